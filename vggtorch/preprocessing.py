"""What each weight set expects of an image: as a function, as Keras layers, as a model's class.

A weight set is known by its name. A model remembers the one it was trained with in its class
(`weight_set(model)`), because a model's class is what Keras keeps when it clones a model and when
it saves and loads one.
"""

from __future__ import annotations

from dataclasses import dataclass

import keras
from keras.src.models.functional import Functional  # what keras.Model(inputs, outputs) returns


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
            scale=1.0,
            mean=(123.0, 117.0, 104.0),
            std=(1.0, 1.0, 1.0),
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


@keras.saving.register_keras_serializable("vggtorch")
class ImagenetModel(Functional):
    """A Functional model whose weights expect `imagenet` preprocessing."""

    weight_set = "imagenet"


@keras.saving.register_keras_serializable("vggtorch")
class FeaturesModel(Functional):
    """A Functional model whose weights expect `features` preprocessing."""

    weight_set = "features"


@keras.saving.register_keras_serializable("vggtorch")
class OxfordModel(Functional):
    """A Functional model whose weights expect `oxford` preprocessing."""

    weight_set = "oxford"


_CLASSES = {c.weight_set: c for c in (ImagenetModel, FeaturesModel, OxfordModel)}


def weight_set(model: keras.Model) -> str | None:
    """Name of the weight set whose preprocessing `model` expects; None where it isn't known."""
    return getattr(type(model), "weight_set", None)


def remember_(model: keras.Model, name: str | None) -> keras.Model:
    """Give a Functional model the class that says which preprocessing it expects, in place.

    None makes it a plain Functional model again, which expects no preprocessing that we know of.
    Returns the model.
    """
    model.__class__ = Functional if name is None else _CLASSES[name]
    return model
