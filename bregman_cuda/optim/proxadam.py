"""ProxAdam: Adam with the prox of its own diagonal metric (ProxGen, ProxSSI, AdamW with a prox)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._math import square_root
from ..regularizers import Regularizer
from ..regularizers._base import check_number
from ._base import SparseOptimizer
from ._rule import Hyper, Rule, State, number
from .adabreg import check_betas

_CORRECTIONS = ("consistent", "proxgen", "proxssi")


class ProxAdamRule(Rule):
    """csrc/math/rules/proxadam.h"""

    name = "proxadam"
    slots: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    reads_param = True
    metric = True

    def hyper(self, group: dict[str, Any], step: Any, *counters: Any) -> Hyper:
        (beta1, beta2), lr, style = group["betas"], number(group["lr"]), group["bias_correction"]
        first, root = 1 - beta1**step, (1 - beta2**step) ** 0.5
        decay = 1 - lr * group["weight_decay"]
        ssi = style == "proxssi"
        return {
            "beta1": beta1,
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "decay_before": 1.0 if ssi else decay,
            "rate": lr * root / first if ssi else lr / first,
            "root_correction": 1.0 if ssi else 1 / root,
            "eps": group["eps"],
            "decay_after": decay if ssi else 1.0,
            "threshold": lr / first if style == "consistent" else lr,
        }

    def second_moment(self, state: State) -> Tensor:
        """What the metric is the root of."""
        return state["exp_avg_sq"]

    def point(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, Tensor]:
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.copy_(mean * h["beta1"] + grad * h["one_minus_beta1"])
        square.copy_(square * h["beta2"] + grad * grad * h["one_minus_beta2"])
        inverse = 1 / (square_root(self.second_moment(state)) * h["root_correction"] + h["eps"])
        z = (param * h["decay_before"] - mean * h["rate"] * inverse) * h["decay_after"]
        return z, inverse * h["threshold"]


class ProxAdamAMSGradRule(ProxAdamRule):
    """csrc/math/rules/proxadam_amsgrad.h"""

    name = "proxadam_amsgrad"
    slots = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def second_moment(self, state: State) -> Tensor:
        square, largest = state["exp_avg_sq"], state["max_exp_avg_sq"]
        return largest.copy_(torch.where(square > largest, square, largest))


class ProxAdam(SparseOptimizer):
    r"""Adam with a prox in its own diagonal metric, and decoupled weight decay (AdamW with lam = 0).

    m, v are Adam's moments, d the root of v plus eps, eta the step and w the decay:
    p <- argmin_z  eta' J(z) + sum_i d_i (z_i - x_i)^2 / 2,  x = p - eta m / d after decay,
    so element i is shrunk by eta' lam / d_i. `bias_correction` says where the corrections c1 = 1 - b1^t and
    c2 = 1 - b2^t go, and the decay:

    ============== ================== ================ ========== ========================
    name            d                  eta              eta'       decay of p by 1 - lr w
    ============== ================== ================ ========== ========================
    "consistent"    sqrt(v/c2) + eps   lr / c1          lr / c1    before the gradient step
    "proxgen"       sqrt(v/c2) + eps   lr / c1          lr         before the gradient step
    "proxssi"       sqrt(v) + eps      lr sqrt(c2)/c1   lr         after it
    ============== ================== ================ ========== ========================

    "consistent" takes gradient and threshold by one step; "proxgen" is the code of Yun, Lozano and Yang (NeurIPS 2021,
    and of RAMDA's ProxAdamW), "proxssi" that of Deleu and Bengio (2021). They agree once t is large. Before, a weight
    at zero under a constant gradient g turns on where |g| exceeds lam / c1, lam and lam / sqrt(c2), respectively:
    only "proxgen" has no phase in which lam acts more strongly (10 times at first with b1 = 0.9, 32 times with
    b2 = 0.999).

    Args:
        params, reg, maximize, fused, count_nonzeros, check_finite, capturable: as in `LinBreg`.
            Group penalties: all but `GroupEnvelope`.
        lr: step size >= 0; a float or a one-element tensor.
        betas, eps: as in `AdaBreg`.
        weight_decay: >= 0, decoupled as in AdamW.
        amsgrad: use the largest v so far.
        bias_correction: see above.

    Raises:
        ValueError, TypeError: a parameter out of its range; nothing was changed.

    >>> p = torch.nn.Parameter(torch.tensor([1.0, 0.01]))
    >>> p.grad = torch.tensor([0.5, 0.5])
    >>> ProxAdam([p], lr=0.25, reg=L1(0.1), bias_correction="proxgen").step()
    >>> p.data
    tensor([ 0.7000, -0.1900])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        reg: Regularizer | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        bias_correction: str = "consistent",
        *,
        maximize: bool = False,
        fused: bool | None = None,
        count_nonzeros: bool = False,
        check_finite: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults: dict[str, Any] = dict(lr=lr, reg=reg, betas=betas, eps=eps, weight_decay=weight_decay)
        defaults |= dict(amsgrad=amsgrad, bias_correction=bias_correction)
        super().__init__(params, defaults, maximize, fused, count_nonzeros, check_finite, capturable)

    def _check_group(self, group: dict[str, Any]) -> None:
        owner = type(self).__name__
        check_betas(owner, group["betas"])
        for name in ("eps", "weight_decay"):
            check_number(owner, name, group[name])
        if not isinstance(group["amsgrad"], bool):
            raise TypeError(f"{owner}: amsgrad must be True or False, got {group['amsgrad']!r}")
        if group["bias_correction"] not in _CORRECTIONS:
            known = ", ".join(map(repr, _CORRECTIONS))
            raise ValueError(f"{owner}: bias_correction must be one of {known}, got {group['bias_correction']!r}")

    def _rule(self, group: dict[str, Any]) -> Rule:
        return _AMSGRAD if group["amsgrad"] else _PLAIN


_PLAIN, _AMSGRAD = ProxAdamRule(), ProxAdamAMSGradRule()
