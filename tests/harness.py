"""Runs one problem on one driver inside guarded memory, and compares outcomes bit by bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import registry
import torch
from torch import Tensor

from bregman_cuda import Regularizer, SparseOptimizer
from bregman_cuda.optim._rule import COUNTERS

MARGIN = 128  # elements before and after; a multiple of every vector, so that alignment is the layout's alone
_INTEGERS = {
    1: (torch.uint8, 0x5A),
    2: (torch.int16, 0x5A5A),
    4: (torch.int32, 0x5A5A5A5A),
    8: (torch.int64, 0x5A5A5A5A5A5A5A5A),
}


class Buffer:
    """A tensor inside a larger one that is filled with a pattern."""

    def __init__(self, like: Tensor, layout: str = "contiguous", strides: tuple[int, ...] | None = None):
        strides = registry.strides(tuple(like.shape), layout) if strides is None else strides
        reach = 1 + sum((n - 1) * s for n, s in zip(like.shape, strides)) if like.numel() else 0
        begin = MARGIN + (layout == "misaligned")
        integer, self.pattern = _INTEGERS[like.element_size()]
        self.arena = torch.full((begin + reach + MARGIN,), self.pattern, dtype=integer, device=like.device)
        self.outside = torch.ones(self.arena.shape, dtype=torch.bool, device=like.device)
        self.outside.as_strided(like.shape, strides, begin).fill_(False)
        self.view = self.arena.view(like.dtype).as_strided(like.shape, strides, begin)
        self.view.copy_(like)

    def intact(self) -> bool:
        return bool((self.arena[self.outside] == self.pattern).all())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits; NaN equals any NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = _INTEGERS[a.element_size()][0]
    bits = [
        torch.where(t.isnan(), torch.nan, t).contiguous().view(-1).view(integer) if t.is_floating_point() else t
        for t in (a, b)
    ]
    return torch.equal(bits[0], bits[1])


@dataclass
class Problem:
    """A few steps on a list of tensors."""

    rule: str
    reg: Callable[[], Regularizer | None]
    dtype: torch.dtype
    shapes: list[tuple[int, ...]]
    layouts: list[str] = field(default_factory=list)  # one per tensor, repeated as needed
    grad_layouts: list[str] = field(default_factory=list)  # empty: as the parameter
    masked: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 2
    seed: int = 0
    zeros: float = 0.5


@dataclass
class Outcome:
    params: list[Tensor]
    states: list[dict[str, Tensor]]
    counts: list[tuple[int, int | None]]
    optimizer: SparseOptimizer


def run(problem: Problem, fused: bool | None, device: str = "cpu", threads: int = 1) -> Outcome:
    """Solves the problem in guarded memory and checks the guards and the gradients. `threads` are those of the step."""
    layouts = problem.layouts or ["contiguous"]
    generator = torch.Generator().manual_seed(problem.seed)
    buffers, params = [], []
    for i, shape in enumerate(problem.shapes):
        start = registry.values(shape, problem.dtype, generator, problem.zeros)
        buffers.append(Buffer(start.to(device), layouts[i % len(layouts)]))
        params.append(torch.nn.Parameter(buffers[-1].view))
    optimizer = registry.EVERY_RULE[problem.rule].make(
        params, problem.reg(), fused=fused, count_nonzeros=True, **problem.options
    )
    if problem.masked:
        for param in params[::2]:
            kept = torch.rand(param.shape, generator=generator) < 0.6
            optimizer.set_mask(param, kept.to(device))
    for step in range(problem.steps):
        grads = []
        for i, param in enumerate(params):
            grad = registry.values(tuple(param.shape), problem.dtype, generator, 0.1).to(device)
            layout = (
                problem.grad_layouts[i % len(problem.grad_layouts)]
                if problem.grad_layouts
                else layouts[i % len(layouts)]
            )
            grads.append((Buffer(grad, layout), grad))
            param.grad = grads[-1][0].view
        torch.set_num_threads(threads)
        optimizer.step()
        torch.set_num_threads(1)
        for buffer, grad in grads:
            assert same_bits(buffer.view, grad), "the step changed a gradient"
        buffers += [buffer for buffer, _ in grads]
        if step == 0:
            buffers += guard_state(optimizer, params)
    assert all(buffer.intact() for buffer in buffers), "the step wrote outside a tensor"
    states = [dict(optimizer.state[p]) for p in params]
    counts = [(row.nonzeros, row.nonzero_groups) for row in optimizer.density().rows]
    return Outcome([p.detach() for p in params], states, counts, optimizer)


def guard_state(optimizer: SparseOptimizer, params: list[Any]) -> list[Buffer]:
    """Moves the state into guarded memory of the same strides."""
    buffers = []
    for param in params:
        for name, tensor in optimizer.state[param].items():
            if name not in COUNTERS:
                buffers.append(Buffer(tensor, strides=tensor.stride()))
                optimizer.state[param][name] = buffers[-1].view
    optimizer._forget_plans()  # plans hold addresses
    return buffers


def true_counts(param: Tensor, reg: Regularizer | None) -> tuple[int, int | None]:
    """Non-zero elements and groups, by a route that shares nothing with the package."""
    nonzeros = int(torch.count_nonzero(param))
    dims = None if reg is None else reg.groups_of(param.shape)
    if dims is None:
        return nonzeros, None
    alive = torch.zeros([param.shape[d] for d in dims], dtype=torch.bool, device=param.device)
    alive[tuple(index for d, index in enumerate(param.detach().nonzero(as_tuple=True)) if d in dims)] = True
    return nonzeros, int(alive.sum()) if dims else min(nonzeros, 1)


def assert_same(got: Outcome, want: Outcome, tolerance: float = 0.0, label: Callable[[int], str] = str) -> None:
    """The same bits everywhere, or within an absolute tolerance, zero patterns apart from values."""
    flips = 0
    for i, (a, b) in enumerate(zip(got.params, want.params, strict=True)):
        a, b = a.cpu(), b.cpu()
        flips += compare(a, b, tolerance, f"parameter {label(i)}")
        assert got.states[i].keys() == want.states[i].keys()
        for name, tensor in got.states[i].items():
            if name != "mask":
                compare(tensor.cpu(), want.states[i][name].cpu(), tolerance, f"{name} of {label(i)}")
    total = sum(p.numel() for p in want.params)
    assert flips <= 1 + 1e-6 * total, f"{flips} of {total} entries are zero on one side only"
    if not tolerance:
        assert got.counts == want.counts


def compare(a: Tensor, b: Tensor, tolerance: float, what: str, relative: float = 0.0) -> int:
    """Asserts closeness, in 16 bits to an ulp, and returns how many entries are zero on one side only."""
    if same_bits(a, b):
        return 0
    if a.element_size() == 2:
        relative = max(relative, torch.finfo(a.dtype).eps)
    worst = (a.double() - b.double()).abs().nan_to_num(math.inf).max()
    assert tolerance, f"{what}: {int((a != b).sum())} of {a.numel()} differ, by {worst:.3g} at most"
    assert torch.equal(a.isnan(), b.isnan()), f"{what}: NaN on one side only"
    difference = torch.where(a == b, 0.0, (a - b).abs())  # equal infinities differ by zero
    difference = torch.where(a.isnan(), 0.0, difference)
    if relative:
        difference = (difference - relative * a.abs().nan_to_num()).clamp_min(0)
    assert float(difference.max()) <= tolerance, f"{what}: differs by {float(difference.max()):.3g} > {tolerance:.3g}"
    return int(((a == 0) != (b == 0)).sum())
