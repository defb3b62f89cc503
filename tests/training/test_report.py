"""The page holds all of a run, and needs nothing."""

from __future__ import annotations

import base64
import errno
import io
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from vggtorch.training import charts, pictures, report
from vggtorch.training.config import TrainConfig
from vggtorch.training.confusion import LARGE, confusion_html
from vggtorch.training.evaluation import Evaluation
from vggtorch.training.loop import finetune
from vggtorch.training.prediction import evaluate_folder
from vggtorch.training.rate_search import RateSearch


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
    report.write_report(history, path, command="vggtorch finetune <data>")
    evaluation = history.evaluation
    page = Page(path.read_text(encoding="utf-8"))
    assert page.links == []
    text = " ".join(page.text)
    assert "vggtorch finetune <data>" in text
    assert f"{evaluation.accuracy:.1%} of {len(history.validation)} right" in text
    for name in (*history.classes, "learning_rate", "label_smoothing"):
        assert name in text
    samples = sum(map(len, chosen(evaluation, 12)))
    assert samples > 0
    # The picture and its map; and six files beside what became of them.
    assert len(page.images) == 2 * samples + 2 * 6
    for source in page.images[: 2 * samples]:
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2])))
        assert picture.size == (192, 192)
    sizes = [
        Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))).size
        for source in page.images[2 * samples :]
    ]
    assert sizes == [(192, 160), (192, 192)] * 6  # 24x20 became 16x16
    for title in ("Wrong and sure", "Unsure", "Right and sure", "What the network saw", "Grad-CAM"):
        assert title in text
    drawings = re.findall("<svg.*?</svg>", path.read_text(encoding="utf-8"))
    assert len(drawings) == 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)


def chosen(evaluation, count):
    wrong = evaluation.worst_mistakes(count)
    return wrong, pictures.unsure(evaluation, count // 2), pictures.right(evaluation, count // 2)


def test_samples_are_wrong_unsure_and_right_by_their_names():
    logits = torch.tensor(
        [[9.0, 0, 0], [8, 0, 0], [0, 5, 4.9], [0, 9, 0], [0, 0, 2], [7, 0, 0], [0, 0, 9]]
    )
    found = Evaluation(logits, torch.tensor([0, 0, 1, 1, 2, 2, 0]))
    wrong, unsure, right = chosen(found, 8)
    assert wrong == [6, 5]  # the surest first
    assert unsure == [2, 4, 5, 1]  # the two most probable classes closest
    assert right == [0, 3, 4, 1]  # each class's surest, then its second


def test_long_names_and_large_figures_have_bounds():
    from vggtorch.text import figure_text

    name = "a & b " * 30
    text = confusion_html([name, "שלום"], np.array([[1, 2], [0, 3]]))
    assert text.count(f'<bdi class=name title="{"a &amp; b " * 30}') == 3  # row, column, list
    assert ">שלום</bdi>: 2 of 3" in text
    assert re.search(r"\.name\{[^}]*max-width[^}]*overflow:hidden", report.STYLE)
    assert [figure_text(value) for value in (0.5, 4.5e24, float("nan"))] == [
        "0.5000",
        "4.5e+24",
        "nan",
    ]


def test_long_names_have_room_beside_a_drawing_of_many_classes():
    names = ["salt & pepper, and a third thing", "日本の秋の紅葉と富士山の風景写真", "<b>"]
    text = confusion_html(names + [f"class {i}" for i in range(30)], np.eye(33, dtype=int))
    shown = re.findall(r'text-anchor="end">([^<]*)<', text)
    assert shown[:5:2] == ["salt &amp; pepp…hird thing", "日本の秋の…の風景写真", "&lt;b&gt;"]


@pytest.mark.slow
def test_a_test_set_has_a_page_of_its_own(history, tmp_path):
    folder = tiny.pictures(tmp_path / "holdout", each=3, seed=3)
    found, images = evaluate_folder(history.model, folder)
    report.write_test_report(history.model, images, found, tmp_path / "t.html", command="x")
    text = (tmp_path / "t.html").read_text()
    assert "tiny on holdout" in text and f"Test: {found.accuracy:.1%} of 9 right" in text
    assert "macro F1" in text and "Grad-CAM" in text and "Confusion" in text
    assert "Epochs" not in text and str(tmp_path) not in text


@pytest.mark.slow
def test_samples_are_of_the_test_images_where_there_are_some(tmp_path):
    tiny.pictures(tmp_path / "data" / "train")
    tiny.pictures(tmp_path / "data" / "test", each=3, seed=2)
    history = finetune(
        tiny.network(), tmp_path / "data", epochs=1, output_dir=str(tmp_path / "run")
    )
    report.write_report(history, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "Test images, and what spoke" in text and "Validation images, and what" not in text


def test_a_curve_goes_where_its_values_go():
    drawing = ElementTree.fromstring(charts.curves_svg({"loss": [3.0, 1.0, 2.0]}, "loss & more"))
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
    labels = re.findall(r'x="([\d.]+)" y="237" text-anchor="middle">([^<]+)<', text)
    assert [label for _, label in labels] == ["0.0001", "0.001", "0.01", "0.1"]
    places = [float(place) for place, _ in labels]
    assert np.ptp(np.diff(places)) < 0.2  # each power of ten as far from the next
    mark = re.search(r'd="M([\d.]+) [^"]*"[^>]*stroke-dasharray', text)
    assert mark and places[1] == float(mark[1])


def test_a_range_without_a_power_of_ten_has_labels_all_the_same():
    drawing = charts.chart({"a": [(2.0, 1.0), (8.0, 2.0)]}, "some", "x", logarithmic=True)
    assert ">4</text>" in drawing


def test_a_run_without_validation_has_curves_alone(tmp_path):
    config = TrainConfig(epochs=1, output_dir=str(tmp_path / "run"))
    history = finetune(tiny.network(), tiny.dataset(9), config=config)
    assert history.evaluation is None
    report.write_report(history, tmp_path / "r.html")
    assert "Confusion" not in (tmp_path / "r.html").read_text()


def test_a_full_disk_leaves_the_page_that_was_there(history, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("the page before")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="Could not write .*report.html: No space left"):
        report.write_report(history, path)
    assert path.read_text() == "the page before"


@pytest.mark.slow
def test_the_page_has_the_test_figures_and_no_folders_of_this_machine(tmp_path):
    tiny.pictures(tmp_path / "data" / "train")
    tiny.pictures(tmp_path / "data" / "test", each=3, seed=2)
    history = finetune(
        tiny.network(), tmp_path / "data", epochs=1, output_dir=str(tmp_path / "run")
    )
    report.write_report(history, tmp_path / "report.html", command="vggtorch finetune data")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert history.test_evaluation is not None
    assert f"Test: {history.test_evaluation.accuracy:.1%} of 9 right" in text
    assert "test accuracy, " in text and "Grad-CAM" in text
    assert str(tmp_path) not in text
    # What differs from the defaults stands before what doesn't.
    assert text.index("output_dir") < text.index("Settings at their defaults")
    assert text.index("label_smoothing") > text.index("Settings at their defaults")


@pytest.mark.parametrize("classes", [3, 100])
def test_the_confusion_scales(classes):
    rng = np.random.default_rng(0)
    confusion = np.diag(rng.integers(5, 9, classes))
    confusion[1, 2] = 4
    names = [f"class {i}" for i in range(classes)]
    found = confusion_html(names, confusion)
    assert re.search(">class 1</bdi> taken for <bdi[^>]*>class 2</bdi>: 4 of", found)
    assert "class 1 as class 2: 4" in found  # under the pointer
    if classes < LARGE:
        assert found.count("<td") == classes**2 and ">4</td>" in found
    else:  # only cells that hold something, and as many names as there is room for
        drawing = ElementTree.fromstring(re.findall("<svg.*</svg>", found)[0])
        cells = [cell for cell in drawing.iter("rect") if cell.find("title") is not None]
        assert len(cells) == np.count_nonzero(confusion)
        assert 20 < len(list(drawing.iter("text"))) <= 2 * classes
        assert len(found) < 50_000


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.13, 0.97), (1, 300), (2e-6, 3e-4), (-4, 4), (7, 7)]
)
def test_ticks_are_few_round_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 1 <= len(found) <= 7
    assert all(low <= tick <= high for tick in found)
    assert all(len(f"{tick:g}") <= 7 for tick in found)
