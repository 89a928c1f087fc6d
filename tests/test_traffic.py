"""The table of bytes: what it counts, what it marks, and that one command prints and writes it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from bregman_cuda import _backend

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def traffic():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("traffic")


def test_every_kernel_rule_is_in_the_table(traffic):
    kernels = _backend._load("cpu")[0]
    assert kernels is not None
    rows = [traffic.counted(title, torch.float32) for title in traffic.EVERYONE]
    assert {row["rule"] for row in rows} == set(kernels.rules)
    assert {*traffic.EVERYONE} == {*traffic.LEAST}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_those_of_the_compiled_rules_slots(traffic, dtype):
    """Slots and those that are only read as the library has them; the gradient is read and the parameter written."""
    kernels = _backend._load("cpu")[0]
    assert kernels is not None
    # The parameter is a function of the state.
    from_state = {"linbreg", "linbreg_momentum", "adabreg", "rmda_point", "ramda_point"}
    for title in traffic.EVERYONE:
        row = traffic.counted(title, dtype)
        _, slots, _, metric, fixed = kernels.rules[row["rule"]]
        carried = 0 if row["rule"] in from_state else (4 if dtype == torch.float32 else 8)  # read; with a master: both
        again = 4 + 4 * len(slots)
        beside = {"ProxSGD momentum masked": 1 / 8, "ProxSGD momentum envelope": again, "HSPG envelope": again}.get(
            title, 0
        )
        assert row["bytes"] == 2 * dtype.itemsize + 8 * len(slots) - 4 * fixed + carried + beside, title
        assert row["bytes"] >= row["least"], title
        assert row["metric"] == metric


def test_nothing_moves_too_much(traffic):
    rows = traffic.run(traffic.parse(["--no-time"]))
    assert {(row["dtype"], row["optimizer"]): row["ratio"] for row in rows if row["ratio"] > 1.15} == {}
    assert len(rows) == 2 * len(traffic.EVERYONE)


def test_marks_of_times(traffic):
    row = {"ratio": 1.15, "ms": 1.0, "vs ProxSGD": 1.31, "vs AdaBreg": 1.3, "metric": False}
    assert traffic.marks(row) == ["vs ProxSGD"]
    assert traffic.marks({**row, "metric": True}) == []
    assert traffic.marks({**row, "metric": True, "vs AdaBreg": 1.31, "ratio": 1.16}) == ["ratio", "vs AdaBreg"]


@pytest.mark.parametrize("rich", [True, False], ids=["rich", "plain"])
def test_one_command_prints_a_table_and_writes_json(traffic, rich, tmp_path, capsys, monkeypatch):
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    file = tmp_path / "out" / "traffic.json"
    short = ["--dtypes", "float32", "--shapes", "tiny", "--threads", "1", "--seconds", "0.05", "--json", str(file)]
    assert traffic.main(short) == 0
    printed, written = capsys.readouterr().out, json.loads(file.read_text())
    rows = written["rows"]
    assert [row["optimizer"] for row in rows if row["penalty"] == "group out"] == list(traffic.EVERYONE)
    groups_alone = {"HSPG", *traffic.VARIANTS}
    plain = [row["optimizer"] for row in rows if row["penalty"] == "l1"]
    assert plain == [x for x in traffic.EVERYONE if x not in groups_alone]
    for row in rows:
        assert row["ns/byte"] * row["bytes"] * 4000 == pytest.approx(1e6 * row["ms"])
        assert row["vs " + row["optimizer"]] == 1 if row["optimizer"] in traffic.TIME else row["ms"] > 0
        assert row["optimizer"] in printed
    assert written["machine"]["threads"] == 1
