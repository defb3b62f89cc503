"""What an engine's convolutions leave out, and pad by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
from keras import layers
from small_vgg import operations, randomise

from vggtorch.lowering import FusedConv2d, has_fused_ops
from vggtorch.lowering.fused import PaddingConv2d
from vggtorch.lowering.plan import Plan
from vggtorch.lowering.winograd import WinogradConv2d

Build = Callable[[Any], Any]


def engine_and_kinds(build: Build, size: tuple[int, int] = (12, 12)) -> tuple[Any, Any, list[Any]]:
    """A model, its engine, and what the engine's steps run."""
    keras.utils.set_random_seed(0)
    image = keras.Input((*size, 4))
    model = randomise(keras.Model(image, build(image)))
    engine = vt.optimize_for_inference(model)
    return model, engine, [step.run for segment in engine._segments for step in segment.steps]


def strides(runs: list[Any]) -> list[Any]:
    return [run.conv.stride for run in runs if isinstance(run, FusedConv2d)]


def check(model: keras.Model, engine: Any, size: tuple[int, int] = (12, 12)) -> None:
    """What Keras computes, where one image has an infinity and another one NaN too."""
    x = torch.randn(4, *size, 4)
    for number in (0.0, torch.inf, torch.nan):
        x[1, 0, -1, 0], x[2, -1, -1, 1] = number, -number
        expected = model(x, training=False)
        for found in (engine(x), engine(x)):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def block(x: Any, stride: int, projected: bool) -> Any:
    """A residual block that begins with its stride, as Keras's ResNets do."""
    y = layers.Conv2D(4, 1, strides=stride, activation="relu")(x)
    y = layers.Conv2D(4, 3, padding="same", activation="relu")(y)
    y = layers.BatchNormalization()(layers.Conv2D(6, 1)(y))
    x = layers.Conv2D(6, 1, strides=stride)(x) if projected else x
    return layers.ReLU()(layers.Add()([x, y]))


def resnet(x: Any) -> Any:
    return block(block(block(x, 1, True), 1, False), 2, True)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(12, 12), (13, 10), (1, 2)])
def test_a_block_whose_pixels_are_left_out_computes_the_others_alone(size: tuple[int, int]) -> None:
    model, engine, runs = engine_and_kinds(resnet, size)
    one, two = (1, 1), (2, 2)
    # The 3x3 of the second block takes the stride of the third, and its shortcut drops pixels.
    assert sorted(strides(runs)) == [one] * 10 + [two]
    assert any(type(run) is nn.MaxPool2d for run in runs)
    check(model, engine, size)


def taken_by_another(x: Any) -> Any:
    y = layers.Conv2D(4, 3)(x)
    z = layers.Conv2D(4, 1, strides=2)(y)
    return layers.Concatenate()([layers.GlobalMaxPooling2D()(v) for v in (y, z)])


def taken_by_a_larger_kernel(x: Any) -> Any:
    return layers.Conv2D(4, 2, strides=2)(layers.Conv2D(4, 3)(x))


def taken_at_two_strides(x: Any) -> Any:
    y = layers.Conv2D(4, 3)(x)
    ends = [layers.Conv2D(4, 1, strides=s)(y) for s in (2, 3)]
    return layers.Concatenate()([layers.GlobalMaxPooling2D()(v) for v in ends])


def to_one_at_a_stride(x: Any) -> Any:
    y = layers.Conv2D(4, 1, strides=2)(x)
    z = layers.Conv2D(4, 3, strides=2, padding="same")(x)
    return layers.ReLU()(layers.Add()([y, z]))


def one_at_a_stride_to_another(x: Any) -> Any:
    y = layers.Conv2D(4, 3, strides=2, padding="same")(x)
    z = layers.Conv2D(4, 1, strides=2)(x)
    return layers.ReLU()(layers.Add()([y, z]))


def of_the_input(x: Any) -> Any:
    return layers.Conv2D(4, 1, strides=2)(x)


def of_a_pool(x: Any) -> Any:
    return layers.Conv2D(4, 1, strides=2)(layers.MaxPooling2D(3, 1)(x))


@pytest.mark.parametrize(
    "build",
    [taken_by_another, taken_by_a_larger_kernel, taken_at_two_strides, to_one_at_a_stride,
     one_at_a_stride_to_another, of_the_input, of_a_pool],
)  # fmt: skip
def test_where_some_pixel_is_needed_strides_stay(build: Build) -> None:
    model, engine, runs = engine_and_kinds(build)
    own = [layer.strides for layer in model.layers if isinstance(layer, layers.Conv2D)]
    assert sorted(strides(runs)) == sorted(own)
    check(model, engine)


def test_an_output_of_the_model_keeps_its_pixels() -> None:
    image = keras.Input((9, 9, 4))
    y = layers.Conv2D(4, 3, name="y")(image)
    model = keras.Model(image, [y, layers.Conv2D(4, 1, strides=2)(y)])
    x = torch.randn(2, 9, 9, 4)
    # Of channels first nothing stands between the convolution and what the model returns.
    engine = vt.optimize_for_inference(model, data_format="channels_first")
    found = engine(x.permute(0, 3, 1, 2))
    for one, expected in zip(found, model(x, training=False), strict=True):
        torch.testing.assert_close(one.permute(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-5)


def padded(pads: Any, layer: keras.Layer) -> Build:
    return lambda x: layers.ReLU(max_value=6)(layer(layers.ZeroPadding2D(pads)(x)))


def depthwise(kernel: Any = 3, strides: int = 2, **options: Any) -> keras.Layer:
    return layers.DepthwiseConv2D(kernel, strides, **options)


INSIDE = {
    "MobileNet's": (((0, 1), (0, 1)), depthwise),
    "the other sides": (((1, 0), (1, 0)), depthwise),
    "one of each": (((1, 0), (0, 1)), depthwise),
    "EfficientNet's": (((1, 2), (1, 2)), lambda: depthwise(5)),
    "one axis": (((0, 0), (1, 0)), depthwise),
    "several of a channel": (((0, 1), (0, 1)), lambda: depthwise(depth_multiplier=2)),
    "ResNet's": (3, lambda: layers.Conv2D(4, 7, strides=2)),
    "uneven axes": (((2, 2), (1, 1)), lambda: layers.Conv2D(4, 3)),
    "dilated": (2, lambda: layers.Conv2D(4, 3, dilation_rate=2)),
}
APART = {
    "a full convolution": (((0, 1), (0, 1)), lambda: layers.Conv2D(4, 3, strides=2)),
    "two more": (((0, 2), (0, 2)), depthwise),
    "dilated": (((0, 1), (0, 1)), lambda: depthwise(strides=1, dilation_rate=2)),
    "1x1": (1, lambda: layers.Conv2D(4, 1)),
    "windows of zeros": (3, lambda: layers.Conv2D(4, 3)),
    "twice": (1, lambda: layers.Conv2D(4, 3, padding="same")),
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_convolution_pads_by_itself(name: str) -> None:
    pads, layer = INSIDE[name]
    model, engine, runs = engine_and_kinds(padded(pads, layer()))
    assert not any(isinstance(run, nn.ZeroPad2d) for run in runs)
    assert any(isinstance(getattr(run, "fused", None), PaddingConv2d) for run in runs)
    check(model, engine)


@pytest.mark.parametrize("name", APART)
def test_what_it_cannot_pad_is_padded_before(name: str) -> None:
    pads, layer = APART[name]
    model, engine, runs = engine_and_kinds(padded(pads, layer()))
    assert any(isinstance(run, nn.ZeroPad2d) for run in runs)
    check(model, engine)


def shared_padding(x: Any) -> Any:
    x = layers.ZeroPadding2D(1)(x)
    return layers.Add()([layers.Conv2D(4, 3)(x), layers.Conv2D(4, 3)(x)])


def test_a_padding_that_two_take_is_made_once() -> None:
    model, engine, runs = engine_and_kinds(shared_padding)
    assert sum(isinstance(run, nn.ZeroPad2d) for run in runs) == 1
    check(model, engine)


@pytest.mark.parametrize("activation, inside", [("relu", True), (None, False)])
@pytest.mark.parametrize(
    "pads, fits",
    [(1, True), (2, False), (((0, 1), (0, 0)), False), (((0, 0), (1, 0)), False),
     (((2, 2), (1, 1)), False), (((1, 1), (2, 2)), False)],
)  # fmt: skip
def test_a_pool_pads_by_itself_what_is_not_negative(
    activation: str | None, inside: bool, pads: Any, fits: bool
) -> None:
    def build(x: Any) -> Any:
        x = layers.Conv2D(4, 3, activation=activation)(x)
        return layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(pads)(x))

    model, engine, runs = engine_and_kinds(build)
    assert any(isinstance(run, nn.ZeroPad2d) for run in runs) is not (inside and fits)
    check(model, engine)


def of_the_image(x: Any) -> Any:
    return layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(1)(x))


def of_another_pool(x: Any) -> Any:
    return of_the_image(layers.MaxPooling2D(2, 1)(x))


def of_means(x: Any) -> Any:
    x = layers.Conv2D(4, 3, activation="relu")(x)
    return layers.AveragePooling2D(3, 2)(layers.ZeroPadding2D(1)(x))


@pytest.mark.parametrize("build", [of_the_image, of_another_pool, of_means])
def test_other_pools_are_padded_before(build: Build) -> None:
    model, engine, runs = engine_and_kinds(build)
    assert any(isinstance(run, nn.ZeroPad2d) for run in runs)
    check(model, engine)


def test_a_pool_of_the_very_input_is_padded_before() -> None:
    image = keras.Input((8, 8, 4))
    model = keras.Model(image, of_the_image(image))
    network, x = vt.to_torch(model, data_format="channels_first").eval(), torch.randn(2, 8, 8, 4)
    found = network(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(found, model(x, training=False))


def narrowing(x: Any) -> Any:
    """What is trimmed in each way: a stride taken over, pixels of a shortcut, padding inside."""
    x = layers.Conv2D(6, 3, padding="same", activation="relu", name="first")(x)
    x = layers.MaxPooling2D(3, 2, name="pool")(layers.ZeroPadding2D(1, name="pool_pad")(x))
    y = layers.Conv2D(6, 3, padding="same", name="inner")(x)
    x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.Conv2D(8, 1, strides=2, name="down")(x)
    x = layers.ReLU(max_value=6, name="six")(layers.BatchNormalization(name="bn")(x))
    x = layers.ZeroPadding2D(((0, 1), (0, 1)), name="pad")(x)
    return layers.DepthwiseConv2D(3, strides=1, activation="relu", name="depthwise")(x)


def change(name: str, attribute: str, value: Any) -> Callable[[Any], None]:
    return lambda network: setattr(getattr(network, name), attribute, value)


def write(name: str, number: float) -> Callable[[Any], None]:
    return lambda network: getattr(network, name).weight.data[1].mul_(number)


CHANGES: dict[str, Callable[[Any], None]] = {
    "a stride": change("down", "stride", (1, 1)),
    "one number as a stride": change("down", "stride", 3),
    "one number as another's": change("inner", "stride", 1),
    "a padding": change("inner", "padding", "same"),
    "a dilation": change("depthwise", "dilation", (2, 2)),
    "one number as a dilation": change("depthwise", "dilation", 1),
    "more around": change("pad", "padding", (2, 1, 0, 1)),
    "nothing around": change("pad", "padding", (0, 0, 0, 0)),
    "a cut": change("pad", "padding", (-1, -1, -1, -1)),
    "ones around": change("pad", "value", 1.0),
    "ones around a pool": change("pool_pad", "value", 9.0),
    "NaN around": change("pad", "value", torch.nan),
    "more around a pool": change("pool_pad", "padding", (2, 2, 1, 1)),
    "a pool": change("pool", "kernel_size", 2),
    "a pool that rounds up": change("pool", "ceil_mode", True),
    "a pool's own padding": change("pool", "padding", 1),
    "a pool's dilation": change("pool", "dilation", 2),
    "zeros around a stride": change("down", "padding", (1, 1)),
    "limits": change("six", "max_val", 0.1),
    "an epsilon": change("bn", "eps", 1.0),
    "a wider kernel": lambda network: setattr(
        network.down, "weight", nn.Parameter(torch.randn(8, 6, 3, 3))
    ),
    "weights of a stride": write("inner", 3.0),
    "weights that pad": write("depthwise", 3.0),
    "a weight that pads, replaced": lambda network: setattr(
        network.depthwise, "weight", nn.Parameter(torch.randn(8, 1, 3, 3))
    ),
}
SAY_THE_SAME = {"one number as another's", "a padding", "one number as a dilation"}


@pytest.mark.filterwarnings("ignore:.*stand alone")
@pytest.mark.parametrize("data_format", [None, "channels_first"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_network_follows_what_its_steps_were_made_for(name: str, data_format: str | None) -> None:
    keras.utils.set_random_seed(0)
    image = keras.Input((17, 18, 3))
    network: Any = vt.to_torch(
        randomise(keras.Model(image, narrowing(image))), data_format=data_format
    ).eval()
    x = torch.randn(3, 3, 17, 18) if data_format else torch.randn(3, 17, 18, 3)
    found, expected = [], []
    with torch.no_grad():
        for _ in range(2):
            found += [network(x), network(x)]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Plan, "takes", lambda self, inputs: False)
                expected += [network(x)] * 2
            CHANGES[name](network)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    is_same = found[0].shape == found[-1].shape and torch.allclose(found[0], found[-1], 1e-5, 1e-5)
    assert is_same is (name in SAY_THE_SAME)


def test_values_that_trimming_adds_are_no_others() -> None:
    image = keras.Input((13, 14, 3))
    network: Any = vt.to_torch(keras.Model(image, narrowing(image))).eval()
    ways = network._current_plan().ways
    steps = [step for part in ways.with_settled(len(ways.steps)).segments for step in part.steps]
    numbers = [*ways.inputs, *(step.output for step in steps)]
    assert len(numbers) == len(set(numbers))


def test_what_pads_by_itself_takes_the_addition_behind_it() -> None:
    image = keras.Input((7, 7, 4))
    x = layers.DepthwiseConv2D(3)(layers.ZeroPadding2D(((0, 1), (0, 1)))(image))
    model = keras.Model(image, layers.Add()([x, layers.Conv2D(4, 2)(image)]))
    network, images = vt.to_torch(model).eval(), torch.randn(2, 7, 7, 4)
    with torch.no_grad():
        torch.testing.assert_close(network(images), model(images), rtol=1e-5, atol=1e-6)
        ran = operations(network, images)
    assert not has_fused_ops(images, images.dtype) or not {"aten::conv2d", "aten::pad"} & ran


def test_a_frozen_start_leaves_out_no_pixel_that_the_rest_takes() -> None:
    image = keras.Input((9, 9, 3))
    y = layers.Conv2D(4, 3, trainable=False)(image)
    ends = layers.Conv2D(4, 1, strides=2, trainable=False)(y), layers.Conv2D(4, 3, name="learns")(y)
    model = randomise(keras.Model(image, ends))
    network: Any = vt.to_torch(model, data_format="channels_first").train()
    x = torch.randn(2, 3, 9, 9)
    by_keras = model(x.permute(0, 2, 3, 1), training=True)
    for one, expected in zip(network(x), by_keras, strict=True):
        torch.testing.assert_close(one.permute(0, 2, 3, 1), expected, rtol=1e-5, atol=1e-5)


def test_what_pads_by_itself_may_be_computed_winograds_way(monkeypatch: Any) -> None:
    """As in networks from when Keras had no padding of its own but zeros."""
    ran = []
    convolve = WinogradConv2d.__call__

    def noted(self: WinogradConv2d, *args: Any) -> torch.Tensor:
        ran.append(self)
        return convolve(self, *args)

    monkeypatch.setattr(WinogradConv2d, "__call__", noted)
    image = keras.Input((28, 28, 192))
    x = layers.Conv2D(192, 3, activation="relu")(layers.ZeroPadding2D(1)(image))
    model = keras.Model(image, x)
    images = torch.rand(1, 28, 28, 192)
    expected = model(images, training=False)
    with torch.no_grad():
        found = vt.to_torch(model, winograd=True).eval()(images)
    assert has_fused_ops(images, images.dtype) == bool(ran)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
