"""HSPG: proximal SGD first, then half-space steps that make whole groups exactly zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import reference
from .._backend import why_reference
from .._math import number_like
from ..regularizers import Regularizer
from ..regularizers._base import check_count, check_number
from ..regularizers._rounds import Extent, Rounds
from ._base import SparseOptimizer, is_capturing
from ._rule import Hyper, Rule, State, number
from ._shards import gathered, is_elsewhere
from .linbreg import check_momentum
from .proxsgd import ProxSGDMomentumRule


class HalfSpaceRule(Rule):
    """csrc/math/rules/half_space.h"""

    name = "half_space"
    slots = ("momentum_buffer",)
    reads_param = True
    half_space = True

    def hyper(self, group: dict[str, Any], step: Any, *counters: Any) -> Hyper:
        return {"lr": number(group["lr"]), "momentum": group["momentum"], "epsilon": group["epsilon"]}

    def point(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, Tensor]:
        buffer = state["momentum_buffer"]
        buffer.copy_(buffer * h["momentum"] + grad)
        return param - buffer * h["lr"], param

    def shrink(
        self, reg: Regularizer, z: Tensor, scale: Any, h: Hyper, param: Tensor, extent: Extent
    ) -> Rounds[Tensor]:
        [x] = yield from half_space_steps(reg, [z], [scale], h["lr"], h["epsilon"], [extent])
        return x

    def shrink_together(
        self, reg: Regularizer, points: Sequence[Tensor], scales: Sequence[Any], h: Hyper, extents: Sequence[Extent]
    ) -> Rounds[list[Tensor]]:
        return (yield from half_space_steps(reg, points, scales, h["lr"], h["epsilon"], extents))


def half_space_steps(
    reg: Regularizer,
    points: Sequence[Tensor],
    params: Sequence[Tensor],
    lr: Any,
    epsilon: Any,
    extents: Sequence[Extent],
) -> Rounds[list[Tensor]]:
    """x = z - lr * (subgradient of J at p), and zero for every group with <x, p> < epsilon ||p||^2, or p zero there; of
    one tensor, or of tensors that share the subgradient.

    The twin of csrc/math/half_space.h, and with a budget of csrc/math/envelope.h.

    Args:
        points, params: z and p, fp32 or fp64: the points after the gradient step, and the parameters before it.
    """
    if not reg.whole:  # no more of other parts than of the groups that are here
        extents = [Extent(extent.shape) for extent in extents]
    dims = [reg.groups_of(extent.shape) for extent in extents]
    totals = yield [
        torch.stack([extent.spread(_products(reg, x, p, extent), d) for x in (p, z)])
        for z, p, extent, d in zip(points, params, extents, dims)
    ]
    lr, epsilon = (number_like(v, params[0]).double() for v in (lr, epsilon))
    rates = _rates(reg, [squares for squares, _ in totals], extents, params[0].dtype)
    results = []
    for z, p, (squares, along), rate, extent, d in zip(points, params, totals, rates, extents, dims):
        pull = (lr * rate).to(p.dtype)
        zero = (squares == 0) | (along - pull.double() * squares < epsilon * squares)
        results.append(torch.where(extent.part(zero, d), z - z, z - p * extent.part(pull, d)))
    return results


def _rates(reg: Regularizer, squares: Sequence[Tensor], extents: Sequence[Extent], dtype: torch.dtype) -> list[Tensor]:
    """J's subgradient on groups of these squared norms, as a factor on their elements, in float64; any number for zero
    groups. As the kernels have it for parameters of a dtype where J's penalty on norms is a line or a curve."""
    if reg.radial is None or not reg.radial.has_slope():
        return reg._pulls(squares, [extent.shape for extent in extents], torch.float64)
    rates, line = [], reg.radial.line(dtype)
    for some, extent in zip(squares, extents):
        norms = some.sqrt()
        weight = number_like(reg.group_weight(extent.shape) if math.prod(extent.shape) else 1.0, norms, dtype)
        if line is None:
            ratio = reg.radial.curve(norms, dtype)[1] * weight.double()
            rates.append(torch.where(norms.isnan(), norms, ratio))
            continue
        level, bend = (number_like(v, norms, dtype) * weight for v in line)
        slope = level.double() - bend.double() * norms
        rates.append(torch.where(slope > 0, slope, 0.0) / norms)
    return rates


def _products(reg: Regularizer, x: Tensor, p: Tensor, extent: Extent) -> Tensor:
    """<x_G, p_G> of the part of every group that is here, in float64."""
    products, reduced = x.double() * p.double(), reg._reduced(extent.shape)
    return products.sum(reduced, keepdim=True) if reduced else products


class HSPG(SparseOptimizer):
    r"""Half-space stochastic projected gradient (Chen et al., 2020, the optimizer of OTO; WGSEF's algorithm 3 with
    `GroupEnvelope`).

    First, proximal SGD as in `ProxSGD`:  m <- momentum * m + g,  p <- prox_{lr J}(p - lr * m).  After `half_space()`,
    which also `start` does by itself after so many steps, on non-zero groups:

        x = p - lr * (m + J'(p)),   p_G <- x_G, or 0 if <x_G, p_G> < epsilon * ||p_G||^2;   zero groups stay zero.

    A prox alone seldom leaves few groups, and shrinks those that it leaves; the second phase removes groups and does
    not shrink toward a smaller support. Neither bounds their number: after `end` steps the k groups of largest norm of
    every tensor (or of all together, `scope`) stay, and the others are masked for good, as by `keep_top`. Half-space
    steps go on among the k. With `GroupEnvelope(scope="all")` all tensors of a parameter group share one k throughout:
    in the prox, in J' and at the end.

    No step waits for the device, but under a GradScaler whose flag lies there the one that reaches `start` or `end`
    reads how many were skipped. The step at `end` sorts the norms of groups; the next one makes its plan anew.

    Args:
        params, maximize, fused, count_nonzeros, check_finite, capturable: as in `LinBreg`.
        lr: step size >= 0; a float or a one-element tensor.
        reg: a regularizer with groups: `GroupLasso`, `GroupMCP`, `GroupEnvelope`, ..., or None (plain SGD).
        momentum: in [0, 1).
        epsilon: in [0, 1); larger removes more.
        start: number of steps after which half-space steps begin; None waits for `half_space()`. Steps that a
            GradScaler skips do not count; compiled and captured ones cannot, and are refused before `start` and `end`.
        end: number of steps after which at most k groups per tensor (see `scope`) are left, >= 1 and >= start; None
            waits for `keep_top()`.
        k: number of groups that a tensor keeps, >= 1 (all, if it has fewer); None: that of `reg` (`GroupEnvelope`).
        scope: "tensor", or "all": the tensors of a parameter group keep k groups together, those of largest norm;
            None: that of `reg` (`GroupEnvelope`), else "tensor".

    Raises:
        ValueError, TypeError: a parameter out of its range, or end without a k; or tensors that share the k of `reg`
            and differ in dtype or device, have fewer groups, or lie in part on other ranks; nothing was changed.

    >>> p = torch.nn.Parameter(torch.tensor([[0.1, 0.1], [1.0, 1.0]]))
    >>> optimizer = HSPG([p], lr=0.5, reg=GroupLasso(0.2, weight="none"))
    >>> optimizer.half_space()
    >>> p.grad = torch.tensor([[0.4, 0.0], [0.4, 0.0]])
    >>> optimizer.step()
    >>> p.data
    tensor([[0.0000, 0.0000],
            [0.7293, 0.9293]])
    """

    joint = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        reg: Regularizer | None = None,
        momentum: float = 0.0,
        epsilon: float = 0.0,
        start: int | None = None,
        end: int | None = None,
        k: int | None = None,
        scope: Literal["tensor", "all"] | None = None,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        count_nonzeros: bool = False,
        check_finite: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults: dict[str, Any] = dict(lr=lr, reg=reg, momentum=momentum, epsilon=epsilon, start=start)
        defaults |= dict(end=end, k=k, scope=scope)
        super().__init__(params, defaults, maximize, fused, count_nonzeros, check_finite, capturable)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict):
            _begin(param_group)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            _begin(group)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_momentum("HSPG", group["momentum"])
        check_number("HSPG", "epsilon", group["epsilon"])
        if group["epsilon"] >= 1:
            raise ValueError(f"HSPG: epsilon must be < 1, got {group['epsilon']!r}")
        start, end, reg = group["start"], group["end"], group["reg"]
        for name, value, least in (("start", start, 0), ("end", end, 1), ("k", group["k"], 1)):
            check_count("HSPG", name, value, least, or_none=True)
        _check_scope("HSPG", group["scope"])
        if start is not None and end is not None and end < start:
            raise ValueError(f"HSPG: end must be >= start, got end={end!r}, start={start!r}")
        if reg is not None and (reg.elementwise is not None or (reg.radial is None and not hasattr(reg, "groups"))):
            raise ValueError(f"HSPG: reg must penalize groups alone, such as GroupLasso, got {type(reg).__name__}")
        if end is not None and reg is not None and group["params"] and _most(group) is None:
            raise ValueError(f"HSPG: end={end!r} needs k, the number of groups to keep: {type(reg).__name__} has none")
        if group["fused"] and (why := why_reference(reg, _HALF_SPACE)):
            raise RuntimeError(f"HSPG: fused=True, but {why}")

    def _rule(self, group: dict[str, Any]) -> Rule:
        return _HALF_SPACE if group.get("projecting") or group["start"] == 0 else _PROX

    def _check_traced(self, group: dict[str, Any], how: str = "compiled") -> None:
        for name, call in (("start", "half_space()"), ("end", "keep_top(k)")):
            if group[name]:  # at start=0 there is nothing to count
                raise RuntimeError(f"a {how} step does not count toward HSPG's {name}: call {call} when it is time")

    def half_space(self, on: bool = True) -> None:
        """Begin (or leave) the second phase, in all groups of parameters; from now on, `start` does nothing."""
        for group in self.param_groups:
            group["projecting"], group["start"] = on, None

    def _step(self) -> bool:
        if is_capturing():
            for group in self.param_groups:
                self._check_traced(group, "captured")
        for group in self.param_groups:
            if _reached(group, "start"):
                group["projecting"], group["start"] = True, None
        found_inf = getattr(self, "found_inf", None)
        stepped = super()._step()
        for group in self.param_groups:
            group["steps"] += stepped
            if stepped and found_inf is not None and (group["start"], group["end"]) != (None, None):
                group["skipped"] = group["skipped"] + (found_inf != 0).reshape(())
        if ending := [group for group in self.param_groups if _reached(group, "end")]:
            self._keep_top("HSPG", ending)
            for group in ending:
                group["end"] = None
        return stepped

    def state_dict(self) -> dict[str, Any]:
        """As of every optimizer here; steps are those that were taken."""
        for group in self.param_groups:
            _settle(group)
        return super().state_dict()

    @torch.no_grad()
    def keep_top(self, k: int | None = None, scope: Literal["tensor", "all"] | None = None) -> None:
        """Keep the k groups of largest norm of every tensor with a regularizer, and mask the others for good.

        Does not wait for the device; a sharded tensor is gathered, one at a time. Groups that were masked before stay
        so. A tensor with fewer groups keeps them all.

        Args:
            k: number of groups; None: that of each parameter group, or of its regularizer.
            scope: whether every tensor keeps k, or all tensors of a parameter group together; None: as each parameter
                group says, or its regularizer.

        Raises:
            ValueError: k is not a positive number, or None where there is none; another scope, or "all" for tensors
                of which some are on other ranks alone; nothing was changed.
        """
        k = check_count("keep_top", "k", k, 1, or_none=True)
        _check_scope("keep_top", scope)
        self._keep_top("keep_top", self.param_groups, k, scope)

    def _keep_top(
        self, owner: str, groups: list[dict[str, Any]], k: int | None = None, scope: str | None = None
    ) -> None:
        groups = [group for group in groups if group["reg"] is not None and group["params"]]
        for group in groups:
            if k is None and _most(group) is None:
                reg = type(group["reg"]).__name__
                raise ValueError(f"{owner}: no k for {self._describe(group, 0)}: neither its group nor {reg} has one")
            if (scope or _scope(group)) == "all" and len({*map(is_elsewhere, group["params"])}) > 1:
                raise ValueError(f"{owner}: scope='all' needs all tensors of a parameter group on every rank")
        for group in groups:
            params = [param for param in group["params"] if param.numel() and not is_elsewhere(param)]
            together = [params] if (scope or _scope(group)) == "all" and params else [[param] for param in params]
            for some in together:
                self._keep_largest(group["reg"], some, _most(group) if k is None else k)

    def _keep_largest(self, reg: Regularizer, params: list[Tensor], most: int | None) -> None:
        """Of the groups of all these."""
        norms = [reg.group_norms(gathered(p.detach()).to(reference.state_dtype(p))) for p in params]
        every = torch.cat([norm.flatten().to(norms[0].device, torch.float64) for norm in norms])
        first = every.argsort(descending=True, stable=True)[:most]  # ties: the same on every device
        keep = torch.zeros_like(every, dtype=torch.bool).scatter_(0, first, True)
        for param, norm, part in zip(params, norms, keep.split([norm.numel() for norm in norms])):
            mask, known = part.to(param.device).view(norm.shape).expand(param.shape), self.get_mask(param)
            self.set_mask(param, (mask & gathered(known)) if known is not None else mask.contiguous())


def _check_scope(owner: str, scope: Any) -> None:
    if scope not in ("tensor", "all", None):
        raise ValueError(f"{owner}: scope must be 'tensor', 'all' or None, got {scope!r}")


def _begin(group: dict[str, Any]) -> None:
    """How far a group of parameters is, which is none of the options in `defaults`."""
    for name, value in (("steps", 0), ("skipped", 0), ("projecting", False)):
        group.setdefault(name, value)


def _most(group: dict[str, Any]) -> int | None:
    """How many groups each tensor keeps; None where nobody says."""
    most: int | None = getattr(group["reg"], "k", None) if group["k"] is None else group["k"]
    return most


def _scope(group: dict[str, Any]) -> str:
    """Whether these are so many groups of each tensor or of all."""
    scope: str = getattr(group["reg"], "scope", "tensor") if group["scope"] is None else group["scope"]
    return scope


def _settle(group: dict[str, Any]) -> None:
    """Makes `steps` those that were taken: until then, those that a flag on the device skipped are counted there."""
    if torch.is_tensor(group["skipped"]):
        group["steps"], group["skipped"] = group["steps"] - int(group["skipped"]), 0


def _reached(group: dict[str, Any], name: str) -> bool:
    """Whether it is `start` or `end`; reads the device only where as many steps were tried."""
    if group[name] is None or group["steps"] < group[name]:
        return False
    _settle(group)
    return bool(group["steps"] >= group[name])


_PROX, _HALF_SPACE = ProxSGDMomentumRule(), HalfSpaceRule()
