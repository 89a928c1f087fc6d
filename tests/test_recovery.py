"""A planted support is found: every method on sparse regression (the table of docs/recovery.md)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import bregman_cuda as bc
from bregman_cuda.experiments import recovery

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recovery.md"
# Inverse scale space: the true support first, and then, unless it is stopped, the noise.
PASSES = {"LinBreg, L1", "LinBreg momentum, L1", "LinBreg, GroupLasso"}
# Adam's step lets all coordinates enter at one pace: the order of entry is lost without noise in the gradients.
# Averages of sparse points have no zeros.
NEVER = {"AdaBreg, L1", "AdaBreg, GroupLasso", "AveragedProxSGD, L1"}


@pytest.mark.slow
@pytest.mark.parametrize("by_rows", [False, True], ids=["entries", "rows"])
def test_every_method_finds_the_support(by_rows):
    problem, methods = recovery.planted(by_rows), recovery.ROWS if by_rows else recovery.ENTRIES
    for name, make in methods.items():
        first, right, at_end = recovery.run(make, problem, 2000)
        assert (first is not None) == (name not in NEVER), name
        assert at_end == (name not in PASSES | NEVER), name
        assert name in NEVER or right >= 20, name


def page_rows() -> dict[str, list[str]]:
    """Method -> its columns `first found at step` and `at the end`, as printed."""
    rows = re.findall(r"^\| ([^|]*?) \| (?:6 of 40 entries|3 of 10 rows) \| (.*?) \| (.*?) \|$", PAGE.read_text(), re.M)
    return {name: columns for name, *columns in rows}


def test_the_page_lists_every_method():
    assert [*page_rows()] == [*recovery.ENTRIES, *recovery.ROWS]


def test_every_exported_optimizer_is_in_the_table():
    classes = {name for name, x in vars(bc).items() if isinstance(x, type) and issubclass(x, bc.SparseOptimizer)}
    assert {re.split("[ ,]", row)[0] for row in page_rows()} == classes - {"SparseOptimizer"} | {"RigL"}


FAST = ["ProxSGD, L0", "RigL, 6 weights", "ProxAdam, GroupLasso", "RAMDA pg, GroupLasso"]
HSPG = [name for name in recovery.ROWS if name.startswith("HSPG")]


@pytest.mark.parametrize("name", FAST + HSPG)
def test_the_page_has_the_steps_of_the_script(name):
    """Of fast rows: the true support is not there before that step."""
    make = (recovery.ENTRIES | recovery.ROWS)[name]
    step = int(page_rows()[name][0])
    assert recovery.run(make, recovery.planted(name in recovery.ROWS), step) == (step, 1, True)


@pytest.mark.parametrize("name", HSPG)
def test_hspg_goes_through_both_phases_and_its_end(name):
    """Half-space steps remove rows, at the end three stay for good: the true ones."""
    problem, p = recovery.planted(True), torch.nn.Parameter(torch.zeros(10, 4))
    optimizer, left = recovery.ROWS[name](p), []
    for _ in range(99):
        p.grad = problem.gradient(p.detach())
        optimizer.step()
        left.append(int(p.any(1).sum()))
    assert optimizer.param_groups[0]["projecting"]
    assert left[19] >= 7 > left[20] > left[-1] == (4 if "weak" in name else 3)
    assert optimizer.get_mask(p) is None
    p.grad = problem.gradient(p.detach())
    optimizer.step()
    assert torch.equal(optimizer.get_mask(p).any(1), problem.truth.any(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reg", "first"), [(bc.GroupLasso(0.1), 41), (bc.GroupEnvelope(0.1, 3), 38), (bc.GroupEnvelope(0.05, 3), None)]
)
def test_the_page_knows_how_long_the_prox_alone_takes(reg, first):
    def alone(p):
        return bc.ProxSGD([p], 0.1, reg)

    assert recovery.run(alone, recovery.planted(True), recovery.STEPS)[0] == first
