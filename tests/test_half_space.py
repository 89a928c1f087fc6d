"""The half-space step of HSPG: its definition, every penalty on norms, one k for all tensors, and torch.compile."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import same_bits
from small import model, set_grads, train
from torch import nn

from bregman_cuda import (
    HSPG,
    L1,
    GroupEnvelope,
    GroupL0,
    GroupLasso,
    GroupLHalf,
    GroupLTwoThirds,
    GroupMCP,
    GroupSCAD,
)
from bregman_cuda.regularizers._base import Separable


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


WEIGHTED = GroupEnvelope(0.2, 3, weight=tuple(range(1, 9)))
ANY = [WEIGHTED, GroupEnvelope(0.2, 3), GroupEnvelope(0.2, 7, weight="sqrt_size"), GroupMCP(0.2, 9.0)]
ANY += [GroupL0(0.2), GroupLHalf(0.2), GroupLTwoThirds(0.2), GroupSCAD(0.2, 6.0)]


@pytest.mark.parametrize("reg", ANY, ids=lambda reg: f"{type(reg).__name__} {reg.weight}")
def test_any_group_regularizer(driver, reg):
    """Its gradient in the trial point; with the envelope WGSEF's algorithm 3."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(8, 5, dtype=torch.float64))
    p0 = p.detach().clone()
    p.grad = torch.randn(8, 5, dtype=torch.float64)
    p.grad[0] = 3 * p0[0]
    HSPG([p], 0.5, reg, epsilon=0.2, start=0, fused=driver.fused if reg is not WEIGHTED else None).step()
    trial = p0 - 0.5 * (p.grad + reg.subgradient(p0))
    keep = (trial * p0).sum(1) >= 0.2 * p0.square().sum(1)
    torch.testing.assert_close(p.detach(), trial * keep[:, None], rtol=0, atol=1e-14)
    assert 0 < int(keep.sum()) < 8


def test_weights_of_their_own_have_no_kernels():
    with pytest.raises(RuntimeError, match="GroupEnvelope runs in plain torch: its groups have weights of their own"):
        HSPG([nn.Parameter(torch.ones(8, 5))], 0.5, WEIGHTED, fused=True)


def envelope_by_hand(tensors, lam, k, weight):
    """lam d_G x_G / u_G of the rows of all tensors, with u = min(1, s_G / t) for s_G = sqrt(d_G) ||x_G||: t is bisected
    for sum u = k, or u = 1 where there are no more than k rows that are not zero."""
    d = [np.sqrt(np.prod(x.shape[1:])) if weight == "sqrt_size" else 1.0 for x in tensors]
    sizes = [np.sqrt(w * (x**2).sum(tuple(range(1, x.ndim)))) for w, x in zip(d, tensors)]
    every = np.concatenate(sizes)
    low, high = 0.0, every.sum() if (every > 0).sum() > k else 0.0
    for _ in range(200 if high else 0):
        t = (low + high) / 2
        low, high = (t, high) if np.minimum(1, every / t).sum() > k else (low, t)
    stretches = [np.maximum(1, high / np.where(s > 0, s, np.inf)) for s in sizes]
    return [lam * w * u.reshape(-1, *[1] * (x.ndim - 1)) * x for w, u, x in zip(d, stretches, tensors)]


@pytest.mark.parametrize("weight", ["none", "sqrt_size"])
@pytest.mark.parametrize("k", [2, 6, 17])
def test_half_space_steps_with_one_k_for_all_tensors(driver, weight, k):
    """By the definition over all tensors that take the step, in numpy; one sits out at times, one has no rows."""
    rng = np.random.default_rng(k)
    values = [rng.standard_normal(shape) for shape in ((9, 4), (0, 3), (7, 3, 2), (6, 5))]
    values[0][::4] = 0
    mask = rng.random((6, 5)) < 0.7
    mask[2] = False
    params = [nn.Parameter(torch.tensor(x)) for x in values]
    reg = GroupEnvelope(0.1, k, weight=weight, scope="all")
    optimizer = HSPG(params, 0.3, reg, momentum=0.5, epsilon=0.6, start=0, fused=driver.fused, count_nonzeros=True)
    optimizer.set_mask(params[3], torch.tensor(mask))
    values[3] = values[3] * mask
    buffers, removed = [np.zeros_like(x) for x in values], 0
    for number in range(5):
        active = [0, 1, 3] if number == 2 else [0, 1, 2, 3]
        grads = {i: 0.7 * rng.standard_normal(values[i].shape) for i in active}
        for i, p in enumerate(params):
            p.grad = torch.tensor(grads[i]) if i in active else None
        optimizer.step()
        for i, pull in zip(active, envelope_by_hand([values[i] for i in active], 0.1, k, weight)):
            buffers[i] = 0.5 * buffers[i] + grads[i]
            trial, axes = values[i] - 0.3 * (buffers[i] + pull), tuple(range(1, values[i].ndim))
            if i == 3:
                trial, buffers[i] = trial * mask, buffers[i] * mask
            squares = (values[i] ** 2).sum(axes, keepdims=True)
            keep = ((trial * values[i]).sum(axes, keepdims=True) >= 0.6 * squares) & (squares > 0)
            removed += int(((squares > 0) & ~keep).sum())
            values[i] = trial * keep
        for p, value in zip(params, values):
            np.testing.assert_allclose(p.detach().numpy(), value, rtol=0, atol=1e-13)
    left = [int((x != 0).any(tuple(range(1, x.ndim))).sum()) for x in values]
    assert removed > 0
    assert sum(left) > 0
    assert [row.nonzero_groups for row in optimizer.density().rows] == left


@pytest.mark.parametrize("scope", ["tensor", "all"])
def test_half_space_steps_of_tensors_without_elements(scope):
    params = [nn.Parameter(torch.ones(shape)) for shape in ((0, 3), (4, 0), (0, 2, 2))]
    optimizer = HSPG(params, 0.1, GroupEnvelope(0.1, 3, weight="sqrt_size", scope=scope), start=0, end=2)
    train(optimizer, params, 3)
    assert [optimizer.state[p]["step"] for p in params] == [3, 3, 3]


def test_k_for_all_tensors_or_for_each_are_different_steps():
    params, grads = [], [torch.randn(6, 4, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    for scope in ("all", "tensor"):
        params.append([nn.Parameter((n + 1) * torch.linspace(-1, 1, 24).view(6, 4)) for n in range(2)])
        for p, g in zip(params[-1], grads):
            p.grad = 0.1 * g
        HSPG(params[-1], 0.1, GroupEnvelope(0.5, 2, scope=scope), start=0).step()
    for p, q in zip(*params):
        assert float((p - q).detach().abs().max()) > 1e-3


class Quartic(L1):
    """A penalty that says neither line nor curve."""

    line = Separable.line


class GroupQuartic(GroupLasso):
    radial = property(lambda self: Quartic(self.lam))


@pytest.mark.parametrize(
    ("reg", "why"),
    [
        (GroupQuartic(0.1), "the half-space step has no kernels for GroupQuartic: its slope is neither a line"),
        (GroupEnvelope(0.1, 2, weight=(1, 2, 3, 4)), "GroupEnvelope runs in plain torch: its groups have weights"),
    ],
    ids=lambda case: type(case).__name__,
)
def test_a_half_space_step_without_kernels_runs_in_plain_torch_and_is_not_compiled(reg, why):
    """The kernels know lines and curves alone, and would take any other slope for one."""
    p = nn.Parameter(torch.ones(4, 4))
    p.grad = torch.ones(4, 4)
    with pytest.raises(RuntimeError, match=f"HSPG: fused=True, but {why}"):
        HSPG([p], 0.1, reg, start=0, fused=True)
    optimizer = HSPG([p], 0.1, reg, start=0)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=f"compiled step runs kernels, but {why}"):
        torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")()
    assert torch.equal(p.detach(), torch.ones(4, 4))
    optimizer.step()
    trial = 0.9 - 0.1 * reg.subgradient(torch.ones(4, 4))
    torch.testing.assert_close(p.detach(), trial, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reg", [GroupLHalf(0.1), GroupEnvelope(0.1, 2, scope="all")], ids=lambda r: type(r).__name__)
def test_a_compiled_half_space_step_is_the_eager_one(reg):
    sides = []
    for compiled in (False, True):
        torch._dynamo.reset()
        params = model([(6, 4), (3, 2, 2)])
        optimizer = HSPG(params, 0.1, reg, 0.5, start=0, fused=True)
        step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager") if compiled else optimizer.step
        for number in range(3):
            set_grads(params, number)
            step()
        sides.append([p.detach() for p in params])
    for a, b in zip(*sides):
        assert same_bits(a, b)
