"""HSPG: proximal SGD first, then half-space steps that make whole groups exactly zero."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._backend import why_no_half_space
from ..regularizers import Regularizer
from ..regularizers._base import check_number
from ._base import SparseOptimizer
from ._rule import Hyper, Rule, State, number
from ._shards import is_sharded, local
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

    def shrink(self, reg: Regularizer, z: Tensor, scale: Any, h: Hyper, param: Tensor) -> Tensor:
        return half_space_step(reg, z, scale, h["lr"], h["epsilon"])


def half_space_step(reg: Regularizer, z: Tensor, p: Tensor, lr: Any, epsilon: Any) -> Tensor:
    """x = z - lr * (subgradient of J at p), and zero for every group with <x, p> < epsilon ||p||^2, or p zero there.

    The twin of csrc/math/half_space.h where J is a function of group norms whose slope is a line.

    Args:
        z, p: fp32 or fp64 of one shape: the point after the gradient step, and the parameter before it.
    """
    dims = reg.groups_of(p.shape)
    assert dims is not None
    if not p.numel():
        return z
    reduced = [d for d in range(p.ndim) if d not in dims]
    line = None if reg.radial is None else reg.radial.line(p.dtype)

    def total(x: Tensor) -> Tensor:
        return x.sum(reduced, keepdim=True) if reduced else x

    squares = total(p.double().square())
    if line is None:
        x = z - reg.subgradient(p) * lr
        left = total(x.double() * p.double()) < epsilon * squares
        return torch.where((squares == 0) | left, z - z, x)
    weight = torch.as_tensor(reg.group_weight(p.shape), dtype=p.dtype, device=p.device)
    level, bend = (torch.as_tensor(v, dtype=p.dtype, device=p.device) * weight for v in line)
    norms, lr, epsilon = squares.sqrt(), *(torch.as_tensor(v, dtype=p.dtype, device=p.device) for v in (lr, epsilon))
    slope = level.double() - bend.double() * norms
    pull = (lr.double() * torch.where(slope > 0, slope, 0.0) / norms).to(p.dtype)
    left = total(z.double() * p.double()) - pull.double() * squares < epsilon.double() * squares
    return torch.where((squares == 0) | left, z - z, z - p * pull)


class HSPG(SparseOptimizer):
    r"""Half-space stochastic projected gradient (Chen et al., 2020, the optimizer of OTO; WGSEF's algorithm 3 with
    `GroupEnvelope`).

    First, proximal SGD as in `ProxSGD`:  m <- momentum * m + g,  p <- prox_{lr J}(p - lr * m).  After `half_space()`,
    which also `start` does by itself after so many steps, on non-zero groups:

        x = p - lr * (m + J'(p)),   p_G <- x_G, or 0 if <x_G, p_G> < epsilon * ||p_G||^2;   zero groups stay zero.

    A prox alone seldom leaves few groups, and shrinks those that it leaves; the second phase removes groups and does
    not shrink toward a smaller support. `keep_top(k)` ends it with at most k groups per tensor, for good.

    Args:
        params, maximize, fused, count_nonzeros, check_finite, capturable: as in `LinBreg`.
        lr: step size >= 0; a float or a one-element tensor.
        reg: a regularizer with groups: `GroupLasso`, `GroupMCP`, `GroupEnvelope`, ..., or None (plain SGD).
        momentum: in [0, 1).
        epsilon: in [0, 1); larger removes more.
        start: number of steps after which half-space steps begin; None waits for `half_space()`, as compiled and
            captured steps do. A step that a GradScaler skips counts only where its flag lies on a device.

    Raises:
        ValueError, TypeError: a parameter out of its range; nothing was changed.

    >>> p = torch.nn.Parameter(torch.tensor([[0.1, 0.1], [1.0, 1.0]]))
    >>> optimizer = HSPG([p], lr=0.5, reg=GroupLasso(0.2, weight="none"))
    >>> optimizer.half_space()
    >>> p.grad = torch.tensor([[0.4, 0.0], [0.4, 0.0]])
    >>> optimizer.step()
    >>> p.data
    tensor([[0.0000, 0.0000],
            [0.7293, 0.9293]])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 0.1,
        reg: Regularizer | None = None,
        momentum: float = 0.0,
        epsilon: float = 0.0,
        start: int | None = None,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        count_nonzeros: bool = False,
        check_finite: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults: dict[str, Any] = dict(lr=lr, reg=reg, momentum=momentum, epsilon=epsilon, start=start)
        defaults |= dict(steps=0, projecting=False)
        super().__init__(params, defaults, maximize, fused, count_nonzeros, check_finite, capturable)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_momentum("HSPG", group["momentum"])
        check_number("HSPG", "epsilon", group["epsilon"])
        if group["epsilon"] >= 1:
            raise ValueError(f"HSPG: epsilon must be < 1, got {group['epsilon']!r}")
        start, reg = group["start"], group["reg"]
        if start is not None and (isinstance(start, bool) or not isinstance(start, int) or start < 0):
            raise ValueError(f"HSPG: start must be a number of steps >= 0, or None, got {start!r}")
        if reg is not None and (reg.elementwise is not None or (reg.radial is None and not hasattr(reg, "groups"))):
            raise ValueError(f"HSPG: reg must penalize groups alone, such as GroupLasso, got {type(reg).__name__}")
        if group["fused"] and reg is not None and (why := why_no_half_space(reg)):
            raise RuntimeError(f"HSPG: fused=True, but {why}")

    def _rule(self, group: dict[str, Any]) -> Rule:
        return _HALF_SPACE if group["projecting"] else _PROX

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if not group["projecting"]:  # what the second phase refuses is refused from the start
            super()._check({**group, "projecting": True})

    def _check_traced(self, group: dict[str, Any]) -> None:
        if group["start"] is not None:
            raise RuntimeError("a compiled step does not count toward HSPG's start: call half_space() when it is time")

    def half_space(self, on: bool = True) -> None:
        """Begin (or leave) the second phase, in all groups of parameters; from now on, `start` does nothing."""
        for group in self.param_groups:
            group["projecting"], group["start"] = on, None

    def _step(self) -> bool:
        for group in self.param_groups:
            if group["start"] is not None and group["steps"] >= group["start"]:
                group["projecting"], group["start"] = True, None
        stepped = super()._step()
        for group in self.param_groups:
            group["steps"] += stepped
        return stepped

    @torch.no_grad()
    def keep_top(self, k: int) -> None:
        """Keep the k groups of largest norm of every tensor with a regularizer, and mask the others for good.

        Does not wait for the device. Groups that were masked before stay so.

        Raises:
            ValueError: k is not a positive number, or more than a tensor's groups; nothing was changed.
            NotImplementedError: a sharded parameter.
        """
        chosen = [(param, group["reg"]) for group in self.param_groups if group["reg"] for param in group["params"]]
        for param, reg in chosen:
            count = reg.group_norms(local(param)).numel()
            if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= count:
                where = self._describe_param(param)
                raise ValueError(
                    f"keep_top: k must be between 1 and the number of groups, {count}, got {k!r} ({where})"
                )
            if is_sharded(param):
                where = self._describe_param(param)
                raise NotImplementedError(
                    f"keep_top: the groups of sharded parameters (DTensor) are not compared ({where})"
                )
        for param, reg in chosen:
            norms = reg.group_norms(param.detach().to(reference.state_dtype(param)))
            keep = torch.zeros_like(norms, dtype=torch.bool).view(-1)
            keep[norms.flatten().topk(k).indices] = True
            mask, known = keep.view(norms.shape).expand(param.shape), self.get_mask(param)
            self.set_mask(param, (mask & known) if known is not None else mask.contiguous())


_PROX, _HALF_SPACE = ProxSGDMomentumRule(), HalfSpaceRule()
