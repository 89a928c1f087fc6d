"""The plot of a training: test accuracy and density against epochs, one colour per optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .train import Run

NAMES = {
    "adabreg": "AdaBreg",
    "linbreg": "LinBreg",
    "linbreg-momentum": "LinBreg, momentum",
    "proxsgd": "ProxSGD",
    "proxadam": "ProxAdam",
    "rmda": "RMDA",
    "ramda": "RAMDA",
    "splitlbi": "SplitLBI, projected",
    "adam": "Adam",
}
# Okabe-Ito colours, told apart by colour-blind readers; line styles serve prints in grey.
_STYLES = {
    "adabreg": ("#0072B2", "-"),
    "linbreg": ("#D55E00", "--"),
    "linbreg-momentum": ("#E69F00", (0, (5, 1, 1, 1))),
    "proxsgd": ("#009E73", "-."),
    "proxadam": ("#F0E442", "-"),
    "rmda": ("#CC79A7", "--"),
    "ramda": ("#CC79A7", "-"),
    "splitlbi": ("#56B4E9", "-."),
    "adam": ("#555555", ":"),
}


def save_plot(runs: Sequence[Run], path: Path) -> None:
    """Write a PNG with test accuracy on the left and density, on a log scale, on the right.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(10, 4), layout="constrained", dpi=150)
    accuracy, density = figure.subplots(1, 2)
    for run in runs:
        colour, style = _STYLES[run.setting.optimizer]
        epochs = [epoch.number for epoch in run.epochs]
        look = {"color": colour, "linestyle": style, "linewidth": 1.8, "label": NAMES[run.setting.optimizer]}
        accuracy.plot(epochs, [100 * epoch.test_accuracy for epoch in run.epochs], **look)
        density.plot(epochs, [100 * epoch.density for epoch in run.epochs], **look)
    accuracy.set(title="Test accuracy", ylabel="correct (%)", ylim=(_floor(runs), 100.5))
    density.set(title="Density of Linear and convolution weights", ylabel="non-zeros (%, log scale)", yscale="log")
    low = min((100 * epoch.density for run in runs for epoch in run.epochs if epoch.density > 0), default=1.0)
    density.set_ylim(low / 1.5, 150)
    density.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    density.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    density.yaxis.set_minor_formatter(NullFormatter())
    for axes in (accuracy, density):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    accuracy.legend(loc="lower right", frameon=False)
    figure.suptitle(_title(runs), fontsize=11)
    figure.savefig(path)


def _title(runs: Sequence[Run]) -> str:
    first = runs[0]
    return f"{first.data}, {first.setting.model}, regularizer {first.setting.reg}, seed {first.seed}"


def _floor(runs: Sequence[Run]) -> float:
    """Lower end of the accuracy axis: below the curves after their first fifth, where the differences are."""
    late = [e.test_accuracy for run in runs for e in run.epochs[max(1, len(run.epochs) // 5) :]]
    return max(0.0, 10 * ((100 * min(late, default=0.0) - 5) // 10))
