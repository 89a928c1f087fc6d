"""A planted support is found: every method on sparse regression (the table of docs/recovery.md)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("name", ["ProxSGD, L0", "RigL, 6 weights", "ProxAdam, GroupLasso", "RAMDA pg, GroupLasso"])
def test_the_page_has_the_steps_of_the_script(name):
    """Of fast rows: the true support is not there before that step."""
    make = (recovery.ENTRIES | recovery.ROWS)[name]
    step = int(page_rows()[name][0])
    assert recovery.run(make, recovery.planted(name in recovery.ROWS), step) == (step, 1, True)
