"""Timing in which the contestants take turns, so that a noisy machine disturbs all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import shapes
import torch
from contestants import YARDSTICK, Contestant
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

COPY = "copy"
_TURN = 4e-3  # seconds: a turn repeats a shorter step, or the clock would count, and cold caches


@dataclass
class Result:
    """Seconds of every turn of one contestant, and what one step of it costs besides."""

    contestant: Contestant
    seconds: list[float] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)  # to torch's fused Adam in the same round
    calls: int = 0
    host: float = 0.0

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def ratio(self) -> float | None:
        return median(self.relative) if self.relative else None


def make_params(sizes: list[shapes.Shape], device: str, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Parameters with gradients, both random (zeros run faster than real data on some machines)."""
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, device=device).mul_(0.02).to(dtype)) for s in sizes]
    for p in params:
        p.grad = torch.empty_like(p)
    draw_gradients(params)
    return params


def draw_gradients(params: list[Tensor]) -> None:
    """New random gradients, in place. With the same ones for all steps second moments would be their squares and sums
    of gradients grow without end, and searches for norms, whose cost depends on data, meet what no training has."""
    for p in params:
        p.grad.normal_(0, 0.01)


def clones(params: list[Tensor]) -> list[Tensor]:
    """Parameters of their own with the same gradients."""
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for copy, p in zip(copies, params, strict=True):
        copy.grad = p.grad
    return copies


def make_copy(numel: int, device: str) -> Callable[[], Any]:
    """A device-to-device copy of as many fp32 numbers (at least 64 MB); it moves 8 bytes per number."""
    source = torch.randn(max(numel, 16 * 2**20), device=device)
    target = torch.empty_like(source)
    run = lambda: target.copy_(source)  # noqa: E731
    run.gigabytes = 8e-9 * source.numel()  # type: ignore[attr-defined]
    return run


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def turn(step: Callable[[], Any], number: int, device: str) -> float:
    """Seconds per call over `number` calls in a row; by device events on a GPU.

    With one thread they are seconds of CPU time, which a busy machine hardly disturbs.
    """
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(number):
            step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / number
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    for _ in range(number):
        step()
    return (clock() - start) / number


def race(
    steps: dict[str, Callable[[], Any]],
    device: str,
    seconds: float,
    least: int = 3,
    before_round: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Rounds in which every step has one turn, in a new order each, until the time is up."""
    numbers = {}
    for name, step in steps.items():
        step()  # builds plans and state
        wait(device)
        step()
        wait(device)
        numbers[name] = max(1, min(100, int(_TURN / turn(step, 1, device))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[order[0]]) < least:
        shuffle(order)
        before_round()
        wait(device)
        for name in order:
            times[name].append(turn(steps[name], numbers[name], device))
    return times


class _Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def is_launch(event: Any) -> bool:
    """Whether an event of the profiler is a kernel: it also lists copies, fills and spans such as Optimizer.step#X.step
    as the device's. Names with a # are no sign of a span: those of torch's own kernels have it, {lambda()#1}."""
    if getattr(event, "is_user_annotation", False) or event.name.startswith(("Memcpy", "Memset", "Optimizer.")):
        return False
    return event.device_type == torch.autograd.DeviceType.CUDA


def count_calls(step: Callable[[], Any], device: str) -> int:
    """Kernel launches of one step as the profiler sees them on a GPU, calls of operators on the CPU."""
    if device != "cuda":
        with _Count() as mode:
            step()
        return mode.calls
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        wait(device)
    return sum(map(is_launch, profile.events()))


def host_seconds(contestant: Contestant, sizes: list[shapes.Shape], device: str, dtype: torch.dtype) -> float:
    """Seconds that a step keeps the host: the median over steps on as many tensors of one element each.

    On a GPU the clock stops when step() returns, without waiting for the device.
    """
    params = make_params(shapes.overhead(sizes), device, dtype)
    optimizer = contestant.make(params)
    times = []
    for number in range(23):
        wait(device)
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
        if number > 4 and sum(times) > 1:  # slow for loops
            break
    return median(times[3:])


def compare(
    contestants: list[Contestant], sizes: list[shapes.Shape], device: str, dtype: torch.dtype, seconds: float
) -> tuple[list[Result], float]:
    """All contestants on one set of shapes; returns their results and the GB/s of a copy in the same rounds."""
    params = make_params(sizes, device, dtype)
    results = {c.name: Result(c) for c in contestants}
    optimizers = {c.name: c.make(params if c.shared else clones(params)) for c in contestants}
    steps: dict[str, Callable[[], Any]] = {name: o.step for name, o in optimizers.items()}
    copy = make_copy(shapes.numel(sizes), device)
    times = race({**steps, COPY: copy}, device, seconds, before_round=lambda: draw_gradients(params))
    yardstick = times.get(YARDSTICK)
    for name, result in results.items():
        result.seconds = times[name]
        if yardstick:
            result.relative = [t / reference for t, reference in zip(times[name], yardstick, strict=True)]
        result.calls = count_calls(steps[name], device)
        result.host = host_seconds(result.contestant, sizes, device, dtype)
    return list(results.values()), copy.gigabytes / median(times[COPY])  # type: ignore[attr-defined]
