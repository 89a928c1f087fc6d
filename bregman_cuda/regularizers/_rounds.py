"""Computations in rounds, on parts of tensors that may lie on several ranks.

What they need of the other parts they ask for as sums: a generator yields what this part adds to each, tensors in
float64, and is sent the sums. All ranks ask as often, for the same shapes: neither depends on values.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")
Rounds = Generator[list[Tensor], list[Tensor], T]


class Extent:
    """Where a part lies in its tensor: here it is all of it."""

    def __init__(self, shape: Sequence[int]):
        self.shape = tuple(shape)

    def spread(self, part: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """What this part adds to a tensor of the whole shape; with `dims`, all others have size 1, here and there."""
        return part

    def part(self, whole: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """What lies here of such a tensor."""
        return whole


def alone(rounds: Rounds[T]) -> T:
    """The result of a computation whose parts are extents: every sum is what it asks for."""
    try:
        asked = next(rounds)
        while True:
            asked = rounds.send(asked)
    except StopIteration as end:
        result: T = end.value
        return result
