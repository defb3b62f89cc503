"""replace_where changes every layer that matches, at any depth, in one rebuild."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from contract import check, equal, run, same_snapshot, shake_, snapshot
from keras import layers as kl

import vggtorch as vt
from vggtorch.keras_graph import raw_value
from vggtorch.surgery import replace, replace_where

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")


def images(*shape):
    return torch.from_numpy(np.random.default_rng(0).normal(size=(2, *shape)).astype("float32"))


def vgg(**options):
    return shake_(vt.VGG11(weights=None, include_top=False, input_shape=(32, 32, 3), **options))


def average(layer):
    return kl.AveragePooling2D(layer.pool_size, layer.strides, name=layer.name)


@pytest.mark.slow
def test_all_max_pools_become_average_pools():
    model = vgg()
    before = snapshot(model)
    made = []

    def make(layer):
        made.append(average(layer))
        return made[-1]

    result = replace_where(model, kl.MaxPooling2D, make)
    same_snapshot(before, snapshot(model))
    assert [layer.name for layer in made] == [f"block{n}_pool" for n in range(1, 6)]
    check(model, result, new=made)
    expected = model
    for n in range(1, 6):
        name = f"block{n}_pool"
        expected = replace(expected, name, average(expected.get_layer(name)))
    equal(run(result, images(32, 32, 3)), run(expected, images(32, 32, 3)))


def test_all_relus_inside_convolutions_become_layers_of_another_kind():
    model = vgg()

    def make(layer):
        linear = type(layer).from_config({**layer.get_config(), "activation": None})
        return [linear, kl.LeakyReLU(0.0, name=f"{layer.name}_leaky")]

    relu = keras.activations.relu
    result = replace_where(
        model, lambda layer: getattr(layer, "activation", None) is relu, make, init="copy"
    )
    assert len(result.layers) == len(model.layers) + 8
    equal(run(result, images(32, 32, 3)), run(model, images(32, 32, 3)))
    for old, new in zip(model.weights, result.weights, strict=True):
        equal(raw_value(old), raw_value(new))


@pytest.mark.slow
def test_all_batch_norms_become_group_norms_with_automatic_names():
    model = vgg(batch_norm=True)
    result = replace_where(model, kl.BatchNormalization, lambda layer: kl.GroupNormalization(8))
    kinds = [type(layer) for layer in result.layers]
    assert kinds.count(kl.GroupNormalization) == 8
    assert kl.BatchNormalization not in kinds
    assert len({layer.name for layer in result.layers}) == len(result.layers)


def test_several_classes_and_strides_without_pools():
    model = vgg(batch_norm=True)
    result = replace_where(
        model,
        (kl.MaxPooling2D, kl.BatchNormalization),
        lambda layer: kl.Activation("linear", name=layer.name),
    )
    assert result.output_shape == (None, 32, 32, 64)


def test_layers_of_nested_and_shared_models():
    inner = keras.Sequential(
        [keras.Input((8, 8, 3)), kl.Conv2D(4, 3, name="conv"), kl.MaxPooling2D(name="pool")],
        name="inner",
    )
    a, b = keras.Input((8, 8, 3), name="a"), keras.Input((8, 8, 3), name="b")
    x = kl.Concatenate(name="both")([inner(a), inner(b)])
    twice = kl.MaxPooling2D(1, name="twice")
    model = shake_(keras.Model([a, b], kl.Flatten()(twice(twice(x)))))
    seen = []

    def make(layer):
        seen.append(layer.name)
        return average(layer)

    result = replace_where(model, kl.MaxPooling2D, make)
    assert sorted(seen) == ["pool", "twice"]
    assert type(result.get_layer("inner").get_layer("pool")) is kl.AveragePooling2D
    x = images(8, 8, 3)
    feature = keras.ops.average_pool(inner.get_layer("conv")(x), 2, 2)
    found = run(result, [x, x])
    torch.testing.assert_close(
        found, keras.ops.reshape(keras.ops.concatenate([feature, feature], -1), (2, -1))
    )


@pytest.mark.parametrize(
    ("where", "make", "message"),
    [
        (kl.LSTM, average, "finds no LSTM layer in .*: nothing to replace. Its layers: "),
        ((kl.LSTM, kl.GRU), average, "finds no LSTM or GRU layer"),
        (lambda layer: False, average, "finds no layer that .* is true of"),
        ("block1_pool", average, "expects a class of layers.* received 'block1_pool'.*vt.replace"),
        (kl.MaxPooling2D, lambda layer: None, "returned None for 'block1_pool'.*vt.remove"),
        (kl.MaxPooling2D, lambda layer: "average", "expects .* layers, a Keras model.*'average'"),
        (kl.MaxPooling2D, lambda layer: [], "received no layers.*'block1_pool'"),
        (kl.MaxPooling2D, lambda layer: layer, "'block1_pool' has been called before"),
        (int, average, "expects a class of layers"),
    ],
)
def test_what_can_not_be_replaced(where, make, message):
    model = vgg()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        replace_where(model, where, make)
    same_snapshot(before, snapshot(model))


def test_one_new_layer_for_all_is_refused():
    one = kl.AveragePooling2D(2)
    with pytest.raises(ValueError, match="returned the layer .* a new one for each"):
        replace_where(vgg(), kl.MaxPooling2D, lambda layer: one)


def test_a_layer_that_joins_several_tensors():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, kl.Add(name="sum")([inputs, kl.Dense(4)(inputs)]))
    with pytest.raises(ValueError, match="one way in; 'sum' have 2|one way in"):
        replace_where(model, kl.Add, lambda layer: kl.Dense(4))


def test_copying_that_does_not_fit_names_the_layer():
    with pytest.raises(ValueError, match="init='copy' can't give .* the weights of 'block1_conv1'"):
        replace_where(vgg(), kl.Conv2D, lambda layer: kl.Conv2D(3, 1, padding="same"), init="copy")
    with pytest.raises(ValueError, match="expects init=None or 'copy', received 'compose'"):
        replace_where(vgg(), kl.Conv2D, lambda layer: kl.Conv2D(3, 1), init="compose")  # type: ignore[arg-type]
