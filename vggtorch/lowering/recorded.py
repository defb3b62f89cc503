"""The steps of an engine as graphs that oneDNN has prepared for inputs of one shape.

Step by step each convolution looks up its kernel anew, and so takes up to a tenth of a millisecond
longer than its arithmetic: half of a MobileNet's time. A graph did so when it was made. How large
the numbers are, which decides whether NaN could come up (see `FusedConv2d`), it computes along;
where that was too much, the steps run again one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggtorch.lowering.fixed import FixedConv2d
from vggtorch.lowering.fused import SAFE, OverwritingReLU, PairMaxPool2d, magnitude, sum_bound
from vggtorch.lowering.kernels import compiled
from vggtorch.lowering.running import run_steps
from vggtorch.lowering.steps import ADDITIONS, Call, Step, adds_two, kind_of

# How large the numbers may be that a graph looks at. It looks again before a convolution whose
# sums could then be too large, so a smaller limit lets it look less often.
LIMIT = 1e12
# Graphs are made for so many shapes of inputs, because torch keeps what it has prepared for each,
# about as much as the weights take, even when the graph is gone.
MOST_SHAPES = 4
# What besides convolutions goes into a graph. No number that these give is larger than 1 and the
# largest that they get.
_MODULES = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh,
    nn.Identity, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d, OverwritingReLU,
    PairMaxPool2d,
)  # fmt: skip


@dataclass
class Stretch:
    """Steps in a row that all go into one graph, or that all run one by one.

    Attributes:
        recordable: whether they can be in a graph.
        examples: what they take, by its number, until the graph is made.
        watched: values that the graph looks at.
        bounds: how large the numbers in a value can be, if no watched one is above the limit.
        inputs, outputs: what the graph takes and gives, besides the magnitudes of `watched`.
    """

    recordable: bool
    steps: list[Step] = field(default_factory=list)
    examples: dict[int, Tensor] = field(default_factory=dict)
    watched: set[int] = field(default_factory=set)
    bounds: dict[int, float] = field(default_factory=dict)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    graph: Callable[..., Any] | None = None

    def __call__(self, values: dict[int, Any]) -> None:
        """Run the steps; `values` keeps what is needed later."""
        if self.graph is not None:
            *outputs, found = self.graph(*(values[i].detach() for i in self.inputs))
            if all(number <= LIMIT for number in found.tolist()):  # which NaN isn't
                for i in {i for step in self.steps for i in step.last_use} & values.keys():
                    del values[i]
                values.update(zip(self.outputs, outputs, strict=True))
                return
        run_steps(self.steps, values)

    def add(self, step: Step, values: dict[int, Any]) -> None:
        """Put a step behind the others; `values` has its inputs."""
        if self.recordable:
            made = {other.output for other in self.steps}
            if isinstance(step.run, FixedConv2d):
                step.run.fold_for(values[step.inputs[0]])
            self.examples |= {i: values[i] for i in step.inputs if i not in made}
            bound = _bound(step, [self.bounds.get(i, math.inf) for i in step.inputs])
            if not bound < SAFE:
                self.watched |= set(step.inputs)
                self.bounds |= dict.fromkeys(step.inputs, LIMIT)
                bound = _bound(step, [LIMIT] * len(step.inputs))
            self.bounds[step.output] = bound
        self.steps.append(step)

    def compile(self) -> None:
        """Make the graph, if the steps can be in one and it is of use."""
        convolutions = [step.run for step in self.steps if isinstance(step.run, FixedConv2d)]
        if self.recordable and convolutions:
            used = {i for step in self.steps for i in step.last_use}
            self.inputs = tuple(self.examples)
            self.outputs = tuple(s.output for s in self.steps if s.output not in used)
            self.graph = compiled(self._plainly, [x.detach() for x in self.examples.values()])
        if self.graph is not None:
            for run in convolutions:
                run.prepared.clear()  # It is made anew if it is needed after all.
        self.examples = {}

    def _plainly(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, and the magnitudes, by functions that oneDNN's graphs know."""
        values = dict(zip(self.inputs, inputs, strict=True))
        for step in self.steps:
            values[step.output] = _plainly(step.run, *(values[i] for i in step.inputs))
        magnitudes = [magnitude(values[i]).float() for i in self.watched]
        return *(values[i] for i in self.outputs), torch.stack(magnitudes)


def _plainly(run: Any, *inputs: Tensor) -> Tensor:
    """What a step gives, by functions that overwrite nothing."""
    result: Tensor
    if isinstance(run, FixedConv2d):
        result = run.plainly(*inputs)
    elif isinstance(run, OverwritingReLU):
        result = F.relu(inputs[0])
    else:
        result = run.pool(*inputs) if isinstance(run, PairMaxPool2d) else run(*inputs)
    return result


def _is_recordable(step: Step, inputs: list[Any]) -> bool:
    """Whether a step with such inputs can be in a graph, whatever their numbers."""
    if not all(isinstance(x, Tensor) and x.ndim == 4 and len(x) > 0 for x in inputs):
        return False
    if isinstance(step.run, FixedConv2d):
        return step.run.is_plain(*inputs) and _bound(step, [LIMIT] * len(inputs)) < SAFE
    if isinstance(step.run, Call):
        return kind_of(step) is torch.cat or (kind_of(step) in ADDITIONS and adds_two(step))
    return kind_of(step) in _MODULES


def _adds_convolved(step: Step, before: list[Step]) -> bool:
    """Whether a step adds what a convolution before it takes.

    In one graph conv(x) + y + x ends the process: oneDNN takes both into the convolution.
    """
    convolved = {other.inputs[0] for other in before if isinstance(other.run, FixedConv2d)}
    return kind_of(step) in ADDITIONS and not convolved.isdisjoint(step.inputs)


def _bound(step: Step, bounds: list[float]) -> float:
    """How large the numbers can be that a step gives for inputs with these bounds."""
    if isinstance(step.run, FixedConv2d):
        bound = sum_bound(bounds, *step.run.growth)
        return min(bound, 6.0) if step.run.kind == "relu6" and bound < SAFE else bound
    return sum(bounds) if kind_of(step) in ADDITIONS else max(1.0, *bounds)


class Recorded:
    """Steps that run as graphs for the first few shapes of inputs, and one by one for others."""

    def __init__(self, steps: list[Step]) -> None:
        self.steps = steps
        made = {step.output for step in steps}
        self.inputs = {i for step in steps for i in step.inputs if i not in made}
        self.stretches: dict[Any, list[Stretch]] = {}

    def __call__(self, values: dict[int, Any]) -> None:
        """Run the steps; `values` keeps what is needed later."""
        key = self._key([values[i] for i in self.inputs])
        if key not in self.stretches and len(self.stretches) < MOST_SHAPES:
            self.stretches[key] = _stretches(self.steps, dict(values))
        if key not in self.stretches:
            run_steps(self.steps, values)
            return
        for stretch in self.stretches[key]:
            stretch(values)

    def _key(self, inputs: list[Any]) -> Any:
        """What graphs are prepared for."""
        shapes = [
            (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else type(x) for x in inputs
        ]
        return torch.get_num_threads(), torch.backends.mkldnn.enabled, *shapes


def _stretches(steps: list[Step], values: dict[int, Any]) -> list[Stretch]:
    """The steps cut into those that are graphs and those between; runs them once to see shapes.

    They may run again on the same inputs, of which they at most overwrite one by its ReLU.
    """
    stretches = [Stretch(recordable=False)]
    for step in steps:
        inputs = [values[i] for i in step.inputs]
        recordable = _is_recordable(step, inputs) and not _adds_convolved(step, stretches[-1].steps)
        if recordable is not stretches[-1].recordable:
            stretches.append(Stretch(recordable))
        stretches[-1].add(step, values)
        run_steps([step], values)
    joined: list[Stretch] = []
    for stretch in stretches:
        stretch.compile()
        if stretch.graph is None and joined and joined[-1].graph is None:
            joined[-1].steps += stretch.steps  # so that one knows the other's bounds
        else:
            joined.append(stretch)
    return joined
