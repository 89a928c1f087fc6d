"""What the options and parameters of a group may be: all of it is checked before anything changes."""

from __future__ import annotations

import difflib
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from .._warn import warn
from ..regularizers import Regularizer
from ..regularizers._base import check_number
from . import _checkpoint, _masks
from ._plan import check_together
from ._shards import is_elsewhere, local, why_refused

if TYPE_CHECKING:
    from ._base import SparseOptimizer

# What looks like an option, and is none.
_OF_REGULARIZERS = dict.fromkeys(("lam", "lamda", "lambda", "regularizer"), "'reg', such as reg=L1(lam=0.1),")
# Values that nobody can change in place.
_FIXED = (int, float, str, tuple, type(None))


def warn_of_misspelt(optimizer: SparseOptimizer, param_group: dict[str, Any]) -> None:
    """Warn of entries of a new group that do nothing and look like options."""
    meant = {name: repr(name) for name in (*optimizer.defaults, "params")} | _OF_REGULARIZERS
    for name in param_group:
        known = name in optimizer.defaults or name in ("params", "param_names", *_checkpoint.FOREIGN)
        likely = [] if known or not isinstance(name, str) else difflib.get_close_matches(name, meant, 1, 0.8)
        if likely:
            warn(
                f"{type(optimizer).__name__} has no option {name!r}: that entry of a parameter group does nothing. "
                f"Is {meant[likely[0]]} meant?"
            )


def check_lr(owner: str, lr: Any, capturable: bool = False) -> None:
    """A step size is a finite number >= 0, or a one-element tensor."""
    if torch.is_tensor(lr):
        if lr.numel() != 1:
            raise ValueError(f"{owner}: a tensor lr must have one element, got shape {tuple(lr.shape)}")
        if lr.device.type != "cpu" or capturable:
            return  # reading it would synchronise
        lr = lr.item()
    check_number(owner, "lr", lr)


def check_options(optimizer: SparseOptimizer, group: dict[str, Any]) -> None:
    """Refuse an option out of its range; numbers of numpy become Python's."""
    owner, reg = type(optimizer).__name__, group["reg"]
    _checkpoint.plain_options(group, getattr(optimizer, "defaults", group))  # torch sets them after the first check
    for flag in ("maximize", "count_nonzeros", "check_finite", "capturable"):
        if group[flag] not in (True, False):
            raise ValueError(f"{owner}: {flag} must be True or False, got {group[flag]!r}")
        group[flag] = bool(group[flag])
    check_lr(owner, group["lr"], group["capturable"])
    if reg is not None and not isinstance(reg, Regularizer):
        raise TypeError(f"{owner}: reg must be None or a regularizer such as bregman_cuda.L1(lam=0.1), got {reg!r}")
    if reg is not None:
        reg.check_tensors()
    if reg is not None and -1 in reg.budgets(2) and not optimizer.joint:
        raise ValueError(
            f"{owner}: reg must have one k per tensor (scope='tensor') here; ProxSGD and HSPG share it, got {reg!r}"
        )
    if group["fused"] not in (None, True, False):
        raise ValueError(f"{owner}: fused must be True, False or None, got {group['fused']!r}")
    if group["fused"] is not None:
        group["fused"] = bool(group["fused"])
    if group["capturable"] and group["check_finite"]:
        raise ValueError(f"{owner}: check_finite reads gradients on the host, so that capturable must be False")
    optimizer._check_group(group)
    if reg is not None and (why := reg.why_no_prox()):
        raise ValueError(f"{owner}: {why}")
    if reg is not None and optimizer._rule(group).metric and (why := reg.why_not_weighted()):
        raise ValueError(f"{owner}: every weight has a step size of its own here, and {why}")
    if reg is not None and reg.every > 1:
        skipping = f"{owner}: {type(reg).__name__}(every={reg.every}) leaves steps without a prox, "
        if not optimizer._rule(group).skips_prox:
            raise ValueError(f"{skipping}and only ProxSGD's later ones make up for it: use that, or every=1")
        if group["capturable"]:
            raise ValueError(f"{skipping}which their count decides on the host: set capturable=False, or every=1")


def check_changed_options(optimizer: SparseOptimizer, number: int, group: dict[str, Any]) -> None:
    """`check_options`, unless all values are the very objects that passed it before and none can change itself."""
    reg = group["reg"]
    now = [*group.values(), *(getattr(reg, name, None) for name in getattr(reg, "__dataclass_fields__", ()))]
    known = optimizer._checked.get(number, ())
    if len(now) == len(known) and all(map(operator.is_, now, known)):
        return
    check_options(optimizer, group)
    others = [value for name, value in group.items() if name not in ("params", "param_names", "reg")]
    fixed = all(isinstance(value, _FIXED) for value in [*others, *now[len(group) :]])
    optimizer._checked[number] = now if fixed else ()


def check_params(optimizer: SparseOptimizer, group: dict[str, Any]) -> None:
    """Refuse parameters that cannot be trained, or not with the group's regularizer; the options have been checked."""
    owner, reg = type(optimizer).__name__, group["reg"]
    for index, param in enumerate(group["params"]):
        if is_lazy(param):
            raise ValueError(
                f"{owner}: parameter {index} has no shape yet (a lazy layer); run a batch through the model first"
            )
        if not param.is_floating_point():
            raise TypeError(
                f"{owner}: {optimizer._describe(group, index)} has dtype {param.dtype}; "
                "only real floating-point parameters can be trained"
            )
        if param.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(
                f"{owner}: {optimizer._describe(group, index)} has unsupported dtype {param.dtype}; "
                "train it in float32, float64, bfloat16 or float16"
            )
        if param.layout is not torch.strided:
            raise TypeError(
                f"{owner}: {optimizer._describe(group, index)} has layout {param.layout}; "
                "train a dense one: to_dense() before it becomes a parameter"
            )
        if _masks.overlaps_itself(local(param)):
            raise ValueError(
                f"{owner}: {optimizer._describe(group, index)} has elements that share memory (strides "
                f"{tuple(param.stride())}, as expand() makes), so that no step can set each; clone() it before it "
                "becomes a parameter"
            )
        if reg is not None:
            try:
                reg.groups_of(param.shape)
            except ValueError as error:
                raise ValueError(f"{owner}: {optimizer._describe(group, index)}: {error}") from None
        if why := why_refused(param, reg, optimizer._rule(group), group["capturable"]):
            raise NotImplementedError(f"{owner}: {optimizer._describe(group, index)}: {why}")
    if reg is not None:
        try:
            reg.fits_together([param.shape for param in group["params"]])
            check_together(reg, group["params"], len({(p.dtype, p.device, is_elsewhere(p)) for p in group["params"]}))
        except ValueError as error:
            raise ValueError(f"{owner}: {error}") from None
