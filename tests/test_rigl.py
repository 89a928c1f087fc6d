"""RigL: counts that never change, the right weights dropped and grown, state, resuming, and training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import NoReads
from torch import nn

from bregman_cuda import L1, AdaBreg, LinBreg, ProxSGD, RigL, density, param_groups
from bregman_cuda.sparsity.rigl import layer_counts

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "linbreg": lambda p: LinBreg(p, lr=0.1, momentum=0.5),
    "adabreg": lambda p: AdaBreg(p, lr=0.01, reg=L1(1e-3)),
    "proxsgd": lambda p: ProxSGD(p, lr=0.1, momentum=0.9),
}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    body = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(216, 20), nn.ReLU(), nn.Linear(20, 3))


def backward(model: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(3, (8,), generator=generator)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def make(kind: str, seed: int = 0, **options):
    model = net(seed)
    optimizer = OPTIMIZERS[kind](model.parameters())
    options = {"density": 0.2, "every": 3, "end": 100, "generator": torch.Generator().manual_seed(seed), **options}
    return model, optimizer, RigL(model, optimizer, **options)


def per_weight_state(optimizer, weight):
    if hasattr(optimizer, "get_mask"):
        return {k: v for k, v in optimizer.state[weight].items() if k not in ("step", "mask")}
    return {k: v for k, v in optimizer.state[weight].items() if torch.is_tensor(v) and v.shape == weight.shape}


# Counts


@given(
    st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6),
    st.floats(0.0, 1.0),
    st.sampled_from(["erk", "uniform"]),
)
@settings(max_examples=400)
def test_the_budget_is_met_exactly(shapes, share, distribution):
    sizes = [math.prod(s) for s in shapes]
    budget = round(share * sum(sizes))
    if budget < len(sizes):
        with pytest.raises(ValueError, match=f"leaves {budget} of {sum(sizes)} weights, fewer than the {len(sizes)}"):
            layer_counts(shapes, share, distribution)
        return
    counts = layer_counts(shapes, share, distribution)
    assert sum(counts) == budget
    assert all(1 <= c <= n for c, n in zip(counts, sizes))
    # Densities follow the scores wherever integers, the minimum of 1 and the maximum of a dense layer do not bind.
    scores = [sum(s) / n if distribution == "erk" else 1.0 for s, n in zip(shapes, sizes)]
    free = [i for i, n in enumerate(sizes) if 1 < counts[i] < n]
    if not any(c == 1 for c in counts):
        for i in free:
            for j in free:
                scale_i, scale_j = counts[i] / sizes[i] / scores[i], counts[j] / sizes[j] / scores[j]
                slack = 1 / (sizes[i] * scores[i]) + 1 / (sizes[j] * scores[j])
                assert abs(scale_i - scale_j) <= slack + 1e-9


def test_erk_of_a_known_network():
    """By hand: scores 16/60, 130/3000, 40/300 times sizes are 16, 130, 40; at 50% the budget is 1680. The scale
    1680/186 = 9.03 makes the first dense (2.4) and the third (1.2); the second keeps 1680 - 60 - 300."""
    shapes = [(6, 10), (30, 100), (30, 10)]
    assert layer_counts(shapes, 0.5, "erk") == [60, 1320, 300]
    assert layer_counts(shapes, 0.1, "erk") == [29, 235, 72]  # scale 336/186 = 1.806: 28.9, 234.8, 72.3
    assert layer_counts(shapes, 0.1, "uniform") == [6, 300, 30]
    assert layer_counts(shapes, 1.0, "erk") == [60, 3000, 300]
    assert layer_counts([(2, 3, 3, 3)], 0.5, "erk") == [27]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("distribution", ["erk", "uniform"])
def test_counts_never_change_and_the_rest_is_zero(kind, distribution):
    model, optimizer, rigl = make(kind, distribution=distribution)
    total = sum(w.numel() for w in rigl.weights)
    assert sum(rigl.counts) == rigl.density().nonzeros == round(0.2 * total)
    seen = []
    for t in range(1, 14):
        backward(model, t)
        rigl.step()
        assert [int(m.sum()) for m in rigl.masks] == rigl.counts
        for weight, mask in zip(rigl.weights, rigl.masks):
            assert bool((weight[~mask] == 0).all())
            assert all(bool((v[~mask] == 0).all()) for v in per_weight_state(optimizer, weight).values())
        seen.append([m.clone() for m in rigl.masks])
    changes = [any(not torch.equal(a, b) for a, b in zip(seen[t], seen[t - 1])) for t in range(1, 13)]
    assert changes == [t % 3 == 2 for t in range(1, 13)], "masks move at steps 3, 6, 9 and 12 only"
    assert density(model).nonzeros <= rigl.density().nonzeros


def test_the_step_of_the_optimizer_is_replaced_and_updates_end():
    model, _, rigl = make("sgd", end=6)
    frozen = None
    for t in range(1, 10):
        backward(model, t)
        before = copy.deepcopy(model.state_dict())
        rigl.step()
        moved = not torch.equal(before["6.bias"], model.state_dict()["6.bias"])
        assert moved == (t != 3), "step 6 is the end: no update there"
        if t == 3:
            frozen = [m.clone() for m in rigl.masks]
    assert all(map(torch.equal, frozen, rigl.masks))


def test_drop_and_growth_on_a_hand_made_example():
    """Active: 0.1, -0.2, 3, -4. f = 1/2: the two smallest go, the two largest gradients outside of {3, -4} come."""
    w = nn.Parameter(torch.tensor([[0.1, -0.2, 3.0, -4.0, 9.0, 9.0, 9.0, 9.0]]))
    optimizer = torch.optim.SGD([w], lr=1.0, momentum=0.9)
    rigl = RigL([("w", w)], optimizer, density=0.5, alpha=1.0, every=2, end=4)
    rigl.load_state_dict({"steps": 1, "masks": {"w": torch.tensor([15, 0, 0, 0, 0, 0, 0, 0], dtype=torch.uint8)}})
    w.data = torch.tensor([[0.1, -0.2, 3.0, -4.0, 0.0, 0.0, 0.0, 0.0]])
    optimizer.state[w]["momentum_buffer"] = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8]])
    w.grad = torch.tensor([[0.0, 1.0, 100.0, 100.0, -5.0, 0.5, -0.25, 0.0]])
    rigl.step()
    # -0.2 has been dropped and has the second largest gradient: it grows back with its value, and its momentum.
    assert w.tolist() == [pytest.approx([0.0, -0.2, 3.0, -4.0, 0.0, 0.0, 0.0, 0.0])]
    assert rigl.masks[0].tolist() == [[False, True, True, True, True, False, False, False]]
    assert optimizer.state[w]["momentum_buffer"].tolist() == [[0, 2, 3, 4, 0, 0, 0, 0]]
    w.grad = torch.tensor([[7.0, 1.0, 0.0, 0.0, -5.0, 7.0, 7.0, 7.0]])
    rigl.step()  # an ordinary one: lr 1, momentum 0.9, gradients outside masked
    expected = [[0.0, -0.2 - 2.8, 3.0 - 2.7, -4.0 - 3.6, 5.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(w.detach(), torch.tensor(expected))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_grows_starts_from_nothing_and_what_stays_keeps_its_state(kind):
    model, optimizer, rigl = make(kind, alpha=0.8)
    for t in (1, 2):
        backward(model, t)
        rigl.step()
    old = [m.clone() for m in rigl.masks]
    values = [w.detach().clone() for w in rigl.weights]
    states = [{k: v.clone() for k, v in per_weight_state(optimizer, w).items()} for w in rigl.weights]
    backward(model, 3)
    rigl.step()
    grown = 0
    for weight, mask, was, value, state in zip(rigl.weights, rigl.masks, old, values, states):
        fresh, stays = mask & ~was, mask & was
        grown += int(fresh.sum())
        assert bool((weight[fresh] == 0).all())
        assert torch.equal(weight[stays], value[stays])
        for name, now in per_weight_state(optimizer, weight).items():
            assert bool((now[fresh] == 0).all()), name
            assert torch.equal(now[stays], state[name][stays]), name
    assert grown > 10
    before = [w.detach().clone() for w in rigl.weights]
    backward(model, 4)
    rigl.step()
    if kind != "adabreg":  # a new weight has to leave the dead zone of its l1 first
        assert all(bool((w != b)[m].any()) for w, b, m in zip(rigl.weights, before, rigl.masks))


def test_the_share_follows_the_cosine():
    w = nn.Parameter(torch.randn(50, 40, generator=torch.Generator().manual_seed(0)))
    rigl = RigL([w], torch.optim.SGD([w], lr=0.0), density=0.5, alpha=0.4, every=1, end=10)
    for t in range(1, 10):
        before = rigl.masks[0].clone()
        w.data = torch.where(before, 1 + torch.rand_like(w), 0)
        w.grad = torch.where(before, 0.0, 1 + torch.rand_like(w))  # nothing grows back
        rigl.step()
        assert int((rigl.masks[0] & ~before).sum()) == round(0.2 * (1 + math.cos(math.pi * t / 10)) * 1000)


def test_closures_losses_and_gradients_of_none():
    model, _, rigl = make("momentum")
    twin_model, _, twin = make("momentum")
    for t in range(1, 8):
        loss = rigl.step(lambda t=t: backward(model, t))
        with torch.no_grad():
            assert loss.requires_grad, "under enable_grad, in updates too"
        other = backward(twin_model, t)
        assert twin.step() is None
        assert torch.equal(loss, other)
    assert all(map(torch.equal, model.parameters(), twin_model.parameters()))
    rigl.zero_grad()
    before = [m.clone() for m in rigl.masks]
    for _ in range(4):
        rigl.step()
    assert all(map(torch.equal, before, rigl.masks)), "no gradients, no change"


def test_growth_reads_the_accumulated_gradient():
    w = nn.Parameter(torch.ones(1, 6))
    rigl = RigL([w], torch.optim.SGD([w], lr=0.1), density=0.5, alpha=1.0, every=1, end=10**9)
    outside = (~rigl.masks[0]).nonzero()[:, 1]
    for amount in (1.0, 2.0):
        (w * torch.zeros(6).index_fill(0, outside, amount)).sum().backward()
    w.grad[rigl.masks[0]] = 2.5  # more than either backward gave the others, less than their sum
    rigl.step()
    assert rigl.masks[0][0, outside].all()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("at", [2, 3, 7])
def test_a_resumed_run_continues_bit_for_bit(kind, at, tmp_path):
    model, optimizer, rigl = make(kind)
    for t in range(1, at + 1):
        backward(model, t)
        rigl.step()
    saved = {"rigl": rigl.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "run.pt")
    for order in (("model", "optimizer", "rigl"), ("rigl", "optimizer", "model")):
        other, other_optimizer, other_rigl = make(kind, seed=5)
        loaded = torch.load(tmp_path / "run.pt", weights_only=True)
        objects = {"rigl": other_rigl, "model": other, "optimizer": other_optimizer}
        for name in order:
            objects[name].load_state_dict(loaded[name])
        reference, reference_optimizer, reference_rigl = make(kind)
        for t in range(1, 12):
            backward(reference, t)
            reference_rigl.step()
        for t in range(at + 1, 12):
            backward(other, t)
            other_rigl.step()
        assert all(map(torch.equal, reference.parameters(), other.parameters()))
        assert all(map(torch.equal, reference_rigl.masks, other_rigl.masks))
        for mine, theirs in zip(reference.parameters(), other.parameters()):
            a, b = per_weight_state(reference_optimizer, mine), per_weight_state(other_optimizer, theirs)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_nothing_reads_the_device():
    for kind in ("sgd", "momentum", "linbreg"):
        model, _, rigl = make(kind)
        for t in range(1, 8):
            backward(model, t)
            if kind == "linbreg" and t % 3:  # the reference's own step is not in question
                rigl.step()
                continue
            with NoReads():
                rigl.step()


def test_a_dense_weight_that_is_loaded_later_is_masked_again():
    for kind in ("momentum", "proxsgd"):
        model, _, rigl = make(kind)
        backward(model, 1)
        rigl.step()
        model.load_state_dict(net(1).state_dict())
        backward(model, 2)
        rigl.step()
        assert all(bool((w[~m] == 0).all()) for w, m in zip(rigl.weights, rigl.masks))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_mask_update_does_not_wait():
    w = nn.Parameter(torch.randn(300, 200, device="cuda"))
    rigl = RigL([w], torch.optim.SGD([w], lr=0.1, momentum=0.9), density=0.1, every=2, end=100)
    w.grad = torch.randn_like(w)
    rigl.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            w.grad = torch.randn_like(w)
            rigl.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert int(rigl.masks[0].sum()) == 6000


def test_a_grad_scaler_takes_it_for_an_optimizer():
    model, _, rigl = make("momentum")
    twin_model, _, twin = make("momentum")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for t in range(1, 8):
        scaler.scale(backward_loss(model, t)).backward()
        if t == 5:
            rigl.weights[0].grad[0] = math.inf
        scaler.step(rigl)
        scaler.update()
        if t != 5:  # skipped as a whole
            backward(twin_model, t)
            twin.step()
        assert rigl.steps == twin.steps
    for a, b in zip(model.parameters(), twin_model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # a power of two: only the loss's own kernels differ


def backward_loss(model: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(3, (8,), generator=generator)
    model.zero_grad()
    return nn.functional.cross_entropy(model(x), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_and_layouts(dtype):
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(6, 5, 3, 3, generator=generator).to(dtype).to(memory_format=torch.channels_last))
    for optimizer in (torch.optim.SGD([w], lr=0.1, momentum=0.9), ProxSGD([w], lr=0.1)):
        rigl = RigL([w], optimizer, density=0.3, every=2, end=100)
        for _ in range(5):
            w.grad = torch.randn(w.shape, generator=generator).to(dtype)
            rigl.step()
            assert int(rigl.masks[0].sum()) == 81
            assert bool((w[~rigl.masks[0]] == 0).all())


def test_first_dense_and_choice_of_weights():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rigl = RigL(model, optimizer, density=0.1, distribution="uniform", end=10, first_dense=True)
    assert rigl.names == ["4.weight", "6.weight"]
    assert rigl.counts == [432, 6]
    assert density(model).rows[0].density == 1.0
    assert "432" in str(rigl.density())


@pytest.mark.parametrize("kind", ["momentum", "adam", "adabreg"])
def test_digits_at_ten_percent(kind):
    """Real data: 64-100-100-10 with a tenth of its weights, 800 steps."""
    sklearn = pytest.importorskip("sklearn.datasets")
    images, labels = sklearn.load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = {
        "momentum": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "adam": lambda: torch.optim.Adam(model.parameters(), lr=3e-3),
        "adabreg": lambda: AdaBreg(param_groups(model, None), lr=3e-3),
    }[kind]()
    rigl = RigL(model, optimizer, density=0.1, every=25, end=600, generator=torch.Generator().manual_seed(0))
    for step in range(800):
        batch = train[torch.randint(len(train), (100,), generator=torch.Generator().manual_seed(step))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        rigl.step()
    accuracy = (model(x[test]).argmax(1) == y[test]).float().mean().item()
    assert density(model).density <= 0.1 + 1e-4
    assert accuracy >= 0.94


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 1.5}, ValueError, r"RigL: density must be finite and between 0 and 1, got 1.5"),
        ({"density": -0.1}, ValueError, r"density must be .*got -0.1"),
        ({"density": math.nan}, ValueError, r"density must be .*got nan"),
        ({"density": 0.0}, ValueError, r"density=0.0 leaves 0 of 4434 weights, fewer than the 3 layers"),
        ({"density": "0.1"}, TypeError, r"density must be a number, got '0.1'"),
        ({"distribution": "er"}, ValueError, r"distribution must be 'erk' or 'uniform', got 'er'"),
        ({"alpha": 1.5}, ValueError, r"alpha must be .*got 1.5"),
        ({"every": 0}, ValueError, r"every must be an integer >= 1, got 0"),
        ({"every": 2.5}, ValueError, r"every must be an integer >= 1, got 2.5"),
        ({"end": -1}, ValueError, r"end must be an integer >= 1, got -1"),
        ({"end": None}, ValueError, r"end must be an integer >= 1, got None"),
    ],
)
def test_bad_options_are_refused_and_nothing_changes(options, error, message):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        RigL(model, optimizer, **{"end": 10, **options})
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_bad_models_and_optimizers_are_refused():
    model, w = net(), nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.SGD([*model[:5].parameters(), w], lr=0.1)
    with pytest.raises(ValueError, match=r"the optimizer does not hold weight '6.weight'"):
        RigL(model, optimizer, end=10)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got 'sgd'"):
        RigL(model, "sgd", end=10)
    with pytest.raises(ValueError, match="BatchNorm1d has no weights to mask"):
        RigL(nn.BatchNorm1d(3), optimizer, end=10)
    with pytest.raises(ValueError, match="list has no weights to mask"):
        RigL([], optimizer, end=10)
    with pytest.raises(ValueError, match="first_dense=True leaves 'weight 0', the only weight, dense; use False"):
        RigL([w], optimizer, end=10, first_dense=True)
    with pytest.raises(TypeError, match=r"needs a torch.nn.Module or an iterable of parameters, got Parameter"):
        RigL(w, optimizer, end=10)
    with pytest.raises(TypeError, match=r"'weight 1' must be a floating-point parameter, got int"):
        RigL([w, 3], optimizer, end=10)
    with pytest.raises(ValueError, match=r"'weight 1' comes with a weight that is given twice"):
        RigL([w, w], optimizer, end=10)
    with pytest.raises(ValueError, match=r"'a' comes with a name that is given twice"):
        RigL([("a", w), ("a", model[4].weight)], optimizer, end=10)
    with pytest.raises(ValueError, match=r"'weight 0' of shape \(0, 3\) has no elements"):
        RigL([nn.Parameter(torch.ones(0, 3))], optimizer, end=10)
    assert torch.equal(w, torch.ones(2, 3))


def test_bad_state_dicts_are_refused_and_nothing_changes():
    rigl = make("sgd")[2]
    good, masks = rigl.state_dict(), [m.clone() for m in rigl.masks]
    name = rigl.names[0]
    bad = [
        ({"steps": 3}, KeyError, "has no 'masks'"),
        ({**good, "steps": -1}, ValueError, "steps in the state dict must be an integer >= 0, got -1"),
        ({**good, "masks": {name: good["masks"][name]}}, KeyError, "'4.weight', '6.weight' differ"),
        ({**good, "masks": {**good["masks"], name: torch.ones(3)}}, ValueError, rf"'{name}' must be torch.uint8"),
        ({**good, "masks": {**good["masks"], name: None}}, ValueError, rf"mask of '{name}' must .* got None"),
        (make("sgd", density=0.3)[2].state_dict(), ValueError, r"active weights in '.*', this RigL .*another density"),
    ]
    for state, error, message in bad:
        with pytest.raises(error, match=message):
            rigl.load_state_dict(state)
    assert rigl.steps == 0
    assert all(map(torch.equal, masks, rigl.masks))
