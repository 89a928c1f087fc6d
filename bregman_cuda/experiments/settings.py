"""Settings of the experiments: our defaults for the digits, the paper's for Fashion-MNIST."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..optim import Restarts
from ..regularizers import L1, GroupLasso, Regularizer, SparseGroupLasso

OPTIMIZERS = ("adabreg", "linbreg", "linbreg-momentum", "proxsgd", "proxadam", "rmda", "ramda", "splitlbi", "adam")
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
    mu: float = 100.0  # of SplitLBI
    density: float = 0.01
    bias_scale: float = 1.0
    epochs: int = 40
    batch_size: int = 64
    schedule: str = "constant"

    def __post_init__(self) -> None:
        for name in ("lr", "lam"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)!r}")
        if not 0 < self.delta < math.inf:
            raise ValueError(f"delta must be finite and > 0, got {self.delta!r}")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be in (0, 1], got {self.density!r}: it is the share of non-zeros")

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

    def schedule_for(self, optimizer: torch.optim.Optimizer) -> Callable[[float], object]:
        """A function of the mean loss of an epoch that sets the next one's lr."""
        if self.schedule == "plateau":  # as in the authors' notebooks, on the training loss
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=5, threshold=0.01)
            return lambda loss: plateau.step(loss)
        if self.schedule == "cosine":
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
            return lambda loss: cosine.step()
        if self.schedule == "stages":  # momentum doubles to 1, so that dual averages end sparse
            ends = sorted({self.epochs // 2, 3 * self.epochs // 4} - {0})
            stages = Restarts(optimizer, ends, gamma=0.5)  # type: ignore[arg-type]
            return lambda loss: stages.step()
        return lambda loss: None


def by_layer(
    model: nn.Sequential, first: Regularizer, kind: type[nn.Module], rest: Regularizer
) -> dict[Any, Regularizer | None]:
    has_kind = any(isinstance(module, kind) for module in model)
    return {kind: first, "*": rest} if has_kind else {"*": rest}


def last_weight(model: nn.Sequential) -> str:
    return f"{len(model) - 1}.weight"


_DENSE = dict(lam=0.0, reg="none", density=1.0)  # Adam, the usual dense training beside them
_TABLES: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    # Tuned here for at least 96% at most at 10% density (tests/test_experiments.py); Adam with its usual lr.
    ("digits", "mlp"): {
        "": dict(epochs=60, batch_size=32, reg="l1", density=0.02),
        "adabreg": dict(lr=5e-3, lam=0.8, schedule="cosine"),
        # All elements of a group take steps of one size, so groups come alive late; accuracy 95% at density 35-65%.
        "adabreg in groups": dict(lam=0.3),
        "linbreg": dict(lr=0.3, lam=0.15),
        "linbreg-momentum": dict(lr=0.3, lam=0.17, momentum=0.9),
        "proxsgd": dict(lr=0.1, lam=2e-3, density=1.0),
        "proxadam": dict(lr=2e-3, lam=1.5e-3, density=1.0, schedule="cosine"),
        "rmda": dict(lr=0.1, lam=2e-3, momentum=0.25, density=1.0, schedule="stages"),
        "ramda": dict(lr=1e-2, lam=3e-4, momentum=0.25, density=1.0, schedule="stages"),
        "splitlbi": dict(lr=0.1, lam=1.0, mu=5.0, momentum=0.9, density=1.0, schedule="cosine"),
        "adam": dict(lr=1e-3, **_DENSE),
    },
    # The authors' ConvNet notebook, except for its 100 epochs; density is that of kernels and of matrix elements.
    ("idx", "convnet"): {
        "": dict(epochs=10, batch_size=128, reg="group-kernel", bias_scale=10.0, schedule="plateau"),
        "adabreg": dict(lr=1e-3, lam=0.5),
        "linbreg": dict(lr=0.07, lam=0.5),
        "linbreg-momentum": dict(lr=0.07, lam=0.5, momentum=0.9),
        "proxsgd": dict(lr=0.1, lam=1e-3, density=1.0),
        "proxadam": dict(lr=1e-3, lam=1e-3, density=1.0),  # these four are not tuned
        "rmda": dict(lr=0.1, lam=1e-3, momentum=0.25, density=1.0, schedule="stages"),
        "ramda": dict(lr=1e-2, lam=1e-3, momentum=0.25, density=1.0, schedule="stages"),
        "splitlbi": dict(lr=0.01, lam=0.1, mu=100.0, momentum=0.9, density=1.0),
        "adam": dict(lr=1e-3, **_DENSE),
    },
    # The authors' MLP notebook (lr 0.1, lam 0.1); AdaBreg's lr is not in the paper.
    ("idx", "mlp"): {
        "": dict(epochs=10, batch_size=128, reg="l1", schedule="plateau"),
        "adabreg": dict(lr=1e-3, lam=0.5),
        "linbreg": dict(lr=0.1, lam=0.1),
        "linbreg-momentum": dict(lr=0.1, lam=0.1, momentum=0.9),
        "proxsgd": dict(lr=0.1, lam=1e-4, density=1.0),
        "proxadam": dict(lr=1e-3, lam=1e-4, density=1.0),  # nor these
        "rmda": dict(lr=0.1, lam=1e-4, momentum=0.25, density=1.0, schedule="stages"),
        "ramda": dict(lr=1e-2, lam=1e-4, momentum=0.25, density=1.0, schedule="stages"),
        "splitlbi": dict(lr=0.01, lam=0.1, mu=100.0, momentum=0.9, density=1.0),
        "adam": dict(lr=1e-3, **_DENSE),
    },
}

# Bungert et al., Tables 1 (l1) and 2 (kernels and l1): test accuracy, then density in total or of linear weights
# and kernels; Fashion-MNIST after 100 epochs.
_PAPER = {
    ("l1", "adam"): "92.1% at 100%",
    ("l1", "proxsgd"): "89.4% at 4.8%",
    ("l1", "linbreg"): "89.2% at 1.9%",
    ("l1", "linbreg-momentum"): "89.9% at 2.7%",
    ("l1", "adabreg"): "90.5% at 2.3%",
    ("group-kernel", "proxsgd"): "89.8% at 3.0% / 3.7%",
    ("group-kernel", "linbreg"): "89.5% at 3.8% / 4.2%",
    ("group-kernel", "linbreg-momentum"): "89.9% at 3.5% / 4.7%",
    ("group-kernel", "adabreg"): "89.4% at 3.5% / 2.8%",
    ("none", "adam"): "92.1% at 100%",
}


def default_model(data: str, image_shape: Sequence[int]) -> str:
    """The convnet for images that it fits, the mlp for smaller ones and for the digits."""
    return "convnet" if data != "digits" and min(image_shape) >= 16 else "mlp"


def uses(optimizer: str, option: str) -> bool:
    """Whether an optimizer's training depends on a field of its setting; Adam stays dense."""
    if optimizer == "adam":
        return option not in ("reg", "lam", "delta", "density")
    return option != "delta" or optimizer in ("adabreg", "linbreg", "linbreg-momentum")


def default_setting(data: str, model: str, optimizer: str, reg: str | None = None, **given: float | None) -> Setting:
    """The setting of an optimizer for a data set and a model, with what was given instead of the defaults.

    What the optimizer does not use is dropped, so that several can be compared with the same options.

    Raises:
        ValueError: a value out of its range.
    """
    table = _TABLES["digits" if data == "digits" else "idx", model if data != "digits" else "mlp"]
    options = {"reg": reg, **given}
    chosen = {name: value for name, value in options.items() if value is not None and uses(optimizer, name)}
    defaults = {**table[""], **table[optimizer]}
    if chosen.get("reg", defaults["reg"]) in ("group-out", "group-in", "sparse-group"):
        defaults |= table.get(f"{optimizer} in groups", {})
    return Setting(**{"model": model, "optimizer": optimizer, **defaults, **chosen})


def paper_figures(data: str, setting: Setting) -> str | None:
    """What the paper reports after 100 epochs for the same experiment, if it does."""
    if (data, setting.model) != ("fashion-mnist", "convnet"):
        return None
    return _PAPER.get((setting.reg, setting.optimizer))
