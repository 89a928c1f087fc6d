"""The step in plain torch: the definition of correct, and the fallback where kernels are missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .optim._rule import Hyper, Rule, State
from .regularizers import Regularizer
from .regularizers._rounds import Extent, Rounds, alone


def state_dtype(param: Tensor) -> torch.dtype:
    """fp64 for fp64 parameters, fp32 for all others: what accumulates never sits in 16 bits."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


@torch.no_grad()
def step_(
    rule: Rule,
    reg: Regularizer | None,
    h: Hyper,
    param: Tensor,
    grad: Tensor,
    state: State,
    mask: Tensor | None = None,
    grad_scale: float = 1.0,
) -> None:
    """One step of `rule` with the prox of `reg` on one tensor, in place.

    Args:
        param: floating tensor of any shape and layout; grad: the same shape and dtype.
        state: the rule's slots, "master" where the rule reads a 16-bit parameter, and "step", the number of steps
            before this one, where `reg` leaves some out.
        mask: bool of param's shape; False keeps the entry at exactly zero, in the state, too.
        grad_scale: factor on the gradient (-1 maximizes).
    """
    alone(in_rounds(rule, reg, h, param, grad, state, mask, grad_scale, Extent(param.shape)))


def in_rounds(
    rule: Rule,
    reg: Regularizer | None,
    h: Hyper,
    param: Tensor,
    grad: Tensor,
    state: State,
    mask: Tensor | None,
    grad_scale: float,
    extent: Extent,
) -> Rounds[None]:
    """`step_` on a part of a tensor."""
    z, scale, before, grad = advance(rule, h, param, grad, state, mask, grad_scale)
    if reg is None or (reg.every > 1 and (int(state["step"]) + 1) % reg.every):  # counted before this step
        q = z
    else:
        q = yield from rule.shrink(reg, z, scale if reg.every == 1 else scale * reg.every, h, before, extent)
    finish(rule, h, q, before, grad, param, state, mask)


@torch.no_grad()
def step_together_(
    rule: Rule,
    reg: Regularizer,
    h: Hyper,
    tensors: list[tuple[Tensor, Tensor, State, Tensor | None]],
    grad_scale: float,
) -> None:
    """`step_` on tensors (parameter, gradient, state, mask) whose groups share a budget."""
    extents = [Extent(param.shape) for param, *_ in tensors]
    alone(together_in_rounds(rule, reg, h, tensors, grad_scale, extents))


def together_in_rounds(
    rule: Rule,
    reg: Regularizer,
    h: Hyper,
    tensors: list[tuple[Tensor, Tensor, State, Tensor | None]],
    grad_scale: float,
    extents: Sequence[Extent],
) -> Rounds[None]:
    """`step_together_` on parts of tensors."""
    halves = [advance(rule, h, *tensor, grad_scale) for tensor in tensors]
    points = yield from rule.shrink_together(
        reg, [z for z, *_ in halves], [scale for _, scale, *_ in halves], h, extents
    )
    for (param, _, state, mask), (_, _, before, grad), q in zip(tensors, halves, points):
        finish(rule, h, q, before, grad, param, state, mask)


def advance(
    rule: Rule, h: Hyper, param: Tensor, grad: Tensor, state: State, mask: Tensor | None, grad_scale: float
) -> tuple[Tensor, Any, Tensor, Tensor]:
    """The step up to the prox: advances the state; the pre-prox point, its prox scale, the parameter as it was, and
    the gradient that counts."""
    master = state.get("master") if rule.reads_param else None
    before = param.to(state_dtype(param)) if master is None else master
    grad = grad.to(before.dtype) * grad_scale
    z, scale = rule.point(grad, before, state, h)
    if mask is not None:
        z = torch.where(mask, z, torch.zeros_like(z))
        if rule.per_element:
            scale = torch.where(mask, scale, 0)  # it may be NaN behind the mask
        _mask_state(rule, state, mask)
    return z, scale, before, grad


def finish(
    rule: Rule,
    h: Hyper,
    q: Tensor,
    before: Tensor,
    grad: Tensor,
    param: Tensor,
    state: State,
    mask: Tensor | None,
) -> None:
    """The step from the prox point `q` on: writes the parameter. `before` and `grad` are those of `advance`."""
    after = rule.finish_late(q, grad, before, state, h) if rule.late else rule.finish(q, before, state, h)
    if mask is not None:
        after = torch.where(mask, after, torch.zeros_like(after))
        _mask_state(rule, state, mask)
    if rule.reads_param and "master" in state:
        state["master"].copy_(after)
    param.copy_(after)


def _mask_state(rule: Rule, state: State, mask: Tensor) -> None:
    for slot in rule.slots:
        state[slot].masked_fill_(~mask, 0)


def count_nonzeros(param: Tensor, reg: Regularizer | None) -> tuple[Tensor, Tensor | None]:
    """Non-zero elements, and non-zero groups where `reg` has groups: 0-dim int64 tensors on the parameter's device."""
    alive = param.detach() != 0
    dims = None if reg is None else reg.groups_of(param.shape)
    if dims is None:
        return alive.sum(), None
    reduced = [d for d in range(param.ndim) if d not in dims]
    groups = alive.any(dim=reduced) if reduced and param.numel() else alive
    return alive.sum(), groups.sum()
