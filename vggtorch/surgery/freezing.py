"""Freeze and unfreeze layers by their place in the graph, in place."""

from __future__ import annotations

from collections.abc import Iterable

import keras
from keras.layers import Layer

from vggtorch.surgery.wiring import Wiring, needed


def freeze_(model: keras.Model, until: str | None = None) -> keras.Model:
    """Freeze the layer `until` and all that it depends on; everything if None. Returns `model`.

    Works in place. `until` may be a layer inside a nested model, by its full name
    ("left/block4_pool") or by its own where no other nested model has a layer of that name.

    >>> import vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> len(vt.freeze_(vgg, until="block4_pool").trainable_variables)  # three kernels, three biases
    6

    Raises:
        ValueError: no layer has the name, several nested models have one, or the model isn't a
            graph of layers.
    """
    wiring = Wiring(model, "freeze_")
    _freeze_(wiring, [] if until is None else wiring.route(until))
    return model


def _freeze_(wiring: Wiring, route: list[str]) -> None:
    """Freeze what the layer at the end of `route` depends on; all if the route is empty."""
    nodes = wiring.nodes
    if route:
        nodes = needed(t for node in wiring.nodes_named(route[0]) for t in node.outputs)
    for layer in _layers(node.operation for node in nodes):
        if route[1:] and layer.name == route[0]:
            _freeze_(wiring.inside(layer.name), route[1:])
        else:
            layer.trainable = False


def unfreeze_(model: keras.Model, since: str | None = None) -> keras.Model:
    """Unfreeze the layer `since` and all that depends on it; everything if None. Returns `model`.

    Works in place. `since` may be a layer inside a nested model, by its full name
    ("left/block4_pool") or by its own where no other nested model has a layer of that name.

    >>> import vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> vgg = vt.unfreeze_(vt.freeze_(vgg), since="block5_conv2")
    >>> [layer.name for layer in vgg.layers if layer.trainable]
    ['block5_conv2', 'block5_conv3', 'block5_pool']

    Raises:
        ValueError: no layer has the name, several nested models have one, or the model isn't a
            graph of layers.
    """
    wiring = Wiring(model, "unfreeze_")
    _unfreeze_(wiring, [] if since is None else wiring.route(since))
    return model


def _unfreeze_(wiring: Wiring, route: list[str]) -> None:
    """Unfreeze what depends on the layer at the end of `route`; all if the route is empty."""
    nodes = set(wiring.nodes)
    if route:
        nodes = wiring.readers_of(wiring.nodes_named(route[0]))
    model = wiring.model
    if not model.trainable:  # it is frozen as a whole: from now on its layers say what is frozen
        model.trainable = True
        for layer in model.layers:
            layer.trainable = False
    for layer in _layers(node.operation for node in nodes):
        if route[1:] and layer.name == route[0]:
            _unfreeze_(wiring.inside(layer.name), route[1:])
        else:
            layer.trainable = True


def _layers(operations: Iterable[keras.Operation]) -> list[Layer]:
    return [x for x in dict.fromkeys(operations) if isinstance(x, Layer)]
