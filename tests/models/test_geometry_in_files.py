"""What a model expects of an image stands in every form of file: all of it, and for its classes."""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from keras import layers

import vggtorch as vt
from vggtorch.models import convert, remember_, remembered
from vggtorch.weight_sets import DataConfig
from vggtorch.weights import read

pytestmark = pytest.mark.filterwarnings("ignore:keras.saving.load_model reads")
SHAPE = (32, 32, 3)
CONFIG = DataConfig(
    "oxford", input_size=(3, 32, 32), crop_pct=1.0, crop_mode="squash", interpolation="bicubic",
    label_names=("cat", "dog"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGGTORCH_HOME", str(tmp_path / "home"))


def build(classes: int = 2, size: int | None = 32, name: str = "out") -> keras.Model:
    x = image = keras.Input((size, size, 3))
    x = layers.Conv2D(64, 3, name="block1_conv1")(x)
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, layers.Dense(classes, name=name)(x))


FORMS = ["pth", "bin", "safetensors", "weights.h5", "keras", "h5"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_geometry_and_classes_come_back_from_every_form(tmp_path: Path, form: str) -> None:
    model = remember_(build(), CONFIG)
    path = tmp_path / f"a.{form}"
    if form in ("keras", "h5"):
        model.save(path)
    else:
        vt.save_weights(model, path)
    again = vt.load_weights(build(), path)
    assert vt.data_config(again) == CONFIG
    wide = np.random.default_rng(0).integers(0, 256, (40, 70, 3)).astype("uint8")
    np.testing.assert_array_equal(vt.preprocess(wide, again), vt.preprocess(wide, model))
    # An open size is that of the training; the classes are those of the layer that has them.
    assert vt.data_config(vt.load_weights(build(size=None), path)).input_size == (3, 32, 32)
    assert vt.data_config(vt.load_weights(build(size=48), path)).input_size == (3, 48, 48)
    other = remember_(build(3), dataclasses.replace(CONFIG, label_names=("a", "b", "c")))
    report = vt.load_weights(other, path, partial=True)
    assert report.left
    assert vt.data_config(other) == dataclasses.replace(CONFIG, label_names=("a", "b", "c"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Names differ and were matched by their order")
@pytest.mark.parametrize("form", ["pth", "safetensors", "weights.h5"])
def test_a_nested_network_gives_its_geometry_too(tmp_path: Path, form: str) -> None:
    def nested(config: DataConfig | None) -> keras.Model:
        body = build(name="hidden")
        if config is not None:
            remember_(body, dataclasses.replace(config, label_names=()))
        image = keras.Input(SHAPE)
        return keras.Model(image, layers.Dense(4, name="head")(body(image)))

    vt.save_weights(nested(CONFIG), tmp_path / f"a.{form}")
    model = vt.load_weights(nested(None), tmp_path / f"a.{form}")
    assert vt.data_config(model) == dataclasses.replace(CONFIG, label_names=())


def test_a_model_that_remembers_nothing_says_nothing(tmp_path: Path) -> None:
    vt.save_weights(build(), tmp_path / "a.safetensors")
    assert read(tmp_path / "a.safetensors").data_config is None
    model = remember_(build(), CONFIG)
    with pytest.warns(UserWarning, match="no longer remembers 'oxford'"):
        vt.load_weights(model, tmp_path / "a.safetensors")
    assert remembered(model) == dataclasses.replace(CONFIG, weight_set=None)
    keras.saving.save_model(build(), tmp_path / "folder", zipped=False)
    assert remembered(vt.load_model(tmp_path / "folder")) == remembered(build())


@pytest.mark.parametrize(
    "text",
    ['{"crop_pct": 7}', "[1]", '{"input_size": ["a", 2, 3]}', '{"label_names": [[[]]]}', "{"],
)
def test_what_makes_no_sense_is_damage(tmp_path: Path, text: str) -> None:
    from vggtorch.weights.sources import write as write_file

    write_file(tmp_path / "a.safetensors", {"a/kernel": torch.ones(2, 2)}, None, text)
    with pytest.raises(ValueError, match=r"a\.safetensors is damaged"):
        read(tmp_path / "a.safetensors")


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_networks_and_conversions_keep_it(tmp_path: Path) -> None:
    vgg = vt.VGG11(weights=None, include_top=False, input_shape=SHAPE)
    config = dataclasses.replace(CONFIG, label_names=())
    source = tmp_path / "a.safetensors"
    vt.save_weights(remember_(vgg, config), source)
    for form in ("pth", "weights.h5", "bin", "keras"):
        convert(source, tmp_path / f"b.{form}")
        source = tmp_path / f"b.{form}"
        again = vt.VGG11(weights=source, include_top=False, input_shape=SHAPE)
        assert vt.data_config(again) == config, form


# Whole models of any layers into other forms


def any_layers() -> keras.Model:
    x = image = keras.Input((8, 8, 3))
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.BatchNormalization(name="bn")(layers.Conv2D(4, 3, name="conv")(x))
    return keras.Model(image, layers.Dense(2, name="out")(layers.Flatten()(x)))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pth", "bin", "safetensors", "weights.h5", "h5"])
@pytest.mark.parametrize("make", [any_layers, build])
def test_a_model_that_was_saved_whole_is_converted(tmp_path: Path, make, form: str) -> None:
    model = make()
    if make is build:
        remember_(model, CONFIG)
    model.save(tmp_path / "a.keras")
    mapped = convert(tmp_path / "a.keras", tmp_path / f"b.{form}")
    again = make()
    vt.load_weights(again, tmp_path / f"b.{form}")
    for a, b in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    if make is build:
        assert vt.data_config(again) == CONFIG
    variables = vt.named_variables(model)
    assert [(name, tuple(v.shape)) for name, v in variables.items()] == [m[:2] for m in mapped]
    if form == "pth":
        state = torch.load(tmp_path / "b.pth")
        assert {name: tuple(state[name].shape) for _, _, name, _ in mapped} == {
            name: shape for _, _, name, shape in mapped
        }
        assert len(mapped) == len(variables)


def test_weights_alone_of_other_layers_are_refused_with_the_reason(tmp_path: Path) -> None:
    vt.save_weights(any_layers(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"does not say what kinds of layers.*whole \(.keras\)"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.pth")
    assert not list(tmp_path.glob("b.*"))


def test_the_form_that_keras_reads_without_it_is_warned_of(tmp_path: Path) -> None:
    model = remember_(build(), CONFIG)
    with pytest.warns(UserWarning, match=r"a\.h5 without .*\(oxford\); vt\.load_model keeps it"):
        model.save(tmp_path / "a.h5")
    assert vt.weight_set(keras.saving.load_model(tmp_path / "a.h5")) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save(tmp_path / "a.keras")
    assert vt.weight_set(keras.saving.load_model(tmp_path / "a.keras")) == "oxford"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("form", ["keras", "h5", "pickle", "folder"])
def test_a_whole_model_comes_back_with_what_it_expects(
    tmp_path: Path, form: str, nested: bool
) -> None:
    config = dataclasses.replace(CONFIG, label_names=()) if nested else CONFIG
    model = remember_(build(), config)
    if nested:
        model = keras.Sequential([keras.Input(SHAPE), model, layers.Dense(3, name="head")])
    if form == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        zipped = False if form == "folder" else None
        keras.saving.save_model(model, tmp_path / f"a.{form}", zipped=zipped)
        again = vt.load_model(tmp_path / f"a.{form}")
    assert vt.data_config(again) == vt.data_config(model)
    assert vt.weight_set(again) == "oxford"
    for ours, theirs in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
