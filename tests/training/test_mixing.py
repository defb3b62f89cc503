"""Mixup and cutmix are torchvision's, bit for bit, and the same whoever has the images."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torchvision.transforms import v2

from vggtorch.training import data, loaders, mixing, reading
from vggtorch.training.config import TrainConfig
from vggtorch.training.loop import finetune
from vggtorch.training.mixing import mixed


@pytest.mark.parametrize(("name", "kind"), [("mixup", v2.MixUp), ("cutmix", v2.CutMix)])
@pytest.mark.parametrize("step", [0, 7])
def test_what_is_mixed_is_what_torchvision_mixes(name, kind, step):
    x, y = torch.rand(5, 10, 12, 3), torch.tensor([0, 2, 1, 1, 0])
    alpha: dict[str, Any] = {name: 0.7}
    config = TrainConfig(seed=3, **alpha)
    found, shares = mixed(x, y, (x.roll(1, 0), y.roll(1, 0)), 3, config, step)
    with data.seeded(3, step, mixing._TAG):
        expected, labels = kind(alpha=0.7, num_classes=3)(x.permute(0, 3, 1, 2), y)
    assert torch.equal(found, expected.permute(0, 2, 3, 1))
    torch.testing.assert_close(shares, labels)
    if step == 0:  # in others the box may be empty
        assert not torch.equal(found, x)


def test_with_both_each_batch_has_one_of_them():
    x, y = torch.rand(4, 8, 8, 3), torch.tensor([0, 1, 2, 0])
    config = TrainConfig(mixup=1.0, cutmix=1.0)
    pasted = []
    for step in range(40):
        found, _ = mixed(x, y, (x.roll(1, 0), y.roll(1, 0)), 3, config, step)
        pasted.append(bool(((found == x) | (found == x.roll(1, 0))).all()))
    assert 10 < sum(pasted) < 30


@pytest.mark.parametrize("count", [1, 2, 7])
def test_processes_share_out_the_pairs_of_the_whole_batch(count):
    dataset = tiny.dataset()
    source, _ = loaders.as_source(dataset, 0, 4)
    keys = [[(i, 0) for i in range(count)], [(9, 0), (3, 0), (5, 0)]]
    for processes in (1, 2, 4):
        parts = []
        for process in range(processes):
            who = SimpleNamespace(process_index=process, num_processes=processes)
            parts.append([*reading.shared_batches(source, keys, 0, who, in_pairs=True)])
        for at, batch in enumerate(keys):
            indices = [index for index, _ in batch]
            for process in range(processes):
                part = parts[process][at]
                assert part.partners is not None
                mine = indices[process::processes]
                before = [indices[indices.index(i) - 1] for i in mine]
                assert torch.equal(part.images, dataset.tensors[0][mine])
                assert torch.equal(part.partners[0], dataset.tensors[0][before])
                assert torch.equal(part.partners[1], dataset.tensors[1][before])
                assert part.size == len(batch)


@pytest.mark.slow
def test_a_run_minimises_the_loss_of_what_torchvision_mixes(config):
    """In pieces too, with smoothed labels and weights: torch's cross-entropy of the shares."""
    config = dataclasses.replace(
        config, epochs=1, batch_size=20, mixup=0.5, label_smoothing=0.1,
        class_weight=(1.0, 2.0, 0.5),
    )  # fmt: skip
    x, y = tiny.dataset().tensors
    order = data.shuffled(20, 20, 0)(0)[0]
    with data.seeded(config.seed, 0, mixing._TAG):
        images, shares = v2.MixUp(alpha=0.5, num_classes=3)(x[order].permute(0, 3, 1, 2), y[order])
    model = tiny.network(dropout=0.0)
    probabilities = model(images.permute(0, 2, 3, 1)).detach()
    expected = torch.nn.functional.cross_entropy(
        probabilities.log(), shares, weight=torch.tensor([1.0, 2.0, 0.5]), reduction="sum",
        label_smoothing=0.1,
    )  # fmt: skip
    for pieces in (1, 3):
        changed = dataclasses.replace(
            config, gradient_accumulation_steps=pieces, output_dir=f"{config.output_dir}{pieces}"
        )
        history = finetune(tiny.network(dropout=0.0), tiny.dataset(), config=changed)
        np.testing.assert_allclose(tiny.curve(history), float(expected) / 20, rtol=1e-5)


@pytest.mark.slow
def test_mixed_images_go_through_the_frozen_layers(images, config, capsys):
    config = dataclasses.replace(config, epochs=1, freeze="block1_pool")
    finetune(tiny.network(), images, config=dataclasses.replace(config, cutmix=1.0))
    assert "Cached: nothing; frozen layers run in every step" in capsys.readouterr().err
