"""Parameter groups, sparse initialisation and density reports."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from bregman_cuda.optim import AdaBreg, LinBreg
from bregman_cuda.regularizers import L1, GroupLasso
from bregman_cuda.sparsity import DensityReport, DensityRow, density, param_groups, sparse_init_
from bregman_cuda.sparsity.layers import weight_tensors

DIMS = {"out": (0,), "in": (1,), "kernel": (0, 1)}


class Tied(nn.Module):
    """An embedding that is its own output layer, and a Linear that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(3, 3))


def zoo() -> dict[str, tuple[nn.Module, set[str]]]:
    """Models, and the names of what should be regularized."""
    return {
        "mlp": (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), {"0.weight", "2.weight"}),
        "conv": (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 3)),
            {"0.weight", "2.weight"},
        ),
        "one and three dims": (
            nn.Sequential(nn.Conv1d(2, 2, 3), nn.GroupNorm(1, 2), nn.Conv3d(2, 2, 1)),
            {"0.weight", "2.weight"},
        ),
        "transformer": (
            nn.TransformerEncoderLayer(8, 2, 16),
            {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"},
        ),
        "attention with other keys": (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"},
        ),
        "tied": (Tied(), {"first.weight"}),
        "recurrent": (nn.LSTM(3, 4), set()),
    }


@pytest.mark.parametrize("name", zoo())
def test_every_parameter_is_in_one_group(name: str) -> None:
    model, expected = zoo()[name]
    with warnings.catch_warnings(record=True) as caught:
        groups = param_groups(model, L1(0.5), lr=0.1)
    assert bool(caught) == (not expected)
    grouped = [parameter for group in groups for _, parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    assert {name for group in groups if group["reg"] for name, _ in group["params"]} == expected
    assert all(group["lr"] == 0.1 for group in groups)
    named = dict(model.named_parameters())
    assert all(named[name] is parameter for group in groups for name, parameter in group["params"])


@pytest.mark.parametrize("kind", [torch.optim.SGD, LinBreg, AdaBreg])
def test_groups_drive_an_optimizer(kind: type[torch.optim.Optimizer]) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    optimizer = kind(param_groups(model, L1(0.01), lr=0.05), lr=1.0)
    before = [p.clone() for p in model.parameters()]
    model(torch.randn(6, 5)).square().sum().backward()
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "2.weight"]
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_each_call_makes_its_own_default() -> None:
    model = nn.Linear(2, 2)
    first, second = param_groups(model)[0]["reg"], param_groups(model)[0]["reg"]
    first.lam = 5.0
    assert second == L1(0.1)


def test_choices_per_layer() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Linear(3, 4), nn.Linear(4, 2), nn.LayerNorm(2))
    kernels, l1 = GroupLasso(0.5, "kernel"), L1(0.1)
    chosen = {
        name: group["reg"]
        for group in param_groups(model, {nn.Conv2d: kernels, "2.*": None, "*": l1, "3.weight": L1(9.0)})
        for name, _ in group["params"]
    }
    assert chosen["0.weight"] is kernels
    assert chosen["1.weight"] is l1
    assert chosen["2.weight"] is chosen["1.bias"] is None
    assert chosen["3.weight"] is None or chosen["3.weight"] is l1  # "*" came first
    by_name = param_groups(model, lambda name, p: L1(p.shape[0] / 10))
    assert [group["reg"].lam for group in by_name[:3]] == [0.2, 0.4, 0.2]


@pytest.mark.parametrize(
    ("weights", "error", "says"),
    [
        ({"conv*": L1(1.0)}, ValueError, r"'conv\*' fits no weight; the weights are: 0.weight, 2.weight"),
        ({"0.*": L1(1.0)}, ValueError, r"'2.weight' meets no key"),
        ({3: L1(1.0)}, TypeError, r"key 3 is neither"),
        ({"*": 0.1}, TypeError, r"'0.weight' got 0.1"),
        (0.1, TypeError, r"weights=0.1 is no regularizer"),
        (lambda name, p: "l1", TypeError, r"'0.weight' got 'l1'"),
        (GroupLasso(1.0, (2,)), ValueError, r"'0.weight'.*does not fit a tensor of shape \(4, 3\)"),
    ],
)
def test_wrong_choices_are_named(weights: object, error: type[Exception], says: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(error, match=says):
        param_groups(model, weights)  # type: ignore[arg-type]


def test_wrong_models_are_named() -> None:
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, got list"):
        param_groups([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no parameters"):
        param_groups(nn.ReLU())
    with pytest.raises(ValueError, match="'weight' of a lazy module"):
        param_groups(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="'reg' itself"):
        param_groups(nn.Linear(2, 2), reg=None)


@pytest.mark.parametrize("weights", [L1(0.5), {}])
def test_a_model_in_which_nothing_is_regularized_is_named(weights: object) -> None:
    with pytest.warns(UserWarning, match=r"GRU has no weight for .* parameters are weight_ih_l0, .*'weight_ih_l0': L1"):
        param_groups(nn.GRU(3, 2), weights)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(nn.GRU(3, 2), None)
        param_groups(nn.GRU(3, 2), lambda name, p: None)  # a choice, made tensor by tensor
        param_groups(nn.Linear(3, 2), {"*": None})
        param_groups(nn.GRU(3, 2), {"weight_ih_l0": L1(0.1)})


def test_a_computed_weight_is_announced() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
    with pytest.warns(UserWarning, match=r"'0.weight' is computed by a parametrization"):
        groups = param_groups(model)
    assert [name for name, _ in groups[0]["params"]] == ["1.weight"]


@st.composite
def layers(draw: st.DrawFn) -> nn.Module:
    outs, ins, groups = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.integers(1, 2))
    kind = draw(st.sampled_from([nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d]))
    if kind is nn.Linear:
        return nn.Linear(ins, outs * 3)
    return kind(ins * groups, outs * groups, draw(st.integers(1, 3)), groups=groups)


@given(
    layers(),
    st.floats(0.001, 1.0),
    st.sampled_from([None, "out", "in", "kernel"]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
@settings(deadline=None, max_examples=150)
def test_the_count_is_exact(layer: nn.Module, share: float, groups: str | None, dtype: torch.dtype) -> None:
    layer = layer.to(dtype)
    report = sparse_init_(layer, share, groups)
    weight = layer.weight
    rest = [] if groups is None else [d for d in range(weight.dim()) if d not in DIMS[groups]]
    live = weight != 0
    alive = live.any(dim=rest, keepdim=True) if rest else live
    assert int(alive.sum()) == max(1, round(share * alive.numel()))
    assert torch.equal(alive.expand_as(weight), live)  # a kept group is kept as a whole
    assert report.nonzeros == int(live.sum())
    assert weight.dtype is dtype


@pytest.mark.parametrize("share", [0.01, 0.1, 1.0])
@pytest.mark.parametrize(
    ("layer", "fan"),
    [
        (nn.Linear(500, 400), 500),
        (nn.Conv2d(40, 50, 5), 40 * 25),
        (nn.Conv2d(80, 100, 5, groups=2), 40 * 25),
        (nn.ConvTranspose2d(50, 40, 4, stride=2), 50 * 16 / 4),
    ],
)
def test_the_variance_makes_up_for_the_density(layer: nn.Module, fan: float, share: float) -> None:
    sparse_init_(layer, share, generator=torch.Generator().manual_seed(1))
    kept = layer.weight[layer.weight != 0]
    # The variance of n normal samples has relative standard deviation sqrt(2 / n); six of them.
    assert kept.var().item() * fan * share == pytest.approx(2.0, rel=6 * math.sqrt(2 / len(kept)))
    assert abs(kept.mean()) < 6 * kept.std() / math.sqrt(len(kept))


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_the_signal_survives_depth(share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = [m for _ in range(8) for m in (nn.Linear(800, 800), nn.ReLU())]
    model = nn.Sequential(*blocks)
    sparse_init_(model, share, generator=generator)
    x = torch.randn(500, 800, generator=generator)
    spread = model(x).var(0).mean()
    # Unscaled, 1% density costs a factor 100 per layer: 1e-16 after eight.
    assert 0.02 < spread < 5


@st.composite
def chains(draw: st.DrawFn) -> tuple[nn.Sequential, tuple[int, ...]]:
    """A random nn.Sequential with convolutions, transposed ones, groups, pooling, flattening and a head.

    Channels are live or not, single pixels are not told apart: 3x3 kernels, which may leave the border zero, are
    averaged before they are flattened.
    """
    channels, modules = draw(st.integers(1, 4)) * 2, []
    first, kernel = channels, draw(st.sampled_from([1, 3]))
    for _ in range(draw(st.integers(0, 3))):
        out = draw(st.integers(1, 6)) * 2
        kind = draw(st.sampled_from([nn.Conv2d, nn.ConvTranspose2d]))
        modules.append(kind(channels, out, kernel, padding=kernel // 2, groups=draw(st.sampled_from([1, 2]))))
        modules.append(draw(st.sampled_from([nn.ReLU(), nn.Identity(), nn.Sequential(nn.ReLU(), nn.Dropout(0.0))])))
        channels = out
    modules += [nn.Flatten()] if kernel == 1 else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    width = channels * 16 if kernel == 1 else channels
    for out in draw(st.lists(st.integers(1, 20), min_size=1, max_size=3)):
        modules += [nn.Linear(width, out), nn.ReLU()]
        width = out
    return nn.Sequential(*modules), (1, first, 4, 4)


@given(chains(), st.floats(0.001, 0.2), st.sampled_from([None, "out", "in", "kernel"]), st.integers(0, 2**31))
@settings(deadline=None, max_examples=150)
def test_a_path_leads_through(
    chain: tuple[nn.Sequential, tuple[int, ...]], share: float, groups: str, seed: int
) -> None:
    model, shape = chain
    report = sparse_init_(model, share, groups, bias="zero", generator=torch.Generator().manual_seed(seed))
    # With positive weights no path cancels another, and none ends in a ReLU: the data arrive or they do not.
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    assert model(torch.ones(shape, dtype=torch.float64)).sum() > 0
    for row, module in zip(report.rows, (m for m in model.modules() if hasattr(m, "weight")), strict=True):
        assert row.live_outputs is not None
        assert row.live_outputs >= 1
        assert row.live_outputs <= module.weight.count_nonzero()


def test_live_outputs_are_counted() -> None:
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 4, 30))
    report = sparse_init_(model, {"0.*": 0.3, "2.*": 0.02}, groups={"0.*": "kernel", "2.*": None}, bias="zero")
    x, live = torch.randn(500, 2, 2, 2), []
    for stop in (1, 3):
        channels = model[:stop](x).transpose(0, 1).flatten(1)
        live.append(int((channels.std(1) > 0).sum()))
    assert [row.live_outputs for row in report.rows] == live


def test_numbers_of_numpy_are_taken() -> None:
    numpy = pytest.importorskip("numpy")
    models = [nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)) for _ in range(2)]
    numbers = [(numpy.float32(0.25), (numpy.int64(1),), numpy.float32(2), numpy.int8(1)), (0.25, (1,), 2.0, 1)]
    for model, (share, groups, scale, gain) in zip(models, numbers, strict=True):
        generator = torch.Generator().manual_seed(0)
        sparse_init_(model, share, groups, bias_scale=scale, gain=gain, generator=generator)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


class Residual(nn.Module):
    """Whose forward nobody can tell from its children: two layers, and a sequence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.branch = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Sequential(nn.Linear(width, width)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu()) + self.branch(x)


@pytest.mark.parametrize("seed", range(10))
def test_sequences_inside_of_other_modules_have_a_path_too(seed: int) -> None:
    """In a block that is in a sequence itself; and the report says where none is known."""
    model = nn.Sequential(Residual(12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    report = sparse_init_(model, 0.01, bias="zero", generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    assert model[0].branch(torch.ones(12)).sum() > 0
    assert model[2:](torch.ones(12)).sum() > 0
    live = {row.name: row.live_outputs for row in report.rows}
    unknown = {"0.first.weight", "0.second.weight"}
    assert {name for name, outputs in live.items() if outputs is None} == unknown
    notes = "\n".join(report.notes)
    assert "through these; each keeps a weight, which may read a dead input: 0.first.weight, 0.second.weight" in notes
    assert "2.weight: which of its inputs are live is not known, so the path before it may end there" in notes


def test_what_is_not_known_is_said() -> None:
    assert sparse_init_(nn.Sequential(nn.Embedding(5, 9), nn.Linear(9, 9)), 0.5).notes == []  # all of it is live
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.PixelShuffle(2), nn.Conv2d(1, 4, 3))
    assert any("2.weight: which of its inputs are live is not known" in note for note in sparse_init_(model, 0.1).notes)
    report = sparse_init_(nn.TransformerEncoderLayer(8, 2, 16), 0.1)
    assert any("not in an nn.Sequential" in note for note in report.notes)
    report = sparse_init_(nn.Sequential(nn.Conv2d(1, 16, 5)), 0.01, "kernel")
    assert "note: 0.weight: one of 16 is more than a density of 0.01" in str(report)


def test_biases() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 90, 3), nn.BatchNorm2d(90), nn.ReLU(), nn.Flatten(), nn.Linear(90, 80))

    positive = model()
    report = sparse_init_(positive, 0.1, bias_scale=3.0)
    assert not positive[0].bias.any()
    assert [row.bias for row in report.rows] == ["zero (before a norm)", "positive"]
    assert 0 <= positive[4].bias.min() < positive[4].bias.max() <= 3 / math.sqrt(90)
    assert positive[4].bias.max() > 2 / math.sqrt(90)
    symmetric = model()
    sparse_init_(symmetric, 0.1, bias="symmetric")
    assert symmetric[4].bias.min() < 0 < symmetric[4].bias.max()
    kept, fresh = model(), model()
    sparse_init_(kept, 0.1, bias="keep")
    assert torch.equal(kept[0].bias, fresh[0].bias)
    assert torch.equal(kept[4].bias, fresh[4].bias)


def test_a_batch_norm_after_a_sparse_layer_keeps_gradients_small() -> None:
    """Constant channels in front of a norm must not blow gradients up: 1/sqrt(eps) = 316 per layer."""
    torch.manual_seed(0)
    blocks = [m for _ in range(6) for m in (nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    sparse_init_(model, 0.01)
    nn.functional.cross_entropy(model(torch.randn(16, 32, 8, 8)), torch.arange(16) % 10).backward()
    assert model[0].weight.grad.norm() < 1e3  # type: ignore[union-attr]


def test_layout_generator_and_choices() -> None:
    def one(seed: int) -> nn.Sequential:
        model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
        model = model.to(memory_format=torch.channels_last)
        before = torch.get_rng_state()
        untouched = model[1].weight.clone()
        sparse_init_(model, {"1.*": None, nn.Conv2d: 0.1}, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(model[1].weight, untouched)
        return model

    first, same, other = one(3), one(3), one(4)
    assert first[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(first[2].weight, same[2].weight)
    assert not torch.equal(first[2].weight, other[2].weight)


def test_the_report_lists_what_stays_dense() -> None:
    model = nn.ModuleList([nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3), nn.GRU(3, 2), nn.Linear(3, 2)])
    report = sparse_init_(model, {"4.*": None, "*": 0.5})
    reasons = {tensor.name: tensor.reason for tensor in report.dense}
    sparse = {row.name for row in report.rows}
    assert reasons.keys() | sparse == {name for name, _ in model.named_parameters()}
    assert (reasons["0.weight"], reasons["2.bias"], reasons["4.weight"]) == ("embedding", "norm layer", "as asked")
    text = str(report)
    assert "1.weight" in text
    assert "0.weight (5x4): embedding" in text
    assert "3.weight_ih_l0 (6x3): no weight of a layer told here" in text


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (dict(density=0.0), ValueError, r"density of '0.weight' must be in \(0, 1\], got 0.0"),
        (dict(density=1.5), ValueError, "got 1.5"),
        (dict(density=math.nan), ValueError, "got nan"),
        (dict(density=True), ValueError, "got True"),
        (dict(density={"0.*": 0.1}), ValueError, "'2.weight' meets no key"),
        (dict(density={"*": 0.1, "x": 0.1}), ValueError, "'x' fits no weight"),
        (dict(density={"0.*": 0.1, "2.*": -1.0}), ValueError, "'2.weight' must be in"),
        (dict(groups="rows"), ValueError, "groups='rows' is unknown"),
        (dict(groups=(0, 3)), ValueError, r"groups=\(0, 3\) does not fit '0.weight'"),
        (dict(bias="ones"), ValueError, "bias='ones' is unknown"),
        (dict(bias_scale=-1.0), ValueError, "bias_scale"),
        (dict(gain=0.0), ValueError, "gain must be a finite number > 0, got 0.0"),
    ],
)
def test_wrong_arguments_change_nothing(arguments: dict[str, object], error: type[Exception], says: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(error, match=says):
        sparse_init_(model, **arguments)  # type: ignore[arg-type]
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_memory_that_elements_share_is_named_before_anything_changes(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    shape = getattr(model[1], name).shape
    setattr(model[1], name, nn.Parameter(torch.zeros(()).expand(shape)))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=rf"'1.{name}' has elements that share memory \(strides \(0.*; clone\(\) it"):
        sparse_init_(model, 0.5)
    assert all(map(torch.equal, before, model.parameters()))
    if name == "bias":
        sparse_init_(model, 0.5, bias="keep")


def test_models_without_weights_are_named() -> None:
    with pytest.raises(ValueError, match="ReLU has no Linear, convolution or attention weight"):
        sparse_init_(nn.ReLU())
    with pytest.raises(ValueError, match="on device meta"):
        sparse_init_(nn.Linear(2, 2, device="meta"))
    with pytest.raises(TypeError, match="got Tensor"):
        sparse_init_(torch.zeros(3))  # type: ignore[arg-type]


def test_density_counts() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(3, 4))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[0, 1, 0, 0] = torch.nan
        model[0].weight[2, 0] = 1.0
        model[2].weight.fill_(-0.0)
        model[2].weight[1, 1] = 1e-45  # denormal
    report = density(model)
    assert report.rows[0] == DensityRow("0.weight", (3, 2, 2, 2), 24, 5, 6, 2)
    assert report.rows[1] == DensityRow("2.weight", (4, 3), 12, 1, None, None)
    assert (report.numel, report.nonzeros) == (36, 6)
    assert report.density == pytest.approx(6 / 36)
    assert report.sparsity == pytest.approx(30 / 36)
    assert report.all_numel == 36 + 3 + 4
    assert report.all_nonzeros == 6 + int(model[0].bias.count_nonzero() + model[2].bias.count_nonzero())
    rows = density(model, groups="out").rows
    assert (rows[0].groups, rows[0].nonzero_groups, rows[1].groups, rows[1].nonzero_groups) == (3, 2, 4, 1)
    text = str(report)
    assert "16.67%" in text
    assert "2 of 6" in text


def test_density_of_special_models() -> None:
    assert [row.name for row in density(Tied()).rows] == ["first.weight"]
    empty = density(nn.ReLU())
    assert math.isnan(empty.density)
    assert "-" in str(empty)
    assert math.isnan(DensityReport([]).sparsity)
    assert density(nn.Linear(0, 3)).numel == 0


@pytest.mark.parametrize("count", [False, True])
@pytest.mark.parametrize("fused", [False, None])
def test_density_of_an_optimizer_is_that_of_the_model(count: bool, fused: bool | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(8, 4))
    sparse_init_(model, 0.3, "kernel")
    weights = {nn.Conv2d: GroupLasso(0.02, "kernel"), "*": L1(0.02)}
    optimizer = LinBreg(param_groups(model, weights), lr=0.05, count_nonzeros=count, fused=fused)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 2, 3, 3)).square().mean().backward()
        optimizer.step()
    expected, found = density(model), density(optimizer)
    assert found.rows == expected.rows
    assert (found.all_numel, found.all_nonzeros) == (expected.all_numel, expected.all_nonzeros)
    assert 0 < found.density < 1


def test_density_names_what_it_cannot_count() -> None:
    with pytest.raises(TypeError, match="SGD does not count non-zeros; pass the model"):
        density(torch.optim.SGD(nn.Linear(2, 2).parameters()))
    with pytest.raises(TypeError, match="got dict"):
        density({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="groups='filter' is unknown"):
        density(nn.Linear(2, 2), groups="filter")  # type: ignore[arg-type]


def test_weights_are_told_once() -> None:
    """The three functions must agree on what a weight is."""
    for model, expected in zoo().values():
        assert {weight.name for weight in weight_tensors(model)} == expected


def test_frozen_layers_stay_as_they_are():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    model[0].requires_grad_(False)
    before = [p.clone() for p in model[0].parameters()]
    report = sparse_init_(model, 0.25)
    assert all(map(torch.equal, before, model[0].parameters()))
    assert int(torch.count_nonzero(model[2].weight)) == 6
    assert "frozen (requires_grad=False), so left as they are: 0.weight" in report.notes
    assert [row.reason for row in report.dense if row.name == "0.weight"] == ["frozen"]
