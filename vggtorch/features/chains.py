"""Frozen convolutions, ReLUs and max pools in a row, as one step with a backward of its own.

Forward runs the kernels of inference. For the gradient of the input it keeps its output, a byte for
each value that another ReLU has looked at and four for each window of a pool, and backward writes
over what nobody else has seen.
"""

# ruff: noqa: D102  (forward and backward do what their class says)
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggtorch.lowering import (
    BatchNorm2d,
    FusedConv2d,
    PreparedConv2d,
    Workspace,
    conv2d,
    finite,
    has_fused_ops,
    prepared_weight,
    stands_for_many,
)

# What can be in a chain, in the order of a unit; a batch norm only behind a convolution.
KINDS = (nn.Conv2d, BatchNorm2d, nn.ReLU, nn.MaxPool2d)
PIECE = 1 << 18  # numbers that are still in the cache when they are used again


def pair(value: Any) -> tuple[int, int]:
    """A setting of torch's layers, which may be one number for both directions."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def can_freeze(conv: nn.Conv2d) -> bool:
    """Whether a convolution has nothing to learn, zeros around its input, and usual settings."""
    bias = conv.bias is not None and conv.bias.requires_grad
    pairs = type(conv.stride) is type(conv.padding) is type(conv.dilation) is tuple
    return conv.padding_mode == "zeros" and pairs and not (bias or conv.weight.requires_grad)


def has_disjoint_windows(pool: nn.MaxPool2d) -> bool:
    """Whether each value is in one window of a pool at most."""
    window = pair(pool.kernel_size)
    return (
        pair(pool.stride) == window
        and pair(pool.padding) == (0, 0)
        and pair(pool.dilation) == (1, 1)
        and not (pool.ceil_mode or pool.return_indices)
    )


class FrozenConv2d:
    """A convolution and the batch norm behind it, and the convolution that is its gradient."""

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: BatchNorm2d | None,
        relu: nn.ReLU | None,
        workspace: Workspace | None,
    ) -> None:
        """`workspace`: where both may be computed Winograd's way, the memory for that."""
        self.conv, self.norm = conv, norm
        self.forward = FusedConv2d(conv, norm, relu, mixed=False, workspace=workspace)
        # A weight, and the constants of `forward` that it was made for.
        self.kept: tuple[Any, Any] = None, None

    def __call__(self, x: Tensor, bound: float | None) -> tuple[Tensor, float | None]:
        """As FusedConv2d has it."""
        self.forward.constants.call.now = object()
        return self.forward([x], [bound])

    @torch.no_grad()
    def gradient(self, shape: torch.Size, of_output: torch.Size) -> Callable[[Tensor], Tensor]:
        """The gradient of an input of this shape from that of the output, with the weight now."""
        conv: Any = self.conv
        constants, workspace = self.forward.constants, self.forward.workspace
        options = conv.stride, conv.padding, conv.dilation, conv.groups
        # Padding of the gradient with which the flipped kernel gives one of the input's size.
        sides = zip(conv.dilation, conv.weight.shape[2:], conv.padding, strict=True)
        around = tuple(d * (k - 1) - p for d, k, p in sides)
        flips = conv.stride == (1, 1) and conv.groups == 1 and min(around) >= 0
        if flips:  # the convolution that is the gradient
            options = (1, 1), around, conv.dilation, 1
        made, (of, weight) = constants.made, self.kept
        if made is None or made is not of:
            weight = self.forward.folded()[0]
            if flips:
                flipped = weight.transpose(0, 1).flip(2, 3).contiguous()
                if workspace is None:
                    weight = prepared_weight(flipped, of_output, *options)
                else:
                    weight = PreparedConv2d(lambda: (flipped, None), options)
            elif self.norm is None:  # backward is to have what forward had
                weight = weight.clone()
            self.kept = made, weight

        def of_input(grad: Tensor) -> Tensor:
            grad = grad.contiguous(memory_format=torch.channels_last)
            if not flips:
                return convolution_gradient(grad, weight, shape, options)
            prepared = weight
            if workspace is not None:
                if self.forward.prefers_winograd(grad):
                    by_winograd = weight.for_winograd("none")(grad, around, workspace)
                    if finite(by_winograd) is not None:
                        return cast(Tensor, by_winograd)
                prepared, _ = weight.for_onednn(grad.shape)
            return conv2d(grad, prepared, None, *options)

        return of_input


@dataclass
class Unit:
    """A convolution, or none, and what follows it: a ReLU, a max pool, or a pool behind a ReLU."""

    conv: FrozenConv2d | None
    relu: nn.ReLU | None = None
    pool: nn.MaxPool2d | None = None


def units_of(children: Sequence[nn.Module], workspace: Workspace | None = None) -> list[Unit]:
    """Modules of KINDS in a row as units, in which convolutions may go Winograd's way."""
    units: list[Unit] = []
    left = list(children)
    while left:
        conv, norm, relu, pool = (
            left.pop(0) if left and type(left[0]) is kind else None for kind in KINDS
        )
        # Pooled first, a ReLU has a quarter of the work and keeps a quarter.
        inside = relu if pool is None else None
        both = FrozenConv2d(conv, norm, inside, workspace) if conv else None  # type: ignore
        units.append(Unit(both, relu, pool))  # type: ignore
    return units


def takes(children: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether the modules can be a chain and are frozen, and the kernels take them and x."""
    if not all(type(child) in KINDS for child in children):
        return False
    if len(children) == 1 and not isinstance(children[0], nn.Conv2d):  # no work to save
        return False
    if x.ndim != 4 or len(x) == 0 or not has_fused_ops(x, x.dtype):
        return False
    channels, before = x.shape[1], None
    for child in children:
        if isinstance(child, nn.Conv2d):
            fits = can_freeze(child) and child.weight.shape[1] * child.groups == channels
            channels = child.weight.shape[0]
        elif isinstance(child, BatchNorm2d):
            mean = child.running_mean
            fits = before is nn.Conv2d and not child.learns
            fits = fits and mean is not None and len(mean) == channels
            fits = fits and not any(p.requires_grad for p in child.parameters())
        elif isinstance(child, nn.MaxPool2d):
            fits = has_disjoint_windows(child)
        else:
            fits = not child.inplace  # what a ReLU overwrites may be a tap
        tensors = (*child._parameters.values(), *child._buffers.values())
        if not (fits and all(t is None or _goes_with(t, x) for t in tensors)):
            return False
        before = type(child)
    return True


def _goes_with(t: Tensor, x: Tensor) -> bool:
    """Whether a parameter or buffer is torch's own, and of the device and dtype of x."""
    plain = type(t) in (Tensor, nn.Parameter) and t.device == x.device
    return plain and (t.dtype == x.dtype or not t.is_floating_point())


class Chain(torch.autograd.Function):
    """Units in a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, units: list[Unit], children: Any) -> Tensor:  # type: ignore[override]
        ctx.units, ctx.children, ctx.gradients = units, children, []
        kept, y, bound = [x], x, None
        for unit in units:
            shape, of_conv = y.shape, None
            if unit.conv is not None:
                y, bound = unit.conv(y, bound)
                of_conv = unit.conv.gradient(shape, y.shape)
            pooled = y.shape
            if unit.pool is not None:
                y, places = F.max_pool2d(y, pair(unit.pool.kernel_size), return_indices=True)
                kept.append(places.to(torch.int32))
            if unit.relu is not None:
                if unit.pool is not None:
                    y.relu_()
                elif unit.conv is None:
                    y = y.relu()
                # NaN isn't stopped and passes its gradient on, as in torch's ReLU.
                kept.append(y if unit is units[-1] else y <= 0)
            ctx.gradients.append((of_conv, pooled))
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, *kept = ctx.saved_tensors
        # With create_graph=True this gradient is to have one.
        if torch.is_grad_enabled() or stands_for_many(grad):
            (of_x,) = torch.func.vjp(partial(_one_by_one, ctx.children), x)[1](grad)
            return of_x, None, None
        pairs = zip(reversed(ctx.units), reversed(ctx.gradients), strict=True)
        for unit, (of_conv, pooled) in pairs:
            if unit.relu is not None and unit is ctx.units[-1]:
                y, given = kept.pop(), grad
                grad = given.contiguous(memory_format=torch.channels_last)
                of_y = torch.empty_like(y) if grad.data_ptr() == given.data_ptr() else grad
                grad = torch.ops.aten.threshold_backward.grad_input(grad, y, 0, grad_input=of_y)
            elif unit.relu is not None:
                _stop_(grad, kept.pop())
            if unit.pool is not None:
                grad = pool_gradient(grad, kept.pop(), pooled, pair(unit.pool.kernel_size))
            if of_conv is not None:
                grad = of_conv(grad)
        return grad, None, None


def _one_by_one(children: Sequence[nn.Module], x: Tensor) -> Tensor:
    for child in children:
        x = child(x)
    return x


def _stop_(grad: Tensor, stopped: Tensor) -> None:
    """Write 0 over a gradient wherever it is stopped; both channels-last.

    A few numbers at a time, for which masks are numbers in the cache: torch's masked_fill_ takes
    six times as long.
    """
    flat, where = (x.permute(0, 2, 3, 1) for x in (grad, stopped))
    if not (flat.is_contiguous() and where.is_contiguous()):
        grad.masked_fill_(stopped, 0)
        return
    for some, mask in zip(flat.view(-1).split(PIECE), where.view(-1).split(PIECE), strict=True):
        numbers = mask.view(torch.uint8).to(some.dtype).neg_()
        torch.ops.aten.threshold_backward.grad_input(some, numbers, -0.5, grad_input=some)


def convolution_gradient(
    grad: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    options: Sequence[Any],
    layout: torch.memory_format = torch.channels_last,
) -> Tensor:
    """The gradient of a convolution's input; `options` are stride, padding, dilation, groups."""
    # Of x torch looks at the shape and the layout alone, so its memory is never touched.
    x = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
    *sizes, groups = options
    of_x, _, _ = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *sizes, False, (0, 0), groups, (True, False, False)
    )
    return cast(Tensor, of_x)


def pool_gradient(
    grad: Tensor,
    places: Tensor,
    shape: Sequence[int],
    window: tuple[int, int],
    layout: torch.memory_format = torch.channels_last,
) -> Tensor:
    """The gradient of the input of a max pool, of this shape, by the places of the largest."""
    x = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)  # as above
    of_x = torch.ops.aten.max_pool2d_with_indices_backward(
        grad, x, window, window, (0, 0), (1, 1), False, places.long()
    )
    return cast(Tensor, of_x)
