"""The picture shows the images that the first step trains on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import vggtorch as vt
from vggtorch.cli import main
from vggtorch.training import batch_view, data, loop, mixing, pictures
from vggtorch.training.batch_view import EDGE, GAP, TEXT, _seen, show_batch
from vggtorch.training.reading import Batch


class Seen(BaseException):
    pass


def first_batch(monkeypatch, *arguments) -> Batch:
    """What a run's first step gets."""

    def step(state, module, batch, *_):
        raise Seen(batch)

    with monkeypatch.context() as patch, pytest.raises(Seen) as seen:
        patch.setattr(loop, "train_step_", step)
        vt.finetune(*arguments)
    return seen.value.args[0]


def cell(sheet: Image.Image, place: int, columns: int) -> np.ndarray:
    left = GAP + place % columns * (EDGE + GAP)
    top = GAP + place // columns * (EDGE + TEXT + GAP)
    return np.asarray(sheet.crop((left, top, left + EDGE, top + EDGE)))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"augment": "trivial"}, {"cutmix": 1.0, "mixup": 0.5}])
def test_it_is_the_first_batch_of_a_run(images, config, settings, monkeypatch):
    config = dataclasses.replace(config, image_size=EDGE, cache=False, **settings)
    model = tiny.network(size=EDGE)
    batch = first_batch(monkeypatch, model, images, None, config)
    sheet = show_batch(model, images, config, count=5)
    expected = batch.images
    if batch.partners is not None:
        others, labels = batch.partners
        expected, _ = mixing.mixed(
            expected.float(), batch.labels, (others.float(), labels), 3, config, 0
        )
        expected = expected.round().byte()
    for place in range(5):
        np.testing.assert_array_equal(cell(sheet, place, 3), expected[place])


@pytest.mark.slow
def test_features_that_are_kept_show_the_copies_that_they_are_of(images, config):
    """Without augmented copies an epoch sees the plain images, and with two the mirrored too."""
    model = tiny.network(size=EDGE)
    source = data.read_folder(images, EDGE)
    plain = {source[[(i, 0)]][0][0].numpy().tobytes() for i in range(len(source))}
    for copies in (1, 2):
        changed = dataclasses.replace(
            config, image_size=EDGE, freeze="block1_pool", augment="flip", cache_copies=copies
        )
        sheet = show_batch(model, images, changed, count=6)
        shown = [cell(sheet, place, 3) for place in range(6)]
        assert all(image.tobytes() in plain or image[:, ::-1].tobytes() in plain for image in shown)
        assert all(image.tobytes() in plain for image in shown) == (copies == 1)
    assert all(layer.trainable for layer in model.layers)


def test_no_images_and_an_epoch_before_the_first_are_refused(images, config):
    with pytest.raises(ValueError, match="Received count=0; expected a whole number from 1"):
        show_batch(tiny.network(), images, config, count=0)
    with pytest.raises(ValueError, match="Received epoch=-1; expected a whole number from 0"):
        show_batch(tiny.network(), images, config, epoch=-1)


def test_labels_with_accents_are_drawn_by_any_font(monkeypatch):
    plain, accents = (
        batch_view._sheet([np.zeros((8, 8, 3), np.uint8)], [text]) for text in ("Jäger", "Jager")
    )
    monkeypatch.setattr(batch_view, "FONTS", ())
    by_default = [
        np.asarray(batch_view._sheet([np.zeros((8, 8, 3), np.uint8)], [text]))
        for text in ("Jäger", "Jager")
    ]
    np.testing.assert_array_equal(by_default[0], by_default[1])  # an a, and no empty box
    assert plain.size == accents.size


def test_labels_of_mixed_images_are_shares():
    images, labels = torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.tensor([0, 1])
    batch = Batch(images, labels, 2, (images.roll(1, 0), labels.roll(1, 0)))
    config = vt.TrainConfig(mixup=0.5)
    pairs = images.float(), labels.roll(1, 0)
    _, shares = mixing.mixed(images.float(), labels, pairs, 2, config, 0)
    _, texts = _seen(batch, ("cat", "dog"), config, 0)
    large, small = sorted(shares[0].tolist(), reverse=True)
    first, second = ("cat", "dog") if shares[0, 0] > shares[0, 1] else ("dog", "cat")
    assert texts[0] == f"{first} {large:.0%}, {second} {small:.0%}"
    assert _seen(Batch(images, labels, 2), ("cat", "dog"), config, 0)[1] == ["cat", "dog"]


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_the_command_draws_it(tmp_path, capsys, images):
    weights = tmp_path / "random.safetensors"
    vt.save_weights(vt.VGG11(weights=None, include_top=False, input_shape=(32, 32, 3)), weights)
    options = ["--architecture", "vgg11", "--weights", str(weights), "--image-size", "32"]
    picture = tmp_path / "seen.png"
    shown = ["--picture", str(picture), "--count", "4", "-b", "8"]
    assert main(["show_batch", str(images), *options, *shown]) == 0
    model = vt.VGG11(weights=weights, include_top=False, input_shape=(32, 32, 3))
    expected: Any = show_batch(model, images, count=4, batch_size=8)
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), np.asarray(expected))
    assert main(["show_batch", str(images), *options, *shown, "--lr", "0.1"]) == 0
    assert "Without effect on the picture: --learning-rate." in capsys.readouterr().out
    assert main(["show_batch", str(images), *options, "--count", "0"]) == 1
    assert "Received --count 0" in capsys.readouterr().err


def test_a_picture_of_a_narrow_image_is_a_line_at_least():
    for shape, size in (((1, 400, 3), (192, 1)), ((400, 1, 3), (1, 192)), ((9, 18, 3), (192, 96))):
        tag = pictures.img(np.zeros(shape, np.uint8), "a strip")
        assert f'<img width="{size[0]}" height="{size[1]}"' in tag
