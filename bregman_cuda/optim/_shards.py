"""Sharded parameters (DTensor: FSDP2, tensor parallelism): each rank steps the part it holds.

Recognised by the attribute that holds the part: importing torch.distributed.tensor takes longer than the whole package.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, however many ranks there are."""
    return hasattr(tensor, "_local_tensor")


def local(tensor: Any) -> Any:
    """The part of a DTensor that this rank holds; anything else as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def local_grads(params: Iterable[Any], grads: Iterable[Any]) -> list[Tensor]:
    """This rank's part of each gradient, laid out as its parameter's."""
    parts = []
    for param, grad in zip(params, grads):
        if is_sharded(grad) and grad.placements != param.placements:
            grad = grad.redistribute(placements=param.placements)
        parts.append(local(grad))
    return parts


def why_groups_cross(param: Any, reg: Any) -> str:
    """Empty, or why a parameter's groups are not whole on the ranks."""
    if not is_sharded(param):
        return ""
    if any(placement.is_partial() for placement in param.placements):
        return "its ranks hold summands (a Partial placement), not parts"
    if reg is not None and reg.whole:
        return f"{type(reg).__name__} cannot regularize a sharded parameter: {reg.whole}"
    if reg is None or reg.radial is None:
        return ""
    dims = reg.groups_of(param.shape)
    for placement in param.placements:
        dim = getattr(placement, "dim", None)  # of Shard and its relatives, which is_shard() does not all know
        if dim is not None and dim % param.ndim not in dims:
            return (
                f"it is sharded along dim {dim}, which cuts its groups (dims {dims} identify one); "
                f'use groups along that dim, such as groups="out" for dim 0, or an elementwise regularizer'
            )
    return ""
