"""Layers inside of nested models are composed and distilled as in one graph."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers as kl

from vggtorch.surgery import distill_, flatten, replace

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


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


def test_nested_layers_are_distilled_as_in_one_graph():
    images = 100 * np.random.default_rng(0).normal(size=(30, 16, 16, 3)).cumsum(1).cumsum(2) / 16
    model = network()
    before = model.get_weights()
    found = []
    for source, path in ((model, "inner/"), (flatten(model), "")):
        keras.utils.set_random_seed(1)
        new = kl.Conv2D(8, 5, padding="same", activation="relu", name="new")
        result = replace(source, [f"{path}conv1", f"{path}conv2"], new)
        done = distill_(
            source, result, f"{path}new", images, steps=25, match=[f"{path}pool", "last"]
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
