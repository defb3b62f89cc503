"""Activations, convolutions, products and embeddings of Keras as torch.nn modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from keras import activations, layers
from torch import nn

from vggtorch.lowering.layer_modules import (
    KerasFunction,
    MixedConv1d,
    MixedConv2d,
    MixedConv3d,
    MixedLinear,
    PReLU,
    SamePad,
)
from vggtorch.lowering.sites import Axes, Converter, Piece, Site
from vggtorch.lowering.ties import Layout

# Activations

_ACTIVATIONS: dict[Any, Callable[[], nn.Module]] = {
    activations.relu: nn.ReLU,
    activations.relu6: nn.ReLU6,
    activations.sigmoid: nn.Sigmoid,
    activations.tanh: nn.Tanh,
    activations.silu: nn.SiLU,
    activations.hard_sigmoid: nn.Hardsigmoid,
    activations.hard_silu: nn.Hardswish,
    activations.elu: nn.ELU,
    activations.selu: nn.SELU,
    activations.gelu: nn.GELU,
    activations.leaky_relu: lambda: nn.LeakyReLU(0.2),
    activations.softplus: nn.Softplus,
    activations.softsign: nn.Softsign,
    activations.mish: nn.Mish,
}


def activation(function: Any, rank: int, *, first: bool, suffix: str = "") -> list[Piece]:
    """An activation function as a module; `first`: channels are on axis 1 where it is applied."""
    if function is None or function is activations.linear:
        return []
    axes: Axes = "first" if first else "keras"
    if function in (activations.softmax, activations.log_softmax):
        kind = nn.Softmax if function is activations.softmax else nn.LogSoftmax
        return [Piece(kind(dim=1 if first and rank > 2 else -1), suffix, axes)]
    if function in _ACTIVATIONS:
        return [Piece(_ACTIVATIONS[function](), suffix, "any")]
    return [Piece(KerasFunction(function), suffix, "keras")]


def _ending(site: Site, *, first: bool) -> list[Piece]:
    """The activation at the end of a layer, named `block1_conv1_relu`."""
    function = site.layer.activation
    name = getattr(function, "__name__", type(function).__name__)
    first = first and site.channels_last  # of a channels_first layer both axes are the same
    return activation(function, site.rank, first=first, suffix=f"_{name}")


def _activation_layer(site: Site) -> list[Piece]:
    return activation(site.layer.activation, site.rank, first=False) or [
        Piece(nn.Identity(), "", "any")
    ]


def _relu(site: Site) -> list[Piece] | None:
    layer = site.layer
    if layer.threshold or layer.max_value not in (None, 6):
        return None
    if layer.max_value == 6:
        return None if layer.negative_slope else [Piece(nn.ReLU6(), "", "any")]
    slope = float(layer.negative_slope or 0)
    return [Piece(nn.LeakyReLU(slope) if slope else nn.ReLU(), "", "any")]


def _prelu(site: Site) -> list[Piece] | None:
    """A slope for all, or one for each channel; with one for each pixel it stays Keras's."""
    alpha = site.layer.alpha
    shape = tuple(alpha.shape)  # (1, 1, C), or (C, 1, 1) where the channels come first
    count, ones = max(shape), (1,) * (len(shape) - 1)
    if shape not in ((*ones, count), (count, *ones)):
        return None
    prelu = PReLU(count, device="meta", dtype=site.dtype)
    site.set_(prelu, "weight", alpha, Layout(split=shape, shape=(count,)))
    axes: Axes = "any" if count == 1 else "first" if shape == (*ones, count) else "keras"
    return [Piece(prelu, "", axes)]


def _softmax(site: Site) -> list[Piece] | None:
    if not isinstance(site.layer.axis, int):
        return None
    return [Piece(nn.Softmax(dim=site.layer.axis), "", "keras")]


# Convolutions and products

# By the number of axes, and whether they compute in another dtype than their weights have.
_CONVOLUTIONS: dict[tuple[int, bool], Any] = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): MixedConv1d,
    (2, True): MixedConv2d,
    (3, True): MixedConv3d,
}
_TRANSPOSED: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
ZERO_PADS: dict[int, Any] = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}


def _layout(kernel: Any, *, depthwise: bool = False) -> Layout:
    """Keras's kernel (H, W, I, O) of torch's (O, I, H, W); (H, W, C, M) of (C * M, 1, H, W)."""
    *window, inputs, outputs = kernel.shape
    spatial = range(2, len(window) + 2)
    if not depthwise:
        return Layout((*spatial, 1, 0))
    return Layout((*spatial, 0, 1), (inputs, outputs, *window), (inputs * outputs, 1, *window))


def _padding(
    layer: Any, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[list[Piece], tuple[int, ...]]:
    """What pads before a convolution, and by how much the convolution itself pads."""
    none = (0,) * len(kernel)
    if layer.padding == "valid":
        return [], none
    totals = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    if layer.padding == "causal":
        return [Piece(nn.ZeroPad1d((totals[0], 0)), "_pad")], none
    if max(stride) == 1 and all(total % 2 == 0 for total in totals):
        return [], tuple(total // 2 for total in totals)
    if max(totals) == 0:  # a 1x1 kernel needs no padding at any stride
        return [], none
    return [Piece(SamePad(kernel, stride, dilation), "_pad")], none


def _convolution(site: Site) -> list[Piece] | None:
    layer = site.layer
    if getattr(layer, "lora_enabled", False) or layer.quantization_mode is not None:
        return None
    kernel, stride, dilation = (
        tuple(v) for v in (layer.kernel_size, layer.strides, layer.dilation_rate)
    )
    pads, own = _padding(layer, kernel, stride, dilation)
    depthwise = isinstance(layer, layers.DepthwiseConv2D | layers.DepthwiseConv1D)
    if depthwise:
        inputs, multiplier = layer.kernel.shape[-2:]
        outputs, groups = inputs * multiplier, inputs
    else:
        inputs, outputs, groups = site.channels, layer.filters, layer.groups
    conv = _CONVOLUTIONS[site.rank - 2, site.is_mixed](
        inputs, outputs, kernel, stride, own, dilation, groups,
        bias=False, device="meta", dtype=site.dtype,
    )  # fmt: skip
    site.set_(conv, "weight", layer.kernel, _layout(layer.kernel, depthwise=depthwise))
    site.set_(conv, "bias", layer.bias)
    return [*pads, Piece(conv), *_ending(site, first=True)]


def _separable(site: Site) -> list[Piece]:
    layer = site.layer
    kind = _CONVOLUTIONS[site.rank - 2, site.is_mixed]
    kernel, stride, dilation = (
        tuple(v) for v in (layer.kernel_size, layer.strides, layer.dilation_rate)
    )
    pads, own = _padding(layer, kernel, stride, dilation)
    inputs, multiplier = layer.depthwise_kernel.shape[-2:]
    middle = inputs * multiplier
    depthwise = kind(
        inputs, middle, kernel, stride, own, dilation, inputs,
        bias=False, device="meta", dtype=site.dtype,
    )  # fmt: skip
    pointwise = kind(middle, layer.filters, 1, bias=False, device="meta", dtype=site.dtype)
    layout = _layout(layer.depthwise_kernel, depthwise=True)
    site.set_(depthwise, "weight", layer.depthwise_kernel, layout)
    site.set_(pointwise, "weight", layer.pointwise_kernel, _layout(layer.pointwise_kernel))
    site.set_(pointwise, "bias", layer.bias)
    pieces = [*pads, Piece(depthwise, "_depthwise"), Piece(pointwise, "_pointwise")]
    return [*pieces, *_ending(site, first=True)]


def _transposed_crop(layer: Any) -> list[tuple[int, int]]:
    """What Keras cuts off before and after each axis of all that a transposed convolution gives.

    A negative number is what it fills up.
    """
    crops = []
    fills = layer.output_padding or (None,) * len(layer.kernel_size)
    axes = zip(layer.kernel_size, layer.strides, layer.dilation_rate, fills, strict=True)
    for k, stride, dilation, fill in axes:
        window = (k - 1) * dilation + 1
        if layer.padding == "valid":
            crops.append((0, -(max(stride - window, 0) if fill is None else fill)))
            continue
        pads = stride + window - 2 if fill is None else window + window % 2 - 2 + fill
        before = min((pads + 1) // 2, window - 1)
        crops.append((window - 1 - before, window - 1 - (pads - before)))
    return crops


def _transposed(site: Site) -> list[Piece]:
    layer, n = site.layer, site.rank - 2
    crops = _transposed_crop(layer)
    # Torch crops both sides alike, and fills up behind them.
    fills = tuple(max(before - after, 0) for before, after in crops)
    conv = _TRANSPOSED[n](
        site.channels, layer.filters, tuple(layer.kernel_size), tuple(layer.strides),
        tuple(before for before, _ in crops), fills, dilation=tuple(layer.dilation_rate),
        bias=False, device="meta", dtype=site.dtype,
    )  # fmt: skip
    site.set_(conv, "weight", layer.kernel, _layout(layer.kernel))  # (I, O, H, W) -> HWOI
    site.set_(conv, "bias", layer.bias)
    rest = [amount for b, after in reversed(crops) for amount in (0, min(b - after, 0))]
    cropping = [Piece(ZERO_PADS[n](tuple(rest)), "_crop")] if any(rest) else []
    return [Piece(conv), *cropping, *_ending(site, first=True)]


def _dense(site: Site) -> list[Piece] | None:
    layer = site.layer
    if layer.lora_enabled or layer.quantization_mode is not None:
        return None
    inputs, outputs = layer.kernel.shape
    kind = MixedLinear if site.is_mixed else nn.Linear
    linear = kind(inputs, outputs, bias=False, device="meta", dtype=site.dtype)
    site.set_(linear, "weight", layer.kernel, Layout((1, 0)))
    site.set_(linear, "bias", layer.bias)
    return [Piece(linear, "", "keras"), *_ending(site, first=False)]


def _embedding(site: Site) -> list[Piece] | None:
    layer = site.layer
    if layer.mask_zero or layer.lora_enabled or layer.quantization_mode is not None:
        return None
    table = nn.Embedding(layer.input_dim, layer.output_dim, device="meta", dtype=site.dtype)
    site.set_(table, "weight", layer.embeddings)
    return [Piece(table, "", "keras")]


PRODUCTS: dict[type, Converter] = {
    layers.Activation: _activation_layer,
    layers.Conv1D: _convolution,
    layers.Conv2D: _convolution,
    layers.Conv3D: _convolution,
    layers.Conv1DTranspose: _transposed,
    layers.Conv2DTranspose: _transposed,
    layers.Conv3DTranspose: _transposed,
    layers.Dense: _dense,
    layers.DepthwiseConv1D: _convolution,
    layers.DepthwiseConv2D: _convolution,
    layers.ELU: lambda site: [Piece(nn.ELU(float(site.layer.alpha)), "", "any")],
    layers.Embedding: _embedding,
    layers.LeakyReLU: lambda site: [
        Piece(nn.LeakyReLU(float(site.layer.negative_slope)), "", "any")
    ],
    layers.PReLU: _prelu,
    layers.ReLU: _relu,
    layers.SeparableConv1D: _separable,
    layers.SeparableConv2D: _separable,
    layers.Softmax: _softmax,
}
