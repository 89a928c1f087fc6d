"""What a state dict must hold to be loaded. All of it is checked before an optimizer changes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._masks import packed_size
from ._plan import slots_of
from ._rule import Rule

if TYPE_CHECKING:
    from ._base import SparseOptimizer

FLAGS = {"maximize": False, "fused": None, "count_nonzeros": False, "check_finite": False}  # may be missing
# What torch's schedulers and SWA write into a group, and its Optimizer when it loads.
_FOREIGN = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr", "differentiable"}


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
        rule = optimizer._rule({**optimizer.defaults, **theirs})
        for index, (param, i) in enumerate(zip(mine["params"], theirs["params"])):
            if i in saved["state"]:
                name = f"{owner}: the state dict's state of {optimizer._describe(mine, index)}"
                _check_state(name, rule, param, saved["state"][i])


def _check_group(optimizer: SparseOptimizer, where: str, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    if unknown := {*theirs} - {*optimizer.defaults, *mine, *FLAGS, *_FOREIGN, "param_names"}:
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
    # These may have been switched on, or the parameter become 16 bits wide, after the last step.
    later = {"momentum_buffer", "max_exp_avg_sq", "master"}
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
        if key == "mask":
            if value.dtype != torch.uint8 or value.shape != (packed_size(param),):
                raise ValueError(
                    f"{where}: the packed mask must be torch.uint8 of shape ({packed_size(param)},), "
                    f"got {value.dtype} of shape {tuple(value.shape)}"
                )
        elif getattr(value, "placements", None) != getattr(param, "placements", None):
            raise ValueError(
                f"{where}: {key} is sharded as {getattr(value, 'placements', 'a whole')}, the parameter as "
                f"{getattr(param, 'placements', 'a whole')}; load through torch.distributed.checkpoint"
            )
        elif value.shape != param.shape:
            raise ValueError(f"{where}: {key} has shape {tuple(value.shape)}, the parameter {tuple(param.shape)}")
        elif not value.is_floating_point():
            raise TypeError(f"{where}: {key} must be floating-point, got {value.dtype}")
