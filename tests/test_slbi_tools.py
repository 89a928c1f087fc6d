"""What surrounds SplitLBI: the path of activation, pruning, tickets, statistics, sizes and growing."""

from __future__ import annotations

import contextlib
import math
import sys

import numpy as np
import pytest
import torch
from harness import same_bits
from torch import nn
from torch.nn import functional as F

from bregman_cuda import (
    L1,
    ActivationPath,
    AdaBreg,
    GroupLasso,
    LinBreg,
    NonnegL1,
    SplitLBI,
    StatisticsRecorder,
    TicketRecorder,
    active_fraction,
    extract_top_filters,
    grow_layer,
    hold_active,
    layer_sizes,
    load_ticket,
    masked,
    param_groups,
    prune_by_order,
    read_statistics,
    reinitialize_filters,
    rewind,
    save_ticket,
    scale_filters,
)
from bregman_cuda.sparsity import LayerSize


class Net(nn.Module):
    """Convolution, norm, convolution, linear; names of which one is a part of another."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.aa = nn.Conv2d(6, 5, 3, bias=False)
        self.fc = nn.Linear(5 * 4, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.a(x)))
        return self.fc(F.max_pool2d(F.relu(self.aa(x)), 2).flatten(1))


def net(lr=0.1, mu=1.0, kappa=1.0, lam=0.05, **options):
    torch.manual_seed(0)
    model = Net()
    regs = {nn.Conv2d: GroupLasso(lam, "out"), "*": L1(lam)}
    return model, SplitLBI(param_groups(model, regs), lr=lr, mu=mu, kappa=kappa, **options)


def batch(seed=0, n=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)


def run(model, optimizer, steps=1, seed=0):
    for i in range(steps):
        x, y = batch(seed + i)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def set_dual(model, optimizer, name, dual):
    """Put a layer's twin where a test wants it."""
    param = model.get_parameter(name)
    if "dual" not in optimizer.state[param]:
        run(model, optimizer)
    optimizer.state[param]["dual"].copy_(dual)


def filters(*norms, like):
    """A dual whose filters are constant and have these norms."""
    flat = torch.tensor(norms)[:, None] / math.sqrt(like[0].numel()) * torch.ones(len(norms), like[0].numel())
    return flat.view(like.shape)


def exact(lam=1.0):
    """A net whose convolutions have unweighted groups: a filter is on when the norm of its dual is above lam."""
    torch.manual_seed(0)
    model = Net()
    regs = {nn.Conv2d: GroupLasso(lam, "out", "none"), "*": L1(lam)}
    return model, SplitLBI(param_groups(model, regs), lr=0.01, mu=10.0)


def recorded():
    """Filters of `a` entered in epochs 0 2 - 0 1 -; of the third and last one the last is nearer to entering."""
    model, optimizer = exact()
    path = ActivationPath(model, optimizer)
    for epoch, norms in enumerate([(3, 0, 0, 2, 0, 0), (3, 0, 0, 2, 1.5, 0), (3, 9, 0.2, 2, 0.9, 0.7)]):
        set_dual(model, optimizer, "a.weight", filters(*norms, like=model.a.weight))
        path.update(epoch)
    return model, optimizer, path


# The path


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


# Pruning


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


def biases_with_twins():
    """A convolution whose biases have a twin, too, with biases in an order of entry that is not that of its filters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    optimizer = SplitLBI(model.parameters(), lr=0.5, reg=L1(1.0), mu=1.0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[model[0].weight]["dual"].copy_(filters(90, 80, 0, 0, like=model[0].weight))
    optimizer.state[model[0].bias]["dual"].copy_(torch.tensor([3.0, 0, 4, 0]))
    model[0].bias.data.copy_(torch.tensor([4.0, 3, 2, 1]))
    path = ActivationPath(model, optimizer)
    path.update(0)
    return model, optimizer, path


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


# Statistics


def test_statistics_are_those_of_numpy_with_one_transfer(tmp_path, monkeypatch):
    model, optimizer = net()
    run(model, optimizer)
    transfers = []
    real = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: transfers.append(self.shape) or real(self))
    want = []
    with StatisticsRecorder(model, tmp_path, every=2, rows_per_file=40) as recorder:
        for step in range(5):
            run(model, optimizer, seed=step)
            assert recorder.update(step) == (step % 2 == 0)
            if step % 2 == 0:
                for name, p in model.named_parameters():
                    want += [(step, name, "weight", p.detach().double().numpy().copy())]
                    want += [(step, name, "gradient", p.grad.double().numpy().copy())]
    assert len(transfers) == 3
    assert len(list(tmp_path.glob("*"))) == 1  # the third record of 14 rows reaches 40
    found = read_statistics(tmp_path)
    assert len(found) == len(want) == 42
    for i, (step, name, quantity, x) in enumerate(want):
        assert (found.step[i], found.layer[i], found.quantity[i]) == (step, name, quantity)
        got = [found.min[i], found.p25[i], found.median[i], found.p75[i], found.max[i], found.mean[i]]
        np.testing.assert_allclose(got, [*np.percentile(x, [0, 25, 50, 75, 100]), x.mean()], rtol=1e-12, atol=1e-15)
        norms = np.linalg.norm(x.reshape(len(x), -1), axis=1) if x.ndim > 1 else []
        np.testing.assert_allclose(found.filter_norms[i], norms, rtol=1e-12)


def test_statistics_of_odd_tensors(tmp_path):
    """Fewer than four elements (slbi.md 4.17), none, NaN, infinities, no gradient."""
    values = {
        "one": torch.tensor(3.0),
        "two": torch.tensor([1.0, 2.0]),
        "none": torch.zeros(0, 3),
        "nan": torch.tensor([[1.0, math.nan], [2.0, 3.0]]),
        "inf": torch.tensor([1.0, math.inf, -math.inf, 2.0, 3.0]),
    }
    with StatisticsRecorder(values, tmp_path) as recorder:
        recorder.update(0)
    found = read_statistics(tmp_path)
    assert found.layer.tolist() == [*values]
    assert {*found.quantity.tolist()} == {"weight"}
    np.testing.assert_equal(found.median, [3.0, 1.5, math.nan, math.nan, 2.0])
    np.testing.assert_equal(found.min, [3.0, 1.0, math.nan, math.nan, -math.inf])
    np.testing.assert_equal(found.p25, [3.0, 1.25, math.nan, math.nan, 1.0])
    np.testing.assert_equal(found.mean, [3.0, 1.5, math.nan, math.nan, math.nan])
    np.testing.assert_equal(found.filter_norms[3], [math.nan, math.sqrt(13)])


def test_statistics_continue_in_the_same_folder_and_survive_an_error(tmp_path):
    model, optimizer = net()
    run(model, optimizer)
    for step in (0, 1):
        with contextlib.suppress(ZeroDivisionError), StatisticsRecorder(model, tmp_path, layers="a.weight") as recorder:
            recorder.update(step)
            raise ZeroDivisionError
    assert read_statistics(tmp_path).step.tolist() == [0, 0, 1, 1]


def test_statistics_never_overwrite_a_file(tmp_path):
    model, _ = net()
    for step in range(3):
        with StatisticsRecorder(model, tmp_path, layers="a.weight", quantities=["weight"]) as recorder:
            recorder.update(step)
        if step == 1:
            (tmp_path / "statistics-000000.npz").unlink()
    assert read_statistics(tmp_path).step.tolist() == [1, 2]


def test_statistics_of_a_grouped_transposed_convolution_have_no_norms(tmp_path):
    with StatisticsRecorder(nn.ConvTranspose1d(4, 4, 1, groups=2), tmp_path, layers="weight") as recorder:
        recorder.update(0)
    found = read_statistics(tmp_path)
    assert len(found) == 1
    assert len(found.filter_norms[0]) == 0


def test_what_statistics_refuse(tmp_path, monkeypatch):
    model, _ = net()
    for options, message in [
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"layers": ["b.weight"]}, "no parameter 'b.weight'"),
        ({"quantities": ["dual"]}, "quantity 'dual' is unknown"),
    ]:
        with pytest.raises(ValueError, match=message):
            StatisticsRecorder(model, tmp_path, **options)
    with pytest.raises(FileNotFoundError, match="has no statistics"):
        read_statistics(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install numpy"):
        StatisticsRecorder(model, tmp_path)


# Tickets


def with_ticket():
    model, optimizer = net(momentum=0.9, nesterov=True)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    tickets = TicketRecorder(model, optimizer)
    for epoch in range(4):
        run(model, optimizer, 3, seed=3 * epoch)
        tickets.update(epoch)
    return model, optimizer, tickets, start


def test_a_ticket_is_the_support_and_the_start():
    model, optimizer, tickets, start = with_ticket()
    assert tickets.epochs == [0, 1, 2, 3]
    densities = [tickets.ticket(epoch).density for epoch in tickets.epochs]
    assert densities == sorted(densities)
    assert 0 < densities[-1] < 1
    ticket = tickets.ticket(3)
    assert {*ticket.masks} == {"a.weight", "aa.weight", "fc.weight"}
    assert torch.equal(ticket.masks["fc.weight"], optimizer.support(model.fc.weight))
    masks = rewind(model, ticket)
    for name, value in model.state_dict().items():  # the norm's running mean and count, too
        assert same_bits(value, torch.where(masks[name], start[name], 0.0) if name in masks else start[name])
    with pytest.raises(KeyError, match="no ticket of epoch 9; there are: 0, 1, 2, 3"):
        tickets.ticket(9)


@pytest.mark.parametrize("name", ["ticket.pt", "ticket.safetensors"])
def test_tickets_are_saved(tmp_path, name):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    ticket = with_ticket()[2].ticket(2)
    save_ticket(ticket, tmp_path / name)
    loaded = load_ticket(tmp_path / name)
    assert loaded.epoch == 2
    for ours, theirs in ((ticket.masks, loaded.masks), (ticket.initial, loaded.initial)):
        assert {*ours} == {*theirs}
        assert all(torch.equal(value, theirs[key]) and value.dtype == theirs[key].dtype for key, value in ours.items())
    torch.save({"other": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt holds no ticket"):
        load_ticket(tmp_path / "other.pt")


def test_safetensors_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match="needs the package safetensors"):
        save_ticket(with_ticket()[2].ticket(0), tmp_path / "ticket.safetensors")


MAKERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5),
    "linbreg": lambda params: LinBreg(params, lr=0.1),
    "adabreg": lambda params: AdaBreg(params, lr=0.01),
    "splitlbi": lambda params: SplitLBI(params, lr=0.1, momentum=0.9, reg=L1(0.1)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_masked_training_with_any_optimizer(name):
    model, _, tickets, _ = with_ticket()
    params = list(model.parameters())
    optimizer = MAKERS[name](params)
    run(model, optimizer, 2)  # momentum for all weights, which must not leak
    masks = rewind(model, tickets.ticket(2))
    handle = masked(optimizer, model, masks)
    for step in range(4):
        run(model, optimizer, seed=step)
        for layer, mask in masks.items():
            param = model.get_parameter(layer)
            assert not param[~mask].any()
            assert bool(param[mask].any())
            for key, tensor in optimizer.state[param].items():
                assert key == "mask" or tensor.shape != param.shape or not tensor[~mask].any()
    handle.remove()
    run(model, optimizer, 1)
    assert name != "sgd" or any(bool(model.get_parameter(n)[~m].any()) for n, m in masks.items())


def test_masked_training_keeps_an_earlier_mask():
    w = nn.Parameter(torch.ones(4))
    optimizer = LinBreg([w], lr=0.1)
    first = torch.tensor([True, True, False, False])
    optimizer.set_mask(w, first)
    with masked(optimizer, {"w": w}, {"w": torch.tensor([True, False, True, False])}):
        assert optimizer.get_mask(w).tolist() == [True, False, False, False]
    assert torch.equal(optimizer.get_mask(w), first)


def test_masked_training_is_training_of_the_subnetwork():
    """SGD with momentum on the kept weights alone gives the same numbers."""
    p = nn.Parameter(torch.randn(5, dtype=torch.float64))
    mask = torch.tensor([True, False, True, True, False])
    q = nn.Parameter(p.detach()[mask].clone())
    ours, theirs = (torch.optim.SGD([x], lr=0.1, momentum=0.9, weight_decay=0.1) for x in (p, q))
    with masked(ours, {"p": p}, {"p": mask}):
        for _ in range(5):
            g = torch.randn(5, dtype=torch.float64)
            p.grad, q.grad = g.clone(), g[mask].clone()
            ours.step()
            theirs.step()
    assert torch.equal(p.detach()[mask], q.detach())
    p.grad = torch.ones(5, dtype=torch.float64)
    ours.step()
    assert bool((p[~mask] != 0).all())


def test_rewinding_an_optimizer_drops_its_state():
    model, optimizer, tickets, _ = with_ticket()
    rewind(model, tickets.ticket(1), optimizer)
    assert not any(optimizer.state.values())
    run(model, optimizer, 2)
    fresh, other = net(momentum=0.9, nesterov=True)
    rewind(fresh, tickets.ticket(1))
    run(fresh, other, 2)
    assert all(map(torch.equal, model.parameters(), fresh.parameters()))


def test_what_tickets_refuse():
    model, _, tickets, _ = with_ticket()
    ticket = tickets.ticket(1)
    with pytest.raises(ValueError, match="is in only one of model and ticket"):
        rewind(nn.Linear(2, 2), ticket)
    wide = Net()
    wide.fc = nn.Linear(20, 11)
    with pytest.raises(ValueError, match=r"'fc.weight' has shape \(10, 20\) in the ticket, \(11, 20\) in the model"):
        rewind(wide, ticket)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for masks, error, message in [
        ({"b": torch.ones(1, dtype=torch.bool)}, ValueError, "no parameter 'b'"),
        ({"a.bias": torch.ones(5, dtype=torch.bool)}, ValueError, r"'a.bias' has shape \(5,\), the parameter \(6,\)"),
        ({"a.bias": torch.ones(6)}, TypeError, "must have dtype torch.bool, got torch.float32"),
    ]:
        with pytest.raises(error, match=message):
            masked(optimizer, model, masks)
    with pytest.raises(ValueError, match=r"layer 'norm.weight' is not among"):
        TicketRecorder(model, SplitLBI(param_groups(model, L1(0.1))), "norm.weight")


# Sizes, extraction, growing


def test_layer_sizes_of_what_is_active():
    model, optimizer, _ = recorded()
    dual = torch.zeros(10, 20)
    dual[2, 3] = dual[2, 5] = dual[7, 3] = -2.0
    set_dual(model, optimizer, "fc.weight", dual)
    sizes = layer_sizes(model, optimizer)
    assert sizes["a.weight"] == LayerSize(inputs=1, outputs=6, active_inputs=1, active_outputs=3)
    assert sizes["aa.weight"] == LayerSize(6, 5, 0, 0)
    assert sizes["fc.weight"] == LayerSize(20, 10, 2, 2)


def test_layer_sizes_of_grouped_and_transposed_convolutions():
    model = nn.Sequential(nn.Conv1d(4, 6, 1, groups=2), nn.ConvTranspose1d(6, 4, 1))
    optimizer = SplitLBI(param_groups(model, L1(1.0)))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for layer, places in ((model[0], [(4, 1), (5, 1)]), (model[1], [(0, 1), (5, 1), (2, 3)])):
        for place in places:
            optimizer.state[layer.weight]["dual"][place] = 2.0
    assert layer_sizes(model, optimizer) == {"0.weight": LayerSize(4, 6, 1, 2), "1.weight": LayerSize(6, 4, 3, 2)}


def test_the_first_filters_and_what_reads_them():
    model, _, path = recorded()
    top = extract_top_filters(path, "a.weight", 3, "aa.weight")
    assert top.indices.tolist() == [0, 3, 4]
    assert torch.equal(top.weight, model.a.weight[[0, 3, 4]])
    assert torch.equal(top.bias, model.a.bias[[0, 3, 4]])
    assert torch.equal(top.consumer_weight, model.aa.weight[:, [0, 3, 4]])
    set_dual(model, path.optimizer, "aa.weight", filters(0.1, 0, 0.2, 0.9, 0.3, like=model.aa.weight))
    top = extract_top_filters(path, "aa.weight", 1, "fc.weight")  # behind a flatten of 2x2 pixels
    first = int(top.indices)
    assert first == 3  # the nearest to entering
    assert torch.equal(top.consumer_weight, model.fc.weight[:, 4 * first : 4 * first + 4])
    assert top.bias is None
    with torch.no_grad():
        top.weight.zero_()
    assert bool(model.aa.weight[first].any())  # copies
    assert extract_top_filters(path, "fc.weight", 2).consumer_weight is None
    for n in (0, 7, 1.0):
        with pytest.raises(ValueError, match=f"n must be an integer from 1 to 6, got {n}"):
            extract_top_filters(path, "a.weight", n)
    with pytest.raises(ValueError, match=r"'fc\.weight' with 20 inputs does not read the 6 filters"):
        extract_top_filters(path, "a.weight", 2, "fc.weight")
    model.aa = nn.Conv2d(12, 5, 3)  # nothing says which two inputs belong to a filter
    with pytest.raises(ValueError, match=r"'aa\.weight' with 12 inputs does not read the 6 filters"):
        extract_top_filters(path, "a.weight", 2, "aa.weight")


@pytest.mark.parametrize("outgoing", ["zero", "random"])
@pytest.mark.parametrize("layers", ["a", "aa"])
def test_a_layer_grows_around_its_old_block(layers, outgoing):
    model, optimizer = net(momentum=0.9)
    path = ActivationPath(model, optimizer)
    run(model, optimizer, 9)
    path.update(0)
    layer, consumer, norm = (model.a, model.aa, model.norm) if layers == "a" else (model.aa, model.fc, None)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    firsts = path.first(f"{layers}.weight", "filter")
    x, _ = batch()
    before = model.eval()(x)
    untouched, narrow = model.fc.bias, (layer.weight, consumer.weight)
    kept = optimizer.state[untouched]
    assert grow_layer(optimizer, layer, consumer, 3, norm=norm, outgoing=outgoing) == 3
    assert layer.out_channels == layer.weight.shape[0] == len(firsts) + 3
    for name, value in model.state_dict().items():
        block = value[tuple(slice(0, n) for n in old[name].shape)]
        assert same_bits(block, old[name])
        assert value.is_contiguous()
    new = consumer.weight[:, old[f"{'aa' if layers == 'a' else 'fc'}.weight"].shape[1] :]
    assert bool(new.any()) == (outgoing == "random")
    assert bool(layer.weight[-3:].all())
    after = model(x)
    if outgoing == "zero":  # sums with a few zeros more, in another order: 1000 terms below 4
        torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    else:
        assert float((after - before).abs().max().detach()) > 1e-3
    params = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in params} == {id(p) for p in model.parameters()}
    assert not {layer.weight, consumer.weight, *narrow} & optimizer.state.keys()
    assert optimizer.state[untouched] is kept
    model.train()
    assert path.first(f"{layers}.weight", "filter").tolist() == [*firsts.tolist(), -1, -1, -1]
    run(model, optimizer, 1)
    path.update(1)
    assert path.ranks(f"{layers}.weight", "filter")[-3:].min() >= (firsts >= 0).sum()  # not first (slbi.md 4.13)
    run(model, optimizer, 40)
    path.update(2)
    later = path.first(f"{layers}.weight", "filter")
    assert torch.equal(later[: len(firsts)][firsts >= 0], firsts[firsts >= 0])
    assert later[-3:].tolist() == [2, 2, 2]


def test_a_layer_grows_only_when_it_is_full():
    model, optimizer, _ = recorded()
    assert active_fraction(optimizer, model.a) == 0.5
    assert grow_layer(optimizer, model.a, model.aa, 8, norm=model.norm, threshold=0.51) == 0
    assert model.a.out_channels == 6
    assert grow_layer(optimizer, model.a, model.aa, 8, norm=model.norm, threshold=0.5) == 8
    assert model(batch()[0]).shape == (32, 10)
    assert active_fraction(optimizer, model.a) == 0  # fresh state


@pytest.mark.parametrize(
    ("layer", "consumer", "x"),
    [
        (nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, 2, bias=False, dtype=torch.float64), (5, 3)),
        (nn.ConvTranspose2d(3, 4, 2, stride=2), nn.ConvTranspose2d(4, 2, 3), (2, 3, 4, 4)),
        (nn.Conv3d(2, 3, 2).to(memory_format=torch.channels_last_3d), nn.Conv3d(3, 2, 1), (2, 2, 3, 3, 3)),
    ],
    ids=["linear", "transposed", "channels_last"],
)
def test_kinds_of_layers_that_grow(layer, consumer, x):
    model = nn.Sequential(layer, nn.ReLU(), consumer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(x, dtype=layer.weight.dtype)
    before, strides = model(x).detach(), layer.weight.stride()
    grow_layer(optimizer, layer, consumer, 2, outgoing="zero")
    torch.testing.assert_close(model(x), before)
    assert (strides[1] == 1) == (layer.weight.stride()[1] == 1)
    model(x).sum().backward()
    optimizer.step()
    assert repr(layer) == repr(type(layer)(*_arguments(layer)))


def _arguments(layer):
    if isinstance(layer, nn.Linear):
        return layer.in_features, 6
    return (
        layer.in_channels,
        layer.weight.shape[0 if isinstance(layer, nn.Conv3d) else 1],
        layer.kernel_size,
        layer.stride,
    )


def test_what_growing_refuses():
    model, optimizer, _ = recorded()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for arguments, options, error, message in [
        ((model.a, model.aa, 0), {}, ValueError, "n must be an integer >= 1, got 0"),
        ((model.a, model.aa, 2), {"outgoing": "ones"}, ValueError, "outgoing must be 'zero' or 'random', got 'ones'"),
        ((model.a, model.fc, 2), {}, ValueError, "the consumer has 20 inputs, the layer 6 outputs"),
        ((model.norm, model.aa, 2), {}, TypeError, "Linear and convolutions without groups can grow, got BatchNorm2d"),
        ((nn.Conv2d(4, 4, 1, groups=2), model.aa, 2), {}, TypeError, "without groups"),
        ((model.a, model.aa, 2), {"norm": nn.BatchNorm2d(5)}, TypeError, "norm of 6 channels, got BatchNorm2d"),
        ((model.a, model.aa, 2), {"norm": nn.GroupNorm(2, 6)}, TypeError, "norm of 6 channels, got GroupNorm"),
    ]:
        with pytest.raises(error, match=message):
            grow_layer(optimizer, *arguments, **options)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())


# On data


@pytest.mark.slow
def test_digits_are_learned_projected_and_learned_again_from_the_ticket():
    pytest.importorskip("sklearn")
    from bregman_cuda.experiments.data import digits
    from bregman_cuda.experiments.models import mlp
    from bregman_cuda.experiments.train import accuracy

    data, generator = digits(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = mlp(64, 10)

    def epoch(optimizer):
        model.train()
        for rows in torch.randperm(len(data.train_x), generator=generator).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(data.train_x[rows]), data.train_y[rows]).backward()
            optimizer.step()

    optimizer = SplitLBI(param_groups(model, L1(1.0)), lr=0.1, mu=5.0, momentum=0.9)
    tickets, path = TicketRecorder(model, optimizer), ActivationPath(model, optimizer)
    for number in range(30):
        epoch(optimizer)
        tickets.update(number)
        path.update(number)
    dense = accuracy(model, data)
    with optimizer.projected():
        sparse = accuracy(model, data)
    ticket = tickets.ticket(29)
    assert dense > 0.96
    assert sparse > dense - 0.02
    assert optimizer.density().density == pytest.approx(ticket.density)
    assert ticket.density < 0.1

    random = prune_by_order(path, 100 * (1 - ticket.density))  # the order holds as good a subnetwork of that size
    assert accuracy(model, data) > dense - 0.05
    assert sum(int(mask.sum()) for mask in random.values()) < 0.11 * 64 * 275

    masks = rewind(model, ticket)
    assert accuracy(model, data) < 0.5
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    with masked(sgd, model, masks):
        for _ in range(15):
            epoch(sgd)
    assert accuracy(model, data) > 0.96
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())


# Second chances


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
