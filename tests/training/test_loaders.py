"""What a DataLoader says of the data is followed, or said not to be."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import keras
import numpy as np
import pytest
import tiny
import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from vggtorch.models import data_config, load_model, preprocess, remember_
from vggtorch.surgery import truncate
from vggtorch.training.batch_view import show_batch
from vggtorch.training.data import Folder
from vggtorch.training.keeping import save_trained
from vggtorch.training.loaders import as_source
from vggtorch.training.loop import finetune
from vggtorch.training.prediction import predict_files
from vggtorch.weight_sets import DataConfig

LABELS = torch.arange(20) % 3


@pytest.fixture
def dataset():
    return TensorDataset(torch.rand(20, 8, 8, 3), LABELS)


@pytest.fixture
def config(config):
    return dataclasses.replace(config, epochs=1, image_size=None, batch_size=32)


def network():
    layers = [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3)]
    return keras.Sequential(layers)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_what_judges_are_the_images_that_its_sampler_gives(name, dataset, config, capsys):
    """One Dataset, two samplers: torch's way of holding images out."""
    first = DataLoader(dataset, batch_size=4, sampler=SubsetRandomSampler(range(12)))
    rest = DataLoader(dataset, batch_size=4, sampler=SubsetRandomSampler(range(12, 20)))
    history = finetune(network(), {"Train": first, name.upper(): rest}, config=config)
    found = history.evaluation if name == "validation" else history.test_evaluation
    assert found is not None
    assert sorted(found.labels.tolist()) == sorted(LABELS[12:].tolist())
    images = dataset.tensors[0][12:]
    with torch.no_grad():
        logits = history.model(images)
    assert found.loss == pytest.approx(
        torch.nn.functional.cross_entropy(logits, LABELS[12:]).item()
    )
    assert "20 train (12 in an epoch, by the DataLoader), 8" in capsys.readouterr().err


def test_the_last_images_of_a_loader_that_drops_them_do_not_judge(dataset, config):
    judging = DataLoader(dataset, batch_size=8, drop_last=True)
    history = finetune(network(), dataset, judging, config)
    assert history.evaluation is not None
    assert history.evaluation.labels.tolist() == LABELS[:16].tolist()


def test_all_images_judge_in_their_order_where_a_loader_shuffles_them(dataset, config):
    history = finetune(network(), dataset, DataLoader(dataset, batch_size=8, shuffle=True), config)
    assert history.evaluation is not None
    assert history.evaluation.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("kept", [slice(1, None), [0, 0, 1, 2, 3]])
def test_a_collate_function_neither_drops_nor_repeats(dataset, config, kept):
    def collate(items):
        x, y = default_collate(items)
        return (x[kept], y[kept]) if len(x) == 4 else (x, y)

    loader = DataLoader(dataset, 4, collate_fn=collate)
    with pytest.raises(ValueError, match="collate_fn makes .* images .* expected as many"):
        finetune(network(), loader, config=config, cache=False)


def test_samplers_learn_the_epoch_and_are_of_all_images(dataset, config):
    def order(epoch):
        sampler: Any = DistributedSampler(dataset, 1, 0, seed=7)
        sampler.set_epoch(epoch)
        return list(sampler)

    loader = DataLoader(dataset, 4, sampler=DistributedSampler(dataset, 1, 0, seed=7))
    _, plan = as_source(loader, 0, 4)
    found = [list(itertools.chain(*plan(epoch))) for epoch in range(3)]
    assert found == [order(epoch) for epoch in range(3)]
    shared = DataLoader(dataset, 4, sampler=DistributedSampler(dataset, 2, 0))
    with pytest.raises(ValueError, match="a DistributedSampler of one process among several"):
        finetune(network(), dataset, shared, config)


def test_arrays_may_be_mirrored(config):
    """Views with negative strides, which torch can't take."""
    pixels = [np.random.default_rng(i).integers(0, 255, (8, 8, 3), np.uint8) for i in range(6)]
    mirrored: Any = [(image[:, ::-1], i % 3) for i, image in enumerate(pixels)]
    source, _ = as_source(mirrored, 0, 6)
    images, _ = source[[(i, 0) for i in range(6)]]
    np.testing.assert_array_equal(images, np.stack(pixels)[:, :, ::-1])


def test_nan_in_an_image_is_said(config):
    images = torch.randn(20, 8, 8, 3)
    images[7, 0, 0, 0] = torch.nan
    model = remember_(network(), "imagenet")
    with pytest.raises(ValueError, match="images with NaN or infinite values"):
        finetune(model, TensorDataset(images, LABELS), config=config)


def test_labels_beyond_the_classes_are_refused_in_a_picture_too(dataset):
    with pytest.raises(ValueError, match="Received labels from 0 to 7; expected 0 to 2"):
        show_batch(network(), TensorDataset(dataset.tensors[0], torch.arange(20) % 8))


@pytest.mark.slow
@pytest.mark.parametrize("nested", [True, False])
def test_a_sequential_model_remembers_what_it_was_trained_with(nested, config, tmp_path):
    folder = tiny.pictures(tmp_path / "data")
    inner = remember_(tiny.network(classes=None), "imagenet")
    top = [keras.layers.Flatten(), keras.layers.Dense(3, "softmax")]
    model = keras.Sequential([inner, *top] if nested else [*inner.layers, *top])
    asked: dict[str, Any] = {"crop_mode": "squash", "interpolation": "bicubic"}
    history = finetune(model, folder, config=config, **asked)
    assert history.model is model
    found = data_config(model)
    assert (found.weight_set, found.crop_mode, found.interpolation) == (
        "imagenet", "squash", "bicubic",
    )  # fmt: skip
    assert found.label_names == tuple(sorted(tiny.COLOURS))
    # What validated is what predicts, from memory and from the file.
    assert isinstance(history.validation, Folder) and history.evaluation is not None
    paths = list(history.validation.paths)
    kept = save_trained(history, tmp_path / "kept")
    assert data_config(kept).label_names == found.label_names
    for one in (model, load_model(tmp_path / "kept")):
        probabilities = one.predict(preprocess(paths, one), verbose=0)
        expected = history.evaluation.probabilities
        np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-5)
        assert next(iter(predict_files(one, paths))).classes[0][0] in tiny.COLOURS
    cut = truncate(model, model.layers[-2].name)
    assert data_config(cut).crop_mode == "squash" and data_config(cut).label_names == ()
    # With another head it isn't that model any more.
    model.pop()
    assert data_config(model).label_names == () and data_config(model).crop_mode == "center"


def test_outputs_that_get_other_names_are_said(dataset, config):
    class Named(TensorDataset):
        classes = ("blue", "red", "zebra")

    model = remember_(network(), DataConfig(label_names=("blue", "green", "red")))
    with pytest.warns(UserWarning, match="were others: green is red, red is zebra from now on"):
        finetune(model, Named(*dataset.tensors), config=config)
    assert data_config(model).label_names == Named.classes


def test_what_is_not_followed_is_said(dataset, config):
    loader = DataLoader(dataset, batch_size=4, num_workers=2, worker_init_fn=lambda number: None)
    with pytest.warns(UserWarning, match="Not followed: the DataLoader's num_workers=2") as said:
        finetune(network(), loader, config=dataclasses.replace(config, batch_size=16))
    (words,) = [str(one.message) for one in said if "Not followed" in str(one.message)]
    assert "worker_init_fn" in words and "batch_size=16 (the DataLoader's own" in words


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.tensor([3, 3, 1]), [3, 3, 1]),
        (np.array([2, 0]), [2, 0]),
        ([-1, -20], [19, 0]),  # which torch's DataLoader takes too
    ],
)
def test_numbers_of_images_are_of_any_kind(dataset, given, expected):
    _, plan = as_source(DataLoader(dataset, 4, sampler=given), 0, 4)
    assert plan(0) == [expected] and {type(index) for index in plan(0)[0]} == {int}


@pytest.mark.parametrize("wrong", [20, -21, "a", 1.5])
def test_what_is_no_number_of_an_image_is_refused(dataset, wrong):
    _, plan = as_source(DataLoader(dataset, 4, sampler=[1, wrong]), 0, 4)
    with pytest.raises(ValueError, match="sampler gives .*; expected the number of an image"):
        plan(0)


def test_any_seed_reaches_the_generator_of_a_sampler(dataset):
    loader = DataLoader(dataset, 4, shuffle=True, generator=torch.Generator())
    _, plan = as_source(loader, 2**80, 4)
    assert plan(0) == plan(0) != plan(1)


def test_a_sampler_without_an_end_is_refused(dataset, config):
    class Endless(Sampler):
        def __iter__(self):
            return itertools.cycle(range(20))

    with pytest.raises(ValueError, match=r"more than 2100 batches of 20 images, or has no end"):
        finetune(network(), DataLoader(dataset, 1, sampler=Endless()), config=config)


def test_a_dataset_of_batches_is_refused(config):
    batches: Any = [(torch.rand(4, 8, 8, 3), torch.arange(4) % 3) for _ in range(5)]
    with pytest.raises(
        ValueError, match=r"\(4, 8, 8, 3\) as the shape of an image; .* not a batch"
    ):
        finetune(network(), batches, config=config)


def test_what_a_model_was_compiled_with_is_said_not_to_count(dataset, config, capsys):
    model = network()
    model.compile(keras.optimizers.SGD(0.5), keras.losses.CategoricalFocalCrossentropy())
    finetune(model, dataset, config=config)
    words = " ".join(capsys.readouterr().err.split())
    assert re.search(r"compiled with \(optimizer sgd\w*, loss categorical_focal_crossent", words)
    capsys.readouterr()
    finetune(network(), dataset, config=config, output_dir=f"{config.output_dir}2")
    assert "Not used" not in capsys.readouterr().err
