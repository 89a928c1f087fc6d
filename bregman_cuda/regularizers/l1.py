"""L1: soft threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._math import clamp
from ._base import Separable


@dataclass
class L1(Separable):
    """J(x) = lam * sum |x_i|, the sparsity-promoting norm (Bungert et al. 2022, eq. 1.4).

    Args:
        lam: strength, >= 0; 0 is the identity.

    >>> L1(0.5).prox(torch.tensor([2.0, -0.2]), 1.0)
    tensor([1.5000, 0.0000])
    """

    lam: float
    kernel = "l1"
    homogeneous = True

    def parameters(self) -> dict[str, float]:
        return {"lam": self.lam}

    def line(self, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
        return self.lam, 0.0

    def _phi(self, x: Tensor) -> Tensor:
        return self.lam * x.abs()

    def _scalar_prox(self, x: Tensor, scale: Tensor) -> Tensor:
        threshold = scale * self.lam
        return x - clamp(x, -threshold, threshold)  # identity minus projection: NaN stays NaN

    def _slope(self, x: Tensor) -> Tensor:
        return self.lam * x.sign()

    def _distance(self, x: Tensor, grad: Tensor) -> Tensor:
        return torch.where(x == 0, (grad.abs() - self.lam).clamp_min(0), (grad + self._slope(x)).abs())

    def lam_max(self, grad: Tensor) -> float:
        return float(grad.abs().max()) if grad.numel() else 0.0
