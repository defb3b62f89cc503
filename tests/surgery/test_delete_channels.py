"""delete_channels slices every layer that a channel touches, and nothing else."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
import torch
from contract import equal, operations, run, same_layer, same_snapshot, snapshot
from keras import layers as kl
from poison import check_deletion

from vggtorch.keras_graph import raw_value
from vggtorch.lowering import to_torch
from vggtorch.models import remember_, remembered
from vggtorch.surgery import deletable_channels, delete_channels

pytestmark = pytest.mark.usefixtures("one_thread")

GONE = [0, 3]


def shaken(model):
    """Values that no initialiser gives, so that one in a wrong place shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for v in model.variables:
            if raw_value(v).is_floating_point():
                raw_value(v).add_(0.2 * torch.rand(v.shape, generator=generator))
    return model


def images(*shape):
    return torch.from_numpy(np.random.default_rng(0).normal(size=(2, *shape)).astype("float32"))


def between(*layers, rank=2, size=8, first=False):
    """A convolution, some layers, and one that reads what they put out."""
    convolution = {1: kl.Conv1D, 2: kl.Conv2D, 3: kl.Conv3D}[rank]
    layout = "channels_first" if first else "channels_last"
    shape = (3, *[size] * rank) if first else (*[size] * rank, 3)
    x = inputs = keras.Input(shape)
    x = convolution(6, 3, data_format=layout, name="conv")(x)
    for layer in layers:
        x = layer(x)
    if len(x.shape) == 2:
        x = kl.Dense(4, name="reader")(x)
    else:
        x = convolution(4, 1, data_format=layout, name="reader")(x)
    return shaken(keras.Model(inputs, x)), images(*shape)


def check(model, x, gone, asked=None):
    """Delete and compare; the input stays, and what isn't concerned stays bit for bit."""
    before = snapshot(model)
    result = delete_channels(model, asked or gone)
    same_snapshot(before, snapshot(model))
    check_deletion(model, result, gone, *(x if isinstance(x, tuple) else (x,)))
    return result


def channels(name):
    return {"data_format": "channels_first" if name == "first" else "channels_last"}


LAYERS_2D = {
    "pool": lambda f: [kl.MaxPooling2D(2, **channels(f))],
    "average": lambda f: [kl.AveragePooling2D(3, padding="same", **channels(f))],
    "adaptive": lambda f: [kl.AdaptiveAveragePooling2D(2, **channels(f))],
    "padding": lambda f: [kl.ZeroPadding2D(((0, 1), (2, 0)), **channels(f))],
    "cropping": lambda f: [kl.Cropping2D((1, 2), **channels(f))],
    "upsampling": lambda f: [kl.UpSampling2D((2, 3), **channels(f))],
    "resizing": lambda f: [kl.Resizing(5, 4, **channels(f))],
    "center crop": lambda f: [kl.CenterCrop(3, 4, **channels(f))],
    "means by function": lambda f: [
        lambda x: keras.ops.mean(x, axis=(2, -1) if f == "first" else (1, 2)),
    ],
    "one axis by function": lambda f: [lambda x: keras.ops.max(x, axis=2, keepdims=True)],
    "sums by function": lambda f: [
        lambda x: keras.ops.sum(x, axis=-1 if f == "first" else -2),
        kl.Flatten(**channels(f)),
    ],
    "global": lambda f: [kl.GlobalMaxPooling2D(**channels(f))],
    "global kept": lambda f: [kl.GlobalAveragePooling2D(keepdims=True, **channels(f))],
    "flatten": lambda f: [kl.Flatten(**channels(f))],
    "flatten as it lies": lambda f: [kl.Flatten(data_format="channels_last")],
    "norm": lambda f: [kl.BatchNormalization(axis=1 if f == "first" else -1), kl.ReLU()],
    "bare norm": lambda f: [
        kl.BatchNormalization(axis=1 if f == "first" else 3, scale=False, center=False)
    ],
    "activations": lambda f: [
        kl.LeakyReLU(),
        kl.ELU(),
        kl.ReLU(6.0),
        kl.Activation("swish"),
        kl.PReLU(),
        kl.PReLU(shared_axes=[1, 2, 3]),
        kl.PReLU(shared_axes=[2, 3] if f == "first" else [1, 2]),
    ],
    "noise": lambda f: [
        kl.Dropout(0.5),
        kl.SpatialDropout2D(0.5, **channels(f)),
        kl.GaussianNoise(0.5),
        kl.GaussianDropout(0.5),
        kl.AlphaDropout(0.5),
        kl.ActivityRegularization(0.1),
        kl.Identity(),
    ],
    "depthwise": lambda f: [
        kl.DepthwiseConv2D(3, padding="same", activation="relu", **channels(f))
    ],
    "multiplied depthwise": lambda f: [
        kl.DepthwiseConv2D(3, depth_multiplier=3, use_bias=False, **channels(f)),
        kl.BatchNormalization(axis=1 if f == "first" else -1),
    ],
    "rescaling": lambda f: [kl.Rescaling(2.0, 1.0)],
    "flat reshape": lambda f: [kl.Reshape((-1,))],
    "function": lambda f: [keras.ops.relu, lambda x: 2.0 * x - 1.0, keras.ops.silu],
}


@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize("layers", LAYERS_2D)
def test_channels_are_followed_through(layers, layout):
    model, x = between(*LAYERS_2D[layers](layout), first=layout == "first")
    result = check(model, x, {"conv": GONE})
    assert result.get_layer("conv").filters == 4


READERS = {
    "conv": lambda f: [kl.Conv2D(4, 3, strides=2, **channels(f))],
    "transposed": lambda f: [kl.Conv2DTranspose(4, 3, strides=2, **channels(f))],
    "separable": lambda f: [kl.SeparableConv2D(4, 3, depth_multiplier=2, **channels(f))],
    "dense": lambda f: [kl.Dense(4)] if f == "last" else [kl.Flatten(), kl.Dense(4)],
    "without bias": lambda f: [kl.Conv2D(4, 3, use_bias=False, **channels(f))],
}


@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize("name", READERS)
def test_each_layer_with_a_kernel_reads_and_loses_channels(name, layout):
    layers = READERS[name](layout)
    layers[-1].name = "made"
    model, x = between(*layers, first=layout == "first")
    check(model, x, {"conv": GONE})
    check(model, x, {"made": [1]})
    check(model, x, {"conv": GONE, "made": [0, 3]}, {"conv": (3, 0), "made": np.array([-1, 0])})


@pytest.mark.parametrize("rank", [1, 3])
def test_one_and_three_dimensions(rank):
    n = f"{rank}D"
    pools = [getattr(kl, f"{name}{n}") for name in ("ZeroPadding", "UpSampling", "Cropping")]
    layers = [pool(1 if pool is not pools[1] else 2) for pool in pools]
    transposed = getattr(kl, f"Conv{n}Transpose")(5, 3, name="up")
    layers += [getattr(kl, f"SpatialDropout{n}")(0.5), transposed]
    layers += [getattr(kl, f"GlobalAveragePooling{n}")()]
    model, x = between(*layers, rank=rank)
    check(model, x, {"conv": GONE, "up": [4]})


def test_one_dimensional_separable_and_depthwise():
    model, x = between(
        kl.DepthwiseConv1D(3, depth_multiplier=2), kl.SeparableConv1D(5, 3, name="s"), rank=1
    )
    check(model, x, {"conv": GONE, "s": [0]})


@pytest.mark.parametrize(
    "layers",
    [
        [kl.GlobalAveragePooling2D(), kl.Reshape((1, 1, 6))],
        [kl.Reshape((-1, 6)), kl.Permute((2, 1)), kl.Permute((2, 1)), kl.Flatten()],
        [kl.Reshape((3, 12, 6))],
        [kl.GlobalAveragePooling2D(), kl.RepeatVector(3), kl.Reshape((1, 3, 6))],
    ],
    ids=["squeezed", "sequence", "same innermost", "repeated"],
)
def test_a_reshape_that_leaves_the_channels_their_axis(layers):
    model, x = between(*[type(layer).from_config(layer.get_config()) for layer in layers])
    check(model, x, {"conv": GONE})


def test_a_reshape_of_an_open_map():
    inputs = keras.Input((None, None, 3))
    x = kl.Reshape((-1, 6))(kl.Conv2D(6, 1, name="conv")(inputs))
    model = shaken(keras.Model(inputs, kl.Dense(2)(x)))
    check(model, images(4, 5, 3), {"conv": GONE})


def test_an_embedding_loses_columns():
    tokens = keras.Input((5,), dtype="int32")
    x = kl.Embedding(9, 6, name="words")(tokens)
    model = shaken(keras.Model(tokens, kl.Dense(2)(x)))
    check(model, torch.arange(10).reshape(2, 5) % 9, {"words": GONE})


def test_masks_that_keras_hands_on_are_no_readers():
    tokens = keras.Input((5,), dtype="int32")
    x = kl.BatchNormalization()(kl.Embedding(9, 6, mask_zero=True, name="words")(tokens))
    x = kl.Concatenate(name="both")([x, kl.Dense(3, name="more")(x)])
    model = shaken(keras.Model(tokens, kl.GRU(2, name="reader")(x)))
    result = delete_channels(model, {"words": [5], "more": [0]})
    with torch.no_grad():  # what reads them reads zeros
        raw_value(model.get_layer("more").kernel)[5] = 0
        raw_value(model.get_layer("reader").cell.kernel)[[5, 6]] = 0
    x = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0]])
    torch.testing.assert_close(run(result, x), run(model, x))
    assert not torch.equal(run(result, x), run(result, torch.cat([x[:, :3], x[:, :2]], 1)))


# Branches


def branched(join):
    inputs = keras.Input((6, 6, 3))
    a = kl.Conv2D(6, 3, padding="same", name="a")(inputs)
    a, b = kl.BatchNormalization(name="a_norm")(a), kl.Conv2D(6, 1, name="b")(inputs)
    x = kl.MaxPooling2D(name="pool")(join([a, b]))
    return shaken(keras.Model(inputs, kl.Conv2D(2, 3, name="reader")(x))), images(6, 6, 3)


JOINS = {
    "Add": lambda: kl.Add(name="join"),
    "Multiply": lambda: kl.Multiply(name="join"),
    "Average": lambda: kl.Average(name="join"),
    "Maximum": lambda: kl.Maximum(name="join"),
    "Subtract": lambda: kl.Subtract(name="join"),
    "Minimum": lambda: kl.Minimum(name="join"),
    "operator": lambda: lambda x: x[0] * x[1] / 2.0,
    "rows": lambda: kl.Concatenate(axis=1, name="join"),
}


@pytest.mark.parametrize("join", JOINS)
def test_what_a_layer_joins_goes_together(join):
    model, x = branched(JOINS[join]())
    check(model, x, {"a": GONE, "b": GONE})
    with pytest.raises(ValueError, match=r"alone: .* ties them .*model, \['a', 'b'\], \[0, 3\]\)"):
        delete_channels(model, "b", GONE)
    with pytest.raises(ValueError, match=r"\(model, \['a', 'b'\], \[0, 3\]\)"):
        delete_channels(model, "a_norm", GONE)
    with pytest.raises(ValueError, match=r"\(model, \['a', 'b'\], \[0, 1, 3\]\)"):
        delete_channels(model, {"a": GONE, "b": [0, 1]})
    if join != "operator":
        check(model, x, {"a": GONE, "b": GONE}, {"join": GONE})


def test_a_concatenation_keeps_the_other_branch():
    model, x = branched(kl.Concatenate(name="join"))
    check(model, x, {"a": GONE})
    check(model, x, {"b": GONE})
    check(model, x, {"a": [5], "b": GONE}, {"join": [5, 6, 9]})
    kernel = check(model, x, {"a": [5], "b": GONE}).get_layer("reader").kernel
    old = raw_value(model.get_layer("reader").kernel)
    equal(raw_value(kernel), old[:, :, [0, 1, 2, 3, 4, 7, 8, 10, 11]])


def test_a_gate_for_each_channel_and_one_for_all():
    inputs = keras.Input((6, 6, 3))
    x = kl.Conv2D(6, 3, name="conv")(inputs)
    gate = kl.Dense(2, activation="relu", name="squeeze")(kl.GlobalAveragePooling2D()(x))
    gate = kl.Dense(6, activation="sigmoid", name="excite")(gate)
    gated = kl.Multiply(name="gate")([x, kl.Reshape((1, 1, 6))(gate)])
    where = kl.Conv2D(1, 1, activation="sigmoid", name="where")(gated)
    y = kl.Multiply(name="look")([gated, where])
    model = shaken(keras.Model(inputs, kl.Conv2D(2, 1)(y)))
    check(model, images(6, 6, 3), {"conv": GONE, "excite": GONE})
    check(model, images(6, 6, 3), {"conv": GONE, "excite": GONE, "squeeze": [0]})
    with pytest.raises(ValueError, match="'gate' .Multiply. ties them"):
        delete_channels(model, "conv", GONE)


def test_what_is_tied_at_other_places_is_shown_place_by_place():
    inputs = keras.Input((6, 6, 3))
    a, b = (kl.Conv2D(3, 1, name=name)(inputs) for name in "ab")
    x = kl.Add(name="join")([kl.Concatenate()([a, b]), kl.Conv2D(6, 1, name="c")(inputs)])
    model = shaken(keras.Model(inputs, kl.Conv2D(2, 1)(x)))
    with pytest.raises(ValueError, match=r"\(model, \{'b': \[0\], 'c': \[3\]\}\)"):
        delete_channels(model, "b", 0)
    check(model, images(6, 6, 3), {"b": [0], "c": [3]})


def test_a_layer_called_twice_is_sliced_once():
    a, b = keras.Input((6,)), keras.Input((6,))
    dense, reader = kl.Dense(6, activation="relu", name="twice"), kl.Dense(2, name="reader")
    model = shaken(keras.Model([a, b], [reader(dense(a)), reader(dense(b))]))
    result = check(model, (images(6), images(6) + 1), {"twice": GONE})
    assert len(result.layers) == 4


def test_a_reader_called_on_two_ties_them():
    inputs, reader = keras.Input((5,)), kl.Dense(3, name="reader")
    one, two = kl.Dense(4, name="one")(inputs), kl.Dense(4, name="two")(inputs)
    model = shaken(keras.Model(inputs, [reader(one), reader(two)]))
    check(model, images(5), {"one": [0], "two": [0]})
    with pytest.raises(ValueError, match="'reader', which is called on both, ties"):
        delete_channels(model, {"one": [0], "two": [1]})


# Groups


def grouped(groups=3):
    return between(kl.Conv2D(9, 3, groups=groups, name="groups"), kl.ReLU())


def test_equally_many_from_each_group():
    model, x = grouped()
    result = check(model, x, {"conv": [0, 3, 4]})
    assert result.get_layer("groups").kernel.shape == (3, 3, 1, 9)
    result = check(model, x, {"groups": [0, 1, 4, 5, 6, 8]})
    assert result.get_layer("groups").kernel.shape == (3, 3, 2, 3)


def test_a_whole_group_with_what_it_reads():
    model, x = grouped()
    result = check(model, x, {"conv": [2, 3], "groups": [3, 4, 5]})
    assert (result.get_layer("groups").groups, result.get_layer("groups").filters) == (2, 6)
    with pytest.raises(ValueError, match=r"they would read \[1, 2, 2\] and make \[3, 3, 3\]"):
        delete_channels(model, "conv", [0])
    with pytest.raises(ValueError, match=r"read \[0, 2, 2\] and make \[3, 3, 3\]"):
        delete_channels(model, "conv", [0, 1])


# Nested models


def siamese():
    """Two images through one nested model, which has a Sequential model inside."""
    inner = keras.Sequential(
        [keras.Input((6, 6, 4)), kl.Conv2D(6, 1, name="conv"), kl.BatchNormalization(name="norm")],
        name="inner",
    )
    image = keras.Input((6, 6, 3))
    x = inner(kl.Conv2D(4, 3, padding="same", name="before")(image))
    x = kl.Conv2D(5, 1, name="after")(kl.ReLU()(x))
    branch = keras.Model(image, kl.GlobalAveragePooling2D(name="pool")(x), name="branch")
    a, b = keras.Input((6, 6, 3), name="a"), keras.Input((6, 6, 3), name="b")
    left, right = branch(a), branch(b)
    x = kl.Concatenate(name="both")([left, right, kl.Subtract(name="minus")([left, right])])
    return shaken(keras.Model([a, b], kl.Dense(2, name="head")(x), name="siamese"))


@pytest.mark.parametrize(
    "gone",
    [
        {"branch/before": [1]},
        {"branch/inner/conv": GONE},
        {"branch/after": [0, 4]},
        {"branch/before": [1, 2], "branch/inner/conv": GONE, "branch/after": [3]},
    ],
)
def test_channels_are_followed_through_nested_models(gone):
    model = siamese()
    x = images(6, 6, 3)
    result = check(model, (x, x.flip(0) + 1), gone)
    assert result.get_layer("branch").name == "branch"
    assert isinstance(result.get_layer("branch").get_layer("inner"), keras.Sequential)


def test_a_name_in_one_nested_model_will_do():
    a = delete_channels(siamese(), "after", [1])
    b = delete_channels(siamese(), {"branch": [1]})
    for model in (a, b):
        assert model.get_layer("branch").get_layer("after").filters == 4
        assert model.get_layer("head").kernel.shape == (12, 2)


def test_a_nested_model_that_only_passes_channels_on():
    inside = keras.Input((6, 6, 6))
    passing = keras.Model(inside, kl.ReLU()(kl.MaxPooling2D()(inside)), name="passing")
    model, x = between(passing)
    check(model, x, {"conv": GONE})
    sequence = keras.Sequential([kl.ReLU(), kl.MaxPooling2D()], name="sequence")
    model, x = between(sequence)
    check(model, x, {"conv": GONE})


# What stays as it is


def test_flags_policies_regularizers_and_layouts_are_kept():
    inputs = keras.Input((6, 6, 3))
    conv = kl.Conv2D(6, 3, kernel_regularizer="l2", dtype="mixed_bfloat16", name="conv")
    norm = kl.BatchNormalization(name="norm")
    reader = kl.Conv2D(2, 1, kernel_constraint="max_norm", name="reader")
    model = keras.Model(inputs, kl.Dense(2, name="last")(reader(norm(conv(inputs)))))
    norm.trainable = conv.bias.trainable = False
    oihw = raw_value(reader.kernel)
    oihw.data = oihw.data.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    result = delete_channels(model, "conv", GONE)
    new = {layer.name: layer for layer in result.layers}
    assert new["conv"].dtype_policy.name == "mixed_bfloat16"
    assert new["conv"].kernel_regularizer.get_config() == conv.kernel_regularizer.get_config()
    assert new["conv"].kernel.regularizer is not None
    assert type(new["reader"].kernel.constraint) is type(reader.kernel.constraint)
    assert (new["norm"].trainable, new["conv"].kernel.trainable) == (False, True)
    assert not new["conv"].bias.trainable
    assert not raw_value(new["conv"].bias).requires_grad
    kernel = raw_value(new["reader"].kernel)
    assert kernel.permute(3, 2, 0, 1).is_contiguous()
    equal(kernel, oihw[:, :, [1, 2, 4, 5]])
    same_layer(operations(model)["last"], operations(result)["last"])
    assert {id(p) for p in result.parameters()} == {id(raw_value(v)) for v in result.variables}


def test_the_result_is_saved_cloned_trained_and_cut_again(tmp_path):
    model, x = between(kl.BatchNormalization(), kl.Flatten())
    result = delete_channels(model, "conv", GONE)
    result.save(tmp_path / "cut.keras")
    equal(run(keras.saving.load_model(tmp_path / "cut.keras"), x), run(result, x))
    clone = keras.models.clone_model(result)
    clone.set_weights(result.get_weights())
    equal(run(clone, x), run(result, x))
    torch.testing.assert_close(to_torch(result).eval()(x), run(result, x), rtol=1e-4, atol=1e-5)
    again = delete_channels(result, "conv", [0])
    assert again.get_layer("conv").filters == 3
    result.compile("sgd", "mse")
    result.fit(x, np.zeros((2, 4)), verbose=0)


def test_names_of_classes_go_with_their_channels():
    inputs = keras.Input((6,))
    x = kl.Dense(3, name="classes")(kl.Dense(4, name="hidden")(inputs))
    model = keras.Model(inputs, x)
    remember_(model, dataclasses.replace(remembered(model), label_names=("ant", "bee", "cat")))
    assert remembered(delete_channels(model, "hidden", 0)).label_names == ("ant", "bee", "cat")
    assert remembered(delete_channels(model, "classes", [1])).label_names == ("ant", "cat")
    assert remembered(model).label_names == ("ant", "bee", "cat")


# What can be deleted


@pytest.mark.slow
def test_deletable_channels_are_what_can_be_deleted():
    model, x = branched(kl.Add(name="join"))
    units = deletable_channels(model)
    assert units == [{"a": [i], "b": [i]} for i in range(6)]
    for unit in units:
        check(model, x, unit)
