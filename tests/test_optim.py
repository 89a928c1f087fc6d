"""The optimizers as a user meets them: changes between steps, and checkpoints."""

from __future__ import annotations

import copy
import io

import pytest
import registry
import torch
from harness import compare, same_bits
from small import model, set_grads, train

from bregman_cuda import L1, AdaBreg, ElasticNet, GroupLasso, LinBreg, NonnegL1, ProxSGD, SparseGroupLasso

# Changes between steps


CHANGES = {
    "lam": lambda group, params: setattr(group["reg"], "lam", 0.9),
    "penalty": lambda group, params: group.update(reg=ElasticNet(0.2, 0.5)),
    "to groups": lambda group, params: group.update(reg=GroupLasso(0.2, "out")),
    "to none": lambda group, params: group.update(reg=None),
    "lr": lambda group, params: group.update(lr=0.01),
    "tensor lr": lambda group, params: group.update(lr=torch.tensor(0.01)),
    "maximize": lambda group, params: group.update(maximize=True),
    "memory": lambda group, params: setattr(params[0], "data", params[0].data.clone()),
    "layout": lambda group, params: setattr(params[1], "data", params[1].data.to(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rule", registry.RULES)
def test_a_change_takes_effect_at_the_next_step(kernel_driver, rule, change):
    """Kernels with plans kept from before the change, against the reference."""
    sides = []
    for fused in (None, False):
        params = model()
        optimizer = registry.RULES[rule].make(params, L1(0.1), fused=fused)
        train(optimizer, params, 2)
        middle = [p.detach().clone() for p in params]
        CHANGES[change](optimizer.param_groups[0], params)
        train(optimizer, params, 2, begin=2)
        sides.append(params)
    for a, b in zip(*sides):
        compare(a.detach(), b.detach(), registry.apart(optimizer), f"of shape {tuple(a.shape)}")
    # ... and the change made a difference
    params = model()
    plain = registry.RULES[rule].make(params, L1(0.1), fused=False)
    train(plain, params, 2)
    assert all(map(torch.equal, middle, params))
    train(plain, params, 2, begin=2)
    assert all(map(torch.equal, sides[0], params)) == (change in ("memory", "layout"))


@pytest.mark.parametrize(("field", "value"), [("groups", "in"), ("weight", "none"), ("lam", 2.0)])
def test_a_group_regularizer_changed_in_place(kernel_driver, field, value):
    sides = []
    for fused in (True, False):
        params = model()
        optimizer = LinBreg(params, reg=GroupLasso(0.1), fused=fused, count_nonzeros=True)
        train(optimizer, params, 2)
        setattr(optimizer.param_groups[0]["reg"], field, value)
        train(optimizer, params, 2, begin=2)
        sides.append((params, [(r.nonzeros, r.nonzero_groups, r.groups) for r in optimizer.density().rows]))
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(sides[0][0], sides[1][0]))
    assert sides[0][1] == sides[1][1]


def test_momentum_switched_on_and_off(kernel_driver):
    for rule, classes in (("linbreg", LinBreg), ("proxsgd", ProxSGD)):
        sides = []
        for fused in (True, False):
            params = model(dtype=torch.bfloat16)
            optimizer = classes(params, lr=0.1, reg=L1(0.1), fused=fused)
            for i, momentum in enumerate((0.0, 0.9, 0.9, 0.0)):
                optimizer.param_groups[0]["momentum"] = momentum
                train(optimizer, params, 1, begin=i)
            sides.append(params)
        assert all(same_bits(a.detach(), b.detach()) for a, b in zip(*sides)), rule


def test_a_parameter_without_gradient_sits_out(driver):
    params = model()
    optimizer = AdaBreg(params, reg=L1(0.1), fused=driver.fused)
    train(optimizer, params, 1)
    set_grads(params, 1)
    params[1].grad = None
    before = params[1].detach().clone(), {k: v.clone() for k, v in optimizer.state[params[1]].items()}
    optimizer.step()
    assert torch.equal(params[1], before[0])
    assert all(torch.equal(optimizer.state[params[1]][k], v) for k, v in before[1].items())
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 1, 2]
    optimizer.zero_grad()
    frozen = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(map(torch.equal, params, frozen))


@pytest.mark.parametrize("change", [lambda o, ps: o.state.clear(), lambda o, ps: [o.state.pop(p) for p in ps]])
def test_who_clears_the_state_starts_anew(driver, change):
    params = model()
    optimizer = AdaBreg(params, reg=L1(0.1), fused=driver.fused)
    train(optimizer, params, 2)
    change(optimizer, params)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    fresh = AdaBreg(twins, reg=L1(0.1), fused=driver.fused)
    train(optimizer, params, 2, begin=2)
    train(fresh, twins, 2, begin=2)
    assert all(same_bits(p.detach(), twin.detach()) for p, twin in zip(params, twins))
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 2, 2]
    assert len(optimizer.state_dict()["state"]) == len(params)


def test_several_groups_each_with_its_own_options(driver):
    params = model()
    lone = model()
    optimizer = LinBreg(
        [{"params": params[:1], "reg": L1(0.2), "lr": 0.5}, {"params": params[1:], "delta": 0.5}], fused=driver.fused
    )
    parts = [
        LinBreg(lone[:1], lr=0.5, reg=L1(0.2), fused=driver.fused),
        LinBreg(lone[1:], delta=0.5, fused=driver.fused),
    ]
    train(optimizer, params, 3)
    for i in range(3):
        set_grads(lone, i)
        for part in parts:
            part.step()
    assert all(map(torch.equal, params, lone))
    optimizer.add_param_group({"params": model([(3,)], seed=9), "lr": 0.3})
    assert optimizer.param_groups[2]["delta"] == 1.0
    train(optimizer, [*params, *optimizer.param_groups[2]["params"]], 1)


def test_versions_increase_so_that_autograd_notices(driver):
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    optimizer = LinBreg([p], fused=driver.fused)
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closure_and_schedulers(driver):
    p = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = ProxSGD([p], lr=0.1, reg=L1(0.01), fused=driver.fused)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 9.0
    assert calls == [True]
    assert float(p) == pytest.approx(3 - 0.1 * 6 - 0.001)
    schedule.step()
    optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert not p.grad.requires_grad


# Checkpoints


@pytest.mark.parametrize("dtype", registry.DTYPES, ids=str)
@pytest.mark.parametrize("rule", registry.RULES)
def test_state_dict_continues_bit_for_bit(driver, rule, dtype):
    params = model(dtype=dtype)
    reg = SparseGroupLasso(0.2, 0.3, "out")
    optimizer = registry.RULES[rule].make(params, reg, fused=driver.fused)
    optimizer.set_mask(params[0], torch.rand(params[0].shape) < 0.7)
    train(optimizer, params, 2)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], file)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    twins = [torch.nn.Parameter(v) for v in values]
    other = registry.RULES[rule].make(twins, SparseGroupLasso(9.0), fused=driver.fused)
    other.load_state_dict(state)
    assert other.param_groups[0]["reg"] == reg
    for p, twin in zip(params, twins):
        assert {k: v.dtype for k, v in optimizer.state[p].items()} == {k: v.dtype for k, v in other.state[twin].items()}
    train(optimizer, params, 3, begin=2)
    train(other, twins, 3, begin=2)
    assert all(same_bits(p.detach(), twin.detach()) for p, twin in zip(params, twins))


def test_a_held_regularizer_stays_live_after_loading(driver):
    mine = L1(0.5)
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = LinBreg([p], reg=mine, fused=driver.fused)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["reg"]["lam"] = 0.125
    optimizer.load_state_dict(saved)
    assert mine.lam == 0.125
    assert optimizer.param_groups[0]["reg"] is mine
    assert saved["param_groups"][0]["reg"] == {"regularizer": "L1", "lam": 0.125}


def test_a_copied_optimizer_steps_its_own_parameters(driver):
    params = model()
    optimizer = AdaBreg(params, reg=NonnegL1(0.1), fused=driver.fused)
    train(optimizer, params, 2)
    holder = copy.deepcopy({"params": params, "optimizer": optimizer})
    before = [p.detach().clone() for p in params]
    train(holder["optimizer"], holder["params"], 1, begin=2)
    assert all(map(torch.equal, params, before))
    train(optimizer, params, 1, begin=2)
    assert all(map(torch.equal, params, holder["params"]))
