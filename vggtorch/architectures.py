"""The eight VGG networks as one frozen table.

Layer names (Keras), module paths (torchvision) and shapes are derived from the number of
convolutions in each block; nothing about a single network is written anywhere else.

Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", ICLR 2015, table 1 (A, B, D, E); names as in keras.applications and torchvision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

WIDTHS = (64, 128, 256, 512, 512)  # output channels of the five blocks
HIDDEN = 4096  # units of fc1 and fc2
CLASSES = 1000  # ImageNet
GRID = 7  # height and width of block5_pool for a 224x224 image


@dataclass(frozen=True)
class Layer:
    """One layer: its Keras name, its torchvision module path and its channels."""

    name: str
    kind: Literal["conv", "batch_norm", "pool", "dense"]
    torch_path: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Architecture:
    """One VGG network: how many 3x3 convolutions each of its five blocks has."""

    name: str
    depths: tuple[int, int, int, int, int]
    batch_norm: bool

    def features(self) -> Iterator[Layer]:
        """Convolutions, batch norms and pools in network order.

        torchvision numbers the modules of `features` one by one and counts the ReLU, which in
        Keras is part of the convolution (or follows the batch norm).
        """
        index, channels = 0, 3
        for block, (depth, width) in enumerate(zip(self.depths, WIDTHS, strict=True), start=1):
            for n in range(1, depth + 1):
                yield Layer(f"block{block}_conv{n}", "conv", f"features.{index}", channels, width)
                index += 1
                if self.batch_norm:
                    yield Layer(
                        f"block{block}_bn{n}", "batch_norm", f"features.{index}", width, width
                    )
                    index += 1
                index += 1  # ReLU
                channels = width
            yield Layer(f"block{block}_pool", "pool", f"features.{index}", width, width)
            index += 1

    def classifier(self, classes: int = CLASSES, grid: int = GRID) -> Iterator[Layer]:
        """The three dense layers; `grid` is the height and width of the last feature map."""
        flat = WIDTHS[-1] * grid * grid
        yield Layer("fc1", "dense", "classifier.0", flat, HIDDEN)
        yield Layer("fc2", "dense", "classifier.3", HIDDEN, HIDDEN)
        yield Layer("predictions", "dense", "classifier.6", HIDDEN, classes)


_DEPTHS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}

ARCHITECTURES: dict[str, Architecture] = {
    name + suffix: Architecture(name + suffix, depths, batch_norm)
    for suffix, batch_norm in (("", False), ("_bn", True))
    for name, depths in _DEPTHS.items()
}

# The names of VGG's layers in network order. The largest network has those of all others.
_LARGEST = ARCHITECTURES["vgg19_bn"]
FEATURES = tuple(layer.name for layer in _LARGEST.features())
LAYERS = (*FEATURES, *(layer.name for layer in _LARGEST.classifier()))


def architecture_named(name: str) -> Architecture:
    """The network of this name; ValueError where there is none."""
    if name not in ARCHITECTURES:
        raise ValueError(
            f"Unknown architecture {name!r}; expected one of {', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[name]
