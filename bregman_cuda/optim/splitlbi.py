"""SplitLBI: split linearized Bregman iterations, a dense network with a sparse twin."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._warn import warn
from ..reference import state_dtype
from ..regularizers import Regularizer
from ..regularizers._base import check_number
from ._base import SparseOptimizer
from ._rule import Hyper, Rule, State, number
from ._shards import for_prox, local
from .linbreg import check_momentum


class SplitLBIRule(Rule):
    """csrc/math/rules/splitlbi.h"""

    name = "splitlbi"
    slots: tuple[str, ...] = ("dual",)
    reads_param = True
    late = True

    def hyper(self, group: dict[str, Any], step: Any, *counters: Any) -> Hyper:
        lr = number(group["lr"])
        return {
            "lr": lr,
            "rate": lr * group["kappa"],
            "kappa": group["kappa"],
            "mu": math.inf if group["reg"] is None else group["mu"],  # without a twin there is no coupling
            "weight_decay": group["weight_decay"],
        }

    def point(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, float]:
        return state["dual"], 1.0

    def finish_late(self, q: Tensor, grad: Tensor, param: Tensor, state: State, h: Hyper) -> Tensor:
        coupling = (param - q * h["kappa"]) / h["mu"]
        state["dual"].copy_(state["dual"] + coupling * h["lr"])
        return param - (grad + param * h["weight_decay"] + coupling) * h["rate"]


class SplitLBIMomentumRule(SplitLBIRule):
    """csrc/math/rules/splitlbi_momentum.h"""

    name = "splitlbi_momentum"
    slots = ("dual", "momentum_buffer")

    def hyper(self, group: dict[str, Any], step: Any, *counters: Any) -> Hyper:
        inside = group["coupling"] == "inside"
        return {
            **super().hyper(group, step),
            "momentum": group["momentum"],
            "nesterov": float(group["nesterov"]),
            "inside": float(inside),
            "outside": float(not inside),
        }

    def finish_late(self, q: Tensor, grad: Tensor, param: Tensor, state: State, h: Hyper) -> Tensor:
        dual, buffer = state["dual"], state["momentum_buffer"]
        coupling = (param - q * h["kappa"]) / h["mu"]
        direction = grad + param * h["weight_decay"] + coupling * h["inside"]
        buffer.copy_(buffer * h["momentum"] + direction)
        dual.copy_(dual + coupling * h["lr"])
        step = buffer * h["momentum"] + direction if h["nesterov"] else buffer
        return param - (step + coupling * h["outside"]) * h["rate"]


class SplitLBI(SparseOptimizer):
    r"""Split linearized Bregman iterations (DessiLBI: Fu et al., ICML 2020 and TPAMI 2022; FuSplit LBI toolbox).

    The weights w train densely; beside them runs a sparse twin Gamma = kappa prox_J(z) that explores, from simple to
    complex, which of them matter. With the coupling c = (w - Gamma) / mu of the old w and Gamma:

        m <- momentum m + g,   w <- w - kappa lr (m + c),   z <- z + lr c.

    A weight enters the twin once |sum of lr w| > mu lam (a group: with the norm, and its weight times lam). Entering
    order is the path that `sparse_twin`, `projected`, tickets and pruning read. Gamma is not stored: it is a function
    of z. Groups with `reg=None` have no twin and take the SGD step with rate kappa lr.

    z is fp32 (fp64 for fp64 parameters): where lr c falls below 2^-25 of z, as with a large mu late in a decay of lr, z
    stands still and nothing enters any more. Begin with a larger lr or lam, or use fp64.

    kappa and lr are not independent: with kappa lr fixed, kappa scales lam. Without momentum, keep
    kappa lr < 2 / (curvature + 2 / mu); `stable_rate` has the sharp bounds.

    Args:
        params, reg, maximize, fused, count_nonzeros, check_finite, capturable: as in `LinBreg`.
        lr: alpha, the clock of the path; the step of the weights is kappa * lr.
        kappa: > 0.
        mu: > 0, strength of the coupling is 1 / mu (the paper's beta is 1 / (2 mu)).
        momentum: in [0, 1).
        nesterov: look ahead; needs momentum > 0.
        weight_decay: >= 0, added to the gradient.
        coupling: "outside" of the momentum buffer, as the toolbox does, or "inside", as the paper writes (eq. 6-9).
        curvature: the largest curvature of the loss, if it is known: a kappa * lr beyond the stable range is warned of,
            also where it gets there later; not where lr lies on a device (or with `capturable`, in a tensor).

    Raises:
        ValueError, TypeError: a parameter out of its range; nothing was changed.

    >>> p = torch.nn.Parameter(torch.tensor([1.0, 0.1]))
    >>> optimizer = SplitLBI([p], lr=1.0, reg=L1(0.5), mu=2.0)
    >>> for _ in range(2):
    ...     p.grad = torch.zeros(2)
    ...     optimizer.step()
    >>> optimizer.sparse_twin(p)
    tensor([0.2500, 0.0000])
    """

    dense_params = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        reg: Regularizer | None = None,
        kappa: float = 1.0,
        mu: float = 100.0,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        coupling: str = "outside",
        curvature: float | None = None,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        count_nonzeros: bool = False,
        check_finite: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults: dict[str, Any] = dict(lr=lr, reg=reg, kappa=kappa, mu=mu, momentum=momentum, nesterov=nesterov)
        defaults |= dict(weight_decay=weight_decay, coupling=coupling, curvature=curvature)
        super().__init__(params, defaults, maximize, fused, count_nonzeros, check_finite, capturable)

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("kappa", "mu"):
            check_number("SplitLBI", name, group[name], above=True)
        check_momentum("SplitLBI", group["momentum"])
        check_number("SplitLBI", "weight_decay", group["weight_decay"])
        if group["curvature"] is not None:
            check_number("SplitLBI", "curvature", group["curvature"])
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("SplitLBI: nesterov=True needs momentum > 0, got momentum=0")
        if group["coupling"] not in ("outside", "inside"):
            raise ValueError(f"SplitLBI: coupling must be 'outside' or 'inside', got {group['coupling']!r}")
        if group["curvature"] is not None and group["reg"] is not None and group["params"]:
            self._warn_of_rate(group)

    def _warn_of_rate(self, group: dict[str, Any]) -> None:
        """Warn of a kappa * lr beyond the stable range, once until it is back in it: schedulers change lr often."""
        lr = group["lr"]
        if torch.is_tensor(lr) and (lr.device.type != "cpu" or group["capturable"]):
            return  # reading it would synchronise
        rate = float(lr) * float(group["kappa"])
        curvature, mu, momentum = (float(group[name]) for name in ("curvature", "mu", "momentum"))
        limit = _stable_rate(curvature, mu, momentum, bool(group["nesterov"]), group["coupling"])
        warned = vars(self).setdefault("_warned", {})  # by a group's first parameter
        known = warned.get(id(group["params"][0]), False)
        warned[id(group["params"][0])] = rate >= limit
        if rate >= limit and not known:
            warn(
                f"SplitLBI: kappa * lr = {rate:g} is not stable for curvature {curvature:g} and mu = {mu:g}; "
                f"keep it below {limit:g}"
            )

    def _rule(self, group: dict[str, Any]) -> Rule:
        return _MOMENTUM if group["momentum"] else _PLAIN

    def _group_of(self, param: Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if any(param is p for p in group["params"]):
                return group
        raise KeyError("SplitLBI: not a parameter of this optimizer")

    def _twin(self, param: Tensor) -> Tensor:
        """The twin in the state's dtype: small entries of a 16-bit parameter's twin count as active, too."""
        group, state = self._group_of(param), self.state.get(param, {})
        reg: Regularizer | None = group["reg"]
        if reg is None:
            raise ValueError("SplitLBI: the parameter's group has reg=None, hence no sparse twin")
        twin = torch.zeros_like(param, dtype=state_dtype(param))
        if "dual" in state:
            slots, part = for_prox(param, reg, {"dual": state["dual"]})
            local(twin).copy_(part(reg.prox(slots["dual"], 1.0)) * group["kappa"])
        return twin

    @torch.no_grad()
    def sparse_twin(self, param: Tensor) -> Tensor:
        """Gamma = kappa prox_J(z) of a parameter, in its dtype and shape; zeros before the first step.

        Raises:
            KeyError: not a parameter of this optimizer.
            ValueError: its group has no regularizer, hence no twin.
        """
        return self._twin(param).to(param.dtype)

    @torch.no_grad()
    def prox_point(self, param: Tensor) -> Tensor:
        """The sparse twin, which `density` counts; a parameter without one is itself."""
        return param.detach() if self._group_of(param)["reg"] is None else self.sparse_twin(param)

    @torch.no_grad()
    def support(self, param: Tensor) -> Tensor:
        """Bool tensor of a parameter's shape: where its twin is active; whole groups where these are penalized.

        Raises:
            KeyError, ValueError: as `sparse_twin`.
        """
        twin, reg = self._twin(param), self._group_of(param)["reg"]
        dims = reg.groups_of(param.shape)
        if dims is None or reg.elementwise is not None or not twin.numel():
            return twin != 0
        return (reg.group_norms(twin) != 0).expand_as(twin)

    @contextmanager
    @torch.no_grad()
    def projected(self) -> Iterator[None]:
        """Inside, every parameter with a twin is w where its twin is active and 0 elsewhere; afterwards w again.

        The memory of the parameters stays where it is. w comes back whatever happens inside: an error, steps and other
        changes of the parameters (they are undone; those of the dual and of momentum are not), the same context again.
        """
        dense: list[tuple[Tensor, Tensor]] = []
        try:
            for group in self.param_groups:
                for param in group["params"] if group["reg"] is not None else ():
                    keep = self.support(param)
                    dense += [
                        (t, t.detach().clone())
                        for t in (param, self.state.get(param, {}).get("master"))
                        if t is not None
                    ]
                    param.masked_fill_(~keep, 0)
            yield
        finally:
            with torch.no_grad():
                for param, values in dense:
                    param.copy_(values)

    @torch.no_grad()
    def residue(self, param: Tensor) -> Tensor:
        """||w - Gamma||^2 of a parameter, a 0-dim tensor of the state's dtype; divided by 2 mu, the coupling's energy.

        Raises:
            KeyError, ValueError: as `sparse_twin`.
        """
        twin = self._twin(param)
        return (param.detach().to(twin.dtype) - twin).square().sum()

    @torch.no_grad()
    def steps_to_entry(self, param: Tensor) -> float:
        """After how many more steps the first entry (or group) enters the twin, if w and lr stay as they are.

        In exact arithmetic: steps of less than 2^-25 of an fp32 dual move it no more (see the class).
        0 if something is active already, infinite where nothing moves. Reads from the device.

        Raises:
            KeyError, ValueError: as `sparse_twin`.
        """
        twin, group, state = self._twin(param), self._group_of(param), self.state.get(param, {})
        if bool(twin.any()) or not twin.numel():
            return 0.0
        dual = state["dual"].double() if "dual" in state else torch.zeros_like(twin, dtype=torch.float64)
        pace = float(group["lr"]) / group["mu"] * state.get("master", param.detach()).double()
        low, high = 0.0, 1.0
        while not bool(group["reg"].prox(dual + high * pace, 1.0).any()):
            low, high = high, 2 * high
            if high > 1e12:
                return math.inf
        while high - low > 1e-6 * high:
            middle = 0.5 * (low + high)
            entered = bool(group["reg"].prox(dual + middle * pace, 1.0).any())
            low, high = (low, middle) if entered else (middle, high)
        return high


def stable_rate(
    curvature: float, mu: float, momentum: float = 0.0, nesterov: bool = False, coupling: str = "outside"
) -> float:
    """The kappa * lr below which SplitLBI is stable on a quadratic of that curvature once the twin is active.

    There (m, w, Gamma) follows a linear map; the bound is where its spectral radius passes 1. Without momentum it is
    2 / l with l = (h + 2/mu + sqrt(h^2 + 4/mu^2)) / 2 <= h + 2 / mu, the largest eigenvalue of the coupled system.

    Raises:
        ValueError, TypeError: curvature < 0 or mu <= 0.

    >>> round(stable_rate(1.0, 1.0), 3), round(stable_rate(1.0, 1.0, momentum=0.9), 3)
    (0.764, 0.871)
    """
    check_number("stable_rate", "curvature", curvature)
    check_number("stable_rate", "mu", mu, above=True)
    inside = float(coupling == "inside")
    ahead, own = (momentum, 1.0) if nesterov else (1.0, 0.0)

    def stable(rate: float) -> bool:
        direction = torch.tensor([0.0, curvature + inside / mu, -inside / mu], dtype=torch.float64)
        coupled = torch.tensor([0.0, 1 / mu, -1 / mu], dtype=torch.float64)
        identity = torch.eye(3, dtype=torch.float64)
        m = momentum * identity[0] + direction
        w = identity[1] - rate * (ahead * m + own * direction + (1 - inside) * coupled)
        twin = identity[2] + rate * coupled
        return float(torch.linalg.eigvals(torch.stack([m, w, twin])).abs().max()) <= 1 + 1e-9

    low, high = 0.0, 4 / max(curvature, 1 / mu)
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if stable(middle) else (low, middle)
    return low


_stable_rate = functools.lru_cache(maxsize=64)(stable_rate)  # takes milliseconds, and a step asks for it


_MOMENTUM, _PLAIN = SplitLBIMomentumRule(), SplitLBIRule()
