"""VGG16's convolutions with the same random weights for Keras and for torchvision."""

from __future__ import annotations

from collections import OrderedDict

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import by_torchvision
import keras
import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def torchvision_vgg():
    """torchvision's layers under torchvision's names; its classifier would only take memory."""
    torch.manual_seed(0)
    layers = by_torchvision.features("vgg16")
    return nn.Sequential(OrderedDict(features=layers)).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def vgg(torchvision_vgg, tmp_path_factory) -> keras.Model:
    """The same weights as a Keras model."""
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(torchvision_vgg.state_dict(), path)
    return vt.VGG16(weights=path, include_top=False)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def small() -> keras.Model:
    """Two blocks with batch norm, and dropout."""
    layers = keras.layers
    keras.utils.set_random_seed(2)
    x = image = keras.Input((None, None, 3))
    for block, width in ((1, 4), (2, 6)):
        x = layers.Conv2D(width, 3, padding="same", name=f"block{block}_conv1")(x)
        x = layers.BatchNormalization(name=f"block{block}_bn1")(x)
        x = layers.ReLU(name=f"block{block}_relu1")(x)
        x = layers.MaxPooling2D(name=f"block{block}_pool")(x)
    return keras.Model(image, layers.Dropout(0.5, name="dropout")(x), name="small")
