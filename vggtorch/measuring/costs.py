"""What a network costs, layer by layer, as a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import keras
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vggtorch.keras_graph import Functional, graph_of, input_structure, torch_dtype
from vggtorch.lowering import lower
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
            (row.name, row.kind, "x".join(map(str, row.shape)), *cells(row))
            for row in (*self.layers, self.total)
        ]
        return table([header, *lines], left=3)


def inspect(model: keras.Model, *, size: int = 224, repeats: int = 5) -> Report:
    """Measure what each layer of a Functional or Sequential model costs for one image.

    Layers run as `vggtorch.lower` runs them, in inference, on the device of the weights. The time
    of a layer is that of the layer alone; the total's is that of the whole network, in which a
    convolution and what follows it may run as one. Multiply-adds are torch's own count.

    >>> import vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> report = vt.inspect(vgg, repeats=1)
    >>> report.layers[0].name, report.layers[0].multiply_adds == 32 * 32 * 3 * 3 * 3 * 64
    ('block1_conv1', True)

    Args:
        model: built; unchanged.
        size: height and width in pixels where the model leaves them open.
        repeats: runs, whose median is the time.

    Raises:
        ValueError: the model is not a graph of layers.
    """
    graph = graph_of(model, "inspect")
    module = lower(model).eval()
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    example = example_of(graph, size, 1, device)

    with torch.no_grad():
        counts, shapes, outputs = _count(module, example)
        times = _time_layers(module, example, repeats)
        runs = in_turns({"": lambda: module(example)}, repeats, device)
        seconds = statistics.median(runs[""])
    layers = {layer.name.replace(".", "_"): layer for layer in model.layers}
    rows = []
    for name, child in module.named_children():
        layer = layers.get(name)  # None for an operation, such as keras.ops.add
        kind = type(child if layer is None else layer).__name__
        parameters = 0 if layer is None else layer.count_params()
        costs = parameters, counts[name], outputs[name], times[name]
        rows.append(Row(name, kind, shapes[name], *costs))
    # Weights that layers share count once, and the network's time is its own.
    total = replace(_sum("total", rows), parameters=model.count_params(), seconds=seconds)
    return Report(tuple(rows), total)


def example_of(graph: Functional, size: int, batch: int, device: torch.device) -> Any:
    """Inputs in the structure that the model takes; `size` where it leaves H and W open.

    Random, but zeros for whole numbers, which often stand for entries of a table.
    """
    inputs = []
    for tensor in graph.inputs:
        dtype = torch_dtype(tensor.dtype)
        make = torch.randn if dtype.is_floating_point else torch.zeros
        shape = [batch, *(n or size for n in tensor.shape[1:])]
        inputs.append(make(shape, device=device, dtype=dtype))
    return keras.tree.pack_sequence_as(input_structure(graph), inputs)


@contextmanager
def _watched(
    module: nn.Module,
    before: Callable[[str], None],
    after: Callable[[str, Any], None],
) -> Iterator[None]:
    """Call `before(name)` and `after(name, output)` around the run of each child."""
    hooks = []
    for name, child in module.named_children():

        def enter(_: nn.Module, __: Any, name: str = name) -> None:
            before(name)

        def leave(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            after(name, output)

        hooks += [child.register_forward_pre_hook(enter), child.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _count(
    module: nn.Module, example: Any
) -> tuple[dict[str, int], dict[str, tuple[int, ...]], dict[str, int]]:
    """Multiply-adds, output shapes and output bytes of each child, by name."""
    counts = {name: 0 for name, _ in module.named_children()}
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(counts, ())
    sizes = dict(counts)
    counter = FlopCounterMode(display=False)

    def before(name: str) -> None:
        counts[name] -= counter.get_total_flops() // 2

    def after(name: str, output: Any) -> None:
        counts[name] += counter.get_total_flops() // 2
        tensors: list[Tensor] = keras.tree.flatten(output)
        sizes[name] += sum(t.nbytes for t in tensors)
        # NCHW -> NHWC where the model's maps are NHWC
        last = module.data_format == "channels_last" and tensors[0].ndim == 4
        shapes[name] = tuple((tensors[0].movedim(1, -1) if last else tensors[0]).shape[1:])

    with counter, _watched(module, before, after):
        module(example)
    return counts, shapes, sizes


def _time_layers(module: nn.Module, example: Any, repeats: int) -> dict[str, float]:
    """Median seconds of each child, by name; the first run warms up."""
    device = keras.tree.flatten(example)[0].device
    spent: dict[str, list[float]] = {name: [] for name, _ in module.named_children()}

    def before(name: str) -> None:
        spent[name][-1] -= clock(device)

    def after(name: str, _: Any) -> None:
        spent[name][-1] += clock(device)

    with _watched(module, before, after):
        for _ in range(repeats + 1):
            for values in spent.values():
                values.append(0.0)
            module(example)
    return {name: statistics.median(values[1:]) for name, values in spent.items()}


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


def cells(row: Row) -> tuple[str, ...]:
    """What a row costs, as text."""
    return (
        f"{row.parameters:,}",
        f"{row.multiply_adds:,}",
        f"{row.activation / 2**20:.2f} MiB",
        f"{1000 * row.seconds:.2f} ms",
    )


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
