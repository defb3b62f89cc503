"""A network, and the same with two of its layers replaced by one."""

from __future__ import annotations

import keras
import pytest

from vggtorch import surgery


@pytest.fixture(scope="module")
def vgg() -> keras.Model:
    return keras.applications.VGG16(weights=None, input_shape=(32, 32, 3), include_top=False)


@pytest.fixture(scope="module")
def replaced(vgg) -> keras.Model:
    new = keras.layers.Conv2D(64, 5, padding="same", activation="relu", name="block1_conv")
    return surgery.replace(vgg, ["block1_conv1", "block1_conv2"], new)
