"""The hot path: a plan is built once per set of tensors and then runs with the gradients alone.

A `GroupPlan` serves one parameter group and one set of active parameters. It splits them into buckets of the same
device, dtype and step count; a bucket is one kernel launch (one op call), or the reference for what kernels do
not serve.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _backend, reference
from ._masks import in_memory_order, unpack
from ._rule import Hyper, Rule
from ._shards import cut_along, is_elsewhere, local

if TYPE_CHECKING:
    from ._base import SparseOptimizer

Counts = list[tuple[Tensor, Tensor, "Tensor | None"]]  # parameter, non-zero elements, non-zero groups


class Amp:
    """What a GradScaler asks of a step, and the sign of the gradient."""

    def __init__(self, sign: float, grad_scale: Tensor | None = None, found_inf: Tensor | None = None):
        self.sign, self.grad_scale, self.found_inf = sign, grad_scale, found_inf

    def on_host(self) -> tuple[float, bool]:
        """The factor on the gradient, and whether to skip the step."""
        factor = self.sign if self.grad_scale is None else self.sign / float(self.grad_scale)
        return factor, self.found_inf is not None and bool(self.found_inf)

    def on_device(self, device: torch.device) -> tuple[Any, Any]:
        """The same without reading anything."""
        factor: Any = self.sign
        if self.grad_scale is not None:
            factor = self.sign / self.grad_scale.to(device, torch.float64).reshape(())
        return factor, 0.0 if self.found_inf is None else self.found_inf.to(device, torch.float64).reshape(())


class Bucket:
    """Parameters of one device, dtype and step count (and of the same value of the rule's other counters).

    Those that share a prox are in one bucket whatever their step counts, which the rules that serve them do not read.

    A bucket is `live` where the scalars of its steps are device memory that kernels read: under `capturable`, and
    from the first overflow flag on that lies on a device. Nothing is read back then.
    """

    def __init__(self, rule: Rule, params: list[Tensor], states: list[dict[str, Any]], index: list[int], live: bool):
        self.rule, self.params, self.states, self.index, self.live = rule, params, states, index, live
        self.dtype = params[0].dtype
        self.step, *self.counters = counter_values(rule, states[0])
        # Shared counters, new for this bucket: tensors that sit out a step keep the old ones.
        where = params[0].device if live else "cpu"
        values = (self.step, *self.counters)
        self.tensors = [torch.full((), value, dtype=torch.float64, device=where) for value in values]
        self.offsets = [float(state["step"]) - self.step for state in states]
        self._share()

    def _share(self) -> None:
        late: dict[float, Tensor] = {}
        for state, offset in zip(self.states, self.offsets):
            state.update(zip(("step", *self.rule.counters), self.tensors))
            if offset:
                state["step"] = late.setdefault(offset, self.tensors[0] + offset)
        self.late = list(late.items())

    def _next(self, group: dict[str, Any], step: Any, *counters: Any) -> tuple[Any, ...]:
        """Number and counters of the next step."""
        more = self.rule.increments(group, step + 1)
        return step + 1, *(known + one for known, one in zip(counters, more))

    def of(self, grads: list[Tensor]) -> list[Tensor]:
        """Those of this bucket's parameters."""
        return grads if len(grads) == len(self.index) else [grads[i] for i in self.index]

    def run(self, group: dict[str, Any], grads: list[Tensor], amp: Amp) -> None:
        """One step; nothing at all, the step count included, if `amp` says so."""
        if not self.live and amp.found_inf is not None and amp.found_inf.device.type != "cpu":
            self.live, self.tensors = True, [tensor.to(self.params[0].device) for tensor in self.tensors]
            self._share()
        known = 1.0 if group["reg"] is None else group["reg"].nan_or_one()
        if self.live:
            factor, skip = amp.on_device(self.params[0].device)
            after = self._next(group, *self.tensors)
            self.run_live(group, grads, self.rule.hyper(group, *after), factor * known, skip)
            for tensor, value in zip(self.tensors, after):
                tensor.copy_(torch.where(skip != 0, tensor, value) if torch.is_tensor(skip) else value)
            for offset, tensor in self.late:
                tensor.copy_(self.tensors[0] + offset)
            return
        factor, skip = amp.on_host()
        if not skip:
            after = tuple(map(float, self._next(group, self.step, *self.counters)))
            self.run_host(group, grads, self.rule.hyper(group, *after), factor * known)
            self.step, *self.counters = after
            for tensor, value in zip(self.tensors, after):
                tensor.fill_(value)
            for offset, tensor in self.late:
                tensor.fill_(self.step + offset)

    def run_host(self, group: dict[str, Any], grads: list[Tensor], h: Hyper, factor: float) -> None:
        raise NotImplementedError

    def run_live(self, group: dict[str, Any], grads: list[Tensor], h: Hyper, factor: Any, skip: Any) -> None:
        raise NotImplementedError

    def is_current(self) -> bool:
        """Whether the counter is where this bucket left it: a compiled step moves it on without it.

        And whether the dtype is: tensors without elements have no address that would change with it.
        """
        if self.states[0]["step"] is not self.tensors[0] or self.params[0].dtype != self.dtype:
            return False
        return self.live or float(self.tensors[0]) == self.step

    def counts(self) -> Counts | None:
        """Non-zeros as counted by the last step; None if it did not count."""
        return None


class ReferenceBucket(Bucket):
    """The step in plain torch."""

    counted: Counts | None = None

    def run_host(self, group: dict[str, Any], grads: list[Tensor], h: Hyper, factor: float) -> None:
        self._run(group, grads, {name: float(value) for name, value in h.items()}, factor)
        self._count(group)

    def run_live(self, group: dict[str, Any], grads: list[Tensor], h: Hyper, factor: Any, skip: Any) -> None:
        wide = reference.state_dtype(self.params[0])
        h = {name: value.to(wide) if torch.is_tensor(value) else value for name, value in h.items()}
        factor = factor.to(wide) if torch.is_tensor(factor) else factor
        changing = [
            *self.params,
            *(local(s[slot]) for s in self.states for slot in slots_of(self.rule, self.params[0])),
        ]
        before = [tensor.detach().clone() for tensor in changing] if torch.is_tensor(skip) else []
        self._run(group, grads, h, factor)
        for tensor, old in zip(changing, before):
            tensor.copy_(torch.where(skip != 0, old, tensor))
        self._count(group)

    def _run(self, group: dict[str, Any], grads: list[Tensor], h: Hyper, factor: Any) -> None:
        parts = [{slot: local(value) for slot, value in state.items()} for state in self.states]
        masks = [unpack(part["mask"], p) if "mask" in part else None for p, part in zip(self.params, parts)]
        tensors = list(zip(self.params, grads, parts, masks))
        if -1 in budgets(group["reg"], self.params):
            reference.step_together_(self.rule, group["reg"], h, tensors, factor)
            return
        for tensor in tensors:
            reference.step_(self.rule, group["reg"], h, *tensor, factor)

    def _count(self, group: dict[str, Any]) -> None:
        count, reg = group["count_nonzeros"], group["reg"]
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
        live: bool,
    ):
        super().__init__(rule, params, states, index, live)
        self.kernels = kernels
        self.slots = slots_of(rule, params[0])
        flat_state = [local(state[slot]) for state in states for slot in self.slots]
        none = torch.empty(0, dtype=torch.uint8, device=params[0].device)
        masks = [in_memory_order(local(s["mask"]), p) if "mask" in s else none for s, p in zip(states, params)]
        self.plan, self.item_tensor = kernels.plan(
            params,
            flat_state,
            masks,
            [group_bits(reg, p) for p in params],
            [group_weight(reg, p) for p in params],
            budgets(reg, params),
            kernels.rule_id(rule),
        )
        self.kept = (flat_state, masks)  # the plan holds their addresses
        self.grouped = any(group_bits(reg, p) >= 0 for p in params)
        self.device_plan = self.plan.to(params[0].device)
        self.odd = array("q", [-1])  # read without an op of torch, which could be a wait for a device
        self.odd_tensor = torch.frombuffer(self.odd, dtype=torch.int64)
        self.none = torch.empty(0, dtype=torch.int32, device=params[0].device)
        self.item_counts: Tensor | None = None

    def run_host(self, group: dict[str, Any], grads: list[Tensor], h: Hyper, factor: float) -> None:
        scalars = _backend.step_scalars(group["reg"], h, factor)
        self._run(group, grads, list(map(float, scalars)), self.none)

    def run_live(self, group: dict[str, Any], grads: list[Tensor], h: Hyper, factor: Any, skip: Any) -> None:
        scalars = _backend.step_scalars(group["reg"], h, factor, skip)
        self._run(group, grads, [], in_one_tensor(scalars, self.params[0].device))

    def _run(self, group: dict[str, Any], grads: list[Tensor], scalars: list[float], live: Tensor) -> None:
        if not group["count_nonzeros"]:
            self.item_counts = None  # what an earlier step counted is no longer true
        elif self.item_counts is None:
            size = (len(self.item_tensor), 2)
            # Negative: a first step that is skipped counts nothing.
            self.item_counts = torch.full(size, -1, dtype=torch.int32, device=self.params[0].device)
        counts = self.none if self.item_counts is None else self.item_counts
        tail = (self.odd_tensor, counts, self.kernels.kinds(self.rule, group["reg"]), scalars, live)
        self.kernels.step(self.plan, self.device_plan, grads, *tail)
        # An index means that nothing changed yet: this gradient is laid out otherwise than its parameter.
        while (odd := self.odd[0]) >= 0:
            if grads[odd].stride() == self.params[odd].stride():
                raise RuntimeError(f"the memory layout of parameter {self.index[odd]} changed since its plan was made")
            grads = list(grads)
            grads[odd] = torch.empty_like(self.params[odd]).copy_(grads[odd])
            self.kernels.step(self.plan, self.device_plan, grads, *tail)
        torch.autograd.graph.increment_version(self.params)

    def counts(self) -> Counts | None:
        if self.item_counts is None or bool((self.item_counts < 0).any()):
            return None
        table = torch.zeros(len(self.params), 2, dtype=torch.int64, device=self.item_counts.device)
        table.index_add_(0, self.item_tensor.to(table.device), self.item_counts.long())
        return [(p, row[0], row[1] if self.grouped else None) for p, row in zip(self.params, table)]


def in_one_tensor(scalars: list[Any], device: torch.device) -> Tensor:
    """Numbers and 0-dim tensors as one float64 tensor, without a copy from the host: it can be captured in a graph."""
    scalars = [float(v) if torch.is_tensor(v) and v.device.type == "cpu" != device.type else v for v in scalars]
    return torch.stack(
        [
            value.to(device, torch.float64).reshape(())
            if torch.is_tensor(value)
            else torch.full((), value, dtype=torch.float64, device=device)
            for value in scalars
        ]
    )


def counter_values(rule: Rule, state: dict[str, Any]) -> tuple[float, ...]:
    """The step count and the rule's other counters."""
    return tuple(float(state[name]) for name in ("step", *rule.counters))


def slots_of(rule: Rule, param: Tensor) -> tuple[str, ...]:
    """State tensors of the parameter's shape: the rule's, and the fp32 master of a 16-bit parameter that it reads."""
    wants_master = rule.reads_param and param.dtype in (torch.bfloat16, torch.float16)
    return rule.slots + (("master",) if wants_master else ())


def group_bits(reg: Any, param: Tensor) -> int:
    """The dims that identify a group as bits, or -1 for a regularizer without groups."""
    dims = None if reg is None else reg.groups_of(param.shape)
    return -1 if dims is None else sum(1 << d for d in dims)


def group_weight(reg: Any, param: Tensor) -> float:
    """The weight of each of a parameter's groups."""
    return 1.0 if reg is None or not param.numel() else float(reg.group_weight(param.shape))


def budgets(reg: Any, params: Sequence[Any]) -> list[int]:
    """See `Regularizer.budgets`."""
    known: list[int] = [0] * len(params) if reg is None else reg.budgets(len(params))
    return known


def check_together(reg: Any, params: Sequence[Any], parts: int) -> None:
    """Refuse tensors that share a budget and are stepped in several parts.

    Raises:
        ValueError: there are several parts.
    """
    if parts > 1 and -1 in budgets(reg, params):
        raise ValueError(
            f"{type(reg).__name__}: k is shared over tensors that cannot step together: they differ in dtype, device "
            "or ranks (or, in a compiled step, in the number of steps taken); give them parameter groups and a k of "
            "their own"
        )


def pointers(params: Sequence[Any], sharded: bool) -> list[Any]:
    """Where parameters lie; of a part without elements, which lies nowhere, the dtype tells when it has changed."""
    if not sharded:
        return [p.data_ptr() for p in params]
    return [(local(p).data_ptr(), p.dtype) for p in params]


class GroupPlan:
    """The buckets of one parameter group for one set of active parameters."""

    def __init__(self, optimizer: SparseOptimizer, group: dict[str, Any], active: Sequence[int]):
        rule, reg = optimizer._rule(group), group["reg"]
        params: list[Tensor] = group["params"]
        self.pointers = pointers([params[i] for i in active], optimizer._sharded)
        self.buckets: list[Bucket] = []
        self.fits = False  # whether gradients were compared with the parameters
        split: dict[tuple[Any, ...], list[int]] = {}
        for position, i in enumerate(active):
            if is_elsewhere(params[i]):
                continue
            state = optimizer._init_state(params[i], group, rule)
            cut = bool(cut_along(params[i], reg, rule))
            kernels, why = (
                (None, "its shards cut groups, or all of it is needed at once: sums over ranks in mid-step")
                if cut
                else _backend.kernels_for(local(params[i]), group["fused"], rule, reg)
            )
            if group["fused"] and kernels is None:
                raise RuntimeError(f"fused=True, but {optimizer._describe(group, i)} cannot use kernels: {why}")
            live = group["capturable"] or state["step"].device.type != "cpu"
            key = (params[i].device, params[i].dtype, *counter_values(rule, state), live, cut, kernels)
            split.setdefault(key, []).append(position)
        if -1 in budgets(reg, params) and len(split) > 1:  # one prox, one bucket: in plain torch where any needs that
            served = {key[-1] for key in split}
            live, cut = (any(key[place] for key in split) for place in (-3, -2))
            split = {(live, cut, None if None in served else served.pop()): sorted(chain(*split.values()))}
        self.ends = [(param, optimizer.state.get(param)) for param in (params[active[0]], params[active[-1]])]
        for (*_, live, cut, kernels), positions in split.items():
            states = [optimizer.state[params[active[k]]] for k in positions]
            chosen = [local(params[active[k]]) for k in positions]
            if cut:
                from ._collective import CutBucket

                self.buckets.append(CutBucket(rule, chosen, states, positions, [params[active[k]] for k in positions]))
            elif kernels is None:
                self.buckets.append(ReferenceBucket(rule, chosen, states, positions, live))
            else:
                self.buckets.append(FusedBucket(kernels, reg, rule, chosen, states, positions, live))

    def checks_first(self) -> bool:
        """Whether its step looks at all gradients before it changes anything: there is one op, and torch runs it for
        strided tensors alone."""
        return len(self.buckets) == 1 and isinstance(self.buckets[0], FusedBucket)

    def is_current(self, state: dict[Any, Any]) -> bool:
        """See `Bucket.is_current`; and whether the optimizer still has the states of its first and last tensor, which
        somebody may have cleared. To look for single tensors that were exchanged in them, too, would cost 13 us (one
        per parameter) to 22 us (three) of the host's 270 us for 500 tensors (2026-11-27, one core, shared machine)."""
        same = all(state.get(param) is known for param, known in self.ends)
        return same and all(bucket.is_current() for bucket in self.buckets)

    def run(self, group: dict[str, Any], grads: list[Tensor], amp: Amp) -> None:
        for bucket in self.buckets:
            bucket.run(group, bucket.of(grads), amp)
