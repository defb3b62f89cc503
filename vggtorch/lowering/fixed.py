"""Steps of an inference engine: those of `fused.py` with weights that never change again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggtorch.lowering import kernels
from vggtorch.lowering.fused import FusedConv2d, FusedLinear, PreparedConv2d
from vggtorch.lowering.layer_modules import KerasLayer
from vggtorch.lowering.steps import Call


def with_fixed_weights(run: Any, dtype: torch.dtype | None) -> Any:
    """What a step runs with weights that don't change, in another dtype if one is named."""
    if isinstance(run, FusedConv2d):
        return FixedConv2d(run, dtype)
    if type(run) is FusedLinear:
        return FixedLinear(run, dtype)
    return Wide(run, dtype) if dtype is not None and _is_wide(run) else run


def _is_wide(run: Any) -> bool:
    """Whether it has numbers of its own in float32, or makes probabilities."""
    module = run.target if isinstance(run, Call) else run
    if not isinstance(module, nn.Module):
        return False
    wide = isinstance(module, KerasLayer | nn.Softmax | nn.LogSoftmax)
    return wide or any(True for _ in (*module.parameters(), *module.buffers()))


def cast_from(half: torch.dtype, value: Any) -> Any:
    """A tensor of this dtype in float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype == half else value


class Wide:
    """A step that computes in float32 among others that don't."""

    def __init__(self, run: Any, half: torch.dtype) -> None:
        self.run, self.half = run, half

    def __call__(self, *inputs: Any) -> Any:
        """What it gives for these inputs in float32."""
        return self.run(*(cast_from(self.half, x) for x in inputs))


class FixedConv2d(FusedConv2d):
    """A fused convolution whose weights are prepared once."""

    def __init__(self, fused: FusedConv2d, dtype: torch.dtype | None) -> None:
        modules = fused.conv, fused.norm, fused.activation
        mixed = fused.mixed or dtype is not None
        super().__init__(*modules, mixed, fused.adds, fused.workspace)
        self.fused, self.dtype = fused, dtype
        self.growth = self._growth()
        self.prepared: dict[torch.dtype, PreparedConv2d] = {}
        self.plain: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    def _dtype(self, x: Tensor) -> torch.dtype:
        return super()._dtype(x) if self.dtype is None else self.dtype

    def _made(self, settings: Any, *args: Any) -> tuple[Any, float, float]:
        dtype, options = args
        if dtype not in self.prepared:
            self.prepared[dtype] = self.prepared_in(dtype, options)
        return self.prepared[dtype], *self.growth

    def kernel_size(self) -> Sequence[int]:
        """As `fused` has it."""
        return self.fused.kernel_size()

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """As `fused` has them."""
        return self.fused.folded()

    def _one_by_one(self, *inputs: Tensor) -> Tensor:
        if self.dtype is None:
            return self.fused._one_by_one(*inputs)
        wide = (cast_from(self.dtype, x) for x in inputs)
        return self.fused._one_by_one(*wide).to(self.dtype)

    def is_plain(self, *inputs: Tensor) -> bool:
        """Whether `plainly` computes what calling it does, where the numbers are small enough."""
        like = inputs[0].to(self._dtype(inputs[0]))
        return self.takes(*inputs) and not self.prefers_winograd(like)

    def fold_for(self, x: Tensor) -> None:
        """Have ready what `plainly` takes for inputs such as x, which a graph is made of."""
        dtype = self._dtype(x)
        if dtype not in self.plain:
            self.plain[dtype] = self.folded_in(dtype)

    def plainly(self, x: Tensor, *others: Tensor) -> Tensor:
        """The same by torch's public functions, for a graph of which weight and bias are part."""
        dtype, conv = self._dtype(x), self.conv
        weight, bias = self.plain[dtype]
        if x.dtype != dtype or not x.is_contiguous(memory_format=torch.channels_last):
            x = x.to(dtype, memory_format=torch.channels_last)
        padding = cast(tuple[int, ...], conv.padding)
        y = F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)
        for other in others:
            y = y + other
        if self.kind == "relu6":
            return F.hardtanh(y, 0.0, 6.0)
        return F.relu(y) if self.kind == "relu" else y


class FixedLinear(FusedLinear):
    """A fused product (N, ..., in) to (N, ..., out) whose weight is prepared once.

    As it was it is no longer kept, because it is often most of a network.
    """

    def __init__(self, fused: FusedLinear, dtype: torch.dtype | None) -> None:
        super().__init__(fused.linear, fused.activation, fused.mixed)
        self.dtype = dtype
        self.prepared: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The product of the last axis, and the activation behind it."""
        if self.prepared is None:
            dtype = x.dtype if self.dtype is None else self.dtype
            fits = self.mixed or self.dtype is not None or dtype == self.linear.weight.dtype
            if not (fits and kernels.has_fused_ops(x, dtype)):
                return self._activated(self.linear(x))
            weight = kernels.prepared_linear_weight(self.linear.weight.to(dtype))
            bias = None if self.linear.bias is None else self.linear.bias.to(dtype)
            self.prepared = weight, bias
            del self.linear
        features, wanted_features = x.shape[-1], self.prepared[0].shape[1]
        if features != wanted_features:
            raise ValueError(f"Received {features} features; expected {wanted_features}.")
        if self.dtype is not None:
            x = x.to(self.dtype)
        elif x.dtype != self.prepared[0].dtype:
            wanted = self.prepared[0].dtype
            raise ValueError(f"Received {x.dtype}; expected {wanted}: cast it, x.to({wanted}).")
        return self._activated(kernels.linear(x, *self.prepared))
