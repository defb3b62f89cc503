"""replace takes layers of a nested model and around it, as in one graph."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from contract import equal, images, run, same_snapshot, shake_, snapshot
from keras import layers as kl
from test_nested import check_nested, layers, outer, siamese, two

from vggtorch.models import VGG11, remember_, weight_set
from vggtorch.surgery import distill_, flatten, insert, replace, truncate

pytestmark = pytest.mark.usefixtures("one_thread")


def conv(name, width=4, **settings):
    return kl.Conv2D(width, 3, padding="same", name=name, **settings)


# What is replaced, by what, and the full names of the new layers.
STRETCHES = {
    "a nested model's end and what follows": (
        ["tower/conv3", "mean", "head"],
        lambda: [conv("c", 5), kl.GlobalAveragePooling2D(name="g"), kl.Dense(2, name="h")],
        ["c", "g", "h"],
    ),
    "the end of a model two levels deep": (
        ["tower/deep/norm", "tower/pool", "tower/conv3", "mean"],
        lambda: [
            *(kl.BatchNormalization(name="n"), kl.MaxPooling2D(name="p"), conv("c", 5)),
            kl.GlobalAveragePooling2D(name="g"),
        ],
        ["n", "p", "c", "g"],
    ),
    "what is before a nested model and its begin": (
        ["rescale", "tower/conv1"],
        lambda: [kl.Rescaling(0.5, name="r"), conv("c", activation="relu")],
        ["tower/r", "tower/c"],
    ),
    "down two levels": (
        ["rescale", "tower/conv1", "tower/deep/conv2"],
        lambda: [kl.Rescaling(0.5, name="r"), conv("c", activation="relu"), conv("d")],
        ["tower/deep/r", "tower/deep/c", "tower/deep/d"],
    ),
    "the begin of the inner one is an input of the outer one": (
        ["tower/conv1", "tower/deep/conv2"],
        lambda: [conv("c", activation="relu"), conv("d")],
        ["tower/deep/c", "tower/deep/d"],
    ),
    "out of one and to the end": (
        ["tower/deep/norm", "tower/pool"],
        lambda: [kl.BatchNormalization(name="n"), kl.MaxPooling2D(name="p")],
        ["tower/n", "tower/p"],
    ),
    "all layers of a nested model": (
        ["tower/conv1", "tower/deep", "tower/pool", "tower/conv3", "mean"],
        lambda: [
            *(conv("c", activation="relu"), conv("d"), kl.BatchNormalization(name="n")),
            *(kl.MaxPooling2D(name="p"), conv("e", 5), kl.GlobalAveragePooling2D(name="g")),
        ],
        ["c", "d", "n", "p", "e", "g"],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STRETCHES)
def test_layers_across_borders_are_copied_as_in_one_graph(case, tmp_path):
    names, make, paths = STRETCHES[case]
    model, x = shake_(outer()), images(8) / 255
    before, y = snapshot(model), run(model, x)
    result = replace(model, names, make(), init="copy")
    same_snapshot(before, snapshot(model))
    check_nested(model, result, new=paths, gone=names)
    assert set(paths) <= set(layers(result))
    equal(run(result, x), y)
    result.save(tmp_path / "m.keras")
    equal(run(keras.saving.load_model(tmp_path / "m.keras"), x), y)


def between():
    """Two models, one after the other, and a layer that changes the size between them."""
    a, b = keras.Input((8, 8, 3)), keras.Input((4, 4, 6))
    first = keras.Model(a, conv("out", 6)(conv("in")(a)), name="first")
    x = conv("in")(b)
    second = keras.Model(b, [conv("out")(x), kl.ReLU(name="side")(x)], name="second")
    image = keras.Input((8, 8, 3))
    y, side = second(kl.AveragePooling2D(2, name="half")(first(image)))
    return keras.Model(image, [kl.Flatten(name="flat")(y), side])


def test_out_of_one_model_and_into_another():
    """The second model's input then has another shape, and its dtype and side output stay."""
    model, x = shake_(between()), images(8) / 255
    flat = flatten(model)
    names = ["first/out", "half", "second/in"]
    new = [kl.Conv2D(4, 4, strides=2, padding="same", name="new")]
    for source, gone in ((model, names), (flat, ["first_out", "half", "second_in"])):
        made = kl.Conv2D.from_config(new[0].get_config())
        if source is not model:
            made.build((None, 8, 8, 4))
            made.set_weights(new[0].get_weights())
        else:
            new[0] = made
        result = replace(source, gone, made)
        found = run(result, x)
        if source is model:
            assert result.get_layer("second").input_shape == (None, 8, 8, 4)
            assert list(layers(result.get_layer("second")))[1:] == ["new", "out", "side"]
            expected = found
    for a, b in zip(found, expected, strict=True):
        equal(a, b)


@pytest.mark.slow
def test_composed_and_distilled_across_borders():
    keras.utils.set_random_seed(0)
    a = keras.Input((16, 16, 3))
    inner = keras.Model(a, conv("conv2", 8)(conv("conv1", 8)(a)), name="inner")
    image = keras.Input((16, 16, 3))
    x = kl.MaxPooling2D(name="pool")(conv("conv3", 8)(inner(image)))
    model = keras.Model(image, x)
    new = kl.Conv2D(8, 5, padding="same", name="new")
    result = replace(model, ["inner/conv2", "conv3"], new, init="compose")
    x = images(16) / 255
    torch.testing.assert_close(run(result, x)[:, 1:-1, 1:-1], run(model, x)[:, 1:-1, 1:-1])
    maps = 100 * np.random.default_rng(0).normal(size=(20, 16, 16, 3)).cumsum(1).cumsum(2) / 16
    done = distill_(model, result, "new", maps, steps=5)
    assert list(done.after) == ["pool"]
    assert done.after["pool"] > 0.9


def split(around=False):
    """A model nested in another, both of whose outputs an Add reads."""
    a = keras.Input((4, 4, 3))
    x = conv("first", 3)(a)
    ends = [conv("a", 3)(x), x if around else conv("b", 3)(x)]
    inner = keras.Model(a, ends, name="inner")
    image = keras.Input((4, 4, 3))
    return keras.Model(image, kl.ReLU(name="last")(kl.Add(name="sum")(inner(image))))


REFUSED = {
    "parts of two models": (
        lambda: replace(two(), ["left/conv1", "right/conv1"], kl.ReLU()),
        "'left/conv1', 'right/conv1', which are .*one way out; they have 2: 'conv1' -> 'left/deep'"
        ".*or by vt.replace_where",
    ),
    "a gap": (
        lambda: replace(outer(), ["tower/conv1", "head"], kl.ReLU()),
        "one way in; they have 2: 'rescale' -> 'tower/conv1', 'mean' -> 'head'",
    ),
    "a model that is called twice": (
        lambda: replace(siamese(), ["tower/conv3", "both"], kl.ReLU()),
        "layers in 'tower' and outside of it, .*each of its 2 calls.*vt.flatten",
    ),
    "a model and its layers": (
        lambda: replace(outer(), ["tower", "tower/conv1", "mean"], kl.ReLU()),
        "received 'tower' and layers in it",
    ),
    "two ways over one border": (
        lambda: replace(split(), ["inner/a", "inner/b", "sum"], kl.ReLU()),
        "cross the border of 'inner' in several places. Make one graph .*vt.flatten",
    ),
    "a border that one way goes around": (
        lambda: replace(split(around=True), ["inner/a", "sum"], kl.ReLU()),
        "cross the border of 'inner' in several places",
    ),
    "an output that another layer reads too": (
        lambda: replace(between(), ["second/in", "second/out", "flat"], kl.ReLU()),
        "one way out; they have 2: 'in' -> 'second/side', 'flat' -> the model's output",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_hangs_together_in_no_one_way_is_refused(case):
    operation, text = REFUSED[case]
    with pytest.raises(ValueError, match=text):
        operation()


# The weight set of what reads no images any more


def short():
    vgg = VGG11(weights=None, include_top=False, input_shape=(32, 32, 3))
    return remember_(truncate(vgg, "block2_pool"), "oxford")


def around():
    image = keras.Input((32, 32, 3), name="photograph")
    x = short()(kl.ZeroPadding2D(1, name="border")(kl.Cropping2D(1, name="crop")(image)))
    return keras.Model(image, kl.Flatten(name="flat")(x))


@pytest.mark.parametrize("make", [short, around])
def test_what_starts_behind_a_layer_forgets_the_weight_set(make):
    model = make()
    start = "vgg11/block1_pool" if make is around else "block1_pool"
    end = "flat" if make is around else "block2_pool"
    with pytest.warns(UserWarning, match="starts at 'block1_pool'.*no longer remembers.*'oxford'"):
        result = truncate(model, end, start=start)
    assert weight_set(result) is None
    again = keras.Model(result.input, result.layers[-1].output)
    assert weight_set(again) is None
    if make is short:  # Keras's own way to cut
        rest = keras.Model(model.get_layer("block1_pool").output, model.output)
        assert weight_set(rest) is None
        assert weight_set(keras.Model(model.input, model.output)) == "oxford"
    assert weight_set(model) == "oxford"


@pytest.mark.slow
def test_what_starts_with_the_image_remembers(narrow):
    model = short()
    assert weight_set(truncate(model, "block2_pool", start=model.layers[0].name)) == "oxford"
    for start in ("photograph", "crop", "border"):
        assert weight_set(truncate(around(), "flat", start=start)) == "oxford"


@pytest.mark.slow
def test_new_layers_before_all_others_give_the_weight_set_up(narrow):
    model = short()
    first = model.layers[0].name
    with pytest.warns(UserWarning, match="'scale' before all that reads .* set 'oxford': if it"):
        result = insert(model, first, kl.Rescaling(1 / 255, name="scale"))
    assert weight_set(result) is None
    with pytest.warns(UserWarning, match="no longer remembers"):
        nested = insert(around(), "crop", [kl.GaussianNoise(0.1), kl.Normalization(name="n")])
    assert weight_set(nested) is None
    assert weight_set(insert(model, first, kl.GaussianNoise(0.1))) == "oxford"
    assert weight_set(insert(model, "block1_conv1", kl.BatchNormalization())) == "oxford"
