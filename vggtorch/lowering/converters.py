"""Keras layers as torch.nn modules: one function for each kind of layer.

A converter gets a `Site` (the layer, where it is called, and how to make weights on the Keras
variables' memory) and returns `Piece`s, which run one after the other, or None where torch.nn has
no exact counterpart for how the layer is set; it then runs as a `KerasLayer`. Those of layers with
kernels and of activations stand in products.py.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import keras
import numpy as np
import torch
from keras import layers
from torch import nn

from vggtorch import keras_graph
from vggtorch.lowering.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from vggtorch.lowering.layer_modules import (
    GlobalMaxPool,
    Normalize,
    Rescale,
    SameAvgPool,
    SamePad,
    Scale,
    SharedDropout,
    WideLayerNorm,
)
from vggtorch.lowering.products import PRODUCTS
from vggtorch.lowering.sites import Axes, Converter, Piece, Site

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
    if not last or getattr(layer, "rms_scaling", False):
        return None
    kind: Any = nn.LayerNorm
    if layer.compute_dtype in ("bfloat16", "float16"):
        dtype = keras_graph.torch_dtype(layer.compute_dtype)
        kind = partial(WideLayerNorm, compute_dtype=dtype)
    norm = kind(site.inputs[0].shape[-1], layer.epsilon, device="meta", dtype=site.dtype)
    site.set_(norm, "weight", layer.gamma if layer.scale else None)
    site.set_(norm, "bias", layer.beta if layer.center else None)
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
    norm = Normalize(layer.mean, layer.variance, layer.mean.shape, keras.config.epsilon())
    if layer.input_mean is None:  # adapted: variables of the model
        site.set_(norm, "mean", layer.adapt_mean)
        site.set_(norm, "variance", layer.adapt_variance)
    return [Piece(norm, "", "keras")]


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


def _adaptive_average(site: Site) -> list[Piece]:
    return [Piece(nn.AdaptiveAvgPool2d(tuple(site.layer.output_size)))]


def _global_max(site: Site) -> list[Piece]:
    return [Piece(GlobalMaxPool(bool(site.layer.keepdims)))]


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


# Modules of torch in a Keras model


def _torch_module(site: Site) -> list[Piece]:
    """A copy of the user's own module, on the tensors of the one that the Keras layer has."""
    own = site.layer.module
    variables = {id(keras_graph.raw_value(v)): v for v in site.layer.variables}
    module = copy.deepcopy(own)
    for path, part in own.named_modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                site.set_(module.get_submodule(path), name, variables[id(parameter)])
        if site.share:
            module.get_submodule(path)._buffers.update(part._buffers)
    return [Piece(module, "", "keras")]


CONVERTERS: dict[type, Converter] = {
    **PRODUCTS,
    layers.AdaptiveAveragePooling2D: _adaptive_average,
    layers.BatchNormalization: _batch_norm,
    layers.Cropping2D: _cropping,
    layers.Dropout: _dropout,
    layers.Flatten: _flatten,
    layers.GlobalAveragePooling1D: _global_average,
    layers.GlobalAveragePooling2D: _global_average,
    layers.GlobalAveragePooling3D: _global_average,
    layers.GlobalMaxPooling1D: _global_max,
    layers.GlobalMaxPooling2D: _global_max,
    layers.GlobalMaxPooling3D: _global_max,
    layers.Identity: lambda site: [Piece(nn.Identity(), "", "any")],
    layers.LayerNormalization: _layer_norm,
    layers.Normalization: _normalization,
    layers.Rescaling: _rescaling,
    layers.SpatialDropout2D: _spatial_dropout,
    layers.TorchModuleWrapper: _torch_module,
    layers.UpSampling2D: _up_sampling,
    layers.ZeroPadding2D: _zero_padding,
    **dict.fromkeys(_POOLS, _pool),
    keras_graph.LayerScale: _layer_scale,
}


# What computes in another dtype than its weights have as Keras does.
_MIXED = {
    layers.BatchNormalization,
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    layers.Dense,
    layers.DepthwiseConv2D,
    layers.LayerNormalization,
    layers.SeparableConv2D,
}


def is_usual(layer: keras.Layer) -> bool:
    """Whether a layer does what its class does, and no more: no penalty, no `call` of its own."""
    return layer.activity_regularizer is None and "call" not in vars(layer)


def convert(site: Site) -> list[Piece] | None:
    """The modules of a layer, in the order in which they run; None where Keras must run it.

    A layer that isn't usual, or reads a masked tensor, is such a one.
    """
    layer = site.layer
    converter = CONVERTERS.get(type(layer))
    if converter is None or not is_usual(layer):
        return None
    if site.is_mixed and layer.variables and type(layer) not in _MIXED:
        return None
    return None if any(map(keras_graph.has_mask, site.inputs)) else converter(site)
