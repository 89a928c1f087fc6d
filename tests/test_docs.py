"""What the documentation says, done: the page on regularizers, the docstrings' examples, the README's Python."""

from __future__ import annotations

import doctest
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bregman_cuda
from bregman_cuda import _backend, optim, regularizers, sparsity
from bregman_cuda.optim._rule import Rule

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "add_a_regularizer.md"
STEP = re.compile(r"<!-- (file|insert): (\S+?)(?: before: (.*?))? -->\n```\w+\n(.*?)```\n", re.DOTALL)


def apply_page(copy: Path) -> list[tuple[str, str]]:
    """Do what the page says to a copy of the repository; returns the (kind, path) of its steps."""
    steps = STEP.findall(PAGE.read_text())
    for kind, path, anchor, text in steps:
        target = copy / path
        if kind == "file":
            assert not target.exists()
            target.write_text(text)
        else:
            before = target.read_text()
            assert before.count(anchor + "\n") == 1, f"{path} has no line {anchor!r}"
            target.write_text(before.replace(anchor + "\n", text + anchor + "\n"))
    return [(kind, path) for kind, path, _, _ in steps]


@pytest.mark.slow
def test_page_adds_a_regularizer(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in ("bregman_cuda", "build_backend", "csrc", "tests", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    steps = apply_page(copy)
    assert sorted(kind for kind, _ in steps) == ["file"] * 2 + ["insert"] * 3
    assert len({path for _, path in steps}) == 4  # two new files, two lists
    quick = tmp_path / "c++"  # a seventh of the time to compile, and the same bits
    quick.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -O0\n')
    quick.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(copy), "BREGMAN_CUDA_REQUIRE": "cpu", "CUDA_HOME": str(tmp_path)}
    environment["CXX"] = str(quick)
    run = lambda *command: subprocess.run(  # noqa: E731
        [sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )
    built = run("setup.py", "build_ext", "--inplace")
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    tests = [f"tests/test_{name}.py" for name in ("kernels", "edges", "regularizers")]
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "asymmetricl1", *tests)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= 20, result.stdout[-500:]
    assert "emulated" in run("-m", "pytest", "--collect-only", "-q", "-k", "asymmetricl1", *tests).stdout


@pytest.mark.parametrize(
    "module",
    [
        *(optim.linbreg, optim.adabreg, optim.proxsgd, optim.averaged_proxsgd, optim.proxadam, optim.rmda),
        *(optim.stages, optim.splitlbi, optim.hspg, regularizers.l1, regularizers.group_lasso, regularizers.l0),
        *(regularizers.l_half, regularizers.l_two_thirds, regularizers.mcp, regularizers.scad),
        *(regularizers.envelope, regularizers.nuclear, sparsity.rigl, sparsity.activation_path),
    ],
    ids=lambda module: module.__name__.rpartition(".")[2],
)
def test_docstring_examples(module: object) -> None:
    names = {name: value for name, value in vars(bregman_cuda).items() if isinstance(value, type)}
    result = doctest.testmod(module, extraglobs={"torch": torch, **names})  # type: ignore[arg-type]
    assert result.attempted > 0
    assert result.failed == 0


def test_readme_python(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "density" in capsys.readouterr().out


def test_splitlbi_page(capsys: pytest.CaptureFixture[str]) -> None:
    """The example runs, says what it should, and every name of ours in the table exists."""
    pytest.importorskip("sklearn")
    page = (ROOT / "docs" / "splitlbi.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "splitlbi.md", "exec"), {})
    printed = capsys.readouterr().out
    dense, projected, ticket = (float(x) for x in re.findall(r"(?:dense|projected|ticket) (\d\.\d+)", printed))
    shares = [float(x) for x in re.findall(r"density (\d\.\d+)", printed)]
    assert dense > 0.95
    assert projected > dense - 0.02
    assert ticket > 0.95
    assert all(0.01 < share < 0.25 for share in shares)
    ours = [row.split("|")[2] for row in page.splitlines() if row.startswith("| `")]
    names = {name for cell in ours for name in re.findall(r"`(?:with )?(?:optimizer\.)?(\w+)\(", cell)}
    elsewhere = {"where", "step", "abs", "prox"}
    assert {"prune_by_order", "grow_layer", "projected", "residue"} <= names
    for name in names - elsewhere:
        assert hasattr(bregman_cuda, name) or hasattr(bregman_cuda.SplitLBI, name), name


def test_both_sides_hold_the_same_names() -> None:
    kernels = _backend._load("cpu")[0]
    assert kernels is not None

    def all_rules(cls: type[Rule]) -> list[type[Rule]]:
        return [cls, *(rule for sub in cls.__subclasses__() for rule in all_rules(sub))]

    rules = {cls.name: cls() for cls in all_rules(Rule) if hasattr(cls, "name") and not cls.plain}
    assert sorted(rules) == sorted(kernels.rules)
    group = dict(lr=0.1, delta=1.0, momentum=0.5, momentum_style="paper", betas=(0.9, 0.99), eps=1e-8)
    group |= dict(reg=None, epsilon=0.1, kappa=1.0, mu=2.0, nesterov=True, coupling="inside")
    group |= dict(rho=0.9, beta=0.9, powers=(0.5, 0.5), weight_decay=0.1, bias_correction="proxgen")
    for name, (_, slots, hypers, metric, fixed) in kernels.rules.items():
        assert list(rules[name].slots) == slots
        assert list(rules[name].hyper(group, 1, *[1.0] * len(rules[name].counters))) == hypers
        assert (rules[name].metric, rules[name].fixed_slots) == (metric, fixed)
    values = {"lam": 0.1, "l2": 0.1, "gamma": 3.0, "a": 3.7}
    known = bregman_cuda.Regularizer.registry.values()  # also those that other tests defined
    classes = [cls for cls in known if hasattr(cls, "kernel") and cls.__module__.startswith("bregman_cuda.")]
    penalties = {cls.kernel: cls(**{n: values[n] for n in cls.__dataclass_fields__}) for cls in classes}
    assert sorted([*penalties, "none"]) == sorted(kernels.penalties)
    for name, penalty in penalties.items():
        assert list(penalty.parameters()) == kernels.penalties[name][1]
