"""Problems on lists of tensors for test_shards.py: `place` puts one on the ranks; without it one process has all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import registry
import torch
from torch import Tensor, nn

from bregman_cuda import (
    HSPG,
    L1,
    RAMDA,
    RMDA,
    AdaBreg,
    GroupEnvelope,
    GroupLasso,
    Nuclear,
    ProxAdam,
    ProxSGD,
    RigL,
)

# Lists of tensors: the edges of dim 0 and dim 1 on 2 and 4 ranks, with uneven and empty parts.
SHAPES = [(17, 8), (3, 5), (1, 7), (5, 4, 3)]
COLLECTIVES = {"rows": 1, "columns": 1, "copies": 0, "whole groups": 0, "2d": 2, "2d rows": 2, "hsdp": 1, "strided": 2}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# Penalties that need all of a tensor, or of several, and rules for some penalties or of plain torch.
WHOLE = {
    "envelope_out": registry.RegCase(lambda lam: GroupEnvelope(lam, 1, "out"), 1),
    "envelope_in": registry.RegCase(lambda lam: GroupEnvelope(lam, 2, "in", "sqrt_size"), 2),
    "nuclear": registry.RegCase(Nuclear, 2),
}
SHARED = {
    "envelope_all": registry.RegCase(lambda lam: GroupEnvelope(lam, 5, "in", scope="all"), 2),
    "nuclear_every": registry.RegCase(lambda lam: Nuclear(lam, every=2), 2),
}
RULES = registry.EVERY_RULE | {
    "ramda_pg": registry.RuleCase(RAMDA, {"lr": 0.1, "momentum": 0.25, "solver": "pg"}, "ramda_pg", dual=False)
}


def regularizers(rule: str, layout: str) -> dict[str, registry.RegCase]:
    known = "ramda_averaged" if rule == "ramda_pg" else rule
    found = {name: case for name, case in registry.REGULARIZERS.items() if registry.takes(known, name)}
    if rule == "ramda_pg":
        found = {name: case for name, case in found.items() if name in {"none", *registry.CONVEX, *registry.SCALAR}}
    if layout == "whole groups":
        return {name: found[name] for name in ("l1", "none", "group_out") if name in found}
    if not RULES[rule].metric:
        found |= {name: case for name, case in WHOLE.items() if rule != "hspg" or name != "nuclear"}
    shared = (
        SHARED if rule.startswith("proxsgd") else {"envelope_all": SHARED["envelope_all"]} if rule == "hspg" else {}
    )
    return found | shared


def collectives_of(rule: str, layout: str) -> int:
    """One for each process group and round: a group's root in a metric takes up to 10."""
    return COLLECTIVES[layout] * (10 if RULES[rule].metric else 1)


def tensors(rule: str, layout: str, dtype: torch.dtype, place: Callable[[Tensor], Tensor] | None) -> dict[str, Any]:
    """Three steps of a rule with every regularizer, each in a group of its own; `place` shards a tensor."""
    generator = torch.Generator().manual_seed(0)
    cases = regularizers(rule, layout)
    groups: list[dict[str, Any]] = []
    for case in cases.values():
        values = [registry.values(s, dtype, generator, 0.5) for s in SHAPES if len(s) >= case.min_ndim]
        groups.append({"params": [nn.Parameter(v if place is None else place(v)) for v in values], "reg": case(0.2)})
    optimizer = RULES[rule].make(groups, None, count_nonzeros=True)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in enumerate(params[::3]):
        mask = torch.rand(p.shape, generator=generator) < 0.7
        optimizer.set_mask(p, mask if place is None or number % 2 else place(mask))
    for last in (False, False, True):
        for p in params:
            grad = registry.values(tuple(p.shape), dtype, generator, 0.1)
            p.grad = grad if place is None else place(grad)
        with collectives() if last and place is not None else contextlib.nullcontext() as seen:  # it is slow
            optimizer.step()
    return {
        "collectives": 0 if seen is None else seen.get_total_counts(),
        "exact": [
            name not in WHOLE | SHARED and not registry.searches(optimizer, group)
            for name, group in zip(cases, optimizer.param_groups)
            for _ in group["params"]
        ],
        "params": [whole(p.detach()) for p in params],
        "state": [
            {key: whole(t) for key, t in optimizer.state[p].items() if key != "mask"} for p in params
        ],
        "counts": [(r.name, r.nonzeros, r.nonzero_groups, r.groups) for r in optimizer.density().rows],
    }  # fmt: skip


def collectives() -> Any:
    from torch.distributed.tensor.debug import CommDebugMode

    return CommDebugMode()


def tensor_cases(world: int) -> list[tuple[str, str, torch.dtype]]:
    """Every rule on the rows of two ranks; every layout, number of ranks and dtype with some."""
    kinds = [*COLLECTIVES][: 4 if world == 2 else None]
    cases = [(rule, "rows", torch.float32) for rule in (RULES if world == 2 else ("linbreg", "proxsgd", "hspg"))]
    cases += [(rule, kind, torch.float32) for rule in ("adabreg", "proxadam") for kind in kinds[1:]]
    cases += [("ramda_averaged", "rows", d) for d in registry.DTYPES[1:]]
    return [*cases, ("proxsgd", kinds[-1], torch.float32), *(("proxsgd", "rows", d) for d in registry.DTYPES[1:])]


ENDS = {"each": GroupLasso(0.05, "in"), "all": GroupEnvelope(0.05, 2, "in", scope="all")}


def ended(name: str, place: Callable[[Tensor], Tensor] | None) -> list[Tensor]:
    """HSPG in two phases that leave six groups of all tensors or two per tensor, and one where a mask holds the others
    already; then three of all of them."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    params = [nn.Parameter(v if place is None else place(v)) for v in values]
    optimizer = HSPG(params, lr=0.1, reg=ENDS[name], epsilon=0.1, start=1, end=3, k=2 if name == "each" else 6)
    mask = torch.arange(SHAPES[1][1]).expand(SHAPES[1]) == 3
    optimizer.set_mask(params[1], mask.contiguous())
    for _ in range(4):
        for p in params:
            grad = torch.randn(p.shape, generator=generator)
            p.grad = grad if place is None else place(grad)
        optimizer.step()
    first = [whole(p.detach()).clone() for p in params]
    optimizer.keep_top(3, scope="all")
    return [*first, *(whole(p.detach()) for p in params)]


def rigl(make: Callable[[Any], Any], place: Callable[[Tensor], Any] | None) -> dict[str, Any]:
    """RigL with updates of masks; on ranks the first one's generator counts. The second half resumes."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    params = [nn.Parameter(v if place is None else place(v)) for v in values]
    seed = 0 if place is None else torch.distributed.get_rank()
    made: dict[str, Any] = dict(density=0.4, alpha=0.9, every=2, end=7)
    optimizer = make(params)
    method = RigL(params, optimizer, **made, generator=torch.Generator().manual_seed(seed))
    for number in range(6):
        if number == 3:
            saved, kept = method.state_dict(), [p.detach().clone() for p in params]
            method = RigL(params, optimizer, **made, generator=torch.Generator().manual_seed(7))
            with torch.no_grad():
                for p, value in zip(params, kept):
                    p.copy_(value)
            method.load_state_dict(saved)
        for p in params:
            grad = torch.randn(p.shape, generator=generator)
            p.grad = grad if place is None else place(grad)
        method.step()
    return {
        "params": [whole(p.detach()) for p in params],
        "masks": [whole(mask) for mask in method.masks],
        "packed": list(method.state_dict()["masks"].values()),
    }


RIGL = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5),
    "adabreg": lambda p: AdaBreg(p, lr=0.01, reg=L1(0.1)),
}


class LoggedGroups(GroupLasso):
    """A prox of its own."""

    def prox(self, x: Tensor, step: Any) -> Tensor:
        return super().prox(x, step)


class HalvedEnvelope(GroupEnvelope):
    """A prox of several tensors of its own."""

    def prox_together(self, points: Any, step: Any) -> list[Tensor]:
        return [0.5 * x for x in super().prox_together(points, step)]


def changed_reg(reg: Any) -> Callable[[Any, Any], None]:
    return lambda p, optimizer: optimizer.param_groups[0].update(reg=reg)


# An optimizer, and what changes after two of its five steps.
CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "every": (lambda p: ProxSGD([p], 0.1, Nuclear(0.3, every=2)), changed_reg(Nuclear(0.3))),
    "kind": (lambda p: ProxSGD([p], 0.1, Nuclear(0.3)), changed_reg(GroupLasso(0.1, "in"))),
    "groups": (lambda p: ProxAdam([p], 0.1, GroupLasso(0.1, "in")), changed_reg(GroupLasso(0.1, ()))),
    "phase": (lambda p: HSPG([p], 0.1, GroupEnvelope(0.1, 2, "in")), lambda p, optimizer: optimizer.half_space()),
    "momentum": (
        lambda p: RMDA([p], 0.1, GroupLasso(0.1, "in"), 0.5),
        lambda p, optimizer: optimizer.param_groups[0].update(momentum=1.0),
    ),
    "own prox": (lambda p: ProxAdam([p], 0.1, LoggedGroups(0.1, "in")), changed_reg(LoggedGroups(0.2, "in"))),
    "own prox_together": (
        lambda p: ProxSGD([p], 0.1, HalvedEnvelope(0.1, 2, "in", scope="all")),
        changed_reg(HalvedEnvelope(0.1, 1, "in", scope="all")),
    ),
}


def changing(name: str, place: Callable[[Tensor], Any] | None) -> Tensor:
    """A parameter whose optimizer changes in mid-training."""
    generator = torch.Generator().manual_seed(0)
    make, change = CHANGES[name]
    value = torch.randn(9, 6, generator=generator)
    p = nn.Parameter(value if place is None else place(value))
    optimizer = make(p)
    for number in range(5):
        if number == 2:
            change(p, optimizer)
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = grad if place is None else place(grad)
        optimizer.step()
    return whole(p.detach())


def turned_wide(place: Callable[[Tensor], Any] | None) -> Tensor:
    """A module that is made float64 between steps."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(6, 9, bias=False)
    value = torch.randn(9, 6, generator=generator)
    module.weight = nn.Parameter(value if place is None else place(value))
    fused = False if place is None else None  # in plain torch, as cut groups are
    optimizer = ProxAdam(module.parameters(), 0.1, GroupLasso(0.1, "in"), fused=fused)
    for number in range(5):
        if number == 2:
            module.double()
        grad = torch.randn(9, 6, generator=generator, dtype=torch.float64).to(module.weight.dtype)
        module.weight.grad = grad if place is None else place(grad)
        optimizer.step()
    return whole(module.weight.detach())
