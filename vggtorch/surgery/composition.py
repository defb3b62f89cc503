"""Exact algebra of linear layers: what one layer must be to compute what a chain of them does.

`compose_` multiplies the kernels out, whatever their strides, padding, dilation and groups. No
images are needed. Activations between them are left out, and it says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod

import keras
import numpy as np

from vggtorch.keras_graph import calls_of, operation_kind, same_padding, scale_and_shift

SKIPPED = (  # layers that pass their input on at inference
    keras.layers.InputLayer,
    keras.layers.Dropout,
    keras.layers.SpatialDropout2D,
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
    """

    exact: bool
    reasons: tuple[str, ...]
    border: int
    kernel_size: tuple[int, int]
    lost_bias: float = 0.0


@dataclass(frozen=True)
class _Linear:
    """y[i] = bias + sum over u of x[i * stride + u - padding] @ kernel[u], in two dimensions."""

    kernel: np.ndarray  # HWIO, float64, dilation already filled in with zeros
    bias: np.ndarray  # O
    strides: tuple[int, int] = (1, 1)
    padding: str | tuple[tuple[int, int], tuple[int, int]] = "valid"


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


def _linear_parts(layer: keras.Layer, channels: int) -> list[_Linear]:
    """The linear operations of a layer, its activation left out; `channels` enter it."""
    if operation_kind(layer) == "Flip" and layer.axis in (-1, 3):  # RGB to BGR, channels last
        return [_Linear(np.eye(channels)[None, None, ::-1], np.zeros(channels))]
    match layer:
        case keras.layers.SeparableConv2D():
            pointwise = _array(layer.pointwise_kernel)
            depthwise = _dilate(_depthwise(_array(layer.depthwise_kernel)), layer.dilation_rate)
            return [
                _Linear(depthwise, np.zeros(depthwise.shape[3]), layer.strides, layer.padding),
                _Linear(pointwise, _bias(layer, pointwise.shape[3])),
            ]
        case keras.layers.Conv2D() | keras.layers.DepthwiseConv2D():
            if isinstance(layer, keras.layers.DepthwiseConv2D):
                kernel = _depthwise(_array(layer.kernel))
            else:
                kernel = _ungroup(_array(layer.kernel), layer.groups)
            kernel = _dilate(kernel, layer.dilation_rate)
            return [_Linear(kernel, _bias(layer, kernel.shape[3]), layer.strides, layer.padding)]
        case keras.layers.Dense():
            kernel = _array(layer.kernel)[None, None]
            return [_Linear(kernel, _bias(layer, kernel.shape[3]))]
        case keras.layers.BatchNormalization():
            return [_batch_norm(layer)]
        case keras.layers.Rescaling():
            return [
                _scale(
                    np.broadcast_to(np.asarray(layer.scale, float), channels),
                    np.broadcast_to(np.asarray(layer.offset, float), channels),
                )
            ]
        case keras.layers.ZeroPadding2D():
            return [
                _Linear(np.eye(channels)[None, None], np.zeros(channels), (1, 1), layer.padding)
            ]
        case keras.layers.AveragePooling2D() if layer.padding == "valid":
            kernel = np.tile(np.eye(channels) / prod(layer.pool_size), (*layer.pool_size, 1, 1))
            return [_Linear(kernel, np.zeros(channels), layer.strides)]
    raise ValueError(
        f"Layer {layer.name!r} ({type(layer).__name__}) is not a linear layer that can be "
        f"composed: composable are Conv2D, DepthwiseConv2D, SeparableConv2D, Dense, "
        f"BatchNormalization, Rescaling, ZeroPadding2D and AveragePooling2D with padding='valid', "
        f"with activations and dropout between them. Use init='distill', init='copy' if the new "
        f"layers have weights of the same shapes, or leave this layer out of those to replace."
    )


def _activation(layer: keras.Layer) -> str | None:
    """The activation of a layer as text; None where it is linear."""
    if isinstance(layer, keras.layers.Activation):
        activation = layer.activation
    elif isinstance(layer, keras.layers.ReLU) and not layer.negative_slope and not layer.threshold:
        # Keras's ReLU layer with its defaults is the function relu
        activation = keras.activations.relu if layer.max_value is None else keras.activations.relu6
        if layer.max_value not in (None, 6):
            return f"ReLU(max_value={layer.max_value})"
    elif isinstance(layer, POINTWISE):
        config = {k: v for k, v in layer.get_config().items() if k not in ("name", "dtype")}
        return f"{type(layer).__name__}({config})"
    else:
        activation = getattr(layer, "activation", None)
    if activation is None or activation is keras.activations.linear:
        return None
    return getattr(activation, "__name__", str(activation))


def _channels(layers: Sequence[keras.Layer]) -> int:
    """How many channels enter a chain, from the first of its layers whose weights say so."""
    for layer in layers:
        match layer:
            case keras.layers.SeparableConv2D():
                return layer.depthwise_kernel.shape[2]
            case keras.layers.DepthwiseConv2D():
                return layer.kernel.shape[2]
            case keras.layers.Conv2D():
                return layer.kernel.shape[2] * layer.groups
            case keras.layers.Dense():
                return layer.kernel.shape[0]
            case keras.layers.BatchNormalization():
                return layer.moving_mean.shape[0]
    names = [layer.name for layer in layers]
    raise ValueError(f"None of the layers {names} has weights: there is nothing to compose.")


def _size(layer: keras.Layer) -> tuple[int | None, int | None]:
    """Height and width of the map that enters a layer; None where the graph leaves it open."""
    shapes = [tensor.shape for node in calls_of(layer)[:1] for tensor in node.input_tensors[:1]]
    if not shapes or len(shapes[0]) != 4:
        return None, None
    (shape,) = shapes
    data_format = getattr(layer, "data_format", keras.config.image_data_format())
    return shape[2:] if data_format == "channels_first" else shape[1:3]


def _pad(linear: _Linear, size: Sequence[int | None]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Zeros before and after, by rows and columns; a size that is open divides by the stride."""
    if not isinstance(linear.padding, str):
        return linear.padding
    if linear.padding != "same":
        return (0, 0), (0, 0)
    axes = zip(size, linear.kernel.shape[:2], linear.strides, strict=True)
    rows, columns = (same_padding(n or stride, k, stride) for n, k, stride in axes)
    return rows, columns


def _then(first: np.ndarray, strides: Sequence[int], second: np.ndarray) -> np.ndarray:
    """The kernel of two convolutions: `first` with `strides`, `second` on its output."""
    (sh, sw), (h1, w1), (h2, w2) = strides, first.shape[:2], second.shape[:2]
    kernel = np.zeros((h1 + sh * (h2 - 1), w1 + sw * (w2 - 1), first.shape[2], second.shape[3]))
    for i, j in np.ndindex(h2, w2):
        if second[i, j].any():  # dilation leaves whole taps at zero
            kernel[sh * i : sh * i + h1, sw * j : sw * j + w1] += first @ second[i, j]
    return kernel


def _inner(layers: Sequence[keras.Layer]) -> Iterator[keras.Layer]:
    """The layers of a chain, those of nested Sequential models among them."""
    for layer in layers:
        if isinstance(layer, keras.Sequential):
            yield from _inner(layer.layers)
        else:
            yield layer


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
        if not isinstance(layer, keras.Operation):
            raise ValueError(
                f"compose_ expects built Keras layers, received {layer!r}. By names: "
                f"vt.replace(model, names, new, init='compose')."
            )
    layers = [layer for layer in _inner(chain) if not isinstance(layer, SKIPPED)]
    channels = _channels(layers)
    reasons: list[str] = []
    kernel, bias = np.eye(channels)[None, None], np.zeros(channels)
    strides, padding, border = (1, 1), np.zeros((2, 2), int), 0
    size = start = _size(layers[0])

    for position, layer in enumerate(layers):
        activation = _activation(layer)
        if position < len(layers) - 1 and activation is not None:
            if all(isinstance(rest, POINTWISE) for rest in layers[position + 1 :]):
                reasons.append(f"{layer.name!r}: two activations in a row, {activation} left out")
            else:
                reasons.append(f"{layer.name!r}: its activation {activation} is left out")
        if isinstance(layer, POINTWISE):
            continue
        for linear in _linear_parts(layer, kernel.shape[3]):
            if linear.kernel.shape[2] != kernel.shape[3]:
                raise ValueError(
                    f"Layer {layer.name!r} takes {linear.kernel.shape[2]} channels, but the layer "
                    f"before it in the chain gives {kernel.shape[3]}: pass the layers in the order "
                    f"of their computation."
                )
            pads = np.array(_pad(linear, size))
            if any(n is None and s > 1 for n, s in zip(size, linear.strides, strict=True)) and (
                linear.padding == "same"
            ):
                reasons.append(
                    f"{layer.name!r}: padding='same' with strides {linear.strides} depends on the "
                    f"size of the input, which is open; taken for a multiple of the strides"
                )
            # Zeros around an intermediate map are what the chain sees and the product does not,
            # unless that map is zero where the input is.
            untouched = kernel.shape[:2] == (1, 1) and not bias.any()
            edge = 0 if untouched else int(pads.max())
            border = ceil((border + edge) / min(linear.strides)) if border + edge else 0
            size = tuple(  # type: ignore[assignment]
                None if n is None else (n + p.sum() - k) // s + 1
                for n, p, k, s in zip(
                    size, pads, linear.kernel.shape[:2], linear.strides, strict=True
                )
            )
            bias = linear.bias + bias @ linear.kernel.sum((0, 1))
            kernel = _then(kernel, strides, linear.kernel)
            padding = padding + np.array(strides)[:, None] * pads
            strides = (strides[0] * linear.strides[0], strides[1] * linear.strides[1])

    last, ends_in = _activation(layers[-1]), _activation(new)
    if last != ends_in:
        reasons.append(
            f"the chain ends in {last or 'linear'}, {new.name!r} in {ends_in or 'linear'}"
        )
    weights = _laid_into(new, kernel, strides, padding[:, 0], start, reasons)
    lost_bias = 0.0 if new.use_bias else float(np.abs(bias).max())
    if lost_bias:
        reasons.append(
            f"{new.name!r} has no bias, and the chain has one: it adds up to {lost_bias:.3g} to a "
            f"channel, beside a kernel whose channels have norms up to "
            f"{np.sqrt((kernel**2).sum((0, 1, 2))).max():.3g}"
        )
    new.set_weights([weights, bias] if new.use_bias else [weights])
    return Composition(not reasons, tuple(reasons), border, kernel.shape[:2], lost_bias)


def _laid_into(
    new: keras.Layer,
    kernel: np.ndarray,
    strides: tuple[int, int],
    before: np.ndarray,
    size: Sequence[int | None],
    reasons: list[str],
) -> np.ndarray:
    """A composed kernel in the shape of `new`'s, each tap over the pixel that it is meant for."""
    height, width = kernel.shape[:2]
    if isinstance(new, keras.layers.Dense):
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
    pads = _pad(
        _Linear(np.zeros(shape), np.zeros(0), strides, getattr(new, "padding", "valid")), size
    )
    laid = np.zeros(shape)
    target, source = [], []
    for axis in (0, 1):
        offset = pads[axis][0] - int(before[axis])  # where the composed kernel's first tap goes
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
