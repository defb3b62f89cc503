"""replace puts new layers in place of old ones, with weights of the kind that is asked for."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from contract import equal, images, run, vgg
from keras import layers as kl

from vggtorch.surgery import replace

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_replace_by_a_copy_gives_the_same():
    model, x = vgg()
    old = model.get_layer("block2_conv1")
    new = type(old).from_config({**old.get_config(), "name": "copy"})
    result = replace(model, "block2_conv1", new)
    new.set_weights(old.get_weights())
    equal(run(result, x), run(model, x))


def test_new_layers_keep_the_weights_they_come_with():
    model, _ = vgg()
    new = kl.Conv2D(64, 5, padding="same", name="new")
    new.build((None, 32, 32, 3))
    kernel = new.kernel.numpy()
    result = replace(model, ["block1_conv1", "block1_conv2"], new)
    assert np.array_equal(result.get_layer("new").kernel.numpy(), kernel)


def linear_chain():
    """Two convolutions without an activation between them, and something that follows."""
    x = inputs = keras.Input((16, 16, 3))
    x = kl.Conv2D(4, 3, name="one")(x)
    x = kl.Conv2D(5, 3, activation="relu", name="two")(x)
    return keras.Model(inputs, kl.MaxPooling2D(name="pool")(x))


def test_replace_by_the_composition_of_a_linear_chain_changes_nothing():
    model = linear_chain()
    new = kl.Conv2D(5, 5, activation="relu", name="both")
    result = replace(model, ["one", "two"], new, init="compose")
    x = images(16)
    torch.testing.assert_close(run(result, x), run(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_replace_with_distillation_comes_closer_than_without():
    model, x = linear_chain(), images(16, 40)
    names, shown = ["one", "two"], np.asarray(x)
    layers = [kl.Conv2D(5, 5, activation="relu", name="both") for _ in range(2)]
    results = [
        replace(model, names, layers[0]),
        replace(model, names, layers[1], init="distill", images=shown),
    ]
    errors = [float((run(result, x) - run(model, x)).square().mean()) for result in results]
    assert errors[1] < 1e-3 * errors[0]


@pytest.mark.parametrize(
    ("new", "options", "message"),
    [
        (1, {"init": "fit"}, "expects init=None, 'compose', 'copy' or 'distill', received 'fit'"),
        (
            1,
            {"init": "distill"},
            "images with init='distill' and only there; received .* without",
        ),
        (1, {"images": np.zeros(3)}, "received init=None with images"),
        (2, {"init": "compose"}, "needs one new layer, received 2"),
    ],
)
def test_replace_refuses_what_its_init_cannot_do(new, options, message):
    layers = [kl.Conv2D(5, 5, padding="valid"), kl.Activation("relu")][:new]
    with pytest.raises(ValueError, match=message):
        replace(linear_chain(), ["one", "two"], layers, **options)
