"""Find the compilers and what they can do.  Every miss is a `Missing` with a one-line reason."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Code for 8.0 also runs on 8.6 to 8.9 (same major); PTX on all that is newer, once a driver has compiled it. A further
# architecture costs about 100 seconds of a core, and one from 10.0 on as much again for its PTX.
DEFAULT_ARCHS = "8.0;9.0+PTX"


class Missing(Exception):
    """Something that a build needs is not there; the message is the one line a user reads."""


def skip_requested(env: Mapping[str, str] = os.environ) -> bool:
    """Whether `$BREGMAN_CUDA_SKIP_EXT` asks for a pure Python install."""
    return env.get("BREGMAN_CUDA_SKIP_EXT", "") not in ("", "0")


def output_of(command: list[str]) -> str:
    """stdout and stderr of a command that may be absent or fail."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return done.stdout + done.stderr


@dataclass(frozen=True)
class Cxx:
    """A C++ compiler."""

    command: tuple[str, ...]
    version: str

    def accepts(self, flag: str) -> bool:
        """Whether the flag compiles an empty file without a warning (clang warns, GCC fails)."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "empty.cpp")
            source.touch()
            command = [*self.command, "-Werror", flag, "-c", str(source), "-o", f"{source}.o"]
            return subprocess.run(command, capture_output=True, check=False).returncode == 0


def find_cxx(env: Mapping[str, str] = os.environ) -> Cxx:
    """`$CXX`, or the first of g++, c++, clang++ on the path."""
    named = shlex.split(env.get("CXX", ""))
    choices = [named] if named else [["g++"], ["c++"], ["clang++"]]
    for command in choices:
        if shutil.which(command[0], path=env.get("PATH")):
            return Cxx(tuple(command), output_of([*command, "--version"]).partition("\n")[0])
    if named:
        raise Missing(f"CXX={env['CXX']} names no program on the path")
    raise Missing("no C++ compiler found (looked for g++, c++, clang++; CXX names another)")


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler: its path, release ("13.0"), and the architectures it knows ("8.0", ...)."""

    path: str
    release: str
    archs: tuple[str, ...]

    @property
    def include(self) -> str | None:
        """The folder of cuda_runtime.h: asked of nvcc itself, which may be a wrapper script."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "empty.cu")
            source.touch()
            text = output_of([self.path, "--dryrun", "-c", str(source), "-o", f"{source}.o"])
        found = re.search(r'INCLUDES="-I([^"]+)"', text)
        return os.path.normpath(found.group(1)) if found else None


def find_nvcc(env: Mapping[str, str] = os.environ, fallback: str = "/usr/local/cuda") -> Nvcc:
    """nvcc of `$CUDA_HOME` (or `$CUDA_PATH`), else on the path, else below /usr/local/cuda."""
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    if home:
        path = shutil.which("nvcc", path=os.path.join(home, "bin"))
        if path is None:
            raise Missing(f"CUDA_HOME={home} has no bin/nvcc")
    else:
        path = shutil.which("nvcc", path=env.get("PATH")) or shutil.which("nvcc", path=os.path.join(fallback, "bin"))
        if path is None:
            raise Missing("no nvcc found (set CUDA_HOME to the CUDA toolkit)")
    release = re.search(r"release (\d+\.\d+)", output_of([path, "--version"]))
    if release is None:
        raise Missing(f"{path} --version names no release")
    numbers = re.findall(r"compute_(\d+)(\d)\b", output_of([path, "--list-gpu-arch"]))
    archs = sorted({f"{major}.{minor}" for major, minor in numbers}, key=float)
    return Nvcc(path, release.group(1), tuple(archs))


def parse_archs(wanted: str | None, nvcc: Nvcc) -> list[str]:
    """The architectures to compile for, of `TORCH_CUDA_ARCH_LIST` or the default list.

    Entries look like 8.0, 9.0a or 9.0+PTX, separated by semicolons, commas or spaces.  Those that
    nvcc does not know are left out; Missing is raised where an entry is no number or none is left.
    """
    entries = re.split(r"[;,\s]+", (wanted or "").strip() or DEFAULT_ARCHS)
    chosen = []
    for entry in filter(None, entries):
        match = re.fullmatch(r"(\d+\.\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise Missing(f"TORCH_CUDA_ARCH_LIST={wanted!r} has {entry!r}: write numbers, as in 8.0;9.0+PTX")
        if match.group(1) in nvcc.archs and entry not in chosen:
            chosen.append(entry)
    if not chosen:
        raise Missing(f"nvcc {nvcc.release} knows none of TORCH_CUDA_ARCH_LIST={wanted!r}")
    return chosen


def visible_archs(nvcc: Nvcc, env: Mapping[str, str] = os.environ) -> str:
    """Those of this machine's GPUs, the newest with PTX for later ones; empty where there is none that nvcc knows.

    Compiling for them alone takes a fraction of the time that the default list takes.
    """
    smi = shutil.which("nvidia-smi", path=env.get("PATH"))
    found = output_of([smi, "--query-gpu=compute_cap", "--format=csv,noheader"]) if smi else ""
    known = sorted({cap for cap in re.findall(r"^(\d+\.\d)\s*$", found, re.MULTILINE) if cap in nvcc.archs}, key=float)
    return ";".join(known) + "+PTX" if known else ""


def gencode_flags(archs: list[str]) -> list[str]:
    """nvcc's flags for a list from `parse_archs`.

    Numbers before 10.0 share the PTX of the lowest, and so do those from 10.0 on, for which nvcc has another compiler:
    for these kernels all PTX of one compiler is the same but for the name of its target (CUDA 13.0, 7.5 to 12.0), and
    making it is half of the work for an architecture.
    """
    numbers = [arch.removesuffix("+PTX").replace(".", "") for arch in archs]
    plain = [int(number) for number in numbers if number.isdigit()]
    codes: dict[str, list[str]] = {}
    for arch, number in zip(archs, numbers, strict=True):
        alike = [n for n in plain if number.isdigit() and (n < 100) == (int(number) < 100)]
        base = str(min(alike)) if alike else number
        code = codes.setdefault(base, [])
        code.append(f"sm_{number}")
        if arch.endswith("+PTX"):
            code.append(f"compute_{base}")
    return [f"-gencode=arch=compute_{base},code=[{','.join(dict.fromkeys(code))}]" for base, code in codes.items()]
