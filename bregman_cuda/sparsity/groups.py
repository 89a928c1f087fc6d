"""Parameter groups: sparse weights, plain everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Union

from torch import nn

from .._warn import warn
from ..regularizers import L1, Regularizer
from .layers import Weight, computed_weights, matches, named_tensors, weight_tensors

Choice = Union[
    Regularizer,
    None,
    Mapping[Union[str, type[nn.Module]], Union[Regularizer, None]],
    Callable[[str, nn.Parameter], Union[Regularizer, None]],
]


def param_groups(model: nn.Module, weights: Choice = L1(0.1), **overrides: Any) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: a regularizer on the weights of the layers, none on all other parameters.

    Weights are those of Linear, Conv1-3d, ConvTranspose1-3d and MultiheadAttention. Biases, norms, embeddings (and
    a weight tied to one), recurrent layers and parameters of your own modules get ``reg=None``: every parameter of
    the model is in exactly one group, a shared one once.

    Args:
        model: a module whose parameters have shapes.
        weights: what the weights get.
            A regularizer, or None. The default, ``L1(0.1)``, is made anew by each call.
            A dict ``{key: regularizer or None}``, where a key is a layer type or a shell pattern on the parameter's
            name; the first key that fits decides, and every weight must meet one. A key that is the exact name of
            another parameter regularizes that one too.
            A function ``(name, parameter) -> regularizer or None``.
            Layers that get the same object share a group, and so its ``lam``.
            Note that dim 0 of a ConvTranspose weight is the input channel: ``groups="out"`` means dim 0.
        overrides: entries that every group gets, such as ``lr=0.1``.

    Returns:
        Dicts with ``params`` as (name, parameter) pairs, ``reg`` and the overrides; the plain group comes last.

    Raises:
        TypeError: `model` is no module, or `weights` gives something that is no regularizer.
        ValueError: no parameters, a lazy module without shapes, a key that fits nothing, a weight that meets no key,
            a regularizer that does not fit a weight's shape, or ``params``/``reg`` among the overrides.

    Warns:
        UserWarning: a weight is computed by a parametrization, so what it is computed from stays plain; or nothing is
            regularized, and neither None nor a dict of None asked for that.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> [(group["reg"], [name for name, _ in group["params"]]) for group in param_groups(model, L1(0.5))]
    [(L1(lam=0.5), ['0.weight', '2.weight']), (None, ['0.bias', '2.bias'])]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups needs a torch.nn.Module, got {type(model).__name__}")
    if clash := sorted({"params", "reg"} & overrides.keys()):
        raise ValueError(f"param_groups sets {' and '.join(map(repr, clash))} itself; use `weights` for regularizers")
    named = named_tensors(model)
    if not named:
        raise ValueError(f"{type(model).__name__} has no parameters")
    if weights is _DEFAULT:
        weights = L1(_DEFAULT.lam)  # regularizers are mutable: two optimizers must not share one by accident
    chosen = _choose(model, weights)
    groups: dict[int, dict[str, Any]] = {}
    for name, parameter in sorted(named, key=lambda pair: chosen.get(pair[0]) is None):
        reg = chosen.get(name)
        group = groups.setdefault(id(reg), {"params": [], "reg": reg, **overrides})
        group["params"].append((name, parameter))
    asks_for_none = weights is None or callable(weights) or (isinstance(weights, Mapping) and len(weights) > 0)
    if all(reg is None for reg in chosen.values()) and not asks_for_none:
        rest = ", ".join([name for name, _ in named[:5]] + ["..."] * (len(named) > 5))
        warn(
            f"{type(model).__name__} has no weight for {weights}, so nothing is regularized. Its parameters are "
            f"{rest}; name those that should be in a dict, such as {{{named[0][0]!r}: L1(0.1)}}"
        )
    for name in computed_weights(model):
        warn(f"{name!r} is computed by a parametrization: its sources stay plain")
    return list(groups.values())


_DEFAULT: L1 = param_groups.__defaults__[0]  # type: ignore[index]


def _choose(model: nn.Module, weights: Choice) -> dict[str, Regularizer | None]:
    found = weight_tensors(model)
    if isinstance(weights, Mapping):
        chosen = {weight.name: reg for weight, reg in by_key(weights, _with_named(model, weights, found))}
    elif isinstance(weights, Regularizer) or weights is None:
        chosen = dict.fromkeys((weight.name for weight in found), weights)
    elif callable(weights):
        chosen = {weight.name: weights(weight.name, weight.tensor) for weight in found}
    else:
        raise TypeError(f"weights={weights!r} is no regularizer; use e.g. L1(0.1), or None")
    parameters = dict(named_tensors(model))
    for name, reg in chosen.items():
        if not (reg is None or isinstance(reg, Regularizer)):
            raise TypeError(f"parameter {name!r} got {reg!r}, which is no regularizer; use e.g. L1(0.1), or None")
        _check_fit(name, parameters[name], reg)
    return chosen


def _check_fit(name: str, parameter: nn.Parameter, reg: Regularizer | None) -> None:
    try:
        if reg is not None:
            reg.groups_of(parameter.shape)
    except ValueError as error:
        raise ValueError(f"parameter {name!r}: {error}") from None


def _with_named(model: nn.Module, keys: Mapping[Any, Any], found: list[Weight]) -> list[Weight]:
    """The weights, and other parameters that a key names exactly."""
    known = {weight.name for weight in found}
    extra = [(name, p) for name, p in named_tensors(model) if name in keys and name not in known]
    return found + [Weight(name, p, model, "") for name, p in extra]


def by_key(choices: Mapping[Any, Any], weights: list[Weight]) -> list[tuple[Weight, Any]]:
    """What the first fitting key gives to each weight.

    Raises:
        TypeError: a key is neither a string nor a layer type.
        ValueError: a key that fits no weight, or a weight that meets no key.
    """
    for key in choices:
        if not (isinstance(key, str) or (isinstance(key, type) and issubclass(key, nn.Module))):
            raise TypeError(f"key {key!r} is neither a name pattern nor a layer type")
        if not any(matches(key, weight) for weight in weights):
            names = ", ".join(weight.name for weight in weights) or "none"
            raise ValueError(f"key {key!r} fits no weight; the weights are: {names}")
    chosen = []
    for weight in weights:
        key = next((key for key in choices if matches(key, weight)), None)
        if key is None:
            raise ValueError(f'weight {weight.name!r} meets no key; add one, or "*": None to leave the rest as it is')
        chosen.append((weight, choices[key]))
    return chosen
