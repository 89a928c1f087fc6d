"""A small model, its gradients, what an optimizer must not have changed, and what must not be read."""

from __future__ import annotations

import copy

import registry
import torch
from harness import same_bits
from torch.utils._python_dispatch import TorchDispatchMode

from bregman_cuda.optim._rule import COUNTERS

SHAPES = [(6, 5), (4, 3, 3, 3), (7, 2)]


def model(shapes=SHAPES, dtype=torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(registry.values(s, dtype, generator, 0.3)) for s in shapes]


def set_grads(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def train(optimizer, params, steps: int, begin: int = 0) -> None:
    for i in range(begin, begin + steps):
        set_grads(params, i)
        optimizer.step()


def snapshot(optimizer) -> list:
    """Bits of every parameter and state tensor, and all options."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        (i, k): v.clone()
        for i, p in enumerate(params)
        for k, v in optimizer.state.get(p, {}).items()
        if k not in COUNTERS
    }
    options = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return [[p.detach().clone() for p in params], state, options]


def assert_unchanged(optimizer, before: list) -> None:
    """Nothing the optimizer had has changed; state may have been created, at its initial value."""
    now = snapshot(optimizer)
    assert all(map(same_bits, now[0], before[0])), "a parameter changed"
    assert before[1].keys() <= now[1].keys()
    assert all(same_bits(now[1][key], value) for key, value in before[1].items()), "a state tensor changed"
    assert repr(now[2]) == repr(before[2]), "an option changed"


class NoReads(TorchDispatchMode):
    """Raises for what makes the host wait for the device: reads of numbers and shapes that depend on values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, name
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        assert not by_mask, "a boolean index reads its mask"
        return func(*args, **(kwargs or {}))


def reg_distance(reg, x: torch.Tensor, grad: torch.Tensor) -> float:
    return float(reg.subdiff_distance(x, grad).max())
