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
from vggtorch.lowering.products import PRODUCTS, ZERO_PADS
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


def _is_float32(site: Site) -> bool:
    """Whether a layer reads, computes in and puts out float32; some of Keras's cast all else."""
    layer = site.layer
    return {site.inputs[0].dtype, layer.compute_dtype, layer.variable_dtype} == {"float32"}


def _group_norm(site: Site) -> list[Piece] | None:
    layer, axis = site.layer, site.layer.axis % site.rank
    _, *sizes = site.inputs[0].shape
    channels = sizes.pop(axis - 1)
    # Torch refuses the norm of one number, and one image may be of one pixel.
    alone = layer.groups == channels and not any(n is not None and n > 1 for n in sizes)
    if not _is_float32(site) or axis not in (1, site.rank - 1) or alone:
        return None
    norm = nn.GroupNorm(layer.groups, channels, layer.epsilon, device="meta", dtype=site.dtype)
    site.set_(norm, "weight", layer.gamma)
    site.set_(norm, "bias", layer.beta)
    return [Piece(norm, "", "first" if axis != 1 else "keras")]


def _rms_norm(site: Site) -> list[Piece] | None:
    layer = site.layer
    if not _is_float32(site) or [axis % site.rank for axis in layer.axis] != [site.rank - 1]:
        return None
    norm = nn.RMSNorm(site.inputs[0].shape[-1], layer.epsilon, device="meta", dtype=site.dtype)
    site.set_(norm, "weight", layer.scale)
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


_ADAPTIVE: dict[type, Any] = {
    layers.AdaptiveAveragePooling1D: nn.AdaptiveAvgPool1d,
    layers.AdaptiveAveragePooling2D: nn.AdaptiveAvgPool2d,
    layers.AdaptiveAveragePooling3D: nn.AdaptiveAvgPool3d,
    layers.AdaptiveMaxPooling1D: nn.AdaptiveMaxPool1d,
    layers.AdaptiveMaxPooling2D: nn.AdaptiveMaxPool2d,
    layers.AdaptiveMaxPooling3D: nn.AdaptiveMaxPool3d,
}


def _adaptive(site: Site) -> list[Piece]:
    return [Piece(_ADAPTIVE[type(site.layer)](tuple(site.layer.output_size)))]


def _global_max(site: Site) -> list[Piece]:
    return [Piece(GlobalMaxPool(bool(site.layer.keepdims)))]


def _zero_padding(site: Site, sign: int = 1) -> list[Piece]:
    n = site.rank - 2
    given = site.layer.padding if sign > 0 else site.layer.cropping
    pairs = [given] if n == 1 else given
    # torch begins with the last axis
    return [Piece(ZERO_PADS[n](tuple(sign * m for pair in reversed(pairs) for m in pair)))]


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
    kind = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}[site.rank]
    return None if site.layer.seed is not None else [Piece(kind(site.layer.rate))]


def _up_sampling(site: Site) -> list[Piece] | None:
    layer, size = site.layer, site.layer.size
    size = (size,) if isinstance(size, int) else tuple(size)
    mode = getattr(layer, "interpolation", "nearest")
    # Torch rounds a pixel's place, to one too early with factors such as 41; it smooths floats.
    smooth = mode in ("bilinear", "bicubic") and layer.compute_dtype in ("float32", "float64")
    if "float" not in site.inputs[0].dtype or not (
        smooth or (mode == "nearest" and max(size) < 41)
    ):
        return None
    factors = tuple(float(n) for n in size)
    return [Piece(nn.Upsample(None, factors, mode, False if smooth else None))]


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
    layers.BatchNormalization: _batch_norm,
    **dict.fromkeys(
        (layers.Cropping1D, layers.Cropping2D, layers.Cropping3D), partial(_zero_padding, sign=-1)
    ),
    layers.Dropout: _dropout,
    layers.Flatten: _flatten,
    layers.GlobalAveragePooling1D: _global_average,
    layers.GlobalAveragePooling2D: _global_average,
    layers.GlobalAveragePooling3D: _global_average,
    layers.GlobalMaxPooling1D: _global_max,
    layers.GlobalMaxPooling2D: _global_max,
    layers.GlobalMaxPooling3D: _global_max,
    layers.GroupNormalization: _group_norm,
    layers.Identity: lambda site: [Piece(nn.Identity(), "", "any")],
    layers.LayerNormalization: _layer_norm,
    layers.Normalization: _normalization,
    layers.RMSNormalization: _rms_norm,
    layers.Rescaling: _rescaling,
    layers.SpatialDropout1D: _spatial_dropout,
    layers.SpatialDropout2D: _spatial_dropout,
    layers.SpatialDropout3D: _spatial_dropout,
    layers.TorchModuleWrapper: _torch_module,
    layers.UpSampling1D: _up_sampling,
    layers.UpSampling2D: _up_sampling,
    layers.UpSampling3D: _up_sampling,
    layers.ZeroPadding1D: _zero_padding,
    layers.ZeroPadding2D: _zero_padding,
    layers.ZeroPadding3D: _zero_padding,
    **dict.fromkeys(_ADAPTIVE, _adaptive),
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
    layers.DepthwiseConv1D,
    layers.DepthwiseConv2D,
    layers.LayerNormalization,
    layers.SeparableConv1D,
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
