"""The group lasso prox in a diagonal metric (RAMDA, ProxAdam) against bisection, optimality conditions and edges."""

from __future__ import annotations

import math

import numpy as np
import oracles
import pytest
import registry
import torch

from bregman_cuda import (
    L1,
    RAMDA,
    GroupEnvelope,
    GroupLasso,
    GroupLHalf,
    GroupMCP,
    Nuclear,
    ProxAdam,
    ProxSGD,
    SparseGroupLasso,
)
from bregman_cuda.regularizers._base import Grouped, Separable


def group(rng, spread: float) -> tuple[np.ndarray, np.ndarray, float]:
    """A random group, its step sizes, and a weight below (mostly) or above what makes it zero."""
    n = int(rng.choice([1, 2, 9, 27, 64, 576]))
    s = np.exp(-rng.uniform(0, math.log(spread), n)) * 10.0 ** rng.uniform(-3, 3)
    x = rng.standard_normal(n) * 10.0 ** rng.uniform(-2, 1)
    x[rng.random(n) < 0.1] = 0
    return x, s, float(np.linalg.norm(x / s)) * rng.choice([1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 1.001])


def prox(x: np.ndarray, s: np.ndarray, w: float, dtype: torch.dtype = torch.float64) -> np.ndarray:
    reg = GroupLasso(w, (), "none")
    return reg.prox(torch.tensor(x, dtype=dtype), torch.tensor(s, dtype=dtype)).double().numpy()


@pytest.mark.parametrize("spread", [1.0, 10.0, 1e3, 1e5, 1e8])
def test_it_is_the_minimiser(spread):
    """fp64: to rounding, which sums over a group carry; KKT residuals relative to x / s, which w balances."""
    rng = np.random.default_rng(int(math.log10(spread)))
    for _ in range(400):
        x, s, w = group(rng, spread)
        want, got = oracles.weighted_group_lasso(x, s, w), prox(x, s, w)
        assert np.array_equal(got == 0, want == 0)
        assert np.abs(got - want).max() <= 1e-12 * np.abs(want).max()
        assert oracles.weighted_group_residual(x, got, s, 0.0, w) <= 1e-10 * max(w, np.linalg.norm(x / s))


@pytest.mark.parametrize("spread", [1.0, 10.0, 1e3, 1e5, 1e8])
def test_fp32_is_rounded_a_few_times(spread):
    """The steps leave less than rounding does; what is left of a group that nearly vanishes carries the group's."""
    rng = np.random.default_rng(7)
    for _ in range(400):
        x, s, w = group(rng, spread)
        x, s = x.astype(np.float32).astype(np.float64), s.astype(np.float32).astype(np.float64)
        want, got = oracles.weighted_group_lasso(x, s, w), prox(x, s, w, torch.float32)
        reach = np.linalg.norm(x / s)
        condition = reach / abs(reach - w) if reach != w else 1.0
        assert np.abs(got - want).max() <= 8 * 2.0**-24 * condition * np.abs(want).max()


@pytest.mark.parametrize("name", [name for name, case in registry.GROUP.items() if not case().why_not_weighted()])
def test_equal_step_sizes_give_the_usual_prox(name):
    reg = registry.GROUP[name](0.3)
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step in (0.4, 4.0):
        if step * reg.radial.line()[1] * reg.group_weight(x.shape) >= 1:
            continue  # MCP beyond gamma: the group problem is not convex
        torch.testing.assert_close(reg.prox(x, torch.full_like(x, step)), reg.prox(x, step), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("longest", "exact"), [(0.5, True), (127 / 128, True), (1.5, False)])
def test_group_mcp_is_a_prox_in_a_metric_up_to_gamma(longest, exact):
    """What the docstring of GroupMCP promises, and what it does not."""
    rng = np.random.default_rng(11)
    worst, reg = 0.0, GroupMCP(1.0, 2.0, "out", "sqrt_size")
    for _ in range(300):
        s = torch.tensor(rng.uniform(0, 1, (1, 9)) * longest * reg.gamma / 3)
        s[0, 0] = longest * reg.gamma / 3
        x = torch.tensor(rng.standard_normal((1, 9)) * rng.uniform(0, 4))
        z = reg.prox(x, s)
        worst = max(worst, float(reg.subdiff_distance(z, (z - x) / s)))
    assert worst <= 1e-13 if exact else worst > 1e-2


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
def test_soft_threshold_and_then_the_group_is_exact_in_a_metric(alpha):
    """Sparse groups: 0 is in alpha lam d|z| + (1 - alpha) lam d||z|| + (z - x) / s."""
    rng = np.random.default_rng(5)
    for _ in range(300):
        x, s, w = group(rng, 1e3)
        reg = SparseGroupLasso(w, alpha, (), "none")
        z = reg.prox(torch.tensor(x), torch.tensor(s)).numpy()
        residual = oracles.weighted_group_residual(x, z, s, alpha * w, (1 - alpha) * w)
        assert residual <= 1e-10 * max(w, np.linalg.norm(x / s))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_edges(dtype):
    x = torch.tensor([[0.0, 0.0, 0.0], [3.0, 4.0, 0.0], [1.0, 0.0, 1.0], [math.nan, 1.0, 2.0]], dtype=dtype)
    s = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [0.0, 5.0, 1.0], [1.0, 1.0, 1.0]], dtype=dtype)
    got = GroupLasso(0.5, "out", "none").prox(x, s)
    assert got[0].tolist() == [0, 0, 0], "a zero group"
    assert got[1].tolist() == [3, 4, 0], "step size 0 leaves it alone"
    assert got[2, 0] == 1, "an element that cannot move keeps its group alive"
    assert 0 < got[2, 2] < 1
    assert bool(got[3].isnan().all()), "NaN stays NaN"
    for reg in (GroupLasso(0.0), SparseGroupLasso(0.0)):  # a NaN takes its group along, as without a metric
        assert torch.equal(reg.prox(x, s)[:3], x[:3]), "lam = 0 is the identity"
    infinite = torch.tensor([[math.inf, 1.0]], dtype=dtype)
    assert GroupLasso(0.5).prox(infinite, torch.ones_like(infinite)).tolist() == [[math.inf, 1.0]]
    for shape in ((0, 3), (3, 0), (0,)):
        assert GroupLasso(0.5).prox(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)).shape == shape


class Capped(Separable):
    """A penalty on group norms that no metric rule can use."""

    kernel = "capped"

    def __init__(self) -> None:
        pass


class GroupCapped(Grouped):
    groups, weight = "out", "none"

    def __init__(self) -> None:
        pass

    @property
    def radial(self) -> Separable:
        return Capped()


@pytest.mark.parametrize(
    ("reg", "shape"),
    [
        (GroupEnvelope(0.3, 1, ()), ()),
        (GroupEnvelope(0.3, 1), (1, 1, 1)),
        (Nuclear(0.3), (1, 1, 1)),
        (GroupLHalf(0.3, ()), ()),
        (GroupLHalf(0.3), (1, 1)),
    ],
    ids=str,
)
def test_a_single_element_has_a_single_step_size(reg, shape):
    """Also where the prox with several is not known: a step size of x's shape may be the only one."""
    x, step = torch.full(shape, 2.0), torch.full(shape, 0.5)
    assert torch.equal(reg.prox(x, step), reg.prox(x, 0.5))
    assert 0 < float(reg.prox(x, step)) < 2


def test_a_number_under_a_tensor_step_size_is_trained():
    p = torch.nn.Parameter(torch.tensor(2.0))
    p.grad = torch.zeros(())
    reg = GroupEnvelope(0.5, 1, ())
    ProxSGD([p], lr=torch.tensor(2.0), reg=reg, capturable=True, fused=False).step()
    assert p == 1


def test_a_penalty_without_a_weighted_prox_is_refused_by_name():
    wanted = "GroupCapped has no known prox: Capped on group norms has no slope"
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=wanted):
        GroupCapped().prox(x, torch.ones_like(x))
    p = torch.nn.Parameter(x.clone())
    for make in (ProxAdam, RAMDA):
        with pytest.raises(ValueError, match=f"{make.__name__}: .*{wanted}"):
            make([p], reg=GroupCapped())
        optimizer = make([p], reg=L1(0.1))
        optimizer.param_groups[0]["reg"] = GroupCapped()
        p.grad = torch.ones_like(p)
        with pytest.raises(ValueError, match=wanted):
            optimizer.step()
    assert torch.equal(p, x)


@pytest.mark.parametrize("optimizer_class", [ProxAdam, RAMDA])
@pytest.mark.parametrize("reg", [L1(0.01), GroupLasso(0.01)], ids=str)
def test_a_mask_hides_infinite_step_sizes(driver, optimizer_class, reg):
    """Behind it the metric is zero, and without eps its inverse infinite."""
    p = torch.nn.Parameter(torch.randn(3, 8))
    optimizer = optimizer_class([p], lr=0.1, reg=reg, eps=0.0, fused=driver.fused)
    mask = torch.ones(3, 8, dtype=torch.bool)
    mask[0, 0] = False
    optimizer.set_mask(p, mask)
    p.grad = torch.randn(3, 8)
    optimizer.step()
    assert bool(p.isfinite().all())
    assert bool(optimizer.prox_point(p).isfinite().all())


@pytest.mark.parametrize("optimizer_class", [ProxAdam, RAMDA])
def test_a_mask_hides_a_nan_gradient_from_the_rest_of_its_group(driver, optimizer_class):
    sides = []
    for hidden in (1.0, math.nan):
        p = torch.nn.Parameter(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))
        optimizer = optimizer_class([p], lr=0.1, reg=GroupLasso(0.01), fused=driver.fused)
        optimizer.set_mask(p, torch.arange(24).view(3, 8) % 5 > 0)
        p.grad = torch.ones(3, 8)
        p.grad[~optimizer.get_mask(p)] = hidden
        optimizer.step()
        sides.append(p.detach())
    assert bool((sides[0] != 0).any())
    assert torch.equal(*sides)
