"""Exact algebra of linear layers: what one layer must be to compute what a chain of them does.

`compose_` multiplies the kernels out, whatever their strides, padding, dilation and groups. No
images are needed. Activations between them are left out, and it says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import keras
import numpy as np

from vggtorch.keras_graph import calls_of, operation_kind, same_padding, scale_and_shift
from vggtorch.lowering import all_ranks

# Kinds of layers here are Keras's own classes: a subclass of a user's may compute something else.
SKIPPED = (  # layers that pass their input on at inference
    keras.layers.InputLayer,
    keras.layers.Dropout,
    *all_ranks("SpatialDropout"),
    keras.layers.GaussianNoise,
    keras.layers.GaussianDropout,
    keras.layers.ActivityRegularization,
)
POINTWISE = (  # layers that are nothing but an activation
    keras.layers.Activation,
    keras.layers.ReLU,
    keras.layers.LeakyReLU,
    keras.layers.PReLU,
    keras.layers.ELU,
    keras.layers.Softmax,
)


@dataclass(frozen=True)
class Composition:
    """What `compose_` did.

    Attributes:
        exact: the new layer computes what the chain computes, up to rounding, `border` aside.
        reasons: where `exact` is False, why; one sentence for each cause.
        border: rows (and columns) of the output along each edge, at most, that may differ all the
            same, because the chain pads its intermediate maps with zeros, which one layer cannot.
        kernel_size: height and width of the composed kernel, before it was laid into the new one.
        lost_bias: the largest absolute value of the chain's bias, where the new layer has none.
        settings: those of the reasons that other settings of the new layer would mend.
    """

    exact: bool
    reasons: tuple[str, ...]
    border: int
    kernel_size: tuple[int, int]
    lost_bias: float = 0.0
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Linear:
    """y[i] = bias + sum over u of x[i * stride + u - padding] @ kernel[u], in two dimensions."""

    kernel: np.ndarray  # HWIO, float64, dilation already filled in with zeros
    bias: np.ndarray  # O
    strides: tuple[int, int] = (1, 1)
    padding: str | Sequence[Sequence[int]] = "valid"  # or ((top, bottom), (left, right))


def compose_(old_layers: Sequence[keras.Layer], new: keras.Layer) -> Composition:
    """Give `new` the product of a chain of linear layers as its weights, in place.

    The chain may hold Conv2D (strides, padding, dilation, groups), DepthwiseConv2D,
    SeparableConv2D, Dense, BatchNormalization (as at inference), Rescaling, ZeroPadding2D and
    AveragePooling2D. Activations between them are left out, which makes the result the best
    linear reading of the chain and not its equal; the Composition says so. A composed kernel
    smaller than `new`'s is laid into it where its taps fall, zeros around; a larger one is cropped.

    >>> import keras, vggtorch as vt
    >>> chain = [keras.layers.Conv2D(4, 3), keras.layers.Conv2D(5, 3)]
    >>> new = keras.layers.Conv2D(5, 5)
    >>> for layer, channels in zip([*chain, new], (3, 4, 3)):
    ...     layer.build((None, 32, 32, channels))
    >>> vt.compose_(chain, new).exact
    True

    Args:
        old_layers: the chain in the order of its computation, built.
        new: a built Conv2D (groups=1, dilation_rate=1) or Dense.

    Returns:
        Whether `new` now equals the chain, and if not, why.

    Raises:
        ValueError: a layer is not linear, or strides, channels or kind don't fit; `new` keeps its
            weights then.
    """
    chain = list(old_layers) if isinstance(old_layers, Iterable) else [old_layers]
    for layer in (*chain, new):
        if not (isinstance(layer, keras.Operation) and getattr(layer, "built", True)):
            raise ValueError(
                f"compose_ expects built Keras layers, received {layer!r}. By names: "
                f"vt.replace(model, names, new, init='compose')."
            )
    layers = [layer for layer in _inner(chain) if type(layer) not in SKIPPED]
    channels_first = _check_axes([*layers, new])
    size, reasons, settings = _size(layers, channels_first), list[str](), list[str]()
    product, border = _product(layers, size, reasons)
    last, ends_in = _activation(layers[-1]), _activation(new)
    if last != ends_in:
        settings.append(f"the chain ends in {_shown(last)}, {new.name!r} in {_shown(ends_in)}")
    weights = _laid_into(new, product, size, reasons, settings)
    kernel, bias = product.kernel, product.bias
    lost_bias = 0.0 if new.use_bias else float(np.abs(bias).max())
    if lost_bias:
        settings.append(
            f"{new.name!r} has no bias, and the chain has one: it adds up to {lost_bias:.3g} to a "
            f"channel, beside a kernel whose channels have norms up to "
            f"{np.sqrt((kernel**2).sum((0, 1, 2))).max():.3g}"
        )
    new.set_weights([weights, bias] if new.use_bias else [weights])
    reasons = [*reasons, *settings]
    return Composition(
        not reasons, tuple(reasons), border, kernel.shape[:2], lost_bias, tuple(settings)
    )


# The chain


def _inner(layers: Sequence[keras.Layer]) -> Iterator[keras.Layer]:
    """The layers of a chain, those of nested Sequential models among them."""
    for layer in layers:
        if type(layer) is keras.Sequential:
            yield from _inner(layer.layers)
        else:
            yield layer


def _check_axes(layers: Sequence[keras.Layer]) -> bool:
    """Whether all layers take channels along axis 1, not the last; ValueError where they differ."""
    by_axis = {axis: layer.name for layer in layers if (axis := _channel_axis(layer)) is not None}
    if len(by_axis) > 1:
        listed = ", ".join(f"{name!r} along {axis}" for axis, name in by_axis.items())
        raise ValueError(
            f"The layers take channels along different axes, {listed}: they can't be composed."
        )
    return "axis 1" in by_axis


def _channel_axis(layer: keras.Layer) -> str | None:
    """The axis along which a layer takes channels; None where it is the same to the layer."""
    axis: Any = None
    if type(layer) is keras.layers.BatchNormalization:
        axis = layer.axis % layer.input_spec.ndim
        axis = -1 if axis == layer.input_spec.ndim - 1 else axis
    elif operation_kind(layer) == "Flip":
        axis = -1 if layer.axis in (-1, 3) else None
    elif type(layer) is keras.layers.Dense or (
        type(layer) is keras.layers.Rescaling and (np.ndim(layer.scale) or np.ndim(layer.offset))
    ):
        axis = -1
    elif hasattr(layer, "data_format"):
        axis = 1 if layer.data_format == "channels_first" else -1
    return None if axis is None else "the last axis" if axis == -1 else f"axis {axis}"


def _size(layers: Sequence[keras.Layer], channels_first: bool) -> tuple[int | None, int | None]:
    """Height and width of the map that enters a chain; None where the graph leaves it open."""
    nodes = [node for layer in layers[:1] for node in calls_of(layer)[:1]]
    shapes = [tensor.shape for node in nodes for tensor in node.input_tensors[:1]]
    if not shapes or len(shapes[0]) != 4:
        return None, None
    return shapes[0][2:] if channels_first else shapes[0][1:3]


def _channels(layers: Sequence[keras.Layer]) -> int:
    """How many channels enter a chain, from the first of its layers whose weights say so."""
    for layer in layers:
        if getattr(layer, "weights", None):
            return _linear_parts(layer, 0)[0].kernel.shape[2]
    names = [layer.name for layer in layers]
    raise ValueError(f"None of the layers {names} has weights: there is nothing to compose.")


def _activation(layer: keras.Layer) -> Any:
    """The activation of a layer, a function or a text that says it; None where it is linear."""
    if type(layer) is keras.layers.Activation:
        activation = layer.activation
    elif type(layer) is keras.layers.ReLU and not layer.negative_slope and not layer.threshold:
        # Keras's ReLU layer with its defaults is the function relu
        activation = keras.activations.relu if layer.max_value is None else keras.activations.relu6
        if layer.max_value not in (None, 6):
            return f"ReLU(max_value={layer.max_value})"
    elif type(layer) in POINTWISE:
        config = {k: v for k, v in layer.get_config().items() if k not in ("name", "dtype")}
        return f"{type(layer).__name__}({config})"
    else:
        activation = getattr(layer, "activation", None)
    return None if activation is keras.activations.linear else activation


def _shown(activation: Any) -> str:
    """An activation as text."""
    return "linear" if activation is None else getattr(activation, "__name__", str(activation))


def _product(
    layers: Sequence[keras.Layer], size: Sequence[int | None], reasons: list[str]
) -> tuple[_Linear, int]:
    """A chain as one linear operation, and the rows along its output's edges that may differ.

    `size` is that of the map that enters; `reasons` gets what makes the chain another thing.
    """
    channels = _channels(layers)
    kernel, bias = np.eye(channels)[None, None], np.zeros(channels)
    strides, padding, border = (1, 1), np.zeros((2, 2), int), 0
    for position, layer in enumerate(layers):
        activation, behind = _activation(layer), layers[position + 1 :]
        if behind and activation is not None:
            if all(type(rest) in POINTWISE for rest in behind):
                what = f"two activations in a row, {_shown(activation)} left out"
            else:
                what = f"its activation {_shown(activation)} is left out"
            reasons.append(f"{layer.name!r}: {what}")
        if type(layer) in POINTWISE:
            continue
        for linear in _linear_parts(layer, kernel.shape[3]):
            if linear.kernel.shape[2] != kernel.shape[3]:
                raise ValueError(
                    f"Layer {layer.name!r} takes {linear.kernel.shape[2]} channels, but the layer "
                    f"before it in the chain gives {kernel.shape[3]}: pass the layers in the order "
                    f"of their computation."
                )
            pads = _pad(linear, size)
            steps = list(zip(size, pads, linear.kernel.shape[:2], linear.strides, strict=True))
            if linear.padding == "same" and any(n is None and s > 1 for n, _, _, s in steps):
                reasons.append(
                    f"{layer.name!r}: padding='same' with strides {linear.strides} depends on the "
                    f"size of the input, which is open; taken for a multiple of the strides"
                )
            # Zeros around an intermediate map are what the chain sees and the product does not,
            # unless that map is zero where the input is.
            untouched = kernel.shape[:2] == (1, 1) and not bias.any()
            border = ceil((border + (0 if untouched else int(pads.max()))) / min(linear.strides))
            size = [None if n is None else (n + p.sum() - k) // s + 1 for n, p, k, s in steps]
            bias = linear.bias + bias @ linear.kernel.sum((0, 1))
            kernel = _then(kernel, strides, linear.kernel)
            padding = padding + np.array(strides)[:, None] * pads
            strides = (strides[0] * linear.strides[0], strides[1] * linear.strides[1])
    return _Linear(kernel, bias, strides, padding.tolist()), border


def _pad(linear: _Linear, size: Sequence[int | None]) -> np.ndarray:
    """Zeros before and after, by rows and columns; a size that is open divides by the stride."""
    if not isinstance(linear.padding, str):
        return np.array(linear.padding)
    if linear.padding != "same":
        return np.zeros((2, 2), int)
    axes = zip(size, linear.kernel.shape[:2], linear.strides, strict=True)
    return np.array([same_padding(n or stride, k, stride) for n, k, stride in axes])


def _sizes(linear: _Linear, size: Sequence[int | None]) -> list[int]:
    """Rows and columns of the output, counted from 0; a size that is open is one stride."""
    pads = _pad(linear, size).sum(axis=1)
    axes = zip(size, linear.strides, pads, linear.kernel.shape[:2], strict=True)
    return [int(((n or stride) + pad - k) // stride) for n, stride, pad, k in axes]


def _then(first: np.ndarray, strides: Sequence[int], second: np.ndarray) -> np.ndarray:
    """The kernel of two convolutions: `first` with `strides`, `second` on its output."""
    (sh, sw), (h1, w1), (h2, w2) = strides, first.shape[:2], second.shape[:2]
    kernel = np.zeros((h1 + sh * (h2 - 1), w1 + sw * (w2 - 1), first.shape[2], second.shape[3]))
    for i, j in np.ndindex(h2, w2):
        if second[i, j].any():  # dilation leaves whole taps at zero
            kernel[sh * i : sh * i + h1, sw * j : sw * j + w1] += first @ second[i, j]
    return kernel


# Linear operations of layers


def _linear_parts(layer: keras.Layer, channels: int) -> list[_Linear]:
    """The linear operations of a layer, its activation left out; `channels` enter it."""
    kind = type(layer)
    if getattr(layer, "quantization_mode", None):
        raise ValueError(
            f"Layer {layer.name!r} is quantized ({layer.quantization_mode}); expected weights in "
            f"floating point. Compose first, quantize the result."
        )
    if operation_kind(layer) == "Flip" and layer.axis in (-1, 3):  # RGB to BGR, channels last
        return [_Linear(np.eye(channels)[None, None, ::-1], np.zeros(channels))]
    if kind is keras.layers.SeparableConv2D:
        pointwise = _array(layer.pointwise_kernel)
        depthwise = _dilate(_depthwise(_array(layer.depthwise_kernel)), layer.dilation_rate)
        return [
            _Linear(depthwise, np.zeros(depthwise.shape[3]), layer.strides, layer.padding),
            _Linear(pointwise, _bias(layer, pointwise.shape[3])),
        ]
    if kind in (keras.layers.Conv2D, keras.layers.DepthwiseConv2D):
        kernel = _array(layer.kernel)
        grouped = kind is keras.layers.Conv2D
        kernel = _ungroup(kernel, layer.groups) if grouped else _depthwise(kernel)
        kernel = _dilate(kernel, layer.dilation_rate)
        return [_Linear(kernel, _bias(layer, kernel.shape[3]), layer.strides, layer.padding)]
    if kind is keras.layers.Dense:
        kernel = _array(layer.kernel)[None, None]
        return [_Linear(kernel, _bias(layer, kernel.shape[3]))]
    if kind is keras.layers.BatchNormalization:
        return [_batch_norm(layer)]
    if kind is keras.layers.Rescaling and max(np.ndim(layer.scale), np.ndim(layer.offset)) < 2:
        factors = (np.asarray(layer.scale, float), np.asarray(layer.offset, float))
        return [_scale(*(np.broadcast_to(factor, channels) for factor in factors))]
    if kind is keras.layers.ZeroPadding2D:
        return [_Linear(np.eye(channels)[None, None], np.zeros(channels), padding=layer.padding)]
    if kind is keras.layers.AveragePooling2D and layer.padding == "valid":
        kernel = np.tile(np.eye(channels) / prod(layer.pool_size), (*layer.pool_size, 1, 1))
        return [_Linear(kernel, np.zeros(channels), layer.strides)]
    raise _not_linear(layer)


def _not_linear(layer: keras.Layer) -> ValueError:
    return ValueError(
        f"Layer {layer.name!r} ({type(layer).__name__}) is not a linear layer that can be "
        f"composed: composable are Conv2D, DepthwiseConv2D, SeparableConv2D, Dense, "
        f"BatchNormalization, Rescaling, ZeroPadding2D and AveragePooling2D with padding='valid', "
        f"with activations and dropout between them. Use init='distill', init='copy' if the new "
        f"layers have weights of the same shapes, or leave this layer out of those to replace."
    )


def _array(variable: keras.Variable) -> np.ndarray:
    return keras.ops.convert_to_numpy(variable).astype(np.float64)


def _dilate(kernel: np.ndarray, rate: Sequence[int]) -> np.ndarray:
    """A kernel whose taps are `rate` apart, with zeros between them."""
    height, width, inputs, outputs = kernel.shape
    shape = ((height - 1) * rate[0] + 1, (width - 1) * rate[1] + 1, inputs, outputs)
    spread = np.zeros(shape)
    spread[:: rate[0], :: rate[1]] = kernel
    return spread


def _ungroup(kernel: np.ndarray, groups: int) -> np.ndarray:
    """The kernel of a grouped convolution as that of an ordinary one: block-diagonal."""
    height, width, inputs, outputs = kernel.shape
    step = outputs // groups
    full = np.zeros((height, width, inputs * groups, outputs))
    for g in range(groups):
        block = slice(g * step, (g + 1) * step)
        full[:, :, g * inputs : (g + 1) * inputs, block] = kernel[:, :, :, block]
    return full


def _depthwise(kernel: np.ndarray) -> np.ndarray:
    """(H, W, I, multiplier) of a depthwise convolution -> HWIO with zeros between channels."""
    height, width, inputs, multiplier = kernel.shape
    return _ungroup(kernel.reshape(height, width, 1, inputs * multiplier), inputs)


def _bias(layer: keras.Layer, outputs: int) -> np.ndarray:
    return _array(layer.bias) if layer.use_bias else np.zeros(outputs)


def _scale(scale: np.ndarray, shift: np.ndarray) -> _Linear:
    """A factor and a summand for each channel, as a 1x1 convolution."""
    return _Linear(np.diag(scale)[None, None], shift)


def _batch_norm(layer: keras.layers.BatchNormalization) -> _Linear:
    mean, variance = _array(layer.moving_mean), _array(layer.moving_variance)
    gamma = _array(layer.gamma) if layer.scale else None
    beta = _array(layer.beta) if layer.center else None
    return _scale(*scale_and_shift(mean, variance, layer.epsilon, gamma, beta))


# The new layer


def _laid_into(
    new: keras.Layer,
    product: _Linear,
    size: Sequence[int | None],
    reasons: list[str],
    settings: list[str],
) -> np.ndarray:
    """A composed kernel in the shape of `new`'s, each tap over the pixel that it is meant for."""
    kernel, strides = product.kernel, product.strides
    height, width = kernel.shape[:2]
    if type(new) is keras.layers.Dense:
        if (height, width) != (1, 1) or strides != (1, 1):
            raise ValueError(
                f"The chain composes to a {height}x{width} kernel with strides {strides}; "
                f"{new.name!r} is a Dense layer, which sees one position. Use Conv2D."
            )
        shape = (1, 1, *new.kernel.shape)
    elif type(new) is not keras.layers.Conv2D or new.groups != 1 or max(new.dilation_rate) != 1:
        raise ValueError(
            f"A chain can be composed into one Conv2D (groups=1, dilation_rate=1) or Dense layer, "
            f"but {new.name!r} is {type(new).__name__} with "
            f"groups={getattr(new, 'groups', None)}, "
            f"dilation_rate={getattr(new, 'dilation_rate', None)}. If only such settings change "
            f"and the shapes of the weights stay, use init='copy'; else init='distill'."
        )
    else:
        shape = new.kernel.shape
        if new.strides != strides:
            raise ValueError(
                f"The chain has strides {strides} in all, {new.name!r} has {new.strides}: "
                f"give it strides={strides}, or, if it is to have the same weights under other "
                f"strides, use init='copy'."
            )
    if kernel.shape[2:] != tuple(shape[2:]):
        raise ValueError(
            f"The chain takes {kernel.shape[2]} channels to {kernel.shape[3]}, {new.name!r} takes "
            f"{shape[2]} to {shape[3]}: give it {kernel.shape[3]} outputs."
        )
    own = _Linear(np.zeros(shape), np.zeros(0), strides, getattr(new, "padding", "valid"))
    first_taps = _pad(own, size)[:, 0] - _pad(product, size)[:, 0]  # where the product's are laid
    if _sizes(own, size) != _sizes(product, size):
        settings.append(f"padding={own.padding!r} of {new.name!r} gives a map of another size")
    laid = np.zeros(shape)
    target, source = [], []
    for axis, offset in enumerate(first_taps.tolist()):
        low, high = max(offset, 0), min(offset + kernel.shape[axis], shape[axis])
        target.append(slice(low, max(low, high)))
        source.append(slice(low - offset, max(low, high) - offset))
    laid[tuple(target)] = kernel[tuple(source)]
    energy = (laid**2).sum() / max((kernel**2).sum(), np.finfo(float).tiny)
    if any(s.stop - s.start < n for s, n in zip(source, (height, width), strict=True)):
        reasons.append(
            f"the composed {height}x{width} kernel reaches beyond the {shape[0]}x{shape[1]} of "
            f"{new.name!r} (padding={new.padding!r}) and is cropped to {energy:.1%} of its energy"
        )
    return laid.reshape(new.kernel.shape)
