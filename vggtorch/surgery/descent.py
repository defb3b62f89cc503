"""Training of new layers: how long, how large its steps are, and which of its weights are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, inf, pi

import torch
from torch import Tensor

WARM_UP = 10  # steps


@dataclass
class Descent:
    """How far a training is.

    Attributes:
        step: how many steps are done.
        seconds: how long they took.
        best: the least error so far.
        kept: what the trained parameters held then.
    """

    step: int = 0
    seconds: float = 0.0
    best: float = inf
    kept: Sequence[Tensor] = ()


def descend_(
    state: Descent,
    trained: Sequence[Tensor],
    step_: Callable[[float], None],
    error: Callable[[], float],
    looked: Callable[[float], None],
    *,
    steps: int,
    seconds: float,
    every: int,
    patience: float = inf,
) -> None:
    """Train parameters, in place, and leave in them the weights that were best.

    Args:
        state: where to go on; follows the training.
        trained: the parameters.
        step_: takes a step of a share of the learning rate. It warms up, then goes down a cosine,
            to nothing by the time the steps or the seconds run out.
        error: of the weights as they are, on examples that nothing is trained on.
        looked: called after each look at the error, with the share of the training that is done.
        steps: at most, those of `state` among them.
        seconds: at most, likewise.
        every: so many steps from one look to the next.
        patience: looks without a better error before the training stops.
    """
    begun, waited = time.monotonic() - state.seconds, 0
    while state.step < steps and waited < patience:
        spent = (time.monotonic() - begun) / max(seconds, 1e-9)
        if spent >= 1:
            break
        # The clock has a say only once it is clear that the steps won't fit in the time, because a
        # result that depends on the clock can't be had again.
        done = max(state.step / steps, spent if spent >= 0.2 else 0.0)
        step_(min(1.0, (state.step + 1) / WARM_UP) * (1 + cos(pi * done)) / 2)
        state.step += 1
        if state.step % every == 0 or state.step == steps:
            waited += 1
            if (now := error()) < state.best:
                state.best, state.kept, waited = now, copies(trained), 0
            state.seconds = time.monotonic() - begun
            looked(max(done, state.step / steps))
    if state.step % every and state.step < steps and (now := error()) < state.best:
        state.best, state.kept = now, copies(trained)
    write_(trained, state.kept)
    state.seconds = time.monotonic() - begun


def copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    """What parameters hold now."""
    return [p.detach().clone() for p in parameters]


@torch.no_grad()
def write_(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Give parameters the values of such copies."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
