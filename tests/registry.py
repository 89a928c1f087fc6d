"""The one table of what is tested: rules, regularizers, dtypes, shapes and layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bregman_cuda import (
    HSPG,
    L0,
    L1,
    MCP,
    RAMDA,
    RMDA,
    SCAD,
    AdaBreg,
    AveragedProxSGD,
    ElasticNet,
    GroupL0,
    GroupLasso,
    GroupLHalf,
    GroupLTwoThirds,
    GroupMCP,
    GroupSCAD,
    LHalf,
    LinBreg,
    LTwoThirds,
    NonnegL1,
    ProxAdam,
    ProxSGD,
    Regularizer,
    SparseGroupLasso,
    SparseOptimizer,
    SplitLBI,
)


@dataclass(frozen=True)
class RuleCase:
    """An optimizer with the options that choose one update rule."""

    optimizer: type[SparseOptimizer]
    options: dict[str, Any] = field(default_factory=dict)
    kernel_rule: str = ""
    dual: bool = True  # whether the parameter is prox(delta * dual)
    metric: bool = False  # whether each element has a prox scale of its own
    twin: bool = False  # whether a sparse twin pulls at the parameter, lam = 0 or not
    dense: bool = False  # whether sparse points lie beside the parameter, which has no zeros

    def make(self, params: Any, reg: Regularizer | None, **options: Any) -> SparseOptimizer:
        if not self.dual:
            options.pop("delta", None)
        return self.optimizer(params, reg=reg, **{**self.options, **options})


RULES = {
    "linbreg": RuleCase(LinBreg, {"lr": 0.25}, "linbreg"),
    "linbreg_paper": RuleCase(LinBreg, {"lr": 0.5, "momentum": 0.75}, "linbreg_momentum"),
    "linbreg_torch": RuleCase(LinBreg, {"lr": 0.25, "momentum": 0.75, "momentum_style": "torch"}, "linbreg_momentum"),
    "adabreg": RuleCase(AdaBreg, {"lr": 0.1}, "adabreg"),
    "proxsgd": RuleCase(ProxSGD, {"lr": 0.25}, "proxsgd", dual=False),
    "proxsgd_momentum": RuleCase(ProxSGD, {"lr": 0.25, "momentum": 0.75}, "proxsgd_momentum", dual=False),
    "averaged_proxsgd": RuleCase(
        AveragedProxSGD, {"lr": 0.25, "powers": (0.25, 0.5)}, "averaged_proxsgd", dual=False, metric=True, dense=True
    ),
    "proxadam": RuleCase(ProxAdam, {"lr": 0.1, "weight_decay": 0.01}, "proxadam", dual=False, metric=True),
    "proxadam_amsgrad": RuleCase(
        ProxAdam,
        {"lr": 0.1, "amsgrad": True, "weight_decay": 0.01, "bias_correction": "proxgen"},
        "proxadam_amsgrad",
        dual=False,
        metric=True,
    ),
    "rmda": RuleCase(RMDA, {"lr": 0.25, "momentum": 1.0}, "rmda_point", dual=False),
    "rmda_averaged": RuleCase(RMDA, {"lr": 0.25, "momentum": 0.25}, "rmda", dual=False, dense=True),
    "ramda": RuleCase(RAMDA, {"lr": 0.1, "momentum": 1.0}, "ramda_point", dual=False, metric=True),
    "ramda_averaged": RuleCase(RAMDA, {"lr": 0.1, "momentum": 0.25}, "ramda", dual=False, metric=True, dense=True),
    "splitlbi": RuleCase(
        SplitLBI, {"lr": 0.25, "kappa": 1.5, "mu": 2.0}, "splitlbi", dual=False, dense=True, twin=True
    ),
    "splitlbi_nesterov": RuleCase(
        SplitLBI,
        {"lr": 0.25, "mu": 2.0, "momentum": 0.5, "nesterov": True, "weight_decay": 0.1},
        "splitlbi_momentum",
        dual=False,
        dense=True,
        twin=True,
    ),
    "splitlbi_inside": RuleCase(
        SplitLBI,
        {"lr": 0.25, "mu": 2.0, "momentum": 0.5, "coupling": "inside"},
        "splitlbi_momentum",
        dual=False,
        dense=True,
        twin=True,
    ),
}

# Rules for some regularizers only, beside those that serve all: their cases are among PAIRS.
GROUP_RULES = {
    "hspg": RuleCase(HSPG, {"lr": 0.25, "momentum": 0.5, "start": 0, "epsilon": 0.25}, "half_space", dual=False),
}
EVERY_RULE = {**RULES, **GROUP_RULES}


ROOTED = {"adabreg", "averaged_proxsgd", "proxadam", "proxadam_amsgrad"}  # with a square root per element


@dataclass(frozen=True)
class RegCase:
    """A regularizer of strength `lam`, and how many dimensions it asks for."""

    make: Callable[[float], Regularizer | None]
    min_ndim: int = 0

    def __call__(self, lam: float = 0.3) -> Regularizer | None:
        return self.make(lam)


SCALAR = {
    "l1": RegCase(L1),
    "nonneg_l1": RegCase(NonnegL1),
    "elastic_net": RegCase(lambda lam: ElasticNet(lam, 0.7)),
    "l0": RegCase(L0),
    "l_half": RegCase(LHalf),
    "l_two_thirds": RegCase(LTwoThirds),
    "mcp": RegCase(lambda lam: MCP(lam, 1.5)),
    "scad": RegCase(lambda lam: SCAD(lam, 2.5)),
}
GROUP = {
    "group_out": RegCase(lambda lam: GroupLasso(lam, "out"), 1),
    "group_in": RegCase(lambda lam: GroupLasso(lam, "in", "none"), 2),
    "group_kernel": RegCase(lambda lam: GroupLasso(lam, "kernel"), 2),
    "group_last": RegCase(lambda lam: GroupLasso(lam, (-1,)), 1),
    "group_outer": RegCase(lambda lam: GroupLasso(lam, (0, 2)), 3),
    "group_all": RegCase(lambda lam: GroupLasso(lam, (), "none"), 0),
    "sparse_group_out": RegCase(lambda lam: SparseGroupLasso(lam, 0.4, "out"), 1),
    "sparse_group_in": RegCase(lambda lam: SparseGroupLasso(lam, 0.5, "in"), 2),
    "group_l0": RegCase(GroupL0, 1),
    "group_l_half": RegCase(lambda lam: GroupLHalf(lam, "in"), 2),
    "group_l_two_thirds": RegCase(lambda lam: GroupLTwoThirds(lam, "kernel", "none"), 2),
    "group_mcp": RegCase(lambda lam: GroupMCP(lam, 3.0, "in", "none"), 2),
    "group_scad": RegCase(lambda lam: GroupSCAD(lam, 3.7), 1),
}


def _unlisted() -> dict[str, RegCase]:
    """A regularizer that was added to the package runs through the suite before anybody lists it here."""

    def case(cls: type[Regularizer]) -> RegCase:
        others = [f for f in dataclasses.fields(cls) if f.name != "lam" and f.default is dataclasses.MISSING]  # type: ignore[arg-type]
        made = lambda lam: cls(lam=lam, **{f.name: 0.5 * sum(_span(cls, f.name)) for f in others})  # type: ignore[call-arg]  # noqa: E731
        return RegCase(made, 1)

    listed = {type(case(0.1)) for case in (*SCALAR.values(), *GROUP.values())}
    return {
        name.lower(): case(cls)
        for name, cls in Regularizer.registry.items()
        if cls.__module__.startswith("bregman_cuda.") and dataclasses.is_dataclass(cls) and cls not in listed
        if not cls.whole  # no bits in common: tests/test_budgets.py, test_whole_tensors.py
    }


def _span(cls: type[Regularizer], name: str) -> tuple[float, float]:
    low, high = cls.bounds.get(name, (0.0, 1.0))
    return low, min(high, low + 4.0)


NONE = {"none": RegCase(lambda lam: None)}
ADDED = _unlisted()
REGULARIZERS = {**NONE, **SCALAR, **GROUP, **ADDED}
PENALTIES = {**SCALAR, **GROUP, **ADDED}  # all but None
SINGULAR = ("l0", "l_half", "l_two_thirds")  # infinitely steep at zero, by themselves or on norms: lam_max is 0
KINKED = {name: case for name, case in PENALTIES.items() if name.removeprefix("group_") not in SINGULAR}
CONVEX = {name: case for name, case in PENALTIES.items() if getattr(case(), "convex", False)}


def searches(optimizer: SparseOptimizer, group: dict[str, Any]) -> bool:
    """Whether its steps search norms: drivers add up some squares in fp32 for that, each in an order of its own."""
    radial = None if group["reg"] is None else group["reg"].radial
    return optimizer._rule(group).metric and radial is not None and not radial.bends()


def apart(optimizer: SparseOptimizer) -> float:
    """What drivers may differ by where norms are searched, after a few steps on values of size 1."""
    return 4e-6 if any(searches(optimizer, group) for group in optimizer.param_groups) else 0.0


def takes(rule: str, reg: str) -> bool:
    """Whether the rule serves the regularizer: a dual asks for a convex one, a metric for a prox known in it."""
    case = EVERY_RULE[rule]
    if rule in GROUP_RULES and reg not in [name for name in GROUP if PENALTIES[name]().elementwise is None]:
        return reg == "none"
    return reg == "none" or not (
        (case.dual and reg not in CONVEX) or (case.metric and PENALTIES[reg]().why_not_weighted())
    )


PAIRS = [(rule, reg) for rule in EVERY_RULE for reg in REGULARIZERS if takes(rule, reg)]
# Rules meet penalties in few places: none and l1 are compiled into their loops, all others work on a buffer of points
# (csrc/cpu/loops.h) or behind a switch (CUDA). So: some rules with all, all rules with some; hypothesis draws more.
_ALL_REGULARIZERS = ("linbreg_paper", "proxsgd_momentum", "proxadam", "hspg")
_ALL_RULES = ("none", "l1", "group_out", "group_in", "sparse_group_out")
CROSSED = [(rule, reg) for rule, reg in PAIRS if rule in _ALL_REGULARIZERS or reg in _ALL_RULES]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Edges of the CPU and the emulated driver (16-byte vectors of 2 to 8 elements, 64-bit mask words, chunks and tiles).
VECTORS = (2, 4, 8)
CPU_CHUNK, EMULATED_CHUNK, EMULATED_CAPACITY = 16384, 512, 512
EDGES = sorted({0, 1, 63, 64, 65, *(v + d for v in VECTORS for d in (-1, 0, 1)), 100, 127, 129})
LONG = {"cpu": CPU_CHUNK, "emulated": EMULATED_CHUNK, "cuda": 32768}


def shapes(min_ndim: int, driver: str) -> list[tuple[int, ...]]:
    """A list of tensors with an empty one first, in the middle and last, and every edge of the driver's chunks."""
    chunk = LONG[driver]
    matrices = [(0, 3), (1, 1), (1, 7), (7, 1), (5, 9), (17, 8), (3, chunk + 1), (chunk // 8 + 1, 9), (4, 0), (2, 64)]
    volumes = [
        (2, 0, 3),
        (3, 4, 5),
        (5, 3, 2),
        (2, 3, 3, 3),
        (1, 1, 1),
        (8, 4, 1, 1),
        (3, 2, 0),
        (2, 2, 3, 2, 2),
        (6, 1, 5),
    ]
    vectors = [(0,), *((n,) for n in EDGES), *((chunk + d,) for d in (-1, 0, 1)), (0,)]
    kinds = {0: [(0,), (), *vectors, *matrices, ()], 1: [*vectors, *matrices, *volumes], 2: [*matrices, *volumes]}
    return kinds.get(min_ndim, [*volumes, (0, 1, 2)])


LAYOUTS = ("contiguous", "channels_last", "transposed", "misaligned", "permuted")


def strides(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Strides of a dense tensor of this shape ("gaps" is not dense: every second element)."""
    order = list(range(len(shape)))  # slowest dimension first
    if layout == "channels_last" and len(shape) > 2:
        order = [0, *order[2:], 1]
    elif layout == "transposed":
        order = order[::-1]
    elif layout == "permuted" and len(shape) > 2:
        order = [order[1], *order[2:], order[0]]
    elif layout == "expanded":
        raise ValueError("an expanded tensor cannot be written")
    result, step = [0] * len(shape), 2 if layout == "gaps" else 1
    for dim in reversed(order):
        result[dim] = step
        step *= max(shape[dim], 1)
    return tuple(result)


def values(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, zeros: float) -> Tensor:
    """Normal values with a share of exact zeros, some of them negative zeros."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    gone = torch.rand(shape, generator=generator, dtype=torch.float64) < zeros
    return torch.where(gone, torch.zeros_like(x).copysign(x), x).to(dtype)
