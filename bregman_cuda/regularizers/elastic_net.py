"""ElasticNet: soft threshold and scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._math import clamp
from ._base import Separable


@dataclass
class ElasticNet(Separable):
    """J(x) = lam * sum |x_i| + l2/2 * sum x_i^2.

    Args:
        lam: strength of the l1 part, >= 0.
        l2: strength of the quadratic part, >= 0 (decoupled weight decay in ProxSGD).
    """

    lam: float
    l2: float
    kernel = "elastic_net"
    bounds = {"lam": (0.0, math.inf), "l2": (0.0, math.inf)}

    def parameters(self) -> dict[str, float]:
        return {"lam": self.lam, "l2": self.l2}

    def line(self, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
        return self.lam, -self.l2

    def _phi(self, x: Tensor) -> Tensor:
        return self.lam * x.abs() + 0.5 * self.l2 * x.square()

    def _scalar_prox(self, x: Tensor, scale: Tensor) -> Tensor:
        threshold = scale * self.lam
        return (x - clamp(x, -threshold, threshold)) / (1 + scale * self.l2)

    def _slope(self, x: Tensor) -> Tensor:
        return self.lam * x.sign() + self.l2 * x

    def _distance(self, x: Tensor, grad: Tensor) -> Tensor:
        return torch.where(x == 0, (grad.abs() - self.lam).clamp_min(0), (grad + self._slope(x)).abs())

    def lam_max(self, grad: Tensor) -> float:
        return float(grad.abs().max()) if grad.numel() else 0.0
