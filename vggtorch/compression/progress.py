"""What is shown of a compression while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """A bar for one step after the other."""

    def __init__(self, bars: Any) -> None:
        self._bars, self._task = bars, None

    def begin(self, text: str, total: float) -> None:
        """A new bar, of so many parts; where there is nothing to draw it in, a line."""
        if not (self._bars.console.is_terminal or self._bars.console.is_jupyter):
            self._bars.console.print(text)
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._task = self._bars.add_task(text, total=total, note="")

    def advance(self) -> None:
        """One more part is done."""
        self._bars.advance(self._task)

    def reach(self, parts: float, note: str) -> None:
        """So many parts are done in all."""
        self._bars.update(self._task, completed=parts, note=note)


@contextmanager
def open_progress() -> Iterator[Progress]:
    """Show progress on stderr."""
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.TextColumn("{task.fields[note]}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True)) as shown:
        yield Progress(shown)
