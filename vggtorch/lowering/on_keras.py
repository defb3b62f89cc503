"""A torch network run on the Keras variables themselves, so that gradients are the variables' own.

`to_torch`'s network has parameters of its own on the Keras variables' memory. Keras's fit, and
whatever trains a Keras model by its variables, wants the gradients on those. `OnKeras` lets the
same network compute with views of the variables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import torch
from torch import Tensor, nn

from vggtorch import keras_graph
from vggtorch.lowering.network import TorchNetwork
from vggtorch.lowering.writing import check_data_format, network_of


@dataclass(frozen=True, eq=False)
class Product:
    """A convolution or a product of a network, and the Keras variables that are its weights.

    Attributes:
        module: torch's.
        kernel: (H, W, I, O), (H, W, C, multiplier) or (in, out).
        bias: (O,), or None.
    """

    module: nn.Conv2d | nn.Linear
    kernel: Tensor
    bias: Tensor | None

    @property
    def convolves(self) -> bool:
        """Whether it is a convolution."""
        return isinstance(self.module, nn.Conv2d)

    @property
    def is_depthwise(self) -> bool:
        """Whether the kernel is (H, W, C, multiplier)."""
        module = self.module
        return isinstance(module, nn.Conv2d) and self.kernel.shape[-1] != module.out_channels


class OnKeras(nn.Module):
    """A Keras graph as a torch module whose parameters are the Keras variables' own Parameters.

    Attributes:
        network: the torch network that it runs, with parameters of its own on the same memory.
    """

    def __init__(
        self,
        graph: keras.Function,
        name: str,
        data_format: str | None = None,
        winograd: bool = False,
    ) -> None:
        super().__init__()
        # In a tuple, which keeps the network's parameters from being listed beside Keras's.
        network = network_of(
            graph, name, data_format=data_format, winograd=winograd, own_modules=True
        )
        self._hidden = (network,)
        self._dtypes = [keras_graph.torch_dtype(x.dtype) for x in graph.inputs]
        names = {id(module): name for name, module in self.network.named_modules()}
        self._weights = [
            (f"{names[id(module)]}.{name}", tie)
            for tie in self.network._ties.pairs
            if isinstance(tie.tensor, nn.Parameter)
            and tie.tensor is not keras_graph.raw_value(tie.variable)
            for module, name in tie.places
        ]
        for operation in graph.operations:
            state = {id(variable) for variable in keras_graph.state_of(operation)}
            for variable in getattr(operation, "variables", ()):
                value, key = keras_graph.raw_value(variable), variable.path.replace(".", "_")
                while key in self._parameters or key in self._buffers:
                    key += "_"
                if id(variable) in state:
                    self.register_buffer(key, value)
                else:
                    self.register_parameter(key, value)  # type: ignore[arg-type]

    @property
    def network(self) -> TorchNetwork:
        """The torch network that it runs."""
        return self._hidden[0]

    def products(self) -> list[Product]:
        """The two-dimensional convolutions and the products of the network, in its order."""
        weights = {
            (id(module), name): keras_graph.raw_value(tie.variable)
            for tie in self.network._ties.pairs
            for module, name in tie.places
        }
        return [
            Product(module, weights[id(module), "weight"], weights.get((id(module), "bias")))
            for module in self.network.modules()
            if isinstance(module, nn.Conv2d | nn.Linear)
        ]

    def train(self, mode: bool = True) -> OnKeras:
        """As torch.nn.Module has it, for the network."""
        self.network.train(mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OnKeras:
        """What `.to(device)` does: the network moves, and takes the Keras variables along."""
        self.network._apply(fn, recurse)
        return self

    def forward(self, *inputs: Tensor) -> Any:
        """Run the graph on its inputs, in the dtypes that Keras wants."""
        values = tuple(x.to(dtype) for x, dtype in zip(inputs, self._dtypes, strict=True))
        if not torch.is_grad_enabled():
            return self.network(*values)
        views = {
            name: tie.view()
            for name, tie in self._weights
            if keras_graph.raw_value(tie.variable).requires_grad
        }
        return torch.func.functional_call(self.network, views, values, tie_weights=False)


def between(inputs: keras.KerasTensor, outputs: Any, *, data_format: str | None = None) -> OnKeras:
    """What a Keras model does between its tensors as a torch module, on its own Parameters.

    The model isn't changed. Height and width may differ from the model's where its layers allow it.

    Args:
        inputs: where it starts: `model.input`, or the `output` of a layer.
        outputs: where it ends: one such tensor, or a list of them.
        data_format: layout of inputs and outputs, as `to_torch` takes it.

    Raises:
        ValueError: a path from the model's input to `outputs` that goes around `inputs`.
    """
    check_data_format(data_format)
    # A keras.Function, unlike a keras.Model, doesn't call the layers again, so that `layer.output`
    # stays what it is.
    return OnKeras(keras.Function(inputs, outputs), "between", data_format)
