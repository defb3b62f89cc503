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


def _padding(
    layer: Any, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[list[Piece], tuple[int, ...]]:
    """What pads before a convolution, and by how much the convolution itself pads."""
    none = (0,) * len(kernel)
    if layer.padding == "valid":
        return [], none
    totals = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    if max(stride) == 1 and all(total % 2 == 0 for total in totals):
        return [], tuple(total // 2 for total in totals)
    if max(totals) == 0:  # a 1x1 kernel needs no padding at any stride
        return [], none
    return [Piece(SamePad(kernel, stride, dilation), "_pad")], none


def _convolution(site: Site) -> list[Piece] | None:
    layer = site.layer
    if getattr(layer, "lora_enabled", False) or layer.quantization_mode is not None:
        return None
    if layer.padding not in ("same", "valid"):  # "causal"
        return None
    n = site.rank - 2
    kernel, stride, dilation = (
        tuple(v) for v in (layer.kernel_size, layer.strides, layer.dilation_rate)
    )
    pads, own = _padding(layer, kernel, stride, dilation)
    depthwise = isinstance(layer, layers.DepthwiseConv2D | layers.DepthwiseConv1D)
    spatial = tuple(range(2, n + 2))
    if depthwise:
        inputs, multiplier = layer.kernel.shape[-2:]
        outputs, groups = inputs * multiplier, inputs
        layout = Layout((*spatial, 0, 1), (inputs, multiplier, *kernel))
    else:
        inputs, outputs, groups = site.channels, layer.filters, layer.groups
        layout = Layout((*spatial, 1, 0))
    conv = _CONVOLUTIONS[n, site.is_mixed](
        inputs, outputs, kernel, stride, own, dilation, groups,
        bias=False, device="meta", dtype=site.dtype,
    )  # fmt: skip
    site.set_(conv, "weight", layer.kernel, layout)
    site.set_(conv, "bias", layer.bias)
    return [*pads, Piece(conv), *_ending(site, first=True)]


def _separable(site: Site) -> list[Piece] | None:
    layer = site.layer
    if site.rank != 4 or layer.padding not in ("same", "valid"):
        return None
    kernel, stride, dilation = (
        tuple(v) for v in (layer.kernel_size, layer.strides, layer.dilation_rate)
    )
    pads, own = _padding(layer, kernel, stride, dilation)
    inputs, multiplier = layer.depthwise_kernel.shape[-2:]
    middle = inputs * multiplier
    depthwise = _CONVOLUTIONS[2, site.is_mixed](
        inputs, middle, kernel, stride, own, dilation, inputs,
        bias=False, device="meta", dtype=site.dtype,
    )  # fmt: skip
    pointwise = _CONVOLUTIONS[2, site.is_mixed](
        middle, layer.filters, 1, bias=False, device="meta", dtype=site.dtype
    )
    split = (inputs, multiplier, *kernel)
    site.set_(depthwise, "weight", layer.depthwise_kernel, Layout((2, 3, 0, 1), split))
    site.set_(pointwise, "weight", layer.pointwise_kernel, Layout((2, 3, 1, 0)))
    site.set_(pointwise, "bias", layer.bias)
    pieces = [*pads, Piece(depthwise, "_depthwise"), Piece(pointwise, "_pointwise")]
    return [*pieces, *_ending(site, first=True)]


def _transposed(site: Site) -> list[Piece] | None:
    layer = site.layer
    stride, kernel = tuple(layer.strides), tuple(layer.kernel_size)
    fits = all(k >= s for k, s in zip(kernel, stride, strict=True))
    if layer.output_padding is not None or max(layer.dilation_rate) > 1:
        return None
    if layer.padding == "valid":
        if not fits:  # Keras then fills up to the stride
            return None
        padding = (0, 0)
    else:
        # torch pads both sides alike; Keras's "same" crops k - s rows in all.
        cropped = [k - s for k, s in zip(kernel, stride, strict=True)]
        if not fits or any(c % 2 for c in cropped):
            return None
        padding = tuple(c // 2 for c in cropped)
    conv = nn.ConvTranspose2d(
        site.channels, layer.filters, kernel, stride, padding,
        bias=False, device="meta", dtype=site.dtype,
    )  # fmt: skip
    site.set_(conv, "weight", layer.kernel, Layout((2, 3, 1, 0)))  # (I, O, H, W) -> HWOI
    site.set_(conv, "bias", layer.bias)
    return [Piece(conv), *_ending(site, first=True)]


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
    layers.Conv2DTranspose: _transposed,
    layers.Conv3D: _convolution,
    layers.Dense: _dense,
    layers.DepthwiseConv2D: _convolution,
    layers.ELU: lambda site: [Piece(nn.ELU(float(site.layer.alpha)), "", "any")],
    layers.Embedding: _embedding,
    layers.LeakyReLU: lambda site: [
        Piece(nn.LeakyReLU(float(site.layer.negative_slope)), "", "any")
    ],
    layers.ReLU: _relu,
    layers.SeparableConv2D: _separable,
    layers.Softmax: _softmax,
}
