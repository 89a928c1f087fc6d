"""NonnegL1: one-sided soft threshold."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._base import Separable


@dataclass
class NonnegL1(Separable):
    """J(x) = lam * sum x_i with the constraint x >= 0 (J is infinite elsewhere).

    Negative weights are projected to zero by the first step.

    Args:
        lam: strength, >= 0; 0 leaves the constraint alone.
    """

    lam: float
    kernel = "nonneg_l1"
    homogeneous = True

    def parameters(self) -> dict[str, float]:
        return {"lam": self.lam}

    def _phi(self, x: Tensor) -> Tensor:
        return torch.where(x < 0, torch.full_like(x, torch.inf), self.lam * x)

    def _scalar_prox(self, x: Tensor, scale: Tensor) -> Tensor:
        threshold = scale * self.lam
        return torch.where(x <= threshold, torch.zeros_like(x), x - threshold)  # NaN stays NaN

    def _slope(self, x: Tensor) -> Tensor:
        return self.lam * x.sign()

    def _distance(self, x: Tensor, grad: Tensor) -> Tensor:
        return torch.where(x == 0, (-grad - self.lam).clamp_min(0), (grad + self.lam).abs())

    def _project(self, x: Tensor) -> Tensor:
        return torch.where(x < 0, torch.zeros_like(x), x)

    def lam_max(self, grad: Tensor) -> float:
        return float((-grad).clamp_min(0).max()) if grad.numel() else 0.0
