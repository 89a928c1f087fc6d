"""A planted support is found: every method on sparse regression (the table of docs/recovery.md)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bregman_cuda.experiments import recovery

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recovery.md"
# Inverse scale space: the true support first, and then, unless it is stopped, the noise.
PASSES = {"LinBreg, L1", "LinBreg momentum, L1", "LinBreg, GroupLasso"}
# Adam's step lets all coordinates enter at one pace: the order of entry is lost without noise in the gradients.
NEVER = {"AdaBreg, L1", "AdaBreg, GroupLasso"}


@pytest.mark.slow
@pytest.mark.parametrize("by_rows", [False, True], ids=["entries", "rows"])
def test_every_method_finds_the_support(by_rows):
    problem, methods = recovery.planted(by_rows), recovery.ROWS if by_rows else recovery.ENTRIES
    for name, make in methods.items():
        first, right, at_end = recovery.run(make, problem, 2000)
        assert (first is not None) == (name not in NEVER), name
        assert at_end == (name not in PASSES | NEVER), name
        assert name in NEVER or right >= 20, name


def test_the_page_lists_every_method():
    rows = re.findall(r"^\| ([^|]*?) \| (?:6 of 40 entries|3 of 10 rows) \|", PAGE.read_text(), re.MULTILINE)
    assert rows == [*recovery.ENTRIES, *recovery.ROWS]
