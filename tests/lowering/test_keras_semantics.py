"""What Keras decides while a model runs: training, masks, batch sizes, functions of the user's."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from small_vgg import assert_close, on_keras

from vggtorch.lowering import accelerate_


class Dropping(layers.Layer):
    """A layer whose `call` has no argument `training`; the Dropout inside asks the call context."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.drop = layers.Dropout(0.5)

    def call(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x)


def zeros(y: torch.Tensor) -> float:
    return float((y == 0).float().mean())


def test_layers_inside_of_a_layer_know_whether_it_trains() -> None:
    image = keras.Input((1000,))
    model = keras.Model(image, Dropping()(image))
    x = torch.ones(4, 1000)
    lowered = on_keras(model)
    assert zeros(lowered.eval()(x)) == 0
    assert 0.4 < zeros(lowered.train()(x)) < 0.6
    assert zeros(lowered.eval()(x)) == 0
    accelerate_(model)
    assert 0.4 < zeros(model(x, training=True)) < 0.6
    assert zeros(model(x, training=False)) == zeros(model(x)) == 0


def test_nested_models_know_whether_they_train() -> None:
    inner = keras.Input((1000,))
    nested = keras.Model(inner, Dropping()(inner))
    image = keras.Input((1000,))
    model = keras.Model(image, nested(image))
    x = torch.ones(4, 1000)
    assert 0.4 < zeros(on_keras(model).train()(x)) < 0.6
    assert zeros(on_keras(model).eval()(x)) == 0


def test_training_that_was_fixed_when_the_model_was_built() -> None:
    """Monte Carlo dropout; Keras honours it where a call doesn't say whether it trains."""
    image = keras.Input((1000,))
    model = accelerate_(keras.Model(image, layers.Dropout(0.5)(image, training=True)))
    x = torch.ones(4, 1000)
    assert 0.4 < zeros(model(x)) < 0.6
    assert zeros(model(x, training=False)) == 0
    assert zeros(torch.from_numpy(model.predict(x, verbose=0))) == 0


def attention(x: Any) -> Any:
    x = layers.LayerNormalization()(x)
    return layers.MultiHeadAttention(2, 4)(x, x)


def recurrent(x: Any) -> Any:
    return layers.LSTM(3)(layers.Dropout(0.5)(layers.Dense(4, activation="relu")(x)))


def merged(x: Any) -> Any:
    return layers.LSTM(3, return_sequences=True)(layers.Add()([x, layers.Dense(8)(x)]))


def nested(x: Any) -> Any:
    inner = keras.Input(x.shape[1:])
    return layers.LSTM(3)(keras.Model(inner, layers.Dense(4)(inner))(x))


def embedded_inside(x: Any) -> Any:
    """The mask comes up inside of a nested model, and is used outside of it."""
    tokens = keras.Input((5,), dtype="int32")
    y = layers.Dense(4)(layers.Embedding(20, 8, mask_zero=True)(tokens))
    ids = keras.ops.cast(keras.ops.sum(x, axis=-1) > 0, "int32")
    return layers.LSTM(3)(layers.Dense(3)(keras.Model(tokens, y)(ids)))


def pooled(x: Any) -> Any:
    return layers.GlobalAveragePooling1D()(layers.BatchNormalization()(x))


def pooled_behind_a_model(x: Any) -> Any:
    """The outer model says that the mask ends there; it goes on with the tensor."""
    inner = keras.Input(x.shape[1:])
    return pooled(keras.Model(inner, layers.Dense(4)(inner))(x))


BUILDS = [attention, recurrent, merged, nested, embedded_inside, pooled, pooled_behind_a_model]


@pytest.mark.parametrize("build", BUILDS)
def test_masks_reach_whoever_uses_them(build: Any) -> None:
    keras.utils.set_random_seed(0)
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(20, 8, mask_zero=True)(tokens)
    model = keras.Model(tokens, build(x))
    ids = torch.tensor([[1, 2, 0, 0, 0], [3, 4, 5, 0, 0], [1, 2, 3, 4, 5]])
    expected = model(ids, training=False).detach()
    assert_close(on_keras(model).eval()(ids).detach(), expected)
    with torch.no_grad():
        assert_close(on_keras(model).eval()(ids), expected)
        assert_close(accelerate_(model)(ids), expected)


def test_masks_of_maps() -> None:
    """4-D tensors change their layout between Keras and torch, and keep their mask."""
    image = keras.Input((3, 4, 5))
    x = layers.TimeDistributed(layers.Dense(2))(layers.Masking()(image))
    model = keras.Model(image, layers.Activation("relu")(x))
    frames = torch.randn(2, 3, 4, 5)
    frames[0, 2] = 0
    expected = model(frames, training=False)
    found = on_keras(model).eval()(frames)
    assert_close(found.detach(), expected.detach())
    for y in (found, accelerate_(model)(frames)):
        assert torch.equal(y._keras_mask, expected._keras_mask)


def test_masks_reach_the_loss() -> None:
    found = []
    for accelerated in (False, True):
        keras.utils.set_random_seed(0)
        tokens = keras.Input((5,), dtype="int32")
        x = layers.Embedding(20, 8, mask_zero=True)(tokens)
        model = keras.Model(tokens, layers.Dense(3, activation="softmax")(x))
        model.compile("sgd", "sparse_categorical_crossentropy")
        if accelerated:
            accelerate_(model)
        ids = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 0, 0]])
        history = model.fit(ids, ids % 3, verbose=0).history["loss"]
        found.append([*history, model.evaluate(ids, ids % 3, verbose=0)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


@pytest.mark.parametrize("place", ["layer", "activation"])
def test_functions_that_mix_images_see_all_of_them(place: str) -> None:
    def by_the_largest(t: Any) -> Any:
        return t / keras.ops.max(t)

    image = keras.Input((16, 16, 3))
    if place == "activation":
        x = layers.Conv2D(8, 3, activation=by_the_largest)(image)
    else:
        x = layers.Activation(by_the_largest)(layers.Conv2D(8, 3)(image))
    model = keras.Model(image, layers.Conv2D(4, 3)(x))
    x = torch.randn(6, 16, 16, 3) * torch.arange(1.0, 7.0).view(6, 1, 1, 1)
    expected = model(x).detach()
    assert_close(on_keras(model).train()(x).detach(), expected)
    with torch.no_grad():
        assert_close(on_keras(model).eval()(x), expected)


@pytest.mark.parametrize("name", ["gelu", "leaky_relu", "softmax", "selu", "relu6", "sparsemax"])
def test_kerass_own_activations(name: str) -> None:
    image = keras.Input((16, 16, 3))
    model = keras.Model(image, layers.Conv2D(4, 3)(layers.Conv2D(8, 3, activation=name)(image)))
    x = torch.randn(6, 16, 16, 3)
    expected = model(x).detach()
    assert_close(on_keras(model).train()(x).detach(), expected)
    with torch.no_grad():
        assert_close(on_keras(model).eval()(x), expected)


def test_a_batch_size_that_the_model_was_built_with_does_not_bind() -> None:
    keras.utils.set_random_seed(0)  # else a number may be so near to 0 that 1e-5 of it is nothing
    image = keras.Input((4,), batch_size=4)
    model = keras.Model(image, layers.Dense(2)(image))
    x = np.random.default_rng(0).normal(size=(10, 4)).astype("float32")
    expected = model.predict(x, batch_size=4, verbose=0)
    accelerate_(model)
    np.testing.assert_allclose(model.predict(x, batch_size=4, verbose=0), expected, rtol=1e-5)
    model.compile("sgd", "mse")
    assert np.isfinite(model.fit(x, expected, batch_size=4, verbose=0).history["loss"][0])
    assert on_keras(model)(torch.zeros(3, 4)).shape == (3, 2)
