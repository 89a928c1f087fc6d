"""Steps whose scalars live on the device: nothing is read on the host, so that a CUDA graph can hold them.

The CPU is the device here. What needs a graph is in test_gpu.py.
"""

from __future__ import annotations

import copy

import pytest
import registry
import torch
from harness import same_bits
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bregman_cuda import L1, AdaBreg, GroupLasso, LinBreg, SparseGroupLasso
from bregman_cuda.optim import _base

RULES = pytest.mark.parametrize("rule", registry.EVERY_RULE)
REGS = ("l1", "group_out", "sparse_group_out")
PAIRS = [(rule, reg) for rule in registry.EVERY_RULE for reg in REGS if registry.takes(rule, reg)]
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select"}


class NoHostReads(TorchDispatchMode):
    """Refuses every operator whose result the host waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in READS:
            raise AssertionError(f"{func} reads a device value on the host")
        return func(*args, **(kwargs or {}))


def make(rule: str, driver, reg=None, **options):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((6, 5), (4, 3, 3, 3))]
    for p in params:
        p.grad = torch.randn_like(p)
    reg = GroupLasso(0.1) if reg is None else reg
    return params, registry.EVERY_RULE[rule].make([*params], reg, fused=driver.fused, **options)


def everything(params, optimizer) -> list[torch.Tensor]:
    return [*params, *(t for p in params for _, t in sorted(optimizer.state[p].items()))]


@pytest.mark.parametrize(("rule", "reg"), PAIRS)
def test_the_same_steps_without_reading_anything(rule, reg, driver):
    params, optimizer = make(rule, driver, registry.REGULARIZERS[reg](0.1), capturable=True, count_nonzeros=True)
    twins, twin = make(rule, driver, registry.REGULARIZERS[reg](0.1), count_nonzeros=True)
    optimizer.step()  # makes the plans
    twin.step()
    for _ in range(3):
        with NoHostReads():
            optimizer.step()
        twin.step()
    for ours, theirs in zip(everything(params, optimizer), everything(twins, twin), strict=True):
        # Powers of the betas come from torch here and from libm there.
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-6, atol=1e-7)
    assert (
        optimizer.density().nonzeros
        == twin.density().nonzeros
        == sum(int(optimizer.prox_point(p).count_nonzero()) for p in params)
    )


@RULES
def test_an_overflow_flag_on_the_device_skips_everything(rule, driver):
    params, optimizer = make(rule, driver, capturable=True)
    optimizer.step()
    before = [t.detach().clone() for t in everything(params, optimizer)]
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.full((1,), 4.0)
    with NoHostReads():
        optimizer.step()
    assert all(same_bits(a, b.detach()) for a, b in zip(before, everything(params, optimizer), strict=True))

    twins, twin = make(rule, driver, capturable=True)
    twin.step()
    optimizer.found_inf = torch.zeros(())
    for p in params:
        p.grad *= 4
    with NoHostReads():
        optimizer.step()
    twin.step()
    assert all(
        same_bits(a.detach(), b.detach())
        for a, b in zip(everything(params, optimizer), everything(twins, twin), strict=True)
    )


def test_a_tensor_lr_and_lam_are_read_at_every_step(driver):
    lr, lam = torch.tensor(0.5), torch.tensor(0.1)
    p = nn.Parameter(torch.tensor([1.0, 0.0, -2.0]))
    p.grad = torch.tensor([0.5, 0.5, 0.0])
    q = nn.Parameter(p.detach().clone())
    q.grad = p.grad.clone()
    optimizer = LinBreg([p], lr=lr, reg=L1(lam), capturable=True, fused=driver.fused)
    twin = LinBreg([q], lr=0.5, reg=L1(0.1), fused=driver.fused)
    for new_lr, new_lam in ((0.5, 0.1), (0.25, 0.1), (0.25, 0.7)):
        lr.fill_(new_lr)
        lam.fill_(new_lam)
        twin.param_groups[0]["lr"], twin.param_groups[0]["reg"].lam = new_lr, new_lam
        optimizer.step()
        twin.step()
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_a_tensor_lam_in_a_group_penalty(driver):
    lam = torch.tensor(0.2)
    params, optimizer = make("proxsgd", driver, SparseGroupLasso(lam, 0.25), capturable=True)
    twins, twin = make("proxsgd", driver, SparseGroupLasso(0.2, 0.25))
    for _ in range(2):
        optimizer.step()
        twin.step()
    for p, q in zip(params, twins):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@RULES
def test_resume(rule, driver):
    params, optimizer = make(rule, driver, capturable=True)
    for _ in range(2):
        optimizer.step()
    twins, twin = make(rule, driver, capturable=True)
    with torch.no_grad():
        for p, q in zip(params, twins):
            q.copy_(p)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert twin.param_groups[0]["capturable"] is True
    for _ in range(2):
        optimizer.step()
        twin.step()
    assert all(
        same_bits(a.detach(), b.detach())
        for a, b in zip(everything(params, optimizer), everything(twins, twin), strict=True)
    )


def test_switching_it_on_and_off_keeps_the_count(driver):
    params, optimizer = make("adabreg", driver)
    twins, twin = make("adabreg", driver)
    for capturable in (False, True, False):
        optimizer.param_groups[0]["capturable"] = capturable
        optimizer.step()
        twin.step()
        assert [float(optimizer.state[p]["step"]) for p in params] == [float(twin.state[q]["step"]) for q in twins]
    for p, q in zip(params, twins):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_capture_is_refused_where_it_would_be_wrong(driver, monkeypatch):
    params, plain = make("linbreg", driver)
    capturable = LinBreg(params, capturable=True, fused=driver.fused)
    monkeypatch.setattr(_base, "is_capturing", lambda: True)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="set capturable=True"):
        plain.step()
    with pytest.raises(RuntimeError, match="take a step with them outside of it first"):
        capturable.step()
    assert all(same_bits(a, b.detach()) for a, b in zip(before, params))
    monkeypatch.setattr(_base, "is_capturing", lambda: False)
    capturable.step()
    monkeypatch.setattr(_base, "is_capturing", lambda: True)
    capturable.step()


def test_check_finite_cannot_be_captured():
    with pytest.raises(ValueError, match="check_finite reads gradients on the host"):
        AdaBreg([nn.Parameter(torch.ones(2))], capturable=True, check_finite=True)


def test_a_tensor_of_several_elements_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"L1: a tensor lam must have one floating-point element, got .* of shape \(2,\)"
    ):
        L1(torch.ones(2))


def test_a_skipped_step_leaves_no_count(driver):
    p = nn.Parameter(torch.ones(10))
    p.grad = torch.full((10,), torch.inf)
    optimizer = registry.RULES["proxsgd"].make([p], L1(0.1), capturable=True, count_nonzeros=True, fused=driver.fused)
    optimizer.found_inf = torch.tensor(1.0)
    for _ in range(2):
        optimizer.step()
        assert optimizer.density().rows[0].nonzeros == 10
