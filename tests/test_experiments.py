"""Data, models, settings, training and plots of the experiments."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bregman_cuda.experiments import data
from bregman_cuda.experiments.data import DataError, Dataset
from bregman_cuda.experiments.models import build, convnet, mlp
from bregman_cuda.experiments.settings import OPTIMIZERS, REGULARIZERS, Setting, default_setting, paper_figures
from bregman_cuda.experiments.train import make_model, make_optimizer, train
from bregman_cuda.sparsity import density

STEMS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


@pytest.fixture
def one_thread():
    """Tiny batches are slower on two threads, far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def idx(shape: tuple[int, ...], values: bytes) -> bytes:
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + values


def write_folder(folder: Path, packed: bool = False, side: int = 4) -> Path:
    """A small data set of 20 training and 10 test images in IDX files."""
    folder.mkdir(exist_ok=True)
    for stem, count in zip(STEMS, (20, 20, 10, 10), strict=True):
        if "images" in stem:
            content = idx((count, side, side), bytes(i % 256 for i in range(count * side * side)))
        else:
            content = idx((count,), bytes(i % 5 for i in range(count)))
        path = folder / f"{stem}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_of_idx_files(tmp_path: Path, packed: bool) -> None:
    found = data.load(str(write_folder(tmp_path / "mine", packed)))
    assert (found.name, found.classes) == ("mine", 5)
    assert found.train_x.shape == (20, 1, 4, 4)
    assert found.test_x.shape == (10, 1, 4, 4)
    assert found.train_y.tolist() == [i % 5 for i in range(20)]
    pixel = found.train_x[1, 0, 0, 2]  # byte 18, scaled so that 0 is -1 and 255 is 1
    assert pixel == pytest.approx((18 / 255 - 0.5) / 0.5)


@given(st.lists(st.integers(0, 5), min_size=3, max_size=3), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=50)
def test_idx_round_trip(tmp_path_factory: pytest.TempPathFactory, shape: list[int], random) -> None:
    content = bytes(random.randrange(256) for _ in range(shape[0] * shape[1] * shape[2]))
    path = tmp_path_factory.mktemp("idx") / "images"
    path.write_bytes(idx(tuple(shape), content))
    if content:
        assert data.read_idx(path, 0x803).tolist() == torch.tensor(list(content)).view(shape).tolist()
    else:
        with pytest.raises(DataError, match="= 0; the file is damaged"):
            data.read_idx(path, 0x803)


def damage(path: Path, how: str) -> None:
    whole = gzip.decompress(path.read_bytes())
    packed = gzip.compress(whole)
    new = {
        "magic": gzip.compress(b"\x00\x00\x0d\x03" + whole[4:]),
        "kind": gzip.compress(idx((5,), b"12345")),
        "short": gzip.compress(whole[:-7]),
        "long": gzip.compress(whole + b"more"),
        "header": gzip.compress(whole[:9]),
        "empty": b"",
        "no gzip": whole,
        "cut gzip": packed[: len(packed) // 2],
        "bad gzip": packed[:20] + bytes(b ^ 0xFF for b in packed[20:-8]) + packed[-8:],
        "bad sum": packed[:-8] + b"\x00" * 8,
    }
    path.write_bytes(new[how])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("magic", "starts with 0x00000d03, expected 0x00000803"),
        ("kind", r"has 13 bytes, an IDX header needs 16|starts with 0x00000801, expected 0x00000803"),
        ("short", "has 313 bytes of data, its header says 20x4x4 = 320"),
        ("long", "has 324 bytes of data, its header says 20x4x4 = 320"),
        ("header", "has 9 bytes, an IDX header needs 16"),
        ("empty", "has 0 bytes, an IDX header needs 16|not a whole gzip file"),
        ("no gzip", "not a whole gzip file"),
        ("cut gzip", "not a whole gzip file"),
        ("bad gzip", "not a whole gzip file"),
        ("bad sum", "not a whole gzip file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, how: str, says: str) -> None:
    folder = write_folder(tmp_path, packed=True)
    damage(folder / "train-images-idx3-ubyte.gz", how)
    with pytest.raises(DataError, match=says) as error:
        data.load(str(folder))
    assert "train-images-idx3-ubyte.gz" in str(error.value)
    assert "download it again" in str(error.value)


def test_a_folder_without_the_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="is no folder; use digits, fashion-mnist"):
        data.load(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"has no train-images-idx3-ubyte\[.gz\], .*apt-get install dataset-fashion"):
        data.load(str(tmp_path))
    folder = write_folder(tmp_path)
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"has no t10k-labels-idx1-ubyte\[.gz\];"):
        data.load(str(folder))
    monkeypatch.setattr(data, "FASHION_MNIST", tmp_path / "absent")
    with pytest.raises(DataError, match="does not exist; run `apt-get install dataset-fashion-mnist`"):
        data.load("fashion-mnist")


def test_files_that_do_not_fit_together_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx((19,), bytes(19)))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte has 19 labels but .*train-images.* has 20 images"):
        data.load(str(folder))
    write_folder(tmp_path)
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx((10, 2, 8), bytes(160)))
    with pytest.raises(DataError, match=r"\(4, 4\) to train and \(2, 8\) to test"):
        data.load(str(folder))


@pytest.mark.skipif(not data.FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist() -> None:
    found = data.load("fashion-mnist")
    assert found.train_x.shape == (60000, 1, 28, 28)
    assert found.test_x.shape == (10000, 1, 28, 28)
    assert torch.bincount(found.test_y).tolist() == [1000] * 10
    assert (found.train_x.min(), found.train_x.max()) == (-1.0, 1.0)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    pytest.importorskip("sklearn", reason="digits need the train extra")
    return data.load("digits")


def test_digits_are_split_the_same_way_always(digits: Dataset) -> None:
    torch.manual_seed(123)
    again = data.digits()
    assert torch.equal(digits.test_x, again.test_x)
    assert torch.equal(digits.train_y, again.train_y)
    assert (len(digits.train_x), len(digits.test_x)) == (1437, 360)
    assert digits.train_x.mean().abs() < 1e-5
    assert digits.train_x.std() == pytest.approx(1.0, abs=1e-5)
    images = torch.cat([digits.train_x, digits.test_x]).flatten(1)
    assert len(images.unique(dim=0)) == 1797  # no test image among the training images


def test_models() -> None:
    assert [tuple(row.shape) for row in density(mlp(64, 10)).rows] == [(200, 64), (80, 200), (10, 80)]
    assert isinstance(mlp(64, 10)[-1], nn.Linear)
    paper = convnet(28, 10)
    assert density(paper).numel == 236352  # the authors' ConvNet
    assert paper(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert convnet(16, 7)(torch.zeros(2, 1, 16, 16)).shape == (2, 7)
    with pytest.raises(ValueError, match="at least 16x16 pixels, got 8x8; use the mlp"):
        build("convnet", (8, 8), 10)
    with pytest.raises(ValueError, match="square images, got 28x30"):
        build("convnet", (28, 30), 10)
    with pytest.raises(ValueError, match="model 'vgg' is unknown"):
        build("vgg", (28, 28), 10)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(lr=float("nan")), "lr must be finite and >= 0, got nan"),
        (dict(lam=-1.0), "lam must be finite and >= 0, got -1.0"),
        (dict(delta=0.0), "delta must be finite and > 0, got 0.0"),
        (dict(density=2.0), r"density must be in \(0, 1\], got 2.0"),
    ],
)
def test_a_setting_out_of_range_is_named(given: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        default_setting("digits", "mlp", "adabreg", **given)


def test_settings_of_the_paper() -> None:
    setting = default_setting("fashion-mnist", "convnet", "linbreg")
    assert (setting.lr, setting.lam, setting.reg, setting.density) == (0.07, 0.5, "group-kernel", 0.01)
    assert paper_figures("fashion-mnist", setting) == "89.5% at 3.8% / 4.2%"
    assert paper_figures("digits", default_setting("digits", "mlp", "linbreg")) is None


def test_group_regularizers_have_their_own_strength() -> None:
    assert default_setting("digits", "mlp", "adabreg").lam == 0.8
    assert default_setting("digits", "mlp", "adabreg", "group-in").lam == 0.3
    assert default_setting("digits", "mlp", "adabreg", "group-in", lam=0.5).lam == 0.5


def test_adam_stays_dense() -> None:
    setting = default_setting("digits", "mlp", "adam", "l1", lam=1.0, density=0.1, lr=0.01)
    assert (setting.reg, setting.lam, setting.density, setting.lr) == ("none", 0.0, 1.0, 0.01)


@pytest.mark.parametrize("reg", REGULARIZERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["mlp", "convnet"])
def test_every_choice_takes_a_step(reg: str, optimizer: str, model: str) -> None:
    x, y = torch.randn(8, 1, 16, 16), torch.arange(8) % 3
    tiny = Dataset("tiny", x, y, x, y, 3)
    setting = default_setting("tiny", model, optimizer, reg, epochs=1, batch_size=8)
    run = train(setting, tiny)
    assert [epoch.number for epoch in run.epochs] == [0, 1]
    assert run.last.seconds >= run.last.optimizer_seconds > 0
    if optimizer == "adam":
        assert run.last.density == 1.0
    elif optimizer == "splitlbi" and reg != "none":
        assert run.last.density == 0  # the twin sleeps
    elif reg != "none":
        assert (run.last.density > 0.5) == ("breg" not in optimizer)  # the others start sparse
    assert (run.kernel_density is None) == (model == "mlp")
    assert (0 if optimizer == "splitlbi" else 1e-9) <= run.linear_density <= 1


def test_the_start_is_sparse_where_it_should_be(digits: Dataset) -> None:
    sparse = default_setting("digits", "mlp", "adabreg")
    model = make_model(sparse, digits, seed=0)
    assert density(model).density == pytest.approx(sparse.density, rel=0.01)
    again = make_model(sparse, digits, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    by_row = make_model(default_setting("digits", "mlp", "linbreg", "group-out"), digits, seed=0)
    rows = {row.name: row for row in density(by_row, "out").rows}
    assert rows["1.weight"].nonzero_groups == 4
    assert rows["5.weight"].nonzero_groups > 4  # classes are not switched off
    assert [group["reg"] for group in make_optimizer(model, sparse).param_groups][1] is None


@pytest.mark.parametrize("name", ["adabreg", "linbreg", "proxadam", "rmda", "ramda", "splitlbi"])
def test_the_defaults_reach_96_percent_at_10_percent_density(digits: Dataset, name: str, one_thread: None) -> None:
    run = train(default_setting("digits", "mlp", name), digits, seed=0)
    assert run.last.test_accuracy >= 0.96
    assert run.last.density <= 0.10
    assert run.epochs[0].density < 0.03 or "breg" not in name
    assert run.epochs[0].test_accuracy < 0.5


def test_a_run_repeats_and_reports(digits: Dataset, one_thread: None) -> None:
    setting = default_setting("digits", "mlp", "linbreg", epochs=2)
    batches: list[None] = []
    first = train(setting, digits, seed=5, on_batch=lambda: batches.append(None))
    second = train(setting, digits, seed=5)
    assert [(e.loss, e.test_accuracy, e.density) for e in first.epochs[1:]] == [
        (e.loss, e.test_accuracy, e.density) for e in second.epochs[1:]
    ]
    assert len(batches) == 2 * 45
    assert 0 < first.optimizer_share < 1
    assert first.weights is not None
    assert first.weights.density == first.last.density


def test_divergence_ends_a_run(digits: Dataset) -> None:
    run = train(Setting("mlp", "linbreg", lr=1e30, lam=0.0, reg="none", epochs=3), digits)
    assert run.diverged
    assert run.last.number < 3


@pytest.mark.parametrize(("schedule", "last"), [("constant", 0.1), ("cosine", 0.0), ("plateau", 0.1 / 4)])
def test_schedules(schedule: str, last: float) -> None:
    setting = Setting("mlp", "linbreg", lr=0.1, lam=0.0, epochs=14, schedule=schedule)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    step = setting.schedule_for(optimizer)
    for _ in range(14):
        optimizer.step()
        step(1.0)  # a loss that never falls
    assert optimizer.param_groups[0]["lr"] == pytest.approx(last, abs=1e-9)


def test_plot(tmp_path: Path, digits: Dataset, one_thread: None) -> None:
    pytest.importorskip("matplotlib", reason="plots need the train extra")
    from bregman_cuda.experiments.plot import save_plot

    runs = [train(default_setting("digits", "mlp", name, epochs=1), digits) for name in OPTIMIZERS]
    save_plot(runs, tmp_path / "plot.png")
    content = (tmp_path / "plot.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1500, 600)
