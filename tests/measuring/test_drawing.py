"""A drawing has every layer and edge, and marks what a surgery changed."""

from __future__ import annotations

from xml.etree import ElementTree

import keras
import pytest

from vggtorch import surgery
from vggtorch.keras_graph import calls
from vggtorch.measuring import draw, drawing

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def vgg() -> keras.Model:
    return keras.applications.VGG16(weights=None, input_shape=(32, 32, 3), include_top=False)


@pytest.fixture(scope="module")
def replaced(vgg) -> keras.Model:
    new = keras.layers.Conv2D(64, 5, padding="same", activation="relu", name="block1_conv")
    return surgery.replace(vgg, ["block1_conv1", "block1_conv2"], new)


def boxes(svg: str) -> dict[str, str]:
    """Name -> state of each box in a drawing, which must be XML."""
    return {
        str(group.findall(f"{SVG}text")[0].text): str(group.get("class"))
        for group in ElementTree.fromstring(svg).findall(f"{SVG}g")
    }


def test_a_drawing_marks_what_a_surgery_changed(vgg, replaced):
    drawn = boxes(draw(replaced, before=vgg))
    assert drawn.pop("block1_conv") == "new"
    assert drawn.pop("block1_conv1") == drawn.pop("block1_conv2") == "removed"
    assert set(drawn) == {layer.name for layer in vgg.layers} - {"block1_conv1", "block1_conv2"}
    assert set(drawn.values()) == {"kept"}
    assert set(boxes(draw(vgg)).values()) == {"kept"}


def test_a_drawing_has_every_edge_and_no_box_on_another():
    model = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3))
    root = ElementTree.fromstring(draw(model))
    nodes = calls(model)
    assert len(root.findall(f"{SVG}g")) == len(nodes)
    assert len(root.findall(f"{SVG}path")) == sum(len(set(n.input_tensors)) for n in nodes)
    places = [
        (float(str(box.get("x"))), float(str(box.get("y"))))
        for box in (group[0] for group in root.findall(f"{SVG}g"))
    ]
    for i, (x1, y1) in enumerate(places):
        for x2, y2 in places[:i]:
            assert abs(x1 - x2) >= drawing.WIDTH or abs(y1 - y2) >= drawing.HEIGHT
    assert all(0 <= x <= float(str(root.get("width"))) for x, _ in places)
