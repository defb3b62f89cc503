"""Surgery on a model as a whole: nested models dissolved, or only seen so, and other names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras
from keras import KerasTensor

from vggtorch.keras_graph import (
    Functional,
    Node,
    filled,
    functional,
    input_structure,
    operation_copy,
    producer,
)
from vggtorch.models import remember_, remembered
from vggtorch.surgery.naming import flat_names, names_by_id
from vggtorch.surgery.rebuild import Rebuild
from vggtorch.surgery.wiring import Wiring, call_inputs, owner


def flatten(model: keras.Model) -> Functional:
    """`model` with all nested Functional and Sequential models dissolved into one graph.

    What was shared stays shared: the layers of a nested model that is called twice are called
    twice. Layers keep their names; where several have one, those of nested models get the names of
    their models before it, `left_block1_conv1`. Models that run code of their own stay layers.

    >>> import keras, vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> model = keras.Sequential([vgg, keras.layers.Flatten(), keras.layers.Dense(2)])
    >>> [layer.name for layer in vt.flatten(model).layers][1:4]
    ['block1_conv1', 'block1_conv2', 'block1_pool']

    Raises:
        ValueError: the model isn't a graph of layers, or a nested model is called in a way that
            its layers can't be called in: with a mask of its own, or an input of another rank.
    """
    wiring = Wiring(model, "flatten")
    rebuild = Rebuild(wiring, names=flat_names(wiring), dissolves=True)
    result = rebuild.model(wiring, input_structure(wiring.functional), wiring.functional.output)
    return remember_(result, remembered(model))


def names_when_flat(model: keras.Model, names: Iterable[str], verb: str) -> list[str]:
    """What layers are called once `flatten` has dissolved what is nested; of a model, all of its.

    Names may be full, "vgg16/block5_conv3", or shorter ones that are clear; ValueError if they
    aren't, or if a layer isn't there.
    """
    wiring = Wiring(model, verb)
    flat = flat_names(wiring)
    found = []
    for name in names:
        place, own = wiring.find(name)
        layer = place.operations[own]
        inside = [layer]
        if functional(layer) is not None:
            inside = [
                operation
                for graph in place.inside(own).all_graphs()
                for operation in graph.operations.values()
                if functional(operation) is None
            ]
        found += [flat.get(id(part), part.name) for part in inside]
    return found


def rename(model: keras.Model, names: Mapping[str, str] | str) -> Functional:
    """`model` with other names for its layers, from which the names of its weights come.

    `names` has the new name for the old one, which may be a full name such as
    "vgg16/block5_conv3"; the new one is the layer's own. A text is written before the names of all
    of the model's own layers (those of a nested model stay as they are, behind its new name). Two
    networks with different prefixes can be parts of one model.

    >>> import vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> left = vt.rename(vgg, "left_")
    >>> left.layers[1].name, list(vt.named_variables(left))[0]
    ('left_block1_conv1', 'left_block1_conv1/kernel')
    >>> vt.rename(vgg, {"block5_conv3": "last"}).get_layer("last").kernel.path
    'last/kernel'

    Raises:
        ValueError: no layer has an old name, or several would have one new name.
    """
    wiring = Wiring(model, "rename")
    wanted = names_by_id(wiring, names)
    inputs = input_structure(wiring.functional)
    if isinstance(inputs, dict):  # Keras wants its keys to be the names of the inputs
        inputs = {
            wanted.get(id(producer(part)), key) if _is_named(part, key) else key: part
            for key, part in inputs.items()
        }
    return Rebuild(wiring, names=wanted).model(wiring, inputs, wiring.functional.output)


def _is_named(part: Any, key: str) -> bool:
    """Whether a part of a model's inputs is one input, called by its key."""
    return isinstance(part, KerasTensor) and owner(part) == key


def flat_view(model: keras.Model, verb: str) -> keras.Model:
    """One graph of all layers of a model and of those nested in it, on their own variables.

    The layers are called by their full names, "vgg16/block5_conv3". The model stays as it is; one
    without nested models is its own view. A nested model that is called twice is seen twice.
    """
    wiring = Wiring(model, verb)
    if not wiring.nested():
        return model
    inputs = wiring.functional.inputs
    made = {id(t): keras.Input(batch_shape=t.shape, dtype=t.dtype, name=owner(t)) for t in inputs}
    _walk(wiring, made, {})
    outputs = [made[id(t)] for t in wiring.outputs]
    return keras.Model([made[id(t)] for t in inputs], outputs, name=model.name)


def _walk(wiring: Wiring, made: dict[int, KerasTensor], copies: dict[int, keras.Operation]) -> None:
    for node in wiring.nodes:
        if node.is_input:
            continue
        graph = functional(node.operation)
        if graph is not None:
            nested = wiring.inside(node.operation.name)
            pairs = zip(graph.inputs, call_inputs(graph, node), strict=True)
            inner = {id(a): made[id(b)] for a, b in pairs}
            _walk(nested, inner, copies)
            ends = zip(nested.outputs, node.outputs, strict=True)
            made.update({id(outer): inner[id(end)] for end, outer in ends})
            continue
        if id(node.operation) not in copies:
            copies[id(node.operation)] = operation_copy(node.operation)
            copies[id(node.operation)].name = wiring.prefix + node.operation.name
        call = _written(copies[id(node.operation)], node, made)
        made.update({id(t): now for t, now in zip(node.outputs, call.outputs, strict=True)})


def _written(operation: keras.Operation, node: Node, values: dict[int, KerasTensor]) -> Node:
    """A call like another one on other tensors, which is written down and not computed."""
    args, kwargs = filled(node, values)
    outputs = [KerasTensor(t.shape, dtype=t.dtype) for t in node.outputs]
    return Node(operation, call_args=args, call_kwargs=kwargs, outputs=outputs)
