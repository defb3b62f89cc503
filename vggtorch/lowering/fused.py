"""Steps that do the work of several modules at once, or of one in another way.

In inference a convolution, its batch norm, an addition and a ReLU are one kernel, for which the
weights are prepared once and anew when a parameter changes. In training a ReLU overwrites what it
gets, or follows the max pool behind it instead of going before it.
"""

# ruff: noqa: D102  (calling one does what its class says)
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggtorch.keras_graph import scale_and_shift
from vggtorch.lowering import kernels
from vggtorch.lowering.batch_norm import BatchNorm2d
from vggtorch.lowering.constants import ParameterCache
from vggtorch.lowering.kernels import Convolution, MaxPoolReLU, Product, ReusedMemory
from vggtorch.lowering.winograd import (
    GROWTH,
    WinogradConv2d,
    WinogradConvolution,
    Workspace,
    gradient_pays,
    pays,
)

# No sum of a convolution may come near the largest float32 (3.4e38), or its products could add up
# to infinities of both signs, which make NaN.
SAFE = 1e37
# Integers with as many bits as a floating-point number.
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
# On a CPU a product of mixed precision is in its weight's own dtype with fewer rows than this:
# reading a large weight takes longer than its product, and casting it and its gradient most.
MANY_ROWS = 128


def product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a convolution or product of x computes in: torch.autocast's choice, or its own dtype."""
    device = x.device.type
    if dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


def _is_rows(x: Tensor, linear: nn.Linear, mixed: bool) -> bool:
    """Whether x is rows that torch's product takes too."""
    return x.ndim == 2 and x.shape[1] == linear.weight.shape[1] and _fits(x, linear, mixed)


def _fits(x: Tensor, module: nn.Conv2d | nn.Linear, mixed: bool) -> bool:
    """Whether torch takes the dtype of x: that of the weight, unless something casts."""
    return mixed or x.dtype == module.weight.dtype or torch.is_autocast_enabled(x.device.type)


class PreparedConv2d:
    """A convolution's weight and bias as kernels want them, each form made when it is first needed.

    oneDNN likes one order best for one image and another for several; a kernel with the other's
    weight can take five times as long.
    """

    def __init__(
        self, fold: Callable[[], tuple[Tensor, Tensor | None]], options: tuple[Any, ...]
    ) -> None:
        self.fold, self.options = fold, options
        self.made: dict[Any, Any] = {}

    def for_onednn(self, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias for inputs of this shape (N, C, H, W)."""

        def make(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return kernels.prepared_weight(weight, shape, *self.options), bias

        made: tuple[Tensor, Tensor | None] = self._once(shape[0] == 1, make)
        return made

    def for_winograd(self, activation: str) -> WinogradConv2d:
        """The convolution Winograd's way, and this activation."""
        made: WinogradConv2d = self._once(activation, partial(WinogradConv2d, activation))
        return made

    def _once(self, key: Any, make: Callable[[Tensor, Tensor | None], Any]) -> Any:
        if key not in self.made:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                self.made[key] = make(*self.fold())
        return self.made[key]


class Bounded:
    """A step that wants to know how large the numbers in its inputs can be.

    It is called with these bounds, None where nobody knows, and returns its output's too.
    """

    def __call__(
        self, inputs: Sequence[Tensor], bounds: Sequence[float | None]
    ) -> tuple[Tensor, float | None]:
        raise NotImplementedError


# What a convolution computes in, its stride, padding, dilation and groups, and its constants.
_Form = tuple[torch.dtype, tuple[Any, ...], tuple["PreparedConv2d", float, float]]


class FusedConv2d(Bounded):
    """A convolution, and the batch norm, the addition and the ReLU or ReLU6 after it as one step.

    oneDNN's ReLU is max(x, 0), which makes 0 of NaN, where torch keeps NaN. So the fused step runs
    only where no NaN can come up: its inputs are finite, and so small that not even the largest sum
    of weights times them, before or after the batch norm, overflows. Otherwise the modules run one
    by one, and give what they give.

    Args:
        mixed: the convolution computes in its input's dtype, whatever its weight's.
        adds: there is a second input, which is added behind the batch norm.
        workspace: where it may compute Winograd's way, its memory for that.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: BatchNorm2d | None,
        activation: nn.Module | None,
        mixed: bool,
        adds: bool = False,
        workspace: Workspace | None = None,
    ) -> None:
        self.conv, self.norm, self.activation, self.mixed = conv, norm, activation, mixed
        self.adds, self.workspace = adds, workspace
        self.constants = ParameterCache(self._constants, self.parameters)
        # The form for the inputs of the present call that came last.
        self.known: tuple[object, Any, _Form | None] = None, None, None
        self.kind = {nn.ReLU: "relu", nn.ReLU6: "relu6", type(None): "none"}[type(activation)]

    def __call__(
        self, inputs: Sequence[Tensor], bounds: Sequence[float | None]
    ) -> tuple[Tensor, float | None]:
        """The output and a bound of its magnitude."""
        form = self._form(inputs)
        if form is None:
            return self._one_by_one(*inputs), None
        dtype, options, (prepared, gain, offset) = form
        x, *others = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in inputs)
        # The bounds of many layers multiply up, so numbers are looked at before they are too large.
        out = sum_bound(bounds, gain, offset)
        if not out < SAFE:
            out = sum_bound([float(magnitude(t)) for t in (x, *others)], gain, offset)
        if not out < SAFE:  # also where it is NaN
            return self._one_by_one(*inputs), None
        y = self._convolved(x, others, prepared, options, out)
        return y, min(out, 6.0) if self.kind == "relu6" else out

    def _form(self, inputs: Sequence[Tensor]) -> _Form | None:
        """How it computes inputs such as these; None where its modules run one by one."""
        call, key = self.constants.call.now, [(x.shape, x.dtype) for x in inputs]
        known_in, known, form = self.known
        if call is None or known_in is not call or known != key:
            form = None
            if self.takes(*inputs):
                conv, norm, dtype = self.conv, self.norm, self._dtype(inputs[0])
                options = conv.stride, conv.padding, conv.dilation, conv.groups
                eps = None if norm is None else norm.eps
                form = dtype, options, self._made((dtype, options, eps), dtype, options)
            self.known = call, key, form
        return form

    def parameters(self) -> list[Tensor]:
        """What its constants are made from."""
        # Which is faster than by its attribute; a weight elsewhere never gets here.
        tensors = [self.conv._parameters["weight"], self.conv.bias]
        if self.norm is not None:
            tensors += (*self.norm._parameters.values(), *self.norm._buffers.values())
        return [tensor for tensor in tensors if tensor is not None]

    def takes(self, x: Tensor, *others: Tensor) -> bool:
        """Whether these inputs are such as the fused step computes, whatever their numbers."""
        conv, norm, dtype = self.conv, self.norm, self._dtype(x)
        return (
            _is_usual(x, conv, self.mixed)
            and kernels.has_fused_ops(x, dtype)
            and all(self._is_like_output(other, x, dtype) for other in others)
            and (norm is None or not (norm.running_mean is None or norm.running_var is None))
            and (self.kind != "relu6" or _is_relu6(self.activation))
        )

    def _is_like_output(self, other: Tensor, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether what is to be added has the shape and dtype of the convolution's output for x."""
        conv = self.conv
        # conv.kernel_size is only what it was made with.
        sides: Any = x.shape[2:], self.kernel_size(), conv.stride, conv.padding, conv.dilation
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(*sides, strict=True)
        ]
        return other.dtype == dtype and list(other.shape) == [len(x), len(conv.weight), *size]

    def kernel_size(self) -> Sequence[int]:
        """Rows and columns of the kernel that it computes with."""
        return self.conv.weight.shape[2:]

    def _dtype(self, x: Tensor) -> torch.dtype:
        """What it computes in."""
        return product_dtype(x, x.dtype if self.mixed else self.conv.weight.dtype)

    def _made(self, settings: Any, *args: Any) -> tuple[Any, float, float]:
        """What `_constants` makes of the parameters as they are now."""
        made: tuple[Any, float, float] = self.constants(settings, *args)
        return made

    def _convolved(
        self, x: Tensor, others: list[Tensor], prepared: Any, options: Any, bound: float
    ) -> Tensor:
        """The output, no number of which is larger than the bound."""
        if bound * GROWTH < SAFE and self.prefers_winograd(x):
            return prepared.for_winograd(self.kind)(x, options[1], cast(Workspace, self.workspace))
        weight, bias = prepared.for_onednn(x.shape)
        other = others[0] if others else None
        stride, padding, dilation, groups = options
        return kernels.conv2d(x, weight, bias, stride, padding, dilation, groups, self.kind, other)

    def prefers_winograd(self, x: Tensor) -> bool:
        """Whether it may compute Winograd's way and is faster so, x being in its dtype."""
        return self.workspace is not None and not self.adds and pays(self.conv, x)

    def _one_by_one(self, x: Tensor, *others: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        y = y if self.norm is None else self.norm(y)
        for other in others:
            y = y + other
        return y if self.activation is None else self.activation(y)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight (O, I, H, W) and bias, in which batch norm is a scale of one and a shift."""
        weight, bias, norm = self.conv.weight.detach(), self.conv.bias, self.norm
        if norm is not None:
            mean, variance = norm.running_mean, norm.running_var
            assert mean is not None and variance is not None
            scale, bias = scale_and_shift(
                mean if bias is None else mean - bias, variance, norm.eps, norm.weight, norm.bias
            )
            weight = weight * scale.reshape(-1, 1, 1, 1)
        return weight, None if bias is None else bias.detach()

    def folded_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The same in another dtype."""
        weight, bias = self.folded()
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def _constants(
        self, dtype: torch.dtype, options: tuple[Any, ...]
    ) -> tuple[PreparedConv2d, float, float]:
        """The folded weight and bias, prepared; and how much an output can be.

        At most the first number times the largest input, plus the second, of the convolution itself
        and behind the batch norm.
        """
        return self.prepared_in(dtype, options), *self._growth()

    def prepared_in(self, dtype: torch.dtype, options: tuple[Any, ...]) -> PreparedConv2d:
        """The folded weight and bias, to be prepared when inputs are known."""
        return PreparedConv2d(lambda: self.folded_in(dtype), options)

    def _growth(self) -> tuple[float, float]:
        """`_constants`' two numbers."""
        gain, offset = _gain(self.conv.weight.detach()), _largest(self.conv.bias)
        if self.norm is not None:
            weight, bias = self.folded()
            gain, offset = gain + _gain(weight), offset + _largest(bias)
        return gain, offset


class PaddingConv2d(FusedConv2d):
    """A fused convolution that pads by itself, both sides alike.

    Where one side needs a pixel less, the kernel of a depthwise convolution is larger by a row or
    column of zeros on that side.

    Args:
        apart: the convolution of what `pad` gives.
        conv: the same with its own padding.
        pad: what goes before it.
        zeros: how many columns are put to the left and right of the kernel, and rows to its top and
            bottom.
    """

    def __init__(
        self, apart: FusedConv2d, conv: nn.Conv2d, pad: nn.ZeroPad2d, zeros: tuple[int, ...]
    ) -> None:
        modules = conv, apart.norm, apart.activation
        super().__init__(*modules, apart.mixed, apart.adds, apart.workspace)
        self.apart, self.pad, self.zeros = apart, pad, zeros

    def kernel_size(self) -> Sequence[int]:
        high, wide = super().kernel_size()
        left, right, top, bottom = self.zeros
        return top + high + bottom, left + wide + right

    def folded(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = super().folded()
        return F.pad(weight, self.zeros), bias

    def _one_by_one(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.apart._one_by_one(self.pad(x), *others)


def _is_usual(x: Tensor, conv: nn.Conv2d, mixed: bool) -> bool:
    """Whether a convolution of x is one that our kernels compute as the module does."""
    return (
        x.ndim == 4
        and len(x) > 0
        and x.shape[1] == conv.weight.shape[1] * conv.groups
        and conv.padding_mode == "zeros"
        # Else one number stands for both axes, or a word for a padding.
        and type(conv.stride) is type(conv.padding) is type(conv.dilation) is tuple
        and _fits(x, conv, mixed)
    )


def _is_relu6(activation: Any) -> bool:
    """Whether an nn.ReLU6 still has its limits."""
    return (activation.min_val, activation.max_val) == (0, 6)


def sum_bound(bounds: Sequence[float | None], gain: float, offset: float) -> float:
    """How large an output can be for inputs with these bounds, the first one convolved."""
    first, *others = (math.inf if bound is None else bound for bound in bounds)
    return first * gain + offset + sum(others)


def magnitude(x: Tensor) -> Tensor:
    """The largest magnitude in x (N, C, H, W), NaN if there is one."""
    low, high = torch.aminmax(x.permute(0, 2, 3, 1))  # NHWC, in the order of its memory
    return torch.maximum(-low, high)


def _gain(weight: Tensor) -> float:
    """The largest sum of magnitudes of one output's weights, which NaN and infinity stay in."""
    return float(weight.abs().sum((1, 2, 3), dtype=torch.float64).max())


def _largest(bias: Tensor | None) -> float:
    return 0.0 if bias is None else float(bias.abs().max())


class PairMaxPool2d(Bounded):
    """A 2x2 max pool behind a ReLU, as maxima of two rows and then of two columns.

    torch's pool notes where each maximum was, which only gradients need, and in bfloat16 makes
    floats of all numbers. Those that are finite and not negative are in the order of their bits,
    so integers are compared here.
    """

    def __init__(self, pool: nn.MaxPool2d) -> None:
        self.pool = pool

    @staticmethod
    def takes(pool: nn.MaxPool2d) -> bool:
        """Whether it is a pool of separate 2x2 windows, and nothing else."""
        return (
            pool.kernel_size in (2, (2, 2))
            and pool.stride in (2, (2, 2))
            and pool.padding in (0, (0, 0))
            and pool.dilation in (1, (1, 1))
            and not (pool.ceil_mode or pool.return_indices)
        )

    def __call__(
        self, inputs: Sequence[Tensor], bounds: Sequence[float | None]
    ) -> tuple[Tensor, float | None]:
        (x,), (bound,) = inputs, bounds
        integers = INTEGERS.get(x.dtype)
        # Only of what a convolution has given of images is a bound known.
        if integers is None or bound is None or min(x.shape[2:]) < 2:
            return self.pool(x), bound
        bits = x.permute(0, 2, 3, 1).view(integers)
        high, wide = x.shape[2] // 2, x.shape[3] // 2
        rows = bits[:, : 2 * high, : 2 * wide].unflatten(1, (high, 2))
        columns = torch.maximum(rows[:, :, 0], rows[:, :, 1]).unflatten(2, (wide, 2))
        largest = torch.maximum(columns[:, :, :, 0], columns[:, :, :, 1])
        return largest.view(x.dtype).permute(0, 3, 1, 2), bound


class FusedLinear:
    """A product as a step of inference; its ReLU overwrites what was computed."""

    def __init__(self, linear: nn.Linear, activation: nn.Module | None, mixed: bool) -> None:
        self.linear, self.activation, self.mixed = linear, activation, mixed

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        linear, own = self.linear, self.linear.weight.dtype
        dtype = product_dtype(x, x.dtype if self.mixed else own)
        if _is_rows(x, linear, self.mixed) and kernels.has_fused_ops(x, dtype):
            # To cast the weight takes longer than a few rows do with it as it is.
            few = kernels.has_fused_ops(x, own) and len(x) < MANY_ROWS
            inside = own if few else dtype
            bias = None if linear.bias is None else linear.bias.to(inside)
            y = kernels.linear(x.to(inside), linear.weight.to(inside), bias).to(dtype)
        else:
            y = linear(x)
        return self._activated(y)

    def _activated(self, y: Tensor) -> Tensor:
        if self.activation is None:
            return y
        return F.relu_(y) if type(self.activation) is nn.ReLU else self.activation(y)


class TrainedConv2d:
    """A convolution that learns, by the gradients of kernels.py, or by Winograd's.

    Args:
        workspace: where it may compute Winograd's way, its memory for that.
    """

    def __init__(self, conv: nn.Conv2d, mixed: bool, workspace: Workspace | None = None) -> None:
        self.conv, self.mixed, self.workspace = conv, mixed, workspace

    def __call__(self, x: Tensor) -> Tensor:
        conv = self.conv
        dtype = product_dtype(x, x.dtype if self.mixed else conv.weight.dtype)
        usual = _is_usual(x, conv, self.mixed) and kernels.supports_training(x, dtype)
        if conv.bias is None or not usual:
            y: Tensor = conv(x)
            return y
        options = conv.stride, conv.padding, conv.dilation, conv.groups
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        weight, bias = conv.weight.to(dtype), conv.bias.to(dtype)
        if self.workspace is not None and gradient_pays(conv, x):
            images = pays(conv, x)
            return WinogradConvolution.apply(x, weight, bias, options[1], self.workspace, images)
        return Convolution.apply(x, weight, bias, *options)


class TrainedLinear:
    """A product that learns, by the gradients of kernels.py."""

    def __init__(self, linear: nn.Linear, mixed: bool) -> None:
        self.linear, self.mixed = linear, mixed
        self.gradients = ReusedMemory()

    def __call__(self, x: Tensor) -> Tensor:
        linear, own = self.linear, self.linear.weight.dtype
        dtype = product_dtype(x, x.dtype if self.mixed else own)
        rows = _is_rows(x, linear, self.mixed)
        few = rows and len(x) < MANY_ROWS and kernels.supports_training(x, own)
        inside = own if few else dtype
        if not (rows and kernels.supports_training(x, inside)):
            y: Tensor = linear(x)
            return y
        bias = None if linear.bias is None else linear.bias.to(inside)
        weight = linear.weight.to(inside)
        return Product.apply(x.to(inside), weight, bias, self.gradients).to(dtype)


class OverwritingReLU:
    """A ReLU that overwrites its input, which nobody else needs."""

    def __call__(self, x: Tensor) -> Tensor:
        return F.relu_(x)


class ReLUPool2d:
    """A ReLU and the max pool after it, pooled first; x is (N, C, H, W)."""

    def __init__(self, relu: nn.ReLU, pool: nn.MaxPool2d) -> None:
        self.relu, self.pool = relu, pool

    def __call__(self, x: Tensor) -> Tensor:
        pool = self.pool
        if x.ndim != 4 or pool.return_indices or pool.ceil_mode or pool.dilation not in (1, (1, 1)):
            y: Tensor = pool(self.relu(x))
            return y
        return MaxPoolReLU.apply(x, pool.kernel_size, pool.stride, pool.padding)[0]
