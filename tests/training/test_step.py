"""One optimizer step: in pieces, with too little memory, with what isn't finite."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import keras
import numpy as np
import pytest
import tiny
import torch

from vggtorch.training import checkpoints, data, step
from vggtorch.training.loop import finetune


@pytest.mark.slow
def test_pieces_of_a_batch_add_up_to_it(config):
    losses = []
    for pieces in (1, 4):
        changed = dataclasses.replace(
            config, gradient_accumulation_steps=pieces, output_dir=f"{config.output_dir}{pieces}"
        )
        model = tiny.regularized(tiny.network(dropout=0.0), keras.regularizers.L2(0.02))
        losses.append(tiny.curve(finetune(model, tiny.dataset(), config=changed)))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.slow
def test_out_of_memory_runs_the_batch_in_pieces(config, monkeypatch):
    expected = tiny.curve(finetune(tiny.network(dropout=0.0), tiny.dataset(), config=config))
    real = torch.nn.functional.cross_entropy

    def small_gpu(outputs, labels, **options):
        if len(labels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(outputs, labels, **options)

    monkeypatch.setattr(step.F, "cross_entropy", small_gpu)
    config = dataclasses.replace(config, output_dir=config.output_dir + "2")
    with (
        pytest.warns(UserWarning, match=r"from step 1 on, each batch of 6 runs in 2 pieces"),
        pytest.warns(UserWarning, match=r"from step 1 on, each batch of 6 runs in 4 pieces"),
    ):
        history = finetune(tiny.network(dropout=0.0), tiny.dataset(), config=config)
    np.testing.assert_allclose(tiny.curve(history), expected, rtol=1e-5)


def test_out_of_memory_with_one_image_is_an_error(config, monkeypatch):
    def no_gpu(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(step.F, "cross_entropy", no_gpu)
    with (
        pytest.warns(UserWarning, match="pieces"),
        pytest.raises(
            ValueError, match="memory doesn't suffice for batches of 6 .* smaller batch_size"
        ),
    ):
        finetune(tiny.network(), tiny.dataset(), config=config)


def test_a_loss_that_is_not_finite_stops_and_the_checkpoint_is_good(config):
    train = tiny.dataset()
    train.tensors[0][13, 0, 0, 0] = math.nan
    config = dataclasses.replace(config, batch_size=1, checkpoint_steps=1)
    with pytest.raises(FloatingPointError, match=r"not taken\. .*last\.pt is good \(vt"):
        finetune(tiny.network(), train, config=config)
    content = checkpoints.read(Path(config.output_dir) / "last.pt")
    assert all(torch.isfinite(tensor).all() for tensor in content["variables"])
    assert content["progress"]["done"] == sum(data.shuffled(20, 1, 0)(0), []).index(13)


@keras.saving.register_keras_serializable("test_step")
class Explode(keras.layers.Layer):
    """Passes its input on, and an infinite gradient back."""

    def call(self, x):
        return ExplodingGradient.apply(x)


class ExplodingGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x

    @staticmethod
    def backward(context, gradient):
        return gradient * math.inf


def test_a_gradient_that_is_not_finite_stops(config):
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            keras.layers.Conv2D(2, 3),
            Explode(),
            keras.layers.Flatten(),
            keras.layers.Dense(3),
        ]
    )
    before = tiny.weights(model)
    words = r"its gradient .* in step 1 of epoch 1\. That step was not taken\. Begin a new run with"
    with pytest.raises(FloatingPointError, match=words):
        finetune(model, tiny.dataset(), config=config)
    assert all(map(np.array_equal, tiny.weights(model), before))


def test_labels_out_of_range(config):
    with pytest.raises(ValueError, match="Received labels from 0 to 2; expected 0 to 1"):
        finetune(tiny.network(2), tiny.dataset(), config=config)
