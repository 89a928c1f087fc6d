"""GroupLasso and SparseGroupLasso: the l1 penalty on group norms, without and with l1 on the elements."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._base import Grouped, Separable
from .l1 import L1


@dataclass
class GroupLasso(Grouped):
    """J(x) = lam * sum_G w_G ||x_G||_2: whole filters, channels or kernels become zero (Bungert et al. eq. 1.14).

    Args:
        lam: strength, >= 0.
        groups: "out" (filter, row), "in" (input channel, column), "kernel" ((out, in) pair) or a tuple of dims
            whose indices identify a group.
        weight: "sqrt_size" (w_G is the square root of the group's size) or "none" (w_G = 1).

    >>> GroupLasso(1.0, "out", "none").prox(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 2.5)
    tensor([[1.5000, 2.0000],
            [0.0000, 0.0000]])
    """

    lam: float
    groups: str | tuple[int, ...] = "out"
    weight: str = "sqrt_size"

    @property
    def radial(self) -> Separable:
        return L1(self.lam)


@dataclass
class SparseGroupLasso(Grouped):
    """J(x) = lam * (alpha * sum |x_i| + (1 - alpha) * sum_G w_G ||x_G||_2).

    lam acts once; the authors' code applied it squared (research notes on BregmanLearning).

    Args:
        lam: strength, >= 0.
        alpha: share of the elementwise part, between 0 (GroupLasso) and 1 (L1).
        groups, weight: as in `GroupLasso`.
    """

    lam: float
    alpha: float = 0.5
    groups: str | tuple[int, ...] = "out"
    weight: str = "sqrt_size"
    bounds = {"lam": (0.0, math.inf), "alpha": (0.0, 1.0)}

    @property
    def elementwise(self) -> Separable:
        return L1(self.lam * self.alpha)

    @property
    def radial(self) -> Separable:
        return L1(self.lam * (1 - self.alpha))

    def lam_max(self, grad: Tensor) -> float:
        """See `Regularizer.lam_max`; by bisection, as it has no closed form."""
        if not grad.numel() or not bool(grad.any()):
            return 0.0
        grad = grad.double()
        low, high = 0.0, float(grad.abs().max()) / self.alpha if self.alpha else math.inf
        if self.alpha < 1:
            reach = float(self.group_norms(grad).max()) / self.group_weight(grad.shape) / (1 - self.alpha)
            high = min(high, reach)
        trial, zero = SparseGroupLasso(high, self.alpha, self.groups, self.weight), torch.zeros_like(grad)
        for _ in range(60):
            trial.lam = 0.5 * (low + high)
            if bool((trial.subdiff_distance(zero, grad) > 0).any()):
                low = trial.lam
            else:
                high = trial.lam
        return high
