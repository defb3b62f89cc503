"""What a model remembers: the weight set whose preprocessing its weights expect.

It stands in the model's class (`keras_graph` has one for each weight set), because a model's class
is what Keras keeps when it clones a model and when it saves and loads one.
"""

from __future__ import annotations

import keras

from vggtorch.keras_graph import MODEL_CLASSES, Functional


def weight_set(model: keras.Model) -> str | None:
    """Name of the weight set whose preprocessing a model expects; None where it isn't known.

    Example:
        >>> import vggtorch as vt
        >>> model = vt.VGG11(weights=None, include_top=False)
        >>> print(vt.weight_set(model))  # random weights belong to none
        None
    """
    return getattr(type(model), "weight_set", None)


def remember_(model: keras.Model, name: str | None) -> keras.Model:
    """Let a Functional model remember a weight set, in place; returns the model.

    Args:
        model: a model of another class (Sequential, a subclass of the user's) stays as it is.
        name: the weight set; None makes the model forget the one that it remembers.
    """
    if type(model) in (Functional, *MODEL_CLASSES.values()):
        model.__class__ = Functional if name is None else MODEL_CLASSES[name]
    return model
