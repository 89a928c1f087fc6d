"""Lottery tickets from the path of SplitLBI: masks per epoch, rewinding to the start, masked training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..optim import SparseOptimizer
from ..optim._shards import mask_as
from ..regularizers._base import check_count
from .activation_path import chosen_layers, named_of, with_twin

if TYPE_CHECKING:
    from ..optim.splitlbi import SplitLBI


@dataclass(frozen=True)
class Ticket:
    """Where the twin was active after an epoch, and the whole model as it was before training."""

    epoch: int
    masks: dict[str, Tensor]  # bool, by parameter name
    initial: dict[str, Tensor]  # state_dict, buffers included

    @property
    def density(self) -> float:
        """Share of weights that the masks keep."""
        total = sum(mask.numel() for mask in self.masks.values())
        return sum(int(mask.sum()) for mask in self.masks.values()) / total if total else float("nan")


class TicketRecorder:
    """Keeps the initial weights and, per epoch, the twin's support (Fu et al., ICML 2020): make it before training.

    Args:
        model: the module to train.
        optimizer: SplitLBI over its parameters.
        layers: exact parameter names; None: all with a twin. (The toolbox takes convolutions alone.)

    Raises:
        TypeError, ValueError: another optimizer, or an unknown layer.
    """

    def __init__(self, model: nn.Module, optimizer: SplitLBI, layers: str | Iterable[str] | None = None) -> None:
        self.model, self.optimizer = model, optimizer
        self.layers = chosen_layers(layers, with_twin(model, optimizer))
        self.initial = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._masks: dict[int, dict[str, Tensor]] = {}

    @property
    def epochs(self) -> list[int]:
        """Epochs with a ticket."""
        return list(self._masks)

    @torch.no_grad()
    def update(self, epoch: int) -> None:
        """Save the masks of this epoch, one bool per weight, without waiting for the device.

        Raises:
            ValueError: the epoch is no integer >= 0.
        """
        epoch = check_count("TicketRecorder", "epoch", epoch)
        named = named_of(self.model)
        self._masks[epoch] = {name: self.optimizer.support(named[name]).clone() for name in self.layers}

    def ticket(self, epoch: int) -> Ticket:
        """The ticket of an epoch.

        Raises:
            KeyError: there is none.
        """
        if epoch not in self._masks:
            raise KeyError(f"there is no ticket of epoch {epoch}; there are: {', '.join(map(str, self._masks))}")
        return Ticket(epoch, self._masks[epoch], self.initial)


@torch.no_grad()
def rewind(model: nn.Module, ticket: Ticket, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Set the whole model, buffers included, to the ticket's initial weights, zero where its masks are False.

    Args:
        model: of the ticket's architecture.
        ticket: what to begin with.
        optimizer: one that goes on with these parameters: its state for them is dropped. A new one has none.

    Returns:
        The masks on the model's device, for `masked`.

    Raises:
        ValueError: other names or shapes; nothing was changed.
    """
    now = model.state_dict()
    if now.keys() != ticket.initial.keys():
        odd = sorted(now.keys() ^ ticket.initial.keys())[0]
        raise ValueError(f"rewind: {odd!r} is in only one of model and ticket")
    for name, value in ticket.initial.items():
        if now[name].shape != value.shape:
            shapes = f"{tuple(value.shape)} in the ticket, {tuple(now[name].shape)} in the model"
            raise ValueError(f"rewind: {name!r} has shape {shapes}")
    params = _masked_params(model, ticket.masks)
    model.load_state_dict(ticket.initial)
    masks = {name: mask.to(params[name].device) for name, mask in ticket.masks.items()}
    for name, mask in masks.items():
        params[name].masked_fill_(~mask, 0)
    if optimizer is not None:
        for param in named_of(model).values():
            optimizer.state.pop(param, None)
        if hasattr(optimizer, "_forget_plans"):
            optimizer._forget_plans()
    return masks


class MaskedTraining:
    """What `masked` returns: `remove()` ends it. Also a context manager."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Let the optimizer train all weights again."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> MaskedTraining:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _Release:
    def __init__(self, optimizer: Any, param: Tensor, earlier: Tensor | None) -> None:
        self.optimizer, self.param, self.earlier = optimizer, param, earlier

    def remove(self) -> None:
        self.optimizer.set_mask(self.param, self.earlier)


@torch.no_grad()
def masked(optimizer: torch.optim.Optimizer, model: Any, masks: Mapping[str, Tensor]) -> MaskedTraining:
    """Keep weights at exactly zero while any optimizer trains the others.

    Optimizers of this package mask inside their step: with a mask set before, both hold, and it comes back at the end
    (end the last of several first). For all others, gradients are masked in place before each step, and weights and
    every state tensor of their shape (momentum, moments) after it, so that neither weight decay nor old momentum leaks.
    The same happens now, at once.

    Args:
        optimizer: any; parameters that it does not hold are masked by other optimizers' hooks, or not at all.
        model: a module, or a mapping from names to parameters.
        masks: bool tensors by parameter name, True where a weight is trained, as from `rewind` or `prune_by_order`.

    Raises:
        ValueError: a name that the model does not have, or another shape; nothing was changed.
        TypeError: a mask that is not bool.
    """
    params = _masked_params(model, masks)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    pairs = [(p, masks[name].to(p.device)) for name, p in params.items() if p in held]
    if isinstance(optimizer, SparseOptimizer):
        earlier = [optimizer.get_mask(param) for param, _ in pairs]
        for (param, mask), old in zip(pairs, earlier):
            optimizer.set_mask(param, mask if old is None else mask_as(param, mask) & old)
        return MaskedTraining([_Release(optimizer, param, old) for (param, _), old in zip(pairs, earlier)])

    @torch.no_grad()
    def before(*_: Any) -> None:
        for param, mask in pairs:
            if param.grad is not None:
                param.grad.masked_fill_(~mask, 0)

    @torch.no_grad()
    def after(*_: Any) -> None:
        for param, mask in pairs:
            state = optimizer.state.get(param, {}).values()
            for tensor in (param, *(t for t in state if torch.is_tensor(t) and t.shape == param.shape)):
                tensor.masked_fill_(~mask, 0)

    after()
    return MaskedTraining([optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)])


def save_ticket(ticket: Ticket, path: str | Path) -> None:
    """Write a ticket: safetensors if the name ends so, else a file that `torch.load(weights_only=True)` reads.

    Raises:
        ModuleNotFoundError: a name in .safetensors without that package.
    """
    parts = {"mask": ticket.masks, "initial": ticket.initial}
    tensors = {
        f"{part}.{name}": value.detach().to("cpu", copy=True).contiguous()
        for part, values in parts.items()
        for name, value in values.items()
    }
    if _is_safetensors(path):
        from safetensors.torch import save_file

        save_file(tensors, str(path), metadata={"epoch": str(ticket.epoch)})
    else:
        torch.save({"epoch": ticket.epoch, "tensors": tensors}, path)


def load_ticket(path: str | Path) -> Ticket:
    """Read what `save_ticket` wrote, on the CPU.

    Raises:
        ValueError: a file of something else.
        ModuleNotFoundError: a name in .safetensors without that package.
    """
    if _is_safetensors(path):
        from safetensors import safe_open

        with safe_open(str(path), "pt") as file:
            saved = {"epoch": (file.metadata() or {}).get("epoch")}
            saved["tensors"] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    else:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict) or saved.get("epoch") is None or "tensors" not in saved:
        raise ValueError(f"{path} holds no ticket; save one with save_ticket")
    split: dict[str, dict[str, Tensor]] = {"mask": {}, "initial": {}}
    for name, value in saved["tensors"].items():
        part, _, rest = name.partition(".")
        split[part][rest] = value
    return Ticket(int(saved["epoch"]), split["mask"], split["initial"])


def _is_safetensors(path: str | Path) -> bool:
    if Path(path).suffix != ".safetensors":
        return False
    try:
        import safetensors  # noqa: F401
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path} needs the package safetensors; pip install it, or choose a name in .pt"
        ) from None
    return True


def _masked_params(model: Any, masks: Mapping[str, Tensor]) -> dict[str, Any]:
    named = named_of(model)
    for name, mask in masks.items():
        if name not in named:
            raise ValueError(f"the model has no parameter {name!r}, which a mask is for")
        if mask.dtype != torch.bool:
            raise TypeError(f"the mask of {name!r} must have dtype torch.bool, got {mask.dtype}")
        if mask.shape != named[name].shape:
            shapes = f"{tuple(mask.shape)}, the parameter {tuple(named[name].shape)}"
            raise ValueError(f"the mask of {name!r} has shape {shapes}")
    return {name: named[name] for name in masks}
