"""A Functional graph of Keras as a torch module that runs its layers in order, the fast way.

The leading steps that learn nothing, all of them in inference, run fused; the others by gradients
of our own; and all run one by one before onlookers such as hooks and compilers. Images run through
the convolutions in groups, and backward computes again what checkpointing has not kept.
"""

# ruff: noqa: D102  (forward does what its class says)
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import torch
from keras import layers
from keras.src.models.functional import Functional
from keras.src.ops.symbolic_arguments import SymbolicArguments
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vggtorch.lowering.fused import FusedConv2D, FusedDense
from vggtorch.lowering.kernels import is_intercepted
from vggtorch.lowering.modules import (
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
    product_dtype,
)

# While images run through the convolutions in groups, a group's largest activation has about this
# many bytes for each thread, so that the next layer still finds it in the cache.
GROUP_BYTES = 8 << 20


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

    def is_observed(self) -> bool:
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
        segments = self._observed if self.is_observed() else self._plan(self._settled(inputs))
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
    (number,) = set(segment.steps[0].inputs)  # x * x takes its one value twice
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
    # The gradients of slices would be added up, each as large as x; those of a split are joined.
    # Only an unsafe split may be written to, which a ReLU at the start of the segment does where
    # nobody else needs x (`_allow_in_place`).
    for group in x.unsafe_split(size) if len(x) > size else (x,):
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
    graph = functional(layer)
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


def functional(model: Any) -> Functional | None:
    """The Functional graph that a model runs; None if it runs code of its own, or isn't a model."""
    if isinstance(model, keras.Sequential) and type(model).call is keras.Sequential.call:
        return model._functional
    if isinstance(model, Functional) and type(model).call is Functional.call:
        return model
    return None
