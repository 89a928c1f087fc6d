"""The contract between an update rule and the drivers that walk the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..regularizers._rounds import Extent, Rounds

State = dict[str, Tensor]
Hyper = dict[str, Any]  # floats, or 0-dim tensors where an option or the step count is one
COUNTERS = ("step", "alpha")  # the scalars of a state, in float64; everything else has the parameter's shape


def number(value: float | Tensor) -> Any:
    """A hyper-parameter as a float; a tensor as a 0-dim float64 tensor: reading it may synchronise, or be forbidden."""
    return value.double().reshape(()) if torch.is_tensor(value) else float(value)


def at_most_one(value: float | Tensor) -> Any:
    """min(value, 1)."""
    return value.clamp(max=1.0) if torch.is_tensor(value) else min(value, 1.0)


class Rule:
    """One update rule: gradient and state -> pre-prox point z -> (the driver applies the prox) -> new parameter.

    The twin of a functor in csrc/math/rules, with the same names and the same operations in the same order, so that
    reference and kernels agree bit for bit; `point` is the functor's update and point in one. A rule knows no
    regularizer, no mask and no device.
    """

    name: str
    slots: tuple[str, ...] = ()  # state tensors of the parameter's shape, in the order of the kernel
    fixed_slots: int = 0  # how many of them, the first, are read and never written
    reads_param: bool = False  # False: the parameter is a function of the state alone
    late: bool = False  # whether `finish_late` advances the state, and `point` does not
    metric: bool = False  # whether each element has a prox scale of its own
    half_space: bool = False  # whether groups take the half-space step, with the old parameter for scale
    skips_prox: bool = False  # whether a step may leave its prox to a later one: its point is the next parameter then
    plain: str = ""  # empty, or why it runs in plain torch: it has no kernels
    counters: tuple[str, ...] = ()  # scalars besides the step count, from COUNTERS, that grow once per step

    def asks_for_all(self, reg: Any) -> bool:
        """Whether `shrink` needs more of a tensor that is not here than sums over its groups."""
        return reg is not None and bool(reg.whole)

    @property
    def per_element(self) -> bool:
        """Whether the prox scale is a tensor of the parameter's shape."""
        return self.metric or self.half_space or bool(self.plain)

    def hyper(self, group: dict[str, Any], step: Any, *counters: Any) -> Hyper:
        """The scalars of step number `step` (from 1), in the order of the kernel's Hyper.

        Here and in `increments`, options, steps and counters are numbers, or 0-dim float64 tensors where steps are
        captured or compiled.
        """
        raise NotImplementedError

    def increments(self, group: dict[str, Any], step: Any) -> tuple[Any, ...]:
        """How much each of the counters grows at step number `step`."""
        return ()

    def init_slot(self, slot: str, param: Tensor, group: dict[str, Any]) -> Tensor | None:
        """Initial value of a state tensor from the parameter (in the state's dtype); None for zeros."""
        return None

    def point(self, grad: Tensor, param: Tensor, state: State, h: Hyper) -> tuple[Tensor, float | Tensor]:
        """Update the state in place and return the pre-prox point and its prox scale."""
        raise NotImplementedError

    def shrink(self, reg: Any, z: Tensor, scale: Any, h: Hyper, param: Tensor, extent: Extent) -> Rounds[Tensor]:
        """The prox point, from the parameter before the step, too, of the part that is here. Anything else than the
        prox asks for kernels of its own."""
        return (yield from reg.prox_in_rounds(z, scale, extent, param))

    def shrink_together(
        self, reg: Any, points: Sequence[Tensor], scales: Sequence[Any], h: Hyper, extents: Sequence[Extent]
    ) -> Rounds[list[Tensor]]:
        """`shrink` of tensors that share a budget: the prox of all, whose scale is a number then."""
        return (yield from reg.together_in_rounds(points, scales[0], extents))

    def finish(self, q: Tensor, param: Tensor, state: State, h: Hyper) -> Tensor:
        """The new parameter from the prox point."""
        return q

    def finish_late(self, q: Tensor, grad: Tensor, param: Tensor, state: State, h: Hyper) -> Tensor:
        """The same for a late rule, whose new state it writes, too."""
        raise NotImplementedError
