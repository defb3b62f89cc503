"""What a network costs, layer by layer, and what a surgery changed in that, block by block."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import keras
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vggtorch.checks import whole
from vggtorch.keras_graph import Functional, data_format, graph_of, input_structure, torch_dtype
from vggtorch.lowering import OnKeras, TorchNetwork
from vggtorch.measuring.timing import clock, in_turns
from vggtorch.models import data_config
from vggtorch.text import table


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

    @property
    def costs(self) -> tuple[float, ...]:
        """Parameters, multiply-adds, bytes of activation and seconds."""
        return self.parameters, self.multiply_adds, self.activation, self.seconds

    @property
    def cells(self) -> tuple[str, ...]:
        """The same as text."""
        return (
            f"{self.parameters:,}",
            f"{self.multiply_adds:,}",
            f"{self.activation / 2**20:.2f} MiB",
            f"{1000 * self.seconds:.2f} ms",
        )


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
        return self.as_text()

    def as_text(self, width: int | None = None) -> str:
        """A table that is at most so many characters wide, if need be with two lines a row."""
        header = ("layer", "kind", "output", "parameters", "multiply-adds", "activation", "time")
        lines = [
            (row.name, row.kind, "x".join(map(str, row.shape)), *row.cells)
            for row in (*self.layers, self.total)
        ]
        return table([header, *lines], 3, width)


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


def inspect(model: keras.Model, *, size: int = 224, repeats: int = 5) -> Report:
    """Measure what each layer of a Functional or Sequential model costs for one image.

    Layers run as `to_torch` runs them, in inference, on the device of the weights. The time of a
    layer is that of the layer alone; the total's is that of the whole network, in which a
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
        ValueError: the model is not a graph of layers, or has none but inputs; or `size` or
            `repeats` is no whole number from 1.
    """
    graph = check_measured(model, "inspect", size, repeats)
    network = OnKeras(graph, model.name).eval().network
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    inputs = keras.tree.flatten(example_of(graph, size, 1, device))

    with torch.no_grad():
        last = data_format(graph) == "channels_last"
        counts, shapes, outputs = _count(network, inputs, last)
        times = _time_layers(network, inputs, repeats)
        runs = in_turns({"": lambda: network(*inputs)}, repeats, device)
        seconds = statistics.median(runs[""])
    operations = {operation.name: operation for operation in graph.operations}
    rows = []
    for name in counts:
        operation = operations[name]
        parameters = operation.count_params() if isinstance(operation, keras.Layer) else 0
        costs = parameters, counts[name], outputs[name], times[name]
        rows.append(Row(name, type(operation).__name__, shapes[name], *costs))
    # Weights that layers share count once, and the network's time is its own.
    total = replace(_sum("total", rows), parameters=model.count_params(), seconds=seconds)
    return Report(tuple(rows), total)


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


def check_measured(model: keras.Model, verb: str, size: int, repeats: int) -> Functional:
    """A model's graph, if it can be measured; raises ValueError as `inspect` does."""
    whole("size", size)
    whole("repeats", repeats)
    graph = graph_of(model, verb)
    if all(isinstance(operation, keras.layers.InputLayer) for operation in graph.operations):
        raise ValueError(f"{verb} received {model.name!r}, which has no layer but its inputs.")
    return graph


def example_of(graph: Functional, size: int, batch: int, device: torch.device) -> Any:
    """Inputs in the structure that the model takes; `size` where it leaves H and W open.

    Random, but zeros for whole numbers, which often stand for entries of a table. A model with its
    preprocessing inside gets pixels of 0 to 255: on smaller numbers all images are the same to it.
    """
    pixels = data_config(graph).preprocessing_inside
    inputs = []
    for tensor in graph.inputs:
        dtype = torch_dtype(tensor.dtype)
        shape = [batch, *(n or size for n in tensor.shape[1:])]
        if not dtype.is_floating_point:
            inputs.append(torch.zeros(shape, device=device, dtype=dtype))
        elif pixels:
            inputs.append(255 * torch.rand(shape, device=device, dtype=dtype))
        else:
            inputs.append(torch.randn(shape, device=device, dtype=dtype))
    return keras.tree.pack_sequence_as(input_structure(graph), inputs)


class _Watched(torch.fx.Interpreter):
    """Runs a network node by node, with `before` and `after` around what belongs to a layer."""

    def __init__(
        self,
        network: TorchNetwork,
        before: Callable[[str], None],
        after: Callable[[str, torch.fx.Node, Any], None],
    ) -> None:
        super().__init__(network)
        self.before, self.after = before, after

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run a node."""
        name = n.meta.get("layer")
        if name is None:
            return super().run_node(n)
        self.before(name)
        output = super().run_node(n)
        self.after(name, n, output)
        return output


def _names(network: TorchNetwork) -> list[str]:
    """The layers and operations of a network, in its order."""
    names = (node.meta.get("layer") for node in network.graph.nodes)
    return list(dict.fromkeys(name for name in names if name is not None))


def operation_counter() -> FlopCounterMode:
    """torch's counter, which by itself doesn't know the attention that runs on a CPU."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    known = {on_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    return FlopCounterMode(display=False, custom_mapping=known)


def _count(
    network: TorchNetwork, inputs: list[Tensor], channels_last: bool
) -> tuple[dict[str, int], dict[str, tuple[int, ...]], dict[str, int]]:
    """Multiply-adds, output shapes and output bytes of each layer, by name."""
    counts = dict.fromkeys(_names(network), 0)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(counts, ())
    sizes = dict(counts)
    counter = operation_counter()

    def before(name: str) -> None:
        counts[name] -= counter.get_total_flops() // 2

    def after(name: str, node: torch.fx.Node, output: Any) -> None:
        counts[name] += counter.get_total_flops() // 2
        if "is_output" in node.meta:  # of the layer, not something on the way
            sizes[name] += output.nbytes
            # NCHW -> NHWC where the model's maps are NHWC
            last = channels_last and node.meta["axes"] == "first" and output.ndim > 2
            shapes[name] = tuple((output.movedim(1, -1) if last else output).shape[1:])

    with counter:
        _Watched(network, before, after).run(*inputs)
    return counts, shapes, sizes


def _time_layers(network: TorchNetwork, inputs: list[Tensor], repeats: int) -> dict[str, float]:
    """Median seconds of each layer, by name; the first run warms up."""
    device = inputs[0].device
    spent: dict[str, list[float]] = {name: [] for name in _names(network)}

    def before(name: str) -> None:
        spent[name][-1] -= clock(device)

    def after(name: str, _: torch.fx.Node, __: Any) -> None:
        spent[name][-1] += clock(device)

    for _ in range(repeats + 1):
        for values in spent.values():
            values.append(0.0)
        _Watched(network, before, after).run(*inputs)
    return {name: statistics.median(values[1:]) for name, values in spent.items()}


def _sum(name: str, rows: list[Row]) -> Row:
    sums: Any = map(sum, zip(*(row.costs for row in rows), strict=True))
    return Row(name, "", rows[-1].shape, *sums)
