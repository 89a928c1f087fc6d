"""The update rules of the reference against float64 formulas, torch's own optimizers and what the papers promise."""

from __future__ import annotations

import functools
import math

import numpy as np
import oracles
import pytest
import registry
import torch
from harness import same_bits

from bregman_cuda import L1, RAMDA, RMDA, AdaBreg, AveragedProxSGD, LinBreg, ProxAdam, ProxSGD, _math
from bregman_cuda.optim._rule import COUNTERS

STEPS = 7
FORMULAS = {
    "linbreg": oracles.linbreg,
    "linbreg_paper": oracles.linbreg_paper,
    "linbreg_torch": oracles.linbreg_torch,
    "adabreg": oracles.adabreg,
    "proxsgd": oracles.proxsgd,
    "proxsgd_momentum": oracles.proxsgd,
    "averaged_proxsgd": oracles.averaged_proxsgd,
    "proxadam": functools.partial(oracles.proxadam_consistent, weight_decay=0.01),
    "proxadam_amsgrad": functools.partial(oracles.proxadam_proxgen, weight_decay=0.01, amsgrad=True),
    "rmda": oracles.rmda,
    "rmda_averaged": oracles.rmda,
    "ramda": oracles.ramda,
    "ramda_averaged": oracles.ramda,
    "splitlbi": functools.partial(oracles.splitlbi, kappa=1.5),
    "splitlbi_nesterov": functools.partial(oracles.splitlbi, nesterov=True, weight_decay=0.1),
    "splitlbi_inside": functools.partial(oracles.splitlbi, inside=True),
}
LRS = [0.25] * 3 + [0.05] * 2 + [0.5] * (STEPS - 5)  # two changes of the step size


def start(seed: int = 0, n: int = 200) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    p0 = rng.standard_normal(n) * (rng.random(n) < 0.5)
    return p0, [rng.standard_normal(n) for _ in range(STEPS)]


def walk(rule: str, p0, grads, lrs, lam, fused, dtype=torch.float64, **options):
    p = torch.nn.Parameter(torch.tensor(p0, dtype=dtype))
    optimizer = registry.RULES[rule].make([p], L1(lam), fused=fused, **options)
    for g, lr in zip(grads, lrs):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.tensor(g, dtype=dtype)
        optimizer.step()
    return p, optimizer


def test_every_rule_has_a_formula():
    assert set(FORMULAS) == set(registry.RULES)


@pytest.mark.parametrize(
    ("rule", "delta"),
    [(r, d) for r, case in registry.RULES.items() for d in ((1.0, 0.4, 3.0) if case.dual else (1.0,))],
)
def test_rule_follows_its_formula(driver, rule, delta):
    """Both sides round each of about ten operations per step to fp64 at magnitudes below 16."""
    case = registry.RULES[rule]
    p0, grads = start()
    options = {k: v for k, v in case.options.items() if k == "momentum"}
    if case.dual:
        options["delta"] = delta
    want = FORMULAS[rule](p0, grads, LRS, 0.3, **options)
    got, _ = walk(rule, p0, grads, LRS, 0.3, driver.fused, **({"delta": delta} if case.dual else {}))
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=0, atol=STEPS * 10 * 16 * 2.3e-16)
    assert case.dense or 0.05 < np.mean(want == 0) < 0.9, "the case must hold zeros and non-zeros"
    assert np.array_equal(got.detach().numpy() == 0, want == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", registry.RULES)
def test_state_accumulates_in_fp32(driver, rule, dtype):
    """Many steps that a 16-bit accumulator would lose: only the last rounding to storage is of the storage type."""
    n, steps = 64, 64
    rng = np.random.default_rng(1)
    p0 = torch.tensor(rng.uniform(1, 2, n)).to(dtype).double().numpy()
    grads = [torch.full((n,), 2.0**-10, dtype=torch.float64).numpy()] * steps
    lrs = [0.125] * steps
    options = {k: v for k, v in registry.RULES[rule].options.items() if k == "momentum"}
    want = FORMULAS[rule](p0, grads, lrs, 0.01, **options)
    got, optimizer = walk(rule, p0, grads, lrs, 0.01, driver.fused, dtype=dtype)
    # fp32: below ten roundings a step at a magnitude below 8; then one rounding to storage.
    atol = steps * 10 * 8 * 2.0**-24 + 8 * torch.finfo(dtype).eps / 2
    np.testing.assert_allclose(got.detach().double().numpy(), want, rtol=0, atol=atol)
    state = {k: v for k, v in optimizer.state[got].items() if k not in COUNTERS}
    assert {v.dtype for v in state.values()} <= {torch.float32}
    from_state = registry.RULES[rule].dual or registry.RULES[rule].kernel_rule.endswith("_point")
    assert ("master" in state) == (not from_state and dtype != torch.float32)


TWINS = {
    "linbreg": (torch.optim.SGD, {}),
    "linbreg_torch": (torch.optim.SGD, {"momentum": 0.75}),
    "adabreg": (torch.optim.Adam, {}),
    "proxsgd": (torch.optim.SGD, {}),
    "proxsgd_momentum": (torch.optim.SGD, {"momentum": 0.75}),
    "proxadam": (torch.optim.AdamW, {"weight_decay": 0.01}),
}


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("rule", TWINS)
def test_without_a_regularizer_it_is_torchs_optimizer(driver, rule, maximize):
    twin_class, options = TWINS[rule]
    p0, grads = start(4)
    p, q = (torch.nn.Parameter(torch.tensor(p0)) for _ in range(2))
    ours = registry.RULES[rule].make([p], None, lr=0.1, fused=driver.fused, maximize=maximize)
    theirs = twin_class([q], lr=0.1, maximize=maximize, **options)
    for g in grads:
        p.grad, q.grad = torch.tensor(g), torch.tensor(g)
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=0, atol=STEPS * 10 * 16 * 2.3e-16)  # as above


def test_paper_momentum_keeps_the_old_step_size_in_its_buffer(driver):
    """After lr -> 0 the paper's buffer still moves the dual by beta^k of what it held; torch's stops at once."""
    moved = {}
    for style in ("paper", "torch"):
        p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = LinBreg([p], lr=1.0, momentum=0.5, momentum_style=style, fused=driver.fused)
        p.grad = torch.ones_like(p)
        optimizer.step()
        first = p.item()
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        optimizer.step()
        moved[style] = (first, p.item() - first)
    assert moved["paper"] == (-0.5, -0.25 - 0.125)  # m = (1-beta) lr g = 0.5, then beta m, beta^2 m
    assert moved["torch"] == (-1.0, 0.0)


def test_paper_momentum_is_torchs_with_scaled_lr_while_lr_is_constant(driver):
    p0, grads = start(8)
    lrs = [0.25] * STEPS
    paper, _ = walk("linbreg_paper", p0, grads, lrs, 0.3, driver.fused)
    torchs, _ = walk("linbreg_torch", p0, grads, [lr * (1 - 0.75) for lr in lrs], 0.3, driver.fused)
    torch.testing.assert_close(paper, torchs, rtol=0, atol=STEPS * 10 * 16 * 2.3e-16)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_adabreg_begins_with_a_step_of_lr_times_sign(driver, scale):
    """Bias correction makes the first direction g / (|g| + eps); the authors' old code missed a factor 10."""
    p = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    p.grad = torch.randn(50, dtype=torch.float64) * scale
    AdaBreg([p], lr=0.01, eps=1e-12, fused=driver.fused).step()
    torch.testing.assert_close(p.detach(), -0.01 * p.grad / (p.grad.abs() + 1e-12), rtol=1e-14, atol=0)


def test_delta_scales_magnitudes_and_never_the_support(driver):
    """v does not depend on delta when started at zero, and prox_{delta J}(delta v) = delta prox_J(v)."""
    _, grads = start(2)
    small, _ = walk("linbreg", np.zeros(200), grads, LRS, 0.3, driver.fused, delta=1.0)
    large, _ = walk("linbreg", np.zeros(200), grads, LRS, 0.3, driver.fused, delta=4.0)
    assert torch.equal(large, 4.0 * small)  # a power of two: exact


def test_the_threshold_of_proxsgd_is_lr_times_lam(driver):
    p = torch.nn.Parameter(torch.tensor([0.11, 0.09, -0.11, -0.09], dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    ProxSGD([p], lr=0.5, reg=L1(0.2), fused=driver.fused).step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.01, 0, -0.01, 0], dtype=torch.float64), rtol=0, atol=1e-16)


def test_bregman_weights_do_not_shrink_while_they_are_on(driver):
    """The bias that separates them from ProxSGD: zero gradients leave a Bregman weight, and shrink a proximal one."""
    for rule, stays in (("linbreg", True), ("linbreg_paper", True), ("adabreg", True), ("proxsgd", False)):
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        optimizer = registry.RULES[rule].make([p], L1(0.25), fused=driver.fused)
        for _ in range(3):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        assert same_bits(p.detach(), torch.tensor([1.0, -2.0, 0.5])) == stays
        assert stays or bool((p.abs() < torch.tensor([1.0, 2.0, 0.5])).all())


@pytest.mark.parametrize("dtype", registry.DTYPES, ids=str)
@pytest.mark.parametrize(("rule", "reg"), [pair for pair in registry.PAIRS if registry.EVERY_RULE[pair[0]].dual])
def test_prox_of_the_initial_dual_is_the_parameter(driver, rule, reg, dtype):
    """prox(v0) = p0 within the rounding of v0, and a second step without a gradient changes nothing at all."""
    case = registry.REGULARIZERS[reg]
    shape = (6, 5, 3)[: max(case.min_ndim, 1)]
    p0 = registry.values(shape, dtype, torch.Generator().manual_seed(9), 0.4)
    p0[0] = 0  # a whole group
    if reg == "nonneg_l1":
        p0 = p0.abs()
    p = torch.nn.Parameter(p0.clone())
    optimizer = registry.RULES[rule].make([p], case(), fused=driver.fused, delta=0.7)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    # v0 = p0/delta + lam * (unit or less), delta v0 and the difference back: five roundings at the size of delta v0;
    # norms are rounded twice more. 16 bits: those errors are below half an ulp of storage.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    size = float(p0.abs().max()) + 2.0
    atol = 8 * size * torch.finfo(wide).eps + (p0.abs().double() * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0)
    assert bool(((p.detach().double() - p0.double()).abs() <= atol).all())
    if dtype.itemsize == 2:
        assert torch.equal(p.detach(), p0)
    assert torch.equal(p.detach() == 0, p0 == 0)
    after = p.detach().clone()
    optimizer.step()
    assert same_bits(p.detach(), after)


@pytest.mark.parametrize("rule", [name for name, case in registry.RULES.items() if case.dual])
def test_a_dual_asks_for_a_convex_regularizer(rule):
    """When the optimizer is made, when a group joins, and when the regularizer is exchanged between steps."""
    make, p = registry.RULES[rule].make, torch.nn.Parameter(torch.ones(4, 3, 2))
    p.grad = torch.ones(4, 3, 2)
    for name in registry.PENALTIES:
        reg = registry.PENALTIES[name]()
        if registry.takes(rule, name):
            make([p], reg)
            continue
        message = rf"Breg: reg must be convex.* got {type(reg).__name__}; use ProxSGD"
        with pytest.raises(ValueError, match=message):
            make([p], reg)
        optimizer = make([p], L1(0.1))
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(4, 3, 2))], "reg": reg})
        optimizer.param_groups[0]["reg"] = reg
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    assert bool((p == 1).all())


# Adam with a prox

CONVENTIONS = {
    "consistent": oracles.proxadam_consistent,
    "proxgen": oracles.proxadam_proxgen,
    "proxssi": oracles.proxadam_proxssi,
}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("style", CONVENTIONS)
def test_proxadam_follows_each_convention(driver, style, amsgrad):
    p0, grads = start(3)
    options = {"weight_decay": 0.1, "amsgrad": amsgrad, "betas": (0.8, 0.95)}
    want = CONVENTIONS[style](p0, grads, LRS, 0.2, **options)
    p = torch.nn.Parameter(torch.tensor(p0))
    optimizer = ProxAdam([p], reg=L1(0.2), bias_correction=style, fused=driver.fused, **options)
    for g, lr in zip(grads, LRS):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.tensor(g)
        optimizer.step()
    np.testing.assert_allclose(p.detach().numpy(), want, rtol=0, atol=STEPS * 10 * 16 * 2.3e-16)
    assert 0.05 < np.mean(want == 0) < 0.95
    assert np.array_equal(p.detach().numpy() == 0, want == 0)


@pytest.mark.parametrize(
    ("style", "twin", "decay"),
    [
        *((style, torch.optim.Adam, 0.0) for style in CONVENTIONS),
        ("consistent", torch.optim.AdamW, 0.1),
        ("proxgen", torch.optim.AdamW, 0.1),
    ],
)
def test_proxadam_without_a_regularizer_is_torchs_amsgrad(driver, style, twin, decay):
    """With eps = 0 the conventions differ in the threshold alone, and "proxssi" decays after the gradient step."""
    p0, grads = start(4)
    p, q = (torch.nn.Parameter(torch.tensor(p0)) for _ in range(2))
    ours = ProxAdam([p], lr=0.1, eps=0.0, weight_decay=decay, amsgrad=True, bias_correction=style, fused=driver.fused)
    theirs = twin([q], lr=0.1, eps=0.0, weight_decay=decay, amsgrad=True)
    for k, g in enumerate(grads):
        p.grad, q.grad = torch.tensor(g) / (k + 1), torch.tensor(g) / (k + 1)  # smaller: the largest v stays
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=0, atol=STEPS * 10 * 16 * 2.3e-16)


@pytest.mark.parametrize(("style", "factor"), [("consistent", 10.0), ("proxgen", 1.0), ("proxssi", 1000**0.5)])
def test_what_turns_a_zero_weight_on_in_proxadams_first_step(driver, style, factor):
    """|g| > lam / c1, lam, lam / sqrt(c2), as the docstring says."""
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    p.grad = torch.tensor([0.999, 1.001], dtype=torch.float64) * 0.1 * factor
    ProxAdam([p], lr=0.1, reg=L1(0.1), eps=0.0, bias_correction=style, fused=driver.fused).step()
    assert (p != 0).tolist() == [False, True]


# Dual averaging


@pytest.mark.parametrize("rule", ["rmda", "ramda", "rmda_averaged", "ramda_averaged"])
def test_the_prox_point_solves_the_subproblem_that_defines_it(driver, rule):
    """0 is in V + P (q - x0) + alpha lam d|q|, P = sqrt(t) or U^(1/3) + eps; with momentum 1 the parameter is q."""
    p0, grads = start(6)
    p, optimizer = walk(rule, p0, grads, LRS, 0.3, driver.fused)
    weights = [lr * math.sqrt(t) for t, lr in enumerate(LRS, 1)]
    v, u = (sum(s * g**k for s, g in zip(weights, grads)) for k in (1, 2))
    metric = np.full_like(p0, math.sqrt(STEPS)) if rule.startswith("rmda") else np.cbrt(u) + 1e-6
    q = optimizer.prox_point(p).numpy()
    pull, limit = v + metric * (q - p0), 0.3 * sum(weights)
    residual = np.where(q == 0, np.maximum(np.abs(pull) - limit, 0), np.abs(pull + limit * np.sign(q)))
    assert residual.max() < 1e-13  # sums of seven terms below 10
    assert 0.05 < np.mean(q == 0) < 0.95
    assert optimizer.density().nonzeros == np.count_nonzero(q)
    assert float(optimizer.state[p]["alpha"]) == pytest.approx(sum(weights), rel=1e-15)
    assert np.array_equal(q, p.detach().numpy()) == (not rule.endswith("averaged"))


@pytest.mark.parametrize("rule", ["rmda_averaged", "ramda_averaged"])
def test_a_parameter_that_joins_late_has_its_own_count_and_alpha(driver, rule):
    p0, grads = start(9)
    first, late = (torch.nn.Parameter(torch.tensor(p0)) for _ in range(2))
    optimizer = registry.RULES[rule].make([first, late], L1(0.3), fused=driver.fused)
    for t, (g, lr) in enumerate(zip(grads, LRS)):
        optimizer.param_groups[0]["lr"] = lr
        first.grad = torch.tensor(g) if t < 4 else None  # then both have stepped as often, under other step sizes
        late.grad = torch.tensor(g) if t >= 3 else None
        optimizer.step()
    for p, part in ((first, slice(0, 4)), (late, slice(3, None))):
        want = FORMULAS[rule](p0, grads[part], LRS[part], 0.3, momentum=0.25)
        np.testing.assert_allclose(p.detach().numpy(), want, rtol=0, atol=1e-13)
        alpha = sum(lr * math.sqrt(t) for t, lr in enumerate(LRS[part], 1))
        assert float(optimizer.state[p]["alpha"]) == pytest.approx(alpha, rel=1e-15)
    assert first.detach().ne(late.detach()).any()


@pytest.mark.parametrize("optimizer_class", [RMDA, RAMDA])
def test_averages_become_sparse_only_when_momentum_is_one(driver, optimizer_class):
    p = torch.nn.Parameter(torch.linspace(-1, 1, 100))
    optimizer = optimizer_class([p], lr=0.5, reg=L1(0.3), momentum=0.5, fused=driver.fused, count_nonzeros=True)
    generator = torch.Generator().manual_seed(1)
    for momentum in (0.5, 0.5, 1.0):
        optimizer.param_groups[0]["momentum"] = momentum
        p.grad = torch.randn(100, generator=generator)
        optimizer.step()
        q = optimizer.prox_point(p)
        assert 0 < int((q != 0).sum()) == optimizer.density().nonzeros < 90
        assert same_bits(p.detach(), q) == (momentum == 1)
        assert bool((p == 0).any()) == (momentum == 1)


def test_the_average_of_yang_is_sparse_only_with_a_weight_of_one(driver):
    for lr, sparse in ((0.9, False), (1.0, True), (3.0, True)):  # weights above 1 are 1
        p = torch.nn.Parameter(torch.linspace(-1, 1, 100))
        p.grad = torch.linspace(1, 2, 100)
        AveragedProxSGD([p], lr=lr, reg=L1(0.5), powers=(0.0, 0.5), fused=driver.fused).step()
        assert bool((p == 0).any()) == sparse


# Cube roots


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cube_root_is_within_three_quarters_of_an_ulp(dtype):
    added, least, most = (2.0**-960, -900, 1021) if dtype == torch.float64 else (2.0**-120, -90, 125)
    values = torch.exp2(torch.arange(least, most, dtype=torch.float64))[:, None]
    values = (values * torch.linspace(1, 1.999, 1000, dtype=torch.float64)).to(dtype).flatten()
    got = _math.cube_root(values).numpy().astype(np.longdouble)
    ulp = np.spacing(got.astype(values.numpy().dtype)).astype(np.longdouble)
    x = values.numpy().astype(np.longdouble)
    error = np.abs((got**3 - x) / (3 * got**2))  # Newton's correction: the distance from the root
    assert float((error / ulp).max()) < 0.74
    special = torch.tensor([math.inf, math.nan, 8.0, 27.0], dtype=dtype)
    assert same_bits(_math.cube_root(special), torch.tensor([math.inf, math.nan, 2.0, 3.0], dtype=dtype))
    tiny = torch.tensor([0.0, torch.finfo(dtype).tiny / 4, added], dtype=dtype)
    want = (tiny.double() + added) ** (1 / 3)
    torch.testing.assert_close(_math.cube_root(tiny).double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cube_roots_of_the_largest_numbers_are_near_or_infinite(dtype):
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest / 8, largest / 2.01, largest / 1.99, largest], dtype=dtype)
    got = _math.cube_root(x)
    torch.testing.assert_close(got[:2], x[:2].double().pow(1 / 3).to(dtype), rtol=2e-3, atol=0)
    assert (got[2:] == x[2:]).all()
