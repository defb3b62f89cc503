from typing import Any

import keras
import numpy as np
import pytest
import torch
import torchvision
from keras.applications.vgg16 import preprocess_input
from PIL import Image
from sklearn.datasets import load_sample_images

from vggtorch.models import as_layers, decode_predictions, preprocess, remember_, weight_set
from vggtorch.weight_sets import WEIGHT_SETS

PHOTOS = [photo.copy() for photo in load_sample_images().images]  # two, (427, 640, 3) uint8
TORCHVISION = {
    "imagenet": torchvision.models.VGG16_Weights.IMAGENET1K_V1,
    "features": torchvision.models.VGG16_Weights.IMAGENET1K_FEATURES,
}


@pytest.fixture(scope="module")
def photo_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"{i}.png" for i in range(len(PHOTOS))]
    for path, photo in zip(paths, PHOTOS, strict=True):
        Image.fromarray(photo).save(path)
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_files_and_pil_images_equal_torchvisions_transforms(name, photo_files):
    transforms = TORCHVISION[name].transforms()
    expected = torch.stack([transforms(Image.fromarray(p)) for p in PHOTOS]).movedim(1, -1).numpy()
    received = preprocess(photo_files, name)
    assert received.dtype == np.float32
    np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(preprocess([Image.fromarray(p) for p in PHOTOS], name), received)


@pytest.mark.parametrize("name", TORCHVISION)
def test_arrays_with_a_size_equal_torchvisions_transforms_of_tensors(name):
    transforms = TORCHVISION[name].transforms()
    # Of 8 bits they are resized by PIL, so that an array comes out as the file of its pixels does.
    images = [transforms(Image.fromarray(photo)) for photo in PHOTOS]
    batch = torch.from_numpy(np.stack(PHOTOS))
    received = torch.as_tensor(preprocess(batch, name, size=224))
    expected = torch.stack(images).movedim(1, -1)
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    # Floating point is resized as it is.
    resized = torchvision.transforms.functional.resize(batch.movedim(-1, 1).float(), [256])
    cropped = torchvision.transforms.functional.center_crop(resized, [224]).movedim(1, -1)
    expected = torch.as_tensor(preprocess(cropped.clamp(0, 255), name))
    received = torch.as_tensor(preprocess(batch.float(), name, size=224))
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_oxford_equals_keras_preprocess_input():
    batch = np.stack(PHOTOS)
    expected = preprocess_input(batch.astype("float32").copy(), data_format="channels_last")
    np.testing.assert_array_equal(preprocess(batch, "oxford"), expected)
    np.testing.assert_array_equal(preprocess(batch.astype("float64"), "oxford"), expected)


@pytest.mark.parametrize("name", WEIGHT_SETS)
def test_the_layers_do_what_the_function_does(name):
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, as_layers(inputs, name))
    batch = np.stack(PHOTOS)[:, :64, :64].astype("float32")
    expected = preprocess(batch, name)
    received = model(batch).cpu().numpy()
    np.testing.assert_allclose(received, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_the_layers_are_plain_keras(tmp_path):
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, as_layers(inputs, "oxford"))
    assert "vggtorch" not in str(model.get_config())


@pytest.mark.parametrize("name", WEIGHT_SETS)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_the_input_is_not_changed(name, dtype):
    batch = np.stack(PHOTOS).astype(dtype)
    before = batch.copy()
    preprocess(batch, name)
    preprocess(torch.from_numpy(batch), name)
    np.testing.assert_array_equal(batch, before)


def test_single_images_lists_and_tensors_agree():
    photo = PHOTOS[0]
    one = preprocess(photo, "imagenet")
    assert one.shape == (1, 427, 640, 3)
    read_only = load_sample_images().images[0]
    assert not read_only.flags.writeable
    np.testing.assert_array_equal(preprocess(read_only[::-1], "imagenet"), one[:, ::-1])
    np.testing.assert_array_equal(preprocess([photo, photo], "imagenet")[1:], one)
    tensor = preprocess(torch.from_numpy(photo), "imagenet")
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), one)


def test_grey_and_transparent_files_become_rgb(tmp_path):
    path = tmp_path / "grey.png"
    Image.fromarray(PHOTOS[0]).convert("LA").save(path)
    assert preprocess(path, "imagenet").shape == (1, 224, 224, 3)


def small_model(name="m", size=32):
    inputs = keras.Input((size, size, 3))
    return keras.Model(inputs, keras.layers.Conv2D(2, 3, name="c")(inputs), name=name)


def test_a_model_remembers_its_weight_set(tmp_path):
    model = remember_(small_model(), "oxford")
    path = tmp_path / "m.keras"
    model.save(path)
    for copy in (keras.models.clone_model(model), keras.models.load_model(path)):
        assert weight_set(copy) == "oxford"
    assert weight_set(remember_(model, None)) is None


def test_preprocess_for_a_model_takes_its_weight_set_and_size():
    model = remember_(small_model(), "oxford")
    image = Image.fromarray(PHOTOS[0])
    expected = preprocess(image, "oxford", size=32)
    np.testing.assert_array_equal(preprocess(image, model), expected)


def test_preprocess_for_a_model_with_its_preprocessing_inside_keeps_the_values():
    inputs = keras.Input((32, 32, 3))
    model = remember_(keras.Model(inputs, as_layers(inputs, "imagenet")), "imagenet")
    batch = PHOTOS[0][None, :32, :32]
    np.testing.assert_array_equal(preprocess(batch, model), batch.astype("float32"))


@pytest.mark.parametrize(
    ("images", "weights", "message"),
    [
        (PHOTOS[0], "caffe", "Unknown weight set 'caffe'; expected one of imagenet, features"),
        (PHOTOS[0], small_model("mine"), "'mine' does not say which weight set"),
        ([], "imagenet", "empty list"),
        (3, "imagenet", "Received int; expected a path"),
        (PHOTOS[0][..., 0], "imagenet", r"shape \(427, 640\); .* grey: pass PIL"),
        (np.zeros((2, 3, 32, 32)), "imagenet", "looks channels-first"),
        (PHOTOS[0].astype("int64"), "imagenet", "of dtype int64; .* Scale them all alike"),
        (PHOTOS[0] - 120.0, "imagenet", "expected 0 to 255. Pass the images as they are"),
        (np.full((4, 4, 3), np.nan), "imagenet", "values from nan"),
        (PHOTOS[0] / 255.0, "imagenet", "look scaled to 0 to 1"),
        ([PHOTOS[0], PHOTOS[0][:9]], "imagenet", "different sizes .* Pass size=224"),
        (np.array([["cat"]], object), "imagenet", "of dtype object; expected uint8 or float"),
        (np.ma.masked_equal(PHOTOS[0], 0), "imagenet", "a masked array; expected one without"),
        ("https://a.b/cat.jpg", "imagenet", "https://a.b/cat.jpg: it is an address, not a file"),
    ],
)
def test_what_cannot_be_right_is_refused(images, weights, message):
    with pytest.raises(ValueError, match=message):
        preprocess(images, weights)


@pytest.mark.parametrize("size", [0, -1, 8.5, "8", True, (8,), (8, 9, 3), (8, 0)])
def test_a_size_is_one_whole_number_or_two(size):
    with pytest.raises(
        ValueError, match=r"Received size=.*; expected a whole number from 1, or he"
    ):
        preprocess(PHOTOS[0], "imagenet", size=size)
    with pytest.raises(ValueError, match="size=100000; expected at most 134,217,728 pixels"):
        preprocess(PHOTOS[0], "imagenet", size=100_000)
    eight: Any = np.int64(8)
    assert preprocess(PHOTOS[0], "imagenet", size=eight).shape == (1, 8, 8, 3)


def test_decode_predictions():
    scores = np.zeros((2, 1000), "float32")
    scores[0, [281, 282]] = 0.75, 0.25
    scores[1, 0] = 1
    first, second = decode_predictions(scores, top=2)
    assert first == [(281, "tabby", 0.75), (282, "tiger cat", 0.25)]
    assert second[0] == (0, "tench", 1.0)
    with pytest.raises(ValueError, match=r"shape \(2, 10\); expected \(N, 1000\)"):
        decode_predictions(scores[:, :10])
    with pytest.raises(ValueError, match="apply softmax"):
        decode_predictions(scores * 9)
    assert decode_predictions(np.array([[0.2, 0.8]]), 5, ["no", "yes"])[0][0][:2] == (1, "yes")
    with pytest.raises(ValueError, match="top=0"):
        decode_predictions(scores, top=0)
