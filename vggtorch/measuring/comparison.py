"""What a surgery changed in the costs of a network, block by block."""

from __future__ import annotations

from dataclasses import dataclass

import keras

from vggtorch.measuring.costs import Report, Row, check_measured, inspect
from vggtorch.text import table


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: both reports; as text, one line for each block and the total."""

    before: Report
    after: Report

    def __str__(self) -> str:
        return self.as_text()

    def as_text(self, width: int | None = None) -> str:
        """A table that is at most so many characters wide, if need be with two lines a row."""
        header = ("block", "", "parameters", "multiply-adds", "activation", "time")
        lines: list[tuple[str, ...]] = [header]
        before = {row.name: row for row in self.before.blocks}
        after = {row.name: row for row in self.after.blocks}
        pairs: list[tuple[str, Row | None, Row | None]] = [
            (name, before.get(name), after.get(name)) for name in before | after
        ]
        for name, old, new in [*pairs, ("total", self.before.total, self.after.total)]:
            if old is not None:
                lines.append((name, "before", *old.cells))
            if new is not None:
                lines.append(("" if old else name, "after", *new.cells))
            if old is not None and new is not None and name == "total":
                both = zip(old.costs, new.costs, strict=True)
                ratios = (f"{b / a:.3f}" if a else "" for a, b in both)
                lines.append(("", "after/before", *ratios))
        return table(lines, 2, width)


def compare(
    before: keras.Model, after: keras.Model, *, size: int = 224, repeats: int = 5
) -> Comparison:
    """Measure two networks, such as one before and after a surgery; see `inspect`.

    >>> import keras, vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> new = keras.layers.Conv2D(64, 5, padding="same", activation="relu", name="block1_conv")
    >>> faster = vt.replace(vgg, ["block1_conv1", "block1_conv2"], new)
    >>> found = vt.compare(vgg, faster, repeats=1)
    >>> found.after.total.multiply_adds < 0.9 * found.before.total.multiply_adds
    True

    Args:
        before: the first network, built; unchanged.
        after: the second.
        size: height and width in pixels where a model leaves them open.
        repeats: runs, whose median is the time.

    Raises:
        ValueError: as `inspect`, for either.
    """
    for model in (before, after):
        check_measured(model, "compare", size, repeats)  # either, before the first is measured
    first, second = (inspect(model, size=size, repeats=repeats) for model in (before, after))
    return Comparison(first, second)
