"""Groups that share a budget, in kernels: GroupEnvelope's norms, shares and scale against the reference."""

from __future__ import annotations

import itertools
import math

import pytest
import registry
import torch
from harness import Problem, compare, run, true_counts
from hypothesis import given, settings
from hypothesis import strategies as st
from small import assert_unchanged, model, set_grads, snapshot, train

from bregman_cuda import HSPG, RMDA, AdaBreg, GroupEnvelope, LinBreg, ProxSGD, SplitLBI, _backend
from bregman_cuda.optim._plan import FusedBucket, ReferenceBucket

RULES = [name for name, case in registry.RULES.items() if not case.metric]
SHAPES = [(7, 3), (0, 2), (5, 4, 3, 3), (65, 130), (4, 1), (2, 513)]
GROUPS = {"out": 2, "in": 2, "kernel": 2, (-1,): 1, (): 0}  # and how many dims they ask for


def check(problem: Problem) -> None:
    """The same parameters, states and counts, up to the rounding of the shares: their sums run in another order.

    A share u = eta n sqrt(c) - c is off by (u + c) times the relative error of eta, and so is a factor u / (u + c); eta
    comes from sums over all groups in fp64. The parameter has one rounding of its own dtype, and that of the decay,
    which kernels compute in fp32.
    """
    got, want = run(problem, fused=True), run(problem, fused=False)
    assert all(type(b) is FusedBucket for _, b in got.optimizer._buckets())
    assert all(type(b) is ReferenceBucket for _, b in want.optimizer._buckets())
    reach = 1.0
    tensors = [t for state in want.states for name, t in state.items() if name != "mask"]
    for tensor in (*want.params, *tensors):
        reach = max(reach, float(tensor.abs().nan_to_num(0, 0, 0).max()) if tensor.numel() else 0)
    groups = sum(p.numel() for p in want.params)  # or fewer
    roundings = 64 * torch.finfo(torch.float64 if problem.dtype == torch.float64 else torch.float32).eps
    tolerance = problem.steps * (roundings + groups * torch.finfo(torch.float64).eps) * reach
    for i, (a, b) in enumerate(zip(got.params, want.params, strict=True)):
        own = 2 * torch.finfo(b.dtype).eps if b.element_size() == 2 else 0.0
        compare(a, b, tolerance, f"parameter {i}", relative=own)
        for name, tensor in want.states[i].items():
            if name != "mask":
                compare(got.states[i][name], tensor, tolerance, f"{name} of {i}")
    reg = problem.reg()
    sparse = [got.optimizer.prox_point(p) for p in got.optimizer.param_groups[0]["params"]]
    assert got.counts == [true_counts(p, reg) for p in sparse]


@pytest.mark.parametrize("dtype", registry.DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule(kernel_driver, rule, dtype):
    for groups, weight in (("out", "none"), ("in", "sqrt_size"), ("kernel", "none")):
        reg = lambda groups=groups, weight=weight: GroupEnvelope(0.4, 1, groups, weight)  # noqa: E731
        shapes = SHAPES if kernel_driver.name == "cpu" else SHAPES[:3] + SHAPES[4:]
        check(Problem(rule, reg, dtype, shapes, steps=3, masked=groups != "out"))


@st.composite
def problems(draw, driver: str) -> Problem:
    groups = draw(st.sampled_from(list(GROUPS)))
    side = st.sampled_from([0, 1, 2, 3, 5, 8, 9, 17, 33])
    shape = st.lists(side, min_size=GROUPS[groups], max_size=4).map(tuple).filter(lambda s: math.prod(s) <= 3000)
    shapes = draw(st.lists(shape, min_size=1, max_size=5))
    scope = draw(st.sampled_from(["tensor", "all"]))
    counts = [math.prod(s[d] for d in GroupEnvelope(1.0, 1, groups).groups_of(s)) for s in shapes if math.prod(s)]
    most = (sum(counts) if scope == "all" else min(counts, default=1)) or 1
    k, lam = draw(st.integers(1, most)), draw(st.sampled_from([0.0, 1e-3, 0.3, 30.0]))
    weight = draw(st.sampled_from(["none", "sqrt_size"]))
    return Problem(
        rule=draw(st.sampled_from(RULES if scope == "tensor" else ["proxsgd", "proxsgd_momentum"])),
        reg=lambda: GroupEnvelope(lam, k, groups, weight, scope),
        dtype=draw(st.sampled_from(registry.DTYPES)),
        shapes=shapes,
        layouts=draw(st.lists(st.sampled_from(registry.LAYOUTS), min_size=1, max_size=3)),
        masked=draw(st.booleans()),
        options={"maximize": draw(st.booleans())},
        steps=draw(st.integers(1, 2)),
        seed=draw(st.integers(0, 2**20)),
        zeros=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )


def test_shapes_layouts_and_scopes(kernel_driver):
    @settings(max_examples={"cpu": 150, "emulated": 60}[kernel_driver.name])
    @given(problems(kernel_driver.name))
    def any_problem(problem: Problem) -> None:
        check(problem)

    any_problem()


def named(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


NAMED = {
    "ties": named([[1.0, 2.0]] * 6),
    "few": named([[0.0, 0.0], [3.0, 4.0], [0.0, -0.0], [0.1, 0.2], [0.0, 0.0], [0.0, 0.0]]),
    "magnitudes": named([[10.0**e, 0.0] for e in (-40, -20, -3, 0, 5, 12)]),
    "tiny": named([[1e-160, 0.0], [3e-160, 1e-160], [1e-150, 0.0], [1.0, 1.0], [2.0, 0.0], [1e-170, 0.0]]),
    "nan": named([[math.nan, 1.0], [3.0, 4.0], [1.0, 1.0], [0.3, 0.1], [0.2, 0.2], [0.1, 0.0]]),
    "infinite": named([[math.inf, 1.0], [3.0, 4.0], [1.0, 1.0], [0.3, 0.1], [0.2, 0.2], [0.1, 0.0]]),
    "zero": torch.zeros(6, 2, dtype=torch.float64),
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("scope", ["tensor", "all"])
def test_named_cases(kernel_driver, name, scope):
    """One step with a zero gradient is the prox, which sorts breakpoints where kernels search for the root."""
    for k, lam in itertools.product((1, 2, 5, 6), (0.0, 1e-6, 0.5, 40.0)):
        reg = GroupEnvelope(lam, k, scope=scope)
        p = torch.nn.Parameter(NAMED[name].clone())
        p.grad = torch.zeros_like(p)
        ProxSGD([p], lr=0.5, reg=reg, fused=True).step()
        torch.testing.assert_close(p.detach(), reg.prox(NAMED[name], 0.5), rtol=1e-12, atol=1e-12, equal_nan=True)


def test_one_k_for_all_tensors_is_the_prox_of_their_rows(kernel_driver):
    """Kernels and reference; against the prox of one tensor that holds all rows."""
    shapes = [(6, 5), (9, 5), (0, 5), (30, 5)]
    expected = GroupEnvelope(0.8, 11).prox(torch.cat([p.detach() for p in model(shapes, torch.float64)]), 0.5)
    reg = GroupEnvelope(0.8, 11, scope="all")
    for fused in (True, False):
        params = model(shapes, torch.float64)
        for p in params:
            p.grad = torch.zeros_like(p)
        ProxSGD(params, lr=0.5, reg=reg, fused=fused).step()
        torch.testing.assert_close(torch.cat([p.detach() for p in params]), expected, rtol=1e-13, atol=1e-14)
    split = torch.cat([GroupEnvelope(0.8, 2).prox(p.detach(), 0.5) for p in model(shapes, torch.float64) if len(p)])
    assert not torch.allclose(split, expected)


def test_tensors_without_a_gradient_take_no_share(kernel_driver):
    params = model([(6, 5), (9, 5)], torch.float64)
    start = [p.detach().clone() for p in params]
    optimizer = ProxSGD(params, lr=0.5, reg=GroupEnvelope(0.8, 4, scope="all"), fused=True)
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    assert torch.equal(params[1], start[1])
    expected = GroupEnvelope(0.8, 4).prox(start[0], 0.5)
    torch.testing.assert_close(params[0].detach(), expected, rtol=1e-13, atol=1e-14)


def test_more_tensors_than_a_launch_takes(kernel_driver):
    shapes = [(n % 4, 3) for n in range(1005)]
    check(Problem("proxsgd", lambda: GroupEnvelope(0.5, 60, scope="all"), torch.float32, shapes, steps=1))


def test_threads_do_not_change_a_bit(kernel_driver):
    problem = Problem("linbreg", lambda: GroupEnvelope(0.5, 9), torch.float32, [(64, 300), (400, 70), (9, 9)], steps=3)
    one, two = run(problem, fused=True), run(problem, fused=True, threads=2)
    assert all(map(torch.equal, one.params, two.params))


def test_scalars_on_the_device_and_a_skipped_step(kernel_driver):
    params, twins = model(dtype=torch.float64), model(dtype=torch.float64)
    reg = GroupEnvelope(0.3, 2)
    optimizer = LinBreg(params, lr=torch.tensor(0.1), reg=reg, capturable=True, fused=True)
    train(optimizer, params, 3)
    train(LinBreg(twins, lr=0.1, reg=reg, fused=True), twins, 3)
    for p, twin in zip(params, twins):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)  # lr is an fp32 tensor
    before = snapshot(optimizer)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), None
    train(optimizer, params, 1)
    assert_unchanged(optimizer, before)
    del optimizer.found_inf
    train(optimizer, params, 1)
    assert not torch.equal(params[0].detach(), before[0][0])


@pytest.mark.parametrize("scope", ["tensor", "all"])
def test_a_compiled_step_is_the_same_step(scope):
    if _backend._load("cpu")[0] is None:
        pytest.skip("no compiled CPU kernels")
    torch._dynamo.reset()
    params, twins = model(), model()
    reg = GroupEnvelope(0.3, 2, scope=scope)
    optimizer, eager = (ProxSGD(side, lr=0.1, momentum=0.5, reg=reg) for side in (params, twins))
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    for i in range(3):
        set_grads(params, i)
        set_grads(twins, i)
        step()
        eager.step()
    for p, twin in zip(params, twins):
        assert torch.equal(p, twin)
    assert not torch.equal(params[0], model()[0])


def test_k_and_scope_may_change_between_steps(kernel_driver):
    sides = []
    for fused in (True, False):
        params, reg = model(dtype=torch.float64), GroupEnvelope(0.3, 2)
        optimizer = ProxSGD(params, lr=0.1, reg=reg, fused=fused)
        train(optimizer, params, 1)
        reg.k = 4
        train(optimizer, params, 1, begin=1)
        reg.scope = "all"
        train(optimizer, params, 1, begin=2)
        sides.append(params)
    for a, b in zip(*sides):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


# Bad input


@pytest.mark.parametrize("kind", [LinBreg, AdaBreg, RMDA, SplitLBI, HSPG])
def test_only_proxsgd_shares_k_over_tensors(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: reg must have one k per tensor .*scope='all'"):
        kind(model(), reg=GroupEnvelope(0.1, 2, scope="all"))


def test_a_k_for_all_tensors_is_compared_with_all_groups():
    params = model([(3, 2), (4, 2)])
    with pytest.raises(ValueError, match=r"ProxSGD: GroupEnvelope: k=8 is more than the 7 groups .* of all tensors"):
        ProxSGD(params, reg=GroupEnvelope(0.1, 8, scope="all"))
    ProxSGD(params, reg=GroupEnvelope(0.1, 7, scope="all"))
    with pytest.raises(ValueError, match=r"scope must be 'tensor' or 'all', got 'model'"):
        GroupEnvelope(0.1, 2, scope="model")


def test_tensors_that_cannot_step_together_are_refused():
    params = [*model([(3, 2)]), *model([(4, 2)], torch.float64)]
    optimizer = ProxSGD(params, lr=0.1, reg=GroupEnvelope(0.1, 3, scope="all"))
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"GroupEnvelope shares its k over tensors that cannot step together"):
        train(optimizer, params, 1)
    assert_unchanged(optimizer, before)
