"""SCAD and GroupSCAD: the smoothly clipped absolute deviation on entries and on group norms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .._math import clamp, number_like
from ._base import Grouped, Separable


@dataclass
class SCAD(Separable):
    """J(x) = sum phi(x_i); phi has slope lam up to |x| = lam, falling linearly to 0 at a * lam, and is constant beyond.

    Smoothly clipped absolute deviation (Fan and Li 2001). Below step = a - 1 the prox is the soft threshold up to
    (1 + step) * lam, linear up to a * lam and the identity from there. For longer steps it is the better of the soft
    threshold and x. Not convex.

    Args:
        lam: strength, >= 0; 0 is the identity.
        a: > 2, better above 1 + the step size; 3.7 is customary.

    >>> SCAD(1.0, 3.0).prox(torch.tensor([4.0, -2.0, 0.5]), 0.5)
    tensor([ 4.0000, -1.6667,  0.0000])
    """

    lam: float
    a: float
    kernel = "scad"
    bounds = {"lam": (0.0, math.inf), "a": (2.0, math.inf)}
    above = ("a",)
    convex = False

    def parameters(self) -> dict[str, float]:
        return {"lam": self.lam, "a": self.a}

    def curve(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        lam, a = (number_like(value, t, dtype).double() for value in (self.lam, self.a))
        slope, near, end = 1 / (a - 1), t <= lam, a * lam
        pull, falling = torch.where(near, lam, end * slope) / t, torch.where(near, 0.0, slope)
        flat = pull <= falling
        ratio, bend = torch.where(flat, 0.0, pull - falling), torch.where(flat, 0.0, pull)
        reach = torch.where(t < end, t, end)
        past = torch.where(near, 0.0, reach - lam)
        return lam * reach - 0.5 * slope * (past * past), ratio, bend

    def middle(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        lam, a = (number_like(value, t, dtype).double() for value in (self.lam, self.a))
        return 0.5 * ((a + 1) * lam)

    def _phi(self, x: Tensor) -> Tensor:
        m = x.abs().clamp_max(self.a * self.lam)
        return self.lam * m - (m - self.lam).clamp_min(0).square() / (2 * (self.a - 1))

    def _scalar_prox(self, x: Tensor, scale: Tensor) -> Tensor:
        lam, b = (
            number_like(self.lam, scale),
            number_like(self.a, scale),
        )  # in the dtype that kernels use
        a, threshold, slack, both = x.abs(), scale * lam, (b - 1) - scale, b + 1
        soft = x - clamp(x, -threshold, threshold)
        beyond = soft - clamp(soft, -lam, lam)
        convex = slack > 0
        ratio = torch.where(convex, scale, threshold) / torch.where(convex, slack, a)
        shrunk = soft + torch.where(convex, beyond * ratio, 0.0)
        end = torch.where(scale < both, 0.5 * (lam * (both + scale)), lam * both * ratio)
        end = torch.where(convex, lam * b, end)
        return torch.where(a <= end, shrunk, x)  # NaN stays

    def _slope(self, x: Tensor) -> Tensor:
        return x.sign() * ((self.a * self.lam - x.abs()) / (self.a - 1)).clamp(0, self.lam)

    def _distance(self, x: Tensor, grad: Tensor) -> Tensor:
        return torch.where(x == 0, (grad.abs() - self.lam).clamp_min(0), (grad + self._slope(x)).abs())

    def lam_max(self, grad: Tensor) -> float:
        return float(grad.abs().max()) if grad.numel() else 0.0


@dataclass
class GroupSCAD(Grouped):
    """J(x) = sum_G w_G phi(||x_G||_2) with the phi of `SCAD`: a group is free of shrinkage from norm a * lam.

    The weight multiplies phi, so that it acts as a longer step: see `SCAD` with step * w_G.

    With a step size for each element (`ProxAdam`, `RAMDA`, `AveragedProxSGD`) it is the best of zero, x and the point
    that a search from half-way down the bent part finds: the global minimum in all 16,800 groups that were tried, at
    steps below and far beyond a - 1.

    Args:
        lam, a: as in `SCAD`.
        groups, weight: as in `GroupLasso`.
    """

    lam: float
    a: float
    groups: str | tuple[int, ...] = "out"
    weight: str = "sqrt_size"
    bounds = SCAD.bounds
    above = SCAD.above
    convex = False

    @property
    def radial(self) -> Separable:
        return SCAD(self.lam, self.a)
