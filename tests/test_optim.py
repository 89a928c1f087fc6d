"""The optimizers as a user meets them: masks, counts, changes between steps, bad input, checkpoints."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import dataclass

import pytest
import registry
import torch
from harness import same_bits, true_counts

from bregman_cuda import L1, AdaBreg, ElasticNet, GroupLasso, LinBreg, NonnegL1, ProxSGD, SparseGroupLasso, _backend
from bregman_cuda.regularizers import Separable

SHAPES = [(6, 5), (4, 3, 3, 3), (7, 2)]


def model(shapes=SHAPES, dtype=torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(registry.values(s, dtype, generator, 0.3)) for s in shapes]


def set_grads(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def train(optimizer, params, steps: int, begin: int = 0) -> None:
    for i in range(begin, begin + steps):
        set_grads(params, i)
        optimizer.step()


def snapshot(optimizer) -> list:
    """Bits of every parameter and state tensor, and all options."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        (i, k): v.clone() for i, p in enumerate(params) for k, v in optimizer.state.get(p, {}).items() if k != "step"
    }
    options = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return [[p.detach().clone() for p in params], state, options]


def assert_unchanged(optimizer, before: list) -> None:
    """Nothing the optimizer had has changed; state may have been created, at its initial value."""
    now = snapshot(optimizer)
    assert all(map(same_bits, now[0], before[0])), "a parameter changed"
    assert before[1].keys() <= now[1].keys()
    assert all(same_bits(now[1][key], value) for key, value in before[1].items()), "a state tensor changed"
    assert repr(now[2]) == repr(before[2]), "an option changed"


# Masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", registry.RULES)
def test_masked_entries_are_zero_in_parameter_and_state(driver, rule, dtype):
    params = model(dtype=dtype)
    params[1].data = params[1].data.to(memory_format=torch.channels_last)
    optimizer = registry.RULES[rule].make(params, L1(0.05), fused=driver.fused)
    train(optimizer, params, 2)
    masks = [torch.rand(p.shape) < 0.5 for p in params[:2]]
    for p, mask in zip(params, masks):
        optimizer.set_mask(p, mask)
        assert torch.equal(optimizer.get_mask(p), mask)
        assert bool((p[~mask] == 0).all()), "zero from now on, not from the next step"
    assert optimizer.get_mask(params[2]) is None
    train(optimizer, params, 3, begin=2)
    for p, mask in zip(params, masks):
        tensors = [p.detach(), *(v for k, v in optimizer.state[p].items() if k not in ("step", "mask"))]
        assert all(bool((t[~mask] == 0).all()) for t in tensors)
        assert bool((p[mask] != 0).any())


def test_a_released_entry_starts_at_zero_and_can_live_again(driver):
    for rule in registry.RULES:
        p = torch.nn.Parameter(torch.ones(10))
        optimizer = registry.RULES[rule].make([p], L1(0.01), fused=driver.fused, lr=0.5)
        mask = torch.arange(10) % 2 == 0
        optimizer.set_mask(p, mask)
        p.grad = torch.full((10,), -1.0)
        optimizer.step()
        optimizer.set_mask(p, None)
        assert optimizer.get_mask(p) is None
        assert bool((p[~mask] == 0).all())
        for _ in range(2):
            optimizer.step()
        assert bool((p[~mask] > 0).all()), rule


def test_a_mask_beats_a_nan_gradient(driver):
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = AdaBreg([p], reg=L1(0.1), fused=driver.fused)
    optimizer.set_mask(p, torch.tensor([True, False, True, False]))
    p.grad = torch.tensor([1.0, math.nan, math.nan, 1.0])
    optimizer.step()
    assert p.isnan().tolist() == [False, False, True, False]
    assert p[1] == 0
    assert p[3] == 0


def test_bad_masks_are_refused(driver):
    p, other = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(1))
    optimizer = LinBreg([p], fused=driver.fused)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"the mask has shape \(3, 2\), the parameter \(2, 3\)"):
        optimizer.set_mask(p, torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"must have dtype torch.bool, got torch.float32"):
        optimizer.set_mask(p, torch.ones(2, 3))
    with pytest.raises(KeyError, match="not a parameter of this optimizer"):
        optimizer.set_mask(other, None)
    assert_unchanged(optimizer, before)


def test_a_mask_follows_its_parameter_to_another_memory_format(driver):
    p = torch.nn.Parameter(torch.ones(2, 3, 2, 2))
    optimizer = LinBreg([p], reg=L1(0.01), fused=driver.fused)
    mask = torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    optimizer.set_mask(p, mask)
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    p.data = p.data.to(memory_format=torch.channels_last)
    optimizer.step()
    assert torch.equal(optimizer.get_mask(p), mask)
    assert torch.equal(p != 0, mask)

    twin = torch.nn.Parameter(torch.ones(2, 3, 2, 2).to(memory_format=torch.channels_last))
    loaded = LinBreg([twin], reg=L1(0.01), fused=driver.fused)
    loaded.load_state_dict(saved)
    assert torch.equal(loaded.get_mask(twin), mask)


# Counting


@pytest.mark.parametrize("reg", registry.PENALTIES)
def test_counts_are_those_of_the_final_parameters(driver, reg):
    params = model([(6, 5, 2), (3, 4, 3), (1, 2, 700), (0, 2, 3)], seed=3)
    case = registry.PENALTIES[reg]
    optimizer = AdaBreg(params, lr=0.1, reg=case(0.4), fused=driver.fused, count_nonzeros=True)
    counting = AdaBreg(
        copied := model([(6, 5, 2), (3, 4, 3), (1, 2, 700), (0, 2, 3)], seed=3),
        lr=0.1,
        reg=case(0.4),
        fused=driver.fused,
    )
    train(optimizer, params, 2)
    train(counting, copied, 2)
    for report in (optimizer.density(), counting.density()):
        assert [(r.nonzeros, r.nonzero_groups) for r in report.rows] == [true_counts(p, case()) for p in params]
        assert report.nonzeros == sum(int(torch.count_nonzero(p)) for p in params)
        assert report.density == report.nonzeros / report.numel == pytest.approx(1 - report.sparsity)


def test_density_rows_are_what_is_regularized_or_masked(driver):
    weight, bias, masked = model([(3, 4), (3,), (5,)])
    optimizer = LinBreg(
        [{"params": [("w", weight)], "reg": L1(0.1)}, {"params": [("b", bias), ("m", masked)]}],
        fused=driver.fused, count_nonzeros=True,
    )  # fmt: skip
    optimizer.set_mask(masked, torch.arange(5) < 3)
    train(optimizer, [weight, bias, masked], 1)
    report = optimizer.density()
    assert [(r.name, r.shape, r.numel) for r in report.rows] == [("w", (3, 4), 12), ("m", (5,), 5)]
    assert [r.nonzeros for r in report.rows] == [int(torch.count_nonzero(weight)), 3]
    assert report.all_numel == 20


def test_density_before_the_first_step_counts_now(driver):
    params = model()
    report = LinBreg(params, reg=L1(0.1), fused=driver.fused, count_nonzeros=True).density()
    assert [r.nonzeros for r in report.rows] == [int(torch.count_nonzero(p)) for p in params]


def test_counting_that_was_switched_off_leaves_nothing_stale(driver):
    params = model()
    optimizer = LinBreg(params, lr=5.0, reg=L1(0.1), fused=driver.fused, count_nonzeros=True)
    train(optimizer, params, 1)
    optimizer.param_groups[0]["count_nonzeros"] = False
    optimizer.param_groups[0]["reg"].lam = 20.0
    train(optimizer, params, 1, begin=1)
    optimizer.param_groups[0]["count_nonzeros"] = True
    assert [r.nonzeros for r in optimizer.density().rows] == [int(torch.count_nonzero(p)) for p in params]


# Changes between steps


CHANGES = {
    "lam": lambda group, params: setattr(group["reg"], "lam", 0.9),
    "penalty": lambda group, params: group.update(reg=ElasticNet(0.2, 0.5)),
    "to groups": lambda group, params: group.update(reg=GroupLasso(0.2, "out")),
    "to none": lambda group, params: group.update(reg=None),
    "lr": lambda group, params: group.update(lr=0.01),
    "tensor lr": lambda group, params: group.update(lr=torch.tensor(0.01)),
    "maximize": lambda group, params: group.update(maximize=True),
    "memory": lambda group, params: setattr(params[0], "data", params[0].data.clone()),
    "layout": lambda group, params: setattr(params[1], "data", params[1].data.to(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rule", registry.RULES)
def test_a_change_takes_effect_at_the_next_step(kernel_driver, rule, change):
    """Kernels with plans kept from before the change, against the reference, bit for bit."""
    sides = []
    for fused in (True, False):
        params = model()
        optimizer = registry.RULES[rule].make(params, L1(0.1), fused=fused)
        train(optimizer, params, 2)
        middle = [p.detach().clone() for p in params]
        CHANGES[change](optimizer.param_groups[0], params)
        train(optimizer, params, 2, begin=2)
        sides.append(params)
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(*sides))
    # ... and the change made a difference
    params = model()
    plain = registry.RULES[rule].make(params, L1(0.1), fused=False)
    train(plain, params, 2)
    assert all(map(torch.equal, middle, params))
    train(plain, params, 2, begin=2)
    assert all(map(torch.equal, sides[0], params)) == (change in ("memory", "layout"))


@pytest.mark.parametrize(("field", "value"), [("groups", "in"), ("weight", "none"), ("lam", 2.0)])
def test_a_group_regularizer_changed_in_place(kernel_driver, field, value):
    sides = []
    for fused in (True, False):
        params = model()
        optimizer = LinBreg(params, reg=GroupLasso(0.1), fused=fused, count_nonzeros=True)
        train(optimizer, params, 2)
        setattr(optimizer.param_groups[0]["reg"], field, value)
        train(optimizer, params, 2, begin=2)
        sides.append((params, [(r.nonzeros, r.nonzero_groups, r.groups) for r in optimizer.density().rows]))
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(sides[0][0], sides[1][0]))
    assert sides[0][1] == sides[1][1]


def test_momentum_switched_on_and_off(kernel_driver):
    for rule, classes in (("linbreg", LinBreg), ("proxsgd", ProxSGD)):
        sides = []
        for fused in (True, False):
            params = model(dtype=torch.bfloat16)
            optimizer = classes(params, lr=0.1, reg=L1(0.1), fused=fused)
            for i, momentum in enumerate((0.0, 0.9, 0.9, 0.0)):
                optimizer.param_groups[0]["momentum"] = momentum
                train(optimizer, params, 1, begin=i)
            sides.append(params)
        assert all(same_bits(a.detach(), b.detach()) for a, b in zip(*sides)), rule


def test_a_parameter_without_gradient_sits_out(driver):
    params = model()
    optimizer = AdaBreg(params, reg=L1(0.1), fused=driver.fused)
    train(optimizer, params, 1)
    set_grads(params, 1)
    params[1].grad = None
    before = params[1].detach().clone(), {k: v.clone() for k, v in optimizer.state[params[1]].items()}
    optimizer.step()
    assert torch.equal(params[1], before[0])
    assert all(torch.equal(optimizer.state[params[1]][k], v) for k, v in before[1].items())
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 1, 2]
    optimizer.zero_grad()
    frozen = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(map(torch.equal, params, frozen))


def test_several_groups_each_with_its_own_options(driver):
    params = model()
    lone = model()
    optimizer = LinBreg(
        [{"params": params[:1], "reg": L1(0.2), "lr": 0.5}, {"params": params[1:], "delta": 0.5}], fused=driver.fused
    )
    parts = [
        LinBreg(lone[:1], lr=0.5, reg=L1(0.2), fused=driver.fused),
        LinBreg(lone[1:], delta=0.5, fused=driver.fused),
    ]
    train(optimizer, params, 3)
    for i in range(3):
        set_grads(lone, i)
        for part in parts:
            part.step()
    assert all(map(torch.equal, params, lone))
    optimizer.add_param_group({"params": model([(3,)], seed=9), "lr": 0.3})
    assert optimizer.param_groups[2]["delta"] == 1.0
    train(optimizer, [*params, *optimizer.param_groups[2]["params"]], 1)


def test_versions_increase_so_that_autograd_notices(driver):
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    optimizer = LinBreg([p], fused=driver.fused)
    p.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closure_and_schedulers(driver):
    p = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = ProxSGD([p], lr=0.1, reg=L1(0.01), fused=driver.fused)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == 9.0
    assert calls == [True]
    assert float(p) == pytest.approx(3 - 0.1 * 6 - 0.001)
    schedule.step()
    optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert not p.grad.requires_grad


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
    (LinBreg, {"momentum": 1.0}, ValueError, r"momentum must be < 1, got 1.0"),
    (LinBreg, {"momentum": -0.5}, ValueError, r"momentum must be .*got -0.5"),
    (ProxSGD, {"momentum": math.nan}, ValueError, r"ProxSGD: momentum must be .*got nan"),
    (LinBreg, {"momentum_style": "nesterov"}, ValueError, r"momentum_style must be 'paper' or 'torch', got 'nesterov'"),
    (AdaBreg, {"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be < 1, got 1.0"),
    (AdaBreg, {"betas": (-0.1, 0.9)}, ValueError, r"betas\[0\] must be .*got -0.1"),
    (AdaBreg, {"betas": 0.9}, ValueError, r"betas must be a pair, got 0.9"),
    (AdaBreg, {"eps": -1e-8}, ValueError, r"eps must be .*got -1e-08"),
    (LinBreg, {"reg": "l1"}, TypeError, r"reg must be None or a regularizer such as bregman_cuda.L1.*got 'l1'"),
    (LinBreg, {"reg": L1}, TypeError, r"reg must be None or a regularizer"),
    (LinBreg, {"fused": "yes"}, ValueError, r"fused must be True, False or None, got 'yes'"),
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


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_parameters_that_cannot_be_trained_are_refused(dtype):
    bad = torch.ones(2).to(dtype)
    if dtype == torch.complex64:
        bad.requires_grad_()
    with pytest.raises(TypeError, match=rf"LinBreg: parameter 'scale' has (unsupported )?dtype {dtype}"):
        LinBreg([("ok", torch.ones(1)), ("scale", bad)])


def sparse_like(p: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(p).to_sparse()


def nan_like(p: torch.Tensor) -> torch.Tensor:
    grad = torch.zeros_like(p)
    grad.view(-1)[-1] = torch.nan
    return grad


@pytest.mark.parametrize("warm", [False, True], ids=["first step", "later step"])
@pytest.mark.parametrize(("bad", "error", "message"), [
    (sparse_like, RuntimeError, r"LinBreg does not support sparse gradients: parameter 'emb'; use sparse=False"),
    (nan_like, FloatingPointError, r"gradient of parameter 'emb' has NaN or Inf; nothing was changed"),
])  # fmt: skip
def test_a_bad_gradient_in_the_last_group_changes_nothing_in_the_first(driver, warm, bad, error, message):
    params = model([(4, 3), (5,), (6, 2)])
    groups = [{"params": [("w", params[0]), ("b", params[1])], "reg": L1(0.1)}, {"params": [("emb", params[2])]}]
    optimizer = LinBreg(groups, fused=driver.fused, check_finite=True)
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
    with pytest.warns(UserWarning, match=r"no compiled cpu kernels \(it was not compiled\); using the slower"):
        LinBreg([p], lr=1.0, fused=None).step()
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


# Checkpoints


@pytest.mark.parametrize("dtype", registry.DTYPES, ids=str)
@pytest.mark.parametrize("rule", registry.RULES)
def test_state_dict_continues_bit_for_bit(driver, rule, dtype):
    params = model(dtype=dtype)
    reg = SparseGroupLasso(0.2, 0.3, "out")
    optimizer = registry.RULES[rule].make(params, reg, fused=driver.fused)
    optimizer.set_mask(params[0], torch.rand(params[0].shape) < 0.7)
    train(optimizer, params, 2)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], file)
    file.seek(0)
    state, values = torch.load(file, weights_only=True)
    twins = [torch.nn.Parameter(v) for v in values]
    other = registry.RULES[rule].make(twins, SparseGroupLasso(9.0), fused=driver.fused)
    other.load_state_dict(state)
    assert other.param_groups[0]["reg"] == reg
    for p, twin in zip(params, twins):
        assert {k: v.dtype for k, v in optimizer.state[p].items()} == {k: v.dtype for k, v in other.state[twin].items()}
    train(optimizer, params, 3, begin=2)
    train(other, twins, 3, begin=2)
    assert all(same_bits(p.detach(), twin.detach()) for p, twin in zip(params, twins))


def test_a_held_regularizer_stays_live_after_loading(driver):
    mine = L1(0.5)
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = LinBreg([p], reg=mine, fused=driver.fused)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["reg"]["lam"] = 0.125
    optimizer.load_state_dict(saved)
    assert mine.lam == 0.125
    assert optimizer.param_groups[0]["reg"] is mine
    assert saved["param_groups"][0]["reg"] == {"regularizer": "L1", "lam": 0.125}


def test_a_copied_optimizer_steps_its_own_parameters(driver):
    params = model()
    optimizer = AdaBreg(params, reg=NonnegL1(0.1), fused=driver.fused)
    train(optimizer, params, 2)
    holder = copy.deepcopy({"params": params, "optimizer": optimizer})
    before = [p.detach().clone() for p in params]
    train(holder["optimizer"], holder["params"], 1, begin=2)
    assert all(map(torch.equal, params, before))
    train(optimizer, params, 1, begin=2)
    assert all(map(torch.equal, params, holder["params"]))
