"""What one rank of test_shards.py does, and the same problems for a single process without shards."""

from __future__ import annotations

import copy
import datetime
import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import same_bits
from placed import CHANGES, ENDS, RIGL, changing, ended, rigl, tensor_cases, tensors, turned_wide, whole
from test_ecosystem import batches, network
from torch import Tensor, nn

import bregman_cuda
from bregman_cuda import (
    HSPG,
    L1,
    RMDA,
    AdaBreg,
    GroupEnvelope,
    GroupLasso,
    LinBreg,
    Nuclear,
    ProxAdam,
    ProxSGD,
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

    results["ended"] = {name: ended(name, place) for name in ENDS}
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


def elsewhere(rank: int, world: int) -> int:
    """Each rank holds a parameter of a mesh of its own, and steps that of its own alone; how many elements of it. They
    cannot share a k, nor be compared with each other."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    meshes = [DeviceMesh("cpu", [r]) for r in range(world)]
    params = [nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])) for mesh in meshes]
    optimizer = LinBreg(params, lr=0.5, reg=GroupLasso(0.1, "in"))
    for p, mesh in zip(params, meshes):
        p.grad = distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])
    optimizer.step()
    optimizer.step()
    for kind in (ProxSGD, HSPG):
        with pytest.raises(ValueError, match=f"{kind.__name__}: GroupEnvelope: k is shared .* differ in .* or ranks"):
            kind(params, reg=GroupEnvelope(0.1, 2, "in", scope="all"))
    with pytest.raises(ValueError, match="keep_top: scope='all' needs all tensors of a parameter group on every rank"):
        HSPG(params, reg=GroupLasso(0.1, "in")).keep_top(1, scope="all")
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
