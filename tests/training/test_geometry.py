"""What was seen in validation is what prediction, the exported file and the card's recipe do."""

from __future__ import annotations

import dataclasses
import json
import re

import keras
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

import vggtorch as vt
from vggtorch.cli import main
from vggtorch.models import remember_
from vggtorch.training import data, keeping, loaders
from vggtorch.weight_sets import DataConfig


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Parts of two photographs, of many sizes, one of them that of the network, in two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir()
        for i in range(8):
            height, width = (16, 16) if i == 7 else rng.integers(20, 90, 2)
            y, x = rng.integers(0, 300, 2)
            part = Image.fromarray(photo[y : y + height, x : x + width])
            part.save(folder / name / f"{i}.png")
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("onnx_operators")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crop_mode": "squash", "interpolation": "bicubic"},
        {"crop_mode": "border", "crop_pct": 0.8},
    ],
    ids=lambda options: options.get("crop_mode", "center"),
)
def test_an_exported_model_by_the_cards_recipe_predicts_what_we_predict(
    options, pictures, tmp_path, capsys
):
    import onnxruntime

    model = remember_(tiny.network(2), "oxford")
    run = tmp_path / "run"
    config = vt.TrainConfig(epochs=2, batch_size=4, output_dir=str(run), **options)
    history = vt.finetune(model, pictures, config=config)
    kept = keeping.save_trained(history, run)
    vt.export(kept, run / "model.onnx")

    # By the card, without vggtorch.
    card = (run / "README.md").read_text()
    block = card.split("must be again:\n")[1].split("    import os\n")[0]
    code = re.sub("^    ", "", block, flags=re.MULTILINE)
    assert len([line for line in code.splitlines() if line]) <= 14
    names: dict = {}
    exec(code, names)
    paths = sorted(pictures.rglob("*.png"))
    batch = np.stack([names["prepared"](path) for path in paths])
    session = onnxruntime.InferenceSession(run / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: batch})

    expected = kept.predict(vt.preprocess(paths, kept), verbose=0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # The command line prints the same.
    assert main(["predict", "--model", str(run / "model.keras"), *map(str, paths)]) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = np.array([float(line.split("%")[0]) / 100 for line in lines if "%" in line])
    np.testing.assert_allclose(printed.reshape(-1, 2), -np.sort(-found), atol=6e-4)
    # And validation saw the same.
    assert isinstance(history.validation, data.Folder)
    held = [paths.index(path) for path in history.validation.paths]
    seen = history.evaluation.probabilities  # type: ignore[union-attr]
    np.testing.assert_allclose(found[held], seen, atol=1e-5)

    stated = json.loads(session.get_modelmeta().custom_metadata_map["data_config"])
    assert stated == vt.data_config(kept).as_dict()
    assert stated == json.loads((run / "config.json").read_text())["pretrained_cfg"]
    assert stated["label_names"] == ["china", "flower"]
    assert stated["input_size"] == [3, 16, 16] and stated["std"] == [1 / 255] * 3
    assert stated["crop_mode"] == options.get("crop_mode", "center")


@pytest.mark.slow
def test_pt2_has_the_same_beside_it(tmp_path):
    model = remember_(tiny.network(), DataConfig("oxford", label_names=("a", "b", "c")))
    vt.export(model, tmp_path / "m.pt2")
    extra = {"data_config.json": ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    assert DataConfig.from_dict(json.loads(extra["data_config.json"])) == vt.data_config(model)


@pytest.mark.slow
def test_the_size_is_the_models(pictures, tmp_path):
    config = vt.TrainConfig(epochs=1, output_dir=str(tmp_path / "run"))
    assert vt.finetune(tiny.network(2), pictures, config=config).data_config.size == (16, 16)
    other = dataclasses.replace(config, image_size=32, output_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="image_size=32; tiny takes images of 16x16. Leave image"):
        vt.finetune(tiny.network(2), pictures, config=other)
    open_model = tiny.network(None, size=None)
    assert data.images_for(open_model, config).size == (224, 224)
    sized = dataclasses.replace(config, image_size=48)
    assert data.images_for(open_model, sized).size == (48, 48)


@pytest.mark.parametrize(
    ("remembered", "asked", "expected"),
    [
        ({}, {}, ("center", 0.875)),
        ({}, {"crop_mode": "squash"}, ("squash", 1.0)),
        ({}, {"crop_mode": "border", "crop_pct": 0.9}, ("border", 0.9)),
        ({"crop_mode": "border", "crop_pct": 1.0}, {}, ("border", 1.0)),
        ({"crop_mode": "border", "crop_pct": 0.9}, {"crop_mode": "border"}, ("border", 0.9)),
        ({"crop_mode": "squash", "crop_pct": 1.0}, {"crop_mode": "center"}, ("center", 0.875)),
    ],
)
def test_what_is_asked_for_goes_before_what_the_model_remembers(remembered, asked, expected):
    model = remember_(tiny.network(), DataConfig("oxford", **remembered))
    found = data.images_for(model, vt.TrainConfig(**asked))
    assert (found.crop_mode, found.crop_pct) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_a_network_with_its_preprocessing_inside_is_not_given_it_twice(pictures, tmp_path):
    """The losses are those of the same network with the preprocessing outside."""
    losses = []
    for inside in (False, True):
        keras.utils.set_random_seed(0)
        base = vt.VGG11(weights=None, include_top=False, input_shape=(32, 32, 3), pooling="avg")
        model = remember_(vt.stack(base, keras.layers.Dense(2, name="head")), "oxford")
        if inside:
            model = keeping.with_preprocessing(model)
        config = vt.TrainConfig(epochs=1, output_dir=str(tmp_path / f"run{inside}"))
        losses.append(vt.finetune(model, pictures, config=config).epochs[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_pil_images_of_a_dataset_are_brought_to_the_models_size(pictures, tmp_path):
    from torchvision.datasets import ImageFolder

    model = remember_(tiny.network(2), "oxford")
    config = vt.TrainConfig(epochs=1, output_dir=str(tmp_path / "run"))
    source, _ = loaders.as_source(ImageFolder(pictures), 0, 4, data.images_for(model, config))
    images, labels = source[[(0, 0), (9, 0)]]
    paths = sorted(pictures.rglob("*.png"))
    expected = vt.preprocess([paths[0], paths[9]], DataConfig(preprocessing_inside=True), size=16)
    np.testing.assert_array_equal(images, expected)
    assert labels.tolist() == [0, 1]
