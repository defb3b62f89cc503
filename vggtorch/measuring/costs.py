"""What a network costs, layer by layer, and what a surgery changed: as a table and as a drawing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

import keras
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vggtorch.lowering.lowered import lower
from vggtorch.measuring.timing import clock, in_turns


@dataclass(frozen=True)
class Row:
    """The cost of a layer, a block or a network for one image.

    Attributes:
        name: of the layer, the block or the network.
        kind: the layer's class.
        shape: of its output, without the batch.
        parameters: numbers in its weights.
        multiply_adds: of its products (convolutions, dense layers, attention).
        activation: bytes of its output, which training keeps.
        seconds: median time, run for itself; of a network, run as a whole.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int
    activation: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """What `inspect` found: one row for each layer in the order of computation, and their total."""

    layers: tuple[Row, ...]
    total: Row

    @property
    def blocks(self) -> tuple[Row, ...]:
        """Layers that share the part of their name before the first underscore, added up."""
        members: dict[str, list[Row]] = {}
        for row in self.layers:
            members.setdefault(row.name.split("_")[0], []).append(row)
        return tuple(_sum(name, rows) for name, rows in members.items())

    def __str__(self) -> str:
        header = ("layer", "kind", "output", "parameters", "multiply-adds", "activation", "time")
        lines = [
            (row.name, row.kind, "x".join(map(str, row.shape)), *_cells(row))
            for row in (*self.layers, self.total)
        ]
        return table([header, *lines], left=3)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: both reports; as text, one line for each block and the total."""

    before: Report
    after: Report

    def __str__(self) -> str:
        header = ("block", "", "parameters", "multiply-adds", "activation", "time")
        lines: list[tuple[str, ...]] = [header]
        before = {row.name: row for row in self.before.blocks}
        after = {row.name: row for row in self.after.blocks}
        pairs: list[tuple[str, Row | None, Row | None]] = [
            (name, before.get(name), after.get(name)) for name in before | after
        ]
        for name, old, new in [*pairs, ("total", self.before.total, self.after.total)]:
            if old is not None:
                lines.append((name, "before", *_cells(old)))
            if new is not None:
                lines.append(("" if old else name, "after", *_cells(new)))
            if old is not None and new is not None and name == "total":
                lines.append(("", "after/before", *_ratios(old, new)))
        return table(lines, left=2)


def _sum(name: str, rows: list[Row]) -> Row:
    return Row(
        name,
        "",
        rows[-1].shape,
        sum(row.parameters for row in rows),
        sum(row.multiply_adds for row in rows),
        sum(row.activation for row in rows),
        sum(row.seconds for row in rows),
    )


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"{row.parameters:,}",
        f"{row.multiply_adds:,}",
        f"{row.activation / 2**20:.2f} MiB",
        f"{1000 * row.seconds:.2f} ms",
    )


def _ratios(old: Row, new: Row) -> tuple[str, ...]:
    pairs = [
        (old.parameters, new.parameters),
        (old.multiply_adds, new.multiply_adds),
        (old.activation, new.activation),
        (old.seconds, new.seconds),
    ]
    return tuple(f"{b / a:.3f}" if a else "" for a, b in pairs)


def table(lines: list[tuple[str, ...]], left: int) -> str:
    """Columns as wide as their longest cell, the first `left` flush left, the rest right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def inspect(model: keras.Model, *, size: int = 224, repeats: int = 5) -> Report:
    """Measure what each layer of a Functional or Sequential model costs for one image.

    Layers run as `vggtorch.lower` runs them, in inference, on the device of the weights. The time
    of a layer is that of the layer alone; the total's is that of the whole network, in which a
    convolution and what follows it may run as one. Multiply-adds are torch's own count.

    Args:
        model: built; unchanged.
        size: height and width in pixels where the model leaves them open.
        repeats: runs, whose median is the time.

    Raises:
        ValueError: the model is not a graph of layers.
    """
    module = lower(model).eval()
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    example = example_of(model, size, 1, device)

    with torch.no_grad():
        counts, shapes, outputs = _count(module, example)
        times = _time_layers(module, example, repeats)
        runs = in_turns({"": lambda: module(example)}, repeats, device)
        seconds = statistics.median(runs[""])
    kinds = {layer.name.replace(".", "_"): layer for layer in model.layers}
    rows = [
        Row(
            name,
            type(kinds[name]).__name__ if name in kinds else type(child).__name__,
            shapes[name],
            sum(p.numel() for p in child.parameters()),
            counts[name],
            outputs[name],
            times[name],
        )
        for name, child in module.named_children()
    ]
    total = _sum("total", rows)
    parameters = sum(p.numel() for p in module.parameters())  # shared ones once
    network = Row(
        "total", "", total.shape, parameters, total.multiply_adds, total.activation, seconds
    )
    return Report(tuple(rows), network)


def compare(
    before: keras.Model, after: keras.Model, *, size: int = 224, repeats: int = 5
) -> Comparison:
    """Measure two networks, such as one before and after a surgery; see `inspect`."""
    return Comparison(
        inspect(before, size=size, repeats=repeats), inspect(after, size=size, repeats=repeats)
    )


def example_of(model: keras.Model, size: int, batch: int, device: torch.device) -> Any:
    """Inputs in the structure that the model takes; `size` where it leaves H and W open.

    Random, but zeros for whole numbers, which often stand for entries of a table.
    """
    inputs = []
    for tensor in model.inputs:
        dtype = getattr(torch, tensor.dtype)
        make = torch.randn if dtype.is_floating_point else torch.zeros
        shape = [batch, *(n or size for n in tensor.shape[1:])]
        inputs.append(make(shape, device=device, dtype=dtype))
    return keras.tree.pack_sequence_as(model._inputs_struct, inputs)


def _count(
    module: nn.Module, example: Any
) -> tuple[dict[str, int], dict[str, tuple[int, ...]], dict[str, int]]:
    """Multiply-adds, output shapes and output bytes of each child, by name."""
    counts = {name: 0 for name, _ in module.named_children()}
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(counts, ())
    sizes = dict(counts)
    hooks = []
    with FlopCounterMode(display=False) as counter:
        for name, child in module.named_children():

            def before(_: nn.Module, __: Any, name: str = name) -> None:
                counts[name] -= counter.get_total_flops() // 2

            def after(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
                counts[name] += counter.get_total_flops() // 2
                tensors: list[Tensor] = keras.tree.flatten(output)
                sizes[name] += sum(t.nbytes for t in tensors)
                # NCHW -> NHWC where the model has it so
                last = module.data_format == "channels_last" and tensors[0].ndim == 4
                shapes[name] = tuple((tensors[0].movedim(1, -1) if last else tensors[0]).shape[1:])

            hooks += [child.register_forward_pre_hook(before), child.register_forward_hook(after)]
        module(example)
    for hook in hooks:
        hook.remove()
    return counts, shapes, sizes


def _time_layers(module: nn.Module, example: Any, repeats: int) -> dict[str, float]:
    """Median seconds of each child, by name; the first run warms up."""
    device = keras.tree.flatten(example)[0].device
    spent: dict[str, list[float]] = {name: [] for name, _ in module.named_children()}
    hooks = []
    for name, child in module.named_children():

        def before(_: nn.Module, __: Any, name: str = name) -> None:
            spent[name][-1] -= clock(device)

        def after(_: nn.Module, __: Any, ___: Any, name: str = name) -> None:
            spent[name][-1] += clock(device)

        hooks += [child.register_forward_pre_hook(before), child.register_forward_hook(after)]
    for _ in range(repeats + 1):
        for values in spent.values():
            values.append(0.0)
        module(example)
    for hook in hooks:
        hook.remove()
    return {name: statistics.median(values[1:]) for name, values in spent.items()}


# The drawing

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
    """Draw a network's graph, from the input down, as SVG.

    With `before`, the network as it was before a surgery: layers that it does not have are green,
    and those of it that are gone stand beside, red and dashed. Layers count as the same if they
    have the same name, class and output shape but for the map's size.
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
            f'<text x="{x + WIDTH / 2:g}" y="{y + 17:g}" font-weight="bold">{escape(box.name)}'
            f'</text><text x="{x + WIDTH / 2:g}" y="{y + 32:g}">{escape(box.label)}</text></g>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'font-family="sans-serif" font-size="11" text-anchor="middle">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _boxes(model: keras.Model) -> list[_Box]:
    """The calls of a model's layers, in the order of their computation."""
    functional = model._functional if isinstance(model, keras.Sequential) else model
    made: dict[int, int] = {}  # tensor -> its box
    boxes: list[_Box] = []
    for depth in sorted(functional._nodes_by_depth, reverse=True):
        for node in functional._nodes_by_depth[depth]:
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
        middle = _mean(box.column for box in ordered)
        for previous, box in pairwise(ordered):
            box.column = max(box.column, previous.column + 1)
        kept = [box for box in ordered if box.state != "removed"] or ordered
        shift = (middle if len(kept) > 1 else kept[0].column) - _mean(b.column for b in kept)
        for box in ordered:
            box.column += shift


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


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
