"""The preprocessing inside a model: both operations or neither, and the weight set is right."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from contract import identity, operations, run
from keras import layers as kl

from vggtorch.models import VGG11, as_layers, preprocess, remember_, weight_set
from vggtorch.surgery import insert, remove, replace, stack, truncate

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")

PHOTOGRAPH = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype("uint8")


def plain(weights="oxford"):
    """A short network that remembers a weight set, as one with published weights does."""
    model = VGG11(weights=None, include_top=False, input_shape=(32, 32, 3))
    return remember_(truncate(model, "block1_pool"), weights)


def built_in(weights="oxford"):
    """The same with its preprocessing inside, as include_preprocessing=True builds it."""
    inputs = keras.Input((32, 32, 3), name="photograph")
    x = as_layers(inputs, weights)
    for layer in plain(weights).layers[1:]:
        x = layer(x)
    return remember_(keras.Model(inputs, x, name="p"), weights)


def predicted(model):
    return run(model, torch.from_numpy(np.asarray(preprocess(PHOTOGRAPH, model))))


def expected(model, weights="oxford"):
    """What the convolution computes of an image that was preprocessed as it should be."""
    x = torch.from_numpy(np.asarray(preprocess(PHOTOGRAPH, weights)))
    with torch.no_grad():
        return model.get_layer("block1_pool")(model.get_layer("block1_conv1")(x))


def flip_of(model):
    return next(name for name in operations(model) if name.startswith("flip"))


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("weights", ["oxford", "imagenet", "features"])
def test_whole_preprocessing_is_removed_and_the_weight_set_stays(weights):
    model = built_in(weights)
    same(predicted(model), expected(model, weights))
    result = remove(model, f"{weights}_preprocessing")
    assert weight_set(result) == weights
    assert not any("flip" in name for name in operations(result))
    same(predicted(result), expected(model, weights))


def test_half_of_the_preprocessing_is_refused():
    model = built_in()
    flip = flip_of(model)
    for operation in (
        lambda: remove(model, flip),
        lambda: replace(model, flip, identity()),
        lambda: remove(model, [flip, "block1_conv1"]),
    ):
        with pytest.raises(ValueError, match=rf"'{flip}', which is half .*'oxford_preprocessing'"):
            operation()
    with pytest.raises(ValueError, match=rf"can't start at '{flip}', which is half of a model's"):
        truncate(model, "block1_pool", start=flip)
    result = truncate(model, "block1_pool", start="oxford_preprocessing")
    same(predicted(result), expected(model))
    for names in ([flip, "oxford_preprocessing"], ["oxford_preprocessing"]):
        same(predicted(remove(model, names)), expected(model))


def test_replaced_preprocessing_gives_the_weight_set_up():
    model = built_in()
    new = kl.Rescaling(1 / 127.5, -1, name="mine")
    with pytest.warns(UserWarning, match="no longer remembers its weight set 'oxford'"):
        result = replace(model, "oxford_preprocessing", new)
    assert not any("flip" in name for name in operations(result))
    assert weight_set(result) is None
    with pytest.raises(ValueError, match="does not say which weight set"):
        preprocess(PHOTOGRAPH, result)
    x = torch.from_numpy(PHOTOGRAPH).float()
    with torch.no_grad():
        first = result.get_layer("block1_conv1")(x / 127.5 - 1)
    same(run(result, x), result.get_layer("block1_pool")(first))


def test_preprocessing_is_composed_into_the_first_convolution():
    model = built_in()
    filters = model.get_layer("block1_conv1").filters
    new = kl.Conv2D(filters, 3, padding="same", activation="relu", name="new")
    with pytest.warns(UserWarning, match="no longer remembers"):
        result = replace(model, ["oxford_preprocessing", "block1_conv1"], new, init="compose")
    x = torch.from_numpy(PHOTOGRAPH).float()
    same(run(result, x)[:, 1:-1, 1:-1], run(model, x)[:, 1:-1, 1:-1])  # padded with other zeros


def test_preprocessing_inside_a_nested_model():
    inner = built_in()
    inputs = keras.Input((32, 32, 3))
    model = keras.Model(inputs, kl.Flatten(name="flat")(inner(inputs)), name="outer")
    flip = flip_of(inner)
    same(predicted(model), predicted(inner).flatten(1))
    with pytest.raises(ValueError, match=rf"'p/{flip}', which is half .*'p/oxford_preprocessing'"):
        remove(model, f"p/{flip}")
    result = remove(model, "p/oxford_preprocessing")
    assert weight_set(result) == "oxford"
    same(predicted(result), predicted(inner).flatten(1))
    with pytest.warns(UserWarning, match="took out 'p/oxford_preprocessing'"):
        result = replace(model, "p/oxford_preprocessing", identity())
    assert weight_set(result) is None


@pytest.mark.slow
def test_the_weight_set_is_found_in_nested_and_originating_networks(tmp_path):
    vgg = plain()
    head = [kl.GlobalAveragePooling2D(), kl.Dense(3)]
    y = predicted(vgg)
    row = keras.Sequential([vgg, *head])
    assert weight_set(row) == "oxford"
    same(predicted(row), head[1](head[0](y)).detach())
    padded = keras.Sequential([keras.Input((30, 30, 3)), kl.ZeroPadding2D(1), vgg])
    assert weight_set(padded) == "oxford"

    same(predicted(keras.Model(vgg.input, kl.Flatten()(vgg.output))), y.flatten(1))
    part = keras.Model(vgg.input, vgg.get_layer("block1_conv1").output)
    assert weight_set(part) == "oxford"
    assert weight_set(insert(part, "block1_conv1", identity())) == "oxford"
    assert weight_set(stack(row, kl.Softmax())) == "oxford"
    vgg.save(tmp_path / "vgg.keras")
    for made in (keras.saving.load_model(tmp_path / "vgg.keras"), keras.models.clone_model(vgg)):
        assert weight_set(keras.Model(made.input, made.output)) == "oxford"
    row.save(tmp_path / "row.keras")
    assert weight_set(keras.saving.load_model(tmp_path / "row.keras")) == "oxford"

    inner = built_in()
    same(predicted(keras.Sequential([inner, kl.Flatten()])), predicted(inner).flatten(1))
    same(
        predicted(keras.Model(inner.input, kl.Flatten()(inner.output))), predicted(inner).flatten(1)
    )

    image, size = keras.Input((32, 32, 3)), keras.Input((2,))
    joined = kl.Concatenate()([kl.Flatten()(vgg(image)), size])
    assert weight_set(keras.Model([image, size], joined)) == "oxford"


@pytest.mark.slow
def test_a_weight_set_that_isnt_clear_is_refused():
    image = keras.Input((32, 32, 3))
    scaled = keras.Model(image, plain()(kl.Rescaling(1 / 255)(image)))
    other = plain("imagenet")
    other.name = "other"
    two = keras.Model(image, kl.Add()([plain()(image), other(image)]))
    first = keras.Model(image, plain()(kl.Conv2D(3, 1)(image)))
    for model in (scaled, two, first):
        with pytest.raises(ValueError, match="does not say which weight set"):
            preprocess(PHOTOGRAPH, model)
    vgg = plain()
    assert weight_set(keras.Model(image, kl.Add()([vgg(image), vgg(image)]))) == "oxford"
    forgotten = remember_(plain(), None)
    assert weight_set(keras.Model(forgotten.input, forgotten.output)) is None
