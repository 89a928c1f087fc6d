"""GroupEnvelope and Nuclear against their definitions, and what optimizers and reports do with them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import oracles
import pytest
import torch
from harness import same_bits
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
from bregman_cuda.optim._shards import why_refused
from bregman_cuda.optim.proxsgd import ProxSGDRule


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
            reg.prox(x, step)
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


def reg_distance(reg: Regularizer, x: torch.Tensor, grad: torch.Tensor) -> float:
    return float(reg.subdiff_distance(x, grad).max())


def test_no_lam_holds_zero():
    reg = GroupEnvelope(1e6, 1)
    assert reg.lam_max(torch.ones(2, 2)) == math.inf
    assert reg.lam_max(torch.zeros(2, 2)) == reg.lam_max(torch.ones(0, 2)) == 0
    assert bool((reg.prox(torch.tensor([[1e-6], [1e-7]]), 1.0)[0] != 0).all())


# Nuclear


def singular_values(x: torch.Tensor) -> np.ndarray:
    return np.linalg.svd(x.double().numpy().reshape(len(x), -1), compute_uv=False)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (3, 2, 2, 2), (1, 7), (7, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nuclear_prox_thresholds_singular_values(shape, dtype):
    eps = torch.finfo(dtype).eps
    reg = Nuclear(0.8)
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    z = reg.prox(x, 1.5)
    expected = np.maximum(singular_values(x) - 1.2, 0)
    np.testing.assert_allclose(singular_values(z), expected, rtol=0, atol=50 * eps)
    assert reg.rank(z) == int((expected > 0).sum())
    assert float(reg.value(z)) == pytest.approx(0.8 * expected.sum(), rel=50 * eps, abs=50 * eps)
    assert z.shape == x.shape
    smallest = min(expected[expected > 0], default=1.0)  # its vectors are known to eps / smallest
    assert reg_distance(reg, z, (z - x) / 1.5) <= 100 * eps / min(1.0, smallest), "optimal"
    planted = (z - x) / 1.5 + 0.1
    assert reg_distance(reg, z, planted) >= 0.05


def test_nuclear_prox_of_a_known_matrix_is_exact_in_rank():
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 40)))
    x = torch.tensor((q[:, :10] * np.arange(1, 11)) @ q[:10], dtype=torch.float32)
    for threshold in (0.5, 3.5, 9.5):
        assert Nuclear(1.0).rank(Nuclear(1.0).prox(x, threshold)) == 10 - int(threshold)
    gone = Nuclear(1.0).prox(x, 10.5)
    assert torch.equal(gone, torch.zeros_like(gone)), "rank 0 is exactly zero"


def test_nuclear_prox_is_no_worse_than_its_neighbours():
    reg, generator = Nuclear(0.5), torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    z = reg.prox(x, 1.0)

    def objective(at):
        return float(reg.value(at) + 0.5 * (at - x).square().sum())

    for scale in (1.0, 1e-2, 1e-4):
        for _ in range(50):
            assert objective(z) <= objective(z + scale * torch.randn(4, 3, dtype=torch.float64, generator=generator))


def test_nuclear_distance_of_a_diagonal_matrix():
    """At diag(1, 0) with lam = 1 only the last entry has room: (a + 1)^2 + b^2 + c^2 + (|d| - 1)_+^2, by hand."""
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    for a, b, c, d in ((-1, 0, 0, 0.9), (-1, 0, 0, -1.5), (0, 0, 0.4, 0.9), (0, 0.4, 0, 0.9), (-2, 0.3, -0.2, 3)):
        expected = math.sqrt((a + 1) ** 2 + b**2 + c**2 + max(abs(d) - 1, 0) ** 2)
        found = reg_distance(Nuclear(1.0), x, torch.tensor([[a, b], [c, d]], dtype=torch.float64))
        assert found == pytest.approx(expected, abs=1e-14)


def test_nuclear_subgradient_and_lam_max():
    reg = Nuclear(0.6)
    x = np.random.default_rng(2).standard_normal((4, 2, 3))
    slope = reg.subgradient(torch.tensor(x)).numpy()
    for i in range(5):
        way = np.random.default_rng(i).standard_normal(x.shape)
        found = oracles.central_difference(lambda at: float(reg.value(torch.tensor(at))), x, way)
        assert found == pytest.approx(float((slope * way).sum()), abs=1e-8)
    leaf = torch.tensor(x, requires_grad=True)
    reg.value(leaf).backward()
    np.testing.assert_allclose(leaf.grad.numpy(), slope, atol=1e-13)
    zero = torch.zeros(3, 4, requires_grad=True)
    reg.value(zero).backward()
    assert torch.equal(zero.grad, torch.zeros(3, 4))
    assert torch.equal(reg.subgradient(zero.detach()), torch.zeros(3, 4))
    grad = torch.tensor(x)
    bound = reg.lam_max(grad)
    assert bound == pytest.approx(singular_values(grad)[0])
    for factor, stays in ((1.001, True), (0.999, False)):
        assert (reg_distance(Nuclear(factor * bound), torch.zeros_like(grad), grad) == 0) == stays


def test_named_cases_of_nuclear():
    x = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    assert same_bits(Nuclear(0.0).prox(x, 0.5), x)
    assert Nuclear(0.3).prox(x, 0.5).stride() == x.stride()
    assert Nuclear(0.3).prox(x.bfloat16(), 0.5).dtype == torch.bfloat16
    x[0, 0, 0, 0] = math.nan
    assert bool(Nuclear(0.3).prox(x, 0.5).isnan().all())
    assert Nuclear(0.3).prox(torch.ones(0, 3), 0.5).shape == (0, 3)
    assert Nuclear(0.3).lam_max(torch.ones(3, 0)) == 0


# Both, in optimizers


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
        return
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


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GroupEnvelope(-1.0, 2), ValueError, r"GroupEnvelope: lam must be finite and >= 0, got -1.0"),
        (lambda: GroupEnvelope(1.0, 0), ValueError, r"k must be >= 1, got 0"),
        (lambda: GroupEnvelope(1.0, -3), ValueError, r"k must be >= 1, got -3"),
        (lambda: GroupEnvelope(1.0, 2.5), TypeError, r"k must be an int, got 2.5"),
        (lambda: GroupEnvelope(1.0, True), TypeError, r"k must be an int, got True"),
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


@pytest.mark.parametrize("make", PAIR)
def test_sharded_parameters_are_refused_by_name(make):

    class Shard:
        dim = 0

        def is_partial(self):
            return False

    sharded = torch.nn.Parameter(torch.ones(4, 3))
    sharded._local_tensor, sharded.placements = sharded.data[:2], (Shard(),)
    assert f"{type(make()).__name__} cannot regularize a sharded parameter" in why_refused(
        sharded, make(), ProxSGDRule(), False
    )


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
