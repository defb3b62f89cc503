"""A network as a list of steps, and what makes a faster list of it.

A `Step` is one call of one module. The functions here are pure: they take steps and return others
that compute the same. `cut` ends with segments, which running.py runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from vggtorch.lowering.as_keras import KerasLayer
from vggtorch.lowering.fused import Convolve, FusedConv2D, FusedDense, OverwritingReLU, ReLUPool2D
from vggtorch.lowering.modules import (
    Activate,
    BatchNorm,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    GlobalPool2D,
    LayerNorm,
    Merge,
    Normalize,
    Pool2D,
    Rescale,
    UpSample2D,
    ZeroPadding2D,
)


@dataclass(frozen=True)
class Step:
    """One call of one module.

    Attributes:
        run: the module, or what does its work: a class of fused.py.
        inputs, outputs: numbers of the values that it takes and makes.
        arguments: how Keras was called, for a KerasLayer.
        by_image: what one image becomes doesn't depend on the others.
        last_use: inputs that nobody needs afterwards.
    """

    run: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: Any = None
    by_image: bool = False
    last_use: tuple[int, ...] = ()


@dataclass(frozen=True)
class Segment:
    """Steps that run one after the other.

    Attributes:
        grouped: they may run for some of the images at a time.
        checkpoint: backward runs them again.
        group_sizes: how many images at a time, for images of each shape and dtype.
    """

    steps: list[Step]
    grouped: bool
    checkpoint: bool = False
    group_sizes: dict[Any, int] = field(default_factory=dict)


# Backward doesn't need what these return, so that a ReLU may overwrite it.
FRESH = (BatchNorm, Conv2D, Dense, Merge)
POOLS = (Pool2D, GlobalPool2D, ReLUPool2D)
CONVOLUTIONS = (Conv2D, Convolve, FusedConv2D)
# Dense isn't here because it would read its large kernel once for each group.
BY_IMAGE = (
    Activate, Flatten, LayerNorm, Merge, Normalize, OverwritingReLU, Rescale, UpSample2D,
    ZeroPadding2D, *CONVOLUTIONS, *POOLS,
)  # fmt: skip
BY_IMAGE_IN_INFERENCE = (*BY_IMAGE, BatchNorm, Dropout)


@dataclass(frozen=True)
class Plans:
    """The steps of a network, and the segments for each way to run it.

    Attributes:
        steps: one for each call, as Keras has them.
        inputs, outputs: numbers of the network's values.
        checkpoint: backward computes activations again.
    """

    steps: list[Step]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    checkpoint: bool
    fused: dict[Any, Any] = field(default_factory=dict)  # by the modules that are in one
    made: dict[int, list[Segment]] = field(default_factory=dict)

    def one_by_one(self) -> list[Segment]:
        """Each module by itself, on the whole batch."""
        segments = cut(self.steps, self.inputs, self.outputs, self.checkpoint)
        return [replace(segment, grouped=False) for segment in segments]

    def fast(self, frozen: int) -> list[Segment]:
        """What runs where so many of the first steps run as in inference."""
        if frozen not in self.made:
            uses = Counter(i for step in self.steps for i in step.inputs) + Counter(self.outputs)
            only_use = {i: step for step in self.steps for i in step.inputs if uses[i] == 1}
            overwritten = {
                step.outputs[0]
                for step in self.steps
                if isinstance(step.run, FRESH)
                and getattr(step.run, "activation", None) is None
                and uses[step.outputs[0]] == 1
            }
            head = _fuse(self.steps[:frozen], only_use, self.fused)
            tail = _pool_first(self.steps[frozen:], only_use)
            steps = [
                *_marked(_overwrite(head, overwritten), BY_IMAGE_IN_INFERENCE),
                *_marked(_overwrite(tail, overwritten), BY_IMAGE),
            ]
            again = self.checkpoint and bool(tail)
            self.made[frozen] = cut(steps, self.inputs, self.outputs, again)
        return self.made[frozen]


def _pool_first(steps: list[Step], only_use: dict[int, Step]) -> list[Step]:
    """For training: a max pool takes over the ReLU before it."""
    pools: dict[int, Step] = {}
    result: list[Step] = []
    here = {id(step) for step in steps}
    for step in steps:
        after = only_use.get(step.outputs[0])
        conv = step.run if isinstance(step.run, Conv2D) else None
        relu = conv.activation if conv is not None else step.run
        is_relu = isinstance(relu, Activate) and relu.is_relu
        pool = after.run if after is not None and id(after) in here else None
        if is_relu and after is not None and isinstance(pool, Pool2D) and pool.maximum:
            inputs = step.inputs if conv is None else step.outputs
            pools[id(after)] = replace(after, run=ReLUPool2D(pool), inputs=inputs)
            if conv is not None:
                result.append(replace(step, run=Convolve(conv, relu=False)))
        elif is_relu and conv is not None:
            result.append(replace(step, run=Convolve(conv, relu=True)))
        else:
            result.append(pools.get(id(step), step))
    return result


def _fuse(steps: list[Step], only_use: dict[int, Step], fused: dict[Any, Any]) -> list[Step]:
    """For inference: a convolution takes over the batch norm and activation after it.

    `fused` keeps these steps, the same for all plans, because they hold prepared weights.
    """
    here = {id(step) for step in steps}
    result: list[Step] = []
    absorbed = set()

    def once(kind: Callable[..., Any], *modules: nn.Module | None) -> Any:
        if modules not in fused:
            fused[modules] = kind(*modules)
        return fused[modules]

    def after(step: Step) -> Step | None:
        found = only_use.get(step.outputs[0])
        return found if found is not None and id(found) in here else None

    for step in steps:
        if id(step) in absorbed:
            continue
        if isinstance(step.run, Dense):
            step = replace(step, run=once(FusedDense, step.run))
        elif isinstance(step.run, Conv2D):
            norm, activation, end = None, step.run.activation, step
            if activation is None and (found := after(end)) and isinstance(found.run, BatchNorm):
                norm, end = found.run, found
                absorbed.add(id(end))
            if activation is None and (found := after(end)) and isinstance(found.run, Activate):
                activation, end = found.run, found
                absorbed.add(id(end))
            run = once(FusedConv2D, step.run, norm, activation)
            step = replace(step, run=run, outputs=end.outputs)
        result.append(step)
    return result


def _overwrite(steps: list[Step], overwritten: set[int]) -> list[Step]:
    """Let a ReLU overwrite its input where that is nobody else's business."""
    return [
        replace(step, run=OverwritingReLU(step.run))
        if isinstance(step.run, Activate) and step.run.is_relu and step.inputs[0] in overwritten
        else step
        for step in steps
    ]


def _marked(steps: list[Step], by_image: tuple[type, ...]) -> list[Step]:
    return [replace(step, by_image=_is_by_image(step.run, by_image)) for step in steps]


def _is_by_image(run: Any, kinds: tuple[type, ...]) -> bool:
    """Whether images don't meet: a function of the user's, as an activation, may mix them."""
    activation = run if isinstance(run, Activate) else getattr(run, "activation", None)
    mixes = isinstance(activation, Activate) and not activation.by_image
    return isinstance(run, kinds) and not mixes


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
        live = (live | set(step.outputs)) - set(step.last_use)
        if len(live) == 1 and (isinstance(step.run, POOLS) or not grouped):
            segments.append(_segment(steps[start : i + 1], grouped, checkpoint))
            start, grouped = i + 1, True
    if start < len(steps):
        segments.append(_segment(steps[start:], grouped and len(live) == 1, checkpoint))
    return segments


def _segment(steps: list[Step], grouped: bool, checkpoint: bool) -> Segment:
    learns = any(isinstance(step.run, Conv2D | Convolve) for step in steps)
    convolves = any(isinstance(step.run, CONVOLUTIONS) for step in steps)
    grouped &= convolves and all(step.by_image for step in steps)
    # Keras's layers may draw random numbers, or count, in ways of their own.
    again = checkpoint and learns and not any(modules_in(steps, KerasLayer))
    return Segment(steps, grouped, again)


def modules_in(steps: list[Step], kind: type[nn.Module]) -> Iterable[Any]:
    """The modules of a kind in the steps, also those inside of others."""
    for step in steps:
        if isinstance(step.run, nn.Module):
            yield from (module for module in step.run.modules() if isinstance(module, kind))


def _with_last_use(steps: list[Step], outputs: tuple[int, ...]) -> list[Step]:
    """Note at each step which values it is the last to need."""
    needed = set(outputs)
    result = []
    for step in reversed(steps):
        result.append(replace(step, last_use=tuple(set(step.inputs) - needed)))
        needed.update(step.inputs)
    return result[::-1]
