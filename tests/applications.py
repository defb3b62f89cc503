"""The beginnings of networks of keras.applications: of each, all kinds of its blocks."""

from __future__ import annotations

import functools
from collections import Counter

import keras

from vggtorch.keras_graph import calls, calls_of, graph_of

# The smallest image that each takes, and how many of its layers are enough.
NETWORKS = {
    "VGG16": (32, 11),
    "ResNet50": (32, 50),
    "ResNet50V2": (32, 50),
    "InceptionV3": (75, 136),
    "DenseNet121": (32, 70),
    "MobileNet": (32, 40),
    "MobileNetV2": (32, 40),
    "MobileNetV3Small": (32, 66),
    "EfficientNetB0": (32, 76),
    "EfficientNetV2B0": (32, 76),
    "Xception": (71, 48),
    "ConvNeXtTiny": (32, 34),
}


def beginning(name: str) -> keras.Model:
    """A network as far as `NETWORKS` says, with random weights, for images of its smallest size."""
    size, enough = NETWORKS[name]
    build = getattr(keras.applications, name)
    model = build(weights=None, include_top=False, input_shape=(size, size, 3))
    taken = {layer.name for layer in model.layers[:enough]}
    last = [name for name in waists(model) if name in taken][-1]
    (end,) = (layer for layer in graph_of(model, "a test").operations if layer.name == last)
    return keras.Model(model.input, calls_of(end)[0].outputs[0])


def cloned_beginning(name: str) -> keras.Model:
    """The same, without the random numbers of all that is left out, and sooner the next time."""
    return keras.models.clone_model(_without_values(name, keras.config.floatx()))


@functools.cache
def _without_values(name: str, floatx: str) -> keras.Model:
    with keras.device("meta"):
        return beginning(name)


def waists(model: keras.Model) -> list[str]:
    """Layers that every path goes through, in order."""
    order = calls(graph_of(model, "a test"))
    left = Counter(id(parent) for node in order for parent in node.parent_nodes)
    found: list[str] = []
    waiting: dict[int, int] = {}
    for node in order:
        for parent in node.parent_nodes:
            waiting[id(parent)] -= 1
            if not waiting[id(parent)]:
                del waiting[id(parent)]
        if not waiting:
            found.append(node.operation.name)
        waiting[id(node)] = left[id(node)]
    return found
