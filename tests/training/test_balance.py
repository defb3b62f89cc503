"""Weights of classes are scikit-learn's and Keras's, and balanced batches torch's sampler's."""

from __future__ import annotations

import collections
import dataclasses
import shutil
from typing import Any

import keras
import numpy as np
import pytest
import tiny
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler

from vggtorch.cli import main
from vggtorch.training import balance, data, loaders
from vggtorch.training.config import TrainConfig
from vggtorch.training.loop import finetune
from vggtorch.training.stages import Stage

NAMES = ("blue", "green", "red")
LABELS = np.array([0] * 12 + [1] * 6 + [2] * 2)


def weights_of(given, labels=LABELS):
    dataset: Any = [(torch.zeros(2, 2, 3), int(label)) for label in labels]
    source, plan = loaders.as_source(dataset, 0, 4)
    return balance.class_weights(TrainConfig(class_weight=given), source, plan, NAMES)


def test_balanced_weights_are_those_of_scikit_learn():
    found = weights_of("balanced")
    assert found is not None
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_balanced_weights_are_of_the_images_that_a_sampler_gives():
    dataset: Any = [(torch.zeros(2, 2, 3), int(label)) for label in LABELS]
    chosen = [*range(8), *range(12, 20)]  # 8, 6 and 2 of the classes
    loader = DataLoader(dataset, batch_size=4, sampler=SubsetRandomSampler(chosen))
    source, plan = loaders.as_source(loader, 0, 4)
    found = balance.class_weights(TrainConfig(class_weight="balanced"), source, plan, NAMES)
    assert found is not None
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS[chosen])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("given", [(1.0, 2.0, 0.5), {"green": 2, "red": 0.5}, {1: 2, 2: 0.5}])
def test_weights_come_in_order_by_name_or_by_index(given):
    found = weights_of(given)
    assert found is not None and found.tolist() == [1.0, 2.0, 0.5]


@pytest.mark.slow
def test_a_step_with_weights_is_that_of_keras(config):
    """Its loss is the weighted sum over the images, as in fit with class_weight."""
    weights = {0: 0.5, 1: 3.0, 2: 1.0}
    config = dataclasses.replace(
        config, epochs=1, batch_size=20, class_weight=weights, optimizer="sgd", warmup=0.0,
        schedule="constant", weight_decay=0.0,
    )  # fmt: skip
    ours, theirs = tiny.network(dropout=0.0), tiny.network(dropout=0.0)
    history = finetune(ours, tiny.dataset(), config=config)
    optimizer = keras.optimizers.SGD(config.learning_rate, momentum=0.9)
    theirs.compile(optimizer, "sparse_categorical_crossentropy")
    x, y = (tensor.numpy() for tensor in tiny.dataset().tensors)
    fitted = theirs.fit(x, y, batch_size=20, class_weight=weights, shuffle=False, verbose=0)
    np.testing.assert_allclose(tiny.curve(history), fitted.history["loss"], rtol=1e-4)
    for a, b in zip(tiny.weights(ours), tiny.weights(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_balanced_batches_draw_every_class_equally_often():
    plan = balance.balanced(LABELS.tolist(), 6, seed=3)
    counts: collections.Counter[int] = collections.Counter()
    for epoch in range(200):
        batches = plan(epoch)
        assert [len(batch) for batch in batches] == [6, 6, 6, 2]
        counts.update(LABELS[sum(batches, [])].tolist())
    np.testing.assert_allclose([counts[i] / 4000 for i in range(3)], 1 / 3, atol=0.03)
    assert plan(7) == balance.balanced(LABELS.tolist(), 6, seed=3)(7) != plan(8)


def test_an_image_that_is_drawn_again_is_augmented_otherwise():
    source = loaders.as_source(tiny.dataset(), 0, 4)[0]
    stage = Stage(torch.nn.Identity(), source, None, is_cached=False)
    ((first, second, third),) = stage.keys(lambda epoch: [[5, 2, 5]], 3)
    assert first[0] == third[0] == 5 and first[1] != third[1]
    assert first[1] % 2 != third[1] % 2  # one of them is mirrored
    assert second == (2, data.augmentation_index(2, 3))


@pytest.mark.slow
def test_the_settings_train(tmp_path, config):
    folder = tiny.pictures(tmp_path / "data")
    shutil.rmtree(folder / "red")
    few = tiny.pictures(tmp_path / "few", each=3)
    shutil.copytree(few / "red", folder / "red")
    losses = []
    settings: list[dict[str, Any]]
    settings = [{}, {"class_weight": "balanced"}, {"sampling": "balanced"}]
    for i, changes in enumerate(settings):
        changed = dataclasses.replace(config, epochs=1, output_dir=f"{config.output_dir}{i}")
        changed = dataclasses.replace(changed, **changes)
        losses.append(tiny.curve(finetune(tiny.network(), folder, config=changed))[0])
    assert len(set(losses)) == 3


def test_what_can_t_be_balanced_is_refused(config, capsys):
    wrong: tuple[Any, ...] = ("even", (1.0, -1.0), (1.0, float("nan")), {"red": "much"})
    for given in wrong:
        with pytest.raises(ValueError, match="expected 'balanced', or a number from 0"):
            TrainConfig(class_weight=given)
    with pytest.raises(ValueError, match="would balance the classes twice"):
        TrainConfig(class_weight="balanced", sampling="balanced")
    with pytest.raises(ValueError, match=r"2 numbers for 3 classes\. .* order blue, green, red"):
        weights_of((1.0, 2.0))
    with pytest.raises(ValueError, match="there is no class 'pink', only blue, green, red"):
        weights_of({"pink": 1.0})
    with pytest.raises(ValueError, match="has the class blue twice"):
        weights_of({0: 1.0, "blue": 2.0})
    with pytest.raises(ValueError, match="need an image of each of the 3; .* none of red"):
        weights_of("balanced", [0, 1])
    loader = DataLoader(Subset(tiny.dataset(), range(8)), batch_size=2)
    with pytest.raises(ValueError, match="with a DataLoader, whose own sampler decides"):
        finetune(tiny.network(), loader, config=config, sampling="balanced")
    assert main(["finetune", "photos", "--class-weight", "a,b"]) == 2
    assert "'a,b' was received; expected balanced, or numbers" in capsys.readouterr().err
    assert main(["finetune", "photos", "--class-weight", "1,2"]) == 1
    assert "There is no photos." in capsys.readouterr().err
