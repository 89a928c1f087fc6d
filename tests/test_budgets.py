"""Groups that share a budget, in kernels: GroupEnvelope's norms, shares and scale against the reference."""

from __future__ import annotations

import itertools
import math

import pytest
import registry
import torch
from conftest import missing
from harness import Problem, compare, run, true_counts
from hypothesis import given, settings
from hypothesis import strategies as st
from small import assert_unchanged, model, set_grads, snapshot, train

from bregman_cuda import HSPG, RMDA, AdaBreg, GroupEnvelope, LinBreg, ProxSGD, SplitLBI, _backend
from bregman_cuda.optim._plan import FusedBucket, ReferenceBucket

RULES = [name for name, case in registry.EVERY_RULE.items() if not case.metric]
TOGETHER = ["proxsgd", "proxsgd_momentum", "hspg"]  # those that serve one k for all tensors
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
    kinds = [("out", "none"), ("in", "sqrt_size"), ("kernel", "none")]
    if kernel_driver.name == "emulated":  # slow: one for each dtype
        kinds = [kinds[registry.DTYPES.index(dtype) % 3]]
    for groups, weight in kinds:
        reg = lambda groups=groups, weight=weight: GroupEnvelope(0.4, 1, groups, weight)  # noqa: E731
        shapes = SHAPES if kernel_driver.name == "cpu" else SHAPES[:3] + SHAPES[4:]
        check(Problem(rule, reg, dtype, shapes, steps=3, masked=groups != "out"))


@pytest.mark.parametrize("kernel_driver", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rule", "scope"),
    [(rule, "tensor") for rule in ("linbreg", "proxsgd_momentum", "hspg")] + [(rule, "all") for rule in TOGETHER],
)
def test_strips(kernel_driver, rule, scope, dtype):
    """Groups that run through all rows of a large tensor: strips of rows leave the sums of their columns."""
    shapes = [(611, 307), (9, 5), (130, 40, 6, 6), (2050, 96), (200, 5, 160)]
    layouts = ["contiguous", "contiguous", "channels_last"]
    reg = lambda: GroupEnvelope(0.3, 4 if scope == "tensor" else 40, "in", scope=scope)  # noqa: E731
    for masked in (False, True):
        problem = Problem(rule, reg, dtype, shapes, layouts, steps=2, masked=masked)
        check(problem)
    ((_, bucket),) = run(problem, fused=True).optimizer._buckets()
    assert int(bucket.plan.view(torch.int64)[5]) >= 2 * 3, "no strips"  # PlanHeader::strips; three tensors or more


@pytest.mark.parametrize("kernel_driver", ["cpu"], indirect=True)
def test_groups_in_strips_whose_squares_underflow_are_counted(kernel_driver):
    p = torch.nn.Parameter(torch.zeros(5000, 40, dtype=torch.float64))
    p.data[:, 3], p.data[:, 5], p.grad = 1e-170, 1.0, torch.zeros_like(p)
    optimizer = LinBreg([p], lr=0.1, reg=GroupEnvelope(0.0, 2, "in"), fused=True, count_nonzeros=True)
    optimizer.step()
    [row] = optimizer.density().rows
    assert (row.nonzeros, row.nonzero_groups) == (10000, 2)


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
        rule=draw(st.sampled_from(RULES if scope == "tensor" else TOGETHER)),
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


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("scope", ["tensor", "all"])
def test_named_cases_of_half_space_steps(kernel_driver, name, scope):
    """Kernels against the reference, which sorts norms; some groups leave their half-space."""
    grad = 0.3 * NAMED[name].nan_to_num(0, 0, 0)
    grad[::2] *= 6
    for k, lam in itertools.product((1, 2, 5, 6), (0.0, 1e-6, 0.5, 40.0)):
        sides = []
        for fused in (True, False):
            p = torch.nn.Parameter(NAMED[name].clone())
            p.grad = grad
            HSPG([p], 0.5, GroupEnvelope(lam, k, scope=scope), epsilon=0.25, start=0, fused=fused).step()
            sides.append(p.detach())
        torch.testing.assert_close(*sides, rtol=1e-12, atol=1e-12, equal_nan=True)


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


def step_some(optimizer, params, active, seed: int) -> None:
    """A step in which only the `active` have a gradient."""
    set_grads(params, seed)
    for i, p in enumerate(params):
        p.grad = p.grad if i in active else None
    optimizer.step()
    assert len(list(optimizer._buckets())) == 1


def step_counts(optimizer, params) -> list[float]:
    return [float(optimizer.state[p]["step"]) for p in params]


@pytest.mark.parametrize("capturable", [False, True])
def test_tensors_of_several_step_counts_step_together(kernel_driver, capturable):
    """One comes later, one sits out; on two sides, kernels and reference."""
    sides = []
    for fused in (True, False):
        params, reg = model(dtype=torch.float64), GroupEnvelope(0.3, 4, scope="all")
        optimizer = ProxSGD(params, lr=0.1, momentum=0.5, reg=reg, fused=fused, capturable=capturable)
        for i, active in enumerate([(0, 1), (1,), (1, 2), (0, 1, 2), (0, 1, 2)]):
            step_some(optimizer, params, active, seed=i)
        assert step_counts(optimizer, params) == [3, 5, 3]
        assert [b.live for _, b in optimizer._buckets()] == [capturable]
        sides.append([t for p in params for t in (p.detach(), optimizer.state[p]["momentum_buffer"])])
    for a, b in zip(*sides):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("fused", [True, False])
def test_the_prox_of_tensors_of_several_step_counts_is_one(kernel_driver, fused):
    params, reg = model(dtype=torch.float64), GroupEnvelope(0.8, 4, scope="all")
    optimizer = ProxSGD(params, lr=0.5, reg=reg, fused=fused)
    step_some(optimizer, params, (0, 2), seed=0)
    set_grads(params, 1)
    points = [p.detach() - 0.5 * p.grad for p in params]
    step_some(optimizer, params, (0, 1, 2), seed=1)
    for p, expected in zip(params, reg.prox_together(points, 0.5)):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("capturable", [False, True])
def test_several_step_counts_survive_a_skipped_step_and_a_checkpoint(kernel_driver, capturable):
    def make(params):
        reg = GroupEnvelope(0.3, 4, scope="all")
        return ProxSGD(params, lr=0.1, momentum=0.5, reg=reg, fused=True, capturable=capturable)

    params = model()
    optimizer = make(params)
    for i, active in enumerate([(1,), (0, 1), (0, 1, 2)]):
        step_some(optimizer, params, active, seed=i)
    before = snapshot(optimizer)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), None
    train(optimizer, params, 1)
    assert_unchanged(optimizer, before)
    assert step_counts(optimizer, params) == [2, 3, 1]
    del optimizer.found_inf
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = make(twins)
    twin.load_state_dict(optimizer.state_dict())
    for o, ps in ((optimizer, params), (twin, twins)):
        train(o, ps, 2, begin=3)
        assert step_counts(o, ps) == [4, 5, 3]
    assert all(map(torch.equal, params, twins))


def test_one_tensor_without_kernels_takes_the_others_along():
    params = [*model([(6, 5)]), torch.nn.Parameter(torch.randn(4, 6)[:, ::2])]  # its memory has gaps
    optimizer = ProxSGD(params, lr=0.1, reg=GroupEnvelope(0.3, 2, scope="all"))
    step_some(optimizer, params, (0,), seed=0)
    assert [type(b) for _, b in optimizer._buckets()] == [FusedBucket]
    step_some(optimizer, params, (0, 1), seed=1)
    assert [type(b) for _, b in optimizer._buckets()] == [ReferenceBucket]


@pytest.mark.parametrize("lam", [1e39, 1e200, 1e308])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_lam_beyond_fp32_is_large_and_not_infinite(kernel_driver, dtype, lam):
    """At lr = 20 the product is beyond fp64, too; what is left of a group is finite or, in fp64, an infinity."""
    for name in ("ties", "few", "magnitudes", "nan", "zero", *(["infinite"] if dtype == torch.float64 else [])):
        start, reg = NAMED[name].to(dtype), GroupEnvelope(lam, 2, scope="all")
        for fused in (True, False):
            p = torch.nn.Parameter(start.clone())
            p.grad = torch.zeros_like(p)
            ProxSGD([p], lr=20.0, reg=reg, fused=fused).step()
            expected = torch.where(start.isnan().any(1, keepdim=True), torch.nan, start.new_zeros(start.shape))
            expected = torch.where(start.isinf(), start, expected)
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-20, equal_nan=True)


def test_more_tensors_than_a_launch_takes(kernel_driver):
    shapes = [(n % 4, 3) for n in range(1005)]
    check(Problem("proxsgd", lambda: GroupEnvelope(0.5, 60, scope="all"), torch.float32, shapes, steps=1))


@pytest.mark.parametrize("rule", ["linbreg", "hspg"])
def test_threads_do_not_change_a_bit(kernel_driver, rule):
    problem = Problem(rule, lambda: GroupEnvelope(0.5, 9), torch.float32, [(64, 300), (400, 70), (9, 9)], steps=3)
    one, two = run(problem, fused=True), run(problem, fused=True, threads=2)
    assert all(map(torch.equal, one.params, two.params))


@pytest.mark.parametrize("kernel_driver", ["cpu"], indirect=True)
@pytest.mark.parametrize("rule", ["proxsgd", "hspg"])
def test_more_groups_than_one_thread_adds_up(kernel_driver, rule):
    """Sums of pieces, 16384 groups each, of two tensors."""
    reg = lambda: GroupEnvelope(0.5, 30000, "kernel", scope="all")  # noqa: E731
    problem = Problem(rule, reg, torch.float32, [(150, 230, 2), (9, 9, 3)], steps=2)
    check(problem)
    found = [run(problem, fused=True, threads=threads).params for threads in (1, 2, 3)]
    assert all(map(torch.equal, found[0] * 2, found[1] + found[2]))


@pytest.mark.parametrize("rule", ["linbreg", "hspg"])
def test_scalars_on_the_device_and_a_skipped_step(kernel_driver, rule):
    params, twins = model(dtype=torch.float64), model(dtype=torch.float64)
    reg, make = GroupEnvelope(0.3, 2), registry.EVERY_RULE[rule].make
    optimizer = make(params, reg, lr=torch.tensor(0.1), capturable=True, fused=True)
    train(optimizer, params, 3)
    train(make(twins, reg, lr=0.1, fused=True), twins, 3)
    for p, twin in zip(params, twins):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)  # lr is an fp32 tensor
    before = snapshot(optimizer)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(()), None
    train(optimizer, params, 1)
    for group, options in zip(optimizer.param_groups, before[2]):  # HSPG counts tries
        options.update((name, group[name]) for name in ("steps", "skipped") if name in group)
    assert_unchanged(optimizer, before)
    del optimizer.found_inf
    train(optimizer, params, 1)
    assert not torch.equal(params[0].detach(), before[0][0])


@pytest.mark.parametrize("scope", ["tensor", "all"])
def test_a_compiled_step_is_the_same_step(scope):
    if _backend._load("cpu")[0] is None:
        missing("the CPU kernels are missing")
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


@pytest.mark.parametrize("kind", [LinBreg, AdaBreg, RMDA, SplitLBI])
def test_only_proxsgd_and_hspg_share_k_over_tensors(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: reg must have one k per tensor .*scope='all'"):
        kind(model(), reg=GroupEnvelope(0.1, 2, scope="all"))


@pytest.mark.parametrize("kind", [ProxSGD, HSPG])
def test_a_k_for_all_tensors_is_compared_with_all_groups(kind):
    params, owner = model([(3, 2), (4, 2)]), kind.__name__
    with pytest.raises(ValueError, match=rf"{owner}: GroupEnvelope: k=8 is more than the 7 groups .* of all tensors"):
        kind(params, reg=GroupEnvelope(0.1, 8, scope="all"))
    kind(params, reg=GroupEnvelope(0.1, 7, scope="all"))
    with pytest.raises(ValueError, match=r"scope must be 'tensor' or 'all', got 'model'"):
        GroupEnvelope(0.1, 2, scope="model")


@pytest.mark.parametrize("kind", [ProxSGD, HSPG])
def test_tensors_of_other_dtypes_or_devices_are_refused(kind):
    params, reg = model([(3, 2)]), GroupEnvelope(0.1, 3, scope="all")
    mixed = [*params, *model([(4, 2)], torch.float64)]
    apart = [*params, torch.nn.Parameter(torch.ones(4, 2, device="meta"))]
    other, owner = kind(model([(3, 2)]), lr=0.1), kind.__name__
    for bad in (mixed, apart):
        with pytest.raises(
            ValueError, match=rf"{owner}: GroupEnvelope: k is shared .* differ in dtype, device or ranks"
        ):
            kind(bad, lr=0.1, reg=reg)
        with pytest.raises(ValueError, match=rf"{owner}: GroupEnvelope: k is shared"):
            other.add_param_group({"params": bad, "reg": reg})
        assert len(other.param_groups) == 1
        kind(bad, lr=0.1, reg=GroupEnvelope(0.1, 3))
        kind([{"params": [p]} for p in bad], lr=0.1, reg=reg)


@pytest.mark.parametrize("change", ["dtype", "scope"])
def test_a_change_that_parts_the_tensors_is_refused_before_the_step(change):
    params, reg = model([(3, 2), (4, 2)]), GroupEnvelope(0.1, 3, scope="all")
    if change == "scope":
        reg.scope, params[1].data = "tensor", params[1].data.double()
    optimizer = ProxSGD(params, lr=0.1, momentum=0.5, reg=reg)
    train(optimizer, params, 2)
    if change == "scope":
        reg.scope = "all"
    else:
        params[1].data, params[1].grad = params[1].data.double(), None
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"k is shared over tensors that cannot step together"):
        train(optimizer, params, 1, begin=2)
    assert_unchanged(optimizer, before)
    assert step_counts(optimizer, params) == [2, 2]


def test_a_compiled_step_refuses_several_step_counts():
    if _backend._load("cpu")[0] is None:
        missing("the CPU kernels are missing")
    torch._dynamo.reset()
    params = model()
    optimizer = ProxSGD(params, lr=0.1, reg=GroupEnvelope(0.3, 2, scope="all"))
    step_some(optimizer, params, (0,), seed=0)
    set_grads(params, 1)
    before = snapshot(optimizer)
    with pytest.raises(Exception, match=r"cannot step together.*in a compiled step, in the number of steps taken"):
        torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")()
    assert_unchanged(optimizer, before)
