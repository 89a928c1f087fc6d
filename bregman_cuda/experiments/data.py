"""Data sets: scikit-learn's digits (embedded, no download) and folders of IDX files such as Fashion-MNIST."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Where Debian's package dataset-fashion-mnist puts its files.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_IMAGES, _LABELS = 0x0803, 0x0801  # unsigned bytes in three dims, in one
_FILES = {
    "train images": ("train-images", "idx3-ubyte"),
    "train labels": ("train-labels", "idx1-ubyte"),
    "test images": ("t10k-images", "idx3-ubyte"),
    "test labels": ("t10k-labels", "idx1-ubyte"),
}


class DataError(ValueError):
    """Data that is missing or not what it should be; the message names the file and the remedy."""


@dataclass(frozen=True)
class Dataset:
    """Images as float32 [n, 1, height, width], normalised; labels as int64 [n] below `classes`."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    def to(self, device: torch.device) -> Dataset:
        train_x, train_y = self.train_x.to(device), self.train_y.to(device)
        return Dataset(self.name, train_x, train_y, self.test_x.to(device), self.test_y.to(device), self.classes)


def load(source: str) -> Dataset:
    """``"digits"``, ``"fashion-mnist"`` or the path of a folder with IDX files.

    Raises:
        DataError: missing or corrupt files.
        ImportError: digits without scikit-learn.
    """
    if source == "digits":
        return digits()
    if source == "fashion-mnist":
        if not FASHION_MNIST.is_dir():
            raise DataError(
                f"{FASHION_MNIST} does not exist; run `apt-get install dataset-fashion-mnist`, "
                "or give --data a folder with the four IDX files"
            )
        return idx_folder(FASHION_MNIST)
    return idx_folder(Path(source))


def digits() -> Dataset:
    """The 1797 handwritten 8x8 digits in scikit-learn: 1437 to train and 360 to test, always the same split."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(raw.target, dtype=torch.int64)
    # The samples lie writer by writer, hence the shuffle; its seed is part of the data set.
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(x) // 5 + 1], order[len(x) // 5 + 1 :]
    x = (x - x[train].mean()) / x[train].std()
    return Dataset("digits", x[train], y[train], x[test], y[test], 10)


def idx_folder(folder: Path) -> Dataset:
    """The data set in a folder with the four IDX files of MNIST, gzipped or not; pixels are scaled to [-1, 1].

    Raises:
        DataError: no such folder, a file is missing, corrupt, or does not fit the others.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; use digits, fashion-mnist, or a folder with IDX files")
    found = {role: _find(folder, *parts) for role, parts in _FILES.items()}
    if missing := [f"{'-'.join(_FILES[role])}[.gz]" for role, path in found.items() if path is None]:
        raise DataError(
            f"{folder} has no {', '.join(missing)}; put the four IDX files there "
            "(apt-get install dataset-fashion-mnist has them)"
        )
    parts: dict[str, Tensor] = {}
    for part in ("train", "test"):
        image_file, label_file = found[f"{part} images"], found[f"{part} labels"]
        assert image_file is not None
        assert label_file is not None
        images, labels = read_idx(image_file, _IMAGES), read_idx(label_file, _LABELS)
        if len(images) != len(labels):
            raise DataError(
                f"{label_file} has {len(labels)} labels but {image_file} has {len(images)} images; "
                "take both from the same download"
            )
        parts[f"{part}_x"] = images.unsqueeze(1).float().div_(127.5).sub_(1.0)  # mean = std = 0.5, as in the paper
        parts[f"{part}_y"] = labels.long()
    if parts["train_x"].shape[1:] != parts["test_x"].shape[1:]:
        shapes = f"{tuple(parts['train_x'].shape[2:])} to train and {tuple(parts['test_x'].shape[2:])} to test"
        raise DataError(f"{folder} has images of shape {shapes}; take all files from the same download")
    classes = 1 + int(torch.cat([parts["train_y"], parts["test_y"]]).max())
    name = "fashion-mnist" if folder == FASHION_MNIST else folder.name
    return Dataset(name, **parts, classes=classes)


def _find(folder: Path, stem: str, kind: str) -> Path | None:
    names = (f"{stem}{joint}{kind}{end}" for joint in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_idx(path: Path, magic: int) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped if its name ends in .gz: a uint8 tensor of the shape in its header.

    Raises:
        DataError: not readable, bad gzip, another magic number, another length than the header says, or no items.
    """
    data = _contents(path)
    dims = magic & 0xFF
    header = 4 * (1 + dims)
    if len(data) < header:
        raise DataError(f"{path} has {len(data)} bytes, an IDX header needs {header}; {_AGAIN}")
    found, *shape = struct.unpack(f">{1 + dims}I", data[:header])
    if found != magic:
        what = "images" if magic == _IMAGES else "labels"
        raise DataError(f"{path} starts with 0x{found:08x}, expected 0x{magic:08x} (IDX {what}); {_AGAIN}")
    expected = math.prod(shape)
    if len(data) - header != expected or not expected:
        size = "x".join(map(str, shape))
        raise DataError(f"{path} has {len(data) - header} bytes of data, its header says {size} = {expected}; {_AGAIN}")
    return torch.frombuffer(bytearray(data[header:]), dtype=torch.uint8).view(shape)


_AGAIN = "the file is damaged or something else: download it again"


def _contents(path: Path) -> bytes:
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            return file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}); {_AGAIN}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}); check its permissions") from None
