"""The package itself: wheels and sdists made by pip, unpacked and run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "build_backend").is_dir(), reason="needs the source tree"),
]


def copy_of_the_source(folder: Path) -> Path:
    """What a fresh clone holds, without what earlier builds left in this one."""
    leave = shutil.ignore_patterns(
        ".git", "build", "build-*", "dist", "*.so", "_build.json", "__pycache__", "*.egg-info", ".venv", "venv"
    )
    return Path(shutil.copytree(ROOT, folder / "source", ignore=leave))


def clean_env(**env) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("BREGMAN_", "PYTHONPATH"))}
    return {**inherited, **env}


def pip_wheel(source: Path, out: Path, **env) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "wheel", "-v", ".", "--no-build-isolation", "--no-deps", "-w", str(out)]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, env=clean_env(**env), check=False)


def said(log: str) -> list[str]:
    return [line.strip() for line in log.splitlines() if line.strip().startswith("bregman_cuda: ")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this source, with CPU kernels, built against this interpreter's torch."""
    folder = tmp_path_factory.mktemp("wheel")
    done = pip_wheel(copy_of_the_source(folder), folder / "out", BREGMAN_CUDA_REQUIRE="cpu", CUDA_HOME="/nonexistent")
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (folder / "out").glob("*.whl")
    return path


def unpacked(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_serves_every_python(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("any.whl")
    assert {"bregman_cuda/_C_cpu.so", "bregman_cuda/_build.json", "bregman_cuda/py.typed"} <= set(names)
    assert all(name.startswith(("bregman_cuda/", "bregman_cuda-")) for name in names)


STEP = """
import json, torch, bregman_cuda
p = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
start = p.detach().clone()
p.grad = torch.ones_like(p)
bregman_cuda.LinBreg([p], lr=0.1, reg=bregman_cuda.L1(0.1), fused=True).step()
assert not torch.equal(p.detach(), start)
print(json.dumps({"torch": torch.__version__, "file": bregman_cuda.__file__, "info": bregman_cuda.build_info()}))
"""


def run_step(python: str, package: Path) -> dict:
    done = subprocess.run(
        [python, "-c", STEP], cwd=package, capture_output=True, text=True, env=clean_env(PYTHONPATH=str(package)),
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_wheel_steps(wheel, tmp_path):
    result = run_step(sys.executable, unpacked(wheel, tmp_path))
    assert result["file"].startswith(str(tmp_path))
    assert result["info"]["cpu"]
    assert result["info"]["built_with_torch"] == result["torch"]


@pytest.mark.skipif(
    not os.environ.get("BREGMAN_OTHER_PYTHON"),
    reason="BREGMAN_OTHER_PYTHON names no interpreter with another torch >= 2.10",
)
def test_one_wheel_runs_under_another_torch(wheel, tmp_path):
    result = run_step(os.environ["BREGMAN_OTHER_PYTHON"], unpacked(wheel, tmp_path))
    assert result["info"]["cpu"]
    assert result["info"]["built_with_torch"] != result["torch"]


def test_a_broken_source_installs_as_pure_python(tmp_path):
    source = copy_of_the_source(tmp_path)
    (source / "csrc/torch/cpu_ops.cpp").write_text("#error planted\n")
    for file in (source / "csrc/cpu").glob("kernels_*.cpp"):
        file.unlink()
    done = pip_wheel(source, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    cpu, cuda = sorted(said(done.stdout + done.stderr))
    assert cpu.startswith("bregman_cuda: no CPU kernels: compiling csrc/torch/cpu_ops.cpp failed: ")
    assert cuda.startswith("bregman_cuda: no CUDA kernels: ")
    (path,) = (tmp_path / "out").glob("*-py3-none-any.whl")
    package = unpacked(path, tmp_path / "package")
    code = "import bregman_cuda; print(bregman_cuda.build_info()['reasons']['cpu'])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=package, capture_output=True, text=True,
        env=clean_env(PYTHONPATH=str(package)), check=True,
    )  # fmt: skip
    assert "planted" in done.stdout


def test_a_required_part_that_fails_is_fatal(tmp_path):
    source = copy_of_the_source(tmp_path)
    done = pip_wheel(source, tmp_path / "out", BREGMAN_CUDA_REQUIRE="cpu", CXX="no-such-compiler")
    assert done.returncode != 0
    reason = "BREGMAN_CUDA_REQUIRE=cpu, but no cpu kernels: CXX=no-such-compiler names no program"
    assert reason in done.stdout + done.stderr


def test_the_sdist_holds_what_a_build_needs(tmp_path):
    source = copy_of_the_source(tmp_path)
    (source / "bregman_cuda/_C_cpu.so").touch()
    code = f"import backend; backend.build_sdist({str(tmp_path)!r})"
    env = clean_env(PYTHONPATH=str(source / "build_backend"))
    subprocess.run([sys.executable, "-c", code], cwd=source, env=env, check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    built_from = {*source.glob("csrc/**/*.*"), *source.glob("build_backend/*.py"), *source.glob("bregman_cuda/**/*.py")}
    assert {str(file.relative_to(source)) for file in built_from} <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "tests/test_packaging.py"} <= names
    assert not [name for name in names if name.endswith((".so", "_build.json"))]
