"""GroupEnvelope against its definition (kernels: test_budgets.py)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import oracles
import pytest
import torch
from harness import same_bits
from small import NoReads, reg_distance

from bregman_cuda import (
    GroupEnvelope,
)
from bregman_cuda.regularizers._rounds import Extent, alone


def conjugate(y: np.ndarray, d: np.ndarray, k: int) -> float:
    """Of 1/2 sum d_j ||x_j||^2 restricted to k groups, so of its envelope too: half the k largest ||y_j||^2 / d_j."""
    return 0.5 * float(np.sort((y**2).sum(1) / d)[::-1][:k].sum())


def cases(count: int, seed: int):
    """(points, weights, k, lam, step) with ties, zero groups and norms many orders of magnitude apart."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        groups = int(rng.integers(1, 40 if number % 10 == 0 else 9))
        t = rng.standard_normal((groups, 3))
        kind = number % 5
        if kind == 1:  # ties: the groups are copies
            t[:] = t[0]
        elif kind == 2:
            t[rng.random(groups) < 0.5] = 0
        elif kind > 2:
            t *= 10 ** (3 * rng.standard_normal((groups, 1)))
        d = np.ones(groups) if kind in (0, 1) else rng.uniform(0.1, 5, groups)
        yield t, d, int(rng.integers(1, groups + 1)), 10 ** rng.uniform(-3, 2), 10 ** rng.uniform(-2, 1)


def test_fenchel_young_gap_of_the_prox():
    """z = prox(t) if and only if E(z) + E*(y) = <z, y> at y = (t - z) / (step lam), whatever E*'s formula says of u."""
    worst = 0.0
    for t, d, k, lam, step in cases(3000, seed=0):
        reg = GroupEnvelope(lam, k, "out", tuple(d))
        z = reg.prox(torch.tensor(t), step)
        y = (t - z.numpy()) / (step * lam)
        e, e_star = float(reg.value(z)) / lam, conjugate(y, d, k)
        gap = e + e_star - float((z.numpy() * y).sum())
        worst = max(worst, abs(gap) / (1 + e + e_star))
    assert worst <= 1e-10


@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
def test_fenchel_young_gap_of_many_groups(spread):
    rng = np.random.default_rng(7)
    t = rng.standard_normal((50_000, 2)) * 10 ** (spread * rng.standard_normal((50_000, 1)))
    d = 10 ** (0.3 * spread * rng.standard_normal(50_000))
    for k, lam in ((1, 1.0), (700, 0.01), (25_000, 1.0), (49_999, 100.0)):
        reg = GroupEnvelope(lam, k, "out", tuple(d))
        z = reg.prox(torch.tensor(t), 1.0)
        y = (t - z.numpy()) / lam
        e, e_star = float(reg.value(z)) / lam, conjugate(y, d, k)
        assert abs(e + e_star - float((z.numpy() * y).sum())) <= 1e-12 * (e + e_star)
        assert int((z != 0).any(1).sum()) >= k


def test_value_lies_between_its_two_definitions():
    """At most any feasible u's value, at least any y's <x, y> - E*(y); the subgradient closes the gap."""
    rng = np.random.default_rng(1)
    for t, d, k, _, _ in cases(300, seed=1):
        reg, x = GroupEnvelope(1.0, k, "out", tuple(d)), torch.tensor(t)
        value, squares = float(reg.value(x)), (t**2).sum(1)
        slack = 1e-12 * (1 + value)
        for _ in range(5):
            u = rng.dirichlet(np.ones(len(d))) * k
            u = np.maximum(np.minimum(u, 1), 1e-9)
            u *= min(1, k / u.sum())
            assert value <= 0.5 * float((d * squares / u).sum()) + slack
            y = rng.standard_normal(t.shape) * np.sqrt(squares.max())
            assert value >= float((t * y).sum()) - conjugate(y, d, k) - slack
        s = reg.subgradient(x).numpy()
        assert float((t * s).sum()) - conjugate(s, d, k) == pytest.approx(value, rel=1e-11, abs=1e-14)


def test_value_on_few_groups_is_the_quadratic_and_one_group_is_a_squared_norm():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert float(GroupEnvelope(0.5, 2).value(x)) == 0.5 * 0.5 * 29
    assert float(GroupEnvelope(0.5, 3, weight=(2.0, 1.0, 3.0)).value(x)) == 0.25 * (50 + 12)
    assert float(GroupEnvelope(1.0, 1).value(x)) == 0.5 * 7**2  # k = 1: half the square of the sum of norms
    assert float(GroupEnvelope(1.0, 2, weight="sqrt_size").value(x)) == pytest.approx(0.5 * math.sqrt(2) * 29)


def test_prox_against_brute_force():
    """Two groups, k = 1: minimise over a grid of norms, refined, with E = (sum sqrt(d) n)^2 / 2 written out."""
    rng = np.random.default_rng(2)
    for _ in range(40):
        n, d, c = rng.uniform(0, 3, 2), rng.uniform(0.2, 3, 2), 10 ** rng.uniform(-2, 1.5)

        def objective(a, b, n=n, d=d, c=c):
            return c / 2 * (np.sqrt(d[0]) * a + np.sqrt(d[1]) * b) ** 2 + ((a - n[0]) ** 2 + (b - n[1]) ** 2) / 2

        z = GroupEnvelope(c, 1, "out", tuple(d)).prox(torch.tensor(n).view(2, 1), 1.0).flatten().numpy()
        center, reach = n / 2, n.max()
        for _ in range(12):
            axes = [np.clip(np.linspace(m - reach, m + reach, 41), 0, None) for m in center]
            grid = objective(axes[0][:, None], axes[1][None, :])
            at = np.unravel_index(grid.argmin(), grid.shape)
            center, reach = np.array([axes[0][at[0]], axes[1][at[1]]]), reach / 4
        np.testing.assert_allclose(z, center, atol=2e-6)
        assert objective(*z) <= objective(*center) + 1e-13


def test_finite_differences_of_the_value():
    for k, weight in itertools.product((1, 2, 4), ("none", (0.5, 2.0, 1.0, 3.0))):
        reg = GroupEnvelope(0.7, k, "out", weight)
        x = np.random.default_rng(3).standard_normal((4, 3))
        slope = reg.subgradient(torch.tensor(x)).numpy()
        for i in range(5):
            way = np.random.default_rng(i).standard_normal(x.shape)
            found = oracles.central_difference(lambda at: float(reg.value(torch.tensor(at))), x, way)  # noqa: B023
            assert found == pytest.approx(float((slope * way).sum()), abs=1e-8)
        leaf = torch.tensor(x, requires_grad=True)
        reg.value(leaf).backward()
        np.testing.assert_allclose(leaf.grad.numpy(), slope, rtol=1e-13)


@pytest.mark.parametrize("groups", ["out", "in", "kernel", (0, 2), (-1,), ()])
def test_any_grouping_is_the_one_of_rows(groups):
    x = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    reg = GroupEnvelope(0.8, 1 if groups == () else 3, groups)
    dims = reg.groups_of(x.shape)
    order = [*dims, *(d for d in range(3) if d not in dims)]
    rows = x.permute(order).reshape(math.prod(x.shape[d] for d in dims), -1)
    expected = GroupEnvelope(0.8, reg.k).prox(rows, 0.5).view(x.permute(order).shape)
    torch.testing.assert_close(reg.prox(x, 0.5).permute(order), expected, rtol=1e-13, atol=0)


def test_named_cases_of_the_prox():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
    assert torch.equal(GroupEnvelope(0.0, 1).prox(-x, 0.7), -x), "lam = 0 is the identity"
    torch.testing.assert_close(GroupEnvelope(0.5, 2).prox(x, 2.0), x / 2)  # two groups of two: weight decay
    torch.testing.assert_close(GroupEnvelope(0.5, 3).prox(x, 2.0), x / 2)
    ties = torch.ones(6, 2)
    torch.testing.assert_close(GroupEnvelope(1.0, 2).prox(ties, 1.0), ties * (1 / 3) / (1 / 3 + 1))
    assert torch.equal(GroupEnvelope(1.0, 2).prox(torch.zeros(3, 2), 1.0), torch.zeros(3, 2))
    assert GroupEnvelope(1.0, 1).prox(torch.ones(0, 3), 1.0).shape == (0, 3)
    assert GroupEnvelope(1.0, 9).prox(torch.ones(3, 0), 1.0).shape == (3, 0)
    step = torch.tensor(1.0)
    assert torch.equal(GroupEnvelope(1.0, 1).prox(x, step), GroupEnvelope(1.0, 1).prox(x, 1.0))


def test_nan_fills_its_group_and_infinity_stays():
    x = torch.ones(4, 2)
    x[0, 0], x[2, 1] = math.nan, math.inf
    z = GroupEnvelope(1.0, 2).prox(x, 1.0)
    assert z.isnan().tolist() == [[True, True], [False, False], [False, False], [False, False]]
    assert z[2, 1] == math.inf
    x[0, 0] = 0
    assert float(GroupEnvelope(1.0, 2).value(x)) == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_keep_layout_and_round_once_or_twice(dtype):
    wide = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(5)).to(dtype)
    x = wide.to(memory_format=torch.channels_last)
    reg = GroupEnvelope(0.6, 2)
    z, before = reg.prox(x, 0.9), x.clone()
    assert (z.dtype, z.shape, z.stride()) == (x.dtype, x.shape, x.stride())
    assert same_bits(x, before)
    exact = reg.prox(x.double(), 0.9)
    assert torch.equal(z == 0, exact == 0)
    assert bool(((z.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * exact.abs()).all())  # factor, product


def test_nothing_reads_the_device():
    x, step = torch.randn(6, 4), torch.tensor(0.5)
    for reg in (GroupEnvelope(0.5, 2), GroupEnvelope(0.5, 6, weight="sqrt_size"), GroupEnvelope(torch.tensor(0.5), 3)):
        with NoReads():
            alone(reg.prox_in_rounds(x, step, Extent(x.shape)))  # of a step; `prox` reads a lam on the CPU
            reg.value(x)
            reg.subgradient(x)
            reg.subdiff_distance(x, x)
    with NoReads(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        float(x.sum())
    with NoReads(), pytest.raises(AssertionError, match="boolean index"):
        x[x > 0]


def test_distance_certifies_the_prox_and_nothing_else():
    for t, d, k, lam, _ in itertools.islice(cases(500, seed=6), 500):
        reg, x = GroupEnvelope(lam, k, "out", tuple(d)), torch.tensor(t)
        z = reg.prox(x, 1.0)
        size = float(x.norm()) + 1
        assert float(reg.subdiff_distance(z, z - x).max()) <= 1e-12 * size
        if bool((z != 0).any()):
            planted = z - x + 0.01 * size * (z != 0)
            assert float(reg.subdiff_distance(z, planted).max()) >= 0.009 * size
    zero = torch.zeros(3, 2)
    assert reg_distance(GroupEnvelope(1.0, 2), zero, torch.ones(3, 2)) == pytest.approx(math.sqrt(2))
    one = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    assert reg_distance(GroupEnvelope(1.0, 1), one, torch.tensor([[-2.0, 0.0], [0.0, 1.9]])) == 0, "below the bar of 2"
    assert reg_distance(GroupEnvelope(1.0, 1), one, torch.tensor([[-2.0, 0.0], [0.0, 2.5]])) == pytest.approx(0.5)


def test_no_tensors_have_no_prox():
    assert [GroupEnvelope(0.7, 2, scope=scope).prox_together([], 1.0) for scope in ("tensor", "all")] == [[], []]


def test_a_k_for_all_tensors_beyond_the_groups_of_one_is_weight_decay():
    """What the functions of one tensor say then, as at k = the number of its groups."""
    generator = torch.Generator().manual_seed(8)
    for gone in (0, 1, 3):
        x, grad = (torch.randn(3, 2, dtype=torch.float64, generator=generator) for _ in range(2))
        x[:gone] = 0
        many, three = GroupEnvelope(0.7, 9, weight="sqrt_size", scope="all"), GroupEnvelope(0.7, 3, weight="sqrt_size")
        assert float(many.value(x)) == pytest.approx(0.35 * math.sqrt(2) * float(x.square().sum()), rel=1e-14)
        for found, want in (
            (many.subgradient(x), three.subgradient(x)),
            (many.subdiff_distance(x, grad), three.subdiff_distance(x, grad)),
            (many.prox(x, 0.5), three.prox(x, 0.5)),
        ):
            assert torch.equal(found, want)


def test_no_lam_holds_zero():
    reg = GroupEnvelope(1e6, 1)
    assert reg.lam_max(torch.ones(2, 2)) == math.inf
    assert reg.lam_max(torch.zeros(2, 2)) == reg.lam_max(torch.ones(0, 2)) == 0
    assert bool((reg.prox(torch.tensor([[1e-6], [1e-7]]), 1.0)[0] != 0).all())
