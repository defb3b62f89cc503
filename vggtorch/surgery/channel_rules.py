"""What each layer does to channels, said once: the table that `channel_flow.Flow` walks by.

A layer that makes or carries weights says along which axes they follow the channels; one that only
passes them on gives back what entered it.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers as kl

from vggtorch.keras_graph import operation_kind, raw_value
from vggtorch.lowering import all_ranks
from vggtorch.surgery.channel_flow import Call, Channels, Flow, Following, Ids, Rule, Sized


def rule_of(operation: Any) -> Rule | None:
    """The rule of a layer or operation, of just this class; None if it has none."""
    return _LAYERS.get(type(operation)) or _OPERATIONS.get(operation_kind(operation) or "")


def _channel_axis(call: Call) -> int:
    layout = getattr(call.layer, "data_format", "channels_last")
    return 1 if layout == "channels_first" else len(call.shape) - 1


def _convolution(flow: Flow, call: Call) -> Channels:
    layer, axis = call.layer, _channel_axis(call)
    read, made = flow.read(call, axis), flow.made_by(call, layer.filters)
    kernel = {-1: read, -2: made} if type(layer) in _TRANSPOSED else {-2: read, -1: made}
    groups = getattr(layer, "groups", 1)
    weights = {"kernel": kernel, "bias": {0: made}}
    flow.weigh(call, weights, Channels(axis, read), made, "filters", groups=groups)
    _activate(flow, call, made)
    return Channels(axis, made)


def _depthwise(flow: Flow, call: Call) -> Channels:
    axis = _channel_axis(call)
    read = flow.read(call, axis)
    made = np.repeat(read, call.layer.depth_multiplier)
    flow.weigh(call, {"kernel": {-2: read}, "bias": {0: made}}, Channels(axis, read))
    _activate(flow, call, made)
    return Channels(axis, made)


def _separable(flow: Flow, call: Call) -> Channels:
    layer, axis = call.layer, _channel_axis(call)
    read, made = flow.read(call, axis), flow.made_by(call, layer.filters)
    between = np.repeat(read, layer.depth_multiplier)
    weights = {
        "depthwise_kernel": {-2: read},
        "pointwise_kernel": {-2: between, -1: made},
        "bias": {0: made},
    }
    flow.weigh(call, weights, Channels(axis, read), made, "filters")
    _activate(flow, call, made)
    return Channels(axis, made)


def _dense(flow: Flow, call: Call) -> Channels:
    axis = len(call.shape) - 1
    read, made = flow.read(call, axis), flow.made_by(call, call.layer.units)
    weights = {"kernel": {0: read, 1: made}, "bias": {0: made}}
    flow.weigh(call, weights, Channels(axis, read), made, "units")
    _activate(flow, call, made)
    return Channels(axis, made)


def _embedding(flow: Flow, call: Call) -> Channels:
    flow.hold(call, "takes them for numbers of rows")
    made = flow.made_by(call, call.layer.output_dim)
    flow.weigh(call, {"embeddings": {1: made}}, None, made, "output_dim")
    return Channels(len(call.shape), made)


def _recurrent(flow: Flow, call: Call) -> list[Channels | None]:
    layer = call.layer
    read, made = flow.read(call, 2), flow.made_by(call, layer.units)
    gates = np.tile(made, {kl.SimpleRNN: 1, kl.GRU: 3, kl.LSTM: 4}[type(layer)])
    weights = {
        "kernel": {0: read, 1: gates},
        "recurrent_kernel": {0: made, 1: gates},
        "bias": {-1: gates},
    }
    flow.weigh(call, weights, Channels(2, read), made, "units", holder=layer.cell)
    _activate(flow, call, made)
    return [Channels(len(t.shape) - 1, made) for t in call.node.outputs]


def _batch_norm(flow: Flow, call: Call) -> Channels:
    axis = call.layer.axis % len(call.shape)
    ids = flow.read(call, axis)
    per_channel = {name: {0: ids} for name in ("gamma", "beta", "moving_mean", "moving_variance")}
    flow.weigh(call, per_channel, Channels(axis, ids))
    return Channels(axis, ids)


def _prelu(flow: Flow, call: Call) -> Channels:
    channels = call.channels
    axis, alpha = channels.axis - 1, raw_value(call.layer.alpha)
    shared = alpha.shape[axis] == 1 and len(channels.ids) > 1
    flow.weigh(call, {"alpha": {} if shared else {axis: channels.ids}}, channels)
    return channels


def _activate(flow: Flow, call: Call, ids: Ids) -> None:
    """Hold what a layer makes if its activation looks at more than one channel."""
    for attribute in ("activation", "recurrent_activation"):
        activation = getattr(call.layer, attribute, None)
        if not _one_by_one(activation):
            name = getattr(activation, "__name__", type(activation).__name__)
            reason = f"the activation {name!r} of {call.what} isn't known to take them one by one"
            flow.held.append((ids, reason))


def _one_by_one(activation: Any) -> bool:
    """Whether an activation computes each value from that value alone."""
    if isinstance(activation, keras.Layer):
        return type(activation) in (kl.ReLU, kl.LeakyReLU, kl.ELU)
    return activation is None or activation in _ELEMENTWISE


def _activation(flow: Flow, call: Call) -> Channels:
    _activate(flow, call, call.channels.ids)
    return call.channels


def _softmax(flow: Flow, call: Call) -> Channels:
    if call.channels.axis in np.atleast_1d(call.layer.axis) % len(call.shape):
        flow.hold(call, "divides each by a sum over all of them")
    return call.channels


def _passing(flow: Flow, call: Call) -> Channels:
    return call.channels


def _dropout(flow: Flow, call: Call) -> Channels | None:
    shape = getattr(call.layer, "noise_shape", None)
    if shape is not None and shape[call.channels.axis] not in (None, 1):
        flow.hold(call, f"its noise_shape {tuple(shape)} counts them")
        return None
    return call.channels


def _rescaling(flow: Flow, call: Call) -> Channels | None:
    if np.ndim(call.layer.scale) or np.ndim(call.layer.offset):
        flow.hold(call, "has a factor of its own for each")
        return None
    return call.channels


def _spatial(flow: Flow, call: Call) -> Channels | None:
    axis = _channel_axis(call)
    if call.channels.axis != axis:
        flow.hold(call, f"takes axis {axis} for that of the channels, which isn't theirs")
        return None
    return call.channels


def _global_pool(flow: Flow, call: Call) -> Channels | None:
    channels = _spatial(flow, call)
    if channels is None or call.layer.keepdims:
        return channels
    return Channels(1, channels.ids)


def _reduced(flow: Flow, call: Call) -> Channels | None:
    """A mean, sum or maximum over other axes than theirs: `keras.ops.mean(x, axis=(1, 2))`."""
    channels, rank = call.channels, len(call.shape)
    given = call.layer.axis
    axes = {a % rank for a in np.atleast_1d(range(rank) if given is None else given).tolist()}
    if channels.axis in axes:
        flow.hold(call, "computes one value of all of them")
        return None
    before = 0 if call.layer.keepdims else sum(axis < channels.axis for axis in axes)
    return Channels(channels.axis - before, channels.ids)


def _spread(call: Call) -> Ids | None:
    """The id of every value of one image; None where a size is open."""
    channels, sizes = call.channels, call.shape[1:]
    if None in sizes:
        return None
    shape = [1] * len(sizes)
    shape[channels.axis - 1] = len(channels.ids)
    return np.broadcast_to(channels.ids.reshape(shape), sizes)  # type: ignore[arg-type]


def _flatten(flow: Flow, call: Call) -> Channels | None:
    spread = _spread(call)
    if spread is None:
        flow.hold(call, "the size of their maps is open")
        return None
    if call.layer.data_format == "channels_first":  # Keras turns the map to channels last
        spread = np.moveaxis(spread, 0, -1)
    return Channels(1, spread.reshape(-1))


def _reshape(flow: Flow, call: Call) -> Channels | None:
    channels, target = call.channels, tuple(call.node.outputs[0].shape)
    found = None
    innermost = channels.axis == len(call.shape) - 1
    if innermost and target[-1] == len(channels.ids):
        found = Channels(len(target) - 1, channels.ids)
    elif (spread := _spread(call)) is not None and None not in target[1:]:
        values = spread.reshape(target[1:])  # type: ignore[arg-type]
        for axis, size in enumerate(values.shape):
            rows = np.moveaxis(values, axis, 0).reshape(size, -1)
            if (rows == rows[:, :1]).all():
                found = Channels(axis + 1, rows[:, 0])
                break
    if found is None:
        flow.hold(call, "leaves no axis along which only they stand")
        return None
    given = (None, *call.layer.target_shape)
    sized: dict[str, Sized] = {}
    if given[found.axis] != -1:
        sized["target_shape"] = (given, found.axis, found.ids)
    flow.follow(Following(call.layer, call.path, call.shape, channels, {}, sized))
    return found


def _permute(flow: Flow, call: Call) -> Channels:
    return Channels(call.layer.dims.index(call.channels.axis) + 1, call.channels.ids)


def _repeat_vector(flow: Flow, call: Call) -> Channels:
    return Channels(2, call.channels.ids)


def _common_axis(flow: Flow, call: Call) -> int | None:
    """The axis of the channels of all tensors that enter; None where they have none in common."""
    axes = {channels.axis for channels in call.entering if channels is not None}
    ranks = {len(tensor.shape) for tensor in call.tensors}
    if len(axes) == 1 and len(ranks) == 1:
        return axes.pop()
    flow.hold(call, "they stand along other axes of what it joins them with")
    return None


def _merge(flow: Flow, call: Call) -> Channels | None:
    """One channel of each tensor makes one; a tensor with one channel serves all of the others."""
    axis = _common_axis(flow, call)
    if axis is None:
        return None
    sizes = [tensor.shape[axis] for tensor in call.tensors]
    if None in sizes:
        flow.hold(call, "joins them with a tensor whose size along their axis is open")
        return None
    wide = [place for place, size in enumerate(sizes) if size == max(sizes)]
    if any(np.ndim(value) for value in _constants(call)):
        flow.hold(call, "joins them with an array of numbers")
        return None
    rows = {id(call.tensors[place]): flow.along(call, axis, place) for place in wide}
    return Channels(axis, flow.join(list(rows.values()), call.what))


def _constants(call: Call) -> list[Any]:
    """The arguments of an operation that aren't tensors of the graph."""
    arguments = (call.node.arguments.args, call.node.arguments.kwargs)
    return [v for v in keras.tree.flatten(arguments) if not isinstance(v, keras.KerasTensor)]


def _concatenate(flow: Flow, call: Call) -> Channels | None:
    axis = _common_axis(flow, call)
    if axis is None:
        return None
    places = range(len(call.entering))
    rows = [flow.along(call, axis, place) for place in places]
    if call.layer.axis % len(call.shape) == axis:
        return Channels(axis, np.concatenate(rows))
    return Channels(axis, flow.join(rows, call.what))


_ELEMENTWISE = [
    *(keras.activations.celu, keras.activations.elu, keras.activations.exponential),
    *(keras.activations.gelu, keras.activations.hard_shrink, keras.activations.hard_sigmoid),
    *(keras.activations.hard_silu, keras.activations.hard_tanh, keras.activations.leaky_relu),
    *(keras.activations.linear, keras.activations.log_sigmoid, keras.activations.mish),
    *(keras.activations.relu, keras.activations.relu6, keras.activations.selu),
    *(keras.activations.sigmoid, keras.activations.silu, keras.activations.soft_shrink),
    *(keras.activations.softplus, keras.activations.softsign, keras.activations.sparse_plus),
    *(keras.activations.sparse_sigmoid, keras.activations.squareplus, keras.activations.tanh),
    *(keras.activations.tanh_shrink, keras.activations.threshold),
]

# Layers for one, two and three spatial axes that take a map and give one of the same channels.
_SPATIAL = (
    "AdaptiveAveragePooling", "AdaptiveMaxPooling", "AveragePooling", "Cropping", "MaxPooling",
    "SpatialDropout", "UpSampling", "ZeroPadding",
)  # fmt: skip

_TRANSPOSED = (kl.Conv1DTranspose, kl.Conv2DTranspose, kl.Conv3DTranspose)

_LAYERS = {
    **dict.fromkeys((*all_ranks("Conv"), *_TRANSPOSED), Rule(_convolution, makes=True)),
    **dict.fromkeys(all_ranks("DepthwiseConv"), Rule(_depthwise, makes=True)),
    **dict.fromkeys(all_ranks("SeparableConv"), Rule(_separable, makes=True)),
    **dict.fromkeys((kl.SimpleRNN, kl.GRU, kl.LSTM), Rule(_recurrent, makes=True)),
    **dict.fromkeys((kl.Add, kl.Subtract, kl.Multiply), Rule(_merge, joins=True)),
    **dict.fromkeys((kl.Average, kl.Maximum, kl.Minimum), Rule(_merge, joins=True)),
    **dict.fromkeys((kl.ReLU, kl.LeakyReLU, kl.ELU, kl.Identity), Rule(_passing)),
    **dict.fromkeys((kl.GaussianNoise, kl.ActivityRegularization), Rule(_passing)),
    **dict.fromkeys((kl.Dropout, kl.GaussianDropout, kl.AlphaDropout), Rule(_dropout)),
    **{layer: Rule(_spatial) for name in _SPATIAL for layer in all_ranks(name)},
    **dict.fromkeys((kl.CenterCrop, kl.RandomFlip, kl.Resizing), Rule(_spatial)),
    **dict.fromkeys(all_ranks("GlobalMaxPooling"), Rule(_global_pool)),
    **dict.fromkeys(all_ranks("GlobalAveragePooling"), Rule(_global_pool)),
    kl.Dense: Rule(_dense, makes=True),
    kl.Embedding: Rule(_embedding, makes=True),
    kl.BatchNormalization: Rule(_batch_norm),
    kl.PReLU: Rule(_prelu),
    kl.Activation: Rule(_activation),
    kl.Softmax: Rule(_softmax),
    kl.Rescaling: Rule(_rescaling),
    kl.Flatten: Rule(_flatten),
    kl.Reshape: Rule(_reshape),
    kl.Permute: Rule(_permute),
    kl.RepeatVector: Rule(_repeat_vector),
    kl.Concatenate: Rule(_concatenate, joins=True),
}

# Operations of keras.ops, by their kind, that a graph may hold beside layers.
_OPERATIONS = {
    **dict.fromkeys(("Add", "Subtract", "Multiply", "Divide"), Rule(_merge, joins=True)),
    **dict.fromkeys(("TrueDivide", "Maximum", "Minimum"), Rule(_merge, joins=True)),
    **dict.fromkeys(("Absolute", "Exp", "Negative", "Sqrt", "Square", "Tanh"), Rule(_passing)),
    **dict.fromkeys(("Celu", "Elu", "Gelu", "HardSigmoid", "HardSilu"), Rule(_passing)),
    **dict.fromkeys(("HardTanh", "LeakyRelu", "LogSigmoid", "Relu", "Relu6"), Rule(_passing)),
    **dict.fromkeys(("Selu", "Sigmoid", "Silu", "SoftShrink", "Softplus"), Rule(_passing)),
    "Softsign": Rule(_passing),
    **dict.fromkeys(("Amax", "Amin", "Max", "Mean", "Min", "Sum"), Rule(_reduced)),
    "Concatenate": Rule(_concatenate, joins=True),
}
