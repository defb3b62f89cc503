"""Networks whose layers have a prefix, of which a model may have several, and files of plain names.

A network under a prefix is matched with a checkpoint as if it had none. A checkpoint of several
networks gives each prefix the one of its name: to `left_` what is `left/...` or `left_...` there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import keras

from vggtorch.architectures import LAYERS
from vggtorch.models.filling import checkpoint_of, named_variables
from vggtorch.models.leftovers import matched
from vggtorch.models.matching import Match
from vggtorch.models.rows import prefixes_in
from vggtorch.weight_sets import WEIGHT_SETS
from vggtorch.weights import Checkpoint


def prefixes_of(model: keras.Model) -> list[str]:
    """What stands before the names of VGG's layers in a model, once for each network in it."""
    names = dict.fromkeys(key.partition("/")[0] for key in named_variables(model))
    if not names.keys().isdisjoint(LAYERS):
        return []
    return prefixes_in(names)


def names_layers_of(model: keras.Model, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has a layer of the model by its very name."""
    parts = {part for key in checkpoint.tensors for part in re.split(r"[./]", key)}
    return any(layer.name in parts for layer in model.layers if layer.weights)


def networks_of(
    model: keras.Model,
    source: str | PathLike | Mapping[str, Any],
    checkpoint: Checkpoint | None,
    *,
    partial: bool = False,
) -> list[Match]:
    """Each network of a model under a prefix, with what belongs to it of a checkpoint.

    That is None for a weight set, of which each network has a checkpoint of its own.

    Raises:
        ValueError: a network's weights aren't those of the checkpoint; names the prefix.
    """
    found = []
    prefixes = prefixes_of(model)
    for prefix in prefixes:
        variables = {
            key.removeprefix(prefix): variable
            for key, variable in named_variables(model).items()
            if key.startswith(prefix) and key.removeprefix(prefix).partition("/")[0] in LAYERS
        }
        one = checkpoint or checkpoint_of(str(source), variables)
        if not partial:  # which says what no network has taken
            one = _without_others(one, prefix, [p for p in prefixes if p != prefix])
        try:
            found.append(matched(model, variables, one, source, prefix=prefix, partial=partial))
        except ValueError as error:
            title = repr(source) if str(source) in WEIGHT_SETS else "The checkpoint"
            raise ValueError(
                f"{title} does not fit the network with the prefix {prefix!r}: {error}"
            ) from error
    return found


def _without_others(checkpoint: Checkpoint, prefix: str, others: Iterable[str]) -> Checkpoint:
    """A checkpoint of several networks without those that have the names of other prefixes."""
    parts = {key: re.split(r"[./]", key) for key in checkpoint.tensors}
    if not any(prefix.rstrip("_.-") in names for names in parts.values()):
        return checkpoint
    gone = {other.rstrip("_.-") for other in others}
    kept = {k: t for k, t in checkpoint.tensors.items() if gone.isdisjoint(parts[k])}
    return replace(checkpoint, tensors=kept)
