"""What `compress` can't do, it says before it has spent any time."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
import torch
from small import L, images, vgg

import vggtorch as vt
from vggtorch.models import remember_
from vggtorch.surgery import names_when_flat

pytestmark = pytest.mark.usefixtures("one_thread")


class Subclassed(keras.Model):
    def call(self, x):
        return x


@pytest.mark.parametrize(
    ("times", "options", "text"),
    [
        (1, {}, r"times=1; expected a number above 1"),
        (float("nan"), {}, r"times=nan; expected a number above 1"),
        (float("inf"), {}, r"times=inf; expected a number above 1"),
        ("2", {}, r"times='2'; expected a number above 1"),
        (True, {}, r"times=True; expected a number above 1"),
        (2, {"by": "flops"}, r"by='flops'; expected one of \('multiply-adds', 'seconds'\)"),
        (2, {"methods": []}, r"methods=\[\]; expected some of \['low rank', 'separated'"),
        (2, {"methods": ["svd"]}, r"methods=\['svd'\]; expected some of"),
        (2, {"methods": "svd"}, r"methods=\['svd'\]; expected some of"),
        (2, {"methods": None}, r"methods=\[\]; expected some of"),
        (2, {"keep": ["conv9"]}, r"keep='conv9'; 'small' has no layer 'conv9'.*Its layers: input"),
        (2, {"keep": "block1_conv"}, r"keep='block1_conv'.*Did you mean .*block1_conv1"),
        (2, {"keep": [3]}, r"keep=3; compress expects the name of one layer, received 3"),
        (2, {"steps": -1}, r"steps=-1; expected a whole number from 0"),
        (2, {"steps": 2.5}, r"steps=2.5; expected a whole number from 0"),
        (2, {"seconds": -1}, r"seconds=-1; expected a number from 0"),
        (2, {"seconds": float("nan")}, r"seconds=nan; expected a number from 0"),
        (2, {"seconds": "60"}, r"seconds='60'; expected a number from 0"),
        (2, {"seed": None}, r"seed=None; expected a whole number from 0"),
        (2, {"folder": __file__}, r"refusals.py is a file; name a folder"),
    ],
)
def test_arguments(times, options, text):
    with pytest.raises(ValueError, match=text):
        vt.compress(vgg(), times, images(), **options)


def test_a_subclassed_model():
    with pytest.raises(ValueError, match="subclassed model"):
        vt.compress(Subclassed(), 2, images())


def test_a_model_with_nothing_to_replace():
    inputs = keras.Input((24, 24, 3))
    model = keras.Model(inputs, L.Conv2D(8, 3)(inputs))
    with pytest.raises(ValueError, match="no layer that could be replaced"):
        vt.compress(model, 2, images())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x: x[:19], r"19 images; expected 20 at least"),
        (lambda x: x[:, :20], r"shape \(40, 20, 24, 3\); expected \(None, 24, 24, 3\)"),
        (lambda x: x / np.float32("nan"), "NaN or infinite"),
        (
            lambda x: np.abs(x) % 256 + 40,
            r"from 40 to .*which are outside of it; expected -123.7 to",
        ),
        (lambda x: np.abs(x) % 256 / 255, r"to \S+, which is what unprocessed images look like"),
        (lambda x: x / 255, r"unprocessed images look like.*vt.preprocess\(images, 'oxford'\)"),
    ],
)
def test_images(change, text):
    model = remember_(vgg(), "oxford")
    with pytest.raises(ValueError, match=text):
        vt.compress(model, 2, change(np.clip(images(), -100, 120)))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (lambda x: None, r"Received NoneType for images; expected an array or tensor"),
        (
            lambda x: "photos",
            r"Received the path 'photos' for images.*vt.preprocess\(\[path, ...\]",
        ),
        (lambda x: [Path("a.jpg"), "b.jpg"], r"Received the path 'a.jpg' for images"),
        (lambda x: [(image, 0) for image in x], r"a tuple of 2 for an image.*Leave labels out"),
        (lambda x: [{"pixels": image} for image in x], r"a dict of 1 for an image"),
        (lambda x: [object() for image in x], r"Received object for an image; expected an array"),
        (lambda x: x[:1].repeat(30, 0), r"30 images that are all the same; expected images of"),
        (lambda x: x[0], r"of shape \(24, 24, 3\); expected \(None, 24, 24, 3\)"),
        (lambda x: [x[:8], x[8:16]], r"Received 16 images; expected 20 at least"),
    ],
)
def test_what_is_no_set_of_images(given, text):
    with pytest.raises(ValueError, match=text):
        vt.compress(vgg(), 2, given(images()))


@pytest.mark.slow
def test_images_may_come_in_batches_as_a_loader_gives_them():
    batches = list(torch.utils.data.DataLoader(list(torch.from_numpy(images())), batch_size=16))  # type: ignore[arg-type]
    results = [vt.compress(vgg(), 2, x, steps=0)[0].get_weights() for x in (images(), batches)]
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


def two_of_a_name() -> keras.Model:
    """Two nested models, whose layers have the same names."""
    inputs = keras.Input((24, 24, 3))
    parts = [vt.truncate(vgg(), "block1_pool") for _ in range(2)]
    for part, name in zip(parts, ("left", "right"), strict=True):
        part.name = name
    joined = L.Concatenate(name="both")([part(inputs) for part in parts])
    return keras.Model(inputs, L.Conv2D(16, 1, name="last")(joined), name="outer")


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (["right/block1_conv2"], {"right_block1_conv2"}),
        ("left", {"left_block1_conv1", "left_block1_conv2"}),
        (["last"], {"last"}),
    ],
)
def test_layers_of_nested_models_are_kept_by_their_full_names(keep, kept):
    model = two_of_a_name()
    sites = {"last"} | {f"{side}_block1_conv{n}" for side in ("left", "right") for n in (1, 2)}
    every = [keep] if isinstance(keep, str) else keep
    assert sites & set(names_when_flat(model, every, "compress")) == kept


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        ("block1_conv2", r"stands in 2 nested models of 'outer'. Pass its full name: 'left/block1"),
        ("middle/block1_conv2", r"'outer' has no layer 'middle/block1_conv2'"),
    ],
)
def test_a_name_in_keep_that_could_be_several_layers_or_none(keep, text):
    with pytest.raises(ValueError, match=f"Received keep='{keep}'; .*{text}"):
        vt.compress(two_of_a_name(), 2, images(), keep=keep)


def test_a_model_that_takes_no_floats():
    inputs = keras.Input((16,), dtype="int32")
    model = keras.Model(inputs, L.Dense(64)(L.Embedding(100, 64)(inputs)))
    with pytest.raises(
        ValueError, match="Received a model that takes int32; expected one of floats"
    ):
        vt.compress(model, 2, np.arange(320).reshape(20, 16) % 100)


def test_images_of_a_size_that_does_not_go_through():
    inputs = keras.Input((None, None, 3))
    x = L.UpSampling2D()(L.Conv2D(3, 3, strides=2, padding="same")(inputs))
    model = keras.Model(inputs, L.Conv2D(32, 3)(L.Add()([x, inputs])), name="halved")
    with pytest.raises(ValueError, match=r"'halved' can't compute images of shape \(3, 23, 23\)"):
        vt.compress(model, 2, images(size=23))


def test_weights_that_are_not_finite():
    model = vgg()
    last = model.get_layer("block3_conv2")
    last.set_weights([np.nan * weights for weights in last.get_weights()])
    with pytest.raises(ValueError, match="'small' gives NaN or infinite values for these images"):
        vt.compress(model, 2, images())


@pytest.mark.slow
def test_a_budget_out_of_reach_says_what_can_be_had():
    with pytest.raises(ValueError, match=r"times=50; this network can cost (\d+\.\d\d) times") as e:
        vt.compress(vgg(), 50, images())
    most = float(str(e.value).split("can cost ")[1].split()[0])
    _, found = vt.compress(vgg(), most - 0.01, images(), steps=0)
    assert found.times >= most - 0.01
