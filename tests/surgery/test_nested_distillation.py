"""Layers inside of nested models are composed and distilled as in one graph."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers as kl

from vggtorch.surgery import distill_, flatten, replace

pytestmark = pytest.mark.usefixtures("one_thread")


def network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 16, 3))
    x = inputs
    for name, width in (("conv1", 8), ("conv2", 8)):
        x = kl.Conv2D(width, 3, padding="same", activation="relu", name=name)(x)
    x = kl.Conv2D(12, 3, padding="same", name="conv3")(kl.MaxPooling2D(name="pool")(x))
    inner = keras.Model(inputs, x, name="inner")
    image = keras.Input((16, 16, 3))
    return keras.Model(image, kl.MaxPooling2D(name="last")(inner(image)), name="outer")


def images(number):
    return 100 * np.random.default_rng(0).normal(size=(number, 16, 16, 3)).cumsum(1).cumsum(2) / 16


@pytest.mark.slow
def test_nested_layers_are_distilled_as_in_one_graph():
    model = network()
    before = model.get_weights()
    found = []
    for source, path in ((model, "inner/"), (flatten(model), "")):
        keras.utils.set_random_seed(1)
        new = kl.Conv2D(8, 5, padding="same", activation="relu", name="new")
        result = replace(source, [f"{path}conv1", f"{path}conv2"], new)
        done = distill_(
            source, result, f"{path}new", images(30), steps=25, match=[f"{path}pool", "last"]
        )
        assert list(done.after) == [f"{path}pool", "last"]
        assert done.after["last"] > done.before["last"] - 1e-6
        found.append((new.get_weights(), list(done.after.values())))
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    (weights, cosines), (flat_weights, flat_cosines) = found
    for a, b in zip(weights, flat_weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(cosines, flat_cosines, atol=1e-4)


@pytest.mark.parametrize(
    ("names", "match", "message"),
    [
        (["inner/conv1", "last"], None, r"\['inner/conv1', 'last'\] take their input from"),
        (["inner/conv1"], ["inner/conv1"], r"Received match=\['inner/conv1'\]; .*'inner/conv2', "),
        (["inner/pool"], None, r"\['inner/pool'\] have no trainable weights"),
        (["inner/conv2"], None, r"The original has the new layers \['inner/conv2'\] itself"),
    ],
)
def test_messages_name_layers_as_users_do(names, match, message):
    model = network()
    with pytest.raises(ValueError, match=message):
        distill_(
            model, model, names, np.random.default_rng(0).normal(size=(10, 16, 16, 3)), match=match
        )


def test_a_network_that_shares_the_new_layers_is_no_original():
    model = network()
    result = keras.Model(model.input, model.layers[-1](model.layers[-2](model.input)))
    before = model.get_weights()
    with pytest.raises(ValueError, match="conv1.*expected the network as it was"):
        distill_(
            model,
            result,
            "inner/conv1",
            np.ones((10, 16, 16, 3)) * np.arange(10)[:, None, None, None],
        )
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
