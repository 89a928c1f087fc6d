"""The peer that a user would pick today: `bregman-learning` (T. J. Heeringa), imported as `bregman`.

    pip install igraph && pip install --no-deps bregman-learning

`--no-deps` because its dependency torch-simplify brings torchvision, which replaces the installed torch; only its
`simplify` function needs that one. Where the package is missing, `peers` returns nothing and `WHY` says so.
"""

from __future__ import annotations

import torch
from contestants import Contestant, groups_of
from torch import Tensor

try:
    import bregman
    from bregman import L1, AdaBreg, LinBreg, Null

    WHY = ""
except ImportError as error:
    bregman = None
    WHY = f"bregman-learning cannot be imported ({error}): pip install igraph; pip install --no-deps bregman-learning"


def _groups(params: list[Tensor]) -> list[dict[str, object]]:
    return [{**group, "reg": L1(1e-3) if group["params"][0].ndim > 1 else Null()} for group in groups_of(params)]


def peers(dtype: torch.dtype) -> list[Contestant]:
    """LinBreg, LinBreg with momentum and AdaBreg of the peer, with l1; its group prox serves matrices only.

    `bytes` is the least that the same update needs, as for ours, so that GB/s compare.
    """
    if bregman is None:
        return []
    size = torch.empty((), dtype=dtype).element_size()
    makers = {
        "LinBreg": (4, lambda params: LinBreg(_groups(params), lr=1e-3)),
        "LinBreg momentum": (6, lambda params: LinBreg(_groups(params), lr=1e-3, momentum=0.9)),
        "AdaBreg": (8, lambda params: AdaBreg(_groups(params), lr=1e-4)),
    }
    # It points p.data at a new tensor in every step, so it gets parameters of its own.
    return [
        Contestant(title, "l1", "bregman-learning", passes * size, make, shared=False)
        for title, (passes, make) in makers.items()
    ]
