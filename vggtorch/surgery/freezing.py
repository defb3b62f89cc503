"""Freeze and unfreeze layers by their place in the graph, in place."""

from __future__ import annotations

from collections.abc import Iterable

import keras
from keras.layers import Layer

from vggtorch.keras_graph import Node
from vggtorch.surgery.wiring import Wiring, needed


def freeze_(model: keras.Model, until: str | None = None) -> keras.Model:
    """Freeze the layer `until` and all that it depends on; everything if None. Returns `model`.

    Works in place. `until` may be a layer inside a nested model.

    >>> import vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> len(vt.freeze_(vgg, until="block4_pool").trainable_variables)  # three kernels, three biases
    6

    Raises:
        ValueError: no layer has the name, or the model isn't a graph of layers.
    """
    layers, nested = _reach(model, until, "freeze_")
    for layer in layers:
        layer.trainable = False
    if nested is not None:
        freeze_(nested, until)
    return model


def unfreeze_(model: keras.Model, since: str | None = None) -> keras.Model:
    """Unfreeze the layer `since` and all that depends on it; everything if None. Returns `model`.

    Works in place. `since` may be a layer inside a nested model.

    >>> import vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> vgg = vt.unfreeze_(vt.freeze_(vgg), since="block5_conv2")
    >>> [layer.name for layer in vgg.layers if layer.trainable]
    ['block5_conv2', 'block5_conv3', 'block5_pool']

    Raises:
        ValueError: no layer has the name, or the model isn't a graph of layers.
    """
    layers, nested = _reach(model, since, "unfreeze_")
    if not model.trainable:  # it is frozen as a whole: from now on its layers say what is frozen
        model.trainable = True
        for layer in model.layers:
            layer.trainable = False
    for layer in layers:
        layer.trainable = True
    if nested is not None:
        unfreeze_(nested, since)
    return model


def _reach(
    model: keras.Model, name: str | None, verb: str
) -> tuple[list[Layer], keras.Model | None]:
    """The layers before a name (unfreeze_: after it), itself included, and the model that has it.

    That model is None unless it is nested in `model`, in which case the layers are those before
    (or after) the nested model.
    """
    wiring = Wiring(model, verb)
    if name is None:
        nodes: Iterable[Node] = wiring.nodes
        nested = None
    else:
        nested = wiring.nested_with(name)
        named = wiring.nodes_named(name if nested is None else nested.name)
        if verb == "unfreeze_":
            nodes = wiring.readers_of(named)
        else:
            nodes = needed(t for node in named for t in node.outputs)
    operations = dict.fromkeys(node.operation for node in nodes)
    return [x for x in operations if isinstance(x, Layer) and x is not nested], nested
