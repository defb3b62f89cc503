"""The page holds all of a run, and needs nothing."""

from __future__ import annotations

import base64
import errno
import io
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import tiny
from PIL import Image

from vggtorch.training import report
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
