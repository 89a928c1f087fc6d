"""The train command: options, progress, table, plot and JSON."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ._backend import build_info
from .experiments.data import DataError, Dataset, load
from .experiments.models import MODELS
from .experiments.plot import NAMES, save_plot
from .experiments.settings import (
    OPTIMIZERS,
    REGULARIZERS,
    Setting,
    default_model,
    default_setting,
    paper_figures,
    uses,
)
from .experiments.train import Run, make_model, make_optimizer, train

_DEVICES = ("auto", "cpu", "cuda")
_DEFAULT_OPTIMIZERS = ("adabreg", "linbreg", "adam")

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)


@app.command(name="train")
def train_command(
    data: Annotated[str, typer.Option(help="digits, fashion-mnist, or a folder with the four IDX files.")] = "digits",
    model: Annotated[Optional[str], typer.Option(metavar="|".join(MODELS), help="Default: what fits the data.")] = None,
    optimizer: Annotated[
        Optional[list[str]],
        typer.Option(metavar="|".join(OPTIMIZERS), help="Repeat it, or all. Default: adabreg, linbreg and adam."),
    ] = None,
    reg: Annotated[
        Optional[str],
        typer.Option(metavar="|".join(REGULARIZERS), help="Default: l1; group-kernel for the convnet."),
    ] = None,
    lam: Annotated[Optional[float], typer.Option(help="Strength of the regularizer.")] = None,
    lr: Annotated[Optional[float], typer.Option(help="Step size.")] = None,
    delta: Annotated[Optional[float], typer.Option(help="Elastic-net parameter of LinBreg and AdaBreg.")] = None,
    density: Annotated[Optional[float], typer.Option(help="Share of weights that are not zero at the start.")] = None,
    epochs: Annotated[Optional[int], typer.Option(min=1, help="Passes over the data.")] = None,
    batch_size: Annotated[Optional[int], typer.Option(min=1, help="Samples per step.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the initialisation and the order of the samples.")] = 0,
    fused: Annotated[
        Optional[bool],
        typer.Option("--fused/--no-fused", help="Kernels or an error / plain torch. Default: what serves."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="|".join(_DEVICES), help="auto: cuda where there is one.")] = "auto",
    threads: Annotated[
        Optional[int], typer.Option(min=1, help="CPU threads. Default: 1 for the digits, else torch's choice.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for training.png and training.json.")] = Path("bregman-train"),
) -> None:
    """Train a sparse network from scratch with one or more optimizers, and compare them.

    Options that are not given come from tuned settings for the data, the model and each optimizer. One that only some
    of several optimizers look at leaves the others as they are: Adam stays dense.
    """
    for option, values, known in (
        ("--model", [model], MODELS),
        ("--optimizer", optimizer, (*OPTIMIZERS, "all")),
        ("--reg", [reg], REGULARIZERS),
        ("--device", [device], _DEVICES),
    ):
        _check_choices(option, values or (), known)
    _require_extras(data)
    names = _optimizer_names(optimizer or ())
    given = dict(lam=lam, lr=lr, delta=delta, density=density, epochs=epochs, batch_size=batch_size)
    _check_use(names, reg, given)
    dataset = load(data)
    model_name = model or default_model(data, dataset.train_x.shape[2:])
    settings = [default_setting(data, model_name, name, reg, **given) for name in names]
    where = _device(device, fused)
    for setting in settings:  # whatever is wrong with an option shows here, before anything is trained or written
        make_optimizer(make_model(setting, dataset, seed), setting, fused)
    plot, numbers = out / "training.png", out / "training.json"
    _check_writable(out, (plot, numbers))
    if threads or data == "digits":
        torch.set_num_threads(threads or 1)  # batches of 32 digits are too small to share: two threads are slower
    console = Console(width=None if sys.stdout.isatty() else 120)
    runs = _train_all(settings, dataset, seed, fused, where, console)
    console.print(_table(runs))
    save_plot(runs, plot)
    numbers.write_text(json.dumps(_numbers(runs, where), indent=1) + "\n")
    console.print(f"wrote {plot} and {numbers}", soft_wrap=True, highlight=False)


def run_train(arguments: Sequence[str]) -> int:
    """Run the train command; wrong input ends in one line on stderr and status 2."""
    try:
        app(args=list(arguments), prog_name="python -m bregman_cuda train")
    except (DataError, ValueError, TypeError, RuntimeError, ModuleNotFoundError, OSError) as error:
        print_error(error)  # an OSError: the disk is full, or the folder of --out gone since it was checked
        return 2
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def print_error(error: Exception) -> None:
    """One line on stderr."""
    Console(stderr=True).print(f"error: {error}", soft_wrap=True, highlight=False, markup=False)


def _check_choices(option: str, values: Sequence[str | None], known: Sequence[str]) -> None:
    if unknown := [value for value in values if value is not None and value not in known]:
        raise ValueError(f"{option} {unknown[0]} is unknown; use one of {', '.join(known)}")


def _check_use(names: Sequence[str], reg: str | None, given: Mapping[str, float | None]) -> None:
    """Refuse an option that none of the optimizers looks at: with it or without, the numbers would be the same."""
    for option, value in {"reg": reg, **given}.items():
        if value is None:
            continue
        named = f"--{option.replace('_', '-')} {value}"
        if not any(uses(name, option) for name in names):
            who = ", ".join(names)
            raise ValueError(f"{named} does not concern {who}; leave it out, or add an --optimizer it does")
        if option == "lam" and reg == "none":
            raise ValueError(f"{named} is the strength of a regularizer, and --reg none has none; leave one out")


def _check_writable(folder: Path, files: Sequence[Path]) -> None:
    """Make the folder, and try to open the files: what is wrong shows before hours of training, not after them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be made a folder ({error.strerror}); choose another one") from None
    for file in files:
        there = file.exists() or file.is_symlink()
        try:
            with file.open("ab"):  # what an earlier training wrote stays until there is something new
                pass
        except OSError as error:
            why = f"{file.name} cannot be written there ({error.strerror})"
            raise ValueError(f"--out {folder}: {why}; remove what is in its way, or choose another folder") from None
        if not there:
            file.unlink()


def _require_extras(data: str) -> None:
    needed = ["matplotlib", *(["sklearn"] if data == "digits" else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ModuleNotFoundError(f"train needs {', '.join(missing)}; run: pip install 'bregman_cuda[train]'")


def _optimizer_names(chosen: Sequence[str]) -> list[str]:
    if "all" in chosen:
        return list(OPTIMIZERS)
    return list(dict.fromkeys(chosen or _DEFAULT_OPTIMIZERS))


def _device(name: str, fused: bool | None) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device; use --device cpu")
    kind = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    info = build_info()
    if fused and not info[kind]:
        why = info["reasons"].get(kind, "unknown reason")
        raise ValueError(f"--fused: there are no compiled {kind} kernels ({why}); use --no-fused or reinstall")
    return torch.device(kind)


def _train_all(
    settings: Sequence[Setting], data: Dataset, seed: int, fused: bool | None, device: torch.device, console: Console
) -> list[Run]:
    columns = (
        TextColumn("{task.description:>18}"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    runs = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for setting in settings:
            batches = math.ceil(len(data.train_x) / setting.batch_size)
            task = progress.add_task(NAMES[setting.optimizer], total=setting.epochs * batches)
            tick = partial(progress.advance, task)
            runs.append(train(setting, data, seed=seed, fused=fused, device=device, on_batch=tick))
    return runs


def _table(runs: Sequence[Run]) -> Table:
    first = runs[0]
    title = f"{first.data}, {first.setting.model}, seed {first.seed}, CPU threads {torch.get_num_threads()}"
    table = Table(title=title, title_justify="left")
    table.add_column("optimizer")
    convolutions = any(run.kernel_density is not None for run in runs)
    figures = [paper_figures(run.data, run.setting) for run in runs]
    headings = ["test accuracy", "density", *(["live kernels"] if convolutions else []), "s/epoch", "in optimizer"]
    for heading in [*headings, *(["paper, 100 epochs"] if any(figures) else [])]:
        table.add_column(heading, justify="right")
    for run, figure in zip(runs, figures, strict=True):
        cells = [f"{run.last.test_accuracy:.1%}", f"{run.last.density:.1%}"]
        cells += [f"{run.kernel_density:.1%}"] if convolutions else []
        cells += [f"{run.seconds_per_epoch:.2f}", f"{run.optimizer_share:.0%}"]
        cells += [figure or ""] if any(figures) else []
        name = NAMES[run.setting.optimizer] + (" (diverged)" if run.diverged else "")
        table.add_row(name, *cells)
    return table


def _numbers(runs: Sequence[Run], device: torch.device) -> dict[str, object]:
    info = build_info()
    return {
        "bregman_cuda": info["version"],
        "torch": info["torch"],
        "kernels": bool(info[device.type]),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "data": runs[0].data,
        "seed": runs[0].seed,
        "runs": [
            {
                **asdict(run.setting),
                "diverged": run.diverged,
                "test_accuracy": run.last.test_accuracy,
                "density": run.last.density,
                "linear_density": run.linear_density,
                "kernel_density": run.kernel_density,
                "seconds_per_epoch": run.seconds_per_epoch,
                "optimizer_share": run.optimizer_share,
                "density_by_tensor": {row.name: row.density for row in run.weights.rows} if run.weights else {},
                "epochs": [_finite(asdict(epoch)) for epoch in run.epochs],
            }
            for run in runs
        ],
    }


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
