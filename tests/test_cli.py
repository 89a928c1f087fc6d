"""`python -m bregman_cuda`: train and info, with and without the train extra, with right and wrong options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from test_experiments import damage, write_folder

import bregman_cuda
from bregman_cuda.__main__ import main
from bregman_cuda.experiments.settings import OPTIMIZERS

TRAIN_EXTRA = ("typer", "rich", "sklearn", "matplotlib")


@pytest.fixture
def extra():
    for name in TRAIN_EXTRA:
        pytest.importorskip(name, reason="needs the train extra")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def shell(*arguments: str, cwd: Path, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-m", "bregman_cuda"] if code is None else ["-c", code]
    where = str(Path(bregman_cuda.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [where, os.environ.get("PYTHONPATH")]))}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *start, *arguments],
        capture_output=True, text=True, cwd=cwd, env=environment, timeout=300, check=False,
    )  # fmt: skip


def without(modules: Sequence[str]) -> str:
    """Code that runs the command line as if modules were not installed."""
    block = f"""
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {tuple(modules)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {tuple(modules)!r} else find(name, *rest)
"""
    return block + "from bregman_cuda.__main__ import main\nsys.exit(main(sys.argv[1:]))"


def test_train_from_a_shell(tmp_path: Path, extra: None) -> None:
    done = shell("train", "--epochs", "2", "--seed", "3", "--out", "runs/one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("AdaBreg", "LinBreg", "Adam", "test accuracy", "density", "s/epoch", "in optimizer", "seed 3"):
        assert word in done.stdout
    assert "batches" not in done.stdout  # no progress bar where nobody watches
    assert done.stderr == ""
    assert (tmp_path / "runs/one/training.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "runs/one/training.json").read_text())
    assert [run["optimizer"] for run in numbers["runs"]] == ["adabreg", "linbreg", "adam"]
    for run in numbers["runs"]:
        assert [epoch["number"] for epoch in run["epochs"]] == [0, 1, 2]
        assert run["density"] == run["epochs"][-1]["density"]
        assert 0 < run["optimizer_share"] < 1
    assert numbers["runs"][2]["density"] == 1.0
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]


def test_a_folder_and_every_optimizer(tmp_path: Path, extra: None, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "mine", packed=True, side=16)
    options = ["--data", str(folder), "--optimizer", "all", "--epochs", "1", "--batch-size", "8", "--no-fused"]
    assert main(["train", *options, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "mine, convnet" in printed
    assert "live kernels" in printed
    runs = json.loads((tmp_path / "out/training.json").read_text())["runs"]
    assert [run["optimizer"] for run in runs] == [*OPTIMIZERS]
    assert {run["model"] for run in runs} == {"convnet"}


def test_options_reach_the_training(tmp_path: Path, extra: None) -> None:
    options = ["--optimizer", "linbreg", "--reg", "sparse-group", "--lam", "0.7", "--lr", "0.02", "--delta", "2"]
    options += ["--density", "0.5", "--epochs", "1"]
    assert main(["train", *options, "--batch-size", "500", "--out", str(tmp_path)]) == 0
    (run,) = json.loads((tmp_path / "training.json").read_text())["runs"]
    expected = dict(reg="sparse-group", lam=0.7, lr=0.02, delta=2.0, density=run["density"], epochs=run["epochs"])
    assert {name: run[name] for name in expected} == expected
    assert run["epochs"][0]["density"] == pytest.approx(0.5, abs=0.01)
    assert run["batch_size"] == 500


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--lr nan", "lr must be finite and >= 0, got nan"),
        ("--lam -1", "lam must be finite and >= 0, got -1.0"),
        ("--delta 0", "delta must be finite and > 0, got 0.0"),
        ("--density 0", "density must be in (0, 1], got 0.0"),
        ("--density 3", "density must be in (0, 1], got 3.0"),
        ("--epochs 0", "--epochs"),
        ("--batch-size -3", "--batch-size"),
        ("--optimizer sgd", "--optimizer sgd is unknown; use one of adabreg, linbreg"),
        ("--reg l2", "--reg l2 is unknown; use one of l1"),
        ("--model convnet", "at least 16x16 pixels, got 8x8; use the mlp"),
        ("--data nowhere", "nowhere is no folder; use digits, fashion-mnist, or a folder with IDX files"),
        ("--data .", "has no train-images-idx3-ubyte[.gz], train-labels-idx1-ubyte[.gz], t10k"),
        ("--quick", "--quick"),
        ("--device tpu", "--device tpu is unknown; use one of auto, cpu, cuda"),
        ("--out file", "--out file cannot be made a folder"),
        ("--out file/below", "--out file/below cannot be made a folder"),
        ("--optimizer adam --lam 0.1", "--lam 0.1 does not concern adam; leave it out, or add an --optimizer it does"),
        ("--optimizer adam --reg l1", "--reg l1 does not concern adam"),
        ("--optimizer adam --density 0.5", "--density 0.5 does not concern adam"),
        ("--optimizer rmda --optimizer adam --delta 2", "--delta 2.0 does not concern rmda, adam"),
        ("--reg none --lam 0.1", "--lam 0.1 is the strength of a regularizer, and --reg none has none"),
    ],
)
def test_wrong_options_are_named_before_anything_is_done(
    options: str,
    says: str,
    tmp_path: Path,
    extra: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert main(["train", *options.split()]) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    from bregman_cuda import cli

    def train(*_: object, **__: object) -> None:
        raise AssertionError("it began to train")

    monkeypatch.setattr(cli, "train", train)


@pytest.mark.parametrize("name", ["training.png", "training.json"])
def test_a_file_that_cannot_be_written_is_named_before_training(
    name: str, tmp_path: Path, extra: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained(monkeypatch)
    (tmp_path / name).mkdir()
    assert main(["train", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err == (
        f"error: --out {tmp_path}: {name} cannot be written there (Is a directory); "
        "remove what is in its way, or choose another folder\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_without_write_permission_is_named_before_training(
    tmp_path: Path, extra: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained(monkeypatch)
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert main(["train", "--out", str(tmp_path)]) == 2
    assert "training.png cannot be written there (Permission denied)" in capsys.readouterr().err


def test_a_disk_that_fills_while_it_trains_is_one_line_and_old_results_stay(
    tmp_path: Path, extra: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bregman_cuda import cli

    def full(runs: object, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(cli, "save_plot", full)
    (tmp_path / "training.json").write_text("earlier")
    assert main(["train", "--optimizer", "adam", "--epochs", "1", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: [Errno 28] No space left on device: '{tmp_path / 'training.png'}'\n"
    assert (tmp_path / "training.json").read_text() == "earlier"


def test_options_that_one_of_several_optimizers_uses_are_taken(tmp_path: Path, extra: None) -> None:
    options = ["--optimizer", "adam", "--optimizer", "proxsgd", "--lam", "0.7", "--epochs", "1"]
    assert main(["train", *options, "--out", str(tmp_path)]) == 0
    adam, sparse = json.loads((tmp_path / "training.json").read_text())["runs"]
    assert (adam["reg"], adam["lam"], sparse["reg"], sparse["lam"]) == ("none", 0.0, "l1", 0.7)


def test_a_damaged_file_ends_in_one_line(tmp_path: Path, extra: None) -> None:
    damage(write_folder(tmp_path / "mine", packed=True) / "train-images-idx3-ubyte.gz", "short")
    done = shell("train", "--data", "mine", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: mine/train-images-idx3-ubyte.gz has 313 bytes of data")
    assert not (tmp_path / "bregman-train").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_named(extra: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device; use --device cpu" in capsys.readouterr().err


def test_fused_without_kernels_is_named(
    extra: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from bregman_cuda import cli

    nothing = {"cpu": False, "cuda": False, "reasons": {"cpu": "no compiler"}}
    monkeypatch.setattr(cli, "build_info", lambda: nothing)
    assert main(["train", "--fused", "--device", "cpu"]) == 2
    assert "--fused: there are no compiled cpu kernels (no compiler); use --no-fused" in capsys.readouterr().err


@pytest.mark.parametrize("missing", [["typer"], ["matplotlib", "sklearn"]])
def test_a_missing_extra_is_one_line(missing: list[str], tmp_path: Path, extra: None) -> None:
    done = shell("train", cwd=tmp_path, code=without(missing))
    assert done.returncode == 2
    assert done.stderr == f"error: train needs {', '.join(missing)}; run: pip install 'bregman_cuda[train]'\n"
    assert list(tmp_path.iterdir()) == []


def test_info_needs_torch_alone(tmp_path: Path) -> None:
    done = shell("info", cwd=tmp_path, code=without([*TRAIN_EXTRA, "numpy"]))
    assert done.returncode == 0, done.stderr
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert lines["bregman_cuda"].strip() == bregman_cuda.__version__
    assert lines["torch"].strip() == torch.__version__
    for kind, name in (("cpu", "CPU kernels"), ("cuda", "CUDA kernels")):
        assert lines[name].strip().startswith("yes" if bregman_cuda.build_info()[kind] else "no: ")


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["fly"], 2), (["--help"], 0), (["info", "--x"], 2)])
def test_usage(arguments: list[str], status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == status
    printed = capsys.readouterr()
    assert "usage: python -m bregman_cuda COMMAND" in (printed.err if status else printed.out)
