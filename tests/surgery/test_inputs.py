"""Another size or other channels: all weights kept, the first kernel made by the rule."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import by_torchvision
import keras
import numpy as np
import pytest
import torch
from contract import equal, images, operations, run, same_snapshot, shake_, snapshot, vgg
from keras import layers as kl
from test_nested import layers, outer, siamese
from torch import nn

from vggtorch.models import VGG11, as_layers, data_config, preprocess, remember_, weight_set
from vggtorch.surgery import insert, truncate, with_input

pytestmark = pytest.mark.usefixtures("one_thread")


def values(model):
    return {path: x.get_weights() for path, x in layers(model).items() if hasattr(x, "get_weights")}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 96, 3), (None, None, 3), (32, 48, 3)])
def test_another_size_keeps_all_weights(shape):
    model, _ = vgg()
    before = snapshot(model)
    result = with_input(model, shape)
    same_snapshot(before, snapshot(model))
    assert result.input_shape == (None, *shape)
    for a, b in zip(model.variables, result.variables, strict=True):
        equal(a.value, b.value)
    # keras_cv_attention_models#87 does it by clone_model and set_weights.
    reference = keras.models.clone_model(model, input_tensors=keras.Input(shape))
    reference.set_weights(model.get_weights())
    x = images(64)[:, :32, :48] if shape == (32, 48, 3) else images(96)[:, :64]
    equal(run(result, x), run(reference, x))


@pytest.mark.parametrize("name", ["outer", "siamese", "sequential"])
def test_nested_models_follow(name):
    inputs = [keras.Input((8, 8, 3)), outer().get_layer("tower"), kl.GlobalMaxPooling2D(name="g")]
    model = {"outer": outer, "siamese": siamese, "sequential": lambda: keras.Sequential(inputs)}
    model = shake_(model[name]())
    x = images(12) / 255
    if name == "siamese":
        result = with_input(model, {"a": (12, 12, 3), "b": (12, 12, 3)})
        x = [x, x.flip(1)]
    else:
        result = with_input(model, (12, 12, 3))
    assert layers(result)["tower"].input_shape == (None, 12, 12, 3)
    assert len(result.variables) == len(model.variables)
    for path, value in values(model).items():
        for a, b in zip(value, values(result)[path], strict=True):
            np.testing.assert_array_equal(a, b)
    free = (None, None, 3)
    open_ = with_input(model, {"a": free, "b": free} if name == "siamese" else free)
    torch.testing.assert_close(run(result, x), run(open_, x))


def first(kernel_size=3, **options):
    inputs = keras.Input((8, 8, 3), name="image")
    x = kl.Conv2D(4, kernel_size, padding="same", name="conv", **options)(inputs)
    return shake_(keras.Model(inputs, kl.ReLU(name="relu")(x), name="first"))


X = torch.rand(2, 8, 8, 3, generator=torch.Generator().manual_seed(1))


def kernels(model, result):
    return model.get_layer("conv").get_weights()[0], result.get_layer("conv").get_weights()[0]


@pytest.mark.parametrize("rule", ["mean", "sum", "zero"])
def test_added_channels_get_what_the_rule_says(rule):
    model = first()
    result = with_input(model, channels=5, rule=rule)
    old, new = kernels(model, result)
    np.testing.assert_array_equal(new[:, :, :3], old)
    for i in (3, 4):
        expected = {"mean": old.mean(2), "sum": old.sum(2), "zero": 0 * old.sum(2)}[rule]
        np.testing.assert_allclose(new[:, :, i], expected, rtol=1e-6, atol=1e-7)
    more = torch.cat([X, torch.zeros(2, 8, 8, 2)], -1)
    torch.testing.assert_close(run(result, more), run(model, X))
    if rule == "zero":
        more[..., 3:] = 7.0
        torch.testing.assert_close(run(result, more), run(model, X))


def test_grey_and_frames():
    """One grey channel by "sum" is three equal ones; equal frames by "repeat" are one of them."""
    model = first()
    grey = X[..., :1]
    torch.testing.assert_close(
        run(with_input(model, channels=1, rule="sum"), grey), run(model, grey.repeat(1, 1, 1, 3))
    )
    frames = with_input(model, channels=6, rule="repeat")
    torch.testing.assert_close(run(frames, X.repeat(1, 1, 1, 2)), run(model, X))
    old, new = kernels(model, with_input(model, channels=1))
    np.testing.assert_allclose(new[:, :, 0], old.mean(2), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("channels", [2, 4, 7])
def test_repeat_is_timms_rule(channels):
    from timm.models import adapt_input_conv

    model = first()
    old, new = kernels(model, with_input(model, channels=channels, rule="repeat"))
    weight = torch.from_numpy(old).permute(3, 2, 0, 1)  # HWIO -> OIHW
    expected = adapt_input_conv(channels, weight).permute(2, 3, 1, 0)
    np.testing.assert_allclose(new, expected.numpy(), rtol=1e-6)


def test_a_function_as_rule():
    model = first()
    result = with_input(model, channels=2, rule=lambda kernel, n: kernel[..., :n, :] * 2)
    old, new = kernels(model, result)
    np.testing.assert_allclose(new, old[:, :, :2] * 2, rtol=1e-6)
    with pytest.raises(ValueError, match=r"made a kernel of shape \(3, 3, 3, 4\).*\(3, 3, 2, 4\)"):
        with_input(model, channels=2, rule=lambda kernel, n: kernel)


def test_layers_before_the_first_kernel_and_several_of_those():
    inputs = keras.Input((8, 8, 3), name="image")
    x = kl.Dropout(0.1, name="drop")(kl.ZeroPadding2D(name="pad")(kl.Rescaling(0.5)(inputs)))
    conv = kl.Conv2D(4, 3, name="conv")
    side = kl.Dense(4, name="dense")(kl.Cropping2D(1, name="crop")(x))
    joined = kl.Add(name="add")([conv(x), conv(x), side])
    model = shake_(keras.Model(inputs, joined))
    result = with_input(model, (12, 12, 4), rule="zero")
    assert result.get_layer("conv").kernel.shape == (3, 3, 4, 4)
    assert result.get_layer("dense").kernel.shape == (4, 4)
    x = torch.rand(2, 12, 12, 4)
    torch.testing.assert_close(run(result, x), run(with_input(model, (12, 12, 3)), x[..., :3]))
    assert run(with_input(outer(), channels=4), torch.rand(1, 8, 8, 4)).shape == (1, 2)


@pytest.mark.slow
def test_the_weight_set_follows_a_size_and_is_given_up_for_other_channels():
    model = VGG11(weights=None, include_top=False, input_shape=(32, 32, 3))
    model = remember_(truncate(model, "block1_pool"), "oxford")
    result = with_input(model, (48, 48, 3))
    assert weight_set(result) == "oxford"
    assert data_config(result).size == (48, 48)
    with pytest.warns(UserWarning, match=r"preprocessing of 'oxford', which is for RGB.*no longer"):
        result = with_input(model, channels=4)
    assert weight_set(result) is None
    with pytest.raises(ValueError, match="does not say which weight set"):
        preprocess(np.zeros((32, 32, 3), "uint8"), result)

    inputs = keras.Input((32, 32, 3))
    x = as_layers(inputs, "oxford")
    for layer in model.layers[1:]:
        x = layer(x)
    inside = remember_(keras.Model(inputs, x), "oxford")
    photograph = np.full((40, 40, 3), 77, "uint8")
    assert data_config(with_input(inside, (40, 40, 3))).preprocessing_inside
    with pytest.warns(UserWarning, match="no longer remembers it, and it is taken out"):
        result = with_input(inside, (40, 40, 4), rule="zero")
    assert not any("preprocessing" in name or "flip" in name for name in operations(result))
    rgb = torch.from_numpy(np.asarray(preprocess(photograph, "oxford")))
    y = run(result, torch.cat([rgb, torch.ones(1, 40, 40, 1)], -1))
    torch.testing.assert_close(y, run(with_input(model, (40, 40, 3)), rgb), rtol=1e-4, atol=1e-3)


def classifier():
    inputs = keras.Input((56, 56, 3), name="image")
    x = kl.Conv2D(4, 3, padding="same", strides=8, name="conv")(inputs)
    x = kl.Dense(5, name="fc")(kl.Flatten(name="flatten")(x))
    return shake_(keras.Model(inputs, x, name="classifier"))


def test_a_classifier_takes_other_sizes_by_adaptive_pooling():
    model = classifier()
    with pytest.raises(ValueError, match=r"'flatten' reads a map of 7x7.*AdaptiveAveragePooling2D"):
        with_input(model, (96, 96, 3))
    pooled = insert(model, "conv", kl.AdaptiveAveragePooling2D((7, 7), name="avgpool"))
    x = images(96) / 255
    result = with_input(pooled, (96, 96, 3))
    with torch.no_grad():
        maps = result.get_layer("conv")(x)  # (N, 12, 12, 4)
        seven = torch.nn.functional.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2), 7)
        expected = result.get_layer("fc")(seven.permute(0, 2, 3, 1).flatten(1))
    torch.testing.assert_close(run(result, x), expected)
    same = images(56) / 255
    torch.testing.assert_close(run(pooled, same), run(model, same))


def test_a_published_classifier_of_another_size_is_told_how():
    for shape in ((96, 96, 3), (None, None, 3)):
        with pytest.raises(ValueError, match=r"map of 7x7.*vt\.with_input\(vt\.insert\(vgg"):
            VGG11(weights="imagenet", input_shape=shape)


@pytest.mark.slow
def test_vgg_with_its_classifier_is_torchvisions_at_another_size(tmp_path, narrow):
    torch.manual_seed(0)
    parts = {
        "features": by_torchvision.features("vgg11", narrow=True),
        "avgpool": nn.AdaptiveAvgPool2d(7),
        "flatten": nn.Flatten(),
        "classifier": nn.Sequential(
            *(nn.Linear(64 * 7 * 7, 64), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)),
        ),
    }
    reference = nn.Sequential(OrderedDict(parts)).eval()
    torch.save(reference.state_dict(), tmp_path / "vgg11.pth")
    model = VGG11(weights=tmp_path / "vgg11.pth", classes=10, classifier_activation=None)
    pooled = insert(model, "block5_pool", kl.AdaptiveAveragePooling2D(7, name="avgpool"))
    del model
    result = with_input(pooled, (96, 96, 3))
    x = torch.rand(2, 96, 96, 3)
    with torch.no_grad():
        expected = reference(x.permute(0, 3, 1, 2))
    torch.testing.assert_close(run(result, x), expected, rtol=1e-4, atol=1e-5)


def scaled(layer):
    return keras.Sequential([keras.Input((4, 4, 3)), layer, kl.Conv2D(2, 1, name="conv")])


SCALED = {"rescaling": kl.Rescaling([1.0, 2.0, 3.0]), "offset": kl.Rescaling(1.0, [1.0, 2.0, 3.0])}
SCALED["normalization"] = kl.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 1.0, 2.0])


@pytest.mark.parametrize("case", SCALED)
@pytest.mark.parametrize("channels", [1, 4])
def test_numbers_for_each_channel_are_not_spread_in_silence(case, channels):
    model = scaled(SCALED[case])
    with pytest.raises(ValueError, match=rf"can't give .* {channels} channels: it has numbers of"):
        with_input(model, channels=channels)
    assert with_input(model, (6, 5, 3)).output_shape == (None, 6, 5, 2)
    one = scaled(kl.Rescaling(0.5, name="half"))
    assert with_input(one, channels=channels).get_layer("conv").kernel.shape[2] == channels


FOUR: Any = np.int64(4)
SIZES: Any = np.array([8, 9, 3])


def bgr(place):
    """A network that turns RGB into BGR by an operation, a Lambda layer or in a nested model."""
    inputs = keras.Input((4, 4, 3), name="image")
    if place == "operation":
        x = keras.ops.flip(inputs, -1)
    elif place == "lambda":
        x = kl.Lambda(lambda x: keras.ops.flip(x, -1))(inputs)
    elif place == "nested":
        inner = keras.Input((4, 4, 3))
        x = keras.Model(inner, keras.ops.flip(inner, -1), name="inner")(inputs)
    else:
        x = inputs[..., :3]
    return keras.Model(inputs, kl.Conv2D(2, 1, name="conv")(x * 2.0))


@pytest.mark.parametrize("place", ["operation", "lambda", "nested", "three of them"])
def test_channels_that_are_moved_before_the_first_kernel_are_refused(place):
    model = bgr(place)
    with pytest.raises(ValueError, match="other channels: it puts them in another order, or in"):
        with_input(model, channels=4, rule="zero")
    assert with_input(model, (6, 5, 3)).output_shape == (None, 6, 5, 2)


def test_keras_own_preprocessing_in_a_model_is_for_three_channels():
    inputs = keras.Input((4, 4, 3))
    x = keras.applications.vgg16.preprocess_input(inputs)
    model = keras.Model(inputs, kl.Conv2D(2, 1, name="conv")(x))
    for channels in (1, 4):
        with pytest.raises(ValueError, match=r"get_item\w*' \(GetItem\).*Take it out, vt\.remove"):
            with_input(model, channels=channels)


def test_operations_that_leave_channels_in_their_places_stay():
    inputs = keras.Input((6, 6, 3), name="image")
    x = keras.ops.pad(
        keras.ops.flip(inputs, 1)[:, :, 1:] / 255 - 0.5, [[0, 0], [1, 1], [1, 1], [0, 0]]
    )
    model = shake_(keras.Model(inputs, kl.Conv2D(2, 3, name="conv")(x)))
    wide = with_input(model, channels=FOUR, rule="zero")
    x = torch.rand(2, 6, 6, 4)
    torch.testing.assert_close(run(wide, x), run(model, x[..., :3]))
    assert with_input(model, SIZES).output_shape == (None, 8, 8, 2)


def channels_first(*layers: keras.Layer) -> keras.Model:
    """Where Keras's own layout is the other one."""
    conv = kl.Conv2D(2, 3, name="conv", data_format="channels_first")
    pool = kl.GlobalAveragePooling2D(data_format="channels_first", name="pool")
    return shake_(keras.Sequential([keras.Input((3, 8, 8)), *layers, conv, pool]))


def test_channels_stand_where_the_layers_have_them():
    model = channels_first()
    wide = with_input(model, channels=5, rule="zero")
    assert wide.input_shape == (None, 5, 8, 8)
    x = torch.rand(2, 5, 8, 8)
    torch.testing.assert_close(run(wide, x), run(model, x[:, :3]))
    assert with_input(model, (3, 6, 7)).input_shape == (None, 3, 6, 7)
    sequences = [keras.Input((3, 9)), kl.Conv1D(2, 3, name="conv", data_format="channels_first")]
    assert with_input(keras.Sequential(sequences), channels=4).input_shape == (None, 4, 9)


def quantized() -> keras.Model:
    model = keras.Sequential([keras.Input((8,)), kl.Dense(4, name="whole")])
    model.get_layer("whole").quantize("int8")
    return model


DEPTHWISE = [keras.Input((4, 4, 3)), kl.DepthwiseConv2D(3, name="deep")]
NORM = [keras.Input((4, 4, 3)), kl.BatchNormalization(name="norm"), kl.Conv2D(2, 1, name="conv")]
MAX: Any = "max"
NUMBER: Any = 8
TEXT: Any = "888"
FRACTION: Any = (8.0, 8, 3)
NO_NUMBERS: Any = lambda kernel, n: None  # noqa: E731
REFUSED = {
    "nothing": (lambda: with_input(first()), "neither a shape nor channels"),
    "rule": (lambda: with_input(first(), channels=4, rule=MAX), "expects rule='mean'.*'max'"),
    "rank": (lambda: with_input(first(), (8, 8)), r"shape \(8, 8\); expected 3 numbers"),
    "zero size": (lambda: with_input(first(), (0, 8, 3)), r"\(0, 8, 3\); expected 3 numbers"),
    "no channels": (lambda: with_input(first(), channels=0), "channels=0; expected 1 or more"),
    "a truth value": (lambda: with_input(first(), channels=True), "channels=True; expected 1"),
    "two numbers of channels": (
        lambda: with_input(first(), (8, 8, 5), channels=4),
        r"channels=4 and the shape \(8, 8, 5\), which has 5",
    ),
    "open channels": (lambda: with_input(first(), (8, 8, None)), "whose channels are open"),
    "fewer by zero": (lambda: with_input(first(), channels=2, rule="zero"), "2 channels in place"),
    "several inputs": (lambda: with_input(siamese(), (9, 9, 3)), "several inputs.*'a', 'b'"),
    "unknown input": (lambda: with_input(siamese(), {"c": (9, 9, 3)}), r"no inputs \['c'\]"),
    "one of two that share": (
        lambda: with_input(siamese(), {"a": (16, 16, 3)}),
        "'tower'|'both'",
    ),
    "too small": (lambda: with_input(outer(), (1, 1, 3)), "'tower/pool'.*doesn't go through"),
    "a number": (lambda: with_input(first(), NUMBER), r"the shape 8; expected 3 numbers"),
    "a text": (lambda: with_input(first(), TEXT), r"the shape '888'; expected 3 numbers"),
    "a fraction": (lambda: with_input(first(), FRACTION), r"\(8.0, 8, 3\); expected 3 numbers"),
    "a rule of no numbers": (
        lambda: with_input(first(), channels=4, rule=NO_NUMBERS),
        r"made a kernel of shape \(\) from .*expected \(\d, \d, 4, \d\)\.$",
    ),
    "a rule of NaN": (
        lambda: with_input(first(), channels=2, rule=lambda kernel, n: kernel[..., :n, :] * np.nan),
        "a rule that made NaN",
    ),
    "a batch norm first": (
        lambda: with_input(keras.Sequential(NORM), channels=4),
        r"'norm' \(BatchNormalization\) expects \(None, 4, 4, 3\).*vt.insert",
    ),
    "numbers of channels that stand first": (
        lambda: with_input(
            channels_first(kl.Rescaling([[[1.0]], [[2.0]], [[3.0]]], name="scale")), channels=1
        ),
        r"can't give 'scale' \(Rescaling\) 1 channels: it has numbers of its own for each of 3",
    ),
    "a quantized kernel": (
        lambda: with_input(quantized(), channels=9, rule="sum"),
        r"'whole' \(Dense\) expects \(None, 8\).*alone, in floating point",
    ),
    "a depthwise convolution": (
        lambda: with_input(keras.Sequential(DEPTHWISE), channels=4),
        r"'deep' \(DepthwiseConv2D\) expects \(None, 4, 4, 3\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cant_be_is_refused(case):
    operation, text = REFUSED[case]
    with pytest.raises(ValueError, match=text):
        operation()
