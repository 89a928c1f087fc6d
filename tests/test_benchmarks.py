"""What the benchmarks choose, count and promise; nothing is timed here but the table of bytes, in test_traffic.py."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bregman_cuda as bc

ROOT = Path(__file__).resolve().parents[1]
CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        names = ("contestants", "measure", "report", "sanitize", "shapes", "traffic")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


@pytest.mark.parametrize(
    ("name", "device", "annotation", "launch"),
    [
        ("void bregman::tile_kernel<bregman::AdaBreg, float>(bregman::KernelArgs)", CUDA, False, True),
        ("void at::native::elementwise_kernel<4, at::native::f()::{lambda()#1}>(int)", CUDA, False, True),
        ("Memcpy DtoH (Device -> Pageable)", CUDA, False, False),
        ("Memset (Device)", CUDA, False, False),
        ("Optimizer.step#AdaBreg.step", CUDA, True, False),
        ("Optimizer.step#AdaBreg.step", CUDA, None, False),
        ("my span", CUDA, True, False),
        ("cudaLaunchKernel", CPU, False, False),
    ],
)
def test_launches_are_kernels_alone(bench, name, device, annotation, launch):
    event = SimpleNamespace(name=name, device_type=device)
    if annotation is not None:  # older torch
        event.is_user_annotation = annotation
    assert bench.measure.is_launch(event) == launch


def test_optimizers_meet_the_penalties_that_they_take(bench):
    """Of those that are left out, HSPG's are refused; the others are SINGULAR, which ProxSGD alone shows."""
    field = bench.contestants
    for title, new in field.OURS.items():
        for penalty, reg in (field.PENALTIES | field.SINGULAR).items():
            groups = [{"params": [torch.nn.Parameter(torch.ones(4, 3))], "reg": reg()}]
            if field.takes(title, penalty):
                new(groups)
            elif penalty in field.PENALTIES:
                with pytest.raises(ValueError, match="HSPG: reg must penalize groups alone"):
                    new(groups)
    met = {(c.optimizer, c.penalty) for c in field.ours("cpu", torch.float32, ("reference",))}
    assert met == {(t, p) for t in field.OURS for p in field.PENALTIES | field.SINGULAR if field.takes(t, p)}
    assert bc.L1 in {type(reg()) for penalty, reg in field.PENALTIES.items() if field.takes("LinBreg", penalty)}


def test_a_thousand_tensors_are_measured_when_asked_for(bench):
    assert [len(bench.shapes.SETS[name]()) for name in ("resnet50", "thousand")] == [161, 1000]
    assert "thousand" not in bench.report.parse(["--device", "cpu"]).shapes
    assert bench.report.parse(["--device", "cpu", "--shapes", "thousand"]).shapes == ["thousand"]
    assert {*bench.shapes.usual("cuda")} == {*bench.shapes.SETS} - {"thousand"}
    assert {*bench.shapes.usual("cpu")} == {*bench.shapes.usual("cuda")} - {"large"}


def test_host_time_is_promised_where_it_was_measured(bench):
    def row(sizes: str, optimizer: str, driver: str, host: float) -> dict:
        return {"shapes": sizes, "optimizer": optimizer, "driver": driver, "ms": 1.0, "vs Adam": 1.0, "host us": host}

    adam = [row(sizes, "torch Adam", "fused", 400.0) for sizes in ("resnet50", "thousand")]
    foreach = row("thousand", "torch Adam", "foreach", 1.0)
    ours = [row("resnet50", "AdaBreg l1", "cuda", 100.0), row("thousand", "LinBreg l1", "cuda", 120.0)]
    lines = bench.report.targets([*adam, foreach, *ours])
    assert lines == [
        "met    AdaBreg l1 host time / torch fused Adam's, resnet50: 0.25 (wanted <= 0.25)",
        "MISSED LinBreg l1 host time / torch fused Adam's, thousand: 0.30 (wanted <= 0.25)",
    ]
    assert bench.report.targets(ours) == []


def test_a_folder_that_cannot_be_made_ends_the_program_before_it_measures(bench, tmp_path):
    (tmp_path / "file").touch()
    for program, option, name in ((bench.report, "--out", ""), (bench.traffic, "--json", "/bytes.json")):
        folder = tmp_path / "file/folder"
        with pytest.raises(SystemExit) as error:
            program.main([option, f"{folder}{name}"])
        assert str(error.value) == f"{option}: {folder} cannot be made a folder (Not a directory); choose another one"
