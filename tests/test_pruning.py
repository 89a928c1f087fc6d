"""prune_by_order: the last to enter go first."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from harness import same_bits
from split_net import batch, biases_with_twins, recorded, run
from torch import nn

from bregman_cuda import (
    L1,
    ActivationPath,
    SplitLBI,
    masked,
    param_groups,
    prune_by_order,
)


@pytest.mark.parametrize(
    ("percent", "kept"),
    [
        (0, [0, 1, 2, 3, 4, 5]),
        (8, [0, 1, 2, 3, 4, 5]),  # round(0.48) = 0
        (9, [0, 1, 3, 4, 5]),
        (17, [0, 1, 3, 4, 5]),
        (33, [0, 1, 3, 4]),
        (50, [0, 3, 4]),
        (75, [0, 3]),  # round(4.5) = 4
        (80, [0]),
        (100, []),
    ],
)
def test_exactly_the_percentage_goes_last_come_first(percent, kept):
    model, _, path = recorded()
    before = model.a.weight.detach().clone()
    masks = prune_by_order(path, percent, "a.weight")
    assert masks["a.weight"].flatten(1).all(1).nonzero().flatten().tolist() == kept
    assert torch.equal(masks["a.weight"].flatten(1).any(1), masks["a.weight"].flatten(1).all(1))
    assert same_bits(model.a.weight.detach(), torch.where(masks["a.weight"], before, torch.zeros(())))
    assert {*masks} == {"a.weight"}


def test_zero_percent_keeps_every_linear_weight():
    """The toolbox zeroes some even so (slbi.md 4.9)."""
    model, _, path = recorded()
    before = model.fc.weight.detach().clone()
    masks = prune_by_order(path, 0)
    assert {*masks} == {"a.weight", "aa.weight", "fc.weight"}
    assert all(bool(mask.all()) for mask in masks.values())
    assert torch.equal(model.fc.weight, before)
    assert int((~prune_by_order(path, 12.5)["fc.weight"]).sum()) == 25  # never entered: still 25 of 200


def test_a_name_is_a_name_and_no_substring():
    """'aa.weight' does not prune 'a.weight' (slbi.md 4.10); two arguments suffice (4.1)."""
    model, _, path = recorded()
    before = model.a.weight.detach().clone()
    prune_by_order(path, 50, "aa.weight")
    assert torch.equal(model.a.weight, before)
    assert {*prune_by_order(path, 50, ["fc.weight", "aa.weight"])} == {"fc.weight", "aa.weight"}
    with pytest.raises(ValueError, match=r"layer 'weight' is not among .*twin: a\.weight, aa\.weight"):
        prune_by_order(path, 50, "weight")


def test_a_removed_filter_is_silent_only_without_its_bias_and_norm():
    """A batch norm behind it still emits its bias (slbi.md 4.11)."""
    model, _, path = recorded()
    nn.init.constant_(model.norm.bias, 0.3)
    x, _ = batch()
    model.train()(x)
    masks = prune_by_order(path, 50, "a.weight")
    gone = ~masks["a.weight"].flatten(1).any(1)
    out = model.norm(model.a(x))
    assert bool((out[:, gone].abs() > 0.1).any())
    masks = prune_by_order(path, 50, "a.weight", biases=True, norms={"a.weight": "norm"})
    assert {*masks} == {"a.weight", "a.bias", "norm.weight", "norm.bias"}
    for mode in (True, False):
        out = model.train(mode).norm(model.a(x))
        assert not out[:, gone].any()
        assert bool(out[:, ~gone].any())
    assert torch.equal(model.a.bias == 0, gone)
    assert {*prune_by_order(path, 20, "aa.weight", biases=True)} == {"aa.weight"}  # has no bias


def test_biases_with_a_twin_go_with_their_filters():
    model, _, path = biases_with_twins()
    masks = prune_by_order(path, 50, biases=True)
    assert masks["0.weight"][:, 0, 0, 0].tolist() == [True, True, False, False]
    assert masks["0.bias"].tolist() == [True, False, False, False]  # by its own place 0 and 2 would stay
    assert model[0].bias.tolist() == [4, 0, 0, 0]


def test_single_weights_of_a_convolution_and_rows_of_a_linear_layer():
    path = recorded()[2]
    assert int((~prune_by_order(path, 10, "aa.weight", unit="weight")["aa.weight"]).sum()) == 27
    masks = prune_by_order(path, 30, "fc.weight", unit="filter", biases=True)
    assert torch.equal(masks["fc.weight"].any(1), masks["fc.bias"])
    assert int(masks["fc.bias"].sum()) == 7


def test_biases_that_stay_are_warned_of():
    """Linear layers are pruned by single weights unless the caller says otherwise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    path = ActivationPath(model, SplitLBI(param_groups(model, L1(1.0))))
    with pytest.warns(UserWarning, match=r"biases=True prunes no bias, .* pass unit='filter'") as seen:
        assert {*prune_by_order(path, 50, biases=True)} == {"0.weight", "2.weight"}
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert int((~prune_by_order(path, 50, unit="filter", biases=True)["0.bias"]).sum()) == 3
        prune_by_order(path, 50)
        prune_by_order(recorded()[2], 50, biases=True)  # convolutions and a Linear layer


def test_what_is_pruned_stays_pruned_under_a_mask():
    model, optimizer, path = recorded()
    masks = prune_by_order(path, 50, biases=True, norms={"a.weight": "norm"})
    masked(optimizer, model, masks)
    run(model, optimizer, 3)
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()
    assert bool(model.fc.weight.any())


def test_pruning_reaches_the_fp32_copy_of_16_bit_weights():
    layer = nn.Linear(8, 8, bias=False).bfloat16()
    optimizer = SplitLBI(layer.parameters(), reg=L1(1.0), mu=1e6)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    path = ActivationPath(layer, optimizer)
    mask = prune_by_order(path, 50)["weight"]
    optimizer.step()
    assert torch.equal(layer.weight != 0, mask)


def test_what_pruning_refuses():
    model, optimizer, path = recorded()
    before = [p.detach().clone() for p in model.parameters()]
    for arguments, options, message in [
        ((101,), {}, "percent must be .*got 101"),
        ((-1,), {}, "percent must be .*got -1"),
        ((math.nan,), {}, "percent must be .*got nan"),
        ((50,), {"unit": "kernel"}, "unit must be 'filter' or 'weight', got 'kernel'"),
        ((50, "fc.weight"), {"norms": {"fc.weight": "norm"}}, "'fc.weight' is pruned by single weights"),
        ((50, "a.weight"), {"unit": "weight", "biases": True}, "'a.weight' is pruned by single weights"),
        ((50,), {"norms": {"aa.weight": "norm"}}, "'norm' has 6 channels, but 'aa.weight' has 5 filters"),
        ((50, "aa.weight"), {"norms": {"a.weight": "norm"}}, "layer 'a.weight' is not among"),
    ]:
        with pytest.raises(ValueError, match=message):
            prune_by_order(path, *arguments, **options)
    with pytest.raises(TypeError, match=r"'fc' is no batch norm .*got Linear"):
        prune_by_order(path, 50, norms={"a.weight": "fc"})
    named = ActivationPath(dict(model.named_parameters()), optimizer)
    with pytest.raises(TypeError, match=r"needs the layers of a torch.nn.Module, got dict"):
        prune_by_order(named, 50, "a.weight", biases=True)
    assert {*prune_by_order(named, 0)} == {"a.weight", "aa.weight", "fc.weight"}
    assert all(map(same_bits, [p.detach() for p in model.parameters()], before))
