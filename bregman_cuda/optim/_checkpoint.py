"""What a state dict holds, and must hold to be loaded: all of it is checked before an optimizer changes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..regularizers import Regularizer
from ..regularizers._base import plain_number
from ._masks import unpack
from ._plan import slots_of
from ._rule import Rule
from ._shards import layout

if TYPE_CHECKING:
    from ._base import SparseOptimizer

FLAGS = {
    "maximize": False,
    "fused": None,
    "count_nonzeros": False,
    "check_finite": False,
    "capturable": False,
}  # may be missing
# What torch's schedulers and SWA write into a group, and its Optimizer when it loads.
FOREIGN = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "differentiable"}
_PLAIN = {float, int, bool, str, type(None)}


# How many parameters of a group have a mask: torch.distributed.checkpoint leaves out, without a word, the masks of
# parameters that have none in the optimizer that loads.
MASKS = "masks"


def plain(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Makes a state dict plain data: regularizers as dicts, masks as bools, numbers as Python's."""
    state = state_dict["state"] = dict(state_dict["state"])  # its entries are the optimizer's own
    for mine, group in zip(optimizer.param_groups, state_dict["param_groups"]):
        plain_options(group, group)  # those of schedulers, too
        if isinstance(group.get("reg"), Regularizer):
            group["reg"] = group["reg"].to_dict()
        for param, i in zip(mine["params"], group["params"]):
            if "mask" in state.get(i, {}):
                state[i] = {**state[i], "mask": unpack(state[i]["mask"], param)}
        group[MASKS] = _masked(group, state)


def plain_options(group: dict[str, Any], names: Iterable[str]) -> None:
    """Makes the numbers of these options Python's, in place: users and schedulers set numpy's, too."""
    for name in names:
        value: Any = group.get(name)
        kind = type(value)
        if kind in (tuple, list):
            if any(type(part) not in _PLAIN for part in value):
                group[name] = kind(map(plain_number, value))
        elif kind not in _PLAIN:  # each step passes here
            group[name] = plain_number(value)


def _masked(group: dict[str, Any], state: dict[Any, Any]) -> int:
    return sum("mask" in state.get(i, {}) for i in group["params"])


def check(optimizer: SparseOptimizer, saved: dict[str, Any]) -> None:
    """Raises before anything changes; regularizers are objects already.

    Raises:
        KeyError, TypeError, ValueError: the dict is of another model, of another optimizer, or damaged.
    """
    owner = type(optimizer).__name__
    if len(saved["param_groups"]) != len(optimizer.param_groups):
        raise ValueError(
            f"{owner}: the state dict has a different number of parameter groups: "
            f"{len(saved['param_groups'])}, the optimizer {len(optimizer.param_groups)}"
        )
    for number, (mine, theirs) in enumerate(zip(optimizer.param_groups, saved["param_groups"])):
        where = f"{owner}: parameter group {number} of the state dict"
        _check_group(optimizer, where, mine, theirs)
        if (found := _masked(theirs, saved["state"])) < theirs.get(MASKS, 0):
            raise ValueError(
                f"{where} was saved with masks on {theirs[MASKS]} of its parameters, and has {found}: "
                "torch.distributed.checkpoint loads only what the optimizer has already. Call get_optimizer_state_dict "
                "once, set any mask on the same parameters, and call it again for the dict to load into"
            )
        rule = optimizer._rule({**optimizer.defaults, **theirs})
        for index, (param, i) in enumerate(zip(mine["params"], theirs["params"])):
            if i in saved["state"]:
                name = f"{owner}: the state dict's state of {optimizer._describe(mine, index)}"
                _check_state(name, rule, param, saved["state"][i])


def _check_group(optimizer: SparseOptimizer, where: str, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    if unknown := {*theirs} - {*optimizer.defaults, *mine, *FLAGS, *FOREIGN, MASKS, "param_names"}:
        raise ValueError(f"{where} has unknown options {', '.join(map(repr, sorted(unknown)))}: another optimizer's?")
    if missing := {"lr", "params"} - {*theirs}:  # other options of a dict from an older version may be missing
        raise KeyError(f"{where} has no {', '.join(map(repr, sorted(missing)))}")
    if len(theirs["params"]) != len(mine["params"]):
        raise ValueError(
            f"{where} differs in size from the optimizer's group: "
            f"{len(theirs['params'])} and {len(mine['params'])} parameters"
        )
    optimizer._check({**optimizer.defaults, **FLAGS, **theirs, "params": mine["params"]})


def _check_state(where: str, rule: Rule, param: Tensor, saved: dict[str, Any]) -> None:
    """A parameter that has not stepped yet has no state, or a mask alone."""
    slots, counters = slots_of(rule, param), {"step", *rule.counters}
    # These may have been switched on (or a solver off), or the parameter become 16 bits wide, after the last step.
    later = {"momentum_buffer", "max_exp_avg_sq", "master", "point"}
    if unknown := {*saved} - {*rule.slots, *counters, "mask", *later}:
        raise ValueError(f"{where} has unknown entries {', '.join(map(repr, sorted(unknown)))}: another optimizer's?")
    if {*saved} - {"mask"} and (missing := {*counters, *slots} - {*saved} - later):
        raise KeyError(f"{where} has no {', '.join(map(repr, sorted(missing)))}")
    for key, value in saved.items():
        if key in counters:
            number = value.item() if torch.is_tensor(value) and value.numel() == 1 else value
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < math.inf:
                raise ValueError(f"{where}: {key} must be a number >= 0, got {value!r}")
            continue
        if not torch.is_tensor(value):
            raise TypeError(f"{where}: {key} must be a tensor, got {value!r}")
        if layout(value) != layout(param):
            raise ValueError(
                f"{where}: {key} is sharded as {layout(value)}, the parameter as {layout(param)}; "
                "load through torch.distributed.checkpoint"
            )
        if value.shape != param.shape:
            raise ValueError(f"{where}: {key} has shape {tuple(value.shape)}, the parameter {tuple(param.shape)}")
        if key == "mask":
            if value.dtype != torch.bool:
                raise TypeError(f"{where}: the mask must be torch.bool, got {value.dtype}")
        elif not value.is_floating_point():
            raise TypeError(f"{where}: {key} must be floating-point, got {value.dtype}")
