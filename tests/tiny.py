"""A VGG of two blocks for tests of training, and folders of pictures that it can learn."""

from __future__ import annotations

from pathlib import Path

import vggtorch  # noqa: F401  # isort: skip  (first: it selects Keras's torch backend)
import keras
import numpy as np
import torch
from PIL import Image
from torch.utils.data import TensorDataset

COLOURS = {"blue": (50, 60, 190), "green": (60, 180, 60), "red": (200, 50, 50)}


def network(
    classes: int | None = 3, dropout: float = 0.3, batch_norm: bool = False, size: int | None = 16
):
    """block1, block2 and, unless classes is None, a head; the same weights every time."""
    layers = keras.layers
    keras.utils.set_random_seed(1)
    x = image = keras.Input((size, size, 3))
    x = layers.Rescaling(1 / 127.5, -1)(x)
    for block, width in ((1, 4), (2, 6)):
        x = layers.Conv2D(width, 3, padding="same", activation="relu", name=f"block{block}_conv1")(
            x
        )
        if batch_norm:
            x = layers.BatchNormalization(name=f"block{block}_bn1")(x)
        x = layers.MaxPooling2D(name=f"block{block}_pool")(x)
    if classes is not None:
        x = layers.Flatten(name="flatten")(x)
        x = layers.Dropout(dropout, name="dropout")(x)
        x = layers.Dense(classes, activation="softmax", name="predictions")(x)
    return keras.Model(image, x, name="tiny")


def pictures(folder: Path, each: int = 8, size: int = 20, seed: int = 0) -> Path:
    """A folder with noisy pictures of one colour for each class."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            noise = rng.normal(0, 50, (size, size + 4, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def weights(model: keras.Model) -> list[np.ndarray]:
    return [keras.ops.convert_to_numpy(v) for v in model.weights]


def dataset(count: int = 20, seed: int = 0) -> TensorDataset:
    """Noise that is ready for the network, in three classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, 16, 3, generator=generator) * 100 + 100
    return TensorDataset(x, torch.arange(count) % 3)


def regularized(model: keras.Model, regularizer: keras.Regularizer | None) -> keras.Model:
    for layer in model.layers:
        if hasattr(layer, "kernel"):
            layer.kernel.regularizer = regularizer
    return model


def curve(history, name: str = "loss") -> list[float]:
    """One figure of every epoch."""
    return [epoch[name] for epoch in history.epochs]
