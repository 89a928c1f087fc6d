"""The native tests: emulated kernels, seeded faults and the launch plan, under the sanitizers.

CTest does the work (``tests/native``); here each preset is one test that fails with CTest's own account.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 1200  # against hanging; how fast the machine is does not matter

pytestmark = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("g++")), reason="the native tests need cmake (>= 3.22) and g++"
)


def run(*command: str) -> str:
    """Runs `command` in the repository; a failure fails the test with the end of its output."""
    done = subprocess.run(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIMEOUT_S
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)} failed ({done.returncode}):\n{done.stdout[-6000:]}", pytrace=False)
    return done.stdout


@pytest.mark.parametrize("preset", ["asan-ubsan", "tsan"])
def test_native(preset: str) -> None:
    run("cmake", "--preset", preset)
    run("cmake", "--build", "--preset", preset)
    output = run("ctest", "--preset", preset, "--no-tests=error")
    assert "100% tests passed" in output
    assert ".caught" in output, "the seeded faults did not run"
