"""The training loop: one model, one optimizer, and what happened in each epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from .. import optim
from ..sparsity import DensityReport, density, param_groups, sparse_init_
from .data import Dataset
from .models import build
from .settings import Setting

OnBatch = Callable[[], None]


@dataclass(frozen=True)
class Epoch:
    """Numbers of one epoch; epoch 0 is the untrained model. Density is that of Linear and convolution weights."""

    number: int
    loss: float
    test_accuracy: float
    density: float
    lr: float
    seconds: float
    optimizer_seconds: float


@dataclass
class Run:
    """What a training gave."""

    setting: Setting
    data: str
    seed: int
    epochs: list[Epoch] = field(default_factory=list)
    weights: DensityReport | None = None  # at the end
    diverged: bool = False

    @property
    def last(self) -> Epoch:
        return self.epochs[-1]

    @property
    def kernel_density(self) -> float | None:
        """Share of convolution kernels that are not zero (the paper's N_conv); None without convolutions."""
        rows = self.weights.rows if self.weights else []
        total = sum(row.groups or 0 for row in rows)
        return sum(row.nonzero_groups or 0 for row in rows) / total if total else None

    @property
    def linear_density(self) -> float | None:
        """Share of non-zeros in the weights of Linear layers (the paper's N_linear)."""
        rows = [row for row in self.weights.rows if row.groups is None] if self.weights else []
        return DensityReport(rows).density if rows else None

    @property
    def seconds_per_epoch(self) -> float:
        trained = self.epochs[1:]
        return sum(e.seconds for e in trained) / len(trained) if trained else math.nan

    @property
    def optimizer_share(self) -> float:
        """Share of the training time spent in ``optimizer.step()``."""
        total = sum(e.seconds for e in self.epochs)
        return sum(e.optimizer_seconds for e in self.epochs) / total if total else math.nan


def make_optimizer(model: nn.Sequential, setting: Setting, fused: bool | None = None) -> torch.optim.Optimizer:
    """The optimizer of a setting, over the parameter groups that it asks for."""
    if setting.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=setting.lr, fused=fused is not False)
    groups = param_groups(model, setting.weights(model))
    if setting.optimizer == "adabreg":
        return optim.AdaBreg(groups, lr=setting.lr, delta=setting.delta, fused=fused)
    if setting.optimizer == "proxsgd":
        return optim.ProxSGD(groups, lr=setting.lr, momentum=setting.momentum, fused=fused)
    if setting.optimizer == "proxadam":
        return optim.ProxAdam(groups, lr=setting.lr, fused=fused)
    if setting.optimizer == "splitlbi":
        return optim.SplitLBI(groups, lr=setting.lr, mu=setting.mu, momentum=setting.momentum, fused=fused)
    if setting.optimizer in ("rmda", "ramda"):
        kind = optim.RMDA if setting.optimizer == "rmda" else optim.RAMDA
        return kind(groups, lr=setting.lr, momentum=setting.momentum, fused=fused)
    return optim.LinBreg(groups, lr=setting.lr, delta=setting.delta, momentum=setting.momentum, fused=fused)


def make_model(setting: Setting, data: Dataset, seed: int) -> nn.Sequential:
    """The model of a setting: a sparse start for the Bregman optimizers, torch's own dense one for the others."""
    torch.manual_seed(seed)
    model = build(setting.model, data.train_x.shape[2:], data.classes)
    if setting.density < 1:
        sparse_init_(model, setting.density, setting.mask_groups(model), bias_scale=setting.bias_scale)
    return model


def train(
    setting: Setting,
    data: Dataset,
    *,
    seed: int = 0,
    fused: bool | None = None,
    device: torch.device | str = "cpu",
    on_batch: OnBatch | None = None,
) -> Run:
    """Train a model from scratch and test it after every epoch; nothing is chosen by the test data.

    What is tested and counted with SplitLBI is the projection of the model on the support of its twin.

    Args:
        setting: model, optimizer and hyper-parameters.
        data: what to train on.
        seed: of the initialisation and the order of the samples.
        fused: as in the optimizers.
        device: where to train.
        on_batch: called after each batch.
    """
    device = torch.device(device)
    data = data.to(device)
    model = make_model(setting, data, seed).to(device)
    optimizer = make_optimizer(model, setting, fused)
    schedule = setting.schedule_for(optimizer)
    order = torch.Generator().manual_seed(seed)
    run = Run(setting, data.name, seed)
    run.epochs.append(_epoch(model, optimizer, data, 0, math.nan, setting.lr, 0.0, 0.0))
    for number in range(1, setting.epochs + 1):
        lr = optimizer.param_groups[0]["lr"]
        loss, seconds, in_optimizer = _train_epoch(model, optimizer, setting.batch_size, data, order, on_batch)
        run.epochs.append(_epoch(model, optimizer, data, number, loss, lr, seconds, in_optimizer))
        if not math.isfinite(loss):
            run.diverged = True
            break
        schedule(loss)
    with _sparse(optimizer):
        run.weights = density(model)
    return run


def _train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    data: Dataset,
    order: torch.Generator,
    on_batch: OnBatch | None,
) -> tuple[float, float, float]:
    """Mean loss, seconds, and the seconds among them spent in the optimizer."""
    model.train()
    device = data.train_x.device
    total, in_optimizer = torch.zeros((), device=device), 0.0
    start = _now(device)
    batches = torch.randperm(len(data.train_x), generator=order).to(device).split(batch_size)
    for batch in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
        loss.backward()
        before = _now(device)
        optimizer.step()
        in_optimizer += _now(device) - before
        total += loss.detach() * len(batch)
        if on_batch is not None:
            on_batch()
    return float(total) / len(data.train_x), _now(device) - start, in_optimizer


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # launches return at once: without this the step would look free
    return time.perf_counter()


def _epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Dataset,
    number: int,
    loss: float,
    lr: float,
    seconds: float,
    in_optimizer: float,
) -> Epoch:
    with _sparse(optimizer):
        return Epoch(number, loss, accuracy(model, data), density(model).density, lr, seconds, in_optimizer)


def _sparse(optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
    """Inside, the model is what the optimizer gives away as sparse."""
    return optimizer.projected() if isinstance(optimizer, optim.SplitLBI) else nullcontext()


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset) -> float:
    """Share of test samples that the model gets right."""
    model.eval()
    right = sum(
        (model(x).argmax(1) == y).sum().item()
        for x, y in zip(data.test_x.split(1000), data.test_y.split(1000), strict=True)
    )
    return right / len(data.test_x)
