"""Keras layers as small torch modules on the layers' own Parameters."""

# ruff: noqa: D102  (forward does what its class says)
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import torch
import torch.nn.functional as F
from keras import activations, layers
from torch import Tensor, nn

from vggtorch.lowering.conventions import (
    LoweringOptions,
    cast,
    lay_out_,
    pad,
    product_dtype,
    same_padding,
    to_nchw,
    to_nhwc,
)
from vggtorch.lowering.kernels import Convolution, Product, ReusedMemory, supports_training

# On a CPU a Dense layer of mixed precision trains in its kernel's own dtype with fewer rows than
# this: reading a large kernel takes longer than its product, and casting it and its gradient most.
MANY_ROWS = 128

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


# What Keras itself offers as an activation looks at one image at a time.
BUILT_IN = {id(getattr(activations, name)) for name in dir(activations)}


class Activate(nn.Module):
    """An activation function."""

    def __init__(self, function: Any, layer: keras.Layer, options: LoweringOptions) -> None:
        super().__init__()
        self.function = ELEMENTWISE.get(function) or LAST_AXIS.get(function, function)
        self.any_layout = function in ELEMENTWISE or not options.channels_last
        self.is_relu = function is activations.relu
        self.by_image = id(function) in BUILT_IN
        self.dtype = options.compute_dtype(layer)

    def forward(self, x: Tensor) -> Tensor:
        x = cast(x, self.dtype)
        if self.any_layout:
            return self.function(x)
        return to_nchw(self.function(to_nhwc(x)))


def activation_of(layer: keras.Layer, options: LoweringOptions) -> Activate | None:
    """The activation at the end of a layer."""
    if layer.activation is None or layer.activation is activations.linear:
        return None
    return Activate(layer.activation, layer, options)


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

    @property
    def weight(self) -> Tensor:
        """The kernel as torch has it, (O, I, H, W): a view, so what is written to it is kept."""
        kernel = self.kernel.flatten(2).unsqueeze(2) if self.depthwise else self.kernel
        return kernel.permute(3, 2, 0, 1)

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input and what the convolution itself must pad it by."""
        if not self.same:
            return x, (0, 0)
        size = self.kernel.shape[:2]
        padding = same_padding(x.shape[2:], size, self.stride, self.dilation)
        return pad(x, padding, "constant")

    def convolve(self, x: Tensor) -> Tensor:
        """Convolution and bias alone."""
        dtype = product_dtype(x, self.dtype)
        x, padding = self.pad(x.to(dtype))
        weight = self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        options = self.stride, padding, self.dilation, x.shape[1] // weight.shape[1]
        if bias is not None and supports_training(x, dtype):
            return Convolution.apply(x, weight, bias, *options)
        return F.conv2d(x, weight, bias, *options)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolve(x)
        return y if self.activation is None else self.activation(y)


class Dense(nn.Module):
    """Product with the (in, out) kernel, bias and activation, over the last axis."""

    def __init__(self, layer: keras.Layer, options: LoweringOptions) -> None:
        super().__init__()
        self.kernel = layer.kernel.value
        self.bias = None if layer.bias is None else layer.bias.value
        self.dtype = options.compute_dtype(layer)
        self.activation = activation_of(layer, options)
        self.gradients = ReusedMemory()
        lay_out_(self.kernel)

    def train(self, mode: bool = True) -> Dense:
        if not mode:
            self.gradients = ReusedMemory()  # lets go of the memory
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        dtype, own = product_dtype(x, self.dtype), self.kernel.dtype
        few = x.ndim == 2 and supports_training(x, own) and len(x) < MANY_ROWS
        computed_in = own if few else dtype
        x, kernel = x.to(computed_in), self.kernel.to(computed_in)
        bias = None if self.bias is None else self.bias.to(computed_in)
        if x.ndim == 2 and supports_training(x, computed_in):
            y = Product.apply(x, kernel, bias, self.gradients).to(dtype)
        else:
            y = F.linear(x, kernel.t(), bias)
        return y if self.activation is None else self.activation(y)


class OnKerasState(nn.Module):
    """A module whose buffers are what Keras's variables of state hold, wherever they are moved."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OnKerasState:
        own = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in own.items():
            moved = self._buffers[name]
            if tensor is not None and moved is not None:
                tensor.data = moved
                self._buffers[name] = tensor
        return self


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


class BatchNorm(OnKerasState):
    """Batch norm with Keras's rules: biased variance, and inference where it is not trainable.

    `synchronized` trains on the mean and variance of all processes' images together.
    """

    moving_mean: Tensor
    moving_variance: Tensor

    def __init__(self, layer: keras.Layer, options: LoweringOptions) -> None:
        super().__init__()
        self.gamma = layer.gamma.value if layer.scale else None
        self.beta = layer.beta.value if layer.center else None
        self.register_buffer("moving_mean", layer.moving_mean.value)
        self.register_buffer("moving_variance", layer.moving_variance.value)
        self.momentum, self.epsilon = layer.momentum, layer.epsilon
        self.dtype = options.compute_dtype(layer)
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

    def __init__(self, layer: keras.Layer, options: LoweringOptions) -> None:
        super().__init__()
        self.maximum = isinstance(layer, layers.MaxPooling2D)
        self.size, self.stride = tuple(layer.pool_size), tuple(layer.strides)
        self.same = layer.padding == "same"
        self.dtype = options.compute_dtype(layer)

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The input and what the pool itself must pad it by."""
        if not self.same:
            return x, (0, 0)
        padding = same_padding(x.shape[2:], self.size, self.stride)
        return pad(x, padding, "replicate")  # as Keras does

    def forward(self, x: Tensor) -> Tensor:
        x, padding = self.pad(cast(x, self.dtype))
        if self.maximum:
            return F.max_pool2d(x, self.size, self.stride, padding)
        return F.avg_pool2d(x, self.size, self.stride, padding, count_include_pad=False)


class GlobalPool2D(nn.Module):
    """Maximum or average over each whole map; x is (N, C, H, W)."""

    def __init__(self, layer: keras.Layer, options: LoweringOptions) -> None:
        super().__init__()
        self.maximum = isinstance(layer, layers.GlobalMaxPooling2D)
        self.keepdim = layer.keepdims
        self.dtype = options.compute_dtype(layer)

    def forward(self, x: Tensor) -> Tensor:
        x = cast(x, self.dtype)
        return (torch.amax if self.maximum else torch.mean)(x, (2, 3), self.keepdim)


class ZeroPadding2D(nn.Module):
    """Zeros around each map; x is (N, C, H, W)."""

    def __init__(self, layer: keras.Layer, options: LoweringOptions) -> None:
        super().__init__()
        (top, bottom), (left, right) = layer.padding
        self.padding = (left, right, top, bottom)
        self.dtype = options.compute_dtype(layer)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(cast(x, self.dtype), self.padding)


class Flatten(nn.Module):
    """All but the batch as one axis; in NHWC order, as Keras has it, a view of NHWC memory."""

    def __init__(self, nhwc: bool) -> None:
        super().__init__()
        self.nhwc = nhwc

    def forward(self, x: Tensor) -> Tensor:
        return (to_nhwc(x) if self.nhwc else x).flatten(1)


class Dropout(nn.Module):
    """Dropout from torch's global generator, as Keras's Dropout without a seed."""

    def __init__(self, layer: keras.Layer, options: LoweringOptions) -> None:
        super().__init__()
        self.rate = layer.rate
        self.dtype = options.compute_dtype(layer)

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

    def __init__(self, layer: keras.Layer, options: LoweringOptions) -> None:
        super().__init__()
        self.dtype = options.compute_dtype(layer)
        for name in ("scale", "offset"):
            value = keras.ops.convert_to_tensor(getattr(layer, name), layer.compute_dtype)
            shape = (-1, 1, 1) if value.ndim else ()
            self.register_buffer(name, value.view(shape).to(self.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) * self.scale + self.offset


class Normalize(OnKerasState):
    """(x - mean) / standard deviation, by axes as the Keras layer has them."""

    mean: Tensor
    variance: Tensor

    def __init__(self, layer: keras.Layer, options: LoweringOptions) -> None:
        super().__init__()
        self.channels_last, self.dtype = options.channels_last, options.compute_dtype(layer)
        self.shape = layer.mean.shape
        if layer.input_mean is None:  # adapted: variables of the Keras model
            self.register_buffer("mean", layer.adapt_mean.value)
            self.register_buffer("variance", layer.adapt_variance.value)
            self.register_buffer("count", layer.count.value)
        else:
            self.register_buffer("mean", layer.mean, persistent=False)
            self.register_buffer("variance", layer.variance, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.mean.to(self.dtype).view(self.shape)
        deviation = self.variance.to(self.dtype).view(self.shape).sqrt()
        deviation = deviation.clamp(min=keras.config.epsilon())
        if self.channels_last:
            mean, deviation = to_nchw(mean), to_nchw(deviation)
        return (x.to(self.dtype) - mean) / deviation


class LayerNorm(nn.Module):
    """Normalises each image by the last axis in Keras's layout, in float32 or more."""

    def __init__(self, layer: keras.Layer, options: LoweringOptions) -> None:
        super().__init__()
        self.gamma = layer.gamma.value if layer.scale else None
        self.beta = layer.beta.value if layer.center else None
        self.channels_last, self.epsilon = options.channels_last, layer.epsilon
        self.dtype = options.compute_dtype(layer)

    def forward(self, x: Tensor) -> Tensor:
        x = to_nhwc(x) if self.channels_last else x
        wide = torch.promote_types(x.dtype, torch.float32)
        gamma, beta = (p if p is None else p.to(wide) for p in (self.gamma, self.beta))
        y = F.layer_norm(x.to(wide), x.shape[-1:], gamma, beta, self.epsilon).to(self.dtype)
        return to_nchw(y) if self.channels_last else y


class UpSample2D(nn.Module):
    """Each pixel several times; x is (N, C, H, W)."""

    def __init__(self, layer: keras.Layer, options: LoweringOptions) -> None:
        super().__init__()
        self.scale = tuple(float(n) for n in layer.size)
        self.dtype = options.compute_dtype(layer)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(cast(x, self.dtype), scale_factor=self.scale, mode="nearest")


class Reshape(nn.Module):
    """All but the batch in another shape, both in Keras's layout."""

    def __init__(self, layer: keras.Layer, options: LoweringOptions) -> None:
        super().__init__()
        self.shape, self.channels_last = layer.target_shape, options.channels_last
        self.dtype = options.compute_dtype(layer)

    def forward(self, x: Tensor) -> Tensor:
        x = cast(x, self.dtype)
        x = to_nhwc(x) if self.channels_last else x
        y = x.reshape(x.shape[0], *self.shape)  # len(x) would fix the batch in an export
        return to_nchw(y) if self.channels_last else y
