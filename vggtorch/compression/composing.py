"""Layers without an activation between them as one layer, where that is exact and cheaper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod
from typing import Any

import keras

from vggtorch.compression.sites import Site
from vggtorch.keras_graph import calls, graph_of, producer
from vggtorch.surgery import compose_, remade, replace


def composed(
    model: keras.Model, sites: Sequence[Site]
) -> tuple[keras.Model, dict[str, tuple[str, int]]]:
    """The model with such layers composed, two at a time, or itself where there are none.

    Beside it for each of these layers the name of the one that it is part of now, and the
    multiply-adds of that.
    """
    costs = {site.name: site for site in sites}
    gone: dict[str, tuple[str, int]] = {}
    while (found := _first_pair(model, costs)) is not None:
        first, second, new, cost = found
        model = replace(model, [first, second], new, init="compose")
        gone[first] = gone[second] = second, cost
        gone = {name: (into, cost if into == second else n) for name, (into, n) in gone.items()}
        costs = {name: site for name, site in costs.items() if name not in (first, second)}
    return model, gone


def _first_pair(
    model: keras.Model, sites: dict[str, Site]
) -> tuple[str, str, keras.Layer, int] | None:
    nodes = calls(graph_of(model, "compress"))
    read = Counter(id(t) for node in nodes for t in node.input_tensors)
    read.update(id(t) for t in model.outputs)
    for node in nodes:
        if node.is_input or node.operation.name not in sites:
            continue
        (tensor,) = node.input_tensors
        first, second = producer(tensor), node.operation
        linear = getattr(first, "activation", None) is keras.activations.linear
        if first.name not in sites or read[id(tensor)] != 1 or not linear:
            continue
        if type(first) is not type(second) or first.activity_regularizer is not None:
            continue
        new, cost = _one_for(sites[first.name], sites[second.name], first, second)
        whole = sites[first.name].multiply_adds + sites[second.name].multiply_adds
        if cost < whole and _is_exact(first, second, new):
            return first.name, second.name, new, cost
    return None


def _one_for(a: Site, b: Site, first: keras.Layer, second: keras.Layer) -> tuple[keras.Layer, int]:
    """A layer, unbuilt, that can compute what two do, and its multiply-adds."""
    settings: dict[str, Any] = {"use_bias": first.use_bias or second.use_bias}
    size = [m + (n - 1) * s for m, n, s in zip(a.kernel, b.kernel, a.stride, strict=True)]
    if not a.is_dense:
        strides = tuple(m * n for m, n in zip(a.stride, b.stride, strict=True))
        settings |= {"kernel_size": tuple(size), "strides": strides}
    return remade(second, **settings), b.positions * b.outputs * a.inputs * prod(size)


def _is_exact(first: keras.Layer, second: keras.Layer, new: keras.Layer) -> bool:
    """Whether a layer, once composed, computes the same everywhere, the edges too."""
    trial = remade(new)
    trial.build(first.input.shape)
    try:
        found = compose_([first, second], trial)
    except ValueError:
        return False
    return found.exact and found.border == 0
