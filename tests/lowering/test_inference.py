"""`optimize_for_inference`: what it computes, what it keeps, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
from keras import layers
from precision import BFLOAT16, needs_bfloat16, needs_onednn
from small_vgg import assert_close, images, randomise, small_vgg


def with_branches() -> keras.Model:
    """Two inputs by name, an addition, a depthwise convolution, Dense on maps, two outputs."""
    keras.utils.set_random_seed(0)
    first, second = keras.Input((16, 16, 4), name="first"), keras.Input((16, 16, 4), name="second")
    x = layers.Conv2D(4, 3, padding="same", activation="relu")(first)
    x = layers.ReLU()(layers.Add()([x, second]))
    y = layers.BatchNormalization()(layers.DepthwiseConv2D(3, strides=2, padding="same")(x))
    y = layers.ReLU(max_value=6)(y)
    maps = layers.Dense(5, activation="relu")(layers.MaxPooling2D(2)(y))
    return randomise(keras.Model([first, second], {"maps": maps, "x": x}))


def vgg(batch_norm: bool, size: int = 32) -> keras.Model:
    return randomise(vt.VGG11(weights=None, input_shape=(size, size, 3), batch_norm=batch_norm))


def test_it_answers_as_the_torch_network_does_bit_for_bit() -> None:
    answers_as_the_torch_network(small_vgg())


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", [False, True])
def test_at_real_width_it_answers_so_too(batch_norm: bool) -> None:
    answers_as_the_torch_network(vgg(batch_norm))


def answers_as_the_torch_network(model: keras.Model) -> None:
    x = torch.rand(3, *model.input_shape[1:])
    with torch.no_grad():
        expected = vt.to_torch(model).eval()(x)
    torch.testing.assert_close(vt.optimize_for_inference(model)(x), expected, rtol=1e-6, atol=1e-7)


def test_inputs_by_name_and_outputs_by_name() -> None:
    model = with_branches()
    first, second = torch.rand(2, 16, 16, 4), torch.rand(2, 16, 16, 4)
    engine = vt.optimize_for_inference(model, winograd=True)
    expected = model([first, second], training=False)
    for found in (engine(first, second), engine(second=second, first=first)):
        assert set(found) == {"maps", "x"}
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    for wrong in ((first,), (first, second, second)):
        with pytest.raises(ValueError, match=r"the inputs \['first', 'second'\]"):
            engine(*wrong)


def test_channels_first_as_to_torch_has_it() -> None:
    model = small_vgg()
    engine = vt.optimize_for_inference(model, data_format="channels_first")
    x = torch.rand(2, 16, 16, 3)
    torch.testing.assert_close(engine(x.permute(0, 3, 1, 2)), model(x, training=False))


@pytest.mark.parametrize("half", [None, BFLOAT16])
def test_maps_lie_in_memory_as_torchs_modules_give_them(half: torch.dtype | None) -> None:
    image = keras.Input((8, 8, 3))
    model = keras.Model(image, layers.Conv2D(4, 3, activation="relu")(image))
    engine = vt.optimize_for_inference(model, dtype=half, data_format="channels_first")
    x = torch.rand(2, 3, 8, 8)
    assert engine(x).is_contiguous()
    assert engine(x.to(memory_format=torch.channels_last)).permute(0, 2, 3, 1).is_contiguous()


@pytest.mark.slow
@needs_bfloat16
@pytest.mark.parametrize("use_winograd", [False, True])
def test_in_bfloat16_it_takes_and_gives_float32(
    use_winograd: bool, winograd_always: None, narrow: None
) -> None:
    whole = vgg(True)
    model = keras.Model(whole.input, [whole.get_layer("block2_pool").output, whole.output])
    x = torch.rand(4, 32, 32, 3)
    expected = model(x, training=False)
    engine = vt.optimize_for_inference(model, dtype=torch.bfloat16, winograd=use_winograd)
    for found, wanted, again in zip(engine(x), expected, engine(x.bfloat16()), strict=True):
        assert found.dtype == torch.float32
        size = wanted.abs().max().item()
        torch.testing.assert_close(found, wanted, rtol=0.1, atol=1e-2 * size)
        assert torch.equal(again, found)


def words() -> keras.Model:
    """A mask, and layers that run as Keras runs them."""
    keras.utils.set_random_seed(0)
    x = image = keras.Input((7,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True)(x)
    return keras.Model(image, layers.Dense(3, activation="softmax")(layers.GRU(5)(x)))


def attention() -> keras.Model:
    keras.utils.set_random_seed(0)
    x = image = keras.Input((8, 8, 3))
    x = layers.Reshape((36, 4))(layers.Conv2D(4, 3, activation="relu")(x))
    x = layers.LayerNormalization()(layers.MultiHeadAttention(2, 4)(x, x) + x)
    return keras.Model(image, layers.Dense(3)(x))


def with_weights_that_stay() -> keras.Model:
    """Layers with numbers of their own behind a convolution, which no kernel takes over."""
    keras.utils.set_random_seed(0)
    x = image = keras.Input((8, 8, 3))
    x = layers.Conv2DTranspose(3, 2)(layers.Conv2D(4, 3)(x))
    x = layers.PReLU(shared_axes=(1, 2))(layers.Conv2D(4, 3)(x))
    return randomise(keras.Model(image, layers.BatchNormalization()(layers.MaxPooling2D(2)(x))))


def masked_attention() -> keras.Model:
    keras.utils.set_random_seed(0)
    image = keras.Input((7,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True)(image)
    return keras.Model(image, layers.MultiHeadAttention(2, 4)(x, x))


class Counts(layers.Layer):
    """Adds how often it has run."""

    def build(self, shape: Any) -> None:
        self.times = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, x: Any) -> Any:
        self.times.assign_add(1.0)
        return x + self.times


def test_a_layer_that_counts_runs_once_a_call() -> None:
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 1)(image)
    model = keras.Model(image, layers.Add()([Counts()(x), layers.Conv2D(4, 3, padding="same")(x)]))
    engine, network = vt.optimize_for_inference(model), vt.to_torch(model).eval()
    x = torch.rand(2, 8, 8, 3)
    with torch.no_grad():
        start = model.get_layer(index=2).times.numpy()
        expected = [network(x) for _ in range(3)]
        model.get_layer(index=2).times.assign(start)
        for one in expected:
            assert_close(engine(x), one)


@pytest.mark.parametrize(
    "dtype, tolerance", [(None, 1e-6), pytest.param(torch.bfloat16, 2e-2, marks=needs_bfloat16)]
)
@pytest.mark.parametrize("make", [words, attention, masked_attention, with_weights_that_stay])
def test_layers_that_run_as_keras_runs_them(
    make: Callable[[], keras.Model], dtype: torch.dtype | None, tolerance: float
) -> None:
    model = make()
    shape = (3, *model.input_shape[1:])
    x = torch.randint(0, 9, shape) if make in (words, masked_attention) else torch.randn(shape)
    found = vt.optimize_for_inference(model, dtype=dtype, winograd=True)(x)
    expected = model(x, training=False)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["float64", "mixed_bfloat16", "bfloat16"])
def test_a_model_of_another_policy_computes_as_it_says(policy: str, narrow: None) -> None:
    keras.config.set_dtype_policy(policy)
    try:
        model = vgg(True)
    finally:
        keras.config.set_dtype_policy("float32")
    x = torch.rand(2, 32, 32, 3)
    expected = model(x, training=False)
    found = vt.optimize_for_inference(model)(x.to(expected.dtype))
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-5)
    with pytest.raises(ValueError, match=rf"policies \['{policy}'\].*leave dtype out"):
        vt.optimize_for_inference(model, dtype=torch.bfloat16)


def test_a_product_takes_the_dtype_of_its_weight_alone() -> None:
    image = keras.Input((4,))
    model = keras.Model(image, layers.Dense(3)(image))
    engine, x = vt.optimize_for_inference(model), torch.rand(2, 4)
    for _ in range(2):  # before its weight is prepared, and after
        for dtype in (torch.bfloat16, torch.float64):
            with pytest.raises((RuntimeError, ValueError), match="(?i)dtype|float"):
                engine(x.to(dtype))
        torch.testing.assert_close(engine(x), model(x))


@pytest.mark.once
@needs_onednn
@pytest.mark.slow
def test_at_real_size_winograd_differs_in_the_last_bits_alone() -> None:
    """The layers from block 3 on take it at batch 4, in groups of images."""
    model = vt.VGG16(weights=None, include_top=False, input_shape=(224, 224, 3))
    x = torch.randn(4, 224, 224, 3)
    with torch.no_grad():
        expected = vt.to_torch(model).eval()(x)
    found = vt.optimize_for_inference(model, winograd=True)(x)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_what_changes_in_the_model_afterwards_does_not_count() -> None:
    model = small_vgg()
    x = images(model)
    engine = vt.optimize_for_inference(model, winograd=True)
    expected = engine(x)
    for variable in model.variables:
        variable.assign(variable * 0 + 0.1)
    assert torch.equal(engine(x), expected)
    assert not torch.allclose(model(x, training=False), expected)


@pytest.mark.slow
@needs_onednn
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_image(
    number: float, winograd_always: None, narrow: None
) -> None:
    model, x = vgg(True), torch.rand(3, 32, 32, 3)
    engine = vt.optimize_for_inference(model, winograd=True)
    expected = engine(x)
    x[1, 4, 4, 0] = number
    found, keras_too = engine(x), model(x, training=False)
    assert torch.equal(found[1].isnan(), keras_too[1].isnan())
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-7)


@needs_onednn
def test_large_numbers_do_not_overflow_inside(winograd_always: None) -> None:
    image = keras.Input((8, 8, 4))
    model = keras.Model(image, layers.Conv2D(4, 3, padding="same", activation="relu")(image))
    x = torch.rand(2, 8, 8, 4) * 1e36
    found = vt.optimize_for_inference(model, winograd=True)(x)
    torch.testing.assert_close(found, model(x, training=False), rtol=1e-5, atol=0)


@pytest.mark.parametrize("use_winograd", [False, True])
def test_no_images_and_one_after_many(use_winograd: bool, winograd_always: None) -> None:
    model = small_vgg()
    x = images(model)
    engine = vt.optimize_for_inference(model, winograd=use_winograd)
    for part in (x, x[:1], x[:0], x):
        expected = model(part, training=False) if len(part) else torch.empty(0, 10)
        torch.testing.assert_close(engine(part), expected, rtol=1e-5, atol=1e-6)


def test_in_any_mode_it_is_the_same_and_has_no_gradient(winograd_always: None) -> None:
    model = small_vgg()
    x = images(model)
    engine = vt.optimize_for_inference(model, winograd=True)
    with torch.inference_mode():
        expected = engine(x)
    found = [engine(x)]
    with torch.no_grad():
        found.append(engine(x.clone().requires_grad_()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found.append(engine(x))
    for y in found:
        assert torch.equal(y, expected) and not y.requires_grad
    with pytest.raises(ValueError, match=r"requires a gradient.*vt\.to_torch"):
        engine(x.clone().requires_grad_())


@pytest.mark.slow
def test_threads_are_served_one_after_the_other(winograd_always: None) -> None:
    engine = vt.optimize_for_inference(small_vgg(), winograd=True)
    batches = [torch.rand(4, 16, 16, 3) for _ in range(8)]
    expected = [engine(x) for x in batches]
    found = list(batches)

    def run(i: int) -> None:
        for _ in range(10):
            found[i] = engine(batches[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, found, expected))


@pytest.mark.slow
def test_what_it_refuses() -> None:
    model = small_vgg()
    x = images(model)
    with pytest.raises(ValueError, match="torch.float16; expected torch.float32 or torch.bfloat16"):
        vt.optimize_for_inference(model, dtype=torch.float16)
    with pytest.raises(ValueError, match="data_format='NHWC'; expected"):
        vt.optimize_for_inference(model, data_format="NHWC")
    with pytest.raises(ValueError, match="optimize_for_inference needs a Keras model"):
        vt.optimize_for_inference(torch.nn.Linear(2, 2))
    engine = vt.optimize_for_inference(model)
    with pytest.raises(ValueError, match=r"torch tensor with 4 axes on the CPU; received \(16, 16"):
        engine(x[0])
    with pytest.raises(ValueError, match=r"received <class 'numpy.ndarray'>"):
        engine(x.numpy())
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match=r"Save the Keras model.*vt\.export"):
            copied(engine)
    with pytest.raises(RuntimeError, match=r"can't be traced.*vt\.to_torch"):
        torch.jit.trace(lambda x: engine(x), x)
    with pytest.raises(RuntimeError, match="can't be traced, compiled"):
        torch.compile(lambda x: engine(x) + 0, backend="eager")(x)
    with pytest.raises(RuntimeError, match=r"can't be traced.*vt\.to_torch"):
        torch.func.vmap(engine)(x[None])
    with FlopCounterMode(display=False), pytest.raises(RuntimeError, match="can't be traced"):
        engine(x)


def test_inputs_of_the_other_layout_are_refused() -> None:
    model = small_vgg()
    with pytest.raises(ValueError, match="look channels_first: pass data_format='channels_first'"):
        vt.optimize_for_inference(model)(torch.rand(2, 3, 16, 16))


@needs_onednn
def test_another_number_of_features_is_refused() -> None:
    image = keras.Input((6,))
    engine = vt.optimize_for_inference(keras.Model(image, layers.Dense(4)(image)))
    for shape in ((2, 7), (2, 6), (2, 5), (0, 7)):
        if shape[1] == 6:
            assert engine(torch.randn(shape)).shape == (2, 4)
            continue
        with pytest.raises(ValueError, match=f"Received {shape[1]} features; expected 6"):
            engine(torch.randn(shape))
