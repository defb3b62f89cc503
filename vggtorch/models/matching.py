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
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import keras
import torch

from vggtorch.architectures import FEATURES
from vggtorch.keras_graph import Functional, own_variables, raw_value, state_of, to_snake_case
from vggtorch.models.rows import in_order, prefixes_in
from vggtorch.models.torch_form import places_of, torch_rules
from vggtorch.weights import Checkpoint, Rule, Shape

Path = tuple[str, ...]
Place = tuple[bool, Path]  # whether the axes are torch's; a layer, or a layer and its variable
Slot = tuple[str, Rule | None]  # a weight of the model, and how torch's axes become Keras's

# No two of these names are ever the same weight; other names may be two names of one.
_KNOWN = frozenset({"kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance"})


@dataclass(frozen=True)
class Match:
    """What belongs together, and what is left on either side.

    Attributes:
        prefix: of the names of the layers, where they are those of one network in the model.
        variables: the model's weights by their names, without the prefix.
        checkpoint: what they are loaded from.
        names: name of a model's weight -> the tensor's name in the checkpoint.
        values: name of a model's weight -> its tensor, in Keras's layout.
        differing: of weights whose shapes differ, the name and both shapes.
        left: what no weight of the model has: a tensor's name in the checkpoint -> the layer that
            it belongs to, by the names of the network itself, and its shape.
        missing: names of the model's weights that the checkpoint doesn't have.
        renamed: layers whose automatic names differ, "dense is dense_1".
    """

    prefix: str
    variables: Mapping[str, keras.Variable]
    checkpoint: Checkpoint
    names: dict[str, str]
    values: dict[str, torch.Tensor]
    differing: list[str]
    left: dict[str, tuple[str, Shape]]
    missing: list[str]
    renamed: list[str]


@dataclass(frozen=True)
class _Entry:
    """One tensor of a checkpoint: its layer, its variable, and its shape."""

    key: str
    path: Path
    name: str
    shape: Shape

    @classmethod
    def of(cls, key: str, tensor: torch.Tensor) -> _Entry:
        *path, name = key.split("/" if "/" in key else ".")
        return cls(key, tuple(path), name, tuple(tensor.shape))

    @property
    def is_torchs(self) -> bool:
        """Whether it has torch's axes: `layer/kernel` is Keras's name, `layer.weight` torch's."""
        return "/" not in self.key

    @property
    def layer(self) -> Place:
        return self.is_torchs, self.path

    @property
    def weight(self) -> Place:
        return self.is_torchs, (*self.path, self.name)


Pairs = dict[str, tuple[_Entry, Rule | None]]  # a weight's name -> its tensor, how its axes move


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
    layers = places_of(model)
    slots = _slots(model, variables, checkpoint, prefix)
    places = {(is_torchs, path[:-1]) for is_torchs, path in slots}
    entries = [_Entry.of(key, tensor) for key, tensor in checkpoint.tensors.items()]
    if checkpoint.unnamed:
        written = _by_class(layers)
        by_class = {(is_torchs, written.get(path, path)) for is_torchs, path in places}
        entries = _without_prefix(entries, by_class, prefix, checkpoint.origin)
        names = {place: path for path, place in written.items()}
        entries = [replace(entry, path=names.get(entry.path, entry.path)) for entry in entries]
    else:
        entries = _without_prefix(entries, places, prefix, checkpoint.origin)
        entries = _without_text(entries, places, prefix)
        models = {path for path, layer in layers.items() if isinstance(layer, keras.Model)}
        entries = _into_models(entries, places, models)
    # VGG's layers, which is all that a network under a prefix has, have no automatic names.
    automatic = {} if prefix else _automatic(layers) | _inside_layers(layers, variables)
    entries, renamed = _in_order(entries, slots, places, automatic, variables)
    pairs: Pairs = {}
    for entry in entries:
        slot = slots.get(entry.weight) or _nearly(entry, slots)
        if slot is not None and slot[0] not in pairs:
            pairs[slot[0]] = entry, slot[1]
    if any(key.partition("/")[0] in FEATURES and key not in pairs for key in variables):
        renamed += _by_row(variables, entries, slots, pairs)
    taken = {entry.key for entry, _ in pairs.values()}
    if checkpoint.ordered:
        depths = (None, 1) if checkpoint.ordered == "models" else (None,)
        taken = _by_place(model, layers, variables, entries, pairs, depths)
    values: dict[str, torch.Tensor] = {}
    differing = []
    for key, (entry, rule) in pairs.items():
        tensor = checkpoint.tensors[entry.key]
        expected = tuple(variables[key].shape) if rule is None else rule.torch_shape
        if other := _other_dtype(tensor, variables[key]):
            differing.append(f"{key} {other}")
        elif entry.shape != expected:
            differing.append(f"{key} has {entry.shape}, expected {expected}")
        else:
            values[key] = tensor if rule is None else rule.to_view(tensor).reshape(rule.keras_shape)
    # A layer that stands in the model and in one nested in it has one weight under two names.
    known = {id(variables[key]) for key in pairs}
    return Match(
        prefix,
        variables,
        checkpoint,
        names={key: entry.key for key, (entry, _) in pairs.items()},
        values=values,
        differing=differing,
        left={e.key: ("/".join(e.path), e.shape) for e in entries if e.key not in taken},
        missing=[key for key, variable in variables.items() if id(variable) not in known],
        renamed=renamed,
    )


def _other_dtype(tensor: torch.Tensor, variable: keras.Variable) -> str | None:
    """How the dtypes of a tensor and a weight differ, if one of them holds whole numbers."""
    now, expected = tensor.dtype, raw_value(variable).dtype
    if now == expected or (now.is_floating_point and expected.is_floating_point):
        return None
    names = [str(dtype).removeprefix("torch.") for dtype in (now, expected)]
    return f"has dtype {names[0]}, expected {names[1]}"


def _nearly(entry: _Entry, slots: Mapping[Place, Slot]) -> Slot | None:
    """The weight that a tensor of torch's names belongs to but for what is no part of a name.

    A layer whose name torch's modules have already, such as `add`, ends in an underscore there; and
    the names of layers inside of a layer, which became a part of the variable's, have numbers.
    """
    if not (entry.is_torchs and entry.path):
        return None

    def plain(name: str) -> str:
        return re.sub(r"_\d+(?=_)", "", name)

    path = (*entry.path[:-1], entry.path[-1].rstrip("_"))
    name = plain(entry.name)
    found = [
        slot
        for (is_torchs, (*p, n)), slot in slots.items()
        if is_torchs and (*p,) == path and plain(n) == name
    ]
    return found[0] if len(found) == 1 else None


def _slots(
    model: keras.Model,
    variables: Mapping[str, keras.Variable],
    checkpoint: Checkpoint,
    prefix: str,
) -> dict[Place, Slot]:
    """The places that a model has for tensors of Keras's names and for those of torch's."""
    slots: dict[Place, Slot] = {(False, tuple(key.split("/"))): (key, None) for key in variables}
    torchvision = checkpoint.origin in ("torchvision", "timm")
    for rule in torch_rules(model, torchvision=torchvision):
        key = rule.keras_key.removeprefix(prefix)
        if key in variables:
            slots[True, tuple(rule.torch_key.removeprefix(prefix).split("."))] = key, rule
    return slots


def _by_class(layers: Mapping[Path, keras.Layer]) -> dict[Path, Path]:
    """A layer's full name -> its place as Keras 2 wrote it: by its class, `conv2d_1`."""
    places: dict[Path, Path] = {(): ()}
    counts: Counter[Path] = Counter()
    for path, layer in layers.items():
        place = (*places[path[:-1]], _class_in_names(layer))
        count = counts[place]
        counts[place] += 1
        places[path] = (*place[:-1], f"{place[-1]}_{count}") if count else place
    return places


# What stands before the names


def _without_prefix(
    entries: list[_Entry], places: Collection[Place], wanted: str, origin: str
) -> list[_Entry]:
    """The entries without the name of the model around the network, or of a wrapper's attribute.

    Of several networks that fit, the one that has the name of the `wanted` prefix is taken.

    Raises:
        ValueError: several networks in the checkpoint fit as well.
    """

    def stripped(path: Path, prefix: Path) -> Path:
        return path[len(prefix) :] if path[: len(prefix)] == prefix else path

    prefixes = {entry.path[:n] for entry in entries for n in range(len(entry.path))}
    found = {
        prefix: len({(e.is_torchs, stripped(e.path, prefix)) for e in entries}.intersection(places))
        for prefix in sorted(prefixes | {()}, key=lambda p: (len(p), p))
    }
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
    return [replace(entry, path=stripped(entry.path, best[0])) for entry in entries]


def _without_text(entries: list[_Entry], places: Collection[Place], wanted: str) -> list[_Entry]:
    """The entries of a network whose layers have a prefix in the file, without it.

    Raises:
        ValueError: there are several such networks, and none has the `wanted` prefix.
    """
    ours = {path[0] for _, path in places if path}
    theirs = dict.fromkeys(entry.path[-1] for entry in entries if entry.path)
    if ours.isdisjoint(FEATURES) or not ours.isdisjoint(theirs):
        return entries
    found = prefixes_in(theirs)
    if not found:
        return entries
    if len(found) > 1 and wanted not in found:
        listed = " and ".join(map(repr, found))
        raise ValueError(
            f"The checkpoint holds several networks, whose layers have the prefixes {listed}. "
            f"Build the model with one of them, prefix={found[0]!r}."
        )
    prefix = wanted if wanted in found else found[0]
    return [
        replace(entry, path=(*entry.path[:-1], *(p.removeprefix(prefix) for p in entry.path[-1:])))
        for entry in entries
    ]


def _into_models(
    entries: list[_Entry], places: Collection[Place], models: Collection[Path]
) -> list[_Entry]:
    """The entries of a model that was flat, with the names of nested models where they are now.

    Not those of a network alone, which has its own way into the one that is nested: nobody has
    said that the layers around that may keep their values.
    """
    if all(entry.path and entry.path[-1] in FEATURES for entry in entries):
        return entries
    inside: dict[Place, list[Path]] = {}
    for is_torchs, path in places:
        for n in range(1, len(path)):
            if path[:n] in models:
                inside.setdefault((is_torchs, path[n:]), []).append(path)

    def nested(entry: _Entry) -> _Entry:
        found = inside.get(entry.layer, [])
        alone = entry.layer not in places and len(found) == 1
        return replace(entry, path=found[0]) if alone else entry

    return list(map(nested, entries))


# Automatic names


def _class_in_names(layer: keras.Layer) -> str:
    """A layer's class as Keras has it in automatic names."""
    return to_snake_case("Functional" if isinstance(layer, Functional) else type(layer).__name__)


def _automatic(layers: Mapping[Path, keras.Layer]) -> dict[Path, str]:
    """The layers whose names Keras made up, `dense_1`, and what they are made of, `dense`.

    Also the two modules that a separable convolution is in torch.
    """
    return {
        (*path, name + part): base + part
        for (*path, name), layer in layers.items()
        if _is_numbered(name, base := _class_in_names(layer))
        for part in ("", "_depthwise", "_pointwise")
    }


def _inside_layers(layers: Mapping[Path, keras.Layer], variables: Iterable[str]) -> dict[Path, str]:
    """The layers inside of layers, whose numbers Keras made up: `forward_lstm_1`."""
    paths = [tuple(key.split("/")[:-1]) for key in variables]
    every = {path[:n] for path in paths for n in range(1, len(path) + 1)}
    return {path: re.sub(r"_\d+$", "", path[-1]) for path in every - layers.keys()}


_NUMBER = re.compile(r"_(\d+)(?=(?:_depthwise|_pointwise)?$)")


def _is_numbered(name: str, base: str) -> bool:
    return base in (name, _NUMBER.sub("", name))


def _number(name: str) -> int:
    match = _NUMBER.search(name)
    return int(match[1]) if match else 0


def _in_order(
    entries: list[_Entry],
    slots: Mapping[Place, Slot],
    places: Collection[Place],
    automatic: Mapping[Path, str],
    variables: Mapping[str, keras.Variable],
) -> tuple[list[_Entry], list[str]]:
    """The entries with the model's automatic names in the place of the checkpoint's.

    Nothing is renamed unless there are as many on both sides and all their shapes agree.
    """
    names: dict[Path, str] = {}
    for kind in (False, True):
        theirs = {entry.path for entry in entries if entry.is_torchs is kind}
        ours = {path for is_torchs, path in places if is_torchs is kind}
        names |= _renaming(theirs, ours, automatic, (), ())

    def renamed(path: Path) -> Path:
        return tuple(names.get(path[: n + 1], path[n]) for n in range(len(path)))

    after = [replace(entry, path=renamed(entry.path)) for entry in entries]
    for new, old in zip(after, entries, strict=True):
        if new.path == old.path:
            continue
        if new.layer not in places:
            return entries, []
        # Weights without names of their own are looked at where they are paired by place.
        if slot := slots.get(new.weight):
            key, rule = slot
            expected = tuple(variables[key].shape) if rule is None else rule.torch_shape
            if new.shape != expected:
                return entries, []
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
    entries: Iterable[_Entry],
    slots: Mapping[Place, Slot],
    pairs: Pairs,
) -> list[str]:
    """Pair VGG's convolutions with those of a file that calls them otherwise; returns which."""
    row = in_order(
        {key: tuple(variable.shape) for key, variable in variables.items()},
        ((e.path, e.name, e.is_torchs, e.shape) for e in entries),
    )
    if row:
        for key in [key for key in pairs if key.partition("/")[0] in FEATURES]:
            del pairs[key]
    for entry in entries:
        name = row.get(entry.path)
        if name and (slot := slots.get(replace(entry, path=(name,)).weight)):
            pairs[slot[0]] = entry, slot[1]
    named = {"/".join(path): name for path, name in row.items()}
    return [f"{old} is {new}" for old, new in named.items() if old != new]


def _by_place(
    model: keras.Model,
    layers: Mapping[Path, keras.Layer],
    variables: Mapping[str, keras.Variable],
    entries: Iterable[_Entry],
    pairs: Pairs,
    depths: tuple[int | None, ...],
) -> set[str]:
    """Pair the weights of a layer, or of a nested model, in order where names say nothing.

    That is how Keras itself loads its files. A pair whose names are known to mean two things is
    none, so that an order which differs is seen. A layer that holds a weight of one inside of it,
    as SpectralNormalization does, has it in the file a second time.

    Returns:
        The names in the checkpoint of all that is paired.
    """
    twice = set()
    fixed = {id(variable) for layer in model.layers for variable in state_of(layer)}
    names = {id(variable): key for key, variable in variables.items()}
    for depth in depths:  # None: a layer by itself, 1: a layer with all that is inside
        cut = slice(0, depth)
        paths = {key: tuple(key.split("/")[:-1])[cut] for key in variables}
        for path in sorted(set(paths.values()), key=len, reverse=True):
            ours = own = [key for key in variables if paths[key] == path]
            theirs = [e for e in entries if e.path[cut] == path and not e.is_torchs]
            if all(key in pairs for key in own):
                continue
            if len(ours) < len(theirs) and path in layers:
                ours = [names[id(v)] for v in own_variables(layers[path]) if id(v) in names]
            if len(ours) != len(theirs):
                continue
            orders = (
                ours,
                sorted(ours, key=lambda key: not variables[key].trainable),
                sorted(ours, key=lambda key: id(variables[key]) in fixed),
            )
            for order in orders:
                both = list(zip(order, theirs, strict=True))
                if all(_may_be(variables[key], key, entry) for key, entry in both):
                    twice |= {entry.key for key, entry in both if key in pairs and key not in own}
                    pairs |= {k: (e, None) for k, e in both if k in own or k not in pairs}
                    break
    return twice | {entry.key for entry, _ in pairs.values()}


def _may_be(variable: keras.Variable, key: str, entry: _Entry) -> bool:
    ours = key.rpartition("/")[2]
    other = ours != entry.name and ours in _KNOWN and entry.name in _KNOWN
    return not other and tuple(variable.shape) == entry.shape
