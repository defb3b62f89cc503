"""NaN stays NaN and infinity infinity, wherever it comes up and however the network runs."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import pytest
import torch
from keras import layers
from small_vgg import FUSED, images, on_keras, operations, small_vgg

from vggtorch.lowering import accelerate_, has_fused_ops


def same_as_keras(model: keras.Model, x: torch.Tensor) -> np.ndarray:
    """What Keras computes, which both ways to run the network must give too."""
    with torch.no_grad():
        expected = model(x, training=False).numpy()
        found = on_keras(model).eval()(x).numpy()
    plain = on_keras(model).eval()(x).detach().numpy()
    for actual in (found, plain):
        np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
        np.testing.assert_allclose(actual, expected, rtol=1e-4)
    return expected


def in_the_kernel(model: keras.Model, x: torch.Tensor) -> None:
    model.get_layer("block1_conv1").kernel.value.data[1, 1, 0, 0] = torch.nan


def in_the_bias(model: keras.Model, x: torch.Tensor) -> None:
    model.get_layer("block2_conv1").bias.value.data[0] = torch.nan


def in_the_moving_mean(model: keras.Model, x: torch.Tensor) -> None:
    model.get_layer("block2_bn1").moving_mean.value.data[3] = torch.nan


def of_a_negative_variance(model: keras.Model, x: torch.Tensor) -> None:
    model.get_layer("block2_bn1").moving_variance.value.data[3] = -1.0


def in_one_image(model: keras.Model, x: torch.Tensor) -> None:
    x[1, 3, 3, 0] = torch.nan


def of_an_infinite_image(model: keras.Model, x: torch.Tensor) -> None:
    x[2] = torch.inf


def of_infinite_weights(model: keras.Model, x: torch.Tensor) -> None:
    model.get_layer("block2_conv1").kernel.value.data.fill_(torch.inf)


def in_the_dense_kernel(model: keras.Model, x: torch.Tensor) -> None:
    model.get_layer("fc1").kernel.value.data[0, 0] = torch.nan


@pytest.mark.parametrize(
    "spoil",
    [
        in_the_kernel,
        in_the_bias,
        in_the_moving_mean,
        of_a_negative_variance,
        in_one_image,
        of_an_infinite_image,
        of_infinite_weights,
        in_the_dense_kernel,
    ],
)
def test_nan_reaches_the_output(spoil: Callable[[keras.Model, torch.Tensor], None]) -> None:
    model = small_vgg()
    x = images(model)
    spoil(model, x)
    assert np.isnan(same_as_keras(model, x)).any()


def test_sums_that_overflow_to_both_sides() -> None:
    """All that goes in is finite; inf - inf inside of the second convolution makes NaN of it."""
    image = keras.Input((8, 8, 2))
    first = layers.Conv2D(2, 1, activation="relu", use_bias=False)
    second = layers.Conv2D(2, 1, activation="relu", use_bias=False)
    model = keras.Model(image, second(first(image)))
    first.kernel.assign(np.full((1, 1, 2, 2), 1e30))
    second.kernel.assign(np.array([[3.0, -3.0], [-3.0, 3.0]]).reshape(1, 1, 2, 2))
    x = torch.full((2, 8, 8, 2), 1e30)
    assert np.isnan(same_as_keras(model, x)).all()


def test_large_numbers_without_nan() -> None:
    """Where no sum can overflow any more, the modules run one by one, and give what they give."""
    image = keras.Input((8, 8, 2))
    conv = layers.Conv2D(2, 1, activation="relu", use_bias=False)
    model = keras.Model(image, conv(image))
    conv.kernel.assign(np.full((1, 1, 2, 2), 2.0))
    for size in (1.0, 1e36, 1e38):
        expected = same_as_keras(model, torch.full((2, 8, 8, 2), size))
        assert not np.isnan(expected).any()


def test_finite_networks_run_fused() -> None:
    model = small_vgg()
    x = images(model)
    with torch.no_grad():
        ran = operations(on_keras(model).eval(), x)
    assert (FUSED in ran) == has_fused_ops(x, x.dtype)
    assert not has_fused_ops(x, x.dtype) or "aten::relu" not in ran


def test_evaluation_of_a_diverged_model_is_not_finite() -> None:
    model = accelerate_(small_vgg())
    x = images(model)
    in_the_kernel(model, x)
    model.compile(loss="sparse_categorical_crossentropy")
    assert np.isnan(model.evaluate(x.numpy(), np.arange(4), verbose=0))
    assert np.isnan(model.predict(x, verbose=0)).all()


def of_two(*weights: float) -> np.ndarray:
    """A 1x1 kernel from two channels to one."""
    return np.array(weights).reshape(1, 1, 2, 1)


def test_a_batch_norm_that_overflows_with_the_weights_alone() -> None:
    """Its scale times them is infinite, while it gets zeros."""
    image = keras.Input((4, 4, 2))
    conv, norm = layers.Conv2D(1, 1, use_bias=False), layers.BatchNormalization()
    model = keras.Model(image, layers.ReLU()(norm(conv(image))))
    conv.kernel.assign(of_two(1e10, -1e10))
    norm.gamma.assign([1e30])
    norm.beta.assign([1.0])
    assert (same_as_keras(model, torch.ones(2, 4, 4, 2)) == 1).all()


@pytest.mark.parametrize("bias", [np.nan, np.inf, -np.inf, 3e38])
def test_a_bias_that_is_large_or_no_number(bias: float) -> None:
    image = keras.Input((4, 4, 2))
    first, second = (layers.Conv2D(n, 1, activation="relu") for n in (2, 1))
    model = keras.Model(image, second(first(image)))
    first.bias.assign([bias, abs(bias)])
    second.kernel.assign(of_two(10.0, -10.0))
    same_as_keras(model, torch.ones(2, 4, 4, 2))


@pytest.mark.parametrize("larger", ["scale", "pad"])
def test_what_makes_numbers_larger_between_two_convolutions(larger: str) -> None:
    """In the second they are infinities of both signs."""
    x = image = keras.Input((4, 4, 2))
    x = layers.Conv2D(2, 1, activation="relu", kernel_initializer="ones")(x)
    x = layers.Rescaling(1e38, name="scale")(x) if larger == "scale" else x
    x = layers.ZeroPadding2D(1, name="pad")(x)
    model = keras.Model(image, layers.Conv2D(1, 1, activation="relu", name="last")(x))
    model.get_layer("last").kernel.assign(of_two(10.0, -10.0))
    network = on_keras(model).eval().network
    if larger == "pad":
        network.pad.value = 3e38
    with torch.no_grad():
        assert network(torch.ones(2, 4, 4, 2)).isnan().any()
