"""Masks that Keras hands on by itself, from a tensor to the layers that read it.

Keras writes such a mask down as an argument of the call. A surgery gives the new call the masks
that the new tensors carry: then a mask that belongs to what was replaced goes with it.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras
import numpy as np
from keras import KerasTensor

from vggtorch.keras_graph import Node, keras_mask, producing_call


def automatic_masks(node: Node) -> list[str]:
    """The arguments of a call that hold no more than the masks which its tensors carry.

    Keras fills these in: `mask` where a layer reads one argument, `query_mask` beside `query`. In a
    model that was loaded or cloned such a mask is one that was computed again, in the same way.
    """
    args, kwargs = node.arguments.args, node.arguments.kwargs
    names = [k for k, v in kwargs.items() if (k == "mask" or k.endswith("_mask")) and v is not None]
    if not names or not isinstance(node.operation, keras.Layer):
        return []
    return [
        name
        for name in names
        if same_computation(kwargs[name], carried_masks(node.operation, name, args, kwargs))
    ]


def carried_masks(layer: keras.Layer, name: str, args: Any, kwargs: Any) -> Any:
    """The masks of the tensors that a mask argument of a layer belongs to."""
    given = inspect.signature(layer.call).bind_partial(*args, **kwargs).arguments
    source = given.get(name.removesuffix("_mask"))
    if name == "mask":
        source = next(value for key, value in given.items() if key != "mask")
    return keras.tree.map_structure(
        lambda t: keras_mask(t) if isinstance(t, KerasTensor) else None, source
    )


def same_computation(a: Any, b: Any) -> bool:
    """Whether two symbolic tensors are one, or operations (no layers) compute them alike.

    Also of structures of tensors and of other values.
    """
    if a is b:
        return True
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same_computation, a, b))
    if not (isinstance(a, KerasTensor) and isinstance(b, KerasTensor)):
        return type(a) is type(b) and bool(np.all(a == b))
    first, second = producing_call(a), producing_call(b)
    if type(first.operation) is not type(second.operation) or isinstance(
        first.operation, keras.Layer
    ):
        return False
    settings = [
        {k: v for k, v in vars(node.operation).items() if k != "name" and not k.startswith("_")}
        for node in (first, second)
    ]
    ours, theirs = (
        keras.tree.flatten((node.arguments.args, node.arguments.kwargs)) for node in (first, second)
    )
    return (
        settings[0] == settings[1]
        and len(ours) == len(theirs)
        and all(map(same_computation, ours, theirs))
    )


def reads(node: Node) -> list[KerasTensor]:
    """The tensors that a call reads, less the masks that come along with them."""
    automatic = automatic_masks(node)
    if not automatic:
        return list(node.input_tensors)
    kwargs = {k: v for k, v in node.arguments.kwargs.items() if k not in automatic}
    given = keras.tree.flatten((node.arguments.args, kwargs))
    return [value for value in given if isinstance(value, KerasTensor)]
