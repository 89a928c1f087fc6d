"""The peers that a user would pick today, each where it is installed; `WHY` says what is missing.

    pip install igraph && pip install --no-deps bregman-learning     LinBreg and AdaBreg (T. J. Heeringa)
    pip install --no-deps pytorch_optimizer                           FTRL: of its 128, the one with an l1 prox

`--no-deps` because bregman-learning's dependency torch-simplify brings torchvision, which replaces the installed torch;
only its `simplify` function needs that one. pytorch_optimizer needs nothing beside torch and numpy.
"""

from __future__ import annotations

from typing import Any

import torch
from contestants import Contestant, groups_of
from torch import Tensor

_MISSING = []
try:
    import bregman
    from bregman import L1, AdaBreg, LinBreg, Null
except ImportError as error:
    bregman = None
    _MISSING.append(
        f"bregman-learning cannot be imported ({error}): pip install igraph; pip install --no-deps bregman-learning"
    )
try:
    from pytorch_optimizer import FTRL
except ImportError as error:
    FTRL = None
    _MISSING.append(f"pytorch_optimizer cannot be imported ({error}): pip install --no-deps pytorch_optimizer")
WHY = "; ".join(_MISSING)


def _groups(params: list[Tensor]) -> list[dict[str, object]]:
    return [{**group, "reg": L1(1e-3) if group["params"][0].ndim > 1 else Null()} for group in groups_of(params)]


def _ftrl(params: list[Tensor]) -> Any:
    groups = [group["params"] for group in groups_of(params)]
    return FTRL([{"params": own, "lambda_1": 1e-3 * (own[0].ndim > 1)} for own in groups], lr=1e-3)


def peers(dtype: torch.dtype) -> list[Contestant]:
    """LinBreg, LinBreg with momentum and AdaBreg of bregman-learning, whose group prox serves matrices only; FTRL.

    `bytes` is the least that the same update needs, as for ours, so that GB/s compare.
    """
    size = torch.empty((), dtype=dtype).element_size()
    makers: list[tuple[str, str, int, Any]] = []
    if bregman is not None:
        makers += [
            ("LinBreg", "bregman-learning", 4, lambda params: LinBreg(_groups(params), lr=1e-3)),
            ("LinBreg momentum", "bregman-learning", 6, lambda params: LinBreg(_groups(params), lr=1e-3, momentum=0.9)),
            ("AdaBreg", "bregman-learning", 8, lambda params: AdaBreg(_groups(params), lr=1e-4)),
        ]
    if FTRL is not None:
        makers.append(("FTRL", "pytorch_optimizer", 7, _ftrl))
    # bregman-learning points p.data at a new tensor in every step, so peers get parameters of their own.
    return [
        Contestant(title, "l1", package, passes * size, make, shared=False) for title, package, passes, make in makers
    ]
