"""What a model remembers: its weight set, and how an image becomes what it expects.

It stands in the model's class, which `keras_graph` makes, because a model's class is what Keras
keeps when it clones a model and when it saves and loads one.
"""

from __future__ import annotations

import dataclasses

import keras

from vggtorch.keras_graph import model_class, remembers
from vggtorch.weight_sets import DataConfig

PREPROCESSING_SUFFIX = "_preprocessing"  # of the name of the layer that preprocesses inside a model


def weight_set(model: keras.Model) -> str | None:
    """Name of the weight set whose preprocessing a model expects; None where it isn't known.

    Example:
        >>> import vggtorch as vt
        >>> model = vt.VGG11(weights=None, include_top=False)
        >>> print(vt.weight_set(model))  # random weights belong to none
        None
    """
    return remembered(model).weight_set


def remembered(model: keras.Model) -> DataConfig:
    """What a model remembers as it stands; the defaults where it remembers nothing."""
    found = getattr(type(model), "data_config", None)
    return found if isinstance(found, DataConfig) else DataConfig()


def data_config(model: keras.Model) -> DataConfig:
    """How an image becomes what a model expects: size, crop, interpolation, arithmetic, classes.

    The size is that of the model's input where it is fixed, else the one that the model was
    trained with. `vggtorch.preprocess(images, model)` does what this says. The names are those of
    timm's `pretrained_cfg`.

    Example:
        >>> import vggtorch as vt
        >>> vgg = vt.VGG11(weights=None, include_top=False, input_shape=(64, 64, 3))
        >>> config = vt.data_config(vgg)
        >>> config.input_size, config.crop_mode, config.crop_pct
        ((3, 64, 64), 'center', 0.875)
    """
    config = remembered(model)
    if any(layer.name.endswith(PREPROCESSING_SUFFIX) for layer in model.layers):
        config = dataclasses.replace(config, preprocessing_inside=True)
    size = _input_size(model)
    return config if size is None else dataclasses.replace(config, input_size=(3, *size))


def _input_size(model: keras.Model) -> tuple[int, int] | None:
    """Height and width of a model's one input, None where they are open or there are several."""
    shapes = [tensor.shape for tensor in getattr(model, "inputs", None) or ()]
    if len(shapes) != 1 or len(shapes[0]) != 4:
        return None
    axis = 1 if keras.config.image_data_format() == "channels_last" else 2
    height, width = shapes[0][axis : axis + 2]
    if height is None and width is None:
        return None
    return height or width, width or height


def remember_(model: keras.Model, config: str | DataConfig | None) -> keras.Model:
    """Let a Functional model remember what it expects of an image, in place; returns the model.

    Args:
        model: a model of another class (Sequential, a subclass of the user's) stays as it is.
        config: all of it; or a weight set alone, None for none, which leaves the rest as it was.
    """
    if remembers(model):
        if not isinstance(config, DataConfig):
            config = dataclasses.replace(
                remembered(model), weight_set=config, preprocessing_inside=False
            )
        model.__class__ = model_class(config)
    return model
