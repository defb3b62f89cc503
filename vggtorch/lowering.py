"""A Keras model as a plain torch.nn.Module on the very same parameters, run the fast way.

How it works, in the order of this file, on the modules of vggtorch/modules.py:

1. In inference a convolution, its batch norm and its ReLU are one kernel, on a weight that was
   prepared once.
2. `Graph` runs the modules in the order of the Functional graph. The leading steps that learn
   nothing, all of them in inference, run fused; the others by gradients of our own; and all run one
   by one before onlookers such as hooks and compilers.
3. `Lowered` is the outermost graph: it takes and returns what the Keras model does. `lower` makes
   it of a model, `part` of a part of one, and `accelerate_` puts it inside the Keras model itself.
"""

# ruff: noqa: D102  (forward does what its class says)
from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import torch
import torch.nn.functional as F
from keras import layers
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.models.functional import Functional
from keras.src.ops.symbolic_arguments import SymbolicArguments
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vggtorch import conversion, kernels
from vggtorch.kernels import is_intercepted
from vggtorch.modules import (
    HANDLERS,
    Activate,
    BatchNorm,
    Conv2D,
    Convolve,
    Dense,
    Dropout,
    Flatten,
    Format,
    GlobalPool2D,
    KerasLayer,
    LayerNorm,
    Merge,
    Normalize,
    Pool2D,
    ReLUPool2D,
    Rescale,
    UpSample2D,
    ZeroPadding2D,
    lay_out_,
    product_dtype,
    to_keras,
    to_torch,
)

# While images run through the convolutions in groups, a group's largest activation has about this
# many bytes for each thread, so that the next layer still finds it in the cache.
GROUP_BYTES = 8 << 20


# 1. Inference: what is constant is prepared once


def _state(parameters: Iterable[nn.Parameter]) -> list[tuple[int, int]]:
    """What changes when a parameter does: its version, or its address."""
    return [(0 if p.is_inference() else p._version, p.data_ptr()) for p in parameters]


class Prepared:
    """Tensors made from parameters, made anew when a parameter changes.

    A parameter's version says that it was written to, its address that its storage was replaced,
    and torch.func.functional_call puts another tensor in its place for one call. Writing through
    `.data` shows in none of them, so on a CPU a sample of the first parameter's values is compared
    as well, and going from training to evaluation or back makes all anew.
    """

    def __init__(self, modules: list[nn.Module], make: Callable[..., Any]) -> None:
        self.modules, self.make = modules, make
        self.key: Any = None
        self.parameters: list[weakref.ref[Tensor]] = []
        self.sample, self.made = torch.empty(0), None

    @torch.no_grad()
    def __call__(self, fuses: bool, dtype: torch.dtype, *args: Any) -> Any:
        """What was made in this dtype of the parameters as they are now.

        For fused operations, which want it in an order of their own, or for plain ones.
        """
        own = [module._parameters.values() for module in self.modules]
        parameters = [p for values in own for p in values if p is not None]
        same = [known() is p for known, p in zip(self.parameters, parameters, strict=False)]
        key = (fuses, dtype, _state(parameters))
        first = parameters[0].detach()
        step = max(1, first.numel() // 64)
        sample = first.as_strided((first.numel() // step,), (step,))
        if (
            key != self.key
            or not all(same)
            or not (first.is_cuda or torch.equal(sample, self.sample))
        ):
            self.made = self.make(fuses, dtype, *args)
            self.key, self.sample = key, sample.clone()
            self.parameters = [weakref.ref(p) for p in parameters]
        return self.made

    def __getstate__(self) -> dict[str, Any]:
        # Neither oneDNN's tensors nor references can be copied.
        return vars(self) | {"key": None, "made": None, "parameters": []}


class FusedConv2D:
    """Conv2D, the BatchNorm that follows it and the activation after that as one step."""

    def __init__(self, conv: Conv2D, norm: BatchNorm | None, activation: Activate | None) -> None:
        self.conv, self.norm, self.activation = conv, norm, activation
        self.constants = Prepared([conv] if norm is None else [conv, norm], self._constants)

    def __call__(self, x: Tensor) -> Tensor:
        conv = self.conv
        dtype = product_dtype(x, conv.dtype)
        x, padding = conv.pad(x.to(dtype).contiguous(memory_format=torch.channels_last))
        fuses = kernels.fuses(x, dtype)
        weight, bias, groups = self.constants(fuses, dtype, x, padding)
        options = conv.stride, padding, conv.dilation, groups
        relu = self.activation is not None and self.activation.is_relu
        if relu and fuses:
            return kernels.conv2d(x, weight, bias, *options, "relu")
        if relu and x.is_cuda:
            return kernels.conv2d_relu(x, weight, bias, *options)
        y = (kernels.conv2d if fuses else F.conv2d)(x, weight, bias, *options)
        return y if self.activation is None else self.activation(y)

    def _constants(
        self, fuses: bool, dtype: torch.dtype, x: Tensor, padding: tuple[int, int]
    ) -> tuple[Tensor, Tensor | None, int]:
        """Weight (O, I, H, W), bias and groups; batch norm is a scale of one and a shift."""
        conv, norm = self.conv, self.norm
        weight = conv.weight().detach()
        bias: Tensor | None = conv.bias
        groups = x.shape[1] // weight.shape[1]
        if norm is not None:
            scale = torch.rsqrt(norm.moving_variance + norm.epsilon)
            scale = scale if norm.gamma is None else scale * norm.gamma
            shift = -norm.moving_mean if bias is None else bias - norm.moving_mean
            shift = shift * scale
            bias = shift if norm.beta is None else shift + norm.beta
            weight = weight * scale.reshape(-1, 1, 1, 1)
        weight = weight.to(dtype)
        bias = None if bias is None else bias.detach().to(dtype)
        if fuses:
            options = conv.stride, padding, conv.dilation, groups
            weight = kernels.prepared_weight(weight, x.shape, *options)
        return weight, bias, groups


class FusedDense:
    """Dense and its ReLU as one step of inference."""

    def __init__(self, dense: Dense) -> None:
        self.dense = dense
        self.constants = Prepared([dense], self._constants)

    def __call__(self, x: Tensor) -> Tensor:
        activation, dtype = self.dense.activation, product_dtype(x, self.dense.dtype)
        x = x.to(dtype)
        fuses = kernels.fuses(x, dtype)
        weight, bias = self.constants(fuses, dtype)
        if not fuses:
            y = F.linear(x, weight, bias)
            return y if activation is None else activation(y)
        if activation is not None and activation.is_relu:
            return kernels.linear(x, weight, bias, "relu")
        y = kernels.linear(x, weight, bias)
        return y if activation is None else activation(y)

    def _constants(self, fuses: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias; the parameters themselves where their dtype is right."""
        dense = self.dense
        bias = None if dense.bias is None else dense.bias.detach().to(dtype)
        return dense.kernel.detach().t().to(dtype), bias


# 2. Graphs


@dataclass(frozen=True)
class Step:
    """One call of one module.

    Attributes:
        run: the module, or a fused step of inference.
        inputs, outputs: numbers of the values that it takes and makes.
        arguments: how Keras was called, for a KerasLayer.
        by_image: what one image becomes doesn't depend on the others.
        last_use: inputs that nobody needs afterwards.
    """

    run: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arguments: SymbolicArguments | None = None
    by_image: bool = False
    last_use: tuple[int, ...] = ()


@dataclass(frozen=True)
class Segment:
    """Steps that run one after the other.

    Attributes:
        grouped: they may run for some of the images at a time.
        checkpoint: backward runs them again.
        group_sizes: how many images at a time, for images of each shape and dtype.
    """

    steps: list[Step]
    grouped: bool
    checkpoint: bool = False
    group_sizes: dict[Any, int] = field(default_factory=dict)


FRESH = (BatchNorm, Conv2D, Dense, Merge)  # their backward doesn't need what they return
POOLS = (Pool2D, GlobalPool2D, ReLUPool2D)
# Dense isn't here because it would read its large kernel once for each group.
BY_IMAGE = (
    Activate, Conv2D, Convolve, Flatten, FusedConv2D, LayerNorm, Merge, Normalize, Rescale,
    UpSample2D, ZeroPadding2D, *POOLS,
)  # fmt: skip
BY_IMAGE_IN_INFERENCE = (*BY_IMAGE, BatchNorm, Dropout)


class Graph(nn.Module):
    """A Functional graph; takes and returns tensors in torch's layout."""

    def __init__(self, model: Functional, format: Format) -> None:
        super().__init__()
        numbers = {id(tensor): i for i, tensor in enumerate(model.inputs)}
        made: dict[int, tuple[nn.Module, list[int]]] = {}
        steps = []
        for depth in sorted(model._nodes_by_depth, reverse=True):
            for node in model._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                for tensor in node.outputs:
                    numbers[id(tensor)] = len(numbers)
                ranks = [len(tensor.shape) for tensor in node.input_tensors]
                module, built_for = made.get(id(node.operation), (None, ranks))
                if module is None or built_for != ranks:
                    module = _lower(node, format)
                    self._register(node.operation.name, module)
                    made[id(node.operation)] = module, ranks
                steps.append(
                    Step(
                        module,
                        tuple(numbers[id(tensor)] for tensor in node.input_tensors),
                        tuple(numbers[id(tensor)] for tensor in node.outputs),
                        arguments=node.arguments if isinstance(module, KerasLayer) else None,
                    )
                )
        self._inputs = tuple(numbers[id(tensor)] for tensor in model.inputs)
        self._outputs = tuple(numbers[id(tensor)] for tensor in model.outputs)
        self._uses = Counter(i for step in steps for i in step.inputs) + Counter(self._outputs)
        self._allow_in_place(steps)
        self._steps, self._checkpoint = steps, format.checkpoint
        self._inside = [tuple(step.run.modules()) for step in steps]
        self._descendants = tuple(self.modules())[1:]
        self._fused: dict[Any, FusedConv2D | FusedDense] = {}  # by the modules that are in one
        self._plans: dict[int, list[Segment]] = {}  # by how many of the steps are settled
        as_they_are = self._cut(steps, format.checkpoint)
        self._observed = [replace(segment, grouped=False) for segment in as_they_are]

    def _register(self, name: str, module: nn.Module) -> None:
        """Add a submodule under its layer's name, or the nearest that torch allows."""
        name = name.replace(".", "_")
        while hasattr(self, name):
            name += "_"
        self.add_module(name, module)

    def _allow_in_place(self, steps: list[Step]) -> None:
        """Let a ReLU overwrite its input where that is nobody else's business."""
        fresh = {
            step.outputs[0]
            for step in steps
            if isinstance(step.run, FRESH) and getattr(step.run, "activation", None) is None
        }
        for step in steps:
            if isinstance(step.run, Activate):
                step.run.inplace &= step.inputs[0] in fresh and self._uses[step.inputs[0]] == 1

    def _plan(self, settled: int) -> list[Segment]:
        """What runs where this many of the leading steps learn nothing."""
        if settled not in self._plans:
            head = _marked(self._fuse(self._steps[:settled]), BY_IMAGE_IN_INFERENCE)
            tail = _marked(self._pool_first(self._steps[settled:]), BY_IMAGE)
            self._plans[settled] = self._cut([*head, *tail], self._checkpoint and bool(tail))
        return self._plans[settled]

    def _only_use(self, steps: list[Step]) -> dict[int, Step]:
        """The step that takes a value which nothing else takes."""
        return {i: step for step in steps for i in step.inputs if self._uses[i] == 1}

    def _pool_first(self, steps: list[Step]) -> list[Step]:
        """For training: a max pool takes over the ReLU before it."""
        only_use = self._only_use(steps)
        pools: dict[int, Step] = {}
        result: list[Step] = []
        for step in steps:
            after = only_use.get(step.outputs[0])
            conv = step.run if isinstance(step.run, Conv2D) else None
            relu = conv.activation if conv is not None else step.run
            pool = after.run if after is not None else None
            if (
                after is not None
                and isinstance(relu, Activate)
                and relu.is_relu
                and isinstance(pool, Pool2D)
                and pool.maximum
            ):
                inputs = step.inputs if conv is None else step.outputs
                pools[id(after)] = replace(after, run=ReLUPool2D(pool), inputs=inputs)
                if conv is not None:
                    result.append(replace(step, run=Convolve(conv)))
            else:
                result.append(pools.get(id(step), step))
        return result

    def _fuse(self, steps: list[Step]) -> list[Step]:
        """For inference: a convolution takes over the batch norm and activation after it."""
        only_use = self._only_use(steps)
        result: list[Step] = []
        absorbed = set()
        for step in steps:
            if id(step) in absorbed:
                continue
            if isinstance(step.run, Dense):
                step = self._fused_step(step, FusedDense, step.run)
            elif isinstance(step.run, Conv2D):
                norm, activation, end = None, step.run.activation, step
                after = only_use.get(end.outputs[0])
                if activation is None and after is not None and isinstance(after.run, BatchNorm):
                    norm, end = after.run, after
                    after = only_use.get(end.outputs[0])
                    absorbed.add(id(end))
                if activation is None and after is not None and isinstance(after.run, Activate):
                    activation, end = after.run, after
                    absorbed.add(id(end))
                step = self._fused_step(step, FusedConv2D, step.run, norm, activation)
                step = replace(step, outputs=end.outputs)
            result.append(step)
        return result

    def _fused_step(self, step: Step, kind: Callable[..., Any], *modules: nn.Module | None) -> Step:
        """The step of a kind for these modules, the same in all plans: it has prepared weights."""
        if modules not in self._fused:
            self._fused[modules] = kind(*modules)
        return replace(step, run=self._fused[modules])

    def _cut(self, steps: list[Step], checkpoint: bool) -> list[Segment]:
        """Cut the steps after each pool where all that is needed later is one value.

        After a pool the maps are smaller, so that more images fit in a group. A checkpoint takes
        everything between two pools, and backward runs those with convolutions that learn again:
        Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
        """
        steps = _with_last_use(steps, self._outputs)
        segments: list[Segment] = []
        live, start, grouped = set(self._inputs), 0, len(self._inputs) == 1
        for i, step in enumerate(steps):
            if not (step.by_image or checkpoint):
                if start < i:
                    one = grouped and len(live) == 1
                    segments.append(_segment(steps[start:i], one, checkpoint))
                start, grouped = i, False
            live = (live | set(step.outputs)) - set(step.last_use)
            if len(live) == 1 and (isinstance(step.run, POOLS) or not grouped):
                segments.append(_segment(steps[start : i + 1], grouped, checkpoint))
                start, grouped = i + 1, True
        if start < len(steps):
            segments.append(_segment(steps[start:], grouped and len(live) == 1, checkpoint))
        return segments

    def _settled(self, inputs: tuple[Tensor, ...]) -> int:
        """How many of the leading steps run as in inference, with no gradient to come."""
        grad = torch.is_grad_enabled()
        if not (self.training or grad):
            return len(self._steps)
        if grad and any(x.requires_grad for x in inputs):
            return 0
        for i, modules in enumerate(self._inside):
            if not all(_is_settled(module, grad) for module in modules):
                return i
        return len(self._steps)

    def train(self, mode: bool = True) -> Graph:
        if mode != self.training:
            for step in self._fused.values():
                step.constants.key = None  # averaged weights, say, may be there for the evaluation
        super().train(mode)
        return self

    def _is_observed(self) -> bool:
        """Whether someone looks on, who must see the whole batch go through each module."""
        return is_intercepted() or any(
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            for module in self._descendants
        )

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        values = dict(zip(self._inputs, inputs, strict=True))
        segments = self._observed if self._is_observed() else self._plan(self._settled(inputs))
        for segment in segments:
            # Of an empty batch there are no groups.
            if segment.grouped and inputs[0].device.type == "cpu" and len(inputs[0]) > 0:
                _run_in_groups(segment, values)
            else:
                _run_segment(segment, values)
        return [values[i] for i in self._outputs]


def _run_in_groups(segment: Segment, values: dict[int, Tensor]) -> None:
    """Run a segment that has one value in and one out for a few images after the other.

    What one layer writes is then still in the cache when the next reads it, and memory is
    used again instead of being taken from the system for each large activation.
    """
    (number,) = segment.steps[0].inputs
    (result,) = segment.steps[-1].outputs
    x = values.pop(number)
    key = x.shape[1:], product_dtype(x, x.dtype)
    if key not in segment.group_sizes:
        # Before the first batch, so that the same batch always runs in the same groups: a
        # kernel's last bit depends on how many images it is given.
        sizes = [1]
        with torch.no_grad():
            _run(segment.steps, {number: x[:1]}, sizes)
        segment.group_sizes[key] = max(1, GROUP_BYTES * torch.get_num_threads() // max(sizes))
    parts: list[Tensor] = []
    size = segment.group_sizes[key]
    # Gradients of slices would be added up, each as large as x; those of a split are joined.
    for group in x.split(size) if len(x) > size else (x,):
        part = {number: group}
        _run_segment(segment, part)
        parts.append(part[result])
    values[result] = parts[0] if len(parts) == 1 else torch.cat(parts)


def _is_settled(module: nn.Module, grad: bool) -> bool:
    """Whether a module does what it does in inference; `grad`: whether parameters may learn."""
    counts = isinstance(module, BatchNorm) and module.layer[0].trainable
    if module.training and (counts or isinstance(module, Dropout)):
        return False
    parameters = module._parameters.values() if grad else ()
    return not any(p is not None and p.requires_grad for p in parameters)


def _segment(steps: list[Step], grouped: bool, checkpoint: bool) -> Segment:
    learns = _any(steps, (Conv2D, Convolve))
    grouped &= all(step.by_image for step in steps) and (learns or _any(steps, FusedConv2D))
    # Keras's layers may draw random numbers, or count, in ways of their own.
    again = checkpoint and learns and not _modules(steps, KerasLayer)
    return Segment(steps, grouped, again)


def _any(steps: list[Step], kinds: type | tuple[type, ...]) -> bool:
    return any(isinstance(step.run, kinds) for step in steps)


def _modules(steps: list[Step], kind: type[nn.Module]) -> list[Any]:
    """The modules of a kind in the steps, also those inside of others."""
    runs = [step.run for step in steps if isinstance(step.run, nn.Module)]
    return [module for run in runs for module in run.modules() if isinstance(module, kind)]


def _marked(steps: list[Step], by_image: tuple[type, ...]) -> list[Step]:
    return [replace(step, by_image=isinstance(step.run, by_image)) for step in steps]


def _run_segment(segment: Segment, values: dict[int, Tensor]) -> None:
    """Run a segment's steps; `values` keeps what is needed later."""
    # A compiler decides by itself what is computed again.
    if not segment.checkpoint or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        _run(segment.steps, values)
        return

    def run(*inputs: Tensor) -> dict[int, Tensor]:
        inside = dict(zip(numbers, inputs, strict=True))
        _run(segment.steps, inside)
        return inside

    taken = {i for step in segment.steps for i in step.inputs}
    numbers = [i for i in values if i in taken]
    inputs = [values.pop(i) for i in numbers]
    values |= checkpoint(
        run, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _again(segment.steps))
    )


@contextmanager
def _again(steps: list[Step]) -> Iterator[None]:
    """Let batch norm leave its moving statistics alone, which have counted this batch."""
    norms = _modules(steps, BatchNorm)
    for norm in norms:
        norm.again = True
    try:
        yield
    finally:
        for norm in norms:
            norm.again = False


def _run(steps: list[Step], values: dict[int, Tensor], sizes: list[int] | None = None) -> None:
    """Run the steps; `values` keeps what is needed later, `sizes` gets the bytes of each result."""
    for step in steps:
        inputs = [values[i] for i in step.inputs]
        for i in step.last_use:
            del values[i]
        extra = () if step.arguments is None else (step.arguments,)
        outputs = step.run(*extra, *inputs)
        if isinstance(outputs, Tensor):
            values[step.outputs[0]] = outputs
            if sizes is not None:
                sizes.append(outputs.nbytes)
        else:
            values.update(zip(step.outputs, outputs, strict=True))


def _with_last_use(steps: list[Step], outputs: tuple[int, ...]) -> list[Step]:
    """Note at each step which values it is the last to need."""
    needed = set(outputs)
    result = []
    for step in reversed(steps):
        result.append(replace(step, last_use=tuple(set(step.inputs) - needed)))
        needed.update(step.inputs)
    return result[::-1]


def _lower(node: Any, format: Format) -> nn.Module:
    """The module for one call of a layer or operation."""
    layer, arguments = node.operation, node.arguments
    args = arguments.args
    options = {name for name, value in arguments.kwargs.items() if value is not None} - {"training"}
    plain = len(args) == 1 and not options and _flat(args[0])
    graph = _functional(layer)
    if plain and graph is not None:
        return Graph(graph, format)
    handler = HANDLERS.get(type(layer))
    own = "channels_last" if format.channels_last else "channels_first"
    same_layout = type(layer) is layers.Flatten or getattr(layer, "data_format", own) == own
    plain = plain and same_layout
    if handler is not None and plain and layer.activity_regularizer is None:
        module = handler(layer, format, node.input_tensors)
        if module is not None:
            return module
    return KerasLayer(layer, format)


def _flat(argument: Any) -> bool:
    """Whether it is a tensor or a list of tensors."""
    return isinstance(argument, keras.KerasTensor) or (
        isinstance(argument, list | tuple)
        and all(isinstance(x, keras.KerasTensor) for x in argument)
    )


def _functional(model: Any) -> Functional | None:
    """The Functional graph that a model runs; None if it runs code of its own, or isn't a model."""
    if isinstance(model, keras.Sequential) and type(model).call is keras.Sequential.call:
        return model._functional
    if isinstance(model, Functional) and type(model).call is Functional.call:
        return model
    return None


# 3. Models


class Lowered(Graph):
    """What `lower` returns: takes and returns what the Keras model does."""

    # Declared here so that no layer of the same name takes their place.
    data_format = "channels_last"
    cuda_graphs = False
    input_dtypes: Sequence[torch.dtype] = ()
    input_shapes: Sequence[tuple[int | None, ...]] = ()

    def __init__(
        self,
        model: keras.Function,
        format: Format,
        data_format: str,
        *,
        any_size: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__(model, format)
        self.data_format, self.cuda_graphs = data_format, cuda_graphs
        # By the inputs' shapes and layouts; all are of the parameters that had this state.
        self._captured: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]] = {}
        self._captured_state: Any = None
        self.input_dtypes = [getattr(torch, x.dtype) for x in model.inputs]
        # Shapes as the caller has them: the Keras model's, unless asked for the other layout.
        axes = {(True, "channels_first"): (0, 3, 1, 2), (False, "channels_last"): (0, 2, 3, 1)}
        order = axes.get((format.channels_last, data_format), (0, 1, 2, 3))
        self.input_shapes = [
            tuple(x.shape[i] for i in order) if len(x.shape) == 4 else tuple(x.shape)
            for x in model.inputs
        ]
        if any_size:
            channels = 3 if data_format == "channels_last" else 1
            self.input_shapes = [
                tuple(n if i == channels else None for i, n in enumerate(shape))
                if len(shape) == 4
                else shape
                for shape in self.input_shapes
            ]
        number = {id(tensor): i for i, tensor in enumerate(model.outputs)}
        self._structure = keras.tree.map_structure(lambda x: number[id(x)], model._outputs_struct)

    def train(self, mode: bool = True) -> Lowered:
        if mode != self.training:
            self._captured_state = None
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Lowered:
        """What `.to()`, `.cuda()` and `.half()` do; refused where the Keras model can't follow."""
        for dtype in {p.dtype for p in self.parameters()}:
            after = fn(torch.empty(0, dtype=dtype)).dtype
            if after != dtype:
                raise ValueError(
                    f"Received a conversion from {dtype} to {after}, but the parameters are the "
                    f"Keras model's own, whose variables are {dtype}. Use lower(model, "
                    f"dtype={after}) or torch.autocast to compute in {after}."
                )
        super()._apply(fn, recurse)
        return self

    def forward(self, inputs: Any) -> Any:  # type: ignore[override]
        """Run the model on a tensor, or on the list or dict that the Keras model takes."""
        flat = [inputs] if isinstance(inputs, Tensor) else keras.tree.flatten(inputs)
        if len(flat) != len(self._inputs):
            raise ValueError(f"Received {len(flat)} inputs; this model takes {len(self._inputs)}.")
        values = []
        for x, shape, dtype in zip(flat, self.input_shapes, self.input_dtypes, strict=True):
            if x.ndim != len(shape) or any(
                expected not in (None, received)
                for expected, received in zip(shape, x.shape, strict=True)
            ):
                raise ValueError(
                    f"Received an input of shape {tuple(x.shape)}; expected {shape} with "
                    f"data_format={self.data_format!r}. Reshape the input, or lower the model "
                    f"with the data_format that the input has."
                )
            x = x.to(dtype)
            values.append(to_torch(x) if self.data_format == "channels_last" else x)
        if self.cuda_graphs and self._replays(values):
            outputs = self._replay(values)
        else:
            outputs = super().forward(*values)
        if self.data_format == "channels_last":
            outputs = [to_keras(y) for y in outputs]
        if isinstance(self._structure, int):
            return outputs[0]
        return keras.tree.map_structure(lambda i: outputs[i], self._structure)

    def _replays(self, inputs: list[Tensor]) -> bool:
        """Whether this is inference on a GPU, of which a graph can be replayed."""
        # Autocast keeps what it has cast only while it is on, and a graph would read it afterwards.
        recast = torch.is_autocast_enabled("cuda")
        learns = self.training or torch.is_grad_enabled()
        return all(x.is_cuda for x in inputs) and not (learns or recast or self._is_observed())

    def _replay(self, inputs: list[Tensor]) -> list[Tensor]:
        """Run the CUDA graph of inference for inputs of these shapes and layouts."""
        state = _state(self.parameters())
        if state != self._captured_state:  # what was prepared of the parameters is out of date
            self._captured, self._captured_state = {}, state
        # What was made in inference mode can't be written to outside of it.
        mode = torch.is_inference_mode_enabled()
        key = (mode, *((x.shape, x.stride(), x.device) for x in inputs))
        if key not in self._captured:
            self._captured[key] = self._capture(inputs)
        graph, static, outputs = self._captured[key]
        for mine, given in zip(static, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return [y.clone() for y in outputs]  # the next replay overwrites them

    def _capture(
        self, inputs: list[Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]:
        """A CUDA graph of inference, and where it reads its inputs and writes its outputs.

        As https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs describes.
        """
        with torch.cuda.device(inputs[0].device):
            static = [x.clone() for x in inputs]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # prepares weights; cuDNN and cuBLAS set themselves up
                for _ in range(3):
                    super().forward(*static)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = super().forward(*static)
        return graph, static, outputs

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_captured": {}, "_captured_state": None}  # can't be copied

    def torchvision_state_dict(self) -> dict[str, Tensor]:
        """`state_dict` with torchvision's keys, shapes and order; of a VGG, whole or in part.

        The tensors share the parameters' memory, but for fc1's kernel, which is a copy: torchvision
        flattens the last map in another order.

        Raises:
            ValueError: layers that torchvision's VGG doesn't have.
        """
        tensors = {key.replace(".", "/"): value for key, value in self.state_dict().items()}
        return conversion.keras_to_torchvision(tensors)


def lower(
    model: keras.Model,
    *,
    data_format: str | None = None,
    dtype: torch.dtype | None = None,
    checkpoint: bool = False,
    cuda_graphs: bool = False,
) -> Lowered:
    """Return a torch module that runs a Keras model on the model's own parameters.

    `train()` and `eval()` decide what Keras's `training` argument does; train either and both
    change. Frozen layers at the front of the network run in training as in inference, which is
    faster and keeps nothing. The kernels' storage is put in another order in place; their values
    stay.

    Args:
        model: a Functional or Sequential model; any layers, the fast way for those in `HANDLERS`.
        data_format: layout of 4-D inputs and outputs, "channels_last" (N, H, W, C) or
            "channels_first" (N, C, H, W); the Keras model's own by default.
        dtype: what layers compute in that Keras would run in float32, as a mixed dtype policy
            would do; the parameters stay as they are.
        checkpoint: in training, keep only what pools put out and compute the activations between
            them again in backward: the same gradients from a fraction of the memory, in up to a
            third more time. Blocks in which a layer runs as Keras runs it are kept whole.
        cuda_graphs: on a GPU, replay inference as a CUDA graph, which spares small batches the time
            that it takes to launch each kernel. A graph, with memory of its own, is captured for
            each shape of the inputs, and again when a parameter has changed.

    Raises:
        ValueError: a model that isn't a graph of layers, or an unknown data_format or dtype.
    """
    graph = _functional(model)
    if graph is None:
        raise ValueError(
            f"Received {model!r}, which is not a Functional model or a built Sequential one; "
            f"only a graph of layers can be lowered. Build the model from keras.Input, or call "
            f"the Keras model itself in the torch loop."
        )
    _check(data_format, dtype)
    own = layout(graph)
    format = Format(own == "channels_last", dtype, checkpoint)
    return Lowered(graph, format, data_format or own, cuda_graphs=cuda_graphs)


def part(inputs: keras.KerasTensor, outputs: Any, *, data_format: str | None = None) -> Lowered:
    """Lower what a Keras model does between its tensors, on its own Parameters.

    The model isn't changed. Height and width may differ from the model's where its layers allow it.

    Args:
        inputs: where the part starts: `model.input`, or the `output` of a layer.
        outputs: where it ends: one such tensor, or a list of them.
        data_format: layout of 4-D inputs and outputs, as `lower` takes it.

    Raises:
        ValueError: a path from the model's input to `outputs` that goes around `inputs`.
    """
    _check(data_format)
    function = keras.Function(inputs, outputs)  # makes no nodes, so `layer.output` stays what it is
    own = layout(function)
    return Lowered(
        function, Format(own == "channels_last", None), data_format or own, any_size=True
    )


def _check(data_format: str | None, dtype: torch.dtype | None = None) -> None:
    if data_format not in (None, "channels_last", "channels_first"):
        raise ValueError(
            f"Received data_format={data_format!r}; expected 'channels_last' or 'channels_first'."
        )
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"Received dtype={dtype!r}; expected torch.float32, torch.bfloat16 or torch.float16."
        )


def layout(model: keras.Function) -> str:
    """The layout that the model's spatial layers have; Flatten has an option of the same name."""
    for operation in model.operations:
        for layer in operation._flatten_layers() if isinstance(operation, keras.Layer) else ():
            if hasattr(layer, "data_format") and not isinstance(layer, layers.Flatten):
                return str(layer.data_format)
    return str(keras.config.image_data_format())


def accelerate_(model: keras.Model, compile: bool = False, enabled: bool = True) -> keras.Model:
    """Make a Keras model run its lowered module in fit, evaluate, predict and calls, in place.

    Results, callbacks, metrics, saving and surgery stay what they are; neither a saved model nor a
    clone of this one is accelerated. Call it again after layers were changed otherwise than by
    training or by their `trainable` flags. Returns the model.

    Args:
        model: what `lower` takes.
        compile: run the module through torch.compile.
        enabled: False gives the model its own `call` back.
    """
    model.__dict__.pop("call", None)
    if not enabled:
        return model
    lowered = lower(model)
    run = torch.compile(lowered) if compile else lowered
    graph = getattr(model, "_functional", model)  # a Sequential model has its graph inside
    laid_out: Any = None  # the optimizer whose slots have the layout of their kernels

    def call(inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        # Keras's own way where it works out shapes, which it does on tensors that are not real.
        if mask is not None or in_stateless_scope():
            return type(model).call(model, inputs, training=training, mask=mask)
        values = graph._standardize_inputs(inputs)
        if any(x is None or x.is_meta for x in values):
            return type(model).call(model, inputs, training=training, mask=mask)
        if lowered.training != bool(training):
            lowered.train(bool(training))
        nonlocal laid_out
        optimizer = getattr(model, "optimizer", None)  # None before compile()
        if training and optimizer is not laid_out and optimizer and optimizer.built:
            _lay_out_slots_(optimizer, lowered)
            laid_out = optimizer
        return run(values)

    model.__dict__["call"] = call
    return model


def _lay_out_slots_(optimizer: keras.Optimizer, lowered: Lowered) -> None:
    """Give momentum and the like the layout of their kernels; mixed layouts make updates slow."""
    shapes = {p.shape for p in lowered.parameters() if not p.is_contiguous()}
    for variable in optimizer.variables:
        if variable.value.shape in shapes:
            lay_out_(variable.value)
