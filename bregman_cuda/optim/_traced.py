"""The step as `torch.compile` sees it: one op per bucket that names all it changes, with every scalar in a tensor.

Outside of compilation `_plan.py` runs instead: there the addresses of a plan replace the lists of tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _backend
from ._masks import in_memory_order
from ._plan import budgets, check_together, group_bits, group_weight, in_one_tensor, slots_of
from ._rule import Rule
from ._shards import traced_cut, traced_parts

if TYPE_CHECKING:
    from ._base import SparseOptimizer

_PLANS: OrderedDict[tuple[Any, ...], tuple[Tensor, Tensor]] = OrderedDict()
_MOST_PLANS = 64


@torch.library.custom_op("bregman_cuda::fused_step_", mutates_args=("params", "state"))
def fused_step_(
    params: list[Tensor],
    grads: list[Tensor],
    state: list[Tensor],
    masks: list[Tensor],
    group_dims: list[int],
    weights: list[float],
    budgets: list[int],
    rule: str,
    elementwise: str,
    radial: str,
    scalars: Tensor,
) -> None:
    """One step of a rule on tensors of one device and dtype, in one launch.

    Args:
        params, grads: n tensors each; a gradient of another memory layout than its parameter's is copied.
        state: n times the rule's slots, in the parameters' shapes and layouts.
        masks: n packed masks in memory order, empty for none.
        group_dims, weights, budgets: per tensor, as in the op `plan`.
        rule, elementwise, radial: names; the penalties of elements and of group norms.
        scalars: float64: whether to skip the step, the factor on gradients, the rule's hyper-parameters, two numbers
            per penalty. Kernels read them on the parameters' device; from another they are read here.
    """
    kernels, why = _backend._load(params[0].device.type)
    if kernels is None:
        raise RuntimeError(f"bregman_cuda::fused_step_ needs compiled kernels: {why}")
    kinds = [kernels.rules[rule][0], *(kernels.penalties[name][0] for name in (elementwise, radial))]
    tensors = (*params, *state, *masks)
    layouts = [(p.dtype, p.shape, p.stride()) for p in params]
    key = (*[t.data_ptr() for t in tensors], *layouts, *group_dims, *weights, *budgets, kinds[0])
    plans = _PLANS.get(key)
    if plans is None:
        plan, _ = kernels.plan(params, state, masks, group_dims, weights, budgets, kinds[0])
        plans = _PLANS[key] = (plan, plan.to(params[0].device))
        if len(_PLANS) > _MOST_PLANS:
            _PLANS.popitem(last=False)
    none = torch.empty(0, dtype=torch.int32, device=params[0].device)
    values = [] if scalars.device == params[0].device else scalars.tolist()
    grads = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for p, g in zip(params, grads)]
    kernels.step(*plans, grads, torch.tensor(-1, device="cpu"), none, kinds, values, scalars)


def traced_step(optimizer: SparseOptimizer) -> None:
    """Every group's step through `fused_step_`.

    Raises:
        RuntimeError: fused=False, which has nothing to gain; check_finite, or a GradScaler, whose decisions from the
            values of gradients cannot be compiled in; a prox that sums over ranks.
    """
    if getattr(optimizer, "found_inf", None) is not None or getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError("a compiled step cannot skip on overflow: call scaler.step(optimizer) outside torch.compile")
    for group in optimizer.param_groups:
        optimizer._check_traced(group)
        if group["fused"] is False:
            raise RuntimeError("a compiled step runs kernels: leave fused at None, or step outside torch.compile")
        if why := _backend.why_reference(group["reg"], optimizer._rule(group)):
            raise RuntimeError(f"a compiled step runs kernels, but {why}: step outside torch.compile")
        if group["check_finite"]:
            raise RuntimeError(
                "a compiled step cannot raise for NaN: set check_finite=False, or step outside torch.compile"
            )
    optimizer._init_group()
    for group in optimizer.param_groups:
        rule = optimizer._rule(group)
        buckets: list[list[tuple[Tensor, dict[str, Any]]]] = []
        for param in group["params"]:
            if param.grad is None:
                continue
            if optimizer._sharded and traced_cut(param, group["reg"], rule):
                raise RuntimeError(
                    "a compiled step does not sum over ranks, and shards cut the groups of a parameter (or all of it "
                    "is needed at once): step outside torch.compile"
                )
            state = optimizer.state[param]
            for bucket in buckets:
                first, known = bucket[0]
                if (first.device, first.dtype) == (param.device, param.dtype) and known["step"] is state["step"]:
                    bucket.append((param, state))
                    break
            else:
                buckets.append([(param, state)])
        check_together(group["reg"], group["params"], len(buckets))
        for bucket in buckets:
            params, grads = [param for param, _ in bucket], [param.grad for param, _ in bucket]
            states = [state for _, state in bucket]
            if optimizer._sharded:
                params, grads, states = traced_parts(params, grads, states)
            _step(group, rule, params, grads, states)


def _step(
    group: dict[str, Any], rule: Rule, params: list[Tensor], grads: list[Any], states: list[dict[str, Any]]
) -> None:
    reg = group["reg"]
    step, counters = states[0]["step"], [states[0][name] for name in rule.counters]
    step += 1
    grown = zip(counters, rule.increments(group, step.double()))
    counters = [counter.add_(more) for counter, more in grown]  # used below, or the graph would drop the addition
    h = rule.hyper(group, step.double(), *[counter.double() for counter in counters])
    factor = (-1.0 if group["maximize"] else 1.0) * (1.0 if reg is None else reg.nan_or_one())
    values = _backend.step_scalars(reg, h, factor)
    none = torch.empty(0, dtype=torch.uint8, device=params[0].device)
    fused_step_(
        params,
        grads,
        [state[slot] for state in states for slot in slots_of(rule, params[0])],
        [in_memory_order(s["mask"], p) if "mask" in s else none for s, p in zip(states, params)],
        [group_bits(reg, p) for p in params],
        [group_weight(reg, p) for p in params],
        budgets(reg, params),
        rule.name,
        *_backend.penalty_names(reg),
        in_one_tensor(values, step.device),
    )
