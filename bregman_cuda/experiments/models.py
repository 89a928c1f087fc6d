"""The models of the paper's experiments, as nn.Sequential: `sparse_init_` can follow a path through them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

MODELS = ("mlp", "convnet")


def mlp(inputs: int, classes: int, hidden: Sequence[int] = (200, 80)) -> nn.Sequential:
    """Fully connected ReLU network, without ReLU on the logits (with it, they die under a large step)."""
    sizes = [inputs, *hidden, classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convnet(side: int, classes: int) -> nn.Sequential:
    """The Fashion-MNIST network of Bungert et al., section 4.3: two 5x5 convolutions of 64 channels, each with ReLU
    and 2x2 pooling, then 1024-128-classes for 28x28 images.

    Raises:
        ValueError: images too small for it.
    """
    rest = ((side - 4) // 2 - 4) // 2
    if rest < 1:
        raise ValueError(f"the convnet needs images of at least 16x16 pixels, got {side}x{side}; use the mlp")
    return nn.Sequential(
        nn.Conv2d(1, 64, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * rest * rest, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def build(name: str, image_shape: Sequence[int], classes: int) -> nn.Sequential:
    """``"mlp"`` or ``"convnet"`` for images of shape (height, width).

    Raises:
        ValueError: unknown model, or images that do not fit it.
    """
    height, width = image_shape
    if name == "mlp":
        return mlp(height * width, classes)
    if name != "convnet":
        raise ValueError(f"model {name!r} is unknown; use mlp or convnet")
    if height != width:
        raise ValueError(f"the convnet needs square images, got {height}x{width}; use the mlp")
    return convnet(height, classes)
