"""Keras layers as torch.nn modules: one function for each kind of layer.

A converter gets the layer and a `Site` (where it is called, and how to make weights on the Keras
variables' memory) and returns `Piece`s, which run one after the other, or None where torch.nn has
no exact counterpart for how the layer is set; it then runs as a `KerasLayer`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras
import numpy as np
import torch
from keras import activations, layers
from torch import nn

from vggtorch import keras_graph
from vggtorch.lowering.layer_modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    KerasFunction,
    Normalize,
    Rescale,
    SameAvgPool,
    SamePad,
    Scale,
    SharedDropout,
)
from vggtorch.lowering.ties import SAME, Layout, Tie, Ties

# "first": channels on axis 1, as torch.nn's modules want it. "keras": as the Keras layer has it.
# "any": it makes no difference.
Axes = Literal["first", "keras", "any"]


@dataclass(frozen=True)
class Piece:
    """A module, the name that it adds to its layer's, and the axes that it takes and gives."""

    module: nn.Module
    suffix: str = ""
    axes: Axes = "first"


@dataclass
class Site:
    """Where a layer is called, and the weights that its modules get.

    Attributes:
        layer: the Keras layer.
        inputs: the symbolic tensors that it is called on.
        ties: the pairs of Keras variables and torch tensors of the whole network.
        share: whether torch's tensors are on the Keras variables' memory.
    """

    layer: Any
    inputs: Sequence[keras.KerasTensor]
    ties: Ties
    share: bool

    @property
    def rank(self) -> int:
        """Axes of the layer's (first) input, the batch among them."""
        return len(self.inputs[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        """What the layer's weights are in, which is what it computes in."""
        return keras_graph.torch_dtype(self.layer.variable_dtype)

    @property
    def channels_last(self) -> bool:
        """Whether the layer's data_format, or Keras's default where it has none, says so."""
        own = getattr(self.layer, "data_format", keras.config.image_data_format())
        return bool(own == "channels_last")

    @property
    def channels(self) -> int:
        """How many channels enter."""
        return int(self.inputs[0].shape[-1 if self.channels_last else 1])

    def set_(
        self, module: nn.Module, name: str, variable: keras.Variable | None, layout: Layout = SAME
    ) -> None:
        """Give a module a Keras variable's value: on its memory, or a copy without `share`."""
        if variable is None:
            module.register_parameter(name, None)
            return
        known = next((tie for tie in self.ties.pairs if tie.variable is variable), None)
        if known is not None:  # a layer that is called in several places has one weight
            tensor = known.tensor
        else:
            value = keras_graph.raw_value(variable)
            tensor = layout.to_torch(value.detach())
            if not self.share and tensor.data_ptr() == value.data_ptr():
                tensor = tensor.clone()
            if name not in module._buffers:
                tensor = nn.Parameter(tensor, requires_grad=value.requires_grad)
            tie = Tie(variable, tensor, layout, module, name, value.requires_grad)
            self.ties.pairs.append(tie)
            if self.share:
                tie.share()
        if name in module._buffers:
            module.register_buffer(name, tensor)
        else:
            module.register_parameter(name, tensor)  # type: ignore[arg-type]


Converter = Callable[[Site], "list[Piece] | None"]


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

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


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
    conv = _CONVOLUTIONS[n](
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
    depthwise = _CONVOLUTIONS[2](
        inputs, middle, kernel, stride, own, dilation, inputs,
        bias=False, device="meta", dtype=site.dtype,
    )  # fmt: skip
    pointwise = nn.Conv2d(middle, layer.filters, 1, bias=False, device="meta", dtype=site.dtype)
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
    linear = nn.Linear(inputs, outputs, bias=False, device="meta", dtype=site.dtype)
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


# Normalisation

_NORMS = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}


def _batch_norm(site: Site) -> list[Piece] | None:
    layer = site.layer
    if getattr(layer, "renorm", False) or site.rank not in _NORMS:
        return None
    axis = layer.axis % site.rank
    if axis not in (1, site.rank - 1):
        return None
    norm = _NORMS[site.rank](
        layer.moving_mean.shape[0], layer.epsilon, 1 - layer.momentum,
        device="meta", dtype=site.dtype,
    )  # fmt: skip
    norm.num_batches_tracked = torch.tensor(0)
    site.set_(norm, "weight", layer.gamma if layer.scale else None)
    site.set_(norm, "bias", layer.beta if layer.center else None)
    site.set_(norm, "running_mean", layer.moving_mean)
    site.set_(norm, "running_var", layer.moving_variance)
    norm.frozen = not layer.trainable
    site.ties.norms.append((norm, layer))
    return [Piece(norm, "", "first" if axis != 1 else "keras")]


def _layer_norm(site: Site) -> list[Piece] | None:
    layer = site.layer
    last = {axis % site.rank for axis in layer.axis} == {site.rank - 1}
    if not last or getattr(layer, "rms_scaling", False) or not (layer.scale and layer.center):
        return None
    norm = nn.LayerNorm(site.inputs[0].shape[-1], layer.epsilon, device="meta", dtype=site.dtype)
    site.set_(norm, "weight", layer.gamma)
    site.set_(norm, "bias", layer.beta)
    return [Piece(norm, "", "keras")]


def _rescaling(site: Site) -> list[Piece] | None:
    layer = site.layer
    values = [np.asarray(v, dtype=float) for v in (layer.scale, layer.offset)]
    if any(v.ndim > 1 for v in values):
        return None
    # Keras adds a list up along the last axis, or by its global setting along the first.
    axes: Axes = "any"
    shape: tuple[int, ...] = ()
    if any(v.ndim for v in values):
        if site.rank < 3 or keras.config.image_data_format() != "channels_last":
            return None
        axes, shape = "first", (-1, *(1,) * (site.rank - 2))
    scale, offset = (
        torch.tensor(v, dtype=keras_graph.torch_dtype(layer.compute_dtype)).reshape(
            shape if v.ndim else ()
        )
        for v in values
    )
    return [Piece(Rescale(scale, offset), "", axes)]


def _normalization(site: Site) -> list[Piece] | None:
    layer = site.layer
    if layer.invert or layer.mean is None:
        return None
    mean, variance = (
        keras.ops.convert_to_tensor(v).detach().clone() for v in (layer.mean, layer.variance)
    )
    return [Piece(Normalize(mean, variance, keras.config.epsilon()), "", "keras")]


def _layer_scale(site: Site) -> list[Piece]:
    scale = Scale()
    site.set_(scale, "weight", site.layer.gamma)
    return [Piece(scale, "", "keras")]


# Pools, padding, shapes

_POOLS = {
    layers.MaxPooling1D: nn.MaxPool1d,
    layers.MaxPooling2D: nn.MaxPool2d,
    layers.MaxPooling3D: nn.MaxPool3d,
    layers.AveragePooling1D: nn.AvgPool1d,
    layers.AveragePooling2D: nn.AvgPool2d,
    layers.AveragePooling3D: nn.AvgPool3d,
}
_AVERAGES = (layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D)


def _pool(site: Site) -> list[Piece]:
    layer = site.layer
    size, stride = tuple(layer.pool_size), tuple(layer.strides)
    pads = []
    if layer.padding == "same":
        if type(layer) in _AVERAGES:
            return [Piece(SameAvgPool(size, stride))]
        # Keras repeats the edge, which leaves a maximum what it is.
        pads = [Piece(SamePad(size, stride, (1,) * len(size), "replicate"), "_pad")]
    return [*pads, Piece(_POOLS[type(layer)](size, stride))]


def _global_average(site: Site) -> list[Piece]:
    pool = {3: nn.AdaptiveAvgPool1d, 4: nn.AdaptiveAvgPool2d, 5: nn.AdaptiveAvgPool3d}[site.rank]
    flatten = [] if site.layer.keepdims else [Piece(nn.Flatten(), "_flatten", "first")]
    return [Piece(pool(1)), *flatten]


def _zero_padding(site: Site) -> list[Piece]:
    (top, bottom), (left, right) = site.layer.padding
    return [Piece(nn.ZeroPad2d((left, right, top, bottom)))]


def _cropping(site: Site) -> list[Piece]:
    (top, bottom), (left, right) = site.layer.cropping
    return [Piece(nn.ZeroPad2d((-left, -right, -top, -bottom)))]


def _flatten(site: Site) -> list[Piece] | None:
    last = site.layer.data_format == "channels_last"
    return [Piece(nn.Flatten(), "", "keras")] if last or site.rank == 2 else None


def _dropout(site: Site) -> list[Piece] | None:
    layer = site.layer
    if layer.seed is not None:
        return None
    if layer.noise_shape is not None:
        return [Piece(SharedDropout(layer.rate, layer.noise_shape), "", "keras")]
    return [Piece(nn.Dropout(layer.rate), "", "any")]


def _spatial_dropout(site: Site) -> list[Piece] | None:
    return None if site.layer.seed is not None else [Piece(nn.Dropout2d(site.layer.rate))]


def _up_sampling(site: Site) -> list[Piece] | None:
    if site.layer.interpolation != "nearest":
        return None
    return [Piece(nn.Upsample(scale_factor=tuple(float(n) for n in site.layer.size)))]


CONVERTERS: dict[type, Converter] = {
    layers.Activation: _activation_layer,
    layers.BatchNormalization: _batch_norm,
    layers.Conv1D: _convolution,
    layers.Conv2D: _convolution,
    layers.Conv2DTranspose: _transposed,
    layers.Conv3D: _convolution,
    layers.Cropping2D: _cropping,
    layers.Dense: _dense,
    layers.DepthwiseConv2D: _convolution,
    layers.Dropout: _dropout,
    layers.ELU: lambda site: [Piece(nn.ELU(float(site.layer.alpha)), "", "any")],
    layers.Embedding: _embedding,
    layers.Flatten: _flatten,
    layers.GlobalAveragePooling1D: _global_average,
    layers.GlobalAveragePooling2D: _global_average,
    layers.GlobalAveragePooling3D: _global_average,
    layers.Identity: lambda site: [Piece(nn.Identity(), "", "any")],
    layers.LayerNormalization: _layer_norm,
    layers.LeakyReLU: lambda site: [
        Piece(nn.LeakyReLU(float(site.layer.negative_slope)), "", "any")
    ],
    layers.Normalization: _normalization,
    layers.ReLU: _relu,
    layers.Rescaling: _rescaling,
    layers.SeparableConv2D: _separable,
    layers.Softmax: _softmax,
    layers.SpatialDropout2D: _spatial_dropout,
    layers.UpSampling2D: _up_sampling,
    layers.ZeroPadding2D: _zero_padding,
    **dict.fromkeys(_POOLS, _pool),
    keras_graph.LayerScale: _layer_scale,
}


def convert(site: Site) -> list[Piece] | None:
    """The modules of a layer, in the order in which they run; None where Keras must run it.

    A layer that computes in another dtype than its weights have (a mixed dtype policy), has an
    activity regulariser, or reads a masked tensor is such a one.
    """
    layer = site.layer
    converter = CONVERTERS.get(type(layer))
    if converter is None or layer.activity_regularizer is not None:
        return None
    if layer.compute_dtype != layer.variable_dtype or any(map(keras_graph.has_mask, site.inputs)):
        return None
    return converter(site)
