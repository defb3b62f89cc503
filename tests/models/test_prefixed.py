"""Two VGGs in one model, each under a prefix, with published weights."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch

from vggtorch.models import (
    VGG11,
    filling,
    load_weights,
    named_variables,
    preprocess,
    save_weights,
    weight_set,
)
from vggtorch.surgery import truncate

pytestmark = pytest.mark.usefixtures("narrow_throughout")
SHAPE = (32, 32, 3)


@pytest.fixture(scope="module")
def published(tmp_path_factory, narrow_throughout):
    """A checkpoint of VGG11 that says its weight set, and the network that it is of."""
    path = tmp_path_factory.mktemp("published") / "vgg11.safetensors"
    model = VGG11(weights=None, include_top=False, input_shape=SHAPE)
    from vggtorch.models import remember_

    save_weights(remember_(model, "oxford"), path)
    return path, model


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", [False, True])
def test_layers_have_the_prefix_in_all_names(batch_norm):
    options = {"include_top": False, "input_shape": SHAPE, "batch_norm": batch_norm}
    plain = VGG11(weights=None, **options)
    model = VGG11(weights=None, prefix="my_bn_", **options)
    assert [layer.name for layer in model.layers[1:]] == [
        f"my_bn_{layer.name}" for layer in plain.layers[1:]
    ]
    assert list(named_variables(model)) == [f"my_bn_{key}" for key in named_variables(plain)]


@pytest.mark.slow
def test_two_networks_in_one_model_load_published_weights(published, tmp_path, monkeypatch):
    path, reference = published
    options = {"include_top": False, "input_shape": SHAPE, "weights": path}
    left = VGG11(prefix="left_", **options)
    assert weight_set(left) == "oxford"
    both = VGG11(prefix="right_", input_tensor=left.input, **options)
    both = keras.Model(left.input, [left.output, both.output], name="both")
    x = torch.rand(1, *SHAPE) * 255
    with torch.no_grad():
        y = reference(x)
        for output in both(x):
            torch.testing.assert_close(output, y)
    for variable in both.variables:
        variable.assign(variable * 0)
    # No published file is fetched here: the checkpoint above stands for one.
    monkeypatch.setattr(filling, "path_of", lambda *_, **__: path)
    load_weights(both, "oxford")
    assert weight_set(both) == "oxford"
    with torch.no_grad():
        for output in both(x):
            torch.testing.assert_close(output, y)
    part = truncate(both, "right_block2_pool")
    part.variables[0].assign(part.variables[0] * 0)
    load_weights(part, "oxford")
    np.testing.assert_array_equal(part.get_weights()[0], reference.get_weights()[0])
    for ending in (".weights.h5", ".safetensors"):
        save_weights(both, tmp_path / f"both{ending}")
        load_weights(both, tmp_path / f"both{ending}")
    wide = keras.Sequential([keras.Input(SHAPE), keras.layers.Conv2D(9, 3, name="a_block1_conv1")])
    with pytest.raises(ValueError, match="'oxford' does not fit the network with the prefix 'a_'"):
        load_weights(wide, "oxford")


@pytest.mark.slow
def test_built_in_preprocessing_has_the_prefix_too(published):
    path, reference = published
    options = {"include_top": False, "input_shape": SHAPE, "include_preprocessing": True}
    model = VGG11(weights=path, prefix="left_", **options)
    assert "left_oxford_preprocessing" in [layer.name for layer in model.layers]
    photograph = np.random.default_rng(0).integers(0, 256, (1, *SHAPE)).astype("uint8")
    with torch.no_grad():
        y = model(torch.from_numpy(preprocess(photograph, model)))
        expected = reference(torch.from_numpy(preprocess(photograph, "oxford")))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_a_prefix_that_cant_be_is_refused():
    with pytest.raises(ValueError, match="prefix='a/'; expected a text without '/'"):
        VGG11(weights=None, prefix="a/")
