"""Find the torch to build against, without importing it.

An isolated build environment hides the packages of the environment that pip installs into, but runs
that environment's interpreter: its site-packages are known by path.  Torch's headers and libraries
are all that a build needs, so a path is enough.
"""

from __future__ import annotations

import importlib.util
import re
import site
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MINIMUM = (2, 10)  # the first torch whose stable ABI has Tensor[] arguments


@dataclass(frozen=True)
class Torch:
    """A torch package on disk; `cuda` is None for a build without CUDA."""

    folder: Path
    version: str
    cuda: str | None
    hip: str | None

    @property
    def release(self) -> tuple[int, int]:
        major, minor = re.findall(r"\d+", self.version)[:2]
        return int(major), int(minor)

    @property
    def problem(self) -> str | None:
        """Why nothing can be built against it, or None."""
        if self.release < MINIMUM:
            return f"torch {self.version} is older than {MINIMUM[0]}.{MINIMUM[1]}"
        if not (self.folder / "include/torch/csrc/stable/library.h").is_file():
            return f"torch {self.version} in {self.folder} comes without its C++ headers"
        return None

    def __str__(self) -> str:
        kind = f"CUDA {self.cuda}" if self.cuda else f"ROCm {self.hip}" if self.hip else "CPU"
        return f"torch {self.version} ({kind})"


def read_torch(folder: Path) -> Torch | None:
    """The torch package in `folder`, from its version.py read as text; None if it is not one."""
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None

    def value(name: str) -> str | None:
        found = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
        return found.group(1) if found else None

    version = value("__version__")
    if version is None or not re.match(r"\d+\.\d+", version):
        return None
    return Torch(folder, version, value("cuda"), value("hip"))


def target_folders() -> list[Path]:
    """The site-packages of the environment that this interpreter belongs to, isolated or not."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    folders += site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # outside a venv, pip's isolation also hides --user installs
        folders.append(site.getusersitepackages())
    return [Path(folder) for folder in dict.fromkeys(folders)]


def target_torch(folders: Iterable[Path] | None = None) -> Torch | None:
    """The target environment's torch: the first that can be built against, else the first."""
    found = [read_torch(folder / "torch") for folder in folders or target_folders()]
    torches = [torch for torch in found if torch]
    return next((torch for torch in torches if torch.problem is None), next(iter(torches), None))


def build_torch() -> Torch | None:
    """The build environment's torch: what `import torch` would find here."""
    spec = importlib.util.find_spec("torch")  # finds a top-level package without importing it
    return read_torch(Path(spec.origin).parent) if spec and spec.origin else None


def find_torch() -> Torch | None:
    """The torch to build against: the target's, unless it is unusable and the build's is not."""
    target = target_torch()
    if target and target.problem is None:
        return target
    return build_torch() or target
