"""One call with a folder is enough, and its first lines say what will happen."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import keras
import numpy as np
import pytest
import tiny
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

import vggtorch as vt
from vggtorch.cli import main
from vggtorch.models import best_weight_set, remember_
from vggtorch.training import loaders, opening
from vggtorch.training.advice import Plan
from vggtorch.training.evaluation import evaluate
from vggtorch.training.optimization import torch_class


@pytest.mark.slow
def test_a_model_and_a_folder_are_enough(images, tmp_path, capsys):
    model = remember_(tiny.network(None), "oxford")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        history = vt.finetune(model, images, epochs=2, output_dir=str(tmp_path / "run"))
    assert isinstance(history.config, Plan)
    assert len(history.epochs) == 2
    assert vt.data_config(history.model).label_names == ("blue", "green", "red")
    # tiny has two blocks, so the head stands on the maps of both; what trains is the head alone.
    assert [layer.name for layer in history.model.layers if layer.name.startswith("head_max")] == [
        "head_max1", "head_max2",
    ]  # fmt: skip
    trained = {layer.name for layer in history.model.layers if layer.trainable_variables}
    assert trained == {"head_norm", "head_hidden", "head_norm2", "head_predictions"}
    said = capsys.readouterr().err
    for expected in (
        "Freeze every layer up to block2_pool and train a multilevel head alone.",
        "3 classes: blue, green, red", "Images: 18 train, 6 validate (held out of the same folder)",
        "Device: cpu", "Input: 16x16, crop mode center", "weight set oxford",
        f"{sum(v.value.numel() for v in history.model.trainable_variables):,} of ",
    ):  # fmt: skip
        assert expected in said


@pytest.mark.slow
def test_settings_of_a_cache_that_there_is_not_are_said(images, config, capsys):
    vt.finetune(tiny.network(), images, config=config, epochs=1, cache=False, cache_dtype="float16")
    assert "nothing, so that nothing follows from cache_dtype\n" in capsys.readouterr().err
    layers = keras.layers
    first = [keras.Input((16, 16, 3)), layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(3)]
    network, folder = keras.Sequential(first), f"{config.output_dir}2"
    vt.finetune(network, images, config=config, epochs=1, cache_dir="other", output_dir=folder)
    said = capsys.readouterr().err
    assert "nothing, as no layer is frozen, so that nothing follows from cache_dir\n" in said
    # Those of frozen layers are kept, and nothing is said.
    network.layers[0].trainable = False
    folder = f"{config.output_dir}3"
    vt.finetune(network, images, config=config, epochs=1, cache_dtype="float16", output_dir=folder)
    assert "Cached" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("until", "is_said"), [("block2_pool", True), ("block1_pool", False)])
def test_a_decay_from_block_to_block_needs_two_of_them(images, config, capsys, until, is_said):
    options: dict[str, Any] = {"layer_decay": 0.5, "freeze": until, "epochs": 1}
    vt.finetune(tiny.network(), images, config=config, **options)
    assert ("Without effect: layer_decay, as" in capsys.readouterr().err) == is_said


@pytest.mark.slow
def test_a_share_to_hold_out_without_effect_is_said(images, config):
    with pytest.warns(UserWarning, match="Without effect: validation_split=0.4, as the data has"):
        vt.finetune(tiny.network(), images, images, config, epochs=1, validation_split=0.4)


@pytest.mark.slow
def test_names_of_classes_are_no_instructions_to_the_terminal(config, tmp_path, capsys):
    folder = tiny.pictures(tmp_path / "data", each=2)
    (folder / "red").rename(folder / "re\nd\x1b[31m")
    vt.finetune(tiny.network(), folder, config=config, epochs=1)
    assert "3 classes: blue, green, re\\nd\\x1b[31m\n" in capsys.readouterr().err


@pytest.mark.slow
def test_the_multilevel_head_stands_on_the_last_three_pools():
    from vggtorch.training.heads import with_head

    vgg = vt.VGG11(weights=None, include_top=False, input_shape=(48, 48, 3))  # 6x6, 3x3, 1x1
    found = with_head(vgg, vt.TrainConfig(head="multilevel"), 4)
    assert found.get_layer("head_pool").output.shape == (None, 6 * (256 + 512) + 2 * 512)
    lower = with_head(vgg, vt.TrainConfig(head="multilevel", cut="block4_conv1"), 4)
    assert lower.get_layer("head_pool").output.shape == (None, 6 * (128 + 256 + 512))
    x = np.random.default_rng(0).uniform(0, 255, (2, 48, 48, 3)).astype(np.float32)
    names = ["block3_pool", "block4_pool", "block5_pool"]
    parts = []
    for m in vt.truncate(vgg, names).predict(x, verbose=0):
        parts += [m.mean((1, 2)), m.max((1, 2))]
        half = (m.shape[1] + 1) // 2  # the middle of 3 belongs to both halves
        if m.shape[1] > 1:
            ends = (slice(half), slice(-half, None))
            parts += [m[:, rows, columns].mean((1, 2)) for rows in ends for columns in ends]
    pooled = vt.truncate(found, "head_pool").predict(x, verbose=0)
    np.testing.assert_allclose(pooled, np.concatenate(parts, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("onnx_operators")
def test_the_multilevel_head_fits_any_size_and_its_files_the_size_that_they_are_for(tmp_path):
    import onnxruntime

    from vggtorch.training.heads import with_head

    found = with_head(tiny.network(None, size=12), vt.TrainConfig(head="multilevel"), 3)
    assert found.get_layer("head_quarters2").output.shape == (None, 2, 2, 6)  # of maps of 3x3
    x = np.random.default_rng(0).uniform(0, 255, (2, 12, 12, 3)).astype(np.float32)
    vt.export(found, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (exported,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(exported, found.predict(x, verbose=0), rtol=1e-4, atol=1e-5)
    assert vt.with_input(found, (20, 28, 3)).output_shape == (None, 3)
    # Where the size is open, a file could hold no quarters of it.
    open_size = with_head(tiny.network(None, size=None), vt.TrainConfig(head="multilevel"), 3)
    assert open_size.get_layer("head_pool").output.shape == (None, 2 * (4 + 6))


@pytest.mark.slow
def test_test_is_scored_once_at_the_end_and_chooses_nothing(tmp_path, monkeypatch):
    tiny.pictures(tmp_path / "data" / "train")
    tiny.pictures(tmp_path / "data" / "test", each=4, seed=3)
    scored = []

    def counted(module, model, source, **options):
        scored.append(getattr(source, "root", None))
        return evaluate(module, model, source, **options)

    monkeypatch.setattr("vggtorch.training.loop.evaluate", counted)
    options: dict[str, Any] = {"epochs": 3, "output_dir": str(tmp_path / "run"), "batch_size": 6}
    history = vt.finetune(tiny.network(), tmp_path / "data", **options)
    assert scored.count(tmp_path / "data" / "test") == 1
    assert scored[-1] == tmp_path / "data" / "test"
    assert history.test is not None and history.test_evaluation is not None
    images, labels = history.test[[(i, 0) for i in range(12)]]
    probabilities = history.model.predict(images.float(), verbose=0)
    np.testing.assert_allclose(history.test_evaluation.probabilities, probabilities, atol=1e-5)
    assert history.test_evaluation.accuracy == (probabilities.argmax(1) == labels.numpy()).mean()
    # Without test/ the run is the same.
    (tmp_path / "data" / "test").rename(tmp_path / "elsewhere")
    options["output_dir"] = str(tmp_path / "again")
    again = vt.finetune(tiny.network(), tmp_path / "data", **options)
    assert tiny.curve(again) == tiny.curve(history)
    assert again.test_evaluation is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.1}, "Received lr=0.1, which is no setting. Perhaps learning_rate?"),
        ({"bs": 8}, "Perhaps batch_size?"),
        ({"epoch": 8}, "Perhaps epochs?"),
        ({"max_lr": 8}, "Perhaps learning_rate?"),
        ({"val_split": 0.3}, "Perhaps validation_split?"),
        ({"loss": "mse"}, "which is no setting. The loss is cross-entropy, which"),
        ({"shuffle": False}, "Images are shuffled, or come as a DataLoader's sampler has them."),
        ({"colour": 1}, "which is no setting. Expected augment, batch_size"),
        ({"epochs": 0}, "Received epochs=0; expected"),
        ({"optimizer": "adamm"}, r"optimizer='adamm'; expected one of adadelta.* Perhaps adam\?"),
        ({"cut": "block1_pool", "freeze": "block2_pool"}, "cut='block1_pool' with freeze='block2"),
    ],
)
def test_what_is_no_setting_is_refused_with_a_hint(settings, message, images, tmp_path):
    with pytest.raises(ValueError, match=message):
        vt.finetune(tiny.network(None), images, **{"output_dir": str(tmp_path / "run"), **settings})


def test_settings_go_before_a_config(images, config):
    model = tiny.network()
    assert opening.settle_config(model, images, config, {"epochs": 7}) == dataclasses.replace(
        config, epochs=7
    )
    # A model that classifies is trained as it is.
    assert opening.settle_config(model, images, None, {}) == vt.TrainConfig()


class Named(TensorDataset):
    classes = ("blue", "green", "red")


def test_advice_counts_the_images_of_a_part_and_of_a_loader():
    data = Named(torch.zeros(6000, 1), torch.arange(6000) % 3)
    part, model = Subset(data, range(30)), vt.VGG11(weights=None, include_top=False)
    for given, each in ((data, 2000), (part, 10), (DataLoader(part, 6), 10)):
        plan = opening.settle_config(model, given, None, {})
        assert f"{each} images of each class" in str(plan)


def test_classes_of_a_data_set_around_another_are_its_own(config):
    class Around(Named):
        dataset = Named()
        classes = ("blue", "green", "violet")

    parts = {"train": Named(*tiny.dataset().tensors), "val": Around(*tiny.dataset().tensors)}
    with pytest.raises(ValueError, match=r"\['red'\], only in the validation data \['violet'\]"):
        vt.finetune(tiny.network(), parts, config=config)


def test_a_head_needs_to_know_the_classes(tmp_path):
    unnamed = TensorDataset(torch.rand(6, 16, 16, 3), torch.arange(6) % 3)
    with pytest.raises(ValueError, match="the data doesn't name them. Give the Dataset an attribu"):
        vt.finetune(tiny.network(None), unnamed, head="linear", output_dir=str(tmp_path / "r"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "Adam", "SGD", "nadam", "RMSprop", "adamw"])
def test_any_optimizer_of_torch_trains(name, images, tmp_path):
    options = {"optimizer": name, "epochs": 3, "learning_rate": 3e-3, "batch_size": 6}
    history = vt.finetune(tiny.network(), images, output_dir=str(tmp_path / "run"), **options)
    losses = tiny.curve(history)
    assert losses[-1] < losses[0]


def test_optimizers_are_torchs():
    kinds: Any = ("optimizer", "AdamW", torch.optim, torch.optim.Optimizer)
    assert torch_class(*kinds) is torch.optim.AdamW
    for name in ("lbfgs", "sparseadam", "optimizer"):
        with pytest.raises(ValueError, match="expected one of"):
            torch_class("optimizer", name, *kinds[2:])
    with pytest.raises(ValueError, match=r"Perhaps adam\?"):
        torch_class("optimizer", "torch.optim.Adam", *kinds[2:])


def test_the_best_weight_set_is_one_that_can_be_had(monkeypatch):
    from vggtorch import weights

    def find(name, architecture, include_top):
        if name not in here:
            raise FileNotFoundError(f"{name} is nowhere.\nTried much.")

    monkeypatch.setattr(weights, "find", find)
    here = {"imagenet", "oxford"}
    assert best_weight_set("vgg16") == ("imagenet", "")
    here = {"oxford"}
    assert best_weight_set("vgg16") == ("oxford", "imagenet is nowhere.\nTried much.")
    with pytest.raises(OSError, match=r"No pretrained weights can be had.\nimagenet is nowhere"):
        best_weight_set("vgg11")  # oxford was published for VGG16 alone


@pytest.mark.slow
def test_the_command_needs_a_folder_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VGGTORCH_OFFLINE", "1")
    tiny.pictures(tmp_path / "photos" / "train")
    tiny.pictures(tmp_path / "photos" / "test", each=2, seed=1)
    # But for the size and the epochs, which make it fast enough for a test.
    assert main(["finetune", "photos", "--image-size", "32", "--epochs", "3"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("Weights: ")
    assert "test (scored once, at the end)" in printed.err
    assert "Accuracy on 6 test images: " in printed.out
    model = keras.saving.load_model("run/model.keras")
    assert vt.data_config(model).label_names == ("blue", "green", "red")
    assert vt.data_config(model).size == (32, 32)


def test_images_of_0_to_1_are_not_taken_for_ready_ones(tmp_path):
    pixels = TensorDataset(torch.rand(6, 16, 16, 3), torch.arange(6) % 3)
    model = remember_(tiny.network(), "imagenet")
    with pytest.raises(ValueError, match="values from .* to .*, which look scaled to 0 to 1"):
        vt.finetune(model, pixels, output_dir=str(tmp_path / "run"))
    source, _ = loaders.as_source(pixels, 0, 4, vt.data_config(tiny.network()))
    assert source[[(0, 0)]][0].max() < 1  # nothing is known of what this network expects
