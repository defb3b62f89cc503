"""Groups of images: at the size where they begin, and where what they share may be overwritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
from keras import layers
from small_vgg import assert_close, images, on_keras, small_vgg, step

from vggtorch.lowering import FusedConv2d, kernels, running


def both_train(
    make: Callable[[], keras.Model], x: torch.Tensor, tolerance: float = 1e-3, **options: Any
) -> None:
    """Outputs, gradients and moving statistics of one step, lowered and by Keras itself."""
    found = []
    for lowered in (True, False):
        keras.utils.set_random_seed(0)
        model = make()
        run: Any = on_keras(model, **options).train() if lowered else model
        output = run(x) if lowered else run(x, training=True)
        output.square().sum().backward()
        # Behind a batch norm a bias changes nothing: what is left as its gradient is rounding.
        variables = [v for v in model.variables if v.name != "bias"]
        found.append([output, *(v.value.grad if v.trainable else v.value for v in variables)])
    for actual, expected in zip(*found, strict=True):
        assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", [False, True])
def test_vgg_with_batch_norm_trains_at_its_own_size(one_thread: None, checkpoint: bool) -> None:
    """Where the ReLU behind a batch norm is the first step that runs in groups."""

    def make() -> keras.Model:
        shape = (224, 224, 3)
        vgg = vt.VGG11(weights=None, include_top=False, input_shape=shape, batch_norm=True)
        return vt.truncate(vgg, "block3_pool")  # behind it all images fit into one group

    # Rounding turns some of the ReLUs of four layers on and off.
    both_train(make, torch.rand(3, 224, 224, 3), tolerance=5e-2, checkpoint=checkpoint)


def norm_then_relu(image: Any) -> Any:
    x = layers.BatchNormalization()(layers.Conv2D(4, 3)(image))
    return layers.Conv2D(4, 3)(layers.ReLU()(x))


def norm_then_conv_with_relu(image: Any) -> Any:
    x = layers.BatchNormalization()(layers.Conv2D(4, 3, activation="relu")(image))
    return layers.Conv2D(4, 3, activation="relu")(x)


def relu_of_the_input(image: Any) -> Any:
    return layers.Conv2D(4, 3)(layers.ReLU()(image))


def sum_then_relu(image: Any) -> Any:
    x = layers.MaxPooling2D()(layers.Conv2D(4, 3)(image))
    x = layers.ReLU()(layers.Add()([x, x]))
    return layers.Conv2D(4, 3)(x)


def one_value_twice(image: Any) -> Any:
    return layers.Conv2D(4, 3)(layers.Multiply()([image, image]))


def one_value_twice_after_a_pool(image: Any) -> Any:
    x = layers.MaxPooling2D()(layers.Conv2D(4, 3, activation="relu")(image))
    return layers.Conv2D(4, 3)(layers.Concatenate()([x, x]))


def a_branch_around_a_relu(image: Any) -> Any:
    x = layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same")(image))
    return layers.Conv2D(4, 3)(layers.Add()([x, layers.ReLU()(x)]))


def a_nested_model(image: Any) -> Any:
    x = layers.BatchNormalization()(layers.Conv2D(4, 3)(image))
    inner = keras.Input(x.shape[1:])
    nested = keras.Model(inner, layers.Conv2D(4, 3)(layers.ReLU()(inner)))
    return nested(x)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(
    "build",
    [
        norm_then_relu,
        norm_then_conv_with_relu,
        relu_of_the_input,
        sum_then_relu,
        one_value_twice,
        one_value_twice_after_a_pool,
        a_branch_around_a_relu,
        a_nested_model,
    ],
)
def test_what_stands_where_groups_begin(build: Callable[[Any], Any], checkpoint: bool) -> None:
    def make() -> keras.Model:
        image = keras.Input((12, 12, 3))
        return keras.Model(image, build(image))

    x = torch.randn(4, 12, 12, 3)
    before = x.clone()
    both_train(make, x, checkpoint=checkpoint)
    model = make()
    with torch.no_grad():
        expected = model(x, training=False)
        torch.testing.assert_close(on_keras(model).eval()(x), expected)
        assert on_keras(model).eval()(x[:0]).shape == (0, *expected.shape[1:])
    assert torch.equal(x, before)


@pytest.mark.slow
def test_images_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image after the other gives what all at once give, in inference and in training."""
    model, twin = small_vgg(), small_vgg()
    x = images(model)
    expected, expected_left = step(twin, lambda x: twin(x, training=True))
    monkeypatch.setattr(running, "GROUP_BYTES", 1)
    module = on_keras(model).train()
    entered: list[int] = []
    convolve = kernels.Convolution.apply

    def spy(x: torch.Tensor, *args: Any) -> torch.Tensor:
        entered.append(len(x))
        return convolve(x, *args)

    monkeypatch.setattr(kernels.Convolution, "apply", spy)
    with torch.profiler.profile() as profile:
        output, left = step(model, module)
    assert entered[:5] == [2, 1, 1, 1, 1]  # the first two to see how many fit
    # Each would fill and add up a tensor as large as the batch's.
    assert "aten::slice_backward" not in {event.key for event in profile.key_averages()}
    assert_close(output, expected, 1e-4)
    for actual, value in zip(left, expected_left, strict=True):
        assert_close(actual, value, 1e-4)
    with torch.no_grad():
        assert_close(module.eval()(x), model(x, training=False))


def test_a_weight_is_prepared_for_one_image_and_for_several() -> None:
    """The orders differ, and a kernel with the other's takes several times as long."""
    image = keras.Input((14, 14, 16))
    network: Any = vt.to_torch(keras.Model(image, layers.Conv2D(32, 1)(image))).eval()
    for count in (1, 4, 1, 3):
        with torch.no_grad():
            network(torch.randn(count, 14, 14, 16))
    (way,) = network._plan.ways.made.values()
    (segment,) = way.segments
    (fused,) = (s.run for s in segment.steps if isinstance(s.run, FusedConv2d))
    prepared, *_ = fused.constants.made
    several = {False} if running.GROUP_BYTES > 1 else set()
    assert set(prepared.made) == {True} | several


def strided(image: Any) -> Any:
    """A map of 8 KB an image, one of 2 and one of 0.5."""
    x = layers.Conv2D(8, 3, padding="same")(image)
    return layers.Conv2D(8, 2, strides=2)(layers.Conv2D(8, 2, strides=2)(x))


def through_a_waist(image: Any) -> Any:
    """Maps of 16, 4, 0.5 and 6 KB an image: the third is the cheapest to join."""
    x = layers.Conv2D(16, 3, padding="same")(image)
    x = layers.DepthwiseConv2D(2, strides=2)(x)
    return layers.Conv2D(24, 1)(layers.Conv2D(2, 1)(x))


def around_a_convolution(image: Any) -> Any:
    """Where the maps are smaller first, the large one is needed once more."""
    x = layers.Conv2D(8, 3, padding="same")(image)
    small = layers.Conv2D(8, 2, strides=2)(x)
    return layers.Add()([small, layers.Conv2D(8, 2, strides=2)(x)])


@pytest.mark.parametrize(
    "build, room, count, groups",
    [
        (strided, 8 << 10, 6, [1, 1] * 6 + [6]),
        (strided, 16 << 10, 5, [2, 2, 2, 2, 1, 1, 5]),  # the groups are as equal as can be
        (strided, 32 << 10, 5, [3, 3, 2, 2, 5]),
        (strided, 64 << 10, 5, [5, 5, 5]),
        (through_a_waist, 16 << 10, 4, [1, 1, 1] * 4 + [2, 2]),
        (around_a_convolution, 16 << 10, 4, [2, 2, 2] * 2),
    ],
)
def test_where_maps_are_smaller_groups_are_larger(
    monkeypatch: pytest.MonkeyPatch, one_thread: None, build: Any, room: int, count: int,
    groups: list[int],
) -> None:  # fmt: skip
    monkeypatch.setattr(running, "GROUP_BYTES", room)
    image = keras.Input((16, 16, 3))
    model = keras.Model(image, build(image))
    network: Any = vt.to_torch(model).eval()
    x = torch.randn(count, 16, 16, 3)
    entered: list[int] = []
    convolve = kernels.conv2d

    def spy(x: torch.Tensor, *args: Any) -> torch.Tensor:
        entered.append(len(x))
        return convolve(x, *args)

    with torch.no_grad():
        network(x[:1])  # looks at the sizes
        monkeypatch.setattr(kernels, "conv2d", spy)
        found = network(x)
    assert entered == groups
    assert_close(found, model(x, training=False))
