"""What `compress` can't do, it says before it has spent any time."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from small import L, images, vgg

import vggtorch as vt
from vggtorch.models import remember_

pytestmark = pytest.mark.usefixtures("one_thread")


class Subclassed(keras.Model):
    def call(self, x):
        return x


@pytest.mark.parametrize(
    ("times", "options", "text"),
    [
        (1, {}, r"times=1; expected more than 1"),
        (float("nan"), {}, r"times=nan; expected more than 1"),
        (2, {"by": "flops"}, r"by='flops'; expected one of \('multiply-adds', 'seconds'\)"),
        (2, {"methods": []}, r"methods=\[\]; expected some of \['low rank', 'separated'"),
        (2, {"methods": ["svd"]}, r"methods=\['svd'\]; expected some of"),
        (2, {"keep": ["conv9"]}, r"keep='conv9'; the model has the layers \['input"),
        (2, {"steps": -1}, r"steps=-1; expected 0 or more"),
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


@pytest.mark.slow
def test_a_budget_out_of_reach_says_what_can_be_had():
    with pytest.raises(ValueError, match=r"times=50; this network can cost (\d+\.\d\d) times") as e:
        vt.compress(vgg(), 50, images())
    most = float(str(e.value).split("can cost ")[1].split()[0])
    _, found = vt.compress(vgg(), most - 0.01, images(), steps=0)
    assert found.times >= most - 0.01
