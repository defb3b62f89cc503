"""A model with nested models, seen as one graph on the very same weights."""

from __future__ import annotations

import keras
from keras import KerasTensor

from vggtorch.keras_graph import Node, filled, functional, operation_copy
from vggtorch.surgery.wiring import Wiring, call_inputs, owner


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
