"""Published weights for networks whose layers have a prefix, of which a model may have several."""

from __future__ import annotations

import keras

from vggtorch import weights
from vggtorch.architectures import ARCHITECTURES
from vggtorch.models.filling import VGG_LAYERS, named_variables, path_of


def prefixes_of(model: keras.Model) -> list[str]:
    """What stands before the names of VGG's layers in a model, once for each network in it."""
    names = {key.partition("/")[0]: None for key in named_variables(model)}
    if not VGG_LAYERS.isdisjoint(names):
        return []
    ends = [(name, layer) for name in names for layer in VGG_LAYERS if name.endswith(layer)]
    blocks = [(name, layer) for name, layer in ends if layer.startswith("block")]
    return list(dict.fromkeys(name.removesuffix(layer) for name, layer in blocks))


def load_prefixed_(model: keras.Model, weight_set: str) -> None:
    """Load a published weight set into each network of a model whose layers have a prefix.

    Raises:
        ValueError: a network's weights aren't those of the published one; nothing is changed then.
    """
    values = []
    for prefix in prefixes_of(model):
        variables = {
            key.removeprefix(prefix): variable
            for key, variable in named_variables(model).items()
            if key.startswith(prefix) and key.removeprefix(prefix).partition("/")[0] in VGG_LAYERS
        }
        shapes = {key: tuple(variable.shape) for key, variable in variables.items()}
        top = any(key.startswith(("fc1/", "fc2/", "predictions/")) for key in shapes)
        networks = weights.identify(shapes) or list(ARCHITECTURES.values())
        tensors = weights.converted(path_of(weight_set, networks, include_top=top)).tensors
        differing = [
            prefix + key
            for key, shape in shapes.items()
            if key not in tensors or tuple(tensors[key].shape) != shape
        ]
        if differing:
            raise ValueError(
                f"{weight_set!r} does not fit the network with the prefix {prefix!r}: it has no "
                f"weights, or weights of other shapes, for {weights.shortened(differing)}."
            )
        values += [(variable, tensors[key]) for key, variable in variables.items()]
    for variable, value in values:
        variable.assign(value)
