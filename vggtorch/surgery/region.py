"""Where the layers that replace others sit: what enters them, what leaves, and what is behind.

Everything here is asked of two Keras graphs, that of the network before the replacement and that
of the network after it, whose other layers have the same names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np
from keras import KerasTensor

from vggtorch.keras_graph import calls, graph_of, producer, producing_call, without_activation
from vggtorch.surgery.composition import POINTWISE, SKIPPED
from vggtorch.surgery.masks import reads


@dataclass(frozen=True)
class Region:
    """Tensors around the replaced layers in one graph and around the new ones in the other.

    Attributes:
        old: what enters the replaced layers and what leaves them.
        new: what enters the new layers and what leaves them.
        behind: what each later layer puts out, in the old graph and in the new, by its name.
    """

    old: tuple[KerasTensor, KerasTensor]
    new: tuple[KerasTensor, KerasTensor]
    behind: dict[str, tuple[KerasTensor, KerasTensor]]


def find_region(original: keras.Model, result: keras.Model, new_layers: Sequence[str]) -> Region:
    """Find the one way into the new layers and the one way out, in both graphs."""
    calls_now = calls(graph_of(result, "distill_"))
    # The call of each layer, in the order of the network; of a shared layer the last one.
    old = {node.operation.name: node for node in calls(graph_of(original, "distill_"))}
    now, new = {node.operation.name: node for node in calls_now}, set(new_layers)
    sources = {producer(t).name for name in new for t in reads(now[name])} - new
    entries = [name for name in now if name in sources]
    if len(entries) != 1 or entries[0] not in old:
        raise ValueError(
            f"The new layers {[name for name in now if name in new]} take their input from "
            f"{entries}; expected one layer, which the original has too."
        )
    (entry,) = entries

    count = Counter(node.operation.name for node in calls_now)
    behind: dict[str, tuple[KerasTensor, KerasTensor]] = {}
    if len(original.outputs) != len(result.outputs):
        raise ValueError(
            f"The original has {len(original.outputs)} outputs, the result {len(result.outputs)}; "
            f"expected the same network with other layers in one place."
        )
    ends = zip(original.outputs, result.outputs, strict=True)
    exits = [(a, b) for a, b in ends if producer(b).name in new]
    for node in calls_now:
        name, producers = node.operation.name, {producer(t).name for t in node.input_tensors}
        later = not producers.isdisjoint({*new, *behind})
        if count[name] > 1 and (name in {*new, entry} or later):
            raise ValueError(
                f"Layer {name!r} is called {count[name]} times; expected the new layers, the one "
                f"before them and those behind them to be called once."
            )
        if name in new or not later:
            continue
        if name not in old:
            raise ValueError(
                f"Layer {name!r} comes after the new layers and is not in the original: "
                f"name it in new_layers too."
            )
        behind[name] = old[name].outputs[0], node.outputs[0]
        pairs = zip(old[name].input_tensors, node.input_tensors, strict=True)
        exits += [(a, b) for a, b in pairs if producer(b).name in new]
    if len({id(b) for _, b in exits}) != 1:
        leaving = {producer(b).name for _, b in exits}
        raise ValueError(
            f"The new layers are left from {[name for name in now if name in leaving]}; expected "
            f"one way out."
        )
    leaves, leaves_now = exits[0]
    if not behind:  # the new layers are the network's last
        behind = {producer(leaves_now).name: exits[0]}
    return Region((old[entry].outputs[0], leaves), (now[entry].outputs[0], leaves_now), behind)


def chain(start: KerasTensor, end: KerasTensor) -> list[keras.Layer] | None:
    """The layers from one tensor to another, in order; None where they branch."""
    layers: list[keras.Layer] = []
    while end is not start:
        if len(producing_call(end).input_tensors) != 1:
            return None
        layers.insert(0, producer(end))
        end = _input(end)
    return layers


def next_smaller(region: Region) -> list[str]:
    """The next three layers behind a region that make the map smaller; without any, the last layer.

    Three, because to match a further block costs as much time as all those before it.
    """
    shrinking = [
        name
        for name, (tensor, _) in region.behind.items()
        if np.max(getattr(producer(tensor), "strides", None) or 1) > 1
    ]
    return shrinking[:3] or list(region.behind)[-1:]


def before_activation(region: Region) -> KerasTensor:
    """What the replaced layers have computed before their last activation."""
    start, tensor = region.old
    while tensor is not start and type(producer(tensor)) in POINTWISE:
        tensor = _input(tensor)
    return tensor if tensor is start else without_activation(tensor)


def last_product(region: Region) -> keras.Layer | None:
    """The new layer that gives the exit its values, if that is an ungrouped product."""
    start, tensor = region.new
    passed = (*POINTWISE, *SKIPPED, keras.layers.BatchNormalization)
    while type(producer(tensor)) in passed:
        if tensor is start:
            return None
        tensor = _input(tensor)
    layer = producer(tensor)
    grouped = isinstance(layer, keras.layers.DepthwiseConv2D) or getattr(layer, "groups", 1) != 1
    return None if grouped else layer


def _input(tensor: KerasTensor) -> KerasTensor:
    (only,) = producing_call(tensor).input_tensors
    return only
