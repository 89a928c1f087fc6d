"""LTwoThirds and GroupLTwoThirds: the power 2/3 of every entry, or of every group norm."""

from __future__ import annotations

from dataclasses import dataclass

from ._base import Grouped, Separable
from ._power import Power


@dataclass
class LTwoThirds(Power):
    """J(x) = lam * sum |x_i|^(2/3): shrinks large weights less than l1 does, and small ones to zero.

    The prox is zero up to |x| = 2 * (2/3 * step * lam)^(3/4), and jumps there. At zero every gradient is in the
    subdifferential, so that zero is a critical point for every lam > 0 and `lam_max` is 0. Not convex.

    Args:
        lam: strength, >= 0; 0 is the identity.

    >>> LTwoThirds(1.0).prox(torch.tensor([4.0, -1.4]), 1.0)
    tensor([3.5635, 0.0000])
    """

    lam: float
    kernel = "l_two_thirds"
    root = 3


@dataclass
class GroupLTwoThirds(Grouped):
    """J(x) = lam * sum_G w_G ||x_G||_2^(2/3).

    With a step size for each element (`ProxAdam`, `RAMDA`, `AveragedProxSGD`), as in `GroupLHalf`.

    Args:
        lam: strength, >= 0.
        groups, weight: as in `GroupLasso`.
    """

    lam: float
    groups: str | tuple[int, ...] = "out"
    weight: str = "sqrt_size"
    convex = False

    @property
    def radial(self) -> Separable:
        return LTwoThirds(self.lam)
