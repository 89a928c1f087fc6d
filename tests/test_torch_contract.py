"""What torch asks of an optimizer, in torch's own frame (OptimizerInfo, @optims), with assertions of ours.

Three oracles: torch's SGD and Adam, which ours equal without a regularizer; an equivalent formulation with the same
optimizer (two optimizers for two groups, no interruption, the negated gradient); the plain-torch reference.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from dataclasses import dataclass
from typing import Any
from unittest import mock

import hypothesis
import pytest
import registry
import torch
from harness import Buffer
from torch.nn import Parameter
from torch.optim import lr_scheduler as lrs
from torch.optim import swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from bregman_cuda import (
    HSPG,
    L1,
    RAMDA,
    RMDA,
    AdaBreg,
    AveragedProxSGD,
    GroupLasso,
    GroupMCP,
    LinBreg,
    ProxAdam,
    ProxSGD,
    SparseGroupLasso,
    SplitLBI,
)

pytest.importorskip("expecttest", reason="torch.testing._internal imports it")
with mock.patch("torch.backends.disable_global_flags"):  # it would freeze torch.backends for the whole session
    from torch.testing._internal import common_optimizers as frame
    from torch.testing._internal.common_device_type import instantiate_device_type_tests
    from torch.testing._internal.common_utils import TestCase, parametrize
hypothesis.settings.load_profile("suite")  # the import above loaded torch's

RULES = {
    LinBreg: [{"lr": 0.25}, {"lr": 0.5, "momentum": 0.75}, {"lr": 0.25, "momentum": 0.75, "momentum_style": "torch"}],
    AdaBreg: [{"lr": 0.05}],
    ProxSGD: [{"lr": 0.25}, {"lr": 0.25, "momentum": 0.75}],
    AveragedProxSGD: [{"lr": 0.25}],
    ProxAdam: [{"lr": 0.05}, {"lr": 0.05, "amsgrad": True}],
    RMDA: [{"lr": 0.125}, {"lr": 0.125, "momentum": 0.5}],
    RAMDA: [{"lr": 0.125}, {"lr": 0.125, "momentum": 1.0}],
    SplitLBI: [{"lr": 0.25, "mu": 2.0}, {"lr": 0.25, "mu": 2.0, "momentum": 0.5, "nesterov": True}],
    HSPG: [{"lr": 0.25, "momentum": 0.5, "start": 2}, {"lr": 0.25, "start": 0, "end": 4, "k": 5}],
}
BREGMAN = (LinBreg, AdaBreg)
REGS = [None, L1(0.05), GroupLasso(0.05, "out"), SparseGroupLasso(0.05, 0.5, "in")]
GROUP_REGS = [GroupLasso(0.05, "out"), GroupMCP(0.05, 4.0, "in")]  # what HSPG takes
SHAPES = ((6, 5), (4, 3, 3, 3), (7, 2))  # the groups above ask for two dimensions
FLAGS = ("maximize", "fused", "count_nonzeros", "check_finite")
F32, F64, BF16, F16 = registry.DTYPES
REFUSED = [
    (ValueError, "optimizer got an empty parameter list", [], {}),
    (ValueError, "can't optimize a non-leaf Tensor", [torch.ones(2, requires_grad=True) * 2], {}),
    (TypeError, "can only optimize Tensors", [1.0], {}),
    (TypeError, "dtype torch.complex64; only real", [torch.ones(2, dtype=torch.complex64)], {}),
    (ValueError, "does not fit a tensor of shape", [torch.ones(())], {"reg": GroupLasso(0.1)}),
    (TypeError, "unexpected keyword argument 'foreach'", None, {"foreach": True}),
]


def optim_inputs(optimizer, device, dtype=None):
    """Every rule with every kind of regularizer; without `fused`, which the frame adds."""
    regs = [None, *GROUP_REGS] if optimizer is HSPG else REGS
    options = [{**rule, "reg": copy.deepcopy(reg)} for rule in RULES[optimizer] for reg in regs]
    options += [{**each, "maximize": True, "count_nonzeros": True} for each in options[:2]]
    return [frame.OptimizerInput(None, each, str(each)) for each in options]


def optim_error_inputs(device, dtype):
    """What torch refuses for all optimizers, in our words where they differ, and what we refuse."""
    cases = frame.get_error_inputs_for_all_optims(device, dtype)
    for case in cases:
        case.error_regex = case.error_regex.replace("Tensor lr must be 1-element", "a tensor lr must have one element")
    for error, regex, params, options in REFUSED:
        wrong = frame.OptimizerInput(params, options)
        cases.append(frame.ErrorOptimizerInput(wrong, error_type=error, error_regex=regex))
    return cases


def info(optimizer):
    options = dict(supported_impls=("fused",), supports_fused_on=("cpu",), supports_complex=False)
    inputs = functools.partial(optim_inputs, optimizer)
    return frame.OptimizerInfo(
        optimizer, optim_inputs_func=inputs, optim_error_inputs_func=optim_error_inputs, **options
    )


INFOS = [info(optimizer) for optimizer in RULES]


@dataclass(frozen=True)
class Case:
    """One configuration of one optimizer, with kernels or without."""

    optimizer: type
    options: dict[str, Any]

    def __call__(self, params, **changes):
        return self.optimizer(params, **copy.deepcopy({**self.options, **changes}))

    @property
    def torch_twin(self):
        """Makes torch's optimizer with the same step; None with a regularizer, and for the paper's momentum."""
        paper = self.optimizer is LinBreg and "momentum" in self.options and "momentum_style" not in self.options
        if self.options["reg"] or paper or self.optimizer in (AveragedProxSGD, RMDA, RAMDA):
            return None
        options = {k: v for k, v in self.options.items() if k in ("lr", "momentum", "nesterov", "amsgrad", "maximize")}
        return functools.partial(
            torch.optim.Adam if self.optimizer in (AdaBreg, ProxAdam) else torch.optim.SGD, **options
        )


def for_every_case(*dtypes):
    """A test of (self, case, params, twins) runs for every optimizer, dtype and configuration; a failure names it."""

    def decorate(test):
        @functools.wraps(test)
        def run(self, dtype, optim_info, **parameters):
            for config in frame._get_optim_inputs_including_global_cliquey_kwargs("cpu", dtype, optim_info):
                case = Case(optim_info.optim_cls, config.kwargs)
                try:
                    test(self, case, weights(dtype), weights(dtype), **parameters)
                except Exception as error:
                    raise AssertionError(f"{optim_info.name}, {config.desc}: {error}") from error

        return frame.optims(INFOS, dtypes=list(dtypes or [F32]))(run)

    return decorate


def weights(dtype, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(registry.values(shape, dtype, generator, 0.3)) for shape in shapes]


def copied(params):
    return [Parameter(p.detach().clone()) for p in params]


def same(got, want, atol=0.0, rtol=0.0):
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def apart(optimizer):
    """How drivers and layouts may round."""
    if not (within := registry.apart(optimizer)):
        return {}
    dtype = optimizer.param_groups[0]["params"][0].dtype
    return {"atol": within, "rtol": torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0}


def train(params, steps, *optimizers, begin=0, missing={}, sign=1):  # noqa: B006
    """Gradients depend on step and place in `params` alone; `missing`: places without one, by step."""
    for number in range(begin, begin + steps):
        for i, p in enumerate(params):
            generator = torch.Generator().manual_seed(100 * number + i)
            grad = sign * torch.randn(p.shape, generator=generator, dtype=F64).to(p.dtype)
            laid_out = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype).copy_(grad)  # as the parameter
            p.grad = None if i in missing.get(number, ()) else laid_out if number % 2 else grad
        for optimizer in optimizers:
            optimizer.step()
    return optimizers[0]


def assert_continues(optimizer, params, other, twins, begin=2, **apart):
    """Three more steps of both give the same bits, and do something."""
    before = copied(params)
    train(params, 3, optimizer, begin=begin)
    train(twins, 3, other, begin=begin)
    same(params, twins, **apart)
    assert not any(map(torch.equal, params, before))


def through_file(data, weights_only=True):
    file = io.BytesIO()
    torch.save(data, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=weights_only)


def without(saved, *keys):
    groups = [{k: v for k, v in group.items() if k not in keys} for group in saved["param_groups"]]
    return copy.deepcopy({**saved, "param_groups": groups})


ROUND_TRIPS = {
    "memory": copy.deepcopy,
    "file": through_file,
    "older": lambda saved: without(saved, *FLAGS[1:], "delta", "momentum_style"),
    "older_step": lambda saved: copy.deepcopy(
        {**saved, "state": {i: {**state, "step": float(state["step"])} for i, state in saved["state"].items()}}
    ),
}
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
    "torch_save": functools.partial(through_file, weights_only=False),
}
SCHEDULERS = {
    **{name: functools.partial(lambda cls, args, opt: cls(opt, *args), getattr(lrs, name), args) for name, args in {
        "LambdaLR": [lambda step: 0.9**step], "MultiplicativeLR": [lambda step: 0.9], "StepLR": [2, 0.5],
        "MultiStepLR": [[1, 4], 0.5], "ConstantLR": [0.5, 3], "LinearLR": [0.25], "ExponentialLR": [0.8],
        "PolynomialLR": [5, 2.0], "CosineAnnealingLR": [4], "CosineAnnealingWarmRestarts": [3],
        "CyclicLR": [0.01, 0.2, 3], "OneCycleLR": [0.3, 8],  # these two cycle the momentum, or the first beta, too
        "ReduceLROnPlateau": ["min", 0.5, 1],
    }.items()},
    "SequentialLR": lambda opt: lrs.SequentialLR(opt, [lrs.LinearLR(opt, 0.1), lrs.ExponentialLR(opt, 0.5)], [3]),
    "ChainedScheduler": lambda opt: lrs.ChainedScheduler([lrs.ConstantLR(opt, 0.5, 2), lrs.ExponentialLR(opt, 0.9)]),
    "SWALR": lambda opt: swa_utils.SWALR(opt, swa_lr=0.02, anneal_epochs=4),
}  # fmt: skip


def test_every_scheduler_of_torch_is_listed():
    assert set(lrs.__all__) - {"LRScheduler"} == set(SCHEDULERS) - {"SWALR"}


class TestTorchContract(TestCase):
    @frame.optims(INFOS, dtypes=[F32])
    def test_errors(self, device, dtype, optim_info):
        good = weights(dtype)
        optimizer = optim_info.optim_cls(good[:2])
        for wrong in optim_info.optim_error_inputs_func(device, dtype):
            given, error = wrong.optimizer_error_input, wrong.error_type
            with (pytest.warns if issubclass(error, Warning) else pytest.raises)(error, match=wrong.error_regex):
                optim_info.optim_cls(good if given.params is None else given.params, **given.kwargs)
        with pytest.raises(TypeError, match=r"dtype torch\.complex64"):
            optimizer.add_param_group({"params": [torch.ones(2, dtype=torch.complex64)]})
        optimizer.add_param_group({"params": good[2:]})
        assert len(optimizer.param_groups) == 2

    @for_every_case()
    def test_defaults_rebuild_and_printing_names_every_option(self, case, params, twins):
        optimizer = case(params)
        printed = repr(optimizer)  # HSPG's start is None later
        assert_continues(optimizer, params, case.optimizer(twins, **optimizer.defaults), twins)
        assert printed.startswith(f"{case.optimizer.__name__} (\nParameter Group 0\n")
        assert all(f"    {k}: {v}\n" in printed for k, v in {**optimizer.defaults, **case.options}.items())

    @for_every_case()
    def test_two_groups_are_two_optimizers_also_when_one_comes_later(self, case, params, twins):
        options = {"lr": 0.125, "reg": GroupLasso(0.01) if case.optimizer is HSPG else L1(0.01)}
        optimizer, first = train(params[:2], 2, case(params[:2])), train(twins[:2], 2, case(twins[:2]))
        optimizer.add_param_group({"params": params[2:], **options})
        train(params, 3, optimizer, begin=2)
        train(twins, 3, first, case(twins[2:], **options), begin=2)
        same(params, twins)
        assert [int(optimizer.state[p]["step"]) for p in params] == [5, 5, 3]
        assert set(optimizer.param_groups[0]) == set(optimizer.param_groups[1])

    @for_every_case(F64)
    def test_without_a_regularizer_it_is_an_optimizer_of_torch(self, case, params, twins):
        if case.torch_twin:
            train(params, 7, case(params))
            train(twins, 7, case.torch_twin(twins))
            same(params, twins, atol=1e-13)  # a few roundings of values around 1 in each step

    @for_every_case(F32, F64, BF16, F16)
    def test_kernels_match_the_reference_with_layers_that_come_and_go(self, case, params, twins):
        missing = {2: (0, 1, 2), 3: (1,), 4: (1,), 5: (1,)}
        optimizer = train(params, 7, case(params), missing=missing)
        reference = train(twins, 7, case(twins, fused=False), missing=missing)
        # fp64: torch's roots, and sums in another order
        within = {"atol": 1e-12} if params[0].dtype == F64 else apart(optimizer)
        same(params, twins, **within)
        same([optimizer.state[p] for p in params], [reference.state[p] for p in twins], **within)

    @for_every_case()
    def test_a_missing_gradient_skips_that_parameter_alone(self, case, params, twins):
        missing = {0: (1,), 2: (0, 1, 2), 3: (0, 2), 4: (0,)}
        frozen = Parameter(torch.ones(3, 3), requires_grad=False)
        phases = {"start": 0, "end": None} if case.optimizer is HSPG else {}  # they count the group's steps
        optimizer = train(params, 6, case([*params, frozen], **phases), missing=missing)
        for i, twin in enumerate(twins):
            alone = case([twin], **phases)
            for number in (n for n in range(6) if i not in missing.get(n, ())):
                train(twins, 1, alone, begin=number)
        same([*params, frozen], [*twins, Parameter(torch.ones(3, 3))])
        assert [int(optimizer.state[p]["step"]) for p in params] == [3, 4, 4]
        assert frozen not in optimizer.state

    @for_every_case(F32, BF16)
    def test_memory_layout_changes_no_value_and_no_neighbour(self, case, params, twins):
        optimizer = train(twins, 3, case(twins))
        for layout in registry.LAYOUTS if case.options["fused"] else (*registry.LAYOUTS, "gaps"):
            buffers = [Buffer(p.detach(), layout) for p in params]
            views = [Parameter(buffer.view) for buffer in buffers]
            train(views, 3, case(views))
            same(views, twins, **apart(optimizer))
            assert all(buffer.intact() for buffer in buffers), layout

    @for_every_case()
    def test_empty_and_0_dim_parameters(self, case, params, twins):
        shapes, reg = [(0, 3), (6, 5), (4, 0, 3), (7, 2), (2, 0)], case.options["reg"]
        shapes = shapes if reg and reg.radial else [(), (0,), *shapes, ()]
        params, twins = weights(F32, shapes), weights(F32, shapes)
        shaped = [t.detach().view(t.shape or (1, 1)).requires_grad_() for t in twins]  # views: no dims become two
        optimizer, other = case(params), case([t for t in shaped if t.numel()])
        for number in range(3):
            train(params, 1, optimizer, begin=number)
            for p, t in zip(params, shaped):
                t.grad = p.grad.view_as(t)
            other.step()
        same(params, twins)
        assert all(int(optimizer.state[p]["step"]) == 3 for p in params)

    @for_every_case()
    def test_dtypes_mixed_in_one_group_are_one_optimizer_each(self, case, params, twins):
        params, twins = ([p for d in (F32, BF16, F64, F32, F16) for p in weights(d)] for _ in "ab")
        train(params, 3, case(params))
        train(twins, 3, *(case([t for t in twins if t.dtype == d]) for d in registry.DTYPES))
        same(params, twins)

    @for_every_case()
    def test_zero_gradients(self, case, params, twins):
        """With lr = 0 nothing changes (torch's distributed checkpoints make state so), nor what a dual determines."""
        for lr in (0.0, case.options["lr"]):
            params = copied(twins)
            optimizer, start, reg = case(params, lr=lr), copied(params), case.options["reg"]
            train(params, 1, optimizer, sign=0)
            if lr and reg and case.optimizer is ProxSGD:
                same(params, [Parameter(reg.prox(p.detach(), lr)) for p in start])
            if lr and reg and case.optimizer not in BREGMAN:
                continue
            assert all(torch.equal(p == 0, q == 0) for p, q in zip(params, start))
            same(params, start, atol=16 * torch.finfo(F32).eps)  # p0 -> dual -> p0, values up to 4
            train(params, 1, optimizer, sign=0)
            start = copied(params)
            train(params, 1, optimizer, sign=0)
            averages = case.optimizer in (AveragedProxSGD, RMDA, RAMDA)  # (1 - c) p + c p rounds
            same(params, start, atol=16 * torch.finfo(F32).eps if averages else 0)

    @for_every_case(F32, BF16)
    def test_maximize_negates_the_gradient(self, case, params, twins):
        train(params, 3, case(params, maximize=True))
        train(twins, 3, case(twins, maximize=False), sign=-1)
        same(params, twins)

    @for_every_case()
    def test_closures(self, case, params, twins):
        optimizer, other, calls = case(params), case(twins), []

        def evaluate(params, optimizer, set_to_none=True):
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad(set_to_none)
            (loss := sum((p**2).sum() for p in params)).backward()
            return loss

        for _ in range(3):
            loss = evaluate(twins, other, set_to_none=False)
            other.step()
            with torch.no_grad():
                same(optimizer.step(lambda: evaluate(params, optimizer)), loss)
        with pytest.raises(ZeroDivisionError):
            optimizer.step(lambda: 1 / 0)
        same(params, twins)
        assert calls == [True] * 6

    @for_every_case(F64)
    def test_gradients_accumulated_over_small_batches_are_those_of_a_big_one(self, case, params, twins):
        data = torch.randn(8, 5, dtype=F64)
        for p, batches in ((params[0], 1), (twins[0], 4)):
            optimizer = case([p])
            for _ in range(3):
                for batch in data.chunk(batches):
                    ((batch @ p.T).square().mean() / batches).backward()
                optimizer.step()
                optimizer.zero_grad()
        same(params, twins, atol=1e-12)

    @for_every_case()
    def test_a_tensor_lr_is_its_value_of_the_moment(self, case, params, twins):
        for lr in (torch.tensor(0.0625), torch.tensor([0.0625], dtype=F64)):
            sides = copied(params), copied(twins)
            optimizer, other = train(sides[0], 2, case(sides[0], lr=lr)), train(sides[1], 2, case(sides[1], lr=0.0625))
            optimizer.param_groups[0]["lr"].fill_(0.5)
            other.param_groups[0]["lr"] = 0.5
            assert_continues(optimizer, sides[0], other, sides[1])

    @parametrize("scheduler", sorted(SCHEDULERS))
    @for_every_case(F64)
    def test_schedulers(self, case, params, twins, scheduler):
        """As on the optimizer of torch, also when optimizer and scheduler are saved and loaded on the way."""
        style = {"momentum_style": "torch"} if case.optimizer is LinBreg else {}
        for lr in (0.25, torch.tensor(0.25, dtype=F64)) if case.torch_twin else ():
            ours, theirs, rates = case(params, lr=lr, **style), case.torch_twin(twins, lr=copy.deepcopy(lr)), []
            schedules = [SCHEDULERS[scheduler](each) for each in (ours, theirs)]
            for number in range(7):
                if number == 4:
                    saved = copy.deepcopy([ours.state_dict(), schedules[0].state_dict()])
                    ours = case(params, lr=lr, **style)
                    schedules[0] = SCHEDULERS[scheduler](ours)
                    ours.load_state_dict(saved[0])
                    schedules[0].load_state_dict(saved[1])
                train(params, 1, ours, begin=number)
                train(twins, 1, theirs, begin=number)
                for each in schedules:
                    each.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
                rates.append(tuple(float(each.param_groups[0]["lr"]) for each in (ours, theirs)))
            same(params, twins, atol=1e-12)
            assert all(a == b for a, b in rates)
            assert len(set(rates)) > 1

    @parametrize("way", sorted(ROUND_TRIPS))
    @for_every_case(F32, BF16)
    def test_a_loaded_optimizer_continues_bit_for_bit(self, case, params, twins, way):
        optimizer = train(params, 2, case(params))
        twins, saved = copied(params), ROUND_TRIPS[way](optimizer.state_dict())
        before = copy.deepcopy(saved)
        (other := case(twins)).load_state_dict(saved)
        older = way == "older"  # `fused` is among the options that it lacks
        assert_continues(optimizer, params, other, twins, **apart(optimizer) if older else {})
        same(saved["state"], before["state"])
        assert saved["param_groups"] == before["param_groups"]

    @for_every_case()
    def test_loading_adds_no_option(self, case, params, twins):
        saved = (optimizer := case(params)).state_dict()
        optimizer.load_state_dict(saved)
        assert optimizer.state_dict()["param_groups"] == saved["param_groups"]

    @for_every_case()
    def test_a_loaded_optimizer_shares_nothing_with_the_saved_one(self, case, params, twins):
        optimizer, other = train(params, 2, case(params)), case(twins)
        other.load_state_dict(optimizer.state_dict())
        train(params, 2, optimizer, begin=2)
        assert [int(other.state[t]["step"]) for t in twins] == [2, 2, 2]

    @for_every_case()
    def test_names_travel_with_the_state(self, case, params, twins):
        named, unnamed = train(params, 2, case(list(zip("abc", params)))), case(twins := copied(params))
        unnamed.load_state_dict(saved := copy.deepcopy(named.state_dict()))
        named.load_state_dict(without(saved, "param_names"))
        assert all(each.param_groups[0]["param_names"] == ["a", "b", "c"] for each in (named, unnamed))
        assert_continues(named, params, unnamed, twins)

    @parametrize("way", sorted(COPIES))
    @for_every_case(F32, BF16)
    def test_copies_continue_with_their_own_parameters(self, case, params, twins, way):
        optimizer = case(params)
        for begin in (0, 3):  # before the first step, and later
            other, twins = COPIES[way]((optimizer, params))
            assert_continues(optimizer, params, other, twins, begin)

    @for_every_case()
    def test_step_hooks(self, case, params, twins):
        optimizer, other, calls = case(params), case(twins), []
        handles = [
            register_optimizer_step_pre_hook(lambda *_: calls.append("global pre")),
            register_optimizer_step_post_hook(lambda *_: calls.append("global post")),
            optimizer.register_step_pre_hook(lambda *_: calls.append("pre")),
            optimizer.register_step_post_hook(lambda *_: calls.append("post")),
            optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, lambda: 7), kwargs)),
        ]
        assert optimizer.step() == 7  # the closure that the last hook put in
        other.step()
        for handle in handles:
            handle.remove()
        assert optimizer.step() is None
        assert calls == ["global pre", "pre", "post", "global post", "global pre", "global post"]

    @for_every_case()
    def test_state_dict_hooks(self, case, params, twins):
        optimizer, seen = case(params), []
        optimizer.register_state_dict_pre_hook(seen.append)
        optimizer.register_state_dict_post_hook(lambda optimizer, saved: {**saved, "epoch": 3})
        assert optimizer.state_dict()["epoch"] == 3
        assert seen == [optimizer]

    @for_every_case()
    def test_a_state_dict_post_hook_sees_what_is_saved(self, case, params, twins):
        optimizer, seen = case(params), []
        optimizer.register_state_dict_post_hook(lambda optimizer, saved: seen.append(copy.deepcopy(saved)))
        assert seen == [optimizer.state_dict()]

    @for_every_case()
    def test_what_a_load_pre_hook_returns_is_loaded(self, case, params, twins):
        optimizer, other = train(params, 2, case(params)), case(twins := copied(params))
        wanted = copy.deepcopy(optimizer.state_dict())
        other.register_load_state_dict_pre_hook(lambda optimizer, saved: wanted)
        other.load_state_dict({**copy.deepcopy(wanted), "state": {}})
        assert_continues(optimizer, params, other, twins)

    @for_every_case(BF16)
    def test_a_load_post_hook_has_the_last_word(self, case, params, twins):
        optimizer = train(params, 2, case(params))
        tensors = lambda: [t for p in params for t in optimizer.state[p].values()]  # noqa: E731
        optimizer.register_load_state_dict_post_hook(lambda optimizer: [t.fill_(2) for t in tensors()])
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert all(t.dtype != BF16 and bool((t == 2).all()) for t in tensors())

    @for_every_case()
    def test_averaged_weights_and_back(self, case, params, twins):
        """EMA and SWA; evaluating with the average, in place, leaves no trace in the training."""
        net = torch.nn.ParameterList(params)
        optimizer, other, seen = case(params), case(twins), []
        ema = swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.75))
        swa = swa_utils.AveragedModel(net)
        for number in range(4):
            train(params, 1, optimizer, begin=number)
            train(twins, 1, other, begin=number)
            seen.append(twins[0].detach().clone())
            ema.update_parameters(net)
            swa.update_parameters(net)
            kept = copy.deepcopy(net.state_dict())
            net.load_state_dict(ema.module.state_dict())
            net.load_state_dict(kept)
        same(params, twins)
        by_hand = [functools.reduce(lambda mean, value: 0.75 * mean + 0.25 * value, seen), sum(seen) / 4]
        same([ema.module[0].data, swa.module[0].data], by_hand, atol=1e-6)


instantiate_device_type_tests(TestTorchContract, globals(), only_for="cpu")
