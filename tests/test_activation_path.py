"""ActivationPath: when filters and weights enter, and in what order."""

from __future__ import annotations

import pytest
import torch
from split_net import exact, recorded, set_dual
from torch import nn

from bregman_cuda import (
    L1,
    ActivationPath,
    NonnegL1,
    SplitLBI,
    grow_layer,
    layer_sizes,
    param_groups,
    prune_by_order,
)
from bregman_cuda.sparsity import LayerSize


def test_first_activations_and_ranks():
    _, _, path = recorded()
    assert path.layers == ["a.weight", "aa.weight", "fc.weight"]
    assert path.first("a.weight", "filter").tolist() == [0, 2, -1, 0, 1, -1]
    assert path.first("a.weight").shape == (6, 1, 3, 3)
    assert torch.equal(path.first("a.weight")[:, 0, 1, 2], path.first("a.weight", "filter"))
    # 0 and 3 entered together: the larger twin first. Filter 4 has left since, and keeps its place.
    assert path.ranks("a.weight", "filter").tolist() == [0, 3, 5, 1, 2, 4]


def test_ranks_do_not_mix_units():
    """A huge late weight does not overtake a small early one, nor do epochs beyond a sentinel (slbi.md 4.9)."""
    model, optimizer = exact()
    path = ActivationPath(model, optimizer)
    early, late = torch.zeros(10, 20), torch.zeros(10, 20)
    early[3, 4] = 1.001
    late[3, 4], late[0, 0] = 1.001, 1e6
    for when, dual in ((2500, early), (10**6, late)):
        set_dual(model, optimizer, "fc.weight", dual)
        path.update(when)
    ranks = path.ranks("fc.weight")
    assert (ranks[3, 4], ranks[0, 0]) == (0, 1)
    assert sorted(ranks.flatten().tolist()) == list(range(200))  # no ties: each weight has its own place
    assert (path.first("fc.weight") == -1).sum() == 198


def test_single_weights_make_filters():
    """Elementwise penalties on a convolution: a filter entered with its first weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.ConvTranspose1d(3, 2, 2))
    optimizer = SplitLBI(param_groups(model, L1(1.0)), mu=10.0)
    path = ActivationPath(model, optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for when, places in enumerate([[(2, 1, 0)], [(2, 0, 1), (0, 1, 1)]]):
        for layer in model:
            for place in places:
                optimizer.state[layer.weight]["dual"][place] = 2.0
        path.update(when)
    assert path.first("0.weight", "filter").tolist() == [1, -1, 0]
    assert path.first("1.weight", "filter").tolist() == [1, 0]  # output channels are dim 1 there (slbi.md 4.19)
    masks = prune_by_order(path, 50, "1.weight")
    assert masks["1.weight"].any(2).any(0).tolist() == [False, True]


def test_of_those_that_entered_together_the_larger_twin_comes_first():
    """Whatever the dual: NonnegL1 has none for a large negative one."""
    layer = nn.Linear(3, 1, bias=False)
    optimizer = SplitLBI(layer.parameters(), reg=NonnegL1(1.0), mu=1e6)
    layer.weight.grad = torch.zeros(1, 3)
    optimizer.step()
    path = ActivationPath(layer, optimizer)
    for when, dual in enumerate([[2.0, 2.0, 2.0], [1.5, -9.0, 3.0]]):
        optimizer.state[layer.weight]["dual"].copy_(torch.tensor([dual]))
        path.update(when)
    assert path.ranks("weight").tolist() == [[1, 2, 0]]


def test_update_does_not_read_the_device(monkeypatch):
    path = recorded()[2]
    for method in ("item", "tolist", "cpu", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, method, lambda *_: pytest.fail("read back"), raising=False)
    path.update(3)


def test_a_path_resumes():
    model, optimizer, path = recorded()
    other = ActivationPath(model, optimizer)
    other.load_state_dict(path.state_dict())
    assert torch.equal(other.ranks("a.weight", "filter"), path.ranks("a.weight", "filter"))
    other.update(5)
    assert int(path.state_dict()["first"]["fc.weight"].max()) == -1  # a copy
    with pytest.raises(ValueError, match="integer >= 5, got 4"):
        other.update(4)


def test_a_path_resumes_between_growing_and_the_next_update():
    model, optimizer, path = recorded()
    grow_layer(optimizer, model.a, model.aa, 2, norm=model.norm)
    other = ActivationPath(model, optimizer)
    other.load_state_dict(path.state_dict())
    assert other.first("a.weight", "filter").tolist() == [0, 2, -1, 0, 1, -1, -1, -1]


def test_a_path_moves_with_its_model():
    layer = nn.Linear(3, 2)
    optimizer = SplitLBI(layer.parameters(), reg=L1(1.0))
    path = ActivationPath(layer, optimizer)
    optimizer.param_groups[0]["params"] = list(layer.to("meta").parameters())  # to a GPU they stay the same objects
    path.update(0)
    assert path.first("weight").device.type == path.state_dict()["first"]["bias"].device.type == "meta"


def test_a_path_counts_negative_weights():
    """The toolbox counts positive weights alone (slbi.md 4.7)."""
    model, optimizer = exact()
    path = ActivationPath(model, optimizer)
    set_dual(model, optimizer, "fc.weight", torch.full((10, 20), -2.0))
    path.update(0)
    assert bool((path.first("fc.weight") == 0).all())
    assert layer_sizes(model, optimizer)["fc.weight"] == LayerSize(20, 10, 20, 10)


def test_what_a_path_refuses():
    model, _, path = recorded()
    with pytest.raises(TypeError, match="need SplitLBI, got SGD"):
        ActivationPath(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="no parameter of the model has a sparse twin"):
        ActivationPath(model, SplitLBI(model.parameters()))
    for wrong in (-1, 1.0, True, 0):
        with pytest.raises(ValueError, match="`when` must be an integer >= 2, got"):
            path.update(wrong)
    state = path.state_dict()
    with pytest.raises(ValueError, match=r"the state has layers \['a.weight'\]"):
        path.load_state_dict({"last": 0, "first": {"a.weight": state["first"]["a.weight"]}})
    state["first"]["fc.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"'fc.weight' has shape \(3, 3\) in the state, here \(10, 20\)"):
        path.load_state_dict(state)
    assert path.last == 2
