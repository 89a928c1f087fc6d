"""Second chances: filters that start anew, are scaled, or are held."""

from __future__ import annotations

import math

import pytest
import torch
from split_net import biases_with_twins, recorded, run
from torch import nn

from bregman_cuda import (
    L1,
    ActivationPath,
    GroupLasso,
    SplitLBI,
    hold_active,
    param_groups,
    reinitialize_filters,
    scale_filters,
)


def test_the_last_filters_start_anew():
    """Weights really change (slbi.md 4.12), and so does their state; the others keep theirs."""
    model, optimizer, path = recorded()
    optimizer.param_groups[0]["momentum"] = 0.9
    run(model, optimizer)
    before = model.a.weight.detach().clone()
    dual = optimizer.state[model.a.weight]["dual"].clone()
    gone = reinitialize_filters(path, 50, "a.weight")["a.weight"]
    assert gone.nonzero().flatten().tolist() == [1, 2, 5]
    assert bool((model.a.weight != before)[gone].all())
    assert torch.equal(model.a.weight[~gone], before[~gone])
    assert float(model.a.weight.detach()[gone].abs().max()) <= float(before.std()) * math.sqrt(3) * 1.001
    for slot in ("dual", "momentum_buffer"):
        assert not optimizer.state[model.a.weight][slot][gone].any()
    assert torch.equal(optimizer.state[model.a.weight]["dual"][~gone], dual[~gone])
    run(model, optimizer)
    assert reinitialize_filters(path, 50, "a.weight", threshold=0.6) == {}
    assert {*reinitialize_filters(path, 50, threshold=0.3)} == {"a.weight"}


@pytest.mark.parametrize("percent", [50, 100])
def test_restarted_filters_are_orthogonal_to_those_that_stay(percent):
    model, _, path = recorded()
    gone = reinitialize_filters(path, percent, "a.weight", orthogonal=True)["a.weight"]
    rows = model.a.weight.detach().flatten(1).double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    overlap = rows[gone] @ rows.T - torch.eye(6, dtype=torch.float64)[gone]
    assert float(overlap.abs().max()) < 1e-6  # fp32 weights
    flat = nn.Sequential(nn.Linear(2, 5))  # no room: three directions stay in two dims
    optimizer = SplitLBI(param_groups(flat, L1(1.0)))
    assert int(reinitialize_filters(ActivationPath(flat, optimizer), 60, orthogonal=True)["0.weight"].sum()) == 3


def test_the_last_filters_are_scaled():
    model, _, path = recorded()
    weight, bias = model.a.weight.detach().clone(), model.a.bias.detach().clone()
    gone = scale_filters(path, 2.0, 50, "a.weight", biases=True)["a.weight"]
    factor = torch.where(gone, 2.0, 1.0)
    assert torch.equal(model.a.weight, weight * factor.view(-1, 1, 1, 1))
    assert torch.equal(model.a.bias, bias * factor)
    with pytest.raises(ValueError, match=r"factor must be .*got -1"):
        scale_filters(path, -1, 50)
    with pytest.raises(ValueError, match=r"percent must be .*got 120"):
        reinitialize_filters(path, 120)


def test_biases_with_a_twin_are_scaled_once():
    model, _, path = biases_with_twins()
    gone = scale_filters(path, 2.0, 50, ["0.weight", "0.bias"], biases=True)
    assert model[0].bias.tolist() == [4, 6, 4, 2]
    assert gone["0.bias"].tolist() == [False, True, True, True]


@pytest.mark.parametrize("options", [{}, {"threshold": 0.4}, {"orthogonal": True}], ids=str)
def test_vectors_and_scalars_start_anew(options):
    model, _, path = biases_with_twins()
    gone = reinitialize_filters(path, 50, "0.bias", **options)["0.bias"]
    assert gone.tolist() == [False, True, False, True]
    assert (model[0].bias == torch.tensor([4.0, 3, 2, 1])).tolist() == [True, False, True, False]
    scalar = nn.Parameter(torch.tensor(3.0))
    path = ActivationPath({"s": scalar}, SplitLBI([scalar], reg=L1(1.0), mu=1.0))
    assert reinitialize_filters(path, 100, **{**options, "threshold": 0.0})["s"].tolist() == [True]
    assert float(scalar.detach()) != 3.0


def test_a_restart_that_is_refused_changes_nothing():
    model, _, path = biases_with_twins()
    before = model[0].weight.detach().clone()
    for bad in (math.nan, -0.1, 80):
        with pytest.raises(ValueError, match=f"reinitialize_filters: threshold must be .*between 0 and 1, got {bad}"):
            reinitialize_filters(path, 50, threshold=bad)
    model[2].weight.data.fill_(math.nan)  # has no singular values
    with pytest.raises(RuntimeError):
        reinitialize_filters(path, 50, ["0.weight", "2.weight"], orthogonal=True)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_active_filters_are_held_while_others_train(dtype):
    model, optimizer, _ = recorded()
    model.to(dtype)
    optimizer = SplitLBI([{"params": [p], "reg": GroupLasso(0.1) if p.ndim > 1 else None} for p in model.parameters()])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[model.a.weight]["dual"][[0, 3]] = 1.0
    before = model.a.weight.detach().clone()
    handle = hold_active(model, optimizer)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    moved = (model.a.weight != before).flatten(1)
    assert moved.any(1).tolist() == [False, True, True, False, True, True]
    handle.remove()
    optimizer.step()
    assert bool((model.a.weight != before)[[0, 3]].any())
