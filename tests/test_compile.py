"""torch.compile: the step in one graph, the op by torch's own checks, and steps that go on outside of it."""

from __future__ import annotations

import re

import pytest
import registry
import torch
from harness import same_bits
from torch import nn
from torch.testing._internal.optests import OpCheckError
from torch.utils._pytree import tree_map_only

from bregman_cuda import L1, AdaBreg, GroupLasso, LinBreg, ProxSGD, SparseGroupLasso, _backend
from bregman_cuda.optim import _traced
from bregman_cuda.regularizers import GroupEnvelope

pytestmark = pytest.mark.slow
BACKENDS = ["inductor", "aot_eager"]
FUSED = ("bregman_cuda", "fused_step_")
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
        for key in ours:
            if key == "alpha":  # adds up torch's square roots; MKL's, with AVX-512, may be an ulp off Python's
                torch.testing.assert_close(ours[key], theirs[key], rtol=1e-15, atol=0)
            else:
                assert same_bits(ours[key], theirs[key]), key


@pytest.mark.parametrize(
    ("rule", "reg"),
    [  # seconds each: every rule with l1 and one of the others
        (rule, REGS[name])
        for number, rule in enumerate(registry.EVERY_RULE)
        for name in ("l1", ("none", "group_out", "sparse_group_in")[number % 3])
        if registry.takes(rule, name)
    ],
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


def masked(params):
    optimizer = AdaBreg(params, lr=0.1, reg=L1(0.1))
    optimizer.set_mask(params[0], torch.rand(params[0].shape) > 0.3)
    return optimizer


# What makes parameters and their optimizer, whose own steps give every op its arguments.
SAMPLES = {
    "fp32": (torch.Tensor.float, lambda p: AdaBreg(p, lr=0.1, reg=L1(0.1))),
    "fp64": (torch.Tensor.double, lambda p: LinBreg(p, lr=0.1, momentum=0.9, reg=L1(0.1))),
    "bf16": (torch.Tensor.bfloat16, lambda p: LinBreg(p, lr=0.1, reg=L1(0.1))),
    "fp16_master": (torch.Tensor.half, lambda p: ProxSGD(p, lr=0.1, reg=L1(0.1))),
    "masked": (torch.Tensor.float, masked),
    "grouped": (torch.Tensor.float, lambda p: LinBreg(p, lr=0.1, reg=SparseGroupLasso(0.1, 0.5, "in"))),
    "other_layout": (torch.Tensor.t, lambda p: LinBreg(p, lr=0.1, reg=GroupLasso(0.1))),
    "counts": (torch.Tensor.float, lambda p: AdaBreg(p, lr=0.1, reg=GroupLasso(0.1), count_nonzeros=True)),
    "shared_budget": (torch.Tensor.float, lambda p: ProxSGD(p, lr=0.1, reg=GroupEnvelope(0.1, 3))),
    "capturable": (torch.Tensor.float, lambda p: LinBreg(p, lr=0.1, reg=L1(0.1), capturable=True)),
}


def calls_of_every_op(sample: str) -> tuple[dict[str, tuple], list]:
    """Arguments by op, as they were before the call, and the tensors whose addresses are among them."""
    change, make = SAMPLES[sample]
    params = [nn.Parameter(change(torch.randn(shape))) for shape in ((6, 4), (8, 3))]
    optimizer = make(params)
    for p in params:
        p.grad = torch.randn(p.shape).to(p.dtype)
    calls: dict[str, tuple] = {"describe": ()}

    def recorder(op):
        def call(*args):
            calls.setdefault(op._opname, tree_map_only(torch.Tensor, copied, args))
            return op(*args)

        return call

    kernels = _backend._load("cpu")[0]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_why_not", "_plan", "step"):
            patch.setattr(kernels, name, recorder(getattr(kernels, name)))
        patch.setattr(_traced, "fused_step_", recorder(torch.ops.bregman_cuda.fused_step_.default))
        optimizer.step()
        with torch.no_grad():
            _traced.traced_step(optimizer)
    return calls, [params, optimizer]


def copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def registered_ops() -> dict[str, torch._ops.OpOverload]:
    """Every op of the library under test, and the one in Python, by name: whatever has a schema."""
    library = _backend._load("cpu")[0].step.namespace
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    names = [(space, name) for space, name in names if space == library or (space, name) == FUSED]
    return {name: getattr(getattr(torch.ops, space), name).default for space, name in names}


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_passes_on_every_op(sample, kernel_driver):
    """torch's own verdict: schema, autograd registration, fake tensors, AOT dispatch. A new op needs arguments here."""
    calls, _alive = calls_of_every_op(sample)
    ops = registered_ops()
    assert set(ops) == set(calls)
    for name, op in ops.items():
        torch.library.opcheck(op, calls[name])


MUTATIONS = {  # and a sample that makes each of them
    ("step", "device_plan"): "shared_budget",
    ("step", "odd"): "other_layout",
    ("step", "counts"): "counts",
    ("fused_step_", "params"): "fp32",
    ("fused_step_", "state"): "fp32",
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=".".join)
def test_opcheck_sees_a_mutation_that_a_schema_hides(mutation, kernel_driver):
    """The same op under a schema without the mark fails, so none is there in vain."""
    name, argument = mutation
    calls, _alive = calls_of_every_op(MUTATIONS[mutation])
    ops = registered_ops()
    marked = {(op, a.name) for op in ops for a in ops[op]._schema.arguments if a.alias_info and a.alias_info.is_write}
    assert marked == set(MUTATIONS)
    schema = str(ops[name]._schema).split("::")[1]
    hidden = re.sub(rf"\(\w+!\)(\S*) {argument}\b", rf"\1 {argument}", schema)
    with torch.library._scoped_library("bregman_hidden", "FRAGMENT") as library:
        library.define(hidden)
        library.impl(name, ops[name], "CPU")
        with pytest.raises(OpCheckError, match=f"Argument {argument} is not defined as mutable but was mutated"):
            torch.library.opcheck(getattr(torch.ops.bregman_hidden, name).default, calls[name])
