"""What delete_channels can't do it refuses, with the reason and the way on."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from contract import same_snapshot, snapshot
from keras import layers as kl

from vggtorch.surgery import deletable_channels, delete_channels

pytestmark = pytest.mark.usefixtures("one_thread")


def between(*layers):
    x = inputs = keras.Input((4, 4, 3), name="image")
    x = kl.Conv2D(4, 1, name="conv")(x)
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, kl.Dense(2, name="last")(x))


def refused(model, message, layer="conv", channels=(0,)):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        delete_channels(model, layer, channels)
    same_snapshot(before, snapshot(model))


@keras.saving.register_keras_serializable("tests")
def swapped(x):
    return keras.ops.flip(x, -1)


class MyConv(kl.Conv2D):
    pass


MIXING = {
    "softmax": ([kl.Softmax(name="x")], r"'x' \(Softmax\) reads them, and divides each by a sum"),
    "softmax as activation": (
        [kl.Activation("softmax", name="x")],
        r"'softmax' of 'x' \(Activation\) isn't known to take them one by one",
    ),
    "layer norm": ([kl.LayerNormalization(name="x")], r"'x' \(LayerNormalization\) .*may mix them"),
    "group norm": ([kl.GroupNormalization(2, name="x")], r"'x' \(GroupNormalization\) .*may mix"),
    "rms norm": ([kl.RMSNormalization(name="x")], r"'x' \(RMSNormalization\) .*may mix"),
    "norm of rows": ([kl.BatchNormalization(axis=1, name="x")], r"'x' .*reads along axis 1, not"),
    "dense over rows": (
        [kl.Permute((3, 1, 2)), kl.Dense(3, name="x")],
        r"'x' \(Dense\) reads them, and reads along axis 3",
    ),
    "pool over channels": (
        [kl.MaxPooling2D(2, data_format="channels_first", name="x")],
        r"'x' \(MaxPooling2D\) .*takes axis 1 for that of the channels",
    ),
    "lambda": ([kl.Lambda(swapped, name="x")], r"'x' \(Lambda\) reads them, and may mix them"),
    "function": (
        [lambda x: keras.ops.cumsum(x, axis=-1)],
        r"\(Cumsum\) reads them, and may mix them",
    ),
    "a mean of all": (
        [lambda x: keras.ops.mean(x, axis=(1, -1))],
        r"\(Mean\) reads them, and computes one value of all of them",
    ),
    "one of one's own": ([MyConv(3, 1, name="x")], r"'x' \(MyConv\) reads them, and may mix them"),
    "reshape": ([kl.Reshape((4, 8, 2), name="x")], r"'x' \(Reshape\) .*leaves no axis along which"),
    "shuffle": (
        [kl.Reshape((4, 4, 2, 2), name="x"), kl.Permute((1, 2, 4, 3)), kl.Reshape((4, 4, 4))],
        r"'x' \(Reshape\) .*leaves no axis",
    ),
    "other factors": ([kl.Rescaling([1.0, 2.0, 3.0, 4.0], name="x")], "'x' .*a factor of its own"),
    "counted noise": ([kl.Dropout(0.5, (None, 1, 1, 4), name="x")], "'x' .*noise_shape .* counts"),
    "array": ([lambda x: x * np.ones(4, "float32")], r"\(Multiply\) .*with an array of numbers"),
    "other rank": (
        [lambda x: kl.Add(name="x")([x, kl.GlobalAveragePooling2D()(x)])],
        r"'x' \(Add\) reads them, and they stand along other axes",
    ),
    "wrapper": ([kl.TimeDistributed(kl.Dense(2), name="x")], r"'x' \(TimeDistributed\) .*may mix"),
    "spectral norm": (
        [kl.SpectralNormalization(kl.Conv2D(2, 1), name="x")],
        r"'x' \(SpectralNormalization\) reads them, and may mix them",
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_layers_that_mix_channels(name):
    layers, message = MIXING[name]
    model = between(*layers)
    refused(model, message)
    assert all("conv" not in unit for unit in deletable_channels(model))


def test_attention():
    inputs = keras.Input((5, 3))
    x = kl.Dense(4, name="conv")(inputs)
    model = keras.Model(inputs, kl.MultiHeadAttention(2, 2, name="attend")(x, x))
    refused(model, r"'attend' \(MultiHeadAttention\) reads them, and may mix them")


def recurrent(activation="tanh", state=False):
    inputs = keras.Input((5, 3))
    x = kl.Dense(4, name="conv")(inputs)
    start = [kl.Dense(2)(kl.Flatten()(x)) for _ in range(2 * state)] or None
    return keras.Model(inputs, kl.LSTM(2, activation=activation, name="x")(x, initial_state=start))


def test_recurrent_layers_that_mix_channels():
    refused(recurrent(state=True), r"'x' \(LSTM\) .*joins 3 tensors in a way of its own")
    refused(recurrent("softmax"), r"'softmax' of 'x' \(LSTM\) isn't known to take", "x")


def test_weights_of_a_form_of_their_own():
    model = between(kl.Dense(3, name="x"))
    model.get_layer("x").enable_lora(2)
    refused(model, r"'x' \(Dense\) has weights of a form of its own \(.*lora_kernel_a")
    refused(model, "'x' .Dense. has weights of a form of its own", "x")


def test_what_an_add_takes_from_an_input_stays():
    inputs = keras.Input((4, 4, 3), name="image")
    x = kl.Conv2D(3, 1, name="conv")(inputs)
    model = keras.Model(inputs, kl.Dense(2)(kl.Add(name="join")([x, inputs])))
    refused(model, r"'join' \(Add\) ties them to what 'image' puts out, which stays as it is")
    assert deletable_channels(model) == []


def test_a_depthwise_convolution_of_an_input_keeps_its_channels():
    inputs = keras.Input((4, 4, 3), name="image")
    model = keras.Model(inputs, kl.Dense(2)(kl.DepthwiseConv2D(3, name="depth")(inputs)))
    refused(model, r"'depth' \(DepthwiseConv2D\) ties them to what 'image' puts out", "depth")


def test_layers_whose_channels_are_not_known_are_named_as_such():
    inputs = keras.Input((5, 4, 4, 3))
    model = keras.Model(inputs, kl.Flatten()(kl.ConvLSTM2D(2, 3, name="x")(inputs)))
    refused(model, r"of 'x': 'x' \(ConvLSTM2D\) is none of the layers whose channels", "x")


def test_an_open_map_before_flatten():
    inputs = keras.Input((None, 4, 3))
    x = kl.Flatten(name="flat")(kl.Conv2D(4, 1, name="conv")(inputs))
    refused(keras.Model(inputs, x), "'flat' .Flatten. reads them, and the size of their maps is")


def test_outputs_stay_unless_they_are_named():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            kl.Conv2D(4, 3, name="conv"),
            kl.ReLU(name="relu"),
            kl.MaxPooling2D(name="pool"),
        ]
    )
    refused(model, r"puts them out, at 'pool'. If .*name 'pool': .*\{'pool': \[0\]\}")
    result = delete_channels(model, "pool", [0])
    assert result.output_shape == (None, 3, 3, 3)
    assert result.get_layer("conv").filters == 3
    both = keras.Model(model.inputs, [model.get_layer("relu").output, *model.outputs])
    refused(both, "at 'relu'", "pool")
    assert delete_channels(both, ["relu", "pool"], [0]).output_shape[0] == (None, 6, 6, 3)


def test_classes_behind_a_softmax_stay():
    model = between(kl.Flatten(), kl.Dense(3, activation="softmax", name="classes"))
    refused(model, "the activation 'softmax' of 'classes' .Dense. isn't known", "classes")


def test_channels_that_go_only_together_in_one_tensor():
    model = between(kl.DepthwiseConv2D(1, depth_multiplier=2, name="depth"))
    refused(model, r"\[2\] of 'depth' without \[3\]: .* made of .* \[1\] of 'conv'", "depth", [2])
    result = delete_channels(model, "depth", [2, 3])
    assert result.get_layer("conv").filters == 3


def test_all_channels_of_a_layer():
    message = r"would leave 'conv' without a channel, and 'last' \(Dense\) with nothing to read"
    refused(between(), message, channels=range(4))
    refused(between(kl.ReLU(name="relu")), "would leave 'relu' without .* 'last'", "relu", range(4))
    refused(between(), "would leave 'last', an output of the model, no channel", "last", [0, 1])


@pytest.mark.parametrize(
    ("layer", "channels", "message"),
    [
        ("conv", [4], r"'conv' has 4 channels, 0 to 3; received \[4\]"),
        ("conv", [-5, 0], r"'conv' has 4 channels, 0 to 3; received \[-5\]"),
        ("conv", [], "received no channels of 'conv' to delete"),
        ({"conv": []}, None, "received no channels of 'conv' to delete"),
        ("conv", [1, -3], r"received channels of 'conv' twice: \[1\]"),
        ("conv", None, r"received no channels: pass delete_channels\(model, 'conv', \[0, 1\]\)"),
        ("conv", "0", "expects the channels of 'conv' as a list of whole numbers, received '0'"),
        ("conv", [0.0], "as a list of whole numbers, received"),
        ("conv", [True, False, False, True], "a mask; its indices are numpy.flatnonzero"),
        ("conv", np.array([True, False]), "a mask; its indices are numpy.flatnonzero"),
        ("conv", torch.tensor([True, False]), "a mask; its indices are numpy.flatnonzero"),
        ({"conv": [0]}, [0], "received a dict of channels, and channels="),
        ({}, None, "received no layer names"),
        (["conv", "conv"], [0], "received a layer name twice: 'conv'"),
        ("conf", [0], "has no layer 'conf'. Did you mean 'conv'"),
        ("image", [0], "can't delete channels of 'image': it makes none, and none"),
        ({"conv": {"a": 1}}, None, "as a list of whole numbers, received {'a': 1}"),
    ],
)
def test_what_is_asked_for(layer, channels, message):
    refused(between(), message, layer, channels)


def test_one_number_or_an_iterator_will_do():
    assert delete_channels(between(), "conv", -1).get_layer("conv").filters == 3
    model = between(kl.Conv2D(4, 1, name="other"), lambda x: x)
    result = delete_channels(model, ["conv", "other"], iter([0, 2]))
    assert [result.get_layer(name).filters for name in ("conv", "other")] == [2, 2]


def test_a_layer_that_is_named_in_two_ways():
    model = keras.Sequential([keras.Input((4, 4, 3)), between(), kl.Dense(2)])
    model.layers[0].name = "inner"
    refused(model, "received the layer 'inner/conv' twice", ["conv", "inner/conv"])


def test_long_lists_of_channels_are_cut():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, kl.Softmax()(kl.Dense(30, name="wide")(inputs)))
    refused(model, r"channels \[0, 1, 2, 3, 4, 5, ... 20 in all\] of 'wide'", "wide", range(20))


def test_a_layer_that_gives_channels_no_axis_is_named_with_the_reason():
    model = between(kl.LayerNormalization(name="norm"))
    refused(model, "can't delete channels of 'norm': 'norm' .LayerNorm.* may mix them", "norm")


def test_models_without_a_graph():
    class Own(keras.Model):
        pass

    with pytest.raises(ValueError, match="delete_channels needs a Functional or Sequential model"):
        delete_channels(Own(), "conv", [0])
    with pytest.raises(ValueError, match="deletable_channels needs a Functional or Sequential"):
        deletable_channels(Own())
