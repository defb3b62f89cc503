"""The steps of inference: a convolution, its batch norm and its activation are one kernel.

So are Dense and its ReLU. What is constant is prepared once, and anew when a parameter changes.
"""

# ruff: noqa: D102  (calling one does what its class says)
from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggtorch.lowering import kernels
from vggtorch.lowering.modules import Activate, BatchNorm, Conv2D, Dense, product_dtype


def state(parameters: Iterable[nn.Parameter]) -> list[tuple[int, int]]:
    """What changes when a parameter does: its version, or its address."""
    return [(0 if p.is_inference() else p._version, p.data_ptr()) for p in parameters]


class Prepared:
    """Tensors made from parameters, made anew when a parameter changes.

    A parameter's version says that it was written to, its address that its storage was replaced,
    and torch.func.functional_call puts another tensor in its place for one call. Writing through
    `.data` shows in none of them, so on a CPU a sample of the first parameter's values is compared
    as well, and going from training to evaluation or back makes all anew.
    """

    def __init__(self, modules: list[nn.Module], make: Callable[..., Any]) -> None:
        self.modules, self.make = modules, make
        self.key: Any = None
        self.parameters: list[weakref.ref[Tensor]] = []
        self.sample, self.made = torch.empty(0), None

    @torch.no_grad()
    def __call__(self, fuses: bool, dtype: torch.dtype, *args: Any) -> Any:
        """What was made in this dtype of the parameters as they are now.

        For fused operations, which want it in an order of their own, or for plain ones.
        """
        own = [module._parameters.values() for module in self.modules]
        parameters = [p for values in own for p in values if p is not None]
        same = [known() is p for known, p in zip(self.parameters, parameters, strict=False)]
        key = (fuses, dtype, state(parameters))
        first = parameters[0].detach()
        step = max(1, first.numel() // 64)
        sample = first.as_strided((first.numel() // step,), (step,))
        if (
            key != self.key
            or not all(same)
            or not (first.is_cuda or torch.equal(sample, self.sample))
        ):
            self.made = self.make(fuses, dtype, *args)
            self.key, self.sample = key, sample.clone()
            self.parameters = [weakref.ref(p) for p in parameters]
        return self.made

    def __getstate__(self) -> dict[str, Any]:
        # Neither oneDNN's tensors nor references can be copied.
        return vars(self) | {"key": None, "made": None, "parameters": []}


class FusedConv2D:
    """Conv2D, the BatchNorm that follows it and the activation after that as one step."""

    def __init__(self, conv: Conv2D, norm: BatchNorm | None, activation: Activate | None) -> None:
        self.conv, self.norm, self.activation = conv, norm, activation
        self.constants = Prepared([conv] if norm is None else [conv, norm], self._constants)

    def __call__(self, x: Tensor) -> Tensor:
        conv = self.conv
        dtype = product_dtype(x, conv.dtype)
        x, padding = conv.pad(x.to(dtype).contiguous(memory_format=torch.channels_last))
        fuses = kernels.fuses(x, dtype)
        weight, bias, groups = self.constants(fuses, dtype, x, padding)
        options = conv.stride, padding, conv.dilation, groups
        relu = self.activation is not None and self.activation.is_relu
        if relu and fuses:
            return kernels.conv2d(x, weight, bias, *options, "relu")
        if relu and x.is_cuda:
            return kernels.conv2d_relu(x, weight, bias, *options)
        y = (kernels.conv2d if fuses else F.conv2d)(x, weight, bias, *options)
        return y if self.activation is None else self.activation(y)

    def _constants(
        self, fuses: bool, dtype: torch.dtype, x: Tensor, padding: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None, int]:
        """Weight (O, I, H, W), bias and groups; batch norm is a scale of one and a shift."""
        conv, norm = self.conv, self.norm
        weight = conv.weight().detach()
        bias: Tensor | None = conv.bias
        groups = x.shape[1] // weight.shape[1]
        if norm is not None:
            scale = torch.rsqrt(norm.moving_variance + norm.epsilon)
            scale = scale if norm.gamma is None else scale * norm.gamma
            shift = -norm.moving_mean if bias is None else bias - norm.moving_mean
            shift = shift * scale
            bias = shift if norm.beta is None else shift + norm.beta
            weight = weight * scale.reshape(-1, 1, 1, 1)
        weight = weight.to(dtype)
        bias = None if bias is None else bias.detach().to(dtype)
        if fuses:
            options = conv.stride, padding, conv.dilation, groups
            weight = kernels.prepared_weight(weight, x.shape, *options)
        return weight, bias, groups


class FusedDense:
    """Dense and its ReLU as one step of inference."""

    def __init__(self, dense: Dense) -> None:
        self.dense = dense
        self.constants = Prepared([dense], self._constants)

    def __call__(self, x: Tensor) -> Tensor:
        activation, dtype = self.dense.activation, product_dtype(x, self.dense.dtype)
        x = x.to(dtype)
        fuses = kernels.fuses(x, dtype)
        weight, bias = self.constants(fuses, dtype)
        if not fuses:
            y = F.linear(x, weight, bias)
            return y if activation is None else activation(y)
        if activation is not None and activation.is_relu:
            return kernels.linear(x, weight, bias, "relu")
        y = kernels.linear(x, weight, bias)
        return y if activation is None else activation(y)

    def _constants(self, fuses: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias; the parameters themselves where their dtype is right."""
        dense = self.dense
        bias = None if dense.bias is None else dense.bias.detach().to(dtype)
        return dense.kernel.detach().t().to(dtype), bias
