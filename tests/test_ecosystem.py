"""Other people's training loops: DistributedDataParallel (real processes), DCP, Accelerate, Lightning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import same_bits
from torch import nn

import bregman_cuda
from bregman_cuda import L1, RMDA, AdaBreg, GroupLasso, LinBreg, ProxSGD, SparseGroupLasso, SplitLBI

ROOT = Path(__file__).resolve().parents[1]
OPTIMIZERS = {
    "linbreg": (lambda p: LinBreg(p, lr=0.1, momentum=0.9), lambda: L1(0.1)),
    "adabreg": (lambda p: AdaBreg(p, lr=1e-2), lambda: SparseGroupLasso(0.05, 0.5, "in")),
    "proxsgd": (lambda p: ProxSGD(p, lr=0.1, momentum=0.9), lambda: GroupLasso(0.1)),
    "rmda": (lambda p: RMDA(p, lr=0.1, momentum=0.25), lambda: GroupLasso(0.1)),
    "splitlbi": (lambda p: SplitLBI(p, lr=0.1, kappa=2.0, mu=1.0), lambda: L1(0.1)),
}


def network(width: int = 17) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))  # odd sizes: misaligned bucket views
    bregman_cuda.sparse_init_(model, density=0.5)
    return model


def batches(steps: int = 6, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(steps)
    ]


def optimizer_for(name: str, model: nn.Module):
    make, reg = OPTIMIZERS[name]
    return make(bregman_cuda.param_groups(model, weights=reg()))


def points(model: nn.Module, optimizer) -> list[torch.Tensor]:
    """The parameters, and the sparse points of them or beside them."""
    return [p.detach() for p in model.parameters()] + [optimizer.prox_point(p) for p in model.parameters()]


def plain_run(name: str) -> list[torch.Tensor]:
    model = network()
    optimizer = optimizer_for(name, model)
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return points(model, optimizer)


# Distributed

WORKER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
import test_ecosystem as here

name, rank, world, folder = sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
torch.set_num_threads(1)
model = here.network()
wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
optimizer = here.optimizer_for(name, model)
for x, y in here.batches():
    optimizer.zero_grad()
    part = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
    nn.functional.cross_entropy(wrapped(x[part]), y[part]).backward()
    optimizer.step()
torch.save(here.points(model, optimizer), f"{folder}/{name}{rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_ddp_trains_as_one_process(name, tmp_path):
    """Two gloo processes with half a batch each: equal bits on both, and what one process gets from the whole."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])}
    command = [sys.executable, "-c", WORKER, name]
    workers = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, f"{worker.returncode}: {errors[-3000:]}"
    first, second = (torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True) for rank in range(2))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    for ours, expected in zip(first, plain_run(name), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert any((p == 0).any() for p in first[4:]), [float(p.norm()) for p in first]  # something was shrunk away


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_distributed_state_dict_functions(name):
    """get_/set_optimizer_state_dict, by parameter names, into a fresh model and optimizer."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    runs = []
    for resume in (False, True):
        model = network()
        optimizer = optimizer_for(name, model)
        for number, (x, y) in enumerate(batches()):
            if resume and number == 3:
                saved, weights = get_optimizer_state_dict(model, optimizer), model.state_dict()
                model = network()
                model.load_state_dict(weights)
                optimizer = optimizer_for(name, model)
                set_optimizer_state_dict(model, optimizer, saved)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        runs.append(
            [*model.parameters(), *(t for p in model.parameters() for _, t in sorted(optimizer.state[p].items()))]
        )
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(*runs, strict=True))


# Frameworks


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accelerate(name):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    data = torch.utils.data.DataLoader(
        [(x[k : k + 4], y[k : k + 4]) for x, y in batches() for k in (0, 4)], batch_size=None
    )
    model, optimizer, data = accelerator.prepare(model, optimizer_for(name, model), data)
    for x, y in data:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
    ends = points(accelerator.unwrap_model(model), optimizer.optimizer)
    for ours, expected in zip(ends, plain_run(name), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accelerate_takes_up_its_own_checkpoint(name, tmp_path):
    """save_state and load_state, with a mask: the bits of an uninterrupted run, in parameters and in state."""
    accelerate = pytest.importorskip("accelerate")
    ends = []
    for begin in (0, 3):
        accelerator = accelerate.Accelerator(cpu=True)
        model = network()
        model, optimizer = accelerator.prepare(model, optimizer_for(name, model))
        weight = accelerator.unwrap_model(model)[0].weight
        if begin:
            accelerator.load_state(str(tmp_path))
        else:
            optimizer.optimizer.set_mask(weight, torch.arange(weight.numel()).view_as(weight) % 3 > 0)
        for number, (x, y) in list(enumerate(batches()))[begin:]:
            if number == 3 and not begin:
                accelerator.save_state(str(tmp_path))
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            optimizer.step()
        state = optimizer.optimizer.state
        ends.append([*model.parameters(), *(t for p in model.parameters() for _, t in sorted(state[p].items()))])
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(*ends, strict=True))
    assert not bool(ends[1][0].flatten()[::3].any())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lightning(name, precision, tmp_path):
    """Fit, checkpoint, and resume from it: the parameters of an uninterrupted run."""
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = network()

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return optimizer_for(name, self.network)

    def fit(epochs: int, resume: str | None = None) -> Module:
        module = Module()
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            precision=precision,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
        )
        data = torch.utils.data.DataLoader(batches(), batch_size=None)
        trainer.fit(module, data, ckpt_path=resume, weights_only=None if resume is None else False)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return module

    whole = fit(2)
    fit(1)
    resumed = fit(2, str(tmp_path / "last.ckpt"))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert same_bits(a.detach(), b.detach())
    assert not same_bits(whole.network[0].weight.detach(), network()[0].weight.detach())
