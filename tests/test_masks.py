"""Masks, and counts of what is left."""

from __future__ import annotations

import math

import pytest
import registry
import torch
from harness import same_bits, true_counts
from small import assert_unchanged, model, snapshot, train

from bregman_cuda import L1, AdaBreg, GroupEnvelope, GroupLasso, GroupMCP, LinBreg, Nuclear, ProxSGD
from bregman_cuda.optim._rule import COUNTERS

# Masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", registry.EVERY_RULE)
def test_masked_entries_are_zero_in_parameter_and_state(driver, rule, dtype):
    params = model(dtype=dtype)
    params[1].data = params[1].data.to(memory_format=torch.channels_last)
    reg = L1(0.05) if registry.takes(rule, "l1") else GroupLasso(0.05)
    optimizer = registry.EVERY_RULE[rule].make(params, reg, fused=driver.fused)
    train(optimizer, params, 2)
    masks = [torch.rand(p.shape) < 0.5 for p in params[:2]]
    for p, mask in zip(params, masks):
        optimizer.set_mask(p, mask)
        assert torch.equal(optimizer.get_mask(p), mask)
        assert bool((p[~mask] == 0).all()), "zero from now on, not from the next step"
    assert optimizer.get_mask(params[2]) is None
    train(optimizer, params, 3, begin=2)
    for p, mask in zip(params, masks):
        tensors = [p.detach(), *(v for k, v in optimizer.state[p].items() if k not in (*COUNTERS, "mask"))]
        assert all(bool((t[~mask] == 0).all()) for t in tensors)
        assert bool((p[mask] != 0).any())


def test_a_released_entry_starts_at_zero_and_can_live_again(driver):
    for rule in registry.RULES:
        p = torch.nn.Parameter(torch.ones(10))
        optimizer = registry.RULES[rule].make([p], L1(0.01), fused=driver.fused, lr=0.5)
        mask = torch.arange(10) % 2 == 0
        optimizer.set_mask(p, mask)
        p.grad = torch.full((10,), -1.0)
        optimizer.step()
        optimizer.set_mask(p, None)
        assert optimizer.get_mask(p) is None
        assert bool((p[~mask] == 0).all())
        for _ in range(2):
            optimizer.step()
        assert bool((p[~mask] > 0).all()), rule


def test_a_mask_beats_a_nan_gradient(driver):
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = AdaBreg([p], reg=L1(0.1), fused=driver.fused)
    optimizer.set_mask(p, torch.tensor([True, False, True, False]))
    p.grad = torch.tensor([1.0, math.nan, math.nan, 1.0])
    optimizer.step()
    assert p.isnan().tolist() == [False, False, True, False]
    assert p[1] == 0
    assert p[3] == 0


def test_bad_masks_are_refused(driver):
    p, other = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(1))
    optimizer = LinBreg([("w", p)], fused=driver.fused)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"the mask of parameter 'w' has shape \(3, 2\), the parameter \(2, 3\)"):
        optimizer.set_mask(p, torch.ones(3, 2, dtype=torch.bool))
    for bad, got in ((torch.ones(2, 3), r"torch\.float32"), ([True] * 3, "list"), (True, "bool")):
        wanted = rf"set_mask: the mask of parameter 'w' must be a tensor of dtype torch\.bool, got {got}"
        with pytest.raises(TypeError, match=wanted):
            optimizer.set_mask(p, bad)
    with pytest.raises(KeyError, match="not a parameter of this optimizer"):
        optimizer.set_mask(other, None)
    assert_unchanged(optimizer, before)


def test_a_mask_follows_its_parameter_to_another_memory_format(driver):
    p = torch.nn.Parameter(torch.ones(2, 3, 2, 2))
    optimizer = LinBreg([p], reg=L1(0.01), fused=driver.fused)
    mask = torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    optimizer.set_mask(p, mask)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    p.data = p.data.to(memory_format=torch.channels_last)
    optimizer.step()
    assert torch.equal(optimizer.get_mask(p), mask)
    assert torch.equal(p != 0, mask)

    twin = torch.nn.Parameter(torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last))
    loaded = LinBreg([twin], reg=L1(0.01), fused=driver.fused)
    loaded.load_state_dict(saved)
    assert torch.equal(loaded.get_mask(twin), mask)


@pytest.mark.parametrize("reg", [GroupEnvelope(0.3, 3), Nuclear(0.3), GroupMCP(0.3, 2.0), GroupLasso(0.3)], ids=str)
def test_a_mask_leaves_one_prox_scale_one(reg):
    """A scale that is a 0-dim tensor is not one per element, which some penalties refuse and others round otherwise."""
    sides = []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        params = model([(6, 5)], torch.float64)
        optimizer = ProxSGD(params, lr=lr, reg=reg, fused=False, capturable=torch.is_tensor(lr))
        optimizer.set_mask(params[0], torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.5)
        train(optimizer, params, 2)
        sides.append(params[0].detach())
    assert same_bits(*sides)


def test_the_mask_of_a_number_leaves_the_prox_scale_to_others():
    """Tensors that share a budget share its 0-dim scale, which has the shape of the first of them."""
    mask, sides = torch.tensor(False), []
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        params = model([(), (6, 5)], torch.float64)
        reg = GroupEnvelope(0.3, 1, (), scope="all")
        optimizer = ProxSGD(params, lr=lr, reg=reg, fused=False, capturable=torch.is_tensor(lr))
        optimizer.set_mask(params[0], mask)
        train(optimizer, params, 2)
        assert params[0] == 0
        sides.append(params[1].detach())
    assert same_bits(*sides)


# Counting


@pytest.mark.parametrize("reg", registry.PENALTIES)
def test_counts_are_those_of_the_final_parameters(driver, reg):
    params = model([(6, 5, 2), (3, 4, 3), (1, 2, 700), (0, 2, 3)], seed=3)
    case = registry.PENALTIES[reg]
    rule = registry.RULES["adabreg" if registry.takes("adabreg", reg) else "proxsgd"]
    optimizer = rule.make(params, case(0.4), fused=driver.fused, count_nonzeros=True)
    copied = model([(6, 5, 2), (3, 4, 3), (1, 2, 700), (0, 2, 3)], seed=3)
    counting = rule.make(copied, case(0.4), fused=driver.fused)
    train(optimizer, params, 2)
    train(counting, copied, 2)
    for report in (optimizer.density(), counting.density()):
        assert [(r.nonzeros, r.nonzero_groups) for r in report.rows] == [true_counts(p, case()) for p in params]
        assert report.nonzeros == sum(int(torch.count_nonzero(p)) for p in params)
        assert report.density == report.nonzeros / report.numel == pytest.approx(1 - report.sparsity)


def test_density_rows_are_what_is_regularized_or_masked(driver):
    weight, bias, masked = model([(3, 4), (3,), (5,)])
    optimizer = LinBreg(
        [{"params": [("w", weight)], "reg": L1(0.1)}, {"params": [("b", bias), ("m", masked)]}],
        fused=driver.fused, count_nonzeros=True,
    )  # fmt: skip
    optimizer.set_mask(masked, torch.arange(5) < 3)
    train(optimizer, [weight, bias, masked], 1)
    report = optimizer.density()
    assert [(r.name, r.shape, r.numel) for r in report.rows] == [("w", (3, 4), 12), ("m", (5,), 5)]
    assert [r.nonzeros for r in report.rows] == [int(torch.count_nonzero(weight)), 3]
    assert report.all_numel == 20


def test_density_before_the_first_step_counts_now(driver):
    params = model()
    report = LinBreg(params, reg=L1(0.1), fused=driver.fused, count_nonzeros=True).density()
    assert [r.nonzeros for r in report.rows] == [int(torch.count_nonzero(p)) for p in params]


def test_counting_that_was_switched_off_leaves_nothing_stale(driver):
    params = model()
    optimizer = LinBreg(params, lr=5.0, reg=L1(0.1), fused=driver.fused, count_nonzeros=True)
    train(optimizer, params, 1)
    optimizer.param_groups[0]["count_nonzeros"] = False
    optimizer.param_groups[0]["reg"].lam = 20.0
    train(optimizer, params, 1, begin=1)
    optimizer.param_groups[0]["count_nonzeros"] = True
    assert [r.nonzeros for r in optimizer.density().rows] == [int(torch.count_nonzero(p)) for p in params]
