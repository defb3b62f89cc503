"""Which tensor of a checkpoint belongs to which weight of a model.

Names decide. Where a checkpoint names the same layers otherwise, they are matched by what is sure
all the same, in this order:

- what stands before all names of the network, such as the name of the model that it was nested in,
  or the prefix of its layers; or the names of the models that it is nested in now;
- Keras's automatic names, where `dense` became `dense_1`: by their order, if all shapes agree;
- weights without names, as Keras's own files have them: by their order in the layer;
- VGG's convolutions under other names: by their order, if all of them stand in one row (`rows`).

Whether what is left over may be, `leftovers` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import keras
import torch

from vggtorch.keras_graph import Functional, own_variables, raw_value, state_of, to_snake_case
from vggtorch.models.rows import FEATURES, in_order
from vggtorch.models.torch_form import places_of, torch_rules
from vggtorch.weights import Checkpoint, Rule, Shape

Path = tuple[str, ...]
Slot = tuple[str, Rule | None]  # a weight of the model, and how torch's axes become Keras's

# No two of these names are ever the same weight; other names may be two names of one.
_KNOWN = frozenset({"kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance"})


@dataclass
class Match:
    """What belongs together, and what is left on either side.

    Attributes:
        values: name of a model's weight -> its tensor, in Keras's layout.
        names: name of a model's weight -> the tensor's name in the checkpoint.
        left: what no weight of the model has: a tensor's name in the checkpoint -> the layer that
            it belongs to, by the names of the network itself, and its shape.
        missing: names of the model's weights that the checkpoint doesn't have.
        differing: of weights whose shapes differ, the name and both shapes.
        renamed: layers whose automatic names differ, "dense is dense_1".
    """

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    left: dict[str, tuple[str, Shape]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Entry:
    """One tensor of a checkpoint: its layer, its variable, and whether it has torch's axes."""

    key: str
    kind: Literal["keras", "torch"]
    path: Path
    name: str

    @classmethod
    def of(cls, key: str) -> _Entry:
        """An entry by its name: `layer/kernel` is Keras's, `layer.weight` torch's."""
        kind: Literal["keras", "torch"] = "keras" if "/" in key else "torch"
        *path, name = key.split("/" if kind == "keras" else ".")
        return cls(key, kind, tuple(path), name)


def match(
    model: keras.Model,
    variables: Mapping[str, keras.Variable],
    checkpoint: Checkpoint,
    *,
    prefix: str = "",
) -> Match:
    """Find the tensor of each of a model's weights.

    Args:
        model: any Keras model.
        variables: those of `named_variables(model)` that shall get values.
        checkpoint: with Keras's names where they are known, as `weights.converted` gives it.
        prefix: of the layers of one network in the model, whose `variables` are named without it.

    Raises:
        ValueError: several networks in the checkpoint could be the model's.
    """
    tensors = checkpoint.tensors
    slots = _slots(model, variables, checkpoint, {}, prefix)
    entries = [_Entry.of(key) for key in tensors]
    if checkpoint.unnamed:
        places = _by_class(model, (), ())
        by_place = _slots(model, variables, checkpoint, places)
        entries = _without_prefix(entries, by_place, prefix, checkpoint.origin)
        names = {place: path for path, place in places.items()}
        entries = [replace(entry, path=names.get(entry.path, entry.path)) for entry in entries]
    else:
        entries = _without_prefix(entries, slots, prefix, checkpoint.origin)
        entries = _without_text(entries, slots, prefix)
        entries = _into_models(entries, slots)
    # VGG's layers, which is all that a network under a prefix has, have no automatic names.
    automatic = {} if prefix else _automatic(model) | _inside_layers(model, variables)
    entries, renamed = _in_order(entries, slots, automatic, variables, tensors)
    found = Match(renamed=renamed)
    for entry in entries:
        slot = slots.get((entry.kind, (*entry.path, entry.name))) or _nearly(entry, slots)
        if slot is not None and slot[0] not in found.names:
            found.names[slot[0]] = entry.key
    unnamed = [k for k in variables if k.partition("/")[0] in FEATURES and k not in found.names]
    if unnamed:
        _by_row(variables, tensors, entries, slots, found)
    taken: set[str] = set()
    if checkpoint.ordered:
        depths = (None, 1) if checkpoint.ordered == "models" else (None,)
        taken = _by_place(model, variables, tensors, entries, found, depths)
    rules = {slot[0]: slot[1] for (kind, _), slot in slots.items() if kind == "torch"}
    for key, name in found.names.items():
        tensor = tensors[name]
        rule = rules.get(key) if "/" not in name else None
        expected = tuple(variables[key].shape) if rule is None else rule.torch_shape
        if differing := _other_dtype(tensor, variables[key]):
            found.differing.append(f"{key} {differing}")
        elif tuple(tensor.shape) != expected:
            found.differing.append(f"{key} has {tuple(tensor.shape)}, expected {expected}")
        elif rule is None:
            found.values[key] = tensor
        else:
            found.values[key] = rule.to_view(tensor).reshape(rule.keras_shape)
    taken |= set(found.names.values())
    found.left = {
        e.key: ("/".join(e.path), tuple(tensors[e.key].shape))
        for e in entries
        if e.key not in taken
    }
    # A layer that stands in the model and in one nested in it has one weight under two names.
    known = {id(variables[key]) for key in found.names}
    found.missing = [key for key, variable in variables.items() if id(variable) not in known]
    return found


def _other_dtype(tensor: torch.Tensor, variable: keras.Variable) -> str | None:
    """How the dtypes of a tensor and a weight differ, if one of them holds whole numbers."""
    now, expected = tensor.dtype, raw_value(variable).dtype
    if now == expected or (now.is_floating_point and expected.is_floating_point):
        return None
    names = [str(dtype).removeprefix("torch.") for dtype in (now, expected)]
    return f"has dtype {names[0]}, expected {names[1]}"


def _nearly(entry: _Entry, slots: Mapping[tuple[str, Path], Slot]) -> Slot | None:
    """The weight that a tensor of torch's names belongs to but for what is no part of a name.

    A layer whose name torch's modules have already, such as `add`, ends in an underscore there; and
    the names of layers inside of a layer, which became a part of the variable's, have numbers.
    """
    if entry.kind != "torch" or not entry.path:
        return None
    path = (*entry.path[:-1], entry.path[-1].rstrip("_"))
    name = re.sub(r"_\d+(?=_)", "", entry.name)
    found = [
        slot
        for (kind, where), slot in slots.items()
        if (kind, where[:-1]) == ("torch", path) and re.sub(r"_\d+(?=_)", "", where[-1]) == name
    ]
    return found[0] if len(found) == 1 else None


def _slots(
    model: keras.Model,
    variables: Mapping[str, keras.Variable],
    checkpoint: Checkpoint,
    places: Mapping[Path, Path],
    prefix: str = "",
) -> dict[tuple[str, Path], Slot]:
    """The places that a model has for tensors of Keras's names and for those of torch's.

    `places` has what a layer is called by in the checkpoint instead of its name.
    """
    slots: dict[tuple[str, Path], Slot] = {}
    for key in variables:
        *path, name = key.split("/")
        slots["keras", (*places.get(tuple(path), tuple(path)), name)] = key, None
    torchvision = checkpoint.origin in ("torchvision", "timm")
    for rule in torch_rules(model, torchvision=torchvision):
        key = rule.keras_key.removeprefix(prefix)
        if key in variables:
            slots["torch", tuple(rule.torch_key.removeprefix(prefix).split("."))] = key, rule
    return slots


def _by_class(model: keras.Model, path: Path, place: Path) -> dict[Path, Path]:
    """A layer's full name -> its place as Keras 2 wrote it: by its class, `conv2d_1`."""
    places: dict[Path, Path] = {}
    counts: dict[str, int] = {}
    for layer in model.layers:
        kind = _class_in_names(layer)
        count = counts[kind] = counts.get(kind, -1) + 1
        inner = (*place, f"{kind}_{count}" if count else kind)
        places[(*path, layer.name)] = inner
        if isinstance(layer, keras.Model):
            places |= _by_class(layer, (*path, layer.name), inner)
    return places


# What stands before the names


def _without_prefix(
    entries: list[_Entry], slots: Mapping[tuple[str, Path], Slot], wanted: str, origin: str
) -> list[_Entry]:
    """The entries without the name of the model around the network, or of a wrapper's attribute.

    Of several networks that fit, the one that has the name of the `wanted` prefix is taken.

    Raises:
        ValueError: several networks in the checkpoint fit as well.
    """

    def stripped(entry: _Entry, prefix: Path) -> _Entry:
        if entry.path[: len(prefix)] != prefix:
            return entry
        return _Entry(entry.key, entry.kind, entry.path[len(prefix) :], entry.name)

    places = {(kind, path[:-1]) for kind, path in slots}
    prefixes = {entry.path[:n] for entry in entries for n in range(len(entry.path))}
    found: dict[Path, int] = {}
    for prefix in sorted(prefixes | {()}, key=lambda p: (len(p), p)):
        under = [stripped(entry, prefix) for entry in entries]
        found[prefix] = len({(e.kind, e.path) for e in under} & places)
    most = max(found.values())
    best = [prefix for prefix, count in found.items() if count == most]
    if () in best or not most:
        return entries
    if named := [p for p in best if wanted and p[-1] == wanted.rstrip("_.-")]:
        best = named
    if len(best) > 1:
        listed = " and ".join(repr("/".join(prefix)) for prefix in best)
        between = "/" if origin == "keras" else "."
        begin = between.join([*best[0], ""])
        raise ValueError(
            f"The checkpoint holds several networks that fit the model: {listed}. Load one of them "
            f"by itself (vt.load_weights(model, {{k.removeprefix({begin!r}): t for k, t in "
            f"tensors.items() if k.startswith({begin!r})}})), or all of them into a model that "
            f"holds networks of these names."
        )
    return [stripped(entry, best[0]) for entry in entries]


def _without_text(
    entries: list[_Entry], slots: Mapping[tuple[str, Path], Slot], wanted: str
) -> list[_Entry]:
    """The entries of a network whose layers have a prefix in the file, without it.

    Raises:
        ValueError: there are several such networks, and none has the `wanted` prefix.
    """
    ours = {path[0] for _, path in slots}
    theirs = {entry.path[-1]: None for entry in entries if entry.path}
    if FEATURES.isdisjoint(ours) or not ours.isdisjoint(theirs):
        return entries
    found = {name[: -len(end)]: None for name in theirs for end in FEATURES if name.endswith(end)}
    if not found:
        return entries
    if len(found) > 1 and wanted not in found:
        listed = " and ".join(map(repr, found))
        raise ValueError(
            f"The checkpoint holds several networks, whose layers have the prefixes {listed}. "
            f"Build the model with one of them, prefix={next(iter(found))!r}."
        )
    prefix = wanted if wanted in found else next(iter(found))

    def plain(path: Path) -> Path:
        return (*path[:-1], path[-1].removeprefix(prefix)) if path else path

    return [replace(entry, path=plain(entry.path)) for entry in entries]


def _into_models(entries: list[_Entry], slots: Mapping[tuple[str, Path], Slot]) -> list[_Entry]:
    """The entries of a model that was flat, with the names of nested models where they are now.

    Not those of a network alone, which has its own way into the one that is nested: nobody has
    said that the layers around that may keep their values.
    """
    if all(entry.path and entry.path[-1] in FEATURES for entry in entries):
        return entries
    places = {(kind, path[:-1]) for kind, path in slots}
    inside: dict[tuple[str, Path], list[Path]] = {}
    for kind, path in places:
        for n in range(1, len(path)):
            inside.setdefault((kind, path[n:]), []).append(path)

    def nested(entry: _Entry) -> _Entry:
        found = inside.get((entry.kind, entry.path), [])
        alone = (entry.kind, entry.path) not in places and len(found) == 1
        return replace(entry, path=found[0]) if alone else entry

    return [nested(entry) for entry in entries]


# Automatic names


def _automatic(model: keras.Model) -> dict[Path, str]:
    """The layers whose names Keras made up, `dense_1`, and what they are made of, `dense`.

    Also the two modules that a separable convolution is in torch.
    """
    found: dict[Path, str] = {}
    for (*path, name), layer in places_of(model, ()):
        base = _class_in_names(layer)
        if _is_numbered(name, base):
            for part in ("", "_depthwise", "_pointwise"):
                found[(*path, name + part)] = base + part
    return found


def _class_in_names(layer: object) -> str:
    """A layer's class as Keras has it in automatic names."""
    return to_snake_case("Functional" if isinstance(layer, Functional) else type(layer).__name__)


def _inside_layers(model: keras.Model, variables: Mapping[str, keras.Variable]) -> dict[Path, str]:
    """The layers inside of layers, whose numbers Keras made up: `forward_lstm_1`."""
    outer = {path for path, _ in places_of(model, ())}
    found: dict[Path, str] = {}
    for key in variables:
        path = tuple(key.split("/")[:-1])
        for n in range(1, len(path) + 1):
            if path[:n] not in outer:
                found[path[:n]] = re.sub(r"_\d+$", "", path[n - 1])
    return found


_NUMBER = re.compile(r"_(\d+)(?=(?:_depthwise|_pointwise)?$)")


def _is_numbered(name: str, base: str) -> bool:
    return base in (name, _NUMBER.sub("", name))


def _number(name: str) -> int:
    match = _NUMBER.search(name)
    return int(match[1]) if match else 0


def _in_order(
    entries: list[_Entry],
    slots: Mapping[tuple[str, Path], Slot],
    automatic: Mapping[Path, str],
    variables: Mapping[str, keras.Variable],
    tensors: Mapping[str, torch.Tensor],
) -> tuple[list[_Entry], list[str]]:
    """The entries with the model's automatic names in the place of the checkpoint's.

    Nothing is renamed unless there are as many on both sides and all their shapes agree.
    """
    names: dict[Path, str] = {}
    for kind in ("keras", "torch"):
        theirs = {entry.path for entry in entries if entry.kind == kind}
        ours = {path[:-1] for of, path in slots if of == kind}
        names |= _renaming(theirs, ours, automatic, (), ())
    if not names:
        return entries, []

    def renamed(path: Path) -> Path:
        return tuple(names.get(path[: n + 1], path[n]) for n in range(len(path)))

    ours_of = {(kind, path[:-1]) for kind, path in slots}
    after = []
    for entry in entries:
        path = renamed(entry.path)
        if path != entry.path:
            if (entry.kind, path) not in ours_of:
                return entries, []
            # Weights without names of their own are looked at where they are paired by place.
            if slot := slots.get((entry.kind, (*path, entry.name))):
                key, rule = slot
                expected = tuple(variables[key].shape) if rule is None else rule.torch_shape
                if tuple(tensors[entry.key].shape) != expected:
                    return entries, []
        after.append(_Entry(entry.key, entry.kind, path, entry.name))
    return after, [f"{'/'.join(old)} is {'/'.join(renamed(old))}" for old in names]


def _renaming(
    theirs: set[Path], ours: set[Path], automatic: Mapping[Path, str], before: Path, above: Path
) -> dict[Path, str]:
    """The checkpoint's full name of a layer or model -> its own name in the model.

    `before` is where the checkpoint's names stand, and `above` where the model's do.
    """
    our_names = {path[0] for path in ours if path}
    their_names = {path[0] for path in theirs if path}
    own: dict[str, str] = {}
    for base in sorted({automatic[(*above, n)] for n in our_names if (*above, n) in automatic}):
        new = sorted((n for n in our_names if automatic.get((*above, n)) == base), key=_number)
        old = sorted((n for n in their_names if _is_numbered(n, base)), key=_number)
        if len(old) == len(new):
            own |= {a: b for a, b in zip(old, new, strict=True) if a != b}
    names = {(*before, old): new for old, new in own.items()}
    for name in their_names:
        inside = {path[1:] for path in theirs if path[:1] == (name,)}
        new_name = own.get(name, name)
        within = {path[1:] for path in ours if path[:1] == (new_name,)}
        if within:
            names |= _renaming(inside, within, automatic, (*before, name), (*above, new_name))
    return names


# Places


def _by_row(
    variables: Mapping[str, keras.Variable],
    tensors: Mapping[str, torch.Tensor],
    entries: Iterable[_Entry],
    slots: Mapping[tuple[str, Path], Slot],
    found: Match,
) -> None:
    """Pair VGG's convolutions with those of a file that calls them otherwise."""
    entries = list(entries)
    row = in_order(
        {key: tuple(variable.shape) for key, variable in variables.items()},
        ((e.path, e.name, e.kind == "torch", tuple(tensors[e.key].shape)) for e in entries),
    )
    names = {
        key: name for key, name in found.names.items() if key.partition("/")[0] not in FEATURES
    }
    for entry in entries:
        if entry.path in row:
            slot = slots.get((entry.kind, (row[entry.path], entry.name)))
            if slot is not None:
                names[slot[0]] = entry.key
    if row:
        found.names = names
        pairs = {"/".join(path): name for path, name in row.items()}
        found.renamed += [f"{old} is {new}" for old, new in pairs.items() if old != new]


def _by_place(
    model: keras.Model,
    variables: Mapping[str, keras.Variable],
    tensors: Mapping[str, torch.Tensor],
    entries: Iterable[_Entry],
    found: Match,
    depths: tuple[int | None, ...],
) -> set[str]:
    """Pair the weights of a layer, or of a nested model, in order where names say nothing.

    That is how Keras itself loads its files. A pair whose names are known to mean two things is
    none, so that an order which differs is seen. A layer that holds a weight of one inside of it,
    as SpectralNormalization does, has it in the file a second time.

    Returns:
        The names in the checkpoint of all that was paired.
    """
    taken = set()
    of_keras = [entry for entry in entries if entry.kind == "keras"]
    fixed = {id(variable) for layer in model.layers for variable in state_of(layer)}
    names = {id(variable): key for key, variable in variables.items()}
    layers = dict(places_of(model, ()))
    for depth in depths:  # None: a layer by itself, 1: a layer with all that is inside
        cut = slice(0, depth)
        paths = {tuple(key.split("/")[:-1])[cut] for key in variables}
        for path in sorted(paths, key=len, reverse=True):
            ours = own = [k for k in variables if tuple(k.split("/")[:-1])[cut] == path]
            theirs = [entry for entry in of_keras if entry.path[cut] == path]
            if all(key in found.names for key in own):
                continue
            if len(ours) < len(theirs) and isinstance(layer := layers.get(path), keras.Layer):
                ours = [names[id(v)] for v in own_variables(layer) if id(v) in names]
            if len(ours) != len(theirs):
                continue
            orders = (
                ours,
                sorted(ours, key=lambda key: not variables[key].trainable),
                sorted(ours, key=lambda key: id(variables[key]) in fixed),
            )
            for order in orders:
                pairs = list(zip(order, theirs, strict=True))
                if all(_may_be(variables[k], k, tensors[e.key], e.name) for k, e in pairs):
                    taken |= {entry.key for _, entry in pairs}
                    found.names |= {k: e.key for k, e in pairs if k in own or k not in found.names}
                    break
    return taken


def _may_be(variable: keras.Variable, key: str, tensor: torch.Tensor, name: str) -> bool:
    ours = key.rpartition("/")[2]
    other = ours != name and ours in _KNOWN and name in _KNOWN
    return not other and tuple(variable.shape) == tuple(tensor.shape)
