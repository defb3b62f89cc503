"""What is set on a Keras layer after `to_torch` is warned of, unless the network follows it."""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from small_vgg import assert_close, images, small_vgg

from vggtorch.lowering import accelerate_, optimize_for_inference, to_torch


def one_beside_an_equal_one(m: Any) -> None:
    m.get_layer("block1_conv1").padding = "".join(("sa", "me"))
    m.get_layer("dropout").rate = 0.25


CHANGES: dict[str, tuple[Callable[[keras.Model], object], str]] = {
    "activation": (
        lambda m: setattr(m.get_layer("block1_conv1"), "activation", keras.activations.tanh),
        "block1_conv1.activation",
    ),
    "rate": (lambda m: setattr(m.get_layer("dropout"), "rate", 0.25), "dropout.rate"),
    "epsilon": (lambda m: setattr(m.get_layer("block2_bn1"), "epsilon", 0.5), "block2_bn1.epsilon"),
    "strides": (
        lambda m: setattr(m.get_layer("block1_conv1"), "strides", (2, 2)),
        "block1_conv1.strides",
    ),
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
    "an array": (
        lambda m: setattr(m.get_layer("block1_conv1"), "strides", np.array((2, 2))),
        "block1_conv1.strides",
    ),
    "one beside an equal one": (
        one_beside_an_equal_one,
        "dropout.rate",
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
        with pytest.warns(UserWarning, match="changed in Keras after to_torch") as warned:
            after = network(x)
        names = str(warned[0].message).partition(" changed in")[0].split(", ")
        assert name in names and len(names) <= {"LoRA": 3, "quantization": 2}.get(change, 1)
        if change != "quantization":  # which takes the kernel away
            assert torch.equal(before, after)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            network(x)
            dict(network.named_parameters())


@contextlib.contextmanager
def patched(kind: type, name: str, factor: float) -> Iterator[None]:
    """While a library has put a wrapper around a method of a class, which scales what it gives."""
    method = getattr(kind, name)

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return factor * method(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, name, wrapper)
        yield


PATCHED = [
    (layers.Dense, "call"),
    (layers.Conv2D, "call"),
    (layers.Conv2D, "convolution_op"),
    (layers.Conv2D, "__call__"),
    (layers.MaxPooling2D, "call"),
    (layers.Flatten, "call"),
    (layers.BatchNormalization, "call"),
    (layers.Dropout, "__call__"),
]


@pytest.mark.parametrize(("kind", "name"), PATCHED)
def test_code_that_a_library_puts_into_a_class_counts(kind: type, name: str) -> None:
    vgg = model()
    x = images(vgg)
    accelerated = accelerate_(keras.models.clone_model(vgg))
    accelerated.set_weights(vgg.get_weights())
    network = to_torch(vgg).eval()
    with torch.no_grad():
        before = network(x)
        with patched(kind, name, 3.0):
            expected = vgg(x, training=False)
            assert not torch.allclose(expected, before)
            assert_close(accelerated(x, training=False), expected)
            assert_close(to_torch(vgg).eval()(x), expected)
            with pytest.warns(UserWarning, match=f"{kind.__name__}.{name} changed in Keras after"):
                assert torch.equal(network(x), before)
        assert_close(accelerated(x, training=False), before)


def test_code_that_a_library_puts_into_a_models_class_counts() -> None:
    vgg = accelerate_(model())
    x = images(vgg)
    before = vgg(x, training=False)
    with patched(type(vgg), "call", 3.0):
        assert_close(vgg(x, training=False), 3.0 * before)
    assert_close(vgg(x, training=False), before)


def test_the_code_of_a_nested_model_may_be_replaced() -> None:
    image = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="dense")], name="inner")
    outer, x = keras.Model(image, inner(image)), torch.rand(2, 4)
    accelerate_(outer)
    network = to_torch(outer)
    inner.call = lambda *args, **kwargs: 3.0 * type(inner).call(inner, *args, **kwargs)
    expected = 3.0 * type(inner).call(inner, x)
    assert_close(outer(x), expected)
    assert_close(to_torch(outer)(x), expected)
    with pytest.warns(UserWarning, match="inner.call changed in Keras after to_torch"):
        assert_close(network(x), expected / 3.0)
    inner.get_layer("dense").activation = keras.activations.tanh
    with pytest.warns(UserWarning, match="^inner/dense.activation changed"):
        assert_close(network(x), expected / 3.0)


@pytest.mark.parametrize("use", [to_torch, accelerate_, optimize_for_inference])
def test_a_model_whose_call_was_replaced_is_refused(use: Callable[[keras.Model], Any]) -> None:
    vgg = small_vgg()
    with patched(type(vgg), "call", 3.0), pytest.raises(ValueError, match="was replaced by code"):
        use(vgg)
    vgg.call = lambda *args, **kwargs: type(vgg).call(vgg, *args, **kwargs)
    with pytest.raises(ValueError, match=f"{use.__name__} would leave out"):
        use(vgg)


class Checked(keras.Model):
    """With a `__call__` of its own, as KerasHub's classifiers have."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def test_the_graph_alone_of_a_class_with_code_of_its_own_is_taken() -> None:
    vgg = small_vgg()
    model, x = Checked(vgg.inputs, vgg.outputs), images(vgg)
    with pytest.raises(ValueError, match=r"graph alone: keras\.Model\(model\.inputs, model\.outp"):
        to_torch(model)
    assert_close(to_torch(keras.Model(model.inputs, model.outputs)).eval()(x), vgg(x))


@pytest.mark.parametrize("nested", [False, True])
def test_layers_that_a_sequential_model_gets_or_loses(nested: bool) -> None:
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="a")], name="inner")
    image = keras.Input((4,))
    outer = keras.Model(image, inner(image)) if nested else inner
    network, x = to_torch(outer), torch.rand(2, 4)
    accelerate_(outer)
    first = outer(x)
    inner.add(layers.Dense(5, name="b"))
    second = inner.get_layer("b")(first)
    assert_close(outer(x), second)
    assert_close(to_torch(outer)(x), second)
    with pytest.warns(UserWarning, match="inner.layers changed in Keras after to_torch"):
        assert_close(network(x), first)
    inner.pop()
    assert_close(outer(x), first)


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


@pytest.mark.parametrize("adapted", [False, True])
def test_statistics_of_a_normalization(adapted: bool) -> None:
    """Adapted anew they are new values of variables, which the network follows."""
    image, data = keras.Input((3,), name="image"), np.random.default_rng(0).random((50, 3))
    given = {} if adapted else {"mean": [1.0, 2.0, 3.0], "variance": [4.0, 5.0, 6.0]}
    norm = layers.Normalization(name="norm", **given)
    if adapted:
        norm.adapt(data)
    made, x = keras.Model(image, norm(image)), torch.rand(2, 3)
    network = to_torch(made).eval()
    before = network(x)
    if adapted:
        norm.adapt(3 * data + 7)
        assert_close(network(x), made(x))  # a warning would fail
    else:
        norm.mean = torch.ones(1, 3)
        with pytest.warns(UserWarning, match=r"^norm\.mean changed in Keras after to_torch"):
            assert torch.equal(network(x), before)


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


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize(
    "name, value", [("dense.bias", None), ("dense.bias", 3), ("norm.gamma", 2)]
)
def test_what_stands_in_a_weights_place(name: str, value: int | None, accelerated: bool) -> None:
    keras.utils.set_random_seed(0)
    image = keras.Input((4, 4, 3))
    x = layers.BatchNormalization(name="norm", beta_initializer="ones")(image)
    model = keras.Model(image, layers.Dense(3, name="dense", bias_initializer="ones")(x))
    x = torch.rand(2, 4, 4, 3)
    if accelerated:
        accelerate_(model)
    before = model(x, training=False)
    layer, attribute = name.split(".")
    tensor = None if value is None else torch.full((3,), float(value))
    setattr(model.get_layer(layer), attribute, tensor)
    expected = type(model).call(model, x, training=False)  # by Keras
    found = model(x, training=False) if accelerated else to_torch(model).eval()(x)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, before)
