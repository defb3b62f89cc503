"""A network's graph as a drawing, and in it what a surgery changed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import keras

from vggtorch.keras_graph import calls, graph_of
from vggtorch.text import in_html

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 190, 40, 40, 28, 20
COLOURS = {"kept": "#f4f4f4", "new": "#b7e4c0", "removed": "#f6c1bd"}


@dataclass
class _Box:
    """One call of one layer in the drawing."""

    name: str
    label: str
    state: str  # a key of COLOURS
    above: list[int]  # the boxes that it reads from
    row: int = 0
    column: float = 0.0


def draw(model: keras.Model, before: keras.Model | None = None) -> str:
    """Draw the graph of a Functional or Sequential model, from the input down, as SVG.

    With `before`, the network as it was before a surgery: layers that it does not have are green,
    and those of it that are gone stand beside, red and dashed. Layers count as the same if they
    have the same name, class and output shape but for the map's size.

    >>> import vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> svg = vt.draw(vt.truncate(vgg, "block2_pool"), before=vgg)
    >>> svg.count('class="kept"'), svg.count('class="removed"')
    (7, 12)

    Raises:
        ValueError: a model is not a graph of layers.
    """
    boxes = _boxes(model)
    if before is not None:
        _mark(boxes, _boxes(before))
    _lay_out(boxes)
    left = min(box.column for box in boxes)
    width = (max(box.column for box in boxes) - left + 1) * (WIDTH + GAP_X) + 4 * MARGIN
    height = (max(box.row for box in boxes) + 1) * (HEIGHT + GAP_Y) + 2 * MARGIN

    def place(box: _Box) -> tuple[float, float]:
        x = 2 * MARGIN + (box.column - left) * (WIDTH + GAP_X)
        return x, MARGIN + box.row * (HEIGHT + GAP_Y)

    parts = []
    for box in boxes:
        parts += [_edge(place(boxes[i]), place(box), box.state) for i in box.above]
    for box in boxes:
        x, y = place(box)
        dash = ' stroke-dasharray="4 3"' if box.state == "removed" else ""
        parts.append(
            f'<g class="{box.state}"><rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" '
            f'rx="5" fill="{COLOURS[box.state]}" stroke="#555"{dash}/>'
            f'<text x="{x + WIDTH / 2:g}" y="{y + 17:g}" font-weight="bold">{in_html(box.name)}'
            f'</text><text x="{x + WIDTH / 2:g}" y="{y + 32:g}">{in_html(box.label)}</text></g>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'font-family="sans-serif" font-size="11" text-anchor="middle">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _boxes(model: keras.Model) -> list[_Box]:
    """The calls of a model's layers, in the order of their computation."""
    made: dict[int, int] = {}  # tensor -> its box
    boxes: list[_Box] = []
    for node in calls(graph_of(model, "draw")):
        shape = "x".join("?" if n is None else str(n) for n in node.outputs[0].shape[1:])
        above = list(dict.fromkeys(made[id(tensor)] for tensor in node.input_tensors))
        label = f"{type(node.operation).__name__}  {shape}"
        made.update((id(tensor), len(boxes)) for tensor in node.outputs)
        boxes.append(_Box(node.operation.name, label, "kept", above))
    return boxes


def _identity(box: _Box) -> tuple[str, str]:
    kind, shape = box.label.split("  ")
    return box.name, f"{kind} {shape.split('x')[-1]}"


def _mark(boxes: list[_Box], before: list[_Box]) -> None:
    """Mark what is new, and add what is gone, each under what it stood under."""
    known = {_identity(box) for box in before}
    for box in boxes:
        box.state = "kept" if _identity(box) in known else "new"
    now = {_identity(box): i for i, box in enumerate(boxes)}
    for box in before:
        if _identity(box) not in now:
            above = [now[_identity(before[i])] for i in box.above]
            now[_identity(box)] = len(boxes)
            boxes.append(_Box(box.name, box.label, "removed", above))


def _lay_out(boxes: list[_Box]) -> None:
    """Rows by the longest way from an input; within a row near what is above, and apart."""
    rows: dict[int, list[_Box]] = {}
    for box in boxes:
        box.row = 1 + max((boxes[i].row for i in box.above), default=-1)
        rows.setdefault(box.row, []).append(box)
    for row in sorted(rows):
        for box in rows[row]:
            columns = [boxes[i].column for i in box.above]
            box.column = sum(columns) / len(columns) if columns else 0.0
        ordered = sorted(rows[row], key=lambda box: (box.column, box.state == "removed"))
        middle = fmean(box.column for box in ordered)
        for previous, box in pairwise(ordered):
            box.column = max(box.column, previous.column + 1)
        kept = [box for box in ordered if box.state != "removed"] or ordered
        shift = (middle if len(kept) > 1 else kept[0].column) - fmean(b.column for b in kept)
        for box in ordered:
            box.column += shift


def _edge(start: tuple[float, float], end: tuple[float, float], state: str) -> str:
    """A line from the bottom of one box to the top of another, around the boxes between them."""
    (x1, y1), (x2, y2) = start, end
    x1, x2, y1 = x1 + WIDTH / 2, x2 + WIDTH / 2, y1 + HEIGHT
    rows = round((y2 - y1) / (HEIGHT + GAP_Y))
    aside = (WIDTH * 0.75 + 8 * min(rows, 10)) if rows > 0 and abs(x1 - x2) < WIDTH else 0
    bend = GAP_Y if aside else (y2 - y1) / 2
    dash = ' stroke-dasharray="4 3"' if state == "removed" else ""
    return (
        f'<path d="M{x1:g} {y1:g} C{x1 - aside:g} {y1 + bend:g} {x2 - aside:g} {y2 - bend:g} '
        f'{x2:g} {y2:g}" fill="none" stroke="#555"{dash}/>'
    )
