"""truncate cuts where it is told to, and keeps no input that isn't needed."""

from __future__ import annotations

import keras
import pytest
import torch
from contract import check, equal, run, shared, vgg
from keras import layers as kl

from vggtorch.surgery import rename, replace, truncate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_the_tutorial_runs_on_results():
    model, x = vgg()
    custom = truncate(model, "block2_pool")
    layer_dict = {layer.name: layer for layer in custom.layers}
    y = layer_dict["block2_pool"].output
    y = kl.Conv2D(64, 3, activation="relu")(y)
    y = kl.Dense(10, activation="softmax")(kl.Flatten()(y))
    custom_model = keras.Model(inputs=custom.input, outputs=y)
    for layer in custom_model.layers[:7]:
        layer.trainable = False
    assert [layer.name for layer in custom_model.layers[:7]] == [
        *("input_layer", "block1_conv1", "block1_conv2", "block1_pool"),
        *("block2_conv1", "block2_conv2", "block2_pool"),
    ] or custom_model.layers[0].name.startswith("input_layer")
    assert run(custom_model, x).shape == (2, 10)
    assert all(model.get_layer(f"block2_conv{n}").trainable for n in (1, 2))

    new_conv = kl.Conv2D(64, 5, padding="same", activation="relu", name="block1_conv")
    replaced = replace(model, ["block1_conv1", "block1_conv2"], new_conv)
    check(model, replaced, new=[new_conv], gone=["block1_conv1", "block1_conv2"])
    inner = keras.Model(replaced.input, replaced.get_layer("block3_pool").output)
    tail = truncate(model, "block3_pool", start="block1_pool")
    equal(run(inner, x), run(tail, run(truncate(replaced, "block1_pool"), x)))


def test_truncate_with_several_names_gives_several_outputs_in_that_order():
    model, x = vgg()
    result = truncate(model, ["block3_conv3", "block1_conv2"])
    check(model, result, gone=["block3_pool"])
    late, early = run(result, x)
    equal(late, run(truncate(model, "block3_conv3"), x))
    equal(early, run(truncate(model, "block1_conv2"), x))


def test_inputs_that_are_no_longer_needed_go():
    model = shared()
    result = truncate(model, "side")
    assert list(result.input) == ["b"]
    x = torch.rand(3, 6)
    equal(run(result, {"b": x}), run(model, {"a": x, "b": x})[1])
    assert [t.name for t in truncate(model, ["sum", "side"]).inputs] == ["a", "b"]


def test_one_input_that_is_left_stands_alone():
    a, b, c = (keras.Input((6,), name=name) for name in "abc")
    x = kl.Add(name="sum")([a, b])
    model = keras.Model([a, b, c], kl.Concatenate(name="all")([x, kl.Dense(2, name="side")(c)]))
    assert [t.name for t in truncate(model, "sum").input] == ["a", "b"]
    assert truncate(model, "side").input.name == "c"
    x = torch.rand(3, 6)
    equal(run(truncate(model, "side"), x), model.get_layer("side")(x))


def test_inputs_in_lists_inside_of_a_dict_go_and_get_other_names():
    a, b, c = (keras.Input((6,), name=name) for name in "abc")
    x, y, z = (kl.Dense(3, name=f"of_{t.name}")(t) for t in (a, b, c))
    model = keras.Model({"pair": [a, b], "c": c}, kl.Add(name="sum")([x, y, z]))
    result = truncate(model, ["of_b", "of_c"])
    assert {key: keras.tree.flatten(part)[0].name for key, part in result.input.items()} == {
        "pair": "b",
        "c": "c",
    }
    x, y, z = torch.rand(3, 2, 6)
    renamed = rename(model, "left_")
    equal(run(renamed, {"pair": [x, y], "left_c": z}), run(model, {"pair": [x, y], "c": z}))
    equal(run(result, {"pair": [y], "c": z})[0], model.get_layer("of_b")(y))
