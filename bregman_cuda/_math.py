"""Elementary functions with the kernels' bits: twins of csrc/math/hd.h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def number_like(value: Any, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A number or tensor on x's device, in its dtype or another; numbers without a copy from the host, which graphs
    cannot capture."""
    if torch.is_tensor(value) and (value.device == x.device or value.numel() > 1):
        return value.to(x.device, dtype or x.dtype)
    return torch.full((), float(value), dtype=dtype or x.dtype, device=x.device)


def square_root(x: Tensor) -> Tensor:
    """Correctly rounded in fp32, as in the kernels; torch's own (MKL on the CPU) is off by an ulp in 3% of cases."""
    return x.double().sqrt().to(x.dtype)


def cube_root(x: Tensor) -> Tensor:
    """The cube root of fp32 or fp64 numbers, within 0.97 ulp: the twin of csrc/math/hd.h, operation by operation."""
    wide = x.dtype == torch.float64
    tiny, up, root_up = (2.0**-900, 2.0**300, 2.0**100) if wide else (2.0**-100, 2.0**48, 2.0**16)
    size = torch.where(x < 0, -x, x)
    one = torch.ones_like(x)
    scale = torch.where(size < tiny, one * up, torch.where(size > 1 / tiny, one / up, one))
    unscale = torch.where(size < tiny, one / root_up, torch.where(size > 1 / tiny, one * root_up, one))
    a = size * scale
    if wide:
        t = (((a.view(torch.int64) >> 32) // 3 + 715094163) << 32).view(torch.float64)
    else:
        t = (a.view(torch.int32) // 3 + 709921077).view(torch.float32)
    for _ in range(3 if wide else 2):
        cube = t * t * t
        t = t + t * ((a - cube) / (cube + cube + a))
    t = t * unscale
    t = torch.where(x < 0, -t, t)
    return torch.where((size > 0) & (size <= torch.finfo(x.dtype).max), t, x)


def clamp(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x within [low, high], by comparisons as in the kernels: NaN passes, and so does -0 where a limit is zero."""
    below = torch.where(x > high, high, x)
    return torch.where(below < low, low, below)
