"""Bit-packed masks, in index order (last dimension fastest): a parameter's memory layout may change under them.

The mask of a sharded parameter is a bool DTensor instead, which torch.distributed.checkpoint can shard anew; state
dicts hold bools for all parameters, so that a checkpoint of many ranks loads on one and the other way round.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 64  # kernels read whole words, so the last one is padded


def is_dense(t: Tensor) -> bool:
    """Whether the tensor covers its memory range without gaps or overlaps (any order of dimensions)."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape) if n != 1):
        if stride != expected:
            return t.numel() == 0
        expected *= size
    return True


def overlaps_itself(t: Tensor) -> bool:
    """Whether several elements certainly share memory, as in an expanded tensor: torch refuses to write to those."""
    return t.numel() > 0 and any(n > 1 and stride == 0 for n, stride in zip(t.shape, t.stride()))


def flat(t: Tensor) -> Tensor:
    """A dense tensor's elements in memory order, as a view."""
    return t.as_strided((t.numel(),), (1,))


def packed_size(t: Tensor) -> int:
    """Bytes of a packed mask of this tensor's elements."""
    return -(-t.numel() // _WORD) * _WORD // 8


def pack(mask: Tensor) -> Tensor:
    """uint8 tensor with bit i % 8 of byte i // 8 set where element i is kept."""
    bits = torch.zeros(-(-mask.numel() // _WORD) * _WORD, dtype=torch.uint8, device=mask.device)
    bits[: mask.numel()] = mask.reshape(-1)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, like: Tensor) -> Tensor:
    """The bool mask of `like`'s shape that `pack` stored; bools stay as they are."""
    if packed.dtype == torch.bool:
        return packed
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(1).bitwise_right_shift(shifts) & 1).view(-1)[: like.numel()]
    return bits.bool().view(like.shape)


def in_memory_order(packed: Tensor, param: Tensor) -> Tensor:
    """What kernels read: bit i belongs to the parameter's element i in memory."""
    if param.is_contiguous() and packed.dtype != torch.bool:
        return packed
    return pack(flat(torch.empty_like(param, dtype=torch.bool).copy_(unpack(packed, param))))
