"""Density reports: how many weights of a model, or of an optimizer, are not zero.

*Density* is the share of non-zeros, *sparsity* the share of zeros. NaN is not zero: it counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from .layers import named_tensors, weight_tensors

if TYPE_CHECKING:
    from ..optim._base import SparseOptimizer

Grouping = Literal["out", "in", "kernel"]

# The dims whose indices identify a group, as in GroupLasso(groups=...).
GROUP_DIMS: dict[str, tuple[int, ...]] = {"out": (0,), "in": (1,), "kernel": (0, 1)}


@dataclass(frozen=True)
class DensityRow:
    """Counts of one tensor. ``groups`` and ``nonzero_groups`` are None where nothing is grouped."""

    name: str
    shape: tuple[int, ...]
    numel: int
    nonzeros: int
    groups: int | None = None
    nonzero_groups: int | None = None

    @property
    def density(self) -> float:
        """Share of non-zeros; NaN for a tensor without elements."""
        return share(self.nonzeros, self.numel)


@dataclass(frozen=True)
class DensityReport:
    """Non-zeros per tensor, and their sum.

    ``rows`` are the tensors that are counted. ``all_numel`` and ``all_nonzeros``, where known, count every
    parameter of the model (biases, norms and embeddings too), so that a sparse head cannot hide a dense body.
    ``str(report)`` is a table.
    """

    rows: list[DensityRow]
    all_numel: int | None = None
    all_nonzeros: int | None = None

    @property
    def numel(self) -> int:
        return sum(row.numel for row in self.rows)

    @property
    def nonzeros(self) -> int:
        return sum(row.nonzeros for row in self.rows)

    @property
    def density(self) -> float:
        """Share of non-zeros over ``rows``; NaN without elements."""
        return share(self.nonzeros, self.numel)

    @property
    def sparsity(self) -> float:
        """Share of zeros over ``rows``: ``1 - density``."""
        return 1.0 - self.density

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [("tensor", "shape", "elements", "non-zeros", "density", "non-zero groups")]
        cells += [_cells(row) for row in self.rows]
        cells.append(_cells(DensityRow(f"{len(self.rows)} tensors", (), self.numel, self.nonzeros)))
        if self.all_numel is not None and self.all_nonzeros is not None:
            cells.append(_cells(DensityRow("all parameters", (), self.all_numel, self.all_nonzeros)))
        return table(cells, rules=(1, 1 + len(self.rows)))


def density(model_or_optimizer: nn.Module | torch.optim.Optimizer, groups: Grouping = "kernel") -> DensityReport:
    """Count the non-zeros of a model's Linear and convolution weights, or ask an optimizer for its counts.

    The rows are the weights that `param_groups` regularizes: the denominator of the paper's tables (Bungert et al.,
    JMLR 2022, section 4); the total over all parameters stands beside it. A parameter that several modules share is
    counted once.

    Args:
        model_or_optimizer: a module, or an optimizer of this package (its ``density()`` is called).
        groups: which groups of a weight with more than two dims are counted: ``"kernel"``, one per pair of indices
            (dim 0, dim 1) as the paper's N_conv; ``"out"``, per index of dim 0; ``"in"``, per index of dim 1. For
            ``"kernel"``, matrices have no groups (each would be one element).

    Raises:
        TypeError: neither a module nor an optimizer with ``density()``.
        ValueError: unknown ``groups``, or a lazy module that has not seen data yet.

    >>> print(density(nn.Linear(4, 3)).numel)
    12
    """
    if groups not in GROUP_DIMS:
        raise ValueError(f"groups={groups!r} is unknown; use one of {', '.join(map(repr, GROUP_DIMS))}")
    if isinstance(model_or_optimizer, torch.optim.Optimizer):
        count = getattr(model_or_optimizer, "density", None)
        if not callable(count):
            kind = type(model_or_optimizer).__name__
            raise TypeError(f"{kind} does not count non-zeros; pass the model to density() instead")
        report = count()
        assert isinstance(report, DensityReport)
        return report
    if not isinstance(model_or_optimizer, nn.Module):
        kind = type(model_or_optimizer).__name__
        raise TypeError(f"density() needs a torch.nn.Module or an optimizer of bregman_cuda, got {kind}")
    dims = GROUP_DIMS[groups]
    weights = {weight.name for weight in weight_tensors(model_or_optimizer)}
    counted = []
    for name, parameter in named_tensors(model_or_optimizer):
        grouped = name in weights and parameter.dim() > len(dims)
        counted.append(_count(name, parameter, dims if grouped else None))
    return _report([one for one in counted if one.name in weights], counted)


def optimizer_report(optimizer: SparseOptimizer) -> DensityReport:
    """The rows of `optimizer.density()`: what is regularized or masked, or everything where nothing is.

    Counts of the last step are read where it left some; other tensors are counted now, and so are prox points where
    parameters are averages of them. Groups are those of the regularizer.
    """
    last = _last_counts(optimizer)
    rows, everything = [], []
    for number, group in enumerate(optimizer.param_groups):
        reg = group["reg"]
        names = group.get("param_names") or [f"group {number}, parameter {i}" for i in range(len(group["params"]))]
        for name, parameter in zip(names, group["params"], strict=True):
            dims = None if reg is None else reg.groups_of(parameter.shape)
            if parameter in last and not optimizer.dense_params:
                everything.append(_Counted(name, parameter, dims, *last[parameter]))
            else:
                everything.append(_count(name, optimizer.prox_point(parameter), dims))
            if reg is not None or "mask" in optimizer.state.get(parameter, {}):
                rows.append(everything[-1])
    return _report(rows or everything, everything)


@dataclass(frozen=True)
class _Counted:
    """Counts that may still be on their way to the host: 0-dim tensors on the parameter's device."""

    name: str
    tensor: Tensor
    dims: tuple[int, ...] | None
    nonzeros: Tensor
    nonzero_groups: Tensor | None


def _count(name: str, tensor: Tensor, dims: tuple[int, ...] | None) -> _Counted:
    nonzero = tensor.detach() != 0  # true for NaN
    return _Counted(name, tensor, dims, nonzero.sum(), None if dims is None else group_any(nonzero, dims).sum())


def _last_counts(optimizer: SparseOptimizer) -> dict[Tensor, tuple[Tensor, Tensor | None]]:
    """What the last step of an optimizer with ``count_nonzeros`` left on the device."""
    counted = {}
    for group, bucket in optimizer._buckets():
        for parameter, nonzeros, groups in (bucket.counts() or ()) if group["count_nonzeros"] else ():
            counted[parameter] = (nonzeros, groups)
    return counted


def _report(rows: Sequence[_Counted], everything: Sequence[_Counted]) -> DensityReport:
    elements = _read([one.nonzeros for one in everything])
    groups = _read([one.nonzero_groups for one in everything if one.nonzero_groups is not None])
    table_rows = []
    for one in rows:
        shape, nonzeros = tuple(one.tensor.shape), elements[id(one.nonzeros)]
        row = DensityRow(one.name, shape, one.tensor.numel(), nonzeros)
        if one.dims is not None and one.nonzero_groups is not None:
            total = math.prod(shape[dim] for dim in one.dims)
            row = replace(row, groups=total, nonzero_groups=groups[id(one.nonzero_groups)])
        table_rows.append(row)
    return DensityReport(table_rows, sum(one.tensor.numel() for one in everything), sum(elements.values()))


def _read(counts: Sequence[Tensor]) -> dict[int, int]:
    """Values of 0-dim tensors by their id, with one wait per device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for count in counts:
        by_device.setdefault(count.device, []).append(count)
    values: dict[int, int] = {}
    for tensors in by_device.values():
        whole = [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in tensors]  # DTensors
        read = torch.stack([tensor.long() for tensor in whole]).tolist()
        values.update(zip(map(id, tensors), read, strict=True))
    return values


def group_any(mask: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Whether any element of each group of a bool tensor is set: a tensor over `dims`, the dims that identify one."""
    rest = [dim for dim in range(mask.dim()) if dim not in dims]
    # Not any(): torch sums what the ranks found when a shard boundary cuts a group of a DTensor.
    return mask.sum(dim=rest) > 0 if rest else mask


def share(part: int, whole: int) -> float:
    """part / whole; the share of nothing is NaN."""
    return part / whole if whole else float("nan")


def percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.2f}%"


def _cells(row: DensityRow) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape))
    grouped = "" if row.groups is None else f"{row.nonzero_groups:,} of {row.groups:,}"
    return (row.name, shape, f"{row.numel:,}", f"{row.nonzeros:,}", percent(row.density), grouped)


def table(cells: list[tuple[str, ...]], rules: tuple[int, ...] = (1,)) -> str:
    """Plain-text table: first column left, the others right aligned, a line before each row in `rules`."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for index, row in enumerate(cells):
        if index in rules:
            lines.append("-" * (sum(widths) + 2 * len(widths) - 2))
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)
