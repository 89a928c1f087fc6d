"""RigL: dynamic sparse training with a fixed number of weights, the baseline of the field, on any optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Union

import torch
from torch import Tensor, nn

from ..optim import SparseOptimizer
from ..optim._masks import pack, packed_size, unpack
from ..optim._shards import gathered, is_sharded, local, sharded_as
from ..regularizers._base import check_count, check_number
from .layers import weight_tensors
from .report import DensityReport, DensityRow

Weights = Union[nn.Module, Iterable[Union[Tensor, tuple[str, Tensor]]]]


class RigL:
    r"""Rigged Lottery (Evci, Gale, Menick, Castro, Elsen, ICML 2020, algorithm 1) on top of an optimizer.

    Every layer trains a fixed number n of its weights, the others are exactly zero. Call `step` where you called
    `optimizer.step`: at step t, if t is a multiple of `every` and t < `end`, it changes the masks **instead of** the
    weights, as in the paper: with f = alpha/2 (1 + cos(pi t / end)) each layer drops its round(f n) active weights of
    smallest magnitude and grows as many with the largest gradient among all that were not kept. A weight that has
    just been dropped may grow back and keeps its value; the others start at zero, and so do their entries in the
    optimizer's state. At all other steps `optimizer` steps, with gradients, state and weights masked.

    Growth reads `.grad` as it is when `step` is called: with gradient accumulation the sum since `zero_grad`. Unlike
    in other steps it must be dense there, so call `zero_grad` after `step`: with torch's optimizers `step` leaves the
    masked gradient behind. Optimizers of this package get the masks by `set_mask` (masks set before are replaced).

    Numbers of weights are known to the host and never change, so that nothing waits for the device. `GradScaler`
    works by ``scaler.step(rigl)``, and ``scaler.unscale_(rigl)``; schedulers take the optimizer. Under DDP every rank
    must draw the same masks: give each a generator of the same seed. A sharded weight (DTensor) has the mask that its
    mesh's first rank draws, and is gathered with its gradient when its mask changes, one at a time; all ranks call
    `step` and `state_dict` together, and under a GradScaler all have to skip the same steps (torch's scaler asks the
    ranks that share the first gradient).

    Args:
        model: a module, whose Linear, convolution and attention weights are masked (those of `param_groups`), or
            parameters, or (name, parameter) pairs. Weights keep their values where a mask keeps them.
        optimizer: any `torch.optim.Optimizer` that holds these weights.
        density: share of weights to train over all masked layers, in (0, 1]; their number is round(density * total).
        distribution: "erk" (Erdos-Renyi-kernel: a layer's density is proportional to the sum of its dims over their
            product; layers that would exceed 1 become dense, and the rest is distributed anew) or "uniform".
        alpha: share that is dropped in the first updates, in [0, 1].
        every: steps between mask updates.
        end: no updates from this step on; the paper takes 75% of the training.
        first_dense: leave the first weight dense, and out of `density`, as the paper does with "uniform".
        generator: where the random first masks come from; they are drawn on its device (default: each weight's).

    Raises:
        TypeError, ValueError: a value out of its range, a model without weights, a weight that the optimizer does not
            hold, more layers than weights to train.
        All are raised before anything changes.

    >>> model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> rigl = RigL(model, optimizer, density=0.1, every=100, end=3000)
    >>> [row.nonzeros for row in rigl.density().rows], rigl.density().nonzeros
    ([393, 157], 550)
    """

    def __init__(
        self,
        model: Weights,
        optimizer: torch.optim.Optimizer,
        density: float = 0.1,
        distribution: str = "erk",
        alpha: float = 0.3,
        every: int = 100,
        *,
        end: int,
        first_dense: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"RigL: optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
        check_number("RigL", "density", density, 0.0, 1.0)
        check_number("RigL", "alpha", alpha, 0.0, 1.0)
        if distribution not in ("erk", "uniform"):
            raise ValueError(f"RigL: distribution must be 'erk' or 'uniform', got {distribution!r}")
        every, end = (check_count("RigL", name, value, 1) for name, value in (("every", every), ("end", end)))
        named = _named(model)
        if first_dense and len(named) == 1:
            raise ValueError(f"RigL: first_dense=True leaves {named[0][0]!r}, the only weight, dense; use False")
        named = named[1 if first_dense else 0 :]
        held = {p for group in optimizer.param_groups for p in group["params"]}
        for name, weight in named:
            if weight not in held:
                raise ValueError(f"RigL: the optimizer does not hold weight {name!r}")
        shapes = [tuple(weight.shape) for _, weight in named]
        self.counts = layer_counts(shapes, density, distribution)

        self.optimizer, self.alpha, self.every, self.end = optimizer, float(alpha), every, end
        self.names = [name for name, _ in named]
        self.weights = [weight for _, weight in named]
        self.steps = 0
        self.masks = [_first_mask(w, n, generator) for w, n in zip(self.weights, self.counts)]
        self._apply(self.masks)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's, so that a GradScaler takes this for an optimizer."""
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step: of the optimizer, or of the masks (see the class). Returns the closure's loss, if any."""
        step = self.steps + 1
        if step % self.every == 0 and step < self.end:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._update(0.5 * self.alpha * (1 + math.cos(math.pi * step / self.end)))
        elif isinstance(self.optimizer, SparseOptimizer):  # masks in the same pass
            loss = self.optimizer.step(closure)
        else:
            loss = self._masked_step(closure)
        self.steps = step
        return loss

    def density(self) -> DensityReport:
        """Active weights per masked layer; for what is zero in the model right now, see `bregman_cuda.density`.

        A weight that has just grown is active, and zero until the next step.
        """
        rows = [
            DensityRow(name, tuple(weight.shape), weight.numel(), count)
            for name, weight, count in zip(self.names, self.weights, self.counts)
        ]
        return DensityReport(rows)

    def state_dict(self) -> dict[str, Any]:
        """Step count and bit-packed masks by weight, as plain data that `torch.load(weights_only=True)` reads."""
        return {
            "steps": self.steps,
            "masks": {name: pack(gathered(mask)) for name, mask in zip(self.names, self.masks)},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Make model, optimizer and RigL first, since RigL's first masks erase weights; then load all three, in any order.

        Raises:
            KeyError, TypeError, ValueError: a dict of another model or density, or damaged; nothing was changed.
        """
        if missing := {"steps", "masks"} - {*state_dict}:
            raise KeyError(f"RigL: the state dict has no {', '.join(map(repr, sorted(missing)))}")
        steps, saved = state_dict["steps"], state_dict["masks"]
        check_count("RigL", "steps in the state dict", steps)
        if {*saved} != {*self.names}:
            odd = sorted({*saved} ^ {*self.names})
            raise KeyError(f"RigL: the state dict has masks of other weights: {', '.join(map(repr, odd))} differ")
        loaded = []
        for name, weight, count in zip(self.names, self.weights, self.counts):
            packed, size = saved[name], packed_size(weight)
            if not torch.is_tensor(packed) or packed.dtype != torch.uint8 or packed.shape != (size,):
                what = f"{packed.dtype} of shape {tuple(packed.shape)}" if torch.is_tensor(packed) else repr(packed)
                raise ValueError(f"RigL: the mask of {name!r} must be torch.uint8 of shape ({size},), got {what}")
            whole = torch.empty(weight.shape, device=weight.device) if is_sharded(weight) else weight
            mask = unpack(packed.to(weight.device), whole)
            if (active := int(mask.sum())) != count:
                raise ValueError(
                    f"RigL: the state dict has {active} active weights in {name!r}, this RigL {count}: "
                    "another density or distribution?"
                )
            loaded.append(_laid_out(weight, mask))
        self.steps, self.masks = steps, loaded
        self._apply(loaded)

    def _update(self, fraction: float) -> None:
        masks, before = [], self._current_masks()
        for weight, old, count in zip(self.weights, before, self.counts):
            grad = weight.grad
            changed = round(fraction * count)
            if grad is not None and changed:
                old = _laid_out(weight, _moved(gathered(weight), gathered(grad), gathered(old), count, changed))
            masks.append(old)
        self.masks = masks
        self._apply([old & new for old, new in zip(before, masks)])

    @torch.no_grad()
    def _apply(self, lives: list[Tensor]) -> None:
        """The masks are new: weights and optimizer state become zero, except where they live on."""
        for weight, mask, live in zip(self.weights, self.masks, lives):
            if isinstance(self.optimizer, SparseOptimizer):
                self.optimizer.set_mask(weight, mask)  # it keeps weights and state at zero outside of the old mask
                continue
            for value in (weight, *self.optimizer.state.get(weight, {}).values()):
                if torch.is_tensor(value) and value.shape == weight.shape:
                    local(value).masked_fill_(~local(live), 0)

    def _masked_step(self, closure: Callable[[], Any] | None) -> Any:
        masks = self._current_masks()

        def mask_gradients() -> None:
            for weight, mask in zip(self.weights, masks):
                grad: Any = weight.grad
                if grad is None:
                    continue
                if is_sharded(grad) and grad.placements != (wanted := getattr(weight, "placements", None)):
                    weight.grad = grad = grad.redistribute(placements=wanted)
                local(grad).masked_fill_(~local(mask), 0)

        def masked_closure() -> Any:
            assert closure is not None
            loss = closure()
            mask_gradients()
            return loss

        if closure is None:
            mask_gradients()
            loss = self.optimizer.step()
        else:
            loss = self.optimizer.step(masked_closure)
        for weight, mask in zip(self.weights, masks):  # also against an update without a gradient
            local(weight).masked_fill_(~local(mask), 0)
        return loss

    def _current_masks(self) -> list[Tensor]:
        """The masks where the weights are: a model may have moved since."""
        self.masks = [mask.to(weight.device) for mask, weight in zip(self.masks, self.weights)]
        return self.masks


def layer_counts(shapes: Sequence[tuple[int, ...]], density: float, distribution: str) -> list[int]:
    """How many weights of each layer to train: integers, at least 1 each, whose sum is exactly round(density * total).

    Raises:
        ValueError: fewer weights to train than layers.
    """
    sizes = [math.prod(shape) for shape in shapes]
    budget = round(density * sum(sizes))
    if budget < len(sizes):
        raise ValueError(
            f"RigL: density={density!r} leaves {budget} of {sum(sizes)} weights, fewer than the {len(sizes)} layers"
        )
    scores = [sum(shape) / size if distribution == "erk" else 1.0 for shape, size in zip(shapes, sizes)]
    dense: set[int] = set()
    while True:
        rest = [i for i in range(len(sizes)) if i not in dense]
        free = budget - sum(sizes[i] for i in dense)
        scale = free / sum(scores[i] * sizes[i] for i in rest) if rest else 0.0
        # All that exceed 1 at once: what they give back only raises the others.
        over = {i for i in rest if scale * scores[i] > 1}
        if not over:
            break
        dense |= over
    wanted = [float(n) if i in dense else scale * scores[i] * n for i, n in enumerate(sizes)]
    counts = [min(n, max(1, math.floor(w))) for w, n in zip(wanted, sizes)]
    while (short := budget - sum(counts)) != 0:  # the largest remainders go up, the largest excesses down
        sign = 1 if short > 0 else -1
        open_ = [i for i, n in enumerate(sizes) if (counts[i] < n if short > 0 else counts[i] > 1)]
        for i in sorted(open_, key=lambda i: sign * (counts[i] - wanted[i]))[: abs(short)]:
            counts[i] += sign
    return counts


def _named(model: Weights) -> list[tuple[str, Tensor]]:
    named: list[tuple[str, Tensor]] = []
    if isinstance(model, nn.Module):
        named = [(weight.name, weight.tensor) for weight in weight_tensors(model)]
    elif isinstance(model, Tensor) or not isinstance(model, Iterable):
        raise TypeError(f"RigL needs a torch.nn.Module or an iterable of parameters, got {type(model).__name__}")
    else:
        for index, item in enumerate(model):
            name, weight = item if isinstance(item, tuple) else (f"weight {index}", item)
            if not isinstance(weight, Tensor) or not weight.is_leaf or not weight.is_floating_point():
                raise TypeError(f"RigL: {name!r} must be a floating-point parameter, got {type(weight).__name__}")
            named.append((name, weight))
    if not named:
        raise ValueError(f"RigL: {type(model).__name__} has no weights to mask")
    for name, weight in named:
        if not weight.numel():
            raise ValueError(f"RigL: weight {name!r} of shape {tuple(weight.shape)} has no elements")
    for what, keys in (("name", [name for name, _ in named]), ("weight", [id(weight) for _, weight in named])):
        twice = [name for i, (name, _) in enumerate(named) if keys[i] in keys[:i]]
        if twice:
            raise ValueError(f"RigL: {twice[0]!r} comes with a {what} that is given twice")
    return named


def _laid_out(weight: Any, mask: Tensor) -> Any:
    """A mask that every rank holds as a whole, sharded as its weight."""
    return sharded_as(weight, mask) if is_sharded(weight) else mask


def _first_mask(weight: Any, count: int, generator: torch.Generator | None) -> Any:
    if not is_sharded(weight):
        return _random_mask(weight, count, generator)
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh, drawn = weight.device_mesh, _random_mask(torch.empty(weight.shape, device=weight.device), count, generator)
    return sharded_as(weight, local(distribute_tensor(drawn, mesh, [Replicate()] * mesh.ndim)))


def _random_mask(weight: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    device = weight.device if generator is None else generator.device
    chosen = torch.randperm(weight.numel(), generator=generator, device=device)[:count].to(weight.device)
    return _mask_of(weight, chosen)


def _mask_of(weight: Tensor, *chosen: Tensor) -> Tensor:
    """The mask that is set at these indices of the flattened weight."""
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    for indices in chosen:
        mask.scatter_(0, indices, True)
    return mask.view(weight.shape)


def _moved(weight: Tensor, grad: Tensor, old: Tensor, count: int, changed: int) -> Tensor:
    """Keep the count - changed largest active weights, and grow the `changed` largest gradients among the others."""
    out = torch.full((), -1.0, dtype=weight.dtype, device=weight.device)  # below every magnitude; NaN is above
    kept = torch.where(old, weight.abs(), out).flatten().topk(count - changed).indices
    among = ~_mask_of(weight, kept)
    grown = torch.where(among, grad.abs(), out).flatten().topk(changed).indices
    return _mask_of(weight, kept, grown)
