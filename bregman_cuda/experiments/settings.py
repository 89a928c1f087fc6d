"""Settings of the experiments: our defaults for the digits, the paper's for Fashion-MNIST."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..regularizers import L1, GroupLasso, Regularizer, SparseGroupLasso

OPTIMIZERS = ("adabreg", "linbreg", "linbreg-momentum", "proxsgd", "adam")
REGULARIZERS = ("l1", "group-out", "group-in", "group-kernel", "sparse-group", "none")


@dataclass(frozen=True)
class Setting:
    """Everything that one training depends on besides the data and the seed."""

    model: str
    optimizer: str
    lr: float
    lam: float
    reg: str = "l1"
    delta: float = 1.0
    momentum: float = 0.0
    density: float = 0.01
    bias_scale: float = 1.0
    epochs: int = 40
    batch_size: int = 64
    schedule: str = "constant"

    def weights(self, model: nn.Sequential) -> dict[Any, Regularizer | None] | Regularizer | None:
        """What `param_groups` gives to the weights."""
        if self.reg == "none":
            return None
        if self.reg == "group-kernel":  # a kernel of a matrix is one element
            return by_layer(model, GroupLasso(self.lam, "kernel"), nn.Conv2d, L1(self.lam))
        if self.reg == "group-in":
            return GroupLasso(self.lam, "in")
        if self.reg == "l1":
            return L1(self.lam)
        out = GroupLasso(self.lam, "out") if self.reg == "group-out" else SparseGroupLasso(self.lam, 0.5, "out")
        return {last_weight(model): L1(self.lam), "*": out}  # rows of the last layer are the classes

    def mask_groups(self, model: nn.Sequential) -> dict[Any, str | None] | str | None:
        """The groups of the sparse start: those of the regularizer."""
        if self.reg in ("group-out", "sparse-group"):
            return {last_weight(model): None, "*": "out"}
        return {"group-in": "in", "group-kernel": "kernel"}.get(self.reg)

    def schedule_for(self, optimizer: torch.optim.Optimizer) -> Callable[[float], None]:
        """A function of the mean loss of an epoch that sets the next one's lr."""
        if self.schedule == "plateau":  # as in the authors' notebooks, on the training loss
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=5, threshold=0.01)
            return lambda loss: plateau.step(loss)
        if self.schedule == "cosine":
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
            return lambda loss: cosine.step()
        return lambda loss: None


def by_layer(
    model: nn.Sequential, first: Regularizer, kind: type[nn.Module], rest: Regularizer
) -> dict[Any, Regularizer | None]:
    has_kind = any(isinstance(module, kind) for module in model)
    return {kind: first, "*": rest} if has_kind else {"*": rest}


def last_weight(model: nn.Sequential) -> str:
    return f"{len(model) - 1}.weight"
