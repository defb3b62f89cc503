"""What torch can compute faster than its public functions and its autograd do.

oneDNN's convolution and product take bias and ReLU along, but torch keeps them private; where they
are missing, or don't take an input, `has_fused_ops` says so, and callers use torch's own functions.
"""

# ruff: noqa: D102  (forward and backward do what their class says)
from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

# glibc maps allocations of this size and unmaps them when they are freed, so each one faults its
# pages in again (its largest threshold for mmap, see `man mallopt`).
LARGE_BYTES = 32 << 20
# A large product is computed in pieces of about this size, each of which stays in the cache.
PIECE_BYTES = 8 << 20


def is_intercepted() -> bool:
    """Whether a compiler, a mode that sees each function or a functorch transform is active."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or _modes_of_functions() > 0
        or torch._C._functorch.maybe_current_level() is not None  # torch.func
        or forward_ad._current_level >= 0
    )


def _modes_of_functions() -> int:
    """How many modes see each function, but for torch.device, which changes new tensors alone."""
    count = torch._C._len_torch_function_stack()
    if count and type(torch._C._get_function_stack_at(0)) is DeviceContext:
        count -= 1
    return count


def stands_for_many(x: Tensor) -> bool:
    """Whether vmap, or autograd's is_grads_batched, has put one tensor in the place of many."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(x) or functorch.is_legacy_batchedtensor(x)


@functools.cache
def _onednn() -> bool:
    """Whether this torch has oneDNN's fused convolution and product."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.aten, "mkldnn_reorder_conv2d_weight")
    )


def has_fused_ops(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether oneDNN's fused operations take this input."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.enabled or not _onednn():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def supports_training(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether `Convolution` and `Product` take this input."""
    # Call len(x) last: under a compiler it would fix the batch size.
    return not is_intercepted() and len(x) > 0 and has_fused_ops(x, dtype)


# Inference on a CPU


def prepared_weight(
    weight: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """A weight (O, I, H, W) in the order that oneDNN likes best for inputs of this shape.

    The shape's batch and size are hints: the weight is right for all.
    """
    return torch.ops.aten.mkldnn_reorder_conv2d_weight(
        weight.to_mkldnn(), padding, stride, dilation, groups, shape
    )


def prepared_linear_weight(weight: Tensor) -> Tensor:
    """A weight (out, in) in the order that oneDNN likes best, for inputs of any batch."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


# Activations as oneDNN knows them: a name and its numbers.
_ACTIVATIONS: dict[str, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
}


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
    other: Tensor | None = None,
) -> Tensor:
    """Convolution, bias, a tensor to add and activation in one; no gradients.

    The activation is "none", "relu" or "relu6", which alone has no addition before it.
    """
    name, numbers = _ACTIVATIONS[activation]
    options = padding, stride, dilation, groups
    bias = _in_a_row(bias)
    if other is None:
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *options, name, numbers, "")
    if other.is_contiguous() and other.is_contiguous(memory_format=torch.channels_last):
        # Maps of one pixel or one channel, in either layout, are refused by torch 2.11.
        y = conv2d(x, weight, bias, stride, padding, dilation, groups).add_(other)
        return y if activation == "none" else y.relu_()
    unary = None if activation == "none" else name
    return torch.ops.mkldnn._convolution_pointwise.binary(
        x, other, weight, bias, *options, "add", 1.0, unary, numbers, ""
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """The same for x (N, in) times weight (out, in)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, _in_a_row(bias), activation, [], "")


def _in_a_row(bias: Tensor | None) -> Tensor | None:
    """A bias as oneDNN reads it, which doesn't look at its stride."""
    return None if bias is None else bias.contiguous()


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return linear(a, b.t(), None)  # in whatever order the numbers are: a copy would take longer


# torch.jit is deprecated; where it is missing, nothing is compiled.
_JIT: Any = getattr(torch, "jit", None)
_COMPILING = threading.Lock()  # whether torch.jit hands graphs to oneDNN is one switch for all


@functools.cache
def _has_graphs() -> bool:
    """Whether this torch has what `compiled` needs."""
    names = (
        "_get_trace_graph", "enable_onednn_fusion", "last_executed_optimized_graph",
        "onednn_fusion_enabled",
    )  # fmt: skip
    has_functions = hasattr(torch._C, "_create_function_from_graph")
    return _onednn() and has_functions and all(hasattr(_JIT, name) for name in names)


def compiled(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Callable[..., Any] | None:
    """A function of tensors, prepared by oneDNN for inputs with these shapes, dtypes and strides.

    oneDNN's operations above choose their kernel anew at each call; in a graph they have done so.
    What the function holds besides its inputs becomes part of it. None where this torch can't.
    """
    if not (_has_graphs() and torch.backends.mkldnn.enabled):
        return None
    with _COMPILING, torch.no_grad():
        before = _JIT.onednn_fusion_enabled()
        _JIT.enable_onednn_fusion(True)
        try:
            graph = _JIT._get_trace_graph(function, tuple(inputs))[0]
            # Not by torch.jit.trace, whose functions stay in memory as long as torch does.
            made: Callable[..., Any] = torch._C._create_function_from_graph("steps", graph)
            made(*inputs)  # It notes the shapes, and at the next call is compiled for them.
            made(*inputs)
            kinds = {node.kind() for node in _JIT.last_executed_optimized_graph().nodes()}
        except RuntimeError:  # what can't be traced
            return None
        finally:
            _JIT.enable_onednn_fusion(before)
    return made if "prim::oneDNNFusionGuard" in kinds else None


# Training, by gradients of our own


class Convolution(torch.autograd.Function):
    """torch's conv2d with bias; the bias's gradient is a sum of its own in backward.

    oneDNN's, which computes the weight's along with it, takes many times as long.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, *options: Any) -> Tensor:
        """`options`: stride, padding, dilation and groups, as conv2d takes them."""
        return F.conv2d(x, weight, bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, *ctx.options = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        of_both = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups,
            (of_x, of_weight, False),
        )  # fmt: skip
        return (*of_both[:2], grad.sum((0, 2, 3)) if of_bias else None, None, None, None, None)


class MaxPoolReLU(torch.autograd.Function):
    """relu(max_pool2d(x)), which is max_pool2d(relu(x)) with a fraction of the work; on any device.

    Backward takes nothing of x: a network need not keep what goes into its pools.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        """`options`: size, stride and padding, as max_pool2d takes them. Also returns indices."""
        y, indices = F.max_pool2d(x, *options, return_indices=True)
        return y.relu_(), indices

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, *ctx.options = inputs
        ctx.save_for_backward(*output)
        ctx.mark_non_differentiable(output[1])
        nhwc = x.is_contiguous(memory_format=torch.channels_last)
        ctx.layout = torch.channels_last if nhwc else torch.contiguous_format
        ctx.shape = x.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        y, indices = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        of_x = torch.empty(ctx.shape, dtype=y.dtype, device=y.device, memory_format=ctx.layout)
        operation = torch.ops.aten.max_pool2d_with_indices_backward
        # Of x torch wants shape and layout alone, which its gradient has too.
        arguments = grad, of_x, *ctx.options, (1, 1), False, indices
        if not torch.is_grad_enabled():  # which `grad_input` has no gradient for
            with suppress(RuntimeError):  # nor has it room where grad stands for many, as in vmap
                return operation.grad_input(*arguments, grad_input=of_x), None, None, None
        return operation(*arguments), None, None, None


class ReusedMemory:
    """Memory for a large tensor that is made again and again, such as a kernel's gradient.

    Taking it from the system page by page and giving it back takes longer than computing the
    gradient of a VGG's fc1 into it. It is lent to one tensor at a time, and is free again when no
    tensor, gradient or view has it any more.
    """

    def __init__(self) -> None:
        self.memory: Any = None  # a numpy array, because whoever uses one can be counted
        self.users = 0
        self.lock = threading.Lock()

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """An uninitialised tensor; None while the last one is in use."""
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        with self.lock:
            if self.memory is None or self.memory.nbytes != nbytes:
                self.memory = torch.empty(nbytes, dtype=torch.uint8, device="cpu").numpy()
                self.users = sys.getrefcount(self.memory)
            elif sys.getrefcount(self.memory) > self.users:
                return None
            return torch.from_numpy(self.memory).view(dtype).view(shape)

    def release(self) -> None:
        """Let go of the memory, until it is asked for again."""
        with self.lock:
            self.memory = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ReusedMemory, ()  # a copy has memory of its own, when it needs it


class Product(torch.autograd.Function):
    """x (N, in) times weight (out, in) plus bias by oneDNN, which is faster than torch's product.

    `memory` is for the weight's gradient.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, memory: ReusedMemory) -> Tensor:
        return linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.memory = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        # oneDNN's product has no gradient of its own, which create_graph=True would need.
        once = not torch.is_grad_enabled()
        product = _matmul if once else torch.matmul
        weight_grad = None
        if of_weight:
            if once and weight.nbytes >= LARGE_BYTES:
                weight_grad = _in_memory(ctx.memory, grad.t(), x)
            if weight_grad is None:
                weight_grad = product(grad.t(), x)
        return (
            product(grad, weight) if of_x else None,
            weight_grad,
            grad.sum(0) if of_bias else None,
            None,
        )


def _in_memory(memory: ReusedMemory, a: Tensor, b: Tensor) -> Tensor | None:
    """The product of two matrices; None where it can't be in this memory.

    oneDNN's product can't be told where to put what it computes, so it goes there piece by piece,
    each still in the cache. torch.mm can, but takes longer than product and copy.
    """
    whole = memory.lend((len(a), b.shape[1]), a.dtype)
    if whole is None:
        return None
    rows = max(1, PIECE_BYTES // whole[0].nbytes)
    try:
        for rows_of_a, piece in zip(a.split(rows), whole.split(rows), strict=True):
            piece.copy_(_matmul(rows_of_a, b))
    except RuntimeError:  # a or b stands for many, as under vmap
        return None
    return whole
