"""SplitLBI's bounds on the step size: where it converges, where not, and who is warned."""

from __future__ import annotations

import math
import warnings

import pytest
import small
import torch
from small import model, train
from split_net import quadratic

import bregman_cuda
from bregman_cuda import L1, SplitLBI
from bregman_cuda.optim.splitlbi import stable_rate

WIDE = torch.float64


def sharp(h: float, mu: float) -> float:
    return 4 / (h + 2 / mu + math.sqrt(h * h + 4 / mu**2))


@pytest.mark.parametrize("mu", [0.1, 1.0, 20.0, 100.0])
@pytest.mark.parametrize("h", [0.01, 1.0, 30.0])
def test_the_bound_without_momentum(h, mu):
    assert stable_rate(h, mu) == pytest.approx(sharp(h, mu), rel=1e-6)
    assert stable_rate(h, mu) >= 2 / (h + 2 / mu) * (1 - 1e-6)  # what the docstring tells to keep


@pytest.mark.parametrize(
    ("h", "mu", "outside", "inside"),
    [(1.0, 1.0, 0.870, 1.141), (1.0, 20.0, 3.440, 3.600), (1.0, 100.0, 3.727, 3.762), (1.0, 0.1, 0.0987, 0.1294)],
)
def test_the_bound_with_momentum(h, mu, outside, inside):
    assert stable_rate(h, mu, 0.9) == pytest.approx(outside, rel=1e-3)
    assert stable_rate(h, mu, 0.9, coupling="inside") == pytest.approx(inside, rel=1e-3)


@pytest.mark.parametrize(
    ("momentum", "nesterov", "coupling"),
    [(0.0, False, "outside"), (0.9, False, "outside"), (0.9, False, "inside"), (0.6, True, "outside")],
)
@pytest.mark.parametrize("mu", [1.0, 20.0])
@pytest.mark.parametrize("driver", ["reference", "cpu"], indirect=True)  # thousands of steps
def test_it_converges_below_the_bound_and_diverges_above(driver, mu, momentum, nesterov, coupling):
    options = dict(momentum=momentum, nesterov=nesterov, coupling=coupling)
    for factor in (0.99, 1.03):
        rate = factor * stable_rate(1.0, mu, **options)
        p, optimizer, step = quadratic([3.0], driver, L1(1e-6), lr=rate, mu=mu, **options)
        for _ in range(4000 if factor < 1 else 1500):
            step()
            if abs(p.item()) > 1e6:
                break
        if factor < 1:
            assert p.item() == pytest.approx(3.0, abs=1e-9)
            assert optimizer.sparse_twin(p).item() == pytest.approx(3.0, abs=1e-9)
        else:
            assert abs(p.item()) > 10


def test_the_bound_of_the_paper_is_not_sufficient(driver):
    """2 / (h + 1/mu) is 1 for h = mu = 1; the sharp one .764."""
    p, _, step = quadratic([3.0], driver, L1(1e-6), lr=0.99, mu=1.0)
    for _ in range(62):
        step()
    assert abs(p.item()) > 1e3


def test_a_rate_beyond_the_bound_is_warned_of():
    params = model()
    with pytest.warns(
        UserWarning, match=r"kappa \* lr = 2 is not stable for curvature 1 and mu = 20; keep it below 1.9"
    ):
        SplitLBI(params, lr=0.2, kappa=10.0, reg=L1(1.0), mu=20.0, curvature=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SplitLBI(params, lr=0.2, kappa=10.0, reg=L1(1.0), mu=20.0, curvature=1.0, momentum=0.9)
        SplitLBI(params, lr=0.19, kappa=10.0, reg=L1(1.0), mu=20.0, curvature=1.0)
        SplitLBI(params, lr=0.2, kappa=10.0, mu=20.0, curvature=1.0)  # no twin
        SplitLBI(params, lr=0.2, kappa=10.0, reg=L1(1.0), mu=20.0)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_rate_that_gets_beyond_the_bound_is_warned_of_once(tensor):
    """By a new group, and by an lr that changed; the warning points here."""
    options = dict(lr=0.19, kappa=10.0, reg=L1(1.0), mu=20.0, curvature=1.0)
    as_lr = torch.tensor if tensor else float
    params = model()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        optimizer = SplitLBI(params[:1], **{**options, "lr": as_lr(0.19)})
        train(optimizer, params[:1], 2)
        assert not seen
        optimizer.add_param_group({"params": params[1:], "lr": as_lr(0.25)})
        train(optimizer, params, 2)
        assert ["kappa * lr = 2.5 is" in str(one.message) for one in seen] == [True]
        for lr in (0.21, 0.22, 0.1, 0.3):
            optimizer.param_groups[0]["lr"] = as_lr(lr)
            train(optimizer, params, 2)
        assert [f"kappa * lr = {rate} is" in str(one.message) for rate, one in zip((2.5, 2.1, 3), seen)] == [True] * 3
        assert len(seen) == 3
        SplitLBI(params, **{**options, "lr": as_lr(0.2)})
        optimizer.load_state_dict(optimizer.state_dict())
        assert len(seen) == 4
    assert [one.filename for one in seen] == [__file__, small.__file__, small.__file__, __file__]


def test_an_lr_that_nobody_reads_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SplitLBI(model(), torch.full((), 0.5, device="meta"), L1(1.0), 10.0, 20.0, curvature=1.0)
        SplitLBI(model(), torch.tensor(0.5), L1(1.0), 10.0, 20.0, curvature=1.0, capturable=True)
    assert bregman_cuda.stable_rate is stable_rate
