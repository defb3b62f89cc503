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
from PIL import Image

from vggtorch.training import charts, report
from vggtorch.training.config import TrainConfig
from vggtorch.training.loop import finetune
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
    assert "of 9 test images right" in text and "Grad-CAM" in text
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
    found = report._confusion(names, confusion)
    assert "class 1 taken for class 2: 4 of" in found
    assert ("<td>" not in found) and found.count("<td") == classes**2
    assert (">4</td>" in found) == (classes < report.LARGE)  # numbers where there is room


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.13, 0.97), (1, 300), (2e-6, 3e-4), (-4, 4), (7, 7)]
)
def test_ticks_are_few_round_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 1 <= len(found) <= 7
    assert all(low <= tick <= high for tick in found)
    assert all(len(f"{tick:g}") <= 7 for tick in found)
