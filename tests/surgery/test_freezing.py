"""freeze_ and unfreeze_ follow the graph."""

from __future__ import annotations

import keras
import pytest
from contract import every_layer, nested, shared
from keras import layers as kl

from vggtorch.surgery import freeze_, unfreeze_

pytestmark = pytest.mark.usefixtures("one_thread")


def trainable(model):
    return {layer.name for layer in every_layer(model) if layer.weights and layer.trainable}


@pytest.mark.slow
def test_freeze_and_unfreeze_by_position():
    model = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    assert freeze_(model, until="block4_pool") is model
    late = {f"block5_conv{n}" for n in (1, 2, 3)}
    assert trainable(model) == {model.name, *late}
    assert {v.path.split("/")[0] for v in model.trainable_variables} == late
    assert unfreeze_(model, since="block4_conv3") is model
    assert trainable(model) == {model.name, "block4_conv3", *late}
    freeze_(model)
    assert not model.trainable_variables
    unfreeze_(model)
    assert len(model.trainable_variables) == len(model.weights)
    model.trainable = False
    unfreeze_(model, since="block5_conv2")
    assert trainable(model) == {model.name, "block5_conv2", "block5_conv3"}
    assert len(model.trainable_variables) == 4


def test_freezing_follows_the_graph():
    model = shared()
    freeze_(model, until="only_a")
    assert trainable(model) == {model.name, "side"}
    unfreeze_(model, since="only_a")
    assert trainable(model) == {model.name, "only_a", "side"}


def test_freezing_reaches_into_nested_models():
    model = nested()
    unfreeze_(model)
    freeze_(model, until="conv")
    assert trainable(model) == {"outer", "middle", "inner", "bn", "head"}
    freeze_(model)
    unfreeze_(model, since="bn")
    assert trainable(model) == {"outer", "middle", "inner", "bn", "head"}
    assert {v.path.split("/")[-2] for v in model.trainable_variables} == {"bn", "head"}


def siamese():
    """Two nested models whose layers have the same names."""
    image = keras.Input((8,), name="image")
    branches = [
        keras.Sequential(
            [keras.Input((8,)), keras.layers.Dense(4, name="a"), keras.layers.Dense(4, name="b")],
            name=name,
        )
        for name in ("left", "right")
    ]
    joined = keras.layers.Add(name="join")([branch(image) for branch in branches])
    return keras.Model(image, joined, name="twins")


@pytest.mark.parametrize("operation", [freeze_, unfreeze_])
def test_a_name_in_several_nested_models_is_refused_with_the_full_names(operation):
    model = siamese()
    verb = operation.__name__
    with pytest.raises(ValueError, match=f"{verb} received 'a', .*'left/a' or 'right/a'"):
        operation(model, "a")
    assert all(v.trainable for v in model.variables)


def test_full_names_reach_into_one_nested_model():
    model = siamese()
    freeze_(model, until="right/a")
    assert [v.path.split("/")[-3] for v in model.trainable_variables] == ["left", "left"] * 2 + [
        "right"
    ] * 2
    unfreeze_(freeze_(model), since="left/b")
    assert {v.path.rpartition("/")[0] for v in model.trainable_variables} == {"left/b"}
    with pytest.raises(ValueError, match="has no layer 'left/c'"):
        freeze_(model, until="left/c")


@pytest.mark.parametrize("operation", [freeze_, unfreeze_])
def test_one_name_is_taken_and_no_list(operation):
    with pytest.raises(ValueError, match=r"expects the name of one layer, received \['a', 'b'\]"):
        operation(keras.Sequential([keras.Input((2,)), kl.Dense(2, name="a")]), ["a", "b"])
