"""What the build makes of it, and what it falls back to.

torch is a folder that only looks like it, nvcc a script; the C++ compiler is the real one, on
sources of a line.  test_packaging.py builds the package itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "build_backend"))

native_build = pytest.importorskip("native_build", reason="needs the source tree")
import find_torch
from fake_tools import fake_nvcc, fake_torch
from toolchain import Missing

linux = pytest.mark.skipif(sys.platform != "linux", reason="links against an ELF library")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A source tree of two one-line modules and a fake torch that they link against."""
    for name, text in {
        "csrc/torch/cpu_ops.cpp": '#include "cpu/k.h"\nint ops() { return kernel(); }\n',
        "csrc/cpu/k.h": "int kernel();\n",
        "csrc/cpu/k.cpp": '#include "cpu/k.h"\nint kernel() { return 1; }\n',
        "csrc/torch/cuda_ops.cpp": "int cuda_ops() { return 2; }\n",
        "csrc/cuda/k.cu": "int cuda_kernel() { return 3; }\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    torch = fake_torch(tmp_path / "site-packages")
    monkeypatch.setattr(native_build, "find_torch", lambda: find_torch.read_torch(torch))
    return tmp_path


def build(tree: Path, **env) -> native_build.Report:
    """Build the tree in an environment of a PATH and `env`."""
    path = {"PATH": os.environ["PATH"], "MAX_JOBS": "2"}
    return native_build.NativeBuild(tree, tree / "out", tree / "temp", "1.2.3", {**path, **env}).run()


def make_torch_library(tree: Path) -> None:
    library = tree / "site-packages/torch/lib/libtorch_cpu.so"
    subprocess.run(["g++", "-shared", "-fPIC", "-x", "c++", os.devnull, "-o", library], check=True)


@linux
def test_cpu_kernels_are_built_and_reported(tree, capfd):
    make_torch_library(tree)
    report = build(tree)
    assert (tree / "out/_C_cpu.so").is_file()
    assert json.loads((tree / "out/_build.json").read_text()) == json.loads(json.dumps(vars(report)))
    assert (report.version, report.torch, report.cpu, report.cuda) == ("1.2.3", "2.13.0+cpu", True, False)
    assert report.reasons == {"cuda": "torch 2.13.0+cpu (CPU) is not a CUDA build of torch"}
    no_cuda, built = capfd.readouterr().out.splitlines()
    assert no_cuda == f"bregman_cuda: no CUDA kernels: {report.reasons['cuda']}"
    assert built.startswith("bregman_cuda: built the CPU kernels with ")


@linux
def test_only_what_changed_is_compiled_again(tree):
    make_torch_library(tree)

    def objects():
        return {file.name: file.stat().st_mtime_ns for file in tree.glob("temp/**/*.o")}

    build(tree)
    first = objects()
    build(tree)
    assert objects() == first
    (tree / "csrc/cpu/k.cpp").write_text("int kernel() { return 4; }\n")
    build(tree)
    second = objects()
    assert [name for name in first if first[name] != second[name]] == ["k.cpp.o"]
    (tree / "csrc/cpu/k.h").touch()
    build(tree)
    third = objects()
    assert [name for name in first if second[name] != third[name]] == ["cpu_ops.cpp.o"]
    version = tree / "site-packages/torch/version.py"
    version.write_text(version.read_text().replace("2.13.0", "2.14.0"))
    build(tree)
    fourth = objects()
    assert [name for name in first if third[name] != fourth[name]] == ["cpu_ops.cpp.o"]
    build(tree, CXXFLAGS="-DOTHER")
    assert all(fourth[name] != time for name, time in objects().items())


@linux
def test_an_earlier_build_leaves_nothing_behind(tree):
    make_torch_library(tree)
    build(tree)
    (tree / "out/_C_cuda.so").touch()
    build(tree, BREGMAN_CUDA_SKIP_EXT="1")
    assert [file.name for file in (tree / "out").iterdir()] == ["_build.json"]


def test_skipping_is_said(tree):
    report = build(tree, BREGMAN_CUDA_SKIP_EXT="1")
    assert (report.cpu, report.cuda) == (False, False)
    assert report.reasons["cpu"] == "BREGMAN_CUDA_SKIP_EXT is set"


def test_no_torch_no_kernels(tree, monkeypatch):
    monkeypatch.setattr(native_build, "find_torch", lambda: None)
    assert build(tree).reasons["cpu"].startswith("no torch to build against")


def test_no_compiler_no_kernels(tree):
    assert build(tree, CXX="no-such-compiler").reasons["cpu"].startswith("CXX=no-such-compiler")


@linux
@pytest.mark.parametrize(
    ("release", "archs", "reason"),
    [
        (None, "", r"CUDA_HOME=\S+ has no bin/nvcc"),
        ("12.8", "", r"nvcc is of CUDA 12.8, torch 2.15.0\+cu132 of 13.2"),
        ("13.0", "7.0", r"nvcc 13.0 knows none of TORCH_CUDA_ARCH_LIST='7.0'"),
        ("13.1", "8.0", r"compiling csrc/cuda/k.cu failed: k.cu\(1\): error: not a compiler"),
    ],
)
def test_cuda_falls_back_to_cpu(tree, release, archs, reason):
    shutil.rmtree(tree / "site-packages")
    fake_torch(tree / "site-packages", "2.15.0+cu132", "13.2")
    make_torch_library(tree)
    if release:
        fake_nvcc(tree / "cuda", release)
    env = {"CUDA_HOME": str(tree / "cuda"), "TORCH_CUDA_ARCH_LIST": archs}
    report = build(tree, **env)
    assert (report.cpu, report.cuda, report.cuda_archs) == (True, False, ())
    assert re.fullmatch(reason, report.reasons["cuda"])
    with pytest.raises(Missing, match=f"BREGMAN_CUDA_REQUIRE=cuda, but no cuda kernels: {reason}"):
        build(tree, BREGMAN_CUDA_REQUIRE="cuda", **env)


@linux
def test_a_source_that_does_not_compile_is_one_line(tree, capfd):
    make_torch_library(tree)
    (tree / "csrc/cpu/k.cpp").write_text("#error planted\n")
    report = build(tree)
    assert report.reasons["cpu"].startswith("compiling csrc/cpu/k.cpp failed: ")
    assert "#error planted" in report.reasons["cpu"]
    out = capfd.readouterr().out
    assert "g++ " in out  # the command and all that the compiler said stand above the line
    assert len([line for line in out.splitlines() if line.startswith("bregman_cuda:")]) == 2
    with pytest.raises(Missing, match=r"but no cpu kernels: compiling csrc/cpu/k\.cpp failed"):
        build(tree, BREGMAN_CUDA_REQUIRE="cpu")


@linux
def test_cuda_needs_the_cpu_module(tree):
    shutil.rmtree(tree / "site-packages")
    fake_torch(tree / "site-packages", "2.15.0+cu132", "13.2")
    fake_nvcc(tree / "cuda")
    (tree / "csrc/cpu/k.cpp").write_text("#error planted\n")
    report = build(tree, CUDA_HOME=str(tree / "cuda"))
    assert report.reasons["cuda"] == "they need the CPU module, which was not built"


@linux
def test_a_symbol_that_nobody_has_is_found_at_link_time(tree):
    make_torch_library(tree)
    (tree / "csrc/cpu/k.cpp").write_text("int absent();\nint kernel() { return absent(); }\n")
    assert "undefined reference to `absent()'" in build(tree).reasons["cpu"]
    assert not list((tree / "out").glob("*.so*"))


def test_a_required_part_without_tools_stops_before_compiling(tree):
    with pytest.raises(Missing, match="but no cuda kernels: torch 2"):
        build(tree, BREGMAN_CUDA_REQUIRE="cuda")
    assert not (tree / "temp").exists()


def test_require_is_cpu_or_cuda(tree):
    with pytest.raises(Missing, match="BREGMAN_CUDA_REQUIRE='gpu' is neither cpu nor cuda"):
        build(tree, BREGMAN_CUDA_REQUIRE="gpu")
