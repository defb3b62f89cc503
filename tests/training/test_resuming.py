"""A run that was killed ends as one that was left alone, and no run takes another's place."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.optim import lr_scheduler

from vggtorch.training import loop
from vggtorch.training.loop import finetune

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sgd": {"optimizer": "sgd", "batch_norm": True},
    "averaged": {"ema_decay": 0.9, "augment": "trivial", "max_grad_norm": 0.5},
    "thawing": {
        "freeze": "block2_pool", "unfreeze": ((1, "block2_conv1"),), "augment": "crop",
        "cache_copies": 3, "layer_decay": 0.5, "batch_norm": True,
    },
    "torch's schedule": {
        "optimizer": functools.partial(torch.optim.SGD, momentum=0.5), "schedule": "OneCycleLR",
        "layer_decay": 0.5, "metrics": ("auroc",), "monitor": "loss",
    },
    "milestones": {
        "schedule": lambda optimizer: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer), lr_scheduler.MultiStepLR(optimizer, [3, 5])],
            [2],
        ),
    },
    "mixed": {
        "mixup": 0.4, "cutmix": 1.0, "sampling": "balanced", "class_weight": (1.0, 2.0, 0.5),
        "augment": "crop", "label_smoothing": 0.1,
    },
    "head": {"head": "mlp", "freeze": "block2_pool", "schedule": "constant"},
}  # fmt: skip


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_ends_as_if_nothing_had_happened(images, config, variant, monkeypatch):
    options = dict(VARIANTS[variant])
    batch_norm, head = options.pop("batch_norm", False), "head" in options
    config = dataclasses.replace(config, checkpoint_steps=1, resume=True, **options)

    def run(folder):
        model = tiny.network(None if head else 3, batch_norm=batch_norm)
        return finetune(model, images, config=dataclasses.replace(config, output_dir=folder))

    expected = run(config.output_dir + "0")
    real, calls = loop.train_step_, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) % 5 == 0:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(loop, "train_step_", interrupted)
    for _ in range(20):
        torch.rand(3)
        try:
            found = run(config.output_dir)
            break
        except Killed:
            continue
    assert len(calls) > 9
    for a, b in zip(tiny.weights(found.model), tiny.weights(expected.model), strict=True):
        np.testing.assert_array_equal(a, b)
    figures = [[{**e, "seconds": 0} for e in history.epochs] for history in (found, expected)]
    assert figures[0] == figures[1]
    assert found.kept_epoch == expected.kept_epoch
    assert found.evaluation is not None and expected.evaluation is not None
    assert torch.equal(found.evaluation.logits, expected.evaluation.logits)


@pytest.mark.slow
def test_a_finished_run_resumes_to_what_it_was(images, config, capsys):
    first = finetune(tiny.network(), images, config=config)
    assert "had ended" not in capsys.readouterr().err
    again = finetune(tiny.network(), images, config=dataclasses.replace(config, resume=True))
    assert "had ended: nothing is trained." in capsys.readouterr().err
    assert again.epochs == first.epochs
    assert all(map(np.array_equal, tiny.weights(again.model), tiny.weights(first.model)))
    assert again.evaluation is not None and first.evaluation is not None
    assert torch.equal(again.evaluation.logits, first.evaluation.logits)


@pytest.mark.slow
def test_a_run_is_not_overwritten(images, config):
    finetune(tiny.network(), images, config=config)
    with pytest.raises(ValueError, match=r"last.pt exists: .* Pass resume=True .* another folder"):
        finetune(tiny.network(), images, config=config)
