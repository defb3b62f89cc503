"""A random quarter of the channels of every layer that allows it, on the networks people have."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from keras import applications
from keras import layers as kl
from poison import check_deletion

import vggtorch as vt
from vggtorch.keras_graph import functional, graph_of, raw_value

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "narrow")]


@pytest.fixture(autouse=True)
def float64():
    before = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


def siamese():
    """Two images through one VGG11 with a head of its own, compared at two depths."""
    trunk = vt.VGG11(weights=None, include_top=False, input_shape=(32, 32, 3), batch_norm=True)
    image = keras.Input((32, 32, 3))
    embed = keras.Sequential(
        [kl.Flatten(name="flat"), kl.Dense(64, activation="relu", name="code"), kl.Dropout(0.5)],
        name="embed",
    )
    branch = keras.Model(image, embed(trunk(image)), name="branch")
    a, b = keras.Input((32, 32, 3), name="a"), keras.Input((32, 32, 3), name="b")
    left, right = branch(a), branch(b)
    x = kl.Concatenate(name="both")([kl.Subtract()([left, right]), kl.Multiply()([left, right])])
    x = kl.Dense(16, activation="gelu", name="compare")(x)
    return keras.Model([a, b], kl.Dense(1, activation="sigmoid", name="same")(x))


def headed(base):
    """A network without a classifier, with a Dense layer behind its last map."""
    x = kl.Flatten(name="flat")(base.output)
    x = kl.Dense(20, activation="relu", name="hidden")(x)
    return keras.Model(base.input, kl.Dense(5, activation="softmax", name="classes")(x))


SMALL = {"weights": None, "include_top": False, "input_shape": (32, 32, 3)}
NETWORKS = {
    "VGG16": lambda: headed(vt.VGG16(**SMALL | {"input_shape": (64, 64, 3)})),
    "VGG16 with batch norm": lambda: headed(vt.VGG16(**SMALL, batch_norm=True)),
    "ResNet50": lambda: headed(applications.ResNet50(**SMALL)),
    "MobileNetV2": lambda: headed(applications.MobileNetV2(**SMALL)),
    "DenseNet121": lambda: headed(applications.DenseNet121(**SMALL)),
    "siamese": siamese,
}
# How many layers make channels, and how many rows of layers go only together.
EXPECTED = {
    "VGG16": (14, 14),
    "VGG16 with batch norm": (14, 14),
    "ResNet50": (54, 38),
    "MobileNetV2": (36, 26),
    "DenseNet121": (121, 121),
    "siamese": (10, 10),
}


def widths(model, prefix=""):
    """The channels that each layer with a kernel of its own makes, by full name."""
    found: dict[str, int] = {}
    for layer in graph_of(model, "a test").operations:
        if functional(layer) is not None:
            found |= widths(layer, f"{prefix}{layer.name}/")
        elif hasattr(layer, "filters") or hasattr(layer, "units"):
            found[prefix + layer.name] = getattr(layer, "filters", getattr(layer, "units", 0))
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_a_random_quarter_of_every_layer(name):
    keras.utils.set_random_seed(0)
    model = NETWORKS[name]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for variable in model.variables:  # biases and statistics that no initialiser gives
            if variable.ndim == 1 and raw_value(variable).is_floating_point():
                raw_value(variable).mul_(0.5 + torch.rand(variable.shape, generator=generator))
                raw_value(variable).add_(0.1 * torch.rand(variable.shape, generator=generator))

    together: dict[tuple[str, ...], list[dict[str, list[int]]]] = {}
    for unit in vt.deletable_channels(model):
        together.setdefault(tuple(unit), []).append(unit)
    rng = np.random.default_rng(0)
    gone: dict[str, list[int]] = {}
    for units in together.values():
        for choice in rng.choice(len(units), len(units) // 4, replace=False):
            for layer, numbers in units[choice].items():
                gone.setdefault(layer, []).extend(numbers)
    assert (len(gone), len(together)) == EXPECTED[name]

    result = vt.delete_channels(model, gone)
    old, new = widths(model), widths(result)
    for layer, width in old.items():
        assert new[layer] == width - len(gone.get(layer, ())), layer
        assert layer not in gone or new[layer] == width - width // 4, layer
    images = [
        torch.rand(2, *t.shape[1:], generator=generator, dtype=torch.float64) * 2 - 1
        for t in model.inputs
    ]
    assert {str(v.dtype) for v in model.trainable_variables} == {"float64"}
    check_deletion(model, result, gone, *images)
