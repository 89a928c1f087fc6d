"""Fixtures of the whole suite: which package is tested, and which driver runs the step."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bregman_cuda" / "_C_cpu.so").exists():
    # `python -m pytest` puts the checkout first; an unbuilt one must not hide the installed package.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT] + [str(ROOT)]

import hypothesis  # noqa: E402
import torch  # noqa: E402

from bregman_cuda import _backend  # noqa: E402

# Derandomised: a red run is red again. BREGMAN_TEST_EXAMPLES multiplies the examples for a long search.
hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    derandomize="BREGMAN_TEST_EXAMPLES" not in os.environ,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
        hypothesis.HealthCheck.function_scoped_fixture,  # the driver is the same for all examples
    ],
)
hypothesis.settings.load_profile("suite")

ALLOW_MISSING = os.environ.get("BREGMAN_TEST_ALLOW_MISSING") == "1"


@dataclass(frozen=True)
class Driver:
    """What walks the tensors: plain torch, the CPU kernels, or the CUDA kernels on the emulation layer."""

    name: str
    fused: bool


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device (skipped where there is none)")
    config.addinivalue_line("markers", "slow: takes more than ten seconds")


def missing(what: str) -> None:
    """Kernels that are not there fail the suite: a skip would hide that nothing was tested."""
    if ALLOW_MISSING:
        pytest.skip(what)
    pytest.fail(f"{what} (BREGMAN_TEST_ALLOW_MISSING=1 skips instead)", pytrace=False)


@pytest.fixture(scope="session")
def emulated_kernels() -> _backend.Kernels:
    """The CUDA kernels compiled for the CPU, built once per state of the sources."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None:
        missing(f"the emulated CUDA kernels need a C++ compiler, and there is no {compiler[0]!r}")
    sources = [*sorted(ROOT.glob("csrc/cuda/*.cu")), ROOT / "csrc/torch/cuda_ops.cpp"]
    sources.append(ROOT / "tests/native/emulation/cuda_emulation.cpp")
    headers = [
        h for pattern in ("csrc/**/*.h", "csrc/**/*.cuh", "tests/native/emulation/*.h") for h in ROOT.glob(pattern)
    ]
    digest = hashlib.sha256(torch.__version__.encode() + shlex.join(compiler).encode())
    for file in sorted(sources + headers):
        digest.update(file.read_bytes())
    library = ROOT / "build" / "emulated" / f"bregman_emulated_{digest.hexdigest()[:16]}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another worker of this session may be building it
        if not library.exists():
            _build(compiler, sources, library)
    torch.ops.load_library(str(library))
    return _backend.Kernels("bregman_emulated")


def _build(compiler: list[str], sources: list[Path], library: Path) -> None:
    torch_root = Path(torch.__file__).parent
    flags = ["-O1", "-g1", "-std=c++20", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-Wno-unknown-pragmas"]
    flags += ["-DBREGMAN_EMULATE", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'tests/native/emulation'}"]
    flags += [f"-I{torch_root / 'include'}"]

    def run(command: list[str]) -> None:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.fail(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}", pytrace=False)

    with tempfile.TemporaryDirectory(dir=library.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(Path(folder) / f"{source.name}.o") for source in sources]
        compile_all = [[*compiler, *flags, "-x", "c++", "-c", str(s), "-o", o] for s, o in zip(sources, objects)]
        list(pool.map(run, compile_all))
        libraries = [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-ltorch", "-pthread"]
        run([*compiler, "-shared", "-o", f"{folder}/library.so", *objects, *libraries])
        os.replace(f"{folder}/library.so", library)


LOAD = _backend._load


def _driver(request: pytest.FixtureRequest) -> Iterator[Driver]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cpu" and LOAD("cpu")[0] is None:
            missing(f"the CPU kernels are missing: {LOAD('cpu')[1]}")
        if request.param == "emulated":
            kernels = request.getfixturevalue("emulated_kernels")
            patch.setattr(_backend, "_load", lambda device: (kernels, "") if device == "cpu" else LOAD(device))
        yield Driver(request.param, fused=request.param != "reference")


# For one test: of a longer life, one driver could hide the other.
driver = pytest.fixture(params=["reference", "cpu", "emulated"], name="driver")(_driver)
kernel_driver = pytest.fixture(params=["cpu", "emulated"], name="kernel_driver")(_driver)


@pytest.fixture(scope="module")
def cpu_kernels() -> None:
    if _backend._load("cpu")[0] is None:
        missing(f"the CPU kernels are missing: {_backend._load('cpu')[1]}")


@pytest.fixture(autouse=True)
def _repeatable(request: pytest.FixtureRequest) -> Iterator[None]:
    """Random numbers that depend on the test alone, so that a red run is red again; and one thread: tensors here are
    small. Other counts give the same bits (test_edges.py)."""
    torch.manual_seed(zlib.crc32(f"{request.path.name}::{request.node.name}".encode()))
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
