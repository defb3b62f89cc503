"""How far a training of new layers is, by steps or by the clock, and how large its steps are."""

from __future__ import annotations

from math import cos, pi

WARM_UP = 10  # steps


def progress_of(step: int, steps: int, spent: float) -> float:
    """The share of a training that is done.

    The clock has a say only once it is clear that the steps won't fit in the time, because a result
    that depends on the clock can't be had again.

    Args:
        step: how many steps are done.
        steps: of all.
        spent: the share of the time that has gone by.
    """
    return step / steps if spent < 0.2 else max(step / steps, spent)


def rate_at(step: int, progress: float) -> float:
    """The share of the learning rate that a step takes: warm up, then down a cosine to nothing."""
    return min(1.0, (step + 1) / WARM_UP) * (1 + cos(pi * progress)) / 2
