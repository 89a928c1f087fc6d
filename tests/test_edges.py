"""Values by name (zero, -0, NaN, infinities, denormals, thresholds met exactly), conversions, and determinism."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import registry
import torch
from harness import Problem, compare, run, same_bits

import bregman_cuda
from bregman_cuda import L1, GroupLasso, LinBreg, NonnegL1, ProxSGD, SparseGroupLasso

TINY = {d: torch.finfo(d).smallest_normal for d in registry.DTYPES}


def step(rule: str, reg, p0: torch.Tensor, grad: torch.Tensor, fused, steps: int = 1, **options):
    p = torch.nn.Parameter(p0.clone())
    optimizer = registry.EVERY_RULE[rule].make([p], reg, fused=fused, **options)
    for _ in range(steps):
        p.grad = grad.clone()
        optimizer.step()
    return p.detach(), optimizer.state[p]


@pytest.mark.parametrize(("rule", "reg"), registry.CROSSED)
def test_a_nan_gradient_makes_the_weight_nan_and_never_zero(driver, rule, reg):
    for dtype in registry.DTYPES:
        grad = torch.zeros(3, 4, 5, dtype=dtype)
        grad[0, 1, 2] = torch.nan
        for p0 in (torch.zeros(3, 4, 5, dtype=dtype), torch.full((3, 4, 5), 0.5, dtype=dtype)):
            p, _ = step(rule, registry.REGULARIZERS[reg](), p0, grad, driver.fused)
            assert bool(p[0, 1, 2].isnan()), dtype
            if registry.REGULARIZERS[reg]() is None or registry.REGULARIZERS[reg]().radial is None:
                assert int(p.isnan().sum()) == 1, "a NaN stays where it is"


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("rule", registry.RULES)
def test_an_infinite_gradient_behaves_as_in_torch(driver, rule, sign):
    """SGD goes to the opposite infinity, Adam divides infinity by infinity; a threshold changes neither."""
    grad = torch.tensor([sign * math.inf, 0.0])
    for reg in (None, L1(0.1)):
        p, _ = step(rule, reg, torch.tensor([1.0, 1.0]), grad, driver.fused)
        twin = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        twin.grad = grad.clone()
        (torch.optim.Adam if rule == "adabreg" or registry.EVERY_RULE[rule].metric else torch.optim.SGD)(
            [twin], lr=0.1
        ).step()
        assert same_bits(p[:1], twin.detach()[:1])
        assert math.isfinite(float(p[1]))


def specials(dtype: torch.dtype) -> torch.Tensor:
    big, tiny = torch.finfo(dtype).max, TINY[dtype]
    base = [0.0, 1.0, 0.3, big, big / 2, tiny, tiny / 2, tiny * torch.finfo(dtype).eps, math.inf, math.nan]
    return torch.tensor([s * v for v in base for s in (1, -1)], dtype=dtype)


@pytest.mark.parametrize("dtype", registry.DTYPES, ids=str)
@pytest.mark.parametrize(("rule", "reg"), registry.CROSSED)
def test_special_values_meet_every_other_on_both_sides(kernel_driver, rule, reg, dtype):
    """Parameter x gradient over all pairs of special values; NaN and Inf have their own groups, so no sum matters."""
    emulated = kernel_driver.name == "emulated"  # slow: the other dtypes meet one penalty of each kind
    if emulated and dtype != torch.float32 and reg not in ("none", "l1", "sparse_group_out"):
        return
    values = specials(dtype)
    p0, grad = (t.reshape(-1, 1, 1).clone() for t in torch.meshgrid(values, values, indexing="ij"))
    case = registry.REGULARIZERS[reg]
    within = registry.apart(registry.EVERY_RULE[rule].make([torch.nn.Parameter(p0)], case()))
    if reg in ("group_in", "group_last", "sparse_group_in", "group_l_half", "group_mcp"):
        p0, grad = p0.reshape(1, -1), grad.reshape(1, -1)
    if reg == "group_last" and dtype.itemsize == 2:
        p0, grad = p0.t().contiguous().t(), grad.t().contiguous().t()
    pairs = [(p0, grad)]
    if reg == "group_all":  # one element each
        pairs = [(p0[i], grad[i]) for i in range(0, len(p0), 67 if emulated else 7)]
    for p_i, g_i in pairs:
        sides = [step(rule, case(), p_i, g_i, fused, steps=2) for fused in (True, False)]
        # fp64: torch's square root is off by an ulp, on values of the size of lr; in a metric, on any values
        rooted = dtype == torch.float64 and rule in registry.ROOTED
        tolerance, relative = (1e-13, 1e-14 * registry.EVERY_RULE[rule].metric) if rooted else (0.0, 0.0)
        size = 1.0
        if within and dtype != torch.float64:  # norms are searched to an accuracy that the points have: p and lr * grad
            size = 1 + sum(t.double().abs().nan_to_num(0, 0, 0) for t in (p_i, g_i))
            tolerance, relative = within, torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
        (got, got_state), (want, want_state) = sides
        compare(got / size, want / size, tolerance, "parameter", relative)
        for name in got_state:
            compare(got_state[name], want_state[name], tolerance, name, relative)


@pytest.mark.parametrize("rule", registry.RULES)
def test_negative_zero_is_a_zero(driver, rule):
    p, _ = step(rule, L1(0.1), torch.tensor([-0.0, 0.0]), torch.tensor([-0.0, 0.0]), driver.fused)
    assert p.tolist() == [0.0, 0.0]
    p = torch.nn.Parameter(torch.tensor([-0.0, 1.0]))
    p.grad = torch.tensor([0.0, 1.0])  # an adaptive metric turns off what has no gradient
    optimizer = registry.EVERY_RULE[rule].make([p], L1(0.1), fused=driver.fused, count_nonzeros=True)
    optimizer.step()
    assert optimizer.density().nonzeros == 1


@pytest.mark.parametrize("dtype", registry.DTYPES, ids=str)
def test_denormals_are_not_flushed(driver, dtype):
    tiny = torch.full((5,), TINY[dtype] / 2, dtype=dtype)
    p, _ = step("proxsgd", None, tiny, torch.zeros(5, dtype=dtype), driver.fused)
    assert torch.equal(p, tiny)
    assert bool((p != 0).all())
    p, _ = step("linbreg", L1(0.0), torch.zeros(5, dtype=dtype), tiny, driver.fused, lr=1.0)
    assert torch.equal(p, -tiny)


@pytest.mark.parametrize("dtype", registry.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rule", "reg"), [p for p in registry.PAIRS if p[0] in ("linbreg", "proxsgd") and p[1] in registry.KINKED]
)
def test_from_lam_max_on_zero_stays_zero(driver, rule, reg, dtype):
    """The threshold lr * lam_max meets the largest entry or norm exactly, and may be off by its own rounding."""
    grad = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(11)).to(dtype)
    case = registry.PENALTIES[reg]
    zero = torch.zeros_like(grad)
    limit = case(1.0).lam_max(grad.double())
    slack = 16 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for factor, stays in ((1 + slack, True), (3.0, True), (0.9, False)):
        p, _ = step(rule, case(limit * factor), zero, grad, driver.fused, lr=1.0)
        assert bool((p == 0).all()) == stays, factor
    if case(1.0).radial is None:  # without a norm nothing is rounded: exactly lam_max is enough
        p, _ = step(rule, case(limit), zero, grad, driver.fused, lr=1.0)
        assert bool((p == 0).all())


@pytest.mark.parametrize("rule", [name for name, case in registry.RULES.items() if not case.twin])
def test_lam_zero_is_no_regularizer(driver, rule):
    """Every penalty with lam = 0 steps as None does, zero groups included."""
    p0 = registry.values((4, 3, 5), torch.float32, torch.Generator().manual_seed(1), 0.3)
    p0[1] = 0
    p0[:, 2] = 0
    grad = torch.randn(4, 3, 5)
    grad[1] = 0
    want, _ = step(rule, None, p0, grad, driver.fused, steps=3)
    for name, case in registry.PENALTIES.items():
        reg = case(0.0)
        if isinstance(reg, NonnegL1) or name in registry.ADDED or not registry.takes(rule, name):
            continue  # a constraint, or a part without lam, acts by itself
        if hasattr(reg, "l2"):
            reg.l2 = 0.0
        got, _ = step(rule, reg, p0, grad, driver.fused, steps=3)
        assert torch.equal(got, want), name


@pytest.mark.parametrize("rule", registry.RULES)
def test_zero_groups_stay_zero_without_nan(driver, rule):
    for name, case in registry.REGULARIZERS.items():
        for lam in (0.0, 0.4) if registry.takes(rule, name) else ():
            p0 = torch.randn(4, 3, 5)
            p0[1] = 0
            p0[:, 2] = 0
            grad = torch.randn(4, 3, 5)
            grad[1] = 0
            grad[:, 2] = 0
            p, _ = step(rule, case(lam), p0, grad, driver.fused, steps=2)
            assert bool(torch.isfinite(p).all()), name
            assert bool((p[1] == 0).all()), name
            assert bool((p[:, 2] == 0).all()), name


@pytest.mark.parametrize("rule", registry.RULES)
def test_a_group_whose_squares_underflow_is_a_zero_group(driver, rule):
    """The norm of fp64 values near 1e-200 is computed as 0: below any threshold, and kept only by lam = 0."""
    p0 = torch.full((2, 3), 1e-200, dtype=torch.float64)
    for lam, kept in ((0.5, False), (0.0, True)):
        for reg in (GroupLasso(lam, "out"), GroupLasso(lam, "in"), SparseGroupLasso(lam, 0.0, "out")):
            if rule.startswith("proxsgd"):
                p, _ = step(rule, reg, p0, torch.zeros_like(p0), driver.fused)
            else:  # started at zero, so that the dual is what the gradient left: -lr * g or so
                p, _ = step("linbreg", reg, torch.zeros_like(p0), p0, driver.fused)
            assert bool((p != 0).all() if kept else (p == 0).all()), reg


@pytest.mark.parametrize(("rule", "reg"), [p for p in registry.CROSSED if p[1] in registry.GROUP])
def test_masked_entries_do_not_count_in_the_norm_of_their_group(driver, rule, reg):
    """A huge or NaN gradient behind the mask leaves the rest of its group as a zero gradient does."""
    results = []
    for hidden in (0.0, 1e6, math.nan):
        generator = torch.Generator().manual_seed(5)
        p = torch.nn.Parameter(registry.values((4, 3, 5), torch.float32, generator, 0.2))
        mask = torch.rand(p.shape, generator=generator) < 0.6
        grad = torch.randn(p.shape, generator=generator)
        optimizer = registry.EVERY_RULE[rule].make([p], registry.REGULARIZERS[reg](), fused=driver.fused)
        optimizer.set_mask(p, mask)
        p.grad = torch.where(mask, grad, hidden)
        optimizer.step()
        results.append(p.detach())
    assert all(same_bits(result, results[0]) for result in results)


def test_nonneg_projects_negative_weights_at_the_first_step(driver):
    for rule, case in registry.RULES.items():
        if case.dense:
            continue
        p, _ = step(rule, NonnegL1(0.1), torch.tensor([-1.0, 1.0, 0.0]), torch.tensor([0.0, -1.0, 0.0]), driver.fused)
        assert float(p[0]) == 0
        assert float(p[1]) > 0
        assert float(p[2]) == 0


# 16-bit storage: every value there is


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_widens_exactly(driver, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    grad = bits.view(dtype)
    p = torch.nn.Parameter(torch.zeros_like(grad))
    p.grad = grad.clone()
    optimizer = LinBreg([p], lr=1.0, fused=driver.fused)
    optimizer.step()
    assert same_bits(optimizer.state[p]["dual"] + 0.0, 0.0 - grad.float())
    assert same_bits(p.detach() + 0.0, (0.0 - grad.float()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrowing_rounds_to_nearest_even(driver, dtype):
    """Around every storable value: itself, the midpoint to the next, and its two neighbours in fp32."""
    every = 61 if driver.name == "emulated" else 1
    grid = torch.arange(-(2**15), 2**15, dtype=torch.int32)[::every].to(torch.int16).view(dtype).float()
    middle = (grid[1:].double() + grid[:-1].double()).div(2).float()
    wide = torch.cat(
        [grid, middle, middle.nextafter(torch.tensor(math.inf)), middle.nextafter(torch.tensor(-math.inf))]
    )
    wide = torch.cat([wide, torch.tensor([65519.9, 65520.0, 65536.0, 1e38, 3.4e38, 1e-45, -1e-45, 2.9e-8, 3.1e-8])])
    p = torch.nn.Parameter(torch.zeros(wide.shape, dtype=dtype))
    optimizer = ProxSGD([p], lr=1.0, fused=driver.fused)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[p]["master"].copy_(wide)
    optimizer.step()
    assert same_bits(p.detach(), wide.to(dtype))


# Determinism


def digest(threads: int) -> str:
    """The bits of parameters, states and counts of a workload that every thread takes part in."""
    total = hashlib.sha256()
    shapes = [(200, 211), (5, 4099), (65, 3, 3, 3), (40001, 1), (5, 0), (611, 307)]
    for rule, reg, dtype in (  # few: threads that wait for each other are slow on a busy machine
        ("adabreg", "l1", torch.float32),
        ("adabreg", "group_out", torch.float64),
        ("linbreg", "group_in", torch.float32),
        ("linbreg_paper", "sparse_group_out", torch.bfloat16),
        ("proxsgd_momentum", "group_in", torch.float64),
        ("proxsgd", "none", torch.float16),
    ):
        outcome = run(Problem(rule, registry.REGULARIZERS[reg], dtype, shapes, masked=True), True, threads=threads)
        for param, state in zip(outcome.params, outcome.states):
            for tensor in (param, *(state[name] for name in sorted(state))):
                total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        total.update(repr(outcome.counts).encode())
    return total.hexdigest()


SCRIPT = """
import json, sys
sys.path[:0] = {paths}
import torch, bregman_cuda, test_edges
torch.set_num_threads(1)
print(json.dumps([bregman_cuda.build_info()["cpu_isa"], test_edges.digest(2)]))
"""


def digest_of_a_process(isa: str) -> list[str]:
    """Which instruction set ran, and its digest."""
    paths = [str(Path(__file__).parent), str(Path(bregman_cuda.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(paths=paths)],
        env={**os.environ, "BREGMAN_CUDA_ISA": isa}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kernel_driver", ["cpu"], indirect=True)
def test_same_bits_for_every_thread_count_and_run(kernel_driver):
    found = [digest(threads) for threads in (1, 2, 4, 2)]
    assert len(set(found)) == 1, found


@pytest.mark.parametrize("kernel_driver", ["cpu"], indirect=True)
def test_same_bits_for_every_instruction_set(kernel_driver):
    """An instruction set that the processor lacks falls back to the next lower one, which is then compared twice."""
    results = {isa: digest_of_a_process(isa) for isa in ("base", "avx2", "avx512")}
    assert results["base"][0] == "base"
    assert results["avx2"][0] in ("avx2", "base")
    assert len({bits for _, bits in results.values()}) == 1, results


@pytest.mark.parametrize("kernel_driver", ["emulated"], indirect=True)
def test_emulated_kernels_repeat_their_bits(kernel_driver):
    """Real threads in another order every time: no result may depend on it."""
    problem = Problem(
        "adabreg", registry.REGULARIZERS["sparse_group_in"], torch.float32, [(70, 9), (3, 300)], masked=True
    )
    first = run(problem, True)
    for _ in range(3):
        again = run(problem, True)
        assert all(same_bits(a, b) for a, b in zip(first.params, again.params))
        assert first.counts == again.counts
