"""The hot path: a plan is built once per set of tensors and then runs with the gradients alone.

A `GroupPlan` serves one parameter group and one set of active parameters. It splits them into buckets of the same
device, dtype and step count; a bucket is one kernel launch (one op call), or the reference for what kernels do
not serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _backend, reference
from ._masks import in_memory_order, unpack
from ._rule import Rule
from ._shards import cut_along, local

if TYPE_CHECKING:
    from ._base import SparseOptimizer

Counts = list[tuple[Tensor, Tensor, "Tensor | None"]]  # parameter, non-zero elements, non-zero groups


class Bucket:
    """Parameters of one device, dtype and step count."""

    def __init__(self, rule: Rule, params: list[Tensor], states: list[dict[str, Any]], index: list[int]):
        self.rule, self.params, self.states, self.index = rule, params, states, index
        self.step = int(states[0]["step"])
        # One shared counter, new for this bucket: tensors that sit out a step keep the old one.
        self.step_tensor = torch.tensor(float(self.step), dtype=torch.float64)
        for state in states:
            state["step"] = self.step_tensor

    def advance(self) -> int:
        self.step += 1
        self.step_tensor.fill_(float(self.step))
        return self.step

    def run(self, group: dict[str, Any], grads: list[Tensor], grad_scale: float) -> None:
        raise NotImplementedError

    def counts(self) -> Counts | None:
        """Non-zeros as counted by the last step; None if it did not count."""
        return None


class ReferenceBucket(Bucket):
    """The step in plain torch."""

    counted: Counts | None = None

    def run(self, group: dict[str, Any], grads: list[Tensor], grad_scale: float) -> None:
        h, reg = self.rule.hyper(group, self.advance()), group["reg"]
        for param, grad, state in zip(self.params, grads, self.states):
            parts = {slot: local(value) for slot, value in state.items()}
            mask = unpack(parts["mask"], param) if "mask" in parts else None
            reference.step_(self.rule, reg, h, param, grad, parts, mask, grad_scale)
        count = group["count_nonzeros"]
        self.counted = [(p, *reference.count_nonzeros(p, reg)) for p in self.params] if count else None

    def counts(self) -> Counts | None:
        return self.counted


class FusedBucket(Bucket):
    """The step by kernels: one op call, one launch, no host synchronisation."""

    def __init__(
        self,
        kernels: _backend.Kernels,
        reg: Any,
        rule: Rule,
        params: list[Tensor],
        states: list[dict[str, Any]],
        index: list[int],
    ):
        super().__init__(rule, params, states, index)
        self.kernels = kernels
        self.slots = slots_of(rule, params[0])
        flat_state = [local(state[slot]) for state in states for slot in self.slots]
        none = torch.empty(0, dtype=torch.uint8, device=params[0].device)
        masks = [in_memory_order(local(s["mask"]), p) if "mask" in s else none for s, p in zip(states, params)]
        self.plan = kernels.plan(
            params,
            flat_state,
            masks,
            [group_bits(reg, p) for p in params],
            [group_weight(reg, p) for p in params],
            kernels.rule_id(rule),
        )
        self.kept = (flat_state, masks)  # the plan holds their addresses
        self.grouped = reg is not None and reg.radial is not None
        self.device_plan = self.plan.to(params[0].device)
        self.item_tensor = kernels.plan_items(self.plan)
        self.none = torch.empty(0, dtype=torch.int32, device=params[0].device)
        self.item_counts: Tensor | None = None

    def run(self, group: dict[str, Any], grads: list[Tensor], grad_scale: float) -> None:
        h, reg, kernels = self.rule.hyper(group, self.step + 1), group["reg"], self.kernels
        kinds, scalars = kernels.encode(self.rule, reg, h, grad_scale)
        if not group["count_nonzeros"]:
            self.item_counts = None  # what an earlier step counted is no longer true
        elif self.item_counts is None:
            size = (len(self.item_tensor), 2)
            self.item_counts = torch.zeros(size, dtype=torch.int32, device=self.params[0].device)
        args = (self.plan, self.device_plan)
        tail = (self.none if self.item_counts is None else self.item_counts, kinds, scalars)
        while (odd := kernels.step(*args, grads, *tail)) >= 0:  # nothing changed: this gradient is laid out otherwise
            if grads[odd].stride() == self.params[odd].stride():
                raise RuntimeError(f"the memory layout of parameter {self.index[odd]} changed since its plan was made")
            grads = list(grads)
            grads[odd] = torch.empty_like(self.params[odd]).copy_(grads[odd])
        self.advance()
        torch.autograd.graph.increment_version(self.params)

    def counts(self) -> Counts | None:
        if self.item_counts is None:
            return None
        table = torch.zeros(len(self.params), 2, dtype=torch.int64, device=self.item_counts.device)
        table.index_add_(0, self.item_tensor.to(table.device), self.item_counts.long())
        return [(p, row[0], row[1] if self.grouped else None) for p, row in zip(self.params, table)]


def slots_of(rule: Rule, param: Tensor) -> tuple[str, ...]:
    """State tensors of the parameter's shape: the rule's, and the fp32 master of a 16-bit parameter that it reads."""
    wants_master = rule.reads_param and param.dtype in (torch.bfloat16, torch.float16)
    return rule.slots + (("master",) if wants_master else ())


def group_bits(reg: Any, param: Tensor) -> int:
    """The dims that identify a group as bits, or -1 for a regularizer without groups."""
    if reg is None or reg.radial is None:
        return -1
    return sum(1 << d for d in reg.groups_of(param.shape))


def group_weight(reg: Any, param: Tensor) -> float:
    """The weight of each of a parameter's groups."""
    return 1.0 if reg is None or not param.numel() else float(reg.group_weight(param.shape))


class GroupPlan:
    """The buckets of one parameter group for one set of active parameters."""

    def __init__(self, optimizer: SparseOptimizer, group: dict[str, Any], active: Sequence[int]):
        rule, reg = optimizer._rule(group), group["reg"]
        params: list[Tensor] = group["params"]
        self.pointers = [local(params[i]).data_ptr() for i in active]
        self.buckets: list[Bucket] = []
        split: dict[tuple[Any, ...], list[int]] = {}
        for position, i in enumerate(active):
            state = optimizer._init_state(params[i], group, rule)
            cut = bool(cut_along(params[i], reg))
            kernels, why = (
                (None, "shards cut its groups, whose norms need a sum over the ranks in mid-step")
                if cut
                else _backend.kernels_for(local(params[i]), group["fused"], rule, reg)
            )
            if group["fused"] and kernels is None:
                raise RuntimeError(f"fused=True, but {optimizer._describe(group, i)} cannot use kernels: {why}")
            key = (params[i].device, params[i].dtype, int(state["step"]), cut, kernels)
            split.setdefault(key, []).append(position)
        for (*_, cut, kernels), positions in split.items():
            states = [optimizer.state[params[active[k]]] for k in positions]
            chosen = [local(params[active[k]]) for k in positions]
            if cut:
                from ._collective import CutBucket

                self.buckets.append(CutBucket(rule, chosen, states, positions, [params[active[k]] for k in positions]))
            elif kernels is None:
                self.buckets.append(ReferenceBucket(rule, chosen, states, positions))
            else:
                self.buckets.append(FusedBucket(kernels, reg, rule, chosen, states, positions))

    def is_current(self) -> bool:
        """Whether the counters are where this plan left them: a compiled step moves them on without it."""
        return all(b.states[0]["step"] is b.step_tensor and int(b.step_tensor) == b.step for b in self.buckets)

    def run(self, group: dict[str, Any], grads: list[Tensor], grad_scale: float) -> None:
        if len(self.buckets) == 1:
            self.buckets[0].run(group, grads, grad_scale)
            return
        for bucket in self.buckets:
            bucket.run(group, [grads[i] for i in bucket.index], grad_scale)
