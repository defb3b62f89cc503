import inspect

import keras
import numpy as np
import pytest
import torch

import vggtorch as vt

CONSTRUCTORS = {
    name.upper(): getattr(vt, name.upper()) for name in ("vgg11", "vgg13", "vgg16", "vgg19")
}
KERAS = {"VGG16": keras.applications.VGG16, "VGG19": keras.applications.VGG19}


def summary(model):
    lines: list[str] = []
    model.summary(print_fn=lines.append)
    return lines


def build_on_meta(constructor, **arguments):
    keras.utils.clear_session()  # automatic names count from the start
    with keras.device("meta"):
        return constructor(weights=None, **arguments)


@pytest.mark.parametrize("name", KERAS)
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"include_top": False},
        {"include_top": False, "pooling": "avg", "input_shape": (64, 48, 3)},
        {"include_top": False, "pooling": "max"},
        {"classes": 10, "classifier_activation": None, "input_shape": (96, 96, 3)},
    ],
)
def test_layers_summary_and_config_equal_keras_applications(name, arguments):
    ours = build_on_meta(CONSTRUCTORS[name], **arguments)
    theirs = build_on_meta(KERAS[name], **arguments)
    assert ours.get_config() == theirs.get_config()
    assert summary(ours) == summary(theirs)


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_signature_and_defaults_are_keras_applications(name):
    ours = inspect.signature(CONSTRUCTORS[name]).parameters
    theirs = inspect.signature(keras.applications.VGG16).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for key, parameter in theirs.items():
        if key != "name":
            assert ours[key].default == parameter.default
    extra = list(ours.values())[len(theirs) :]
    assert {p.name: p.default for p in extra} == {
        "batch_norm": False,
        "dropout": 0.0,
        "include_preprocessing": False,
    }
    assert all(p.kind is p.KEYWORD_ONLY for p in extra)


@pytest.mark.parametrize("name", KERAS)
def test_same_arrays_same_outputs_as_keras_applications(name):
    arguments = {"weights": None, "include_top": False, "input_shape": (64, 64, 3)}
    ours, theirs = CONSTRUCTORS[name](**arguments), KERAS[name](**arguments)
    theirs.set_weights(ours.get_weights())
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype("float32")
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))
