"""RAMDA's published solver: proximal gradient steps on the subproblem, to a tolerance (Huang and Lee, NeurIPS 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._math import number_like
from ..regularizers import Regularizer


def proximal_gradient(
    reg: Regularizer, z: Tensor, metric: Tensor, alpha: Any, start: Tensor, most: int, rtol: float
) -> Tensor:
    """argmin_x  alpha J(x) + sum_i P_i (x_i - z_i)^2 / 2, approximately, by at most `most` iterations

        y <- prox_{alpha J / M}(y - P (y - z) / M),   M = the largest P of the group,  from y = `start`.

    Elementwise penalties have a group per element: one step is exact, and the same as `solver="exact"` takes.
    Penalties of the whole tensor (`Nuclear`) have one M for all of it. Groups that are zero in the minimum are known
    beforehand (||P z|| <= alpha lam w for the lasso) and left out. It ends, after two iterations or more, once
    (Q_before - Q) / (|Q| + 1) < rtol, where Q is the objective without its constant: the authors' code, with the sums
    over groups as their experiments' code has them.

    On the CPU it returns when it ends; elsewhere, and where alpha is a tensor, nothing is read on the host: `most`
    iterations run, and those after the end change nothing. Both return the same bits.

    Args:
        z, start: fp32 or fp64 of one shape; the minimum of the quadratic, and a guess.
        metric: P > 0, of z's shape and dtype; 0 where z and start are zero and stay so (masks).
        alpha: a number >= 0, or a 0-dim tensor of z's dtype.
    """
    if not z.numel():
        return z
    dims = None if reg.whole else reg.groups_of(z.shape)
    if dims is None and not reg.whole:
        return reg.prox(z, torch.where(metric > 0, 1 / metric, 0) * alpha)
    reduced = [d for d in range(z.ndim) if d not in (dims or ())]
    largest = metric.amax(reduced, keepdim=True) if reduced else metric
    largest = torch.where(largest == 0, 1, largest)  # masked throughout: any weight holds it at zero
    metric = torch.where(metric > 0, metric, largest)  # masked entries: of the whole tensor they would be free
    step = (1 / largest).reshape(()) if reg.whole else 1 / largest
    pull, share = metric * z, metric / largest
    gone = torch.zeros_like(z, dtype=torch.bool)
    if not reg.whole:
        gone = (reg.subdiff_distance(torch.zeros_like(z), -pull / alpha) <= 0).expand_as(z)

    def objective(y: Tensor) -> Tensor:
        wide = y.double()
        return ((0.5 * metric * wide - pull) * wide).sum() + alpha * reg.value(wide)

    y = torch.where(gone, 0, start)
    value, ended = objective(y), torch.zeros((), dtype=torch.bool, device=z.device)
    readable = z.device.type == "cpu" and not torch.is_tensor(alpha)
    for number in range(1, most + 1):
        after = torch.where(gone, 0, reg.prox(y - share * (y - z), step * alpha))
        before, value = value, objective(after)
        y = torch.where(ended, y, after)
        if number > 1:
            ended = ended | ((before - value) / (value.abs() + 1) < rtol)
            if readable and bool(ended):
                break
    weight = alpha * number_like(getattr(reg, "lam", 1.0), z)
    return torch.where(weight == 0, z, y)  # without a penalty the minimum is known
