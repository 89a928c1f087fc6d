"""Does a method find a planted support? Sparse linear regression, every method with the gradient of all data.

    python -m bregman_cuda.experiments.recovery

prints the table of docs/recovery.md: the step at which a method's support (the zero pattern of `prox_point`) is that of
the true coefficients for the first time, and whether it is so at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import bregman_cuda as bc

STEPS = 4000
Make = Callable[[torch.nn.Parameter], bc.SparseOptimizer | bc.RigL]


@dataclass(frozen=True)
class Problem:
    """y = x w + noise from w = 0, w of 10 rows of 4 with few rows or few entries that are not zero."""

    x: Tensor
    y: Tensor
    truth: Tensor

    def gradient(self, w: Tensor) -> Tensor:
        """Of the mean squared error, halved."""
        return (self.x.t() @ (self.x @ w.reshape(-1) - self.y) / len(self.y)).view_as(w)


def planted(by_rows: bool, noise: float = 0.5) -> Problem:
    """200 samples of 40 standard normal features; 3 of 10 rows (12 coefficients), or 6 entries, of size 0.7 to 3."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 40, generator=generator)
    truth = torch.zeros(10, 4)
    if by_rows:
        truth[[1, 4, 8]] = torch.tensor([[2.0, -1.0, 1.5, 0.7], [-1.0, 1.0, 0.7, -2.0], [0.7, 0.7, -3.0, 1.0]])
    else:
        places = torch.tensor([3, 8, 13, 21, 30, 37])
        truth.view(-1)[places] = torch.tensor([3.0, -2.5, 2.0, -1.5, 1.0, -0.7])
    return Problem(x, x @ truth.view(-1) + noise * torch.randn(200, generator=generator), truth)


def rigl(p: torch.nn.Parameter, seed: int = 0) -> bc.RigL:
    """6 of 40 weights from a random start, under gradient descent without a penalty; the last masks stay."""
    generator = torch.Generator().manual_seed(seed)
    return bc.RigL([p], bc.ProxSGD([p], 0.1), density=0.15, every=10, end=1000, generator=generator)


def hspg(p: torch.nn.Parameter, reg: bc.Regularizer) -> bc.HSPG:
    """Half-space steps before a prox alone would have found the rows, and an end that keeps three."""
    return bc.HSPG([p], 0.1, reg, epsilon=0.9, start=20, end=100, k=3)


ENTRIES: dict[str, Make] = {
    "LinBreg, L1": lambda p: bc.LinBreg([p], 0.01, bc.L1(2.0)),
    "LinBreg momentum, L1": lambda p: bc.LinBreg([p], 0.01, bc.L1(2.0), momentum=0.9),
    "AdaBreg, L1": lambda p: bc.AdaBreg([p], 0.001, bc.L1(0.3)),
    "ProxSGD, L1": lambda p: bc.ProxSGD([p], 0.1, bc.L1(0.3)),
    "ProxSGD, L0": lambda p: bc.ProxSGD([p], 0.4, bc.L0(0.05)),
    "ProxSGD, LHalf": lambda p: bc.ProxSGD([p], 0.4, bc.LHalf(0.1)),
    "ProxSGD, LTwoThirds": lambda p: bc.ProxSGD([p], 0.4, bc.LTwoThirds(0.15)),
    "ProxSGD, MCP": lambda p: bc.ProxSGD([p], 0.1, bc.MCP(0.3, 2.0)),
    "ProxSGD, SCAD": lambda p: bc.ProxSGD([p], 0.1, bc.SCAD(0.3, 3.7)),
    "AveragedProxSGD, L1": lambda p: bc.AveragedProxSGD([p], 0.06, bc.L1(0.3)),
    "AveragedProxSGD lr=1, L1": lambda p: bc.AveragedProxSGD([p], 1.0, bc.L1(0.3), powers=(0.0, 0.5)),
    "ProxAdam, L1": lambda p: bc.ProxAdam([p], 0.02, bc.L1(0.3)),
    "ProxAdam AMSGrad, L1": lambda p: bc.ProxAdam([p], 0.02, bc.L1(0.3), amsgrad=True),
    "RMDA, L1": lambda p: bc.RMDA([p], 0.1, bc.L1(0.3), momentum=0.1),
    "RAMDA, L1": lambda p: bc.RAMDA([p], 0.1, bc.L1(0.3), momentum=0.1),
    "SplitLBI, L1": lambda p: bc.SplitLBI([p], 0.01, bc.L1(1.0), mu=10.0),
    "SplitLBI momentum, L1": lambda p: bc.SplitLBI([p], 0.001, bc.L1(0.1), mu=10.0, momentum=0.9),
    "RigL, 6 weights": rigl,
}
ROWS: dict[str, Make] = {
    "LinBreg, GroupLasso": lambda p: bc.LinBreg([p], 0.01, bc.GroupLasso(1.0)),
    "AdaBreg, GroupLasso": lambda p: bc.AdaBreg([p], 0.001, bc.GroupLasso(0.3)),
    "ProxSGD, GroupLasso": lambda p: bc.ProxSGD([p], 0.1, bc.GroupLasso(0.3)),
    "ProxSGD, SparseGroupLasso": lambda p: bc.ProxSGD([p], 0.1, bc.SparseGroupLasso(0.3, 0.5)),
    "ProxSGD, GroupL0": lambda p: bc.ProxSGD([p], 0.4, bc.GroupL0(0.1)),
    "ProxSGD, GroupLHalf": lambda p: bc.ProxSGD([p], 0.4, bc.GroupLHalf(0.1)),
    "ProxSGD, GroupLTwoThirds": lambda p: bc.ProxSGD([p], 0.4, bc.GroupLTwoThirds(0.15)),
    "ProxSGD, GroupMCP": lambda p: bc.ProxSGD([p], 0.1, bc.GroupMCP(0.3, 4.0)),
    "ProxSGD, GroupSCAD": lambda p: bc.ProxSGD([p], 0.1, bc.GroupSCAD(0.3, 3.7)),
    "ProxSGD, GroupEnvelope": lambda p: bc.ProxSGD([p], 0.1, bc.GroupEnvelope(0.1, 3)),
    "AveragedProxSGD lr=1, GroupLasso": lambda p: bc.AveragedProxSGD([p], 1.0, bc.GroupLasso(0.3), powers=(0.0, 0.5)),
    "ProxAdam, GroupLasso": lambda p: bc.ProxAdam([p], 0.02, bc.GroupLasso(0.3)),
    "ProxAdam AMSGrad, GroupLasso": lambda p: bc.ProxAdam([p], 0.02, bc.GroupLasso(0.3), amsgrad=True),
    "RMDA, GroupLasso": lambda p: bc.RMDA([p], 0.1, bc.GroupLasso(0.3), momentum=0.1),
    "RAMDA, GroupLasso": lambda p: bc.RAMDA([p], 0.1, bc.GroupLasso(0.3), momentum=0.1),
    "RAMDA pg, GroupLasso": lambda p: bc.RAMDA([p], 0.1, bc.GroupLasso(0.3), momentum=0.1, solver="pg"),
    "SplitLBI, GroupLasso": lambda p: bc.SplitLBI([p], 0.01, bc.GroupLasso(0.5), mu=10.0),
    "HSPG, GroupLasso": lambda p: hspg(p, bc.GroupLasso(0.1)),
    "HSPG, GroupEnvelope": lambda p: hspg(p, bc.GroupEnvelope(0.1, 3)),
    "HSPG weak, GroupEnvelope": lambda p: hspg(p, bc.GroupEnvelope(0.05, 3)),
}


def run(make: Make, problem: Problem, steps: int = STEPS, fused: bool | None = None) -> tuple[int | None, int, bool]:
    """First step at which the support is the true one (None: never), the number of such steps, whether it ends so."""
    p = torch.nn.Parameter(torch.zeros(10, 4))
    stepper = make(p)
    optimizer = stepper.optimizer if isinstance(stepper, bc.RigL) else stepper
    assert isinstance(optimizer, bc.SparseOptimizer)
    for group in optimizer.param_groups:
        group["fused"] = fused
    first, right, found = None, 0, False
    for step in range(1, steps + 1):
        p.grad = problem.gradient(p.detach())
        stepper.step()
        found = torch.equal(optimizer.prox_point(p) != 0, problem.truth != 0)
        right += found
        if found and first is None:
            first = step
    return first, right, found


def table(steps: int = STEPS) -> str:
    """The table in Markdown."""
    lines = [f"| method | planted | first found at step | at the end of {steps:,} |", "|---|---|---|---|"]
    for by_rows, methods in ((False, ENTRIES), (True, ROWS)):
        problem = planted(by_rows)
        for name, make in methods.items():
            first, _, found = run(make, problem, steps)
            what = "3 of 10 rows" if by_rows else "6 of 40 entries"
            lines.append(f"| {name} | {what} | {first or 'never'} | {'yes' if found else 'no'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
