"""The group prox in a diagonal metric: the twin of csrc/math/weighted.h, operation by operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._math import number_like
from ._rounds import Rounds


def weighted_group_prox(x: Tensor, scale: Tensor, level: Any, slope: Any, reduced: list[int]) -> Rounds[Tensor]:
    """argmin_z  phi(||z||) + sum_i (z_i - x_i)^2 / (2 scale_i)  for each group, with phi'(t) = level - slope t.

    The group is zero if and only if ||x / scale|| <= level; otherwise z_i = x_i / (1 + rho scale_i) with
    rho = phi'(t) / t, and t = ||z|| is found by a fixed number of steps, whose errors weighted.h gives.

    Args:
        x: fp32 or fp64 of any shape.
        scale: of x's shape and dtype, >= 0; 0 leaves an element alone.
        level, slope: of phi, the group's weight included; numbers or 0-dim tensors of x's dtype.
        reduced: the dimensions within a group; none if every element is a group.
    """
    if not reduced:
        wider = yield from weighted_group_prox(x.unsqueeze(-1), scale.unsqueeze(-1), level, slope, [x.dim()])
        return wider.squeeze(-1)
    double = x.dtype == torch.float64
    level, slope = (number_like(value, x) for value in (level, slope))

    def sums(part: Tensor, other: Tensor) -> Rounds[Tensor]:
        square = part.double().square()
        pair = [square.sum(reduced, keepdim=True), (square * other.double()).sum(reduced, keepdim=True)]
        [total] = yield [torch.stack(pair)]
        return total

    def bent(scale: Tensor) -> Tensor:
        rest = 1 - slope * scale
        return torch.where(rest < 2.0**-7, 2.0**-7, rest)

    kept = torch.where(scale < (1e-75 if double else 1e-30), 1e-75 if double else 1e-30, scale)
    a, b = yield from sums(x / kept, bent(kept) / kept)
    norm, wide = a.sqrt(), level.double()
    t = a * (norm - wide) / b
    t = torch.where(norm <= wide, 0.0, torch.where(norm - norm != 0, norm, t))
    for _ in range(6 if double else 5):
        rest = bent(scale)
        t = t.to(x.dtype).double()
        q = 1 / (t.to(x.dtype) * rest + level * scale)
        a, b = yield from sums(x * q, q * rest)
        after = t + a * (a.sqrt() - 1) / b
        exponent = _rough_log2(a.float()) * (a / (2 * t * b)).float()
        far = t * _rough_exp2(torch.where(exponent < 60, exponent, 60)).double()
        far = torch.where(far < 1e12 * after, far, 1e12 * after)
        after = torch.where((a > 1) & (far > 4 * after), (after * far).sqrt(), after)
        t = torch.where((t > 0) & (t - t == 0), after, t)
    rho = wide / t - slope.double()
    rho = torch.where(rho < 0, 0.0, rho)
    rho = torch.where((wide == 0) & (t == 0), 0.0, rho).to(x.dtype)
    return x / (1 + rho * kept)


def _rough_log2(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    u = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32) - 1
    return ((bits >> 23) - 127).float() + u * (1.4209 + u * (-0.5773 + u * 0.1564))


def _rough_exp2(x: Tensor) -> Tensor:
    whole = x.to(torch.int32)
    u = x - whole.float()
    return ((whole + 127) << 23).view(torch.float32) * (1 + u * (0.6959 + u * (0.2249 + u * 0.0791)))
