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
        threshold: layers with a smaller share of active filters are left alone. Reads from the device.
        orthogonal: see above.
        generator: of the random numbers, on the CPU.

    Returns:
        Bool tensors by parameter name: which filters were restarted; layers below the threshold are missing.

    Raises:
        ValueError: percent or threshold out of range, or an unknown layer; nothing was changed.
    """
    restarted = {}
    for name, param, gone in _last_filters(path, percent, layers):
        dim = filter_dim(path.model, name, param)
        if threshold > 0:
            active = path.optimizer.support(param).transpose(0, dim).flatten(1).any(1)
            if float(active.float().mean()) < threshold:
                continue
        rows = param.detach().transpose(0, dim)
        count = int(gone.sum())
        scale = float(param.std()) if param.numel() > 1 else 1.0
        new = torch.rand((count, *rows.shape[1:]), generator=generator, dtype=torch.float64)
        new = ((2 * new - 1) * scale * math.sqrt(3)).to(param.device)
        if orthogonal and count:
            new = _orthogonal_to(rows[~gone].flatten(1).double(), new.flatten(1), scale).view(new.shape)
        state = path.optimizer.state.get(param, {})
        for slot, tensor in state.items():
            if slot != "mask" and torch.is_tensor(tensor) and tensor.shape == param.shape:
                tensor.transpose(0, dim)[gone] = new.to(tensor.dtype) if slot == "master" else 0
        rows[gone] = new.to(param.dtype)
        if (mask := path.optimizer.get_mask(param)) is not None:
            for tensor in (param, *(t for s, t in state.items() if s == "master")):
                tensor.masked_fill_(~mask, 0)
        restarted[name] = gone
    return restarted


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

    Args, returns and errors as `reinitialize_filters`; with `biases`, theirs too.
    """
    check_number("scale_filters", "factor", factor)
    chosen = _last_filters(path, percent, layers)
    for name, param, gone in chosen:
        module = owner_of(path.model, name)[2] if biases else None
        bias: Any = getattr(module, "bias", None)
        for one, dim in ((param, filter_dim(path.model, name, param)), *([(bias, 0)] if bias is not None else [])):
            for tensor in (one.detach(), path.optimizer.state.get(one, {}).get("master")):
                if tensor is not None:
                    tensor.transpose(0, dim)[gone] *= factor
    return {name: gone for name, _, gone in chosen}


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


def _orthogonal_to(kept: Tensor, new: Tensor, scale: float) -> Tensor:
    """Rows of `new` made orthogonal to those of `kept` and to each other, as many as there is room for."""
    room = max(0, new.shape[1] - int(torch.linalg.matrix_rank(kept))) if kept.numel() else new.shape[1]
    basis = torch.linalg.svd(kept, full_matrices=True).Vh[new.shape[1] - room :] if kept.numel() else None
    free = new[:room] if basis is None else new[:room] @ basis.T @ basis
    directions = torch.linalg.qr(free.T).Q.T * scale * math.sqrt(new.shape[1])
    return torch.cat([directions, new[len(directions) :]])
