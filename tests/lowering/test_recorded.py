"""The graphs of an inference engine: what they compute, and when the steps run one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
from keras import layers
from precision import needs_bfloat16, needs_onednn
from small_vgg import FUSED, operations, randomise, small_vgg

from vggtorch.lowering import kernels, recorded

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_onednn]


def branches(image: Any) -> Any:
    """A stem that stays, a sum, a concatenation, pools, and layers that are no convolutions."""
    x = layers.Conv2D(8, 3, padding="same", activation="relu6")(image)
    y = layers.DepthwiseConv2D(3, padding="same")(x)
    y = layers.ReLU(max_value=6)(layers.BatchNormalization()(y))
    x = layers.Add()([layers.Conv2D(8, 1)(y), x])
    x = layers.Concatenate()([layers.MaxPooling2D(2)(x), layers.AveragePooling2D(2)(x)])
    x = layers.Conv2D(8, 3, activation="silu")(x)
    x = layers.LayerNormalization()(x)  # has numbers of its own
    x = layers.Conv2D(8, 1, activation="relu")(layers.ReLU()(x))
    return layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling2D()(x))


def model_of(build: Callable[[Any], Any], size: int = 12) -> keras.Model:
    keras.utils.set_random_seed(0)
    image = keras.Input((size, size, 4))
    return randomise(keras.Model(image, build(image)))


def recorded_parts(engine: Any) -> list[recorded.Recorded]:
    parts = [part for parts in engine._parts.values() for part in parts]
    return [part for part in parts if isinstance(part, recorded.Recorded)]


def graphs(engine: Any) -> list[Any]:
    return [
        stretch
        for run in recorded_parts(engine)
        for stretches in run.stretches.values()
        for stretch in stretches
        if stretch.graph is not None
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype, tolerance", [(None, 1e-6), pytest.param(torch.bfloat16, 2e-2, marks=needs_bfloat16)]
)
@pytest.mark.parametrize("use_winograd", [False, True])
def test_graphs_compute_what_the_steps_do(
    dtype: torch.dtype | None, tolerance: float, use_winograd: bool
) -> None:
    model = model_of(branches)
    engine = vt.optimize_for_inference(model, dtype=dtype, winograd=use_winograd)
    for count in (3, 1, 3):
        x = torch.randn(count, 12, 12, 4)
        expected = model(x, training=False)
        found = engine(x)
        assert (found - expected).norm() <= tolerance * expected.norm()
        assert torch.equal(engine(x), found)
    assert FUSED not in operations(engine, x)
    assert len(graphs(engine)) >= 2  # on both sides of the layer normalization


@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_what_is_added_is_not_overwritten(activation: str) -> None:
    """oneDNN can write a sum where one of its terms stands, and both are needed later here."""

    def build(image: Any) -> Any:
        x = image
        for _ in range(3):
            x = layers.Add()([layers.Conv2D(4, 3, padding="same")(x), image])
            x = layers.Activation(activation)(x)
        y = layers.Add()([layers.Conv2D(4, 1)(x), x])
        return layers.Concatenate()([y, x, image])

    model, x = model_of(build), torch.randn(2, 12, 12, 4)
    engine, before = vt.optimize_for_inference(model), x.clone()
    for _ in range(3):
        torch.testing.assert_close(engine(x), model(x, training=False), rtol=1e-5, atol=1e-6)
    assert graphs(engine) and torch.equal(x, before)


def test_without_graphs_the_steps_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a torch that has no torch.jit any more."""
    monkeypatch.setattr(kernels, "_has_graphs", lambda: False)
    model = model_of(branches)
    engine, x = vt.optimize_for_inference(model), torch.randn(2, 12, 12, 4)
    for _ in range(2):
        torch.testing.assert_close(engine(x), model(x, training=False))
    assert not graphs(engine) and FUSED in operations(engine, x)


def test_where_torch_cannot_make_one_the_steps_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> Any:
        raise RuntimeError("no graph of this")

    monkeypatch.setattr(torch.jit, "_get_trace_graph", refused)
    model = model_of(branches)
    engine, x = vt.optimize_for_inference(model), torch.randn(2, 12, 12, 4)
    torch.testing.assert_close(engine(x), model(x, training=False))
    assert not graphs(engine) and not torch.jit.onednn_fusion_enabled()


@pytest.mark.parametrize("before", [False, True])
def test_the_switch_of_torch_stays_as_it_was(before: bool) -> None:
    torch.jit.enable_onednn_fusion(before)
    try:
        engine = vt.optimize_for_inference(model_of(branches))
        engine(torch.randn(2, 12, 12, 4))
        assert graphs(engine) and torch.jit.onednn_fusion_enabled() is before
    finally:
        torch.jit.enable_onednn_fusion(False)


def behind_a_relu(image: Any) -> Any:
    """oneDNN's ReLU makes 0 of NaN before a convolution could tell."""
    return layers.Conv2D(4, 3)(layers.ReLU()(layers.BatchNormalization()(image)))


def behind_a_max_pool(image: Any) -> Any:
    return layers.Conv2D(4, 3, activation="relu")(layers.MaxPooling2D(2)(image))


def behind_a_sum(image: Any) -> Any:
    x, y = (layers.Conv2D(4, 3, activation="relu")(image) for _ in range(2))
    return layers.Conv2D(4, 3, activation="relu")(layers.ReLU()(layers.Add()([x, y])))


def three_convolutions(image: Any) -> Any:
    for _ in range(3):
        image = layers.Conv2D(4, 3, padding="same", activation="relu")(image)
    return image


CHAINS = [behind_a_relu, behind_a_max_pool, behind_a_sum, three_convolutions, branches]


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("build", CHAINS)
def test_what_is_not_finite_stays_what_it_is_in_keras(
    build: Callable[[Any], Any], number: float
) -> None:
    model, x = model_of(build), torch.rand(3, 12, 12, 4)
    engine = vt.optimize_for_inference(model)
    expected = engine(x)
    assert graphs(engine)
    x[1, 4, 4, 0] = number
    found, keras_too = engine(x), model(x, training=False)
    assert torch.equal(found[1].isnan(), keras_too[1].isnan())
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-6)
    x[1] = 0.5
    torch.testing.assert_close(engine(x), model(x, training=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e11, 1e14, 1e30, 1e38])
def test_large_numbers_overflow_as_in_keras(scale: float) -> None:
    """Between convolutions, where the graph looks; a sum of infinities of both signs is NaN."""
    model = model_of(three_convolutions)
    for layer in model.layers[1:3]:
        layer.kernel.assign(layer.kernel * scale**0.5)
    engine, x = vt.optimize_for_inference(model), torch.randn(2, 12, 12, 4)
    expected = model(x, training=False)
    for _ in range(2):
        found = engine(x)
        assert torch.equal(found.isnan(), expected.isnan())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0, equal_nan=True)


def test_a_few_shapes_have_graphs_and_others_run_step_by_step() -> None:
    image = keras.Input((None, None, 4))
    model = randomise(keras.Model(image, three_convolutions(image)))
    engine = vt.optimize_for_inference(model)
    for size in (8, 9, 10, 11, 12, 13, 8):
        x = torch.randn(2, size, size, 4)
        torch.testing.assert_close(engine(x), model(x, training=False), rtol=1e-5, atol=1e-5)
    (run,) = recorded_parts(engine)
    assert len(run.stretches) == recorded.MOST_SHAPES


def test_another_number_of_threads_has_graphs_of_its_own() -> None:
    """A kernel's memory is measured for the threads that it was made with."""
    model = model_of(three_convolutions)
    engine, x = vt.optimize_for_inference(model), torch.randn(2, 12, 12, 4)
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        torch.testing.assert_close(engine(x), model(x, training=False), rtol=1e-5, atol=1e-5)
    (run,) = recorded_parts(engine)
    assert len(run.stretches) == 2


def test_inputs_of_all_kinds() -> None:
    """Those of another layout, with a gradient that nobody wants, made in inference mode."""
    model = small_vgg()
    engine = vt.optimize_for_inference(model)
    with torch.inference_mode():
        x = torch.rand(2, 16, 16, 3)
    y = torch.rand(2, 16, 3, 16).transpose(2, 3)
    for images in (x, y, y.clone().requires_grad_()):
        with torch.no_grad():
            found = engine(images)
            torch.testing.assert_close(found, model(images, training=False), rtol=1e-5, atol=1e-6)
        assert not found.requires_grad
    assert graphs(engine)


@pytest.mark.parametrize("between", ["linear", "relu", "relu6", "sigmoid"])
def test_what_is_convolved_is_added_behind_another_addition(between: str) -> None:
    """With both additions in one graph oneDNN ends the process."""
    keras.utils.set_random_seed(0)
    x = image = keras.Input((9, 9, 4))
    for _ in range(2):
        y = layers.AveragePooling2D(3, 1, padding="same")(x)
        y = layers.Activation(between)(layers.Conv2D(4, 3, padding="same")(x) + y)
        x = layers.ReLU()(y + x)
    model, x = keras.Model(image, x), torch.randn(3, 9, 9, 4)
    engine = vt.optimize_for_inference(model)
    for part in (x, x[:1], x):
        torch.testing.assert_close(engine(part), model(part, training=False), rtol=1e-5, atol=1e-5)
