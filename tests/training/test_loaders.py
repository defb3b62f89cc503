"""What a DataLoader says of the data is followed, or said not to be."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import keras
import pytest
import torch
from torch.utils.data import DataLoader, Sampler, SubsetRandomSampler, TensorDataset

from vggtorch.training.loop import finetune

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
    history = finetune(network(), {"train": first, name: rest}, config=config)
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


def test_what_is_not_followed_is_said(dataset, config):
    loader = DataLoader(dataset, batch_size=4, num_workers=2, worker_init_fn=lambda number: None)
    with pytest.warns(UserWarning, match="Not followed: the DataLoader's num_workers=2") as said:
        finetune(network(), loader, config=dataclasses.replace(config, batch_size=16))
    (words,) = [str(one.message) for one in said if "Not followed" in str(one.message)]
    assert "worker_init_fn" in words and "batch_size=16 (the DataLoader's own" in words


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
