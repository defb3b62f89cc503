"""Which module each type of Keras layer becomes: `HANDLERS` maps layer types to functions.

A layer that has no handler, or is set to something that only Keras can do, runs in a `KerasLayer`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import keras
import numpy as np
import torch
from keras import activations, layers
from torch import Tensor, nn

from vggtorch.lowering.conventions import LoweringOptions
from vggtorch.lowering.modules import (
    Activate,
    BatchNorm,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    GlobalPool2D,
    LayerNorm,
    Merge,
    Normalize,
    Pool2D,
    Rescale,
    Reshape,
    UpSample2D,
    ZeroPadding2D,
    activation_of,
)


def _conv2d(layer: keras.Layer, options: LoweringOptions, inputs: list[Any]) -> nn.Module | None:
    if getattr(layer, "lora_enabled", False) or layer.quantization_mode is not None:
        return None
    return Conv2D(
        layer.kernel.value,
        None if layer.bias is None else layer.bias.value,
        activation_of(layer, options),
        stride=tuple(layer.strides),
        dilation=tuple(layer.dilation_rate),
        same=layer.padding == "same",
        depthwise=isinstance(layer, layers.DepthwiseConv2D),
        dtype=options.compute_dtype(layer),
    )


def _separable_conv2d(layer: keras.Layer, options: LoweringOptions, inputs: list[Any]) -> nn.Module:
    depthwise = Conv2D(
        layer.depthwise_kernel.value,
        None,
        None,
        stride=tuple(layer.strides),
        dilation=tuple(layer.dilation_rate),
        same=layer.padding == "same",
        depthwise=True,
        dtype=options.compute_dtype(layer),
    )
    pointwise = Conv2D(
        layer.pointwise_kernel.value,
        None if layer.bias is None else layer.bias.value,
        activation_of(layer, options),
        stride=(1, 1),
        dilation=(1, 1),
        same=False,
        depthwise=False,
        dtype=options.compute_dtype(layer),
    )
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise))


def _dense(layer: keras.Layer, options: LoweringOptions, inputs: list[Any]) -> nn.Module | None:
    if layer.lora_enabled or layer.quantization_mode is not None or len(inputs[0].shape) == 4:
        return None
    return Dense(layer, options)


def _batch_norm(
    layer: keras.Layer, options: LoweringOptions, inputs: list[Any]
) -> nn.Module | None:
    rank = len(inputs[0].shape)
    if getattr(layer, "renorm", False) or options.axis(layer.axis, rank) != 1:
        return None
    return BatchNorm(layer, options)


def _activation_layer(layer: keras.Layer, options: LoweringOptions, inputs: list[Any]) -> nn.Module:
    return Activate(layer.activation, layer, options)


def _relu(layer: keras.Layer, options: LoweringOptions, inputs: list[Any]) -> nn.Module | None:
    if layer.negative_slope or layer.threshold or layer.max_value not in (None, 6):
        return None
    relu = activations.relu if layer.max_value is None else activations.relu6
    return Activate(relu, layer, options)


def _dropout(layer: keras.Layer, options: LoweringOptions, inputs: list[Any]) -> nn.Module | None:
    if layer.seed is not None or layer.noise_shape is not None:
        return None
    return Dropout(layer, options)


def _flatten(layer: keras.Layer, options: LoweringOptions, inputs: list[Any]) -> nn.Module | None:
    last = layer.data_format == "channels_last"
    if len(inputs[0].shape) != 4:
        return Flatten(nhwc=False) if last else None
    if options.channels_last and not last:
        return None
    return Flatten(nhwc=options.channels_last or not last)  # channels_first: Keras transposes


PAIRS: dict[type[keras.Layer], Callable[[Tensor, Tensor], Tensor]] = {
    layers.Add: torch.add,
    layers.Maximum: torch.maximum,
    layers.Minimum: torch.minimum,
    layers.Multiply: torch.mul,
    layers.Subtract: torch.sub,
}


def _mean(tensors: list[Tensor]) -> Tensor:
    return reduce(torch.add, tensors) / len(tensors)


def _merge(layer: keras.Layer, options: LoweringOptions, inputs: list[Any]) -> nn.Module | None:
    ranks = {len(x.shape) for x in inputs}
    if len(ranks) > 1 or len(inputs) < 2:
        return None
    function: Callable[[list[Tensor]], Tensor]
    if isinstance(layer, layers.Concatenate):
        function = partial(torch.cat, dim=options.axis(layer.axis, ranks.pop()))
    else:
        function = (
            _mean if isinstance(layer, layers.Average) else partial(reduce, PAIRS[type(layer)])
        )
    return Merge(function, options.compute_dtype(layer))


def _rescale(layer: keras.Layer, options: LoweringOptions, inputs: list[Any]) -> nn.Module | None:
    ranks = {np.ndim(value) for value in (layer.scale, layer.offset)}
    # Keras takes the last axis of the input, or by a global setting the first.
    maps = len(inputs[0].shape) == 4 and options.channels_last
    last = keras.config.image_data_format() == "channels_last"
    if ranks != {0} and not (ranks <= {0, 1} and maps and last):
        return None
    return Rescale(layer, options)


def _normalize(layer: keras.Layer, options: LoweringOptions, inputs: list[Any]) -> nn.Module | None:
    return None if layer.invert else Normalize(layer, options)


def _layer_norm(
    layer: keras.Layer, options: LoweringOptions, inputs: list[Any]
) -> nn.Module | None:
    last = {axis % len(inputs[0].shape) for axis in layer.axis} == {len(inputs[0].shape) - 1}
    return LayerNorm(layer, options) if last and not layer.rms_scaling else None


def _up_sample(layer: keras.Layer, options: LoweringOptions, inputs: list[Any]) -> nn.Module | None:
    return UpSample2D(layer, options) if layer.interpolation == "nearest" else None


def _module(kind: type[nn.Module]) -> Handler:
    return lambda layer, options, inputs: kind(layer, options)


# A handler makes the module for a layer that is called on `inputs` (KerasTensors), or returns None
# where the layer is set to something that only Keras itself can do.
Handler = Callable[[keras.Layer, LoweringOptions, list[Any]], nn.Module | None]
HANDLERS: dict[type[keras.Layer], Handler] = {
    layers.Activation: _activation_layer,
    layers.Add: _merge,
    layers.Average: _merge,
    layers.AveragePooling2D: _module(Pool2D),
    layers.BatchNormalization: _batch_norm,
    layers.Concatenate: _merge,
    layers.Conv2D: _conv2d,
    layers.Dense: _dense,
    layers.DepthwiseConv2D: _conv2d,
    layers.Dropout: _dropout,
    layers.Flatten: _flatten,
    layers.GlobalAveragePooling2D: _module(GlobalPool2D),
    layers.GlobalMaxPooling2D: _module(GlobalPool2D),
    layers.LayerNormalization: _layer_norm,
    layers.MaxPooling2D: _module(Pool2D),
    layers.Maximum: _merge,
    layers.Minimum: _merge,
    layers.Multiply: _merge,
    layers.Normalization: _normalize,
    layers.ReLU: _relu,
    layers.Rescaling: _rescale,
    layers.Reshape: _module(Reshape),
    layers.SeparableConv2D: _separable_conv2d,
    layers.Subtract: _merge,
    layers.UpSampling2D: _up_sample,
    layers.ZeroPadding2D: _module(ZeroPadding2D),
}
