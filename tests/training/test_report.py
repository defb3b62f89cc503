from __future__ import annotations

import base64
import dataclasses
import io
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import keras
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch.utils.data import TensorDataset

from vggtorch.models import preprocessing
from vggtorch.models.preprocessing import remember_, weight_set
from vggtorch.training import report
from vggtorch.training.config import TrainConfig
from vggtorch.training.data import as_source
from vggtorch.training.loop import RateSearch, finetune


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    config = TrainConfig(epochs=2, batch_size=6, image_size=16, folder=str(folder / "run"))
    model = remember_(tiny.network(), "oxford")
    return finetune(model, tiny.pictures(folder / "data"), config=config)


def test_figures_are_those_of_scikit_learn(history):
    found = report.evaluate(history.model, history.validation)
    images, labels = history.validation[[(i, 0) for i in range(len(history.validation))]]
    inputs = keras.applications.vgg16.preprocess_input(images.numpy().astype(np.float32))
    expected = history.model.predict(inputs, verbose=0)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
    predicted = expected.argmax(1)
    np.testing.assert_array_equal(
        found.confusion, confusion_matrix(labels, predicted, labels=range(3))
    )
    reference = precision_recall_fscore_support(labels, predicted, labels=range(3), zero_division=0)
    for i, figures in enumerate(found.per_class(history.classes)):
        assert figures.name == history.classes[i]
        ours = (figures.precision, figures.recall, figures.f1, figures.images)
        np.testing.assert_allclose(ours, [values[i] for values in reference])
    assert found.accuracy == pytest.approx((predicted == labels.numpy()).mean())


def test_logits_are_understood():
    model = tiny.network(dropout=0.0)
    x = torch.randn(5, 16, 16, 3) * 100
    source, _ = as_source(TensorDataset(x, torch.tensor([0, 1, 2, 0, 1])), 0, 2)
    expected = report.evaluate(model, source).probabilities
    model.get_layer("predictions").activation = keras.activations.linear
    np.testing.assert_allclose(report.evaluate(model, source).probabilities, expected, atol=1e-6)


def test_worst_mistakes_come_first():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.7, 0.3]])
    found = report.Evaluation(probabilities, np.array([0, 0, 0, 1]), np.eye(2))
    assert found.worst_mistakes(5) == [1, 3, 2]
    assert found.worst_mistakes(2) == [1, 3]


def test_the_map_is_grad_cam_by_its_definition():
    model = tiny.network(dropout=0.0)
    image = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0)) * 255
    model.get_layer("predictions").activation = keras.activations.linear
    maps = keras.Model(model.inputs, [model.get_layer("block2_pool").output, model.outputs[0]])
    features, scores = maps(image[None], training=False)
    largest = []
    for index in range(3):
        (gradient,) = torch.autograd.grad(scores[0, index], features, retain_graph=True)
        expected = np.zeros((4, 4))
        for channel in range(features.shape[-1]):
            weight = float(gradient[0, :, :, channel].mean())
            expected += weight * features[0, :, :, channel].detach().numpy()
        expected = np.maximum(expected, 0)
        largest.append(expected.max())
        found = report.activation_map(model, image, index)
        np.testing.assert_allclose(found, expected / max(expected.max(), 1e-12), atol=1e-4)
    assert max(largest) > 0
    model.get_layer("predictions").activation = keras.activations.softmax
    np.testing.assert_array_equal(report.activation_map(model, image, 2), found)


def test_a_network_without_maps():
    image = keras.Input((4, 4, 3))
    x = keras.layers.Dense(2, activation="softmax")(keras.layers.Flatten()(image))
    with pytest.raises(ValueError, match="no layer with a height and a width"):
        report.activation_map(keras.Model(image, x, name="flat"), torch.rand(4, 4, 3), 0)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links, self.images, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "img":
            self.images.append(values["src"])
        self.links += [values[name] for name in ("href", "src") if name in values and tag != "img"]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_all_and_needs_nothing(history, tmp_path):
    path = tmp_path / "report.html"
    evaluation = report.write_report(history, path, command="vggtorch finetune <data>")
    assert evaluation is not None
    page = Page(path.read_text(encoding="utf-8"))
    assert page.links == []
    text = " ".join(page.text)
    assert "vggtorch finetune <data>" in text
    assert f"{evaluation.accuracy:.1%} of {len(history.validation)} right" in text
    for name in (*history.classes, "learning_rate", "label_smoothing"):
        assert name in text
    mistakes = len(evaluation.worst_mistakes(12))
    assert mistakes > 0
    assert len(page.images) == 2 * mistakes  # the picture, and its map
    for source in page.images:
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))
        assert picture.size == (160, 160)
    drawings = re.findall("<svg.*?</svg>", path.read_text(encoding="utf-8"))
    assert len(drawings) == 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def test_a_curve_goes_where_its_values_go():
    drawing = ElementTree.fromstring(report.curves_svg({"loss": [3.0, 1.0, 2.0]}, "loss & more"))
    (polyline,) = drawing.findall("{http://www.w3.org/2000/svg}polyline")
    line = polyline.attrib["points"]
    points = [tuple(map(float, point.split(","))) for point in line.split()]
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[0][1] < points[2][1] < points[1][1]  # SVG counts from the top


def test_the_search_is_drawn_with_its_suggestion(tmp_path):
    search = RateSearch((1e-4, 1e-3, 1e-2, 1e-1), (2.0, 1.5, 1.0, 4.0))
    report.plot_rates(search, tmp_path / "rates.svg")
    text = (tmp_path / "rates.svg").read_text()
    ElementTree.fromstring(text)
    assert "suggested 0.001" in text
    assert "stroke-dasharray" in text


def test_plain_keras_takes_raw_images(history, tmp_path):
    """In a process that has never heard of vggtorch."""
    report.save_trained(history, tmp_path, command="vggtorch finetune data")
    images, _ = history.validation[[(0, 0), (1, 0)]]
    np.save(tmp_path / "images.npy", images.numpy().astype(np.float32))
    code = (
        "import sys, keras, numpy as np; sys.path = [p for p in sys.path if p]\n"
        f"model = keras.saving.load_model({str(tmp_path / 'model.keras')!r})\n"
        f"images = np.load({str(tmp_path / 'images.npy')!r})\n"
        f"np.save({str(tmp_path / 'out.npy')!r}, model.predict(images, verbose=0))\n"
        "assert 'vggtorch' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path,
        env=os.environ | {"KERAS_BACKEND": "torch", "PYTHONPATH": ""},
    )  # fmt: skip
    expected = report.evaluate(history.model, history.validation).probabilities[:2]
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-5)
    assert (tmp_path / "classes.txt").read_text().split() == list(history.classes)


def test_the_kept_model_has_its_preprocessing_inside(history):
    model = report.with_preprocessing(history.model)
    assert weight_set(model) is None
    images, _ = history.validation[[(0, 0), (1, 0)]]
    # preprocess knows that only the geometry is left to do.
    np.testing.assert_array_equal(preprocessing.preprocess(images, model), images.float())
    assert weight_set(history.model) == "oxford"
    assert history.model.layers[0].name != "image"


def test_a_model_without_a_weight_set_stays_as_it_is(history):
    model = tiny.network()
    x = torch.rand(2, 16, 16, 3) * 255
    kept = report.with_preprocessing(model)
    assert torch.equal(kept(x, training=False), model(x, training=False))


def test_the_card_says_what_one_has_to_know(history, tmp_path):
    report.save_trained(history, tmp_path, command="vggtorch finetune data --epochs 2")
    card = (tmp_path / "README.md").read_text()
    best = history.epochs[history.best_epoch]
    for expected in (
        "blue, green, red", "oxford", "vggtorch finetune data --epochs 2", "0 to 255",
        f"| val_accuracy | {best['val_accuracy']:.4g} |", "(None, 16, 16, 3)",
    ):  # fmt: skip
        assert expected in card


def test_a_run_without_validation_has_curves_alone(tmp_path):
    x, y = torch.rand(9, 16, 16, 3), torch.arange(9) % 3
    config = TrainConfig(epochs=1, folder=str(tmp_path / "run"))
    history = finetune(tiny.network(), TensorDataset(x, y), config=config)
    assert report.write_report(dataclasses.replace(history), tmp_path / "r.html") is None
    assert "Confusion" not in Path(tmp_path / "r.html").read_text()
