"""What people see while a network trains: a progress bar, and the figures of each epoch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class Display:
    """A progress bar on stderr."""

    def __init__(self, progress: Any) -> None:
        self._progress, self._task = progress, None

    def begin(self, text: str, images: int, done: int = 0) -> None:
        """A new bar for so many images, some of them done already."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(text, total=images, completed=done, loss="")

    def advance(self, images: int, loss: float | None = None) -> None:
        """So many more images are done; the mean loss so far."""
        text = "" if loss is None else f"loss {loss:.4f}"
        self._progress.update(self._task, advance=images, loss=text)

    def say(self, text: str) -> None:
        """Show a line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def end(self, epoch: int, result: dict[str, float]) -> None:
        """Show an epoch's figures."""
        figures = "  ".join(f"{name} {value:.4g}" for name, value in result.items())
        self._progress.console.print(f"epoch {epoch + 1}  {figures}")


@contextlib.contextmanager
def open_display(is_main: bool) -> Iterator[Display]:
    """Show progress in the main process."""
    from rich import progress as bars
    from rich.console import Console

    class Throughput(bars.ProgressColumn):
        def render(self, task: bars.Task) -> str:
            return f"{task.speed or 0:.0f} images/s"

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        Throughput(),
        bars.TextColumn("{task.fields[loss]}"),
        bars.TimeRemainingColumn(),
    )
    console = Console(stderr=True, quiet=not is_main)
    with bars.Progress(*columns, console=console, disable=not is_main) as progress:
        yield Display(progress)
