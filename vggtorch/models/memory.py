"""What a model remembers: its weight set, and how an image becomes what it expects.

It stands in the model's class, which `keras_graph` makes, because a model's class is what Keras
keeps when it clones a model and when it saves and loads one. It is also written on the model's
layers, for models that users make of them: keras.Model(vgg.input, ...).
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import keras

from vggtorch.keras_graph import (
    calls,
    check_model,
    data_format,
    functional,
    graph_of,
    mark_,
    marked,
    model_class,
    operation_kind,
    remembers,
)
from vggtorch.weight_sets import DataConfig
from vggtorch.weights import Checkpoint

PREPROCESSING_SUFFIX = "_preprocessing"  # of the name of the layer that preprocesses inside a model

_WRITTEN = "vggtorch_remembered"  # of a Sequential model, and what that stood on

PASSING = (  # layers behind which an image is an image of the same colours
    keras.layers.InputLayer,
    keras.layers.Identity,
    keras.layers.Dropout,
    keras.layers.SpatialDropout2D,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.ZeroPadding2D,
    keras.layers.Cropping2D,
    keras.layers.Resizing,
    keras.layers.CenterCrop,
    keras.layers.RandomCrop,
    keras.layers.RandomFlip,
    keras.layers.RandomRotation,
    keras.layers.RandomTranslation,
    keras.layers.RandomZoom,
)


def weight_set(model: keras.Model) -> str | None:
    """Name of the weight set whose preprocessing a model expects; None where it isn't known.

    A model that has a network nested in it, or is made of a network's layers, expects what that
    network expects, if nothing comes before it but layers that leave colours alone.

    Example:
        >>> import vggtorch as vt
        >>> model = vt.VGG11(weights=None, include_top=False)
        >>> print(vt.weight_set(model))  # random weights belong to none
        None
    """
    check_model(model, "weight_set")
    return remembered(model).weight_set


def remembered(model: keras.Model) -> DataConfig:
    """What a model remembers as it stands; the defaults where it remembers nothing.

    A model of no class that remembers goes by what `remember_` wrote on it, as long as it is made
    of the same layers, or else by the one network that reads its images; its classes aren't that
    network's.
    """
    found = getattr(type(model), "data_config", None)
    if isinstance(found, DataConfig):
        return found
    written = written_on(model)
    return _of_its_network(model) if written is None else written


def written_on(model: keras.Model) -> DataConfig | None:
    """What `remember_` wrote on a Sequential model, if that is still made of the same layers."""
    written = getattr(model, _WRITTEN, None)
    if written is None or written[1:] != (_of_its_network(model), _layer_names(model)):
        return None
    found: DataConfig = written[0]
    return found


def _of_its_network(model: keras.Model) -> DataConfig:
    """What the one network remembers that reads a model's images."""
    if functional(model) is None or not _reads_rgb(model):
        return DataConfig()
    readers = image_readers(model)
    configs = {marked(x) if functional(x) is None else remembered(x) for x in readers}
    expected = configs.pop() if len(configs) == 1 else DataConfig()
    return dataclasses.replace(expected, label_names=())


def _layer_names(model: keras.Model) -> tuple[str, ...]:
    return tuple(layer.name for layer in model.layers)


def _reads_rgb(model: keras.Model) -> bool:
    """Whether what enters a model has three channels, and is no map from within a network."""
    graph = graph_of(model, "preprocess")
    axis = -1 if data_format(graph) == "channels_last" else 1
    maps = [tensor for tensor in graph.inputs if len(tensor.shape) == 4]
    return not maps or any(tensor.shape[axis] in (3, None) for tensor in maps)


def preprocesses(model: keras.Model) -> bool:
    """Whether the preprocessing of a weight set is part of a model, or of one nested in it."""
    if any(layer.name.endswith(PREPROCESSING_SUFFIX) for layer in model.layers):
        return True
    if functional(model) is None:
        return False
    nested = [x for x in image_readers(model, flips=False) if functional(x) is not None]
    return bool(nested) and all(map(preprocesses, nested))


def image_readers(model: keras.Model, *, flips: bool = True) -> list[Any]:
    """The layers that read a model's images, perhaps through layers that leave colours alone.

    With `flips`, also through the two operations of built-in preprocessing. Inputs that can't be
    images aren't looked at, where there are some that can.
    """
    return _readers_and_images(model, flips)[0]


def image_tensors(model: keras.Model) -> set[int]:
    """The ids of the tensors of a model's graph that are its images, as its network reads them.

    That is what enters it, behind layers that leave colours alone too, and what its built-in
    preprocessing makes of it.
    """
    return _readers_and_images(model, True)[1]


def _readers_and_images(model: keras.Model, flips: bool) -> tuple[list[Any], set[int]]:
    graph = graph_of(model, "preprocess")
    inputs = [tensor for tensor in graph.inputs if len(tensor.shape) == 4] or graph.inputs
    images = {id(tensor) for tensor in inputs}
    readers: dict[Any, None] = {}
    for node in calls(graph):
        if node.is_input or not any(id(tensor) in images for tensor in node.input_tensors):
            continue
        operation = node.operation
        built_in = operation_kind(operation) == "Flip" or operation.name.endswith(
            PREPROCESSING_SUFFIX
        )
        if isinstance(operation, PASSING) or (flips and built_in):
            images |= {id(tensor) for tensor in node.outputs}
        else:
            readers[operation] = None
    return list(readers), images


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
    check_model(model, "data_config")
    config = remembered(model)
    if preprocesses(model):
        config = dataclasses.replace(config, preprocessing_inside=True)
    size = _input_size(model)
    return config if size is None else dataclasses.replace(config, input_size=(3, *size))


def _input_size(model: keras.Model) -> tuple[int, int] | None:
    """Height and width of a model's one input, None where they are open or there are several."""
    shapes = [tensor.shape for tensor in getattr(model, "inputs", None) or ()]
    if len(shapes) != 1 or len(shapes[0]) != 4:
        return None
    graph = functional(model)
    layout = keras.config.image_data_format() if graph is None else data_format(graph)
    axis = 1 if layout == "channels_last" else 2
    height, width = shapes[0][axis : axis + 2]
    if height is None and width is None:
        return None
    return height or width, width or height


def remember_checkpoint_(model: keras.Model, checkpoint: Checkpoint, classes: int) -> keras.Model:
    """Let a model remember what the model expected whose weights it now has, in place.

    What the model itself does to images stays its own, and its size where that is fixed. It has the
    names of classes if it has all of the `classes` that were loaded into its outputs; 0 for none.
    """
    if checkpoint.data_config is None:
        return remember_(model, checkpoint.weight_set)
    before, config = remembered(model), DataConfig.from_dict(json.loads(checkpoint.data_config))
    named = classes > 0 and len(config.label_names) == classes
    config = dataclasses.replace(
        config,
        weight_set=checkpoint.weight_set,
        preprocessing_inside=before.preprocessing_inside,
        label_names=config.label_names if named else () if classes else before.label_names,
    )
    return remember_(model, config)


def remember_(model: keras.Model, config: str | DataConfig | None) -> keras.Model:
    """Let a model remember what it expects of an image, in place; returns the model.

    A Functional model remembers it by its class, in files too; a Sequential one as long as it is
    there and has the same layers. A subclass of the user's stays as it is.

    Args:
        model: Functional or Sequential.
        config: all of it; or a weight set alone, None for none, which leaves the rest as it was.
    """
    if not isinstance(config, DataConfig):
        config = dataclasses.replace(
            remembered(model), weight_set=config, preprocessing_inside=False
        )
    if remembers(model):
        model.__class__ = model_class(config)
        for layer in model.layers:
            mark_(layer, config)
    elif functional(model) is not None:
        setattr(model, _WRITTEN, (config, _of_its_network(model), _layer_names(model)))
    return model
