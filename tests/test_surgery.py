"""Surgery gives what it says, leaves its input as it was, and its result stands alone."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import vggtorch  # noqa: F401  selects the torch backend
from vggtorch.surgery import insert, remove, replace, stack, truncate

import keras  # isort: skip
from keras import layers as kl  # isort: skip

NETWORKS = {  # of keras.applications: the smallest input each takes
    "VGG16": 32,
    "ResNet50": 32,
    "InceptionV3": 75,
    "DenseNet121": 32,
    "MobileNetV3Small": 32,
    "EfficientNetB0": 32,
    "Xception": 71,
    "ConvNeXtTiny": 32,
}


# What is checked after every operation -----------------------------------------------------------


def operations(model):
    """Operations of the graph by name."""
    graph = model._functional if isinstance(model, keras.Sequential) else model
    return {op.name: op for op in graph.operations}


def every_layer(model):
    return model._flatten_layers()


def snapshot(model):
    """All of a model that surgery must leave as it is."""
    return {
        "class": type(model),
        "values": [(v, v._value, v._value.detach().clone()) for v in model.variables],
        "trainable": [(layer, layer.trainable) for layer in every_layer(model)],
        "variables": [v.trainable for v in model.variables],
        "requires_grad": [v._value.requires_grad for v in model.variables],
        "parameters": [id(p) for p in model.parameters()],
        "nodes": [
            (op, [id(n) for n in op._inbound_nodes], [id(n) for n in op._outbound_nodes])
            for layer in every_layer(model)
            if isinstance(layer, keras.Model)
            for op in operations(layer).values()
        ],
        "outputs": [
            [id(t) for n in op._inbound_nodes for t in n.outputs]
            for op in operations(model).values()
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


def same_layer(old, new):
    """A kept layer has everything that the old one had, and shares nothing with it."""
    assert type(old) is type(new)
    assert old is not new
    assert old.get_config() == new.get_config()
    if not isinstance(old, kl.Layer):
        return
    assert old.dtype_policy.name == new.dtype_policy.name
    assert [x.trainable for x in every_layer(old)] == [x.trainable for x in every_layer(new)]
    for a, b in zip(old.variables, new.variables, strict=True):
        assert a is not b
        assert unnumbered(a.path) == unnumbered(b.path)
        assert (a.trainable, a.dtype) == (b.trainable, b.dtype)
        assert a._value.requires_grad == b._value.requires_grad
        assert a._value.stride() == b._value.stride()
        assert a._value.device == b._value.device
        assert a._value.is_meta or a._value.data_ptr() != b._value.data_ptr()
        assert a._value.is_meta or torch.equal(a._value, b._value), a.path
    ours = {id(v._value) for v in new.variables}
    assert {id(p) for p in new.parameters()} == ours


def check(model, result, new=(), gone=()):
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
        assert len(op._inbound_nodes) == sum(node.operation is op for node in nodes(result)), name
    assert not set(gone) & set(made)
    assert set(new) <= set(made)
    assert not result.compiled
    assert result.name == model.name
    if not isinstance(model, keras.Sequential):
        assert type(result) is type(model)
    assert {id(p) for p in result.parameters()} == {id(v._value) for v in result.variables}


def nodes(model):
    return [node for level in model._nodes_by_depth.values() for node in level]


def waists(model):
    """Layers that every path goes through, in order."""
    order = sorted(nodes(model), key=lambda n: -depth(model, n))
    left = {id(n): len(n.outputs[0]._keras_history.operation._outbound_nodes) for n in order}
    found, waiting = [], {}
    for node in order:
        for parent in node.parent_nodes:
            waiting[id(parent)] -= 1
            if not waiting[id(parent)]:
                del waiting[id(parent)]
        if not waiting:
            found.append(node.operation.name)
        waiting[id(node)] = left[id(node)]
    return found


def depth(model, node):
    return next(d for d, level in model._nodes_by_depth.items() if node in level)


def between(model, first, last):
    """Names of the layers after `first` up to `last`, both waists."""
    names = [n.operation.name for n in sorted(nodes(model), key=lambda n: -depth(model, n))]
    return names[names.index(first) + 1 : names.index(last) + 1]


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
            if v._value.is_floating_point():
                v._value += 0.01 * torch.rand(v._value.shape, generator=generator)
    layers = model.layers
    layers[len(layers) // 3].trainable = False
    return model


def images(size, count=2):
    return torch.from_numpy(
        np.random.default_rng(0).uniform(0, 255, (count, size, size, 3)).astype("float32")
    )


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    size = NETWORKS[request.param]
    build = getattr(keras.applications, request.param)
    model = build(weights=None, include_top=False, input_shape=(size, size, 3))
    return shake_(model), images(size)


@pytest.fixture(autouse=True)
def input_untouched(request):
    """Whatever a test does, the network it was lent is as it was."""
    if "network" not in request.fixturenames:
        yield
        return
    model, _ = request.getfixturevalue("network")
    before = snapshot(model)
    yield
    same_snapshot(before, snapshot(model))


# Every operation on every network ----------------------------------------------------------------


def test_truncate_gives_the_intermediate_output(network):
    model, x = network
    points = waists(model)
    name = points[len(points) // 2]
    result = truncate(model, name)
    check(model, result, gone=[model.layers[-1].name])
    features = run(result, x)
    rest = truncate(model, model.layers[-1].name, start=name)
    check(model, rest, gone=[name])
    equal(run(rest, features), run(model, x))


def test_insert_and_remove_of_an_identity(network):
    model, x = network
    points = waists(model)
    new = kl.Activation("linear", name="identity")
    inserted = insert(model, points[len(points) // 2], new)
    check(model, inserted, new=[new])
    y = run(model, x)
    equal(run(inserted, x), y)
    removed = remove(inserted, "identity")
    check(model, removed, gone=["identity"])
    assert [layer.name for layer in removed.layers] == [layer.name for layer in model.layers]
    equal(run(removed, x), y)


def test_replace_of_a_block_with_branches_inside(network):
    model, x = network
    points = waists(model)
    first, last = points[len(points) // 2 - 1], points[len(points) // 2]
    block = between(model, first, last)
    new = truncate(model, last, start=first)
    new.name = "block"
    result = replace(model, block, new)
    assert result.get_layer("block") is new
    check(model, result, new=[new], gone=block)
    equal(run(result, x), run(model, x))


def test_stack(network):
    model, x = network
    head = [kl.GlobalAveragePooling2D(name="pool_"), kl.Dense(3, name="logits_")]
    result = stack(model, head)
    check(model, result, new=head)
    equal(run(result, x), head[1](run(model, x).mean((1, 2))))
