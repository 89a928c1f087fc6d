"""Loads the compiled kernels once, and says in one line what is missing and why."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._version import __version__
from ._warn import warn

if TYPE_CHECKING:
    from .optim._rule import Hyper, Rule

_HERE = Path(__file__).parent
_PENALTY_PARAMETERS = 2  # scalars that a penalty may have in the kernels


def penalty_names(reg: Any) -> list[str]:
    """The kernels' names of a regularizer's penalties, on elements and on group norms."""
    return ["none" if penalty is None else penalty.kernel for penalty in _penalties(reg)]


def step_scalars(reg: Any, h: Hyper, grad_scale: Any, skip: Any = 0.0) -> list[Any]:
    """All scalars of a step in the kernels' order: whether to skip it, the factor on gradients, then those of the
    rule's `hyper` and of the penalties' `parameters`."""
    scalars = [skip, grad_scale, *h.values()]
    for penalty in _penalties(reg):
        own = [] if penalty is None else list(penalty.parameters().values())
        scalars += own + [0.0] * (_PENALTY_PARAMETERS - len(own))
    if reg is not None and reg.budgets_kernel:
        scalars[-_PENALTY_PARAMETERS] = reg.lam
    return scalars


def why_reference(reg: Any, rule: Rule) -> str:
    """Empty, or why no kernel can apply a regularizer: it is not made of penalties on elements and on group norms, or a
    half-space step does not know the slope of one."""
    if rule.half_space and reg is not None and reg.radial is not None and not reg.radial.has_slope():
        return f"the half-space step has no kernels for {type(reg).__name__}: its slope is neither a line nor a curve"
    if reg is None or not (reg.whole or _penalties(reg) == (None, None)):
        return ""
    name = type(reg).__name__
    if reg.budgets_kernel:
        return (
            "" if isinstance(reg.weight, str) else f"{name} runs in plain torch: its groups have weights of their own"
        )
    return f"{name} runs in plain torch: {reg.whole or 'it has no penalty on elements or group norms'}"


def _penalties(reg: Any) -> tuple[Any, Any]:
    return (None, None) if reg is None else (reg.elementwise, reg.radial)


class Kernels:
    """The ops of a namespace, with rules and penalties resolved by name."""

    def __init__(self, namespace: str):
        ops = getattr(torch.ops, namespace)
        # The plain overloads skip the packet's overload resolution at every step.
        self.step, self._plan, self._why_not = ops.step.default, ops.plan.default, ops.why_not.default
        torch.library.register_fake(self._plan, _fake_plan)
        torch.library.register_fake(self.step, _fake_step)
        self.isa = ""
        self.rules: dict[str, tuple[int, list[str], list[str], bool, int]] = {}
        self.penalties: dict[str, tuple[int, list[str]]] = {}
        for line in _text(ops.describe.default()).splitlines():
            kind, name, *rest = line.split(";")
            if kind == "isa":
                self.isa = name
            elif kind == "rule":
                self.rules[name] = (
                    len(self.rules),
                    rest[0].split(),
                    rest[1].split(),
                    rest[2] == "metric",
                    int(rest[3]),
                )
            elif kind == "penalty":
                self.penalties[name] = (len(self.penalties), rest[0].split())

    def plan(self, params: list[Tensor], state: list[Tensor], masks: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor]:
        """The plan of tensors that have to live as long as it, and the index of the tensor that each item is of."""
        addresses = [tensor.data_ptr() for tensor in (*params, *state, *masks)]
        plan, item_tensor = self._plan(params, state, masks, addresses, *rest)
        return plan, item_tensor

    def rule_id(self, rule: Rule) -> int:
        return self.rules[rule.name][0]

    def kinds(self, rule: Rule, reg: Any) -> list[int]:
        """Which rule and penalties run."""
        return [self.rule_id(rule), *[self.penalties[name][0] for name in penalty_names(reg)]]

    def serves(self, param: Tensor, rule: Rule, reg: Any) -> str:
        """Empty, or why the reference has to step this parameter."""
        if rule.plain:
            return rule.plain
        if rule.name not in self.rules:
            return f"rule {rule.name!r} is not compiled in"
        if why := why_reference(reg, rule):
            return why
        for penalty in _penalties(reg):
            if penalty is not None and penalty.kernel not in self.penalties:
                return f"penalty {penalty.kernel!r} is not compiled in"
        from .optim._plan import group_bits

        groups = group_bits(reg, param)
        if groups >= 0 and reg.elementwise is not None and not reg.elementwise.homogeneous:
            return f"{type(reg).__name__} runs in plain torch: on elements of groups kernels want a homogeneous penalty"
        return _text(self._why_not(param.shape, param.stride(), groups))


def _text(utf8: list[int]) -> str:
    return bytes(utf8).decode()


def _fake_plan(params: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size
    return torch.empty(size(), dtype=torch.uint8, device="cpu"), torch.empty(size(), dtype=torch.int64, device="cpu")


def _fake_step(*_: Any) -> None:
    pass


def build_info() -> dict[str, Any]:
    """What was built, for which architectures, what could be loaded, and why anything is missing."""
    built = _built()
    reasons = dict(built.get("reasons", {}))
    for name in ("cpu", "cuda"):
        if (why := _load(name)[1]) and not (name in reasons and not (_HERE / f"_C_{name}.so").exists()):
            reasons[name] = why
    cpu = _load("cpu")[0]
    return {
        "version": __version__,
        "torch": torch.__version__,
        "built_with_torch": built.get("torch"),
        "cpu": cpu is not None,
        "cpu_isa": None if cpu is None else cpu.isa,
        "cuda": _load("cuda")[0] is not None,
        "cuda_archs": built.get("cuda_archs", []),
        "nvcc": built.get("nvcc"),
        "cxx": built.get("cxx"),
        "reasons": reasons,
    }


def kernels_for(param: Tensor, fused: bool | None, rule: Rule, reg: Any) -> tuple[Kernels | None, str]:
    """The kernels that serve a parameter, or None and why not."""
    if fused is False:
        return None, "fused=False"
    kernels, why = _load(param.device.type)
    if kernels is None:
        if fused is None:
            _warn_once(param.device.type, why)
        return None, why
    why = kernels.serves(param, rule, reg)
    return (None, why) if why else (kernels, "")


@functools.cache
def _built() -> dict[str, Any]:
    try:
        return dict(json.loads((_HERE / "_build.json").read_text()))
    except FileNotFoundError:
        why = "this is a source folder, not the installed package: run elsewhere, or install with `pip install -e .`"
        return {"reasons": {"cpu": why, "cuda": why}}


@functools.cache
def _load(device: str) -> tuple[Kernels | None, str]:
    if device not in ("cpu", "cuda"):
        return None, f"there are no kernels for device type {device!r}"
    if device == "cuda":
        if torch.version.cuda is None:
            return None, f"this torch ({torch.__version__}) is a CPU build"
        if _load("cpu")[0] is None:
            return None, "the CPU library, which defines the ops, is missing"
    library = _HERE / f"_C_{device}.so"
    if not library.exists():
        return None, _built().get("reasons", {}).get(device, "it was not compiled")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return None, f"{library.name} does not load: {str(error).splitlines()[0]}"
    return _kernels(), ""


@functools.cache
def _kernels() -> Kernels:
    return Kernels("bregman_cuda")  # one for both libraries: torch chooses by the tensors' device


@functools.cache
def _warn_once(device: str, why: str) -> None:
    warn(
        f"bregman_cuda: no compiled {device} kernels ({why}); using the slower plain-torch reference. "
        "`python -m bregman_cuda info` tells more."
    )
