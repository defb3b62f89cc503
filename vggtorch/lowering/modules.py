"""Keras layers as small torch modules on the layers' own Parameters.

Every 4-D tensor of a channels_last model is an NCHW view of NHWC memory here, which torch calls
channels-last, so that going from one layout to the other never copies. `HANDLERS` maps layer types
to modules; a layer that has no handler runs in a `KerasLayer`, which calls it as Keras does.
"""

# ruff: noqa: D102  (forward does what its class says)
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import keras
import numpy as np
import torch
import torch.nn.functional as F
from keras import activations, layers
from keras.src.ops.symbolic_arguments import SymbolicArguments
from torch import Tensor, nn

from vggtorch.lowering.kernels import (
    Convolution,
    MaxPoolReLU,
    Product,
    ReusedMemory,
    trains,
)

# On a CPU a Dense layer of mixed precision trains in its kernel's own dtype with fewer rows than
# this: reading a large kernel takes longer than its product, and casting it and its gradient most.
MANY_ROWS = 128


@dataclass(frozen=True)
class Format:
    """What is true of a whole graph: its layout, what it computes in, what backward keeps.

    Attributes:
        channels_last: 4-D tensors are NHWC in Keras, so NCHW views of NHWC memory here.
        dtype: computes in this dtype where Keras would in float32; None leaves it to Keras.
        checkpoint: backward computes activations between pools again instead of keeping them.
    """

    channels_last: bool
    dtype: torch.dtype | None
    checkpoint: bool = False

    def axis(self, axis: int, rank: int) -> int:
        """Where an axis of a Keras tensor is here."""
        return (0, 2, 3, 1)[axis % 4] if rank == 4 and self.channels_last else axis % rank

    def compute_dtype(self, layer: keras.Layer) -> torch.dtype:
        """What the layer computes in."""
        dtype: torch.dtype = getattr(torch, layer.compute_dtype)
        return self.dtype if dtype == torch.float32 and self.dtype is not None else dtype


def lay_out_(kernel: nn.Parameter) -> None:
    """Put a kernel's numbers in O, H, W, I order in memory; same Parameter, shape and values.

    A kernel (H, W, I, O) permuted to OIHW is then in torch's channels-last order, and one of
    (I, O) transposed is contiguous, so that torch's operations take them as they are.
    """
    rank = kernel.ndim
    outputs_first = kernel.detach().permute(rank - 1, *range(rank - 1))
    if not outputs_first.is_contiguous():
        kernel.data = outputs_first.contiguous().permute(*range(1, rank), 0)


def to_torch(x: Tensor) -> Tensor:
    """NHWC -> NCHW, a view."""
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def to_keras(x: Tensor) -> Tensor:
    """NCHW -> NHWC, a view."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What Keras does to a layer's input; under torch.autocast the operation itself decides."""
    if x.dtype == dtype or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(dtype)


def product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a convolution or product of x computes in: torch.autocast's choice, or its own dtype."""
    device = x.device.type
    if dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


def _same_padding(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> list[tuple[int, int]]:
    """Rows before and after, columns before and after, that Keras's padding="same" adds."""
    padding = []
    for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
        total = max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n)
        padding.append((total // 2, total - total // 2))
    return padding


def _pad(x: Tensor, padding: list[tuple[int, int]], mode: str) -> tuple[Tensor, tuple[int, int]]:
    """Leave even padding to the operation; pad here what is uneven."""
    (top, bottom), (left, right) = padding
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom), mode=mode), (0, 0)


# Keras's activations as torch has them. Those of ELEMENTWISE run in any layout; the others, and
# whatever isn't here and runs as the Keras function, on the Keras layout.
ELEMENTWISE: dict[Any, Callable[[Tensor], Tensor]] = {
    activations.relu: F.relu,
    activations.relu6: F.relu6,
    activations.sigmoid: torch.sigmoid,
    activations.hard_sigmoid: F.hardsigmoid,
    activations.tanh: torch.tanh,
    activations.silu: F.silu,
    activations.hard_silu: F.hardswish,
    activations.elu: F.elu,
    activations.softplus: F.softplus,
}
LAST_AXIS: dict[Any, Callable[[Tensor], Tensor]] = {
    activations.softmax: partial(torch.softmax, dim=-1),
    activations.log_softmax: partial(torch.log_softmax, dim=-1),
}


class Activate(nn.Module):
    """An activation function; `inplace` lets a ReLU overwrite its input."""

    def __init__(self, function: Any, layer: keras.Layer, format: Format) -> None:
        super().__init__()
        self.function = ELEMENTWISE.get(function) or LAST_AXIS.get(function, function)
        self.any_layout = function in ELEMENTWISE or not format.channels_last
        self.is_relu = function is activations.relu
        self.inplace = True  # unless the graph finds that its input is needed
        self.dtype = format.compute_dtype(layer)

    def forward(self, x: Tensor) -> Tensor:
        x = cast(x, self.dtype)
        if self.is_relu:
            return F.relu_(x) if self.inplace else F.relu(x)
        if self.any_layout:
            return self.function(x)
        return to_torch(self.function(to_keras(x)))


def _activation(layer: keras.Layer, format: Format) -> Activate | None:
    """The activation at the end of a layer, which may overwrite what the layer has computed."""
    if layer.activation is None or layer.activation is activations.linear:
        return None
    return Activate(layer.activation, layer, format)


class Conv2D(nn.Module):
    """Convolution, bias and activation in one; x is (N, C, H, W), the kernel HWIO as in Keras.

    A depthwise kernel is (H, W, C, multiplier).
    """

    def __init__(
        self,
        kernel: nn.Parameter,
        bias: nn.Parameter | None,
        activation: Activate | None,
        *,
        stride: tuple[int, int],
        dilation: tuple[int, int],
        same: bool,
        depthwise: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.kernel, self.bias, self.activation = kernel, bias, activation
        self.stride, self.dilation, self.same = stride, dilation, same
        self.depthwise, self.dtype = depthwise, dtype
        lay_out_(kernel)

    def weight(self) -> Tensor:
        """The kernel as torch has it, (O, I, H, W): a view."""
        kernel = self.kernel.flatten(2).unsqueeze(2) if self.depthwise else self.kernel
        return kernel.permute(3, 2, 0, 1)

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input and what the convolution itself must pad it by."""
        if not self.same:
            return x, (0, 0)
        size = self.kernel.shape[:2]
        padding = _same_padding(x.shape[2:], size, self.stride, self.dilation)
        return _pad(x, padding, "constant")

    def convolve(self, x: Tensor) -> Tensor:
        """Convolution and bias alone."""
        dtype = product_dtype(x, self.dtype)
        x, padding = self.pad(x.to(dtype))
        weight = self.weight().to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        options = self.stride, padding, self.dilation, x.shape[1] // weight.shape[1]
        if bias is not None and trains(x, dtype):
            return Convolution.apply(x, weight, bias, *options)
        return F.conv2d(x, weight, bias, *options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolve(x)
        return y if self.activation is None else self.activation(y)


class Convolve(nn.Module):
    """A Conv2D without its activation."""

    def __init__(self, conv: Conv2D) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv.convolve(x)


class Dense(nn.Module):
    """Product with the (in, out) kernel, bias and activation, over the last axis."""

    def __init__(self, layer: keras.Layer, format: Format) -> None:
        super().__init__()
        self.kernel = layer.kernel.value
        self.bias = None if layer.bias is None else layer.bias.value
        self.dtype = format.compute_dtype(layer)
        self.activation = _activation(layer, format)
        self.gradients = ReusedMemory()
        lay_out_(self.kernel)

    def train(self, mode: bool = True) -> Dense:
        if not mode:
            self.gradients = ReusedMemory()  # lets go of the memory
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        dtype, own = product_dtype(x, self.dtype), self.kernel.dtype
        few = x.ndim == 2 and trains(x, own) and len(x) < MANY_ROWS
        computed_in = own if few else dtype
        x, kernel = x.to(computed_in), self.kernel.to(computed_in)
        bias = None if self.bias is None else self.bias.to(computed_in)
        if x.ndim == 2 and trains(x, computed_in):
            y = Product.apply(x, kernel, bias, self.gradients).to(dtype)
        else:
            y = F.linear(x, kernel.t(), bias)
        return y if self.activation is None else self.activation(y)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; so is the gradient with respect to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _SumOverProcesses.forward(ctx, gradient)


class BatchNorm(nn.Module):
    """Batch norm with Keras's rules: biased variance, and inference where it is not trainable.

    `synchronized` trains on the mean and variance of all processes' images together.
    """

    def __init__(self, layer: keras.Layer, format: Format) -> None:
        super().__init__()
        self.gamma = layer.gamma.value if layer.scale else None
        self.beta = layer.beta.value if layer.center else None
        self.moving_mean = layer.moving_mean.value
        self.moving_variance = layer.moving_variance.value
        self.momentum, self.epsilon = layer.momentum, layer.epsilon
        self.dtype = format.compute_dtype(layer)
        self.layer = (layer,)  # in a tuple, which keeps it from being a submodule
        self.synchronized = False
        self.again = False  # whether checkpointing runs a batch for the second time

    def forward(self, x: Tensor) -> Tensor:
        x = cast(x, self.dtype)
        if not (self.training and self.layer[0].trainable):
            return F.batch_norm(
                x, self.moving_mean, self.moving_variance, self.gamma, self.beta, eps=self.epsilon
            )
        if self.synchronized:
            return self._over_processes(x)
        # torch would keep the unbiased variance; ask it for the batch's own and undo that.
        n = x.numel() // x.shape[1]
        mean, variance = torch.zeros_like(self.moving_mean), torch.zeros_like(self.moving_mean)
        y = torch.batch_norm(
            x, self.gamma, self.beta, mean, variance, True, 1.0, self.epsilon,
            torch.backends.cudnn.enabled,
        )  # fmt: skip
        with torch.no_grad():
            variance = variance * ((n - 1) / n) if n > 1 else torch.zeros_like(variance)
        self._keep(mean, variance)
        return y

    def _over_processes(self, x: Tensor) -> Tensor:
        """Normalise a process's part of a batch, which may be empty, by the whole batch's moments.

        torch.nn.SyncBatchNorm does so on GPUs only.
        """
        wide = x.float()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        count = _SumOverProcesses.apply(wide.new_tensor(x.numel() // x.shape[1]))
        mean = _SumOverProcesses.apply(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(axes)) / count
        scale = torch.rsqrt(variance + self.epsilon)
        if self.gamma is not None:
            scale = scale * self.gamma
        y = centred * scale.view(shape)
        if self.beta is not None:
            y = y + self.beta.view(shape)
        self._keep(mean, variance)
        return y.to(x.dtype)

    @torch.no_grad()
    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        """Let the moving mean and variance follow those of a batch, once."""
        if self.again:
            return
        self.moving_mean.lerp_(mean, 1 - self.momentum)
        self.moving_variance.lerp_(variance, 1 - self.momentum)


class Pool2D(nn.Module):
    """Maximum or average over windows; x is (N, C, H, W)."""

    def __init__(self, layer: keras.Layer, format: Format) -> None:
        super().__init__()
        self.maximum = isinstance(layer, layers.MaxPooling2D)
        self.size, self.stride = tuple(layer.pool_size), tuple(layer.strides)
        self.same = layer.padding == "same"
        self.dtype = format.compute_dtype(layer)

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input and what the pool itself must pad it by."""
        if not self.same:
            return x, (0, 0)
        padding = _same_padding(x.shape[2:], self.size, self.stride)
        return _pad(x, padding, "replicate")  # as Keras does

    def forward(self, x: Tensor) -> Tensor:
        x, padding = self.pad(cast(x, self.dtype))
        if self.maximum:
            return F.max_pool2d(x, self.size, self.stride, padding)
        return F.avg_pool2d(x, self.size, self.stride, padding, count_include_pad=False)


class ReLUPool2D(nn.Module):
    """A ReLU and the max pool after it, pooled first; x is (N, C, H, W)."""

    def __init__(self, pool: Pool2D) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x, padding = self.pool.pad(cast(x, self.pool.dtype))
        return MaxPoolReLU.apply(x, self.pool.size, self.pool.stride, padding)[0]


class GlobalPool2D(nn.Module):
    """Maximum or average over each whole map; x is (N, C, H, W)."""

    def __init__(self, layer: keras.Layer, format: Format) -> None:
        super().__init__()
        self.maximum = isinstance(layer, layers.GlobalMaxPooling2D)
        self.keepdim = layer.keepdims
        self.dtype = format.compute_dtype(layer)

    def forward(self, x: Tensor) -> Tensor:
        x = cast(x, self.dtype)
        return (torch.amax if self.maximum else torch.mean)(x, (2, 3), self.keepdim)


class ZeroPadding2D(nn.Module):
    """Zeros around each map; x is (N, C, H, W)."""

    def __init__(self, layer: keras.Layer, format: Format) -> None:
        super().__init__()
        (top, bottom), (left, right) = layer.padding
        self.padding = (left, right, top, bottom)
        self.dtype = format.compute_dtype(layer)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(cast(x, self.dtype), self.padding)


class Flatten(nn.Module):
    """All but the batch as one axis; in NHWC order, as Keras has it, a view of NHWC memory."""

    def __init__(self, nhwc: bool) -> None:
        super().__init__()
        self.nhwc = nhwc

    def forward(self, x: Tensor) -> Tensor:
        return (to_keras(x) if self.nhwc else x).flatten(1)


class Dropout(nn.Module):
    """Dropout from torch's global generator, as Keras's Dropout without a seed."""

    def __init__(self, layer: keras.Layer, format: Format) -> None:
        super().__init__()
        self.rate = layer.rate
        self.dtype = format.compute_dtype(layer)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(cast(x, self.dtype), self.rate, self.training)


class Merge(nn.Module):
    """A sum, product, concatenation ... of tensors of one rank."""

    def __init__(self, function: Callable[[list[Tensor]], Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.function, self.dtype = function, dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function([cast(x, self.dtype) for x in inputs])


class Rescale(nn.Module):
    """x * scale + offset; each a number, or one for each channel, which is axis 1 of x."""

    scale: Tensor
    offset: Tensor

    def __init__(self, layer: keras.Layer, format: Format) -> None:
        super().__init__()
        self.dtype = format.compute_dtype(layer)
        for name in ("scale", "offset"):
            value = keras.ops.convert_to_tensor(getattr(layer, name), layer.compute_dtype)
            shape = (-1, 1, 1) if value.ndim else ()
            self.register_buffer(name, value.view(shape).to(self.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) * self.scale + self.offset


class Normalize(nn.Module):
    """(x - mean) / standard deviation, by axes as the Keras layer has them."""

    def __init__(self, layer: keras.Layer, format: Format) -> None:
        super().__init__()
        self.channels_last, self.dtype = format.channels_last, format.compute_dtype(layer)
        self.shape = layer.mean.shape
        if layer.input_mean is None:  # adapted: variables of the Keras model
            self.mean, self.variance = layer.adapt_mean.value, layer.adapt_variance.value
            self.count = layer.count.value
        else:
            self.register_buffer("mean", layer.mean, persistent=False)
            self.register_buffer("variance", layer.variance, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean.to(self.dtype).view(self.shape)
        deviation = self.variance.to(self.dtype).view(self.shape).sqrt()
        deviation = deviation.clamp(min=keras.config.epsilon())
        if self.channels_last:
            mean, deviation = to_torch(mean), to_torch(deviation)
        return (x.to(self.dtype) - mean) / deviation


class LayerNorm(nn.Module):
    """Normalises each image by the last axis in Keras's layout, in float32 or more."""

    def __init__(self, layer: keras.Layer, format: Format) -> None:
        super().__init__()
        self.gamma = layer.gamma.value if layer.scale else None
        self.beta = layer.beta.value if layer.center else None
        self.channels_last, self.epsilon = format.channels_last, layer.epsilon
        self.dtype = format.compute_dtype(layer)

    def forward(self, x: Tensor) -> Tensor:
        x = to_keras(x) if self.channels_last else x
        wide = torch.promote_types(x.dtype, torch.float32)
        gamma, beta = (p if p is None else p.to(wide) for p in (self.gamma, self.beta))
        y = F.layer_norm(x.to(wide), x.shape[-1:], gamma, beta, self.epsilon).to(self.dtype)
        return to_torch(y) if self.channels_last else y


class UpSample2D(nn.Module):
    """Each pixel several times; x is (N, C, H, W)."""

    def __init__(self, layer: keras.Layer, format: Format) -> None:
        super().__init__()
        self.scale = tuple(float(n) for n in layer.size)
        self.dtype = format.compute_dtype(layer)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(cast(x, self.dtype), scale_factor=self.scale, mode="nearest")


class Reshape(nn.Module):
    """All but the batch in another shape, both in Keras's layout."""

    def __init__(self, layer: keras.Layer, format: Format) -> None:
        super().__init__()
        self.shape, self.channels_last = layer.target_shape, format.channels_last
        self.dtype = format.compute_dtype(layer)

    def forward(self, x: Tensor) -> Tensor:
        x = cast(x, self.dtype)
        x = to_keras(x) if self.channels_last else x
        y = x.reshape(len(x), *self.shape)
        return to_torch(y) if self.channels_last else y


class KerasLayer(nn.Module):
    """A layer, or an operation of keras.ops, that runs as Keras runs it, on Keras's layout."""

    def __init__(self, operation: Any, format: Format) -> None:
        super().__init__()
        self.operation = (operation,)  # in a tuple, which keeps it from being a submodule
        self.channels_last = format.channels_last
        self.takes_training = getattr(operation, "_call_has_training_arg", False)
        prefix = f"{getattr(operation, 'path', '')}/"
        for variable in getattr(operation, "variables", ()):
            name = variable.path.removeprefix(prefix).replace("/", "_").replace(".", "_")
            self.register_parameter(name, variable.value)

    def forward(self, arguments: SymbolicArguments, *inputs: Tensor) -> list[Tensor]:
        values: Iterable[Tensor] = map(to_keras, inputs) if self.channels_last else inputs
        pairs = zip(arguments.keras_tensors, values, strict=True)
        args, kwargs = arguments.fill_in({id(tensor): x for tensor, x in pairs})
        if self.takes_training:
            kwargs = kwargs | {"training": self.training}
        outputs = keras.tree.flatten(self.operation[0](*args, **kwargs))
        return [to_torch(y) for y in outputs] if self.channels_last else outputs


# From layers to modules


def _conv2d(layer: keras.Layer, format: Format, inputs: list[Any]) -> nn.Module | None:
    if getattr(layer, "lora_enabled", False) or layer.quantization_mode is not None:
        return None
    return Conv2D(
        layer.kernel.value,
        None if layer.bias is None else layer.bias.value,
        _activation(layer, format),
        stride=tuple(layer.strides),
        dilation=tuple(layer.dilation_rate),
        same=layer.padding == "same",
        depthwise=isinstance(layer, layers.DepthwiseConv2D),
        dtype=format.compute_dtype(layer),
    )


def _separable_conv2d(layer: keras.Layer, format: Format, inputs: list[Any]) -> nn.Module:
    depthwise = Conv2D(
        layer.depthwise_kernel.value,
        None,
        None,
        stride=tuple(layer.strides),
        dilation=tuple(layer.dilation_rate),
        same=layer.padding == "same",
        depthwise=True,
        dtype=format.compute_dtype(layer),
    )
    pointwise = Conv2D(
        layer.pointwise_kernel.value,
        None if layer.bias is None else layer.bias.value,
        _activation(layer, format),
        stride=(1, 1),
        dilation=(1, 1),
        same=False,
        depthwise=False,
        dtype=format.compute_dtype(layer),
    )
    return nn.Sequential(OrderedDict(depthwise=depthwise, pointwise=pointwise))


def _dense(layer: keras.Layer, format: Format, inputs: list[Any]) -> nn.Module | None:
    if layer.lora_enabled or layer.quantization_mode is not None or len(inputs[0].shape) == 4:
        return None
    return Dense(layer, format)


def _batch_norm(layer: keras.Layer, format: Format, inputs: list[Any]) -> nn.Module | None:
    rank = len(inputs[0].shape)
    if getattr(layer, "renorm", False) or format.axis(layer.axis, rank) != 1:
        return None
    return BatchNorm(layer, format)


def _activation_layer(layer: keras.Layer, format: Format, inputs: list[Any]) -> nn.Module:
    return Activate(layer.activation, layer, format)


def _relu(layer: keras.Layer, format: Format, inputs: list[Any]) -> nn.Module | None:
    if layer.negative_slope or layer.threshold or layer.max_value not in (None, 6):
        return None
    relu = activations.relu if layer.max_value is None else activations.relu6
    return Activate(relu, layer, format)


def _dropout(layer: keras.Layer, format: Format, inputs: list[Any]) -> nn.Module | None:
    if layer.seed is not None or layer.noise_shape is not None:
        return None
    return Dropout(layer, format)


def _flatten(layer: keras.Layer, format: Format, inputs: list[Any]) -> nn.Module | None:
    last = layer.data_format == "channels_last"
    if len(inputs[0].shape) != 4:
        return Flatten(nhwc=False) if last else None
    if format.channels_last and not last:
        return None
    return Flatten(nhwc=format.channels_last or not last)  # channels_first: Keras transposes


PAIRS: dict[type[keras.Layer], Callable[[Tensor, Tensor], Tensor]] = {
    layers.Add: torch.add,
    layers.Maximum: torch.maximum,
    layers.Minimum: torch.minimum,
    layers.Multiply: torch.mul,
    layers.Subtract: torch.sub,
}


def _mean(tensors: list[Tensor]) -> Tensor:
    return reduce(torch.add, tensors) / len(tensors)


def _merge(layer: keras.Layer, format: Format, inputs: list[Any]) -> nn.Module | None:
    ranks = {len(x.shape) for x in inputs}
    if len(ranks) > 1 or len(inputs) < 2:
        return None
    function: Callable[[list[Tensor]], Tensor]
    if isinstance(layer, layers.Concatenate):
        function = partial(torch.cat, dim=format.axis(layer.axis, ranks.pop()))
    else:
        function = (
            _mean if isinstance(layer, layers.Average) else partial(reduce, PAIRS[type(layer)])
        )
    return Merge(function, format.compute_dtype(layer))


def _rescale(layer: keras.Layer, format: Format, inputs: list[Any]) -> nn.Module | None:
    ranks = {np.ndim(value) for value in (layer.scale, layer.offset)}
    # Keras takes the last axis of the input, or by a global setting the first.
    maps = len(inputs[0].shape) == 4 and format.channels_last
    last = keras.config.image_data_format() == "channels_last"
    if ranks != {0} and not (ranks <= {0, 1} and maps and last):
        return None
    return Rescale(layer, format)


def _normalize(layer: keras.Layer, format: Format, inputs: list[Any]) -> nn.Module | None:
    return None if layer.invert else Normalize(layer, format)


def _layer_norm(layer: keras.Layer, format: Format, inputs: list[Any]) -> nn.Module | None:
    last = {axis % len(inputs[0].shape) for axis in layer.axis} == {len(inputs[0].shape) - 1}
    return LayerNorm(layer, format) if last and not layer.rms_scaling else None


def _up_sample(layer: keras.Layer, format: Format, inputs: list[Any]) -> nn.Module | None:
    return UpSample2D(layer, format) if layer.interpolation == "nearest" else None


def _module(kind: type[nn.Module]) -> Handler:
    return lambda layer, format, inputs: kind(layer, format)


# A handler makes the module for a layer that is called on `inputs` (KerasTensors), or returns None
# where the layer is set to something that only Keras itself can do.
Handler = Callable[[keras.Layer, Format, list[Any]], nn.Module | None]
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
