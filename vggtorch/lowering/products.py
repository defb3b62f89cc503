"""Activations, convolutions, products and embeddings of Keras as torch.nn modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
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
from vggtorch.lowering.sites import Axes, Converter, Piece, Site, all_ranks

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


def _activation(site: Site, suffix: str = "", *, first: bool = False) -> list[Piece]:
    """A layer's activation function; `first`: channels are on axis 1 where it is applied."""
    function = site.layer.activation
    if function is None or function is activations.linear:
        return []
    axes: Axes = "first" if first else "keras"
    if function in (activations.softmax, activations.log_softmax):
        kind = nn.Softmax if function is activations.softmax else nn.LogSoftmax
        return [Piece(kind(dim=1 if first and site.rank > 2 else -1), suffix, axes)]
    if function in _ACTIVATIONS:
        return [Piece(_ACTIVATIONS[function](), suffix, "any")]
    return [Piece(KerasFunction(function), suffix, "keras")]


def _ending(site: Site, *, first: bool) -> list[Piece]:
    """The activation at the end of a layer, named `block1_conv1_relu`."""
    function = site.layer.activation
    name = getattr(function, "__name__", type(function).__name__)
    # Of a channels_first layer both axes are the same.
    return _activation(site, f"_{name}", first=first and site.channels_last)


def _activation_layer(site: Site) -> list[Piece]:
    return _activation(site) or [Piece(nn.Identity(), "", "any")]


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
    axes: Axes = "any" if count == 1 else "first" if shape == (*ones, count) else "keras"
    return [Piece(site.module(PReLU, count), "", axes)]


def _softmax(site: Site) -> list[Piece] | None:
    if not isinstance(site.layer.axis, int):
        return None
    return [Piece(nn.Softmax(dim=site.layer.axis), "", "keras")]


# Convolutions and products

# What computes in another dtype than its weights have, by the number of spatial axes.
_MIXED: dict[int, Any] = {1: MixedConv1d, 2: MixedConv2d, 3: MixedConv3d}


def _padding(
    layer: Any, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[list[Piece], tuple[int, ...]]:
    """What pads before a convolution, and by how much the convolution itself pads."""
    none = (0,) * len(kernel)
    totals = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    if layer.padding == "valid" or max(totals) == 0:  # a 1x1 kernel needs none at any stride
        return [], none
    if layer.padding == "causal":
        return [Piece(nn.ZeroPad1d((totals[0], 0)), "_pad")], none
    if max(stride) == 1 and all(total % 2 == 0 for total in totals):
        return [], tuple(total // 2 for total in totals)
    return [Piece(SamePad(kernel, stride, dilation), "_pad")], none


def _conv(site: Site) -> Any:
    """torch's class of convolutions for a layer."""
    return _MIXED[site.rank - 2] if site.is_mixed else site.of("Conv")


def _windows(site: Site, kernel: Any, suffix: str = "", *, depthwise: bool = False) -> list[Piece]:
    """A convolution by a layer's windows, and what pads before it."""
    layer, (inputs, outputs) = site.layer, kernel.shape[-2:]
    size, stride, dilation = map(tuple, (layer.kernel_size, layer.strides, layer.dilation_rate))
    pads, own = _padding(layer, size, stride, dilation)
    groups = inputs if depthwise else layer.groups
    channels = (inputs, inputs * outputs) if depthwise else (inputs * groups, outputs)
    conv = site.module(_conv(site), *channels, size, stride, own, dilation, groups, suffix=suffix)
    return [*pads, Piece(conv, suffix)]


def _convolution(site: Site, *, depthwise: bool = False) -> list[Piece]:
    return [
        *_windows(site, site.layer.kernel, depthwise=depthwise),
        *_ending(site, first=True),
    ]


def _separable(site: Site) -> list[Piece]:
    layer = site.layer
    channels = layer.pointwise_kernel.shape[-2:]
    pointwise = site.module(_conv(site), *channels, 1, suffix="_pointwise")
    return [
        *_windows(site, layer.depthwise_kernel, "_depthwise", depthwise=True),
        Piece(pointwise, "_pointwise"),
        *_ending(site, first=True),
    ]


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
    layer = site.layer
    crops = _transposed_crop(layer)
    *_, outputs, inputs = layer.kernel.shape
    # Torch crops both sides alike, and fills up behind them.
    fills = tuple(max(before - after, 0) for before, after in crops)
    conv = site.module(
        site.of("ConvTranspose"), inputs, outputs, tuple(layer.kernel_size), tuple(layer.strides),
        tuple(before for before, _ in crops), fills, 1, True, tuple(layer.dilation_rate),
    )  # fmt: skip
    rest = [amount for b, after in reversed(crops) for amount in (0, min(b - after, 0))]
    cropping = [Piece(site.of("ZeroPad")(tuple(rest)), "_crop")] if any(rest) else []
    return [Piece(conv), *cropping, *_ending(site, first=True)]


def _dense(site: Site) -> list[Piece]:
    kind = MixedLinear if site.is_mixed else nn.Linear
    linear = site.module(kind, *site.layer.kernel.shape)
    return [Piece(linear, "", "keras"), *_ending(site, first=False)]


def _embedding(site: Site) -> list[Piece] | None:
    if site.layer.mask_zero or site.given not in ("int32", "int64"):  # Keras casts others
        return None
    return [Piece(site.module(nn.Embedding, *site.layer.embeddings.shape), "", "keras")]


PRODUCTS: dict[type, Converter] = {
    **dict.fromkeys(all_ranks("Conv"), _convolution),
    **dict.fromkeys(all_ranks("DepthwiseConv"), partial(_convolution, depthwise=True)),
    **dict.fromkeys(all_ranks("SeparableConv"), _separable),
    layers.Conv1DTranspose: _transposed,
    layers.Conv2DTranspose: _transposed,
    layers.Conv3DTranspose: _transposed,
    layers.Dense: _dense,
    layers.Embedding: _embedding,
    layers.Activation: _activation_layer,
    layers.ELU: lambda site: [Piece(nn.ELU(float(site.layer.alpha)), "", "any")],
    layers.LeakyReLU: lambda site: [
        Piece(nn.LeakyReLU(float(site.layer.negative_slope)), "", "any")
    ],
    layers.PReLU: _prelu,
    layers.ReLU: _relu,
    layers.Softmax: _softmax,
}
