"""Learning rates over time: vggtorch's own schedules, and any scheduler of torch."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from vggtorch import files
from vggtorch.training.config import OWN_SCHEDULES, TrainConfig
from vggtorch.training.optimization import learning_rate, name_of, set_learning_rate_, torch_class


def make_scheduler(config: TrainConfig, optimizer: Optimizer, steps: int) -> LRScheduler | None:
    """A scheduler of torch, by its name or by what makes one; None for vggtorch's own schedules.

    It begins at the learning rates of all groups. By name it gets the number of steps and the
    highest rate where it asks for them, and has torch's defaults otherwise.

    Raises:
        ValueError: no such scheduler, or one that needs more to be said.
    """
    given = config.schedule
    if given in OWN_SCHEDULES:
        return None
    set_learning_rate_(optimizer, config.learning_rate)
    make: Any = given
    if isinstance(given, str):
        kind = torch_class("schedule", given, lr_scheduler, LRScheduler, OWN_SCHEDULES)
        make = functools.partial(_with_steps, kind, steps=steps)
    try:
        made = make(optimizer)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"Received schedule={name_of(given)!r}, which can't be made: {files.first_line(error)}"
        ) from error
    if not isinstance(made, LRScheduler):
        raise ValueError(
            f"Received schedule={name_of(given)!r}, which makes a {type(made).__name__}; expected "
            f"a torch.optim.lr_scheduler.LRScheduler."
        )
    return made


def _with_steps(kind: Any, optimizer: Optimizer, steps: int) -> LRScheduler:
    rates = [group["lr"] for group in optimizer.param_groups]
    values = {"total_steps": steps, "T_max": steps, "total_iters": steps, "max_lr": rates}
    parameters = list(inspect.signature(kind).parameters.values())[1:]  # without the optimizer
    options = {p.name: values[p.name] for p in parameters if p.name in values}
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in options]
    if missing:
        raise ValueError(
            f"it needs {', '.join(missing)}. Pass what makes it, in Python: "
            f"functools.partial({kind.__name__}, {missing[0]}=...)."
        )
    return kind(optimizer, **options)


def set_rate_(
    scheduler: LRScheduler | None, optimizer: Optimizer, config: TrainConfig, step: int, steps: int
) -> float:
    """Set the learning rates of a step (from 0) of so many; returns the head's."""
    if scheduler is None:
        rate = learning_rate(config, step, steps)
        set_learning_rate_(optimizer, rate)
        return rate
    return max(group["lr"] / group["scale"] for group in optimizer.param_groups)


def after_step_(scheduler: LRScheduler | None) -> None:
    """What a scheduler does after an optimizer's step."""
    if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step()


def after_epoch_(scheduler: LRScheduler | None, loss: float) -> None:
    """What ReduceLROnPlateau does after an epoch with this loss, of validation if there is any."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(loss)
