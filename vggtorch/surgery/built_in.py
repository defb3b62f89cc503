"""The preprocessing inside a model, two operations of one meaning: surgery takes both or neither.

`as_layers` turns RGB into BGR by an operation that has no name of the user's, and then scales. A
model that has lost only one of them is wrong without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import keras
from keras import KerasTensor

from vggtorch.keras_graph import Node, functional, operation_kind, producer, producing_call
from vggtorch.models import (
    PREPROCESSING_SUFFIX,
    image_readers,
    image_tensors,
    remember_,
    weight_set,
)
from vggtorch.surgery.wiring import Wiring, call_inputs
from vggtorch.telling import tell


def _scales(operation: Any) -> bool:
    return str(operation.name).endswith(PREPROCESSING_SUFFIX)


def _scaling_of(place: Wiring, tensor: KerasTensor) -> str | None:
    """The layer that scales what a flip has turned to BGR; None where `tensor` is no such thing."""
    if operation_kind(producer(tensor)) != "Flip":
        return None
    readers = (node.operation for node, t in place.reads if t is tensor)
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
    own = {id(operation) for operation in place.operations.values()}
    scaling = [x.name for x in gone if _scales(x) and id(x) in own]
    if not scaling:
        return
    models = _models_on_the_way(result, place)
    name = weight_set(models[-1])
    if name is not None:
        tell(
            f"{place.verb} took out {place.prefix + scaling[0]!r}, the preprocessing inside "
            f"{place.model.name!r}. The result no longer remembers its weight set {name!r}: "
            f"preprocess() can't know what the new layers do to an image."
        )
    for model in models:
        remember_(model, None)


def forget_before_(result: keras.Model, place: Wiring, added: Sequence[Any]) -> None:
    """Let a model forget its weight set, with a warning, if new layers read its images first.

    Not if they leave colours as they are.
    """
    models = _models_on_the_way(result, place)
    if not any(reader is layer for reader in image_readers(models[-1]) for layer in added):
        return
    name = weight_set(place.model)
    for model in models:
        remember_(model, None)
    if name is not None:
        tell(
            f"{place.verb} put {added[0].name!r} before all that reads the images of "
            f"{place.model.name!r}. The result no longer remembers its weight set {name!r}: if it "
            f"is still to get what that expects, name it: preprocess(images, {name!r})."
        )


def forget_images_(result: keras.Model, wiring: Wiring, start: KerasTensor) -> None:
    """Let a model that was cut forget its weight set, with a warning, unless it reads images still.

    It does if what it begins with is an image, or one that the preprocessing inside has been
    applied to.
    """
    if _is_image(wiring, start):
        return
    graphs = list(Wiring(result, wiring.verb).all_graphs())
    name = next(filter(None, (weight_set(graph.model) for graph in graphs)), None)
    for graph in graphs:
        remember_(graph.model, None)
    if name is not None:
        tell(
            f"{wiring.verb} starts at {producer(start).name!r}, so the result reads what that puts "
            f"out, and no images. It no longer remembers its weight set {name!r}: preprocess what "
            f"goes into the first part."
        )


def _is_image(wiring: Wiring, tensor: KerasTensor) -> bool:
    """Whether a tensor of a model, or of one nested in it, is one of the images that it reads."""
    call = wiring.origin(tensor)
    if call is producing_call(tensor):
        return id(tensor) in image_tensors(wiring.model)
    nested = wiring.inside(call.operation.name)
    images = image_tensors(wiring.model)
    given = call_inputs(nested.functional, call)
    return all(id(t) in images for t in given) and _is_image(nested, tensor)


def _models_on_the_way(result: keras.Model, place: Wiring) -> list[keras.Model]:
    """A result and the models nested in it that lead to where `place` was, as far as they are."""
    models = [result]
    for step in place.prefix.split("/")[:-1]:
        inner = Wiring(models[-1], place.verb).operations.get(step)
        if functional(inner) is None:
            break
        models.append(inner)
    return models
