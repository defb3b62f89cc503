"""insert and remove change what they name, in shared and nested layers too."""

from __future__ import annotations

import keras
import pytest
import torch
from contract import (
    check,
    equal,
    identity,
    images,
    nested,
    operations,
    run,
    same_layer,
    same_snapshot,
    shake_,
    shared,
    snapshot,
    vgg,
)
from keras import layers as kl

from vggtorch.surgery import insert, remove, replace, truncate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_remove_of_several_layers():
    model, x = vgg()
    result = remove(model, ["block4_conv2", "block4_conv3", "block5_conv1"])
    check(model, result, gone=["block4_conv2", "block4_conv3", "block5_conv1"])
    y = run(truncate(model, "block4_conv1"), x)
    for name in ("block4_pool", "block5_conv2", "block5_conv3", "block5_pool"):
        y = model.get_layer(name)(y)
    equal(run(result, x), y)


def test_shared_layers_stay_shared():
    model = shake_(shared())
    x = {"a": torch.rand(3, 6), "b": torch.rand(3, 6)}
    before = snapshot(model)
    result = insert(model, "only_a", identity())
    check(model, result, new=[result.get_layer("identity")])
    for a, b in zip(run(result, x), run(model, x), strict=True):
        equal(a, b)

    new = kl.Dense(6, activation="relu", name="new")
    result = replace(model, "shared", new)
    assert len(new._inbound_nodes) == 2
    new.set_weights(model.get_layer("shared").get_weights())
    for a, b in zip(run(result, x), run(model, x), strict=True):
        equal(a, b)

    new = identity()
    result = insert(model, "shared", new)
    assert len(new._inbound_nodes) == 2
    check(model, result, new=[new])

    removed = remove(model, "shared")
    equal(run(removed, x)[1], model.get_layer("side")(x["b"]))
    same_snapshot(before, snapshot(model))


def test_nested_models_are_copied_with_all_that_is_in_them():
    model = shake_(nested())
    model.get_layer("middle").get_layer("inner").layers[0].trainable = False
    before = snapshot(model)
    x = images(4)
    result = insert(model, "middle", identity())
    check(model, result, new=[result.get_layer("identity")])
    equal(run(result, x), run(model, x))
    middle = result.get_layer("middle")
    assert isinstance(middle.get_layer("inner"), keras.Sequential)
    assert not middle.get_layer("inner").layers[0].trainable
    same_layer(model.get_layer("middle").get_layer("inner"), middle.get_layer("inner"))
    for op in operations(middle).values():
        assert len(op._inbound_nodes) == 1
    (node,) = middle.get_layer("inner")._inbound_nodes
    assert node.arguments.kwargs == {"training": False}
    same_snapshot(before, snapshot(model))


@pytest.mark.slow
def test_graphs_deeper_than_the_stack_of_python():
    inputs = x = keras.Input((2,))
    for n in range(300):
        x = kl.Activation("linear", name=f"layer{n}")(x)
    model = keras.Model(inputs, x)
    result = remove(model, [f"layer{n}" for n in range(100, 200)])
    assert len(result.layers) == 201


def test_sequential_models_become_functional_ones():
    model = keras.Sequential([keras.Input((6,)), kl.Dense(5, name="a"), kl.Dense(4, name="b")])
    shake_(model)
    before = snapshot(model)
    result = truncate(model, "a")
    equal(run(result, torch.ones(2, 6)), model.layers[0](torch.ones(2, 6)))
    assert result.name == model.name
    result = insert(model, "a", identity())
    equal(run(result, torch.ones(2, 6)), run(model, torch.ones(2, 6)))
    same_snapshot(before, snapshot(model))
