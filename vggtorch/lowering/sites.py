"""Where a Keras layer is called, and what a converter makes of it: `Site` and `Piece`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import keras
import torch
from keras import layers
from torch import nn

from vggtorch import keras_graph
from vggtorch.lowering.ties import Tie, Ties
from vggtorch.models import rule_of

# "first": channels on axis 1, as torch.nn's modules want it. "keras": as the Keras layer has it.
# "any": it makes no difference.
Axes = Literal["first", "keras", "any"]


@dataclass(frozen=True)
class Piece:
    """A module, the name that it adds to its layer's, and the axes that it takes and gives."""

    module: nn.Module
    suffix: str = ""
    axes: Axes = "first"


@dataclass
class Site:
    """Where a layer is called, and the weights that its modules get.

    Attributes:
        layer: the Keras layer.
        inputs: the symbolic tensors that it is called on.
        ties: the pairs of Keras variables and torch tensors of the whole network.
        share: whether torch's tensors are on the Keras variables' memory.
        given: the name of the dtype that its (first) input has when the network runs.
    """

    layer: Any
    inputs: Sequence[keras.KerasTensor]
    ties: Ties
    share: bool
    given: str

    @property
    def rank(self) -> int:
        """Axes of the layer's (first) input, the batch among them."""
        return len(self.inputs[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        """What the layer's weights are in, which is what it computes in."""
        return keras_graph.torch_dtype(self.layer.variable_dtype)

    @property
    def is_mixed(self) -> bool:
        """Whether it computes in another dtype than its weights have (a mixed dtype policy)."""
        return bool(self.layer.compute_dtype != self.layer.variable_dtype)

    @property
    def channels_last(self) -> bool:
        """Whether the layer's data_format, or Keras's default where it has none, says so."""
        own = getattr(self.layer, "data_format", keras.config.image_data_format())
        return bool(own == "channels_last")

    def of(self, kind: str) -> Any:
        """torch's class of a kind for these inputs: nn.MaxPool2d for "MaxPool" on images."""
        return getattr(nn, f"{kind}{self.rank - 2}d")

    def module(self, kind: Any, *args: Any, suffix: str = "") -> Any:
        """A module of torch with the layer's variables in it; `suffix`: of several, which it is."""
        made = kind(*args, device="meta", dtype=self.dtype)
        variables = {
            rule_of(self.layer, variable).torch_key: variable
            for variable in keras_graph.own_variables(self.layer)
        }
        for name in (*made._parameters, *made._buffers):
            self.set_(made, name, variables.get(f"{suffix}.{name}"))
        return made

    def set_(self, module: nn.Module, name: str, variable: keras.Variable | None) -> None:
        """Give a module a Keras variable's value: on its memory, or a copy without `share`."""
        if variable is None:
            setattr(module, name, None)
            return
        known = next((tie for tie in self.ties.pairs if tie.variable is variable), None)
        if known is not None:  # a layer that is called in several places has one weight
            tensor = known.tensor
            known.places.append((module, name))
        else:
            value, rule = keras_graph.raw_value(variable), rule_of(self.layer, variable)
            if value.is_inference() and self.share:  # of a model made in inference mode
                keras_graph.set_value_(variable, value.clone(), value.requires_grad)
                keras_graph.track_variables_(self.layer)
                value = keras_graph.raw_value(variable)
            tensor = rule.to_torch(value.detach()).contiguous()
            if not self.share and tensor.data_ptr() == value.data_ptr():
                tensor = tensor.clone()
            if name not in module._buffers:
                tensor = nn.Parameter(tensor, requires_grad=value.requires_grad)
            tie = Tie(variable, tensor, rule, [(module, name)], value.requires_grad)
            self.ties.pairs.append(tie)
            if self.share:
                tie.share()
        setattr(module, name, tensor)


Converter = Callable[[Site], "list[Piece] | None"]


def all_ranks(name: str) -> list[type]:
    """Keras's layers of one name for one, two and three spatial axes, as far as there are such."""
    return [kind for n in (1, 2, 3) if (kind := getattr(layers, f"{name}{n}D", None))]
