"""Optimizers and schedulers of torch do in a run what they do in a loop of one's own."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch.optim import lr_scheduler

from vggtorch.training.config import TrainConfig
from vggtorch.training.loop import finetune
from vggtorch.training.optimization import make_optimizer, trained_parameters
from vggtorch.training.schedules import after_step_, make_scheduler, set_rate_

CPU = torch.device("cpu")


def rates(config, steps=12):
    """What each step of a run would learn with."""
    model = tiny.network()
    optimizer = make_optimizer(model, trained_parameters(model, config), config, CPU)
    scheduler = make_scheduler(config, optimizer, steps)
    found = []
    for step in range(steps):
        found.append(set_rate_(scheduler, optimizer, config, step, steps))
        optimizer.step()
        after_step_(scheduler)
    return found


def plainly(make, steps=12):
    """The same by torch alone, on one parameter."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("CosineAnnealingLR", {"T_max": 12}),
        ("onecyclelr", {"max_lr": 0.3, "total_steps": 12}),
        ("LinearLR", {"total_iters": 12}),
        ("PolynomialLR", {"total_iters": 12}),
    ],
)
def test_a_scheduler_by_its_name_is_torch_s_over_all_steps(name, options):
    kind = {key.lower(): value for key, value in vars(lr_scheduler).items()}[name.lower()]
    config = TrainConfig(optimizer="sgd", learning_rate=0.3, layer_decay=0.5, schedule=name)
    expected = plainly(lambda optimizer: kind(optimizer, **options))
    np.testing.assert_allclose(rates(config), expected, rtol=1e-9)


def test_what_makes_a_scheduler_does_too():
    make = functools.partial(lr_scheduler.StepLR, step_size=5)
    config = TrainConfig(optimizer="sgd", learning_rate=0.3, schedule=make)
    np.testing.assert_allclose(rates(config), plainly(make), rtol=1e-9)


@pytest.mark.slow
def test_a_plateau_is_one_of_epochs(config):
    make = functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10.0)
    config = dataclasses.replace(config, schedule=make, epochs=4)
    history = finetune(tiny.network(), tiny.dataset(), tiny.dataset(9), config)
    # No loss is ten times better than another, so that the rate falls after every epoch.
    np.testing.assert_allclose(tiny.curve(history, "learning_rate"), [1e-3, 1e-4, 1e-5, 1e-6])


@pytest.mark.slow
def test_an_optimizer_by_what_makes_it_trains_as_torch_s_own_loop(config):
    config = dataclasses.replace(
        config, epochs=2, batch_size=20, schedule="constant", warmup=0.0, weight_decay=0.0,
        optimizer=functools.partial(torch.optim.SGD, momentum=0.5, nesterov=True),
    )  # fmt: skip
    ours, theirs = tiny.network(dropout=0.0), tiny.network(dropout=0.0)
    finetune(ours, tiny.dataset(), config=config)
    parameters = [v.value for v in theirs.trainable_variables]
    optimizer = torch.optim.SGD(parameters, 1e-3, momentum=0.5, nesterov=True)
    x, y = tiny.dataset().tensors
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.nll_loss(theirs(x, training=True).log(), y).backward()
        optimizer.step()
    for a, b in zip(tiny.weights(ours), tiny.weights(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_function_may_make_the_optimizer():
    model = tiny.network()
    config = TrainConfig(optimizer=lambda groups: torch.optim.Adam(groups, betas=(0.8, 0.9)))
    made = make_optimizer(model, trained_parameters(model, config), config, CPU)
    assert {tuple(group["betas"]) for group in made.param_groups} == {(0.8, 0.9)}
    assert {group["weight_decay"] for group in made.param_groups} == {0.0, config.weight_decay}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosin"}, r"schedule='cosin'; expected one of cosine, .* Perhaps cosine\?"),
        ({"schedule": "plateau"}, r"expected one of .* Perhaps reducelronplateau\?"),
        ({"schedule": "StepLR"}, r"it needs step_size\. Pass what makes it, .* step_size=\.\.\."),
        ({"schedule": lambda optimizer: 5}, "which makes a int; expected a torch.optim.lr_sched"),
        (
            {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.5)},
            "which sets lr=0.5, and that would not count: .* Pass learning_rate=0.5 instead",
        ),
        (
            {"optimizer": lambda groups: torch.optim.AdamW(groups, weight_decay=0.3)},
            "which sets weight_decay=0.3, and that would not count",
        ),
        ({"optimizer": lambda groups: 5}, "which makes a int; expected a torch.optim.Optimizer"),
        (
            {"optimizer": functools.partial(torch.optim.SGD, lr=0.5)},
            r"'SGD\(lr=0.5\)', which sets lr=0.5, and .* Pass learning_rate=0.5 instead",
        ),
        (
            {"optimizer": functools.partial(torch.optim.SGD, weight_decay=0.5)},
            r"which sets weight_decay=0.5, and that would not count: .* Pass weight_decay=0.5",
        ),
    ],
)
def test_what_can_t_be_made_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        rates(TrainConfig(**settings))


def test_what_is_made_already_is_refused():
    optimizer: Any = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"optimizer=SGD\(\.\.\.\), which is made already"):
        TrainConfig(optimizer=optimizer)
    scheduler: Any = lr_scheduler.StepLR(optimizer, 2)
    with pytest.raises(ValueError, match=r"Pass what makes it: functools\.partial\(StepLR, "):
        TrainConfig(schedule=scheduler)


@pytest.mark.slow
def test_another_function_is_another_run(config):
    def resumed(schedule):
        changed = dataclasses.replace(config, epochs=1, resume=True, schedule=schedule)
        return finetune(tiny.network(), tiny.dataset(), config=changed)

    resumed(lambda optimizer: lr_scheduler.StepLR(optimizer, 2))
    resumed(lambda optimizer: lr_scheduler.StepLR(optimizer, 2))
    with pytest.raises(ValueError, match="belongs to another run: schedule="):
        resumed(lambda optimizer: lr_scheduler.StepLR(optimizer, 3))
    with pytest.raises(ValueError, match="belongs to another run: schedule="):
        resumed(functools.partial(lr_scheduler.StepLR, step_size=2))
