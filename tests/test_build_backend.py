"""The build's decisions: what it finds and what it falls back to.

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

backend = pytest.importorskip("backend", reason="needs the source tree and setuptools >= 77", exc_type=ImportError)
import compiling  # noqa: E402
import find_torch  # noqa: E402
import native_build  # noqa: E402
from toolchain import Missing, Nvcc, find_cxx, find_nvcc, gencode_flags, parse_archs  # noqa: E402

linux = pytest.mark.skipif(sys.platform != "linux", reason="links against an ELF library")
NVCC = Nvcc("nvcc", "13.0", ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"))


def fake_torch(site_packages: Path, version="2.13.0+cpu", cuda=None, hip=None, headers=True) -> Path:
    """A folder that looks like torch to the build, and fails to import."""
    folder = site_packages / "torch"
    (folder / "lib").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('the build imported torch')\n")
    (folder / "version.py").write_text(
        "from typing import Optional\n__all__ = ['__version__', 'cuda', 'hip']\n"
        f"__version__ = {version!r}\ndebug = False\ncuda: Optional[str] = {cuda!r}\n"
        f"git_version = 'abc'\nhip: Optional[str] = {hip!r}\n"
    )
    if headers:
        library = folder / "include/torch/csrc/stable/library.h"
        library.parent.mkdir(parents=True)
        library.touch()
    return folder


def fake_nvcc(home: Path, release="13.0", archs=("80", "90")) -> Path:
    """A script that answers --version and --list-gpu-arch, and compiles nothing."""
    path = home / "bin/nvcc"
    path.parent.mkdir(parents=True)
    names = "\\n".join(f"compute_{arch}" for arch in archs)
    path.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f'*--version*) echo "Cuda compilation tools, release {release}, V{release}.1";;\n'
        f'*--list-gpu-arch*) printf "{names}\\n";;\n'
        '*) echo "k.cu(1): error: not a compiler" >&2; exit 2;;\nesac\n'
    )
    path.chmod(0o755)
    return path


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


# finding torch


@pytest.mark.parametrize(
    ("version", "cuda", "hip", "kind"),
    [
        ("2.13.0+cpu", None, None, "CPU"),
        ("2.15.0+cu132", "13.2", None, "CUDA 13.2"),
        ("2.10.0", None, "6.4", "ROCm 6.4"),
        ("2.16.0a0+git123", "13.0", None, "CUDA 13.0"),
    ],
)
def test_torch_is_read_as_text(tmp_path, version, cuda, hip, kind):
    torch = find_torch.read_torch(fake_torch(tmp_path, version, cuda, hip))
    assert (torch.version, torch.cuda, torch.hip, torch.problem) == (version, cuda, hip, None)
    assert str(torch) == f"torch {version} ({kind})"


def test_version_file_without_annotations(tmp_path):
    (tmp_path / "version.py").write_text('__version__ = "2.10.1"\ncuda = "12.8"\nhip = None\n')
    torch = find_torch.read_torch(tmp_path)
    assert (torch.version, torch.cuda, torch.hip) == ("2.10.1", "12.8", None)


@pytest.mark.parametrize("text", ["", "nonsense", "__version__ = None"])
def test_what_is_not_torch_is_no_torch(tmp_path, text):
    (tmp_path / "version.py").write_text(text)
    assert find_torch.read_torch(tmp_path) is None
    assert find_torch.read_torch(tmp_path / "absent") is None


def test_unusable_torches_say_why(tmp_path):
    old = find_torch.read_torch(fake_torch(tmp_path / "a", "2.9.1"))
    bare = find_torch.read_torch(fake_torch(tmp_path / "b", headers=False))
    assert old.problem == "torch 2.9.1 is older than 2.10"
    assert "without its C++ headers" in bare.problem


def test_the_first_usable_torch_of_the_target_counts(tmp_path):
    fake_torch(tmp_path / "user", "2.8.0")
    fake_torch(tmp_path / "venv", "2.11.0")
    folders = [tmp_path / "none", tmp_path / "user", tmp_path / "venv"]
    assert find_torch.target_torch(folders).version == "2.11.0"
    assert find_torch.target_torch(folders[:2]).version == "2.8.0"
    assert find_torch.target_torch(folders[:1]) is None


@pytest.mark.parametrize(
    ("target", "built", "used"),
    [
        ("2.13.0", "2.14.0", "2.13.0"),
        ("2.9.0", "2.14.0", "2.14.0"),
        (None, "2.14.0", "2.14.0"),
        ("2.9.0", None, "2.9.0"),
        (None, None, None),
    ],
)
def test_target_before_build_environment(tmp_path, monkeypatch, target, built, used):
    def torch(name, version):
        return version and find_torch.read_torch(fake_torch(tmp_path / name, version))

    monkeypatch.setattr(find_torch, "target_torch", lambda: torch("target", target))
    monkeypatch.setattr(find_torch, "build_torch", lambda: torch("build", built))
    found = find_torch.find_torch()
    assert (found and found.version) == used


def test_this_torch_is_found_where_isolation_hides_it():
    """As in pip's isolated environment: the interpreter is the target's, its packages are hidden."""
    import torch

    code = (
        "import sys; sys.path = [p for p in sys.path if 'packages' not in p];"
        f"sys.path.insert(0, {str(ROOT / 'build_backend')!r});"
        "import find_torch; print(find_torch.find_torch().version); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == torch.__version__


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
@pytest.mark.parametrize(
    ("version", "env", "asked"),
    [
        ("2.13.0", {}, False),
        (None, {}, True),
        ("2.9.0", {}, True),
        (None, {"BREGMAN_CUDA_SKIP_EXT": "1"}, False),
        (None, {"CXX": "no-such-compiler"}, False),
    ],
)
def test_torch_is_fetched_only_where_it_helps(tmp_path, monkeypatch, hook, version, env, asked):
    torch = version and find_torch.read_torch(fake_torch(tmp_path, version))
    monkeypatch.setattr(backend, "target_torch", lambda: torch)
    monkeypatch.setattr(backend.build_meta, hook, lambda config_settings: ["setuptools"])
    monkeypatch.delenv("BREGMAN_CUDA_SKIP_EXT", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert getattr(backend, hook)() == ["setuptools"] + ["torch>=2.10"] * asked


# finding the compilers


def test_compilers_that_are_not_there(tmp_path):
    with pytest.raises(Missing, match=r"no C\+\+ compiler found"):
        find_cxx({"PATH": str(tmp_path)})
    with pytest.raises(Missing, match="CXX=frob -m64 names no program"):
        find_cxx({"PATH": str(tmp_path), "CXX": "frob -m64"})
    with pytest.raises(Missing, match="no nvcc found"):
        find_nvcc({"PATH": str(tmp_path)}, fallback=str(tmp_path))
    with pytest.raises(Missing, match=r"CUDA_HOME=\S+ has no bin/nvcc"):
        find_nvcc({"PATH": os.environ["PATH"], "CUDA_HOME": str(tmp_path)})


def test_a_flag_that_the_compiler_does_not_know_is_refused():
    cxx = find_cxx()
    assert cxx.accepts("-O2")
    assert not cxx.accepts("-fno-such-flag")


def test_nvcc_of_cuda_home_then_path_then_usr_local(tmp_path):
    home, path, local = (fake_nvcc(tmp_path / name) for name in ("home", "path", "local"))
    env = {"PATH": str(path.parent), "CUDA_HOME": str(tmp_path / "home")}
    fallback = str(tmp_path / "local")
    assert find_nvcc(env, fallback).path == str(home)
    assert find_nvcc({"PATH": env["PATH"]}, fallback).path == str(path)
    assert find_nvcc({"PATH": str(tmp_path)}, fallback).path == str(local)


def test_nvcc_is_asked_for_release_and_architectures(tmp_path):
    fake_nvcc(tmp_path, "12.8", ("75", "90", "100"))
    nvcc = find_nvcc({"CUDA_HOME": str(tmp_path)})
    assert (nvcc.release, nvcc.archs) == ("12.8", ("7.5", "9.0", "10.0"))


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (None, ["7.5", "8.0", "8.6", "8.9", "9.0+PTX", "10.0", "12.0"]),
        ("", ["7.5", "8.0", "8.6", "8.9", "9.0+PTX", "10.0", "12.0"]),
        ("8.0;9.0", ["8.0", "9.0"]),
        ("8.0, 9.0a 12.0+PTX;8.0", ["8.0", "9.0a", "12.0+PTX"]),
        ("7.0;8.0", ["8.0"]),  # CUDA 13 dropped 7.0
    ],
)
def test_architectures(wanted, chosen):
    assert parse_archs(wanted, NVCC) == chosen


def test_default_architectures_of_an_older_nvcc():
    assert parse_archs(None, Nvcc("nvcc", "12.4", ("7.5", "8.0", "9.0")))[-1] == "9.0+PTX"


def test_architectures_that_leave_nothing():
    with pytest.raises(Missing, match=r"knows none of TORCH_CUDA_ARCH_LIST='5.0'"):
        parse_archs("5.0", NVCC)
    with pytest.raises(Missing, match=r"has 'Hopper': write numbers"):
        parse_archs("8.0;Hopper", NVCC)


def test_gencode_flags():
    assert gencode_flags(["8.0", "9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_80,code=[sm_80]",
        "-gencode=arch=compute_90a,code=[sm_90a]",
        "-gencode=arch=compute_120,code=[sm_120,compute_120]",
    ]


def test_max_jobs():
    assert compiling.max_jobs({"MAX_JOBS": "3"}) == 3
    assert compiling.max_jobs({}) >= 1
    for text in ("0", "-1", "many"):
        with pytest.raises(Missing, match="MAX_JOBS"):
            compiling.max_jobs({"MAX_JOBS": text})


# building


@linux
def test_cpu_kernels_are_built_and_reported(tree, capfd):
    make_torch_library(tree)
    report = build(tree)
    assert (tree / "out/_C_cpu.so").is_file()
    assert json.loads((tree / "out/_build.json").read_text()) == json.loads(json.dumps(vars(report)))
    assert (report.version, report.torch, report.cpu, report.cuda) == ("1.2.3", "2.13.0+cpu", True, False)
    assert report.reasons == {"cuda": "torch 2.13.0+cpu (CPU) is not a CUDA build of torch"}
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("bregman_cuda: built the CPU kernels")
    assert lines[1] == f"bregman_cuda: no CUDA kernels: {report.reasons['cuda']}"


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
    build(tree, CXXFLAGS="-DOTHER")
    assert all(third[name] != time for name, time in objects().items())


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
    assert (report.cpu, report.cuda) == (True, False)
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
    assert report.reasons["cuda"] == "they need the CPU module, which was not built"
    out = capfd.readouterr().out
    assert "g++ " in out  # the command and all that the compiler said stand above the line
    assert len([line for line in out.splitlines() if line.startswith("bregman_cuda:")]) == 2
    with pytest.raises(Missing, match=r"but no cpu kernels: compiling csrc/cpu/k\.cpp failed"):
        build(tree, BREGMAN_CUDA_REQUIRE="cpu")


@linux
def test_a_symbol_that_nobody_has_is_found_at_link_time(tree):
    make_torch_library(tree)
    (tree / "csrc/cpu/k.cpp").write_text("int absent();\nint kernel() { return absent(); }\n")
    assert "undefined reference to `absent()'" in build(tree).reasons["cpu"]
    assert not list((tree / "out").glob("*.so*"))


def test_require_is_cpu_or_cuda(tree):
    with pytest.raises(Missing, match="BREGMAN_CUDA_REQUIRE='gpu' is neither cpu nor cuda"):
        build(tree, BREGMAN_CUDA_REQUIRE="gpu")
