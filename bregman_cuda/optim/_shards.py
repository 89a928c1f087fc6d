"""Sharded parameters (DTensor: FSDP2, tensor parallelism): each rank steps the part it holds.

Recognised by the attribute that holds the part: importing torch.distributed.tensor takes longer than the whole package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..regularizers._rounds import Extent
from ._rule import Rule


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor, however many ranks there are."""
    return hasattr(tensor, "_local_tensor")


def is_elsewhere(tensor: Any) -> bool:
    """Whether this rank is outside of the mesh of a DTensor: it has no part in it, and nothing to do."""
    return is_sharded(tensor) and tensor.device_mesh.get_coordinate() is None


def local(tensor: Any) -> Any:
    """The part of a DTensor that this rank holds; anything else as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def gathered(tensor: Any) -> Any:
    """All of a DTensor, on every rank, which ask for it together; anything else as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def layout(tensor: Any) -> str:
    """In words: which ranks hold a tensor, and how it is cut."""
    return f"{tensor.placements} on ranks {tensor.device_mesh.mesh.tolist()}" if is_sharded(tensor) else "a whole"


def local_grads(params: Iterable[Any], grads: Iterable[Any]) -> list[Tensor]:
    """This rank's part of each gradient, laid out as its parameter's."""
    parts = []
    for param, grad in zip(params, grads):
        if is_sharded(grad) and grad.placements != param.placements:
            grad = grad.redistribute(placements=param.placements)
        parts.append(local(grad))
    return parts


def sharded_as(param: Any, whole: Tensor) -> Any:
    """A DTensor laid out as `param` from a tensor that every rank holds as a whole; nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = param.device_mesh
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(
        placements=param.placements
    )


def cut_along(param: Any, reg: Any, rule: Rule | None = None) -> tuple[int, ...]:
    """The dims of the mesh over whose ranks a prox sums: those that hold pieces of the same groups, or of a tensor that
    `reg` or the rule needs as a whole; none where every group is on one rank."""
    return _cut_along(param, reg, rule) if is_sharded(param) else ()


def _cut_along(param: Any, reg: Any, rule: Rule | None = None) -> tuple[int, ...]:
    everything = reg is not None and (bool(reg.whole) if rule is None else rule.asks_for_all(reg))
    if reg is None or not (everything or reg.radial is not None):
        return ()
    dims, mesh = () if everything else reg.groups_of(param.shape), param.device_mesh
    if mesh.get_coordinate() is None:
        return ()  # this rank has no part in it
    along = []
    for number, placement in enumerate(param.placements):
        dim = getattr(placement, "dim", None)  # of Shard and its relatives, which is_shard() does not all know
        if dim is not None and dim % param.ndim not in dims and mesh.size(number) > 1:
            along.append(number)
    return tuple(along)


class ShardExtent(Extent):
    """Of this rank's part of a DTensor."""

    def __init__(self, param: Any):
        super().__init__(param.shape)
        self.param = param
        self.known: dict[Any, Tensor] = {}

    def spread(self, part: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        shape = [n if dims is None or d in dims else 1 for d, n in enumerate(self.shape)]
        whole = torch.zeros(math.prod(shape), dtype=torch.float64, device=part.device)
        whole[self._numbers(dims).flatten()] = part.double().flatten()
        return whole.view(shape)

    def part(self, whole: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        return whole.flatten()[self._numbers(dims)]

    def _numbers(self, dims: Sequence[int] | None) -> Tensor:
        """Which of the elements (of the groups) of the whole are here, in the shape of the part."""
        if dims in self.known:
            return self.known[dims]
        from torch.distributed.tensor import DTensor, Replicate

        mesh, ndim = self.param.device_mesh, len(self.shape)
        shape = [n if dims is None or d in dims else 1 for d, n in enumerate(self.shape)]
        numbers = torch.arange(math.prod(shape), device=local(self.param).device).view(shape)
        kept = [
            p if (d := getattr(p, "dim", None)) is not None and (dims is None or d % ndim in dims) else Replicate()
            for p in self.param.placements
        ]
        whole = DTensor.from_local(numbers, mesh, [Replicate()] * mesh.ndim, run_check=False)
        here = local(whole.redistribute(placements=kept))
        if dims is not None:  # those of elements are as large as the part
            self.known[dims] = here
        return here


def why_refused(param: Any, reg: Any, rule: Rule, capturable: bool) -> str:
    """Empty, or why a sharded parameter cannot be stepped."""
    if not is_sharded(param):
        return ""
    if any(placement.is_partial() for placement in param.placements):
        return "its ranks hold summands (a Partial placement), not parts"
    if capturable and cut_along(param, reg, rule):
        return "its prox sums over the ranks that hold it in mid-step, which cannot be captured: set capturable=False"
    return ""


def initial_values(
    rule: Rule, slots: Sequence[str], param: Any, group: dict[str, Any], dtype: torch.dtype
) -> dict[str, Tensor | None]:
    """What `rule` puts in new slots of this rank's part, in the state's dtype; None for zeros.

    Where shards cut groups, the dual depends on whole groups: the tensor is gathered for it, once.
    """
    if not slots:
        return {}
    part = local(param.detach()).to(dtype)
    if not any(slot != "master" for slot in slots) or not cut_along(param, group["reg"]):
        return {slot: part if slot == "master" else rule.init_slot(slot, part, group) for slot in slots}
    whole = param.detach().full_tensor().to(dtype)
    values: dict[str, Tensor | None] = {}
    for slot in slots:
        value = part if slot == "master" else rule.init_slot(slot, whole, group)
        values[slot] = value if value is None or value is part else local(sharded_as(param, value))
    return values


def for_prox(param: Any, reg: Any, state: dict[str, Any]) -> tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]:
    """A parameter's state for a prox outside of a step, and what takes this rank's part from its result.

    These are this rank's parts, and whole tensors where the prox needs more; all ranks ask for it together then.
    """
    if is_sharded(param) and cut_along(param, reg):
        return {name: gathered(t) for name, t in state.items()}, lambda value: local(sharded_as(param, value))
    return {name: local(t) for name, t in state.items()}, lambda value: value


def mask_as(param: Any, mask: Any) -> Any:
    """A copy of a bool mask, sharded as its parameter and on its device.

    Raises:
        ValueError: the mask is a DTensor and sharded otherwise.
    """
    if not is_sharded(mask):
        mask = mask.to(param.device, copy=True)
        return sharded_as(param, mask) if is_sharded(param) else mask
    layout = (mask.device_mesh, mask.placements)
    if not is_sharded(param) or layout != (param.device_mesh, param.placements):
        raise ValueError(
            f"set_mask: the mask is sharded as {mask.placements}, the parameter as "
            f"{getattr(param, 'placements', 'a whole')}; pass a mask sharded alike, or the whole one on every rank"
        )
    return mask.clone()


def on_all_ranks(flags: Sequence[bool], params: Iterable[Any]) -> list[bool]:
    """Which flags are set on every rank that has a part in the parameters. (`bool` of a DTensor reads this rank's.)"""
    from torch import distributed as dist

    sharded = [p for p in params if is_sharded(p)]
    if not sharded or not flags:
        return list(flags)
    lowest = torch.tensor(flags, dtype=torch.float32, device=local(sharded[0]).device)
    for process_group in dict.fromkeys(group for p in sharded for group in p.device_mesh.get_all_groups()):
        dist.all_reduce(lowest, dist.ReduceOp.MIN, group=process_group)
    return [bool(flag) for flag in lowest.tolist()]


def found_inf_anywhere(found_inf: bool, params: Iterable[Any]) -> bool:
    """GradScaler's verdict for all ranks: torch asks only those that share the first gradient, and others may have
    overflowed; without this some would step alone."""
    sharded = [p for p in params if is_sharded(p)]
    if len({(p.device_mesh, *(placement.is_replicate() for placement in p.placements)) for p in sharded}) == 1:
        return found_inf
    return not on_all_ranks([not found_inf], sharded)[0]


# Inside torch.compile a DTensor has no attributes of its own, and answers to its type.


def traced_cut(param: Any, reg: Any, rule: Rule) -> bool:
    """See `cut_along`."""
    from torch.distributed.tensor import DTensor

    return isinstance(param, DTensor) and bool(_cut_along(param, reg, rule))


def traced_parts(params: list[Any], grads: list[Any], states: list[dict[str, Any]]) -> tuple[Any, Any, Any]:
    """This rank's parts of parameters, gradients and states."""
    from torch.distributed.tensor import DTensor

    def part(t: Any) -> Any:
        return t.to_local() if isinstance(t, DTensor) else t

    alike = [
        g.redistribute(placements=p.placements) if isinstance(p, DTensor) and g.placements != p.placements else g
        for p, g in zip(params, grads)
    ]
    return (
        [part(p) for p in params],
        [part(g) for g in alike],
        [{key: part(value) for key, value in state.items()} for state in states],
    )
