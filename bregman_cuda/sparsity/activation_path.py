"""The path of SplitLBI: which weights and filters entered the sparse twin first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Union

import torch
from torch import Tensor, nn

from ..regularizers._base import check_count
from .layers import named_tensors
from .resize import filter_dim, filter_norms

if TYPE_CHECKING:
    from ..optim.splitlbi import SplitLBI

Model = Union[nn.Module, Mapping[str, Any]]
Unit = Literal["filter", "weight"]
NEVER = -1


def named_of(model: Model) -> dict[str, Any]:
    """The named parameters of a module, or the mapping itself."""
    return dict(named_tensors(model)) if isinstance(model, nn.Module) else dict(model)


def with_twin(model: Model, optimizer: SplitLBI) -> dict[str, Any]:
    """The named parameters that have a sparse twin, in the order of the model.

    Raises:
        TypeError: an optimizer without twins.
        ValueError: no parameter of the model has one.
    """
    if not hasattr(optimizer, "sparse_twin"):
        raise TypeError(f"paths and tickets need SplitLBI, got {type(optimizer).__name__}")
    twins = {p for group in optimizer.param_groups if group["reg"] is not None for p in group["params"]}
    found = {name: p for name, p in named_of(model).items() if p in twins}
    if not found:
        raise ValueError("no parameter of the model has a sparse twin in the optimizer; give SplitLBI a regularizer")
    return found


def chosen_layers(layers: str | Iterable[str] | None, known: Iterable[str]) -> list[str]:
    """Exact parameter names, all of them for None. (The toolbox takes a string apart into substrings.)

    Raises:
        ValueError: a name that is not known.
    """
    known = list(known)
    names = known if layers is None else [layers] if isinstance(layers, str) else list(layers)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"layer {unknown[0]!r} is not among those with a sparse twin: {', '.join(known)}")
    return names


class ActivationPath:
    """Records when each weight and each filter entered the sparse twin of SplitLBI for the first time.

    Call `update` once per epoch, or per step: it reads the twins on their device and does not wait for it. Filters are
    the slices of the output dimension (dim 1 of transposed convolutions, 0 of all others); one is active as soon as one
    of its weights is. Where whole groups enter, one number per group is kept.

    Args:
        model: a module, or a mapping from names to parameters (without biases and norms then).
        optimizer: SplitLBI over these parameters.

    Raises:
        TypeError, ValueError: another optimizer, or no parameter with a twin.

    >>> layer = nn.Linear(2, 2, bias=False)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 1.0], [0.0, 2.0]]))
    >>> optimizer = SplitLBI(layer.parameters(), lr=1.0, reg=L1(1.0), mu=1.0, kappa=1e-6)
    >>> path = ActivationPath(layer, optimizer)
    >>> for step in range(2):
    ...     layer.weight.grad = torch.zeros(2, 2)
    ...     optimizer.step()
    ...     path.update(step)
    >>> path.first("weight", "weight"), path.ranks("weight", "filter")
    (tensor([[ 0,  1],
            [-1,  0]], dtype=torch.int32), tensor([0, 1]))
    """

    def __init__(self, model: Model, optimizer: SplitLBI) -> None:
        self.model, self.optimizer = model, optimizer
        self.last = NEVER
        self._first: dict[str, Tensor] = {}
        for name, param in with_twin(model, optimizer).items():
            self._first[name] = torch.full(self._unit_shape(param), NEVER, dtype=torch.int32, device=param.device)

    @property
    def layers(self) -> list[str]:
        """Names of the parameters with a twin."""
        return list(self._first)

    @torch.no_grad()
    def update(self, when: int) -> None:
        """Note what is active now and was never before.

        Parameters that have grown since (`grow_layer`) keep their old block; what is new in them never entered.

        Args:
            when: number of the epoch or step, at least that of the last call.

        Raises:
            ValueError: not an integer, or smaller than before.
        """
        when = check_count("ActivationPath", "`when`", when, max(self.last, 0))
        named = named_of(self.model)
        for name in self._first:
            first = self._units(name, named[name])
            active = self.optimizer.support(named[name])[tuple(slice(0, size) for size in first.shape)]
            first.masked_fill_(active & (first == NEVER), when)
        self.last = when

    def first(self, layer: str, unit: Unit = "weight") -> Tensor:
        """When each weight (a tensor of the parameter's shape) or filter (1-D) was active first; -1: never.

        Raises:
            ValueError: an unknown layer or unit.
        """
        param = self._param(layer, unit)
        first = self._units(layer, param).expand(param.shape)
        if unit == "weight":
            return first.clone()
        late = torch.iinfo(torch.int32).max
        rest = [d for d in range(param.ndim) if d != filter_dim(self.model, layer, param)]
        earliest = torch.where(first == NEVER, late, first).reshape(param.shape or (1,))
        if rest and param.numel():
            earliest = earliest.amin(rest)
        elif rest:  # no weights, no least one
            earliest = earliest.new_full((param.shape[filter_dim(self.model, layer, param)],), late)
        return torch.where(earliest == late, NEVER, earliest)

    @torch.no_grad()
    def ranks(self, layer: str, unit: Unit = "weight") -> Tensor:
        """Place of each weight or filter in the order of entry, from 0, int64, of the shape of `first`.

        Of those that entered together, the one with the larger twin now (a filter: its norm) comes first; after them,
        and among those that never entered, the larger dual, which is nearer to entering; then the lower index.
        The toolbox ranks by norm minus epoch instead, so that a large weight overtakes an early one.

        Raises:
            ValueError: as `first`.
        """
        first = self.first(layer, unit)
        param = self._param(layer, unit)
        dual = self.optimizer.state.get(param, {}).get("dual", torch.zeros_like(param))
        keys = [dual, self.optimizer._twin(param)]
        if unit == "filter":
            keys = [filter_norms(key, filter_dim(self.model, layer, param)) for key in keys]
        when = torch.where(first == NEVER, torch.iinfo(torch.int32).max, first).flatten()
        order = torch.arange(when.numel(), device=when.device)
        for key in keys:  # stable sorts, the least important key first
            order = order[key.abs().flatten()[order].sort(descending=True, stable=True).indices]
        order = order[when[order].sort(stable=True).indices]
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(len(order), device=order.device)
        return ranks.view(first.shape)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and a number, readable with `weights_only=True`."""
        named = named_of(self.model)
        return {"last": self.last, "first": {name: self._units(name, named[name]).clone() for name in self._first}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            KeyError: an entry is missing.
            ValueError: other layers or shapes; nothing was changed.
        """
        named, first = named_of(self.model), state["first"]
        if {*first} != {*self._first}:
            raise ValueError(f"ActivationPath: the state has layers {sorted(first)}, the model {sorted(self._first)}")
        for name, value in first.items():
            if value.shape != self._unit_shape(named[name]):
                want = self._unit_shape(named[name])
                raise ValueError(f"ActivationPath: {name!r} has shape {tuple(value.shape)} in the state, here {want}")
        self.last = int(state["last"])
        self._first = {name: first[name].to(named[name].device, torch.int32, copy=True) for name in self._first}

    def _units(self, name: str, param: Tensor) -> Tensor:
        """What is recorded of a layer, where it is now and in the leading block of one that has grown since."""
        first, shape = self._first[name].to(param.device), self._unit_shape(param)
        if first.shape != shape:
            old, first = first, torch.full(shape, NEVER, dtype=first.dtype, device=param.device)
            first[tuple(slice(0, size) for size in old.shape)] = old
        self._first[name] = first
        return first

    def _unit_shape(self, param: Tensor) -> tuple[int, ...]:
        """The parameter's shape, or 1 in the dims over which whole groups enter."""
        reg = self.optimizer._group_of(param)["reg"]
        dims = None if reg.elementwise is not None else reg.groups_of(param.shape)
        return tuple(n if dims is None or d in dims else min(n, 1) for d, n in enumerate(param.shape))

    def _param(self, layer: str, unit: str) -> Any:
        if unit not in ("filter", "weight"):
            raise ValueError(f"unit must be 'filter' or 'weight', got {unit!r}")
        chosen_layers(layer, self._first)
        return named_of(self.model)[layer]
