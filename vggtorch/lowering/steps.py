"""A torch.fx graph as a list of steps, and what makes a faster list of it.

A `Step` is one node of the graph. The functions here are pure: they take steps and return others
that compute the same. `cut` ends with segments, which running.py runs.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from vggtorch.lowering.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from vggtorch.lowering.fused import (
    FusedConv2d,
    FusedLinear,
    OverwritingReLU,
    PairMaxPool2d,
    ReLUPool2d,
    TrainedConv2d,
    TrainedLinear,
)
from vggtorch.lowering.layer_modules import (
    GlobalMaxPool,
    KerasFunction,
    MixedConv2d,
    MixedLinear,
    Normalize,
    Permute,
    Place,
    PReLU,
    Rescale,
    SameAvgPool,
    SamePad,
    Scale,
    WideLayerNorm,
)
from vggtorch.lowering.winograd import Workspace


class Call:
    """A node that runs as it stands in the graph: a function, a method, or a module's call."""

    def __init__(self, target: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.target, self.arguments = target, (args, kwargs)

    def __call__(self, *inputs: Any) -> Any:
        """Run it on the values at its places, in the order of their first use."""
        args, kwargs = torch.fx.node.map_aggregate(
            self.arguments, lambda x: inputs[x.index] if isinstance(x, Place) else x
        )
        return self.target(*args, **kwargs)


class Method:
    """A method of a value, called by its name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return getattr(value, self.name)(*args, **kwargs)


@dataclass(frozen=True)
class Step:
    """One node of a graph, or several that run as one.

    Attributes:
        run: a module, a `Call`, or what does the work of modules: a class of fused.py.
        inputs: numbers of the values that it takes.
        output: number of the value that it makes.
        by_image: what one image becomes doesn't depend on the others.
        last_use: inputs that nobody needs afterwards.
    """

    run: Any
    inputs: tuple[int, ...]
    output: int
    by_image: bool = False
    last_use: tuple[int, ...] = ()


@dataclass(frozen=True)
class Segment:
    """Steps that run one after the other.

    Attributes:
        grouped: they may run for some of the images at a time.
        checkpoint: backward runs them again.
        groups: its parts, and how many images run through each at a time, for images of each shape
            and dtype, with gradients and without.
    """

    steps: list[Step]
    grouped: bool
    checkpoint: bool = False
    groups: dict[Any, list[tuple[Segment, int]]] = field(default_factory=dict)


CONVOLUTIONS = (nn.Conv2d, MixedConv2d)
LINEARS = (nn.Linear, MixedLinear)
NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
POOLS = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, SameAvgPool, GlobalMaxPool, PairMaxPool2d,
    ReLUPool2d,
)  # fmt: skip
# What looks at one image at a time and has no weights. Products aren't here because they would read
# their large weights once for each group.
ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
    nn.Tanh, nn.Hardsigmoid, nn.Hardswish, nn.Softplus, nn.Softsign, nn.Identity,
)  # fmt: skip
BY_IMAGE = (
    *ELEMENTWISE, *POOLS, *CONVOLUTIONS, nn.LayerNorm, WideLayerNorm, nn.Upsample, nn.ZeroPad2d,
    nn.GroupNorm, Normalize, Permute, PReLU, Rescale, SamePad, Scale, FusedConv2d, TrainedConv2d,
    OverwritingReLU,
)  # fmt: skip
BY_IMAGE_IN_INFERENCE = (*BY_IMAGE, *NORMS, *DROPOUTS)
# What gives the same for the same input and parameters, in training too.
STATELESS = (
    *BY_IMAGE, *LINEARS, nn.Softmax, nn.LogSoftmax, nn.Flatten, nn.Embedding, KerasFunction,
)  # fmt: skip
FUNCTIONS_BY_IMAGE = (
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg,
    torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.maximum, torch.minimum,
)  # fmt: skip
ADDITIONS = (torch.add, operator.add)
# Backward doesn't need what these return, so that a ReLU may overwrite it.
FRESH = (
    *CONVOLUTIONS, *LINEARS, *NORMS, operator.add, operator.sub, operator.mul,
    torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, torch.cat,
)  # fmt: skip


# Methods that `to_torch` writes, which ask nothing of the order in which numbers lie in memory.
METHODS = ("flatten", "permute", "reshape", "size", "to", "unflatten")


def in_plain_order(x: Any) -> Any:
    """Maps (N, C, H, W) that lie in memory as NHWC in the order of their axes; or x as it is."""
    is_map = isinstance(x, torch.Tensor) and x.ndim == 4
    return x.contiguous() if is_map and x.is_contiguous(memory_format=torch.channels_last) else x


def steps_of(graph: torch.fx.Graph, modules: dict[str, nn.Module]) -> tuple[list[Step], Any]:
    """The graph's nodes as steps, and what it returns, with the places of the values.

    The inputs are the values 0, 1, ... in the order of the graph's placeholders.
    """
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    numbers = {node: i for i, node in enumerate(inputs)}
    steps: list[Step] = []
    outputs: Any = None
    map_arg: Any = torch.fx.node.map_arg  # typed for nodes, and takes anything
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        used = list(dict.fromkeys(node.all_input_nodes))
        places = {value: Place(i) for i, value in enumerate(used)}
        if node.op == "output":
            outputs = map_arg(node.args[0], lambda n: Place(numbers[n]))
            continue
        numbers[node] = len(numbers)
        args, kwargs = map_arg((node.args, node.kwargs), places.__getitem__)
        run: Any
        if node.op == "call_module":
            run = modules[node.target]
            if kwargs or list(node.args) != used:
                run = Call(run, args, kwargs)
        elif node.op == "call_method":
            run = Call(Method(node.target), args, kwargs)
        elif node.op == "call_function":
            run = Call(node.target, args, kwargs)
        else:  # get_attr, which only an edited graph has
            raise NotImplementedError(node.op)
        steps.append(Step(run, tuple(numbers[n] for n in used), numbers[node]))
    return steps, outputs


def permutes(step: Step) -> bool:
    """Whether a step puts the axes of a value in another order."""
    run = step.run
    return isinstance(run, Call) and isinstance(run.target, Method) and run.target.name == "permute"


def kind_of(step: Step) -> Any:
    """The class of a step's module, or of what does its work, exactly; the function of a call."""
    if isinstance(step.run, Call):
        return step.run.target
    return type(step.run)


def _is_by_image(step: Step, kinds: tuple[type, ...]) -> bool:
    """Whether images don't meet in a step."""
    if not isinstance(step.run, Call):
        return type(step.run) in kinds or (type(step.run) is KerasFunction and step.run.is_by_image)
    target, (args, kwargs) = step.run.target, step.run.arguments
    if target is torch.cat:
        return not kwargs and len(args) == 2 and args[1] != 0
    if isinstance(target, Method):
        if target.name == "permute":
            return args[1] == 0
        if target.name in ("flatten", "unflatten"):
            return args[1] == 1
        return target.name == "to"
    return target in FUNCTIONS_BY_IMAGE


def repeats(step: Step) -> bool:
    """Whether a step gives the same when it runs again on the same inputs.

    Modules that aren't known, Keras's layers among them, may draw random numbers, or count, in
    their own way; and a layer of Keras may take the mask off its input.
    """
    run = step.run.target if isinstance(step.run, Call) else step.run
    return not isinstance(run, nn.Module) or type(run) in (*BY_IMAGE_IN_INFERENCE, *STATELESS)


def is_foreign(step: Step) -> bool:
    """Whether a step may write to what it takes, or ask how that lies in memory.

    Modules and functions that aren't known may, the user's and Keras's layers among them.
    """
    run = step.run.target if isinstance(step.run, Call) else step.run
    if isinstance(run, Method):
        return run.name not in METHODS
    if not isinstance(run, nn.Module):
        return run not in (*FUNCTIONS_BY_IMAGE, torch.cat)
    if type(run) is KerasFunction:
        return not run.is_by_image
    known = type(run) in (*STATELESS, *NORMS, *DROPOUTS)
    return not known or bool(getattr(run, "inplace", False))


def _is_view(step: Step) -> bool:
    """Whether a step may give the memory that it takes."""
    fused = (FusedConv2d, FusedLinear, TrainedConv2d, TrainedLinear)
    return kind_of(step) not in (*FRESH, *POOLS, *fused)


def _exposed(steps: list[Step], outputs: tuple[int, ...] = ()) -> set[int]:
    """Values that foreign steps take, or are views of; and those of outputs."""
    found = set(outputs)
    for step in reversed(steps):
        if is_foreign(step) or (_is_view(step) and step.output in found):
            found.update(step.inputs)
    return found


@dataclass(frozen=True)
class Plans:
    """The steps of a network, and the segments for each way to run it.

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
    made: dict[tuple[int, bool], list[Segment]] = field(default_factory=dict)

    def fast(self, settled: int, plain: bool = False) -> list[Segment]:
        """What runs where so many of the first steps run as in inference.

        `plain`: maps that torch's modules would give in plain order are so where that can be told.
        """
        if (settled, plain) not in self.made:
            uses = Counter(i for step in self.steps for i in step.inputs) + Counter(self.outputs)
            fresh = {s.output for s in self.steps if kind_of(s) in FRESH and uses[s.output] == 1}
            head, tail = self.steps[:settled], self.steps[settled:]
            head = self._for_inference(head, _only_uses(head, uses))
            tail = self._for_training(tail, _only_uses(tail, uses))
            steps = [
                *_marked(_overwrite(head, fresh), BY_IMAGE_IN_INFERENCE),
                *_marked(_overwrite(tail, fresh), BY_IMAGE),
            ]
            if plain:
                steps = _in_plain_order(steps, _exposed(self.steps))
            again = self.checkpoint and bool(tail)
            self.made[settled, plain] = cut(steps, self.inputs, self.outputs, again)
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
        positive: set[int] = set()  # values behind a convolution's ReLU

        def after(step: Step, *kinds: Any) -> Step | None:
            found = only_use.get(step.output)
            return found if found is not None and kind_of(found) in kinds else None

        def add(first: Step, kind: Any, norm: Any, end: Step, *others: int) -> None:
            """Add a fused step for all from the first to the end, and the ReLU behind that."""
            six = () if others or kind not in CONVOLUTIONS else (nn.ReLU6,)
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
            if activation is not None and kind in CONVOLUTIONS:
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
        exposed = _exposed(self.steps, self.outputs)  # backward needs what a pool gives as it was
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
                and after.output not in exposed
            ):
                run = ReLUPool2d(step.run, after.run)
                pools[id(after)] = replace(after, run=run, inputs=step.inputs)
                continue
            result.append(pools.get(id(step), step))
        return result


def adds_two(step: Step) -> bool:
    """Whether an addition takes two different values, and nothing else."""
    return step.run.arguments == ((Place(0), Place(1)), {})


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
        if step.output in asked and not _is_view(step):
            result.append(Step(in_plain_order, (step.output,), step.output, by_image=True))
    return result


def _marked(steps: list[Step], by_image: tuple[type, ...]) -> list[Step]:
    return [replace(step, by_image=_is_by_image(step, by_image)) for step in steps]


def cut(
    steps: list[Step], inputs: tuple[int, ...], outputs: tuple[int, ...], checkpoint: bool
) -> list[Segment]:
    """Cut the steps after each pool where all that is needed later is one value.

    After a pool the maps are smaller, so that more images fit in a group. A checkpoint takes
    everything between two pools, and backward runs those with convolutions that learn again:
    Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    steps = _with_last_use(steps, outputs)
    segments: list[Segment] = []
    live, start, grouped = set(inputs), 0, len(inputs) == 1
    for i, step in enumerate(steps):
        if not (step.by_image or checkpoint):
            if start < i:
                one = grouped and len(live) == 1
                segments.append(_segment(steps[start:i], one, checkpoint))
            start, grouped = i, False
        live = (live | {step.output}) - set(step.last_use)
        if len(live) == 1 and (kind_of(step) in POOLS or not grouped):
            segments.append(_segment(steps[start : i + 1], grouped, checkpoint))
            start, grouped = i + 1, True
    if start < len(steps):
        segments.append(_segment(steps[start:], grouped and len(live) == 1, checkpoint))
    return segments


def _segment(steps: list[Step], grouped: bool, checkpoint: bool) -> Segment:
    learns = any(kind_of(step) is TrainedConv2d for step in steps)
    convolves = any(kind_of(step) in (FusedConv2d, TrainedConv2d) for step in steps)
    grouped &= convolves and all(step.by_image for step in steps)
    return Segment(steps, grouped, checkpoint and learns and all(map(repeats, steps)))


def _with_last_use(steps: list[Step], outputs: tuple[int, ...]) -> list[Step]:
    """Note at each step which values it is the last to need."""
    needed = set(outputs)
    result = []
    for step in reversed(steps):
        result.append(replace(step, last_use=tuple(set(step.inputs) - needed)))
        needed.update(step.inputs)
    return result[::-1]
