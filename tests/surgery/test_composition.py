from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import hypothesis
import keras
import numpy as np
import pytest
from hypothesis import strategies as st

from vggtorch.surgery.composition import compose_

L = keras.layers
SHAPE = (17, 16, 3)


def network(*layers: keras.Layer, shape: tuple[int | None, ...] = SHAPE) -> keras.Model:
    """A chain of layers with random weights, so large that nothing hides in rounding."""
    model = keras.Sequential([keras.Input(shape), *layers])
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if not variable.path.split("/")[-1].startswith("seed"):
            values = rng.normal(size=variable.shape)
            variable.assign(np.abs(values) + 0.5 if "variance" in variable.path else values)
    return model


def error(
    chain: list[keras.Layer], new: keras.Layer, border: int, shape: tuple[int, ...] = SHAPE
) -> float:
    """Largest relative difference of a chain and its replacement, `border` pixels left out."""
    images = np.random.default_rng(1).normal(size=(2, *shape)).astype("float32")
    expected = keras.Sequential([keras.Input(shape), *chain]).predict(images, verbose=0)
    actual = keras.Sequential([keras.Input(shape), new]).predict(images, verbose=0)
    assert actual.shape == expected.shape
    inside = slice(border, -border or None)
    difference = np.abs(actual - expected)[:, inside, inside]
    assert difference.size
    return float(difference.max() / np.abs(expected).max())


class OfOnesOwn(keras.layers.Conv2D):
    """A convolution by another kernel than the one that it holds."""

    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel - keras.ops.mean(kernel))


CHAINS = {
    "two 3x3": (
        [L.Conv2D(4, 3, padding="same"), L.Conv2D(5, 3, padding="same", activation="relu")],
        L.Conv2D(5, 5, padding="same", activation="relu"),
        1,
    ),
    "laid into a larger kernel": (
        [L.Conv2D(4, 3, padding="same"), L.Conv2D(5, 1)],
        L.Conv2D(5, 7, padding="same"),
        0,
    ),
    "batch norm, valid": (
        [
            L.BatchNormalization(),
            L.Conv2D(4, 3),
            L.BatchNormalization(scale=False),
            L.Dropout(0.5),
            L.Conv2D(5, 3, use_bias=False),
            L.BatchNormalization(),
            L.ReLU(),
        ],
        L.Conv2D(5, 5, activation="relu"),
        0,
    ),
    "strides": (
        [L.Conv2D(4, 3, strides=2, padding="same"), L.Conv2D(5, 3, strides=2, padding="same")],
        L.Conv2D(5, 9, strides=4, padding="same"),
        1,
    ),
    "dilation": (
        [
            L.Conv2D(4, 3, dilation_rate=2, padding="same"),
            L.Dense(5),
            L.Conv2D(6, (1, 3), padding="same"),
        ],
        L.Conv2D(6, 7, padding="same"),
        1,
    ),
    "groups": (
        [
            L.SeparableConv2D(4, 3, depth_multiplier=2),
            L.DepthwiseConv2D(3),
            L.Conv2D(8, 3, groups=4),
        ],
        L.Conv2D(8, 7),
        0,
    ),
    "pooling and padding": (
        [
            L.Rescaling(0.5, offset=1.0),
            L.Conv2D(4, 2),
            L.AveragePooling2D(2),
            L.Conv2D(4, 1, bias_initializer="ones"),
        ],
        L.Conv2D(4, 3, strides=2),
        0,
    ),
    "explicit padding": (
        [L.ZeroPadding2D(((2, 0), (1, 1))), L.Conv2D(4, 3)],
        L.Conv2D(4, 5, padding="same"),
        0,
    ),
    "depthwise first, in a nested model": (
        [
            keras.Sequential([L.DepthwiseConv2D(3, depth_multiplier=2), L.Dropout(0.5)]),
            L.Activation("linear"),
            L.Conv2D(4, 1, activation=None),
            L.Activation("tanh"),
        ],
        L.Conv2D(4, 3, activation="tanh"),
        0,
    ),
    "dense": ([L.Dense(4), L.BatchNormalization(), L.Dense(5)], L.Dense(5), 0),
}


@pytest.mark.parametrize(("chain", "new", "border"), CHAINS.values(), ids=CHAINS)
def test_a_linear_chain_composes_exactly(chain, new, border):
    network(*chain)
    network(new)
    composition = compose_(chain, new)
    assert (composition.exact, composition.reasons) == (True, ())
    assert composition.border == border
    assert error(chain, new, border) < 1e-5
    if border:  # the border is said to differ because it does
        assert error(chain, new, 0) > 1e-3


def random_chain(draw: Callable[[Any], Any]) -> tuple[list[keras.Layer], keras.Layer]:
    """Up to four random layers, and the one convolution that they should come to."""
    padding = draw(st.sampled_from(["valid", "same"]))
    chain: list[keras.Layer] = []
    size, strides, channels = [1, 1], [1, 1], 3
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "depthwise", "norm", "dense"]))
        sizes = st.sampled_from([1, 3] if padding == "same" else [1, 2, 3])
        kernel = (draw(sizes), draw(sizes))
        both = st.tuples(st.integers(1, 2), st.integers(1, 2))
        step = draw(both) if padding == "valid" else (1, 1)
        rate = draw(both) if step == (1, 1) else (1, 1)
        options = {"padding": padding, "strides": step, "dilation_rate": rate}
        outputs = draw(st.integers(1, 4))
        if kind == "norm":
            chain.append(L.BatchNormalization(scale=draw(st.booleans())))
            continue
        if kind == "dense":
            chain.append(L.Dense(outputs, use_bias=draw(st.booleans())))
            channels = outputs
            continue
        if kind == "depthwise":
            chain.append(L.DepthwiseConv2D(kernel, depth_multiplier=outputs, **options))
            channels *= outputs
        else:
            chain.append(L.Conv2D(outputs, kernel, use_bias=draw(st.booleans()), **options))
            channels = outputs
        for axis in (0, 1):
            size[axis] += (kernel[axis] - 1) * rate[axis] * strides[axis]
            strides[axis] *= step[axis]
    larger = 2 * draw(st.integers(0, 1)) if padding == "same" else 0
    new = L.Conv2D(channels, [n + larger for n in size], strides=strides, padding=padding)
    return chain, new


@pytest.mark.slow
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_any_linear_chain_composes_exactly(data):
    chain, new = random_chain(data.draw)
    shape = (33, 32, 3)
    network(*chain, shape=shape)
    network(new, shape=shape)
    composition = compose_(chain, new)
    assert (composition.exact, composition.reasons) == (True, ())
    assert error(chain, new, composition.border, shape) < 1e-5


def test_an_activation_between_is_left_out_and_said():
    chain = [L.Conv2D(4, 3, activation="relu", name="first"), L.Conv2D(5, 3, name="second")]
    network(*chain)
    new = L.Conv2D(5, 5)
    network(new)
    composition = compose_(chain, new)
    assert not composition.exact
    assert composition.reasons == ("'first': its activation relu is left out",)
    chain[0].activation = keras.activations.linear
    assert error(chain, new, 0) < 1e-5


@pytest.mark.parametrize(
    ("chain", "new", "reason"),
    [
        ([L.Conv2D(4, 3, activation="relu")], L.Conv2D(4, 3, name="new"), "ends in relu, 'new' in"),
        (
            [L.Conv2D(4, 5)],
            L.Conv2D(4, 3, name="new"),
            "5x5 kernel reaches beyond the 3x3 of 'new'",
        ),
        (
            [L.Conv2D(4, 3, bias_initializer="ones")],
            L.Conv2D(4, 3, use_bias=False, name="new"),
            "'new' has no bias",
        ),
        (
            [L.Conv2D(4, 3), L.LeakyReLU(0.1, name="leaky"), L.Conv2D(4, 1)],
            L.Conv2D(4, 3, name="new"),
            "'leaky': its activation LeakyReLU({'trainable': True, 'negative_slope': 0.1}) is left",
        ),
        (
            [L.Conv2D(4, 3), L.ReLU(max_value=4)],
            L.Conv2D(4, 3, activation="relu6", name="new"),
            "ends in ReLU(max_value=4), 'new' in relu6",
        ),
        (
            [L.Conv2D(4, 3, activation="relu", name="old"), L.Activation("tanh")],
            L.Conv2D(4, 3, activation="tanh", name="new"),
            "'old': two activations in a row, relu left out",
        ),
    ],
)
def test_what_does_not_fit_into_the_new_layer_is_said(chain, new, reason):
    network(*chain)
    network(new)
    composition = compose_(chain, new)
    assert not composition.exact
    assert reason in composition.reasons[0]


def test_activations_are_told_apart_by_what_they_are_not_by_their_names():
    chain = [L.Conv2D(4, 3, activation=lambda x: 2 * x)]
    new = L.Conv2D(4, 3, activation=lambda x: x**3, name="new")
    network(*chain)
    network(new)
    assert compose_(chain, new).reasons == ("the chain ends in <lambda>, 'new' in <lambda>",)
    assert compose_(chain, chain[0]).exact


def test_a_quantized_layer_is_refused():
    chain = [L.Dense(4), L.Dense(5, name="whole")]
    new = L.Dense(5)
    network(*chain)
    network(new)
    chain[1].quantize("int8")
    with pytest.raises(ValueError, match=r"Layer 'whole' is quantized \(int8\); expected"):
        compose_(chain, new)


def test_an_open_size_is_taken_for_a_multiple_of_the_strides_and_said():
    chain = [L.Conv2D(4, 3, strides=2, padding="same", name="open")]
    new = L.Conv2D(4, 3, strides=2, padding="same")
    network(*chain, shape=(None, None, 3))
    network(new, shape=(None, None, 3))
    composition = compose_(chain, new)
    assert not composition.exact
    assert "padding='same' with strides (2, 2) depends on the size" in composition.reasons[0]


@pytest.mark.parametrize(
    ("chain", "new", "message"),
    [
        ([L.Conv2D(4, 3), L.MaxPooling2D(name="pool")], L.Conv2D(4, 5), "'pool' .MaxPooling2D. is"),
        ([L.Conv2D(4, 3), L.Flatten(name="flat")], L.Conv2D(4, 5), "'flat' .Flatten. is not a li"),
        ([L.Conv2D(4, 3)], L.SeparableConv2D(4, 3, name="new"), "'new' is SeparableConv2D with"),
        ([L.Conv2D(4, 3)], L.Conv2D(4, 3, dilation_rate=2, name="new"), r"dilation_rate=\(2, 2\)"),
        ([L.Conv2D(4, 3)], L.Dense(4, name="new"), "3x3 kernel with strides .1, 1.; 'new' is a De"),
        ([L.Conv2D(4, 3, strides=2)], L.Conv2D(4, 3, name="new"), r"give it strides=\(2, 2\)"),
        ([L.Conv2D(4, 3)], L.Conv2D(6, 3, name="new"), "takes 3 channels to 4, 'new' takes 3 to 6"),
        ([L.ReLU()], L.Conv2D(4, 3), "has weights: there is nothing to compose"),
        (
            [L.Conv2D(16, 2, name="conv"), L.BatchNormalization(axis=1, name="norm")],
            L.Conv2D(16, 2, name="new"),
            "axes, 'new' along the last axis, 'norm' along axis 1",
        ),
        (
            [L.Conv2D(16, 2, data_format="channels_first"), L.Dense(16, name="dense")],
            L.Conv2D(16, 2, data_format="channels_first", name="new"),
            "axes, 'new' along axis 1, 'dense' along the last axis",
        ),
        (
            [L.Conv2D(16, 2, name="conv")],
            L.Conv2D(16, 2, data_format="channels_first", name="new"),
            "axes, 'conv' along the last axis, 'new' along axis 1",
        ),
        ([OfOnesOwn(4, 3, name="own")], L.Conv2D(4, 3), "'own' .OfOnesOwn. is not"),
        ([L.Conv2D(4, 3), OfOnesOwn(4, 1, name="own")], L.Conv2D(4, 3), "'own' .OfOnesOwn. is not"),
    ],
)
def test_what_cannot_be_composed_says_why_and_keeps_the_weights(chain, new, message):
    network(*chain)
    network(new)
    before = new.get_weights()
    with pytest.raises(ValueError, match=message):
        compose_(chain, new)
    for expected, actual in zip(before, new.get_weights(), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_layers_that_were_built_but_never_called_compose():
    chain = [L.Conv2D(4, 3, padding="same"), L.Conv2D(5, 3, padding="same")]
    new = L.Conv2D(5, 5, padding="same")
    for layer, channels in zip([*chain, new], (3, 4, 3), strict=True):
        layer.build((None, None, None, channels))
    assert compose_(chain, new).exact
    assert error(chain, new, 1) < 1e-5


def test_layers_out_of_order_are_refused():
    first, second = L.Conv2D(4, 3), L.Conv2D(5, 3, name="second")
    network(first, second)
    new = L.Conv2D(5, 5)
    network(new)
    with pytest.raises(ValueError, match=r"takes 3 channels, but the layer before it .* gives 5"):
        compose_([second, first], new)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"use_bias": False}, "'one' has no bias, and the chain has one"),
        ({"padding": "valid"}, "padding='valid' of 'one' gives a map of another size"),
        ({"activation": None}, "the chain ends in relu, 'one' in linear"),
    ],
)
def test_settings_by_which_the_new_layer_gives_something_else_are_warned_of(setting, said):
    image = keras.Input((8, 8, 3))
    settings = {"padding": "same", "activation": "relu"}
    x = L.Conv2D(4, 3, name="a", bias_initializer="ones", **settings)(image)
    x = L.Conv2D(5, 3, name="b", **settings)(x)
    model = keras.Model(image, L.MaxPooling2D()(x))
    with warnings.catch_warnings(action="error", category=UserWarning):
        vt.replace(model, ["a", "b"], L.Conv2D(5, 5, **settings), init="compose")
    new = L.Conv2D(5, 5, name="one", **settings | setting)
    with pytest.warns(UserWarning, match=f"{re.escape(said)}.*Other settings of 'one'"):
        vt.replace(model, ["a", "b"], new, init="compose")


@pytest.mark.network
@pytest.mark.slow
def test_the_preprocessing_inside_is_removed_whole():
    keras.utils.set_random_seed(0)
    inside = vt.VGG16(weights="oxford", include_top=False, include_preprocessing=True)
    images = np.random.default_rng(0).uniform(0, 255, (1, 64, 64, 3)).astype("float32")
    outside = vt.remove(inside, "oxford_preprocessing")
    assert vt.weight_set(outside) == "oxford"
    expected, received = (
        keras.ops.convert_to_numpy(m(vt.preprocess(images, m))) for m in (inside, outside)
    )
    np.testing.assert_allclose(received, expected, atol=1e-4 * expected.max())
