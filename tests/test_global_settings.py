"""What a user sets for all of torch changes no result: a default dtype or device, a mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tiny
import torch
from keras import layers

import vggtorch as vt
from vggtorch.training import TrainConfig, balance

X = np.random.default_rng(0).normal(size=(3, 16, 16, 3)).astype("float32")


@pytest.fixture(params=[torch.float64, torch.bfloat16, "meta"], ids=str)
def default(request: pytest.FixtureRequest) -> Iterator[None]:
    """A default dtype or device of torch's; "meta" stands for one that isn't the model's."""
    if isinstance(request.param, torch.dtype):
        torch.set_default_dtype(request.param)
        yield
        torch.set_default_dtype(torch.float32)
    else:
        with torch.device(request.param):
            yield


@pytest.mark.usefixtures("default")
def test_preprocess_is_in_float32() -> None:
    pixels = np.full((1, 2, 2, 3), 200, "uint8")
    found = vt.preprocess(pixels, "imagenet")
    assert found.dtype == np.float32
    expected = (200 / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(found[0, 0, 0], expected, rtol=1e-5)


def test_predictions_in_bfloat16_are_decoded() -> None:
    image = keras.Input((4,))
    dense = layers.Dense(3, activation="softmax", dtype="bfloat16")
    found = keras.Model(image, dense(image)).predict(np.zeros((1, 4)), verbose=0)
    ((best,),) = vt.decode_predictions(found, 1, ["a", "b", "c"])
    assert best[2] == pytest.approx(1 / 3, abs=2e-3)


@pytest.mark.usefixtures("default")
def test_weights_of_classes_are_in_float32() -> None:
    config = TrainConfig(class_weight={"a": 0.3})
    found = balance.class_weights(config, None, None, ("a", "b"))  # type: ignore[arg-type]
    assert found is not None
    np.testing.assert_allclose(found.numpy(), [0.3, 1], rtol=1e-6)


@pytest.mark.parametrize("winograd", [False, True])
@pytest.mark.usefixtures("default", "winograd_always")
def test_an_engine_gives_what_keras_gives(winograd: bool) -> None:
    model, x = tiny.network(batch_norm=True), torch.from_numpy(X)
    engine = vt.optimize_for_inference(model, winograd=winograd)
    for _ in range(3):
        assert torch.allclose(engine(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("default")
@pytest.mark.parametrize("ending", ["pth", "weights.h5", "safetensors"])
def test_weights_are_written_and_read(ending: str, tmp_path: Path) -> None:
    one, other = tiny.network(batch_norm=True), tiny.network(batch_norm=True)
    for variable in other.variables:
        variable.assign(variable + 1)
    vt.save_weights(one, tmp_path / f"w.{ending}")
    vt.load_weights(other, tmp_path / f"w.{ending}")
    for a, b in zip(tiny.weights(one), tiny.weights(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.usefixtures("default", "one_thread")
def test_compress_computes_in_float32() -> None:
    image = keras.Input((16, 16, 3))
    x = layers.Conv2D(32, 3, padding="same", activation="relu")(image)
    model = keras.Model(image, layers.Dense(10)(layers.Conv2D(32, 3)(x)))
    images = np.tile(X, (8, 1, 1, 1))
    made, _ = vt.compress(model, 1.3, images, steps=2)
    assert {variable.dtype for variable in made.variables} == {"float32"}
    assert made(images).isfinite().all()


@pytest.mark.slow
@pytest.mark.usefixtures("default", "one_thread")
def test_a_composed_and_distilled_layer_is_float32() -> None:
    image = keras.Input((16, 16, 3))
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="a")(image)
    model = keras.Model(image, layers.Conv2D(4, 3, padding="same", activation="relu", name="b")(x))
    new = layers.Conv2D(4, 5, padding="same", activation="relu", name="c")
    made = vt.replace(model, ["a", "b"], new, init="compose")
    vt.distill_(model, made, "c", np.tile(X, (8, 1, 1, 1)), steps=2)
    assert made(X).isfinite().all()


@pytest.mark.parametrize("place", [lambda: torch.device("cpu"), lambda: torch.device("meta")])
def test_a_default_device_keeps_the_fast_plan(
    place: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, calls = tiny.network(), torch.from_numpy(X), []
    network = vt.to_torch(model).eval()
    expected = network(x)
    plan = network._current_plan()

    def run(_: Any, inputs: Any) -> torch.Tensor:
        calls.append(inputs)
        return expected

    monkeypatch.setattr(type(plan), "__call__", run)
    with place():
        network(x)
    assert calls


def test_a_model_made_in_inference_mode_runs_and_learns() -> None:
    with torch.inference_mode():
        model, x = tiny.network(batch_norm=True), torch.from_numpy(X)
        expected = model(x)
        network = vt.to_torch(model).eval()
        assert torch.allclose(network(x), expected, atol=1e-5)
        assert torch.allclose(model(x), expected, atol=1e-5)
    accelerated = vt.accelerate_(model)
    accelerated(x.clone(), training=True).sum().backward()
    gradient = model.get_layer("block1_conv1").kernel.value.grad
    assert gradient is not None


@pytest.mark.slow
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_learns_learns_in_any_mode(mode: Any, tmp_path: Path) -> None:
    found = []
    modes: Any = torch.enable_grad, mode
    for i, context in enumerate(modes):
        model = tiny.network()
        with context():
            config = TrainConfig(
                epochs=1, batch_size=8, num_workers=0, output_dir=str(tmp_path / str(i))
            )
            vt.finetune(model, tiny.dataset(), None, config)
        found.append(tiny.weights(model))
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)
