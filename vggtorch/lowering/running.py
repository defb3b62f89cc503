"""How segments of steps run: in groups of images, and again in backward where that saves memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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


def run_segments(segments: list[Segment], values: dict[int, Any]) -> None:
    """Run all segments; `values` has the network's inputs and gets its outputs."""
    for segment in segments:
        if segment.grouped and len(values[segment.steps[0].inputs[0]]) > 0:
            _run_in_groups(segment, values)
        else:
            _run_segment(segment, values)


def _run_in_groups(segment: Segment, values: dict[int, Any]) -> None:
    """Run a segment that has one value in and one out for a few images after the other.

    What one layer writes is then still in the cache when the next reads it, and memory is
    used again instead of being taken from the system for each large activation.
    """
    (number,) = set(segment.steps[0].inputs)  # x * x takes its one value twice
    result = segment.steps[-1].output
    x = values.pop(number)
    key = x.shape[1:], product_dtype(x, x.dtype)
    if key not in segment.group_sizes:
        # Before the first batch, so that the same batch always runs in the same groups: a
        # kernel's last bit depends on how many images it is given.
        sizes = [1]
        try:
            with torch.no_grad():
                # A copy, because the first step may be a ReLU that overwrites its input. Two
                # images, as groups are of several, so that no weight is prepared for one alone.
                few = x[:2].clone()
                _run(segment.steps, {number: few}, sizes)
        except Exception:  # the whole batch will tell its own shape
            _run(segment.steps, values | {number: x})
            raise
        by_image = max(sizes) / len(few)
        segment.group_sizes[key] = max(1, int(GROUP_BYTES * torch.get_num_threads() / by_image))
    parts: list[Tensor] = []
    size = segment.group_sizes[key]
    # The gradients of slices would be added up, each as large as x; those of a split are joined.
    # Only an unsafe split may be written to, which a ReLU at the start of the segment does where
    # nobody else needs x (`_overwrite` in steps.py).
    for group in x.unsafe_split(size) if len(x) > size else (x,):
        part = {number: group}
        _run_segment(segment, part)
        parts.append(part[result])
    values[result] = parts[0] if len(parts) == 1 else torch.cat(parts)


def _run_segment(segment: Segment, values: dict[int, Any]) -> None:
    """Run a segment's steps; `values` keeps what is needed later."""
    if not segment.checkpoint or not torch.is_grad_enabled():
        _run(segment.steps, values)
        return

    def run(*inputs: Tensor) -> dict[int, Any]:
        inside = dict(zip(numbers, inputs, strict=True))
        _run(segment.steps, inside)
        return inside

    def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _Again(segment.steps)

    taken = {i for step in segment.steps for i in step.inputs}
    numbers = [i for i in values if i in taken]
    inputs = [values.pop(i) for i in numbers]
    values |= checkpoint(run, *inputs, use_reentrant=False, context_fn=contexts)


class _Again(AbstractContextManager[None]):
    """Let batch norm leave its moving statistics alone, which have counted this batch.

    It is entered once for each backward through the same forward.
    """

    def __init__(self, steps: list[Step]) -> None:
        self.norms = [step.run for step in steps if isinstance(step.run, KerasBatchNorm)]

    def __enter__(self) -> None:
        for norm in self.norms:
            norm.counted = True

    def __exit__(self, *_: object) -> None:
        for norm in self.norms:
            norm.counted = False


def _run(steps: list[Step], values: dict[int, Any], sizes: list[int] | None = None) -> None:
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
            if kind_of(step) in _NOT_LARGER:
                bounds[step.output] = bounds.get(step.inputs[0])
        values[step.output] = output
        if sizes is not None and isinstance(output, Tensor):
            sizes.append(output.nbytes)
