"""AveragedProxSGD: the ProxSGD of Yang et al., a unit step in an adaptive metric and then averaging."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .._math import square_root
from ..regularizers import Regularizer
from ..regularizers._base import check_number
from ._base import SparseOptimizer
from ._rule import Hyper, Rule, State, at_most_one, number
from .linbreg import check_momentum

_OFFSET = 4  # of the step count in both schedules, as in the authors' code


class AveragedProxSGDRule(Rule):
    """csrc/math/rules/averaged_proxsgd.h"""

    name = "averaged_proxsgd"
    slots = ("exp_avg", "exp_avg_sq")
    reads_param = True
    metric = True

    def hyper(self, group: dict[str, Any], step: Any, *counters: Any) -> Hyper:
        power_lr, power_rho = group["powers"]
        rate = at_most_one(number(group["lr"]) * (step + _OFFSET) ** -power_lr)
        gain = group["rho"] * (step + _OFFSET) ** -power_rho
        return {
            "decay": 1 - gain,
            "gain": gain,
            "beta": group["beta"],
            "one_minus_beta": 1 - group["beta"],
            "root_correction": (1 - group["beta"] ** step) ** -0.5,
            "eps": group["eps"],
            "keep": 1 - rate,
            "step": rate,
        }

    def point(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, Tensor]:
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.copy_(mean * h["decay"] + grad * h["gain"])
        square.copy_(square * h["beta"] + grad * grad * h["one_minus_beta"])
        inverse = 1 / (square_root(square) * h["root_correction"] + h["eps"])
        return param - mean * inverse, inverse

    def finish(self, q: Tensor, param: Tensor, state: State, h: Hyper) -> Tensor:
        return param * h["keep"] + q * h["step"]


class AveragedProxSGD(SparseOptimizer):
    r"""The ProxSGD of Yang, Yuan, Chatzinotas and Ottersten (ICLR 2020): a unit step in an adaptive metric, averaged.

    With rho_t = rho / (t + 4)^powers[1] and eps_t = min(lr / (t + 4)^powers[0], 1):
    v <- (1 - rho_t) v + rho_t g,  r <- beta r + (1 - beta) g^2,  tau = sqrt(r / (1 - beta^t)) + eps,
    q = argmin_z  J(z) + sum_i tau_i (z_i - p_i + v_i / tau_i)^2 / 2,  p <- p + eps_t (q - p).

    Parameters are averages of the sparse points q, so they are not sparse themselves: no exact zero appears in them
    unless eps_t = 1 (`lr=1, powers=(0, ...)`: a proximal step of its own kind). The paper prunes small weights
    afterwards. Steps count from 1 in both schedules and in the correction of r; the authors' two codes differ from each
    other by one.

    Args:
        params, reg, maximize, fused, count_nonzeros, check_finite, capturable: as in `LinBreg`.
            Group penalties: all but `GroupEnvelope`.
        lr: eps_0 >= 0; a float or a one-element tensor. The threshold is lam / tau, without lr.
        rho: weight rho_0 of a new gradient, in (0, 1].
        beta: decay rate of the second moment, in [0, 1).
        eps: >= 0, added to the root (the paper's delta).
        powers: how fast lr and rho decay, two numbers >= 0.

    Raises:
        ValueError, TypeError: a parameter out of its range; nothing was changed.

    >>> p = torch.nn.Parameter(torch.tensor([1.0, 0.01]))
    >>> p.grad = torch.tensor([2.0, 0.0])
    >>> AveragedProxSGD([p], lr=1.0, reg=L1(0.5), rho=1.0, eps=1.0, powers=(0.0, 0.0)).step()
    >>> p.data
    tensor([0.1667, 0.0000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.06,
        reg: Regularizer | None = None,
        rho: float = 0.9,
        beta: float = 0.999,
        eps: float = 1e-8,
        powers: tuple[float, float] = (0.5, 0.5),
        *,
        maximize: bool = False,
        fused: bool | None = None,
        count_nonzeros: bool = False,
        check_finite: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = dict(lr=lr, reg=reg, rho=rho, beta=beta, eps=eps, powers=powers)
        super().__init__(params, defaults, maximize, fused, count_nonzeros, check_finite, capturable)

    def _check_group(self, group: dict[str, Any]) -> None:
        owner = type(self).__name__
        check_share(owner, "rho", group["rho"])
        check_momentum(owner, group["beta"], "beta")
        check_number(owner, "eps", group["eps"])
        if not isinstance(group["powers"], (tuple, list)) or len(group["powers"]) != 2:
            raise ValueError(f"{owner}: powers must be a pair, got {group['powers']!r}")
        for index, power in enumerate(group["powers"]):
            check_number(owner, f"powers[{index}]", power)

    def _rule(self, group: dict[str, Any]) -> Rule:
        return _RULE


def check_share(owner: str, name: str, value: Any) -> None:
    """The weight of what is new in an average is a number in (0, 1]."""
    check_number(owner, name, value, high=1.0)
    if value == 0:
        raise ValueError(f"{owner}: {name} must be > 0, got {value!r}")


_RULE = AveragedProxSGDRule()
