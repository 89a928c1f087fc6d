"""HSPG: both phases, at most k groups at the end, bad input, a real task."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from harness import same_bits
from small import NoReads, assert_unchanged, model, set_grads, snapshot, train
from torch import nn

from bregman_cuda import (
    HSPG,
    L1,
    GroupEnvelope,
    GroupLasso,
    GroupMCP,
    ProxSGD,
    SparseGroupLasso,
    param_groups,
)
from bregman_cuda.experiments.data import digits
from bregman_cuda.optim import hspg


@pytest.mark.parametrize("reg", [GroupLasso(0.5), GroupEnvelope(0.5, 4, scope="all")], ids=lambda r: type(r).__name__)
def test_the_first_phase_is_proximal_sgd(driver, reg):
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.linspace(-1, 1, 4 * n).view(n, 4)) for n in (6, 3)] for _ in range(2))
    fused = None if driver.fused else False
    optimizers = HSPG(ours, 0.1, reg, 0.5, start=3, fused=fused), ProxSGD(theirs, 0.1, reg, 0.5, fused=fused)
    for step in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(ours, theirs):
            assert same_bits(p.detach(), q.detach()) == (step < 3), "the fourth step is a half-space step"


def alive(p):
    return p.flatten(1).any(1).tolist()


def test_keep_top_ends_with_k_groups_for_good(driver):
    p = nn.Parameter(torch.tensor([[1.0, 1.0], [3.0, 0.0], [0.0, 0.0], [0.0, 2.0]]))
    optimizer = HSPG([p], 0.1, GroupLasso(0.01), fused=driver.fused)
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"keep_top: k must be an integer >= 1 or None, got {bad!r}"):
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
    with pytest.raises(ValueError, match="keep_top: scope must be 'tensor', 'all' or None, got 'global'"):
        optimizer.keep_top(1, scope="global")
    with pytest.raises(ValueError, match="HSPG: scope must be 'tensor', 'all' or None, got 3"):
        HSPG([nn.Parameter(torch.ones(2, 2))], reg=GroupLasso(0.1), scope=3)


@pytest.mark.parametrize(("options", "kept"), [({}, 4), ({"k": 2}, 2), ({"scope": "tensor"}, 7)], ids=str)
def test_an_envelope_over_all_tensors_ends_with_its_k_of_all(driver, options, kept):
    """Unless the optimizer says otherwise, in k or in scope: those that are largest without an end."""
    reg, fused = GroupEnvelope(0.001, 4, scope="all"), None if driver.fused else False
    (params, ending), (others, endless) = (
        (ps, HSPG(ps, 0.05, reg, 0.5, start=1, end=end, fused=fused, count_nonzeros=True, **options))
        for ps, end in ((model([(9, 4), (3, 5, 2)]), 3), (model([(9, 4), (3, 5, 2)]), None))
    )
    train(endless, others, 3)
    norms = torch.cat([p.detach().flatten(1).norm(dim=1) for p in others])
    assert int((norms > 0).sum()) > kept
    for number in range(6):
        train(ending, params, 1, begin=number)
        left = [alive(p) for p in params]
        assert [row.nonzero_groups for row in ending.density().rows] == [*map(sum, left)]
        if number == 2 and not options.get("scope"):
            assert [*left[0], *left[1]] == (norms >= norms.sort().values[-kept]).tolist()
        assert (sum(map(sum, left)) <= kept) == (number >= 2)
    assert sum(sum(alive(ending.get_mask(p))) for p in params) == kept
    ending.keep_top(1)
    assert sum(sum(alive(p)) for p in params) == (2 if options.get("scope") else 1)


ENDING = [GroupMCP(0.02, 4.0), GroupEnvelope(0.02, 4, scope="all")]


@pytest.mark.parametrize("reg", ENDING, ids=lambda reg: type(reg).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stop", [1, 2, 4, 5])
def test_resume_across_the_end_is_bit_exact(driver, dtype, stop, reg):
    def make():
        torch.manual_seed(0)
        p, q = nn.Parameter(torch.randn(9, 4).to(dtype)), nn.Parameter(torch.randn(3, 5, 2).to(dtype))
        fused = None if driver.fused else False
        return [p, q], HSPG([p, q], 0.05, replace(reg), 0.5, start=2, end=4, k=4, fused=fused)

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
    assert whole.param_groups[0]["end"] is second.param_groups[0]["end"] is None
    kept = [sum(alive(second.get_mask(t))) for t in twins]
    assert kept == [4, 3] if isinstance(reg, GroupMCP) else sum(kept) == 4
    assert all(0 < sum(alive(t)) <= most for t, most in zip(twins, kept))


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
        ({"start": -1}, "start must be an integer >= 0 or None, got -1"),
        ({"end": 0}, "end must be an integer >= 1 or None, got 0"),
        ({"end": 2.0}, "end must be an integer >= 1 or None, got 2.0"),
        ({"start": 5, "end": 4}, "end must be >= start, got end=4, start=5"),
        ({"k": 0}, "k must be an integer >= 1 or None, got 0"),
        ({"k": True}, "k must be an integer >= 1 or None, got True"),
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


@pytest.mark.parametrize("capturable", [False, True])
def test_what_a_step_over_all_tensors_skips_or_refuses_changes_nothing(driver, capturable):
    """An overflow, in both phases and after the end; a gradient that is not finite; a k beyond all groups."""
    params, reg = model(), GroupEnvelope(0.01, 4, scope="all")
    options = dict(start=2, end=4, capturable=capturable, check_finite=not capturable)
    optimizer = HSPG(params, 0.05, reg, 0.5, fused=None if driver.fused else False, **options)
    for number in range(6):
        train(optimizer, params, 1, begin=number)
        before = snapshot(optimizer)
        optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.tensor(2.0)
        set_grads(params, number)
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale
        settled = optimizer.state_dict()["param_groups"][0]
        if number < 3:  # later ones are not counted
            assert settled["steps"] == number + 1
        before[-1] = snapshot(optimizer)[-1]
        assert_unchanged(optimizer, before)
        if not capturable:
            params[1].grad[0] = torch.inf
            with pytest.raises(FloatingPointError, match="the gradient of parameter 1 of shape"):
                optimizer.step()
            assert_unchanged(optimizer, before)
    assert sum(map(sum, map(alive, params))) <= 4
    reg.k = 18
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"HSPG: GroupEnvelope: k=18 is more than the 17 groups .* of all tensors"):
        train(optimizer, params, 1)
    assert_unchanged(optimizer, before)


def test_no_step_over_all_tensors_reads_the_device(driver):
    params, lr = model(), torch.tensor(0.05)
    reg = GroupEnvelope(0.01, 4, scope="all")
    fused = None if driver.fused else False
    optimizer = HSPG(params, lr, reg, start=2, end=5, capturable=True, fused=fused)
    for number in range(7):
        set_grads(params, number)
        with nullcontext() if number in (0, 2, 5) else NoReads():  # new plans
            optimizer.step()
    assert sum(map(sum, map(alive, params))) <= 4


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
