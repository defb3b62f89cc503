"""A Functional graph of Keras as a torch module that runs its layers in order, the fast way.

Steps before the first trainable one run as fused inference kernels, in inference all of them do;
the others use our autograd functions. Whoever looks on, such as a hook or a compiler, gets each
module run by itself on the whole batch.
"""

# ruff: noqa: D102  (forward does what its class says)
from __future__ import annotations

from typing import Any

import keras
import torch
from keras import layers
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from vggtorch import keras_graph
from vggtorch.lowering.as_keras import KerasLayer, Place
from vggtorch.lowering.conventions import LoweringOptions
from vggtorch.lowering.fused import FusedConv2D
from vggtorch.lowering.handlers import HANDLERS
from vggtorch.lowering.kernels import is_intercepted
from vggtorch.lowering.modules import BatchNorm, Dropout
from vggtorch.lowering.running import run_segments
from vggtorch.lowering.steps import Plans, Step


class Graph(nn.Module):
    """A Functional graph; takes and returns tensors in torch's layout."""

    def __init__(self, model: keras.Function, options: LoweringOptions) -> None:
        super().__init__()
        numbers = {id(tensor): i for i, tensor in enumerate(model.inputs)}
        made: dict[int, tuple[nn.Module, list[int]]] = {}
        steps = []
        hidden: set[int] = set()  # tensors that may carry a mask which their graph doesn't show
        for node in keras_graph.calls(model):
            if node.is_input:
                continue
            for tensor in node.outputs:
                numbers[id(tensor)] = len(numbers)
            inputs = {id(x) for x in node.input_tensors}
            hides = _masks_inside(node.operation) or not hidden.isdisjoint(inputs)
            if hides:
                hidden |= {id(tensor) for tensor in node.outputs}
            ranks = [len(tensor.shape) for tensor in node.input_tensors]
            module, built_for = made.get(id(node.operation), (None, ranks))
            if module is None or built_for != ranks:
                module = KerasLayer(node.operation, options) if hides else _lower(node, options)
                self._register(node.operation.name, module)
                made[id(node.operation)] = module, ranks
            steps.append(
                Step(
                    module,
                    tuple(numbers[id(tensor)] for tensor in node.input_tensors),
                    tuple(numbers[id(tensor)] for tensor in node.outputs),
                    arguments=_arguments(node) if isinstance(module, KerasLayer) else None,
                )
            )
        self._inputs = tuple(numbers[id(tensor)] for tensor in model.inputs)
        self._outputs = tuple(numbers[id(tensor)] for tensor in model.outputs)
        self._steps, self._checkpoint = steps, options.checkpoint
        self._inside = [tuple(step.run.modules()) for step in steps]
        self._children = dict(self._modules)
        self._plans = Plans(self._steps, self._inputs, self._outputs, self._checkpoint)
        self._one_by_one = self._plans.one_by_one()
        self._descendants = [
            (module, tuple(module._modules.values())) for module in tuple(self.modules())[1:]
        ]

    def _register(self, name: str, module: nn.Module) -> None:
        """Add a submodule under its layer's name, or the nearest that torch allows."""
        name = name.replace(".", "_")
        while hasattr(self, name):
            name += "_"
        self.add_module(name, module)

    def __setattr__(self, name: str, value: Any) -> None:
        if value is not self.__dict__.get("_children", {}).get(name, value):
            self._refuse_replacement(name)
        super().__setattr__(name, value)

    def _refuse_replacement(self, name: str) -> None:
        raise ValueError(
            f"Received another module in the place of {name!r}; what lower returns always runs "
            f"the layers of its Keras model. Change the Keras model with vt.replace and lower "
            f"that, or replace modules in vt.to_torch(model), which runs what you put there."
        )

    def _frozen_prefix(self, inputs: tuple[Tensor, ...]) -> int:
        """How many of the leading steps run as in inference, with no gradient to come."""
        grad = torch.is_grad_enabled()
        if not (self.training or grad):
            return len(self._steps)
        if grad and any(x.requires_grad for x in inputs):
            return 0
        for i, modules in enumerate(self._inside):
            if not all(_is_frozen(module, grad) for module in modules):
                return i
        return len(self._steps)

    def is_observed(self) -> bool:
        """Whether someone looks on, or has changed a module, so that each must run by itself."""
        if is_intercepted() or _has_global_hooks():
            return True
        for name, child in self._children.items():
            if self._modules.get(name) is not child:
                self._refuse_replacement(name)
        return any(
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in vars(module)
            or tuple(module._modules.values()) != children
            for module, children in self._descendants
        )

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        values = dict(zip(self._inputs, inputs, strict=True))
        if self.is_observed():
            segments = self._one_by_one
        else:
            segments = self._plans.fast(self._frozen_prefix(inputs))
            for step in self._plans.fused.values():
                if isinstance(step, FusedConv2D):
                    step.constants.is_checked = False
        run_segments(segments, values, inputs[0])
        return [values[i] for i in self._outputs]


def _has_global_hooks() -> bool:
    """Whether torch calls hooks for every module that runs."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _is_frozen(module: nn.Module, grad: bool) -> bool:
    """Whether a module does what it does in inference; `grad`: whether parameters may learn."""
    counts = isinstance(module, BatchNorm) and module.layer[0].trainable
    if module.training and (counts or isinstance(module, Dropout)):
        return False
    tensors = (*module._parameters.values(), *module._buffers.values()) if grad else ()
    return not any(p is not None and p.requires_grad for p in tensors)


def _lower(node: keras_graph.Node, options: LoweringOptions) -> nn.Module:
    """The module for one call of a layer or operation."""
    layer, arguments = node.operation, node.arguments
    # Masks live on Keras's own tensors, and only Keras's own layers hand them on.
    if any(keras_graph.has_mask(x) for x in (*node.input_tensors, *node.outputs)):
        return KerasLayer(layer, options)
    args = arguments.args
    given = {name for name, value in arguments.kwargs.items() if value is not None} - {"training"}
    plain = len(args) == 1 and not given and _flat(args[0])
    graph = keras_graph.functional(layer)
    if plain and graph is not None:
        return Graph(graph, options)
    handler = HANDLERS.get(type(layer))
    own = "channels_last" if options.channels_last else "channels_first"
    same_layout = type(layer) is layers.Flatten or getattr(layer, "data_format", own) == own
    plain = plain and same_layout
    if handler is not None and plain and layer.activity_regularizer is None:
        module = handler(layer, options, node.input_tensors)
        if module is not None:
            return module
    return KerasLayer(layer, options)


def _masks_inside(operation: Any) -> bool:
    """Whether a layer inside of a layer makes masks, as an Embedding in a nested model does."""
    if not isinstance(operation, keras.Layer):
        return False
    inside = keras_graph.all_layers(operation, include_self=False)
    return any(isinstance(x, layers.Masking) or getattr(x, "mask_zero", False) for x in inside)


def _arguments(node: keras_graph.Node) -> Any:
    """What Keras was called with, each tensor as its place among the inputs."""
    place = {id(tensor): Place(i) for i, tensor in enumerate(node.input_tensors)}
    arguments = node.arguments.args, node.arguments.kwargs
    return keras.tree.map_structure(lambda x: place.get(id(x), x), arguments)


def _flat(argument: Any) -> bool:
    """Whether it is a tensor or a list of tensors."""
    return isinstance(argument, keras.KerasTensor) or (
        isinstance(argument, list | tuple)
        and all(isinstance(x, keras.KerasTensor) for x in argument)
    )
