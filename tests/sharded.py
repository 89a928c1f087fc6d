"""What one rank of test_shards.py does, and the same problems for a single process without shards."""

from __future__ import annotations

import contextlib
import copy
import datetime
import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import registry
import torch
from harness import same_bits
from test_ecosystem import batches, network
from torch import Tensor, nn

import bregman_cuda
from bregman_cuda import (
    HSPG,
    L1,
    RAMDA,
    RMDA,
    AdaBreg,
    GroupEnvelope,
    GroupLasso,
    LinBreg,
    Nuclear,
    ProxAdam,
    ProxSGD,
    RigL,
    SparseGroupLasso,
    SplitLBI,
)

# Networks under FSDP2: an optimizer, its regularizer, and whether the first layer is masked.
CASES: dict[str, tuple[Callable[[Any], Any], Callable[[], Any], bool]] = {
    "linbreg-l1": (lambda p: LinBreg(p, lr=0.1, momentum=0.9, count_nonzeros=True), lambda: L1(0.1), True),
    "adabreg-out": (lambda p: AdaBreg(p, lr=1e-2), lambda: SparseGroupLasso(0.05, 0.5, "out"), False),
    "adabreg-in": (lambda p: AdaBreg(p, lr=1e-2), lambda: SparseGroupLasso(0.05, 0.5, "in"), True),
    "proxsgd-out": (lambda p: ProxSGD(p, lr=0.1, momentum=0.9), lambda: GroupLasso(0.1), False),
    "proxsgd-all": (lambda p: ProxSGD(p, lr=0.1, momentum=0.5), lambda: GroupLasso(0.1, (), "none"), False),
    "reference": (lambda p: AdaBreg(p, lr=1e-2, fused=False), lambda: GroupLasso(0.05, "out"), False),
    "rmda-out": (lambda p: RMDA(p, lr=0.1, momentum=0.25), lambda: GroupLasso(0.1, "out"), False),
    "proxadam-in": (lambda p: ProxAdam(p, lr=1e-2), lambda: GroupLasso(0.05, "in"), True),
    "linbreg-nuclear": (lambda p: LinBreg(p, lr=0.1), lambda: Nuclear(0.1), False),
    "hspg": (
        lambda p: HSPG(p, lr=0.1, momentum=0.5, epsilon=0.1, start=2),
        lambda: GroupEnvelope(0.1, 2, "in"),
        False,
    ),
    "splitlbi-l1": (lambda p: SplitLBI(p, lr=0.1, kappa=2.0, mu=1.0, momentum=0.5), lambda: L1(0.1), True),
}
MASK = torch.arange(17 * 6).view(17, 6) % 3 > 0

# Lists of tensors: the edges of dim 0 and dim 1 on 2 and 4 ranks, with uneven and empty parts.
SHAPES = [(17, 8), (3, 5), (1, 7), (5, 4, 3)]
COLLECTIVES = {"rows": 1, "columns": 1, "copies": 0, "whole groups": 0, "2d": 2, "2d rows": 2, "hsdp": 1, "strided": 2}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def optimizer_for(name: str, model: nn.Module, masked: bool = True) -> Any:
    make, reg, has_mask = CASES[name]
    optimizer = make(bregman_cuda.param_groups(model, weights=reg()))
    if has_mask and masked:
        optimizer.set_mask(model[0].weight, MASK)
    return optimizer


def train(model: nn.Module, optimizer: Any, part: slice, begin: int = 0, end: int = 6) -> None:
    for x, y in batches()[begin:end]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()


def single(name: str, end: int = 6) -> tuple[nn.Module, Any]:
    model = network()
    optimizer = optimizer_for(name, model)
    train(model, optimizer, slice(None), 0, end)
    return model, optimizer


def outcome(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    names = {p: name for name, p in model.named_parameters()}
    points = [optimizer.prox_point(p) for p in model.parameters()]
    if isinstance(optimizer, SplitLBI):
        with optimizer.projected():
            points += [p.detach().clone() for p in model.parameters()]
        residues = [optimizer.residue(p) for g in optimizer.param_groups if g["reg"] for p in g["params"]]
        points += [whole(r) + 1 for r in residues]  # none is zero
    return {
        "points": [whole(p) for p in points],
        "params": [whole(p.detach()) for p in model.parameters()],
        "state": {
            f"{names[p]}.{key}": whole(t) for p, s in optimizer.state.items() for key, t in s.items() if key != "mask"
        },
        "masks": [None if (mask := optimizer.get_mask(p)) is None else whole(mask) for p in model.parameters()],
        "density": [(r.name, r.nonzeros, r.nonzero_groups, r.groups) for r in optimizer.density().rows],
    }


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
    return found | (SHARED if rule.startswith("proxsgd") else {})


def collectives_of(rule: str, layout: str) -> int:
    """One for each process group and round: a group's root in a metric takes up to 10, a half-space step with the
    envelope 2."""
    return COLLECTIVES[layout] * (10 if RULES[rule].metric else 2 if rule == "hspg" else 1)


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
    total = 0
    for _ in range(3):
        for p in params:
            grad = registry.values(tuple(p.shape), dtype, generator, 0.1)
            p.grad = grad if place is None else place(grad)
        with contextlib.nullcontext() if place is None else collectives() as seen:
            optimizer.step()
        total = 0 if seen is None else seen.get_total_counts()
    return {
        "collectives": total,
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


def scaled(model: nn.Module, part: slice, first: bool) -> dict[str, Any]:
    """GradScaler and clipping; two gradients overflow, on the first rank only."""
    optimizer = AdaBreg(bregman_cuda.param_groups(model, weights=GroupLasso(0.05, "in")), lr=1e-2, check_finite=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    log = []
    for number, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x[part]), y[part])).backward()
        held = getattr(model[2].weight.grad, "_local_tensor", model[2].weight.grad)
        if number in (2, 3) and first:
            held.view(-1)[0] = torch.inf
        if number % 2:
            scaler.unscale_(optimizer)
            log.append(float(whole(nn.utils.clip_grad_norm_(model.parameters(), 0.1, foreach=True))))
        scaler.step(optimizer)
        scaler.update()
        log.append(scaler.get_scale())
    return {"log": log, "steps": int(optimizer.state[model[0].weight]["step"]), **outcome(model, optimizer)}


def layouts(world: int) -> dict[str, tuple[Any, list[Any]]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    line = init_device_mesh("cpu", (world,))
    found = {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "copies": (line, [Replicate()]),
        "whole groups": (line, [Shard(0)]),
    }
    if world == 4:
        grid = init_device_mesh("cpu", (2, 2))
        found |= {
            "2d": (grid, [Shard(1), Shard(0)]),
            "2d rows": (grid, [Shard(0), Shard(0)]),
            "hsdp": (grid, [Replicate(), Shard(0)]),
            "strided": (grid, [_StridedShard(0, split_factor=2), Shard(0)]),  # FSDP2 on top of ColwiseParallel
        }
    return found


def tensor_cases(world: int) -> list[tuple[str, str, torch.dtype]]:
    """Every rule on the rows of two ranks; every layout, number of ranks and dtype with some."""
    kinds = [*COLLECTIVES][: 4 if world == 2 else None]
    cases = [(rule, "rows", torch.float32) for rule in (RULES if world == 2 else ("linbreg", "proxsgd", "hspg"))]
    cases += [(rule, kind, torch.float32) for rule in ("adabreg", "proxadam") for kind in kinds[1:]]
    cases += [("ramda_averaged", "rows", d) for d in registry.DTYPES[1:]]
    return [*cases, ("proxsgd", kinds[-1], torch.float32), *(("proxsgd", "rows", d) for d in registry.DTYPES[1:])]


def join(rank: int, world: int, meeting: str) -> None:
    """Ranks that wait for each other in vain end soon, with an error. A file, as a free port may not stay free."""
    import torch.distributed as dist

    address, patience = f"file://{meeting}", datetime.timedelta(seconds=90)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=patience)
    torch.set_num_threads(1)


def worker(rank: int, world: int, folder: str) -> None:
    """One rank of all cases."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    join(rank, world, f"{folder}/meeting")
    places = layouts(world)
    mesh = places["rows"][0]
    size = len(batches()[0][0]) // world
    part = slice(rank * size, (rank + 1) * size)
    results: dict[Any, Any] = {}

    for case in tensor_cases(world):
        on, placements = places[case[1]]

        def place(t: Tensor, on: Any = on, placements: Any = placements) -> Any:
            copies = DTensor.from_local(t.clone(), on, [Replicate()] * on.ndim)
            return copies.redistribute(placements=placements)

        results[case] = tensors(*case, place)

    for name in CASES:
        model = fsdp(mesh)
        optimizer = optimizer_for(name, model)
        train(model, optimizer, part, 0, 3)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{name}")
        train(model, optimizer, part, 3)
        results[name] = {**outcome(model, optimizer), "handed on": handed_on(name, mesh, model, optimizer, part)}
    results["scaled"] = scaled(fsdp(mesh), part, rank == 0)

    for name, reg in {"l1": L1(0.05), "in": GroupLasso(0.05, "in"), "out": GroupLasso(0.05, "out")}.items():
        model = parallelize_module(network(16), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        optimizer = AdaBreg(bregman_cuda.param_groups(model, weights=reg), lr=1e-2)
        train(model, optimizer, slice(None))
        results["tensor parallel", name] = [whole(p.detach()) for p in model.parameters()]

    results["ended"] = ended(place)
    results["changing"] = {name: changing(name, place) for name in CHANGES}
    results["turned wide"] = turned_wide(place)
    results["elsewhere"] = elsewhere(rank, world)
    results["rigl"] = {name: rigl(make, place) for name, make in RIGL.items()}
    results["refused"] = refusals(rank, mesh)
    results["agreed"] = agreed(rank, mesh)
    if world == 2:
        results["compiled"] = {name: compiled(reg, mesh) for name, reg in COMPILED.items()}
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


def fsdp(mesh: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = network()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def handed_on(name: str, mesh: Any, model: Any, optimizer: Any, part: slice) -> list[bool]:
    """Whether state dicts in three forms, given to a fresh optimizer, bring the state and the next step along."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    sharded, full = StateDictOptions(), StateDictOptions(full_state_dict=True)
    sent = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    same = []
    for taken, given in ((sharded, sharded), (full, full), (full, sent)):
        fresh = fsdp(mesh)
        fresh.load_state_dict(model.state_dict())
        other = optimizer_for(name, fresh, masked=False)
        if CASES[name][2]:
            get_optimizer_state_dict(fresh, other)  # makes the state, so that the mask is not all there is
            other.set_mask(fresh[0].weight, torch.ones(17, 6, dtype=torch.bool))
        saved = get_optimizer_state_dict(model, optimizer, options=taken)
        set_optimizer_state_dict(fresh, other, saved, options=given)
        old, new = outcome(model, optimizer), outcome(fresh, other)
        alike = [torch.equal(old["state"][key], new["state"][key]) for key in old["state"]]
        alike += [a is b or torch.equal(a, b) for a, b in zip(old["masks"], new["masks"])]
        same.append(all(alike) and old["state"].keys() == new["state"].keys())
    return same


def held(optimizer: Any) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Copies of what this rank has: parts of parameters and state, and options."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [t for p in params for t in (p.detach(), *(t for _, t in sorted(optimizer.state[p].items())))]
    parts = [getattr(t, "_local_tensor", t).detach().clone() for t in tensors]
    return parts, copy.deepcopy(optimizer.state_dict()["param_groups"])


def through_file(saved: Any) -> Any:
    torch.save(saved, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


def saved_elsewhere() -> dict[str, Tensor]:
    """The state of a (6, 4) parameter as one process saves it, and as half as many ranks do."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard, distribute_tensor

    half = DeviceMesh("cpu", list(range(dist.get_world_size() // 2)))
    return {"whole": torch.ones(6, 4), "other world": distribute_tensor(torch.ones(6, 4), half, [Shard(0)])}


def refusals(rank: int, mesh: Any) -> dict[str, str]:
    """What is refused, and by what sentence, on every rank alike."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    def sharded(shape: tuple[int, ...], placement: Any = Shard(0)) -> Any:
        return nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [placement]))

    def stepped(optimizer: Any, missing: bool = False) -> None:
        for p in optimizer.param_groups[0]["params"]:
            p.grad = None if missing else torch.ones_like(p)
        optimizer.step()

    cut, plain = sharded((6, 4)), nn.Parameter(torch.ones(6, 4))
    some = LinBreg([sharded((6, 4))], reg=GroupLasso(0.1, "in"))
    stepped(some)
    stepped(some, missing=True)  # nowhere a gradient: nothing happens
    uses: dict[str, Callable[[], Any]] = {
        "partial": lambda: LinBreg([nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, [Partial()]))]),
        "fused": lambda: stepped(LinBreg([cut], reg=GroupLasso(0.1, "in"), fused=True)),
        "mask": lambda: LinBreg([cut]).set_mask(cut, distribute_tensor(torch.ones(6, 4) > 0, mesh, [Replicate()])),
        "mask of a plain one": lambda: LinBreg([plain]).set_mask(plain, distribute_tensor(MASK[:6, :4], mesh)),
        "some gradients": lambda: stepped(some, missing=rank == 1),
        "capturable": lambda: ProxAdam([cut], reg=GroupLasso(0.1, "in"), capturable=True),
    }
    loading = LinBreg([sharded((6, 4))], lr=0.25, momentum=0.5, reg=L1(0.1))
    stepped(loading)
    before, found = held(loading), {}
    for name, dual in saved_elsewhere().items():
        saved = loading.state_dict()
        saved["state"] = {0: {**saved["state"][0], "dual": dual}}
        uses[name] = lambda saved=saved: loading.load_state_dict(saved)
    for name, use in uses.items():
        with pytest.raises((NotImplementedError, RuntimeError, ValueError)) as refused:
            use()
        found[name] = f"{refused.type.__name__}: {refused.value}"
    assert all(map(same_bits, before[0], held(loading)[0])), f"a refused state dict changed rank {rank}"
    assert before[1] == held(loading)[1]
    loading.load_state_dict(through_file(loading.state_dict()))  # of the same ranks: taken, without any detour
    assert all(map(same_bits, before[0], held(loading)[0]))
    return found


def ended(place: Callable[[Tensor], Tensor] | None) -> list[Tensor]:
    """HSPG in two phases that leave two groups per tensor, and one where a mask holds the others already."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    params = [nn.Parameter(v if place is None else place(v)) for v in values]
    optimizer = HSPG(params, lr=0.1, reg=GroupLasso(0.05, "in"), epsilon=0.1, start=1, end=3, k=2)
    mask = torch.arange(SHAPES[1][1]).expand(SHAPES[1]) == 3
    optimizer.set_mask(params[1], mask.contiguous())
    for _ in range(4):
        for p in params:
            grad = torch.randn(p.shape, generator=generator)
            p.grad = grad if place is None else place(grad)
        optimizer.step()
    return [whole(p.detach()) for p in params]


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


def elsewhere(rank: int, world: int) -> int:
    """Each rank holds a parameter of a mesh of its own, and steps that of its own alone; how many elements of it."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    meshes = [DeviceMesh("cpu", [r]) for r in range(world)]
    params = [nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])) for mesh in meshes]
    optimizer = LinBreg(params, lr=0.5, reg=GroupLasso(0.1, "in"))
    for p, mesh in zip(params, meshes):
        p.grad = distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])
    optimizer.step()
    optimizer.step()
    return sum(int((p._local_tensor != 1).sum()) for p in params)


def agreed(rank: int, mesh: Any) -> int:
    """How many ranks skip a step in which one has an overflow; torch asks only those that share the first gradient."""
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    first, second = (nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [p])) for p in (Replicate(), Shard(0)))
    optimizer, scaler = LinBreg([first, second], reg=GroupLasso(0.1, "in")), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    first.grad, second.grad = torch.zeros_like(first), torch.zeros_like(second)
    if rank == 1:
        second.grad._local_tensor[0, 0] = torch.inf
    scaler.step(optimizer)
    skipped = torch.tensor(float(not optimizer.state))
    dist.all_reduce(skipped)
    with pytest.raises(FloatingPointError, match="parameter 1 of shape"):
        LinBreg([first, second], reg=GroupLasso(0.1, "in"), check_finite=True).step()
    warm_up = LinBreg([first, second], lr=0.0, reg=GroupLasso(0.1, "in"))  # not the step that DCP makes
    second.grad.nan_to_num_(posinf=1.0)
    warm_up.step()
    assert warm_up.state[second]["step"] == 1, rank
    return int(skipped)


COMPILED = {"l1": L1(0.05), "out": GroupLasso(0.05, "out"), "in": GroupLasso(0.05, "in")}


def compiled(reg: Any, mesh: Any | None) -> list[Tensor]:
    """Steps of torch.compile, with a gradient that is laid out otherwise; without a mesh, plain ones of whole tensors.

    Cut groups are not compiled: fullgraph=True refuses them, and without it the step runs as ever.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator) for s in ((17, 5), (1, 4))]
    params = [nn.Parameter(p if mesh is None else distribute_tensor(p, mesh, [Shard(0)])) for p in params]
    optimizer = AdaBreg(params, lr=0.1, reg=reg)
    optimizer.set_mask(params[0], torch.rand(17, 5, generator=generator) < 0.5)
    fullgraph = reg is not COMPILED["in"]
    torch._dynamo.reset()
    step = optimizer.step if mesh is None else torch.compile(optimizer.step, backend="aot_eager", fullgraph=fullgraph)
    for number in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
            if mesh is not None:
                p.grad = distribute_tensor(p.grad, mesh, [Replicate() if number == 1 else Shard(0)])
        if mesh is not None and not fullgraph and number == 0:
            with pytest.raises(Exception, match="shards cut the groups"):
                torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)()
            torch._dynamo.reset()
        step()
    optimizer.step()
    return [whole(p.detach()) for p in params]


def resumer(rank: int, world: int, folder: str, *sources: str) -> None:
    """Loads what other numbers of ranks saved after three steps, and continues."""
    import torch.distributed as dist

    join(rank, world, f"{folder}/meeting")
    mesh = layouts(world)["rows"][0]
    size = len(batches()[0][0]) // world
    results = {}
    for number, source in enumerate(sources):
        for name in CASES:
            model = fsdp(mesh)
            part = slice(rank * size, (rank + 1) * size)
            results[number, name] = resume(name, model, f"{source}/{name}", part)
            if number == 0:  # a chain: taken up here for a step, and saved for others
                resume(name, fsdp(mesh), f"{source}/{name}", part, end=4, save=f"{folder}/chain/{name}")
    if rank == 0:
        torch.save(results, f"{folder}/resumed.pt")
    dist.barrier()
    dist.destroy_process_group()


def resume(
    name: str, model: Any, checkpoint: str, part: slice, begin: int = 3, end: int = 6, save: str = "", **options: Any
) -> dict[str, Any]:
    """A run that continues from a checkpoint, and may end with one."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    optimizer = optimizer_for(name, model, masked=False)
    lost = ""
    weights, state = get_state_dict(model, optimizer)
    if CASES[name][2]:
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=checkpoint, **options)
        try:
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
        except ValueError as error:
            lost = str(error)
        optimizer.set_mask(model[0].weight, torch.ones(17, 6, dtype=torch.bool))
        weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=checkpoint, **options)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(model, optimizer, part, begin, end)
    if save:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=save)
    return {"lost": lost, **outcome(model, optimizer)}


if __name__ == "__main__":
    role, *numbers = sys.argv[1:4]  # rank, world; then folders
    {"worker": worker, "resumer": resumer}[role](*map(int, numbers), *sys.argv[4:])
