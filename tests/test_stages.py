"""Stages of RMDA and RAMDA: restarts, what starts them, and the momentum that grows at the end."""

from __future__ import annotations

import copy
import math

import pytest
import registry
import torch
from harness import same_bits
from small import model, train

from bregman_cuda import L1, RAMDA, RMDA, LinBreg, MomentumGrowth, Restarts

RULES = ["rmda", "rmda_averaged", "ramda", "ramda_averaged"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_after_a_restart_it_is_a_new_optimizer(driver, rule, dtype):
    """In all groups, for parameters of different step counts, at the full width of 16-bit ones; masks stay."""
    params = model(dtype=dtype)
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.125}]
    optimizer = registry.RULES[rule].make(groups, L1(0.05), fused=driver.fused)
    optimizer.set_mask(params[0], torch.rand(params[0].shape) < 0.6)
    train(optimizer, params, 2)
    params[1].grad = None
    optimizer.step()
    optimizer.restart()
    for p in params:
        state = optimizer.state[p]
        assert float(state["step"]) == float(state["alpha"]) == 0
        assert same_bits(state["start"], state.get("master", state["start"]))
        assert same_bits(state["start"].to(dtype), p.detach())  # where there is no copy: the prox point, unrounded
        assert dtype == torch.float32 or not torch.equal(state["start"], p.detach().float())
        assert same_bits(optimizer.prox_point(p), p.detach())
        assert not state["gradient_sum"].any()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = registry.RULES[rule].make(
        [{"params": twins[:1]}, {"params": twins[1:], "lr": 0.125}], L1(0.05), fused=driver.fused
    )
    fresh.set_mask(twins[0], optimizer.get_mask(params[0]))
    if dtype == torch.float32:  # a fresh optimizer has no fp32 copy to begin with
        train(optimizer, params, 3)
        train(fresh, twins, 3)
        assert all(same_bits(p.detach(), q.detach()) for p, q in zip(params, twins))


def test_restarting_before_the_first_step_does_nothing():
    optimizer = RMDA(model())
    optimizer.restart()
    assert not optimizer.state


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_milestones(tensor_lr):
    lr = torch.tensor(1.0) if tensor_lr else 1.0
    params = model()
    optimizer = RAMDA([{"params": params[:1]}, {"params": params[1:], "lr": 0.5}], lr=lr, momentum=0.05)
    stages, seen = Restarts(optimizer, milestones=[2, 3, 6], gamma=0.25), []
    for epoch in range(7):
        train(optimizer, params, 1, begin=epoch)
        begun = stages.step()
        steps = {float(optimizer.state[p]["step"]) for p in params}
        assert (steps == {0.0}) == begun
        seen.append((begun, float(optimizer.param_groups[0]["lr"]), optimizer.param_groups[0]["momentum"]))
    assert [begun for begun, _, _ in seen] == [False, True, True, False, False, True, False]
    assert [lr for _, lr, _ in seen] == [1, 0.25, 0.0625, 0.0625, 0.0625, 0.015625, 0.015625]
    assert [c for _, _, c in seen] == [0.05, 0.2, 0.8, 0.8, 0.8, 1.0, 1.0]
    assert optimizer.param_groups[1]["lr"] == 0.5 / 64


def test_the_schedule_of_ramda():
    """Momentum stays until it grows in the last stage; eps falls with lr (RAMDA's code)."""
    params = model()
    optimizer = RAMDA([{"params": params[:1]}, {"params": params[1:], "eps": 0.5}], lr=1.0, momentum=0.25, eps=1.0)
    stages = Restarts(optimizer, milestones=[1, 2], gamma=0.5, raise_momentum=False, shrink_eps=True)
    growth, seen = MomentumGrowth(optimizer, start=2), []
    for epoch in range(4):
        train(optimizer, params, 1, begin=epoch)
        stages.step()
        growth.step()
        seen.append([(group["lr"], group["momentum"], group["eps"]) for group in optimizer.param_groups])
    assert [first for first, _ in seen] == [
        (0.5, 0.25, 0.5), (0.25, 0.25, 0.25), (0.25, 0.25, 0.25), (0.25, 0.25 * math.sqrt(2), 0.25)
    ]  # fmt: skip
    assert seen[-1][1] == (0.25, 0.25 * math.sqrt(2), 0.125)
    with pytest.raises(ValueError, match="Restarts: shrink_eps=True needs RAMDA, RMDA has no eps"):
        Restarts(RMDA(model()), milestones=[1], shrink_eps=True)


def test_a_plateau_and_resuming_in_the_middle_of_one():
    losses = [3.0, 2.0, 2.0, 1.9999, math.nan, 1.0, 1.0, 1.0, 1.0, 0.5]
    expected = [False, False, False, False, True, False, False, False, True, False]
    optimizer = RMDA(model())
    for resumed_at in range(len(losses)):
        stages, begun = Restarts(optimizer, gamma=0.5, patience=2, threshold=1e-3), []
        for k, loss in enumerate(losses):
            if k == resumed_at:
                saved = copy.deepcopy(stages.state_dict())
                stages = Restarts(optimizer, gamma=0.5, patience=2, threshold=1e-3)
                stages.load_state_dict(saved)
            begun.append(stages.step(loss))
        assert begun == expected


def test_momentum_grows_to_one_and_resumes():
    optimizer = RMDA([{"params": model()}, {"params": model(), "momentum": 0.5}], momentum=0.25)
    growth, seen = MomentumGrowth(optimizer, start=2), []
    for k in range(20):
        if k == 5:
            saved = copy.deepcopy(growth.state_dict())
            growth = MomentumGrowth(optimizer, start=2)
            growth.load_state_dict(saved)
        growth.step()
        seen.append([group["momentum"] for group in optimizer.param_groups])
    assert seen[:2] == [[0.25, 0.5]] * 2
    assert [c for c, _ in seen[2:]] == [min(0.25 * math.sqrt(k), 1.0) for k in range(1, 19)]
    assert [c for _, c in seen[2:]] == [min(0.5 * math.sqrt(k), 1.0) for k in range(1, 19)]


def test_a_run_with_stages_ends_sparse():
    torch.manual_seed(0)
    x, truth = torch.randn(200, 30), torch.zeros(30)
    truth[:3] = torch.tensor([1.0, -2.0, 1.5])
    p = torch.nn.Parameter(torch.zeros(30))
    optimizer = RMDA([p], lr=0.05, reg=L1(0.05), momentum=0.1)
    stages, growth = Restarts(optimizer, milestones=[100, 150], gamma=0.5), MomentumGrowth(optimizer, start=150)
    for _ in range(200):
        loss = (x @ p - x @ truth).square().mean() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        stages.step()
        growth.step()
    assert set(p.nonzero().flatten().tolist()) == {0, 1, 2}
    assert float((p.detach() - truth).abs().max()) < 0.2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda o: Restarts(LinBreg(model())), TypeError, "RMDA and RAMDA, got LinBreg"),
        (lambda o: Restarts(o, gamma=0.0), ValueError, "gamma must be > 0, got 0.0"),
        (lambda o: Restarts(o, gamma=1.5), ValueError, "gamma must be .*got 1.5"),
        (lambda o: Restarts(o, milestones=[3, 2]), ValueError, r"milestones must increase, got \[3, 2\]"),
        (lambda o: Restarts(o, milestones=[0]), ValueError, "milestone must be an integer >= 1, got 0"),
        (lambda o: Restarts(o, patience=-1), ValueError, "patience must be an integer >= 0 or None, got -1"),
        (lambda o: Restarts(o, threshold=math.nan), ValueError, "threshold must be .*got nan"),
        (lambda o: Restarts(o, patience=1).step(), ValueError, "needs a loss"),
        (lambda o: MomentumGrowth(o, start=1.5), ValueError, "start must be an integer >= 0, got 1.5"),
        (lambda o: MomentumGrowth(torch.optim.SGD(model())), TypeError, "got SGD"),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(RMDA(model()))


def test_a_tensor_lr_that_groups_share_is_scaled_once():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = RMDA([{"params": [p]} for p in params], lr=torch.tensor(1.0))
    Restarts(optimizer, milestones=[1], gamma=0.5).step()
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 0.5]
