"""The PEP 517 and 660 hooks: setuptools', and torch asked for only where there is none.

Listing torch as a build requirement would make pip fetch its newest torch for every build, and build
against a torch that the user does not run.
"""

from __future__ import annotations

from find_torch import target_torch
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from toolchain import Missing, find_cxx, skip_requested

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def torch_requirement() -> list[str]:
    """["torch>=2.10"] if the kernels could be built but for a torch in the target environment."""
    if skip_requested():
        return []
    try:
        find_cxx()
    except Missing:  # nothing could be compiled against it
        return []
    torch = target_torch()
    return [] if torch and torch.problem is None else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *torch_requirement()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *torch_requirement()]
