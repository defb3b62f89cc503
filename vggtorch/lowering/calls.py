"""What a call of a Keras layer takes and gives, for whoever writes it down as torch's."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch
from keras import layers

from vggtorch import keras_graph
from vggtorch.lowering.converters import CONVERTERS

MERGES: dict[type, Callable[..., Any]] = {
    layers.Add: operator.add,
    layers.Multiply: operator.mul,
    layers.Subtract: operator.sub,
    layers.Maximum: torch.maximum,
    layers.Minimum: torch.minimum,
    layers.Average: operator.add,
}
# The layers that become torch's modules or functions, where they are set so that these can do it.
WRITTEN = {*CONVERTERS, *MERGES, layers.Concatenate, layers.Permute, layers.Reshape}


def dtype_of(tensor: keras.KerasTensor) -> str:
    """The dtype that a value has; a symbolic tensor keeps what its layer's was when it was made."""
    layer = keras_graph.producer(tensor)
    known = type(layer) in WRITTEN and layer.autocast and "float" in tensor.dtype
    return str(layer.compute_dtype if known else tensor.dtype)


def one_dtype(call: keras_graph.Node, dtype_of: Callable[[Any], str]) -> str | None:
    """The float dtype of all tensors around a call; None where they, or numbers of axes, differ."""
    ranks = {len(t.shape) for t in call.input_tensors}
    dtype, *others = {dtype_of(t) for t in (*call.input_tensors, *call.outputs)}
    return dtype if len(ranks) == 1 and not others and "float" in dtype else None


def masks_inside(operation: Any, masked: bool) -> bool:
    """Whether a layer inside of a layer makes masks, as an Embedding in a nested model does.

    Or hands on the mask of what enters, where the outer layer says that it ends there.
    """
    if not isinstance(operation, keras.Layer):
        return False
    inside = keras_graph.all_layers(operation, include_self=False)
    if masked and inside and not operation.supports_masking:
        return True
    return any(isinstance(x, layers.Masking) or getattr(x, "mask_zero", False) for x in inside)


def fits(given: Any, model: keras.Function) -> bool:
    """Whether a model takes tensors as they come; Keras sorts others by name, or adds an axis."""
    structure = keras_graph.input_structure(model)
    flat, wanted = keras.tree.flatten(given), keras.tree.flatten(structure)
    if len(wanted) > 1:
        try:
            keras.tree.assert_same_structure(given, structure)
        except (TypeError, ValueError):
            return False
    return [len(t.shape) for t in flat] == [len(t.shape) for t in wanted]


def in_layout(shape: Sequence[int | None], layout: str) -> tuple[int | None, ...]:
    """A shape with the axis of channels moved: "first" from the end, "last" to it, or not."""
    moved = list(shape)
    if layout in ("first", "last") and len(moved) > 2:
        old, new = (-1, 1) if layout == "first" else (1, len(moved) - 1)
        moved.insert(new, moved.pop(old))
    return tuple(moved)


def returned(model: keras.Function) -> Any:
    """The structure that a call of a graph returns; a model makes of a list of one the tensor."""
    structure = keras_graph.output_structure(model)
    several = not isinstance(structure, list | tuple) or len(structure) != 1
    return structure if several or keras_graph.functional(model) is None else structure[0]


def is_plain(call: keras_graph.Node) -> bool:
    """Whether a call has tensors, or a list of them, as its one argument, and no options."""
    args, kwargs = call.arguments.args, call.arguments.kwargs
    given = {name: keras.tree.flatten(value) for name, value in kwargs.items()}
    # A model of several inputs is called with a mask of None for each.
    options = {name for name, parts in given.items() if any(x is not None for x in parts)}
    options -= {"training"}
    flat = keras.tree.flatten(args)
    return len(args) == 1 and not options and all(isinstance(x, keras.KerasTensor) for x in flat)
