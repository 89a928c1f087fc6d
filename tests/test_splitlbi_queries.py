"""What SplitLBI tells of its twin: support, projection, entry times; and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from harness import same_bits
from small import model, train

from bregman_cuda import L1, GroupLasso, SparseGroupLasso, SplitLBI

WIDE = torch.float64


def trained(driver, reg=None, steps=12, **options):
    params = model()
    groups = [{"params": params[:2]}, {"params": params[2:], "reg": None}]
    options = {"lr": 0.3, "mu": 1.0, **options}
    optimizer = SplitLBI(groups, reg=reg or L1(0.3), fused=driver.fused, **options)
    train(optimizer, params, steps)
    return params, optimizer


@pytest.mark.parametrize("reg", [L1(0.3), GroupLasso(0.7, "out"), SparseGroupLasso(0.25, 0.5, "out")], ids=str)
def test_twin_support_and_projection(driver, reg):
    params, optimizer = trained(driver, reg, kappa=1.5)
    for p in params[:2]:
        twin = optimizer.sparse_twin(p)
        assert same_bits(twin, reg.prox(optimizer.state[p]["dual"], 1.0) * 1.5)
        assert same_bits(optimizer.prox_point(p), twin)
        assert torch.equal(optimizer.support(p), twin != 0)
        assert float(optimizer.residue(p)) == pytest.approx(float((p.detach() - twin).square().sum()), rel=1e-6)
    alive = sum(int(optimizer.support(p).sum()) for p in params[:2])
    assert 0 < alive == optimizer.density().nonzeros < sum(p.numel() for p in params[:2])
    before = [p.detach().clone() for p in params]
    addresses = [p.data_ptr() for p in params]
    with optimizer.projected():
        assert torch.is_grad_enabled()
        for p, dense in zip(params[:2], before):
            assert same_bits(p.detach(), torch.where(optimizer.support(p), dense, torch.zeros_like(dense)))
        assert same_bits(params[2].detach(), before[2])
    assert all(map(same_bits, [p.detach() for p in params], before))
    assert [p.data_ptr() for p in params] == addresses


def test_a_group_is_active_as_a_whole_whatever_its_elements_are(driver):
    """A zero of the dual inside an active filter does not cut the weight out of the projection."""
    p = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.1, 0.1]]))
    optimizer = SplitLBI([p], lr=1.0, reg=GroupLasso(0.5, "out", "none"), mu=2.0, fused=driver.fused)
    for _ in range(2):
        p.grad = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
        optimizer.step()
    with torch.no_grad():
        p[0, 1] = 7.0
    assert optimizer.sparse_twin(p)[0, 1] == 0
    assert optimizer.support(p).tolist() == [[True, True], [False, False]]
    with optimizer.projected():
        assert p[0, 1] == 7.0


@pytest.mark.parametrize("what", ["error", "nested", "changed", "stepped", "support fails"])
def test_the_weights_come_back_from_a_projection(driver, what, monkeypatch):
    params, optimizer = trained(driver)
    before = [p.detach().clone() for p in params]
    addresses = [p.data_ptr() for p in params]
    if what == "error":
        with pytest.raises(ZeroDivisionError), optimizer.projected():
            raise ZeroDivisionError
    elif what == "nested":
        with optimizer.projected():
            inner = [p.detach().clone() for p in params]
            with optimizer.projected():
                assert all(map(same_bits, [p.detach() for p in params], inner))
            assert all(map(same_bits, [p.detach() for p in params], inner))
    elif what == "changed":
        with optimizer.projected(), torch.no_grad():
            params[0].fill_(math.nan)
    elif what == "stepped":
        with optimizer.projected():
            train(optimizer, params[:2], 1)
            before[2] = params[2].detach().clone()  # has no twin: its step stays
    else:
        real, seen = optimizer.support, []

        def support(param):
            seen.append(param)
            if len(seen) == 2:
                raise MemoryError
            return real(param)

        monkeypatch.setattr(optimizer, "support", support)
        with pytest.raises(MemoryError), optimizer.projected():
            pass
    assert all(map(same_bits, [p.detach() for p in params], before))
    assert [p.data_ptr() for p in params] == addresses


def test_a_projection_twice_continues_the_run_bit_for_bit(driver):
    params, optimizer = trained(driver, momentum=0.5)
    others, other = trained(driver, momentum=0.5)
    for _ in range(2):
        with optimizer.projected():
            pass
    train(optimizer, params, 3)
    train(other, others, 3)
    assert all(map(same_bits, [p.detach() for p in params], [p.detach() for p in others]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reg", [L1(0.7), GroupLasso(0.4, "out"), SparseGroupLasso(0.5, 0.5, "in")], ids=str)
@pytest.mark.parametrize("done", [0, 3])
def test_steps_to_entry_against_a_run(driver, reg, dtype, done):
    """A tiny kappa holds w, so that z moves by lr w / mu at every step."""
    p = torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(3)).to(dtype))
    optimizer = SplitLBI([p], lr=0.25, reg=reg, kappa=1e-9, mu=5.0, fused=driver.fused)

    def step() -> None:
        p.grad = torch.zeros_like(p)
        optimizer.step()

    for _ in range(done):
        step()
    predicted = optimizer.steps_to_entry(p)
    taken = 0
    while not optimizer.support(p).any():
        step()
        taken += 1
    assert taken == math.ceil(predicted - 1e-4)  # bisected to a millionth of it
    assert optimizer.steps_to_entry(p) == 0


def test_steps_to_entry_where_nothing_moves(driver):
    p, empty = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(0, 3))
    optimizer = SplitLBI([p, empty], reg=L1(0.1), fused=driver.fused)
    assert optimizer.steps_to_entry(p) == math.inf
    assert optimizer.steps_to_entry(empty) == 0
    assert not optimizer.sparse_twin(p).any()  # before the first step
    assert optimizer.support(empty).shape == (0, 3)


@pytest.mark.parametrize("query", ["sparse_twin", "support", "residue", "steps_to_entry"])
def test_queries_name_what_has_no_twin(query):
    params = model()
    optimizer = SplitLBI([{"params": params[:1]}, {"params": params[1:], "reg": None}], reg=L1(0.1))
    with pytest.raises(ValueError, match="reg=None, hence no sparse twin"):
        getattr(optimizer, query)(params[1])
    with pytest.raises(KeyError, match="not a parameter of this optimizer"):
        getattr(optimizer, query)(torch.nn.Parameter(torch.zeros(2)))
    assert optimizer.prox_point(params[1]) is not None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(kappa=0.0), ValueError, "SplitLBI: kappa must be finite and > 0, got 0.0"),
        (dict(kappa=-1.0), ValueError, "kappa must be finite and > 0, got -1.0"),
        (dict(kappa=math.nan), ValueError, "kappa must be .*got nan"),
        (dict(kappa="1"), TypeError, "kappa must be a number, got '1'"),
        (dict(mu=0), ValueError, "mu must be finite and > 0, got 0"),
        (dict(mu=-2.0), ValueError, "mu must be finite and > 0, got -2.0"),
        (dict(mu=math.inf), ValueError, "mu must be .*got inf"),
        (dict(lr=-0.1), ValueError, "lr must be .*got -0.1"),
        (dict(momentum=1.0), ValueError, "momentum must be .*got 1.0"),
        (dict(momentum=-0.5), ValueError, "momentum must be .*got -0.5"),
        (dict(weight_decay=-1e-4), ValueError, "weight_decay must be .*got -0.0001"),
        (dict(nesterov=True), ValueError, "nesterov=True needs momentum > 0, got momentum=0"),
        (dict(coupling="seed"), ValueError, "coupling must be 'outside' or 'inside', got 'seed'"),
        (dict(curvature=-1.0), ValueError, "curvature must be .*got -1.0"),
        (dict(reg=0.1), TypeError, r"reg must be None or a regularizer .*got 0.1"),
    ],
)
def test_what_is_refused(options, error, message):
    params = model()
    with pytest.raises(error, match=message):
        SplitLBI(params, **{"reg": L1(0.1), **options})
    optimizer = SplitLBI(params, reg=L1(0.1))
    train(optimizer, params, 1)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0].update(options)
    with pytest.raises(error, match=message):
        train(optimizer, params, 1)
    assert all(map(same_bits, [p.detach() for p in params], before))
