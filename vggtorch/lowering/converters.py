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
from torch import Tensor, nn

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
from vggtorch.lowering.sites import Axes, Converter, Piece, Site, all_ranks

# Normalisation

_NORMS = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}


def _batch_norm(site: Site) -> list[Piece] | None:
    layer = site.layer
    if getattr(layer, "renorm", False) or site.rank not in _NORMS:
        return None
    axis = layer.axis % site.rank
    if axis not in (1, site.rank - 1):
        return None
    norm = site.module(
        _NORMS[site.rank], layer.moving_mean.shape[0], layer.epsilon, 1 - layer.momentum
    )
    norm.num_batches_tracked = torch.tensor(0, device=norm.running_mean.device)
    norm.frozen = not layer.trainable
    site.ties.norms.append((norm, layer))
    return [Piece(norm, "", "first" if axis != 1 else "keras")]


def _layer_norm(site: Site) -> list[Piece] | None:
    layer = site.layer
    last = {axis % site.rank for axis in layer.axis} == {site.rank - 1}
    if not last or getattr(layer, "rms_scaling", False):
        return None
    kind: Any = nn.LayerNorm
    dtypes = {site.given, layer.compute_dtype, layer.variable_dtype}
    if dtypes <= {"bfloat16", "float16", "float32"} and dtypes != {"float32"}:
        dtype = keras_graph.torch_dtype(layer.compute_dtype)
        kind = partial(WideLayerNorm, compute_dtype=dtype)
    elif len(dtypes) > 1:
        return None
    norm = site.module(kind, site.inputs[0].shape[-1], layer.epsilon)
    return [Piece(norm, "", "keras")]


def _is_float32(site: Site) -> bool:
    """Whether a layer reads, computes in and puts out float32; some of Keras's cast all else."""
    layer = site.layer
    return {site.given, layer.compute_dtype, layer.variable_dtype} == {"float32"}


def _group_norm(site: Site) -> list[Piece] | None:
    layer, axis = site.layer, site.layer.axis % site.rank
    _, *sizes = site.inputs[0].shape
    channels = sizes.pop(axis - 1)
    # Torch refuses the norm of one number, and one image may be of one pixel.
    alone = layer.groups == channels and not any(n is not None and n > 1 for n in sizes)
    # Torch 2.11 fails at, or in, the gradient of a bias without a weight.
    shifts = layer.center and not layer.scale
    if not _is_float32(site) or axis not in (1, site.rank - 1) or alone or shifts:
        return None
    norm = site.module(nn.GroupNorm, layer.groups, channels, layer.epsilon)
    return [Piece(norm, "", "first" if axis != 1 else "keras")]


def _rms_norm(site: Site) -> list[Piece] | None:
    layer = site.layer
    if not _is_float32(site) or [axis % site.rank for axis in layer.axis] != [site.rank - 1]:
        return None
    norm = site.module(nn.RMSNorm, site.inputs[0].shape[-1], layer.epsilon)
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
    dtype = keras_graph.torch_dtype(layer.compute_dtype)
    scale, offset = (
        torch.tensor(v, dtype=dtype, device=keras_graph.device()).reshape(shape if v.ndim else ())
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


def _max_pool(site: Site) -> list[Piece]:
    size, stride = tuple(site.layer.pool_size), tuple(site.layer.strides)
    pool = Piece(site.of("MaxPool")(size, stride))
    if site.layer.padding == "valid":
        return [pool]
    # Keras repeats the edge, which leaves a maximum what it is.
    return [Piece(SamePad(size, stride, (1,) * len(size), "replicate"), "_pad"), pool]


def _average_pool(site: Site) -> list[Piece]:
    size, stride = tuple(site.layer.pool_size), tuple(site.layer.strides)
    pool = site.of("AvgPool") if site.layer.padding == "valid" else SameAvgPool
    return [Piece(pool(size, stride))]


def _global_average(site: Site) -> list[Piece]:
    flatten = [] if site.layer.keepdims else [Piece(nn.Flatten(), "_flatten", "first")]
    return [Piece(site.of("AdaptiveAvgPool")(1)), *flatten]


def _adaptive(kind: str, site: Site) -> list[Piece]:
    return [Piece(site.of(kind)(tuple(site.layer.output_size)))]


def _padded(attribute: str, sign: int, site: Site) -> list[Piece]:
    """Rows of zeros around a map, or fewer rows of it."""
    given = getattr(site.layer, attribute)
    pairs = [given] if site.rank == 3 else given
    # torch begins with the last axis
    return [Piece(site.of("ZeroPad")(tuple(sign * m for pair in reversed(pairs) for m in pair)))]


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
    layer = site.layer
    return [Piece(site.of("Dropout")(layer.rate))] if layer.seed is None else None


def _up_sampling(site: Site) -> list[Piece] | None:
    layer, size = site.layer, site.layer.size
    size = (size,) if isinstance(size, int) else tuple(size)
    mode = getattr(layer, "interpolation", "nearest")
    # Torch rounds a pixel's place, to one too early with factors such as 41; it smooths floats.
    smooth = mode in ("bilinear", "bicubic") and layer.compute_dtype in ("float32", "float64")
    if not (smooth or (mode == "nearest" and max(size) < 41)):
        return None
    factors = tuple(float(n) for n in size)
    return [Piece(nn.Upsample(None, factors, mode, False if smooth else None))]


# Modules of torch in a Keras model


def _torch_module(site: Site) -> list[Piece]:
    """A copy of the user's own module, on the tensors of the one that the Keras layer has."""
    own = site.layer.module
    variables = {id(keras_graph.raw_value(v)): v for v in site.layer.variables}
    # What hooks compute before each call, such as pruned weights, can't be copied with its history.
    values = (value for part in own.modules() for value in vars(part).values())
    computed = [v for v in values if isinstance(v, Tensor) and not v.is_leaf]
    module = copy.deepcopy(own, {id(tensor): tensor.detach() for tensor in computed})
    for path, part in own.named_modules():
        copied = module.get_submodule(path)
        for name, parameter in part._parameters.items():
            if id(parameter) in variables:
                site.set_(copied, name, variables[id(parameter)])
            elif site.share:  # it came after Keras had listed the parameters
                copied._parameters[name] = parameter
        if site.share:
            copied._buffers.update(part._buffers)
            site.ties.wrapped.append((copied, part))
    return [Piece(module, "", "keras")]


CONVERTERS: dict[type, Converter] = {
    **PRODUCTS,
    layers.BatchNormalization: _batch_norm,
    layers.GroupNormalization: _group_norm,
    layers.LayerNormalization: _layer_norm,
    layers.Normalization: _normalization,
    layers.RMSNormalization: _rms_norm,
    layers.Rescaling: _rescaling,
    keras_graph.LayerScale: _layer_scale,
    **dict.fromkeys(all_ranks("MaxPooling"), _max_pool),
    **dict.fromkeys(all_ranks("AveragePooling"), _average_pool),
    **dict.fromkeys(all_ranks("AdaptiveMaxPooling"), partial(_adaptive, "AdaptiveMaxPool")),
    **dict.fromkeys(all_ranks("AdaptiveAveragePooling"), partial(_adaptive, "AdaptiveAvgPool")),
    **dict.fromkeys(all_ranks("GlobalAveragePooling"), _global_average),
    **dict.fromkeys(
        all_ranks("GlobalMaxPooling"), lambda site: [Piece(GlobalMaxPool(site.layer.keepdims))]
    ),
    **dict.fromkeys(all_ranks("ZeroPadding"), partial(_padded, "padding", 1)),
    **dict.fromkeys(all_ranks("Cropping"), partial(_padded, "cropping", -1)),
    **dict.fromkeys(all_ranks("UpSampling"), _up_sampling),
    **dict.fromkeys(all_ranks("SpatialDropout"), _spatial_dropout),
    layers.Dropout: _dropout,
    layers.Flatten: _flatten,
    layers.Identity: lambda site: [Piece(nn.Identity(), "", "any")],
    layers.TorchModuleWrapper: _torch_module,
}
# What computes in another dtype than its weights have as Keras does.
_MIXED = {
    layers.BatchNormalization,
    layers.Dense,
    layers.LayerNormalization,
    *all_ranks("Conv"),
    *all_ranks("DepthwiseConv"),
    *all_ranks("SeparableConv"),
}
# What takes whole numbers as Keras does; other layers of Keras make floats of them, each its way.
_WHOLE = {
    layers.Embedding,
    layers.Flatten,
    layers.Identity,
    layers.Normalization,
    layers.Rescaling,
    layers.TorchModuleWrapper,
}


def convert(site: Site) -> list[Piece]:
    """The modules of a layer, in the order in which they run; none where Keras must run it."""
    layer = site.layer
    converter = CONVERTERS.get(type(layer))
    if converter is None or (site.is_mixed and layer.variables and type(layer) not in _MIXED):
        return []
    if "float" not in site.given and type(layer) not in _WHOLE:
        return []
    if type(layer) is not layers.TorchModuleWrapper and not _holds_its_weights(layer):
        return []
    return converter(site) or []


def _holds_its_weights(layer: keras.Layer) -> bool:
    """Whether nothing stands in a weight's place, as None does after `dense.bias = None`."""
    held = {id(value) for value in vars(layer).values() if isinstance(value, keras.Variable)}
    return held.issuperset(map(id, keras_graph.own_variables(layer)))
