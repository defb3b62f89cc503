"""How segments of steps run: in groups of images, and again in backward where that saves memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vggtorch.lowering.batch_norm import KerasBatchNorm
from vggtorch.lowering.fused import Bounded, product_dtype
from vggtorch.lowering.layer_modules import SamePad
from vggtorch.lowering.steps import Segment, Step, kind_of

# While images run through the convolutions in groups, a group's largest activation has about this
# many bytes for each thread, so that the next layer still finds it in the cache.
GROUP_BYTES = 8 << 20
# No number in what these put out is larger than the largest in what they get.
_NOT_LARGER = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ReLU, nn.ZeroPad2d, SamePad)


# What runs a segment: values has what it takes, and gets what is needed later.
Run = Callable[[Segment, dict[int, Any]], None]


def run_segments(segments: list[Segment], values: dict[int, Any], run: Run | None = None) -> None:
    """Run all segments; `values` has the network's inputs and gets its outputs."""
    run = run or _run_segment
    for segment in segments:
        if segment.grouped and len(values[segment.steps[0].inputs[0]]) > 0:
            _run_in_groups(segment, values, run)
        else:
            run(segment, values)


def _run_in_groups(segment: Segment, values: dict[int, Any], run: Run) -> None:
    """Run a segment that has one value in and one out for a few images after the other.

    What one layer writes is then still in the cache when the next reads it, and memory is
    used again instead of being taken from the system for each large activation.
    """
    (number,) = set(segment.steps[0].inputs)  # x * x takes its one value twice
    x = values.pop(number)
    key = x.shape[1:], product_dtype(x, x.dtype), torch.is_grad_enabled()
    if key not in segment.groups:
        # Before the first batch, so that the same batch always runs in the same groups: a
        # kernel's last bit depends on how many images it is given.
        sizes: dict[int, int] = {}
        try:
            with torch.no_grad():
                # A copy, because the first step may be a ReLU that overwrites its input. Two
                # images, as groups are of several, so that no weight is prepared for one alone.
                few = x[:2].clone()
                run_steps(segment.steps, {number: few}, sizes)
        except Exception:  # the whole batch will tell its own shape
            run_steps(segment.steps, values | {number: x})
            raise
        bytes_of = [sizes.get(step.output, 0) / len(few) for step in segment.steps]
        # Joining the groups again copies their maps, which backward would keep too.
        parts = [segment] if torch.is_grad_enabled() else _parts(segment, bytes_of)
        segment.groups[key] = _with_group_sizes(parts, bytes_of)
    parts_and_sizes = segment.groups[key]
    if len(x) <= min(size for _, size in parts_and_sizes):
        parts_and_sizes = [(segment, len(x))]
    for part, size in parts_and_sizes:
        x = _in_groups(part, x, size, run)
    values[segment.steps[-1].output] = x


def _parts(segment: Segment, bytes_of: list[float]) -> list[Segment]:
    """The segment cut where the rest needs at most half the memory, so that more images fit.

    Of the places before the rest's largest value, the cut is where the one value that is needed
    later is the smallest. `bytes_of`: how large each step's output is, of one image.
    """
    steps, parts, start = segment.steps, [], 0
    live = set(steps[0].inputs)
    ends = []
    for i, step in enumerate(steps):
        live = (live | {step.output}) - set(step.last_use)
        if len(live) == 1:
            ends.append(i)
    while start < len(steps):
        most = max(bytes_of[start:])
        cuts = [i for i in ends if start <= i < len(steps) - 1 and 2 * max(bytes_of[i:]) <= most]
        end = len(steps) - 1
        if cuts:
            behind = range(cuts[0] + 1, len(steps))
            largest = max(behind, key=bytes_of.__getitem__)
            end = min((i for i in cuts if i <= max(cuts[0], largest - 1)), key=bytes_of.__getitem__)
        parts.append(replace(segment, steps=steps[start : end + 1], groups={}))
        start = end + 1
    return parts


def _with_group_sizes(parts: list[Segment], bytes_of: list[float]) -> list[tuple[Segment, int]]:
    """Each part, and how many images may run through it at a time."""
    limit, sizes = GROUP_BYTES * torch.get_num_threads(), iter(bytes_of)
    largest = [max(1, *itertools.islice(sizes, len(part.steps))) for part in parts]
    return [(part, max(1, int(limit / n))) for part, n in zip(parts, largest, strict=True)]


def _in_groups(segment: Segment, x: Tensor, size: int, run: Run) -> Tensor:
    """The segment's output for x, which goes through it in equal groups of this size at most."""
    number, result = segment.steps[0].inputs[0], segment.steps[-1].output
    count = -(-len(x) // size)
    outputs: list[Tensor] = []
    # The gradients of slices would be added up, each as large as x; those of a split are joined.
    # Only an unsafe split may be written to, which a ReLU at the start of the segment does where
    # nobody else needs x (`_overwrite` in steps.py).
    for group in x.unsafe_split(-(-len(x) // count)) if count > 1 else (x,):
        values = {number: group}
        run(segment, values)
        outputs.append(values[result])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _run_segment(segment: Segment, values: dict[int, Any]) -> None:
    """Run a segment's steps; `values` keeps what is needed later."""
    if not segment.checkpoint or not torch.is_grad_enabled():
        run_steps(segment.steps, values)
        return

    def run(*inputs: Tensor) -> dict[int, Any]:
        inside = dict(zip(numbers, inputs, strict=True))
        run_steps(segment.steps, inside)
        return inside

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _Again(segment.steps)

    taken = {i for step in segment.steps for i in step.inputs}
    numbers = [i for i in values if i in taken]
    inputs = [values.pop(i) for i in numbers]
    values |= checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts)


class _Again(AbstractContextManager[None]):
    """What steps need to run again as they did when this was made.

    Batch norm leaves its moving statistics alone, which have counted this batch, and modules have
    the tensors that they had, which functional_call lends for one call. It is entered once for each
    backward through the same forward.
    """

    def __init__(self, steps: list[Step]) -> None:
        self.norms = [step.run for step in steps if isinstance(step.run, KerasBatchNorm)]
        modules = [m for step in steps for part in _modules_of(step) for m in part.modules()]
        self.places = [place for m in modules for place in (m._parameters, m._buffers)]
        self.then = [dict(place) for place in self.places]
        self.now: list[dict[str, Any]] = []

    def __enter__(self) -> None:
        self.now = [dict(place) for place in self.places]
        self._put(self.then)
        for norm in self.norms:
            norm.counted = True

    def __exit__(self, *_: object) -> None:
        self._put(self.now)
        for norm in self.norms:
            norm.counted = False

    def _put(self, tensors: list[dict[str, Any]]) -> None:
        for place, those in zip(self.places, tensors, strict=True):
            place.clear()
            place.update(those)


def _modules_of(step: Step) -> list[nn.Module]:
    """The module that a step runs, or those whose work it does."""
    run = step.target
    parts = [run] if isinstance(run, nn.Module) else getattr(run, "__dict__", {}).values()
    return [part for part in parts if isinstance(part, nn.Module)]


def run_steps(
    steps: list[Step], values: dict[int, Any], sizes: dict[int, int] | None = None
) -> None:
    """Run the steps; `values` keeps what is needed later, `sizes` gets the bytes of each result."""
    bounds: dict[int, float | None] = {}  # how large the numbers in a value can be
    for step in steps:
        inputs = [values[i] for i in step.inputs]
        for i in step.last_use:
            del values[i]
        if isinstance(step.run, Bounded):
            known = [bounds.get(i) for i in step.inputs]
            output, bounds[step.output] = step.run(inputs, known)
        else:
            output = step.run(*inputs)
            # A padding's value is 0 unless somebody has set another.
            if kind_of(step) in _NOT_LARGER and getattr(step.run, "value", 0) == 0:
                bounds[step.output] = bounds.get(step.inputs[0])
        values[step.output] = output
        if sizes is not None and isinstance(output, Tensor):
            sizes[step.output] = output.nbytes
