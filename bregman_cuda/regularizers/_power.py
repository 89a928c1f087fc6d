"""What LHalf and LTwoThirds share: lam |x|^p for p = (K - 1) / K. The twin of csrc/math/power.h and inverse_root."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .._math import number_like
from ._base import Separable

# Where zero and the other minimum are equally good, and the start of the iteration, by K.
_CROSSING = {2: 0.27216552697590873, 3: 0.3968502629920499}
_START = {2: (0.24, 1.46), 3: (0.02, 1.12)}


class Power(Separable):
    """lam |x|^p with p = 1 - 1 / `root`."""

    lam: float
    root: ClassVar[int]
    convex = False

    def parameters(self) -> dict[str, float]:
        return {"lam": self.lam}

    def curve(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        lam, y = number_like(self.lam, t, dtype).double(), inverse_root(t, self.root)
        ratio = lam * ((self.root - 1) / self.root) * y / t
        return lam * t * y, ratio, ratio * (1 + 1 / self.root)

    def _phi(self, x: Tensor) -> Tensor:
        safe = torch.where(x == 0, 1.0, x.abs())  # torch's gradient at zero is zero and not NaN
        return torch.where(x == 0, 0.0, self.lam * safe ** (1 - 1 / self.root))

    def _scalar_prox(self, x: Tensor, scale: Tensor) -> Tensor:
        if x.element_size() < 4:  # the iteration knows the bits of fp32 and fp64
            return self._scalar_prox(x.float(), scale.float()).to(x.dtype)
        root, (c2, c3), a = self.root, _START[self.root], x.abs()
        q = scale * self.lam / a * ((root - 1) / root) * inverse_root(a, root)
        w = 1 - q * (1 / root + q * (c2 + q * c3))
        for _ in range(3 if x.dtype == torch.float64 else 2):
            p = _power(w, root)
            w = w - ((p - 1) * w + q) / ((root + 1) * p - 1)
        w = torch.where(q > 0, w, 1.0)
        return torch.where(q >= _CROSSING[root], 0.0, x * _power(w, root))

    def _slope(self, x: Tensor) -> Tensor:
        safe = torch.where(x == 0, 1.0, x.abs())
        return self.lam * (1 - 1 / self.root) * x.sign() * safe ** (-1 / self.root)

    def _distance(self, x: Tensor, grad: Tensor) -> Tensor:
        return torch.where((x == 0) & (self.lam > 0), 0.0, (grad + self._slope(x)).abs())

    def lam_max(self, grad: Tensor) -> float:
        return 0.0


def inverse_root(x: Tensor, root: int) -> Tensor:
    """x^(-1/root) for fp32 or fp64 x >= 0 and root 2 or 3, with the bits that the kernels get."""
    integer, bias, one = (torch.int64, 1023, 2**52) if x.dtype == torch.float64 else (torch.int32, 127, 2**23)
    bits = x.view(integer)
    share = bits >> (1 if root == 2 else 2)
    for shift in (2, 4, 8) if root == 3 else ():
        share = share + (share >> shift)
    y = (int((1 + 1 / root) * (bias - 0.048) * one) - share).view(x.dtype)
    for _ in range(3 if x.dtype == torch.float64 else 2):
        left = 1 - (x * y * y if root == 2 else x * y * y * y)
        y = y + y * (left * (1 / root + left * ((root + 1) / (2 * root * root))))
    return y


def _power(w: Tensor, root: int) -> Tensor:
    return w * w if root == 2 else w * w * w
