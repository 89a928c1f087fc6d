"""Sparse initialisation (Bungert et al., JMLR 2022, section 4.1): few weights, scaled so that the signal survives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..optim._masks import overlaps_itself
from ..regularizers._base import plain_number
from . import paths
from .groups import by_key
from .init_report import InitRow, SparseInitReport, left_dense
from .layers import Weight, weight_tensors
from .report import GROUP_DIMS

Groups = Union[str, tuple[int, ...], None]
Bias = Literal["positive", "symmetric", "zero", "keep"]
_BIASES = ("positive", "symmetric", "zero", "keep")
_LEFT = ("none", "keep")  # there is no bias, or it stays as it is


@dataclass
class _Layer:
    """What happens to one weight. `mask` is a bool tensor over its groups."""

    weight: Weight
    dims: tuple[int, ...]
    mask: Tensor
    std: float
    bias: str
    live_outputs: int | None = None

    @property
    def elementwise(self) -> bool:
        return len(self.dims) == len(self.shape)

    @property
    def shape(self) -> torch.Size:
        return self.weight.tensor.shape

    def element_mask(self) -> Tensor:
        view = [n if d in self.dims else 1 for d, n in enumerate(self.shape)]
        return self.mask.view(view).expand(self.shape)


@torch.no_grad()
def sparse_init_(
    model: nn.Module,
    density: float | Mapping[Any, float | None] = 0.01,
    groups: Groups | Mapping[Any, Groups] = None,
    bias: Bias = "positive",
    *,
    bias_scale: float = 1.0,
    gain: float = math.sqrt(2.0),
    generator: torch.Generator | None = None,
) -> SparseInitReport:
    """Start the layers of a model sparse, in place: W = N(0, gain^2 / (fan_in * density)) on a random mask, else 0.

    The 1/density in the variance is eq. (4.3) of the paper; without it the signal fades by that factor per layer.
    Weights are those that `param_groups` regularizes. A mask keeps exactly ``max(1, round(density * n))`` of the n
    elements (or groups) of a weight, and the scale follows the density reached. Along each nn.Sequential, wherever it
    is in the model, at least one path of non-zero weights leads from its input to its output (one kept element or group
    moves, if need be). Behind a module whose inside is not told, such as a residual block in the sequence, it starts
    anew; layers that are in no nn.Sequential keep at least one weight, and no more is certain. The report names both.
    Paths are told by channel, not by pixel, and a ReLU may still close one: the report says how many outputs are live.
    Frozen weights (requires_grad=False), and their biases, stay as they are.

    Args:
        model: its weights may have any floating dtype, device and memory format.
        density: share of elements (groups) to keep, in (0, 1]. A dict ``{key: density}`` chooses per layer as in
            `param_groups`; None for a key leaves those layers, and their biases, as they are.
        groups: None, elementwise masks; ``"kernel"``, whole kernels of convolutions (elementwise in matrices), as
            in the paper's ConvNet; ``"out"`` (dim 0) or ``"in"`` (dim 1), whole rows or columns; a tuple of dims as
            in `GroupLasso`; or a dict of these.
        bias: of the sparse layers. ``"positive"``: U[0, bias_scale / sqrt(fan_in)], which keeps a ReLU neuron without
            incoming weight alive (the paper's choice); ``"symmetric"`` for tanh, sigmoid or leaky ReLU; ``"zero"``;
            ``"keep"``. Except with ``"keep"``, a bias before a norm layer becomes zero: there it cancels, and a channel
            that is constant would send gradients back enlarged by 1/sqrt(eps). Biases of attention are kept.
        bias_scale: see `bias`.
        gain: sqrt(2) for ReLU (He), 1 for linear or tanh layers.
        generator: where the random numbers come from; they are drawn on its device (default: each weight's).

    Returns:
        A report of every sparse weight, every tensor left dense, and what could not be guaranteed; print it.

    Raises:
        TypeError: `model` is no module.
        ValueError: a value out of range, a key that fits nothing, a model without such weights or on the meta device, a
            weight or bias whose elements share memory.
        All are raised before anything is changed.

    >>> model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    >>> sparse_init_(model, 0.1).nonzeros
    550
    """
    bias_scale, gain = plain_number(bias_scale), plain_number(gain)
    layers, notes = _plan(model, density, groups, bias, bias_scale, gain, generator)
    notes += _connect(model, layers, generator)
    for layer in layers:
        _write(layer, bias_scale, generator)
    return SparseInitReport([_row(layer) for layer in layers], left_dense(model), notes)


def _plan(
    model: nn.Module,
    density: Any,
    groups: Any,
    bias: str,
    bias_scale: float,
    gain: float,
    generator: torch.Generator | None,
) -> tuple[list[_Layer], list[str]]:
    """Check everything and draw the masks."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"sparse_init_ needs a torch.nn.Module, got {type(model).__name__}")
    if bias not in _BIASES:
        raise ValueError(f"bias={bias!r} is unknown; use one of {', '.join(map(repr, _BIASES))}")
    if not (isinstance(bias_scale, (int, float)) and 0 <= bias_scale < math.inf):
        raise ValueError(f"bias_scale must be a finite number >= 0, got {bias_scale!r}")
    if not (isinstance(gain, (int, float)) and 0 < gain < math.inf):
        raise ValueError(f"gain must be a finite number > 0, got {gain!r}")
    weights = weight_tensors(model)
    if not weights:
        raise ValueError(f"{type(model).__name__} has no Linear, convolution or attention weight to make sparse")
    densities, groupings = _per_layer(density, weights), _per_layer(groups, weights)
    before_norm = paths.before_norm(model)
    checked = []
    for weight, share, grouping in zip(weights, densities, groupings, strict=True):
        if share is not None and weight.tensor.requires_grad:
            share = plain_number(share)
            _check_density(weight, share)
            checked.append((weight, share, _dims(weight, grouping), _bias(weight, bias, before_norm)))
            _check_memory(weight, checked[-1][-1])
    notes: list[str] = []
    if frozen := [weight.name for weight in weights if not weight.tensor.requires_grad]:
        notes.append(f"frozen (requires_grad=False), so left as they are: {', '.join(frozen)}")
    layers = [_draw(*one, gain, generator, notes) for one in checked]
    return layers, notes


def _per_layer(value: Any, weights: list[Weight]) -> list[Any]:
    if isinstance(value, Mapping):
        return [chosen for _, chosen in by_key(value, weights)]
    return [value] * len(weights)


def _check_density(weight: Weight, density: Any) -> None:
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ValueError(f"density of {weight.name!r} must be in (0, 1], got {density!r}: it is the share of non-zeros")
    if weight.tensor.device.type == "meta" or not weight.tensor.is_floating_point():
        kind = f"{weight.tensor.dtype} on device {weight.tensor.device}"
        raise ValueError(f"{weight.name!r} ({kind}) cannot be initialised; give the model real floating-point weights")


def _check_memory(weight: Weight, bias: str) -> None:
    written = {"weight": weight.tensor}
    if bias not in _LEFT:
        written["bias"] = weight.module.bias  # type: ignore[assignment]
    for kind, tensor in written.items():
        if overlaps_itself(tensor):
            name = weight.name if kind == "weight" else f"{weight.module_name}.bias".lstrip(".")
            raise ValueError(
                f"{name!r} has elements that share memory (strides {tensor.stride()}, as expand() makes), so that it "
                "cannot be initialised; clone() it before it becomes a parameter"
            )


def _dims(weight: Weight, groups: Groups) -> tuple[int, ...]:
    ndim = weight.tensor.dim()
    if isinstance(groups, str) and groups not in GROUP_DIMS:
        raise ValueError(f"groups={groups!r} is unknown; use None, 'out', 'in', 'kernel' or a tuple of dims")
    dims = tuple(range(ndim)) if groups is None else GROUP_DIMS[groups] if isinstance(groups, str) else groups
    dims = tuple(map(plain_number, dims))
    if not all(isinstance(dim, int) and -ndim <= dim < ndim for dim in dims):
        raise ValueError(f"groups={groups!r} does not fit {weight.name!r} of shape {tuple(weight.tensor.shape)}")
    return tuple(sorted({dim % ndim for dim in dims}))


def _bias(weight: Weight, bias: str, before_norm: set[nn.Module]) -> str:
    if isinstance(weight.module, (nn.MultiheadAttention, NonDynamicallyQuantizableLinear)):
        return "keep"  # attention: no ReLU follows, and torch starts its biases at zero
    if getattr(weight.module, "bias", None) is None:
        return "none"
    return "zero (before a norm)" if weight.module in before_norm and bias != "keep" else bias


def _draw(
    weight: Weight,
    density: float,
    dims: tuple[int, ...],
    bias: str,
    gain: float,
    generator: torch.Generator | None,
    notes: list[str],
) -> _Layer:
    shape = weight.tensor.shape
    sizes = [shape[dim] for dim in dims]
    total = math.prod(sizes)
    kept = min(total, max(1, round(density * total)))
    if total and kept > 2 * density * total:
        notes.append(f"{weight.name}: one of {total} is more than a density of {density:g}")
    mask = torch.zeros(total, dtype=torch.bool)
    device = weight.tensor.device if generator is None else generator.device
    mask[torch.randperm(total, generator=generator, device=device)[:kept].cpu()] = True
    fan = paths.fan_in(weight.module, shape)
    std = gain / math.sqrt(fan * kept / total) if total and fan else 0.0
    return _Layer(weight, dims, mask.view(sizes), std, bias)


def _connect(model: nn.Module, layers: list[_Layer], generator: torch.Generator | None) -> list[str]:
    """Give every nn.Sequential a live path; returns what was moved and what is not known."""
    by_module = {layer.weight.module: layer for layer in layers}
    notes: list[str] = []
    seen: set[nn.Module] = set()
    for sequence in paths.sequences(model):
        stream = paths.Stream()
        for _, module in sequence:
            if isinstance(module, (nn.Linear, _ConvNd)):
                notes += _connect_layer(module, by_module.get(module), stream, generator, first=module not in seen)
                seen.add(module)
            else:
                stream.pass_on(module)
    if unknown := [layer.weight.name for layer in layers if layer.weight.module not in seen]:
        notes.append(
            "not in an nn.Sequential, so no live path is guaranteed through these; each keeps a weight, which may read "
            f"a dead input: {', '.join(unknown)}"
        )
    return notes


def _connect_layer(
    module: nn.Linear | _ConvNd,
    layer: _Layer | None,
    stream: paths.Stream,
    generator: torch.Generator | None,
    first: bool,
) -> list[str]:
    live = stream.inputs(module)
    if layer is None or not first:  # left as it is, or met again: what it does to the stream is not told
        stream.weigh(module, None)
        return []
    name, notes = layer.weight.name, []
    if live is None and stream.position:
        notes.append(f"{name}: which of its inputs are live is not known, so the path before it may end there")
    edges = paths.live_edges(module, live, layer.shape)
    if paths.keep_path_(layer.mask, edges, layer.dims, layer.shape, generator):
        notes.append(f"{name}: moved one kept {'element' if layer.elementwise else 'group'} to a live input")
    outputs = paths.live_outputs(module, paths.pairs_of(layer.mask, layer.dims, layer.shape) & edges)
    layer.live_outputs = int(outputs.sum())
    stream.weigh(module, outputs)
    return notes


def _write(layer: _Layer, bias_scale: float, generator: torch.Generator | None) -> None:
    tensor = layer.weight.tensor
    device = tensor.device if generator is None else generator.device
    mask = layer.element_mask().to(tensor.device)
    # Drawn in fp32 and never zero after rounding, so that the count stays exact in 16 bits, too.
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    values = torch.randn(int(mask.sum()), generator=generator, device=device, dtype=wide).mul_(layer.std)
    values = values.to(tensor.device, tensor.dtype)
    values[values == 0] = layer.std
    fresh = torch.zeros_like(tensor)
    fresh[mask] = values
    tensor.copy_(fresh)
    if layer.bias in _LEFT:
        return
    bias = layer.weight.module.bias
    assert isinstance(bias, Tensor)
    if layer.bias.startswith("zero"):
        bias.zero_()
    else:
        reach = bias_scale / math.sqrt(paths.fan_in(layer.weight.module, layer.shape) or 1)
        low = 0.0 if layer.bias == "positive" else -reach
        drawn = torch.rand(bias.shape, generator=generator, device=device) * (reach - low) + low
        bias.copy_(drawn)


def _row(layer: _Layer) -> InitRow:
    tensor, nonzeros = layer.weight.tensor, int(torch.count_nonzero(layer.weight.tensor))
    groups, kept = (None, None) if layer.elementwise else (layer.mask.numel(), int(layer.mask.sum()))
    return InitRow(
        layer.weight.name, tuple(layer.shape), tensor.numel(), nonzeros, groups, kept,
        layer.std, layer.bias, layer.live_outputs,
    )  # fmt: skip
