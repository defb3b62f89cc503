"""VGG11, VGG13, VGG16 and VGG19 as Keras models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Real
from os import PathLike
from typing import Any

import keras
import numpy as np
from keras import layers

from vggtorch.architectures import ARCHITECTURES, CLASSES, Architecture, Layer, architecture_named
from vggtorch.checks import is_whole, switch, whole
from vggtorch.keras_graph import device, obtain_input_shape
from vggtorch.models.filling import path_of
from vggtorch.models.leftovers import fill_from_
from vggtorch.models.preprocessing import as_layers
from vggtorch.weight_sets import WEIGHT_SETS
from vggtorch.weights import converted

# What the pretrained classifiers take, by Keras's data format.
SHAPES = {"channels_last": (224, 224, 3), "channels_first": (3, 224, 224)}


def _features(x: keras.KerasTensor, architecture: Architecture, prefix: str) -> keras.KerasTensor:
    """The convolutions and pools on top of an image, in keras.applications' order and names."""
    channel_axis = -1 if keras.config.image_data_format() == "channels_last" else 1
    activation = None if architecture.batch_norm else "relu"
    for layer in architecture.features():
        name = prefix + layer.name
        if layer.kind == "conv":
            convolution = layers.Conv2D(
                layer.outputs, (3, 3), activation=activation, padding="same", name=name
            )
            x = convolution(x)
        elif layer.kind == "batch_norm":
            # torchvision's and the papers' values; Keras's own defaults are 0.99 and 1e-3.
            x = layers.BatchNormalization(channel_axis, momentum=0.9, epsilon=1e-5, name=name)(x)
            x = layers.Activation("relu", name=prefix + layer.name.replace("_bn", "_relu"))(x)
        else:
            x = layers.MaxPooling2D((2, 2), strides=(2, 2), name=name)(x)
    return x


def _classifier(
    x: keras.KerasTensor,
    units: Iterable[Layer],
    activation: str | Callable | None,
    dropout: float,
    prefix: str,
) -> keras.KerasTensor:
    """The dense layers on top of the last map."""
    x = layers.Flatten(name=f"{prefix}flatten")(x)
    for layer in units:
        last, name = layer.name == "predictions", prefix + layer.name
        x = layers.Dense(layer.outputs, activation=activation if last else "relu", name=name)(x)
        if dropout and not last:
            x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
    return x


def _check_shape(shape: Any) -> None:
    """Refuse what is no shape of an image, and channels that are open."""
    sides = list(shape) if isinstance(shape, Sequence | np.ndarray) else []
    channels = -1 if keras.config.image_data_format() == "channels_last" else 0
    given = [side for side in sides if side is not None]
    if shape is not None and (
        len(sides) != 3
        or sides[channels] is None
        or not all(is_whole(side) and side > 0 for side in given)
    ):
        expected = "(H, W, 3)" if channels else "(3, H, W)"
        raise ValueError(
            f"Received input_shape={shape!r}; expected {expected}, with None for H and W where "
            f"they are open."
        )


def _constructor(plain_name: str) -> Callable[..., keras.Model]:
    """The public function that builds one of the four networks, with or without batch norm.

    The four have one signature and one docstring, so one function makes them all.
    """

    def build(
        include_top: bool = True,
        weights: str | PathLike | None = "imagenet",
        input_tensor: keras.KerasTensor | None = None,
        input_shape: tuple[int | None, ...] | None = None,
        pooling: str | None = None,
        classes: int = CLASSES,
        classifier_activation: str | Callable | None = "softmax",
        name: str | None = None,
        *,
        batch_norm: bool = False,
        dropout: float = 0.0,
        include_preprocessing: bool = False,
        prefix: str = "",
    ) -> keras.Model:
        if not isinstance(prefix, str) or "/" in prefix or "." in prefix:
            raise ValueError(f"Received prefix={prefix!r}; expected a text without '/' and '.'.")
        include_top = switch("include_top", include_top)
        batch_norm = switch("batch_norm", batch_norm)
        include_preprocessing = switch("include_preprocessing", include_preprocessing)
        architecture = ARCHITECTURES[plain_name + ("_bn" if batch_norm else "")]
        if pooling not in (None, "avg", "max"):
            raise ValueError(f"Received pooling={pooling!r}; expected None, 'avg' or 'max'.")
        if not isinstance(dropout, Real) or not 0 <= dropout < 1:
            raise ValueError(f"Received dropout={dropout!r}; expected a rate from 0 to below 1.")
        if include_top:
            classes = whole("classes", classes)
        _check_shape(input_shape)
        published = isinstance(weights, str) and weights in WEIGHT_SETS
        if published and include_top and classes != CLASSES:
            raise ValueError(
                f"Received classes={classes} with weights={weights!r} and include_top=True, whose "
                f"classifier has {CLASSES}. Use include_top=False and stack a head of your own, or "
                f"weights=None."
            )
        if weights is not None and include_top and classifier_activation not in (None, "softmax"):
            raise ValueError(
                f"Received classifier_activation={classifier_activation!r} with pretrained "
                f"weights; expected 'softmax', or None for logits."
            )
        sizes = input_shape if input_tensor is None else getattr(input_tensor, "shape", (None,))[1:]
        expected = SHAPES[keras.config.image_data_format()]
        channels = expected.index(3)
        if published and len(sizes or ()) == 3 and sizes[channels] not in (3, None):
            raise ValueError(
                f"Received images of {tuple(sizes)} with weights={weights!r}, whose first kernel "
                f"reads 3 channels. Build the network with 3 and change it: "
                f"vt.with_input(vgg, channels={sizes[channels]}, rule=...)."
            )
        if published and include_top and sizes and tuple(sizes) != expected:
            raise ValueError(
                f"Received images of {tuple(sizes)} with weights={weights!r} and include_top=True; "
                f"this classifier reads a map of 7x7, which images of {expected} "
                f"give. Use include_top=False and stack a head of your own, or take other sizes by "
                f"adaptive pooling, as torchvision does: vt.with_input(vt.insert(vgg, "
                f"'block5_pool', keras.layers.AdaptiveAveragePooling2D(7)), {tuple(sizes)}), with "
                f"the vgg of {expected}."
            )
        # The checkpoint first: what can't be had should cost no time.
        checkpoint = weight_set = None
        if weights is not None:
            checkpoint = converted(path_of(weights, [architecture], include_top=include_top))
            weight_set = checkpoint.weight_set
        if include_preprocessing and weights is not None and weight_set is None:
            raise ValueError(
                f"include_preprocessing=True needs to know the preprocessing, and {weights!r} does "
                f"not say which weight set it belongs to. Use include_preprocessing=False and "
                f"preprocess()."
            )

        input_shape = obtain_input_shape(
            input_shape,
            default_size=224,
            min_size=32,
            data_format=keras.config.image_data_format(),
            require_flatten=include_top,
            weights="imagenet" if published else None,
        )
        # Random values that the checkpoint would replace are never made.
        with keras.device("meta") if checkpoint else keras.device(device()):
            if input_tensor is None:
                inputs = image = layers.Input(shape=input_shape)
            elif keras.backend.is_keras_tensor(input_tensor):
                image, inputs = input_tensor, keras.utils.get_source_inputs(input_tensor)
            else:
                raise ValueError(
                    f"Received input_tensor of type {type(input_tensor).__name__}; expected a "
                    f"Keras tensor, such as keras.Input(shape=(160, 160, 3))."
                )
            if include_preprocessing:
                image = as_layers(image, weight_set or "imagenet", prefix)
            x = _features(image, architecture, prefix)
            if include_top:
                units = architecture.classifier(classes)
                x = _classifier(x, units, classifier_activation, dropout, prefix)
            elif pooling == "avg":
                x = layers.GlobalAveragePooling2D()(x)
            elif pooling == "max":
                x = layers.GlobalMaxPooling2D()(x)
            model = keras.Model(inputs, x, name=name or architecture.name)
        if weights is not None and checkpoint is not None:
            top = classes if include_top else 0
            return fill_from_(model, checkpoint, weights, classes=top, prefix=prefix)
        return model

    title = plain_name.upper()
    build.__name__ = build.__qualname__ = title
    build.__doc__ = f"""{title} as a Keras Functional model on torch.

    Signature, defaults, layer names and order are those of keras.applications; batch norm layers,
    which that does not have, are named `block1_bn1` and their ReLU `block1_relu1`.

    Args:
        include_top: whether flatten, fc1, fc2 and predictions are included.
        weights: `imagenet`, `features`, `oxford`, the path of a checkpoint, `hf://owner/name/file`,
            or None for random.
        input_tensor: a Keras tensor to use as the image, (N, H, W, 3) in channels-last.
        input_shape: (H, W, 3), at least 32x32; without a top, H and W may be None.
        pooling: without a top: None for the feature map, `avg` or `max` for its mean or maximum.
        classes: units of predictions.
        classifier_activation: of predictions; None for logits.
        name: the model's name; the architecture's by default.
        batch_norm: the network with batch norm after each convolution.
        dropout: rate of a Dropout after fc1 and after fc2 (torchvision trains with 0.5).
        include_preprocessing: the model then takes RGB images of 0 to 255 as they are.
        prefix: of the names of all layers, so that two networks can be parts of one model.

    Returns:
        The model; `vggtorch.weight_set(model)` says which preprocessing it expects.

    Raises:
        ValueError: arguments that don't go together, or a checkpoint that does not fit.
        OSError: the checkpoint can't be had.

    Source: Simonyan and Zisserman, ICLR 2015.

    Example:
        >>> import vggtorch as vt
        >>> shape = (32, 32, 3)
        >>> features = vt.{title}(weights=None, include_top=False, input_shape=shape, pooling="avg")
        >>> features.output_shape
        (None, 512)
    """
    return build


_PLAIN = {name: _constructor(name) for name in ("vgg11", "vgg13", "vgg16", "vgg19")}
VGG11, VGG13, VGG16, VGG19 = _PLAIN.values()


def constructor(architecture: str) -> Callable[..., keras.Model]:
    """The function that builds one of the eight networks: `VGG16`, say, for "vgg16_bn" too.

    Raises ValueError for a name that isn't in ARCHITECTURES.
    """
    network = architecture_named(architecture)
    return partial(_PLAIN[network.name.removesuffix("_bn")], batch_norm=network.batch_norm)
