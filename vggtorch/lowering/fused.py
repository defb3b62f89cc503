"""Steps that do the work of several modules at once, or of one in another way.

In inference a convolution, its batch norm and its activation are one kernel, for which the weights
are prepared once and anew when a parameter changes. In training a ReLU overwrites what it gets, or
follows the max pool behind it instead of going before it.
"""

# ruff: noqa: D102  (calling one does what its class says)
from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggtorch.keras_graph import scale_and_shift
from vggtorch.lowering import kernels
from vggtorch.lowering.conventions import cast, product_dtype, to_nhwc
from vggtorch.lowering.kernels import MaxPoolReLU
from vggtorch.lowering.modules import Activate, BatchNorm, Conv2D, Dense, Pool2D

# No sum of a convolution may come near the largest float32 (3.4e38), or its products could add up
# to infinities of both signs, which make NaN.
SAFE = 1e37
# Random numbers that the rows of a kernel are multiplied by to see whether it has changed.
PROBE = torch.randn(4096, generator=torch.Generator().manual_seed(0))


def parameter_versions(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Of each tensor its version, which writing to it counts up, and its address."""
    return [(0 if p.is_inference() else p._version, p.data_ptr()) for p in tensors]


class ParameterCache:
    """Tensors made from the parameters and buffers of modules, made anew when one of them changes.

    A version says that a tensor was written to, an address that its storage was replaced, and
    torch.func.functional_call puts another tensor in its place for one call. Writing through
    `.data` shows in none of them, so fingerprints of the values are compared, once for each call of
    the network, which sets `is_checked` to False.
    """

    def __init__(self, modules: list[nn.Module], make: Callable[..., Any]) -> None:
        self.modules, self.make = modules, make
        self.key: Any = None
        self.known: list[weakref.ref[Tensor]] = []
        self.fingerprints: list[Tensor] = []
        self.made: Any = None
        self.is_checked = False

    @torch.no_grad()
    def __call__(self, dtype: torch.dtype, *args: Any) -> Any:
        """What was made in this dtype of the tensors as they are now."""
        if self.is_checked and self.key is not None and self.key[0] == dtype:
            return self.made
        tensors = [
            tensor.detach()
            for module in self.modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        ]
        key = (dtype, parameter_versions(tensors))
        with torch.autocast("cpu", enabled=False):  # whose bfloat16 would round small changes away
            fingerprints = [_fingerprint(tensor) for tensor in tensors]
        if key != self.key or not all(map(torch.equal, fingerprints, self.fingerprints)):
            self.made = self.make(dtype, *args)
            self.key, self.fingerprints = key, fingerprints
        self.is_checked = True
        return self.made

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {
            "key": None,
            "made": None,
            "fingerprints": [],
        }  # oneDNN's can't be copied


def _fingerprint(tensor: Tensor) -> Tensor:
    """What differs when the values do: their bits, or of a large kernel its rows times a probe.

    The product reads the kernel once, which a comparison with a copy would have to do twice. A
    change so small that it is lost in the product's rounding is lost in that of the convolution
    too. A kernel with a NaN is never equal, and so is prepared at each call.
    """
    flat = tensor.as_strided((tensor.numel(),), (1,))  # in the order of its memory
    if tensor.dtype != torch.float32 or len(flat) < 16 * len(PROBE):
        return flat.clone().view(torch.int8)
    rows = len(flat) // len(PROBE)
    products = flat[: rows * len(PROBE)].view(rows, len(PROBE)) @ PROBE
    return torch.cat([products, flat[rows * len(PROBE) :]])


class FusedConv2D:
    """Conv2D, the BatchNorm that follows it and the activation after that as one step.

    oneDNN's ReLU is max(x, 0), which makes 0 of NaN, where Keras and torch keep NaN. So the fused
    step runs only where no NaN can come up: its input is finite, and so small that not even the
    largest sum of weights times it, before or after the batch norm, overflows. Otherwise the
    modules run one by one, and give what they give.
    """

    def __init__(self, conv: Conv2D, norm: BatchNorm | None, activation: Activate | None) -> None:
        self.conv, self.norm, self.activation = conv, norm, activation
        modules: list[Any] = [conv] if norm is None else [conv, norm]
        self.constants = ParameterCache(modules, self._constants)

    def __call__(self, x: Tensor, bound: float | None) -> tuple[Tensor, float | None]:
        """The output and a bound of its magnitude, from the input and the bound that is known."""
        conv = self.conv
        dtype = product_dtype(x, conv.dtype)
        if len(x) == 0 or not kernels.has_fused_ops(x, dtype):
            return self._one_by_one(x), None
        x, padding = conv.pad(x.to(dtype).contiguous(memory_format=torch.channels_last))
        weight, bias, groups, gain, offset = self.constants(dtype, x, padding)
        if bound is None:
            low, high = torch.aminmax(to_nhwc(x))  # NHWC, in the order of its memory
            bound = float(torch.maximum(-low, high))
        bound = bound * gain + offset
        if not bound < SAFE:  # also where it is NaN
            return self._one_by_one(x), None
        is_relu = self.activation is not None and self.activation.is_relu
        options = conv.stride, padding, conv.dilation, groups
        y = kernels.conv2d(x, weight, bias, *options, "relu" if is_relu else "none")
        if self.activation is None or is_relu:
            return y, bound
        return self.activation(y), None

    def _one_by_one(self, x: Tensor) -> Tensor:
        y = self.conv.convolve(x)
        y = y if self.norm is None else self.norm(y)
        return y if self.activation is None else self.activation(y)

    def _constants(
        self, dtype: torch.dtype, x: Tensor, padding: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None, int, float, float]:
        """Weight (O, I, H, W), bias and groups; batch norm is a scale of one and a shift.

        And how much an output can be: at most the first number times the largest input, plus the
        second, of the convolution itself and behind the batch norm.
        """
        conv, norm = self.conv, self.norm
        weight = conv.weight.detach()
        bias: Tensor | None = conv.bias
        groups = x.shape[1] // weight.shape[1]
        gain, offset = _gain(weight), _largest(bias)
        if norm is not None:
            mean = norm.moving_mean if bias is None else norm.moving_mean - bias
            scale, bias = scale_and_shift(
                mean, norm.moving_variance, norm.epsilon, norm.gamma, norm.beta
            )
            weight = weight * scale.reshape(-1, 1, 1, 1)
            gain, offset = gain + _gain(weight), offset + _largest(bias)
        weight = weight.to(dtype)
        bias = None if bias is None else bias.detach().to(dtype)
        options = conv.stride, padding, conv.dilation, groups
        prepared = kernels.prepared_weight(weight, x.shape, *options)
        return prepared, bias, groups, gain, offset


def _gain(weight: Tensor) -> float:
    """The largest sum of magnitudes of one output's weights, which NaN and infinity stay in."""
    return float(weight.abs().sum((1, 2, 3), dtype=torch.float64).max())


def _largest(bias: Tensor | None) -> float:
    return 0.0 if bias is None else float(bias.abs().max())


class FusedDense:
    """Dense as a step of inference; its ReLU overwrites the product."""

    def __init__(self, dense: Dense) -> None:
        self.dense, self.activation = dense, dense.activation

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        dense, activation = self.dense, self.activation
        dtype = product_dtype(x, dense.dtype)
        x, weight = x.to(dtype), dense.kernel.detach().t().to(dtype)  # (out, in)
        bias = None if dense.bias is None else dense.bias.detach().to(dtype)
        y = (kernels.linear if kernels.has_fused_ops(x, dtype) else F.linear)(x, weight, bias)
        if activation is not None and activation.is_relu:
            return F.relu_(y)
        return y if activation is None else activation(y)


class Convolve:
    """A Conv2D without its activation, or with a ReLU that overwrites what was computed."""

    def __init__(self, conv: Conv2D, relu: bool) -> None:
        self.conv, self.relu = conv, relu

    def __call__(self, x: Tensor) -> Tensor:
        y = self.conv.convolve(x)
        return F.relu_(y) if self.relu else y


class OverwritingReLU:
    """A ReLU that overwrites its input, which nobody else needs."""

    def __init__(self, activation: Activate) -> None:
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        return F.relu_(cast(x, self.activation.dtype))


class ReLUPool2D:
    """A ReLU and the max pool after it, pooled first; x is (N, C, H, W)."""

    def __init__(self, pool: Pool2D) -> None:
        self.pool = pool

    def __call__(self, x: Tensor) -> Tensor:
        x, padding = self.pool.pad(cast(x, self.pool.dtype))
        return MaxPoolReLU.apply(x, self.pool.size, self.pool.stride, padding)[0]
