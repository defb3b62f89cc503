"""All new layers trained at once, until the network behind them sees what it saw before."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vggtorch.compression.statistics import to_unit_size
from vggtorch.surgery import progress_of, rate_at

LEARNING_RATE = 1e-3  # of the size of a weight; larger steps diverged
BATCH = 8
CHECK = 20  # steps from one look at the held-out images to the next
DEEPER = 2.0  # how many times as much as the map before it each map counts


def distance(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Squared error of each map relative to its size, by image; deeper maps count more."""
    errors = []
    for y, t in zip(outputs, targets, strict=True):
        errors.append(((y - t).flatten(1) * to_unit_size(t)).square().sum(1).mean())
    weights = DEEPER ** torch.arange(len(errors), device=errors[0].device)
    return torch.stack(errors) @ weights / weights.sum()


@dataclass
class State:
    """How far the training is; all that it needs to go on as if it had never stopped."""

    step: int = 0
    seconds: float = 0.0
    best: float = float("inf")
    kept: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    optimizer: dict[str, Any] | None = None
    generator: Tensor | None = None


def descend_(
    network: Callable[[Tensor], Sequence[Tensor]],
    trained: Sequence[Tensor],
    reference: Callable[[Tensor], Sequence[Tensor]],
    draw: Callable[[int, torch.Generator], Tensor],
    held_out: Sequence[Tensor],
    *,
    steps: int,
    seconds: float,
    seed: int,
    state: State | None = None,
    save: Callable[[State], None] = lambda state: None,
    show: Callable[[float, float], None] = lambda progress, error: None,
) -> State:
    """Train the new layers' weights, in place, and leave those that were best on held-out images.

    Adam, with steps of a thousandth of each weight's size at first, which fall to nothing.

    Args:
        network: with the new layers in place; returns its maps as a list.
        trained: the new layers' parameters.
        reference: the original's maps of a batch.
        draw: so many crops of the images to train on.
        held_out: batches of images that aren't trained on.
        steps: at most; by then the learning rate has fallen to nothing.
        seconds: at most, likewise.
        seed: of the crops.
        state: where to go on.
        save: called with the state at each look at the held-out images.
        show: called with the share that is done and the held-out error.
    """
    begun = time.monotonic() - (0.0 if state is None else state.seconds)
    targets = [reference(x) for x in held_out]
    groups = [
        {"params": [p], "lr": 0.0, "size": float(p.detach().norm()) / p.numel() ** 0.5}
        for p in trained
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def error() -> float:
        values = [float(distance(network(x), t)) for x, t in zip(held_out, targets, strict=True)]
        return sum(values) / len(values)

    def copies() -> list[Tensor]:
        return [p.detach().clone() for p in trained]

    if state is None:
        state = State(best=error(), kept=copies())
    else:
        _write_(trained, state.weights)
        optimizer.load_state_dict(state.optimizer or {})
        generator.set_state(state.generator)  # type: ignore[arg-type]
    show(state.step / max(steps, 1), state.best)
    while state.step < steps:
        spent = (time.monotonic() - begun) / max(seconds, 1e-9)
        if spent >= 1:
            break
        progress = progress_of(state.step, steps, spent)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * group["size"] * rate_at(state.step, progress)
        x = draw(BATCH, generator)
        wanted = reference(x)
        optimizer.zero_grad()
        distance(network(x), wanted).backward()
        optimizer.step()
        state.step += 1
        if state.step % CHECK == 0 or state.step == steps:
            now = error()
            if now < state.best:
                state.best, state.kept = now, copies()
            state.weights, state.optimizer = copies(), optimizer.state_dict()
            state.generator = generator.get_state()
            state.seconds = time.monotonic() - begun
            save(state)
            show(max(progress, state.step / steps), state.best)
    if state.step % CHECK and state.step < steps and (now := error()) < state.best:
        state.best, state.kept = now, copies()
    _write_(trained, state.kept)
    state.seconds = time.monotonic() - begun
    return state


@torch.no_grad()
def _write_(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
