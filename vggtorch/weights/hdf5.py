"""Where the weights lie in an HDF5 file of Keras, found by a process of its own.

The HDF5 library is C, which damaged files make crash or run without end. So `readers` runs this
file as a script, with a time limit, and maps the values itself:

    python -P hdf5.py FILE

prints as JSON, in `spans`, each weight's name -> [byte where its values begin, shape, dtype], and
beside it the model's `config`, where it is there, and in `said` what a `sources.Checkpoint` has
beside its tensors. What is wrong with the file is one line on standard error; the exit status 3
says that it is whole, but nothing that is read here. FILE may be a .keras archive.

Names are `layer/variable`, with the nested model's name before them. Keras's own form has no names
of variables: they are `kernel` and `bias`, or batch norm's, where there is no doubt, and numbers.
"""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import h5py

Span = tuple[int, list[int], str]
DEEPEST = 32  # groups inside of groups


class UnsupportedError(ValueError):
    """The file is whole, and nothing that is read here."""


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
        raise UnsupportedError(f"{name} keeps its values outside of the file")
    offset = dataset.id.get_offset()
    if offset is None:
        raise UnsupportedError(f"{name} is chunked, compressed or empty; Keras writes it whole")
    kind = dataset.dtype.str
    if kind == "|V2" and dataset.attrs.get("dtype") == "bfloat16":  # which HDF5 doesn't have
        kind = "bfloat16"
    return offset, list(dataset.shape), kind


def _variables(layer: str, spans: list[Span]) -> dict[str, Span]:
    """A layer's weights by name; in the file they have an order only."""
    ranks = [len(shape) for _, shape, _ in spans]
    names = [str(i) for i in range(len(spans))]
    if ranks == [1, 1, 1, 1]:
        names = ["gamma", "beta", "moving_mean", "moving_variance"]
    elif ranks and ranks[0] > 1 and ranks[1:] in ([], [1]):
        names = ["kernel", "bias"]
    return {f"{layer}/{name}": span for name, span in zip(names, spans, strict=False)}


# Keras 3's own form, which Keras 2 wrote too from 2.12 on, without the names


def _in_order(names: Any) -> list[str]:
    """Names such as dense, dense_1, ..., dense_10 by their numbers."""

    def key(name: str) -> tuple[str, int]:
        match = re.fullmatch(r"(.*?)(?:_(\d+))?", name)
        assert match is not None
        return match[1], int(match[2] or 0)

    return sorted(names, key=key)


def _layers_of_keras3(
    group: h5py.Group, prefix: str, deep: int = 0
) -> Iterator[tuple[str, dict[str, Span], bool]]:
    """Name, weights by theirs, and whether the name is the layer's own, of the layers in a group.

    Models keep theirs in `layers`; what a layer has inside of it stands beside its `vars`.
    """
    if deep > DEEPEST:
        raise ValueError("its groups are nested without end")
    inside = ["layers"] if "layers" in group else [k for k in _in_order(group) if k != "vars"]
    for key in inside:
        if "seed_generator" in key:  # what random layers draw from
            continue
        child = _inner(group, key, h5py.Group)
        if "vars" not in child:  # a list of layers
            yield from _layers_of_keras3(child, prefix, deep + 1)
            continue
        variables = _inner(child, "vars", h5py.Group)
        name = variables.attrs.get("name")
        named = isinstance(name, str)
        path = f"{prefix}{name if named else key}"
        if all(key.isdecimal() for key in variables):
            spans = _variables(path, [_span(variables, str(i)) for i in range(len(variables))])
        else:  # a torch module's, by the names that they have there
            names = [k for k in variables if not k.endswith("num_batches_tracked")]
            spans = {f"{path}/{k}": _span(variables, k) for k in names}
        if spans:
            yield path, spans, named
        yield from _layers_of_keras3(child, f"{path}/", deep + 1)


def _own_of_keras3(root: h5py.Group) -> Iterator[tuple[str, dict[str, Span]]]:
    """What a model holds itself, beside its layers."""
    if "vars" in root and len(variables := _inner(root, "vars", h5py.Group)):
        name = str(variables.attrs.get("name", "model"))
        yield name, _variables(name, [_span(variables, str(i)) for i in range(len(variables))])


# Keras's older form


def _texts(group: h5py.Group, name: str) -> list[str]:
    """An attribute of names, which Keras splits into numbered ones where it is long."""
    if name in group.attrs:
        listed = list(group.attrs[name])
    else:
        parts = (f"{name}{i}" for i in range(len(group.attrs)))
        listed = [text for part in parts for text in group.attrs.get(part, ())]
    return list(map(_text, listed))


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _weights_of_legacy(layer: str, group: h5py.Group) -> dict[str, Span]:
    """The weights of one layer, or of a nested model, which stand under the names of its layers."""
    written = _texts(group, "weight_names")
    spans = [_span(group, name) for name in written]
    paths = []
    for name in written:
        path = re.sub(r":\d+$", "", name).split("/")
        while layer in path[:-1]:  # behind the name of the model, if that is Sequential
            del path[: path.index(layer) + 1]
        paths.append(path)
    old = all(path[-1].startswith(f"{layer}_") for path in paths)  # block1_conv1_W_1, of Keras 1
    if old or not paths:
        return _variables(layer, spans)
    return {f"{layer}/{'/'.join(path)}": span for path, span in zip(paths, spans, strict=True)}


def _layers_of_legacy(root: h5py.Group) -> Iterator[tuple[str, dict[str, Span]]]:
    """The layers of keras.applications' files and of models saved as `.h5`."""
    group = _inner(root, "model_weights", h5py.Group) if "model_weights" in root else root
    for name in _texts(group, "layer_names"):
        yield name, _weights_of_legacy(name, _inner(group, name, h5py.Group))


def found(path: str) -> dict[str, Any]:
    """What the module's docstring says of a file.

    Raises what h5py raises, and ValueError for what Keras does not write.
    """
    spans: dict[str, Span] = {}
    with _opened(path) as root:
        said = {"ordered": "models"}
        if "layers" in root:
            walked = list(_layers_of_keras3(root, ""))
            layers = [(name, listed) for name, listed, _ in walked]
            layers += _own_of_keras3(root)
            said = {"ordered": "layers"}
            if not all(named for _, _, named in walked):
                said["unnamed"] = "yes"
        elif "layer_names" in root.attrs or "model_weights" in root or "layer_names0" in root.attrs:
            layers = list(_layers_of_legacy(root))
        else:
            raise UnsupportedError(
                "it holds no layers as Keras's Functional and Sequential models write them; into a "
                "model that is subclassed, Keras itself loads it (model.load_weights(path))"
            )
        for layer, variables in layers:
            if spans.keys() & variables.keys():
                raise UnsupportedError(
                    f"layer {layer} is there twice; Keras itself loads it "
                    f"(model.load_weights(path))"
                )
            spans.update(variables)
        for name in ("weight_set", "data_config"):
            if f"vggtorch_{name}" in root.attrs:
                said[name] = _text(root.attrs[f"vggtorch_{name}"])
        config = _text(root.attrs["model_config"]) if "model_config" in root.attrs else None
    return {"spans": spans, "config": config, "said": said}


if __name__ == "__main__":
    try:
        print(json.dumps(found(sys.argv[1])))
    except Exception as error:  # whatever the library makes of a damaged file
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        sys.exit(3 if isinstance(error, UnsupportedError) else 1)
