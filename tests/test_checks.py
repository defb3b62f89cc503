"""What a function can't take is refused in words that say what it expects, of whatever type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tiny
import torch

import vggtorch as vt
from vggtorch.checks import switch, whole
from vggtorch.options import as_options


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return tiny.network(size=None, classes=None)


@pytest.fixture(scope="module")
def extractor(model: keras.Model) -> vt.FeatureExtractor:
    return vt.FeatureExtractor(model, ["block1_conv1"], normalization=None)


def test_whole_numbers_are_those_of_python_and_numpy() -> None:
    assert whole("n", np.int64(3)) == 3
    assert type(whole("n", np.int64(3))) is int
    for value in (0, -1, 1.5, True, "2", None, float("nan"), np.float32(2)):
        with pytest.raises(ValueError, match=r"Received n=.*; expected a whole number from 1"):
            whole("n", value)


def test_switches_are_true_and_false_and_nothing_else() -> None:
    for one in (bool, int, np.bool_, np.int64, torch.tensor):
        assert switch("s", one(True)) is True
        assert switch("s", one(False)) is False
    wrong: list[Any] = [None, "False", "", 2, 1.0, [], np.array([True]), float("nan")]
    for value in wrong:
        with pytest.raises(ValueError, match=r"Received s=.*; expected True or False"):
            switch("s", value)


@pytest.mark.parametrize("switch", ["trainable", "checkpoint", "winograd"])
def test_switches_of_the_extractor(model: keras.Model, switch: str) -> None:
    wrong: Any = {switch: "no"}
    with pytest.raises(ValueError, match=f"Received {switch}='no'; expected True or False"):
        vt.FeatureExtractor(model, ["block1_conv1"], normalization=None, **wrong)


@pytest.mark.parametrize("names", [None, 3, 1.5, True, Path("block1_conv1"), b"block1_conv1"])
def test_names_of_layers_are_texts(model: keras.Model, names: Any) -> None:
    calls: list[Callable[[Any], Any]] = [
        lambda names: vt.truncate(model, names),
        lambda names: vt.remove(model, names),
        lambda names: vt.replace(model, names, keras.layers.ReLU()),
        lambda names: vt.delete_channels(model, names, [0]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="expects a layer's name or several names, received"):
            call(names)


def test_a_layer_stands_by_its_name(model: keras.Model) -> None:
    with pytest.raises(ValueError, match=r"truncate expects a layer's name.*; pass its name"):
        vt.truncate(model, model.get_layer("block1_conv1"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"compose_ expects built Keras layers, received 'block1"):
        vt.compose_(["block1_conv1"], model.get_layer("block1_conv1"))  # type: ignore[list-item]


@pytest.mark.parametrize("wrong", [None, "vgg16", torch.nn.Linear(2, 2), keras.Model])
def test_what_is_no_model_is_refused_by_all(wrong: Any, tmp_path: Path) -> None:
    calls: dict[str, Callable[[Any], Any]] = {
        "load_weights": lambda wrong: vt.load_weights(wrong, {}),
        "save_weights": lambda wrong: vt.save_weights(wrong, tmp_path / "a.pth"),
        "named_variables": vt.named_variables,
        "weight_set": vt.weight_set,
        "data_config": vt.data_config,
        "inspect": vt.inspect,
    }
    for name, call in calls.items():
        kind = type(wrong).__name__
        with pytest.raises(ValueError, match=f"{name} needs a Keras model, received {kind}"):
            call(wrong)


@pytest.mark.parametrize("name", ["size", "repeats"])
@pytest.mark.parametrize("value", [0, -1, 1.5, None, "32", (8, 8)])
def test_sizes_and_repeats_are_whole_numbers(model: keras.Model, name: str, value: Any) -> None:
    message = f"Received {name}=.*; expected a whole number from 1"
    with pytest.raises(ValueError, match=message):
        vt.inspect(model, **{name: value})
    with pytest.raises(ValueError, match=message):
        vt.compare(model, model, **{name: value})
    with pytest.raises(ValueError, match=message):
        vt.bench(model, **{name: value})


def test_a_model_of_inputs_alone_costs_nothing_that_could_be_measured() -> None:
    inputs = keras.Input((4,))
    with pytest.raises(ValueError, match="inspect received .* which has no layer but its inputs"):
        vt.inspect(keras.Model(inputs, inputs))


@pytest.mark.parametrize("taps", [3, None, [], ["block1_conv1", 3], [None]])
def test_taps_are_names(model: keras.Model, taps: Any) -> None:
    with pytest.raises(ValueError, match="Received taps=.*; expected a list of layers' names"):
        vt.FeatureExtractor(model, taps, normalization=None)


def test_taps_may_come_one_by_one(model: keras.Model) -> None:
    taps = (name for name in ("block1_conv1", "block2_conv1"))
    assert vt.FeatureExtractor(model, taps, normalization=None).taps == [  # type: ignore[arg-type]
        "block1_conv1",
        "block2_conv1",
    ]


@pytest.mark.parametrize(
    "value", [None, 255, "01", ("0", "1"), (0, 1, 2), (1, 0), (0, float("inf")), (0, float("nan"))]
)
def test_a_range_is_two_numbers(model: keras.Model, value: Any) -> None:
    with pytest.raises(ValueError, match="Received value_range=.*; expected the values of black"):
        vt.FeatureExtractor(model, ["block1_conv1"], normalization="imagenet", value_range=value)


def test_images_without_pixels_are_refused(extractor: vt.FeatureExtractor) -> None:
    with pytest.raises(ValueError, match=r"Received images of shape \(2, 3, 0, 16\); expected"):
        extractor(torch.rand(2, 3, 0, 16))
    assert extractor(torch.rand(0, 3, 16, 16))["block1_conv1"].shape == (0, 4, 16, 16)


def test_weights_of_a_loss_are_finite_numbers(extractor: vt.FeatureExtractor) -> None:
    for value in (-1, float("nan"), float("inf"), "1", None, 1j):
        with pytest.raises(ValueError, match=r"expected a number of 0 or more"):
            vt.PerceptualLoss(extractor, total_variation=value)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"expected a number of 0 or more"):
            vt.PerceptualLoss(extractor, {"block1_conv1": value})  # type: ignore[dict-item]
    loss = vt.PerceptualLoss(extractor, {"block1_conv1": np.float32(2)})  # type: ignore[dict-item]
    images = torch.rand(1, 3, 16, 16)
    one = vt.PerceptualLoss(extractor, {"block1_conv1": 1})
    assert float(loss(images, 0 * images)) == 2 * float(one(images, 0 * images)) > 0
    with pytest.raises(ValueError, match=r"content='block1_conv1'; expected weights by tap"):
        vt.PerceptualLoss(extractor, "block1_conv1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"extractor of type Functional; expected vt.Feature"):
        vt.PerceptualLoss(tiny.network(), {"a": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("size", ["224", 1.5, True, (8,), (8, 9, 3), (None, 8), (8.0, 9.0)])
def test_an_images_size_is_one_number_or_two(size: Any) -> None:
    with pytest.raises(ValueError, match="Received size=.*; expected a whole number from 1, or"):
        vt.preprocess(np.zeros((8, 8, 3), "uint8"), "imagenet", size=size)


def test_numbers_of_numpy_are_sizes() -> None:
    grey = np.zeros((8, 8, 3), "uint8")
    assert vt.preprocess(grey, "imagenet", size=np.int64(4)).shape == (1, 4, 4, 3)  # type: ignore[arg-type]
    assert vt.preprocess(grey, "imagenet", size=np.array([4, 5])).shape == (1, 4, 5, 3)  # type: ignore[arg-type]
    with keras.device("meta"):  # without memory for its 114 million weights
        made = vt.VGG11(weights=None, input_shape=(32, 32, 3), classes=np.int64(3))
    assert made.output_shape == (None, 3)


def test_what_can_be_no_images_or_predictions() -> None:
    with pytest.raises(ValueError, match="images of dtype object; expected uint8 or float"):
        vt.preprocess(np.zeros((8, 8, 3), object), "imagenet")
    with pytest.raises(ValueError, match="Received weights of type list; expected a Keras model"):
        vt.preprocess(np.zeros((8, 8, 3), "uint8"), ["imagenet"])  # type: ignore[arg-type]
    some = np.array([[0.25, 0.75]])
    with pytest.raises(ValueError, match="predictions of type NoneType; expected an array"):
        vt.decode_predictions(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Received top=1\.5; expected a whole number from 1"):
        vt.decode_predictions(some, 1.5, ["a", "b"])  # type: ignore[arg-type]
    for names in ("ab", {"a": 0, "b": 1}, 3):
        with pytest.raises(ValueError, match=r"Received categories=.*; expected a list of names"):
            vt.decode_predictions(some, categories=names)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 0}, "Received classes=0; expected a whole number from 1"),
        ({"classes": "10"}, "Received classes='10'; expected a whole number"),
        ({"dropout": None}, "Received dropout=None; expected a rate"),
        ({"dropout": "0.5"}, "Received dropout='0.5'; expected a rate"),
        ({"prefix": "a.b"}, r"Received prefix='a\.b'; expected a text without '/' and '\.'"),
        ({"batch_norm": "no"}, "Received batch_norm='no'; expected True or False"),
        ({"include_top": "no"}, "Received include_top='no'; expected True or False"),
        ({"input_shape": 32}, r"Received input_shape=32; expected \(H, W, 3\)"),
        ({"input_shape": (32, 32)}, r"input_shape=\(32, 32\); expected \(H, W, 3\)"),
        ({"input_shape": (32, 32, None)}, r"input_shape=\(32, 32, None\); expected \(H, W, 3\)"),
    ],
)
def test_arguments_of_the_constructors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vt.VGG11(**{"weights": None, **arguments})


def test_where_weights_can_be_saved(model: keras.Model, tmp_path: Path) -> None:
    for path in (None, 3, b"a.pth", "a.pt", "a.h5", tmp_path / "a.keras", tmp_path):
        with pytest.raises(ValueError, match=r"expected a name that ends in \.safetensors, \.we"):
            vt.save_weights(model, path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model\.save\(path\) writes the whole model"):
        vt.save_weights(model, "a.keras")
    with pytest.raises(ValueError, match="Received partial='False'; expected True or False"):
        vt.load_weights(model, {}, partial="False")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="1 is the name of a tensor, expected a text"):
        vt.load_weights(model, {1: torch.ones(2)})  # type: ignore[dict-item]


@pytest.mark.parametrize("form", [".safetensors", ".pth", ".weights.h5"])
def test_a_file_with_a_name_that_is_no_text_is_not_called_damaged(
    model: keras.Model, form: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a\udcff{form}"
    vt.save_weights(model, path)
    with pytest.raises(ValueError, match=r"a\\udcff.* has a name that isn't UTF-8.* Rename it"):
        vt.load_weights(model, path)


def test_what_surgery_cannot_make_anything_of(model: keras.Model) -> None:
    replace_where: Callable[..., Any] = vt.replace_where
    wrong: dict[str, Callable[[], Any]] = {
        "expects a class of layers": lambda: replace_where(model, keras.layers.ReLU(), len),
        "a function that makes a new layer of the old one, received 3": lambda: replace_where(
            model, keras.layers.Conv2D, 3
        ),
        "received a dict of no shapes": lambda: vt.with_input(model, {}),
        r"has no '/' .* and no '\.'": lambda: vt.rename(model, "left."),
        "distill_ expects a layer's name or several names": lambda: vt.distill_(
            model,
            model,
            None,  # type: ignore[arg-type]
            np.zeros((10, 8, 8, 3)),
        ),
        "Received a dict for images; expected an array": lambda: vt.compress(
            model, 2, {"a": np.zeros((20, 8, 8, 3))}
        ),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_a_file_of_weights_is_no_model(model: keras.Model, tmp_path: Path) -> None:
    for name in ("a.pth", "a.safetensors", "a.weights.h5"):
        vt.save_weights(model, tmp_path / name)
        with pytest.raises(ValueError, match=r"is a file of weights, .*vt\.load_weights\(model"):
            vt.load_model(tmp_path / name)


def test_the_command_line_speaks_of_its_option() -> None:
    assert as_options("Received size=0; expected a whole number from 1.").startswith("Received --s")
