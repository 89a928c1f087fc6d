"""What a step costs the host, under pytest-benchmark: as many tensors as the models have, of one element each.

    python -m pytest benchmarks/test_overhead.py

On a GPU the clock stops when step() returns, without waiting for the device.
"""

from __future__ import annotations

import contestants
import peers
import pytest
import shapes
import torch
from measure import count_calls, make_params, wait

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERYONE = contestants.torchs(torch.float32) + contestants.ours(DEVICE, torch.float32) + peers.peers(torch.float32)


@pytest.mark.parametrize("name", [name for name in shapes.SETS if name != "large"])
@pytest.mark.parametrize("contestant", EVERYONE, ids=lambda c: c.name)
def test_host_time(benchmark, name, contestant):
    step = contestant.make(make_params(shapes.overhead(shapes.SETS[name]()), DEVICE, torch.float32)).step
    step()
    benchmark.extra_info["launches"] = count_calls(step, DEVICE)
    benchmark.pedantic(step, setup=lambda: wait(DEVICE), rounds=20, warmup_rounds=2)
