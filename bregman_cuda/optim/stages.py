"""Stages of dual averaging: restarts with a smaller step, and the momentum that grows to 1 at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..regularizers._base import check_count, check_number
from .rmda import RAMDA, RMDA


class Restarts:
    """Restarts RMDA or RAMDA: lr <- gamma lr, momentum <- min(momentum / gamma, 1), and `optimizer.restart()`.

    That is RMDA's schedule (Huang and Lee, ICLR 2022). RAMDA's code (NeurIPS 2024) keeps momentum until
    `MomentumGrowth` takes over in the last stage, and makes eps smaller: `raise_momentum=False, shrink_eps=True`.

    A stage ends at each milestone, and, if `patience` is given, when the loss has not fallen below
    (1 - threshold) times its best for more than `patience` calls (the count begins anew with each stage).

    Args:
        optimizer: RMDA or RAMDA.
        milestones: numbers of calls of `step` (usually epochs) after which a new stage begins, increasing and > 0.
        gamma: factor of lr, in (0, 1].
        patience: calls without progress that are tolerated; None looks at milestones alone.
        threshold: least relative progress, in [0, 1).
        raise_momentum: whether a new stage divides momentum by gamma.
        shrink_eps: whether it multiplies RAMDA's eps by gamma.

    Raises:
        ValueError, TypeError: a parameter out of its range, or another optimizer.

    >>> p = torch.nn.Parameter(torch.zeros(1))
    >>> optimizer = RMDA([p], lr=1.0, momentum=0.1)
    >>> stages = Restarts(optimizer, milestones=[2], gamma=0.5)
    >>> [stages.step() for _ in range(3)], optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]
    ([False, True, False], 0.5, 0.2)
    """

    def __init__(
        self,
        optimizer: RMDA | RAMDA,
        milestones: Sequence[int] = (),
        gamma: float = 0.1,
        patience: int | None = None,
        threshold: float = 1e-3,
        raise_momentum: bool = True,
        shrink_eps: bool = False,
    ) -> None:
        _check_optimizer("Restarts", optimizer)
        check_number("Restarts", "gamma", gamma, high=1.0)
        if gamma == 0:
            raise ValueError(f"Restarts: gamma must be > 0, got {gamma!r}")
        check_number("Restarts", "threshold", threshold, high=1.0)
        patience = check_count("Restarts", "patience", patience, or_none=True)
        milestones = [check_count("Restarts", "a milestone", milestone, 1) for milestone in milestones]
        if sorted({*milestones}) != [*milestones]:
            raise ValueError(f"Restarts: milestones must increase, got {[*milestones]!r}")
        if shrink_eps and not isinstance(optimizer, RAMDA):
            raise ValueError(f"Restarts: shrink_eps=True needs RAMDA, {type(optimizer).__name__} has no eps")
        self.optimizer, self.milestones, self.gamma = optimizer, [*milestones], float(gamma)
        self.raise_momentum, self.shrink_eps = raise_momentum, shrink_eps
        self.patience, self.threshold = patience, float(threshold)
        self.calls, self.waited, self.best = 0, 0, math.inf

    def step(self, loss: float | None = None) -> bool:
        """Count a call; begins a new stage where one is due, and says whether it did.

        Raises:
            ValueError: `patience` was given and no loss.
        """
        if self.patience is not None:
            if loss is None:
                raise ValueError("Restarts: patience needs a loss: step(loss)")
            progress = float(loss) < self.best * (1 - self.threshold) if self.best > 0 else float(loss) < self.best
            self.waited = 0 if progress else self.waited + 1  # NaN is no progress
            self.best = float(loss) if progress else self.best
        self.calls += 1
        due = self.calls in self.milestones or (self.patience is not None and self.waited > self.patience)
        if due:
            self._begin_stage()
        return due

    def _begin_stage(self) -> None:
        shared = {id(group["lr"]): group["lr"] for group in self.optimizer.param_groups}  # groups may hold one tensor
        for lr in filter(torch.is_tensor, shared.values()):
            lr.mul_(self.gamma)
        for group in self.optimizer.param_groups:
            if not torch.is_tensor(group["lr"]):
                group["lr"] *= self.gamma
            if self.raise_momentum:
                group["momentum"] = min(group["momentum"] / self.gamma, 1.0)
            if self.shrink_eps:
                group["eps"] *= self.gamma
        self.optimizer.restart()
        self.waited = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; lr, momentum and eps are in the optimizer's."""
        return {"calls": self.calls, "waited": self.waited, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            KeyError: an entry is missing.
        """
        self.calls, self.waited, self.best = int(state["calls"]), int(state["waited"]), float(state["best"])


class MomentumGrowth:
    """Lets momentum grow to 1 at the end, so that parameters become sparse: min(c sqrt(k), 1) at the k-th call.

    c is each group's momentum when the growth begins. Call `step` after each optimizer step.

    Args:
        optimizer: RMDA or RAMDA.
        start: calls of `step` that change nothing.

    Raises:
        ValueError, TypeError: a parameter out of its range, or another optimizer.
    """

    def __init__(self, optimizer: RMDA | RAMDA, start: int = 0) -> None:
        _check_optimizer("MomentumGrowth", optimizer)
        self.optimizer, self.start = optimizer, check_count("MomentumGrowth", "start", start)
        self.calls = 0
        self.base: list[float] = []

    def step(self) -> None:
        """Count a call and set every group's momentum."""
        self.calls += 1
        k = self.calls - self.start
        if k <= 0:
            return
        self.base = self.base or [group["momentum"] for group in self.optimizer.param_groups]
        for group, momentum in zip(self.optimizer.param_groups, self.base):
            group["momentum"] = min(momentum * math.sqrt(k), 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {"calls": self.calls, "base": [*self.base]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            KeyError: an entry is missing.
        """
        self.calls, self.base = int(state["calls"]), [float(c) for c in state["base"]]


def _check_optimizer(owner: str, optimizer: Any) -> None:
    if not isinstance(optimizer, (RMDA, RAMDA)):
        raise TypeError(f"{owner} works with RMDA and RAMDA, got {type(optimizer).__name__}")
