"""The group prox in a diagonal metric: the twin of csrc/math/weighted.h and curved.h, operation by operation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._math import number_like
from ._rounds import Rounds


def weighted_group_prox(
    x: Tensor, scale: Tensor, radial: Any, weight: float, reduced: list[int], near: Tensor | None = None
) -> Rounds[Tensor]:
    """argmin_z  weight phi(||z||) + sum_i (z_i - x_i)^2 / (2 scale_i)  for each group.

    Other than zero, z_i = x_i / (1 + rho scale_i) with rho = weight phi'(t) / t and t = ||z||. A fixed number of steps
    finds rho; weighted.h and curved.h give their errors.

    Args:
        x: fp32 or fp64 of any shape.
        scale: of x's shape and dtype, >= 0; 0 leaves an element alone.
        radial: the penalty phi, which has a `line` or a `curve`.
        reduced: the dimensions within a group; none if every element is a group.
        near: a point near the result, of x's shape and dtype; the search for norms begins at its norms.
    """
    if not reduced:
        wider = yield from weighted_group_prox(
            *(x.unsqueeze(-1), scale.unsqueeze(-1), radial, weight, [x.dim()]),
            near=None if near is None else near.unsqueeze(-1),
        )
        return wider.squeeze(-1)
    kept = _positive(scale)
    if (line := radial.line(x.dtype)) is None:
        rho = yield from _curve_rho(x, scale, kept, radial, number_like(weight, x).double(), reduced)
    else:
        level, slope = (number_like(value, x) * weight for value in line)
        rho = yield from _line_rho(x, scale, near, level, slope, reduced)
    return x / (1 + rho * kept)


def _line_rho(
    x: Tensor, scale: Tensor, near: Tensor | None, level: Tensor, slope: Tensor, reduced: list[int]
) -> Rounds[Tensor]:
    """rho where phi'(t) = level - slope t: infinite if and only if ||x / scale|| <= level."""
    double = x.dtype == torch.float64
    rest = 1 - slope * scale
    rest = torch.where(rest < 2.0**-7, 2.0**-7, rest)
    if near is None:
        t = x.new_zeros([1 if d in reduced else n for d, n in enumerate(x.shape)], dtype=torch.float64)
    else:
        [squares] = yield [near.double().square().sum(reduced, keepdim=True)]
        t = squares.sqrt().to(x.dtype).double()
        t = torch.where(t - t == 0, t, 0.0)
    settled = torch.zeros_like(t, dtype=torch.bool)
    for _ in range(7 if double else 6):
        before = t.to(x.dtype).double()
        q = 1 / _positive(before.to(x.dtype) * rest + level * scale)
        a, b, c = yield from _sums(x * q, q * rest, reduced, 3)
        root = a.sqrt()
        newton = a * (root - 1) / b
        after, bend = before + newton, 1.5 * (root - 1) * (a * c / (b * b) - 1)
        exponent = _rough_log2(a.float()) * (a / (2 * before * b)).float()
        far = before * _rough_exp2(torch.where(exponent < 60, exponent, 60)).double()
        far = torch.where(far < 1e12 * after, far, 1e12 * after)
        jumps = (root > 1) & (before > 0) & (far > 4 * after)
        next_far = torch.where(jumps, (after * far).sqrt(), after)
        next_near = before + newton / (1 - bend)
        after = torch.where(after > 0, torch.where(bend.abs() <= 0.5, next_near, next_far), 0.0)
        after = torch.where((a - a != 0) | (a == 0), a, after)
        t = torch.where(settled, t, after)
        short = ~((after - before).abs() > (2.0**-18 if double else 2.0**-8) * before)
        settled = settled | short | (after - after != 0)
    rho = torch.where(level == 0, 0.0, level.double() / t) - slope.double()
    return torch.where(rho < 0, 0.0, rho).to(x.dtype)


def _curve_rho(
    x: Tensor, scale: Tensor, kept: Tensor, radial: Any, weight: Tensor, reduced: list[int]
) -> Rounds[Tensor]:
    """rho of a penalty with a `curve`: a critical point's that beats zero, or infinity."""
    double = x.dtype == torch.float64

    def curve(squares: Tensor) -> list[Tensor]:
        squares = torch.where(squares < 1e-300, 1e-300, squares)
        return [squares, *(weight * part for part in radial.curve(squares.sqrt(), x.dtype))]

    rho = x.new_zeros([1 if d in reduced else n for d, n in enumerate(x.shape)])
    for _ in range(9):
        q = 1 / (1 + rho * kept)
        a, b = yield from _sums(x * q, kept * q, reduced)
        squares, _, wanted, bend = curve(a)
        fall = 1 - bend * (b / squares)
        fall = torch.where(fall < 2.0**-10, 2.0**-10, fall)
        after = rho.double() + (wanted - rho.double()) / fall
        after = torch.where(after < wanted / 4, wanted / 4, after)
        after = torch.where(after > wanted * 4, wanted * 4, after)
        after = torch.where(after > (1e58 if double else 1e22), 1e58 if double else 1e22, after)
        rho = torch.where(a - a != 0, torch.where(a > 0, 0.0, a), after).to(x.dtype)
    wide = scale.double()
    q = 1 / (1 + rho * kept)
    a, b = yield from _sums(x * q, 1 / torch.where(wide < 1e-300, 1e-300, wide), reduced)
    value = curve(a)[1]
    return torch.where((value > 0) & (value >= 0.5 * b + rho.double() * a), math.inf, rho)


def _positive(scale: Tensor) -> Tensor:
    least = 1e-75 if scale.dtype == torch.float64 else 1e-30
    return torch.where(scale < least, least, scale)


def _sums(part: Tensor, share: Tensor, reduced: list[int], count: int = 2) -> Rounds[Tensor]:
    """Of squares, and of these times powers of `share`."""
    terms = [part.double().square()]
    while len(terms) < count:
        terms.append(terms[-1] * share.double())
    [total] = yield [torch.stack([term.sum(reduced, keepdim=True) for term in terms])]
    return total


def _rough_log2(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    u = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32) - 1
    return ((bits >> 23) - 127).float() + u * (1.4209 + u * (-0.5773 + u * 0.1564))


def _rough_exp2(x: Tensor) -> Tensor:
    whole = x.to(torch.int32)
    u = x - whole.float()
    return ((whole + 127) << 23).view(torch.float32) * (1 + u * (0.6959 + u * (0.2249 + u * 0.0791)))
