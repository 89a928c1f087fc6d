"""StatisticsRecorder: the numbers, the files, and what they survive."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pytest
import torch
from split_net import net, run
from torch import nn

from bregman_cuda import (
    StatisticsRecorder,
    read_statistics,
)


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
        ({"quantities": ["dual"]}, "quantity 'dual' is unknown; use 'weight' or 'gradient'"),
        ({"quantities": "dual"}, "quantity 'dual' is unknown"),
    ]:
        with pytest.raises(ValueError, match=message):
            StatisticsRecorder(model, tmp_path, **options)
    recorder = StatisticsRecorder(model, tmp_path, every=2, quantities="weight")
    assert recorder.quantities == ("weight",)
    for step in (1.5, 2.0, "x", -2, True):
        with pytest.raises(ValueError, match=f"StatisticsRecorder: step must be an integer >= 0, got {step!r}"):
            recorder.update(step)
    with pytest.raises(FileNotFoundError, match="has no statistics"):
        read_statistics(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install numpy"):
        StatisticsRecorder(model, tmp_path)
