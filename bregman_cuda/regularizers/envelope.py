"""GroupEnvelope: the tightest convex stand-in for "at most k groups, and weight decay on them"."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from .._math import number_like
from ._base import Grouped, Regularizer, Step, check_count, check_number
from ._rounds import Extent, Rounds

_INFINITE = 1e300  # stands for an infinite norm in the sums below, so that no inf - inf or inf / inf arises


@dataclass
class GroupEnvelope(Grouped):
    """J(x) = lam * E(x), E the convex envelope of  1/2 sum_G d_G ||x_G||^2  over x with at most k non-zero groups.

    E(x) = 1/2 min { sum_G d_G ||x_G||^2 / u_G : 0 <= u <= 1, sum_G u_G <= k }, with conjugate E*(y) = half the sum of
    the k largest ||y_G||^2 / d_G (weighted group sparse envelope, WGSEF; Beck and Refael's sparse envelope for groups
    of one element). k counts the groups of one tensor. Where x has at most k non-zero groups, J is plain weight
    decay; beyond, groups compete: the k-th largest sets the bar. One prox shrinks, too, and rarely leaves exactly k.

    It couples all groups of a tensor, or of all tensors: a step takes three launches (norms, shares, scale), and no
    value is read back from the device. A NaN fills its group and leaves the others as if that group were zero. For a k
    per layer give `param_groups` a function: ``weights=lambda name, p: GroupEnvelope(0.1, k=max(1, len(p) // 4))``.

    Args:
        lam: strength, >= 0; 0 is the identity.
        k: how many groups are free of the extra shrinkage, from 1 to their number.
        groups: as in `GroupLasso`.
        weight: d_G. "none" (1), "sqrt_size" (as w_G in `GroupLasso`), or a tuple of numbers > 0, one per group in
            index order (in plain torch; copied to the device each time).
        scope: "tensor", each tensor has a k of its own, or "all": the tensors of a parameter group that take a step
            share k, and have one dtype, device and set of ranks. `ProxSGD` and `HSPG` serve that; the functions of one
            tensor count that tensor alone, see `prox_together`.

    Raises:
        ValueError, TypeError: a value out of its range; by `groups_of`, and so when an optimizer is made: fewer than
            k groups, a tensor without the dims of `groups`, or with another number of groups than weights.

    >>> GroupEnvelope(1.0, k=1).prox(torch.tensor([[6.0, 8.0], [0.3, 0.4], [3.0, 4.0]]), 1.0)
    tensor([[3., 4.],
            [0., 0.],
            [0., 0.]])
    """

    lam: float
    k: int
    groups: str | tuple[int, ...] = "out"
    weight: str | tuple[float, ...] = "none"
    scope: str = "tensor"
    budgets_kernel = True
    whole = "it shares k among all groups of a tensor"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "k":
            value = check_count("GroupEnvelope", name, value, 1)
        if name == "scope" and value not in ("tensor", "all"):
            raise ValueError(f"GroupEnvelope: scope must be 'tensor' or 'all', got {value!r}")
        if (
            name == "weight"
            and not isinstance(value, str)
            and isinstance(value, Iterable)
            and not torch.is_tensor(value)
        ):
            Regularizer.__setattr__(self, name, _check_weights(tuple(value)))
        else:
            super().__setattr__(name, value)

    def groups_of(self, shape: Sequence[int]) -> tuple[int, ...]:
        """See `Regularizer.groups_of`.

        Raises:
            ValueError: the tensor has too few dimensions, too few groups for k, or not as many as there are weights.
        """
        dims = super().groups_of(shape)
        count = math.prod([shape[d] for d in dims])
        if math.prod(shape) and self.k > count and self.scope == "tensor":
            raise ValueError(
                f"GroupEnvelope: k={self.k} is more than the {count} groups (groups={self.groups!r}) "
                f"of a tensor of shape {tuple(shape)}"
            )
        if not isinstance(self.weight, str) and len(self.weight) != count:
            raise ValueError(
                f"GroupEnvelope: {len(self.weight)} weights do not fit the {count} groups (groups={self.groups!r}) "
                f"of a tensor of shape {tuple(shape)}"
            )
        return dims

    def budgets(self, count: int) -> list[int]:
        return [self.k] * count if self.scope == "tensor" else [self.k, *[-1] * (count - 1)]

    def fits_together(self, shapes: Sequence[Sequence[int]]) -> None:
        count = sum(math.prod(shape[d] for d in self.groups_of(shape)) for shape in shapes if math.prod(shape))
        if self.scope == "all" and 0 < count < self.k:
            raise ValueError(
                f"GroupEnvelope: k={self.k} is more than the {count} groups (groups={self.groups!r}) of all tensors"
            )

    def value(self, x: Tensor) -> Tensor:
        self.groups_of(x.shape)
        if not x.numel():
            return x.new_zeros(())
        # The best u is a constant for the derivative (envelope theorem), so autograd gives d_G x_G / u_G.
        [stretch] = self._stretches([self.group_norms(x.detach().double())], [x.shape])
        return 0.5 * (self.lam * x.double().square() * stretch).sum().to(x.dtype)

    def _prox(self, x: Tensor, step: Step, extent: Extent, near: Tensor | None = None) -> Rounds[Tensor]:
        [result] = yield from self._prox_of_all([x], step, [extent])
        return result

    def _together(self, points: Sequence[Tensor], step: Step, extents: Sequence[Extent]) -> Rounds[list[Tensor]]:
        together = self._prox_of_all if self.scope == "all" else super()._together
        return (yield from together(points, step, extents))

    def _prox_of_all(self, points: Sequence[Tensor], step: Step, extents: Sequence[Extent]) -> Rounds[list[Tensor]]:
        dims = [self.groups_of(extent.shape) for extent in extents]
        parts = [self._group_squares(x, extent.shape) for x, extent in zip(points, extents)]
        sums = yield [extent.spread(part, d) for part, extent, d in zip(parts, extents, dims)]
        norms = [squares.sqrt() for squares in sums]
        decays = []
        for x, norm, extent in zip(points, norms, extents):
            scale = number_like(step, x, torch.float64) * self.lam
            decay = (scale * self._weights(extent.shape, norm)).clamp_max(_INFINITE) if norm.numel() else norm
            decays.append(decay.expand_as(norm))
        norm, decay = (torch.cat([x.flatten() for x in several]) for several in (norms, decays))
        share = _shares(_finite(norm), decay, self.k) if len(norm) else norm
        factor = torch.where(decay == 0, torch.ones_like(share), share / (share + decay))
        factors = torch.where(norm.isnan(), norm, factor).split([x.numel() for x in norms])
        return [
            x * extent.part(f.view_as(n), d).to(x.dtype) if x.numel() else x
            for x, f, n, extent, d in zip(points, factors, norms, extents, dims)
        ]

    def subgradient(self, x: Tensor) -> Tensor:
        squares = self._group_squares(x, x.shape)
        return x * self._pull(squares, x.shape, x.dtype) if x.numel() else torch.zeros_like(x)

    def _pull(self, squares: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        [pull] = self._pulls([squares], [shape], dtype)
        return pull

    def _pulls(self, squares: Sequence[Tensor], shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
        stretches = self._stretches([some.sqrt() for some in squares], shapes)
        return [(self.lam * stretch).to(dtype) for stretch in stretches]

    def subdiff_distance(self, x: Tensor, grad: Tensor) -> Tensor:
        norms = self.group_norms(x)
        if not x.numel():
            return norms
        # A zero group's subgradients are the ball ||y|| <= bar.
        sizes = self._sizes(self.group_norms(x.double()), x.shape)
        bar = self.lam * self._weights(x.shape, norms).sqrt() * self._level(sizes)
        at_zero = (self.group_norms(grad.double()) - bar).clamp_min(0).to(x.dtype)
        return torch.where(norms == 0, at_zero, self.group_norms(grad + self.subgradient(x)))

    def lam_max(self, grad: Tensor) -> float:
        """Infinite unless grad is zero: near zero J is quadratic, and no lam holds x there."""
        return math.inf if grad.numel() and bool((grad != 0).any()) else 0.0

    def _weights(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """d_G in float64, one per group or one for all, on the device of `like`."""
        if isinstance(self.weight, str):
            return torch.full((), self.group_weight(shape), dtype=torch.float64, device=like.device)
        dims = self.groups_of(shape)
        view = [n if d in dims else 1 for d, n in enumerate(shape)]
        return torch.tensor(self.weight, dtype=torch.float64, device=like.device).view(view)

    def _sizes(self, norms: Tensor, shape: Sequence[int]) -> Tensor:
        """s_G = sqrt(d_G) ||x_G|| of groups of these norms, in float64."""
        return _finite(norms * self._weights(shape, norms).sqrt())

    def _level(self, sizes: Tensor) -> Tensor:
        """The t of  u_G = min(1, s_G / t): zero with fewer than k non-zero groups."""
        if not sizes.numel():
            return sizes.sum()
        sizes = sizes.flatten().sort(descending=True).values
        k = min(self.k, len(sizes))  # of all tensors it may exceed the groups of this one
        tails = sizes.flip(0).cumsum(0).flip(0)[:k]  # sums from the small end: nothing cancels
        # With the N largest at u = 1 the others share k - N. The right N is the first at which none of them exceeds 1;
        # N = k - 1 always qualifies, as a sum is no smaller than its largest term.
        levels = tails / torch.arange(k, 0, -1, dtype=torch.float64, device=sizes.device)
        first = (levels >= sizes[:k]).int().argmax()
        return levels.gather(0, first.view(1)).view(())

    def _stretches(self, norms: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """d_G / u_G per group of tensors that share k, from float64 norms; for a zero group, where any number serves,
        d_G; NaN for NaN."""
        sizes = [self._sizes(some, shape) for some, shape in zip(norms, shapes)]
        level = self._level(torch.cat([some.flatten() for some in sizes]))
        ratios = [level / torch.where(some > 0, some, torch.full_like(some, torch.inf)) for some in sizes]
        return [
            torch.where(some.isnan(), torch.nan, ratio.clamp_min(1) * self._weights(shape, some))
            for some, ratio, shape in zip(norms, ratios, shapes)
        ]


def _finite(norms: Tensor) -> Tensor:
    return norms.nan_to_num(nan=0.0, posinf=_INFINITE)


def _shares(norms: Tensor, decay: Tensor, k: int) -> Tensor:
    """The u of the prox: u_G(eta) = clip(eta ||x_G|| sqrt(c_G) - c_G, 0, 1) with sum k; c_G = step * lam * d_G.

    The sum is piecewise linear and increasing in eta with two breakpoints per group. A binary search over the sorted
    breakpoints, whose length the shape tells, finds the piece that holds the root, and one division solves it there:
    exact up to rounding, as no sum mixes signs, and without a tolerance, a starting point or a look at the data by the
    host. With at most k non-zero groups all of them have u = 1.

    Args:
        norms, decay: float64 of shape (groups,), finite.
    """
    slope = norms * decay.sqrt()
    moves = slope > 0
    divisor = torch.where(moves, slope, torch.ones_like(slope))
    begins = torch.where(moves, decay / divisor, torch.zeros_like(slope))
    ends = torch.where(moves, (1 + decay) / divisor, torch.zeros_like(slope))
    points = torch.cat([begins, ends]).sort().values

    low = torch.zeros(1, dtype=torch.int64, device=norms.device)
    high = torch.full_like(low, len(points) - 1)
    # The sum is < k at points[low]: strictly, so that of a flat piece with sum k the lower end is found.
    for _ in range(len(points).bit_length()):
        middle = (low + high) // 2
        below = (points.gather(0, middle) * slope - decay).clamp(0, 1).sum() < k
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    point = points.gather(0, low)

    linear = (begins <= point) & (point < ends)
    full = (ends <= point) & moves
    zero = torch.zeros_like(slope)
    rise = torch.where(linear, slope, zero).sum()
    eta = (k - full.sum() + torch.where(linear, decay, zero).sum()) / rise
    eta = torch.where(rise > 0, eta, point)  # on a flat piece the sum is k already
    share = torch.where(linear, (eta * slope - decay).clamp(0, 1), full.to(slope.dtype))
    alive = norms > 0
    return torch.where(alive.sum() <= k, alive.to(share.dtype), share)


def _check_weights(weights: Union[tuple[Any, ...], list[Any]]) -> tuple[float, ...]:
    for index, weight in enumerate(weights):
        name = f"weight[{index}]"
        if torch.is_tensor(weight):
            raise TypeError(f"GroupEnvelope: {name} must be a number, got a tensor")
        check_number("GroupEnvelope", name, weight)
        if weight == 0:
            raise ValueError(f"GroupEnvelope: {name} must be > 0, got {weight!r}")
    return tuple(map(float, weights))
