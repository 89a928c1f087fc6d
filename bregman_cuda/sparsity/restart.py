"""Second chances for filters of a SplitLBI run: restart the last ones, scale them, or train only what is not active."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..regularizers._base import check_number
from .activation_path import ActivationPath, Model, chosen_layers, with_twin
from .resize import filter_dim, owner_of
from .tickets import MaskedTraining

if TYPE_CHECKING:
    from ..optim.splitlbi import SplitLBI


@torch.no_grad()
def reinitialize_filters(
    path: ActivationPath,
    percent: float,
    layers: str | Iterable[str] | None = None,
    *,
    threshold: float = 0.0,
    orthogonal: bool = False,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Start the round(percent / 100 * n) filters of each layer anew that entered last or never.

    New weights are uniform with the standard deviation of the layer's weights; biases stay. With `orthogonal`, they are
    orthogonal to the filters that stay and to each other, at that scale, as far as the space has room; the rest stays
    random. The optimizer's state of these weights (dual, momentum, fp32 copy) begins anew.

    Args:
        path: what was recorded; it keeps when the old filter entered.
        percent: of each layer's filters, from 0 to 100.
        layers: exact parameter names; None: every layer with a twin.
        threshold: from 0 to 1; layers with a smaller share of active filters are left alone. Reads from the device.
        orthogonal: see above.
        generator: of the random numbers, on the CPU.

    Returns:
        Bool tensors by parameter name: which filters were restarted; layers below the threshold are missing.

    Raises:
        ValueError: percent or threshold out of range, or an unknown layer; nothing was changed.
    """
    check_number("reinitialize_filters", "threshold", threshold, high=1.0)
    new_rows = {}
    for name, param, gone in _last_filters(path, percent, layers):
        dim = filter_dim(path.model, name, param)
        if threshold > 0:
            active = _matrix(_rows(path.optimizer.support(param), dim)).any(1)
            if float(active.float().mean()) < threshold:
                continue
        rows = _rows(param, dim)
        count = int(gone.sum())
        scale = float(param.std()) if param.numel() > 1 else 1.0
        new = torch.rand((count, *rows.shape[1:]), generator=generator, dtype=torch.float64)
        new = ((2 * new - 1) * scale * math.sqrt(3)).to(param.device)
        if orthogonal and count:
            new = _orthogonal_to(_matrix(rows[~gone]).double(), _matrix(new), scale).view(new.shape)
        new_rows[name] = (param, dim, gone, new)
    for param, dim, gone, new in new_rows.values():  # nothing is refused from here on
        state = path.optimizer.state.get(param, {})
        for slot, tensor in state.items():
            if slot != "mask" and torch.is_tensor(tensor) and tensor.shape == param.shape:
                _rows(tensor, dim)[gone] = new.to(tensor.dtype) if slot == "master" else 0
        _rows(param, dim)[gone] = new.to(param.dtype)
        if (mask := path.optimizer.get_mask(param)) is not None:
            for tensor in (param, *(t for s, t in state.items() if s == "master")):
                tensor.masked_fill_(~mask, 0)
    return {name: gone for name, (_, _, gone, _) in new_rows.items()}


@torch.no_grad()
def scale_filters(
    path: ActivationPath,
    factor: float,
    percent: float,
    layers: str | Iterable[str] | None = None,
    *,
    biases: bool = False,
) -> dict[str, Tensor]:
    """Multiply the round(percent / 100 * n) filters of each layer that entered last or never, by a factor >= 0.

    Args, returns and errors as `reinitialize_filters`; with `biases`, theirs too. A bias with a twin is scaled
    once, with its filter or by its own place.
    """
    check_number("scale_filters", "factor", factor)
    chosen = _last_filters(path, percent, layers)
    scaled = {param: (filter_dim(path.model, name, param), gone) for name, param, gone in chosen}
    for name, _, gone in chosen:
        bias: Any = getattr(owner_of(path.model, name)[2], "bias", None) if biases else None
        if bias is not None:
            scaled[bias] = (0, gone | scaled[bias][1] if bias in scaled else gone)
    for param, (dim, gone) in scaled.items():
        for tensor in (param, path.optimizer.state.get(param, {}).get("master")):
            if tensor is not None:
                _rows(tensor, dim)[gone] *= factor
    return {name: scaled[param][1] for name, param, _ in chosen}


@torch.no_grad()
def hold_active(model: Model, optimizer: SplitLBI) -> MaskedTraining:
    """From now on, steps leave weights alone whose twin was active before the step; all others, and the path, go on.

    Costs a copy of the weights with a twin. `remove()` on what is returned ends it.

    Raises:
        TypeError, ValueError: another optimizer, or no parameter with a twin.
    """
    params = list(with_twin(model, optimizer).values())
    held: list[tuple[Tensor, Tensor, Tensor]] = []

    def tensors(param: Any) -> list[Tensor]:
        master = optimizer.state.get(param, {}).get("master")
        return [param] if master is None else [param, master]

    @torch.no_grad()
    def before(*_: Any) -> None:
        held.clear()
        for param in params:
            active = optimizer.support(param)
            held.extend((tensor, active, tensor.detach().clone()) for tensor in tensors(param))

    @torch.no_grad()
    def after(*_: Any) -> None:
        for tensor, active, old in held:
            tensor.copy_(torch.where(active, old, tensor))
        held.clear()

    return MaskedTraining([optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)])


def _last_filters(
    path: ActivationPath, percent: float, layers: str | Iterable[str] | None
) -> list[tuple[str, nn.Parameter, Tensor]]:
    check_number("percent of filters", "percent", percent, high=100.0)
    chosen = []
    for name in chosen_layers(layers, path.layers):
        ranks = path.ranks(name, "filter")
        chosen.append((name, path._param(name, "filter"), ranks >= len(ranks) - round(percent / 100 * len(ranks))))
    return chosen


def _rows(tensor: Tensor, dim: int) -> Tensor:
    """A view with the filters in dim 0; a scalar is one filter."""
    return tensor.detach().transpose(0, dim) if tensor.ndim else tensor.detach().view(1)


def _matrix(rows: Tensor) -> Tensor:
    return rows.flatten(1) if rows.ndim > 1 else rows[:, None]


def _orthogonal_to(kept: Tensor, new: Tensor, scale: float) -> Tensor:
    """Rows of `new` made orthogonal to those of `kept` and to each other, as many as there is room for."""
    room = max(0, new.shape[1] - int(torch.linalg.matrix_rank(kept))) if kept.numel() else new.shape[1]
    basis = torch.linalg.svd(kept, full_matrices=True).Vh[new.shape[1] - room :] if kept.numel() else None
    free = new[:room] if basis is None else new[:room] @ basis.T @ basis
    directions = torch.linalg.qr(free.T).Q.T * scale * math.sqrt(new.shape[1])
    return torch.cat([directions, new[len(directions) :]])
