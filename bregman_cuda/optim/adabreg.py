"""AdaBreg: Bregman iterations with Adam's step in the dual."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .._math import square_root
from ..regularizers import Regularizer
from ..regularizers._base import check_number
from ._base import SparseOptimizer
from ._rule import Hyper, Rule, State, number
from .linbreg import BregmanRule, check_convex, check_delta, check_momentum


class AdaBregRule(BregmanRule):
    """csrc/math/rules/adabreg.h"""

    name = "adabreg"
    slots = ("dual", "exp_avg", "exp_avg_sq")

    def hyper(self, group: dict[str, Any], step: Any, *counters: Any) -> Hyper:
        beta1, beta2 = group["betas"]
        return {
            "beta1": beta1,
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "rate": number(group["lr"]) / (1 - beta1**step),
            "root_correction": (1 - beta2**step) ** -0.5,
            "eps": group["eps"],
            "delta": group["delta"],
        }

    def point(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, float]:
        dual, mean, square = state["dual"], state["exp_avg"], state["exp_avg_sq"]
        mean.copy_(mean * h["beta1"] + grad * h["one_minus_beta1"])
        square.copy_(square * h["beta2"] + grad * grad * h["one_minus_beta2"])
        dual.copy_(dual - mean * h["rate"] / (square_root(square) * h["root_correction"] + h["eps"]))
        return dual * h["delta"], h["delta"]


class AdaBreg(SparseOptimizer):
    r"""Bregman iterations with Adam's direction (Bungert et al., JMLR 2022, algorithm 3).

    m <- b1 m + (1 - b1) g,  s <- b2 s + (1 - b2) g^2,  v <- v - lr * mhat / (sqrt(shat) + eps),
    p <- prox_{delta J}(delta * v), with both moments bias-corrected (the authors' code missed the first until 2024).

    A zero weight turns on after about lam / lr steps of one sign: keep lam / lr well above 10, or everything
    turns on at once.

    Args:
        params, reg, delta, maximize, fused, count_nonzeros, check_finite, capturable: as in `LinBreg`.
        lr: step size >= 0; a float or a one-element tensor.
        betas: decay rates of the two moments, each in [0, 1).
        eps: >= 0, added outside the root.

    Raises:
        ValueError, TypeError: a parameter out of its range; nothing was changed.

    >>> p = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
    >>> p.grad = torch.tensor([0.5, 0.5])
    >>> AdaBreg([p], lr=0.25, reg=L1(0.1)).step()
    >>> p.data
    tensor([ 0.7500, -0.1500])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        reg: Regularizer | None = None,
        delta: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        count_nonzeros: bool = False,
        check_finite: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = dict(lr=lr, reg=reg, delta=delta, betas=betas, eps=eps)
        super().__init__(params, defaults, maximize, fused, count_nonzeros, check_finite, capturable)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_convex("AdaBreg", group["reg"])
        check_delta("AdaBreg", group["delta"])
        check_number("AdaBreg", "eps", group["eps"])
        check_betas("AdaBreg", group["betas"])

    def _rule(self, group: dict[str, Any]) -> Rule:
        return _RULE


def check_betas(owner: str, betas: Any) -> None:
    """Adam's decay rates are a pair of numbers in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{owner}: betas must be a pair, got {betas!r}")
    for index, beta in enumerate(betas):
        check_momentum(owner, beta, f"betas[{index}]")


_RULE = AdaBregRule()
