"""A small VGG and images as smooth as photographs, for the tests of compression."""

from __future__ import annotations

import keras
import numpy as np

L = keras.layers
SIZE = 24


def vgg(head: bool = False, **options) -> keras.Model:
    """Three blocks of a VGG with random weights, and a classifier if wanted."""
    keras.utils.set_random_seed(0)
    options = {"padding": "same", "activation": "relu"} | options
    x = inputs = keras.Input((SIZE, SIZE, 3))
    for name, width in (("block1", 16), ("block2", 24), ("block3", 32)):
        for n in (1, 2):
            x = L.Conv2D(width, 3, name=f"{name}_conv{n}", **options)(x)
        x = L.MaxPooling2D(name=f"{name}_pool")(x)
    if head:
        x = L.Flatten(name="flatten")(x)
        x = L.Dense(64, activation="relu", name="fc")(x)
        x = L.Dense(5, activation="softmax", name="predictions")(x)
    return keras.Model(inputs, x, name="small")


def images(number: int = 40, size: int = SIZE) -> np.ndarray:
    """(number, size, size, 3), smooth."""
    noise = np.random.default_rng(2).normal(size=(number, size, size, 3)).astype("float32")
    return 100 * (noise.cumsum(1).cumsum(2) / size + 0.05 * noise)
