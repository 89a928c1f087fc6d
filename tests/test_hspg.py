"""HSPG: the half-space step by its definition, both phases, at most k groups, bad input, a real task."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from harness import same_bits
from small import NoReads
from torch import nn

from bregman_cuda import (
    HSPG,
    L1,
    GroupEnvelope,
    GroupLasso,
    GroupLHalf,
    GroupMCP,
    ProxSGD,
    SparseGroupLasso,
    param_groups,
)
from bregman_cuda.experiments.data import digits
from bregman_cuda.optim import hspg


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
    left = int((want != 0).any(1).sum())
    assert 0 < left < 32
    assert optimizer.density().rows[0].nonzero_groups == left


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


def alive(p):
    return (p != 0).any(1).tolist()


def test_keep_top_ends_with_k_groups_for_good(driver):
    p = nn.Parameter(torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 0.0], [0.0, 2.0]]))
    optimizer = HSPG([p], 0.1, GroupLasso(0.01), fused=driver.fused)
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"keep_top: k must be a number of groups >= 1, or None, got {bad!r}"):
            optimizer.keep_top(bad)
    with pytest.raises(ValueError, match=r"keep_top: no k for parameter 0 of .*\(4, 2\): neither .* nor GroupLasso"):
        optimizer.keep_top()
    assert optimizer.get_mask(p) is None
    optimizer.keep_top(2)
    for _ in range(3):
        p.grad = torch.ones(4, 2)
        optimizer.step()
        assert alive(p) == [False, True, False, True]
    optimizer.param_groups[0]["k"] = 1
    optimizer.keep_top()
    assert alive(p) == [False, True, False, False]


def test_tensors_keep_a_number_of_groups_each(driver):
    """The parameter group's k, else the regularizer's; all groups of a tensor that has fewer, and of none without."""
    big, small, envelope, dense = (nn.Parameter(torch.randn(n, 3)) for n in (9, 2, 6, 5))
    empty = nn.Parameter(torch.ones(4, 0))
    groups = [
        {"params": [big, empty, small], "reg": GroupLasso(0.0), "k": 4},
        {"params": [envelope], "reg": GroupEnvelope(0.0, 2)},
        {"params": [dense]},
    ]
    optimizer = HSPG(groups, 0.01, end=2, fused=None if driver.fused else False)
    params = [big, small, envelope, dense]
    for number in range(4):
        norms = [p.detach().norm(dim=1) for p in params]
        for p in (*params, empty):
            p.grad = 1e-3 * torch.randn_like(p)
        optimizer.step()
        wanted = [9, 2, 6, 5] if number == 0 else [4, 2, 2, 5]
        assert [sum(alive(p)) for p in params] == wanted, number
        if number == 1:
            assert alive(big) == [bool(x) for x in norms[0] >= norms[0].sort().values[-4]]
    optimizer.keep_top(3)
    assert [sum(alive(p)) for p in params] == [3, 2, 2, 5]


def test_tensors_keep_a_number_of_groups_together(driver):
    """Those of largest norm in all of a parameter group's tensors, whatever their dtypes; another group has its own."""
    big, small, empty = nn.Parameter(torch.randn(9, 3)), nn.Parameter(torch.randn(4, 2).half()), torch.ones(4, 0)
    other = nn.Parameter(torch.randn(5, 2))
    groups = [
        {"params": [big, nn.Parameter(empty), small], "reg": GroupLasso(0.0), "k": 5, "scope": "all"},
        {"params": [other], "reg": GroupLasso(0.0), "k": 2},
    ]
    optimizer = HSPG(groups, 0.01, end=1, fused=None if driver.fused else False)
    before = [p.detach().double() for p in (big, small)]
    norms = torch.cat([p.norm(dim=1) for p in before])
    for p in (big, small, other):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert alive(big) + alive(small) == (norms >= norms.sort().values[-5]).tolist()
    assert sum(alive(other)) == 2
    optimizer.keep_top(1, scope="all")
    assert alive(big) + alive(small) == (norms == norms.max()).tolist()
    assert sum(alive(other)) == 1
    optimizer.keep_top(99)
    assert sum(alive(big) + alive(small)) == 1, "what is masked stays so"
    with pytest.raises(ValueError, match="keep_top: scope must be 'tensor' or 'all', got 'global'"):
        optimizer.keep_top(1, scope="global")
    with pytest.raises(ValueError, match="HSPG: scope must be 'tensor' or 'all', got 3"):
        HSPG([nn.Parameter(torch.ones(2, 2))], reg=GroupLasso(0.1), scope=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stop", [2, 4, 5])
def test_resume_across_the_end_is_bit_exact(driver, dtype, stop):
    def make():
        torch.manual_seed(0)
        p, q = nn.Parameter(torch.randn(9, 4).to(dtype)), nn.Parameter(torch.randn(3, 5, 2).to(dtype))
        return [p, q], HSPG([p, q], 0.05, GroupMCP(0.02, 4.0), 0.5, start=2, end=4, k=4, fused=driver.fused)

    def train(params, optimizer, begin, end):
        for number in range(begin, end):
            generator = torch.Generator().manual_seed(number)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            optimizer.step()

    (params, whole), (others, first), (twins, second) = make(), make(), make()
    train(params, whole, 0, 7)
    train(others, first, 0, stop)
    with torch.no_grad():
        [t.copy_(p) for t, p in zip(twins, others)]
    second.load_state_dict(first.state_dict())
    train(twins, second, stop, 7)
    for p, t in zip(params, twins):
        assert same_bits(p.detach(), t.detach())
        assert all(same_bits(whole.state[p][key], second.state[t][key]) for key in whole.state[p])
        assert 0 < int(p.flatten(1).any(1).sum()) <= 4
    assert whole.param_groups[0]["end"] is second.param_groups[0]["end"] is None
    assert second.get_mask(twins[0]).any(1).sum() == 4


def test_the_state_dict_of_a_version_without_an_end_is_taken():
    saved = HSPG([nn.Parameter(torch.ones(3, 2))], 0.1, GroupLasso(0.1)).state_dict()
    for key in ("end", "k", "skipped"):
        del saved["param_groups"][0][key]
    optimizer = HSPG([nn.Parameter(torch.ones(3, 2))], 0.1, GroupLasso(0.1), end=5, k=2)
    optimizer.load_state_dict(saved)
    assert [optimizer.param_groups[0][key] for key in ("end", "k", "skipped", "steps")] == [5, 2, 0, 0]


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
        ({"end": 0}, "end must be a number of steps >= 1, or None, got 0"),
        ({"end": 2.0}, "end must be a number of steps >= 1, or None, got 2.0"),
        ({"start": 5, "end": 4}, "end must be >= start, got end=4, start=5"),
        ({"k": 0}, "k must be a number of groups >= 1, or None, got 0"),
        ({"k": True}, "k must be a number of groups >= 1, or None, got True"),
        ({"end": 3, "reg": GroupLasso(0.1)}, "end=3 needs k, the number of groups to keep: GroupLasso has none"),
        ({"reg": L1(0.1)}, "reg must penalize groups alone, such as GroupLasso, got L1"),
        ({"reg": SparseGroupLasso(0.1)}, "reg must penalize groups alone, such as GroupLasso, got SparseGroupLasso"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=f"HSPG: {message}"):
        HSPG([nn.Parameter(torch.ones(2, 2))], **options)


@pytest.mark.slow
def test_digits_with_a_fifth_of_the_neurons():
    """Two phases and an end with at most 20 of 100 hidden neurons, by whole rows."""
    torch.manual_seed(0)
    data = digits()
    x, y = data.train_x, data.train_y
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10))
    groups = param_groups(model, weights=lambda name, _: GroupLasso(2e-3) if name == "1.weight" else None)
    optimizer = HSPG(groups, 0.1, momentum=0.9, start=600, end=900, k=20, count_nonzeros=True)
    left = []
    for _ in range(1200):
        index = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
        left.append(sum(alive(model[1].weight)))
    accuracy = float((model(data.test_x).argmax(1) == data.test_y).float().mean())
    assert max(left[899:]) <= 20 < left[898]
    assert optimizer.density().rows[0].nonzero_groups == left[-1]
    assert accuracy > 0.93


def test_start_and_end_count_steps_that_were_taken():
    p = nn.Parameter(torch.ones(4, 4))
    optimizer = HSPG([p], 0.1, GroupLasso(0.1), start=2, end=3, k=1)
    optimizer.step()  # no gradient
    p.grad, optimizer.found_inf = torch.full((4, 4), torch.inf), torch.tensor(1.0)
    optimizer.step()  # an overflow
    del optimizer.found_inf
    for projecting, left in ((False, 4), (False, 4), (True, 1)):
        p.grad = torch.zeros(4, 4)
        optimizer.step()
        assert optimizer.param_groups[0]["projecting"] == projecting
        assert sum(alive(p)) == left
    optimizer.half_space(False)
    optimizer.step()
    assert optimizer.param_groups[0]["projecting"] is False


def test_steps_that_a_flag_on_the_device_skips_do_not_count(driver):
    """Nor does any step wait for the flag, but those that would be the last before start or end."""
    p = nn.Parameter(torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 2.0]]))
    options = dict(start=4, end=7, k=1, capturable=True, fused=driver.fused)  # capturable: the flag is the device's
    optimizer, taken = HSPG([p], 0.1, GroupLasso(0.01), **options), 0
    for number, skip in enumerate([0, 1, 0, 1, 0, 0, 0, 0, 0, 0]):
        p.grad, optimizer.found_inf = torch.zeros(3, 2), torch.full((1,), float(skip))
        projecting = taken >= 4
        with nullcontext() if number in (0, 4, 6, 8, 9) else NoReads():  # plans; four tried, twice; seven tried
            optimizer.step()
        taken += not skip
        assert optimizer.param_groups[0]["projecting"] == projecting, number
        assert sum(alive(p)) == (1 if taken >= 7 else 3), number
    saved = optimizer.state_dict()["param_groups"][0]
    assert [saved[key] for key in ("steps", "skipped", "start", "end")] == [8, 0, None, None]


def test_without_a_flag_no_step_reads_the_device(driver):
    """The one at the end neither; the next one makes its plan anew, and reads the step count for it."""
    p = nn.Parameter(torch.randn(5, 3))
    optimizer = HSPG([p], 0.1, GroupLasso(0.01), start=2, end=5, k=2, capturable=True, fused=driver.fused)
    for number in range(7):
        p.grad = torch.zeros(5, 3)
        with nullcontext() if number in (0, 2, 5) else NoReads():  # new plans
            optimizer.step()
        assert sum(alive(p)) == (5 if number < 4 else 2)


def test_a_captured_step_before_start_or_end_is_refused(monkeypatch):
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones(4, 4)
    optimizer = HSPG([p], 0.1, GroupLasso(0.1), start=1, end=2, k=2, capturable=True)
    for call in (r"start: call half_space\(\)", r"end: call keep_top\(k\)"):
        with monkeypatch.context() as patch:
            patch.setattr(hspg, "is_capturing", lambda: True)
            with pytest.raises(RuntimeError, match=f"a captured step does not count toward HSPG's {call}"):
                optimizer.step()
        optimizer.step()
        optimizer.half_space()
    assert sum(alive(p)) == 2
    monkeypatch.setattr(hspg, "is_capturing", lambda: True)
    optimizer.step()


def test_a_compiled_step_does_not_ignore_start_and_end():
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones(4, 4)
    for options, call in (({"start": 2}, r"half_space\(\)"), ({"end": 2, "k": 1}, r"keep_top\(k\)")):
        optimizer = HSPG([p], 0.1, GroupLasso(0.1), **options)
        with pytest.raises(Exception, match=rf"call {call} when it is time"):
            torch.compile(optimizer.step, fullgraph=True, backend="eager")()


@pytest.mark.parametrize("reg", [GroupLHalf(0.1), GroupEnvelope(0.1, 2)], ids=lambda reg: type(reg).__name__)
def test_a_compiled_half_space_step_without_kernels_is_refused(reg):
    """The kernels know slopes that are lines alone, and would take any other for one."""
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones(4, 4)
    optimizer = HSPG([p], 0.1, reg, start=0)
    torch._dynamo.reset()
    with pytest.raises(
        Exception,
        match=f"compiled step runs kernels, but the half-space step has no kernels for {reg.__class__.__name__}",
    ):
        torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")()
    assert torch.equal(p.detach(), torch.ones(4, 4))
