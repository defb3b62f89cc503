"""init="copy" keeps the weights where only settings change, or the form that they have."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from contract import equal, run, same_snapshot, shake_, snapshot
from keras import layers as kl

import vggtorch as vt
from vggtorch.keras_graph import raw_value
from vggtorch.surgery import replace

pytestmark = pytest.mark.usefixtures("one_thread", "narrow")


def images(*shape):
    return torch.from_numpy(np.random.default_rng(0).normal(size=(2, *shape)).astype("float32"))


def again(layer, **settings):
    return type(layer).from_config({**layer.get_config(), **settings})


def vgg11(**options):
    options = {"weights": None, "input_shape": (32, 32, 3), "include_top": False} | options
    return shake_(vt.VGG11(**options))


@pytest.mark.slow
def test_a_dilated_block_5_with_its_weights():
    """Block 5 at twice the resolution: pool 4 keeps the size, the convolutions are dilated."""
    model = vgg11()
    pool = kl.MaxPooling2D(3, strides=1, padding="same", name="block4_pool")
    result = replace(model, "block4_pool", pool, init="copy")
    names = ["block5_conv1", "block5_conv2"]
    new = [again(model.get_layer(name), dilation_rate=2) for name in names]
    result = replace(result, names, new, init="copy")
    assert result.output_shape == (None, 2, 2, 64)
    x = images(32, 32, 3)
    y = keras.Model(model.input, model.get_layer("block4_conv2").output)(x)
    y = kl.MaxPooling2D(3, strides=1, padding="same")(y)
    for name in names:
        conv = model.get_layer(name)
        y = keras.ops.conv(y, conv.kernel.value, padding="same", dilation_rate=2)
        y = keras.ops.relu(y + conv.bias.value)
    torch.testing.assert_close(run(result, x), kl.MaxPooling2D()(y), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_batch_norm_between_convolution_and_activation():
    model = vgg11()
    old = model.get_layer("block2_conv1")
    new = [again(old, activation=None), kl.BatchNormalization(epsilon=0.0), kl.ReLU()]
    result = replace(model, "block2_conv1", new, init="copy")
    x = images(32, 32, 3)
    torch.testing.assert_close(run(result, x), run(model, x), rtol=1e-5, atol=1e-5)
    equal(raw_value(result.get_layer("block2_conv1").kernel), raw_value(old.kernel))


@pytest.mark.slow
def test_lists_on_both_sides_in_their_order():
    model = vgg11()
    names = ["block3_conv1", "block3_conv2", "block3_pool", "block4_conv1"]
    convs = [model.get_layer(name) for name in names if "conv" in name]
    new = [
        again(convs[0], dilation_rate=3),
        kl.SpatialDropout2D(0.1),
        again(convs[1], activation="gelu"),
        again(convs[2], strides=2, activation=None),
        kl.PReLU(shared_axes=[1, 2]),
    ]
    result = replace(model, names, new, init="copy")
    for conv in convs:
        copied = result.get_layer(conv.name)
        equal(raw_value(copied.kernel), raw_value(conv.kernel))
        equal(raw_value(copied.bias), raw_value(conv.bias))
        assert raw_value(copied.kernel).data_ptr() != raw_value(conv.kernel).data_ptr()
    assert result.get_layer("block3_conv2").activation is keras.activations.gelu


@pytest.mark.slow
def test_a_classifier_becomes_fully_convolutional_and_back():
    model = shake_(vt.VGG11(weights=None, input_shape=(64, 64, 3), classes=7))
    names = ["flatten", "fc1", "fc2", "predictions"]
    convolutions = [
        kl.Conv2D(64, 2, activation="relu", name="fc1"),
        kl.Conv2D(64, 1, activation="relu", name="fc2"),
        kl.Dropout(0.5),
        kl.Conv2D(7, 1, activation="softmax", name="predictions"),
    ]
    result = replace(model, names, convolutions, init="copy")
    x = images(64, 64, 3)
    y = run(result, x)
    assert y.shape == (2, 1, 1, 7)
    torch.testing.assert_close(y[:, 0, 0], run(model, x), rtol=1e-4, atol=1e-6)
    dense = [
        kl.Flatten(name="flatten"),
        kl.Dense(64, activation="relu", name="fc1"),
        kl.Dense(64, activation="relu", name="fc2"),
        kl.Dense(7, activation="softmax", name="predictions"),
    ]
    back = replace(result, [layer.name for layer in convolutions], dense, init="copy")
    equal(run(back, x), run(model, x))


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
@pytest.mark.parametrize("flatten", ["channels_last", "channels_first"])
def test_flatten_reads_a_map_in_its_own_order(layout, flatten):
    shape = (2, 3, 4) if layout == "channels_last" else (4, 2, 3)
    inputs = keras.Input(shape)
    x = kl.Flatten(data_format=flatten, name="flat")(kl.ReLU(name="relu")(inputs))
    model = shake_(keras.Model(inputs, kl.Dense(5, name="dense")(x)))
    conv = kl.Conv2D(5, (2, 3), data_format=layout, name="conv")
    result = replace(model, ["flat", "dense"], conv, init="copy")
    x = images(*shape)
    torch.testing.assert_close(run(result, x).reshape(2, 5), run(model, x), rtol=1e-5, atol=1e-6)
    layers = [kl.Flatten(data_format=flatten), kl.Dense(5, name="dense")]
    equal(run(replace(result, "conv", layers, init="copy"), x), run(model, x))


def test_a_dense_layer_as_a_1x1_convolution_and_a_new_bias_of_zero():
    inputs = keras.Input((5, 5, 3))
    model = keras.Model(inputs, kl.Dense(4, use_bias=False, name="dense")(inputs))
    result = replace(model, "dense", kl.Conv2D(4, 1, name="conv"), init="copy")
    x = images(5, 5, 3)
    torch.testing.assert_close(run(result, x), run(model, x), rtol=1e-5, atol=1e-6)
    assert not raw_value(result.get_layer("conv").bias).any()


def test_other_layers_by_their_class_and_shapes():
    inputs = keras.Input((6, 4))
    x = kl.Bidirectional(kl.GRU(3, return_sequences=True), name="both")(inputs)
    x = kl.LayerNormalization(name="norm")(x)
    model = shake_(keras.Model(inputs, kl.Conv1D(2, 3, name="conv")(x)))
    new = [
        kl.Bidirectional(kl.GRU(3, return_sequences=True, activation="relu"), name="two"),
        kl.LayerNormalization(epsilon=1e-5),
        kl.Conv1D(2, 3, strides=2, name="strided"),
    ]
    result = replace(model, ["both", "norm", "conv"], new, init="copy")
    for one, other in zip(model.weights, result.weights, strict=True):
        equal(raw_value(one), raw_value(other))


def test_sequential_models_on_either_side_are_looked_into():
    block = keras.Sequential([kl.Conv2D(4, 3, name="a"), kl.ReLU(), kl.Conv2D(4, 3, name="b")])
    inputs = keras.Input((8, 8, 3))
    model = shake_(keras.Model(inputs, block(inputs)))
    new = [kl.Conv2D(4, 3, name="c"), kl.Activation("relu"), kl.Conv2D(4, 3, name="d")]
    result = replace(model, block.name, new, init="copy")
    equal(run(result, images(8, 8, 3)), run(model, images(8, 8, 3)))


def row():
    inputs = keras.Input((6, 6, 4))
    x = kl.Conv2D(4, 3, padding="same", name="one")(inputs)
    x = kl.Conv2D(8, 1, name="two")(x)
    return shake_(keras.Model(inputs, kl.Dense(3, name="last")(kl.Flatten(name="flat")(x))))


@pytest.mark.parametrize(
    ("names", "new", "message"),
    [
        ("one", [kl.Conv2D(4, 5, padding="same")], r"can't give .*kernel \(5, 5, 4, 4\).* 'one'"),
        ("one", [kl.Conv2D(4, 3, padding="same", use_bias=False)], "Give .* use_bias=True"),
        (
            "one",
            [kl.Conv2DTranspose(4, 3, padding="same")],
            r"\(Conv2DTranspose\).*equal names and shapes",
        ),
        (
            "one",
            [kl.ReLU()],
            r"would lose the weights of 'one', kernel \(3, 3, 4, 4\), bias \(4,\)",
        ),
        (["two", "flat", "last"], [kl.Conv2D(8, 1), kl.Flatten()], "would lose .* 'last'"),
        (["two", "flat", "last"], [kl.Flatten(), kl.Dense(3)], "the weights of 'two' .Conv2D."),
        (
            "one",
            [kl.Conv2D(4, 3, padding="same"), kl.Conv2D(4, 3, padding="same")],
            "finds no weights for the new layer .*Insert it afterwards: vt.insert",
        ),
        (
            ["one", "two"],
            [kl.Conv2D(8, 1), kl.Conv2D(8, 3, padding="same")],
            r"can't give .* the weights of 'one' \(Conv2D\), kernel \(3, 3, 4, 4\)",
        ),
        (["flat", "last"], [kl.Conv2D(3, 5)], r"kernel_size be the size .*\(6, 6, 8\)"),
        ("one", [kl.Conv2D(4, 3, groups=2, padding="same")], r"kernel \(3, 3, 2, 4\)"),
    ],
)
def test_weights_that_have_no_counterpart(names, new, message):
    model = row()
    before = snapshot(model)
    fresh = [again(layer, name=f"new{n}") for n, layer in enumerate(new)]
    with pytest.raises(ValueError, match=message):
        replace(model, names, fresh, init="copy")
    same_snapshot(before, snapshot(model))


FREE = {"padding": "same", "use_bias": False}
OTHER_MEANINGS = {
    "a shift for a scale": (
        kl.BatchNormalization(scale=False),
        kl.BatchNormalization(center=False),
    ),
    "a scale for a shift": (
        kl.LayerNormalization(center=False),
        kl.LayerNormalization(scale=False),
    ),
    "what a wrapper holds": (
        kl.TimeDistributed(kl.Conv1D(4, 3, **FREE)),
        kl.TimeDistributed(kl.Conv1DTranspose(4, 3, **FREE)),
    ),
    "a matrix and its transpose": (
        kl.EinsumDense("abcd,de->abce", (None, None, 4)),
        kl.EinsumDense("abcd,ed->abce", (None, None, 4)),
    ),
    "rows of a table": (
        kl.TimeDistributed(kl.Dense(4)),
        kl.TimeDistributed(kl.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d")),
    ),
}


@pytest.mark.parametrize("case", OTHER_MEANINGS)
def test_weights_of_equal_shapes_that_mean_something_else(case):
    old, new = (
        again(layer, name=name)
        for layer, name in zip(OTHER_MEANINGS[case], ["old", "new"], strict=True)
    )
    inputs = keras.Input((6, 5, 4))
    model = shake_(keras.Model(inputs, old(inputs)))
    with pytest.raises(
        ValueError, match="can't give the new layer 'new'|would lose the weights of 'old'"
    ):
        replace(model, "old", new, init="copy")
    result = replace(model, "old", again(old, name="same"), init="copy")
    equal(run(result, images(6, 5, 4)), run(model, images(6, 5, 4)))


def test_composing_into_other_settings_offers_copy():
    model = row()
    with pytest.raises(ValueError, match="dilation_rate=.*init='copy'"):
        new = kl.Conv2D(4, 3, padding="same", dilation_rate=2)
        replace(model, "one", new, init="compose")
    inputs = keras.Input((6, 6, 4))
    model = keras.Model(inputs, kl.Conv2D(4, 3, name="one")(inputs))
    with pytest.raises(ValueError, match="strides .* init='copy'"):
        replace(model, "one", kl.Conv2D(4, 3, strides=2), init="compose")
