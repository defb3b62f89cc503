"""keras.applications in an inference engine: what is left out, padded inside and recorded."""

from __future__ import annotations

from typing import Any

import applications
import keras
import pytest
import torch
from precision import needs_onednn
from small_vgg import FUSED, operations, randomise

import vggtorch as vt
from vggtorch.lowering import has_fused_ops

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread"), needs_onednn]


def built(name: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    return randomise(applications.cloned_beginning(name))


@pytest.mark.parametrize("name", applications.NETWORKS)
def test_engines_compute_what_keras_does(name: str) -> None:
    model = built(name)
    x = 255 * torch.rand(3, *model.input_shape[1:])
    expected: Any = model(x, training=False)
    engine = vt.optimize_for_inference(model)
    found = engine(x)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert torch.equal(engine(x), found)
    if has_fused_ops(x, torch.bfloat16):
        half = vt.optimize_for_inference(model, dtype=torch.bfloat16)
        assert (half(x) - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["VGG16", "ResNet50", "MobileNetV2", "InceptionV3"])
def test_no_convolution_is_left_outside_of_the_graphs(name: str) -> None:
    model = built(name)
    x = torch.rand(2, *model.input_shape[1:])
    engine = vt.optimize_for_inference(model)
    engine(x)
    assert FUSED not in operations(engine, x)
