"""What a fused step moves, the least that it could move, and the time of a byte: one table for all optimizers.

    python benchmarks/traffic.py [--dtypes float32 bfloat16] [--threads N] [--seconds S] [--no-time] [--json FILE]

`bytes` are counted from what a rule declares (its slots, those that it only reads, whether it reads the parameter, the
master copy); `least` are the fused minima of the tables in our research notes, and a `ratio` above 1.15 is marked. Then
ResNet-18's tensors on the CPU, weights with the penalty and vectors without: ms per step, ns per byte moved, and the
latter over those of ProxSGD (for rules without a prox scale per element) and of AdaBreg in the same rounds, marked
above 1.3. Contestants take turns (measure.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import contestants as field
import measure
import report
import shapes
import torch
from measure import Result

import bregman_cuda as bc

Row = dict[str, Any]
MOST_BYTES, MOST_TIME = 1.15, 1.3  # over the least, and over the yardsticks' time per byte
TIME = ("ProxSGD", "AdaBreg")
DTYPES = ("float32", "bfloat16")
PENALTIES = ("l1", "group out", "group in")

# Optimizers that the report leaves out: they share kernels or state with a contestant of its own.
OTHERS: dict[str, Callable[..., bc.SparseOptimizer]] = {
    "ProxSGD momentum": lambda groups, **kw: bc.ProxSGD(groups, lr=1e-3, momentum=0.9, **kw),
    "AveragedProxSGD": lambda groups, **kw: bc.AveragedProxSGD(groups, lr=1e-3, **kw),
    "ProxAdam AMSGrad": lambda groups, **kw: bc.ProxAdam(groups, lr=1e-4, amsgrad=True, **kw),
    "RMDA momentum=1": lambda groups, **kw: bc.RMDA(groups, lr=1e-3, momentum=1.0, **kw),
    "RAMDA momentum=1": lambda groups, **kw: bc.RAMDA(groups, lr=1e-3, momentum=1.0, **kw),
    "SplitLBI": lambda groups, **kw: bc.SplitLBI(groups, lr=1e-3, **kw),
}


def masked(groups: Any, **kw: Any) -> bc.SparseOptimizer:
    """Every other element is held at zero."""
    optimizer = OTHERS["ProxSGD momentum"](groups, **kw)
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        optimizer.set_mask(p, torch.arange(p.numel()).view(p.shape) % 2 > 0)
    return optimizer


# Steps that move more than their rule declares: the optimizer, the penalty of the weights, and the bytes beside. A mask
# is a bit; groups that share k are visited again, which reads parameter (bf16: its master copy) and momentum, in fp32.
VARIANTS: dict[str, tuple[Callable[..., bc.SparseOptimizer], bc.Regularizer, float]] = {
    "ProxSGD momentum masked": (masked, bc.GroupLasso(1e-3), 1 / 8),
    "ProxSGD momentum envelope": (OTHERS["ProxSGD momentum"], bc.GroupEnvelope(1e-3, k=1), 8),
    "HSPG envelope": (field.OURS["HSPG"], bc.GroupEnvelope(1e-3, k=1), 8),
}
EVERYONE = field.OURS | OTHERS | {title: new for title, (new, *_) in VARIANTS.items()}

# Bytes per parameter of the best fused step, for fp32 and for bf16 parameters (with an fp32 master copy where the
# parameter is carried as state), as (reads + writes). g: gradient, p: parameter, w: master; others are fp32 state.
LEAST: dict[str, tuple[float, float]] = {
    # The dual is the master: g v (m) (s) -> v (m) (s) p. Research notes on structured optimizers, section 5, last rows.
    "LinBreg": (16, 12),
    "LinBreg momentum": (24, 20),
    "AdaBreg": (32, 28),
    # The same table: p g -> p; with one moment (HSPG, too), with two (Yang, ProxSSI, ProxGen), with AMSGrad's three.
    "ProxSGD": (12, 12),
    "ProxSGD momentum": (20, 20),
    "HSPG": (20, 20),
    # The same table: RigL's, with the mask in bits; WGSEF's, norms first, then scale: p g v -> v; p v -> p.
    "ProxSGD momentum masked": (20.125, 20.125),
    "ProxSGD momentum envelope": (28, 28),
    "HSPG envelope": (28, 28),
    "AveragedProxSGD": (28, 28),
    "ProxAdam": (28, 28),
    "ProxAdam AMSGrad": (36, 36),
    # The same table: g V x0 p -> V p; where momentum is 1 the parameter is a function of the state, and not read.
    "RMDA": (24, 24),
    "RMDA momentum=1": (20, 16),
    "RAMDA": (32, 32),
    "RAMDA momentum=1": (28, 24),
    # Research notes on SplitLBI, section 5: p g (m) z -> p (m) z. Its bf16 row has momentum; without it, 8 bytes less.
    "SplitLBI": (20, 20),
    "SplitLBI momentum": (28, 28),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--threads", type=int, default=2, help="(2); 1: count CPU time (busy machines)")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="time for the rounds of each dtype and penalty (15)"
    )
    parser.add_argument("--shapes", choices=shapes.SETS, default="resnet18")
    parser.add_argument("--no-time", action="store_true", help="bytes alone")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    return args


def counted(title: str, dtype: torch.dtype) -> Row:
    """What a step of an optimizer moves per parameter, and the least."""
    probe = torch.zeros(1, dtype=dtype)
    optimizer = EVERYONE[title]([probe])
    found, least = field.step_bytes(optimizer, probe), LEAST[title][DTYPES.index(str(dtype).removeprefix("torch."))]
    if title in VARIANTS:
        found += VARIANTS[title][2]
    if isinstance(optimizer, bc.HSPG):
        optimizer.half_space()
    rule = optimizer._rule(optimizer.param_groups[0])
    return {"optimizer": title, "rule": rule.name, "metric": rule.metric, "bytes": found, "least": least}


def variant(title: str, dtype: torch.dtype) -> field.Contestant:
    """A step with its own penalty, on parameters of its own: a mask erases some."""
    new, reg, _ = VARIANTS[title]
    make = lambda params: new(field.groups_of(params, reg), fused=True)  # noqa: E731
    return field.Contestant(title, "its own", "cpu", counted(title, dtype)["bytes"], make, shared=False)


def timed(dtype: torch.dtype, penalty: str, sizes: list[shapes.Shape], seconds: float) -> dict[str, Row]:
    """Time of every optimizer that takes the penalty, and over that of the yardsticks in the same rounds, by byte."""
    entrants = [c for c in field.ours("cpu", dtype, ("kernels",), field.OURS | OTHERS) if c.penalty == penalty]
    if penalty == "group out":  # theirs
        entrants += [variant(title, dtype) for title in VARIANTS]
    results, _ = measure.compare(entrants, sizes, "cpu", dtype, seconds)
    by_title = {r.contestant.optimizer: r for r in results}
    numel = shapes.numel(sizes)

    def over(result: Result, yardstick: Result) -> float:
        bytes_over = result.contestant.bytes / yardstick.contestant.bytes
        return median(a / b for a, b in zip(result.seconds, yardstick.seconds, strict=True)) / bytes_over

    return {
        title: {
            "ms": 1e3 * result.median,
            "ns/byte": 1e9 * result.median / numel / result.contestant.bytes,
            "rounds": len(result.seconds),
            **{f"vs {name}": over(result, by_title[name]) for name in TIME},
        }
        for title, result in by_title.items()
    }


def run(args: argparse.Namespace) -> list[Row]:
    """A row per dtype, penalty and optimizer."""
    rows = []
    sizes = shapes.SETS[args.shapes]()
    for name in args.dtypes:
        dtype = getattr(torch, name)
        rule_rows = [counted(title, dtype) for title in EVERYONE]
        if args.no_time:
            rows += [{"dtype": name, "penalty": "", **row} for row in rule_rows]
            continue
        for penalty in PENALTIES:
            print(f"{name}, {penalty}: {shapes.numel(sizes):,} parameters", file=sys.stderr, flush=True)
            times = timed(dtype, penalty, sizes, args.seconds)
            rows += [
                {"dtype": name, "penalty": penalty, **row, **times[row["optimizer"]]}
                for row in rule_rows
                if row["optimizer"] in times  # HSPG and the variants take groups alone
            ]
    for row in rows:
        row["ratio"] = row["bytes"] / row["least"]
        row["marks"] = marks(row)
    return rows


def marks(row: Row) -> list[str]:
    """Which figures are above their limit."""
    found = ["ratio"] if row["ratio"] > MOST_BYTES else []
    if "ms" in row:
        fair = TIME[1:] if row["metric"] else TIME  # ProxSGD has no prox scale per element to compute
        found += [f"vs {name}" for name in fair if row[f"vs {name}"] > MOST_TIME]
    return found


def cells(row: Row) -> list[str]:
    def marked(name: str, text: str) -> str:
        return f"{text} !" if name in row["marks"] else f"{text}  "

    found = [row["optimizer"], f"{row['bytes']:g}", f"{row['least']:g}"]
    found.append(marked("ratio", f"{row['ratio']:.2f}"))
    if "ms" in row:
        own = "" if row["metric"] else f"{row['vs ProxSGD']:.2f}"
        found += [f"{row['ms']:.2f}", f"{row['ns/byte']:.3f}", marked("vs ProxSGD", own)]
        found.append(marked("vs AdaBreg", f"{row['vs AdaBreg']:.2f}"))
    return found


def show(rows: list[Row], title: str) -> None:
    """One table, with rich if it is installed."""
    columns = ["optimizer", "bytes", "least", "ratio"]
    if "ms" in rows[0]:
        columns += ["ms", "ns/byte", *(f"vs {name}" for name in TIME)]
    parts = dict.fromkeys((row["dtype"], row["penalty"]) for row in rows)
    found: list[report.Section] = [
        ([" ".join(part).strip()], [(cells(row), False) for row in rows if (row["dtype"], row["penalty"]) == part])
        for part in parts
    ]
    report.print_table(title, columns, found, left=1)
    print(f"!: above {MOST_BYTES} times the least bytes, or {MOST_TIME} times a yardstick's time per byte")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.json:
        report.make_folder("--json", args.json.parent)
    info = bc.build_info()
    if not args.no_time and not info["cpu"]:
        print(f"no CPU kernels ({info['reasons'].get('cpu')}): --no-time counts bytes alone", file=sys.stderr)
        return 1
    where = report.machine("cpu")
    rows = run(args)
    timing = "" if args.no_time else f", {args.shapes}, {where['cpu']}, {where['threads']} threads"
    show(rows, f"Bytes per parameter and step{timing}, torch {where['torch']}, {where['date'][:10]}")
    if args.json:
        limits = {"bytes": MOST_BYTES, "time": MOST_TIME}
        args.json.write_text(json.dumps({"machine": where, "limits": limits, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
