"""Modules for what Keras does and torch.nn has no exact module for.

Each takes and gives tensors with the channels on axis 1 where torch.nn's own modules do, and
`KerasLayer` those of Keras's layout.
"""

# ruff: noqa: D102  (forward does what its class says)
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggtorch import keras_graph
from vggtorch.lowering.ties import Tie
from vggtorch.weights import unmoved


class Leaf(nn.Module):
    """A module that tracers of torch.fx take as one step, as they do those of torch.nn.

    They go by `__module__`. A tracer that went inside would write down what it does in one mode,
    training or inference, or for one image size.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__module__ = "torch.nn"


class _Mixed(Leaf):
    """A product that computes in its input's dtype, with weights in another one.

    Keras's mixed dtype policies do so. `torch.nn` has it by autocast alone.
    """

    weight: Any
    bias: Any
    product: Any  # of input, weight and bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: Tensor = self.product(x, self.weight.to(x.dtype), bias)
        return y


class MixedConv1d(_Mixed, nn.Conv1d):
    """nn.Conv1d that computes in its input's dtype; x is (N, C, L)."""

    product = nn.Conv1d._conv_forward


class MixedConv2d(_Mixed, nn.Conv2d):
    """nn.Conv2d that computes in its input's dtype; x is (N, C, H, W)."""

    product = nn.Conv2d._conv_forward


class MixedConv3d(_Mixed, nn.Conv3d):
    """nn.Conv3d that computes in its input's dtype; x is (N, C, D, H, W)."""

    product = nn.Conv3d._conv_forward


class MixedLinear(_Mixed, nn.Linear):
    """nn.Linear that computes in its input's dtype; x is (..., in)."""

    product = staticmethod(F.linear)


class WideLayerNorm(Leaf, nn.LayerNorm):
    """nn.LayerNorm that computes in float32 and puts out another dtype, as Keras does."""

    def __init__(self, *args: Any, compute_dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p if p is None else p.float() for p in (self.weight, self.bias))
        y = F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)
        return y.to(self.compute_dtype)


class PReLU(Leaf, nn.PReLU):
    """nn.PReLU whose gradient at 0 is 0, as Keras's is; x is (N, C, ...) or (N, C).

    Torch's is `weight` there, which the black borders of images would tell.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) - self.weight.view(-1, *(1,) * (x.ndim - 2)) * F.relu(-x)


class GlobalMaxPool(Leaf):
    """The maximum of each map; x is (N, C, ...).

    Where several pixels have it, each gets its share of the gradient, as in Keras.
    """

    def __init__(self, keepdims: bool) -> None:
        super().__init__()
        self.keepdims = keepdims

    def forward(self, x: Tensor) -> Tensor:
        return torch.amax(x, tuple(range(2, x.ndim)), self.keepdims)


def _same_pads(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """What Keras's padding="same" adds to (N, C, ...), which depends on the size with strides."""
    axes = zip(x.shape[2:], kernel, stride, dilation, strict=True)
    return [keras_graph.same_padding(*axis) for axis in axes]


def _padded(x: Tensor, pads: list[tuple[int, int]], mode: str) -> Tensor:
    flat = [number for pair in reversed(pads) for number in pair]  # F.pad begins with the last axis
    return F.pad(x, flat, mode=mode) if _are_open(pads) or any(flat) else x


def _are_open(pads: list[tuple[int, int]]) -> bool:
    """Whether pads stand for those of many sizes, as in an export, and can't be compared."""
    return any(isinstance(number, torch.SymInt) for pair in pads for number in pair)


class SamePad(Leaf):
    """Keras's padding="same" where no constant padding is right for every image size."""

    def __init__(
        self,
        kernel: Sequence[int],
        stride: Sequence[int],
        dilation: Sequence[int],
        mode: str = "constant",
    ) -> None:
        super().__init__()
        self.kernel, self.stride = tuple(kernel), tuple(stride)
        self.dilation, self.mode = tuple(dilation), mode

    def forward(self, x: Tensor) -> Tensor:
        return _padded(x, _same_pads(x, self.kernel, self.stride, self.dilation), self.mode)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel}, stride={self.stride}, mode={self.mode!r}"


class SameAvgPool(Leaf):
    """Keras's average pool with padding="same"; x is (N, C, ...).

    Zeros that pad both sides alike don't count in the mean; where Keras must pad one side more, it
    repeats the edge, which does. Which of the two depends on the size, where the pool has strides.
    """

    def __init__(self, size: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__()
        self.size, self.stride = tuple(size), tuple(stride)

    def forward(self, x: Tensor) -> Tensor:
        size, stride = self.size, self.stride
        pool: Any = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}[x.ndim]
        pads = _same_pads(x, size, stride, (1,) * len(size))
        y: Tensor
        if _are_open(pads):
            # Both ways in one: a number's weight is 0 for zeros that pad both sides alike, else 1.
            odd = sum(after - before for before, after in pads)
            weight = (_padded(torch.ones_like(x), pads, "constant") + odd).clamp(max=1)
            y = pool(_padded(x, pads, "replicate") * weight, size, stride)
            y = y / pool(weight, size, stride)
        elif all(before == after for before, after in pads):
            padding = tuple(before for before, _ in pads)
            y = pool(x, size, stride, padding, count_include_pad=False)
        else:
            y = pool(_padded(x, pads, "replicate"), size, stride)
        return y

    def extra_repr(self) -> str:
        return f"size={self.size}, stride={self.stride}"


class Normalize(Leaf):
    """(x - mean) / deviation, on Keras's layout.

    Attributes:
        shape: in which mean and variance meet x.
        least: the smallest deviation.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, mean: Tensor, variance: Tensor, shape: Sequence[int], least: float) -> None:
        super().__init__()
        self.shape, self.least = tuple(shape), least
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = (t.view(self.shape).to(x.dtype) for t in (self.mean, self.variance))
        return (x - mean) / variance.sqrt().clamp(min=self.least)


class Permute(Leaf):
    """The axes of a tensor in another order."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.order))


class Scale(Leaf):
    """x * weight, a number for each channel, which is the last axis."""

    weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class SharedDropout(Leaf):
    """Dropout that keeps or drops along some axes at once, as Keras's `noise_shape` says."""

    def __init__(self, rate: float, noise_shape: Sequence[int | None]) -> None:
        super().__init__()
        self.rate, self.noise_shape = rate, tuple(noise_shape)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.rate:
            return x
        shape = [n if m is None else m for n, m in zip(x.shape, self.noise_shape, strict=True)]
        return x * F.dropout(x.new_ones(shape), self.rate)


class Rescale(Leaf):
    """x * scale + offset; each is a number, or has the shape of one number for each channel."""

    scale: Tensor
    offset: Tensor

    def __init__(self, scale: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.offset


# What Keras itself offers as an activation looks at one image at a time.
_BUILT_IN = {id(getattr(keras.activations, name)) for name in dir(keras.activations)}


class KerasFunction(Leaf):
    """An activation function of Keras or of the user, on Keras's layout.

    `is_by_image`: what one image becomes doesn't depend on the others.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.is_by_image = id(function) in _BUILT_IN

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@contextlib.contextmanager
def _parameters_from(modules: list[nn.Module], tensors: dict[int, Tensor]) -> Iterator[None]:
    """Let torch's modules inside of Keras layers compute with these tensors, by parameters' ids.

    They read their own parameters, so a StatelessScope of Keras's variables doesn't reach them.
    """
    places = [module._parameters for module in modules]
    before = [dict(place) for place in places]
    try:
        for place in places:
            place.update({k: tensors.get(id(p), p) for k, p in place.items()})  # type: ignore[misc]
        yield
    finally:
        for place, was in zip(places, before, strict=True):
            place.update(was)


@dataclass(frozen=True)
class Place:
    """Stands for the value number `index` in the recorded arguments of a call."""

    index: int


class KerasLayer(Leaf):
    """A layer, or an operation of keras.ops, that runs as Keras runs it, on Keras's layout.

    Its variables are the module's own parameters (what Keras doesn't train, buffers), under their
    names in Keras. A tensor that torch has put in a parameter's place, as functional_call does,
    is what the layer then computes with.
    """

    def __init__(
        self, node: keras_graph.Node, copies: dict[int, nn.Parameter] | None = None
    ) -> None:
        """`copies`: what stands for each variable, by its id, in a network with its own memory."""
        super().__init__()
        operation = node.operation
        position = {id(tensor): i for i, tensor in enumerate(node.input_tensors)}
        self.arguments = keras.tree.map_structure(
            lambda x: Place(position[id(x)]) if isinstance(x, keras.KerasTensor) else x,
            (node.arguments.args, node.arguments.kwargs),
        )
        # In a tuple, which keeps the Keras layer from being a submodule with names of its own.
        self.operation = (operation,)
        self.names: list[str] = []
        prefix = f"{getattr(operation, 'path', '')}/"
        for variable in getattr(operation, "variables", ()):
            name = variable.path.removeprefix(prefix).replace("/", "_").replace(".", "_")
            while hasattr(self, name):
                name += "_"
            value = keras_graph.raw_value(variable)
            if copies is not None:
                if id(variable) not in copies:
                    copy = nn.Parameter(value.detach().clone(), value.requires_grad)
                    copies[id(variable)] = copy
                value = copies[id(variable)]
            if variable.trainable or value.requires_grad:
                self.register_parameter(name, value)  # type: ignore[arg-type]
            else:
                self.register_buffer(name, value if copies is None else value.detach())
            self.names.append(name)

    def ties(self) -> list[Tie]:
        """The layer's variables and the module's tensors, which are their very values."""
        found, variables = [], getattr(self.operation[0], "variables", ())
        for name, variable in zip(self.names, variables, strict=True):
            value = keras_graph.raw_value(variable)
            rule = unmoved(name, variable.path, tuple(value.shape))
            found.append(Tie(variable, value, rule, [(self, name)], value.requires_grad))
        return found

    def forward(self, *inputs: Tensor) -> Any:
        (operation,) = self.operation
        args, kwargs = keras.tree.map_structure(
            lambda x: inputs[x.index] if isinstance(x, Place) else x, self.arguments
        )
        if keras_graph.reads_training(operation):  # over one fixed at the call, as in Keras
            kwargs = {**kwargs, "training": self.training}
        with self._own_values(), keras_graph.training_context(operation, self.training):
            outputs = operation(*args, **kwargs)
        flat = keras.tree.flatten(outputs)
        return flat[0] if len(flat) == 1 else tuple(flat)

    @contextlib.contextmanager
    def _own_values(self) -> Any:
        """Let the layer compute with the module's tensors where those aren't its variables' own."""
        (operation,) = self.operation
        variables = list(getattr(operation, "variables", ()))
        mine = [getattr(self, name) for name in self.names]
        if len(variables) != len(mine):
            raise ValueError(
                f"{operation.path!r} has {len(variables)} variables now, and had {len(mine)} when "
                f"this network was made: what LoRA or quantization has changed in Keras needs "
                f"another network. Call to_torch again."
            )
        if all(keras_graph.raw_value(v) is t for v, t in zip(variables, mine, strict=True)):
            yield
            return
        taken = {id(keras_graph.raw_value(v)): t for v, t in zip(variables, mine, strict=True)}
        with (
            keras.StatelessScope(list(zip(variables, mine, strict=True))) as scope,
            _parameters_from(self._torch_modules(), taken),
        ):
            yield
        for variable, tensor in zip(variables, mine, strict=True):
            value = scope.get_current_value(variable)
            if value is not None and value is not tensor:  # moving statistics, counters of seeds
                with torch.no_grad():
                    tensor.copy_(value)

    def _torch_modules(self) -> list[nn.Module]:
        """The modules of torch's inside of the layer, whose parameters are variables of Keras's."""
        (operation,) = self.operation
        inside = keras_graph.all_layers(operation) if isinstance(operation, keras.Layer) else ()
        wrapped = [x.module for x in inside if isinstance(x, keras.layers.TorchModuleWrapper)]
        return [part for module in wrapped for part in module.modules()]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KerasLayer:
        """Take the Keras variables along to another device, and leave them alone otherwise."""
        own = {name: getattr(self, name) for name in self.names}
        new = [(fn(t.new_empty(0)), t) for t in own.values()]
        parts = any(a.dtype != b.dtype or a.is_meta != b.is_meta for a, b in new)
        if parts:  # `.half()` would change the values of the Keras model
            for name, tensor in own.items():
                copy = tensor.detach().clone()
                if name in self._parameters:
                    self._parameters[name] = nn.Parameter(copy, tensor.requires_grad)
                else:
                    self._buffers[name] = copy
        super()._apply(fn, recurse)
        if not parts:
            for name, tensor in own.items():
                if name in self._buffers:  # torch has put another tensor there
                    tensor.data = getattr(self, name)
                    self._buffers[name] = tensor  # setattr would list it as a parameter
            for buffer in (b for part in self._torch_modules() for b in part._buffers.values()):
                if buffer is not None:
                    buffer.data = fn(buffer)
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *lists: Any
    ) -> None:
        """Copy values into Keras's own tensors, also with assign=True, unless they have none."""
        if not any(getattr(self, name).is_meta for name in self.names):
            local_metadata = {**local_metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *lists)

    def __prepare_scriptable__(self) -> None:
        """Say why torch.jit.script can't take it, which asks every module for a form that it can.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"torch.jit.script can't take the Keras code of {self.extra_repr()}. Use "
            f"torch.jit.trace or torch.export.export."
        )

    def extra_repr(self) -> str:
        (operation,) = self.operation
        return f"{operation.name!r} ({type(operation).__name__})"
