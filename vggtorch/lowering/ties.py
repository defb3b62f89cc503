"""Keras variables and torch parameters on the same memory, and what keeps them there.

A Keras kernel is (H, W, I, O) and torch's weight (O, I, H, W): two tensors, because each side's
tools expect their own shape, over one storage. `Tie` is one such pair. What replaces the storage
under one of the two (`.to(device)`, `vector_to_parameters`, a Keras model that is moved) is
carried to the other at the network's next call, or when its parameters are next listed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import torch
from torch import Tensor, nn

from vggtorch import keras_graph


@dataclass(frozen=True)
class Layout:
    """How torch's tensor becomes Keras's: seen in the shape `split`, its axes permuted to `order`.

    An `order` of None means that both sides have the same axes. `shape` is that of torch's tensor,
    where it isn't `split`'s: (C * M, 1, H, W) of (C, M, H, W), a depthwise convolution's kernel.
    """

    order: tuple[int, ...] | None = None
    split: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None

    def to_keras(self, tensor: Tensor) -> Tensor:
        """Keras's view of torch's tensor."""
        tensor = tensor if self.split is None else tensor.view(self.split)
        return tensor if self.order is None else tensor.permute(self.order)

    def to_torch(self, tensor: Tensor) -> Tensor:
        """Torch's tensor, contiguous; on the same memory if that is how it already lies there."""
        if self.order is not None:
            inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
            tensor = tensor.permute(inverse)
        tensor = tensor.contiguous()
        return tensor if self.shape is None else tensor.view(self.shape)


SAME = Layout()


@dataclass(eq=False)  # tensors have no one truth value
class Tie:
    """One Keras variable and the torch tensor on its memory.

    Attributes:
        variable: Keras's.
        tensor: torch's Parameter, or its buffer where Keras's variable is state.
        layout: how torch's axes are Keras's.
        places: the modules that the torch tensor stands in, and its name there.
        addresses: where both stood when they were last made to share memory.
        trains: Keras's flag when it was last carried over to torch.
    """

    variable: keras.Variable
    tensor: Tensor
    layout: Layout
    places: list[tuple[nn.Module, str]]
    trains: bool
    addresses: tuple[int, int] = (0, 0)

    @torch.no_grad()
    def share(self, *, from_torch: bool = True) -> None:
        """Let the Keras variable stand on the torch tensor's memory, or the other way round."""
        value = keras_graph.raw_value(self.variable)
        if not from_torch:
            self.tensor.data = self.layout.to_torch(value.detach())
        value.data = self.layout.to_keras(self.tensor.detach())
        self.addresses = self.tensor.data_ptr(), value.data_ptr()

    def sync(self) -> None:
        """Carry over what either side has replaced, and Keras's `trainable` where it changed."""
        value = keras_graph.raw_value(self.variable)
        now = self.tensor.data_ptr(), value.data_ptr()
        if now != self.addresses:
            self.share(from_torch=now[0] != self.addresses[0])
        if isinstance(self.tensor, nn.Parameter) and value.requires_grad != self.trains:
            self.trains = value.requires_grad
            self.tensor.requires_grad_(self.trains)

    def find(self) -> None:
        """Take the tensor that stands in the module now, where torch has put another one there."""
        for module, name in self.places:
            for tensors in (module._parameters, module._buffers):
                tensor = tensors.get(name)
                if tensor is not None:
                    self.tensor = tensor

    def view(self) -> Tensor:
        """The Keras variable in torch's shape: a view, so that its gradient is the variable's."""
        return self.layout.to_torch(keras_graph.raw_value(self.variable))

    def can_hold(self) -> bool:
        """Whether the torch tensor's dtype and shape, and its having values, still are Keras's."""
        value = keras_graph.raw_value(self.variable)
        return (
            type(self.tensor) in (Tensor, nn.Parameter)
            and self.tensor.dtype == value.dtype
            and self.tensor.is_meta == value.is_meta
            and self.tensor.shape.numel() == value.shape.numel()
        )


def warn_parted(variables: Sequence[keras.Variable]) -> None:
    """Say that these Keras variables don't follow their torch tensors any more."""
    warnings.warn(
        f"{len(variables)} weights of the torch network, {variables[0].path} first, now have "
        f"another dtype or form than their Keras variables, or no values: from here on they stand "
        f"alone, and the Keras model keeps the weights that it had.",
        stacklevel=2,
    )


@dataclass
class Ties:
    """All pairs of a network, and the batch norms whose Keras layers may be frozen.

    A copy of it has none: copies and pickles of a network stand alone.
    """

    pairs: list[Tie] = field(default_factory=list)
    norms: list[tuple[Any, keras.Layer]] = field(default_factory=list)

    def sync(self) -> None:
        """Let both sides see what was replaced or frozen on one of them."""
        self._part()
        for tie in self.pairs:
            tie.sync()
        for module, layer in self.norms:
            module.frozen = not layer.trainable

    def find(self) -> None:
        """After `.to()` and `load_state_dict(assign=True)`: let Keras follow, or part from it."""
        for tie in self.pairs:
            tie.find()
        self._part()
        for tie in self.pairs:
            tie.share()

    def _part(self) -> None:
        """Part from the variables whose torch tensors can't stand for them any more."""
        parted = [tie for tie in self.pairs if not tie.can_hold()]
        if parted:
            warn_parted([tie.variable for tie in parted])
            self.pairs = [tie for tie in self.pairs if tie not in parted]

    def __deepcopy__(self, memo: Any) -> Ties:
        return Ties()

    def __reduce__(self) -> tuple[Any, ...]:
        return Ties, ()
