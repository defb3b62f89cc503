"""Where the weights lie in an HDF5 file of Keras, found by a process of its own.

The HDF5 library is C, which damaged files make crash or run without end. So `readers` runs this
file as a script, with a time limit, and maps the values itself:

    python -P hdf5.py FILE

prints as JSON, for each weight, its name -> [byte where its values begin, shape, dtype], or what is
wrong with the file as one line on standard error. FILE may be a .keras archive.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py

Span = tuple[int, list[int], str]


@contextmanager
def _opened(path: str) -> Iterator[h5py.File]:
    if zipfile.is_zipfile(path):
        with (
            zipfile.ZipFile(path) as archive,
            archive.open("model.weights.h5") as member,
            h5py.File(member, "r") as file,
        ):
            yield file
    else:
        with h5py.File(path, "r") as file:
            yield file


def _inner(parent: h5py.Group, name: str, kind: type) -> Any:
    """A member of a group; never one that a link brings in from elsewhere."""
    if not isinstance(parent.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} is a link")
    member = parent[name]
    if not isinstance(member, kind):
        raise ValueError(f"{name} is not a {kind.__name__}")
    return member


def _span(group: h5py.Group, name: str) -> Span:
    """Where the values of a dataset lie in the file."""
    *folders, last = name.split("/")
    for folder in folders:
        group = _inner(group, folder, h5py.Group)
    dataset = _inner(group, last, h5py.Dataset)
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"{name} keeps its values outside of the file")
    offset = dataset.id.get_offset()
    if offset is None:
        raise ValueError(f"{name} is chunked, compressed or empty; Keras writes it whole")
    return offset, list(dataset.shape), dataset.dtype.str


def _variables(layer: str, spans: list[Span]) -> dict[str, Span]:
    """A layer's weights by name; in the file they have an order only."""
    names = ["kernel", "bias"]
    if len(spans) == 4 and all(len(shape) == 1 for _, shape, _ in spans):
        names = ["gamma", "beta", "moving_mean", "moving_variance"]
    if len(spans) > len(names):
        raise ValueError(f"{layer} has {len(spans)} weights; no layer of VGG has that many")
    return {f"{layer}/{name}": span for name, span in zip(names, spans, strict=False)}


def _layers_of_keras3(group: h5py.Group, prefix: str = "") -> Iterator[tuple[str, list[Span]]]:
    """The layers of `.weights.h5`, models nested in the model included."""
    layers = _inner(group, "layers", h5py.Group)
    for key in layers:
        layer = _inner(layers, key, h5py.Group)
        if "vars" not in layer:
            continue
        variables = _inner(layer, "vars", h5py.Group)
        name = variables.attrs.get("name")
        if not isinstance(name, str):
            raise ValueError("it does not name its layers; load it with Keras and save it again")
        yield prefix + name, [_span(variables, str(i)) for i in range(len(variables))]
        if "layers" in layer:
            if prefix.count("/") > 16:
                raise ValueError("its groups are nested without end")
            yield from _layers_of_keras3(layer, f"{prefix}{name}/")


def _texts(group: h5py.Group, name: str) -> list[str]:
    """An attribute of names, which Keras splits into numbered ones where it is long."""
    if name in group.attrs:
        listed = list(group.attrs[name])
    else:
        parts = (f"{name}{i}" for i in range(len(group.attrs)))
        listed = [text for part in parts for text in group.attrs.get(part, ())]
    return [text.decode() if isinstance(text, bytes) else str(text) for text in listed]


def _layers_of_legacy(root: h5py.Group) -> Iterator[tuple[str, list[Span]]]:
    """The layers of keras.applications' files and of models saved as `.h5`."""
    group = _inner(root, "model_weights", h5py.Group) if "model_weights" in root else root
    for name in _texts(group, "layer_names"):
        layer = _inner(group, name, h5py.Group)
        yield name, [_span(layer, weight) for weight in _texts(layer, "weight_names")]


def spans(path: str) -> dict[str, Span]:
    """Name -> where its values begin, shape and dtype, of every weight in a file.

    Raises what h5py raises, and ValueError for what Keras does not write.
    """
    found: dict[str, Span] = {}
    with _opened(path) as root:
        layers = _layers_of_keras3(root) if "layers" in root else _layers_of_legacy(root)
        for layer, listed in layers:
            variables = _variables(layer, listed)
            if found.keys() & variables.keys():
                raise ValueError(f"layer {layer} is there twice")
            found.update(variables)
    return found


if __name__ == "__main__":
    try:
        print(json.dumps(spans(sys.argv[1])))
    except Exception as error:  # whatever the library makes of a damaged file
        sys.exit(" ".join(str(error).split()) or type(error).__name__)
