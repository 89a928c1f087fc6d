"""What is timed: our optimizers in each driver and torch's own, each with the bytes that one step has to move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bregman_cuda as bc
from bregman_cuda import Regularizer
from bregman_cuda.optim._plan import slots_of
from bregman_cuda.reference import state_dtype

Groups = list[dict[str, Any]]
Maker = Callable[[list[Tensor]], torch.optim.Optimizer]

PENALTIES: dict[str, Callable[[], Regularizer]] = {
    "l1": lambda: bc.L1(1e-3),
    "group out": lambda: bc.GroupLasso(1e-3, "out"),
    "group in": lambda: bc.GroupLasso(1e-3, "in"),
    "group kernel": lambda: bc.GroupLasso(1e-3, "kernel"),
    "sparse-group": lambda: bc.SparseGroupLasso(1e-3, 0.5, "out"),
}
OURS: dict[str, Callable[..., bc.SparseOptimizer]] = {
    "LinBreg": lambda groups, **kw: bc.LinBreg(groups, lr=1e-3, **kw),
    "LinBreg momentum": lambda groups, **kw: bc.LinBreg(groups, lr=1e-3, momentum=0.9, **kw),
    "AdaBreg": lambda groups, **kw: bc.AdaBreg(groups, lr=1e-4, **kw),
    "ProxSGD": lambda groups, **kw: bc.ProxSGD(groups, lr=1e-3, **kw),
    "ProxAdam": lambda groups, **kw: bc.ProxAdam(groups, lr=1e-4, **kw),
    "RMDA": lambda groups, **kw: bc.RMDA(groups, lr=1e-3, **kw),
    "RAMDA": lambda groups, **kw: bc.RAMDA(groups, lr=1e-3, **kw),
    "SplitLBI momentum": lambda groups, **kw: bc.SplitLBI(groups, lr=1e-3, momentum=0.9, **kw),
    "HSPG": lambda groups, **kw: bc.HSPG(groups, lr=1e-3, momentum=0.9, start=0, **kw),
}
SINGULAR: dict[str, Callable[[], Regularizer]] = {  # with ProxSGD: what the penalty itself costs
    "l0": lambda: bc.L0(1e-6),
    "l1/2": lambda: bc.LHalf(1e-5),
    "l2/3": lambda: bc.LTwoThirds(1e-5),
    "mcp": lambda: bc.MCP(1e-3, 3.0),
    "scad": lambda: bc.SCAD(1e-3, 3.7),
    "group mcp out": lambda: bc.GroupMCP(1e-3, 100.0, "out"),
}
TORCH: dict[str, tuple[Callable[..., torch.optim.Optimizer], int]] = {  # and passes over an array of parameter size
    "SGD": (lambda groups, **kw: torch.optim.SGD(groups, lr=1e-3, **kw), 3),
    "Adam": (lambda groups, **kw: torch.optim.Adam(groups, lr=1e-4, **kw), 7),
}
TORCH_DRIVERS: dict[str, dict[str, bool]] = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
YARDSTICK = "torch Adam, fused"


@dataclass(frozen=True)
class Contestant:
    """One optimizer in one driver. `bytes` are per parameter, the fewest that a step has to read and write."""

    optimizer: str
    penalty: str
    driver: str
    bytes: float
    make: Maker
    shared: bool = True  # may step the same parameter tensors as the others

    @property
    def name(self) -> str:
        return f"{self.optimizer}{' ' * bool(self.penalty)}{self.penalty}, {self.driver}"


def groups_of(params: list[Tensor], reg: Regularizer | None = None) -> Groups:
    """Two parameter groups as `param_groups` makes them: weights (2 dims or more), and the rest without `reg`."""
    weights, rest = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
    groups: Groups = [{"params": weights, "reg": reg}, {"params": rest, "reg": None}]
    return [group for group in groups if group["params"]]


def plain_groups(params: list[Tensor]) -> Groups:
    """The same two groups for an optimizer that knows no regularizer."""
    return [{"params": group["params"]} for group in groups_of(params)]


def step_bytes(optimizer: bc.SparseOptimizer, param: Tensor) -> int:
    """Bytes that one step moves per parameter: gradient and parameter, state read and written."""
    rule = optimizer._rule(optimizer.param_groups[0])
    wide = torch.empty((), dtype=state_dtype(param)).element_size()
    slots = slots_of(rule, param)
    reads_param = rule.reads_param and "master" not in slots
    return param.element_size() * (2 + reads_param) + wide * (2 * len(slots) - rule.fixed_slots)


def takes(title: str, penalty: str) -> bool:
    """Whether one of our optimizers is run with a penalty: HSPG takes groups alone, SINGULAR is for ProxSGD."""
    if penalty in SINGULAR:
        return title == "ProxSGD"
    return title != "HSPG" or penalty.startswith("group")


def ours(
    device: str,
    dtype: torch.dtype,
    drivers: tuple[str, ...] = ("reference", "kernels"),
    optimizers: dict[str, Callable[..., bc.SparseOptimizer]] = OURS,
) -> list[Contestant]:
    """Our optimizers x the penalties that they take x drivers; kernels only where they were built."""
    if not bc.build_info()[device]:
        drivers = tuple(driver for driver in drivers if driver != "kernels")
    probe = torch.zeros(1, dtype=dtype)
    found = []
    for driver in drivers:
        for title, new in optimizers.items():
            for penalty, reg in (PENALTIES | SINGULAR).items():
                if not takes(title, penalty):
                    continue
                kernels = driver == "kernels"

                def make(params: list[Tensor], new: Any = new, reg: Any = reg, kernels: bool = kernels) -> Any:
                    return new(groups_of(params, reg()), fused=kernels)

                where = device if kernels else driver
                found.append(Contestant(title, penalty, where, step_bytes(new([probe]), probe), make))
    return found


def torchs(dtype: torch.dtype) -> list[Contestant]:
    """torch.optim.SGD and Adam, as a loop, foreach and fused."""
    size = torch.empty((), dtype=dtype).element_size()
    return [
        Contestant(
            f"torch {title}", "", driver, passes * size,
            lambda params, new=new, kw=kw: new(plain_groups(params), **kw),  # type: ignore[misc]
        )
        for title, (new, passes) in TORCH.items()
        for driver, kw in TORCH_DRIVERS.items()
    ]  # fmt: skip
