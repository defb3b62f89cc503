"""A torch.fx graph as a list of steps, what is known of each, and where the list may be cut.

A `Step` is one node of the graph, or several that run as one. `cut` ends with segments, which
running.py runs.
"""

from __future__ import annotations

import operator
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
    PaddingConv2d,
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

    @property
    def target(self) -> Any:
        """What runs, which a `Call` gives its arguments."""
        return self.run.target if isinstance(self.run, Call) else self.run


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
    nn.GroupNorm, Normalize, Permute, PReLU, Rescale, SamePad, Scale, FusedConv2d, PaddingConv2d,
    TrainedConv2d, OverwritingReLU,
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
    return isinstance(step.target, Method) and step.target.name == "permute"


def kind_of(step: Step) -> Any:
    """The class of a step's module, or of what does its work, exactly; the function of a call."""
    return step.target if isinstance(step.run, Call) else type(step.run)


def is_by_image(step: Step, kinds: tuple[type, ...]) -> bool:
    """Whether images don't meet in a step."""
    if not isinstance(step.run, Call):
        return type(step.run) in kinds or (type(step.run) is KerasFunction and step.run.is_by_image)
    target, (args, _) = step.run.target, step.run.arguments
    if target is torch.cat:
        return len(args) == 2 and type(args[1]) is int and args[1] > 0
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
    run = step.target
    return not isinstance(run, nn.Module) or type(run) in (*BY_IMAGE_IN_INFERENCE, *STATELESS)


def is_foreign(step: Step) -> bool:
    """Whether a step may write to what it takes, or ask how that lies in memory.

    Modules and functions that aren't known may, the user's and Keras's layers among them.
    """
    run = step.target
    if isinstance(run, Method):
        return run.name not in METHODS
    if not isinstance(run, nn.Module):
        return run not in (*FUNCTIONS_BY_IMAGE, torch.cat)
    if type(run) is KerasFunction:
        return not run.is_by_image
    known = type(run) in (*STATELESS, *NORMS, *DROPOUTS)
    return not known or bool(getattr(run, "inplace", False))


def is_view(step: Step) -> bool:
    """Whether a step may give the memory that it takes."""
    fused = (FusedConv2d, PaddingConv2d, FusedLinear, TrainedConv2d, TrainedLinear)
    return kind_of(step) not in (*FRESH, *POOLS, *fused)


def exposed(steps: list[Step], outputs: tuple[int, ...] = ()) -> set[int]:
    """Values that foreign steps take, or are views of; and those of outputs."""
    found = set(outputs)
    for step in reversed(steps):
        if is_foreign(step) or (is_view(step) and step.output in found):
            found.update(step.inputs)
    return found


def adds_two(step: Step) -> bool:
    """Whether an addition takes two different values, and nothing else."""
    return step.run.arguments == ((Place(0), Place(1)), {})


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
    convolves = any(isinstance(step.run, FusedConv2d | TrainedConv2d) for step in steps)
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
