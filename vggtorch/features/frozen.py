"""The gradient of frozen layers to their input, from a quarter of the memory.

torch keeps every activation for backward, also where only the input's gradient is asked for. That
one needs less: of a convolution its weight, of a ReLU which values were positive, of a max pool
where in each window the largest stood.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules


def with_little_kept(network: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same network on the same children, whose backward keeps less where they are frozen."""
    root: dict[str, nn.Module] = {}
    for node in network.graph.nodes:
        if node.op == "call_module":
            root[str(node.target)] = _Frozen(network, str(node.target))
    attributes = {
        str(node.target): getattr(network, str(node.target))
        for node in network.graph.nodes
        if node.op == "get_attr"
    }
    return torch.fx.GraphModule(root | attributes, network.graph)


class _Frozen(nn.Module):
    """A child as it stands in the network at each call, by a gradient of our own if it has one."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.name = name
        object.__setattr__(self, "network", network)  # not a child of its own child

    def forward(self, *values: Tensor) -> Any:
        network: Any = self.network
        child = network.get_submodule(self.name)
        if len(values) == 1 and _is_plain(child):
            (x,) = values
            if type(child) is nn.Conv2d and _can_freeze(child):
                options = child.stride, child.padding, child.dilation, child.groups
                return _Convolution.apply(x, child.weight, child.bias, *options)
            if type(child) is nn.ReLU and not child.inplace:
                return _ReLU.apply(x)
            if type(child) is nn.MaxPool2d and _has_disjoint_windows(child):
                return _MaxPool.apply(x, _pair(child.kernel_size))
        return child(*values)


def _is_plain(child: nn.Module) -> bool:
    """Whether nobody looks on when this module runs."""
    hooks = (
        child._forward_hooks,
        child._forward_pre_hooks,
        child._backward_hooks,
        child._backward_pre_hooks,
    )
    return not (any(hooks) or torch_modules._has_any_global_hook())


def _can_freeze(conv: nn.Conv2d) -> bool:
    bias = conv.bias is not None and conv.bias.requires_grad
    zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return zeros and not (bias or conv.weight.requires_grad)


def _has_disjoint_windows(pool: nn.MaxPool2d) -> bool:
    window = _pair(pool.kernel_size)
    return (
        _pair(pool.stride) == window
        and _pair(pool.padding) == (0, 0)
        and _pair(pool.dilation) == (1, 1)
        and not (pool.ceil_mode or pool.return_indices)
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _layout(x: Tensor) -> torch.memory_format:
    nhwc = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format


class _Convolution(torch.autograd.Function):
    """conv2d of frozen weights."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        return F.conv2d(x, weight, bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, *ctx.options = inputs
        ctx.shape, ctx.layout = x.shape, _layout(x)
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        # Of x torch looks at the shape and the layout alone, so its memory is never touched.
        x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.layout)
        of_x, _, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, _pair(stride), _pair(padding), _pair(dilation), False, (0, 0),
            groups, (True, False, False),
        )  # fmt: skip
        return of_x, None, None, None, None, None, None


class _ReLU(torch.autograd.Function):
    """ReLU, of which a byte for each value is kept."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = torch.relu(x)
        return y, y <= 0  # NaN is not, and passes its gradient on, as torch's does

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Tensor:  # type: ignore[override]
        (stopped,) = ctx.saved_tensors
        return grad.masked_fill(stopped, 0)

    @classmethod
    def apply(cls, x: Tensor) -> Tensor:
        """The values alone."""
        return super().apply(x)[0]


class _MaxPool(torch.autograd.Function):
    """A max pool whose windows don't overlap, of which two bytes for each window are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[int, int]) -> Tensor:  # type: ignore[override]
        y, places = F.max_pool2d(x, window, return_indices=True)
        ctx.shape, ctx.window, ctx.layout = x.shape, window, _layout(x)
        # How far the largest value is from its window's first one.
        farthest = (window[0] - 1) * x.shape[3] + window[1] - 1
        dtype = torch.int16 if farthest < 2**15 else torch.int32
        ctx.save_for_backward((places - _first_places(y, x.shape[3], window)).to(dtype))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        places = inside + _first_places(grad, ctx.shape[3], ctx.window)
        x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.layout)
        of_x = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, x, ctx.window, ctx.window, (0, 0), (1, 1), False, places
        )
        return of_x, None


def _first_places(y: Tensor, width: int, window: tuple[int, int]) -> Tensor:
    """Where the window of each value of y (N, C, H, W) begins, in a map of this width; (H, W)."""
    rows = torch.arange(y.shape[2], device=y.device)[:, None] * (window[0] * width)
    return rows + torch.arange(y.shape[3], device=y.device) * window[1]
