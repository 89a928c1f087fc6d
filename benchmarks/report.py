"""Benchmarks in one command: a table, a plot and a JSON.

    python benchmarks/report.py [--quick] [--out DIR] [--device cpu|cuda] [--dtype float32] [--shapes resnet18 ...]
                                   [--threads N] [--seconds S]

The contestants take turns in every round; a figure is the median over the rounds. `vs Adam` is the step time over
that of torch's fused Adam in the same round: on a noisy machine it is the figure to trust. GB/s are the declared
bytes per parameter (the fewest that the step has to read and write) over the time, `of copy` their share of what a
copy of as many numbers reaches, read plus written, in the same rounds. Launches are kernels on a GPU, operator calls
on the CPU; `host` is the time of a step on as many one-element tensors (on a GPU: until step() returns).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contestants as field
import measure
import peers
import shapes
import torch
from contestants import YARDSTICK, Contestant
from measure import Result

import bregman_cuda as bc

Row = dict[str, Any]
COLUMNS = ("optimizer", "driver", "ms", "vs Adam", "bytes/param", "GB/s", "of copy", "launches", "host us")
QUICK = {  # optimizer, penalty and driver of the short run; a None matches everything
    ("LinBreg", None, "kernels"), ("LinBreg momentum", "l1", "kernels"), ("AdaBreg", None, "kernels"),
    ("ProxSGD", None, "kernels"), ("ProxAdam", "l1", "kernels"), ("ProxAdam", "group out", "kernels"),
    ("ProxAdam", "group in", "kernels"), ("RMDA", "l1", "kernels"), ("RAMDA", "l1", "kernels"),
    ("RAMDA", "group in", "kernels"), ("SplitLBI momentum", "l1", "kernels"),
    ("SplitLBI momentum", "group out", "kernels"), ("HSPG", "group out", "kernels"),
    ("LinBreg", "l1", "reference"), ("AdaBreg", "l1", "reference"),
    ("LinBreg", "l1", "bregman-learning"), ("AdaBreg", "l1", "bregman-learning"),
    ("FTRL", "l1", "pytorch_optimizer"),
    ("torch SGD", None, "fused"), ("torch Adam", None, "foreach"), ("torch Adam", None, "fused"),
}  # fmt: skip


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-18 and tiny tensors, main contestants")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for report.json and report.png (out)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument(
        "--shapes", nargs="+", choices=shapes.SETS, help="default: what the device can bear, without thousand"
    )
    parser.add_argument("--threads", type=int, help="on the CPU; 1: count CPU time (busy machines)")
    parser.add_argument("--seconds", type=float, help="time for the rounds of each set (8; --quick: 6)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device; use --device cpu")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.shapes is None:
        args.shapes = ["resnet18", "tiny"] if args.quick else shapes.usual(args.device)
    args.seconds = args.seconds or (6.0 if args.quick else 8.0)
    return args


def make_folder(option: str, folder: Path) -> None:
    """Ends the program, before anything is measured, where it could not write what it found."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"{option}: {folder} cannot be made a folder ({error.strerror}); choose another one")


def choose(device: str, dtype: torch.dtype, quick: bool) -> list[Contestant]:
    """The contestants of a run, torch's first."""
    everyone = field.torchs(dtype) + field.ours(device, dtype) + peers.peers(dtype)
    if not quick:
        return everyone

    def wanted(c: Contestant) -> bool:
        driver = "kernels" if c.driver == device else c.driver
        return not {(c.optimizer, None, driver), (c.optimizer, c.penalty, driver)}.isdisjoint(QUICK)

    return [c for c in everyone if wanted(c)]


def heats(everyone: list[Contestant], numel: int, device: str) -> list[list[Contestant]]:
    """Splits the field so that what races together fits in half the free memory; the yardstick is in every heat."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    room = free / 2 / numel - 48  # per parameter; the rest is for parameters, gradients, the copy and the reference
    yardstick = [c for c in everyone if c.name == YARDSTICK]
    packed: list[list[Contestant]] = [[*yardstick]]
    for c in (c for c in everyone if c not in yardstick):
        if len(packed[-1]) > len(yardstick) and sum(x.bytes for x in packed[-1]) + c.bytes > room:
            packed.append([*yardstick])
        packed[-1].append(c)
    return packed


def row(result: Result, name: str, numel: int, copy: float) -> Row:
    c, speed = result.contestant, result.contestant.bytes * numel / result.median / 1e9
    return {
        "shapes": name, "optimizer": f"{c.optimizer} {c.penalty}".strip(), "driver": c.driver,
        "ms": 1e3 * result.median, "vs Adam": result.ratio, "bytes/param": c.bytes, "GB/s": speed,
        "of copy": speed / copy, "launches": result.calls, "host us": 1e6 * result.host, "rounds": len(result.seconds),
    }  # fmt: skip


def run(args: argparse.Namespace, where: Row) -> tuple[list[Row], dict[str, float]]:
    """Rows of all sets, and the copy's GB/s per set; report.json is written after every set."""
    dtype, rows, copies = getattr(torch, args.dtype), [], {}
    everyone = choose(args.device, dtype, args.quick)
    for name in args.shapes:
        sizes = shapes.SETS[name]()
        numel = shapes.numel(sizes)
        for number, heat in enumerate(heats(everyone, numel, args.device)):
            what = f"{name}: {numel:,} parameters, {len(sizes)} tensors, {len(heat)} contestants"
            print(what, file=sys.stderr, flush=True)
            results, copies[name] = measure.compare(heat, sizes, args.device, dtype, args.seconds)
            new = [r for r in results if number == 0 or r.contestant.name != YARDSTICK]
            rows += [row(r, name, numel, copies[name]) for r in new]
        content = {"machine": where, "device": args.device, "dtype": args.dtype, "copy GB/s": copies}
        content |= {"rows": rows, "targets": targets(rows)}
        (args.out / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    return rows, copies


def machine(device: str) -> Row:
    """Where and with what the figures were measured."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cpu = next(iter(names), platform.processor())
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), "cpu": cpu,
        "cores": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.platform(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "python": platform.python_version(), "torch": torch.__version__, "bregman_cuda": bc.build_info(),
    }  # fmt: skip


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def cells(r: Row) -> list[str]:
    ratio = "" if r["vs Adam"] is None else f"{r['vs Adam']:.2f}"
    return [
        r["optimizer"], r["driver"], f"{r['ms']:.3f}", ratio, f"{r['bytes/param']:g}", f"{r['GB/s']:.2f}",
        f"{r['of copy']:.0%}", str(r["launches"]), f"{r['host us']:.0f}",
    ]  # fmt: skip


def sections(rows: list[Row], copies: dict[str, float]) -> list[tuple[str, list[Row]]]:
    """A title and the rows, fastest first, of every set."""
    return [
        (f"{name}  ({shapes.numel(shapes.SETS[name]()):,} parameters; copy {copies[name]:.1f} GB/s)",
         sorted((r for r in rows if r["shapes"] == name), key=lambda r: r["ms"]))
        for name in copies
    ]  # fmt: skip


Section = tuple[list[str], list[tuple[list[str], bool]]]  # a heading, and rows with whether they stand out


def print_table(title: str, columns: Sequence[str], sections: Sequence[Section], left: int) -> None:
    """A table whose first `left` columns are left-aligned, with rich if it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        for heading, group in sections:
            lines = [list(columns), *(line for line, _ in group)]
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            print("\n" + "  ".join(heading))
            for line in lines:
                padded = zip(line, widths, range(len(line)), strict=True)
                print("  ".join(cell.ljust(w) if i < left else cell.rjust(w) for cell, w, i in padded))
        return
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=True)
    for (name, *rest), group in sections:
        table.add_section()
        table.add_row(f"[bold]{name}[/]", *(f"[dim]{text}[/]" for text in rest))
        for line, stands_out in group:
            table.add_row(*line, style="green" if stands_out else "")
    console = Console()
    if console.width < 120:  # a pipe has 80 columns, which would cut the figures
        console = Console(width=120)
    console.print(table)


def show(rows: list[Row], copies: dict[str, float], where: Row) -> None:
    """One table of all sets."""
    what = where["gpu"] or f"{where['cpu']}, {where['threads']} threads"
    title = f"One step: {what}, torch {where['torch']}, {where['date'][:10]}"
    found: list[Section] = [
        ([heading.partition("  ")[0], f"copy {copies[group[0]['shapes']]:.1f} GB/s"],
         [(cells(r), r["driver"] in ("cpu", "cuda")) for r in group])
        for heading, group in sections(rows, copies)
    ]  # fmt: skip
    print_table(title, COLUMNS, found, left=2)


def targets(rows: list[Row]) -> list[str]:
    """The ratios that the project promises, as measured in this run."""
    mine = {(r["shapes"], r["optimizer"]): r for r in rows if r["driver"] in ("cpu", "cuda")}
    plain = {(r["shapes"], r["optimizer"]): r for r in rows if r["driver"] == "reference"}
    adam = {r["shapes"]: r for r in rows if f"{r['optimizer']}, {r['driver']}" == YARDSTICK}
    lines = []

    def say(what: str, row: Row | None, figure: str, limit: float, over: Row | None = None, at_most: bool = True):
        if row is None or (over is None and figure in ("ms", "host us")):
            return
        value = row[figure] / (over[figure] if over else 1)
        met = value <= limit if at_most else value >= limit
        verdict = "met   " if met else "MISSED"
        lines.append(f"{verdict} {what}: {value:.2f} (wanted {'<=' if at_most else '>='} {limit})")

    for name, limit in (("AdaBreg", 1.15), ("LinBreg", 0.60)):
        l1 = mine.get(("resnet18", f"{name} l1"))
        say(f"{name} l1 / torch fused Adam, resnet18", l1, "vs Adam", limit)
        if l1 is not None:
            reference = plain.get(("resnet18", f"{name} l1"))
            say(f"{name} l1 reference / kernels, resnet18", reference, "ms", 5, over=l1, at_most=False)
        for penalty in ("group out", "group in", "sparse-group"):
            say(f"{name} {penalty} / l1, resnet18", mine.get(("resnet18", f"{name} {penalty}")), "ms", 1.3, over=l1)
        say(f"{name} l1 / torch fused Adam, tiny", mine.get(("tiny", f"{name} l1")), "vs Adam", 0.2)
        for sizes in ("resnet50", "thousand"):
            what = f"{name} l1 host time / torch fused Adam's, {sizes}"
            say(what, mine.get((sizes, f"{name} l1")), "host us", 0.25, over=adam.get(sizes))
        say(f"{name} l1, share of a copy, large", mine.get(("large", f"{name} l1")), "of copy", 0.9, at_most=False)
    return lines


def plot(rows: list[Row], copies: dict[str, float], where: Row, path: Path) -> None:
    """Bars of step time over torch's fused Adam, a panel per set, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"cpu": "#2a7f3f", "cuda": "#2a7f3f", "reference": "#9bc8a5"}
    colours |= dict.fromkeys(("bregman-learning", "pytorch_optimizer"), "#c8782a")
    groups = sections(rows, copies)
    longest = max(len(group) for _, group in groups)
    size = (5.5 * len(groups), 1.6 + 0.22 * longest)
    figure, axes = plt.subplots(1, len(groups), figsize=size, squeeze=False)
    for axis, (heading, group) in zip(axes[0], groups, strict=True):
        group = sorted(group, key=lambda r: r["vs Adam"])
        adam = next(r["bytes/param"] for r in group if (r["optimizer"], r["driver"]) == ("torch Adam", "fused"))
        labels = [f"{r['optimizer']}, {r['driver']}" for r in group]
        values = [r["vs Adam"] for r in group]
        axis.barh(range(len(group)), values, color=[colours.get(r["driver"], "#5577aa") for r in group])
        by_bytes = [r["bytes/param"] / adam for r in group]
        axis.plot(by_bytes, range(len(group)), "|", color="black", markersize=9, label="by bytes alone")
        for y, value in enumerate(values):
            axis.text(value * 1.06, y, f"{value:.2f}", va="center", fontsize=7)
        axis.set_yticks(range(len(group)), labels, fontsize=7)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlim(right=2.2 * max(values))
        axis.axvline(1, color="black", linewidth=0.6)
        axis.set_xlabel("step time / torch's fused Adam", fontsize=8)
        axis.set_title(heading.replace("  ", "\n"), fontsize=8)
        axis.legend(fontsize=7, loc="upper right")
    what = where["gpu"] or f"{where['cpu']}, {where['threads']} threads"
    figure.suptitle(f"{what}, torch {where['torch']}, {where['date'][:10]}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    make_folder("--out", args.out)
    if peers.WHY:
        print(f"left out: {peers.WHY}", file=sys.stderr)
    info = bc.build_info()
    if not info[args.device]:
        print(f"left out: the {args.device} kernels ({info['reasons'].get(args.device)})", file=sys.stderr)
    where = machine(args.device)
    rows, copies = run(args, where)
    written = "report.json"
    try:
        plot(rows, copies, where, args.out / "report.png")
        written += " and report.png"
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)
    show(rows, copies, where)
    print(*targets(rows), f"{written} are in {args.out}/", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
