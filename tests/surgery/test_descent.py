"""Training of new layers: when it ends, how large its steps are, and what it leaves."""

from __future__ import annotations

from typing import Any

import vggtorch as vt  # isort: skip  # noqa: F401  (first: it selects Keras's torch backend)
import pytest
import torch

from vggtorch.surgery.descent import WARM_UP, Descent, copies, descend_


def descend(errors: list[float], **options: Any) -> tuple[Descent, list[float], float]:
    """A training of one number, which each step makes larger by one, and its errors at each look.

    Gives how far it came, the shares of the learning rate, and what the number was left at.
    """
    number, rates = torch.zeros(()), []

    def step_(rate: float) -> None:
        rates.append(rate)
        number.add_(1)

    state = Descent(best=10.0, kept=copies([number]))
    options = {"steps": 100, "seconds": 1e6, "every": 1} | options
    found = iter(errors)
    descend_(state, [number], step_, lambda: next(found), lambda done: None, **options)
    return state, rates, float(number)


def test_it_ends_with_the_steps_and_leaves_what_was_best() -> None:
    state, rates, number = descend([5.0, 3.0, 4.0, 4.0], steps=4)
    assert (state.step, state.best, number, len(rates)) == (4, 3.0, 2.0, 4)


def test_it_ends_after_so_many_looks_without_a_better_error() -> None:
    state, _, number = descend([5.0, 6.0, 3.0, 4.0, 4.0, 1.0], patience=2)
    assert (state.step, state.best, number) == (5, 3.0, 3.0)


def test_without_a_better_error_it_leaves_what_it_began_with() -> None:
    assert descend([11.0] * 4, steps=4)[2] == 0


def test_steps_grow_at_first_and_go_down_a_cosine_to_nothing() -> None:
    _, rates, _ = descend([1.0] * 100)
    assert rates[0] == pytest.approx(1 / WARM_UP)
    assert rates[50] == pytest.approx(0.5)
    assert rates[25] == pytest.approx(0.8536, abs=1e-4)
    assert 0 < rates[-1] < 1e-3


def test_no_time_is_no_step() -> None:
    assert descend([], seconds=0.0)[0].step == 0


def test_it_goes_on_where_it_was() -> None:
    number = torch.full((), 7.0)
    state = Descent(step=3, best=2.0, kept=[torch.full((), 7.0)])
    seen: list[float] = []
    descend_(state, [number], seen.append, lambda: 9.0, lambda done: None,
             steps=5, seconds=1e6, every=1)  # fmt: skip
    assert (state.step, len(seen), float(number)) == (5, 2, 7.0)
