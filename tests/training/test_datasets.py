"""What a Dataset gives is trained on as it is meant, or refused before anything is trained."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas
import pytest
import tiny
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset, random_split
from torchvision.datasets import ImageFolder

import vggtorch as vt
from vggtorch.models import remember_
from vggtorch.training import settle_config
from vggtorch.training.advice import planned

PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), np.uint8))
LABELS = torch.arange(12) % 3


def loss(data: Any, config: Any, weight_set: str | None = "imagenet", **settings: Any) -> float:
    model = tiny.network(dropout=0)
    if weight_set:
        model = remember_(model, weight_set)
    return vt.finetune(model, data, config=config, epochs=1, **settings).epochs[0]["loss"]


@pytest.mark.parametrize("weight_set", ["imagenet", "features", "oxford"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.long(), r"images of torch\.int64; expected uint8 RGB, or .*`\.to\(torch.uint"),
        (lambda x: x.float(), r"values from 0 to 255; expected uint8 RGB, .* with values from -"),
        (lambda x: x.float() / 255, r"values from 0 to 1, which look scaled to 0 to 1; expected"),
        (lambda x: x.float() * torch.nan, "with NaN or infinite values; expected"),
        (lambda x: x.float() * 100 - 9e3, "values from -9e.03 to .*; expected"),
    ],
    ids=["whole", "float", "to 1", "nan", "far"],
)
def test_values_that_are_neither_pixels_nor_ready_are_refused(config, weight_set, change, message):
    with pytest.raises(ValueError, match=message):
        loss(TensorDataset(change(PIXELS), LABELS), config, weight_set)


@pytest.mark.slow
def test_values_of_other_weights_are_refused_and_ready_ones_with_noise_are_not(config, tmp_path):
    of_minus_1 = PIXELS.float() / 127.5 - 1
    with pytest.raises(ValueError, match="from -1 to 1, which look scaled to -1 to 1; expected"):
        loss(TensorDataset(of_minus_1, LABELS), config, "oxford")
    normalised = torch.as_tensor(vt.preprocess(PIXELS, "imagenet"))
    for caffe in ("oxford", "features"):
        with pytest.raises(ValueError, match="2.64, which look normalised as for 'imagenet'; ex"):
            loss(TensorDataset(normalised, LABELS), config, caffe)
    oxford = torch.as_tensor(vt.preprocess(PIXELS, "oxford"))
    with pytest.raises(ValueError, match="values from -124 to 151; expected .* from -2.12 to 2.64"):
        loss(TensorDataset(oxford, LABELS), config)
    noise = torch.randn(PIXELS.shape, generator=torch.Generator().manual_seed(0))
    ready = torch.as_tensor(vt.preprocess(PIXELS, "imagenet")) + 0.5 * noise
    assert np.isfinite(loss(TensorDataset(ready, LABELS), config))


@pytest.mark.slow
def test_labels_as_keras_s_data_sets_have_them(config, tmp_path):
    expected = loss(TensorDataset(PIXELS, LABELS), config)
    for i, labels in enumerate((LABELS[:, None], LABELS.float(), LABELS.to(torch.uint8))):
        found = loss(TensorDataset(PIXELS, labels), config, output_dir=str(tmp_path / f"{i}"))
        assert found == expected


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.nn.functional.one_hot(LABELS),
            r"have the shape \(\d+, 3\); expected .*`labels.argmax\(-1\)`.* cutmix=1.0, not in the",
        ),
        (LABELS + 0.5, r"gives the label 0\.5; expected a whole number from 0\."),
        (LABELS * torch.nan, "gives the label nan; expected a whole"),
        (LABELS - 1, "gives the label -1; expected a whole number from 0"),
        (LABELS + 3, "labels from 3 to 5; expected 0 to 2, as tiny puts out 3"),
    ],
)
def test_labels_that_are_no_numbers_of_classes_are_refused_first(config, labels, message):
    wrong, right = TensorDataset(PIXELS, labels), TensorDataset(PIXELS, LABELS)
    for data in (wrong, {"train": right, "validation": wrong}, {"train": right, "test": wrong}):
        with pytest.raises(ValueError, match=message):
            loss(data, config)
    assert not (Path(config.output_dir) / "last.pt").exists()


def test_labels_of_a_data_set_that_is_not_read_before_are_refused_too(config):
    class Named(TensorDataset):
        content_name = "named"

    right, wrong = Named(PIXELS, LABELS), Named(PIXELS, LABELS + 3)
    with pytest.raises(ValueError, match="Received labels from 3 to 5; expected 0 to 2"):
        loss({"train": right, "validation": wrong}, config)


@pytest.mark.parametrize(
    ("image", "hint"),
    [
        (PIXELS[0, :12], "12, 16, 3); tiny takes 16x16x3. Give PIL images, which are brought to"),
        (PIXELS[0, ..., 0], "shape (16, 16); tiny takes 16x16x3. Give PIL"),
        (PIXELS[0, None, ..., 0], "(1, 16, 16); tiny takes 16x16x3. Give PIL"),
        (PIXELS[:4], "(4, 16, 16, 3) as the shape of an image; expected one of three axes."),
    ],
)
def test_images_of_another_shape_are_refused(config, image, hint):
    data: Any = [(image, i % 3) for i in range(6)]
    for look in (vt.finetune, vt.find_learning_rate, vt.show_batch):
        with pytest.raises(ValueError) as refused:
            look(tiny.network(), data, config=config)
        assert hint in str(refused.value)


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (("a/0.png", 0), r"gives 'a/0.png' as an image; expected pixels. Open it .*a table of"),
        ((Path("a/0.png"), 0), "gives 'a/0.png' as an image; expected pixels"),
        ((png(), 0), "gives bytes as an image; expected a PIL image, .*cast_column"),
        ({"image": {"bytes": png(), "path": None}, "label": 0}, "gives dict as an image; expected"),
        ((None, 0), "gives None as an image; expected a PIL image"),
        ((PIXELS[0], None), "gives None as a label; expected a number from 0"),
        (
            (PIXELS[0], [0, 1]),
            r"(of several values|have the shape|1 images and 2 labels).*; expected (one|as)",
        ),
        ((PIXELS[0], [[0], [1, 2]]), "gives labels of several values .*; expected one number"),
    ],
)
def test_items_that_hold_no_image_or_no_label_are_refused(config, item, message):
    for data in ([item] * 4, iter([item] * 4)):
        with pytest.raises(ValueError, match=message):
            loss(data, config)


def test_images_of_different_shapes_are_refused_and_pil_images_are_brought_to_one(config):
    arrays = [(PIXELS[i, : 16 - i % 2].numpy(), i % 3) for i in range(6)]
    with pytest.raises(ValueError, match=r"different shapes \[\(15, 16, 3\), \(16, 16, 3\)\], wh"):
        loss(arrays, config)
    assert np.isfinite(loss([(Image.fromarray(image), label) for image, label in arrays], config))


def test_what_is_no_data_set_or_has_no_batches_is_refused(config):
    frame = pandas.DataFrame({"path": ["a.png"], "label": ["a"]})
    with pytest.raises(ValueError, match=r"Received a DataFrame; expected .*\.to_csv\('labels.csv"):
        loss(frame, config)
    with pytest.raises(ValueError, match="Received a bytes; expected a Path or a text"):
        loss(b"photos", config)
    with pytest.raises(ValueError, match="a dictionary of 'val' as one part of the data; expected"):
        loss({"train": TensorDataset(PIXELS, LABELS), "val": {"val": PIXELS}}, config)
    with pytest.raises(ValueError, match="Received an empty list_iterator; expected images"):
        loss(iter([]), config)
    loader = DataLoader(TensorDataset(PIXELS, LABELS), batch_size=50, drop_last=True)
    with pytest.raises(ValueError, match="no batch of its 12 images.* a smaller batch_size, or"):
        loss(loader, config)


@pytest.mark.slow
def test_parts_of_a_data_set_have_its_classes(images, config):
    folder = ImageFolder(str(images))
    train, held = random_split(folder, [18, 6], generator=torch.Generator().manual_seed(0))
    base = remember_(tiny.network(None), "imagenet")
    settings: dict[str, Any] = {"config": config, "head": "linear", "cut": "block2_pool"}
    history = vt.finetune(base, ConcatDataset([train, Subset(train, [0])]), held, **settings)
    assert history.classes == ("blue", "green", "red")
    assert history.model.output_shape == (None, 3)
    assert isinstance(history.model, keras.Model)


@pytest.mark.slow
def test_a_part_with_the_first_classes_alone_fits_a_model_of_so_many(images, config, tmp_path):
    other = str(tmp_path / "other")
    folder = ImageFolder(str(images))
    few = Subset(folder, [i for i, label in enumerate(folder.targets) if label < 2])
    model = remember_(tiny.network(2), "imagenet")
    history = vt.finetune(model, few, few, config=config)
    assert history.classes == history.data_config.label_names == ("blue", "green")
    assert vt.find_learning_rate(model, few, config, steps=3).rates
    with pytest.raises(ValueError, match="Received labels from 0 to 2; expected 0 to 1, as"):
        vt.finetune(model, Subset(folder, range(len(folder))), config=config, output_dir=other)
    with pytest.raises(ValueError, match=r"The data has 3 classes \(blue, green, red\)"):
        vt.finetune(model, folder, config=config, output_dir=other)


def test_an_image_that_can_t_be_taken_is_numbered(config):
    images = [(Image.new("RGB", (9, 9)), 0), (Image.new("F", (9, 9), 0.5), 1)]
    for data, kind in ((images, "Dataset"), (iter(images), "stream")):
        with pytest.raises(ValueError, match=f"Image 1 of the {kind} can't be taken: it has float"):
            loss(data, config)


@pytest.mark.slow
def test_settings_of_files_are_said_to_do_nothing_to_a_dataset(config, tmp_path):
    settings: dict[str, Any] = {"augment": "crop", "label_pattern": "(.)", "validation_split": 0.5}
    with pytest.warns(UserWarning, match=r"Dataset: augment='crop', label_pattern='\(.\)', valid"):
        loss(TensorDataset(PIXELS, LABELS), config, **settings)
    given = {"train": TensorDataset(PIXELS, LABELS), "val": TensorDataset(PIXELS, LABELS)}
    with pytest.warns(UserWarning, match="^Without effect on a Dataset: on_unreadable='skip'[.] "):
        loss(given, config, on_unreadable="skip", validation_split=0.5, output_dir=str(tmp_path))


def test_the_plan_for_a_dataset_mirrors_and_holds_out_nothing(images):
    for train, mirrored in (
        ({"training": str(images)}, True),
        (ImageFolder(images), False),
        ({"train": ImageFolder(images)}, False),
    ):
        config = settle_config(tiny.network(None), train, None, {})
        assert (config.augment, config.cache_copies) == (("flip", 2) if mirrored else ("none", 1))
        assert ("mirror image" in str(config)) is mirrored
    many = planned(["block5_pool"], 3000, 10, None, {}, are_files=False)
    assert many.validation_split == 0.2 and "Hold out a tenth" not in str(many)
