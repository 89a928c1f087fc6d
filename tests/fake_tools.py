"""Folders that look like torch to the build, and scripts that look like nvcc."""

from pathlib import Path


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
