"""Folders and a model for the tests of checkpoints."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest

from vggtorch.models import remember_


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the caches of whoever runs it, or reaches the network by accident."""
    monkeypatch.setenv("VGGTORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("VGGTORCH_OFFLINE", "1")


@pytest.fixture(scope="module")
def keras_model() -> keras.Model:
    """A little network with the kinds of layers that a VGG has."""
    image = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, padding="same", name="block1_conv1")(image)
    x = keras.layers.BatchNormalization(name="block1_bn1")(x)
    x = keras.layers.MaxPooling2D(name="block1_pool")(x)
    x = keras.layers.Conv2D(5, 3, padding="same", name="block2_conv1")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    model = keras.Model(image, keras.layers.Dense(2, name="fc1")(x))
    generator = np.random.default_rng(0)
    for variable in model.variables:
        variable.assign(generator.normal(size=variable.shape))
    return remember_(model, "oxford")
