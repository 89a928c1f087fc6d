"""Pruning in the order in which weights and filters entered the twin of SplitLBI."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from .._warn import warn
from ..regularizers._base import check_number
from .activation_path import ActivationPath, Unit, chosen_layers, named_of
from .resize import filter_dim, owner_of


@torch.no_grad()
def prune_by_order(
    path: ActivationPath,
    percent: float,
    layers: str | Iterable[str] | None = None,
    *,
    unit: Unit | None = None,
    biases: bool = False,
    norms: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """Zero, in each layer, the round(percent / 100 * n) units that entered the twin last or never.

    Args:
        path: what was recorded.
        percent: of each layer's units, from 0 (none) to 100 (all); halves round to even.
        layers: exact parameter names; None: every layer with a twin.
        unit: "filter" or "weight"; None: filters of convolutions, single weights of everything else, as the toolbox.
        biases: whether the biases of removed filters go, too; one with a twin goes by its own place as well. Layers
            pruned by single weights keep theirs: by default Linear ones do, with unit="filter" they lose rows and
            biases. Where no layer is pruned by filters, a warning says that nothing comes of it.
        norms: {layer: name of the batch norm after it}: its weight and bias at removed filters go, too. Without it,
            a batch norm still emits its bias there.

    Returns:
        Masks by parameter name, True where a weight stays, for `masked` or an optimizer's `set_mask`: without one, the
        next step brings the weights back.

    Raises:
        ValueError: percent outside [0, 100], an unknown layer, `biases` or `norms` for single weights, or a norm
            that does not fit its layer; nothing was changed.
        TypeError: `biases` or `norms` without a module, or a norm that is none.
    """
    check_number("prune_by_order", "percent", percent, high=100.0)
    names, norms = chosen_layers(layers, path.layers), dict(norms or {})
    chosen_layers(norms, names)
    masks: dict[str, Tensor] = {}
    by_filters = False
    for name in names:
        param = path._param(name, "weight")
        kind: Unit = unit or ("filter" if param.ndim > 2 else "weight")
        ranks = path.ranks(name, kind)
        keep = ranks < ranks.numel() - round(percent / 100 * ranks.numel())
        if kind == "weight":
            if name in norms or (biases and unit is not None):
                raise ValueError(f"biases and norms belong to whole filters, but {name!r} is pruned by single weights")
            parts = {name: keep}
        else:
            by_filters = True
            dim = filter_dim(path.model, name, param)
            parts = {name: keep.view([-1 if d == dim else 1 for d in range(param.ndim)]).expand(param.shape).clone()}
            prefix, _, module = owner_of(path.model, name) if biases or name in norms else ("", "", None)
            if biases and getattr(module, "bias", None) is not None:
                parts.setdefault(f"{prefix}bias", keep)
            if name in norms:
                parts |= _norm_masks(path.model, norms[name], name, keep)
        for part, mask in parts.items():  # a bias with a twin goes with its filter, and by its own place
            masks[part] = masks[part] & mask if part in masks else mask
    if biases and names and not by_filters:
        warn(
            "prune_by_order: biases=True prunes no bias, as all of these layers are pruned by single weights; "
            "pass unit='filter' to prune rows of Linear layers with their biases"
        )
    named = named_of(path.model)
    for name, mask in masks.items():
        for tensor in (named[name], path.optimizer.state.get(named[name], {}).get("master")):
            if tensor is not None:  # the fp32 copy of a 16-bit parameter would bring it back
                tensor.masked_fill_(~mask, 0)
    return masks


def _norm_masks(model: Any, norm: str, layer: str, keep: Tensor) -> dict[str, Tensor]:
    module = model.get_submodule(norm)
    if not isinstance(module, _NormBase) or module.weight is None:
        raise TypeError(f"{norm!r} is no batch norm with a weight and a bias, got {type(module).__name__}")
    if module.num_features != len(keep):
        raise ValueError(f"{norm!r} has {module.num_features} channels, but {layer!r} has {len(keep)} filters")
    return {f"{norm}.weight": keep, f"{norm}.bias": keep}
