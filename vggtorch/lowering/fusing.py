"""Which steps run in place of a graph's own, in inference and in training, so that it is faster.

All of these compute the same. Here is decided what is fused; how that computes stands in fused.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from vggtorch.lowering.batch_norm import BatchNorm2d
from vggtorch.lowering.constants import AllParameters
from vggtorch.lowering.fused import (
    FusedConv2d,
    FusedLinear,
    OverwritingReLU,
    PairMaxPool2d,
    ReLUPool2d,
    TrainedConv2d,
    TrainedLinear,
)
from vggtorch.lowering.layer_modules import MixedConv2d, MixedLinear
from vggtorch.lowering.steps import (
    ADDITIONS,
    BY_IMAGE,
    BY_IMAGE_IN_INFERENCE,
    CONVOLUTIONS,
    FRESH,
    LINEARS,
    Segment,
    Step,
    adds_two,
    cut,
    exposed,
    in_plain_order,
    is_by_image,
    is_foreign,
    is_view,
    kind_of,
)
from vggtorch.lowering.trimming import trimmed
from vggtorch.lowering.winograd import Workspace


@dataclass(frozen=True)
class Way:
    """The segments for one way to run a network, and the look at what they have prepared."""

    segments: list[Segment]
    parameters: AllParameters


@dataclass(frozen=True)
class Ways:
    """The steps of a network, and each way to run it.

    Attributes:
        steps: one for each node.
        inputs, outputs: numbers of the network's values.
        checkpoint: backward computes activations again.
        workspace: where convolutions may be computed Winograd's way, the memory for that.
    """

    steps: list[Step]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    checkpoint: bool
    workspace: Workspace | None = None
    fused: dict[Any, Any] = field(default_factory=dict)  # by the modules that are in one
    made: dict[tuple[int, bool], Way] = field(default_factory=dict)

    def with_settled(self, settled: int, plain: bool = False) -> Way:
        """What runs where so many of the first steps run as in inference.

        `plain`: maps that torch's modules would give in plain order are so where that can be told.
        """
        if (settled, plain) not in self.made:
            uses = Counter(i for step in self.steps for i in step.inputs) + Counter(self.outputs)
            fresh = {s.output for s in self.steps if kind_of(s) in FRESH and uses[s.output] == 1}
            head, tail = self.steps[:settled], self.steps[settled:]
            needed = {*self.outputs, *(i for step in tail for i in step.inputs)}
            head = self._for_inference(head, _only_uses(head, uses))
            head = trimmed(head, needed, len(self.inputs) + len(self.steps), self._once)
            tail = self._for_training(tail, _only_uses(tail, uses))
            steps = [
                *_marked(_overwrite(head, fresh), BY_IMAGE_IN_INFERENCE),
                *_marked(_overwrite(tail, fresh), BY_IMAGE),
            ]
            if plain:
                steps = _in_plain_order(steps, exposed(self.steps))
            again = self.checkpoint and bool(tail)
            convolutions = [step.run for step in head if isinstance(step.run, FusedConv2d)]
            self.made[settled, plain] = Way(
                cut(steps, self.inputs, self.outputs, again),
                AllParameters(
                    [run.constants for run in convolutions],
                    at_once=not any(map(is_foreign, self.steps)),
                ),
            )
        return self.made[settled, plain]

    def _once(self, kind: Callable[..., Any], *key: Any) -> Any:
        """The same object for all plans, because it holds prepared weights or lent memory."""
        if (kind, *key) not in self.fused:
            self.fused[kind, *key] = kind(*key)
        return self.fused[kind, *key]

    def _for_inference(self, steps: list[Step], only_use: dict[int, Step]) -> list[Step]:
        """A convolution takes over the batch norm, addition and ReLU after it, a product its ReLU.

        A max pool behind a convolution's ReLU compares pairs.
        """
        result: list[Step] = []
        absorbed = set()
        sums: dict[int, tuple[Step, Any, int]] = {}  # a convolution that waits for its addition
        positive: set[int] = set()  # values behind a ReLU

        def after(step: Step, *kinds: Any) -> Step | None:
            found = only_use.get(step.output)
            return found if found is not None and kind_of(found) in kinds else None

        def add(first: Step, kind: Any, norm: Any, end: Step, *others: int) -> None:
            """Add a fused step for all from the first to the end, and the ReLU behind that."""
            six = () if others else (nn.ReLU6,)
            activation = None
            if found := after(end, nn.ReLU, *six):
                activation, end = found.run, found
                absorbed.add(id(end))
            if kind in CONVOLUTIONS:
                mixed, adds = kind is MixedConv2d, bool(others)
                key = first.run, norm, activation, mixed, adds, self.workspace
                run = self._once(FusedConv2d, *key)
            else:
                run = self._once(FusedLinear, first.run, activation, kind is MixedLinear)
            result.append(Step(run, (*first.inputs, *others), end.output))
            if activation is not None:
                positive.add(end.output)

        for step in steps:
            kind, norm, end = kind_of(step), None, step
            if id(step) in absorbed:
                continue
            if id(step) in sums:
                first, norm, value = sums[id(step)]
                others = (i for i in step.inputs if i != value)
                add(first, kind_of(first), norm, step, *others)
            elif kind in CONVOLUTIONS:
                if found := after(end, BatchNorm2d):
                    norm, end = found.run, found
                    absorbed.add(id(end))
                found = after(end, *ADDITIONS)
                if found and id(found) not in sums and adds_two(found):
                    sums[id(found)] = step, norm, end.output
                else:
                    add(step, kind, norm, end)
            elif kind in LINEARS:
                add(step, kind, None, step)
            elif (
                kind is nn.MaxPool2d
                and step.inputs[0] in positive
                and PairMaxPool2d.takes(step.run)
            ):
                result.append(replace(step, run=self._once(PairMaxPool2d, step.run)))
            else:
                result.append(step)
        return result

    def _for_training(self, steps: list[Step], only_use: dict[int, Step]) -> list[Step]:
        """Convolutions and products with gradients of our own; a max pool before its ReLU."""
        pools: dict[int, Step] = {}
        result: list[Step] = []
        seen = exposed(self.steps, self.outputs)  # backward needs what a pool gives as it was
        for step in steps:
            kind, after = kind_of(step), only_use.get(step.output)
            if kind in CONVOLUTIONS:
                run = self._once(TrainedConv2d, step.run, kind is MixedConv2d, self.workspace)
                step = replace(step, run=run)
            elif kind in LINEARS:
                step = replace(step, run=self._once(TrainedLinear, step.run, kind is MixedLinear))
            elif (
                kind is nn.ReLU
                and after is not None
                and kind_of(after) is nn.MaxPool2d
                and after.output not in seen
            ):
                run = ReLUPool2d(step.run, after.run)
                pools[id(after)] = replace(after, run=run, inputs=step.inputs)
                continue
            result.append(pools.get(id(step), step))
        return result


def _only_uses(steps: list[Step], uses: Counter[int]) -> dict[int, Step]:
    """Which of these steps is the only one of all that takes a value, by the value's number."""
    return {i: step for step in steps for i in step.inputs if uses[i] == 1}


def _overwrite(steps: list[Step], fresh: set[int]) -> list[Step]:
    """Let a ReLU overwrite its input where that is nobody else's business."""
    return [
        replace(step, run=OverwritingReLU())
        if kind_of(step) is nn.ReLU and step.inputs[0] in fresh
        else step
        for step in steps
    ]


def _in_plain_order(steps: list[Step], asked: set[int]) -> list[Step]:
    """Steps that put what is asked of them into plain order, for all who take it."""
    result: list[Step] = []
    for step in steps:
        result.append(step)
        if step.output in asked and not is_view(step):
            result.append(Step(in_plain_order, (step.output,), step.output, by_image=True))
    return result


def _marked(steps: list[Step], by_image: tuple[type, ...]) -> list[Step]:
    return [replace(step, by_image=is_by_image(step, by_image)) for step in steps]
