"""``python -m bregman_cuda info`` (needs torch alone) and ``python -m bregman_cuda train`` (needs the train extra)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ._backend import build_info

USAGE = """usage: python -m bregman_cuda COMMAND

  info    what was compiled, for which architectures, and why anything is missing
  train   train a sparse network and plot its accuracy and density (train --help)"""


def info_text() -> str:
    """`build_info()` as lines to read."""
    info = build_info()
    lines = [("bregman_cuda", info["version"]), ("torch", info["torch"])]
    if info.get("built_with_torch"):
        lines.append(("built with", f"torch {info['built_with_torch']}"))
    lines += [(tool, info[tool]) for tool in ("cxx", "nvcc") if info.get(tool)]
    archs = info["cuda_archs"] if isinstance(info["cuda_archs"], str) else ", ".join(map(str, info["cuda_archs"]))
    lines.append(("CPU kernels", _state(info["cpu"], info["cpu_isa"], info["reasons"].get("cpu"))))
    lines.append(("CUDA kernels", _state(info["cuda"], archs, info["reasons"].get("cuda"))))
    lines += [(name, why) for name, why in info["reasons"].items() if name not in ("cpu", "cuda")]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def _state(there: bool, detail: Any, why: str | None) -> str:
    if there:
        return f"yes ({detail})" if detail else "yes"
    return f"no: {why}" if why else "no"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["info"]:
        print(info_text())
        return 0
    if arguments[:1] != ["train"]:
        asked_for_help = arguments[:1] in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if asked_for_help else sys.stderr)
        return 0 if asked_for_help else 2
    try:
        from .cli import run_train
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("bregman_cuda"):
            raise
        print(f"error: train needs {error.name}; run: pip install 'bregman_cuda[train]'", file=sys.stderr)
        return 2
    return run_train(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
