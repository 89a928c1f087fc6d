"""Live paths: which outputs of a sparse layer still depend on the data, along every nn.Sequential of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from .layers import NORMS, weight_tensors

# Layers of these files of torch pass channels on one by one; the named exceptions rearrange them.
_PASSES = ("activation", "batchnorm", "dropout", "flatten", "instancenorm", "normalization", "padding", "pooling")
_REARRANGES = (nn.MultiheadAttention, nn.Unflatten)


def sequences(model: nn.Module, name: str = "") -> Iterator[list[tuple[str, nn.Module]]]:
    """The layers of every nn.Sequential, those of nested ones in line, with their full names.

    A module of another kind, such as a residual block, is one layer of the sequence around it; the sequences inside of
    it come by themselves.
    """
    if isinstance(model, nn.Sequential):
        children = list(_in_line(model, name))
        yield children
    else:
        children = [(f"{name}.{child_name}".lstrip("."), child) for child_name, child in model.named_children()]
    for child_name, child in children:
        yield from sequences(child, child_name)


def _in_line(sequence: nn.Sequential, name: str) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in sequence.named_children():
        full = f"{name}.{child_name}".lstrip(".")
        if isinstance(child, nn.Sequential):
            yield from _in_line(child, full)
        else:
            yield full, child


def before_norm(model: nn.Module) -> set[nn.Module]:
    """Linear and convolution layers whose output goes into a norm layer of the same width.

    Told from the order in which modules are registered: exact in an nn.Sequential, a good guess elsewhere.
    """
    found: set[nn.Module] = set()
    for parent in model.modules():
        children = [c for c in parent.children() if not isinstance(c, nn.Identity)]
        if isinstance(parent, nn.Sequential):
            children = [c for _, c in _in_line(parent, "") if not isinstance(c, nn.Identity)]
        for layer, after in zip(children, children[1:], strict=False):
            pair = isinstance(layer, (nn.Linear, _ConvNd)) and isinstance(after, NORMS)
            if pair and _norm_width(after) in (None, _outputs(layer)):
                found.add(layer)
    return found


def _norm_width(norm: nn.Module) -> int | None:
    for attribute in ("num_features", "num_channels"):
        if isinstance(width := getattr(norm, attribute, None), int):
            return width
    shape = getattr(norm, "normalized_shape", None)
    return int(shape[-1]) if shape else None


def _outputs(layer: nn.Module) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


class Stream:
    """Which channels between two layers of a sequence depend on the data.

    ``live`` is a bool tensor over the channels, or None where that cannot be told: then every input counts as live.
    """

    def __init__(self) -> None:
        self.live: Tensor | None = None
        self.flat = True
        self.position = 0  # layers with weights so far

    def inputs(self, layer: nn.Linear | _ConvNd) -> Tensor | None:
        """Liveness of the layer's inputs, or None."""
        if self.live is None:
            return None
        count = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        per_channel, rest = divmod(count, len(self.live))
        if isinstance(layer, nn.Linear) != self.flat or rest or not per_channel:
            return None
        return self.live.repeat_interleave(per_channel)  # a flattened channel is a run of inputs

    def weigh(self, layer: nn.Linear | _ConvNd, live: Tensor | None) -> None:
        """Go through a layer with weights, whose live outputs are given."""
        self.live, self.flat = live, isinstance(layer, nn.Linear)
        self.position += 1

    def pass_on(self, layer: nn.Module) -> None:
        """Go through a layer without weights of ours."""
        known = type(layer).__module__.removeprefix("torch.nn.modules.") in _PASSES or isinstance(layer, nn.Identity)
        if not known or isinstance(layer, _REARRANGES):
            self.live = None
            self.position += bool(weight_tensors(layer))  # a path may end in it
        elif isinstance(layer, nn.Flatten):
            if (layer.start_dim, layer.end_dim) != (1, -1):
                self.live = None
            self.flat = True


def live_edges(layer: nn.Linear | _ConvNd, live_inputs: Tensor | None, shape: torch.Size) -> Tensor:
    """Bool over (dim 0, dim 1) of the weight: whether that pair reads a live input."""
    if live_inputs is None:
        return torch.ones(shape[:2], dtype=torch.bool)
    if isinstance(layer, _ConvTransposeNd):
        return live_inputs.view(-1, 1).expand(shape[:2])  # dim 0 is the input channel
    groups = layer.groups if isinstance(layer, _ConvNd) else 1
    by_group = live_inputs.view(groups, 1, shape[1])
    return by_group.expand(groups, shape[0] // groups, shape[1]).reshape(shape[:2])


def live_outputs(layer: nn.Linear | _ConvNd, live_pairs: Tensor) -> Tensor:
    """Bool over the outputs: whether any of the live (dim 0, dim 1) pairs leads to it."""
    if isinstance(layer, _ConvTransposeNd):
        groups, outputs = layer.groups, live_pairs.shape[1]
        return live_pairs.view(groups, -1, outputs).any(1).flatten()
    return live_pairs.any(1)


def pairs_of(mask: Tensor, dims: tuple[int, ...], shape: torch.Size) -> Tensor:
    """Bool over (dim 0, dim 1) of a mask over the groups that `dims` identify: whether anything there is kept."""
    view = mask.reshape([shape[d] if d in dims else 1 for d in range(len(shape))])
    return (view.flatten(2).any(2) if len(shape) > 2 else view).expand(shape[:2])


def pick_group(edges: Tensor, dims: tuple[int, ...], shape: torch.Size, generator: torch.Generator | None) -> int:
    """Flat index of a random group that holds one of the given (dim 0, dim 1) pairs."""
    pairs = edges.nonzero()
    first, second = pairs[_random(len(pairs), generator)].tolist()
    index = 0
    for dim in dims:
        place = (first, second)[dim] if dim < 2 else _random(shape[dim], generator)
        index = index * shape[dim] + place
    return index


def _random(high: int, generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(max(high, 1), (), generator=generator, device=device))


def keep_path_(
    mask: Tensor, edges: Tensor, dims: tuple[int, ...], shape: torch.Size, generator: torch.Generator | None
) -> bool:
    """Move one kept group of a mask to a live input if none is at one. Returns whether it moved; the count stays."""
    if not mask.any() or not edges.any() or (pairs_of(mask, dims, shape) & edges).any():
        return False
    kept = mask.flatten().nonzero().flatten()
    flat = mask.view(-1)
    flat[kept[_random(len(kept), generator)]] = False
    flat[pick_group(edges, dims, shape, generator)] = True
    return True


def fan_in(layer: nn.Module, shape: torch.Size) -> float:
    """How many weights meet in one output (on average, for a transposed convolution with stride)."""
    if isinstance(layer, _ConvTransposeNd):
        return shape[0] / layer.groups * math.prod(shape[2:]) / math.prod(layer.stride)
    return math.prod(shape[1:])
