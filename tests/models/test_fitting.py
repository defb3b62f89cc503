"""One geometry: by timm's names and pixels, the same for files, PIL images and arrays, kept."""

from __future__ import annotations

import copy
import dataclasses

import keras
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import vggtorch as vt
from vggtorch.models import fitted, fitted_arrays, read_image, recipe, remember_
from vggtorch.weight_sets import DataConfig

PHOTO = load_sample_images().images[0]  # (427, 640, 3) uint8
SIZES = [(427, 640), (200, 90), (97, 97), (31, 64), (40, 300)]
GEOMETRIES = [
    DataConfig(),
    DataConfig(interpolation="bicubic", crop_pct=1.0),
    DataConfig(crop_mode="squash", crop_pct=1.0),
    DataConfig(crop_mode="squash", interpolation="bicubic"),
    DataConfig(crop_mode="border", crop_pct=1.0, fill=(1, 2, 3)),
    DataConfig(crop_mode="border", interpolation="bicubic"),
]


def name(config: DataConfig) -> str:
    return f"{config.crop_mode}-{config.crop_pct}-{config.interpolation}"


def photo(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(PHOTO).resize(size[::-1])


@pytest.mark.parametrize("target", [(96, 96), (64, 112)])
@pytest.mark.parametrize("config", GEOMETRIES, ids=name)
def test_every_geometry_is_timms(config, target):
    create_transform = pytest.importorskip("timm.data").create_transform
    theirs = create_transform(
        (3, *target), interpolation=config.interpolation, crop_pct=config.crop_pct,
        crop_mode=config.crop_mode, mean=tuple(value / 255 for value in config.fill),
        normalize=False,
    )  # fmt: skip
    for size in SIZES:
        image = photo(size)
        expected = theirs(image).movedim(0, -1)  # CHW -> HWC
        assert expected.dtype == torch.uint8
        np.testing.assert_array_equal(np.asarray(fitted(image, config, target)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("target", [(96, 96), (64, 112)])
@pytest.mark.parametrize("config", GEOMETRIES, ids=name)
def test_the_recipe_does_the_same_without_us(config, target, tmp_path):
    code = recipe(config, target)
    assert "vggtorch" not in code and "torch" not in code
    names: dict = {}
    exec(code, names)
    for size in [*SIZES, target]:
        photo(size).save(tmp_path / "a.png")
        expected = np.asarray(fitted(photo(size), config, target), np.float32)
        np.testing.assert_array_equal(names["prepared"](tmp_path / "a.png"), expected)


def test_the_recipe_reads_every_kind_of_image_as_we_do(tmp_path):
    """What is transparent shows white, photographs stand upright, CMYK and palettes are RGB."""
    config = DataConfig(crop_pct=1.0)
    names: dict = {}
    exec(recipe(config, (32, 32)), names)
    image, clear = photo((48, 40)), Image.linear_gradient("L").resize((40, 48))
    turned = Image.Exif()
    turned[0x0112] = 6
    for file, made, options in (
        ("alpha.png", Image.merge("RGBA", (*image.split(), clear)), {}),
        ("grey.png", Image.merge("LA", (image.convert("L"), clear)), {}),
        ("key.png", image, {"transparency": image.getpixel((3, 3))}),
        ("palette.png", image.convert("P"), {"transparency": 7}),
        ("palette.gif", image.convert("P"), {"transparency": 7}),
        ("cmyk.jpg", image.convert("CMYK"), {}),
        ("bits.png", image.convert("1"), {}),
        ("turned.jpg", image, {"exif": turned}),
        ("turned.png", Image.merge("RGBA", (*image.split(), clear)), {"exif": turned}),
    ):
        made.save(tmp_path / file, **options)
        expected = fitted(read_image(tmp_path / file), config, (32, 32))
        found = names["prepared"](tmp_path / file)
        np.testing.assert_array_equal(found, np.asarray(expected, np.float32), err_msg=file)
    deep = np.asarray(image.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    with pytest.raises(AssertionError, match=r"save .*deep.png with 8 bits, np\.uint8"):
        names["prepared"](tmp_path / "deep.png")


@pytest.mark.parametrize("config", GEOMETRIES, ids=name)
def test_files_pil_images_and_arrays_come_out_the_same(config, tmp_path):
    config = dataclasses.replace(config, weight_set="oxford", input_size=(3, 48, 56))
    image = photo((200, 90))
    image.save(tmp_path / "a.png")
    pixels = np.asarray(image)
    expected = vt.preprocess(tmp_path / "a.png", config)
    assert expected.shape == (1, 48, 56, 3)
    for same in (image, pixels, pixels[None]):
        np.testing.assert_array_equal(vt.preprocess(same, config), expected)
    tensor = vt.preprocess(torch.from_numpy(pixels.copy()), config)
    np.testing.assert_array_equal(tensor, expected)
    # Floating point isn't rounded to 8 bits between the two directions, as PIL does it.
    floats = vt.preprocess(pixels.astype(np.float32), config)
    np.testing.assert_allclose(floats, expected, atol=2.01)


@pytest.mark.parametrize("config", GEOMETRIES, ids=name)
def test_an_image_that_has_the_size_is_not_touched(config):
    image = photo((96, 64))
    assert fitted(image, config, (96, 64)) is image
    batch = torch.from_numpy(np.asarray(image).copy())[None]
    assert fitted_arrays(batch, config, (96, 64)) is batch


def small_model(size=32, **layer):
    inputs = keras.Input((size, size, 3))
    x = keras.layers.Conv2D(2, 3, name="conv", **layer)(inputs)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, keras.layers.Dense(2, name="classes")(x), name="m")


KEPT = DataConfig(
    "oxford", input_size=(3, 32, 32), crop_mode="border", crop_pct=1.0, interpolation="bicubic",
    label_names=("cat", "dog"),
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return remember_(small_model(), KEPT)


@pytest.mark.slow
def test_a_model_keeps_its_geometry_through_saving_cloning_copying_and_surgery(model, tmp_path):
    model.save(tmp_path / "m.keras")
    replaced = vt.replace(model, "conv", keras.layers.Conv2D(2, 3, name="other"))
    for kept in (
        model, keras.saving.load_model(tmp_path / "m.keras"), keras.models.clone_model(model),
        copy.deepcopy(model), replaced,
    ):  # fmt: skip
        assert vt.data_config(kept) == KEPT
        assert vt.weight_set(kept) == "oxford"
    assert vt.data_config(small_model()) == DataConfig(input_size=(3, 32, 32))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: vt.truncate(m, "pool"),
        lambda m: vt.stack(vt.truncate(m, "pool"), keras.layers.Dense(2, name="new")),
        lambda m: vt.replace(m, "classes", keras.layers.Dense(2, name="new")),
        lambda m: vt.stack(m, keras.layers.Dense(2, name="new")),
    ],
)
def test_labels_go_with_the_output_that_they_name(model, change):
    assert vt.data_config(change(model)) == dataclasses.replace(KEPT, label_names=())


def test_preprocess_does_what_the_model_remembers(model):
    image = photo((200, 90))
    expected = keras.applications.vgg16.preprocess_input(
        np.asarray(fitted(image, KEPT, (32, 32)), np.float32)
    )
    np.testing.assert_array_equal(vt.preprocess(image, model)[0], expected)
    np.testing.assert_array_equal(vt.preprocess(np.asarray(image), model)[0], expected)


def test_numbers_follow_from_the_weight_set():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 3), np.uint8)
    for weight_set in ("imagenet", "features", "oxford"):
        config = DataConfig(weight_set)
        x = pixels[..., ::-1] if config.channel_order == "bgr" else pixels
        expected = (x / 255 - np.array(config.mean)) / np.array(config.std)
        found = vt.preprocess(pixels, weight_set)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    inside = DataConfig("oxford", preprocessing_inside=True)
    assert (inside.mean, inside.std, inside.channel_order) == ((0,) * 3, (1 / 255,) * 3, "rgb")
    assert DataConfig.from_dict(KEPT.as_dict()) == KEPT


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_mode": "crop"}, "crop_mode='crop'; expected one of 'center', 'squash', 'border'"),
        ({"interpolation": "cubic"}, "interpolation='cubic'; expected one of 'bilinear'"),
        ({"crop_pct": 1.5}, r"crop_pct=1.5; expected a number above 0 and at most 1"),
        ({"input_size": (96, 96)}, r"input_size=\(96, 96\); expected \(3, height, width\)"),
        ({"weight_set": "caffe"}, "Unknown weight set 'caffe'"),
    ],
)
def test_what_cannot_be_right_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**arguments)
