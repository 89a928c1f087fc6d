"""Nuclear: the sum of singular values, for matrices of low rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._math import number_like
from ._base import Regularizer, Step, check_count


@dataclass
class Nuclear(Regularizer):
    """J(x) = lam * (sum of the singular values of x), the convex penalty of rank (Fazel 2002).

    A tensor of more than two dims is the matrix (dim 0) x (all others): a convolution's out x (in * kh * kw). The prox
    soft-thresholds the singular values (Cai, Candes and Shen 2010, theorem 2.1): those at or below the threshold
    take no part in the product, so that the result has the rank of what is left, up to the rounding of its entries.

    It runs in plain torch (`fused=True` is refused) and costs a full singular value decomposition per tensor and step,
    in float64 for float64 and in float32 else; on a GPU torch's decomposition waits for the device. A NaN or an
    infinity fills the tensor with NaN.

    With `every` = n, `ProxSGD` leaves the prox out of all steps but each n-th of a parameter, and takes it there with n
    times its step size: as much shrinkage, 1/n of the decompositions. The rank is low after those steps alone
    (`rank(x)` reports it). Other optimizers refuse it, as in theirs the parameter is the prox of a point that runs
    beside it, or an average of such; and so does `capturable`, as the step count decides on the host.

    Args:
        lam: strength, >= 0; 0 is the identity.
        every: an integer >= 1.

    Raises:
        ValueError, TypeError: a value out of its range; ValueError by `groups_of`, and so when an optimizer is made: a
            tensor with fewer than two dims.

    >>> Nuclear(1.0).prox(torch.tensor([[3.0, 0.0], [0.0, 0.5]]), 1.0)
    tensor([[2., 0.],
            [0., 0.]])
    """

    lam: float
    every: int = 1
    whole = "it decomposes the whole matrix"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "every":
            value = check_count("Nuclear", name, value, 1)
        super().__setattr__(name, value)

    def groups_of(self, shape: Sequence[int]) -> None:
        """There are no groups; see `Regularizer.groups_of`.

        Raises:
            ValueError: the tensor is no matrix.
        """
        if len(shape) < 2:
            raise ValueError(
                f"Nuclear does not fit a tensor of shape {tuple(shape)}: it needs two dims or more; "
                "give it another regularizer"
            )

    def value(self, x: Tensor) -> Tensor:
        if not x.numel():
            return x.new_zeros(())
        matrix, finite = self._finite_matrix(x)
        values = torch.linalg.svdvals(matrix)
        total = (self.lam * torch.where(values > 0, values, torch.zeros_like(values))).sum()
        return torch.where(finite, total, torch.nan).to(x.dtype)

    def prox(self, x: Tensor, step: Step) -> Tensor:
        self._per_element(x, step)
        if not x.numel():
            return x
        matrix, finite = self._finite_matrix(x)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        threshold = number_like(step, matrix) * self.lam
        shrunk = (left * (values - threshold).clamp_min(0)) @ right
        result = torch.where(threshold == 0, self._matrix(x), torch.where(finite, shrunk, torch.nan))
        return torch.empty_like(x).copy_(result.view(x.shape))

    def subgradient(self, x: Tensor) -> Tensor:
        if not x.numel():
            return torch.zeros_like(x)
        left, right = self._bases(x)
        return torch.empty_like(x).copy_((self.lam * left @ right).view(x.shape))

    def subdiff_distance(self, x: Tensor, grad: Tensor) -> Tensor:
        """See `Regularizer.subdiff_distance`; one number, as the matrix is one group: every dim has size 1.

        With x = U S V^T the subdifferential is lam (U V^T + W), W orthogonal to U and V with singular values <= 1.
        """
        if not x.numel():
            return grad.new_zeros([1] * x.ndim)
        left, right = self._bases(x)
        target = -self._matrix(grad)
        beyond = target - left @ (left.mT @ target)
        beyond = beyond - (beyond @ right.mT) @ right
        excess = (torch.linalg.svdvals(self._finite_matrix(beyond)[0]) - self.lam).clamp_min(0)
        inside = target - beyond - self.lam * left @ right
        return (inside.square().sum() + excess.square().sum()).sqrt().to(grad.dtype).view([1] * x.ndim)

    def lam_max(self, grad: Tensor) -> float:
        """The largest singular value of grad."""
        if not grad.numel():
            return 0.0
        matrix, finite = self._finite_matrix(grad)
        return float(torch.where(finite, torch.linalg.matrix_norm(matrix, 2), torch.nan))

    def rank(self, x: Tensor) -> int:
        """How many singular values are above the rounding of the largest; synchronises with the device."""
        return int(torch.linalg.matrix_rank(self._matrix(x))) if x.numel() else 0

    def _matrix(self, x: Tensor) -> Tensor:
        self.groups_of(x.shape)
        wide = x if x.dtype == torch.float64 else x.float()
        return wide.reshape(x.shape[0], -1) if x.numel() else wide

    def _finite_matrix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix and whether it is finite; if not, zeros in its place, as decompositions refuse it."""
        matrix = self._matrix(x)
        finite = torch.isfinite(matrix).all()
        return torch.where(finite, matrix, 0), finite

    def _bases(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Left and right singular vectors, with zeros in place of those whose singular value is zero up to rounding."""
        matrix, finite = self._finite_matrix(x)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        kept = values > values[:1] * (max(matrix.shape) * torch.finfo(matrix.dtype).eps)
        left = torch.where(finite, left, torch.nan)
        return left * kept, right * kept.unsqueeze(1)
