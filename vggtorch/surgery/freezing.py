"""Freeze and unfreeze layers by their place in the graph, in place."""

from __future__ import annotations

import keras
from keras.layers import Layer

from vggtorch.surgery.wiring import Wiring, needed


def freeze_(model: keras.Model, until: str | None = None) -> keras.Model:
    """Freeze the layer `until` and all that it depends on; everything if None. Returns `model`.

    Works in place. `until` may be a layer inside a nested model, by its full name
    ("left/block4_pool") or by its own where no other nested model has a layer of that name.
    Keras's own batch norms run as in inference while they are frozen; in a frozen
    `TorchModuleWrapper` only the parameters stay, and torch's batch norms and dropout go on as in
    training, as Keras has it.

    >>> import vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> len(vt.freeze_(vgg, until="block4_pool").trainable_variables)  # three kernels, three biases
    6

    Raises:
        ValueError: no layer has the name, several nested models have one, or the model isn't a
            graph of layers.
    """
    wiring = Wiring(model, "freeze_")
    _set_(wiring, [] if until is None else wiring.route(until), trainable=False)
    return model


def unfreeze_(model: keras.Model, since: str | None = None) -> keras.Model:
    """Unfreeze the layer `since` and all that depends on it; everything if None. Returns `model`.

    Works in place; compile the model anew before `fit`, since Keras's optimizer knows the variables
    that were trainable at its first step alone. `since` may be a layer inside a nested model, by
    its full name ("left/block4_pool") or by its own where no other has a layer of that name.

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
    _set_(wiring, [] if since is None else wiring.route(since), trainable=True)
    return model


def _set_(wiring: Wiring, route: list[str], *, trainable: bool) -> None:
    """Unfreeze what depends on the layer at the end of `route`, or freeze what it depends on.

    All layers if the route is empty.
    """
    model, nodes = wiring.model, wiring.nodes
    if route:
        named = wiring.nodes_named(route[0])
        outputs = (tensor for node in named for tensor in node.outputs)
        nodes = list(wiring.readers_of(named)) if trainable else needed(outputs)
    if trainable and not model.trainable:  # frozen as a whole: now its layers say what is frozen
        model.trainable = True
        for layer in model.layers:
            layer.trainable = False
    for layer in dict.fromkeys(n.operation for n in nodes if isinstance(n.operation, Layer)):
        if route[1:] and layer.name == route[0]:
            _set_(wiring.inside(layer.name), route[1:], trainable=trainable)
        else:
            layer.trainable = trainable
