"""The kernels against the reference: CPU and emulated CUDA, over rules, regularizers, dtypes, shapes and layouts."""

from __future__ import annotations

import math
import os

import pytest
import registry
import torch
from conftest import Driver
from harness import Buffer, Outcome, Problem, assert_same, compare, guard_state, run, same_bits, true_counts
from hypothesis import given, settings
from hypothesis import strategies as st

from bregman_cuda import L1, GroupLasso, LinBreg, NonnegL1, _backend
from bregman_cuda.optim._plan import FusedBucket, ReferenceBucket

EXAMPLES = int(os.environ.get("BREGMAN_TEST_EXAMPLES", "1"))


def tolerance(problem: Problem, outcome: Outcome) -> float:
    """What two correct drivers may differ by: nothing, except in fp64, and where a root is searched.

    16- and 32-bit parameters: every operation is the same correctly rounded fp32 operation in the same order, and
    group norms are summed in fp64, where another order is off by 2^-53 * size and never reaches the fp32 rounding.
    fp64: (1) a norm of n squares in another order is off by n/2 * eps relatively, which moves the shrunk entries by
    up to n/2 * eps * |z|; (2) torch's square root (MKL) is off by an ulp, which AdaBreg's update, of size about
    |dual|, inherits; in a metric, so do the step and the threshold. Each step adds one of each; a rule that reads its
    parameter carries them on.

    Roots: up to 32 squares, or as many as a thread has, are summed in fp32 first (csrc/math/weighted.h), which leaves
    some 2^-24 of a group's norm.
    """
    reg, wide = problem.reg(), problem.dtype == torch.float64
    if not wide and not registry.searches(outcome.optimizer, outcome.optimizer.param_groups[0]):
        return 0.0
    eps = torch.finfo(torch.float64).eps
    size = 0.0
    if reg is not None and reg.radial is not None:
        size = max(p.numel() for p in outcome.params)  # of the largest group, or more
    if problem.rule in registry.ROOTED:
        size += 16
    reach = 1.0
    for param, state in zip(outcome.params, outcome.states):
        for tensor in (param, *(v for name, v in state.items() if name != "mask")):
            if tensor.numel():
                reach = max(reach, float(tensor.abs().nan_to_num(0, 0, 0).max()))
    return problem.steps * reach * (size * eps if wide else 16 * 2.0**-24)


def check(problem: Problem, driver: Driver) -> Outcome:
    """Kernels and reference agree, and the kernels' counts are those of the final parameters."""
    reg, case = problem.reg(), registry.EVERY_RULE[problem.rule]
    got, want = run(problem, fused=True), run(problem, fused=False)
    assert all(b.kernels is _backend._load("cpu")[0] for _, b in got.optimizer._buckets())
    assert all(type(b) is ReferenceBucket for _, b in want.optimizer._buckets())
    assert_same(got, want, tolerance(problem, want), lambda i: f"{i} of shape {problem.shapes[i]}")
    counted = [i for i in range(len(got.params)) if reg is not None or "mask" in got.states[i]]
    sparse = [got.optimizer.prox_point(p) for p in got.optimizer.param_groups[0]["params"]]
    assert got.counts == [true_counts(sparse[i], reg) for i in counted or range(len(got.params))]
    if problem.dtype == torch.float32 and not case.dense:  # found again from the state alone
        # Zeros have no sign here.
        found = [compare(q + 0.0, p + 0.0, tolerance(problem, want), "prox point") for q, p in zip(sparse, got.params)]
        assert not any(found)
    return got


@pytest.mark.parametrize("dtype", registry.DTYPES, ids=str)
@pytest.mark.parametrize(("rule", "reg"), registry.CROSSED)
def test_every_rule_regularizer_and_dtype(kernel_driver, rule, reg, dtype):
    case = registry.REGULARIZERS[reg]
    shapes = registry.shapes(case.min_ndim, kernel_driver.name)
    masked = dtype in (torch.float32, torch.bfloat16)  # the mask is the same code for the other two
    if dtype != torch.float32 or kernel_driver.name == "emulated":  # a third, and another third in the next case
        shapes = shapes[(len(rule) + len(reg)) % 3 :: 3]
    check(Problem(rule, case, dtype, shapes, steps=2, masked=masked), kernel_driver)


@st.composite
def problems(draw, driver: str) -> Problem:
    rule, name = draw(st.sampled_from(registry.PAIRS))
    reg = registry.REGULARIZERS[name]
    side = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33])
    small = st.lists(side, min_size=reg.min_ndim, max_size=max(reg.min_ndim, 4)).map(tuple)
    small = small.filter(lambda shape: math.prod(shape) <= 3000)
    edge = st.sampled_from(registry.shapes(reg.min_ndim, driver))
    layout = st.sampled_from(registry.LAYOUTS)
    several = st.lists(layout, min_size=1, max_size=4)
    return Problem(
        rule=rule,
        reg=lambda lam=draw(st.sampled_from([0.0, 0.3, 1.5])): reg(lam),
        dtype=draw(st.sampled_from(registry.DTYPES)),
        shapes=draw(st.lists(st.one_of(small, small, edge), min_size=1, max_size=6)),
        layouts=draw(several),
        grad_layouts=draw(st.one_of(st.just([]), several, st.just(["gaps", "contiguous"]))),
        masked=draw(st.booleans()),
        options={"maximize": draw(st.booleans()), "delta": draw(st.sampled_from([1.0, 0.3, 2.5]))},
        steps=draw(st.integers(1, 2 if driver == "emulated" else 4)),
        seed=draw(st.integers(0, 2**20)),
        zeros=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )


def test_shapes_layouts_and_options(kernel_driver):
    name = kernel_driver.name

    @settings(max_examples=EXAMPLES * {"cpu": 250, "emulated": 100}[name])
    @given(problems(name))
    def any_problem(problem: Problem) -> None:
        check(problem, kernel_driver)

    any_problem()


class NonnegGroups(GroupLasso):
    """With an elementwise penalty that has no loops of its own in the group kernels."""

    elementwise = property(lambda self: NonnegL1(self.lam))

    @staticmethod
    def example() -> GroupLasso:
        return NonnegGroups(0.3, "in")


@pytest.mark.parametrize("kernel_driver", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rule", "make"),
    [
        (rule, make)
        for rule in ("linbreg", "linbreg_torch", "adabreg", "proxsgd_momentum", "rmda", "splitlbi")
        for make in (registry.REGULARIZERS["group_in"], registry.REGULARIZERS["sparse_group_in"], NonnegGroups.example)
    ]
    + [(rule, registry.REGULARIZERS["group_l_half"]) for rule in ("proxsgd_momentum", "rmda", "hspg")]  # not for a dual
    + [("hspg", registry.REGULARIZERS["group_in"])],
)
def test_strips(kernel_driver, rule, make, dtype):
    """Groups that run through all rows of a large tensor: what follows from sums of strips of rows."""
    shapes = [(611, 307), (9, 5), (130, 40, 6, 6), (2050, 96), (200, 5, 160)]
    problem = Problem(rule, make, dtype, shapes, ["contiguous", "contiguous", "channels_last"], masked=True)
    optimizer = check(problem, kernel_driver).optimizer
    ((_, bucket),) = optimizer._buckets()
    assert int(bucket.plan.view(torch.int64)[5]) >= 2 * 3, "no strips"  # PlanHeader::strips; three tensors or more


@pytest.mark.parametrize("grad_layout", [*registry.LAYOUTS, "gaps"])
@pytest.mark.parametrize("layout", registry.LAYOUTS)
def test_every_pair_of_layouts(kernel_driver, layout, grad_layout):
    shapes = [(3, 4, 2, 5), (2, 3, 5), (9, 7), (65,), (1, 5, 1, 3), (4, 1, 3, 3)]
    for reg in ("none", "group_out", "sparse_group_out", "group_last"):
        case = registry.REGULARIZERS[reg]
        check(Problem("adabreg", case, torch.float32, shapes, [layout], [grad_layout], masked=True), kernel_driver)


def test_dims_that_alternate_too_often_go_through_the_reference(kernel_driver):
    """Groups over dims 0, 2, 4 and 6 of a contiguous tensor: more runs than the kernels' layout has."""
    p = torch.nn.Parameter(torch.randn(2, 2, 2, 2, 2, 2, 2))
    p.grad = torch.randn_like(p)
    twin = torch.nn.Parameter(p.detach().clone())
    twin.grad = p.grad.clone()
    reg = GroupLasso(0.1, (0, 2, 4, 6))
    with pytest.raises(RuntimeError, match=r"fused=True.*parameter 0 of shape \(2, 2, 2, 2, 2, 2, 2\).*alternate"):
        LinBreg([p], reg=reg, fused=True).step()
    LinBreg([p], reg=reg).step()
    LinBreg([twin], reg=reg, fused=False).step()
    assert torch.equal(p, twin)


@pytest.mark.parametrize("rule", registry.RULES)
def test_a_view_with_gaps_goes_through_the_reference_and_is_refused_by_fused(kernel_driver, rule):
    dense, gaps = torch.randn(5, 6), Buffer(torch.randn(7, 3), "gaps")
    before = gaps.view.clone(), dense.clone()
    params = [torch.nn.Parameter(dense), torch.nn.Parameter(gaps.view)]
    for p in params:
        p.grad = torch.randn_like(p)
    case = registry.RULES[rule]
    with pytest.raises(RuntimeError, match=r"fused=True, but parameter 1 of shape \(7, 3\).*gaps or overlaps"):
        case.make(params, L1(0.1), fused=True).step()
    assert torch.equal(gaps.view, before[0])
    assert torch.equal(dense, before[1])

    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    optimizers = [case.make(params, L1(0.1), fused=None), case.make(twins, L1(0.1), fused=False)]
    for _ in range(2):
        for p, twin in zip(params, twins):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert {type(b) for _, b in optimizers[0]._buckets()} == {FusedBucket, ReferenceBucket}
    assert gaps.intact()
    for p, twin in zip(params, twins):
        assert torch.equal(p, twin)


def test_dtypes_in_one_group_and_tensors_that_join_late(kernel_driver):
    """One bucket per dtype and step count, each with its own bias correction."""
    torch.manual_seed(3)
    start = [torch.randn(9).to(dtype) for dtype in registry.DTYPES for _ in range(2)]
    sides = []
    for fused in (True, False):
        params = [torch.nn.Parameter(t.clone()) for t in start]
        optimizer = registry.RULES["adabreg"].make(params, L1(0.2), fused=fused)
        generator = torch.Generator().manual_seed(5)
        for step in range(4):
            for i, p in enumerate(params):
                grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                p.grad = None if (step + i) % 3 == 0 else grad
            optimizer.step()
        sides.append((params, [int(optimizer.state[p]["step"]) for p in params]))
    assert sides[0][1] == sides[1][1] == [sum((s + i) % 3 != 0 for s in range(4)) for i in range(len(start))]
    for got, want in zip(sides[0][0], sides[1][0]):
        compare(got.detach(), want.detach(), 32 * 2.3e-16 if got.dtype == torch.float64 else 0.0, str(got.dtype))


def test_the_plan_covers_every_tensor(kernel_driver):
    """Separable: chunks of one size but the last. Grouped: at least one item for each tensor with elements."""
    kernels = _backend._load("cpu")[0]
    none = torch.empty(0, dtype=torch.uint8)

    @settings(max_examples=200)
    @given(
        st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 8, 40, 129]), max_size=4), min_size=1, max_size=8), st.booleans()
    )
    def property_of(shapes: list[list[int]], grouped: bool) -> None:
        shapes = [shape or [1] for shape in shapes]
        params = [torch.zeros(shape) for shape in shapes if math.prod(shape) < 2**16] or [torch.zeros(1)]
        state = [torch.zeros_like(p) for p in params]
        bits, weights = [1 if grouped else -1] * len(params), [1.0] * len(params)
        rule = kernels.rules["linbreg"][0]
        _, item_tensor = kernels.plan(params, state, [none] * len(params), bits, weights, [0] * len(params), rule)
        items = item_tensor.tolist()
        assert items == sorted(items), "items follow the tensors"
        assert set(items) == {i for i, p in enumerate(params) if p.numel()}
        if not grouped:
            chunk = registry.LONG[kernel_driver.name]
            assert [items.count(i) for i in range(len(params))] == [-(-p.numel() // chunk) for p in params]

    property_of()


# The helpers themselves, each with a planted error.


@pytest.mark.parametrize("layout", [*registry.LAYOUTS, "gaps"])
def test_guards_see_a_single_element(layout):
    for shape in ((3, 4, 2, 2), (5,), (), (0, 3)):
        for where in ("before", "after"):
            buffer = Buffer(torch.randn(shape), layout)
            assert buffer.intact()
            inside = (~buffer.outside).nonzero()
            first, last = (int(inside.min()), int(inside.max())) if len(inside) else (128, 127)
            buffer.arena[first - 1 if where == "before" else last + 1] ^= 1
            assert not buffer.intact()
    assert (Buffer(torch.zeros(3), layout).view.data_ptr() % 16 != 0) == (layout == "misaligned")


def test_comparison_sees_one_ulp_and_one_nan():
    a = torch.tensor([1.0, -0.0, float("nan"), 2.0])
    assert same_bits(a, a.clone())
    assert not same_bits(a, torch.tensor([1.0, 0.0, float("nan"), 2.0]))
    assert not same_bits(a, torch.tensor([1.0, -0.0, float("nan"), 2.0000002]))
    assert not same_bits(a, torch.tensor([1.0, -0.0, 0.0, 2.0]))
    assert not same_bits(a, a.double())
    with pytest.raises(AssertionError, match="1 of 3 differ"):
        compare(a[:3].nan_to_num(), torch.tensor([1.0, 0.0, 1e-45]), 0.0, "planted")
    with pytest.raises(AssertionError, match="NaN on one side"):
        compare(a, a.nan_to_num(), 1.0, "planted")
    with pytest.raises(AssertionError, match="differs by"):
        compare(torch.tensor([1.0, math.inf]), torch.tensor([1.5, math.inf]), 0.1, "planted")
    assert compare(torch.tensor([0.0, 1.0]), torch.tensor([1e-9, 1.0]), 1e-8, "flip") == 1


def test_guarded_state_is_the_state_that_steps():
    p = torch.nn.Parameter(torch.randn(10))
    p.grad = torch.randn(10)
    optimizer = LinBreg([p], reg=L1(0.1))
    optimizer.step()
    (buffer,) = guard_state(optimizer, [p])
    before = buffer.view.clone()
    optimizer.step()
    assert not torch.equal(buffer.view, before)
