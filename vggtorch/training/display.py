"""What people see while a network trains: a progress bar, and the figures of each epoch."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from vggtorch.text import table, wrapped

LONGEST = 9  # characters of a figure, such as 1.234e-05


class Display:
    """A progress bar on stderr."""

    def __init__(self, progress: Any) -> None:
        self._progress, self._task = progress, None
        self._header = ""  # of the table of epochs, as it was shown last

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
        """Show lines above the bar, broken between words where a terminal is narrower."""
        text = wrapped(text, self._width)
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def end(self, epoch: int, result: dict[str, float]) -> None:
        """Show an epoch's figures: a table's row in a terminal, else a line that names them."""
        if self._width is None:
            self.say("  ".join([f"epoch {epoch + 1}", *_named(result)]))
            return
        header, row = epoch_row(epoch, result, self._width)
        if header != self._header:
            self._header = header
            self.say(header)
        self.say(row)

    @property
    def _width(self) -> int | None:
        console = self._progress.console
        return console.width if console.is_terminal and not console.is_jupyter else None


def epoch_row(epoch: int, result: Mapping[str, float], width: int) -> tuple[str, str]:
    """A table's header and row for an epoch; figures that have no room stand named under the row.

    >>> from vggtorch.training.display import epoch_row
    >>> figures = {"loss": 0.5, "val_accuracy": 0.75, "val_auroc": 0.8125}
    >>> for lines in epoch_row(0, figures, 40):
    ...     print(lines)
    epoch       loss  val_accuracy
        1        0.5          0.75
           val_auroc 0.8125
    """
    columns = [("epoch", str(epoch + 1))]
    left = width - len("epoch")
    for name, value in result.items():
        left -= 2 + max(len(name), LONGEST)
        if left < 0:
            break
        columns.append((name.rjust(LONGEST), f"{value:.4g}"))
    lines = table(list(zip(*columns, strict=True)), 0).split("\n")
    rest = _named(dict(list(result.items())[len(columns) - 1 :]))
    more = textwrap.fill(
        "  ".join(pair.replace(" ", "\0") for pair in rest),
        width,
        initial_indent=" " * 7,
        subsequent_indent=" " * 7,
        break_long_words=False,
    ).replace("\0", " ")
    return lines[0], "\n".join([lines[1], *filter(str.strip, [more])])


def _named(result: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in result.items()]


@contextlib.contextmanager
def open_display(is_main: bool) -> Iterator[Display]:
    """Show progress in the main process."""
    from rich import progress as bars
    from rich.console import Console

    class Throughput(bars.ProgressColumn):
        def render(self, task: bars.Task) -> str:
            return "" if task.speed is None else f"{task.speed:.0f} images/s"

    console = Console(stderr=True, quiet=not is_main)
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(max(5, min(40, console.width - 65))),  # the rest is 65 wide at most
        bars.MofNCompleteColumn(),
        Throughput(),
        bars.TextColumn("{task.fields[loss]}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, disable=not is_main) as progress:
        yield Display(progress)
