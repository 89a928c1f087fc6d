"""Ten thousand steps leave no memory behind."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import registry
import torch
from small import model

import bregman_cuda
from bregman_cuda import SparseGroupLasso

CASES = [("adabreg", True), ("proxsgd", False)]
STATM = Path("/proc/self/statm")


def run_long(name: str, fused: bool) -> tuple[int, list[list[int]]]:
    """How many tensors 10,000 steps left behind, and of each 2,500 the bytes: resident, and traced by Python."""
    params = model([(2, 3), (4,)], torch.bfloat16)
    optimizer = registry.RULES[name].make(params, SparseGroupLasso(1e-3), fused=fused, count_nonzeros=True)

    def tensors() -> int:
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    def run(steps: int) -> tuple[int, int]:
        for i in range(steps):
            for p in params:
                p.grad = None if i % 10 == 0 and p is params[0] else torch.ones_like(p)  # other plans at times
            optimizer.step()
        gc.collect()
        resident = int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if STATM.exists() else 0
        return resident, tracemalloc.get_traced_memory()[0]

    run(500)
    before = tensors()  # not between stretches: a list of all objects leaves holes in the heap, and the next one more
    tracemalloc.start(1)
    marks = [run(500)] + [run(2_500) for _ in range(4)]
    assert int(optimizer.state[params[1]]["step"]) == 11_000
    stretches = [[end - begin for begin, end in zip(a, b)] for a, b in zip(marks, marks[1:])]
    return tensors() - before, stretches


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize("case", range(len(CASES)), ids=[name for name, _ in CASES])
def test_ten_thousand_steps_leave_no_memory_behind(case, tmp_path):
    """In a process of its own: what other tests left on the heap does not count."""
    path = os.pathsep.join([str(Path(bregman_cuda.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    file = tmp_path / "left.json"
    command = [sys.executable, __file__, str(file), str(case)]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True, timeout=300)
    tensors, stretches = json.loads(file.read_text())
    # What leaks does so in every stretch; free lists and arenas do not.
    resident, traced = map(min, zip(*stretches))
    assert tensors == 0
    assert resident < 1e6, f"400 bytes a step: {stretches}"
    assert traced < 1.5e4, f"6 bytes a step: {stretches}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).write_text(json.dumps(run_long(*CASES[int(sys.argv[2])])))
