"""Models of every kind that are graphs of layers are compressed to the budget, and stay of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
import pytest
from small import L, images, vgg

import vggtorch as vt
from vggtorch.compression import photographs
from vggtorch.compression.networks import networks_of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def conv(filters=32, size=3, **options):
    return L.Conv2D(filters, size, **({"padding": "same", "activation": "relu"} | options))


def of_policy(policy: str) -> keras.Model:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        return vgg()
    finally:
        keras.config.set_dtype_policy(before)


def sequential() -> keras.Model:
    layers = [conv(), conv(padding="valid"), L.MaxPooling2D(), L.Flatten(), L.Dense(10)]
    return keras.Sequential([keras.Input((24, 24, 3)), *layers], name="line")


def several_outputs() -> keras.Model:
    model = vgg()
    return keras.Model(
        model.inputs, {"a": model.get_layer("block2_pool").output, "b": model.output}
    )


def shared() -> keras.Model:
    inputs, twice = keras.Input((24, 24, 3)), conv(name="twice")
    x = twice(twice(conv(48)(inputs)[..., :32]))
    return keras.Model(inputs, conv(48, name="last", padding="valid")(x))


def shared_pool() -> keras.Model:
    pool, x = L.MaxPooling2D(name="pool"), keras.Input((24, 24, 3))
    inputs = x
    for width in (32, 48):
        x = pool(conv(width)(x))
    return keras.Model(inputs, conv(48)(x))


def shared_head() -> keras.Model:
    inputs, head = keras.Input((24, 24, 3)), conv(16, 1, name="head")
    x = conv()(inputs)
    return keras.Model(inputs, [head(conv(48)(x)), head(conv(48)(x))])


def own_activation(x):
    return x * keras.ops.sigmoid(x)


def of_own_activations() -> keras.Model:
    x = inputs = keras.Input((24, 24, 3))
    for width in (32, 48, 48):
        x = conv(width, activation=own_activation)(x)
    return keras.Model(inputs, x)


def channels_first() -> keras.Model:
    inputs, first = keras.Input((3, 24, 24)), {"data_format": "channels_first"}
    x = conv(**first)(conv(**first)(inputs))
    return keras.Model(inputs, L.MaxPooling2D(**first)(x))


def odd_strides() -> keras.Model:
    x = inputs = keras.Input((25, 25, 3))
    x = conv(padding="valid", strides=(2, 1))(x)
    return keras.Model(inputs, conv(48, (3, 5), padding="valid", strides=2)(x))


def edges_of_two_widths(dtype: str | None = None) -> keras.Model:
    """Padding "same" with strides, which adds zeros on one side alone."""
    inputs = keras.Input((24, 24, 3), dtype=dtype)
    x = conv(strides=2, dtype=dtype)(inputs)
    return keras.Model(inputs, conv(48, strides=(2, 1), dtype=dtype)(x))


def of_operations(policy: str | None = None) -> keras.Model:
    x = inputs = keras.Input((24, 24, 3))
    for width in (32, 48):
        x = keras.ops.relu(conv(width, activation=None, dtype=policy)(x) * 0.5)
    return keras.Model(inputs, keras.ops.cast(x, "bfloat16"))


def restrained() -> keras.Model:
    inputs = keras.Input((24, 24, 3))
    x = conv(kernel_regularizer="l2", activity_regularizer="l2")(inputs)
    return keras.Model(inputs, conv(kernel_constraint=keras.constraints.MaxNorm(5))(x))


def perceptron() -> keras.Model:
    inputs = keras.Input((64,))
    return keras.Model(inputs, L.Dense(96)(L.Dense(128, activation="relu")(inputs)))


def of_sequences() -> keras.Model:
    inputs = keras.Input((20, 16))
    x = L.Dense(64, activation="relu")(L.Conv1D(64, 3, activation="relu")(inputs))
    return keras.Model(inputs, L.Dense(64)(x))


KINDS: dict[str, tuple[Callable[[], keras.Model], float]] = {
    "Sequential": (sequential, 2.0),
    **{p: (partial(of_policy, p), 2.0) for p in ("mixed_bfloat16", "bfloat16", "float64")},
    "several outputs": (several_outputs, 2.0),
    "shared layer": (shared, 1.2),
    "shared pool": (shared_pool, 1.5),
    "shared outputs": (shared_head, 1.2),
    "own activations": (of_own_activations, 1.5),
    "operations": (of_operations, 1.5),
    "operations in half precision": (partial(of_operations, "mixed_bfloat16"), 1.5),
    "edges of two widths": (edges_of_two_widths, 2.0),
    "images in double precision": (partial(edges_of_two_widths, "float64"), 2.0),
    "channels first": (channels_first, 2.0),
    "odd strides": (odd_strides, 1.5),
    "regularisers and constraints": (restrained, 1.5),
    "vectors": (perceptron, 1.5),
    "sequences": (of_sequences, 1.2),
}


def shown(model: keras.Model) -> np.ndarray:
    shape = model.inputs[0].shape[1:]
    if len(shape) < 3:
        mixed = np.random.default_rng(0).normal(size=(400, 8)) @ np.random.default_rng(1).normal(
            size=(8, int(np.prod(shape)))
        )
        return mixed.reshape(400, *shape).astype("float32")
    x = images(40, max(shape))
    return x.transpose(0, 3, 1, 2) if shape[0] == 3 else x


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, tmp_path):
    make, times = KINDS[kind]
    keras.utils.set_random_seed(0)
    model = make()
    x = shown(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # none that says nothing to whoever compresses
        result, found = vt.compress(model, times, x, steps=3, folder=tmp_path)
    assert times <= found.times < 1.15 * times
    counted = [vt.inspect(m, repeats=1).total.multiply_adds for m in (model, result)]
    assert counted == [found.before, found.after]
    assert min(found.likeness.values()) > 0.9
    policies = [{layer.dtype_policy.name for layer in m.layers} for m in (model, result)]
    assert policies[0] == policies[1]
    before, after = (keras.tree.flatten(m.predict(x[:8], verbose=0)) for m in (model, result))
    for a, b in zip(before, after, strict=True):
        a, b = (np.asarray(y, "float32").ravel() for y in (a, b))
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.9


def test_channels_that_an_activation_of_ones_own_may_mix_are_not_deleted():
    with pytest.raises(ValueError, match=r"this network can cost 1.00 times less at most"):
        vt.compress(of_own_activations(), 1.2, images(), methods="channels")


def test_names_that_are_taken_get_a_number():
    x = inputs = keras.Input((24, 24, 3))
    for name in ("a", "b_rank", "b"):
        x = conv(48, name=name)(x)
    options: Any = {"methods": "low rank", "keep": ["a", "b_rank"], "steps": 0}
    result, _ = vt.compress(keras.Model(inputs, x), 1.2, images(), **options)
    assert [layer.name for layer in result.layers][1:] == ["a", "b_rank", "b_rank_2", "b"]


def test_layers_whose_names_torch_modules_have_taken_are_replaced_too():
    x = inputs = keras.Input((24, 24, 3))
    for name in ("forward", "training", "a"):
        x = conv(name=name)(x)
    _, found = vt.compress(keras.Model(inputs, x), 1.5, images(), steps=0)
    assert [row.name for row in found.layers] == ["forward", "training", "a"]


@pytest.mark.gpu
@pytest.mark.parametrize("by", ["multiply-adds", "seconds"])
def test_on_a_gpu(by, tmp_path):
    model = vgg()
    times = 2.0 if by == "multiply-adds" else 1.01
    result, found = vt.compress(model, times, images(), by=by, steps=3, folder=tmp_path)
    assert {v.value.device.type for m in (model, result) for v in m.variables} == {"cuda"}
    assert by == "seconds" or found.times >= 2
    assert min(found.likeness.values()) > 0.95


def test_networks_that_know_the_size_of_their_maps_see_whole_images(monkeypatch):
    monkeypatch.setattr(photographs, "CROP", 12)
    inputs = keras.Input((24, 24, 3))
    x = L.PReLU("ones")(conv(activation=None)(inputs))
    x = keras.ops.reshape(conv(48)(x), (-1, 24 * 24 * 48))
    _, found = vt.compress(keras.Model(inputs, x), 1.5, images(), steps=1)
    assert min(found.likeness.values()) > 0.9


def test_images_of_which_nothing_is_left_decide_nothing():
    """Whose last map is zero, relative to which any change is without end."""
    model, x = vgg(), images()  # no layer of which adds a bias
    model.get_layer("block3_conv2").activation = keras.activations.linear
    x[::3] = 0
    result, found = vt.compress(model, 2, x, steps=3)
    assert found.times >= 2
    seen = x[1::3]
    before, after = (m.predict(seen, verbose=0).ravel() for m in (model, result))
    assert before @ after / np.linalg.norm(before) / np.linalg.norm(after) > 0.9


def test_layers_that_give_nothing_are_alike():
    model = vgg()
    dead = model.get_layer("block2_conv1")
    dead.set_weights([0 * weights for weights in dead.get_weights()])
    _, found = vt.compress(model, 2, images(), steps=1)
    assert found.times >= 2
    assert found.likeness["block1_pool"] > 0.7
    assert found.likeness["block3_pool"] == 1.0  # zeros, as before


def test_the_products_of_attention_are_part_of_what_a_network_costs():
    inputs = keras.Input((24, 24, 3))
    tokens = L.Reshape((36, 32))(L.MaxPooling2D(4)(conv()(conv()(inputs))))
    model = keras.Model(inputs, L.MultiHeadAttention(2, 16)(tokens, tokens))
    total = networks_of(model, photographs.split(model, images(), 0), ()).total
    assert total == vt.inspect(model, repeats=1).total.multiply_adds
