"""The weights of replaced layers for the new ones: the same numbers under other settings.

`copy_` pairs two rows of layers by the shapes of their weights. A Dense layer that reads a
flattened map and a convolution as large as that map have the same numbers in another shape, so
that a classifier becomes fully convolutional, and back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import keras
import torch
from keras import layers as kl

from vggtorch.keras_graph import all_layers, calls, calls_of, functional, raw_value

_CONVOLUTIONS = (kl.Conv1D, kl.Conv2D, kl.Conv3D)
_READY = (kl.BatchNormalization, kl.PReLU)  # whose weights are useful from the start


@dataclass(frozen=True)
class _Place:
    """A layer in a row, with the Flatten before it, if its input comes from one."""

    layer: keras.Layer
    flatten: kl.Flatten | None


def copy_(old: Sequence[keras.Layer], new: Sequence[keras.Layer]) -> None:
    """Give the layers `new`, built, the weights of the layers `old`, in place.

    Each layer of `old` with weights gives them to the next of `new` that is of its kind and whose
    weights have the same names and shapes; settings such as strides, dilation, padding and
    activation may differ, and layers without weights may stand anywhere. A new batch norm without a
    counterpart keeps its initial values, with which it changes next to nothing, and so does a
    PReLU, which begins as a ReLU; a new bias without a counterpart is 0.

    Raises:
        ValueError: weights without a counterpart, on either side. No layer has changed then.
    """
    givers, takers = _with_weights(old), _with_weights(new)
    given = []
    for taker in takers:
        values = _fitting(givers[0], taker) if givers else None
        if values is not None:
            given.append((taker.layer, values))
            givers.pop(0)
        elif not isinstance(taker.layer, _READY):
            raise ValueError(_misfit(givers[0] if givers else None, taker))
    if givers:
        raise ValueError(
            f"init='copy' would lose the weights of {givers[0].layer.name!r}, "
            f"{_shapes(givers[0].layer)}: none of the new layers is left to take them "
            f"({', '.join(repr(layer.name) for layer in new)})."
        )
    for layer, values in given:
        for variable, value in zip(layer.weights, values, strict=True):
            variable.assign(value)


def _with_weights(layers: Sequence[keras.Layer]) -> list[_Place]:
    """The layers of a row that have weights, those in models among them."""
    places: list[_Place] = []
    flatten = None
    todo = list(layers)
    while todo:
        layer = todo.pop(0)
        graph = functional(layer)
        if graph is not None:
            inside = dict.fromkeys(node.operation for node in calls(graph))
            todo[:0] = [x for x in inside if isinstance(x, keras.Layer)]
        elif isinstance(layer, kl.Flatten):
            flatten = layer
        elif layer.weights:
            places.append(_Place(layer, flatten))
            flatten = None
    return places


def _fitting(giver: _Place, taker: _Place) -> list[torch.Tensor] | None:
    """The weights of one layer in the form of another's; None where they don't fit it."""
    old, new = giver.layer, taker.layer
    values = [raw_value(variable).detach() for variable in old.weights]
    if isinstance(old, kl.Dense) and isinstance(new, _CONVOLUTIONS):
        values[:1] = _as_kernel(values[0], giver.flatten, new)
    elif isinstance(old, _CONVOLUTIONS) and isinstance(new, kl.Dense):
        values[:1] = _as_matrix(values[0], old, taker.flatten)
    elif not _alike(old, new):
        return None
    if getattr(new, "use_bias", False) and not getattr(old, "use_bias", True):
        values.append(values[0].new_zeros(new.weights[-1].shape))
    fits = [tuple(v.shape) for v in values] == [tuple(w.shape) for w in new.weights]
    return values if fits else None


def _alike(old: keras.Layer, new: keras.Layer) -> bool:
    """Whether the weights of two layers mean the same, one by one.

    Both are of one kind, down to what a wrapper holds, and so are their weights: the shift of one
    batch norm has the shape of another's scale.
    """
    pairs = list(zip(all_layers(old), all_layers(new), strict=False))
    return (
        len(all_layers(old)) == len(all_layers(new))
        and all(isinstance(b, type(a)) or isinstance(a, type(b)) for a, b in pairs)
        and all(
            getattr(a, name, None) == getattr(b, name, None)
            for a, b in pairs
            for name in ("groups", "equation")
        )
        and all(a == b for a, b in zip(_meanings(old), _meanings(new), strict=False))
    )


def _meanings(layer: keras.Layer) -> list[str]:
    """What the weights of a layer are called, less the numbers that Keras gives automatic names."""
    return [re.sub(r"_\d+$", "", weight.name) for weight in layer.weights]


def _as_kernel(
    matrix: torch.Tensor, flatten: kl.Flatten | None, new: keras.Layer
) -> list[torch.Tensor]:
    """(features, units) of a Dense layer as the kernel of a convolution; [] where it can't be."""
    sizes = tuple(new.kernel.shape)[:-1]
    if matrix.shape[0] != prod(sizes) or new.groups != 1:
        return []
    order = _flattened(flatten, new)
    spread = matrix.reshape(*(sizes[axis] for axis in order), -1)
    return [spread.permute(*(order.index(axis) for axis in range(len(order))), len(order))]


def _as_matrix(
    kernel: torch.Tensor, old: keras.Layer, flatten: kl.Flatten | None
) -> list[torch.Tensor]:
    """The kernel of a convolution as (features, units) of a Dense layer; [] where it can't be."""
    order = _flattened(flatten, old)
    matrix = kernel.permute(*order, len(order)).reshape(-1, kernel.shape[-1])
    return [matrix] if old.groups == 1 else []


def _flattened(flatten: kl.Flatten | None, convolution: keras.Layer) -> list[int]:
    """The axes of a kernel, its outputs aside, in the order in which Flatten reads a map's."""
    window = list(range(convolution.rank))
    channels = convolution.rank
    first = convolution.data_format == "channels_first"
    order = [channels, *window] if first else [*window, channels]
    if flatten is not None and flatten.data_format == "channels_first":
        order = [*order[1:], order[0]]  # Flatten moves axis 1 to the end, channels or not
    return order


def _shapes(layer: keras.Layer) -> str:
    return ", ".join(f"{w.name} {tuple(w.shape)}" for w in layer.weights)


def _misfit(giver: _Place | None, taker: _Place) -> str:
    new = taker.layer
    what = f"{new.name!r} ({type(new).__name__}) with {_shapes(new)}"
    if giver is None:
        return (
            f"init='copy' finds no weights for the new layer {what}: those of all replaced layers "
            f"have been given to the layers before it. Insert it afterwards: vt.insert."
        )
    old = giver.layer
    message = (
        f"init='copy' can't give the new layer {what} the weights of {old.name!r} "
        f"({type(old).__name__}), {_shapes(old)}: they must be of one kind and have weights of "
        f"equal names and shapes, layer by layer in their order."
    )
    if getattr(old, "use_bias", False) and not getattr(new, "use_bias", True):
        return f"{message} Give {new.name!r} use_bias=True."
    if isinstance(old, kl.Dense) and isinstance(new, _CONVOLUTIONS):
        features, kernel = old.kernel.shape[0], tuple(new.kernel.shape)
        return (
            f"{message} A Dense layer of {features} features becomes a convolution whose window "
            f"times channels is that, not {kernel[:-2]} times {kernel[-2]}: put Flatten among the "
            f"replaced layers, and let kernel_size be the size of the map that it flattens"
            f"{_map_of(giver.flatten)}."
        )
    return message


def _map_of(flatten: kl.Flatten | None) -> str:
    calls = calls_of(flatten) if flatten is not None else []
    return f", {calls[0].input_tensors[0].shape[1:]}" if calls else ""
