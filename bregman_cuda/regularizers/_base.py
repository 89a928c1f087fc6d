"""What a regularizer is: a scalar penalty per element, a scalar penalty per group norm, or both.

Every regularizer here is  J(x) = sum_i phi(x_i) + sum_G w_G psi(||x_G||_2)  with scalar penalties phi and psi.
Its prox is the scalar prox of phi followed by the radial prox of psi, so a penalty is written once and serves
elements and groups alike. The kernels apply exactly this composition (csrc/math/penalties, csrc/math/radial.h). Where
both are there, phi has to be homogeneous (`Regularizer.why_no_prox`).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, ClassVar, Union

import torch
from torch import Tensor

from .._math import number_like
from ._rounds import Extent, Rounds, alone
from ._weighted import weighted_group_prox

Step = Union[float, Tensor]
_GROUP_NAMES = {"out": (0,), "in": (1,), "kernel": (0, 1)}
_READ_ON_DEVICE = ("lr", "lam")  # the scalars that steps read where they lie


def plain_number(value: Any) -> Any:
    """A number of another library, such as numpy's, as Python's int or float: checkpoints hold plain data.

    What is no number, or none that a float holds exactly, comes back as it is.
    """
    if type(value) in (float, int, bool):
        return value
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    if isinstance(value, numbers.Real) and ((number := float(value)) == value or math.isnan(number)):
        return number
    return value


def check_number(
    owner: str, name: str, value: Any, low: float = 0.0, high: float = math.inf, above: bool = False
) -> None:
    """Refuse a value that is not a finite number within [low, high], or (low, high] with `above`.

    A one-element tensor is read on the CPU, but not while torch.compile traces. On a device, where reading would
    synchronise, lr and lam pass unread, and all others are refused.

    Raises:
        TypeError: not a real number.
        ValueError: NaN, infinite or out of range, or a tensor of several elements, or of another option on a device.
    """
    if torch.is_tensor(value):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{owner}: a tensor {name} must have one floating-point element, got {value.dtype} of shape "
                f"{tuple(value.shape)}"
            )
        if value.device.type != "cpu" and name not in _READ_ON_DEVICE:
            raise ValueError(
                f"{owner}: {name} must be a number or a tensor on the CPU, got one on {value.device}; only lr and lam "
                "can lie on a device"
            )
        if value.device.type != "cpu" or torch.compiler.is_compiling():
            return
        value = value.item()
    number = plain_number(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        remedy = "; use float(...)" if hasattr(value, "__float__") and not isinstance(value, bool) else ""
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}{remedy}")
    if not (low <= value <= high) or math.isinf(value) or (above and value == low):
        span = f"{'>' if above else '>='} {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ValueError(f"{owner}: {name} must be finite and {span}, got {value!r}")


def check_count(owner: str, name: str, value: Any, least: int = 0, or_none: bool = False) -> Any:
    """An integer, numpy's too, as Python's; or None, if it may be that.

    Raises:
        ValueError: no integer, or too small.
    """
    number = plain_number(value)
    if (number is None and or_none) or (type(number) is int and number >= least):
        return number
    raise ValueError(f"{owner}: {name} must be an integer >= {least}{' or None' * or_none}, got {value!r}")


class Regularizer:
    """Base of all regularizers: plain, mutable data whose changes take effect at the optimizer's next step.

    A subclass is a dataclass that sets `elementwise` (phi) and/or `radial` (psi), see `Separable` and `Grouped`.
    """

    registry: ClassVar[dict[str, type[Regularizer]]] = {}
    bounds: ClassVar[dict[str, tuple[float, float]]] = {"lam": (0.0, math.inf)}
    above: ClassVar[tuple[str, ...]] = ()  # parameters that must exceed their lower bound
    convex: ClassVar[bool] = True  # Bregman optimizers need it: their dual is a subgradient
    # Empty, or why the prox needs a whole tensor at once: no composition of phi and psi, so no kernels but those for
    # budgets.
    whole: ClassVar[str] = ""
    budgets_kernel: ClassVar[bool] = False  # whether the kernels know its groups' shares of a budget nevertheless
    every: int = 1  # the prox is taken at every so many steps, with so many times the step size; > 1 needs `whole`

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Regularizer.registry[cls.__name__] = cls

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in {field.name for field in dataclasses.fields(self)}:  # type: ignore[arg-type]
            raise AttributeError(f"{type(self).__name__} has no parameter {name!r}")
        value = plain_number(value)
        if name in self.bounds:
            check_number(type(self).__name__, name, value, *self.bounds[name], above=name in self.above)
        object.__setattr__(self, name, value)

    def check_tensors(self) -> None:
        """Check tensor parameters again, which may have changed in place; numbers cannot.

        Raises:
            ValueError: out of range.
        """
        for name in self.bounds:
            if isinstance(value := getattr(self, name, None), Tensor):
                check_number(type(self).__name__, name, value, *self.bounds[name], above=name in self.above)

    def nan_or_one(self) -> Any:
        """What makes NaN of a step whose lam turned NaN where nobody reads it, as comparisons with it would make zeros:
        a factor, 1 else."""
        lam = getattr(self, "lam", None)
        if not isinstance(lam, Tensor) or (lam.device.type == "cpu" and not torch.compiler.is_compiling()):
            return 1.0  # `check_tensors` reads it
        return torch.where(lam.isnan(), lam, 1.0).double().reshape(())

    @property
    def elementwise(self) -> Separable | None:
        """The scalar penalty phi applied to every element."""
        return None

    @property
    def radial(self) -> Separable | None:
        """The scalar penalty psi applied to every group norm."""
        return None

    def groups_of(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """Dimensions whose indices identify a group in a tensor of this shape, or None without groups."""
        return None

    def group_weight(self, shape: Sequence[int]) -> float:
        """The weight w_G of a group (the same for all groups of a tensor)."""
        return 1.0

    def budgets(self, count: int) -> list[int]:
        """For each of so many tensors: the k that its groups share, -1 if they share the k of the tensor before, 0 if
        they share none."""
        return [0] * count

    def fits_together(self, shapes: Sequence[Sequence[int]]) -> None:
        """Check the tensors of a parameter group, each of which fits by itself.

        Raises:
            ValueError: they do not fit together.
        """

    def prox_together(self, points: Sequence[Tensor], step: Step) -> list[Tensor]:
        """The prox of all tensors of a parameter group; of each by itself unless they share a budget.

        Args:
            points: tensors of any shapes and of one device.
            step: a number or a 0-dim tensor, the same for all.
        """
        return alone(self._together(points, step, [Extent(x.shape) for x in points])) if points else []

    def group_norms(self, x: Tensor) -> Tensor:
        """Euclidean norm of every group, with the reduced dimensions kept at size 1. Sums run in float64."""
        return x.abs() if self.groups_of(x.shape) is None else self._group_squares(x, x.shape).sqrt().to(x.dtype)

    def value(self, x: Tensor) -> Tensor:
        """J(x), a 0-dim tensor; differentiable where J is."""
        total = x.new_zeros(())
        if self.elementwise is not None:
            total = total + self.elementwise._phi(x).sum()
        if self.radial is not None:
            total = total + self.group_weight(x.shape) * self.radial._phi(self._smooth_norms(x)).sum()
        return total

    def prox(self, x: Tensor, step: Step) -> Tensor:
        """argmin_z  step * J(z) + ||z - x||^2 / 2, of the shape and dtype of x. NaN stays NaN, zero stays zero.

        The global minimum also where J is not convex; of two that are equally good, the one nearer to zero.

        Args:
            x: floating tensor of any shape.
            step: the step size, a float or a 0-dim tensor of x's dtype; or one per element, a tensor of x's shape:
                argmin_z  J(z) + sum_i (z_i - x_i)^2 / (2 step_i), the prox in a diagonal metric.

        Raises:
            ValueError: a penalty whose prox is not known (`why_no_prox`), or not with steps per element; or a tensor
                lam that turned NaN or negative.
        """
        self._per_element(x, step)
        self.check_tensors()
        if torch.is_tensor(factor := self.nan_or_one()):
            x = x * factor.to(x.dtype)
        return alone(self._prox(x, step, Extent(x.shape)))

    def _per_element(self, x: Tensor, step: Step) -> bool:
        """Whether there is a step size for each element; refused where that prox is not known."""
        if not torch.is_tensor(step) or step.shape != x.shape:
            return False
        why = self.why_not_weighted()
        if why and x.numel() > 1:
            raise ValueError(f"prox: with a step size for each element, {why}")
        return not why  # a single element has a single step size

    def why_no_prox(self) -> str:
        """Empty, or why the prox is not known: with phi below psi it is the prox of phi followed by that of the norm if
        phi(t x) = t phi(x) for t >= 0. Its subgradients depend on signs alone then, which shrinking a group keeps.
        """
        part, own = self.elementwise, type(self).prox is not Regularizer.prox
        if own or self.radial is None or part is None or getattr(part, "homogeneous", False):
            return ""
        why = f"{type(part).__name__} below group norms is not homogeneous (or does not say so)"
        return f"{type(self).__name__} has no known prox: {why}"

    def why_not_weighted(self) -> str:
        """Empty, or why the prox with a step size for each element is not known.

        Separable penalties always have it. On group norms, those have whose slope is a line (`Separable.line`) or a
        known curve (`Separable.curve`).
        """
        why = self.whole
        if not why and self.radial is not None and not self.radial.in_metric():
            why = f"{type(self.radial).__name__} on group norms has no slope that is a line, nor a curve"
        return f"{type(self).__name__} has no known prox: {why}" if why else self.why_no_prox()

    def subgradient(self, x: Tensor) -> Tensor:
        """The element of smallest norm of the subdifferential of J at x (zero where x is zero)."""
        result = torch.zeros_like(x)
        if self.elementwise is not None:
            result = result + self.elementwise._slope(x)
        if self.radial is not None and x.numel():
            result = result + x * self._pull(self._group_squares(x, x.shape), x.shape, x.dtype)
        return result

    def subdiff_distance(self, x: Tensor, grad: Tensor) -> Tensor:
        """How far -grad is from the subdifferential of J at x: zero everywhere is the optimality certificate.

        Returns:
            A tensor of distances, one per element, or one per group (reduced dimensions kept at size 1).
        """
        if self.radial is None:
            return grad.abs() if self.elementwise is None else self.elementwise._distance(x, grad)
        squares, weight = self._group_squares(x, x.shape), self.group_weight(x.shape)
        alive = squares.sqrt().to(x.dtype) > 0
        rest = torch.where(alive, grad + x * self._pull(squares, x.shape, x.dtype), grad)
        rest = rest.abs() if self.elementwise is None else self.elementwise._distance(x, rest)
        rest = self.group_norms(rest)
        return torch.where(alive, rest, weight * self.radial._distance(torch.zeros_like(rest), rest / weight))

    def lam_max(self, grad: Tensor) -> float:
        """The smallest lam for which x = 0 is optimal (a critical point, where J is not convex) when the loss has
        gradient `grad` there."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the domain of J (x itself unless J is a constraint, too)."""
        return x if self.elementwise is None else self.elementwise._project(x)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint; `Regularizer.from_dict` is the inverse."""
        return {"regularizer": type(self).__name__, **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Regularizer:
        """Rebuild what `to_dict` wrote.

        Raises:
            ValueError: the dictionary names no known regularizer.
        """
        values = dict(data)
        name = values.pop("regularizer", None)
        known = {key: cls for key, cls in Regularizer.registry.items() if dataclasses.is_dataclass(cls)}
        if name not in known:
            raise ValueError(f"unknown regularizer {name!r}; known: {', '.join(sorted(known))}")
        return known[name](**values)

    def prox_in_rounds(self, x: Tensor, step: Step, extent: Extent, near: Tensor | None = None) -> Rounds[Tensor]:
        """`prox` of a part of a tensor. `near`, of x's shape, is a guess at it where it has to be searched.

        A subclass with a `prox` of its own gets all that the ranks hold of the groups here: all of the tensor if it
        says that it needs the `whole`.
        """
        if type(self).prox is Regularizer.prox:
            return (yield from self._prox(x, step, extent, near))
        parts = [x, step] if torch.is_tensor(step) and step.shape == x.shape else [x]
        [total] = yield [torch.stack([extent.spread(part) for part in parts])]
        point, *scales = total.to(x.dtype)
        return extent.part(self.prox(point, *scales or [step]))

    def _prox(self, x: Tensor, step: Step, extent: Extent, near: Tensor | None = None) -> Rounds[Tensor]:
        if why := self.why_no_prox():
            raise ValueError(f"prox: {why}")
        scale = number_like(step, x)
        if self.elementwise is not None:
            x = self.elementwise._scalar_prox(x, scale)
        if self.radial is None:
            return x
        weight = self.group_weight(extent.shape) if math.prod(extent.shape) else 1.0
        if self._per_element(x, step):
            reduced = self._reduced(extent.shape)
            return (yield from weighted_group_prox(x, scale, self.radial, weight, reduced, near))
        [squares] = yield [self._group_squares(x, extent.shape)]
        return x * self._radial_factor(squares.sqrt().to(x.dtype), scale * weight) if x.numel() else x

    def together_in_rounds(
        self, points: Sequence[Tensor], step: Step, extents: Sequence[Extent]
    ) -> Rounds[list[Tensor]]:
        """`prox_together` of parts; of all tensors where a subclass has its own."""
        if type(self).prox_together is Regularizer.prox_together:
            return (yield from self._together(points, step, extents))
        totals = yield [extent.spread(x) for x, extent in zip(points, extents)]
        results = self.prox_together([total.to(x.dtype) for total, x in zip(totals, points)], step)
        return [extent.part(result) for result, extent in zip(results, extents)]

    def _together(self, points: Sequence[Tensor], step: Step, extents: Sequence[Extent]) -> Rounds[list[Tensor]]:
        results = []
        for x, extent in zip(points, extents):
            results.append((yield from self.prox_in_rounds(x, step, extent)))
        return results

    def _reduced(self, shape: Sequence[int]) -> list[int]:
        """The dims within a group."""
        dims = self.groups_of(shape)
        assert dims is not None
        return [d for d in range(len(shape)) if d not in dims]

    def _group_squares(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Of a part of a tensor of this shape."""
        squares, reduced = x.double().square(), self._reduced(shape)
        return squares.sum(reduced, keepdim=True) if reduced else squares

    def _smooth_norms(self, x: Tensor) -> Tensor:
        # vector_norm has a zero subgradient at a zero group, where sqrt(sum) would give NaN.
        reduced = self._reduced(x.shape)
        return torch.linalg.vector_norm(x, dim=reduced, keepdim=True) if reduced else x.abs()

    def _radial_factor(self, norms: Tensor, scale: Tensor) -> Tensor:
        # A zero group meets the smallest normal number instead: factor 0, or 1 where the prox is the identity.
        assert self.radial is not None
        norms = torch.where(norms == 0, torch.full_like(norms, torch.finfo(norms.dtype).tiny), norms)
        shrunk = self.radial._scalar_prox(norms, scale)
        return torch.where(shrunk == norms, torch.ones_like(norms), shrunk / norms)

    def _pull(self, squares: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The subgradient with respect to groups of these squared norms, as a factor on their elements."""
        assert self.radial is not None
        norms = squares.sqrt().to(dtype)
        safe = torch.where(norms == 0, torch.ones_like(norms), norms)  # a zero group has subgradient zero
        return self.group_weight(shape) * self.radial._slope(norms) / safe

    def _pulls(self, squares: Sequence[Tensor], shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
        """`_pull` of tensors that are stepped together; of each by itself unless they share a budget."""
        return [self._pull(some, shape, dtype) for some, shape in zip(squares, shapes)]


class Separable(Regularizer):
    """A scalar penalty phi on every element. A subclass writes the five functions below and names its kernel."""

    kernel: ClassVar[str]  # its entry in csrc/math/penalty_list.h
    homogeneous: ClassVar[bool] = False  # whether phi(t x) = t phi(x) for t >= 0

    @property
    def elementwise(self) -> Separable | None:
        return self

    def parameters(self) -> dict[str, float]:
        """The kernel's parameters by name."""
        raise NotImplementedError

    def line(self, dtype: torch.dtype = torch.float64) -> tuple[Any, Any] | None:
        """(level, slope), computed in `dtype`:  phi'(t) = level - slope * t for t > 0, as far as that is positive. As a
        group penalty it has a prox in a diagonal metric then, by a `curve` if slope > 0."""
        return None

    def curve(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """For t > 0 in fp64, with parameters rounded to `dtype`: phi(t), phi'(t) / t, and -t times the derivative of
        that; phi'(t) / t must not increase."""
        raise NotImplementedError

    def middle(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """The norm, like t, at which the search along a curve begins at the latest (csrc/math/curved.h)."""
        return torch.full_like(t, math.inf)

    def in_metric(self) -> bool:
        """Whether the group penalty has a prox in a diagonal metric."""
        line = self.line()
        return self.bends() or (line is not None and float(line[1]) <= 0)

    def has_slope(self) -> bool:
        """Whether half-space steps know its slope on group norms: a `line` or a `curve`."""
        return self.line() is not None or self.bends()

    def bends(self) -> bool:
        """Whether it has a `curve`."""
        return type(self).curve is not Separable.curve

    def _phi(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _scalar_prox(self, x: Tensor, scale: Tensor) -> Tensor:
        raise NotImplementedError

    def _slope(self, x: Tensor) -> Tensor:
        """The subgradient of smallest norm."""
        raise NotImplementedError

    def _distance(self, x: Tensor, grad: Tensor) -> Tensor:
        raise NotImplementedError

    def _project(self, x: Tensor) -> Tensor:
        return x


class Grouped(Regularizer):
    """Shared part of group penalties: which dimensions identify a group, and its weight.

    `groups`: "out" (one group per index of dim 0), "in" (dim 1), "kernel" (dims 0 and 1), or a tuple of dims.
    `weight`: "sqrt_size" (square root of the group's element count) or "none" (1).
    """

    groups: str | tuple[int, ...]
    weight: str | tuple[float, ...]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "groups":
            value = _check_groups(type(self).__name__, value)
        if name == "weight" and value not in ("sqrt_size", "none"):
            raise ValueError(f"{type(self).__name__}: weight must be 'sqrt_size' or 'none', got {value!r}")
        super().__setattr__(name, value)

    def groups_of(self, shape: Sequence[int]) -> tuple[int, ...]:
        """See `Regularizer.groups_of`.

        Raises:
            ValueError: the tensor has too few dimensions.
        """
        dims = _GROUP_NAMES[self.groups] if isinstance(self.groups, str) else self.groups
        if any(not -len(shape) <= d < len(shape) for d in dims):
            raise ValueError(
                f"{type(self).__name__}(groups={self.groups!r}) does not fit a tensor of shape {tuple(shape)}; "
                "choose dims that it has, or give it another regularizer"
            )
        return tuple(sorted({d % len(shape) for d in dims}))

    def group_weight(self, shape: Sequence[int]) -> float:
        if self.weight == "none":
            return 1.0
        dims = self.groups_of(shape)
        return math.sqrt(math.prod([n for d, n in enumerate(shape) if d not in dims]))

    def lam_max(self, grad: Tensor) -> float:
        assert self.radial is not None
        return self.radial.lam_max(self.group_norms(grad)) / self.group_weight(grad.shape) if grad.numel() else 0.0


def _check_groups(owner: str, groups: Any) -> str | tuple[int, ...]:
    if isinstance(groups, str):
        if groups not in _GROUP_NAMES:
            raise ValueError(f"{owner}: groups must be 'out', 'in', 'kernel' or a tuple of dims, got {groups!r}")
        return groups
    if not isinstance(groups, (tuple, list)) or not all(isinstance(plain_number(d), int) for d in groups):
        raise TypeError(f"{owner}: groups must be 'out', 'in', 'kernel' or a tuple of dims, got {groups!r}")
    return tuple(map(plain_number, groups))
