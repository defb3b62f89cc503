"""Which class was taken for which: a table with numbers, or of many classes a drawing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vggtorch.text import in_html, name_in_html, shortened

LARGE = 25  # classes, from which on it is a drawing without numbers
ROOM = 22  # columns of text for a name beside the drawing
RIGHT, WRONG = "59,130,196", "217,115,13"


def confusion_html(classes: Sequence[str], confusion: np.ndarray) -> str:
    """A confusion matrix, rows true and columns predicted, and the pairs most often confused."""
    draw = _drawing if len(classes) >= LARGE else _table
    wrong = confusion * (1 - np.eye(len(classes), dtype=confusion.dtype))
    pairs = [divmod(int(i), len(classes)) for i in np.argsort(-wrong, axis=None, kind="stable")[:8]]
    worst = "".join(
        f"<li>{name_in_html(classes[i])} taken for {name_in_html(classes[j])}: "
        f"{wrong[i, j]} of {confusion[i].sum()}</li>"
        for i, j in pairs
        if wrong[i, j]
    )
    return (
        f"<h3>Confusion</h3><p>Rows are true, columns predicted; blue is right, orange wrong.</p>"
        f"{draw(classes, confusion)}"
        + (f"<p>Most often confused:</p><ul>{worst}</ul>" if worst else "")
    )


def _shade(i: int, j: int, count: int, images: int) -> str:
    """The colour of a cell: deeper for a larger share of the class; no mistake is faint."""
    if not count:
        return ""
    share = count / max(images, 1)
    return f"rgba({RIGHT},{share:.2f})" if i == j else f"rgba({WRONG},{0.25 + 0.65 * share:.2f})"


def _table(classes: Sequence[str], confusion: np.ndarray) -> str:
    names, body = [in_html(name) for name in classes], ""
    for i, (name, counts) in enumerate(zip(classes, confusion, strict=True)):
        cells = ""
        for j, count in enumerate(counts):
            shade = _shade(i, j, count, counts.sum())
            style = f' style="background:{shade}"' if shade else ""
            cells += f'<td{style} title="{in_html(name)} as {names[j]}: {count}">{count or ""}</td>'
        body += f"<tr><th>{name_in_html(name)}</th>{cells}</tr>"
    columns = "".join(f"<th>{name_in_html(name)}</th>" for name in classes)
    return (
        f'<div class=wide><table class="confusion"><tr class=turned><th></th>{columns}</tr>'
        f"{body}</table></div>"
    )


def _drawing(classes: Sequence[str], confusion: np.ndarray) -> str:
    """Cells that hold something, each of which says what it is; some classes have names."""
    names, count, edge = list(map(in_html, classes)), len(classes), 640 / len(classes)
    step = max(1, round(14 / edge))
    size, left = 640, 150
    cells = "".join(
        f'<rect x="{left + j * edge:.2f}" y="{i * edge:.2f}" width="{edge:.2f}" '
        f'height="{edge:.2f}" fill="{_shade(i, j, confusion[i, j], confusion[i].sum())}"><title>'
        f"{names[i]} as {names[j]}: {confusion[i, j]}</title></rect>"
        for i, j in zip(*(axis.tolist() for axis in np.nonzero(confusion)), strict=True)
    )
    labels = "".join(
        f'<text x="{left - 6}" y="{(i + 0.5) * edge + 4:.1f}" text-anchor="end">'
        f"{in_html(shortened(classes[i], ROOM))}</text>"
        f'<text transform="translate({left + (i + 0.5) * edge + 4:.1f} {size + 8}) rotate(-90)" '
        f'text-anchor="end">{in_html(shortened(classes[i], ROOM))}</text>'
        for i in range(0, count, step)
    )
    return (
        f'<svg viewBox="0 -8 {left + size} {size + left}" role="img" font-family="sans-serif" '
        f'font-size="11" fill="currentColor" width="{left + size}">'
        f"<title>Confusion of {count} classes</title>"
        f'<rect x="{left}" y="0" width="{size}" height="{size}" fill="none" '
        f'stroke="currentColor" opacity=".25"/>{cells}{labels}</svg>'
    )
