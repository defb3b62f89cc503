"""Layers and operations that run as Keras runs them, inside of a torch module."""

# ruff: noqa: D102  (forward does what its class says)
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import torch
from torch import Tensor

from vggtorch import keras_graph
from vggtorch.lowering.conventions import LoweringOptions, to_nchw, to_nhwc
from vggtorch.lowering.modules import OnKerasState


@dataclass(frozen=True)
class Place:
    """Stands for input number `index` in the recorded arguments of a call."""

    index: int


class KerasLayer(OnKerasState):
    """A layer, or an operation of keras.ops, that runs as Keras runs it, on Keras's layout.

    Its variables are the module's own parameters and, what Keras never trains, buffers. A tensor
    that torch has put in the place of one, as functional_call does, is what the layer then
    computes with.
    """

    def __init__(self, operation: Any, options: LoweringOptions) -> None:
        super().__init__()
        self.operation = (operation,)  # in a tuple, which keeps it from being a submodule
        self.channels_last = options.channels_last
        self.names: list[str] = []
        prefix = f"{getattr(operation, 'path', '')}/"
        state = keras_graph.state_of(operation)
        for variable in getattr(operation, "variables", ()):
            name = variable.path.removeprefix(prefix).replace("/", "_").replace(".", "_")
            while hasattr(self, name):
                name += "_"
            if any(variable is v for v in state):
                self.register_buffer(name, variable.value)
            else:
                self.register_parameter(name, variable.value)
            self.names.append(name)

    def forward(self, arguments: Any, *inputs: Tensor) -> list[Tensor]:
        (operation,) = self.operation
        values = [self._in_layout(x, to_nhwc) for x in inputs]
        args, kwargs = keras.tree.map_structure(
            lambda x: values[x.index] if isinstance(x, Place) else x, arguments
        )
        if keras_graph.reads_training(operation):
            kwargs = {**kwargs, "training": self.training}
        with self._own_tensors(), keras_graph.training_context(operation, self.training):
            outputs = keras.tree.flatten(operation(*args, **kwargs))
        return [self._in_layout(y, to_nchw) for y in outputs]

    def _in_layout(self, x: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
        """A 4-D tensor in the other layout, with its mask."""
        if not self.channels_last or x.ndim != 4:
            return x
        y = view(x)
        keras_graph.copy_mask_(x, y)
        return y

    @contextmanager
    def _own_tensors(self) -> Iterator[None]:
        """Let the layer compute with this module's tensors where they aren't its variables' own."""
        variables = getattr(self.operation[0], "variables", ())
        pairs = [(v, getattr(self, name)) for v, name in zip(variables, self.names, strict=True)]
        if all(keras_graph.raw_value(variable) is tensor for variable, tensor in pairs):
            yield
            return
        with keras.StatelessScope(pairs) as scope:
            yield
        for variable, tensor in pairs:
            value = scope.get_current_value(variable)
            if value is not None and value is not tensor:  # a moving mean, the state of a seed
                with torch.no_grad():
                    tensor.copy_(value)
