"""Layer sizes, extraction of the first filters, and layers that grow."""

from __future__ import annotations

import math

import pytest
import torch
from harness import same_bits
from split_net import batch, filters, net, recorded, run, set_dual
from torch import nn

from bregman_cuda import (
    L1,
    ActivationPath,
    SplitLBI,
    active_fraction,
    extract_top_filters,
    grow_layer,
    layer_sizes,
    param_groups,
)
from bregman_cuda.sparsity import LayerSize


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
    for n, says in ((0, "an integer >= 1"), (1.0, "an integer >= 1"), (7, "at most the 6 filters of 'a.weight'")):
        with pytest.raises(ValueError, match=f"n must be {says}, got {n}"):
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


def test_a_layer_with_several_readers_grows():
    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Linear(4 * 36, 2)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.left(x).mean((2, 3)) + self.right(x.flatten(1))

    model, x = Forked(), torch.randn(5, 3, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = model(x).detach()
    assert grow_layer(optimizer, model.stem, [model.left, model.right], 3, outgoing="zero") == 3
    torch.testing.assert_close(model(x), before)
    assert (model.left.in_channels, model.right.in_features) == (7, 7 * 36)
    model(x).sum().backward()
    optimizer.step()
    for consumers in ([], [model.left, model.left], [model.stem]):
        with pytest.raises(ValueError, match="must be different modules"):
            grow_layer(optimizer, model.stem, consumers, 1)
    with pytest.raises(ValueError, match="the consumer has 3 inputs, the layer 7 outputs"):
        grow_layer(optimizer, model.stem, [model.left, nn.Conv2d(3, 2, 1)], 1)
    assert model.stem.out_channels == 7


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
    lost = "the optimizer does not hold {} of shape .*; pass the optimizer that does, or freeze it"
    for arguments, options, error, message in [
        ((model.a, model.aa, 0), {}, ValueError, "n must be an integer >= 1, got 0"),
        ((model.a, model.aa, 2), {"outgoing": "ones"}, ValueError, "outgoing must be 'zero' or 'random', got 'ones'"),
        ((model.a, model.fc, 2), {}, ValueError, "the consumer has 20 inputs, the layer 6 outputs"),
        ((model.norm, model.aa, 2), {}, TypeError, "Linear and convolutions without groups can grow, got BatchNorm2d"),
        ((nn.Conv2d(4, 4, 1, groups=2), model.aa, 2), {}, TypeError, "without groups"),
        ((model.a, model.aa, 2), {"norm": nn.BatchNorm2d(5)}, TypeError, "norm of 6 channels, got BatchNorm2d"),
        ((model.a, model.aa, 2), {"norm": nn.GroupNorm(2, 6)}, TypeError, "norm of 6 channels, got GroupNorm"),
        ((model.a, model.aa, 2), {"threshold": math.nan}, ValueError, "threshold must be .*between 0 and 1, got nan"),
        ((model.a, model.aa, 2), {"threshold": -1}, ValueError, "threshold must be .*between 0 and 1, got -1"),
        ((model.a, model.aa, 2), {"threshold": 80}, ValueError, "threshold must be .*between 0 and 1, got 80"),
        ((model.a, model.aa, 2), {"threshold": "x"}, TypeError, "grow_layer: threshold must be a number, got 'x'"),
        ((nn.Conv2d(1, 6, 3), model.aa, 2), {}, ValueError, lost.format("layer.weight")),
        ((model.a, nn.Conv2d(6, 5, 3), 2), {}, ValueError, lost.format("consumer.weight")),
        ((model.a, model.aa, 2), {"norm": nn.BatchNorm2d(6)}, ValueError, lost.format("norm.weight")),
    ]:
        with pytest.raises(error, match=message):
            grow_layer(optimizer, *arguments, **options)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"active filters is that of SplitLBI's twin, got SGD; .* with threshold=0"):
        grow_layer(sgd, model.a, model.aa, 2, norm=model.norm, threshold=0.5)
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())
    model.a.bias.requires_grad_(False)  # a frozen parameter needs no optimizer
    some = torch.optim.SGD([p for p in model.parameters() if p is not model.a.bias], lr=0.1)
    assert grow_layer(some, model.a, model.aa, 2, norm=model.norm) == 2
