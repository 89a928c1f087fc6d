"""The tensor shapes that are stepped, as tables: no model is built and no torchvision is needed."""

from __future__ import annotations

from math import prod

Shape = tuple[int, ...]


def _resnet_tail(width: int) -> list[Shape]:
    return [(1000, width), (1000,)]


def resnet18() -> list[Shape]:
    """torchvision's resnet18: 62 tensors, 11,689,512 parameters."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(width, inputs, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if block == 0 and inputs != width:
                shapes += [(width, inputs, 1, 1), (width,), (width,)]
            inputs = width
    return shapes + _resnet_tail(inputs)


def resnet50() -> list[Shape]:
    """torchvision's resnet50: 161 tensors, 25,557,032 parameters."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return shapes + _resnet_tail(inputs)


def gpt2_small() -> list[Shape]:
    """GPT-2 small, output tied to the embedding: 148 tensors, 124,439,808 parameters."""
    d = 768
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *block * 12, (d,), (d,)]


def tiny() -> list[Shape]:
    """500 tensors of 8 elements: what a step costs apart from the arithmetic."""
    return [(2, 4)] * 500


def thousand() -> list[Shape]:
    """1,000 matrices of 64 elements: for host time."""
    return [(8, 8)] * 1000


def large() -> list[Shape]:
    """16 matrices, 268,435,456 parameters: enough to see a GPU's bandwidth."""
    return [(4096, 4096)] * 16


SETS = {
    "resnet18": resnet18,
    "resnet50": resnet50,
    "gpt2": gpt2_small,
    "tiny": tiny,
    "large": large,
    "thousand": thousand,
}


def usual(device: str) -> list[str]:
    """The sets that a device can bear, without `thousand`, which is asked for by name."""
    return [name for name in SETS if name != "thousand" and (name != "large" or device == "cuda")]


def numel(shapes: list[Shape]) -> int:
    """Elements of all shapes together."""
    return sum(prod(shape) for shape in shapes)


def overhead(shapes: list[Shape]) -> list[Shape]:
    """As many tensors of the same ranks with one element each: what is left of a step is its overhead."""
    return [(1,) * len(shape) for shape in shapes]
