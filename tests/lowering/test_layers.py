"""Single layers in all their settings, those that run as Keras runs them, and any name."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.multiprocessing
from keras import layers
from small_vgg import assert_close, images, on_keras, randomise

from vggtorch.lowering.layer_modules import KerasLayer


@pytest.mark.parametrize("size", [15, 16])
@pytest.mark.parametrize(
    "kernel,stride,dilation", [(3, 1, 1), (2, 1, 1), (5, 2, 1), (4, 3, 1), (3, 1, 2)]
)
@pytest.mark.parametrize("kind", [layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D])
def test_same_padding(kind: type, kernel: int, stride: int, dilation: int, size: int) -> None:
    options = {"strides": stride, "dilation_rate": dilation, "padding": "same"}
    filters = () if kind is layers.DepthwiseConv2D else (6,)
    image = keras.Input((size, size + 1, 4))
    y = kind(*filters, kernel, **options)(image)
    model = randomise(keras.Model(image, y))
    x = images(model)
    expected = model(x).detach()
    assert_close(on_keras(model)(x).detach(), expected)
    with torch.no_grad():
        assert_close(on_keras(model).eval()(x), expected)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("layer", [layers.MaxPooling2D, layers.AveragePooling2D])
def test_pooling(layer: type, padding: str) -> None:
    image = keras.Input((15, 14, 4))
    model = keras.Model(image, [layer(3, 2, padding)(image), layer(2, 2, padding)(image)])
    x = images(model)
    for actual, expected in zip(on_keras(model)(x), model(x), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("size", [2, (3, 1)])
def test_adaptive_pooling_where_the_size_is_no_multiple(size: Any) -> None:
    image = keras.Input((7, 6, 4))
    y = layers.AdaptiveAveragePooling2D(size)(layers.ReLU()(layers.Conv2D(4, 3)(image)))
    model = randomise(keras.Model(image, y))
    x = images(model)
    assert_close(as_torch(model, x), model(x))


def test_a_layer_without_handler_gets_training_and_keeps_its_parameters() -> None:
    image = keras.Input((6, 6, 3))
    noisy = layers.GaussianNoise(1.0)(layers.UnitNormalization()(image))
    model = keras.Model(image, layers.PReLU(name="prelu")(noisy))
    x = images(model)
    lowered: Any = on_keras(model)
    assert torch.equal(lowered.eval()(x), model(x, training=False))
    assert not torch.allclose(lowered.train()(x), lowered.eval()(x))
    assert lowered.network.prelu.alpha is model.get_layer("prelu").alpha.value


def as_torch(model: keras.Model, x: torch.Tensor) -> torch.Tensor:
    """What the lowered model gives, in which no layer may run as Keras runs it."""
    lowered = on_keras(model).train()
    assert not any(isinstance(m, KerasLayer) for m in lowered.network.modules())
    output = lowered(x).detach()
    with torch.no_grad():
        assert_close(lowered.eval()(x), output)
    return output


@pytest.mark.parametrize(
    "layer",
    [
        layers.Rescaling(2.0, -1.0),
        layers.Rescaling([0.5, 2.0, 1.0], [1.0, 0.0, -1.0]),
        layers.Rescaling(0.5, [1.0, 0.0, -1.0], dtype="mixed_bfloat16"),
        layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[4.0, 1.0, 0.0]),
        layers.Normalization(mean=1.0, variance=4.0, axis=None),
        layers.LayerNormalization(),
        layers.LayerNormalization(center=False, scale=False, epsilon=0.1, dtype="mixed_bfloat16"),
        layers.UpSampling2D((2, 3)),
        layers.Reshape((4, 5, 6)),
        layers.Reshape((-1, 3)),
        layers.Reshape((60, -1)),
    ],
)
def test_layers_of_one_input(layer: keras.Layer) -> None:
    image = keras.Input((8, 5, 3))
    model = randomise(keras.Model(image, layer(image)))
    x = images(model)
    assert_close(as_torch(model, x), model(x).detach())


@pytest.mark.parametrize("axis", [-1, (1, 2), None])
def test_adapted_normalization(axis: Any) -> None:
    image = keras.Input((8, 5, 3))
    layer = layers.Normalization(axis=axis)
    model = keras.Model(image, layer(image))
    x = images(model)
    layer.adapt(3 * x.numpy() + 1)
    assert_close(as_torch(model, x), model(x).detach())
    layer.adapt(x.numpy())
    assert_close(as_torch(model, x), model(x).detach())


@pytest.mark.parametrize(
    "merge", [layers.Add, layers.Average, layers.Maximum, layers.Minimum, layers.Multiply]
)
def test_merges(merge: type) -> None:
    image = keras.Input((6, 6, 3))
    several = [image, layers.Rescaling(2.0)(image), layers.Rescaling(-1.0, 0.5)(image)]
    model = keras.Model(image, merge()(several))
    x = images(model)
    assert_close(as_torch(model, x), model(x))


def test_layers_set_to_what_only_keras_does() -> None:
    image = keras.Input((6, 4, 3))
    outputs = [
        layers.Normalization(mean=1.0, variance=4.0, invert=True)(image),
        layers.LayerNormalization(axis=[2, 3])(image),
        layers.UpSampling2D(2, interpolation="bilinear")(image),
        layers.Rescaling(np.ones((4, 3)), 1.0)(image),
    ]
    model = keras.Model(image, outputs)
    x = images(model)
    for actual, expected in zip(on_keras(model)(x), model(x), strict=True):
        assert_close(actual.detach(), expected.detach())


def test_layers_of_any_name() -> None:
    """Also of one that the module itself would use."""
    x = image = keras.Input((4,), name="inputs")
    names = ["steps", "forward", "data_format", "training", "outputs"]
    for name in names:
        x = layers.Dense(4, name=name)(x)
    model = keras.Model(image, x)
    lowered = on_keras(model)
    assert_close(lowered(torch.ones(2, 4)).detach(), model(torch.ones(2, 4)).detach())
    found = [name for name, _ in lowered.network.named_modules()][1:]
    assert found == ["steps", "forward_", "data_format", "training_", "outputs"]


def test_masks_are_kept() -> None:
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 4, mask_zero=True)(tokens)
    model = keras.Model(tokens, layers.LSTM(3)(layers.BatchNormalization()(layers.Dense(4)(x))))
    ids = torch.tensor([[1, 2, 0, 0, 0], [3, 4, 5, 0, 0]])
    assert_close(on_keras(model).eval()(ids).detach(), model(ids).detach())


def test_subclasses_and_layers_with_a_call_of_their_own_run_as_they_are() -> None:
    class Halved(layers.Reshape):
        def call(self, x: torch.Tensor) -> torch.Tensor:
            return super().call(x) / 2

    image = keras.Input((6, 4, 3))
    doubled, merged = layers.Permute((2, 1, 3)), layers.Add()
    for layer in (doubled, merged):
        layer.call = lambda x, call=layer.call: call(x) * 2
    model = keras.Model(image, [Halved((24, 3))(image), doubled(image), merged([image, image])])
    x = images(model)
    for actual, expected in zip(on_keras(model)(x), model(x), strict=True):
        assert_close(actual, expected)
