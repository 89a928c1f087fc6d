"""Nuclear(every=n): the prox at every n-th step of a parameter, n times as strong, and identity in between."""

from __future__ import annotations

import copy

import pytest
import torch
from harness import same_bits
from small import assert_unchanged, model, set_grads, snapshot, train

from bregman_cuda import RAMDA, RMDA, AdaBreg, LinBreg, Nuclear, ProxSGD, Regularizer, SplitLBI


def formula(params, steps: int, every: int, lam: float, lr: float, momentum: float) -> list[torch.Tensor]:
    """Singular values thresholded at lr * lam * every where `every` divides the number of the step."""
    result = [p.detach().double().clone() for p in params]
    buffers = [torch.zeros_like(x) for x in result]
    grads = model()
    for t in range(1, steps + 1):
        set_grads(grads, t - 1)
        for x, m, g in zip(result, buffers, grads):
            m.mul_(momentum).add_(g.grad.double())
            x.sub_(lr * m)
            if t % every == 0:
                u, s, v = torch.linalg.svd(x.view(len(x), -1), full_matrices=False)
                x.copy_((u @ torch.diag((s - lr * lam * every).clamp_min(0)) @ v).view(x.shape))
    return result


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("steps", [2, 3, 6])
def test_steps_follow_the_formula(momentum, every, steps):
    params = model()
    want = formula(params, steps, every, 3.0, 0.5, momentum)
    reg = Nuclear(3.0, every=every)
    train(ProxSGD(params, 0.5, reg, momentum), params, steps)
    for p, x in zip(params, want):
        torch.testing.assert_close(p.detach().double(), x, rtol=0, atol=2e-5)  # float32: some 50 roundings below 10
    lost = sum(min(p.shape[0], p[0].numel()) - reg.rank(p) for p in params)
    assert (lost == 0) == (steps % every > 0)


def test_decompositions_happen_at_those_steps_alone(monkeypatch):
    seen: list[int] = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: seen.append(step) or svd(*args, **kwargs))
    params = model([(4, 5)])
    optimizer = ProxSGD(params, 0.1, Nuclear(0.1, every=3))
    for step in range(1, 8):
        train(optimizer, params, 1, begin=step)
    assert seen == [3, 6]


def test_a_parameter_counts_its_own_steps():
    params = model([(6, 5), (7, 2)])
    optimizer = ProxSGD(params, 0.5, Nuclear(3.0, every=2))
    for t in range(3):
        set_grads(params, t)
        if t == 0:
            params[1].grad = None
        optimizer.step()
        if t == 1:
            assert Nuclear(1.0).rank(params[0]) < 5
            assert Nuclear(1.0).rank(params[1]) == 2
    assert Nuclear(1.0).rank(params[1]) < 2
    assert Nuclear(1.0).rank(params[0]) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("before", [3, 4, 5])
def test_resume_in_between_is_bit_exact(before, dtype):
    params = model(dtype=dtype)
    optimizer = ProxSGD(params, 0.2, Nuclear(0.5, every=4), 0.5)
    mask = torch.rand(params[0].shape, generator=torch.Generator().manual_seed(0)) < 0.7
    optimizer.set_mask(params[0], mask)
    train(optimizer, params, before)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = ProxSGD(others, 0.2, Nuclear(0.1), 0.5)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert twin.param_groups[0]["reg"] == Nuclear(0.5, every=4)
    for o, ps in ((optimizer, params), (twin, others)):
        train(o, ps, 5, begin=before)
    assert all(same_bits(p.detach(), q.detach()) for p, q in zip(params, others))
    assert bool((params[0][~mask] == 0).all())


def test_a_dict_from_before_the_option_loads():
    data = Nuclear(0.5, every=3).to_dict()
    assert Regularizer.from_dict(data) == Nuclear(0.5, every=3)
    del data["every"]
    assert Regularizer.from_dict(data) == Nuclear(0.5, every=1)


def test_a_skipped_step_does_not_count():
    params = model([(4, 5)])
    optimizer = ProxSGD(params, 0.1, Nuclear(5.0, every=2))
    train(optimizer, params, 1)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    del optimizer.found_inf
    assert Nuclear(1.0).rank(params[0]) == 4
    train(optimizer, params, 1)
    assert Nuclear(1.0).rank(params[0]) < 4


def test_every_can_change_between_steps():
    params = model([(4, 5)])
    reg = Nuclear(5.0, every=1000)
    optimizer = ProxSGD(params, 0.1, reg)
    train(optimizer, params, 1)
    assert reg.rank(params[0]) == 4
    reg.every = 2
    train(optimizer, params, 1)
    assert reg.rank(params[0]) < 4


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "2", None])
def test_bad_values_are_refused(value):
    with pytest.raises(ValueError, match=rf"Nuclear: every must be an integer >= 1, got {value!r}"):
        Nuclear(0.1, every=value)
    reg = Nuclear(0.1)
    with pytest.raises(ValueError, match=r"Nuclear: every must be"):
        reg.every = value
    assert reg == Nuclear(0.1)


@pytest.mark.parametrize(
    "make",
    [
        LinBreg,
        AdaBreg,
        RMDA,
        SplitLBI,
        lambda params, reg: LinBreg(params, reg=reg, momentum=0.5),
        lambda params, reg: RAMDA(params, reg=reg, solver="pg"),
    ],
    ids=["linbreg", "adabreg", "rmda", "splitlbi", "linbreg_momentum", "ramda"],
)
def test_other_optimizers_refuse_it_before_anything_changes(make):
    params = model([(4, 5)])
    message = r"(LinBreg|AdaBreg|RMDA|RAMDA|SplitLBI): Nuclear\(every=2\) leaves steps without a prox, .* ProxSGD"
    with pytest.raises(ValueError, match=message):
        make(params, reg=Nuclear(0.1, every=2))
    reg = Nuclear(0.1)
    optimizer = make(params, reg=reg)
    train(optimizer, params, 1)
    reg.every = 2
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_capturable_is_refused():
    params = model([(4, 5)])
    with pytest.raises(ValueError, match=r"ProxSGD: Nuclear\(every=2\) .* set capturable=False, or every=1"):
        ProxSGD(params, reg=Nuclear(0.1, every=2), capturable=True)
    ProxSGD(params, reg=Nuclear(0.1), capturable=True)
