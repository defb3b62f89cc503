"""How fast a model runs on this machine: as Keras runs it, and as vggtorch does."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
import torch
from torch import Tensor

from vggtorch.checks import whole
from vggtorch.keras_graph import graph_of
from vggtorch.lowering import OnKeras
from vggtorch.measuring import timing
from vggtorch.measuring.costs import example_of
from vggtorch.models import held_tensors
from vggtorch.text import table


@dataclass(frozen=True)
class Result:
    """One way to run the model.

    Attributes:
        name: "Keras", "vggtorch" or "vggtorch, bfloat16".
        seconds: of each run.
        speed: how many times as fast as Keras, the median of all turns.
        difference: of its outputs or gradients from Keras's, relative to their length.
    """

    name: str
    seconds: tuple[float, ...]
    speed: float
    difference: float


@dataclass(frozen=True)
class Bench:
    """What `bench` found.

    Attributes:
        batch: images at a time.
        inference, gradients: each way to run the model; no gradients where nothing is trainable.
    """

    batch: int
    inference: tuple[Result, ...]
    gradients: tuple[Result, ...]

    def __str__(self) -> str:
        return self.as_text()

    def as_text(self, width: int | None = None) -> str:
        """A table that is at most so many characters wide, if need be with two lines a row."""
        header = ("", "median", "fastest", "slowest", "times as fast", "difference")
        lines: list[tuple[str, ...]] = [header]
        for title, results in (("inference", self.inference), ("gradients", self.gradients)):
            for result in results:
                times = (statistics.median, min, max)
                lines.append(
                    (
                        f"{title}, {result.name}",
                        *(f"{1000 * of(result.seconds):.1f} ms" for of in times),
                        f"{result.speed:.2f}",
                        f"{result.difference:.0e}",
                    )
                )
        return f"batch {self.batch}\n{table(lines, 1, width)}"


def bench(model: keras.Model, batch: int = 8, *, size: int = 224, repeats: int = 5) -> Bench:
    """Time a Functional or Sequential model on random inputs, in turns of all ways to run it.

    "vggtorch" is what `accelerate_` runs, in float32 and under torch.autocast. Gradients are those
    of a step of training, of all trainable weights and without an optimizer. The model is
    unchanged, but for the order of its kernels in memory.

    >>> import vggtorch as vt
    >>> vgg = vt.VGG11(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> [way.name for way in vt.bench(vgg, batch=1, repeats=1).inference][:2]
    ['Keras', 'vggtorch']

    Args:
        model: built.
        batch: images at a time.
        size: height and width in pixels where the model leaves them open.
        repeats: turns.

    Raises:
        ValueError: the model is not a graph of layers, or `batch`, `size` or `repeats` is no whole
            number from 1.
    """
    batch, size, repeats = whole("batch", batch), whole("size", size), whole("repeats", repeats)
    graph = graph_of(model, "bench")
    module = OnKeras(graph, model.name)
    parameters = [v.value for v in model.trainable_variables]
    trained_ids = {id(parameter) for parameter in parameters}
    state = [t for t in held_tensors(model) if id(t) not in trained_ids]
    kept = [(tensor, tensor.detach().clone()) for tensor in state]
    device = next(module.parameters(), torch.empty(0)).device
    x = example_of(graph, size, batch, device)
    inputs = keras.tree.flatten(x)

    def run(training: bool, mixed: bool) -> object:
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            return module.train(training)(*inputs)

    inference: dict[str, Callable[[], object]] = {
        "Keras": lambda: model(x, training=False),
        "vggtorch": lambda: run(False, False),
        "vggtorch, bfloat16": lambda: run(False, True),
    }
    gradients: dict[str, Callable[[], object]] = {
        "Keras": lambda: _gradients(model(x, training=True), parameters),
        "vggtorch": lambda: _gradients(run(True, False), parameters),
        "vggtorch, bfloat16": lambda: _gradients(run(True, True), parameters),
    }
    try:
        with torch.random.fork_rng():
            with torch.no_grad():
                inferred = _measure(inference, repeats, device)
            trained = _measure(gradients, repeats, device) if parameters else ()
    finally:
        with torch.no_grad():
            for value, before in kept:  # the runs changed moving statistics and seeds
                value.copy_(before)
    return Bench(batch, inferred, trained)


def _gradients(outputs: object, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    loss = torch.stack([y.float().square().mean() for y in keras.tree.flatten(outputs)]).sum()
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """How far tensors are from others, relative to the length of these, all of them taken as one.

    In float64, since the squares of large or small gradients leave the range of float32.
    """
    pairs = list(zip(found, expected, strict=True))
    error = torch.stack([(a.double() - b).square().sum() for a, b in pairs]).sum().sqrt()
    length = torch.stack([b.double().square().sum() for _, b in pairs]).sum().sqrt()
    return float(error / length) if length else float(error)


def _measure(
    candidates: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> tuple[Result, ...]:
    expected: list[Tensor] = []
    differences = {}
    for name, run in candidates.items():
        torch.manual_seed(0)  # so that dropout drops the same in each run
        found = [y.detach() for y in keras.tree.flatten(run()) if y is not None]
        expected = expected or found
        differences[name] = difference(found, expected)
    del expected, found
    seconds = timing.in_turns(candidates, repeats, device, warmup=1)
    return tuple(
        Result(
            name,
            tuple(values),
            statistics.median(a / b for a, b in zip(seconds["Keras"], values, strict=True)),
            differences[name],
        )
        for name, values in seconds.items()
    )
