"""Filters as units: norms, sizes of a network that is rebuilt smaller, extraction, and growing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..regularizers._base import check_count, check_number

if TYPE_CHECKING:
    from ..optim.splitlbi import SplitLBI
    from .activation_path import ActivationPath

Layer = Union[nn.Linear, _ConvNd]


def owner_of(model: Any, name: str) -> tuple[str, str, nn.Module]:
    """Prefix with dot, attribute and module of a parameter's name.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"this needs the layers of a torch.nn.Module, got {type(model).__name__}")
    prefix, dot, attribute = name.rpartition(".")
    return prefix + dot, attribute, model.get_submodule(prefix)


def filter_dim(model: Any, name: str, param: Tensor) -> int:
    """The dimension of the output channels: 1 for transposed convolutions, 0 elsewhere.

    Raises:
        ValueError: a grouped transposed convolution, whose dim 1 is no list of all output channels.
    """
    module = owner_of(model, name)[2] if isinstance(model, nn.Module) else None
    if not isinstance(module, _ConvTransposeNd) or param is not module.weight:
        return 0
    if module.groups != 1:
        raise ValueError(f"{name!r} is a transposed convolution with groups={module.groups}: its filters are no slices")
    return 1


def filter_norms(values: Tensor, dim: int = 0) -> Tensor:
    """Euclidean norm of every filter: a 1-D tensor over the output dimension."""
    if values.ndim == 0:
        return values.abs().reshape(1)
    rest = [d for d in range(values.ndim) if d != dim]
    return torch.linalg.vector_norm(values, dim=rest) if rest else values.abs()


@dataclass(frozen=True)
class LayerSize:
    """Channels of a layer, and how many of them an active weight of the twin touches."""

    inputs: int
    outputs: int
    active_inputs: int
    active_outputs: int


@torch.no_grad()
def layer_sizes(model: nn.Module, optimizer: SplitLBI) -> dict[str, LayerSize]:
    """Sizes for rebuilding the network without what never entered, by the weight's name, in the order of the model.

    An output is active if any weight of its filter is, an input if any weight that reads it is. Whether a following
    layer can do without an inactive output is for the caller to decide: biases and norms may still emit something.

    Raises:
        TypeError, ValueError: another optimizer, or no parameter with a twin.
    """
    from .activation_path import with_twin

    sizes, counts = {}, []
    for name, param in with_twin(model, optimizer).items():
        layer = owner_of(model, name)[2]
        if not isinstance(layer, (nn.Linear, _ConvNd)):
            continue
        active = optimizer.support(param).flatten(2) if param.ndim > 2 else optimizer.support(param)
        active = active.any(2) if active.ndim > 2 else active
        groups = layer.groups if isinstance(layer, _ConvNd) else 1
        by_group = active.view(groups, -1, active.shape[1])  # [group, dim 0 in it, dim 1]
        ends = [by_group.any(2).flatten(), by_group.any(1).flatten()]  # outputs and inputs, transposed: the other way
        outputs, inputs = reversed(ends) if isinstance(layer, _ConvTransposeNd) else ends
        counts += [inputs.sum(), outputs.sum()]
        sizes[name] = (len(inputs), len(outputs))
    read = torch.stack([count.cpu() for count in counts]).tolist() if counts else []
    return {name: LayerSize(*size, *read[2 * i : 2 * i + 2]) for i, (name, size) in enumerate(sizes.items())}


@dataclass(frozen=True)
class TopFilters:
    """Filters taken out of a layer: their indices in increasing order, weights, biases, and what reads them."""

    indices: Tensor
    weight: Tensor
    bias: Tensor | None
    consumer_weight: Tensor | None


@torch.no_grad()
def extract_top_filters(path: ActivationPath, layer: str, n: int, consumer: str | None = None) -> TopFilters:
    """Copies of the n filters of a layer that entered the twin first, with the weights that read them.

    Args:
        path: what was recorded.
        layer: exact name of the weight.
        n: how many, from 1 to the number of filters.
        consumer: exact name of the weight that reads this layer's output; one behind a flatten reads every filter
            with a run of inputs, and must not be a convolution.

    Raises:
        ValueError: n out of range, an unknown layer, or a consumer that does not read the filters.
    """
    ranks = path.ranks(layer, "filter")
    n = check_count("extract_top_filters", "n", n, 1)
    if n > len(ranks):
        raise ValueError(f"extract_top_filters: n must be at most the {len(ranks)} filters of {layer!r}, got {n!r}")
    param = path._param(layer, "filter")
    indices = (ranks < n).nonzero().flatten()
    bias = getattr(owner_of(path.model, layer)[2], "bias", None) if isinstance(path.model, nn.Module) else None
    reads = None
    if consumer is not None:
        _, attribute, module = owner_of(path.model, consumer)
        weight = getattr(module, attribute)
        dim = 0 if isinstance(module, _ConvTransposeNd) else 1
        run, rest = divmod(weight.shape[dim], len(ranks))
        if rest or not run or getattr(module, "groups", 1) != 1 or (run > 1 and isinstance(module, _ConvNd)):
            raise ValueError(
                f"{consumer!r} with {weight.shape[dim]} inputs does not read the {len(ranks)} filters of {layer!r}"
            )
        columns = (indices[:, None] * run + torch.arange(run, device=indices.device)).flatten()
        reads = weight.detach().index_select(dim, columns)
    taken = param.detach().index_select(filter_dim(path.model, layer, param), indices)
    return TopFilters(indices, taken, None if bias is None else bias.detach()[indices].clone(), reads)


@torch.no_grad()
def active_fraction(optimizer: SplitLBI, layer: Layer) -> float:
    """Share of a layer's filters that are active in the twin. Reads from the device.

    Raises:
        TypeError: an optimizer without twins.
        KeyError, ValueError: the weight is not the optimizer's, or has no twin.
    """
    if not hasattr(optimizer, "support"):
        raise TypeError(
            f"the share of active filters is that of SplitLBI's twin, got {type(optimizer).__name__}; "
            "grow_layer takes any optimizer with threshold=0"
        )
    dim = filter_dim(layer, "weight", layer.weight)
    support = optimizer.support(layer.weight).transpose(0, dim)
    return float(support.flatten(1).any(1).float().mean())


@torch.no_grad()
def grow_layer(
    optimizer: SplitLBI,
    layer: Layer,
    consumer: Layer | Sequence[Layer],
    n: int,
    *,
    threshold: float = 0.0,
    norm: nn.Module | None = None,
    outgoing: Literal["zero", "random"] = "random",
) -> int:
    """Widen a layer by n filters, and the layers that read it, once enough of its filters are active.

    Old weights stay in the leading block; new filters (and biases) get the layer's own initialisation, new channels of
    the norm weight 1 and bias 0. With `outgoing="zero"` the consumer's new inputs are zero and the network computes
    what it did before; "random", its own initialisation, is the paper's. Modules change in place; parameters are new
    objects, exchanged in the optimizer, whose state for them begins anew, masks included.

    Args:
        optimizer: SplitLBI (for threshold 0 any optimizer) that holds the parameters.
        layer: Linear or convolution, without groups. Its output must go to the consumers alone: where it is added to
            another layer's (a residual connection), both would have to grow.
        consumer: the layer that reads it, or all of them; Linear or convolution, without groups. A Linear behind a
            flatten reads runs of inputs.
        n: how many filters more, >= 1. The paper takes max(8, n_old // 10).
        threshold: from 0 to 1; nothing is done while a smaller share than this of the filters is active.
        norm: batch norm or instance norm between them.
        outgoing: "zero" or "random".

    Returns:
        How many filters were added: n or 0.

    Raises:
        ValueError, TypeError: n < 1, a threshold out of range or without SplitLBI, groups, layers that do not fit each
            other, a parameter (not frozen) that the optimizer does not hold; nothing was changed.
    """
    check_number("grow_layer", "threshold", threshold, high=1.0)
    n = check_count("grow_layer", "n", n, 1)
    if outgoing not in ("zero", "random"):
        raise ValueError(f"grow_layer: outgoing must be 'zero' or 'random', got {outgoing!r}")
    consumers: list[Any] = [consumer] if isinstance(consumer, nn.Module) else [*consumer]
    if not consumers or len({layer, *consumers}) != 1 + len(consumers):
        raise ValueError("grow_layer: the layer and its consumers, one at least, must be different modules")
    for one in (layer, *consumers):
        if not isinstance(one, (nn.Linear, _ConvNd)) or getattr(one, "groups", 1) != 1:
            raise TypeError(f"grow_layer: Linear and convolutions without groups can grow, got {one}")
    outputs = layer.weight.shape[filter_dim(layer, "weight", layer.weight)]
    runs = []
    for one in consumers:
        reads = one.weight.shape[0 if isinstance(one, _ConvTransposeNd) else 1]
        run, rest = divmod(reads, outputs)
        if rest or not run or (run > 1 and not isinstance(one, nn.Linear)):
            raise ValueError(f"grow_layer: the consumer has {reads} inputs, the layer {outputs} outputs")
        runs.append(run)
    if norm is not None and (not isinstance(norm, _NormBase) or norm.num_features != outputs):
        raise TypeError(f"grow_layer: norm must be a batch or instance norm of {outputs} channels, got {norm}")
    changing: dict[str, Tensor] = {f"layer.{name}": p for name, p in layer.named_parameters(recurse=False)}
    of = lambda i: f"[{i}]" if len(consumers) > 1 else ""  # noqa: E731
    changing |= {f"consumer{of(i)}.weight": one.weight for i, one in enumerate(consumers)}
    changing |= {} if norm is None else {f"norm.{name}": p for name, p in norm.named_parameters(recurse=False)}
    held = {p for group in optimizer.param_groups for p in group["params"]}
    for name, param in changing.items():
        if param.requires_grad and param not in held:
            raise ValueError(
                f"grow_layer: the optimizer does not hold {name} of shape {tuple(param.shape)}, and would not train "
                "what replaces it; pass the optimizer that does, or freeze it by requires_grad_(False)"
            )
    if threshold > 0 and active_fraction(optimizer, layer) < threshold:
        return 0
    _widen(optimizer, layer, {"out_features": n, "out_channels": n})
    for one, run in zip(consumers, runs):
        _widen(optimizer, one, {"in_features": n * run, "in_channels": n * run}, outgoing == "zero")
    if norm is not None:
        _widen(optimizer, norm, {"num_features": n})
    return n


def _widen(optimizer: torch.optim.Optimizer, module: Any, more: dict[str, int], zero: bool = False) -> None:
    """Add to sizes of a module: fresh parameters and buffers of the new shapes, the old ones in their leading block."""
    sizes = {name: getattr(module, name) + count for name, count in more.items() if hasattr(module, name)}
    wider = _rebuilt(module, sizes)
    for name, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        fresh = getattr(wider, name).detach()
        if fresh.shape == old.shape:
            continue
        new = torch.zeros_like(fresh, device=old.device, dtype=old.dtype, memory_format=_format(old))
        if not zero:
            new.copy_(fresh)
        new[tuple(slice(0, size) for size in old.shape)] = old
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            _exchange(optimizer, old, new)
        setattr(module, name, new)
    for name, size in sizes.items():
        setattr(module, name, size)


def _rebuilt(module: Any, sizes: dict[str, int]) -> nn.Module:
    """A module of the same kind and of other sizes, freshly initialised on the CPU."""
    size = lambda name: sizes.get(name, getattr(module, name))  # noqa: E731
    if isinstance(module, nn.Linear):
        return nn.Linear(size("in_features"), size("out_features"), module.bias is not None)
    if isinstance(module, _NormBase):
        affine, tracks = module.affine, module.track_running_stats
        return type(module)(size("num_features"), affine=affine, track_running_stats=tracks)
    channels = size("in_channels"), size("out_channels")
    return type(module)(*channels, module.kernel_size, stride=module.stride, bias=module.bias is not None)


def _exchange(optimizer: Any, old: nn.Parameter, new: nn.Parameter) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    optimizer.state.pop(old, None)
    if hasattr(optimizer, "_forget_plans"):
        optimizer._forget_plans()


def _format(old: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(old.ndim)
    if last is not None and not old.is_contiguous() and old.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format
