"""What a network has of Keras layers beside their weights, and whether it still is so."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable
from typing import Any

import keras

# A layer, its attributes, how many these are, the names of those that count, and their values.
_Taken = tuple[keras.Layer, dict[str, Any], int, list[str], list[Any]]


class Settings:
    """The strides, activations, rates, dtype policies and so on that some layers have now.

    Attributes whose names begin with an underscore are Keras's own; weights and `trainable`, which
    networks follow, are among them. A copy is empty: copies of a network stand alone.
    """

    def __init__(self, layers: Iterable[keras.Layer] = ()) -> None:
        self._taken = [_taken(layer) for layer in layers]

    def are_same(self) -> bool:
        """Whether the layers still have these very objects as their attributes, and no new ones."""
        return all(
            len(own) == number and all(map(operator.is_, map(own.get, names), values))
            for _, own, number, names, values in self._taken
        )

    def warn_of_changes(self) -> None:
        """Say which of them are no longer what they were, once."""
        if self.are_same():
            return
        changed = [
            f"{layer.path or layer.name}.{name.removeprefix('_')}"
            for layer, own, _, names, values in self._taken
            for name, value in zip(names, values, strict=True)
            if not _is_equal(own.get(name), value)
        ]
        self._taken = [_taken(layer) for layer, *_ in self._taken]
        if changed:
            warnings.warn(
                f"{', '.join(changed)} changed in Keras after to_torch, and the torch network "
                f"keeps what it was written with: call to_torch again to have it, or train the "
                f"Keras model under accelerate_, which follows.",
                stacklevel=6,
            )

    def __deepcopy__(self, memo: Any) -> Settings:
        return Settings()

    def __reduce__(self) -> tuple[Any, ...]:
        return Settings, ()


def _taken(layer: keras.Layer) -> _Taken:
    own = vars(layer)
    public = (name for name in own if name[0] != "_" and name not in ("call", "training"))
    names = ["_dtype_policy", "call", *public]
    return layer, own, len(own), names, [own.get(name) for name in names]


def _is_equal(new: Any, old: Any) -> bool:
    """Whether a setting is what it was; of weights and layers only the same object is."""
    plain = (bool, int, float, str, tuple, list, dict, keras.DTypePolicy)
    return new is old or (isinstance(old, plain) and type(new) is type(old) and bool(new == old))
