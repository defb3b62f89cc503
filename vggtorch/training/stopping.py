"""How a run is stopped from outside: by Ctrl-C, or by the signal that schedulers send, SIGTERM."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """A run was stopped by Ctrl-C, and has left a checkpoint."""


class Terminated(SystemExit):
    """A run was stopped by SIGTERM, and has left a checkpoint; the process ends with status 143."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Stopping:
    """Turns the first signal into an exception, where a run can be left and carried on later.

    A second one ends the run wherever it is. One of several processes can't stop while the others
    wait for its part of a step: they agree on it, by `agree`.
    """

    def __init__(self, together: bool) -> None:
        self._together = together
        self._received: int | None = None
        self._is_held = False
        self._process = os.getpid()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if os.getpid() != self._process:  # a worker that reads images has inherited this
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self._received is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        else:
            self._received = number
            if not self._is_held and not self._together:
                self._stop()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, what has begun is ended first: a step, an epoch's figures, a checkpoint."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._received is not None and not self._together:
            self._stop()

    def agree(self, accelerator: Any) -> None:
        """Between two steps: stop, in all processes, if one of them has got a signal."""
        if not self._together:
            return
        import torch  # late, since the command line asks for the classes here before it needs torch

        received = torch.tensor(float(self._received is not None), device=accelerator.device)
        if accelerator.reduce(received).item():
            self._received = self._received or signal.SIGTERM
            self._stop()

    def _stop(self) -> None:
        raise Interrupted if self._received == signal.SIGINT else Terminated


@contextlib.contextmanager
def stoppable(processes: int) -> Iterator[Stopping]:
    """Listen to SIGINT and SIGTERM while a run is at work.

    Only in the main thread, which alone gets signals. A signal that the process ignores, as under
    nohup, stays ignored.
    """
    stop = Stopping(together=processes > 1)
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, stop.handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
