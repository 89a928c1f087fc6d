"""HSPG: the half-space step by its definition, both phases, at most k groups, bad input, a real task."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import same_bits
from torch import nn

from bregman_cuda import HSPG, L1, GroupEnvelope, GroupLasso, GroupMCP, ProxSGD, SparseGroupLasso, param_groups
from bregman_cuda.experiments.data import digits


def by_hand(p, m, g, lr, lam, momentum, epsilon):
    """Rows as groups, in numpy: the trial point with the regularizer's gradient, then the half-space test."""
    m = momentum * m + g
    out = np.zeros_like(p)
    for i, row in enumerate(p):
        norm = np.linalg.norm(row)
        if norm > 0:
            trial = row - lr * (m[i] + lam * row / norm)
            out[i] = trial if trial @ row >= epsilon * norm**2 else 0
    return out, m


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("epsilon", [0.0, 0.9])
def test_follows_its_definition(driver, momentum, epsilon):
    rng = np.random.default_rng(0)
    p0 = rng.standard_normal((40, 7))
    p0[::5] = 0
    p = nn.Parameter(torch.tensor(p0))
    reg = GroupLasso(0.3, "out", "none")
    optimizer = HSPG([p], 0.4, reg, momentum, epsilon, start=0, fused=driver.fused, count_nonzeros=True)
    want, m = p0, np.zeros_like(p0)
    for _ in range(5):
        g = (1.0 if epsilon else 3.0) * rng.standard_normal(p0.shape)
        p.grad = torch.tensor(g)
        optimizer.step()
        want, m = by_hand(want, m, g, 0.4, 0.3, momentum, epsilon)
        np.testing.assert_allclose(p.detach().numpy(), want, rtol=0, atol=1e-13)
    alive = int((want != 0).any(1).sum())
    assert 0 < alive < 32
    assert optimizer.density().rows[0].nonzero_groups == alive


def test_the_first_phase_is_proximal_sgd(driver):
    torch.manual_seed(0)
    p, q = (nn.Parameter(torch.linspace(-1, 1, 24).view(6, 4)) for _ in range(2))
    ours = HSPG([p], 0.1, GroupLasso(0.5), 0.5, start=3, fused=driver.fused)
    theirs = ProxSGD([q], 0.1, GroupLasso(0.5), 0.5, fused=driver.fused)
    for step in range(4):
        p.grad = torch.randn(6, 4)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        assert same_bits(p.detach(), q.detach()) == (step < 3), "the fourth step is a half-space step"


def test_zero_groups_stay_zero_and_nan_shows(driver):
    p = nn.Parameter(torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]))
    optimizer = HSPG([p], 0.1, GroupLasso(0.1), start=0, fused=driver.fused)
    p.grad = torch.tensor([[-5.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    optimizer.step()
    assert p[0].tolist() == [0.0, 0.0]
    p.grad = torch.tensor([[torch.nan, 0.0], [0.0, torch.nan], [0.0, 0.0]])
    optimizer.step()
    assert bool(p[0, 0].isnan())
    assert bool(p[1, 1].isnan())
    assert bool(p[2].isfinite().all())


def test_any_group_regularizer_through_the_reference():
    """The envelope's gradient in the trial point: WGSEF's algorithm 3."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(8, 5, dtype=torch.float64))
    p0, reg = p.detach().clone(), GroupEnvelope(0.2, 3)
    p.grad = torch.randn(8, 5, dtype=torch.float64)
    p.grad[0] = 3 * p0[0]
    HSPG([p], 0.5, reg, epsilon=0.2, start=0).step()
    trial = p0 - 0.5 * (p.grad + reg.subgradient(p0))
    keep = (trial * p0).sum(1) >= 0.2 * p0.square().sum(1)
    torch.testing.assert_close(p.detach(), trial * keep[:, None], rtol=0, atol=1e-14)
    assert 0 < int(keep.sum()) < 8
    with pytest.raises(RuntimeError, match="no kernels for GroupEnvelope"):
        HSPG([p], 0.5, reg, fused=True).step()


def test_keep_top_ends_with_k_groups_for_good(driver):
    p = nn.Parameter(torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 0.0], [0.0, 2.0]]))
    optimizer = HSPG([("w", p)], 0.1, GroupLasso(0.01), fused=driver.fused)
    for bad in (0, 5, 1.5, True):
        wanted = rf"k must be between 1 and the number of groups, 4, got {bad!r} \(parameter 'w'\)"
        with pytest.raises(ValueError, match=wanted):
            optimizer.keep_top(bad)
    optimizer.keep_top(2)
    for _ in range(3):
        p.grad = torch.ones(4, 2)
        optimizer.step()
        assert (p != 0).any(1).tolist() == [False, True, False, True]
    optimizer.keep_top(1)
    assert int((p != 0).any(1).sum()) == 1


def test_resume_keeps_the_phase(driver):
    def make():
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(6, 4))
        return p, HSPG([p], 0.2, GroupMCP(0.2, 4.0), 0.5, start=2, fused=driver.fused)

    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(6, 4, generator=generator) for _ in range(5)]
    p, whole = make()
    q, first = make()
    for g in grads:
        p.grad = g
        whole.step()
    for g in grads[:3]:
        q.grad = g
        first.step()
    r, second = make()
    with torch.no_grad():
        r.copy_(q)
    second.load_state_dict(first.state_dict())
    for g in grads[3:]:
        r.grad = g
        second.step()
    assert same_bits(p.detach(), r.detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 1.0}, "epsilon must be < 1, got 1.0"),
        ({"start": -1}, "start must be a number of steps >= 0, or None, got -1"),
        ({"reg": L1(0.1)}, "reg must penalize groups alone, such as GroupLasso, got L1"),
        ({"reg": SparseGroupLasso(0.1)}, "reg must penalize groups alone, such as GroupLasso, got SparseGroupLasso"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=f"HSPG: {message}"):
        HSPG([nn.Parameter(torch.ones(2, 2))], **options)


@pytest.mark.slow
def test_digits_with_a_fifth_of_the_neurons():
    """Two phases and at most 20 of 100 hidden neurons, by whole rows."""
    torch.manual_seed(0)
    data = digits()
    x, y = data.train_x, data.train_y
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    groups = param_groups(model, weights=lambda name, _: GroupLasso(2e-3) if name == "1.weight" else None)
    optimizer = HSPG(groups, 0.1, momentum=0.9, start=600, epsilon=0.0, count_nonzeros=True)
    for _ in range(1200):
        index = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    alive = int((model[1].weight != 0).any(1).sum())
    accuracy = float((model(data.test_x).argmax(1) == data.test_y).float().mean())
    assert alive < 60
    assert accuracy > 0.93


def test_start_counts_steps_that_were_taken():
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = HSPG([p], 0.1, GroupLasso(0.1), start=2)
    optimizer.step()  # no gradient
    p.grad, optimizer.found_inf = torch.full((4, 4), torch.inf), torch.tensor(1.0)
    optimizer.step()  # an overflow
    del optimizer.found_inf
    for projecting in (False, False, True):
        p.grad = torch.zeros(4, 4)
        optimizer.step()
        assert optimizer.param_groups[0]["projecting"] == projecting
    optimizer.half_space(False)
    optimizer.step()
    assert optimizer.param_groups[0]["projecting"] is False


def test_a_compiled_step_does_not_ignore_start():
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones(4, 4)
    optimizer = HSPG([p], 0.1, GroupLasso(0.1), start=2)
    with pytest.raises(Exception, match=r"call half_space\(\) when it is time"):
        torch.compile(optimizer.step, fullgraph=True, backend="eager")()
