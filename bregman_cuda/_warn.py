"""Warnings that name the line of the user's code."""

from __future__ import annotations

import sys
import warnings


def warn(text: str) -> None:
    """A UserWarning at the line that called this package, through torch or not."""
    frame, level, inside = sys._getframe(1), 2, ("bregman_cuda", "torch")
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in inside:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
