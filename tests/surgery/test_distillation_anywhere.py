"""Layers are distilled wherever they stand; where nothing can be learned, it is said."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from keras import layers as kl
from test_distillation import images, vgg

from vggtorch.surgery import distill_, examples, relative_error, replace

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def conv(width: int = 8, size: int = 3, **options) -> keras.Layer:
    return kl.Conv2D(width, size, **({"padding": "same", "activation": "relu"} | options))


def residual(size: int | None = 16) -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((size, size, 3))
    x = conv(name="stem")(inputs)
    y = conv(name="second")(conv(name="first")(x))
    x = kl.Add(name="add")([x, y])
    return keras.Model(inputs, conv(12, strides=2, name="last")(x), name="residual")


def test_a_layer_beside_a_shortcut_is_distilled():
    model = residual()
    result = replace(model, ["first", "second"], conv(size=5, name="new"))
    found = distill_(model, result, "new", images(), steps=50)
    assert found.after["last"] > max(0.9, found.before["last"])


@pytest.mark.parametrize("path", ["new", "inner/new"])
def test_a_new_layer_that_is_a_model_is_distilled(path):
    model = vgg()
    if "/" in path:
        image = keras.Input((16, 16, 3))
        model.name = "inner"
        model = keras.Model(image, kl.ReLU(name="end")(model(image)))
    new = keras.Sequential([conv(name="a"), conv(name="b")], name="new")
    place = path.removesuffix("new")
    result = replace(model, [f"{place}block1_conv1", f"{place}block1_conv2"], new)
    before = [w.copy() for w in new.get_weights()]
    found = distill_(model, result, path, images(), steps=25)
    assert found.after[f"{place}block3_pool"] > found.before[f"{place}block3_pool"]
    assert all((a != b).any() for a, b in zip(before, new.get_weights(), strict=True))


@pytest.mark.parametrize("shape", [(16,), (20, 16)])
def test_networks_of_vectors_and_of_sequences_are_distilled(shape):
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input(shape)
    for name in ("one", "two", "three"):
        x = kl.Dense(24, activation="relu", name=name)(x)
    model = keras.Model(inputs, x)
    new = [kl.Dense(8, name="narrow"), kl.Dense(24, activation="relu", name="new")]
    result = replace(model, "two", new)
    seen = np.random.default_rng(0).normal(size=(200, *shape))
    found = distill_(model, result, ["narrow", "new"], seen, steps=50)
    assert found.after["three"] > max(0.85, found.before["three"])


def test_networks_that_know_the_size_of_their_maps_take_whole_images(monkeypatch):
    """A PReLU with a slope for every pixel, and a reshaping that is no layer."""
    monkeypatch.setattr(examples, "CROP", 12)
    inputs = keras.Input((16, 16, 3))
    x = kl.PReLU("ones", name="slopes")(conv(name="one")(inputs))
    x = keras.ops.reshape(x, (-1, 16 * 16 * 8))
    model = keras.Model(inputs, kl.Dense(4, name="head")(x))
    result = replace(model, "one", conv(size=5, name="new"))
    assert distill_(model, result, "new", images(), steps=1).after["head"] > 0


def test_images_of_a_size_that_does_not_go_through():
    inputs = keras.Input((None, None, 3))
    x = kl.UpSampling2D()(conv(3, strides=2, name="half")(inputs))
    model = keras.Model(inputs, conv(name="last")(kl.Add()([x, inputs])), name="halved")
    result = replace(model, "last", conv(name="new"))
    with pytest.raises(ValueError, match=r"'halved' can't compute images of shape \(3, 15, 15\)"):
        distill_(model, result, "new", images(size=15))


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("pool", lambda: kl.Dense(8, name="new"), r"\(8, 16, 16\) at 'new', where .* gives \(8,\)"),
        ("one", lambda: conv(padding="valid", name="new"), r"\(8, 14, 14\) .* gives \(8, 16, 16\)"),
    ],
)
def test_maps_of_another_shape_cannot_be_matched(old, new, text):
    size = None if old == "one" else 16  # which keras can't refuse
    inputs = keras.Input((size, size, 3))
    x = conv(name="one")(inputs)
    x = kl.GlobalAveragePooling2D(name="pool")(x) if old == "pool" else x
    model = keras.Model(inputs, x)
    with pytest.raises(ValueError, match=f"The result gives maps of shape {text}"):
        distill_(model, replace(model, old, new()), "new", images())


def test_an_original_that_gives_nothing_teaches_nothing():
    for value, text in ((0.0, "nothing but zeros at 'block1_pool', "), (np.nan, "NaN or infinite")):
        model = vgg()
        result = replace(model, "block1_conv2", conv(name="new"))
        layer = model.get_layer("block1_conv2")
        layer.set_weights([np.full_like(w, value) for w in layer.get_weights()])
        with pytest.raises(ValueError, match=f"The original gives {text}"):
            distill_(model, result, "new", images())


def test_a_batch_of_zeros_has_no_error_and_no_gradient():
    y = torch.ones(1, 2, requires_grad=True)
    error = relative_error([y, 2 * y], [torch.zeros(1, 2), torch.ones(1, 2)])
    error.backward()
    assert float(error.detach()) == pytest.approx(0.75)
    assert y.grad is not None
    assert y.grad.isfinite().all()


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_not_finite_is_no_small_error(number):
    zeros, found = torch.zeros(1, 2), torch.tensor([[1.0, number]])
    for pair in ((found, zeros), (found, zeros + 1), (zeros, found)):
        assert not relative_error([pair[0]], [pair[1]]).isfinite()
