"""What `sparse_init_` did, and what it left dense."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .layers import EMBEDDINGS, NORMS, named_tensors, weight_tensors
from .report import DensityRow, percent, share, table


@dataclass(frozen=True)
class InitRow(DensityRow):
    """A weight that was initialised: its standard deviation, its layer's bias, and how many outputs are live.

    An output is live if non-zero weights lead to it from the input of its nn.Sequential; None if not known.
    """

    std: float = 0.0
    bias: str = "none"
    live_outputs: int | None = None


@dataclass(frozen=True)
class DenseTensor:
    """A tensor that stayed dense, and why."""

    name: str
    shape: tuple[int, ...]
    numel: int
    reason: str


@dataclass(frozen=True)
class SparseInitReport:
    """``rows``: the weights that were initialised; ``dense``: every tensor without zeros; ``notes``: what was moved
    and what is not guaranteed. ``str(report)`` is a table and these lists."""

    rows: list[InitRow]
    dense: list[DenseTensor]
    notes: list[str]

    @property
    def numel(self) -> int:
        return sum(row.numel for row in self.rows)

    @property
    def nonzeros(self) -> int:
        return sum(row.nonzeros for row in self.rows)

    @property
    def density(self) -> float:
        """Share of non-zeros over the initialised weights."""
        return share(self.nonzeros, self.numel)

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [
            ("sparse weight", "shape", "non-zeros", "density", "std", "live outputs", "bias")
        ]
        for row in self.rows:
            live = "not known" if row.live_outputs is None else f"{row.live_outputs:,}"
            shape = "x".join(map(str, row.shape))
            cells.append((row.name, shape, f"{row.nonzeros:,}", percent(row.density), f"{row.std:.3g}", live, row.bias))
        total = (f"{len(self.rows)} weights", "", f"{self.nonzeros:,}", percent(self.density), "", "", "")
        lines = [table([*cells, total], rules=(1, 1 + len(self.rows)))]
        lines += ["left dense:" if self.dense else "left dense: nothing"]
        vectors: dict[str, list[DenseTensor]] = {}
        for tensor in self.dense:
            if len(tensor.shape) > 1:
                shape = "x".join(map(str, tensor.shape))
                lines.append(f"  {tensor.name} ({shape}): {tensor.reason}")
            else:
                vectors.setdefault(tensor.reason, []).append(tensor)
        for reason, tensors in vectors.items():
            lines.append(f"  {len(tensors)} vectors ({sum(t.numel for t in tensors):,} elements): {reason}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def left_dense(model: nn.Module) -> list[DenseTensor]:
    """Every parameter without a zero entry, or that is no weight of a layer; with the reason."""
    weights = {weight.tensor for weight in weight_tensors(model)}
    reasons: dict[nn.Parameter, str] = {}
    for module in model.modules():
        kind = "embedding" if isinstance(module, EMBEDDINGS) else "norm layer" if isinstance(module, NORMS) else ""
        for name, parameter in module._parameters.items():
            if parameter is not None and kind:
                reasons.setdefault(parameter, kind)
            elif parameter is not None and "bias" in name:
                reasons.setdefault(parameter, "bias")
    dense = []
    for name, parameter in named_tensors(model):
        default = "source of a parametrization" if "parametrizations." in name else "no weight of a layer told here"
        asked = "as asked" if parameter.requires_grad else "frozen"
        reason = asked if parameter in weights else reasons.get(parameter, default)
        if parameter not in weights or int(torch.count_nonzero(parameter)) == parameter.numel():
            dense.append(DenseTensor(name, tuple(parameter.shape), parameter.numel(), reason))
    return dense
