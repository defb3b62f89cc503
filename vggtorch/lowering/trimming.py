"""Steps of inference that compute no pixel that nobody takes, and copy none only to pad it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from torch import nn

from vggtorch.lowering.fused import FusedConv2d, PaddingConv2d
from vggtorch.lowering.steps import Step, kind_of

Pair = tuple[int, int]
Once = Callable[..., Any]


def trimmed(steps: list[Step], needed: set[int], unused: int, once: Once) -> list[Step]:
    """Steps that compute the same; those of convolutions have new ones.

    Args:
        steps: with fused convolutions.
        needed: numbers of the values that are needed behind the last step.
        unused: from this number on, numbers stand for no values yet.
        once: calls its first argument with the others, and gives the same object the next time.
    """
    return _pads_inside(_strides_before(steps, needed, unused, once), needed, once)


def _strides_before(steps: list[Step], needed: set[int], unused: int, once: Once) -> list[Step]:
    """Where all who take a convolution's output leave out the same pixels, it leaves them out.

    A ResNet's blocks that halve the map begin with 1x1 convolutions with a stride of 2, and so need
    a quarter of what the block before them gives.
    """
    steps = list(steps)
    subsampled: dict[int, Step] = {}  # what goes before a step
    for i in reversed(range(len(steps))):
        step, number = steps[i], steps[i].output
        users = [j for j, user in enumerate(steps) if number in user.inputs]
        strides = {_left_out(steps[j], number) for j in users}
        if kind_of(step) is not FusedConv2d or number in needed or len(strides) != 1:
            continue
        if not _has_pairs(step.run.conv):
            continue
        (stride,) = strides
        if stride == (1, 1):
            continue
        for j in users:
            steps[j] = replace(steps[j], run=once(_with_stride, steps[j].run, (1, 1)))
        own, (down, across) = cast(Pair, step.run.conv.stride), stride
        run = once(_with_stride, step.run, (own[0] * down, own[1] * across))
        inputs = step.inputs
        if len(inputs) == 2:  # the second is added
            subsampled[i] = Step(nn.MaxPool2d(1, stride), inputs[1:], unused, step.by_image)
            inputs, unused = (inputs[0], unused), unused + 1
        steps[i] = replace(step, run=run, inputs=inputs)
    for i in sorted(subsampled, reverse=True):
        steps.insert(i, subsampled[i])
    return steps


def _left_out(user: Step, number: int) -> Pair:
    """The stride by which a step takes the pixels of a value, and no others; (1, 1) for all."""
    run = user.run
    if kind_of(user) is not FusedConv2d or number in user.inputs[1:] or not _has_pairs(run.conv):
        return 1, 1
    one_by_one = run.conv.weight.shape[2:] == (1, 1) and run.conv.padding == (0, 0)
    return cast(Pair, run.conv.stride) if one_by_one else (1, 1)


def _has_pairs(conv: nn.Conv2d) -> bool:
    """Whether its settings are pairs, and not one number for both axes or a padding's name."""
    return type(conv.stride) is type(conv.padding) is type(conv.dilation) is tuple


def _with_stride(fused: FusedConv2d, stride: Pair) -> FusedConv2d:
    conv = copy.copy(fused.conv)
    conv.stride = stride
    return FusedConv2d(conv, fused.norm, fused.activation, fused.mixed, fused.adds)


def _pads_inside(steps: list[Step], needed: set[int], once: Once) -> list[Step]:
    """Let a convolution, or the max pool of what isn't negative, pad by itself."""
    uses = Counter(i for step in steps for i in step.inputs) + Counter(needed)
    makers = {step.output: step for step in steps}
    gone: set[int] = set()
    result: list[Step] = []
    for step in steps:
        pad = makers.get(step.inputs[0]) if step.inputs else None
        if (
            pad is None
            or kind_of(pad) is not nn.ZeroPad2d
            or pad.run.value != 0  # which somebody may have set
            or uses[pad.output] != 1
        ):
            result.append(step)
            continue
        run: PaddingConv2d | nn.MaxPool2d | None = None
        if kind_of(step) is FusedConv2d:
            run = once(_padding_conv, pad.run, step.run)
        elif kind_of(step) is nn.MaxPool2d and _is_positive(makers.get(pad.inputs[0])):
            run = _padding_pool(pad.run, step.run)
        if run is not None:
            gone.add(pad.output)
            step = replace(step, run=run, inputs=(*pad.inputs, *step.inputs[1:]))
        result.append(step)
    return [step for step in result if step.output not in gone]


def _is_positive(step: Step | None) -> bool:
    """Whether what a step gives has no negative numbers."""
    return step is not None and kind_of(step) is FusedConv2d and step.run.kind != "none"


def _padding_pool(pad: nn.ZeroPad2d, pool: nn.MaxPool2d) -> nn.MaxPool2d | None:
    """A pool that pads by itself, with less than any number; None where it can't."""
    left, right, top, bottom = cast(tuple[int, ...], pad.padding)
    size, stride = (_pair(n) for n in (pool.kernel_size, pool.stride))
    usual = pool.padding in (0, (0, 0)) and pool.dilation in (1, (1, 1))
    fits = left == right and top == bottom and 0 <= 2 * left <= size[1] and 0 <= 2 * top <= size[0]
    if not (usual and fits) or pool.ceil_mode or pool.return_indices:
        return None
    return nn.MaxPool2d(size, stride, (top, left))


def _pair(number: Any) -> Pair:
    return (number, number) if isinstance(number, int) else number


def _padding_conv(pad: nn.ZeroPad2d, fused: FusedConv2d) -> PaddingConv2d | None:
    """The two as one; None where the convolution can't pad so, or takes longer then."""
    conv = fused.conv
    if conv.padding != (0, 0) or not _has_pairs(conv):
        return None
    left, right, top, bottom = cast(tuple[int, ...], pad.padding)
    padding = max(top, bottom), max(left, right)
    spans = zip(padding, conv.dilation, conv.weight.shape[2:], strict=True)
    uneven = max(abs(left - right), abs(top - bottom))
    depthwise = conv.groups == conv.in_channels and conv.dilation == (1, 1)
    if (
        min(left, right, top, bottom) < 0
        or any(p > d * (k - 1) for p, d, k in spans)  # a window of zeros alone
        or uneven > (1 if depthwise else 0)
    ):
        return None
    zeros = padding[1] - left, padding[1] - right, padding[0] - top, padding[0] - bottom
    grown = copy.copy(conv)
    grown.padding = padding
    return PaddingConv2d(fused, grown, pad, zeros)
