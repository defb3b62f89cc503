"""How segments of steps run: in groups of images, and again in backward where that saves memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vggtorch.lowering.conventions import product_dtype
from vggtorch.lowering.fused import FusedConv2D
from vggtorch.lowering.modules import BatchNorm
from vggtorch.lowering.steps import Segment, Step, modules_in

# While images run through the convolutions in groups, a group's largest activation has about this
# many bytes for each thread, so that the next layer still finds it in the cache.
GROUP_BYTES = 8 << 20


def run_segments(segments: list[Segment], values: dict[int, Tensor], images: Tensor) -> None:
    """Run all segments; `values` has the network's inputs and gets its outputs."""
    for segment in segments:
        # An empty batch has no groups, and on a GPU they would gain nothing.
        if segment.grouped and images.device.type == "cpu" and len(images) > 0:
            _run_in_groups(segment, values)
        else:
            _run_segment(segment, values)


def _run_in_groups(segment: Segment, values: dict[int, Tensor]) -> None:
    """Run a segment that has one value in and one out for a few images after the other.

    What one layer writes is then still in the cache when the next reads it, and memory is
    used again instead of being taken from the system for each large activation.
    """
    (number,) = set(segment.steps[0].inputs)  # x * x takes its one value twice
    (result,) = segment.steps[-1].outputs
    x = values.pop(number)
    key = x.shape[1:], product_dtype(x, x.dtype)
    if key not in segment.group_sizes:
        # Before the first batch, so that the same batch always runs in the same groups: a
        # kernel's last bit depends on how many images it is given.
        sizes = [1]
        with torch.no_grad():
            # A copy, because the first step may be a ReLU that overwrites its input.
            _run(segment.steps, {number: x[:1].clone()}, sizes)
        segment.group_sizes[key] = max(1, GROUP_BYTES * torch.get_num_threads() // max(sizes))
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


def _run_segment(segment: Segment, values: dict[int, Tensor]) -> None:
    """Run a segment's steps; `values` keeps what is needed later."""
    # A compiler decides by itself what is computed again.
    if not segment.checkpoint or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        _run(segment.steps, values)
        return

    def run(*inputs: Tensor) -> dict[int, Tensor]:
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
        self.norms = list(modules_in(steps, BatchNorm))

    def __enter__(self) -> None:
        for norm in self.norms:
            norm.again = True

    def __exit__(self, *_: object) -> None:
        for norm in self.norms:
            norm.again = False


def _run(steps: list[Step], values: dict[int, Tensor], sizes: list[int] | None = None) -> None:
    """Run the steps; `values` keeps what is needed later, `sizes` gets the bytes of each result."""
    bounds: dict[int, float | None] = {}  # how large the numbers in a value can be
    for step in steps:
        inputs = [values[i] for i in step.inputs]
        for i in step.last_use:
            del values[i]
        if isinstance(step.run, FusedConv2D):
            outputs, bounds[step.outputs[0]] = step.run(inputs[0], bounds.get(step.inputs[0]))
        elif step.arguments is not None:
            outputs = step.run(step.arguments, *inputs)
        else:
            outputs = step.run(*inputs)
        if isinstance(outputs, Tensor):
            values[step.outputs[0]] = outputs
            if sizes is not None:
                sizes.append(outputs.nbytes)
        else:
            values.update(zip(step.outputs, outputs, strict=True))
