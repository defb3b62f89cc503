"""VGG's convolutions in a checkpoint that calls them otherwise, found by their order.

Many write VGG anew: `conv1_1`, `slice1.0`, `features.0.conv`. The shapes of its layers, one after
another, are those of no other network, so that a row of layers with the same shapes in the same
order is one of VGG.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from vggtorch.architectures import FEATURES
from vggtorch.weights import NORM

Path = tuple[str, ...]
Shape = tuple[int, ...]
Layer = dict[str, Shape]  # the weights of one layer by Keras's names, as Keras has them


def in_order(
    weights: Mapping[str, Shape], tensors: Iterable[tuple[Path, str, bool, Shape]]
) -> dict[Path, str]:
    """The checkpoint's layers -> VGG's, where all of VGG's stand in it in a row, and only once.

    Of the checkpoint's tensors, in its order, there is the layer, the variable's name, whether the
    axes are torch's, and the shape.
    """
    ours: dict[str, Layer] = {}
    for key, shape in weights.items():
        layer, _, name = key.partition("/")
        if layer in FEATURES:
            ours.setdefault(layer, {})[name] = shape
    written: dict[tuple[Path, bool], Layer] = {}
    for path, name, torch, shape in tensors:
        if name != "num_batches_tracked":
            written.setdefault((path, torch), {})[name] = shape
    paths = list(written)
    if paths == sorted(paths):  # alphabetical, as safetensors are, where 10 stands before 2
        paths.sort(key=lambda item: _natural(item[0]))
    theirs = [_as_keras(written[path]) if path[1] else written[path] for path in paths]
    row = list(ours.values())
    begins = [i for i in range(len(theirs) - len(row) + 1) if theirs[i : i + len(row)] == row]
    if len(row) < 2 or len(begins) != 1:
        return {}
    taken = paths[begins[0] : begins[0] + len(row)]
    return {path: name for (path, _), name in zip(taken, ours, strict=True)}


def prefixes_in(names: Iterable[str]) -> list[str]:
    """What stands before the names of VGG's convolutions among these, once for each network."""
    found = (name.removesuffix(end) for name in names for end in FEATURES if name.endswith(end))
    return list(dict.fromkeys(found))


def _as_keras(layer: Layer) -> Layer:
    """The weights of a convolution or a batch norm of torch as Keras has them."""
    if "running_mean" in layer:
        return {NORM.get(name, name): shape for name, shape in layer.items()}
    kernel = layer.get("weight", ())
    if len(kernel) != 4:
        return layer
    out, inputs, *window = kernel
    others = {name: shape for name, shape in layer.items() if name != "weight"}
    return {"kernel": (*window, inputs, out), **others}


def _natural(path: Path) -> list[list[tuple[int, str]]]:
    """A key by which names are ordered by the numbers in them."""
    return [
        [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
        for name in path
    ]
