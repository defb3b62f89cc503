"""Times calls fairly: in turns, after a warm-up, with an empty queue on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch


def clock(device: torch.device) -> float:
    """Seconds; on a GPU once it has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    begun = clock(device)
    run()
    return clock(device) - begun


def in_turns(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    warmup: int = 2,
) -> dict[str, list[float]]:
    """Seconds of each call: A B C A B C ..., after a warm-up of each."""
    for run in candidates.values():
        for _ in range(warmup):
            timed(run, device)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            seconds[name].append(timed(run, device))
    return seconds
