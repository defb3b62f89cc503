"""What surgery promises, as checks: its input is as it was, and its result has all that is kept."""

from __future__ import annotations

import functools
import re

import keras
import numpy as np
import torch
from keras import layers as kl

from vggtorch.keras_graph import all_layers, calls, calls_of, graph_of, raw_value
from vggtorch.models import weight_set


def operations(model):
    """Operations of the graph by name."""
    return {op.name: op for op in graph_of(model, "a test").operations}


def every_layer(model):
    return all_layers(model)


def snapshot(model):
    """All of a model that surgery must leave as it is."""
    return {
        "class": type(model),
        "values": [(v, raw_value(v), raw_value(v).detach().clone()) for v in model.variables],
        "trainable": [(layer, layer.trainable) for layer in every_layer(model)],
        "variables": [v.trainable for v in model.variables],
        "requires_grad": [raw_value(v).requires_grad for v in model.variables],
        "parameters": [id(p) for p in model.parameters()],
        "nodes": [
            (op, [id(n) for n in calls_of(op)], [id(n) for n in op._outbound_nodes])
            for layer in every_layer(model)
            if isinstance(layer, keras.Model)
            for op in operations(layer).values()
        ],
        "outputs": [
            [id(t) for n in calls_of(op) for t in n.outputs] for op in operations(model).values()
        ],
    }


def same_snapshot(before, after):
    assert before.keys() == after.keys()
    for key in before:
        if key == "values":
            for (v1, p1, x1), (v2, p2, x2) in zip(before[key], after[key], strict=True):
                assert v1 is v2
                assert p1 is p2
                assert x1.stride() == x2.stride()
                assert x1.is_meta or torch.equal(x1, x2)
        else:
            assert before[key] == after[key], key


def unnumbered(path):
    """A variable's path less the numbers that Keras gives as variables are made."""
    return re.sub(r"_\d+(?=/|$)", "", path)


def from_layer(variable, layer):
    """A variable's path from its layer's name on; a Sequential model's name stands before that."""
    return unnumbered(variable.path[variable.path.find(f"{layer.name}/") :])


def without_sizes(config):
    """A configuration less the shapes of what enters: nested models follow what they are given."""
    if isinstance(config, dict):
        sizes = ("batch_shape", "shape", "build_config")
        return {key: without_sizes(value) for key, value in config.items() if key not in sizes}
    return [*map(without_sizes, config)] if isinstance(config, list | tuple) else config


def same_layer(old, new):
    """A kept layer has everything that the old one had, and shares nothing with it."""
    assert type(old) is type(new)
    assert old is not new
    assert without_sizes(old.get_config()) == without_sizes(new.get_config())
    if not isinstance(old, kl.Layer):
        return
    assert old.dtype_policy.name == new.dtype_policy.name
    assert [x.trainable for x in every_layer(old)] == [x.trainable for x in every_layer(new)]
    for u, v in zip(old.variables, new.variables, strict=True):
        a, b = raw_value(u), raw_value(v)
        assert u is not v
        assert from_layer(u, old) == from_layer(v, new)
        assert (u.trainable, u.dtype) == (v.trainable, v.dtype)
        assert a.requires_grad == b.requires_grad
        assert a.stride() == b.stride()
        assert a.device == b.device
        assert a.is_meta or a.data_ptr() != b.data_ptr()
        assert a.is_meta or torch.equal(a, b), u.path
        assert b.untyped_storage().nbytes() == b.numel() * b.itemsize
    ours = {id(raw_value(v)) for v in new.variables}
    assert {id(p) for p in new.parameters()} == ours


def check(model, result, new=(), gone=(), *, sees_images=True):
    """The contract between a model and what surgery made of it."""
    old, made = operations(model), operations(result)
    new = {layer.name: layer for layer in new}
    for name, op in made.items():
        if name in new:
            assert op is new[name]
        elif name in old:
            same_layer(old[name], op)
        else:
            assert isinstance(op, kl.InputLayer)
        assert len(calls_of(op)) == sum(node.operation is op for node in nodes(result)), name
    assert not set(gone) & set(made)
    assert set(new) <= set(made)
    assert not result.compiled
    assert (result.name, result.trainable) == (model.name, model.trainable)
    if not sees_images:
        assert weight_set(result) is None
    elif not isinstance(model, keras.Sequential):
        assert type(result) is type(model)
    assert {id(p) for p in result.parameters()} == {id(raw_value(v)) for v in result.variables}


def nodes(model):
    return calls(graph_of(model, "a test"))


def output_of(model, name):
    """What a layer puts out in this graph; a nested model's own `.output` is inside it."""
    return calls_of(operations(model)[name])[0].outputs[0]


def identity():
    return kl.Activation("linear", name="identity")


def run(model, x):
    with torch.no_grad():
        return model(x, training=False)


def equal(a, b):
    assert torch.equal(a, b), f"{a.shape} {b.shape} {float((a - b).abs().max())}"


def shake_(model, seed=0):
    """Values that no initialiser gives, so that a lost one shows; some layers frozen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for v in model.variables:
            if raw_value(v).is_floating_point():
                raw_value(v).add_(0.01 * torch.rand(v.shape, generator=generator))
    layers = model.layers
    layers[len(layers) // 3].trainable = False
    return model


def images(size, count=2):
    return torch.from_numpy(
        np.random.default_rng(0).uniform(0, 255, (count, size, size, 3)).astype("float32")
    )


def shared():
    """One layer called twice, on two inputs, and a branch."""
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    dense = kl.Dense(6, activation="relu", name="shared")
    x, y = dense(a), dense(b)
    x = kl.Dense(6, name="only_a")(x)
    return keras.Model({"a": a, "b": b}, [kl.Add(name="sum")([x, y]), kl.Dense(2, name="side")(y)])


def nested():
    """Models inside a model, one of them frozen, one called with training=False."""
    inner = keras.Sequential(
        [keras.Input((4, 4, 6)), kl.Conv2D(6, 1, name="conv"), kl.BatchNormalization(name="bn")],
        name="inner",
    )
    deep = keras.Input((4, 4, 3))
    y = inner(kl.Conv2D(6, 3, padding="same", name="before")(deep), training=False)
    middle = keras.Model(deep, kl.ReLU(name="after")(y), name="middle")
    inner.layers[0].trainable = False
    inputs = keras.Input((4, 4, 3), name="image")
    x = kl.Rescaling(1 / 255, name="rescale")(inputs)
    x = middle(x)
    return keras.Model(inputs, kl.Dense(2, name="head")(kl.Flatten(name="flat")(x)), name="outer")


@functools.cache
def vgg():
    """A VGG16 without a classifier, and images for it; nobody changes either."""
    model = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    return shake_(model), images(32)
