"""The kept model takes raw images, in plain Keras too, and its card says what one has to know."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import keras
import numpy as np
import pytest
import tiny
import torch
from fresh import run
from huggingface_hub import ModelCard

from vggtorch.models import load_model, preprocess, weight_set
from vggtorch.training import keeping
from vggtorch.training.card import LOADING
from vggtorch.training.loop import finetune
from vggtorch.training.prediction import predict_files


@pytest.mark.slow
def test_plain_keras_takes_raw_images(history, tmp_path):
    """In a process that has never heard of vggtorch."""
    keeping.save_trained(history, tmp_path, command="vggtorch finetune data")
    images, _ = history.validation[[(0, 0), (1, 0)]]
    np.save(tmp_path / "images.npy", images.numpy().astype(np.float32))
    code = (
        f"import numpy as np\n{textwrap.dedent(LOADING)}\n"
        "np.save('out.npy', model.predict(np.load('images.npy'), verbose=0))\n"
        "assert 'vggtorch' not in sys.modules"
    )
    done = run(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = history.evaluation.probabilities[:2]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)
    assert json.loads((tmp_path / "classes.json").read_text()) == list(history.classes)


def test_the_kept_model_has_its_preprocessing_inside(history):
    model = keeping.with_preprocessing(history.model)
    assert weight_set(model) == "oxford"
    images, _ = history.validation[[(0, 0), (1, 0)]]
    # preprocess knows that only the geometry is left to do.
    np.testing.assert_array_equal(preprocess(images, model), images.float())
    assert weight_set(history.model) == "oxford"
    assert history.model.layers[0].name != "image"


@pytest.mark.slow
def test_a_model_without_a_weight_set_stays_as_it_is(history):
    model = tiny.network()
    x = torch.rand(2, 16, 16, 3) * 255
    kept = keeping.with_preprocessing(model)
    assert torch.equal(kept(x, training=False), model(x, training=False))


def test_the_card_says_what_one_has_to_know(history, tmp_path):
    keeping.save_trained(history, tmp_path, command="vggtorch finetune data --epochs 2")
    card = (tmp_path / "README.md").read_text()
    best = history.epochs[history.kept_epoch]
    for expected in (
        "blue, green, red", "oxford", "vggtorch finetune data --epochs 2", "0 to 255",
        f"| val_accuracy | {best['val_accuracy']:.4g} |", "(None, 16, 16, 3)",
    ):  # fmt: skip
        assert expected in card


@pytest.mark.slow
def test_the_card_has_the_test_figures_under_the_name_of_the_data(tmp_path):
    tiny.pictures(tmp_path / "photos" / "train")
    tiny.pictures(tmp_path / "photos" / "test", each=3, seed=2)
    run = tmp_path / "run"
    history = finetune(tiny.network(), tmp_path / "photos", epochs=1, output_dir=str(run))
    keeping.save_trained(history, run, command="vggtorch finetune photos")
    data: Any = ModelCard((run / "README.md").read_text()).data
    found = {(r.dataset_name, r.dataset_split) for r in data.eval_results}
    assert found == {("photos", "test"), ("photos", "validation")}
    assert history.test_evaluation is not None
    accuracy = next(r for r in data.eval_results if r.metric_name == "accuracy")
    assert accuracy.dataset_split == "test"  # what counts stands first
    assert accuracy.metric_value == pytest.approx(history.test_evaluation.accuracy)
    assert data.license is None  # the weights are nobody's


@pytest.mark.slow
def test_the_card_of_a_network_to_logits_gives_the_probabilities_that_predict_gives(
    images, tmp_path, monkeypatch
):
    model = tiny.network()
    model.layers[-1].activation = keras.activations.linear
    run = tmp_path / "run"
    history = finetune(model, images, epochs=1, output_dir=str(run))
    keeping.save_trained(history, run)
    card = (run / "README.md").read_text()
    assert "one logit for each name" in card
    (found,) = predict_files(load_model(run), [images / "red" / "0.png"], top=3)
    monkeypatch.chdir(run)
    text = card.split("---\n", 2)[2]  # behind what the hub reads
    code = "\n".join(line[4:] for line in text.split("\n") if line.startswith("    "))
    known: dict[str, Any] = {}
    exec(code.replace('"image.jpg"', repr(str(images / "red" / "0.png"))), known)
    shares = dict(zip(history.classes, known["probabilities"][0].tolist(), strict=True))
    assert shares == pytest.approx(dict(found.classes), abs=1e-6)
