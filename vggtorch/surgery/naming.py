"""Names of layers: those of new layers in a network, and other names for all that is there."""

from __future__ import annotations

import re
from collections.abc import Sequence

from keras.layers import Layer

from vggtorch.keras_graph import to_snake_case


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
