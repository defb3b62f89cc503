"""What is timed computes what Keras does, and the model is afterwards as it was."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tiny

from vggtorch.measuring import timing
from vggtorch.measuring.benchmark import bench


def test_every_way_to_run_a_model_is_compared_with_keras() -> None:
    model = tiny.network(batch_norm=True)
    before = model.get_weights()
    found = bench(model, 4, repeats=3)
    for results in (found.inference, found.gradients):
        assert [r.name for r in results][:3] == ["Keras", "lowered", "lowered, bfloat16"]
        keras_, lowered, rounded = results[:3]
        assert (keras_.speed, keras_.difference) == (1.0, 0.0)
        assert 0 < lowered.difference < 1e-4 < rounded.difference < 0.5
        assert all(len(r.seconds) == 3 and min(r.seconds) > 0 for r in results)
    for value, old in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(value, old)


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.network()
    model.trainable = False
    seconds = {
        "Keras": [0.2, 0.4, 0.9],
        "lowered": [0.1, 0.1, 0.3],
        "lowered, bfloat16": [0.2, 0.1, 0.6],
    }
    monkeypatch.setattr(timing, "in_turns", lambda *_, **__: seconds)
    lines = str(bench(model, 2)).splitlines()
    assert lines[0] == "batch 2"
    rows = [" ".join(line.split()) for line in lines[2:]]
    assert rows[0] == "inference, Keras 400.0 ms 200.0 ms 900.0 ms 1.00 0e+00"
    assert rows[1].startswith("inference, lowered 100.0 ms 100.0 ms 300.0 ms 3.00 ")
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


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Received batch=0 and repeats=5; expected 1 or more"):
        bench(tiny.network(), 0)
    with pytest.raises(ValueError, match="not a Functional model"):
        bench(keras.Sequential([keras.layers.Dense(2)]))
