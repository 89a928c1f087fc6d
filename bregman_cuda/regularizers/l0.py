"""L0 and GroupL0: how many entries, or groups, are not zero."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._math import number_like
from ._base import Grouped, Separable


@dataclass
class L0(Separable):
    """J(x) = lam * (number of non-zero x_i): whatever survives is not shrunk.

    The prox is the hard threshold at sqrt(2 * step * lam). At zero every gradient is in the subdifferential, so that
    zero is a critical point for every lam > 0 and `lam_max` is 0. Not convex.

    Args:
        lam: strength, >= 0; 0 is the identity.

    >>> L0(0.5).prox(torch.tensor([1.5, -1.0, 0.2]), 1.0)
    tensor([1.5000, 0.0000, 0.0000])
    """

    lam: float
    kernel = "l0"
    convex = False

    def parameters(self) -> dict[str, float]:
        return {"lam": self.lam}

    def curve(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        flat = torch.zeros_like(t)
        return number_like(self.lam, t, dtype).double() + flat, flat, flat

    def _phi(self, x: Tensor) -> Tensor:
        return torch.where(x == 0, 0 * x, self.lam)  # in torch's graph, with a gradient of zero

    def _scalar_prox(self, x: Tensor, scale: Tensor) -> Tensor:
        a = x.abs()  # x^2 <= 2 scale lam, without squares that overflow; NaN stays
        return torch.where(a <= 2 * (scale * self.lam) / a, 0.0, x)

    def _slope(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def _distance(self, x: Tensor, grad: Tensor) -> Tensor:
        return torch.where((x == 0) & (self.lam > 0), 0.0, grad.abs())

    def lam_max(self, grad: Tensor) -> float:
        return 0.0


@dataclass
class GroupL0(Grouped):
    """J(x) = lam * sum of w_G over the groups that are not zero.

    With a step size for each element (`ProxAdam`, `RAMDA`, `AveragedProxSGD`), a group stays as it is if
    sum x_i^2 / (2 step_i) > lam w_G.

    Args:
        lam: strength, >= 0.
        groups, weight: as in `GroupLasso`.

    >>> GroupL0(2.0, "out", "none").prox(torch.tensor([[3.0, 4.0], [0.6, 0.8]]), 1.0)
    tensor([[3., 4.],
            [0., 0.]])
    """

    lam: float
    groups: str | tuple[int, ...] = "out"
    weight: str = "sqrt_size"
    convex = False

    @property
    def radial(self) -> Separable:
        return L0(self.lam)
