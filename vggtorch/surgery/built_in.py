"""The preprocessing inside a model, two operations of one meaning: surgery takes both or neither.

`as_layers` turns RGB into BGR by an operation that has no name of the user's, and then scales. A
model that has lost only one of them is wrong without a word.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import keras
from keras import KerasTensor

from vggtorch.keras_graph import Node, operation_kind, producer, producing_call
from vggtorch.models import PREPROCESSING_SUFFIX, remember_, weight_set
from vggtorch.surgery.wiring import Wiring


def _scales(operation: Any) -> bool:
    return str(operation.name).endswith(PREPROCESSING_SUFFIX)


def _scaling_of(place: Wiring, tensor: KerasTensor) -> str | None:
    """The layer that scales what a flip has turned to BGR; None where `tensor` is no such thing."""
    if operation_kind(producer(tensor)) != "Flip":
        return None
    readers = (node.operation for node in place.readers.get(id(tensor), ()))
    return next((reader.name for reader in readers if _scales(reader)), None)


def with_flips(place: Wiring, nodes: Sequence[Node]) -> list[list[Node]]:
    """Each call that is to go, behind the flip that goes with it where it scales an image."""
    groups = []
    for node in nodes:
        group = [node]
        if _scales(node.operation):
            before = producing_call(node.input_tensors[0])
            if operation_kind(before.operation) == "Flip" and before not in nodes:
                group = [before, node]
        for tensor in node.outputs:
            scaling = _scaling_of(place, tensor)
            if scaling and scaling not in {n.operation.name for n in nodes}:
                raise ValueError(
                    f"{place.verb} received {place.prefix + node.operation.name!r}, which is half "
                    f"of the preprocessing inside {place.model.name!r}: what follows scales BGR. "
                    f"Name {place.prefix + scaling!r}, which takes both."
                )
        groups.append(group)
    return groups


def refuse_half(wiring: Wiring, start: KerasTensor) -> None:
    """Raise if a model that starts at a tensor would have only half of the preprocessing."""
    scaling = next((name for w in wiring.all_graphs() if (name := _scaling_of(w, start))), None)
    if scaling:
        raise ValueError(
            f"{wiring.verb} can't start at {producer(start).name!r}, which is half of a model's "
            f"preprocessing. Start at {scaling!r} for images that are preprocessed outside."
        )


def forget_preprocessing_(result: keras.Model, place: Wiring, gone: Iterable[Any]) -> None:
    """Let a model forget its weight set, with a warning, if its preprocessing was replaced.

    What the new layers do to an image is known to the user alone.
    """
    scaling = [operation.name for operation in gone if _scales(operation)]
    if not scaling:
        return
    models = [result]
    for step in place.prefix.split("/")[:-1]:
        models.append(Wiring(models[-1], place.verb).operations[step])
    name = weight_set(models[-1])
    for model in models:
        remember_(model, None)
    if name is not None:
        warnings.warn(
            f"{place.verb} took out {place.prefix + scaling[0]!r}, the preprocessing inside "
            f"{place.model.name!r}. The result no longer remembers its weight set {name!r}: "
            f"preprocess() can't know what the new layers do to an image.",
            stacklevel=3,
        )
