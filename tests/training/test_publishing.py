"""A model goes to the Hugging Face hub and comes back the same, by a server on this machine."""

from __future__ import annotations

import json
import shutil
from typing import Any

import hub_server
import huggingface_hub
import keras
import numpy as np
import pytest
import tiny

import vggtorch as vt
from vggtorch.cli import main
from vggtorch.models import data_config
from vggtorch.training.loop import finetune

X = np.random.default_rng(0).uniform(0, 255, (2, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def run(history, tmp_path_factory):
    """The folder of a run, with what is not to be pushed beside the model."""
    folder = tmp_path_factory.mktemp("pushed") / "run"
    vt.save_trained(history, folder, command="vggtorch finetune data")
    vt.write_report(history, folder / "report.html", command="vggtorch finetune data")
    shutil.copytree(history.config.output_dir, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The repositories of a hub whose token this machine has."""
    with hub_server.running() as (address, repositories):
        # What HF_ENDPOINT sets when the client is imported.
        constants = huggingface_hub.constants
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.delenv("VGGTORCH_OFFLINE", raising=False)
        yield repositories


def card_in(text) -> Any:
    """As the hub's own client reads it; mypy doesn't know what it finds."""
    return huggingface_hub.ModelCard(text)


def files_of(hub, name="ann/cats", branch="main"):
    return hub[name]["branches"][branch]


@pytest.mark.slow
def test_it_comes_back_the_same_by_us_and_by_keras(hub, run, history):
    address = vt.push_to_hub(run, "ann/cats", private=True)
    assert address == f"{huggingface_hub.constants.ENDPOINT}/ann/cats"
    assert hub["ann/cats"]["private"]
    assert set(files_of(hub)) == {
        "README.md", "classes.json", "config.json", "metadata.json", "model.weights.h5",
    }  # fmt: skip
    kept = vt.load_model(run)
    back = vt.load_model("hf://ann/cats")
    np.testing.assert_array_equal(back.predict(X, verbose=0), kept.predict(X, verbose=0))
    assert data_config(back) == data_config(kept)
    assert data_config(back).label_names == history.classes
    plain = keras.saving.load_model(huggingface_hub.snapshot_download("ann/cats"))  # as the card
    np.testing.assert_array_equal(plain.predict(X, verbose=0), kept.predict(X, verbose=0))


@pytest.mark.slow
def test_the_configuration_has_labels_and_geometry_by_timms_names(hub, run, history):
    vt.push_to_hub(run, "ann/cats")
    config = json.loads(files_of(hub)["config.json"])
    assert config["label_names"] == list(history.classes)
    assert config["num_classes"] == 3
    images = config["pretrained_cfg"]
    assert images["input_size"] == [3, 16, 16]
    assert images["crop_pct"] == 0.875 and images["interpolation"] == "bilinear"


def test_the_card_is_what_the_hub_reads(hub, run, history):
    vt.push_to_hub(run, "ann/cats")
    card = card_in(files_of(hub)["README.md"].decode())
    data = card.data
    assert data.library_name == "keras" and data.pipeline_tag == "image-classification"
    assert data.license == "cc-by-4.0"  # of the oxford weights
    assert data.base_model is None  # which are nowhere on the hub
    assert "vggtorch" in data.tags and data.metrics == ["accuracy"]
    figures = {result.metric_name: result.metric_value for result in data.eval_results}
    assert figures.keys() == history.evaluation.figures().keys()
    assert figures["accuracy"] == pytest.approx(history.evaluation.accuracy)
    assert {(r.dataset_name, r.dataset_split) for r in data.eval_results} == {
        ("data", "validation")
    }
    assert 'load_model(snapshot_download("ann/cats"))' in card.text
    assert str(run.parent) not in str(card) and "/tmp" not in str(card)


def test_base_model_and_licence_are_those_of_the_weights(hub, run):
    from vggtorch.training.card import base_of, license_of

    assert base_of("imagenet", "vgg16") == "timm/vgg16.tv_in1k"
    assert base_of("imagenet", "vgg11_bn") is None and base_of(None, "vgg16") is None
    assert license_of("imagenet") == "bsd-3-clause" and license_of(None) is None
    vt.push_to_hub(run, "ann/cats", license="apache-2.0")
    assert card_in(files_of(hub)["README.md"].decode()).data.license == "apache-2.0"


@pytest.mark.slow
def test_foreign_names_stay_text_in_the_card(tmp_path):
    hostile = "a: [b]\n---\n# x"
    names = (hostile, "<img src=x>", "'\"|")
    for number, name in enumerate(names):
        tiny.pictures(tmp_path / "all", each=6) if number == 0 else None
        colour = list(tiny.COLOURS)[number]
        (tmp_path / hostile).mkdir(exist_ok=True)
        (tmp_path / "all" / colour).rename(tmp_path / hostile / name.replace("/", "_"))
    model = tiny.network()
    history = finetune(model, tmp_path / hostile, epochs=1, output_dir=str(tmp_path / "run"))
    vt.save_trained(history, tmp_path / "run", command="vggtorch finetune x")
    card = card_in((tmp_path / "run" / "README.md").read_text(encoding="utf-8"))
    assert {r.dataset_name for r in card.data.eval_results} == {"a: [b]\\n---\\n# x"}
    assert "<img" not in card.text and "\n# x" not in card.text


@pytest.mark.slow
def test_a_branch_and_a_private_repository(hub, run, monkeypatch):
    vt.push_to_hub(run, "ann/cats", private=True, revision="v2")
    assert not files_of(hub) and files_of(hub, branch="v2")
    assert vt.load_model("hf://ann/cats@v2").output_shape == (None, 3)
    with pytest.raises(OSError, match=r"hf://ann/cats: it has no revision 'v3'"):
        vt.load_model("hf://ann/cats@v3")
    with pytest.raises(ValueError, match="private=False, and ann/cats is there and is private"):
        vt.push_to_hub(run, "ann/cats", private=False)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(OSError, match="may not see. See to the spelling, or log in with `hf auth"):
        vt.load_model("hf://ann/cats@v4")
    with pytest.raises(OSError, match="push to hf://ann/dogs: the hub refuses .401.*may write"):
        vt.push_to_hub(run, "ann/dogs")
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    with pytest.raises(OSError, match="push to hf://others/dogs: the hub refuses .403"):
        vt.push_to_hub(run, "others/dogs")


@pytest.mark.slow
def test_a_closed_network_is_said_at_once_and_the_cache_is_used(hub, run, monkeypatch):
    vt.push_to_hub(run, "ann/cats")
    vt.load_model("hf://ann/cats")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.warns(UserWarning, match=r"127\.0\.0\.1:1 can't be reached, so hf://ann/cats is"):
        back = vt.load_model("hf://ann/cats")
    assert back.output_shape == (None, 3)
    with pytest.raises(OSError, match=r"Could not get hf://ann/dogs: .*refused.*Nothing of it"):
        vt.load_model("hf://ann/dogs")
    with pytest.raises(OSError, match="Could not push to ann/cats: .* can't be reached .*refused"):
        vt.push_to_hub(run, "ann/cats")
    monkeypatch.setenv("VGGTORCH_OFFLINE", "1")
    with pytest.raises(OSError, match="Could not push to ann/cats: VGGTORCH_OFFLINE is set"):
        vt.push_to_hub(run, "ann/cats")
    assert vt.load_model("hf://ann/cats").output_shape == (None, 3)


@pytest.mark.slow
def test_weights_of_the_hub_load_into_a_model(hub, history, tmp_path):
    vt.save_weights(history.model, tmp_path / "w.safetensors")
    content = {"w.safetensors": (tmp_path / "w.safetensors").read_bytes()}
    hub["ann/weights"] = {"private": False, "branches": {"main": content}}
    other = keras.models.clone_model(history.model)
    vt.load_weights(other, "hf://ann/weights/w.safetensors")
    for one, two in zip(history.model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    with pytest.raises(ValueError, match=r"a whole repository; expected one file in it, such as"):
        vt.load_weights(other, "hf://ann/weights")
    with pytest.raises(OSError, match=r"hf://ann/weights has no file 'x\.bin'"):
        vt.load_weights(other, "hf://ann/weights/x.bin")
    with pytest.raises(ValueError, match=r"hf://ann/weights has no model\.keras"):
        vt.load_model("hf://ann/weights")


@pytest.mark.parametrize(
    ("received", "message"),
    [
        ("hf-hub:ann/cats", "expected hf://ann/cats, as Keras writes it"),
        ("hub:ann/cats", "expected hf://ann/cats"),
        ("https://huggingface.co/ann/cats", "expected hf://ann/cats"),
        ("hf://cats", "expected hf://owner/name"),
        ("hf://ann/../cats", "expected hf://owner/name"),
        ("hf://ann/cats/model.keras", "without a file behind it, hf://ann/cats"),
        ("ann/cats", "On the Hugging Face hub it would be hf://ann/cats"),
    ],
)
def test_other_spellings_are_hinted_at(received, message):
    with pytest.raises(ValueError, match=message):
        vt.load_model(received)


@pytest.mark.slow
def test_the_command_pushes_and_every_model_may_be_on_the_hub(hub, run, tmp_path, capfd):
    assert main(["push", str(run), "ann/cats", "--private", "--license", "mit"]) == 0
    assert "Load it as hf://ann/cats." in capfd.readouterr().out
    pictures = tiny.pictures(tmp_path / "data", each=2)
    assert main(["predict", "hf://ann/cats", str(pictures)]) == 0
    assert "red" in capfd.readouterr().out
    assert main(["evaluate", "hf://ann/cats", str(pictures)]) == 0
    assert main(["inspect", "hf://ann/cats"]) == 0
    assert "block1_conv1" in capfd.readouterr().out
    assert main(["push", str(tmp_path), "ann/cats"]) == 1
    error = capfd.readouterr().err
    assert "has no model.keras and no config.json and no README.md" in error and "vt." not in error


def test_a_bare_model_and_what_is_damaged_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"expected the folder of a run.*model\.save\('hf://a/b'"):
        vt.push_to_hub(tiny.network(), "a/b")
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "README.md").write_text("---\na: [\n---\n")
    with pytest.raises(ValueError, match=r"front matter of .*README\.md can't be read"):
        vt.push_to_hub(copy, "a/b")
    (copy / "model.keras").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"model\.keras is damaged"):
        vt.push_to_hub(copy, "a/b")
