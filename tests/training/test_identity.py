"""A run is carried on as the run that it is; one that differs in anything is refused by name."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tiny
import torch
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

import vggtorch as vt
from vggtorch.models import remember_
from vggtorch.training import checkpoints
from vggtorch.training.identity import network_digest
from vggtorch.training.loop import finetune


@pytest.fixture
def begun(images, config):
    """The configuration that would carry on a run, which has ended."""
    finetune(tiny.network(), images, config=config)
    return dataclasses.replace(config, resume=True)


def lighter(model: keras.Model) -> keras.Model:
    """The same network with another bias in its first layer."""
    bias = model.get_layer("block1_conv1").bias
    bias.assign(bias + 1e-3)
    return model


def frozen(model: keras.Model, name: str) -> keras.Model:
    model.get_layer(name).trainable = False
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lighter(tiny.network()), "other starting weights of block1_conv1 (vt.load_chec"),
        (lambda: tiny.network(batch_norm=True), "another network"),
        (lambda: tiny.network(dropout=0.4), "another network"),
        (lambda: frozen(tiny.network(), "block1_conv1"), "another network"),
        (lambda: remember_(tiny.network(), "oxford"), "weight set oxford (was None)"),
    ],
)  # fmt: skip
def test_another_network_is_refused(images, begun, make, message):
    with pytest.raises(ValueError, match="belongs to another run: ") as caught:
        finetune(make(), images, config=begun)
    assert message in str(caught.value)
    assert str(caught.value).endswith("begin anew in another folder.")


@pytest.mark.slow
def test_other_settings_and_all_that_differs_are_named(images, begun):
    config = dataclasses.replace(begun, learning_rate=0.5, seed=3)
    model = remember_(lighter(tiny.network()), "imagenet")
    message = (
        r"learning_rate=0.5 \(was 0.001\), seed=3 \(was 0\), weight set imagenet \(was None\), "
        r"other training images, other validation images, other batches, "
        r"other starting weights of block1_conv1 \("
    )
    with pytest.raises(ValueError, match=message):
        finetune(model, images, config=config)


@pytest.mark.slow
def test_other_versions_are_refused(images, begun, monkeypatch):
    ours = checkpoints.versions()
    monkeypatch.setattr(checkpoints, "versions", lambda: ours | {"torch": "1.0"})
    with pytest.raises(ValueError, match=rf"torch 1.0 \(was {ours['torch']}\)".replace("+", r"\+")):
        finetune(tiny.network(), images, config=begun)


@pytest.mark.slow
def test_other_images_of_a_folder_are_refused(begun, tmp_path):
    other = tiny.pictures(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="other training images, other validation images. Resume"):
        finetune(tiny.network(), other, config=begun)


@pytest.mark.slow
def test_the_same_images_in_another_place_are_the_same(begun, tmp_path):
    finetune(tiny.network(), tiny.pictures(tmp_path / "moved"), config=begun)


@pytest.mark.slow
def test_one_image_in_another_class_is_another_folder(images, begun, tmp_path):
    moved = tiny.pictures(tmp_path / "moved")
    (moved / "red" / "3.png").rename(moved / "red" / "9.png")
    with pytest.raises(ValueError, match="other training images"):
        finetune(tiny.network(), moved, config=begun)


def changed(data: TensorDataset, what: str) -> Dataset[Any]:
    images, labels = (tensor.clone() for tensor in data.tensors)
    if what == "pixel":
        images[7, 3, 3, 1] += 1e-3
    elif what == "label":
        labels[7] = (labels[7] + 1) % 3
    elif what == "order":
        images, labels = images.flip(0), labels.flip(0)
    return TensorDataset(images, labels)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["pixel", "label", "order"])
@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_dataset_of_the_same_length_with_other_content_is_refused(config, what, where):
    data = tiny.dataset()
    finetune(tiny.network(), data, data, config)
    config = dataclasses.replace(config, resume=True)
    finetune(tiny.network(), changed(data, "nothing"), changed(data, "nothing"), config)
    train, validation = changed(data, what), changed(data, "nothing")
    if where == "validation":
        train, validation = validation, train
    with pytest.raises(ValueError, match=f"other {where} images"):
        finetune(tiny.network(), train, validation, config)


class Noisy(Dataset[Any]):
    """Never yields the same image twice."""

    def __init__(self, name: str | None) -> None:
        self.rng = np.random.default_rng()
        if name is not None:
            self.content_name = name

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.rng.random((16, 16, 3), dtype=np.float32)), index % 3


@pytest.mark.slow
def test_a_name_may_stand_for_the_content_of_a_dataset(config):
    resumed = dataclasses.replace(config, resume=True)
    finetune(tiny.network(), Noisy("noise"), config=config)
    finetune(tiny.network(), Noisy("noise"), config=resumed)
    for other in ("silence", None):
        with pytest.raises(ValueError, match="other training images"):
            finetune(tiny.network(), Noisy(other), config=resumed)


@pytest.mark.slow
def test_other_batches_of_a_loader_are_refused(config):
    data = tiny.dataset()
    config = dataclasses.replace(config, epochs=1)
    finetune(tiny.network(), DataLoader(data, batch_size=5, shuffle=True), config=config)
    config = dataclasses.replace(config, resume=True)
    finetune(tiny.network(), DataLoader(data, batch_size=5, shuffle=True), config=config)
    for loader in (
        DataLoader(data, batch_size=4, shuffle=True),
        DataLoader(data, batch_size=5),
        DataLoader(data, batch_size=5, sampler=SubsetRandomSampler(range(10))),
    ):
        with pytest.raises(ValueError, match="belongs to another run: other batches"):
            finetune(tiny.network(), loader, config=config)


@pytest.mark.slow
def test_a_model_that_holds_the_weights_of_the_run_may_carry_it_on(images, config):
    config = dataclasses.replace(config, ema_decay=0.5)
    expected = tiny.weights(finetune(tiny.network(), images, config=config).model)
    config = dataclasses.replace(config, resume=True)
    for _ in range(2):  # after which it still knows the weights that it began with
        model = vt.load_checkpoint_(lighter(tiny.network()), f"{config.output_dir}/last.pt")
        found = finetune(model, images, config=config)
        assert all(map(np.array_equal, tiny.weights(found.model), expected))
        finetune(tiny.network(), images, config=config)


def test_what_a_network_is_does_not_depend_on_names_or_processes():
    def network(name: str | None, rate: float = 0.5) -> keras.Model:
        keras.utils.set_random_seed(0)
        inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name=name)])
        image = keras.Input((4,))
        return keras.Model(image, keras.layers.Dropout(rate)(inner(image)))

    class Odd:
        """Has no form in JSON, and an address in its text."""

    def odd() -> keras.Model:
        layer = keras.layers.Dense(3)
        layer.get_config = lambda: {"odd": Odd()}  # type: ignore[method-assign]
        image = keras.Input((4,))
        return keras.Model(image, layer(image))

    assert network_digest(network("a"), values=True) == network_digest(network(None), values=True)
    assert network_digest(network(None)) != network_digest(network(None, rate=0.4))
    assert network_digest(odd()) == network_digest(odd())


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_finetune_with_other_weights_is_refused(tmp_path: Path, monkeypatch, capsys):
    from vggtorch.cli import main

    monkeypatch.chdir(tmp_path)
    tiny.pictures(tmp_path / "images", each=2)
    network = vt.VGG11(weights=None, include_top=False)
    vt.save_weights(network, "a.safetensors")
    vt.save_weights(lighter(network), "b.safetensors")
    options = "--architecture vgg11 --image-size 32 --head linear --freeze block5_pool --epochs 1"
    command = ["finetune", "images", *shlex.split(options), "--weights"]
    assert main([*command, "a.safetensors"]) == 0
    capsys.readouterr()
    assert main([*command, "b.safetensors", "--resume"]) == 1
    error = capsys.readouterr().err
    assert "belongs to another run: other starting weights of block1_conv1. Resume as" in error
