"""The 39 tests of keras-surgeon (tests/test_surgeon.py, version 0.2.0) on vggtorch's surgery.

Each test here names those whose intent it has. keras-surgeon compares the reading layer's weights
with `numpy.delete`; here the whole output is compared too. Where its intent holds only by
dropping a constant or by taking one branch's rows for another's, the refusal is tested, and what
to do instead.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from contract import equal, run, shake_
from keras import layers as kl
from poison import check_deletion

from vggtorch.keras_graph import raw_value
from vggtorch.surgery import delete_channels, insert, remove, replace, truncate

pytestmark = pytest.mark.usefixtures("one_thread")

INDICES = pytest.mark.parametrize("channels", [[0], [-1], [1, 2]], ids=str)
LAYOUTS = pytest.mark.parametrize("layout", ["channels_first", "channels_last"])


def images(*shape):
    return torch.from_numpy(np.random.default_rng(0).normal(size=(2, *shape)).astype("float32"))


def deleted(values, channels, axis):
    return np.delete(values.numpy(), channels, axis=axis)


def read_by_dense(make, channels, rank=2, layout="channels_last", flat=True):
    """conv(3) -> what `make` gives -> Flatten -> Dense, as keras-surgeon's helpers build it."""
    shape = (10, 12, 11)[:rank]
    shape = (3, *shape) if layout == "channels_first" else (*shape, 3)
    convolution = {1: kl.Conv1D, 2: kl.Conv2D, 3: kl.Conv3D}[rank]
    inputs = keras.Input(shape)
    x = convolution(3, 3, data_format=layout, name="conv")(inputs)
    x = make()(x) if make else x
    sizes = tuple(x.shape)[1:]
    x = kl.Flatten(name="flat")(x) if flat else x
    model = shake_(keras.Model(inputs, kl.Dense(5, name="dense")(x)))
    result = delete_channels(model, "conv", channels)
    check_deletion(model, result, {"conv": channels}, images(*shape))

    axis = 0 if layout == "channels_first" or not flat else len(sizes) - 1
    places = np.arange(int(np.prod(sizes))).reshape(sizes)
    rows = np.take(places, channels, axis=axis).reshape(-1)
    old, new = model.get_layer("dense"), result.get_layer("dense")
    assert np.array_equal(new.kernel.numpy(), deleted(old.kernel, rows, 0))
    assert np.array_equal(new.bias.numpy(), old.bias.numpy())


def test_rebuild_submodel():
    """test_rebuild_submodel: a model that is rebuilt without a change is the same."""
    layers = [keras.Input((28, 28, 1)), kl.Conv2D(2, 3, activation="relu"), kl.Conv2D(2, 3)]
    model = shake_(keras.Sequential([*layers, kl.Flatten(), kl.Dense(2), kl.Dense(10)]))
    result = truncate(model, model.layers[-1].name)
    equal(run(result, images(28, 28, 1)), run(model, images(28, 28, 1)))


def test_dense_in_dense():
    """test_delete_channels_rec_1."""
    inputs = keras.Input((784,))
    x = kl.Dense(64, activation="relu")(kl.Dense(64, activation="relu", name="first")(inputs))
    model = shake_(keras.Model(inputs, kl.Dense(10, activation="softmax")(x)))
    model.compile("rmsprop", "categorical_crossentropy", metrics=["accuracy"])
    for name in ("first", model.layers[2].name):
        result = delete_channels(model, name, [0])
        check_deletion(model, result, {name: [0]}, images(784))


@INDICES
@LAYOUTS
@pytest.mark.parametrize(("size", "padding"), [(7, "valid"), (2, "same")])
def test_convolution_in_convolution(channels, layout, size, padding):
    """test_delete_channels_conv2d_conv2d, _conv2d_conv2d_small_shape, _conv2d_conv2d_next_layer."""
    shape = (1, size, size) if layout == "channels_first" else (size, size, 1)
    inputs = keras.Input(shape)
    x = kl.Conv2D(3, 3, data_format=layout, padding=padding, name="one")(inputs)
    x = kl.Conv2D(3, 3, data_format=layout, padding=padding, name="two")(x)
    model = shake_(keras.Model(inputs, kl.Dense(1)(kl.Dense(3)(kl.Flatten()(x)))))
    result = delete_channels(model, "one", channels)
    check_deletion(model, result, {"one": channels}, images(*shape))
    old, new = ([m.get_layer(name) for name in ("one", "two")] for m in (model, result))
    assert np.array_equal(new[0].kernel.numpy(), deleted(old[0].kernel, channels, -1))
    assert np.array_equal(new[0].bias.numpy(), deleted(old[0].bias, channels, 0))
    assert np.array_equal(new[1].kernel.numpy(), deleted(old[1].kernel, channels, -2))
    assert np.array_equal(new[1].bias.numpy(), old[1].bias.numpy())


@INDICES
@LAYOUTS
def test_flatten(channels, layout):
    """test_delete_channels_flatten."""
    read_by_dense(None, channels, layout=layout)


ONE_DIMENSION = {
    "maxpooling": lambda: kl.MaxPooling1D(2),
    "cropping": lambda: kl.Cropping1D(3),
    "upsampling": lambda: kl.UpSampling1D(3),
    "zeropadding": lambda: kl.ZeroPadding1D(3),
    "averagepooling": lambda: kl.AveragePooling1D(3),
}


@INDICES
@pytest.mark.parametrize("name", ONE_DIMENSION)
def test_one_dimension(name, channels):
    """test_delete_channels_{maxpooling,cropping,upsampling,zeropadding,averagepooling}1d."""
    read_by_dense(ONE_DIMENSION[name], channels, rank=1)


@INDICES
def test_global_pools(channels):
    """test_delete_channels_globalaveragepooling1d, _globalaveragepooling2d."""
    read_by_dense(kl.GlobalAveragePooling1D, channels, rank=1, flat=False)
    for layout in ("channels_first", "channels_last"):
        pool = lambda layout=layout: kl.GlobalAveragePooling2D(data_format=layout)  # noqa: E731
        read_by_dense(pool, channels, layout=layout, flat=False)


SPATIAL = ["MaxPooling", "Cropping", "UpSampling", "ZeroPadding", "AveragePooling"]


@INDICES
@LAYOUTS
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("name", SPATIAL)
def test_two_and_three_dimensions(name, rank, channels, layout):
    """test_delete_channels_{maxpooling,cropping,upsampling,zeropadding,averagepooling}{2d,3d}."""
    kind, sizes = getattr(kl, f"{name}{rank}D"), (2, 3, 2)[:rank]
    read_by_dense(lambda: kind(sizes, data_format=layout), channels, rank=rank, layout=layout)


def two_branches(join, layout):
    shape = (12, 11, 10)
    a, b = keras.Input(shape), keras.Input(shape)
    x = kl.Conv2D(3, 3, data_format=layout, name="conv_1")(a)
    y = kl.Conv2D(3, 3, data_format=layout, name="conv_2")(b)
    x = kl.Flatten(name="flat")(join([x, y]))
    return shake_(keras.Model([a, b], kl.Dense(5, name="dense")(x))), (images(*shape),) * 2


@INDICES
@LAYOUTS
def test_concatenation(channels, layout):
    """test_delete_channels_merge_concatenate."""
    model, x = two_branches(kl.Concatenate(1 if layout == "channels_first" else -1), layout)
    check_deletion(model, delete_channels(model, "conv_1", channels), {"conv_1": channels}, *x)


@INDICES
@LAYOUTS
@pytest.mark.parametrize("join", [kl.Add, kl.Multiply, kl.Average, kl.Maximum])
def test_other_merges(join, channels, layout):
    """test_delete_channels_merge_others."""
    model, x = two_branches(join(), layout)
    gone = {"conv_1": channels, "conv_2": channels}
    check_deletion(model, delete_channels(model, gone), gone, *x)


ONE_BY_ONE = {
    "leaky": kl.LeakyReLU,
    "elu": kl.ELU,
    "thresholded": lambda: kl.ReLU(threshold=0.1),
    "relu": kl.ReLU,
    "noise": lambda: kl.GaussianNoise(0.5),
    "gaussian dropout": lambda: kl.GaussianDropout(0.5),
    "alpha dropout": lambda: kl.AlphaDropout(0.5),
}


@INDICES
@LAYOUTS
@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_activations_and_noise(name, channels, layout):
    """test_delete_channels_advanced_activations, _noise."""
    read_by_dense(ONE_BY_ONE[name], channels, layout=layout)


@INDICES
@pytest.mark.parametrize("kind", [kl.SimpleRNN, kl.GRU, kl.LSTM])
def test_recurrent_layers(kind, channels):
    """test_delete_channels_simplernn, _gru, _lstm."""
    inputs = keras.Input((7, 10))
    x = kind(9, return_sequences=True, name="made")(inputs)
    x = kl.GRU(4, name="reader")(x)
    model = shake_(keras.Model(inputs, kl.Dense(5)(x)))
    result = delete_channels(model, "made", channels)
    old, new = model.get_layer("reader").cell, result.get_layer("reader").cell
    assert np.array_equal(new.kernel.numpy(), deleted(old.kernel, channels, 0))
    # A unit whose state nobody reads, in its own layer and behind it, is as good as gone.
    with torch.no_grad():
        raw_value(model.get_layer("made").cell.recurrent_kernel)[channels] = 0
        raw_value(old.kernel)[channels] = 0
    x = images(7, 10)
    torch.testing.assert_close(run(result, x), run(model, x), rtol=1e-5, atol=1e-6)


@INDICES
@LAYOUTS
def test_batch_norm(channels, layout):
    """test_delete_channels_batchnormalization."""
    axis = 1 if layout == "channels_first" else -1
    read_by_dense(lambda: kl.BatchNormalization(axis=axis), channels, layout=layout)


def chain(*names):
    inputs = keras.Input((3,), name="inputs")
    layers = {name: kl.Dense(3, name=name) for name in names}
    x = inputs
    for name in names:
        x = layers[name](x)
    return shake_(keras.Model(inputs, x))


def expected(model, *names):
    """The layers of a model, by name, called one after another on its input."""
    x = images(3)
    for name in names:
        x = run(model.get_layer(name), x) if name != "inputs" else x
    return x


def test_delete_layer():
    """test_delete_layer."""
    model = chain("one", "two", "three", "four")
    result = remove(model, "two")
    equal(run(result, images(3)), expected(model, "one", "three", "four"))


def test_delete_layer_reuse():
    """test_delete_layer_reuse: every call of the layer goes."""
    inputs, twice = keras.Input((3,)), kl.Dense(3, name="twice")
    x = twice(kl.Dense(3, name="three")(twice(kl.Dense(3, name="one")(inputs))))
    model = shake_(keras.Model(inputs, kl.Dense(3, name="four")(x)))
    result = remove(model, "twice")
    equal(run(result, images(3)), expected(model, "one", "three", "four"))


def test_replace_layer():
    """test_replace_layer."""
    model, new = chain("one", "two", "four"), kl.Dense(3, name="three")
    result = replace(model, "two", new)
    x = run(new, run(model.get_layer("one"), images(3)))
    equal(run(result, images(3)), run(model.get_layer("four"), x))


def test_insert_layer():
    """test_insert_layer: what keras-surgeon puts before a layer goes after the one before it."""
    model, new = chain("one", "two", "four"), kl.Dense(3, name="three")
    result = insert(model, "two", new)
    equal(
        run(result, images(3)),
        run(model.get_layer("four"), run(new, expected(model, "one", "two"))),
    )


def test_delete_layer_same_layer_outputs():
    """test_delete_layer_same_layer_outputs: the outputs are two calls of one layer."""
    inputs = keras.Input((3,))
    one, last = kl.Dense(3, name="one"), kl.Dense(1, name="last")
    x = one(inputs)
    y = kl.Dense(3, name="two")(x)
    model = shake_(keras.Model(inputs, [last(kl.Dense(3, name="three")(x)), last(y)]))
    found = run(remove(model, "three"), images(3))
    equal(found[0], expected(model, "one", "last"))
    equal(found[1], expected(model, "one", "two", "last"))


def test_downstream_sharing():
    """test_delete_channels_downstream_sharing.

    keras-surgeon deletes channel 0 of one layer and channel 1 of another, and lets a layer that is
    called on both read one by the other's rows. There is no such layer; the same channels can go.
    """
    inputs, shared = keras.Input((5,)), kl.Dense(3, name="dense_3")
    x, y = kl.Dense(4, name="dense_1")(inputs), kl.Dense(4, name="dense_2")(inputs)
    model = shake_(keras.Model(inputs, [shared(x), shared(y)]))
    with pytest.raises(ValueError, match="'dense_3', which is called on both, ties them to others"):
        delete_channels(model, {"dense_1": [0], "dense_2": [1]})
    gone = {"dense_1": [0], "dense_2": [0]}
    result = delete_channels(model, gone)
    check_deletion(model, result, gone, images(5))
    assert [result.get_layer(f"dense_{n}").units for n in (1, 2, 3)] == [3, 3, 3]


def concatenated(long):
    inputs = keras.Input((20, 20, 3))
    x = kl.Conv2D(2, 3, name="conv_1")(inputs)
    if long:
        x = kl.Conv2D(4, 1, name="conv_3")(kl.ReLU()(x))
    y = kl.Conv2D(3, 3, name="conv_2")(inputs)
    return shake_(keras.Model(inputs, kl.Concatenate(name="cat_1")([x, y])))


def test_delete_all_channels_in_branch():
    """test_delete_all_channels_in_branch: nothing is left of the branch and the join."""
    model = concatenated(long=False)
    with pytest.raises(ValueError, match="the model puts them out, at 'cat_1'"):
        delete_channels(model, "conv_1", [0, 1])
    result = delete_channels(model, "cat_1", [0, 1])
    assert [layer.name for layer in result.layers[1:]] == ["conv_2"]
    equal(run(result, images(20, 20, 3)), run(model, images(20, 20, 3))[..., 2:])


def test_delete_all_channels_in_long_branch():
    """test_delete_all_channels_in_long_branch.

    keras-surgeon drops conv_3 as well, which would go on putting out its bias: here it is named.
    """
    model = concatenated(long=True)
    with pytest.raises(
        ValueError, match="'conv_3' .Conv2D. with nothing to read.* all channels of"
    ):
        delete_channels(model, "conv_1", [0, 1])
    result = delete_channels(model, {"conv_1": [0, 1], "cat_1": [0, 1, 2, 3]})
    assert [layer.name for layer in result.layers[1:]] == ["conv_2"]
    equal(run(result, images(20, 20, 3)), run(model, images(20, 20, 3))[..., 4:])


def test_a_branch_of_three_goes_and_the_concatenation_stays():
    inputs = keras.Input((8, 8, 3))
    branches = [kl.Conv2D(n + 2, 3, name=f"conv_{n}")(inputs) for n in range(3)]
    x = kl.Concatenate(name="cat")([*branches[:2], kl.MaxPooling2D(1)(branches[2])])
    model = shake_(keras.Model(inputs, kl.Conv2D(2, 3, name="reader")(x)))
    gone = {"conv_2": [0, 1, 2, 3], "conv_0": [1]}
    result = delete_channels(model, gone)
    check_deletion(model, result, gone, images(8, 8, 3))
    assert "conv_2" not in {layer.name for layer in result.layers}
    assert len(result.layers) == 5


def test_an_input_that_only_a_vanished_branch_read_stays_an_input():
    model, x = two_branches(kl.Concatenate(), "channels_last")
    gone = {"conv_1": [0, 1, 2]}
    result = delete_channels(model, gone)
    check_deletion(model, result, gone, *x)
