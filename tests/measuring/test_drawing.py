"""A drawing has every layer and edge, and marks what a surgery changed."""

from __future__ import annotations

from xml.etree import ElementTree

import keras
import pytest

from vggtorch import surgery
from vggtorch.keras_graph import calls
from vggtorch.measuring import draw, drawing

SVG = "{http://www.w3.org/2000/svg}"


def boxes(svg: str) -> dict[str, str]:
    """Name -> state of each box in a drawing, which must be XML."""
    return {
        str(group.findall(f"{SVG}text")[0].text): str(group.get("class"))
        for group in ElementTree.fromstring(svg).findall(f"{SVG}g")
        if group.get("class") in drawing.COLOURS
    }


def lines(svg: str) -> dict[str, list[str]]:
    """Name -> the lines under it in each box."""
    groups = ElementTree.fromstring(svg).findall(f"{SVG}g")
    texts = [[str(text.text) for text in group.findall(f"{SVG}text")] for group in groups]
    return {
        name: rest
        for group, (name, *rest) in zip(groups, texts, strict=True)
        if group.get("class") in drawing.COLOURS
    }


def legend(svg: str) -> list[str]:
    """What the legend says."""
    (group,) = [
        g for g in ElementTree.fromstring(svg).findall(f"{SVG}g") if g.get("class") == "legend"
    ]
    return [str(text.text) for text in group.findall(f"{SVG}text")]


@pytest.mark.slow
def test_a_drawing_marks_what_a_surgery_changed(vgg, replaced):
    drawn = boxes(draw(replaced, before=vgg))
    assert drawn.pop("block1_conv") == "new"
    assert drawn.pop("block1_conv1") == drawn.pop("block1_conv2") == "removed"
    assert set(drawn) == {layer.name for layer in vgg.layers} - {"block1_conv1", "block1_conv2"}
    assert set(drawn.values()) == {"kept"}
    assert set(boxes(draw(vgg)).values()) == {"kept"}


@pytest.mark.slow
def test_a_drawing_has_every_edge_and_no_box_on_another():
    model = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3))
    root = ElementTree.fromstring(draw(model, fold=False))
    nodes = calls(model)
    drawn = [g for g in root.findall(f"{SVG}g") if g.get("class") in drawing.COLOURS]
    assert len(drawn) == len(nodes)
    assert len(root.findall(f"{SVG}path")) == sum(len(set(n.input_tensors)) for n in nodes)
    places = [
        (float(str(box.get("x"))), float(str(box.get("y"))))
        for box in (group[0] for group in drawn)
    ]
    for i, (x1, y1) in enumerate(places):
        for x2, y2 in places[:i]:
            assert abs(x1 - x2) >= drawing.WIDTH or abs(y1 - y2) >= drawing.HEIGHT
    assert all(0 <= x <= float(str(root.get("width"))) for x, _ in places)


def test_a_drawing_says_parameters_and_what_is_frozen(vgg, replaced):
    surgery.freeze_(replaced, until="block2_pool")
    try:
        found = lines(draw(replaced, before=vgg))
        said = legend(draw(replaced, before=vgg))
    finally:
        surgery.unfreeze_(replaced)
    assert found["block1_conv"] == ["Conv2D  32x32x64", "4,864 parameters, frozen"]
    assert found["block3_conv1"] == ["Conv2D  8x8x256", "295,168 parameters"]
    assert found["block1_conv2"] == ["Conv2D  32x32x64", "36,928 parameters"]  # what is gone, too
    assert found["block1_pool"] == ["MaxPooling2D  16x16x64"]
    count = replaced.count_params()
    trains = count - sum(
        replaced.get_layer(n).count_params()
        for n in ("block1_conv", "block2_conv1", "block2_conv2")
    )
    assert said[0] == f"{replaced.name}: {count:,} parameters, {trains:,} trainable"
    assert said[1:] == ["kept", "new", "removed", "frozen"]
    assert legend(draw(vgg))[1:] == []  # nothing that isn't there


def test_a_nested_network_is_frozen_whole_or_partly():
    inside = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(4, name="a"), keras.layers.Dense(4)], name="inside"
    )
    model = keras.Sequential([keras.Input((4,)), inside, keras.layers.Dropout(0.5)])
    assert lines(draw(model))["inside"][1] == "40 parameters"
    inside.get_layer("a").trainable = False
    assert lines(draw(model))["inside"][1] == "40 parameters, partly frozen"
    inside.trainable = False
    assert lines(draw(model))["inside"][1] == "40 parameters, frozen"


def block(x, name, width=8):
    y = keras.layers.Conv2D(width, 3, padding="same", name=f"{name}_a")(x)
    y = keras.layers.Conv2D(width, 3, padding="same", name=f"{name}_b")(y)
    return keras.layers.Add(name=f"{name}_add")([x, y])


@pytest.fixture
def repeated():
    x = image = keras.Input((8, 8, 8))
    outputs = []
    for i in range(4):
        x = block(x, f"block{i}")
        outputs.append(x)
    return image, outputs


def folds(svg: str) -> list[list[str]]:
    return [
        [str(text.text) for text in group.findall(f"{SVG}text")]
        for group in ElementTree.fromstring(svg).findall(f"{SVG}g")
        if group.get("class") == "fold"
    ]


def test_blocks_that_repeat_are_drawn_once(repeated):
    image, outputs = repeated
    x = keras.layers.Conv2D(2, 1, name="last")(outputs[-1])
    model = keras.Model(image, x)
    svg = draw(model)
    assert folds(svg) == [["4 times", "to block3_add"]]
    assert list(boxes(svg))[1:] == ["block0_a", "block0_b", "block0_add", "last"]
    # Every edge of what is drawn: a skip from the input, and what follows reads the block's end.
    assert len(ElementTree.fromstring(svg).findall(f"{SVG}path")) == 5
    assert folds(draw(model, fold=False)) == []
    assert len(boxes(draw(model, fold=False))) == 1 + 4 * 3 + 1


def test_what_is_read_from_inside_or_differs_is_not_folded(vgg, repeated):
    image, outputs = repeated
    taps = keras.layers.Concatenate(name="taps")([outputs[1], outputs[-1]])
    tapped = keras.Model(image, taps)
    assert "block1_add" in boxes(draw(tapped)) and folds(draw(tapped)) == []
    model = keras.Model(image, outputs[-1])
    model.get_layer("block2_a").trainable = False
    assert folds(draw(model)) == []
    assert folds(draw(vgg)) == []  # two or three convolutions are quicker read than unfolded


@pytest.mark.slow
def test_a_deep_network_becomes_readable():
    model = keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3), include_top=False)
    svg = draw(model)
    assert len(folds(svg)) >= 3
    assert len(boxes(svg)) < 0.7 * len(calls(model))


def test_a_long_name_stays_inside_its_box():
    name = "encoder_of_photographs_stage1_block2_conv_branch"
    image = keras.Input((8, 8, 3))
    text = draw(keras.Model(image, keras.layers.Conv2D(1, 1, name=name)(image)))
    assert "encoder_of_phot…k2_conv_branch<" in text and f"<title>{name}</title>" in text
