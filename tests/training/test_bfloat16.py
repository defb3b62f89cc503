"""Training in bfloat16: what it changes, what it leaves, and where it is slow."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
import tiny
import torch

from vggtorch.training import run
from vggtorch.training.loop import finetune
from vggtorch.training.rate_search import find_learning_rate


@pytest.mark.slow
def test_bf16_and_back(images, config):
    losses: list[list[float]] = []
    for precision in ("fp32", "bf16", "fp32"):
        folder = f"{config.output_dir}{len(losses)}"
        changed = dataclasses.replace(config, precision=precision, output_dir=folder)
        losses.append(tiny.curve(finetune(tiny.network(dropout=0.0), images, config=changed)))
    assert losses[0] == losses[2] != losses[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [None, "block2_pool"])
@pytest.mark.parametrize("changed", [{"precision": "bf16"}, {"cache_dtype": "float16"}, {}])
def test_the_evaluations_are_those_of_the_model_as_it_predicts(config, freeze, changed):
    config = dataclasses.replace(config, freeze=freeze, **changed)
    data = {name: tiny.dataset(9, seed) for seed, name in enumerate(("train", "val", "test"))}
    history = finetune(tiny.network(), data, config=config)
    for part, found in (("val", history.evaluation), ("test", history.test_evaluation)):
        assert found is not None
        expected = history.model.predict(data[part].tensors[0].numpy(), verbose=0)
        np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [None, "block2_pool"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_epochs_tell_of_the_precision_of_training(images, config, freeze, precision):
    config = dataclasses.replace(config, precision=precision, freeze=freeze)
    history = finetune(tiny.network(), images, config=config)
    best, found = history.epochs[history.kept_epoch], history.evaluation
    assert found is not None
    assert found.loss == pytest.approx(best["val_loss"], rel=0.02)
    assert (found.loss == best["val_loss"]) == (precision == "fp32")


WORDS = "no instructions for bfloat16, so that training in it .*: {} is faster"


def test_a_cpu_without_bfloat16_is_warned_of_before_training(config, monkeypatch):
    monkeypatch.setattr(run, "has_fused_ops", lambda x, dtype: dtype != torch.bfloat16)
    asked = dataclasses.replace(config, epochs=1, precision="bf16")
    with pytest.warns(UserWarning, match=WORDS.format("precision='fp32'")):
        finetune(tiny.network(), tiny.dataset(6), config=asked)
    with pytest.warns(UserWarning, match=WORDS.format("precision='fp32'")):
        find_learning_rate(tiny.network(), tiny.dataset(6), asked, steps=2)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = tiny.network()
    finally:
        keras.config.set_dtype_policy("float32")
    asked = dataclasses.replace(config, epochs=1, output_dir=f"{config.output_dir}2")
    with pytest.warns(UserWarning, match=WORDS.format("dtype='float32' of the model")):
        finetune(model, tiny.dataset(6), config=asked)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_warning_where_there_is_nothing_to_say(config, monkeypatch, precision):
    monkeypatch.setattr(run, "has_fused_ops", lambda x, dtype: precision == "bf16")
    finetune(tiny.network(), tiny.dataset(6), config=config, epochs=1, precision=precision)
