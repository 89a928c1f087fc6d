"""Groups that lie on several ranks: their squares are summed over the ranks in the middle of a step.

All such tensors of an optimizer first advance their state, up to the prox of groups (`CutBucket.run`); then one
collective per process group sums the squares of all of them, and every tensor finishes its step (`finish`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import reference
from .._math import number_like
from ._masks import unpack
from ._plan import Bucket, GroupPlan
from ._rule import Hyper, Rule
from ._shards import cut_along, local

if TYPE_CHECKING:
    from ._base import SparseOptimizer


class CutBucket(Bucket):
    """Parameters whose groups are cut by shard boundaries, in plain torch: the halves of `reference.step_`."""

    def __init__(
        self, rule: Rule, params: list[Tensor], states: list[dict[str, Any]], index: list[int], wholes: list[Any]
    ):
        super().__init__(rule, params, states, index, live=False)
        self.wholes = wholes  # the DTensors, of which `params` are this rank's parts
        self.halfway: list[tuple[Tensor, Tensor, Callable[[Tensor], None]]] = []

    def run_host(self, group: dict[str, Any], grads: list[Tensor], h: Hyper, factor: float) -> None:
        h = {name: float(value) for name, value in h.items()}
        self.halfway = [
            (whole, *self._advance(group["reg"], h, whole, param, grad, state, factor))
            for whole, param, grad, state in zip(self.wholes, self.params, grads, self.states)
        ]

    def _advance(
        self, reg: Any, h: Any, whole: Any, param: Tensor, grad: Tensor, state: dict[str, Any], grad_scale: float
    ) -> tuple[Tensor, Callable[[Tensor], None]]:
        """The squares of this rank's pieces of groups, and what takes those of whole groups to finish the step."""
        rule, parts = self.rule, {slot: local(value) for slot, value in state.items()}
        mask = unpack(parts["mask"], param) if "mask" in parts else None
        z, step, before, grad = reference.advance(rule, h, param, grad, parts, mask, grad_scale)
        scale = number_like(step, z)
        x = reg._prox_of_elements(z, scale)

        def finish(squares: Tensor) -> None:
            norms = squares.sqrt().to(x.dtype)
            q = reg._prox_of_groups(x, norms, scale * reg.group_weight(whole.shape)) if x.numel() else x
            reference.finish(rule, h, q, before, grad, param, parts, mask)

        return reg._group_squares(x), finish


def finish(optimizer: SparseOptimizer, plans: Sequence[GroupPlan]) -> None:
    """Sums what the plans' cut buckets left halfway over the ranks, and finishes their step.

    Every rank sums a place for every such tensor, with a gradient or without, so that no rank waits for another.

    Raises:
        RuntimeError: only some ranks have a gradient of a tensor (on CUDA: an assertion on the device).
    """
    places = _places(optimizer)
    if not places:
        return
    from torch import distributed as dist

    halfway = {
        id(whole): (squares, then)
        for plan in plans
        for bucket in plan.buckets
        if isinstance(bucket, CutBucket)
        for whole, squares, then in bucket.halfway
    }
    sums: list[Tensor] = []
    for whole, shape, _ in places:
        absent = torch.zeros(shape, dtype=torch.float64, device=local(whole).device)
        sums.append(halfway[id(whole)][0] if id(whole) in halfway else absent)
    # How many ranks have a gradient, as 0 or 1 on the way in.
    there = [s.new_full((1,), float(id(whole) in halfway)) for (whole, _, _), s in zip(places, sums)]
    for process_group in dict.fromkeys(group for _, _, groups in places for group in groups):
        mine = [i for i, (_, _, groups) in enumerate(places) if process_group in groups]
        pieces = [*(sums[i].reshape(-1) for i in mine), *(there[i] for i in mine)]
        together = torch.cat(pieces)
        dist.all_reduce(together, group=process_group)
        ranks = dist.get_world_size(process_group)
        for i, total, count in zip(mine, *_halves(together.split([len(p) for p in pieces]))):
            sums[i], there[i] = total.view(sums[i].shape), count / ranks
        some = torch.cat([there[i] for i in mine])
        torch._assert_async(
            ((some == 0) | (some == 1)).all(),
            "a parameter whose groups lie on several ranks has a gradient on some of them only; all or none must",
        )
    for (whole, _, _), total in zip(places, sums):
        if id(whole) in halfway:
            halfway[id(whole)][1](total)
    for plan in plans:
        for bucket in plan.buckets:
            if isinstance(bucket, CutBucket):
                bucket.halfway = []  # the points of a step need not outlive it


def _halves(pieces: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]


def _places(optimizer: SparseOptimizer) -> list[Any]:
    """Of every parameter whose groups are cut: itself, the shape of its sums here, and whom to sum with.

    The order is the optimizer's, the same on all ranks; so is the order of the collectives."""
    regs = [group["reg"] for group in optimizer.param_groups]
    key = [
        (type(reg), getattr(reg, "groups", None), *map(id, group["params"]))
        for reg, group in zip(regs, optimizer.param_groups)
    ]
    if optimizer._cut is None or optimizer._cut[0] != key:
        places = []
        for reg, group in zip(regs, optimizer.param_groups):
            for param in group["params"]:
                if along := cut_along(param, reg):
                    dims, part = reg.groups_of(param.shape), local(param)
                    shape = [size if d in dims else 1 for d, size in enumerate(part.shape)]
                    places.append((param, shape, [param.device_mesh.get_group(i) for i in along]))
        optimizer._cut = (key, places)
    return optimizer._cut[1]
