"""Penalties of whole tensors, GroupEnvelope and Nuclear, in optimizers and reports."""

from __future__ import annotations

import pytest
import torch
from conftest import missing
from small import NoReads, assert_unchanged, model, snapshot, train

from bregman_cuda import (
    L1,
    AdaBreg,
    GroupEnvelope,
    LinBreg,
    Nuclear,
    ProxSGD,
    Regularizer,
    _backend,
    density,
    param_groups,
)

PAIR = [
    pytest.param(lambda lam=0.3: GroupEnvelope(lam, 2), id="envelope"),
    pytest.param(lambda lam=0.3: Nuclear(lam), id="nuclear"),
]


PLAIN = [GroupEnvelope(0.3, 2, weight=(1.0, 2.0, 1.0, 3.0)), Nuclear(0.3)]


@pytest.mark.parametrize("reg", PLAIN, ids=lambda r: type(r).__name__)
def test_fused_none_falls_back_and_fused_true_says_why(reg):
    w, twin = (torch.nn.Parameter(torch.ones(4, 3) + torch.eye(4, 3)) for _ in range(2))
    for p, fused in ((w, None), (twin, False)):
        p.grad = torch.full_like(p, 0.5)
        ProxSGD([p], lr=0.5, reg=reg, fused=fused).step()
    expected = reg.prox(torch.ones(4, 3) + torch.eye(4, 3) - 0.25, 0.5)
    assert torch.equal(w, expected)
    assert torch.equal(twin, expected)
    if _backend._load("cpu")[0] is None:
        missing("the CPU kernels are missing")
    optimizer = ProxSGD([("w", w)], lr=0.5, reg=reg, fused=True)
    with pytest.raises(RuntimeError, match=rf"fused=True, but parameter 'w' .* {type(reg).__name__} runs in plain"):
        optimizer.step()
    assert torch.equal(w, expected)


@pytest.mark.parametrize("make", PAIR)
def test_a_regularizer_that_arrives_between_steps_is_served(make):
    """Kernels stepped this tensor with L1; the plan must not keep them."""
    w = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    optimizer = ProxSGD([w], lr=0.5, reg=L1(0.1))
    w.grad = torch.zeros_like(w)
    optimizer.step()
    optimizer.param_groups[0]["reg"] = make()
    expected = make().prox(w.detach().clone(), 0.5)
    optimizer.step()
    torch.testing.assert_close(w.detach(), expected, rtol=2e-7, atol=0.0)
    assert not torch.equal(w.detach(), L1(0.1).prox(expected, 0.5))


@pytest.mark.parametrize("make", PAIR)
@pytest.mark.parametrize("optimizer", [LinBreg, AdaBreg])
@pytest.mark.parametrize("delta", [1.0, 0.5])
def test_a_bregman_step_without_gradient_keeps_the_weights(make, optimizer, delta):
    """prox(delta v0) = p0: convex, so it holds, up to rounding, and zero groups stay exactly zero."""
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    for gone in (0, 3, 4, 5, 6):
        p = torch.nn.Parameter(start.clone())
        p.data[:gone] = 0
        before = p.detach().clone()
        p.grad = torch.zeros_like(p)
        optimizer([p], lr=0.1, reg=make(), delta=delta).step()
        torch.testing.assert_close(p.detach(), before, rtol=2e-6, atol=2e-6)
        if isinstance(make(), GroupEnvelope):
            assert bool((p[:gone] == 0).all())


@pytest.mark.parametrize("make", PAIR)
@pytest.mark.parametrize("kind", [LinBreg, AdaBreg, ProxSGD])
def test_scalars_on_the_device_give_the_same_steps(make, kind):
    params, twins = model([(6, 5), (4, 3, 3, 3)]), model([(6, 5), (4, 3, 3, 3)])
    optimizer = kind(params, lr=torch.tensor(0.1), reg=make(), capturable=True)
    train(optimizer, params, 3)
    train(kind(twins, lr=0.1, reg=make()), twins, 3)
    for p, twin in zip(params, twins):
        torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-6)
    if isinstance(make(), GroupEnvelope):
        with NoReads():
            optimizer.step()


@pytest.mark.parametrize("make", PAIR)
@pytest.mark.parametrize("kind", [LinBreg, AdaBreg, ProxSGD])
def test_they_train_and_structure_appears(make, kind):
    """Least squares with a solution of two rows (rank two): the loss falls and the structure is found."""
    generator = torch.Generator().manual_seed(2)
    truth, data = torch.zeros(8, 6), torch.randn(64, 6, generator=generator)
    truth[:2] = torch.randn(2, 6, generator=generator)
    reg = make(2.0) if kind is not ProxSGD else make(0.3)
    w = torch.nn.Parameter(torch.zeros(8, 6))
    optimizer = kind([w], lr=0.05, reg=reg)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (data @ (w - truth).T).square().sum(1).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.15 * float((data @ truth.T).square().sum(1).mean())
    if isinstance(reg, Nuclear):
        assert reg.rank(w.detach()) <= 2
    else:
        assert int((w != 0).any(1).sum()) <= 2


def test_density_counts_the_groups_of_an_envelope():
    w = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 0.0], [2.0, 2.0]]))
    optimizer = ProxSGD([("w", w)], lr=0.0, reg=GroupEnvelope(0.1, 2), count_nonzeros=True)
    row = optimizer.density().rows[0]
    assert (row.nonzeros, row.groups, row.nonzero_groups) == (3, 3, 2)
    w.grad = torch.zeros_like(w)
    w.grad[0, 0] = 1e-3
    optimizer.step()
    row = density(optimizer).rows[0]
    assert (row.nonzeros, row.groups, row.nonzero_groups) == (3, 3, 2)
    plain = ProxSGD([w], reg=Nuclear(0.1)).density().rows[0]
    assert (plain.nonzeros, plain.groups) == (3, None)


def test_a_mask_and_an_envelope():
    params = model([(6, 5)])
    optimizer = LinBreg(params, lr=0.5, reg=GroupEnvelope(0.2, 3))
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    optimizer.set_mask(params[0], mask)
    train(optimizer, params, 4)
    assert bool((params[0][~mask] == 0).all())
    assert bool((params[0] != 0).any())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_nothing_waits_and_values_agree():
    x, step = torch.randn(64, 30), 0.5
    reg, on_gpu, step_on_gpu = GroupEnvelope(0.7, 9), x.cuda(), torch.tensor(step, device="cuda")
    reg.prox(on_gpu, step_on_gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        z = reg.prox(on_gpu, step_on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(z.cpu(), reg.prox(x, step))
    torch.testing.assert_close(Nuclear(0.7).prox(on_gpu, step).cpu(), Nuclear(0.7).prox(x, step), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GroupEnvelope(-1.0, 2), ValueError, r"GroupEnvelope: lam must be finite and >= 0, got -1.0"),
        (lambda: GroupEnvelope(1.0, 0), ValueError, r"k must be an integer >= 1, got 0"),
        (lambda: GroupEnvelope(1.0, -3), ValueError, r"k must be an integer >= 1, got -3"),
        (lambda: GroupEnvelope(1.0, 2.5), ValueError, r"k must be an integer >= 1, got 2.5"),
        (lambda: GroupEnvelope(1.0, True), ValueError, r"k must be an integer >= 1, got True"),
        (lambda: GroupEnvelope(1.0, 2, "rows"), ValueError, r"groups must be 'out'.*got 'rows'"),
        (lambda: GroupEnvelope(1.0, 2, weight="size"), ValueError, r"weight must be 'sqrt_size' or 'none', got 'size'"),
        (lambda: GroupEnvelope(1.0, 2, weight=(1.0, 0.0)), ValueError, r"weight\[1\] must be > 0, got 0.0"),
        (lambda: GroupEnvelope(1.0, 2, weight=(1.0, "a")), TypeError, r"weight\[1\] must be a number, got 'a'"),
        (lambda: GroupEnvelope(1.0, 4).groups_of((3, 5)), ValueError, r"k=4 is more than the 3 groups .* \(3, 5\)"),
        (lambda: GroupEnvelope(1.0, 1, weight=(1.0,)).groups_of((3, 5)), ValueError, r"1 weights do not fit the 3"),
        (lambda: GroupEnvelope(1.0, 1, "in").groups_of((3,)), ValueError, r"does not fit a tensor of shape \(3,\)"),
        (lambda: Nuclear(-0.5), ValueError, r"Nuclear: lam must be finite and >= 0, got -0.5"),
        (lambda: Nuclear(0.5).prox(torch.ones(3), 1.0), ValueError, r"Nuclear does not fit .* shape \(3,\)"),
    ],
)
def test_bad_values_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("reg", [GroupEnvelope(0.1, 5), Nuclear(0.1)], ids=lambda r: type(r).__name__)
def test_optimizers_name_the_tensor_that_does_not_fit(reg):
    bad = torch.nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=r"LinBreg: parameter 'b': (GroupEnvelope: k=5|Nuclear does not fit)"):
        LinBreg([("a", torch.nn.Parameter(torch.ones(6, 2))), ("b", bad)], reg=reg)
    with pytest.raises(ValueError, match=r"parameter 'weight': GroupEnvelope: k=9"):
        param_groups(torch.nn.Linear(3, 4), GroupEnvelope(0.1, 9))


def test_a_k_that_grows_too_large_changes_nothing():
    params = model([(6, 5)])
    optimizer = LinBreg(params, reg=GroupEnvelope(0.2, 3))
    train(optimizer, params, 2)
    optimizer.param_groups[0]["reg"].k = 7
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter 0 .*k=7 is more than the 6 groups"):
        train(optimizer, params, 1, begin=2)
    assert_unchanged(optimizer, before)
    optimizer.param_groups[0]["reg"].k = 6
    train(optimizer, params, 1, begin=2)


@pytest.mark.parametrize("reg", PLAIN, ids=lambda r: type(r).__name__)
def test_compiled_steps_in_plain_torch_are_refused_by_name(reg):
    p = torch.nn.Parameter(torch.ones(4, 3))
    p.grad = torch.ones(4, 3)
    optimizer = LinBreg([p], reg=reg)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=rf"compiled step runs kernels, but {type(reg).__name__}"):
        torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")()


@pytest.mark.parametrize("reg", [GroupEnvelope(0.1, 2, "in", (1.0, 2.0)), Nuclear(0.1)], ids=lambda r: type(r).__name__)
def test_dictionary_and_checkpoint_round_trip(reg, tmp_path):
    assert Regularizer.from_dict(reg.to_dict()) == reg
    params = model([(5, 2)])
    optimizer = AdaBreg(params, reg=reg)
    train(optimizer, params, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = AdaBreg(twins, reg=L1(9.0))
    twin.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert twin.param_groups[0]["reg"] == reg
    train(optimizer, params, 2, begin=2)
    train(twin, twins, 2, begin=2)
    assert torch.equal(params[0], twins[0])
