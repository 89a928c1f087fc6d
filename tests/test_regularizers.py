"""Regularizers against oracles: brute force, optimality conditions, finite differences, and lam_max from both sides."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import oracles
import pytest
import registry
import torch
from harness import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from bregman_cuda import (
    L0,
    L1,
    MCP,
    SCAD,
    ElasticNet,
    GroupEnvelope,
    GroupLasso,
    GroupSCAD,
    LHalf,
    LTwoThirds,
    NonnegL1,
    ProxSGD,
    Regularizer,
    SparseGroupLasso,
)

SCALAR = {**registry.SCALAR, **{k: c for k, c in registry.ADDED.items() if c(0.1).radial is None}}
GROUP = {**registry.GROUP, **{k: c for k, c in registry.ADDED.items() if c(0.1).radial is not None}}
number = st.floats(-5, 5, allow_nan=False)
strength = st.floats(0, 3)
step_size = st.floats(1e-3, 5)  # short and long ones: from gamma and a - 1 on, MCP and SCAD change their prox
CONVEX_GROUP = {name: case for name, case in GROUP.items() if name in registry.CONVEX and name in registry.GROUP}


def phi(reg):
    """The scalar penalty as the literature has it; for one that oracles.py does not know yet, its own value."""
    formula = oracles.PHI.get(type(reg).__name__)
    if formula is None:
        return lambda x: float(reg.value(torch.tensor([x], dtype=torch.float64)))
    return lambda x: formula(x, **dataclasses.asdict(reg))


def groups_as_rows(x: torch.Tensor, reg) -> np.ndarray:
    """One row per group, by moving the dims that identify a group to the front."""
    dims = reg.groups_of(x.shape)
    rest = [d for d in range(x.ndim) if d not in dims]
    return x.permute(*dims, *rest).reshape(math.prod(x.shape[d] for d in dims), -1).numpy()


def l1_and_l2(reg, shape) -> tuple[float, float]:
    """The weights of |z|_1 and ||z||_2 of a group, written out from the class docstrings."""
    alpha = reg.alpha if isinstance(reg, SparseGroupLasso) else 0.0
    size = math.prod(n for d, n in enumerate(shape) if d not in reg.groups_of(shape))
    return reg.lam * alpha, reg.lam * (1 - alpha) * (math.sqrt(size) if reg.weight == "sqrt_size" else 1.0)


# Prox


@pytest.mark.parametrize("name", SCALAR)
def test_scalar_prox_minimises_its_objective(name):
    @settings(max_examples=150)
    @given(number, strength, step_size)
    def best(x: float, lam: float, step: float) -> None:
        reg = SCALAR[name](lam)
        z = float(reg.prox(torch.tensor([x], dtype=torch.float64), step))
        scale = 1 + x * x + step * lam * abs(x)
        assert oracles.excess(phi(reg), x, z, step) <= 1e-12 * scale

    best()


@pytest.mark.parametrize("name", SCALAR)
def test_scalar_value_is_the_sum_of_its_formula(name):
    reg = SCALAR[name](0.7)
    x = torch.tensor([0.0, 1.5, 0.25, 3.0], dtype=torch.float64)
    assert float(reg.value(x)) == pytest.approx(sum(map(phi(reg), x.tolist())), rel=1e-14)


@pytest.mark.parametrize("name", CONVEX_GROUP)
def test_group_prox_is_optimal(name):
    """0 lies in the subdifferential of the prox objective, group by group, up to rounding at the size of x."""

    @settings(max_examples=60)
    @given(st.integers(0, 10**6), strength, step_size)
    def optimal(seed: int, lam: float, step: float) -> None:
        reg = registry.GROUP[name](lam)
        x = registry.values((4, 3, 5), torch.float64, torch.Generator().manual_seed(seed), 0.3) * 2
        x[1] = 0
        l1, l2 = l1_and_l2(reg, x.shape)
        for before, after in zip(groups_as_rows(x, reg), groups_as_rows(reg.prox(x, step), reg)):
            rounding = 64 * 2.3e-16 * (1 + np.linalg.norm(before) + step * (l1 + l2))
            assert oracles.sparse_group_residual(before, after, step * l1, step * l2) <= rounding

    optimal()


@pytest.mark.parametrize("name", [name for name in GROUP if not GROUP[name](0.1).convex])
def test_group_prox_shrinks_the_norm_to_the_least_objective(name):
    """Of a penalty on norms: the direction stays, and no other norm does better by brute force."""

    @settings(max_examples=40)
    @given(st.integers(0, 10**6), strength, step_size)
    def best(seed: int, lam: float, step: float) -> None:
        reg = GROUP[name](lam)
        x = registry.values((4, 3, 5), torch.float64, torch.Generator().manual_seed(seed), 0.3) * 2
        weight = reg.group_weight(x.shape)
        for before, after in zip(groups_as_rows(x, reg), groups_as_rows(reg.prox(x, step), reg)):
            norm, shrunk = np.linalg.norm(before), np.linalg.norm(after)
            assert oracles.excess(phi(reg.radial), norm, shrunk, step * weight) <= 1e-12 * (1 + norm * norm)
            np.testing.assert_allclose(after * norm, before * shrunk, rtol=0, atol=1e-14 * (1 + norm * norm))

    best()


@pytest.mark.parametrize("name", SCALAR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scalar_prox_takes_a_scale_per_element(name, dtype):
    """As diagonal metrics need it: the same bits as one scale at a time."""
    penalty = SCALAR[name](0.6)
    x = torch.randn(40, dtype=dtype, generator=torch.Generator().manual_seed(8)) * 3
    scale = torch.linspace(0.0, 4.0, 40, dtype=dtype)
    alone = torch.stack([penalty.prox(x[i], scale[i]) for i in range(40)])
    assert same_bits(penalty._scalar_prox(x, scale), alone)
    assert same_bits(penalty._scalar_prox(x.view(5, 8).t(), scale.view(5, 8).t()).t().reshape(-1), alone)


# Where the prox jumps or changes its form: (penalty, step, up to here, prox there, prox just above).
TURNS = {
    "l0": (L0(2.0), 1.0, 2.0, 0.0, 2.0),
    "l_half": (LHalf(1.0), 1.0, 1.5, 0.0, 1.0),
    "l_two_thirds": (LTwoThirds(1.5), 1.0, 2.0, 0.0, 1.0),
    "mcp": (MCP(1.0, 3.0), 1.0, 1.0, 0.0, 0.0),
    "mcp_flat": (MCP(1.0, 3.0), 1.0, 3.0, 3.0, 3.0),
    "mcp_step_is_gamma": (MCP(1.0, 2.0), 2.0, 2.0, 0.0, 2.0),
    "mcp_long_step": (MCP(1.0, 1.0), 4.0, 2.0, 0.0, 2.0),
    "scad": (SCAD(1.0, 3.0), 0.5, 0.5, 0.0, 0.0),
    "scad_falling": (SCAD(1.0, 3.0), 0.5, 1.5, 1.0, 1.0),
    "scad_flat": (SCAD(1.0, 3.0), 0.5, 3.0, 3.0, 3.0),
    "scad_step_is_a_minus_1": (SCAD(1.0, 3.0), 2.0, 3.0, 1.0, 3.0),
    "scad_long_step": (SCAD(1.0, 3.0), 3.0, 3.5, 0.5, 3.5),
    "scad_longest_step": (SCAD(1.0, 3.0), 9.0, 6.0, 0.0, 6.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", TURNS)
def test_prox_at_its_turns(case, dtype):
    """A tie goes to the smaller weight, with either sign; roots are closed forms to a few ulps."""
    reg, step, turn, there, above = TURNS[case]
    eps = torch.finfo(dtype).eps
    x = torch.tensor([turn * (1 + d * eps) for d in (-8, 0, 8)], dtype=dtype)
    for sign in (1, -1):
        below_, there_, above_ = (sign * reg.prox(sign * x, step)).tolist()
        assert there_ == pytest.approx(there, abs=64 * eps) or case.startswith("l_")  # its own threshold is rounded
        assert (below_ == 0) == (there == 0) or below_ > 0
        assert below_ == pytest.approx(there, abs=64 * eps)
        assert above_ == pytest.approx(above, abs=64 * eps)


@pytest.mark.parametrize("name", SCALAR)
def test_scalar_prox_at_the_ends_of_the_range(name):
    """Infinity and huge numbers stay finite or infinite, tiny ones are zero or stay, NaN is NaN, for any step."""
    for dtype in (torch.float32, torch.float64):
        info = torch.finfo(dtype)
        x = torch.tensor([0.0, info.smallest_normal / 4, info.smallest_normal, info.max / 2, torch.inf], dtype=dtype)
        for lam, step in ((0.0, 1.0), (0.5, 0.0), (0.5, 1e-3), (0.5, 1.5), (0.5, 100.0)):
            reg = SCALAR[name](lam)
            z = reg.prox(x, step)
            assert not bool(z.isnan().any()), (lam, step)
            assert z[0] == 0
            assert z[-1] == torch.inf
            assert bool((z <= x).all())
            assert bool((z[1:3] == 0).all()) if lam * step else bool((z[1:3] > 0).all())
            assert z[3] > 0
            assert bool(reg.prox(torch.tensor(torch.nan, dtype=dtype), step).isnan())
            if not isinstance(reg, NonnegL1):
                assert same_bits(reg.prox(-x[1:], step).abs(), z[1:])


@pytest.mark.parametrize("groups", ["out", "in", "kernel", (0, 2), (1, 2), (), (-1,), (2, 0)])
@pytest.mark.parametrize("weight", ["sqrt_size", "none"])
def test_group_lasso_prox_is_identity_minus_projection(groups, weight):
    """Moreau: x - prox(x) is the projection of each group on the dual ball of radius step * lam * w."""
    reg = GroupLasso(0.4, groups, weight)
    x = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, l2 = l1_and_l2(reg, x.shape)
    for before, after in zip(groups_as_rows(x, reg), groups_as_rows(reg.prox(x, 0.9), reg)):
        np.testing.assert_allclose(before - after, oracles.project_ball(before, 0.9 * l2), rtol=0, atol=1e-14)


def test_l1_prox_is_identity_minus_projection():
    x = torch.linspace(-2, 2, 401, dtype=torch.float64)
    np.testing.assert_array_equal(L1(0.5).prox(x, 0.6), x.numpy() - np.clip(x.numpy(), -0.3, 0.3))


@pytest.mark.parametrize("name", registry.CONVEX)
def test_prox_is_firmly_nonexpansive(name):
    """|prox x - prox y|^2 <= <prox x - prox y, x - y>: true of the prox of every convex function."""
    reg = registry.PENALTIES[name](0.4)
    generator = torch.Generator().manual_seed(2)
    for _ in range(30):
        x, y = (registry.values((4, 3, 2), torch.float64, generator, 0.2) for _ in range(2))
        difference = reg.prox(x, 0.8) - reg.prox(y, 0.8)
        assert float((difference * difference).sum()) <= float((difference * (x - y)).sum()) + 1e-13


def test_sparse_group_lasso_ends_at_its_two_relatives():
    x = torch.randn(6, 5, dtype=torch.float64)
    assert torch.equal(SparseGroupLasso(0.3, 1.0).prox(x, 0.7), L1(0.3).prox(x, 0.7))
    assert torch.equal(SparseGroupLasso(0.3, 0.0).prox(x, 0.7), GroupLasso(0.3).prox(x, 0.7))


def test_group_of_one_element_is_l1():
    x = torch.randn(7, 4, dtype=torch.float64)
    torch.testing.assert_close(GroupLasso(0.3, "kernel").prox(x, 0.7), L1(0.3).prox(x, 0.7), rtol=1e-15, atol=1e-15)


# Value, subgradient, distance


@pytest.mark.parametrize("name", registry.PENALTIES)
def test_subgradient_is_the_slope_of_the_value(name):
    """Central differences at points away from the kinks: error h^2 times the third derivative, plus eps / h."""
    reg = registry.PENALTIES[name](0.6)
    x = torch.rand(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.5
    if name != "nonneg_l1":
        x[1] *= -1
    slope = reg.subgradient(x).numpy()

    def value(at: np.ndarray) -> float:
        return float(reg.value(torch.tensor(at)))

    for i in range(5):
        direction = np.random.default_rng(i).standard_normal(x.shape)
        assert oracles.central_difference(value, x.numpy(), direction) == pytest.approx(
            float((slope * direction).sum()), abs=1e-8
        )


@pytest.mark.parametrize("name", registry.CONVEX)
def test_subgradient_supports_the_value_from_below(name):
    """J(y) >= J(x) + <s, y - x> for every y: the definition, also at the kinks."""
    reg = registry.PENALTIES[name](0.6)
    generator = torch.Generator().manual_seed(4)
    x = reg.project(registry.values((3, 4, 2), torch.float64, generator, 0.4))
    x[0] = 0
    s = reg.subgradient(x)
    assert bool((s[0] == 0).all()), "the element of smallest norm at zero"
    for _ in range(50):
        y = reg.project(torch.randn(x.shape, dtype=torch.float64, generator=generator))
        assert float(reg.value(y)) >= float(reg.value(x) + (s * (y - x)).sum()) - 1e-12


@pytest.mark.parametrize("name", registry.PENALTIES)
def test_value_has_torchs_gradient(name):
    reg = registry.PENALTIES[name](0.6)
    x = (torch.rand(3, 4, 2, dtype=torch.float64) + 0.5).requires_grad_()
    reg.value(x).backward()
    torch.testing.assert_close(x.grad, reg.subgradient(x.detach()), rtol=1e-12, atol=1e-12)


def test_gradient_of_the_value_at_a_zero_group_is_zero_and_not_nan():
    for reg in (case(0.5) for name, case in registry.PENALTIES.items() if name != "nonneg_l1"):
        x = torch.zeros(2, 3, 2, requires_grad=True)
        reg.value(x).backward()
        assert torch.equal(x.grad, torch.zeros(2, 3, 2)), reg


@pytest.mark.parametrize("name", registry.PENALTIES)
def test_distance_certifies_the_prox_and_nothing_else(name):
    """z = prox(x, t) means (x - z) / t in dJ(z): distance zero for grad = (z - x) / t, and not for a moved one."""
    reg = registry.PENALTIES[name](0.5)
    generator = torch.Generator().manual_seed(6)
    for _ in range(20):
        x = registry.values((4, 3, 2), torch.float64, generator, 0.2)
        z = reg.prox(x, 0.4)
        assert float(reg.subdiff_distance(z, (z - x) / 0.4).max()) <= 1e-13
        if bool((z != 0).any()):
            planted = (z - x) / 0.4 + 0.01 * (z != 0)
            assert float(reg.subdiff_distance(z, planted).max()) >= 0.009


# lam_max


@pytest.mark.parametrize("name", registry.KINKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lam_max_from_both_sides(name, dtype):
    """At lam_max and above zero is optimal and a step from zero stays there; just below it does not."""
    grad = torch.randn(4, 3, 2, dtype=dtype, generator=torch.Generator().manual_seed(7))
    case = registry.PENALTIES[name]
    limit = case(1.0).lam_max(grad)
    slack = 64 * torch.finfo(dtype).eps  # the norm's own rounding, and bisection's for the sparse group
    zero = torch.zeros_like(grad)
    for factor, stays in ((1 + slack, True), (1 - slack, False), (2.0, True), (0.5, False)):
        reg = case(limit * factor)
        assert bool((reg.subdiff_distance(zero, grad) == 0).all()) == stays
        p = torch.nn.Parameter(zero.clone())
        p.grad = grad.clone()
        ProxSGD([p], lr=0.5, reg=reg, fused=False).step()
        assert bool((p == 0).all()) == stays, f"factor {factor}"


@pytest.mark.parametrize("name", [name for name in registry.PENALTIES if name not in registry.KINKED])
def test_zero_is_critical_for_every_lam_where_the_penalty_is_infinitely_steep(name):
    zero, grad = torch.zeros(2, 3, 4), torch.randn(2, 3, 4)
    assert registry.PENALTIES[name](1.0).lam_max(grad) == 0
    assert bool((registry.PENALTIES[name](1e-9).subdiff_distance(zero, grad) == 0).all())
    assert bool((registry.PENALTIES[name](0.0).subdiff_distance(zero, grad) > 0).all())


@pytest.mark.parametrize("name", registry.PENALTIES)
def test_lam_max_of_nothing_is_zero(name):
    reg = registry.PENALTIES[name](1.0)
    assert reg.lam_max(torch.zeros(2, 3, 4)) == 0
    assert reg.lam_max(torch.zeros(0, 3, 4)) == 0


# Values by name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", registry.PENALTIES)
def test_lam_zero_is_the_identity(name, dtype):
    """Of every value, except for what a constraint or a quadratic part does by itself."""
    reg = registry.PENALTIES[name](0.0)
    if isinstance(reg, ElasticNet):
        reg.l2 = 0.0
    tiny = torch.finfo(dtype).smallest_normal
    x = torch.tensor([[0.0, -0.0, 1.0], [0.0, 0.0, 0.0], [tiny / 2, tiny, 3e38], [5.0, 0.1, 1e-30]], dtype=dtype)
    x = torch.stack([x, x if isinstance(reg, NonnegL1) else -x], dim=2)
    assert torch.equal(reg.prox(x, 0.7), x)


@pytest.mark.parametrize("name", GROUP)
def test_zero_groups_stay_zero(name):
    for lam in (0.0, 0.5):
        x = torch.randn(3, 3, 4)
        x[1] = 0
        x[:, 1] = 0
        result = registry.PENALTIES[name](lam).prox(x, 0.7)
        assert bool(torch.isfinite(result).all())
        assert bool((result[1] == 0).all())
        assert bool((result[:, 1] == 0).all())


@pytest.mark.parametrize("name", registry.PENALTIES)
def test_nan_stays_nan_and_inf_stays_inf(name):
    reg = registry.PENALTIES[name](0.5)
    x = torch.ones(3, 3, 4)
    x[0, 0, 0], x[2, 2, 3] = torch.nan, torch.inf
    result = reg.prox(x, 0.7)
    assert bool(result[0, 0, 0].isnan())
    assert float(result[2, 2, 3]) == math.inf or name == "group_all", "the NaN is in the same group"


def test_prox_keeps_dtype_shape_and_layout_and_changes_nothing():
    for name, case in registry.PENALTIES.items():
        for dtype in registry.DTYPES:
            x = torch.randn(2, 3, 4, 4).to(dtype).to(memory_format=torch.channels_last)
            before = x.clone()
            result = case(0.2).prox(x, 0.5)
            assert (result.dtype, result.shape, result.stride()) == (x.dtype, x.shape, x.stride()), name
            assert same_bits(x, before)


# Objects


@pytest.mark.parametrize("name", registry.PENALTIES)
def test_dictionary_round_trip(name):
    reg = registry.PENALTIES[name](0.25)
    assert Regularizer.from_dict(reg.to_dict()) == reg
    with pytest.raises(ValueError, match=r"unknown regularizer 'Mystery'; known: .*L1"):
        Regularizer.from_dict({**reg.to_dict(), "regularizer": "Mystery"})


@pytest.mark.parametrize("name", registry.PENALTIES)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-0.1, ValueError),
        (math.nan, ValueError),
        (math.inf, ValueError),
        ("1", TypeError),
        (None, TypeError),
        (True, TypeError),
    ],
)
def test_bad_lam_is_refused_when_made_and_when_changed(name, value, error):
    with pytest.raises(error, match=r"lam must be .*got"):
        registry.PENALTIES[name](value)
    reg = registry.PENALTIES[name](0.5)
    with pytest.raises(error, match=f"{type(reg).__name__}: lam must be"):
        reg.lam = value
    assert reg.lam == 0.5


def test_other_bad_parameters_are_refused():
    with pytest.raises(ValueError, match=r"ElasticNet: l2 must be finite and >= 0, got -1"):
        ElasticNet(0.1, -1)
    for gamma in (0.0, -1.0):
        with pytest.raises(ValueError, match=rf"MCP: gamma must be finite and > 0, got {gamma}"):
            MCP(0.1, gamma)
    with pytest.raises(ValueError, match=r"GroupSCAD: a must be finite and > 2, got 2"):
        GroupSCAD(0.1, 2)
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="SparseGroupLasso: alpha must be finite and between 0 and 1"):
            SparseGroupLasso(0.1, alpha)
    with pytest.raises(
        ValueError, match=r"GroupLasso: groups must be 'out', 'in', 'kernel' or a tuple of dims, got 'rows'"
    ):
        GroupLasso(0.1, "rows")
    with pytest.raises(TypeError, match=r"GroupLasso: groups must be .* got 1"):
        GroupLasso(0.1, 1)
    with pytest.raises(ValueError, match="GroupLasso: weight must be 'sqrt_size' or 'none', got 'sqrt'"):
        GroupLasso(0.1, "out", "sqrt")
    with pytest.raises(AttributeError, match="L1 has no parameter 'lambda_'"):
        L1(0.1).lambda_ = 3
    for shape, groups in (((), "out"), ((3,), "in"), ((3,), (-2,)), ((3, 4), (2,))):
        with pytest.raises(ValueError, match=r"GroupLasso\(groups=.*\) does not fit a tensor of shape"):
            GroupLasso(0.1, groups).groups_of(shape)


def test_groups_by_name():
    shape = (8, 4, 3, 3)
    found = {g: GroupLasso(0.1, g).groups_of(shape) for g in ("out", "in", "kernel", (0, -1), (3, 0))}
    assert found == {"out": (0,), "in": (1,), "kernel": (0, 1), (0, -1): (0, 3), (3, 0): (0, 3)}
    assert L1(0.1).groups_of(shape) is None
    assert GroupLasso(0.1, "out").group_norms(torch.ones(2, 9)).tolist() == [[3.0], [3.0]]
    assert GroupLasso(0.1, "out").group_weight((2, 9)) == 3.0


# The oracles themselves, each with a planted error


def test_brute_force_sees_a_wrong_threshold():
    for name, z in (("L1", 0.5), ("NonnegL1", 0.5), ("ElasticNet", 0.5 / 1.7)):
        parameters = {"lam": 0.5, **({"l2": 0.7} if name == "ElasticNet" else {})}
        right = lambda x: oracles.PHI[name](x, **parameters)  # noqa: B023, E731
        assert abs(oracles.excess(right, 1.0, z, 1.0)) <= 1e-15
        assert oracles.excess(right, 1.0, z + 1e-3, 1.0) >= 4e-7
        assert oracles.excess(right, 0.4, 1e-3, 1.0) >= 9e-5, "zero is best there"
    assert oracles.excess(lambda x: oracles.PHI["NonnegL1"](x, 0.5), -1.0, -1e-9, 1.0) == math.inf


def test_group_residual_sees_a_wrong_factor():
    x = np.array([3.0, 4.0])
    assert oracles.sparse_group_residual(x, x * 0.8, 0.0, 1.0) <= 1e-15
    assert oracles.sparse_group_residual(x, x * 0.81, 0.0, 1.0) >= 0.04
    assert oracles.sparse_group_residual(x, np.zeros(2), 0.0, 4.9) >= 0.09
    assert oracles.sparse_group_residual(x, np.zeros(2), 1.0, math.sqrt(13)) <= 1e-15
    assert oracles.sparse_group_residual(x, np.zeros(2), 1.0, 3.5) >= 0.1


def test_difference_sees_a_wrong_slope():
    x, d = np.array([1.0, -2.0]), np.array([1.0, 1.0])
    assert oracles.central_difference(lambda z: float((z**2).sum()), x, d) == pytest.approx(-2.0, abs=1e-9)
    assert oracles.project_ball(np.array([3.0, 4.0]), 1.0) == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("name", [*registry.PENALTIES, "envelope"])
def test_prox_compiles_in_one_graph(name):
    """With one step size and with one per element; generators within generators are torch 2.14's to trace."""
    nested = torch.__version__ >= (2, 14)
    reg = GroupEnvelope(0.1, 2) if name == "envelope" else registry.PENALTIES[name](0.1)
    x, steps = torch.randn(6, 5, 3), [0.3] if name != "envelope" or nested else []
    if not reg.why_not_weighted() and (nested or reg.radial is None):
        steps.append(torch.rand(6, 5, 3))
    for step in steps:
        torch._dynamo.reset()
        compiled = torch.compile(reg.prox, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, step), reg.prox(x, step), rtol=1e-5, atol=1e-6)
