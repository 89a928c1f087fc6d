"""Bad options, parameters and gradients: an error that names them, and nothing changed."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from small import assert_unchanged, model, set_grads, snapshot, train

from bregman_cuda import (
    HSPG,
    L1,
    MCP,
    RAMDA,
    RMDA,
    AdaBreg,
    AveragedProxSGD,
    GroupEnvelope,
    GroupLasso,
    LinBreg,
    Nuclear,
    ProxAdam,
    ProxSGD,
    Restarts,
    SparseGroupLasso,
    SplitLBI,
    _backend,
)
from bregman_cuda.regularizers import Separable

# Bad input


BAD_OPTIONS = [
    (LinBreg, {"lr": -0.1}, ValueError, r"LinBreg: lr must be finite and >= 0, got -0.1"),
    (LinBreg, {"lr": math.nan}, ValueError, r"lr must be .*got nan"),
    (LinBreg, {"lr": math.inf}, ValueError, r"lr must be .*got inf"),
    (LinBreg, {"lr": "0.1"}, TypeError, r"lr must be a number, got '0.1'"),
    (LinBreg, {"lr": torch.tensor(-1.0)}, ValueError, r"lr must be .*got -1"),
    (LinBreg, {"lr": torch.ones(2)}, ValueError, r"a tensor lr must have one element, got shape \(2,\)"),
    (LinBreg, {"delta": 0.0}, ValueError, r"delta must be > 0, got 0.0"),
    (LinBreg, {"delta": -1.0}, ValueError, r"delta must be .*got -1"),
    (AdaBreg, {"delta": math.nan}, ValueError, r"AdaBreg: delta must be .*got nan"),
    (LinBreg, {"delta": torch.tensor(-1.0)}, ValueError, r"delta must be .*got -1"),
    (LinBreg, {"delta": torch.ones((), device="meta")}, ValueError, r"delta must be .* on the CPU, got one on meta"),
    (LinBreg, {"momentum": 1.0}, ValueError, r"momentum must be < 1, got 1.0"),
    (LinBreg, {"momentum": -0.5}, ValueError, r"momentum must be .*got -0.5"),
    (ProxSGD, {"momentum": math.nan}, ValueError, r"ProxSGD: momentum must be .*got nan"),
    (LinBreg, {"momentum_style": "nesterov"}, ValueError, r"momentum_style must be 'paper' or 'torch', got 'nesterov'"),
    (AdaBreg, {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be < 1, got 1.0"),
    (AdaBreg, {"betas": (-0.1, 0.9)}, ValueError, r"betas\[0\] must be .*got -0.1"),
    (AdaBreg, {"betas": 0.9}, ValueError, r"betas must be a pair, got 0.9"),
    (AdaBreg, {"eps": -1e-8}, ValueError, r"eps must be .*got -1e-08"),
    (ProxAdam, {"betas": (0.9, math.nan)}, ValueError, r"ProxAdam: betas\[1\] must be .*got nan"),
    (ProxAdam, {"weight_decay": -0.1}, ValueError, r"ProxAdam: weight_decay must be .*got -0.1"),
    (ProxAdam, {"amsgrad": 1}, TypeError, r"ProxAdam: amsgrad must be True or False, got 1"),
    (ProxAdam, {"bias_correction": "adam"}, ValueError, r"must be one of 'consistent', 'proxgen', .*got 'adam'"),
    (RMDA, {"momentum": 0.0}, ValueError, r"RMDA: momentum must be > 0, got 0.0"),
    (RMDA, {"momentum": 1.5}, ValueError, r"RMDA: momentum must be .*between 0 and 1, got 1.5"),
    (RMDA, {"momentum": torch.tensor(5.0)}, ValueError, r"RMDA: momentum must be .*between 0 and 1, got 5.0"),
    (RMDA, {"lr": -0.1}, ValueError, r"RMDA: lr must be .*got -0.1"),
    (RAMDA, {"momentum": math.nan}, ValueError, r"RAMDA: momentum must be .*got nan"),
    (RAMDA, {"eps": -1.0}, ValueError, r"RAMDA: eps must be .*got -1.0"),
    (RAMDA, {"solver": "x"}, ValueError, r"RAMDA: solver must be 'exact' or 'pg', got 'x'"),
    (RAMDA, {"solver": "pg", "max_iters": 0}, ValueError, r"RAMDA: max_iters must be an integer >= 1, got 0"),
    (RAMDA, {"max_iters": True}, ValueError, r"RAMDA: max_iters must be an integer >= 1, got True"),
    (RAMDA, {"max_iters": 1.5}, ValueError, r"RAMDA: max_iters must be an integer >= 1, got 1.5"),
    (RAMDA, {"rtol": -1}, ValueError, r"RAMDA: rtol must be .*got -1"),
    (RAMDA, {"rtol": math.nan}, ValueError, r"RAMDA: rtol must be .*got nan"),
    (AveragedProxSGD, {"rho": 0.0}, ValueError, r"AveragedProxSGD: rho must be > 0, got 0.0"),
    (AveragedProxSGD, {"beta": 1.0}, ValueError, r"AveragedProxSGD: beta must be < 1, got 1.0"),
    (AveragedProxSGD, {"powers": 0.5}, ValueError, r"AveragedProxSGD: powers must be a pair, got 0.5"),
    (AveragedProxSGD, {"powers": (0.5, -1.0)}, ValueError, r"AveragedProxSGD: powers\[1\] must be .*got -1.0"),
    (SplitLBI, {"mu": torch.tensor(-1.0)}, ValueError, r"SplitLBI: mu must be finite and > 0, got -1.0"),
    (SplitLBI, {"kappa": torch.tensor(0.0)}, ValueError, r"SplitLBI: kappa must be finite and > 0, got 0.0"),
    (LinBreg, {"reg": "l1"}, TypeError, r"reg must be None or a regularizer such as bregman_cuda.L1.*got 'l1'"),
    (LinBreg, {"reg": L1}, TypeError, r"reg must be None or a regularizer"),
    (LinBreg, {"fused": "yes"}, ValueError, r"fused must be True, False or None, got 'yes'"),
    (LinBreg, {"maximize": "False"}, ValueError, r"LinBreg: maximize must be True or False, got 'False'"),
    (ProxSGD, {"check_finite": None}, ValueError, r"ProxSGD: check_finite must be True or False, got None"),
    (
        LinBreg,
        {"reg": GroupLasso(0.1, "kernel"), "params": [torch.ones(3)]},
        ValueError,
        r"parameter 0 of shape \(3,\).*does not fit",
    ),
]


@pytest.mark.parametrize(("optimizer", "options", "error", "message"), BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_bad_options_are_refused_when_made_and_when_added(optimizer, options, error, message):
    options = dict(options)
    params = options.pop("params", [torch.nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(error, match=message):
        optimizer(params, **options)
    good = optimizer([torch.nn.Parameter(torch.ones(2))])
    before = snapshot(good)
    with pytest.raises(error, match=message):
        good.add_param_group({"params": params, **options})
    assert len(good.param_groups) == 1
    assert_unchanged(good, before)


def test_numbers_of_numpy_are_taken_and_kept_as_pythons(tmp_path):
    """Schedulers set them, too; a state dict with them in it would not load with weights_only=True."""
    numpy = pytest.importorskip("numpy")
    params = model()
    reg = GroupLasso(numpy.float32(0.1), groups=(numpy.int64(0),))
    flags = dict(maximize=numpy.bool_(False), check_finite=numpy.bool_(True), fused=numpy.bool_(False))
    optimizer = AdaBreg(params, numpy.float32(0.1), reg, numpy.int64(2), (numpy.float64(0.9), 0.99), **flags)
    twins = model()
    twin_reg = GroupLasso(float(numpy.float32(0.1)), (0,))
    twin = AdaBreg(twins, float(numpy.float32(0.1)), twin_reg, 2, (0.9, 0.99), check_finite=True, fused=False)
    for made in (optimizer, twin):
        train(made, made.param_groups[0]["params"], 2)
        made.param_groups[0]["reg"].lam = numpy.float64(0.2)
        made.param_groups[0]["lr"] = numpy.float16(0.5)
    optimizer.param_groups[0]["max_lr"] = numpy.float32(3)
    optimizer.param_groups[0]["theirs"] = theirs = [numpy.float32(3)]
    torch.save(optimizer.state_dict(), tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)["param_groups"][0]
    kinds = {name: type(saved[name]) for name in ("lr", "delta", "max_lr", "maximize", "check_finite")}
    assert kinds == dict(lr=float, delta=int, max_lr=float, maximize=bool, check_finite=bool)
    assert [saved["lr"], *map(type, saved["betas"])] == [0.5, float, float]
    assert saved["reg"] == dict(regularizer="GroupLasso", lam=0.2, groups=(0,), weight="sqrt_size")
    for made in (optimizer, twin):
        train(made, made.param_groups[0]["params"], 1)
    assert all(map(torch.equal, params, twins))
    assert type(optimizer.param_groups[0]["lr"]) is float
    assert optimizer.param_groups[0]["theirs"] is theirs, "a step leaves the entries of others alone"
    assert optimizer.param_groups[0]["fused"] is False
    envelope = GroupEnvelope(0.1, k=numpy.int64(2), weight=numpy.ones(4))
    assert (type(envelope.k), envelope.weight) == (int, (1.0,) * 4)
    nuclear = Nuclear(numpy.float64(1.0), every=numpy.int32(2))
    assert [(type(v), v) for v in (nuclear.lam, nuclear.every)] == [(float, 1.0), (int, 2)]
    assert HSPG(model(), 0.1, reg, k=numpy.int64(2), end=numpy.int64(5)).param_groups[0]["k"] == 2


def test_counts_of_numpy_are_taken_and_kept_as_pythons():
    numpy = pytest.importorskip("numpy")
    schedule = Restarts(RMDA(model(), reg=L1(0.1)), [numpy.int64(3), 5], patience=numpy.uint8(2))
    assert [type(n) for n in (*schedule.milestones, schedule.patience)] == [int] * 3
    p = torch.nn.Parameter(torch.eye(4))
    HSPG([p], reg=GroupLasso(0.1)).keep_top(numpy.int32(3))
    assert int(p.any(1).sum()) == 3


@pytest.mark.parametrize("bad", [Fraction(1, 3), Decimal("0.1")])
def test_a_number_that_a_float_does_not_hold_is_refused_with_a_remedy(bad):
    for make in (lambda: LinBreg(model(), lr=bad), lambda: L1(bad)):
        with pytest.raises(TypeError, match=rf"(lr|lam) must be a number, got {re.escape(repr(bad))}; use float\("):
            make()
    assert LinBreg(model(), lr=Fraction(1, 4)).param_groups[0]["lr"] == 0.25


def test_a_bad_lr_set_before_the_first_step_is_refused_by_name():
    params = model()
    optimizer = LinBreg(params)
    optimizer.param_groups[0]["lr"] = "fast"
    set_grads(params, 0)
    with pytest.raises(TypeError, match=r"LinBreg: lr must be .*got 'fast'"):
        optimizer.step()
    assert not optimizer.state


def test_an_entry_of_a_group_that_looks_like_an_option_is_warned_of():
    entries = {"lamda": 0.1, "momentun": 0.9, "max_momentum": 0.9, "weight_decay": 0.1, "name": "x", 3: 4}
    with pytest.warns(UserWarning, match="LinBreg has no option") as caught:
        optimizer = LinBreg([{"params": model(), **entries}])
    assert [str(warning.message) for warning in caught] == [
        "LinBreg has no option 'lamda': that entry of a parameter group does nothing. "
        "Is 'reg', such as reg=L1(lam=0.1), meant?",
        "LinBreg has no option 'momentun': that entry of a parameter group does nothing. Is 'momentum' meant?",
    ]
    assert {warning.filename for warning in caught} == {__file__}
    assert optimizer.param_groups[0].items() >= entries.items()  # as in torch
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="lamda"):
            optimizer.add_param_group({"params": model(), "lamda": 0.1})
    assert len(optimizer.param_groups) == 1
    with pytest.warns(UserWarning, match=r"'beta'.* Is 'betas' meant\?"):
        AdaBreg([{"params": model(), "beta": 0.9}])
    for kind in (AdaBreg, HSPG, RAMDA, ProxAdam):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other = kind(model(), 0.1)
            torch.optim.lr_scheduler.OneCycleLR(other, 0.1, total_steps=9, cycle_momentum=False)
            kind([{**other.param_groups[0], "params": model()}], 0.1)


def test_a_lazy_layer_is_refused_by_number():
    layer = torch.nn.LazyLinear(3)
    with pytest.raises(ValueError, match=r"LinBreg: parameter 1 has no shape yet .*run a batch through"):
        LinBreg([torch.nn.Parameter(torch.ones(2)), *layer.parameters()], reg=L1(0.1))


@pytest.mark.parametrize(("optimizer", "options", "error", "message"), BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_bad_options_set_between_steps_are_refused_before_anything_changes(driver, optimizer, options, error, message):
    options = dict(options)
    shape = (3,) if options.pop("params", None) else (2, 2)
    params = model([(5,), shape])
    made = optimizer([{"params": params[:1]}, {"params": params[1:]}], fused=driver.fused)
    train(made, params, 2)
    made.param_groups[1].update(options)
    set_grads(params, 5)
    before = snapshot(made)
    with pytest.raises(error, match=message.replace("parameter 0", "parameter .")):
        made.step()
    assert_unchanged(made, before)


BAD_LAMS = [math.nan, -1.0, math.inf]


@pytest.mark.parametrize("bad", BAD_LAMS)
def test_a_tensor_on_the_cpu_is_read_like_a_number(bad):
    for make in (L1, GroupLasso, lambda lam: MCP(1.0, lam)):
        with pytest.raises(ValueError, match=rf"must be finite and >=? 0, got {bad}"):
            make(torch.tensor(bad))
    with pytest.raises(ValueError, match=r"MCP: gamma must be a number or a tensor on the CPU, got one on meta"):
        MCP(1.0, torch.ones((), device="meta"))
    assert L1(torch.ones((), device="meta")).lam.device.type == "meta"  # reading it would synchronise


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("bad", BAD_LAMS)
@pytest.mark.parametrize("make", [L1, GroupLasso, SparseGroupLasso, lambda lam: GroupEnvelope(lam, 2)])
def test_a_lam_that_changes_in_place_is_refused_before_anything_changes(driver, make, bad, capturable):
    params, lam = model(), torch.tensor(0.1)
    groups = [{"params": params[:1]}, {"params": params[1:], "reg": make(lam)}]
    optimizer = ProxSGD(groups, lr=0.1, capturable=capturable, fused=driver.fused)
    train(optimizer, params, 2)
    lam.fill_(bad)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"lam must be finite and >= 0, got {bad}"):
        train(optimizer, params, 1)
    assert_unchanged(optimizer, before)
    lam.fill_(0.1)
    train(optimizer, params, 1)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("make", [LinBreg, AdaBreg, ProxSGD, ProxAdam, RMDA, SplitLBI])
def test_a_lam_that_is_nan_where_nobody_reads_it_makes_nan_and_no_zeros(driver, make, capturable, monkeypatch):
    """As on a device: L1's clamp compares with it, and x - x is 0."""
    assert L1(torch.ones((), device="meta")).nan_or_one().dtype == torch.float64
    params = model()
    optimizer = make(params, lr=0.1, reg=L1(0.1), capturable=capturable, fused=driver.fused)
    train(optimizer, params, 1)
    assert not any(bool(p.isnan().any()) for p in params)
    monkeypatch.setattr(L1, "nan_or_one", lambda self: torch.tensor(math.nan, dtype=torch.float64))
    train(optimizer, params, 1)
    assert all(bool(p.isnan().all()) for p in params)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_parameters_that_cannot_be_trained_are_refused(dtype):
    bad = torch.ones(2).to(dtype)
    if dtype == torch.complex64:
        bad.requires_grad_()
    remedy = "; train it in float32" if dtype == torch.float8_e4m3fn else "; only real floating-point"
    with pytest.raises(TypeError, match=rf"LinBreg: parameter 'scale' has (unsupported )?dtype {dtype}{remedy}"):
        LinBreg([("ok", torch.ones(1)), ("scale", bad)])


@pytest.mark.parametrize(("bad", "error", "message"), [
    (torch.zeros(1).expand(5), ValueError, r"'scale' has elements that share memory \(strides \(0,\).*; clone\(\) it"),
    (torch.zeros(3, 1).expand(3, 2), ValueError, r"'scale' has elements that share memory \(strides \(1, 0\)"),
    (torch.zeros(3).to_sparse(), TypeError, r"'scale' has layout torch.sparse_coo; train a dense one: to_dense\(\)"),
], ids=["a number", "columns", "sparse"])  # fmt: skip
def test_parameters_that_no_step_can_write_are_refused_when_added(bad, error, message):
    """They would fail in mid-step, when others have changed."""
    bad = torch.nn.Parameter(bad)
    with pytest.raises(error, match=rf"AdaBreg: parameter {message}"):
        AdaBreg([("ok", torch.nn.Parameter(torch.ones(1))), ("scale", bad)])
    optimizer = AdaBreg(model())
    train(optimizer, optimizer.param_groups[0]["params"], 1)
    before = snapshot(optimizer)
    with pytest.raises(error, match=message.replace("'scale'", r"AdaBreg: parameter 0 of shape \(.*\)")):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1
    assert_unchanged(optimizer, before)


def test_strides_of_zero_where_nothing_is_shared_are_fine(driver):
    params = [
        torch.nn.Parameter(torch.zeros(4, 1).expand(4, 0)),
        torch.nn.Parameter(torch.ones(1).as_strided((1, 1), (0, 0))),
    ]
    train(LinBreg(params, fused=driver.fused), params, 2)


def sparse_like(p: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(p).to_sparse()


def nan_like(p: torch.Tensor) -> torch.Tensor:
    grad = torch.zeros_like(p)
    grad.view(-1)[-1] = torch.nan
    return grad


@pytest.mark.parametrize("warm", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize(("bad", "check_finite", "error", "message"), [
    *[(sparse_like, check, RuntimeError, "LinBreg does not support sparse gradients: parameter 'emb'; use sparse=False")
      for check in (False, True)],
    (nan_like, True, FloatingPointError, r"gradient of parameter 'emb' has NaN or Inf; nothing was changed"),
])  # fmt: skip
def test_a_bad_gradient_in_the_last_group_changes_nothing_in_the_first(driver, warm, bad, check_finite, error, message):
    params = model([(4, 3), (5,), (6, 2)])
    groups = [{"params": [("w", params[0]), ("b", params[1])], "reg": L1(0.1)}, {"params": [("emb", params[2])]}]
    optimizer = LinBreg(groups, fused=driver.fused, check_finite=check_finite)
    if warm:
        train(optimizer, params, 2)
    set_grads(params, 7)
    good = params[2].grad
    params[2].grad = bad(params[2])
    before = snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_unchanged(optimizer, before)
    params[2].grad = good  # and it goes on as if nothing had happened
    optimizer.step()
    twins = model([(4, 3), (5,), (6, 2)])
    twin = LinBreg([{"params": twins[:2], "reg": L1(0.1)}, {"params": twins[2:]}], fused=driver.fused)
    if warm:
        train(twin, twins, 2)
    set_grads(twins, 7)
    twin.step()
    assert all(map(torch.equal, params, twins))


@pytest.mark.parametrize("warm", [False, True], ids=["first step", "later step"])
def test_a_sparse_gradient_in_a_group_of_its_own_changes_nothing(driver, warm):
    """torch refuses it to the op, where it is the only one."""
    params = model([(4, 3), (6, 2)])
    optimizer = AdaBreg([("w", params[0]), ("emb", params[1])], reg=L1(0.1), fused=driver.fused)
    if warm:
        train(optimizer, params, 2)
    set_grads(params, 7)
    params[1].grad = sparse_like(params[1])
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="AdaBreg does not support sparse gradients: parameter 'emb'"):
        optimizer.step()
    assert_unchanged(optimizer, before)


def test_a_sparse_gradient_in_a_group_that_steps_already_makes_no_state_of_another(driver):
    params = model([(4, 3), (6, 2)])
    optimizer = AdaBreg([{"params": [p]} for p in params], fused=driver.fused)
    train(optimizer, params[:1], 2)
    assert params[1] not in optimizer.state
    set_grads(params, 7)
    params[0].grad = sparse_like(params[0])
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="AdaBreg does not support sparse gradients: parameter 0 of shape"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    assert params[1] not in optimizer.state


@pytest.mark.parametrize(("name", "change"), [
    ("lr", lambda value: value.neg_()), ("betas", lambda value: value.__setitem__(1, 1.5)),
])  # fmt: skip
def test_an_option_that_changes_in_place_is_seen(driver, name, change):
    params, options = model(), {"lr": torch.tensor(0.1), "betas": [0.9, 0.99]}
    optimizer = AdaBreg([{"params": params, name: options[name]}], fused=driver.fused)
    train(optimizer, params, 3)
    change(optimizer.param_groups[0][name])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"AdaBreg: {name}.* must be .* got (-0.1|1.5)"):
        train(optimizer, params, 1)
    assert_unchanged(optimizer, before)


def test_infinity_is_not_finite_and_without_the_check_it_goes_through(driver):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = LinBreg([p], fused=driver.fused, check_finite=True)
    p.grad = torch.tensor([math.inf, 0.0])
    with pytest.raises(FloatingPointError, match=r"parameter 0 of shape \(2,\)"):
        optimizer.step()
    optimizer.param_groups[0]["check_finite"] = False
    optimizer.step()
    assert p.tolist() == [-math.inf, 1.0]


def test_fused_true_without_kernels_names_the_parameter_and_the_reason(monkeypatch):
    monkeypatch.setattr(_backend, "_load", lambda device: (None, "it was not compiled"))
    _backend._warn_once.cache_clear()
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"fused=True, but parameter 'w' cannot use kernels: it was not compiled"):
        LinBreg([("w", p)], fused=True).step()
    assert p.tolist() == [1.0, 1.0, 1.0]
    with pytest.warns(UserWarning, match=r"no compiled cpu kernels \(it was not compiled\); using the slower") as seen:
        LinBreg([p], lr=1.0, fused=None).step()
    assert seen[0].filename == __file__
    assert p.tolist() == [0.0, 0.0, 0.0]


@dataclass
class Foreign(Separable):
    """A penalty without a kernel."""

    kernel = "foreign"

    def parameters(self):
        return {}

    def _scalar_prox(self, x, scale):
        return x * 0.5

    def _slope(self, x):
        return torch.zeros_like(x)


def test_a_penalty_without_a_kernel_uses_the_reference(kernel_driver):
    """Also when it comes between two steps, in the second of two groups."""
    for first in (Foreign(), L1(0.1)):
        params = model([(4,), (5,)])
        optimizer = LinBreg([{"params": params[:1]}, {"params": params[1:], "reg": first}], lr=0.0, fused=None)
        train(optimizer, params, 1)
        optimizer.param_groups[1]["reg"] = Foreign()
        dual = optimizer.state[params[1]]["dual"].clone()
        train(optimizer, params, 1)
        assert torch.equal(params[1], dual * 0.5)
        optimizer.param_groups[1]["fused"] = True
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match="penalty 'foreign' is not compiled in"):
            optimizer.step()
        assert_unchanged(optimizer, before)
