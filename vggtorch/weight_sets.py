"""What each weight set expects of an image: the arithmetic that training it began with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightSet:
    """The arithmetic that turns RGB values of 0 to 255 into the network's input.

    Attributes:
        name: `imagenet`, `features` or `oxford`.
        bgr: the channels are reversed first; `mean` and `std` are then in BGR order.
        scale: divides the 0-255 values first.
        mean: subtracted from each channel.
        std: divides each channel last.
        source: where the numbers come from.
    """

    name: str
    bgr: bool
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source: str


WEIGHT_SETS = {
    s.name: s
    for s in (
        WeightSet(
            "imagenet",
            bgr=False,
            scale=255.0,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            source="torchvision IMAGENET1K_V1",
        ),
        WeightSet(
            "features",
            bgr=False,
            scale=255.0,
            mean=(0.48235, 0.45882, 0.40784),
            std=(1 / 255, 1 / 255, 1 / 255),
            source="torchvision VGG16_Weights.IMAGENET1K_FEATURES",
        ),
        WeightSet(
            "oxford",
            bgr=True,
            scale=1.0,
            mean=(103.939, 116.779, 123.68),
            std=(1.0, 1.0, 1.0),
            source="keras.applications.vgg16.preprocess_input",
        ),
    )
}


def weight_set_named(name: str) -> WeightSet:
    """The weight set of this name; ValueError where there is none."""
    if name not in WEIGHT_SETS:
        raise ValueError(f"Unknown weight set {name!r}; expected one of {', '.join(WEIGHT_SETS)}.")
    return WEIGHT_SETS[name]
