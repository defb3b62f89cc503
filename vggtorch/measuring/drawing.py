"""A network's graph as a drawing, and in it what a surgery changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean

import keras

from vggtorch.keras_graph import calls, graph_of
from vggtorch.text import in_html, shortened

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 200, 54, 40, 26, 20
COLOURS = {"kept": "#f4f4f4", "new": "#b7e4c0", "removed": "#f6c1bd"}
FROZEN = "#5b8fd6"  # of the bar beside a layer that doesn't train
ROOM = 30  # columns of text in a box
LEGEND = 48  # pixels above the drawing
HIDDEN = 6  # boxes that folding must save, at least
LONGEST = 60  # boxes of a block that may be folded


@dataclass
class _Box:
    """One call of one layer in the drawing."""

    name: str
    kind: str  # the layer's class
    shape: str  # of what it puts out, "?" where a size is open
    state: str  # a key of COLOURS
    above: list[int]  # the boxes that it reads from
    parameters: int = 0
    training: str = ""  # `frozen`, `partly frozen`, or nothing
    row: int = 0
    column: float = 0.0

    @property
    def identity(self) -> tuple[str, str, str]:
        """What makes it the same layer as one of another network: name, class and last axis."""
        return self.name, self.kind, self.shape.split("x")[-1]


@dataclass
class _Fold:
    """A block that stands for several like it, one behind the other."""

    boxes: list[_Box]
    times: int
    last: str  # name of the last layer that it stands for


def draw(model: keras.Model, before: keras.Model | None = None, *, fold: bool = True) -> str:
    """Draw the graph of a Functional or Sequential model, from the input down, as SVG.

    Each layer with its output, its parameters and whether it is frozen; blocks that are repeated
    are drawn once. With `before`, the network as it was before a surgery: layers that it does not
    have are green, and those of it that are gone stand beside, red and dashed. Layers count as the
    same if they have the same name, class and output shape but for the map's size.

    >>> import vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> svg = vt.draw(vt.truncate(vgg, "block2_pool"), before=vgg)
    >>> svg.count('class="kept"'), svg.count('class="removed"')
    (7, 12)

    Args:
        model: the network.
        before: what it was before a surgery.
        fold: draw a block once that is repeated, where that saves six boxes or more.

    Raises:
        ValueError: a model is not a graph of layers.
    """
    boxes, folds = _boxes(model), list[_Fold]()
    if before is not None:
        _mark(boxes, _boxes(before))
    if fold:
        boxes, folds = _folded(boxes)
    _lay_out(boxes)
    left = min(box.column for box in boxes)
    width = (max(box.column for box in boxes) - left + 1) * (WIDTH + GAP_X) + 4 * MARGIN
    height = (max(box.row for box in boxes) + 1) * (HEIGHT + GAP_Y) + 2 * MARGIN + LEGEND
    legend, legend_width = _legend(model, boxes, before is not None)
    width = max(width, legend_width)

    def place(box: _Box) -> tuple[float, float]:
        x = 2 * MARGIN + (box.column - left) * (WIDTH + GAP_X)
        return x, MARGIN + LEGEND + box.row * (HEIGHT + GAP_Y)

    parts = [legend, *(_outline([place(box) for box in f.boxes], f) for f in folds)]
    for box in boxes:
        parts += [_edge(place(boxes[i]), place(box), box.state) for i in box.above]
    parts += [_drawn(box, *place(box)) for box in boxes]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" font-size="11" '
        f'text-anchor="middle"><rect width="100%" height="100%" rx="8" fill="#fff"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _drawn(box: _Box, x: float, y: float) -> str:
    """A layer: its name, what it puts out, and what it learns, where it learns something."""
    dash = ' stroke-dasharray="4 3"' if box.state == "removed" else ""
    middle, top = x + WIDTH / 2, y + (17 if box.parameters else 24)
    lines = [
        f'<text x="{middle:g}" y="{top:g}" font-weight="bold">{_fitting(box.name)}',
        f'<text x="{middle:g}" y="{top + 15:g}">{_fitting(f"{box.kind}  {box.shape}")}',
    ]
    bar = ""
    if box.parameters:
        said = f"{box.parameters:,} parameters" + (f", {box.training}" if box.training else "")
        lines.append(f'<text x="{middle:g}" y="{top + 29:g}" fill="#555">{said}')
    if box.training:
        bar = f'<rect x="{x:g}" y="{y:g}" width="6" height="{HEIGHT}" rx="3" fill="{FROZEN}"/>'
    return (
        f'<g class="{box.state}"><rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" '
        f'rx="5" fill="{COLOURS[box.state]}" stroke="#555"{dash}/>{bar}'
        + "".join(f"{line}</text>" for line in lines)
        + f"<title>{in_html(box.name)}</title></g>"
    )


def _fitting(text: str) -> str:
    """Text as a box has room for it."""
    return in_html(shortened(text, ROOM))


def _legend(model: keras.Model, boxes: Sequence[_Box], compared: bool) -> tuple[str, float]:
    """What the model is and what the colours mean, of those that are there; and its width."""
    trainable = sum(math.prod(v.shape) for v in model.trainable_variables)
    text = f"{in_html(model.name)}: {model.count_params():,} parameters, {trainable:,} trainable"
    x, entries = float(2 * MARGIN), []
    meanings = [(COLOURS[state], state) for state in COLOURS if compared]
    meanings += [(FROZEN, "frozen")] if any(box.training for box in boxes) else []
    for colour, meaning in meanings:
        dash = ' stroke-dasharray="4 3"' if meaning == "removed" else ""
        entries.append(
            f'<rect x="{x:g}" y="38" width="14" height="14" rx="3" fill="{colour}" '
            f'stroke="#555"{dash}/><text x="{x + 20:g}" y="49">{meaning}</text>'
        )
        x += 90
    title = f'<text x="{2 * MARGIN}" y="28" font-size="13" font-weight="bold">{text}</text>'
    legend = f'<g class="legend" text-anchor="start">{title}{"".join(entries)}</g>'
    return legend, max(x, 4 * MARGIN + 7.6 * len(text))


def _outline(places: Sequence[tuple[float, float]], fold: _Fold) -> str:
    """A frame around a block that stands for several, which says for how many and up to which."""
    pad = 9
    x0, y0 = (min(place[i] for place in places) - pad for i in range(2))
    x1 = max(x for x, _ in places) + WIDTH + pad
    y1 = max(y for _, y in places) + HEIGHT + pad
    return (
        f'<g class="fold"><rect x="{x0:g}" y="{y0:g}" width="{x1 - x0:g}" height="{y1 - y0:g}" '
        f'rx="8" fill="#eef3fa" stroke="#9bb4d3"/><text x="{x1 + 6:g}" y="{y0 + 14:g}" '
        f'text-anchor="start" font-size="13" font-weight="bold">{fold.times} times</text>'
        f'<text x="{x1 + 6:g}" y="{y0 + 29:g}" text-anchor="start">to {in_html(fold.last)}</text>'
        f"</g>"
    )


def _boxes(model: keras.Model) -> list[_Box]:
    """The calls of a model's layers, in the order of their computation."""
    made: dict[int, int] = {}  # tensor -> its box
    boxes: list[_Box] = []
    for node in calls(graph_of(model, "draw")):
        shape = "x".join("?" if n is None else str(n) for n in node.outputs[0].shape[1:])
        above = list(dict.fromkeys(made[id(tensor)] for tensor in node.input_tensors))
        operation = node.operation
        made.update((id(tensor), len(boxes)) for tensor in node.outputs)
        boxes.append(_Box(operation.name, type(operation).__name__, shape, "kept", above))
        if isinstance(operation, keras.Layer) and operation.weights:
            boxes[-1].parameters = operation.count_params()
            boxes[-1].training = _training(operation)
    return boxes


def _training(layer: keras.Layer) -> str:
    """What of a layer with weights is frozen."""
    if not layer.trainable_variables:
        return "frozen"
    inside = layer.layers if isinstance(layer, keras.Model) else []
    return "partly frozen" if any(_training(each) for each in inside if each.weights) else ""


def _folded(boxes: list[_Box]) -> tuple[list[_Box], list[_Fold]]:
    """The boxes without those that only repeat the block before them, and what was folded."""
    folds: list[_Fold] = []
    start = 0
    while start < len(boxes):
        period, times = _repeated(boxes, start)
        if times > 1:
            end, cut = start + period * times, period * (times - 1)
            block = boxes[start : start + period]
            folds.append(_Fold(block, times, boxes[end - 1].name))
            for box in boxes[end:]:
                box.above = [
                    i if i < start else (i - cut if i >= end else start + (i - start) % period)
                    for i in box.above
                ]
            boxes = [*boxes[: start + period], *boxes[end:]]
            start += period
        else:
            start += 1
    return boxes, folds


def _repeated(boxes: Sequence[_Box], start: int) -> tuple[int, int]:
    """The length of the block at `start` that is best folded, and how often it stands there."""

    def signature(i: int) -> tuple:
        box = boxes[i]
        reads = tuple(above - i for above in box.above)
        return box.kind, box.shape, box.state, box.parameters, box.training, reads

    found, saved = (1, 1), HIDDEN - 1
    for period in range(1, min(LONGEST, (len(boxes) - start) // 2) + 1):
        same = start + period
        while same < len(boxes) and signature(same) == signature(same - period):
            same += 1
        times = (same - start) // period
        last, end = start + period * (times - 1), start + period * times
        # What comes behind may read the last of the blocks only, which the drawn one stands for.
        inside = any(start <= i < last for box in boxes[end:] for i in box.above)
        if period * (times - 1) > saved and not inside:
            found, saved = (period, times), period * (times - 1)
    return found


def _mark(boxes: list[_Box], before: list[_Box]) -> None:
    """Mark what is new, and add what is gone, each under what it stood under."""
    known = {box.identity for box in before}
    for box in boxes:
        box.state = "kept" if box.identity in known else "new"
    now = {box.identity: i for i, box in enumerate(boxes)}
    for box in before:
        if box.identity not in now:
            above = [now[before[i].identity] for i in box.above]
            now[box.identity] = len(boxes)
            boxes.append(replace(box, state="removed", above=above))


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
