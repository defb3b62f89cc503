"""A temperature is the one that fits best, and all that comes out of a run has it."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
import tiny
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss

import vggtorch as vt
from vggtorch.training import loop
from vggtorch.training.evaluation import Evaluation
from vggtorch.training.loop import finetune
from vggtorch.training.temperature import check_temperature, fitted_temperature


@pytest.mark.parametrize("scale", [0.3, 5.0])
def test_it_is_the_one_of_the_least_loss(scale):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 4, generator=generator)
    labels = (logits + torch.randn(200, 4, generator=generator)).argmax(1)
    found = Evaluation(logits * scale, labels)

    def loss(temperature):
        return log_loss(labels, (found.logits.double() / temperature).softmax(1), labels=range(4))

    expected = minimize_scalar(loss, bounds=(0.01, 100), method="bounded", options={"xatol": 1e-6})
    temperature = fitted_temperature(found)
    assert temperature == pytest.approx(expected.x, rel=1e-3)
    scaled = Evaluation(found.logits / temperature, labels)
    assert scaled.loss < found.loss and scaled.calibration_error < found.calibration_error
    assert scaled.accuracy == found.accuracy


@pytest.mark.parametrize("labels", [[0, 1, 2], [1, 2, 0]])  # all right, and all wrong
def test_images_that_can_t_tell_leave_it(labels):
    with pytest.warns(UserWarning, match=r"on 3 validation images, .* right: it stays 1"):
        assert fitted_temperature(Evaluation(torch.eye(3) * 4, torch.tensor(labels))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["softmax", "linear"])
def test_the_kept_model_says_what_the_evaluation_says(config, tmp_path, activation, monkeypatch):
    def run(**changes):
        model = tiny.network(dropout=0.0)
        model.get_layer("predictions").activation = getattr(keras.activations, activation)
        changed = dataclasses.replace(config, learning_rate=0.01, **changes)
        return finetune(model, tiny.dataset(), held, changed)

    held = tiny.dataset(30, seed=1)
    plain = run(output_dir=str(tmp_path / "plain"))
    history = run(output_dir=str(tmp_path / "run"), temperature_scaling=True)
    assert plain.evaluation is not None and history.evaluation is not None
    assert history.epochs[0]["val_loss"] == plain.epochs[0]["val_loss"]
    assert history.temperature == fitted_temperature(plain.evaluation) != 1
    expected = (plain.evaluation.logits / history.temperature).softmax(1)
    np.testing.assert_allclose(history.evaluation.probabilities, expected, rtol=1e-5)
    kept = vt.save_trained(history, tmp_path / "run")
    found = torch.as_tensor(kept.predict(held.tensors[0], verbose=0))
    found = found if activation == "softmax" else found.softmax(1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"before a temperature of {history.temperature:.3f}, fitted on the" in card
    monkeypatch.setattr(loop, "train_step_", None)  # the run is at its end
    again = run(output_dir=str(tmp_path / "run"), temperature_scaling=True, resume=True)
    assert all(map(np.array_equal, tiny.weights(again.model), tiny.weights(history.model)))


def test_what_has_no_place_for_it_is_refused(config):
    x = image = keras.Input((16, 16, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(3, 1, name="maps")(x))
    with pytest.raises(ValueError, match=r"ends in global_.*, and a temperature goes into the we"):
        check_temperature(keras.Model(image, x))
    twice = keras.layers.Dense(3, name="twice")
    y = twice(twice(keras.layers.GlobalAveragePooling2D()(image)))
    with pytest.raises(ValueError, match=r"twice \(Dense, which it uses twice\), and a temp"):
        check_temperature(keras.Model(image, y))
    with pytest.raises(ValueError, match="temperature_scaling=True and no validation data"):
        finetune(tiny.network(), tiny.dataset(), config=config, temperature_scaling=True)
