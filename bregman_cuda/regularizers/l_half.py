"""LHalf and GroupLHalf: the power 1/2 of every entry, or of every group norm."""

from __future__ import annotations

from dataclasses import dataclass

from ._base import Grouped, Separable
from ._power import Power


@dataclass
class LHalf(Power):
    """J(x) = lam * sum |x_i|^(1/2): shrinks large weights less than l1 does, and small ones to zero.

    The prox is zero up to |x| = 1.5 * (step * lam)^(2/3), and jumps there. At zero every gradient is in the
    subdifferential, so that zero is a critical point for every lam > 0 and `lam_max` is 0. Not convex.

    Args:
        lam: strength, >= 0; 0 is the identity.

    >>> LHalf(1.0).prox(torch.tensor([4.0, -1.4]), 1.0)
    tensor([3.7415, 0.0000])
    """

    lam: float
    kernel = "l_half"
    root = 2


@dataclass
class GroupLHalf(Grouped):
    """J(x) = lam * sum_G w_G ||x_G||_2^(1/2).

    With a step size for each element (`ProxAdam`, `RAMDA`, `AveragedProxSGD`), the prox is the better of zero and the
    critical point of largest norm. That is the global minimum unless there are more such points: never seen where steps
    spread evenly over up to 8 decades; with steps in two clusters, decades apart, 0 to 2% of groups had a better one,
    by up to 1% of zero's objective (csrc/math/curved.h).

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
        return LHalf(self.lam)
