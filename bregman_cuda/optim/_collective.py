"""Prox points that need sums over ranks in the middle of a step.

All such tensors of an optimizer first advance their state, up to the first sums that their prox asks for
(`CutBucket.run`); then a round of one collective per process group serves all of them, until they ask no more
(`finish`): one round for the norms of groups, more for a group's root in a metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import reference
from ..regularizers._rounds import Extent, Rounds, alone
from ._masks import unpack
from ._plan import Bucket, GroupPlan, budgets
from ._rule import Hyper, Rule
from ._shards import ShardExtent, cut_along, is_sharded, local

if TYPE_CHECKING:
    from ._base import SparseOptimizer


class Unit:
    """Tensors in the middle of their step, what they ask for, and what they are sent for it: one unless they share a
    budget."""

    def __init__(self, params: list[Any], rounds: Rounds[None]):
        self.params, self.rounds = params, rounds
        self.asked: list[Tensor] | None = None
        self.send(None)

    def send(self, sums: Any) -> None:
        try:
            self.asked = self.rounds.send(sums)
        except StopIteration:
            self.asked = None


class CutBucket(Bucket):
    """Parameters whose prox needs sums over ranks, in plain torch."""

    def __init__(
        self, rule: Rule, params: list[Tensor], states: list[dict[str, Any]], index: list[int], wholes: list[Any]
    ):
        super().__init__(rule, params, states, index, live=False)
        self.wholes = wholes  # the DTensors, of which `params` are this rank's parts
        self.extents = [ShardExtent(p) if is_sharded(p) else Extent(p.shape) for p in wholes]
        self.units: list[Unit] = []

    def run_host(self, group: dict[str, Any], grads: list[Tensor], h: Hyper, factor: float) -> None:
        h, reg = {name: float(value) for name, value in h.items()}, group["reg"]
        tensors = []
        for param, grad, state in zip(self.params, grads, self.states):
            parts = {slot: local(value) for slot, value in state.items()}
            mask = unpack(parts["mask"], param) if "mask" in parts else None
            tensors.append((param, grad, parts, mask))
        if -1 in budgets(reg, self.params):
            rounds = reference.together_in_rounds(self.rule, reg, h, tensors, factor, self.extents)
            self.units = [Unit(self.wholes, rounds)]
            return
        self.units = [
            Unit([whole], reference.in_rounds(self.rule, reg, h, *tensor, factor, extent))
            for tensor, whole, extent in zip(tensors, self.wholes, self.extents)
        ]


def finish(plans: Sequence[GroupPlan], known: Sequence[Place]) -> None:
    """Sums over the ranks what the plans' cut buckets ask for, until their step is done.

    Args:
        known: of `places`. Every rank has one for every such tensor, with a gradient or without, so that no rank waits
            for another.

    Raises:
        RuntimeError: only some ranks have a gradient of a tensor (on CUDA: an assertion on the device).
    """
    cut = [bucket for plan in plans for bucket in plan.buckets if isinstance(bucket, CutBucket)]
    units = [unit for bucket in cut for unit in bucket.units]
    stepped = {id(p) for unit in units for p in unit.params}
    present = [place for place in known if place.takes_part(id(place.param) in stepped)]
    try:
        for number in range(max((len(place.shapes) for place in present), default=0)):
            asked = {id(p): part for unit in units if unit.asked for p, part in zip(unit.params, unit.asked)}
            _sum([place for place in present if number < len(place.shapes)], number, asked)
            for unit in units:
                if unit.asked:
                    unit.send([asked[id(p)] for p in unit.params])
        if any(unit.asked for unit in units):
            raise RuntimeError("a prox asked for more sums over ranks than that of zeros: their number must not vary")
    finally:
        for bucket in cut:
            bucket.units = []  # the points of a step need not outlive it


class Place:
    """A parameter whose prox sums over ranks: whom with, and the shapes of its sums, round by round."""

    def __init__(self, optimizer: SparseOptimizer, group: dict[str, Any], param: Any, along: tuple[int, ...]):
        self.param, self.every, self.optimizer = param, group["reg"].every, optimizer
        self.groups = [param.device_mesh.get_group(dim) for dim in along]
        self.shapes = _shapes(optimizer._rule(group), group, param)

    def takes_part(self, stepped: bool) -> bool:
        """Whether this step has sums for it: not if it is frozen, and not if the step leaves out the prox."""
        if not (stepped or self.param.requires_grad):
            return False
        steps = int(self.optimizer.state.get(self.param, {}).get("step", 0)) + (not stepped)
        return steps % self.every == 0


def _sum(present: list[Place], number: int, asked: dict[int, Tensor]) -> None:
    """Replaces the parts that are asked for by their sums over ranks, one collective per process group."""
    from torch import distributed as dist

    ids = [id(place.param) for place in present]
    sums = {
        i: asked[i]
        if i in asked
        else torch.zeros(place.shapes[number], dtype=torch.float64, device=local(place.param).device)
        for i, place in zip(ids, present)
    }
    # How many ranks have a gradient, as 0 or 1 on the way in.
    there = {i: sums[i].new_full((1,), float(i in asked)) for i in ids}
    for process_group in dict.fromkeys(group for place in present for group in place.groups):
        mine = [i for i, place in zip(ids, present) if process_group in place.groups]
        pieces = [*(sums[i].reshape(-1) for i in mine), *(there[i] for i in mine)]
        together = torch.cat(pieces)
        dist.all_reduce(together, group=process_group)
        ranks = dist.get_world_size(process_group)
        found = together.split([len(piece) for piece in pieces])
        for i, total, count in zip(mine, found[: len(mine)], found[len(mine) :]):
            sums[i], there[i] = total.view(sums[i].shape), count / ranks
    for some in there.values():  # on all ranks alike: after the last collective none waits for another
        torch._assert_async(
            ((some == 0) | (some == 1)).all(),
            "a parameter whose groups lie on several ranks has a gradient on some of them only; all or none must",
        )
    asked.update((i, total) for i, total in sums.items() if i in asked)


def _shapes(rule: Rule, group: dict[str, Any], param: Any) -> list[torch.Size]:
    """The shapes that a parameter asks for: those of a prox of zeros."""
    zero = torch.zeros_like(local(param.detach()), dtype=reference.state_dtype(param))
    h = {name: float(value) for name, value in rule.hyper(group, 1.0, *(1.0 for _ in rule.counters)).items()}
    scale = torch.zeros_like(zero) if rule.per_element else 1.0
    shapes: list[torch.Size] = []

    def listed(rounds: Rounds[Tensor]) -> Rounds[Tensor]:
        asked = next(rounds)
        while True:
            shapes.extend(part.shape for part in asked)
            try:
                asked = rounds.send((yield asked))
            except StopIteration as end:
                return end.value

    alone(listed(rule.shrink(group["reg"], zero, scale, h, zero, ShardExtent(param))))
    return shapes


def places(optimizer: SparseOptimizer) -> list[Place]:
    """Of every parameter whose prox sums over ranks. The order is the optimizer's, the same on all ranks; so is the
    order of the collectives."""
    key = [
        (
            *(type(reg := group["reg"]), getattr(reg, "groups", 0), getattr(reg, "every", 1)),
            optimizer._rule(group).name,
            *((id(p), p.dtype) for p in group["params"]),
        )
        for group in optimizer.param_groups
    ]
    if optimizer._cut is None or optimizer._cut[0] != key:
        found = [
            Place(optimizer, group, param, along)
            for group in optimizer.param_groups
            for param in group["params"]
            if (along := cut_along(param, group["reg"], optimizer._rule(group)))
        ]
        optimizer._cut = (key, found)
    return optimizer._cut[1]
