"""Lottery tickets: recorded, saved, rewound to, and trained under their masks."""

from __future__ import annotations

import sys

import pytest
import torch
from harness import same_bits
from split_net import Net, net, run
from torch import nn
from torch.nn import functional as F

from bregman_cuda import (
    L1,
    ActivationPath,
    AdaBreg,
    LinBreg,
    SplitLBI,
    TicketRecorder,
    load_ticket,
    masked,
    param_groups,
    prune_by_order,
    rewind,
    save_ticket,
)


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
    for epoch in (-1.5, 2.0, "last", -1, True):
        with pytest.raises(ValueError, match=f"TicketRecorder: epoch must be an integer >= 0, got {epoch!r}"):
            tickets.update(epoch)
    assert tickets.epochs == [0, 1, 2, 3]
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
    assert sparse > 0.96
    assert dense > 0.9  # W follows the noise of lr = 0.1: 0.92 to 0.98 from epoch to epoch
    assert optimizer.density().density == pytest.approx(ticket.density)
    assert ticket.density < 0.1

    random = prune_by_order(path, 100 * (1 - ticket.density))  # the order holds as good a subnetwork of that size
    assert accuracy(model, data) > sparse - 0.08
    assert sum(int(mask.sum()) for mask in random.values()) < 0.11 * 64 * 275

    masks = rewind(model, ticket)
    assert accuracy(model, data) < 0.5
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    with masked(sgd, model, masks):
        for _ in range(15):
            epoch(sgd)
    assert accuracy(model, data) > 0.95
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.items())
