"""Which parameters of a model are weights of Linear, convolution and attention layers: told once, for all of
`param_groups`, `sparse_init_` and `density`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(frozen=True)
class Weight:
    """A weight that may be made sparse: its full name, the parameter, the layer that holds it and that layer's name."""

    name: str
    tensor: nn.Parameter
    module: nn.Module
    module_name: str


def named_tensors(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Every parameter once (a shared one under its first name).

    Raises:
        ValueError: a lazy module that has not seen data yet.
    """
    named = list(model.named_parameters())
    for name, parameter in named:
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} of a lazy module has no shape yet; run one forward pass of the model first"
            )
    return named


def weight_tensors(model: nn.Module) -> list[Weight]:
    """Weights of Linear, Conv1-3d, ConvTranspose1-3d and MultiheadAttention, each once, in the order of the model.

    Not among them: a weight that an embedding shares (it is an embedding), and one that a parametrization computes
    (``torch.nn.utils.parametrizations``): it is no parameter.
    """
    names = {parameter: name for name, parameter in named_tensors(model)}
    embedded = {p for module in model.modules() if isinstance(module, EMBEDDINGS) for p in module.parameters()}
    found: dict[nn.Parameter, Weight] = {}
    for module_name, module in model.named_modules():
        for attribute in _weight_attributes(module):
            tensor = module._parameters.get(attribute)
            if tensor is not None and tensor not in embedded:
                found.setdefault(tensor, Weight(names[tensor], tensor, module, module_name))
    return list(found.values())


def computed_weights(model: nn.Module) -> Iterator[str]:
    """Names of Linear and convolution weights that a parametrization or an old-style hook computes."""
    for module_name, module in model.named_modules():
        if isinstance(module, (nn.Linear, _ConvNd)) and module._parameters.get("weight") is None:
            yield f"{module_name}.weight".lstrip(".")


def _weight_attributes(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, (nn.Linear, _ConvNd)):
        return ("weight",)
    return ATTENTION_WEIGHTS if isinstance(module, nn.MultiheadAttention) else ()


def matches(key: str | type[nn.Module], weight: Weight) -> bool:
    """A key chooses weights by layer type, or by a shell pattern on the full name of the parameter."""
    return fnmatchcase(weight.name, key) if isinstance(key, str) else isinstance(weight.module, key)
