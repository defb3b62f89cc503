"""What is saved is right for whoever reads it: torch's own layers, Keras, and `preprocess`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import by_torchvision
import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

import vggtorch as vt
from vggtorch.models import convert, remember_
from vggtorch.weights import read

pytestmark = pytest.mark.usefixtures("narrow_throughout")
SHAPE = (64, 96, 3)  # a last map of 2x3, whose order counts


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGGTORCH_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def backbone(narrow_throughout: None) -> keras.Model:
    keras.utils.set_random_seed(0)
    return vt.VGG11(weights=None, include_top=False, input_shape=SHAPE)


def head() -> list[keras.layers.Layer]:
    return [
        layers.Flatten(name="flat"),
        layers.BatchNormalization(name="norm"),
        layers.Dropout(0.5, name="drop"),
        layers.Dense(5, activation="relu", name="hidden"),
        layers.Dense(3, name="out"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pth", "bin"])
def test_a_head_is_right_in_torch_and_back(
    tmp_path: Path, backbone: keras.Model, ending: str
) -> None:
    """Behind torch's own Flatten, which reads the map in another order than Keras's."""
    model = vt.stack(backbone, head())
    norm = model.get_layer("norm")
    norm.set_weights([np.random.default_rng(0).uniform(0.5, 1, w.shape) for w in norm.weights])
    vt.save_weights(model, tmp_path / f"a.{ending}")
    state = torch.load(tmp_path / f"a.{ending}")
    network: Any = nn.Module()
    network.features = by_torchvision.features("vgg11", narrow=True)
    network.norm, network.hidden = nn.BatchNorm1d(64 * 6, eps=norm.epsilon), nn.Linear(64 * 6, 5)
    network.out = nn.Linear(5, 3)
    network.load_state_dict(state)  # strictly
    network.eval()
    images = torch.rand(2, *SHAPE)
    with torch.no_grad():
        x = network.norm(network.features(images.movedim(-1, 1)).flatten(1))
        expected = network.out(network.hidden(x).relu())
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    again = vt.stack(vt.VGG11(weights=None, include_top=False, input_shape=SHAPE), head())
    vt.load_weights(again, tmp_path / f"a.{ending}")
    for a, b in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "top",
    [
        lambda: [layers.Flatten(), layers.Dense(256, name="fc1"), layers.Dense(3, name="out")],
        lambda: [layers.Flatten(), layers.Dense(7, name="predictions")],
        lambda: [layers.Conv2D(9, 1, name="fc1"), layers.GlobalMaxPooling2D()],
        lambda: [layers.GlobalAveragePooling2D(), layers.Dense(3, name="classifier")],
    ],
)
def test_names_of_vggs_own_classifier_in_other_shapes(
    tmp_path: Path, backbone: keras.Model, top: Callable[[], list[keras.layers.Layer]]
) -> None:
    model = vt.stack(backbone, top())
    for ending in ("pth", "safetensors"):
        vt.save_weights(model, tmp_path / f"a.{ending}")
        again = vt.stack(vt.VGG11(weights=None, include_top=False, input_shape=SHAPE), top())
        vt.load_weights(again, tmp_path / f"a.{ending}")
        for a, b in zip(again.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
        alone = vt.VGG11(weights=tmp_path / f"a.{ending}", include_top=False, input_shape=SHAPE)
        for a, b in zip(alone.get_weights(), backbone.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


def cut(name: str | None) -> keras.Model:
    vgg = vt.VGG11(weights=None, include_top=False, input_shape=(32, 32, 3))
    return remember_(vt.truncate(vgg, "block1_pool"), name)


@pytest.mark.filterwarnings("ignore:keras.saving.load_model reads")
@pytest.mark.slow
@pytest.mark.parametrize("form", ["pth", "bin", "safetensors", "weights.h5", "keras", "h5"])
def test_the_weight_set_is_kept_in_every_form(tmp_path: Path, form: str) -> None:
    model, path = cut("oxford"), tmp_path / f"a.{form}"
    if form in ("keras", "h5"):
        model.save(path)
    else:
        vt.save_weights(model, path)
    again = vt.load_weights(cut(None), path)
    assert vt.weight_set(again) == "oxford"
    grey = np.full((32, 32, 3), 128, "uint8")
    np.testing.assert_array_equal(vt.preprocess(grey, again), vt.preprocess(grey, "oxford"))
    # Each is what the form's own library writes, and read by it.
    if form in ("pth", "bin"):
        network: Any = nn.Module()
        network.features = by_torchvision.features("vgg11", narrow=True)[:1]
        network.load_state_dict(torch.load(path))
    elif form == "weights.h5":
        by_keras = cut(None)
        by_keras.load_weights(path)
        for a, b in zip(by_keras.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pth", "safetensors", "weights.h5"])
def test_a_nested_network_keeps_its_weight_set(tmp_path: Path, form: str) -> None:
    def build(name: str | None) -> keras.Model:
        image = keras.Input((32, 32, 3))
        return keras.Model(image, layers.Flatten()(cut(name)(image)))

    vt.save_weights(build("features"), tmp_path / f"a.{form}")
    model = vt.load_weights(build("oxford"), tmp_path / f"a.{form}")
    assert vt.weight_set(model.get_layer("vgg11")) == "features"
    with pytest.warns(UserWarning, match="'vgg11' no longer remembers 'features'"):
        vt.load_weights(model, {k: v.value for k, v in vt.named_variables(model).items()})


def test_maps_are_flattened_as_torch_does_from_channels_first_too(tmp_path: Path) -> None:
    keras.config.set_image_data_format("channels_first")
    try:
        image = keras.Input((3, 4, 6))
        x = layers.Conv2D(8, 3, padding="same", name="block1_conv1")(image)
        model = keras.Model(image, layers.Dense(2, name="out")(layers.Flatten()(x)))
        vt.save_weights(model, tmp_path / "a.pth")
        state = torch.load(tmp_path / "a.pth")
        images = torch.rand(2, 3, 4, 6)
        with torch.no_grad():
            kernel, bias = state["features.0.weight"], state["features.0.bias"]
            x = nn.functional.conv2d(images, kernel, bias, padding=1).flatten(1)
            expected = nn.functional.linear(x, state["out.weight"], state["out.bias"])
            torch.testing.assert_close(model(images), expected)
        before = model.get_weights()
        model.set_weights([np.zeros_like(w) for w in before])
        vt.load_weights(model, tmp_path / "a.pth")
        for a, b in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)
    finally:
        keras.config.set_image_data_format("channels_last")


@pytest.mark.slow
@pytest.mark.parametrize("by_keras", [True, False])
def test_the_loss_of_a_weight_set_is_said(tmp_path: Path, by_keras: bool) -> None:
    model = cut("features")
    if by_keras:
        cut(None).save_weights(tmp_path / "a.weights.h5")
    else:
        vt.save_weights(cut(None), tmp_path / "a.weights.h5")
    with pytest.warns(UserWarning, match="no longer remembers 'features': name it, preprocess"):
        vt.load_weights(model, tmp_path / "a.weights.h5")
    assert vt.weight_set(model) is None


@pytest.mark.filterwarnings("ignore:keras.saving.load_model reads")
@pytest.mark.slow
def test_conversion_keeps_the_weight_set_from_form_to_form(tmp_path: Path) -> None:
    model = vt.VGG11(weights=None, include_top=False, input_shape=(32, 32, 3))
    source = tmp_path / "a.safetensors"
    vt.save_weights(remember_(model, "features"), source)
    for form in ("pth", "weights.h5", "bin", "h5"):
        convert(source, tmp_path / f"b.{form}")
        source = tmp_path / f"b.{form}"
        assert read(source).weight_set == "features", form
