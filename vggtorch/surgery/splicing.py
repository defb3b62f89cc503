"""Splices: whoever read tensor A now reads tensor B, after some new layers; and cuts.

That is what every surgery by name comes down to. The new model is made by `rebuild`'s one walk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import KerasTensor as Tensor
from keras.layers import Layer

from vggtorch.keras_graph import Functional, producing_call
from vggtorch.surgery.naming import settle_names_
from vggtorch.surgery.rebuild import Instead, Rebuild
from vggtorch.surgery.wiring import Wiring, needed

Change = tuple[Wiring, Sequence[tuple[Tensor, Tensor]], Sequence[Layer]]


def splice(wiring: Wiring, changes: Sequence[Change]) -> Functional:
    """A new model in which whoever read one tensor of a pair reads new layers applied to the other.

    Each change has the graph that its tensors are in, of the model or of one nested in it, then its
    pairs and its new layers.

    The new layers are built only once the whole graph has been seen to fit, with copies of them
    in their place.
    """
    instead: Instead = {}
    for _, pairs, new in changes:
        instead.update({id(before): (now, new) for before, now in pairs})
    taken: dict[int, set[str]] = {}  # by the id of a model, the names that its layers have
    for place, _, new in changes:
        if id(place.model) not in taken:
            ends = [*place.outputs, *place.functional.inputs]
            kept = needed(ends, {key: now for key, (now, _) in instead.items()})
            taken[id(place.model)] = {node.operation.name for node in kept}
        settle_names_(new, taken[id(place.model)])
        taken[id(place.model)] |= {layer.name for layer in new}
    inputs, outputs = wiring.functional.input, wiring.functional.output
    new_layers = {id(layer): layer for _, _, new in changes for layer in new}
    if new_layers:
        trial = Rebuild(wiring, weights=False)
        copies = {key: trial.copy(layer, wiring) for key, layer in new_layers.items()}
        trial.instead = {
            key: (now, [copies[id(layer)] for layer in new]) for key, (now, new) in instead.items()
        }
        trial.model(wiring, inputs, outputs)
    return Rebuild(wiring, instead).model(wiring, inputs, outputs)


def rebuilt(wiring: Wiring, inputs: Any, outputs: Any) -> Functional:
    """A new model from `inputs` to `outputs`, both structures of the old graph's tensors.

    They may be tensors of nested models that are called once, which are then cut to what is needed
    of them.
    """
    starts, ends = (
        [t for t in keras.tree.flatten(tensors) if producing_call(t) not in wiring.nodes]
        for tensors in (inputs, outputs)
    )
    return Rebuild(wiring, starts=starts, ends=ends).model(wiring, inputs, outputs)
