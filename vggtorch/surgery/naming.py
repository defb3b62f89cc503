"""Names of layers: those of new layers in a network, and other names for those that are there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from keras.layers import Layer

from vggtorch.keras_graph import functional, to_snake_case
from vggtorch.surgery.wiring import Wiring


def settle_names_(layers: Sequence[Layer], taken: set[str]) -> None:
    """Rename new layers whose automatic name is taken; refuse a chosen one that is."""
    taken = set(taken)
    for layer in {id(layer): layer for layer in layers}.values():
        if layer.name in taken:
            base = to_snake_case(type(layer).__name__)
            if not re.fullmatch(rf"{re.escape(base)}(_\d+)?", layer.name):
                raise ValueError(
                    f"The name {layer.name!r} of a new layer is taken. Give it another name."
                )
            layer.name = next(
                name for n in range(1, len(taken) + 2) if (name := f"{base}_{n}") not in taken
            )
        taken.add(layer.name)


def names_by_id(wiring: Wiring, names: Mapping[str, str] | str) -> dict[int, str]:
    """What the user wants layers to be called, by their ids; checked.

    `names` are full or clear old names -> the layers' own new ones; or what to write before all.
    """
    wanted: dict[int, str] = {}
    if not isinstance(names, Mapping | str) or not names:
        raise ValueError(
            f"rename expects {{old name: new name}} or a prefix that isn't empty, received "
            f"{names!r}."
        )
    if isinstance(names, str):
        names = {name: names + name for name in wiring.operations}
    for old, new in names.items():
        if not isinstance(new, str) or not new or "/" in new or "." in new:
            raise ValueError(
                f"rename received {new!r} as the new name of {old!r}; expected a name that isn't "
                f"empty and has no '/' (a layer stays in its model) and no '.' (torch's names of "
                f"weights have none)."
            )
        place, own = wiring.find(old)
        layer = place.operations[own]
        if wanted.setdefault(id(layer), new) != new:
            raise ValueError(
                f"rename received {wanted[id(layer)]!r} and {new!r} as names of one layer, {old!r}."
            )
    for graph in wiring.all_graphs():
        found = Counter(wanted.get(id(x), x.name) for x in graph.operations.values())
        if twice := [name for name, count in found.items() if count > 1]:
            raise ValueError(
                f"rename would give several layers of {graph.model.name!r} one name: "
                f"{', '.join(map(repr, twice))}."
            )
    return wanted


def flat_names(wiring: Wiring) -> dict[int, str]:
    """Names for the layers of all nested models in one graph, by their ids.

    Where several have one name, those of nested models get their models' names before it.
    """
    outer = {id(x) for x in wiring.operations.values()}
    layers: dict[int, tuple[str, str]] = {}  # id -> full name, own name
    for graph in wiring.all_graphs():
        for node in graph.nodes:
            layer = node.operation
            dissolved = functional(layer) is not None or (node.is_input and graph is not wiring)
            if not dissolved:
                layers.setdefault(id(layer), (graph.prefix + layer.name, layer.name))
    count = Counter(own for _, own in layers.values())
    taken = set(count)
    names: dict[int, str] = {}
    for key, (path, own) in layers.items():
        if count[own] > 1 and key not in outer:
            base = path.replace("/", "_")
            numbered = (f"{base}_{n}" for n in range(1, len(taken) + 2))
            name = base if base not in taken else next(n for n in numbered if n not in taken)
            taken.add(name)
            names[key] = name
    return names
