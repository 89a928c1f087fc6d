"""The CUDA kernels on a device: the same cases against the same reference, streams, graphs of launches, counts."""

from __future__ import annotations

import pytest
import registry
import torch
from harness import Problem, assert_same, run, same_bits, true_counts
from test_kernels import tolerance

from bregman_cuda import L1, AdaBreg, GroupEnvelope, GroupLasso, LinBreg, _backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


@pytest.fixture(autouse=True)
def _kernels():
    kernels, why = _backend._load("cuda")
    assert kernels is not None, f"there is a device, but no kernels: {why}"


def check(problem: Problem) -> None:
    """The device against the reference on the CPU, whose every operation is correctly rounded."""
    got, want = run(problem, fused=True, device="cuda"), run(problem, fused=False)
    assert all(p.is_cuda for p in got.params)
    assert_same(got, want, tolerance(problem, want), lambda i: f"{i} of shape {problem.shapes[i]}")
    reg = problem.reg()
    counted = [i for i in range(len(got.params)) if reg is not None or "mask" in got.states[i]]
    sparse = [got.optimizer.prox_point(p) for p in got.optimizer.param_groups[0]["params"]]
    assert got.counts == [true_counts(sparse[i], reg) for i in counted or range(len(got.params))]


@pytest.mark.parametrize("dtype", registry.DTYPES, ids=str)
@pytest.mark.parametrize(("rule", "reg"), registry.CROSSED)
def test_every_rule_regularizer_and_dtype(rule, reg, dtype):
    case = registry.REGULARIZERS[reg]
    shapes = registry.shapes(case.min_ndim, "cuda")
    if dtype != torch.float32:
        shapes = shapes[(len(rule) + len(reg)) % 3 :: 3]
    check(Problem(rule, case, dtype, shapes, steps=2, masked=dtype in (torch.float32, torch.bfloat16)))


@pytest.mark.parametrize("grad_layout", [*registry.LAYOUTS, "gaps"])
@pytest.mark.parametrize("layout", registry.LAYOUTS)
def test_every_pair_of_layouts(layout, grad_layout):
    shapes = [(3, 4, 2, 5), (2, 3, 5), (9, 7), (65,), (1, 5, 1, 3), (4, 1, 3, 3)]
    for reg in ("none", "group_out", "sparse_group_out", "group_last"):
        for dtype in (torch.float32, torch.bfloat16):
            check(Problem("adabreg", registry.REGULARIZERS[reg], dtype, shapes, [layout], [grad_layout], masked=True))


def test_runs_on_the_current_stream():
    """Gradients that a slow stream is still writing are waited for, because the step is in the same stream."""
    stream, n = torch.cuda.Stream(), 1 << 20
    p = torch.nn.Parameter(torch.zeros(n, device="cuda"))
    p.grad = torch.zeros(n, device="cuda")
    optimizer = LinBreg([p], lr=1.0, reg=L1(0.5), fused=True)
    optimizer.step()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        p.grad.fill_(-2.0)
        optimizer.step()
        result = p.detach().clone()
    stream.synchronize()
    assert bool((result == 1.5).all())


LAUNCHES = [
    *(("adabreg", reg, 1) for reg in ("l1", "group_out", "group_in")),
    ("linbreg", "l1", 1),
    ("proxadam", "group_in", 1),
    ("rmda", "group_out", 1),
    ("ramda", "group_out", 1),
    ("splitlbi_nesterov", "group_out", 1),
    ("hspg", "group_out", 1),
    ("proxsgd_momentum", "envelope", 3),
    ("hspg", "envelope", 3),
]


@pytest.mark.parametrize(("rule", "reg", "launches"), LAUNCHES)
def test_launches_per_group_and_no_wait(rule, reg, launches):
    """500 tensors in each of two groups: so many kernels for each, and no call that waits for the device."""
    params = [torch.nn.Parameter(torch.randn(4, 3 + i % 5, device="cuda")) for i in range(1000)]
    groups = [{"params": params[:500]}, {"params": params[500:], "lr": 0.2}]
    penalty = GroupEnvelope(0.1, k=2) if reg == "envelope" else registry.REGULARIZERS[reg]()
    optimizer = registry.EVERY_RULE[rule].make(groups, penalty, fused=True, count_nonzeros=True)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    on_device = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_device if not name.startswith(("Memcpy", "Memset", "Optimizer."))]
    assert len(kernels) == 2 * launches, kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    report = optimizer.density()
    assert [r.nonzeros for r in report.rows] == [int(torch.count_nonzero(optimizer.prox_point(p))) for p in params]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rule", registry.RULES)
def test_a_captured_step_replays(rule, fused):
    """Replays read gradient, lr and lam anew, and count steps: the same bits as steps outside of the graph."""
    sides = []
    for captured in (True, False):
        torch.manual_seed(0)
        lr, lam = torch.tensor(0.25, device="cuda"), torch.tensor(0.1, device="cuda")
        params = [
            torch.nn.Parameter(torch.randn(33, 7, device="cuda")),
            torch.nn.Parameter(torch.randn(5, device="cuda")),
        ]
        for p in params:
            p.grad = torch.randn_like(p)
        options = {**registry.RULES[rule].options, "lr": lr}
        optimizer = registry.RULES[rule].optimizer(params, reg=L1(lam), capturable=True, fused=fused, **options)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        take = optimizer.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            take = graph.replay
        for k in range(4):
            for p in params:
                p.grad.mul_(-1)
            lr.fill_(0.25 / (1 + k))
            lam.fill_(0.1 * (1 + k))
            take()
        assert [float(optimizer.state[p]["step"]) for p in params] == [5.0, 5.0]
        sides.append([t.detach().cpu() for p in params for t in (p, *optimizer.state[p].values())])
    assert all(same_bits(a, b) for a, b in zip(*sides, strict=True))


def test_capture_without_capturable_is_refused():
    p = torch.nn.Parameter(torch.ones(3, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = LinBreg([p])
    optimizer.step()
    with pytest.raises(RuntimeError, match="set capturable=True"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()


@pytest.mark.parametrize("capturable", [False, True])
def test_grad_scaler_does_not_synchronise(capturable):
    p = torch.nn.Parameter(torch.ones(64, device="cuda"))
    optimizer = AdaBreg([p], lr=0.1, reg=L1(0.01), capturable=capturable)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    for overflow in (False, True, False):
        p.grad = None
        scaler.scale((p * (torch.inf if overflow else 2.0)).sum()).backward()
        before = p.detach().clone()
        if optimizer.state:  # the first step moves the counter
            torch.cuda.set_sync_debug_mode("error")
        try:
            scaler.step(optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert bool((p == before).all()) == overflow
        scaler.update()
    assert float(optimizer.state[p]["step"]) == 2


def test_more_tensors_than_one_launch_holds():
    """Gradient pointers travel as kernel arguments, 1000 at a time."""
    sides = []
    for device, fused in (("cuda", True), ("cpu", False)):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(5, 2, generator=generator).to(device)) for _ in range(2101)]
        optimizer = LinBreg(params, reg=GroupLasso(0.1), fused=fused)
        for p in params:
            p.grad = torch.randn(5, 2, generator=generator).to(device)
        optimizer.step()
        sides.append(params)
    assert all(same_bits(a.detach().cpu(), b.detach()) for a, b in zip(*sides))


@pytest.mark.parametrize("rule", registry.RULES)
def test_a_nan_gradient_makes_the_weight_nan(rule):
    for case in (case for name, case in registry.REGULARIZERS.items() if registry.takes(rule, name)):
        p = torch.nn.Parameter(torch.zeros(3, 4, 5, device="cuda"))
        p.grad = torch.zeros_like(p)
        p.grad[0, 1, 2] = torch.nan
        registry.RULES[rule].make([p], case(), fused=True).step()
        assert bool(p[0, 1, 2].isnan())


def test_same_bits_run_to_run():
    for reg in ("l1", "group_out", "group_in"):
        problem = Problem(
            "adabreg", registry.REGULARIZERS[reg], torch.float32, [(700, 900), (65, 3, 3, 3)], masked=True
        )
        first = run(problem, True, "cuda")
        for _ in range(3):
            again = run(problem, True, "cuda")
            assert all(same_bits(a, b) for a, b in zip(first.params, again.params))
            assert first.counts == again.counts


@pytest.mark.slow
def test_more_than_2_to_the_31_elements():
    n = 2**31 + 12345
    if torch.cuda.mem_get_info()[0] < 20 * n:
        pytest.skip("needs 43 GB of free device memory")
    p = torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    p.grad[-1] = 3
    optimizer = LinBreg([p], lr=1.0, reg=L1(2.0), fused=True, count_nonzeros=True)
    optimizer.step()
    assert float(p[-1]) == -1.0
    assert optimizer.density().nonzeros == 1
