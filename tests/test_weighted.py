"""Group proxes in a diagonal metric (RAMDA, ProxAdam) against brute force, optimality conditions and edges."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import oracles
import pytest
import registry
import torch

from bregman_cuda import (
    L1,
    RAMDA,
    ElasticNet,
    GroupEnvelope,
    GroupL0,
    GroupLasso,
    GroupLHalf,
    GroupLTwoThirds,
    GroupMCP,
    GroupSCAD,
    Nuclear,
    ProxAdam,
    ProxSGD,
    SparseGroupLasso,
)
from bregman_cuda.regularizers._base import Grouped, Separable
from bregman_cuda.regularizers._rounds import Extent, alone


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


@pytest.mark.parametrize("far", [0.0, 1e-30, 0.1, 0.999, 1.001, 2.0, 1e3, 1e15, math.inf, math.nan])
@pytest.mark.parametrize("spread", [1.0, 1e3, 1e8])
def test_a_search_may_begin_anywhere(spread, far):
    """At the norm of a point that is `far` from the result, as a factor."""
    rng = np.random.default_rng(int(math.log10(spread)) + 100)
    for _ in range(60):
        x, s, w = group(rng, spread)
        want = oracles.weighted_group_lasso(x, s, w)
        near = torch.tensor(want * far if want.any() else x * far)
        rounds = GroupLasso(w, (), "none").prox_in_rounds(torch.tensor(x), torch.tensor(s), Extent(x.shape), near)
        got = alone(rounds).numpy()
        assert np.array_equal(got == 0, want == 0)
        assert np.abs(got - want).max() <= 1e-12 * np.abs(want).max()


@pytest.mark.parametrize(
    ("x", "s", "near", "level"),
    [
        (1024.0, 1024.0, 1e-43, 1.0),  # nothing of the old norm is left beside level s, and g is 1
        (1e8, 1e8, 1e-38, 1.0),
        (1e-24, 0.0, 1e-24, 1.0),  # squares are too small for fp32
        (1e-24, 0.0, 0.0, 1.0),
    ],
)
def test_rare_starts_leave_no_nan(x, s, near, level):
    """One element: soft thresholding, and with a step of zero nothing."""
    args = (torch.tensor([v], dtype=torch.float32) for v in (x, s))
    rounds = GroupLasso(level, (), "none").prox_in_rounds(*args, Extent((1,)), torch.tensor([near]))
    assert float(alone(rounds)) == pytest.approx(max(x - level * s, 0.0), rel=1e-6, abs=0.0)


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
    for step in (0.4, 4.0, 40.0):  # the problems of MCP and SCAD are not convex at the last ones
        torch.testing.assert_close(reg.prox(x, torch.full_like(x, step)), reg.prox(x, step), rtol=0, atol=1e-14)


# Those that bend (csrc/math/curved.h), of strength w and without another weight.
CURVED = {
    "L0": lambda w: GroupL0(w, (), "none"),
    "LHalf": lambda w: GroupLHalf(w, (), "none"),
    "LTwoThirds": lambda w: GroupLTwoThirds(w, (), "none"),
    "MCP": lambda w: GroupMCP(w, 3.0, (), "none"),
    "SCAD": lambda w: GroupSCAD(w, 3.7, (), "none"),
}
ENDING = ("MCP", "SCAD")  # constant from some norm on, and not convex at long steps


def bent_group(rng, name: str, spread: float) -> tuple[np.ndarray, np.ndarray, float]:
    """A random group, its step sizes, and a strength about where zero and another point are equally good; for MCP and
    SCAD one for any of their pieces, at steps that leave their problems convex and at such that do not."""
    x, s, _ = group(rng, spread)
    x[0] = x[0] or 1.0
    if name in ENDING:
        s *= 2.6 * rng.choice([0.01, 0.1, 1.0, 10.0, 1000.0]) / s.max()
        return x, s, min(np.linalg.norm(x / s), np.linalg.norm(x) * 10.0 ** rng.uniform(-1, 2)) * rng.choice([0.3, 0.9])
    p = {"L0": 0.0, "LHalf": 1 / 2, "LTwoThirds": 2 / 3}[name]
    return x, s, float(np.sum(x * x / s)) / np.linalg.norm(x) ** p * 10.0 ** rng.uniform(-3, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spread", [1.0, 1e3, 1e8])
@pytest.mark.parametrize("name", CURVED)
def test_it_is_as_good_as_brute_force(name, spread, dtype):
    """The objective, relative to zero's; a critical point of it, unless that is zero: phi'(t) z / t = (x - z) / s.

    Rounding moves the point by eps and the objective by eps^2, but its sum by eps of fp64. The residual is relative to
    x / s."""
    rng = np.random.default_rng(int(math.log10(spread)))
    eps, zeros = torch.finfo(dtype).eps, 0
    for _ in range(40):
        x, s, w = bent_group(rng, name, spread)
        x, s = (torch.tensor(v).to(dtype).double().numpy() for v in (x, s))
        reg = CURVED[name](float(torch.tensor(w).to(dtype)))
        z = reg.prox(torch.tensor(x).to(dtype), torch.tensor(s).to(dtype)).double()
        phi = lambda t, reg=reg: oracles.PHI[name](t, **reg.radial.parameters())  # noqa: E731
        zero = oracles.weighted_objective(phi, x, np.zeros_like(x), s)
        got, least = oracles.weighted_objective(phi, x, z.numpy(), s), oracles.least_weighted_objective(phi, x, s)
        assert got <= min(least, zero) + zero * max(1e-13, 64 * eps * eps)
        zeros += not z.any()
        if z.any():
            pull = torch.tensor((x - z.numpy()) / s)
            residual = float(reg.subdiff_distance(z, -pull).norm())
            assert residual <= 64 * eps * np.linalg.norm(x / s)
    assert name in ENDING or 0 < zeros < 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name in CURVED if name != "L0"])
def test_the_least_shrinkage_is_not_lost(name, dtype):
    """A step that shortens a group by 1e-6 to 1e-3, as in a training: there objectives tell nothing."""
    rng = np.random.default_rng(17)
    for _ in range(100):
        x = torch.tensor(rng.standard_normal((1, 64)) * 0.02).to(dtype)
        s = torch.tensor(rng.uniform(0.5, 2, (1, 64)) * 10.0 ** rng.uniform(-6, -3)).to(dtype)
        norm, reg = float(x.double().norm()), dataclasses.replace(CURVED[name](0.5), groups="out")
        z = reg.prox(x, s).double()
        x, s = x.double(), s.double()
        t = norm
        for _ in range(50):  # the plain iteration, which a small pull ends soon
            t = float((x / (1 + float(reg.radial._slope(torch.tensor(t, dtype=torch.float64))) / t * s)).norm())
        want = norm - t
        assert want > 0
        assert abs(norm - float(z.norm()) - want) <= 1e-3 * want + 8 * torch.finfo(dtype).eps * norm


@pytest.mark.parametrize("name", CURVED)
def test_scales_in_two_clusters_may_end_in_another_minimum_but_never_worse_than_zero(name):
    """What curved.h says: how often, and how much worse. Steps go beyond the convexity of MCP and SCAD here."""
    rng, missed, worst = np.random.default_rng(3), 0, 0.0
    for _ in range(60):
        x, s, w = bent_group(rng, name, 10.0)
        s = np.where(rng.random(len(s)) < 0.5, 1.0, 10.0 ** -rng.uniform(0, 8))
        x = x * np.where(s == 1.0, 10.0 ** rng.uniform(-1, 3), 1.0)
        w = float(np.sum(x * x / s)) * 10.0 ** rng.uniform(-4, 0) / np.linalg.norm(x) ** 0.6
        if name in ENDING:
            w = np.linalg.norm(x) * 10.0 ** rng.uniform(-1, 1)
        reg = CURVED[name](w)
        z = reg.prox(torch.tensor(x), torch.tensor(s)).numpy()
        phi = lambda t, reg=reg: oracles.PHI[name](t, **reg.radial.parameters())  # noqa: E731
        zero = oracles.weighted_objective(phi, x, np.zeros_like(x), s)
        excess = oracles.weighted_objective(phi, x, z, s) - oracles.least_weighted_objective(phi, x, s)
        assert oracles.weighted_objective(phi, x, z, s) <= zero * (1 + 1e-13)
        missed += excess > 1e-9 * zero
        worst = max(worst, excess / zero if zero else 0.0)
    assert missed <= (2 if name in ("LHalf", "LTwoThirds") else 0)
    assert worst < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CURVED)
def test_edges_of_those_that_bend(name, dtype):
    rows = [[0.0, 0.0, 0.0], [3.0, 4.0, 0.0], [1e-20, 0.0, 0.0], [1.0, 0.0, 1e-3], [math.nan, 1e9, 0.0]]
    x = torch.tensor([*rows, [math.inf, 1.0, -2.0], [-0.0, 1e-3, 0.0]], dtype=dtype)
    s = torch.ones_like(x)
    s[1:3] = 0.0
    s[3] = torch.tensor([0.0, 5.0, 1.0])
    reg = dataclasses.replace(CURVED[name](0.5), groups="out")
    got = reg.prox(x, s)
    assert got[0].tolist() == [0, 0, 0], "a zero group"
    assert torch.equal(got[1:3], x[1:3]), "step size 0 leaves it alone"
    assert got[3, 0] == 1, "an element that cannot move keeps its group alive"
    assert bool(got[4].isnan().all()), "NaN fills its group"
    assert got[5].tolist() == [math.inf, 1.0, -2.0], "nothing shrinks an infinite group"
    assert got[6].tolist() == [0, 0, 0]
    assert torch.equal(dataclasses.replace(reg, lam=0.0).prox(x, s)[[0, 1, 2, 3, 5, 6]], x[[0, 1, 2, 3, 5, 6]])
    single = CURVED[name](0.5).prox(torch.tensor(2.0, dtype=dtype), torch.tensor(0.5, dtype=dtype))
    torch.testing.assert_close(single, CURVED[name](0.5).prox(torch.tensor(2.0, dtype=dtype), 0.5), rtol=1e-6, atol=0)
    for shape in ((0, 3), (3, 0), (0,)):
        assert reg.prox(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)).shape == shape


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


@dataclasses.dataclass
class Sparse(GroupLasso):
    """With a penalty on elements whose prox, followed by that of the norms, is not the prox of both."""

    below: str = "elastic_net"
    norms: bool = True

    @property
    def elementwise(self) -> Separable:
        return ElasticNet(self.lam, 1.0) if self.below == "elastic_net" else L1(self.lam)

    @property
    def radial(self) -> Separable | None:
        return L1(self.lam) if self.norms else None


class Known(Sparse):
    """With a prox of its own."""

    whole = "it is not a composition"

    def prox(self, x, step):
        return x * 0.5


@pytest.mark.parametrize("make", [ProxSGD, ProxAdam])
def test_a_penalty_below_norms_has_to_be_homogeneous(kernel_driver, monkeypatch, make):
    wanted = "Sparse has no known prox: ElasticNet below group norms is not homogeneous"
    p = torch.nn.Parameter(torch.ones(2, 3))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=wanted):
        Sparse(0.1).prox(p.detach(), 0.5)
    with pytest.raises(ValueError, match=f"{make.__name__}: .*{wanted}"):
        make([p], reg=Sparse(0.1))
    # The kernels know no such pair either.
    optimizer = make([p], lr=0.1, reg=SparseGroupLasso(0.1), fused=True)
    optimizer.step()
    ((_, bucket),) = optimizer._buckets()
    before, (rule, _, radial) = p.detach().clone(), bucket.kernels.kinds(bucket.rule, SparseGroupLasso(0.1))
    other = bucket.kernels.penalties["elastic_net"][0]
    monkeypatch.setattr(bucket.kernels, "kinds", lambda *_: [rule, other, radial])
    with pytest.raises(RuntimeError, match=f"below group norms stand penalties with .* got kind {other}"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("fused", [False, None])
@pytest.mark.parametrize("make", [ProxSGD, ProxAdam])
def test_a_penalty_that_stops_being_homogeneous_is_refused_before_anything_changes(make, fused):
    params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    reg = Sparse(0.1, below="l1")
    optimizer = make([{"params": params[:1]}, {"params": params[1:], "reg": reg}], lr=0.1, fused=fused)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    reg.below = "elastic_net"
    with pytest.raises(ValueError, match="ElasticNet below group norms is not homogeneous"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


@pytest.mark.filterwarnings("ignore:ProxSGD")
def test_proxes_that_are_known_without_homogeneity():
    """Groups without a penalty on their norms, which plain torch steps, and a prox of a user's own."""
    x = torch.randn(4, 3)
    for reg, wanted in (
        (Sparse(0.1, norms=False), ElasticNet(0.1, 1.0).prox(x - 0.1, 0.1)),
        (Known(0.1), (x - 0.1) / 2),
    ):
        p = torch.nn.Parameter(x.clone())
        p.grad = torch.ones_like(p)
        ProxSGD([p], lr=0.1, reg=reg).step()
        torch.testing.assert_close(p.detach(), wanted)
    with pytest.raises(ValueError, match="Sparse has no known prox: ElasticNet below"):
        Sparse(0.1).prox_together([x], 0.5)
