"""What is timed computes what Keras does, and the model is afterwards as it was."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest
import tiny
import torch

from vggtorch.keras_graph import graph_of
from vggtorch.measuring import bench, benchmark, timing
from vggtorch.measuring.costs import example_of
from vggtorch.models import as_layers, remember_
from vggtorch.surgery import freeze_
from vggtorch.weight_sets import DataConfig


@pytest.mark.slow
def test_every_way_to_run_a_model_is_compared_with_keras() -> None:
    model = tiny.network(batch_norm=True)
    before = model.get_weights()
    found = bench(model, 4, repeats=3)
    for results in (found.inference, found.gradients):
        assert [r.name for r in results][:3] == ["Keras", "vggtorch", "vggtorch, bfloat16"]
        keras_, ours, rounded = results[:3]
        assert (keras_.speed, keras_.difference) == (1.0, 0.0)
        assert 0 < ours.difference < 1e-4 < rounded.difference < 0.5
        assert all(len(r.seconds) == 3 and min(r.seconds) > 0 for r in results)
    for value, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, old)


@pytest.mark.slow
def test_gradients_of_a_network_frozen_in_part_are_compared() -> None:
    model = tiny.network()
    freeze_(model, "block1_pool")
    found = bench(model, 2, repeats=1).gradients
    assert found[1].difference < 1e-5
    assert all(np.isfinite(result.difference) for result in found)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])  # the squares leave the range of float32
def test_a_difference_is_relative_at_any_size(size: float) -> None:
    expected = [torch.tensor([3.0]) * size, torch.tensor([[4.0, 0.0]]) * size]
    found = [torch.tensor([3.0]) * size, torch.tensor([[4.0, 0.5]]) * size]
    assert benchmark.difference(found, expected) == pytest.approx(0.1)


def test_a_difference_from_nothing_is_absolute() -> None:
    assert benchmark.difference([torch.tensor([0.5])], [torch.zeros(1)]) == 0.5


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.network()
    model.trainable = False
    seconds = {
        "Keras": [0.2, 0.4, 0.9],
        "vggtorch": [0.1, 0.1, 0.3],
        "vggtorch, bfloat16": [0.2, 0.1, 0.6],
    }
    monkeypatch.setattr(timing, "in_turns", lambda *_, **__: seconds)
    lines = str(bench(model, 2)).splitlines()
    assert lines[0] == "batch 2"
    rows = [" ".join(line.split()) for line in lines[2:]]
    assert rows[0] == "inference, Keras 400.0 ms 200.0 ms 900.0 ms 1.00 0e+00"
    assert rows[1].startswith("inference, vggtorch 100.0 ms 100.0 ms 300.0 ms 3.00 ")
    assert len(lines) == 5  # nothing trains


def test_open_sizes_and_outputs_of_several_shapes() -> None:
    image = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(4, 3)(image)
    model = keras.Model(image, {"map": x, "mean": keras.layers.GlobalAveragePooling2D()(x)})
    assert bench(model, 1, size=12, repeats=1).inference[1].difference < 1e-5


def test_tokens() -> None:
    tokens = keras.Input((50,), dtype="int32")
    x = keras.layers.Flatten()(keras.layers.Embedding(1, 4)(tokens))
    model = keras.Model(tokens, keras.layers.Dense(2)(x))
    assert bench(model, 2, repeats=1).gradients[1].difference < 1e-5


def test_too_few_images_or_turns_are_refused() -> None:
    with pytest.raises(ValueError, match="Received batch=0; expected a whole number from 1"):
        bench(tiny.network(), 0)


def test_a_model_with_its_preprocessing_inside_gets_pixels() -> None:
    """On noise around 0 its images are nearly the same, and Keras's batch norm then gives NaN."""
    image = keras.Input((8, 8, 3))
    x = as_layers(image, "oxford")
    x = keras.layers.Conv2D(4, 3, name="conv")(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.BatchNormalization()(x))
    model = remember_(keras.Model(image, x), DataConfig(preprocessing_inside=True))
    pixels = example_of(graph_of(model, "bench"), 8, 2, torch.device("cpu"))
    assert 0 <= pixels.min() < 20 and 235 < pixels.max() <= 255
    found = bench(model, batch=2, repeats=1)
    assert all(math.isfinite(r.difference) for r in (*found.inference, *found.gradients))
