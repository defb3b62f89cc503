"""Additions that a convolution in inference takes over: the same as the modules one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
from keras import layers, ops
from small_vgg import randomise

from vggtorch.lowering import FusedConv2d


def conv(x: Any, filters: int = 4, **options: Any) -> Any:
    return layers.Conv2D(filters, 3, **{"padding": "same", **options})(x)


def relu_of_sum(a: Any, b: Any) -> Any:
    return layers.ReLU()(layers.Add()([a, b]))


def identity_block(x: Any) -> Any:
    return relu_of_sum(layers.BatchNormalization()(conv(conv(x))), x)


def projection_block(x: Any) -> Any:
    """Both that are added are convolutions."""
    shortcut = layers.BatchNormalization()(conv(x, strides=2))
    return relu_of_sum(shortcut, conv(conv(x, strides=2, activation="relu")))


def linear_block(x: Any) -> Any:
    return conv(layers.Add()([x, conv(x)]))


def three(x: Any) -> Any:
    return relu_of_sum(layers.Add()([conv(x), x, conv(x)]), x)


def by_the_operator(x: Any) -> Any:
    return layers.ReLU()(x + conv(x))


def relu6_of_sum(x: Any) -> Any:
    return layers.ReLU(max_value=6)(layers.Add()([conv(x), x]))


def one_number_for_each_channel(x: Any) -> Any:
    """Shapes differ, and torch broadcasts."""
    return layers.ReLU()(conv(x) + ops.mean(x, (1, 2), keepdims=True))


def one_pixel_and_a_map(x: Any) -> Any:
    """What is added is larger than the convolution's own output."""
    return layers.ReLU()(conv(layers.AveragePooling2D(9)(x)) + x)


def twice_the_same(x: Any) -> Any:
    y = conv(x)
    return layers.ReLU()(layers.Add()([y, y]))


def used_elsewhere(x: Any) -> Any:
    y = conv(x)
    return layers.Multiply()([relu_of_sum(x, y), y])


FUSED = [identity_block, projection_block, linear_block, three, by_the_operator, relu6_of_sum]
BLOCKS = [*FUSED, one_number_for_each_channel, one_pixel_and_a_map, twice_the_same, used_elsewhere]


def model_of(block: Callable[[Any], Any]) -> keras.Model:
    keras.utils.set_random_seed(0)
    x = image = keras.Input((9, 9, 4))
    for _ in range(2):
        x = block(x)
    return randomise(keras.Model(image, x))


def both_ways(model: keras.Model, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The network's answer, and that of its modules one by one."""
    network = vt.to_torch(model, share=False).eval().to(x.dtype)
    with torch.no_grad():
        found = network(x)
        hook = next(network.children()).register_forward_hook(lambda *_: None)
        expected = network(x)
        hook.remove()
    return found, expected


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_sums_are_the_modules_and_keras(
    block: Callable[[Any], Any], dtype: torch.dtype, tolerance: float
) -> None:
    model, x = model_of(block), torch.randn(3, 9, 9, 4)
    kept = x.clone()
    found, expected = both_ways(model, x.to(dtype))
    assert (found - expected).norm() <= tolerance * expected.norm()
    assert (found - model(x, training=False)).norm() <= 10 * tolerance * expected.norm()
    assert torch.equal(x, kept)


@pytest.mark.parametrize("block", FUSED)
def test_a_convolution_takes_the_addition(block: Callable[[Any], Any]) -> None:
    network: Any = vt.to_torch(model_of(block)).eval()
    with torch.no_grad():
        network(torch.randn(2, 9, 9, 4))
    ways = network._plan.ways.made.values()
    runs = [step.run for way in ways for segment in way.segments for step in segment.steps]
    assert any(isinstance(run, FusedConv2d) and run.adds for run in runs)


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 1e38])
@pytest.mark.parametrize("block", FUSED)
def test_what_is_not_finite_stays_as_it_is(block: Callable[[Any], Any], number: float) -> None:
    x = torch.randn(3, 9, 9, 4)
    x[1, 4, 4, 2] = number
    found, expected = both_ways(model_of(block), x)
    rounding = 1e-6 * float(expected[expected.isfinite()].abs().max())
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-5, atol=rounding)
    assert found[[0, 2]].isfinite().all()


def test_what_is_set_later_counts() -> None:
    """A batch norm's statistics through `.data`, and a module that is replaced."""
    model, x = model_of(identity_block), torch.randn(2, 9, 9, 4)
    network = vt.to_torch(model).eval()
    with torch.no_grad():
        network(x)
        model.layers[3].moving_mean.value.data += 1
        torch.testing.assert_close(network(x), model(x, training=False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_what_is_added_may_not_be_finite(number: float) -> None:
    """While what is convolved is, and a pool of pairs stands behind the sum."""
    keras.utils.set_random_seed(0)
    image, other = keras.Input((8, 8, 4)), keras.Input((8, 8, 4))
    model = keras.Model([image, other], layers.MaxPooling2D(2)(relu_of_sum(conv(image), other)))
    first, second = torch.randn(2, 3, 8, 8, 4)
    second[1, 4, 4, 2] = number
    with torch.no_grad():
        found = vt.to_torch(model).eval()(first, second)
        expected = model([first, second], training=False)
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("activation", [None, torch.nn.ReLU(), torch.nn.ReLU6()])
@torch.no_grad()
def test_no_output_is_larger_than_its_bound(activation: Any) -> None:
    conv, x = torch.nn.Conv2d(4, 8, 3), 5 * torch.randn(2, 4, 8, 8)
    y, bound = FusedConv2d(conv, None, activation, mixed=False)([x], [float(x.abs().max())])
    assert bound is None or bound >= y.abs().max() > 1


@pytest.mark.parametrize("block", FUSED)
@torch.no_grad()
def test_additions_behind_winograds_way(block: Callable[[Any], Any], winograd_always: None) -> None:
    model, x = model_of(block), torch.randn(3, 9, 9, 4)
    expected = model(x, training=False)
    network, engine = vt.to_torch(model, winograd=True), vt.optimize_for_inference
    for run in (network.eval(), engine(model, winograd=True)):
        assert (run(x) - expected).norm() <= 1e-5 * expected.norm()
