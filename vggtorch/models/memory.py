"""What a model remembers: the weight set whose preprocessing its weights expect.

It stands in the model's class (`keras_graph` has one for each weight set), because a model's class
is what Keras keeps when it clones a model and when it saves and loads one.
"""

from __future__ import annotations

import keras

from vggtorch.keras_graph import MODEL_CLASSES, Functional


def weight_set(model: keras.Model) -> str | None:
    """Name of the weight set whose preprocessing `model` expects; None where it isn't known."""
    return getattr(type(model), "weight_set", None)


def remember_(model: keras.Model, name: str | None) -> keras.Model:
    """Give a Functional model the class that says which preprocessing it expects, in place.

    None makes it a plain Functional model again, which expects no preprocessing that we know of.
    A model of another class (Sequential, a subclass of the user's) stays as it is.
    Returns the model.
    """
    if type(model) in (Functional, *MODEL_CLASSES.values()):
        model.__class__ = Functional if name is None else MODEL_CLASSES[name]
    return model
