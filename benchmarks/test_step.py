"""Step time under pytest-benchmark: every optimizer, penalty and driver on every set of shapes.

    python -m pytest benchmarks/test_step.py -k "resnet18 and l1" --benchmark-group-by=param:name

Contestants run one after the other here; report.py lets them take turns, and is what ratios should come from.
"""

from __future__ import annotations

import contestants
import peers
import pytest
import shapes
import torch
from measure import make_params, wait

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERYONE = contestants.torchs(torch.float32) + contestants.ours(DEVICE, torch.float32) + peers.peers(torch.float32)


@pytest.mark.parametrize("name", shapes.usual(DEVICE))
@pytest.mark.parametrize("contestant", EVERYONE, ids=lambda c: c.name)
def test_step(benchmark, name, contestant):
    sizes = shapes.SETS[name]()
    step = contestant.make(make_params(sizes, DEVICE, torch.float32)).step

    def run():
        step()
        wait(DEVICE)

    run()  # builds plans and state
    benchmark.extra_info.update(parameters=shapes.numel(sizes), bytes_per_parameter=contestant.bytes)
    benchmark.pedantic(run, rounds=10, warmup_rounds=1)


def test_peer():
    if peers.WHY:
        pytest.skip(peers.WHY)
