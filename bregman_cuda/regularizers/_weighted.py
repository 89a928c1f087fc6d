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
    searches rho; weighted.h and curved.h say how far they get.

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
    if radial.bends():
        rho = yield from _curve_rho(x, scale, kept, radial, number_like(weight, x).double(), reduced)
    else:
        level, slope = (number_like(value, x) * weight for value in radial.line(x.dtype))
        rho = yield from _line_rho(x, scale, near, level, slope, reduced)
    return x / (1 + rho * kept)


def _line_rho(
    x: Tensor, scale: Tensor, near: Tensor | None, level: Tensor, slope: Tensor, reduced: list[int]
) -> Rounds[Tensor]:
    """rho where phi'(t) = level - slope t: infinite if and only if ||x / scale|| <= level."""
    wide = x.dtype == torch.float64
    least, most = (2.0**-18, 1e150) if wide else (2.0**-8, 1e37)
    rest = 1 - slope * scale
    t = x.new_zeros([1 if d in reduced else n for d, n in enumerate(x.shape)], dtype=torch.float64)
    if near is not None:
        [squares] = yield [near.double().square().sum(reduced, keepdim=True)]
        norms = squares.sqrt().to(x.dtype).double()
        t = torch.where(norms - norms == 0, norms, t)
    alive = settled = torch.zeros_like(t, dtype=torch.bool)
    for _ in range(8):
        before = t.to(x.dtype).double()
        along = before.to(x.dtype) * rest
        q = 1 / _positive(along + level * scale)
        u = x * q
        v = torch.where(before > 0, u * (along * q), x)
        products = [(p.double() * r.double()).sum(reduced, keepdim=True) for p, r in ((u, u), (u, v), (v, v))]
        [(a, b, c)] = yield [torch.stack(products)]
        from_zero = ~(before > 0)
        norm = torch.where(c > 0, c, 1e-46).sqrt()
        root = a.sqrt()
        newton = before * a * (root - 1) / b
        bend = 1.5 * (root - 1) * (a * c / (b * b) - 1)
        after = before + newton
        below = (a == 0) | (b == 0) | (after <= 0)
        far = torch.where(a > most, (before * 1e9).clamp(max=most), a)
        near_root = before + newton / (1 - bend)
        after = torch.where((bend.abs() <= 0.5) & (near_root > 0), near_root, after)
        after = torch.where(a <= most, after, far)
        after = torch.where(below, torch.where(alive, before / 16, 0.0), after)
        short = ~below & ~((after - before).abs() > least * before)
        after = torch.where(from_zero, torch.where(a > 1, norm, a - a), after)
        t = torch.where(settled, t, after)
        settled = settled | torch.where(from_zero, ~(a > 1) | ~(norm <= most), short)
        alive = alive | (from_zero & (a > 1))
    rho = torch.where(level == 0, 0.0, level.double() / t) - slope.double()
    return torch.where(rho < 0, 0.0, rho).to(x.dtype)


def _curve_rho(
    x: Tensor, scale: Tensor, kept: Tensor, radial: Any, weight: Tensor, reduced: list[int]
) -> Rounds[Tensor]:
    """rho of a penalty with a `curve`: a critical point's, zero for x or infinity for zero, whichever is best."""
    most = 1e58 if x.dtype == torch.float64 else 1e22
    wide = scale.double()
    inverse = 1 / torch.where(wide < 1e-300, 1e-300, wide)

    def curve(norms: Tensor) -> list[Tensor]:
        return [weight * part for part in radial.curve(norms, x.dtype)]

    def bounded(squares: Tensor) -> Tensor:
        return torch.where(squares < 1e-300, 1e-300, squares)

    def gained(rho: Tensor, a: Tensor, b: Tensor, value: Tensor) -> Tensor:
        return 0.5 * b + rho.double() * a - value

    def checked(rho: Tensor, a: Tensor) -> Tensor:
        return torch.where(a - a != 0, torch.where(a > 0, 0.0, a), torch.where(rho > most, most, rho)).to(x.dtype)

    a, b = yield from _sums(x, inverse, reduced)
    norms = bounded(a).sqrt()
    value, pull, _ = curve(norms)
    whole = torch.where(pull > 0, -math.inf, gained(torch.zeros_like(norms), a, b, value))
    middle = radial.middle(norms, x.dtype)
    nearer = torch.where(middle > 1e-300, middle, 1e-300)
    rho = checked(torch.where(norms > middle, curve(nearer)[1], pull), a)
    for _ in range(8):
        q = 1 / (1 + rho * kept)
        a, b = yield from _sums(x * q, kept * q, reduced)
        squares = bounded(a)
        _, wanted, bend = curve(squares.sqrt())
        fall = 1 - bend * (b / squares)
        fall = torch.where(fall < 2.0**-10, 2.0**-10, fall)
        after = rho.double() + (wanted - rho.double()) / fall
        after = torch.where(after < wanted / 4, wanted / 4, after)
        after = torch.where(after > wanted * 4, wanted * 4, after)
        rho = checked(after, a)
    q = 1 / (1 + rho * kept)
    a, b = yield from _sums(x * q, inverse, reduced)
    value = curve(bounded(a).sqrt())[0]
    gain = gained(rho, a, b, value)
    keep = whole >= gain
    best = torch.where(keep, torch.zeros_like(rho), rho)
    return torch.where((value > 0) & (torch.where(keep, whole, gain) <= 0), math.inf, best)


def _positive(scale: Tensor) -> Tensor:
    least = 1e-75 if scale.dtype == torch.float64 else 1e-30
    return torch.where(scale < least, least, scale)


def _sums(part: Tensor, other: Tensor, reduced: list[int]) -> Rounds[Tensor]:
    square = part.double().square()
    pair = [square.sum(reduced, keepdim=True), (square * other.double()).sum(reduced, keepdim=True)]
    [total] = yield [torch.stack(pair)]
    return total
