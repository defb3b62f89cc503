"""Networks, images and comparisons for the tests of this room."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import torch
import torch.multiprocessing
from keras import layers

from vggtorch import keras_graph
from vggtorch.lowering import OnKeras


def on_keras(
    model: keras.Model,
    data_format: str | None = None,
    *,
    checkpoint: bool = False,
    winograd: bool = False,
) -> OnKeras:
    """The torch network of a model on the model's own Parameters, so that gradients are Keras's."""
    graph = keras_graph.graph_of(model, "on_keras")
    lowered = OnKeras(graph, model.name, data_format, winograd)
    if checkpoint:
        lowered.network.meta["checkpoint"] = True
    return lowered


def randomise(model: keras.Model) -> keras.Model:
    """Give batch norms and biases values that a mistake would show in."""
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if variable.name in ("gamma", "moving_variance"):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif variable.name in ("beta", "moving_mean", "bias"):
            variable.assign(rng.normal(0, 0.1, variable.shape))
    return model


def small_vgg(data_format: str = "channels_last", dtype: str = "float32") -> keras.Model:
    """Two blocks of a VGG, one with batch norm, and its classifier."""
    keras.utils.set_random_seed(0)
    options = {"data_format": data_format}
    shape = (16, 16, 3) if data_format == "channels_last" else (3, 16, 16)
    axis = -1 if data_format == "channels_last" else 1
    with_dtype = {"dtype": dtype}
    x = image = keras.Input(shape)
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="block1_conv1",
                      **options, **with_dtype)(x)  # fmt: skip
    x = layers.MaxPooling2D(2, name="block1_pool", **options, **with_dtype)(x)
    x = layers.Conv2D(16, 3, padding="same", name="block2_conv1", **options, **with_dtype)(x)
    x = layers.BatchNormalization(axis, 0.5, name="block2_bn1", **with_dtype)(x)
    x = layers.Activation("relu", name="block2_relu1", **with_dtype)(x)
    x = layers.MaxPooling2D(2, name="block2_pool", **options, **with_dtype)(x)
    x = layers.Flatten(name="flatten", **options)(x)
    x = layers.Dense(32, activation="relu", name="fc1", **with_dtype)(x)
    x = layers.Dense(10, activation="softmax", name="predictions", **with_dtype)(x)
    return randomise(keras.Model(image, x))


def dropout_vgg() -> keras.Model:
    """small_vgg with a second convolution in its first block and dropout in its second."""
    keras.utils.set_random_seed(0)
    x = image = keras.Input((16, 16, 3))
    for _ in range(2):
        x = layers.Conv2D(8, 3, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Dropout(0.5)(layers.Conv2D(8, 3, padding="same")(x))
    x = layers.Flatten()(layers.MaxPooling2D()(x))
    return randomise(keras.Model(image, layers.Dense(10)(x)))


def images(model: keras.Model | None = None, n: int = 4) -> torch.Tensor:
    """Random images for a model; without one, for `small_vgg`, which need not be built for them."""
    generator = torch.Generator().manual_seed(0)
    shape = (16, 16, 3) if model is None else model.input_shape[1:]
    return torch.randn(n, *shape, generator=generator)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of the largest magnitude (or of 0.01, below which it is noise)."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * max(expected.abs().max().item(), 0.01)


def step(model: keras.Model, run: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a step of training leaves: outputs, and gradients or moving statistics."""
    output = run(images(model))
    output.square().sum().backward()
    left = [v.value.grad if v.trainable else v.value.detach() for v in model.variables]
    return output.detach(), left


def operations(run: Any, x: torch.Tensor) -> set[str]:
    """The operations of torch that a call runs."""
    with torch.profiler.profile() as profile:
        run(x)
    return {event.key for event in profile.key_averages()}


FUSED = "mkldnn::_convolution_pointwise"


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
