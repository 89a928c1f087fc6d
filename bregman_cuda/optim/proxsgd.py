"""ProxSGD: proximal stochastic gradient descent, plain and heavy-ball."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..regularizers import Regularizer
from ._base import SparseOptimizer
from ._rule import Hyper, Rule, State, number
from .linbreg import check_momentum


class ProxSGDRule(Rule):
    """csrc/math/rules/proxsgd.h"""

    name = "proxsgd"
    reads_param = True
    skips_prox = True

    def hyper(self, group: dict[str, Any], step: Any, *counters: Any) -> Hyper:
        return {"lr": number(group["lr"])}

    def point(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, float]:
        return param - grad * h["lr"], h["lr"]


class ProxSGDMomentumRule(Rule):
    """csrc/math/rules/proxsgd_momentum.h"""

    name = "proxsgd_momentum"
    slots = ("momentum_buffer",)
    reads_param = True
    skips_prox = True

    def hyper(self, group: dict[str, Any], step: Any, *counters: Any) -> Hyper:
        return {"lr": number(group["lr"]), "momentum": group["momentum"]}

    def point(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, float]:
        buffer = state["momentum_buffer"]
        buffer.copy_(buffer * h["momentum"] + grad)
        return param - buffer * h["lr"], h["lr"]


class ProxSGD(SparseOptimizer):
    r"""Proximal SGD:  p <- prox_{lr J}(p - lr * g),  or with the heavy ball  m <- momentum * m + g  in place of g.

    bf16 and fp16 parameters keep an fp32 master copy in the state, since the parameter itself is what accumulates.

    Args:
        params, maximize, fused, count_nonzeros, check_finite, capturable: as in `LinBreg`.
        reg: a `Regularizer`, convex or not, or None, per param group.
        lr: step size >= 0; a float or a one-element tensor. The threshold is lr * lam.
        momentum: in [0, 1).

    Raises:
        ValueError, TypeError: a parameter out of its range; nothing was changed.

    >>> p = torch.nn.Parameter(torch.tensor([1.0, 0.01]))
    >>> p.grad = torch.tensor([0.5, 0.0])
    >>> ProxSGD([p], lr=1.0, reg=L1(0.1)).step()
    >>> p.data
    tensor([0.4000, 0.0000])
    """

    joint = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        reg: Regularizer | None = None,
        momentum: float = 0.0,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        count_nonzeros: bool = False,
        check_finite: bool = False,
        capturable: bool = False,
    ) -> None:
        super().__init__(
            params, dict(lr=lr, reg=reg, momentum=momentum), maximize, fused, count_nonzeros, check_finite, capturable
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        check_momentum("ProxSGD", group["momentum"])

    def _rule(self, group: dict[str, Any]) -> Rule:
        return _MOMENTUM if group["momentum"] else _PLAIN


_PLAIN, _MOMENTUM = ProxSGDRule(), ProxSGDMomentumRule()
