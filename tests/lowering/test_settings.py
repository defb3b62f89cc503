"""What is set on a Keras layer after `to_torch` is warned of, unless the network follows it."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable

import keras
import numpy as np
import pytest
import torch
from keras import layers
from small_vgg import images, small_vgg

from vggtorch.lowering import accelerate_, to_torch

CHANGES: dict[str, tuple[Callable[[keras.Model], object], str]] = {
    "activation": (
        lambda m: setattr(m.get_layer("block1_conv1"), "activation", keras.activations.tanh),
        "block1_conv1.activation",
    ),
    "rate": (lambda m: setattr(m.get_layer("dropout"), "rate", 0.25), "dropout.rate"),
    "epsilon": (lambda m: setattr(m.get_layer("block2_bn1"), "epsilon", 0.5), "block2_bn1.epsilon"),
    "strides": (lambda m: setattr(m.get_layer("block1_conv1"), "strides", (2, 2)), "strides"),
    "LoRA": (lambda m: m.get_layer("fc1").enable_lora(2), "fc1.lora_enabled"),
    "quantization": (lambda m: m.get_layer("fc1").quantize("int8"), "fc1.dtype_policy"),
    "call": (
        lambda m: setattr(m.get_layer("fc1"), "call", m.get_layer("fc1").call),
        "fc1.call",
    ),
    "policy": (
        lambda m: setattr(m.get_layer("fc1"), "dtype_policy", keras.DTypePolicy("mixed_bfloat16")),
        "fc1.dtype_policy",
    ),
}


def model() -> keras.Model:
    made = small_vgg()
    return keras.Model(made.input, layers.Dropout(0.5, name="dropout")(made.output))


@pytest.mark.parametrize("change", CHANGES)
def test_a_setting_is_warned_of_once_and_has_no_effect(change: str) -> None:
    vgg = model()
    network, x = to_torch(vgg).eval(), images(vgg)
    edit, name = CHANGES[change]
    with torch.no_grad():
        before = network(x)
        edit(vgg)
        with pytest.warns(
            UserWarning, match=f"{re.escape(name)}.* changed in Keras after to_torch"
        ):
            after = network(x)
        if change != "quantization":  # which takes the kernel away
            assert torch.equal(before, after)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            network(x)
            dict(network.named_parameters())


def test_what_the_network_follows_is_not_warned_of() -> None:
    vgg = model()
    network, x = to_torch(vgg).train(), images(vgg)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        network(x).sum().backward()
        conv = vgg.get_layer("block1_conv1")
        conv.strides, conv.trainable = tuple(conv.strides), False
        vgg.get_layer("dropout").rate = float("0.5")  # another object of the same value
        vgg.set_weights([w + 1 for w in vgg.get_weights()])
        vgg.compile("sgd", "mse")
        y = vgg(x)
        vgg.fit(x.numpy(), np.zeros(y.shape), verbose=0)
        network(x)
        accelerate_(vgg)(x)
        network(x)


def test_layers_that_keras_runs_follow_what_is_set() -> None:
    image = keras.Input((6, 6, 3))
    lstm = layers.LSTM(4, name="lstm")
    made = keras.Model(image, lstm(layers.Reshape((36, 3))(image)))
    network, x = to_torch(made).eval(), torch.rand(2, 6, 6, 3)
    lstm.cell.activation = keras.activations.relu
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        torch.testing.assert_close(network(x), made(x, training=False))


def test_copies_and_networks_of_their_own_stand_alone() -> None:
    vgg = model()
    network, x = to_torch(vgg).eval(), images(vgg)
    alone = [
        copy.deepcopy(network),
        pickle.loads(pickle.dumps(network)),
        to_torch(vgg, share=False).eval(),
    ]
    CHANGES["activation"][0](vgg)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        for each in alone:
            each(x)
