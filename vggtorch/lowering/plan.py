"""The fast way to run a network, and when nobody can tell it from running its modules one by one.

Steps before the first one that learns run as in inference, fused; in inference all of them do. The
others use gradients of our own. Both go through the batch in groups of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, cast

import keras
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves

from vggtorch.lowering.fused import TrainedLinear
from vggtorch.lowering.fusing import Ways
from vggtorch.lowering.kernels import is_intercepted
from vggtorch.lowering.layer_modules import KerasLayer, Place
from vggtorch.lowering.running import run_segments
from vggtorch.lowering.steps import (
    CONVOLUTIONS,
    DROPOUTS,
    LINEARS,
    NORMS,
    STATELESS,
    Step,
    in_plain_order,
    permutes,
    steps_of,
)
from vggtorch.lowering.winograd import Workspace

# What a tracer, or a library that changes a class for all its modules, puts something else for; and
# what in place of which, for a single module or for all of torch, others compute something else.
_CALL, _CALLED = nn.Module.__call__, nn.Module._call_impl
_CONVOLVES = nn.Conv2d._conv_forward
_OVERRIDDEN = {"forward", "_conv_forward"}
_FUNCTIONS = {
    name: getattr(F, name)
    for name in ("conv2d", "linear", "batch_norm", "relu", "relu6", "max_pool2d")
}
_DEVICE, _LAYOUT, _IS_QUANTIZED = map(attrgetter, ("device", "layout", "is_quantized"))
_WEIGHTED = (*CONVOLUTIONS, *LINEARS, *NORMS)
# How modules were set up that stand in the steps in a form made for that.
_SETTINGS: dict[type, Callable[[Any], Any]] = {
    **dict.fromkeys(
        CONVOLUTIONS, attrgetter("stride", "padding", "dilation", "groups", "padding_mode")
    ),
    nn.MaxPool2d: attrgetter(
        "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"
    ),
    nn.ZeroPad2d: attrgetter("padding", "value"),
    nn.ReLU6: attrgetter("min_val", "max_val"),
    **dict.fromkeys(NORMS, attrgetter("eps")),
}
_FORWARDS: dict[type, Any] = {
    kind: kind.forward  # type: ignore[union-attr]
    for kind in (*STATELESS, *NORMS, *DROPOUTS)
    if issubclass(kind, nn.Module)
}


class Plan:
    """The fast way to run a network whose graph and modules are what they were when it was made."""

    def __init__(
        self, graph: torch.fx.Graph, root: nn.Module, *, checkpoint: bool, winograd: bool
    ) -> None:
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self.names = [str(node.target) for node in inputs]
        self.ranks = [node.meta.get("rank") for node in inputs]
        self.shapes = [node.meta.get("shape") for node in inputs]
        self.children = [
            (parent, name, child, type(child))
            for parent in root.modules()
            for name, child in parent._modules.items()
        ]
        self.modules = tuple(root.modules())
        self.weighted = [m for m in self.modules if type(m) in _WEIGHTED]
        kinds = {type(m) for m in self.modules}
        self.forwards = [(kind, _FORWARDS[kind]) for kind in kinds if kind in _FORWARDS]
        steps, self.structure = steps_of(graph, dict(root.named_modules(remove_duplicate=False)))
        outputs = tuple(x.index for x in tree_leaves(self.structure) if isinstance(x, Place))
        workspace = Workspace() if winograd else None
        self.ways = Ways(steps, tuple(range(len(inputs))), outputs, checkpoint, workspace)
        self.settings = [(m, _settings(m)) for m in self.modules if type(m) in _SETTINGS]
        # Whether the maps that go in have their channels on axis 1, and so do those that come out.
        self.is_first = not any(permutes(step) and step.inputs[0] < len(inputs) for step in steps)

    def __deepcopy__(self, memo: Any) -> None:
        return None  # a copy of a network makes its own

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def is_current(self) -> bool:
        """Whether every module is where it was, and what it was."""
        return all(
            parent._modules.get(name) is child and type(child) is kind
            for parent, name, child, kind in self.children
        ) and all(_settings(module) == settings for module, settings in self.settings)

    def in_order(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Sequence[Any]:
        """The inputs one after the other; none where they aren't what the network takes."""
        named = self.names[len(args) :]
        return (*args, *map(kwargs.get, named)) if set(named) == set(kwargs) else ()

    def takes(self, inputs: Sequence[Any]) -> bool:
        """Whether these inputs run the fast way: plain tensors, while nobody looks on."""
        return (
            not self.is_watched()
            and _are_plain(inputs)
            and [x.ndim for x in inputs] == self.ranks
            and _have_plain_weights(self.weighted)
        )

    def layout_meant(self, inputs: Sequence[Tensor]) -> str | None:
        """The data_format of inputs that have another than the network's, as far as shapes tell."""
        for x, shape in zip(inputs, self.shapes, strict=True):
            if shape is None or x.ndim < 3 or _has_shape(x, shape):
                continue
            if _has_shape(x.movedim(1, -1), shape):
                return "channels_first"
            if _has_shape(x.movedim(-1, 1), shape):
                return "channels_last"
        return None

    def notes_of(self, inputs: Sequence[Tensor]) -> Iterator[str]:
        """What may be wrong with inputs that torch has raised an error for, and what to do."""
        if layout := self.layout_meant(inputs):
            yield (
                f"The network has another layout than these inputs. For theirs, make it by "
                f"vt.to_torch(model, data_format={layout!r})."
            )
        wanted = {m.weight.dtype for m in self.weighted if m.weight is not None}
        given = {x.dtype for x in inputs}
        if len(wanted) == len(given) == 1 and wanted != given:
            (have,), (want,) = given, wanted
            yield (
                f"The inputs are {have} and the network's weights {want}; Keras would cast them, "
                f"and torch doesn't: hand over images.to({want})."
            )

    def is_watched(self) -> bool:
        """Whether somebody looks on when modules run, or has given one of them another forward."""
        return (
            is_intercepted()
            or has_global_hooks()
            or _is_patched()
            or not all(
                kind.forward is forward and kind.__call__ is _CALL
                for kind, forward in self.forwards
            )
            or any(map(has_hooks, self.modules))
        )

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        """Run the network."""
        values: dict[int, Any] = dict(enumerate(inputs))
        plain = self.is_plain(inputs)
        way = self.ways.with_settled(self._settled(inputs), plain)
        way.parameters.look()
        run_segments(way.segments, values)
        if plain:
            for number in self.ways.outputs:
                values[number] = in_plain_order(values[number])
        return filled(self.structure, values)

    def is_plain(self, inputs: Sequence[Tensor]) -> bool:
        """Whether torch's modules would give maps that lie in memory in the order of their axes.

        The fused steps put them out in the order NHWC, as torch's modules do for such images.
        """
        return self.is_first and all(x.is_contiguous() for x in inputs if x.ndim == 4)

    def release(self) -> None:
        """Let go of the memory that is kept for gradients."""
        if self.ways.workspace is not None:
            self.ways.workspace.release()
        for run in self.ways.fused.values():
            if isinstance(run, TrainedLinear):
                run.gradients.release()

    def _settled(self, inputs: Sequence[Tensor]) -> int:
        """How many of the leading steps do as in inference, with no gradient to come."""
        grad = torch.is_grad_enabled()
        if grad and any(x.requires_grad for x in inputs):
            return 0
        for i, step in enumerate(self.ways.steps):
            if not _is_settled(step, grad):
                return i
        return len(self.ways.steps)


def _is_settled(step: Step, grad: bool) -> bool:
    """Whether a step does what it does in inference; `grad`: whether parameters may learn."""
    run, kind = step.target, type(step.target)
    if not isinstance(run, nn.Module):
        return True
    run = cast(Any, run)
    if kind in NORMS:
        changes = run.learns
    elif kind is KerasLayer:
        changes = run.training and isinstance(run.operation[0], keras.Layer)
    elif kind in STATELESS:
        changes = False
    else:  # a dropout, or a module of the user's
        changes = any(m.training for m in run.modules())
    if changes or not grad:
        return not changes
    modules = (run,) if kind in STATELESS else run.modules()
    return not any(
        p is not None and p.requires_grad
        for m in modules
        for p in (*m._parameters.values(), *m._buffers.values())
    )


def _settings(module: nn.Module) -> tuple[Any, Any]:
    """How a module is set up whose work the steps do in a form made for that."""
    weight = module._parameters.get("weight")
    return _SETTINGS[type(module)](module), None if weight is None else weight.shape


def _has_shape(x: Tensor, shape: Sequence[int | None]) -> bool:
    return all(m in (None, n) for n, m in zip(x.shape, shape, strict=True))


def _have_plain_weights(modules: Sequence[nn.Module]) -> bool:
    """Whether their weights are where their classes put them, and tensors on the CPU."""
    tensors = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
    return all("weight" in m._parameters for m in modules) and _are_plain(
        [t for t in tensors if t is not None]
    )


def _are_plain(tensors: Sequence[Any]) -> bool:
    """Whether all are tensors on the CPU, of torch's own two classes, with numbers in a row."""
    return (
        set(map(type, tensors)) <= {Tensor, nn.Parameter}
        and {device.type for device in set(map(_DEVICE, tensors))} <= {"cpu"}
        and set(map(_LAYOUT, tensors)) <= {torch.strided}
        and not any(map(_IS_QUANTIZED, tensors))
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to know when it runs, or has given it another forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or not _OVERRIDDEN.isdisjoint(vars(module))
        or module._compiled_call_impl is not None
    )


def _is_patched() -> bool:
    """Whether something stands in the place of a function of torch's that the plan goes around."""
    return (
        nn.Module.__call__ is not _CALL
        or nn.Module._call_impl is not _CALLED
        or nn.Conv2d._conv_forward is not _CONVOLVES
        or any(getattr(F, name) is not function for name, function in _FUNCTIONS.items())
    )


def has_global_hooks() -> bool:
    """Whether torch calls hooks for every module that runs."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def filled(structure: Any, values: dict[int, Any]) -> Any:
    """What the network returns: torch.fx's lists and dicts as Python's own."""
    if isinstance(structure, Place):
        return values[structure.index]
    if isinstance(structure, dict):
        return {key: filled(part, values) for key, part in structure.items()}
    if isinstance(structure, list | tuple):
        parts = [filled(part, values) for part in structure]
        return tuple(parts) if isinstance(structure, tuple) else parts
    return structure
