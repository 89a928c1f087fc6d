"""Sharded training with real gloo processes: FSDP2 and tensor parallelism give what one process gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import same_bits
from test_ecosystem import batches, free_port, network
from torch import nn

import bregman_cuda
from bregman_cuda import L1, AdaBreg, GroupLasso, LinBreg, ProxSGD, SparseGroupLasso

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    "linbreg-l1": (lambda p: LinBreg(p, lr=0.1, momentum=0.9, count_nonzeros=True), lambda: L1(0.1)),
    "adabreg-out": (lambda p: AdaBreg(p, lr=1e-2), lambda: SparseGroupLasso(0.05, 0.5, "out")),
    "proxsgd-out": (lambda p: ProxSGD(p, lr=0.1, momentum=0.9), lambda: GroupLasso(0.1)),
    "reference": (lambda p: AdaBreg(p, lr=1e-2, fused=False), lambda: GroupLasso(0.05, "out")),
}


def optimizer_for(name: str, model: nn.Module):
    make, reg = CASES[name]
    return make(bregman_cuda.param_groups(model, weights=reg()))


def train(model, optimizer, part: slice, begin: int = 0, end: int = 6) -> None:
    for x, y in batches()[begin:end]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def worker(rank: int, world: int, port: int, folder: str) -> None:
    """One rank of all cases: FSDP2 on the whole world, then a tensor-parallel layer."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (world,))
    size = len(batches()[0][0]) // world
    results = {}
    for name in CASES:
        model = network()
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        optimizer = optimizer_for(name, model)
        train(model, optimizer, slice(rank * size, (rank + 1) * size), 0, 3)
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{name}")
        train(model, optimizer, slice(rank * size, (rank + 1) * size), 3)
        saved = get_optimizer_state_dict(model, optimizer)["state"]
        results[name] = {
            "params": [whole(p.detach()) for p in model.parameters()],
            "state": {f"{p}.{key}": whole(t) for p, entry in saved.items() for key, t in entry.items()},
            "density": optimizer.density().density,
        }
    model = parallelize_module(network(16), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = AdaBreg(model.parameters(), lr=1e-2, reg=L1(0.05))
    train(model, optimizer, slice(None))
    results["tensor parallel"] = [whole(p.detach()) for p in model.parameters()]
    refused = []
    for use in (
        lambda: LinBreg([model[0].weight], reg=GroupLasso(0.1, "in")),
        lambda: optimizer.set_mask(model[0].weight, torch.ones(16, 6, dtype=torch.bool)),
    ):
        try:
            use()
        except NotImplementedError as error:
            refused.append(str(error))
    results["refused"] = refused
    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


def single(name: str):
    model = network()
    optimizer = optimizer_for(name, model)
    train(model, optimizer, slice(None))
    return model, optimizer


@pytest.fixture(scope="module", params=[2, 4])
def sharded(request, tmp_path_factory):
    world, folder = request.param, tmp_path_factory.mktemp("shards")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])}
    code = f"import test_shards, sys; test_shards.worker(int(sys.argv[1]), {world}, {free_port()}, {str(folder)!r})"
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, str(rank)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    for one in workers:
        _, errors = one.communicate(timeout=240)
        assert one.returncode == 0, errors[-4000:]
    return folder, torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_fsdp_trains_as_one_process(sharded, name):
    """Uneven and empty shards included: 17 and 3 rows on 2 and 4 ranks."""
    _, results = sharded
    model, optimizer = single(name)
    for ours, expected in zip(results[name]["params"], model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected.detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(ours == 0, expected.detach() == 0)
    names = dict(model.named_parameters())
    for key, value in results[name]["state"].items():
        parameter, _, slot = key.rpartition(".")
        torch.testing.assert_close(value, optimizer.state[names[parameter]][slot], rtol=1e-4, atol=1e-5)
    assert results[name]["density"] == optimizer.density().density


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_checkpoint_of_many_ranks_continues_on_one(sharded, name):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    folder, results = sharded
    model = network()
    optimizer = optimizer_for(name, model)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=str(folder / name), no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(model, optimizer, slice(None), 3)
    for ours, expected in zip(model.parameters(), results[name]["params"], strict=True):
        torch.testing.assert_close(ours.detach(), expected, rtol=1e-4, atol=1e-5)
    assert not same_bits(model[0].weight.detach(), network()[0].weight.detach())


@pytest.mark.slow
def test_tensor_parallel_layers_train_as_whole_ones(sharded):
    model = network(16)
    train(model, AdaBreg(model.parameters(), lr=1e-2, reg=L1(0.05)), slice(None))
    for ours, expected in zip(sharded[1]["tensor parallel"], model.parameters(), strict=True):
        torch.testing.assert_close(ours, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_what_shards_cannot_do_yet_is_refused(sharded):
    crossing, mask = sharded[1]["refused"]
    assert "sharded along dim 0, which cuts its groups" in crossing
    assert "masks of sharded parameters" in mask
