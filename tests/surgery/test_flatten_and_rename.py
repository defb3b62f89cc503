"""One graph of nested models, and other names: the same network, sharing kept, inputs untouched."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from contract import equal, images, operations, run, same_layer, same_snapshot, shake_, snapshot
from keras import layers as kl
from test_nested import MODELS, layers, outer, siamese, tower, two

from vggtorch.keras_graph import functional
from vggtorch.lowering import to_torch
from vggtorch.models import load_weights, named_variables, remember_, save_weights, weight_set
from vggtorch.surgery import flatten, insert, rename, truncate

pytestmark = pytest.mark.usefixtures("one_thread")


def case_of(name):
    model = shake_({**MODELS, "two": two}[name]())
    x = images(8) / 255
    return model, [x, x.flip(1)] if name == "siamese" else x


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "two"])
def test_flatten_gives_one_graph_that_computes_the_same(name, tmp_path):
    model, x = case_of(name)
    before = snapshot(model)
    flat = flatten(model)
    same_snapshot(before, snapshot(model))
    y = run(model, x)
    equal(run(flat, x), y)
    assert not any(functional(x) for x in operations(flat).values())
    old = {id(x): x for x in layers(model).values() if functional(x) is None}
    kept = [x for x in old.values() if not isinstance(x, kl.InputLayer)]
    made = [x for x in operations(flat).values() if not isinstance(x, kl.InputLayer)]
    assert len(kept) == len(made)
    assert len(flat.variables) == len(model.variables)  # what was shared is one layer
    if name != "two":
        for layer in kept:
            same_layer(layer, operations(flat)[layer.name])
    network = to_torch(flat).eval()
    args = x if isinstance(x, list) else [x]
    torch.testing.assert_close(network(*args), y, rtol=1e-4, atol=1e-5)
    flat.save(tmp_path / "flat.keras")
    equal(run(keras.saving.load_model(tmp_path / "flat.keras"), x), y)
    clone = keras.models.clone_model(flat)
    clone.set_weights(flat.get_weights())
    equal(run(clone, x), y)
    torch.testing.assert_close(flat(x, training=True), model(x, training=True))


def test_names_that_collide_get_the_names_of_their_models():
    flat = flatten(two())
    left = ["left_conv1", "left_deep_conv2", "left_deep_norm", "left_pool", "left_conv3"]
    assert set(left) | {name.replace("left", "right") for name in left} | {"sum"} <= set(
        operations(flat)
    )
    assert flat.get_layer("left_conv1").kernel.path == "left_conv1/kernel"
    inputs = keras.Input((8, 8, 3))
    x = kl.Conv2D(3, 1, name="conv1")(inputs)
    taken = kl.Conv2D(3, 1, name="tower_conv1")(x)
    flat = flatten(keras.Model(inputs, tower()(taken)))
    assert [n for n in operations(flat) if "conv1" in n] == [
        "conv1",
        "tower_conv1",
        "tower_conv1_1",
    ]


def test_flatten_keeps_dtypes_training_and_the_weight_set():
    inner = keras.Sequential(
        [keras.Input((4, 4, 3)), kl.Dropout(0.5, seed=1, name="drop"), kl.Conv2D(2, 1, name="c")],
        name="inner",
    )
    pixels = keras.Input((4, 4, 3), dtype="uint8")
    model = keras.Model(pixels, kl.Flatten()(inner(pixels, training=True)))
    x = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    with torch.no_grad():
        equal(flatten(model)(x), model(x))  # dropped alike: training=True is part of the graph
    vgg = remember_(truncate(outer(), "tower/pool"), "oxford")
    row = keras.Sequential([vgg, kl.Flatten(name="f")])
    assert weight_set(flatten(row)) == "oxford"
    assert weight_set(rename(row, "a_")) == "oxford"


def test_a_model_that_is_called_with_another_rank_is_not_dissolved():
    a, x = keras.Input((4, 1)), keras.Input((4,))
    inner = keras.Model(a, kl.Flatten()(a), name="inner")
    with pytest.raises(ValueError, match=r"'inner': its input has the shape \(None, 4, 1\) and it"):
        flatten(keras.Model(x, inner(x)))


def test_what_cannot_be_told_that_it_trains_is_not_dissolved():
    class Own(keras.Layer):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.drop = kl.Dropout(0.5)

        def call(self, x):
            return self.drop(x)

    a, x = keras.Input((4,)), keras.Input((4,))
    inner = keras.Model(a, Own(name="own")(a), name="inner")
    with pytest.raises(ValueError, match="'inner', .*with training=True: own can't be told"):
        flatten(keras.Model(x, inner(x, training=True)))


def test_flatten_refuses_what_a_graph_of_layers_cant_be():
    steps = keras.Input((5, 3))
    inner = keras.Model(steps, kl.LSTM(2)(steps), name="inner")
    mask = keras.Input((5,), dtype="bool")
    model = keras.Model([steps, mask], inner(steps, mask=mask))
    with pytest.raises(ValueError, match="can't dissolve 'inner': it is called with mask"):
        flatten(model)


def test_masks_go_through_nested_models():
    steps = keras.Input((7, 8))
    inner = keras.Model(steps, kl.GRU(4, name="gru")(kl.Dropout(0.1, name="d")(steps)), name="in")
    tokens = keras.Input((7,), dtype="int32")
    model = keras.Model(tokens, inner(kl.Embedding(9, 8, mask_zero=True, name="e")(tokens)))
    numbers = torch.tensor([[1, 2, 3, 0, 0, 0, 0], [4, 5, 6, 7, 8, 0, 0]])
    equal(run(flatten(model), numbers), run(model, numbers))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_renamed_layers_are_the_same_under_other_names(name):
    model, x = case_of(name)
    before = snapshot(model)
    result = rename(model, {"tower/deep/conv2": "second", "tower": "body", "head": "top"})
    same_snapshot(before, snapshot(model))
    equal(run(result, x), run(model, x))
    paths = layers(result)
    assert {"body", "body/conv1", "body/deep/second", "top"} <= set(paths)
    assert not {"tower", "head"} & set(paths)
    assert paths["body/deep/second"].kernel.path.endswith("second/kernel")
    assert paths["top"].kernel.path == "top/kernel"
    for a, b in zip(model.variables, result.variables, strict=True):
        equal(a.value, b.value)
    swapped = rename(result, {"body/conv1": "conv3", "body/conv3": "conv1"})
    equal(run(swapped, x), run(model, x))
    keys = named_variables(rename(model, "left_"))
    assert all(key.startswith("left_") for key in keys)


@pytest.mark.slow
def test_renamed_models_load_what_they_save(tmp_path):
    """Flat models under new names: Keras's own files and the package's, and two in one model."""
    flat = shake_(flatten(outer()))
    x = images(8) / 255
    renamed = rename(flat, "a_")
    for ending in (".weights.h5", ".safetensors"):
        path = tmp_path / f"w{ending}"
        save_weights(renamed, path)
        empty = rename(flatten(outer()), "a_")
        load_weights(empty, path)
        equal(run(empty, x), run(flat, x))
        other = rename(flatten(outer()), "a_")
    other.load_weights(tmp_path / "w.weights.h5")
    equal(run(other, x), run(flat, x))
    left, right = rename(flat, "left_"), rename(flatten(outer()), "right_")
    both = keras.Model([left.input, right.input], kl.Add(name="sum")([left.output, right.output]))
    both.save(tmp_path / "both.keras")
    y = run(both, [x, x])
    equal(y, run(left, x) + run(right, x))
    equal(run(keras.saving.load_model(tmp_path / "both.keras"), [x, x]), y)
    save_weights(both, tmp_path / "both.weights.h5")
    for v in both.variables:
        v.assign(v * 0)
    load_weights(both, tmp_path / "both.weights.h5")
    equal(run(both, [x, x]), y)


@pytest.mark.slow
def test_layers_that_the_user_renamed_have_names_that_load(tmp_path):
    """keras#5540: `layer.name = ...` leaves the variables' paths as they were."""
    model = shake_(flatten(outer()))
    x = images(8) / 255
    for layer in model.layers:
        layer.name = f"mine_{layer.name}"
    assert "mine_conv1/kernel" in named_variables(model)
    for ending in (".weights.h5", ".safetensors"):
        save_weights(model, tmp_path / f"w{ending}")
        values = [v.numpy().copy() for v in model.variables]
        for v in model.variables:
            v.assign(v * 0)
        load_weights(model, tmp_path / f"w{ending}")
        for v, value in zip(model.variables, values, strict=True):
            np.testing.assert_array_equal(v.numpy(), value)
    model.save(tmp_path / "m.keras")
    load_weights(model, tmp_path / "m.keras")
    assert insert(model, "mine_conv1", kl.ReLU()).get_layer("mine_conv1").kernel.path == (
        "mine_conv1/kernel"
    )
    equal(run(keras.saving.load_model(tmp_path / "m.keras"), x), run(model, x))


def test_dict_inputs_are_renamed_with_their_layers():
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    model = keras.Model({"a": a, "b": b}, kl.Subtract(name="minus")([a, b]))
    result = rename(model, {"a": "z"})
    x, y = torch.rand(2, 3), torch.rand(2, 3)
    equal(run(result, {"z": x, "b": y}), x - y)


LETTERS: Any = list("head")
REFUSED = {
    "no prefix": (lambda: rename(outer(), ""), "a prefix that isn't empty, received ''"),
    "nothing": (lambda: rename(outer(), {}), "rename expects .* received {}"),
    "a list": (lambda: rename(outer(), LETTERS), r"rename expects .* received \['h', 'e'"),
    "unknown": (lambda: rename(outer(), {"haed": "x"}), "no layer 'haed'. Did you mean 'head'"),
    "taken": (
        lambda: rename(outer(), {"head": "mean"}),
        "several layers of 'outer' one name: 'mean'",
    ),
    "taken inside": (
        lambda: rename(outer(), {"tower/conv1": "pool"}),
        "several layers of 'tower' one name: 'pool'",
    ),
    "a path": (
        lambda: rename(outer(), {"head": "tower/head"}),
        "received 'tower/head' as the new name of 'head'.*has no '/'",
    ),
    "two names": (
        lambda: rename(siamese(), {"mix": "a", "tower/mix": "b"}),
        "received 'a' and 'b' as names of one layer, 'tower/mix'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_names_that_cant_be_are_refused(case):
    operation, text = REFUSED[case]
    with pytest.raises(ValueError, match=text):
        operation()
