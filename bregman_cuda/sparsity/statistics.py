"""Statistics of weights and gradients over time, in columns: .npz files that `read_statistics` joins."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..regularizers._base import check_count
from .activation_path import Model, named_of
from .resize import filter_dim, filter_norms

_NUMBERS = ("min", "p25", "median", "p75", "max", "mean")
QUANTITIES = ("weight", "gradient")


@dataclass(frozen=True)
class Statistics:
    """Columns of equal length, one entry per (step, layer, quantity), in the order of recording."""

    step: Any  # int64
    layer: Any  # str, names of parameters
    quantity: Any  # str, "weight" or "gradient"
    min: Any  # float64, as the following; quartiles interpolate linearly
    p25: Any
    median: Any
    p75: Any
    max: Any
    mean: Any
    filter_norms: list[Any]  # float64 arrays, a norm per filter; empty for vectors, scalars, grouped transposed conv.

    def __len__(self) -> int:
        return len(self.step)


class StatisticsRecorder:
    """Records min, quartiles, max, mean and norms per filter of weights and gradients, at an interval.

    Call `update` after the backward pass. A record costs one transfer to the host for all tensors together; rows wait
    in memory until `flush` writes them to a new .npz in the folder. (The toolbox appends to twelve text files and
    synchronises twelve times per tensor.) As a context manager it flushes at the end, after an error too.

    Args:
        model: a module, or a mapping from names to parameters.
        folder: made if it is not there; files of earlier runs are continued.
        every: steps that are multiples of it are recorded.
        layers: exact parameter names; None: all.
        quantities: "weight", "gradient" or both; parameters without a gradient have no row for it.
        rows_per_file: rows that are kept in memory.

    Raises:
        ModuleNotFoundError: without numpy.
        ValueError: an unknown layer or quantity, `every` or `rows_per_file` below 1.
    """

    def __init__(
        self,
        model: Model,
        folder: str | Path,
        every: int = 1,
        layers: str | Iterable[str] | None = None,
        quantities: str | Iterable[str] = QUANTITIES,
        rows_per_file: int = 10_000,
    ) -> None:
        _numpy()
        self.model, self.every = model, check_count("StatisticsRecorder", "every", every, 1)
        self.rows_per_file = check_count("StatisticsRecorder", "rows_per_file", rows_per_file, 1)
        known = named_of(model)
        names = [*known] if layers is None else [layers] if isinstance(layers, str) else list(layers)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"StatisticsRecorder: the model has no parameter {unknown[0]!r}")
        self.layers = names
        self.quantities = (quantities,) if isinstance(quantities, str) else tuple(quantities)
        if wrong := [quantity for quantity in self.quantities if quantity not in QUANTITIES]:
            raise ValueError(f"StatisticsRecorder: quantity {wrong[0]!r} is unknown; use 'weight' or 'gradient'")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows: list[tuple[int, str, str, Any]] = []

    @torch.no_grad()
    def update(self, step: int) -> bool:
        """Record this step if it is due, and say whether it was.

        Raises:
            ValueError: the step is no integer >= 0.
        """
        step = check_count("StatisticsRecorder", "step", step)
        if step % self.every:
            return False
        named = named_of(self.model)
        keys, values = [], []
        for name in self.layers:
            param = named[name]
            for quantity in self.quantities:
                tensor = param.detach() if quantity == "weight" else param.grad
                if tensor is not None:
                    keys.append((name, quantity))
                    values.append(_summary(tensor.double(), _filter_dim(self.model, name, param)))
        if values:
            home = values[0].device  # tensors on several devices meet on one
            read = torch.cat([value.to(home) for value in values]).cpu().numpy()
            for (name, quantity), value in zip(keys, values):
                self._rows.append((step, name, quantity, read[: len(value)]))
                read = read[len(value) :]
        if len(self._rows) >= self.rows_per_file:
            self.flush()
        return True

    def flush(self) -> None:
        """Write what waits to a new file; a reader never sees half of one."""
        if not self._rows:
            return
        numpy = _numpy()
        steps, layers, quantities, values = zip(*self._rows)
        columns = {"step": numpy.array(steps, numpy.int64), "layer": numpy.array(layers, str)}
        columns["quantity"] = numpy.array(quantities, str)
        columns |= {name: numpy.array([v[i] for v in values]) for i, name in enumerate(_NUMBERS)}
        columns["norms"] = numpy.concatenate([v[len(_NUMBERS) :] for v in values])
        columns["norm_counts"] = numpy.array([len(v) - len(_NUMBERS) for v in values], numpy.int64)
        ends = [file.stem.removeprefix("statistics-") for file in _files(self.folder)]
        number = 1 + max((int(end) for end in ends if end.isdecimal()), default=-1)  # earlier files may be gone
        path = self.folder / f"statistics-{number:06d}.npz"
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            numpy.savez_compressed(file, **columns)
        os.replace(part, path)
        self._rows = []

    def __enter__(self) -> StatisticsRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()


def read_statistics(folder: str | Path) -> Statistics:
    """All records of a folder.

    Raises:
        FileNotFoundError: there are none.
        ModuleNotFoundError: without numpy.
    """
    numpy, files = _numpy(), _files(Path(folder))
    if not files:
        raise FileNotFoundError(f"{folder} has no statistics-*.npz; StatisticsRecorder.flush() writes them")
    parts = []
    for path in files:
        with numpy.load(path, allow_pickle=False) as file:
            parts.append({name: file[name] for name in file.files})
    columns = {name: numpy.concatenate([part[name] for part in parts]) for name in parts[0]}
    norms, counts = columns.pop("norms"), columns.pop("norm_counts")
    return Statistics(**columns, filter_norms=numpy.split(norms, counts.cumsum()[:-1]))


def _filter_dim(model: Model, name: str, param: Tensor) -> int | None:
    try:
        return filter_dim(model, name, param)
    except ValueError:  # a grouped transposed convolution: its filters are no slices
        return None


def _summary(x: Tensor, dim: int | None) -> Tensor:
    """The six numbers and the filter norms of a float64 tensor, in one; NaN where it holds a NaN or is empty."""
    norms = filter_norms(x, dim) if x.ndim > 1 and dim is not None else x.new_zeros(0)
    if not x.numel():
        return torch.cat([x.new_full((len(_NUMBERS),), torch.nan), norms])
    ordered = x.flatten().sort().values
    last = len(ordered) - 1
    places = [q * last for q in (0, 0.25, 0.5, 0.75, 1)]
    quartiles = [
        torch.lerp(ordered[int(at)], ordered[int(at) + 1], at % 1) if at % 1 else ordered[int(at)] for at in places
    ]
    numbers = torch.stack([*quartiles, x.mean()])
    return torch.cat([torch.where(ordered[-1].isnan(), torch.nan, numbers), norms])  # NaN sorts last


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("statistics-*.npz"))


def _numpy() -> Any:
    if importlib.util.find_spec("numpy") is None:
        raise ModuleNotFoundError("statistics are written with numpy; run: pip install numpy")
    import numpy

    return numpy
