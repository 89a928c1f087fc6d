"""torch.compile: the step in one graph, the op by torch's own checks, and steps that go on outside of it."""

from __future__ import annotations

import pytest
import registry
import torch
from harness import same_bits
from torch import nn

from bregman_cuda import L1, AdaBreg, GroupLasso, LinBreg, ProxSGD, SparseGroupLasso
from bregman_cuda.optim._traced import fused_step_

pytestmark = pytest.mark.slow
BACKENDS = ["inductor", "aot_eager"]
REGS = {
    "none": None,
    "l1": L1(0.1),
    "group_out": GroupLasso(0.1),
    "sparse_group_in": SparseGroupLasso(0.1, 0.5, "in"),
}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """How many graphs Dynamo has captured in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def make(rule: str, reg):
    """Two dtypes, a mask, and a channels_last weight."""
    torch.manual_seed(0)
    params = [torch.randn(6, 4), torch.randn(5, 3, 3, 3).to(memory_format=torch.channels_last), torch.randn(4, 2)]
    params[2] = params[2].bfloat16()
    params = [nn.Parameter(p) for p in params]
    optimizer = registry.EVERY_RULE[rule].make([*params], reg)
    optimizer.set_mask(params[0], torch.rand(6, 4) > 0.3)
    return params, optimizer


def set_gradients(params, step: int, without: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        p.grad = None if i in without else grad.to(memory_format=torch.preserve_format)


def assert_same(first, second) -> None:
    for p, q in zip(first[0], second[0], strict=True):
        assert same_bits(p.detach(), q.detach())
        ours, theirs = first[1].state[p], second[1].state[q]
        assert set(ours) == set(theirs)
        assert all(same_bits(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("rule", "reg"),
    [(rule, reg) for rule in registry.EVERY_RULE for name, reg in REGS.items() if registry.takes(rule, name)],
    ids=str,
)
def test_a_compiled_step_is_the_eager_one(rule, reg):
    eager, compiled = make(rule, reg), make(rule, reg)
    step = torch.compile(compiled[1].step, fullgraph=True, backend="aot_eager")
    for number in range(5):
        without = (1,) if number == 2 else ()
        set_gradients(eager[0], number, without)
        set_gradients(compiled[0], number, without)
        eager[1].step()
        compiled[1].step() if number == 3 else step()  # in and out of compilation
    assert_same(eager, compiled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_whole_training_step(backend):
    """Forward, backward and our step in one compiled function; no recompilation from step to step."""
    frames = []
    losses = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        optimizer = AdaBreg(model.parameters(), lr=torch.tensor(1e-2), reg=L1(0.01))
        x, y = torch.randn(32, 8), torch.randint(0, 2, (32,))

        def train(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        run = torch.compile(train, backend=backend) if compiled else train
        for step in range(12):
            loss = run()
            if compiled and step == 3:
                frames.append(graphs())
        if compiled:
            frames.append(graphs())
        losses[compiled] = loss.item()
        assert optimizer.state[model[0].weight]["step"] == 12
    assert frames[0] == frames[1]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


@pytest.mark.parametrize("order", ["cc", "ecec", "ceec", "cecece"])
def test_groups_and_counters_in_and_out_of_compilation(order):
    """Every group counts, whichever way its steps were taken, and the density is that of the last one."""
    ends = []
    for taken in (order, "e" * len(order)):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(5)) for _ in range(3)]
        groups = [{"params": params[:1]}, {"params": params[1:2], "reg": L1(0.5)}, {"params": params[2:]}]
        optimizer = AdaBreg(groups, lr=torch.tensor([0.3]), reg=L1(0.1), count_nonzeros=True)
        step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
        for number, how in enumerate(taken):
            set_gradients(params, number)
            step() if how == "c" else optimizer.step()
            assert [float(optimizer.state[p]["step"]) for p in params] == [number + 1.0] * 3
            assert optimizer.density().nonzeros == sum(int((p != 0).sum()) for p in params)
        ends.append((params, optimizer))
    assert_same(*ends)


def test_a_tensor_lr_changes_without_recompilation():
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    compiled, eager = (ProxSGD([t], lr=torch.tensor(0.5)) for t in (p, q))
    step = torch.compile(compiled.step, fullgraph=True, backend="aot_eager")
    before = graphs()
    for lr in (0.5, 0.25, 0.125):
        for t, optimizer in ((p, compiled), (q, eager)):
            t.grad = torch.ones(4)
            optimizer.param_groups[0]["lr"].fill_(lr)
        step()
        eager.step()
    assert same_bits(p.detach(), q.detach())
    assert graphs() == before + 1


def test_a_tensor_lam_changes_without_recompilation_and_its_nan_makes_no_zeros():
    p, lam = nn.Parameter(torch.ones(4)), torch.tensor(0.5)
    optimizer = ProxSGD([p], lr=torch.tensor(1.0), reg=L1(lam))
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    before = graphs()
    for value, wanted in ((0.5, 0.5), (0.25, 0.25), (torch.nan, torch.nan)):
        lam.fill_(value)
        p.grad = torch.zeros(4)
        step()
        assert same_bits(p.detach(), torch.full((4,), wanted))
    assert graphs() == before + 1


def test_what_cannot_be_compiled_says_so():
    p = nn.Parameter(torch.ones(4))
    optimizer = LinBreg([p])
    p.grad, optimizer.param_groups[0]["lr"] = torch.ones(4), -5.0
    with pytest.raises(Exception, match="lr must be finite"):
        torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")()
    cases = (
        ({"fused": False}, "leave fused at None"),
        ({"check_finite": True}, "check_finite=False"),
        ({}, "scaler.step"),
    )
    for options, match in cases:
        optimizer = LinBreg([p], **options)
        p.grad = torch.ones(4)
        if match == "scaler.step":
            optimizer.found_inf = torch.tensor(0.0)
        torch._dynamo.reset()
        with pytest.raises(Exception, match=match):
            torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")()
    assert p.tolist() == [1.0] * 4


@pytest.mark.parametrize("options", [{"fused": False}, {"check_finite": True}], ids=str)
def test_where_compilation_gives_up_the_step_runs_as_a_whole(options):
    """Without fullgraph torch falls back to Python: the same bits, and no part of the step compiled by itself."""
    sides = []
    for compiled in (True, False):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4))]
        optimizer = AdaBreg(params, lr=0.1, reg=L1(0.1), **options)
        torch._dynamo.reset()
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            step()
        sides.append([t for p in params for t in (p.detach(), *optimizer.state[p].values())])
    assert all(map(same_bits, *sides))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", registry.DTYPES, ids=str)
def test_opcheck(dtype, masked):
    """torch's own verdict on the op: schema, fake tensors, autograd registration, AOT dispatch."""
    params = [torch.randn(6, 4).to(dtype), torch.randn(8).to(dtype)]
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    state = [torch.randn(p.shape, dtype=wide) for p in params]
    masks = [torch.randint(0, 255, (8,), dtype=torch.uint8) if masked else torch.empty(0, dtype=torch.uint8)] * 2
    scalars = torch.tensor(
        [0.0, 1.0, 0.1, 1.0, 0.05, 0.0, 0.0, 0.0], dtype=torch.float64
    )  # skip, factor, lr, delta, lam
    args = (
        params,
        [torch.randn_like(p) for p in params],
        state,
        masks,
        [-1, -1],
        [1.0, 1.0],
        [0, 0],
        "linbreg",
        "l1",
        "none",
    )
    torch.library.opcheck(fused_step_, (*args, scalars))
