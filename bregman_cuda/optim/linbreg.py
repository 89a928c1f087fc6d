"""LinBreg: stochastic linearized Bregman iterations, with and without momentum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..regularizers import Regularizer
from ..regularizers._base import check_number
from ._base import SparseOptimizer
from ._rule import Hyper, Rule, State, number


def initial_dual(param: Tensor, group: dict[str, Any]) -> Tensor:
    """v0 = p0 / delta + (subgradient of J at p0), so that prox(delta * v0) = p0 up to one rounding of delta * v0."""
    reg: Regularizer | None = group["reg"]
    if reg is None:
        return param / group["delta"]
    param = reg.project(param)
    return param / group["delta"] + reg.subgradient(param)


class BregmanRule(Rule):
    """What LinBreg and AdaBreg share: the parameter is prox(delta * dual)."""

    def init_slot(self, slot: str, param: Tensor, group: dict[str, Any]) -> Tensor | None:
        return initial_dual(param, group) if slot == "dual" else None


class LinBregRule(BregmanRule):
    """csrc/math/rules/linbreg.h"""

    name = "linbreg"
    slots = ("dual",)

    def hyper(self, group: dict[str, Any], step: Any, *counters: Any) -> Hyper:
        return {"lr": number(group["lr"]), "delta": group["delta"]}

    def point(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, float]:
        dual = state["dual"]
        dual.copy_(dual - grad * h["lr"])
        return dual * h["delta"], h["delta"]


class LinBregMomentumRule(BregmanRule):
    """csrc/math/rules/linbreg_momentum.h"""

    name = "linbreg_momentum"
    slots = ("dual", "momentum_buffer")

    def hyper(self, group: dict[str, Any], step: Any, *counters: Any) -> Hyper:
        lr, momentum = number(group["lr"]), group["momentum"]
        paper = group["momentum_style"] == "paper"
        return {
            "momentum": momentum,
            "gain": (1 - momentum) * lr if paper else 1.0,
            "rate": 1.0 if paper else lr,
            "delta": group["delta"],
        }

    def point(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, float]:
        dual, buffer = state["dual"], state["momentum_buffer"]
        buffer.copy_(buffer * h["momentum"] + grad * h["gain"])
        dual.copy_(dual - buffer * h["rate"])
        return dual * h["delta"], h["delta"]


class LinBreg(SparseOptimizer):
    r"""Linearized Bregman iterations (Bungert, Roith, Tenbrinck, Burger, JMLR 2022, algorithms 1 and 2).

    Without momentum:  v <- v - lr * g,  p <- prox_{delta J}(delta * v).
    momentum_style="paper":  m <- beta * m + (1 - beta) * lr * g,  v <- v - m  (lr sits inside the buffer: a change
    of lr takes 1 / (1 - beta) steps to arrive).  momentum_style="torch":  m <- beta * m + g,  v <- v - lr * m.

    The dual v is stored in fp32 for fp32, bf16 and fp16 parameters (fp64 for fp64) and is the master weight: a
    parameter changed behind the optimizer's back is overwritten at the next step. A zero weight turns on once
    lr times the sum of its gradients exceeds lam: begin with few weights (`sparse_init_`) and a large lam.

    Args:
        params: iterable of tensors, (name, tensor) pairs, or param-group dicts (see `param_groups`).
        lr: step size >= 0; a float or a one-element tensor (on a device: see `capturable`).
        reg: a convex `Regularizer` or None, per param group.
        delta: > 0, scales magnitudes and never the support (elastic net of the paper, eq. 2.6).
        momentum: in [0, 1).
        momentum_style: "paper" or "torch".
        maximize: ascend instead of descend.
        fused: True: kernels or an error; False: plain torch; None: kernels wherever they serve.
        count_nonzeros: count non-zeros (and non-zero groups) in the same pass, for `density()`.
        check_finite: raise FloatingPointError naming the tensor before anything changes; synchronises.
        capturable: keep the step count and the scalars of a step on the device, so that it can be captured in a CUDA
            graph and never synchronises. A tensor `lr` or `lam` on the device is read at every replay; numbers are
            those of the capture. The same happens by itself from the first step under a GradScaler on CUDA. Without it,
            such a tensor is read back at each step, which waits for the device.

    Raises:
        ValueError, TypeError: a parameter out of its range; nothing was changed.

    >>> p = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
    >>> p.grad = torch.tensor([0.5, 0.5])
    >>> LinBreg([p], lr=1.0, reg=L1(0.1)).step()
    >>> p.data
    tensor([ 0.5000, -0.4000])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        reg: Regularizer | None = None,
        delta: float = 1.0,
        momentum: float = 0.0,
        momentum_style: str = "paper",
        *,
        maximize: bool = False,
        fused: bool | None = None,
        count_nonzeros: bool = False,
        check_finite: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = dict(lr=lr, reg=reg, delta=delta, momentum=momentum, momentum_style=momentum_style)
        super().__init__(params, defaults, maximize, fused, count_nonzeros, check_finite, capturable)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_convex(type(self).__name__, group["reg"])
        check_delta(type(self).__name__, group["delta"])
        check_momentum(type(self).__name__, group["momentum"])
        if group["momentum_style"] not in ("paper", "torch"):
            raise ValueError(f"LinBreg: momentum_style must be 'paper' or 'torch', got {group['momentum_style']!r}")

    def _rule(self, group: dict[str, Any]) -> Rule:
        return _MOMENTUM if group["momentum"] else _PLAIN


def check_convex(owner: str, reg: Regularizer | None) -> None:
    """The dual is a subgradient that leads back to the weight: every weight has one only where J is convex."""
    if reg is not None and not reg.convex:
        raise ValueError(
            f"{owner}: reg must be convex, or no dual stands for every weight, got {type(reg).__name__}; "
            "use ProxSGD with it, or a convex regularizer such as L1 or GroupLasso"
        )


def check_delta(owner: str, delta: Any) -> None:
    """delta is a finite number > 0."""
    check_number(owner, "delta", delta)
    if delta == 0:
        raise ValueError(f"{owner}: delta must be > 0, got {delta!r}")


def check_momentum(owner: str, momentum: Any, name: str = "momentum") -> None:
    """A momentum or beta is a number in [0, 1)."""
    check_number(owner, name, momentum)
    if momentum >= 1:
        raise ValueError(f"{owner}: {name} must be < 1, got {momentum!r}")


_PLAIN, _MOMENTUM = LinBregRule(), LinBregMomentumRule()
