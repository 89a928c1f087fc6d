"""What the build finds: torch, compilers, architectures.  torch is a folder, nvcc a script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "build_backend"))

backend = pytest.importorskip("backend", reason="needs the source tree and setuptools >= 77", exc_type=ImportError)
import compiling
import find_torch
from fake_tools import fake_nvcc, fake_torch
from toolchain import Missing, Nvcc, find_cxx, find_nvcc, gencode_flags, parse_archs, visible_archs

NVCC = Nvcc("nvcc", "13.0", ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0"))


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
        (None, ["8.0", "9.0+PTX"]),
        ("", ["8.0", "9.0+PTX"]),
        ("8.0;9.0", ["8.0", "9.0"]),
        ("8.0, 9.0a 12.0+PTX;8.0", ["8.0", "9.0a", "12.0+PTX"]),
        ("7.0;8.0", ["8.0"]),  # CUDA 13 dropped 7.0
    ],
)
def test_architectures(wanted, chosen):
    assert parse_archs(wanted, NVCC) == chosen


def test_default_architectures_of_an_older_nvcc():
    assert parse_archs(None, Nvcc("nvcc", "12.4", ("7.5", "8.0", "9.0")))[-1] == "9.0+PTX"


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("9.0\n9.0\n8.0\n", "8.0;9.0+PTX"),
        ("7.0\n", ""),  # nvcc does not know it: the default list
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", ""),
    ],
)
def test_architectures_of_this_machine(tmp_path, answer, wanted):
    assert visible_archs(NVCC, {"PATH": str(tmp_path)}) == ""
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}END\n")
    smi.chmod(0o755)
    assert visible_archs(NVCC, {"PATH": str(tmp_path)}) == wanted


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
    # One PTX for all that the same compiler makes.
    assert gencode_flags(["9.0+PTX", "8.0", "7.5", "12.0+PTX", "10.0", "10.0+PTX"]) == [
        "-gencode=arch=compute_75,code=[sm_90,compute_75,sm_80,sm_75]",
        "-gencode=arch=compute_100,code=[sm_120,compute_100,sm_100]",
    ]


def test_max_jobs():
    assert compiling.max_jobs({"MAX_JOBS": "3"}) == 3
    assert compiling.max_jobs({}) >= 1
    for text in ("0", "-1", "many"):
        with pytest.raises(Missing, match="MAX_JOBS"):
            compiling.max_jobs({"MAX_JOBS": text})
