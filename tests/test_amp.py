"""Automatic mixed precision: torch's own GradScaler (on the CPU), overflow, clipping, 16-bit training on real data."""

from __future__ import annotations

import copy

import pytest
import registry
import torch
from harness import same_bits
from torch import Tensor, nn
from torch.amp import GradScaler

from bregman_cuda import L1, AdaBreg, GroupLasso, LinBreg, sparse_init_
from bregman_cuda.experiments.data import digits
from bregman_cuda.optim._rule import COUNTERS

RULES = pytest.mark.parametrize("rule", registry.EVERY_RULE)
FUSED = pytest.mark.parametrize("fused", [True, False])


def make(rule: str, fused: bool, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((6, 5), (4, 3, 3, 3))]
    return params, registry.EVERY_RULE[rule].make([*params], GroupLasso(0.1), fused=fused)


def gradients(params: list[nn.Parameter], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def everything(params: list[nn.Parameter], optimizer) -> list[Tensor]:
    return [*params, *(t for p in params for _, t in sorted(optimizer.state[p].items()))]


def equal(first, second) -> bool:
    pairs = zip(everything(*first), everything(*second), strict=True)
    return all(same_bits(a.detach(), b.detach()) for a, b in pairs)


def backward(scaler: GradScaler, params: list[nn.Parameter], grads: list[Tensor]) -> None:
    """A loss whose gradients are `grads`, scaled."""
    for p in params:
        p.grad = None
    scaler.scale(sum((p * g).sum() for p, g in zip(params, grads))).backward()


@RULES
@FUSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scaled_steps_equal_plain_ones(rule, fused, dtype):
    """Powers of two scale without rounding: the same bits. fp16 gradients, which `unscale_` refuses, work, too."""
    plain, scaled = make(rule, fused, dtype), make(rule, fused, dtype)
    scaler = GradScaler("cpu", init_scale=2.0**4)
    for step in range(3):
        grads = gradients(plain[0], step)
        for p, g in zip(plain[0], grads):
            p.grad = g
        plain[1].step()
        backward(scaler, scaled[0], grads)
        scaler.step(scaled[1])
        scaler.update()
    assert equal(plain, scaled)
    assert scaled[1].state[scaled[0][0]]["step"] == 3
    assert same_bits(scaled[0][0].grad, plain[0][0].grad * 2**4)  # documented: .grad stays scaled


@RULES
@FUSED
def test_an_overflow_changes_nothing(rule, fused):
    params, optimizer = make(rule, fused)
    scaler = GradScaler("cpu", init_scale=4.0)
    backward(scaler, params, gradients(params, 0))
    scaler.step(optimizer)
    scaler.update()
    before = copy.deepcopy([t.detach() for t in everything(params, optimizer)])
    backward(scaler, params, [torch.full_like(p, torch.inf) for p in params])
    scaler.step(optimizer)
    scaler.update()
    assert all(same_bits(a, b.detach()) for a, b in zip(before, everything(params, optimizer), strict=True))
    assert scaler.get_scale() == 2.0
    backward(scaler, params, gradients(params, 1))
    scaler.step(optimizer)
    assert optimizer.state[params[0]]["step"] == 2
    assert not same_bits(before[0], params[0].detach())


def test_an_overflow_in_the_first_step_and_with_check_finite():
    p = nn.Parameter(torch.ones(3))
    optimizer = AdaBreg([p], check_finite=True)
    scaler = GradScaler("cpu", init_scale=2.0)
    backward(scaler, [p], [torch.full((3,), torch.nan)])
    scaler.step(optimizer)
    assert p.tolist() == [1.0, 1.0, 1.0]
    assert p not in optimizer.state


@RULES
def test_clipping_between(rule):
    """unscale_, clip, step: as clipping plain gradients."""
    plain, scaled = make(rule, True), make(rule, True)
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for step in range(3):
        grads = gradients(plain[0], step)
        for p, g in zip(plain[0], grads):
            p.grad = g.clone()
        nn.utils.clip_grad_norm_(plain[0], 0.5)
        plain[1].step()
        backward(scaler, scaled[0], grads)
        scaler.unscale_(scaled[1])
        norm = nn.utils.clip_grad_norm_(scaled[0], 0.5)
        assert norm < 100  # of the unscaled gradients
        scaler.step(scaled[1])
        scaler.update()
    assert equal(plain, scaled)


def test_a_scale_of_the_users_own_multiplies():
    """As in torch (pytorch #123428): `optimizer.grad_scale` set before `scaler.step` comes on top."""
    (p,) = params = [nn.Parameter(torch.zeros(2))]
    optimizer = LinBreg(params, lr=1.0)
    optimizer.grad_scale = torch.tensor(4.0)
    scaler = GradScaler("cpu", init_scale=2.0)
    backward(scaler, params, [torch.tensor([4.0, -8.0])])
    scaler.step(optimizer)
    assert p.tolist() == [-1.0, 2.0]
    assert not hasattr(optimizer, "grad_scale")


def test_maximize_and_missing_gradients():
    p, idle = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2))
    optimizer = LinBreg([p, idle], lr=1.0, maximize=True)
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale((p * torch.tensor([1.0, 2.0])).sum()).backward()
    scaler.step(optimizer)
    assert p.tolist() == [1.0, 2.0]
    assert idle.tolist() == [1.0, 1.0]


# Training in 16 bits


def train(dtype: torch.dtype, autocast: bool, optimizer_type) -> tuple[float, float, float]:
    """Final training loss, test accuracy and density of a small network on the digits."""
    torch.manual_seed(0)
    data = digits()
    x, y = data.train_x.flatten(1), data.train_y
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    sparse_init_(model, density=0.3)
    model.to(dtype)
    lr = 0.1 if optimizer_type is LinBreg else 1e-3
    optimizer = optimizer_type(model.parameters(), lr=lr, reg=L1(0.1), fused=True)
    scaler = GradScaler("cpu", enabled=dtype is not torch.bfloat16)
    order = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(15):
        for index in torch.randperm(len(x), generator=order).split(64):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss = nn.functional.cross_entropy(model(x[index].to(dtype)).float(), y[index])
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    with torch.no_grad():
        accuracy = (model(data.test_x.flatten(1).to(dtype)).argmax(1) == data.test_y).float().mean().item()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return sum(losses[-22:]) / 22, accuracy, (weights != 0).float().mean().item()


@pytest.mark.parametrize("optimizer_type", [LinBreg, AdaBreg])
def test_16_bit_parameters_train_like_32_bit_ones(optimizer_type):
    """The fp32 dual is the master weight: 16-bit parameters reach the same loss, autocast as well."""
    loss, accuracy, density = train(torch.float32, False, optimizer_type)
    assert accuracy > 0.9
    assert density < 0.6
    for dtype, autocast in ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True)):
        other = train(dtype, autocast, optimizer_type)
        assert abs(other[0] - loss) < 0.05, (dtype, autocast)
        assert other[1] > accuracy - 0.03
        assert abs(other[2] - density) < 0.1


def test_small_steps_are_not_lost_in_bf16():
    """Steps below bf16's resolution add up in the dual."""
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = LinBreg([p], lr=1e-4)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.float().sub(0.99).abs().max() < 0.004


# Changes of dtype


@RULES
@FUSED
def test_state_follows_the_parameters_dtype(rule, fused):
    """model.double() and back: state keeps its values and takes the dtype that belongs to the parameter's."""
    params, optimizer = make(rule, fused)
    reads_param = optimizer._rule(optimizer.param_groups[0]).reads_param
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        for p in params:
            p.grad = None
            p.data = p.data.to(dtype)
        for p, g in zip(params, gradients(params, 5)):
            p.grad = g
        old = {k: v.clone() for k, v in optimizer.state[params[0]].items()}
        optimizer.step()
        state = optimizer.state[params[0]]
        assert {t.dtype for key, t in state.items() if key not in COUNTERS} <= {wide}
        assert ("master" in state) == (dtype is torch.bfloat16 and reads_param)
        assert "dual" not in old or float((state["dual"].double() - old["dual"].double()).abs().max()) < 5
    assert state["step"] == 3


@pytest.mark.parametrize("change", [lambda t: t.bfloat16(), lambda t: torch.zeros(5)])
def test_a_gradient_that_does_not_fit_changes_nothing(change):
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = LinBreg([{"params": [first]}, {"params": [second]}], lr=1.0, fused=True)
    first.grad, second.grad = torch.ones(3), torch.ones(3)
    second.data = change(second.data)
    with pytest.raises(RuntimeError, match=r"its gradient torch\.float32 and .*they must agree"):
        optimizer.step()
    assert first.tolist() == [1.0, 1.0, 1.0]


def test_an_error_under_the_scaler_leaves_no_scale_behind():
    p = nn.Parameter(torch.ones(4))
    optimizer, scaler = LinBreg([p], lr=0.1), GradScaler("cpu", init_scale=8.0)
    backward(scaler, [p], [torch.ones(4)])
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="lr"):
        scaler.step(optimizer)
    optimizer.param_groups[0]["lr"] = 0.5
    p.grad = torch.ones(4)
    optimizer.step()
    assert p.tolist() == [0.5] * 4
