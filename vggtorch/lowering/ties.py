"""Keras variables and torch parameters on the same memory, and what keeps them there.

A Keras kernel is (H, W, I, O) and torch's weight (O, I, H, W): two tensors, because each side's
tools expect their own shape, over one storage. `Tie` is one such pair. Where torch registers
another tensor in the place of one (`child.weight = ...`), the Keras variable takes its storage at
once. What replaces the storage under one of the two (`vector_to_parameters`, a Keras model that is
moved) is carried to the other at the network's next call, or when its parameters are next listed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import keras
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from vggtorch import keras_graph
from vggtorch.telling import tell
from vggtorch.weights import Rule

_PLAIN = Tensor, nn.Parameter  # not a subclass, such as quantized or sharded tensors


@dataclass(eq=False)  # tensors have no one truth value
class Tie:
    """One Keras variable and the torch tensor on its memory.

    Attributes:
        variable: Keras's.
        tensor: torch's Parameter, or its buffer where Keras's variable is state; the variable's own
            where the module runs the Keras layer itself.
        rule: how torch's axes become Keras's.
        places: the modules that the torch tensor stands in, and its name there.
        trains: Keras's flag when it was last carried over to torch.
        addresses: where both stood when they were last made to share memory.
        is_torn: torch has registered different tensors in its places.
    """

    variable: keras.Variable
    tensor: Tensor
    rule: Rule
    places: list[tuple[nn.Module, str]]
    trains: bool
    addresses: tuple[int, int] = (0, 0)
    is_torn: bool = False

    @torch.no_grad()
    def share(self, *, from_torch: bool = True) -> None:
        """Let the Keras variable stand on the torch tensor's memory, or the other way round."""
        value = keras_graph.raw_value(self.variable)
        if not from_torch:
            self.tensor.data = self.rule.to_torch(value.detach()).contiguous()
        value.data = self.rule.to_view(self.tensor.detach()).view(self.rule.keras_shape)
        self.addresses = self.tensor.data_ptr(), value.data_ptr()

    def has_changed(self) -> bool:
        """Whether either side isn't what it was when this pair was last in step."""
        tensor, value = self.tensor, keras_graph.raw_value(self.variable)
        return (
            self.is_torn
            or type(tensor) not in _PLAIN
            or (tensor.data_ptr(), value.data_ptr()) != self.addresses
            or tensor.shape != self.rule.torch_shape
            or value.requires_grad != self.trains
        )

    def sync(self) -> None:
        """Carry over what either side has replaced, and Keras's `trainable` where it changed."""
        value = keras_graph.raw_value(self.variable)
        now = self.tensor.data_ptr(), value.data_ptr()
        if now != self.addresses:
            self.share(from_torch=now[0] != self.addresses[0])
        if value.requires_grad != self.trains:
            self.trains = value.requires_grad
            self.tensor.requires_grad_(self.trains)

    def find(self, at: tuple[nn.Module, str] | None = None, new: Tensor | None = None) -> None:
        """Take the tensor that stands in the modules now; `new` is about to stand at one place."""
        found: list[Tensor | None] = []
        for module, name in self.places:
            here = at is not None and at[0] is module and at[1] == name
            tensor = module._parameters.get(name, module._buffers.get(name))
            found.append(new if here else tensor)
        present = [tensor for tensor in found if tensor is not None]
        if present:
            self.tensor = present[0]
            self.is_torn = any(tensor is not self.tensor for tensor in present)

    def view(self) -> Tensor:
        """The Keras variable in torch's shape: a view, so that its gradient is the variable's."""
        return self.rule.to_torch(keras_graph.raw_value(self.variable)).contiguous()

    def can_hold(self) -> bool:
        """Whether torch has one tensor of the Keras variable's dtype and size, with values."""
        value = keras_graph.raw_value(self.variable)
        return (
            not self.is_torn
            and type(self.tensor) in _PLAIN
            and self.tensor.dtype == value.dtype
            and self.tensor.shape == self.rule.torch_shape
            and self.tensor.is_meta == value.is_meta
            and (value.is_inference() or not self.tensor.is_inference())  # which can't learn
        )


# By a module's id and the tensor's name in it. A tie keeps its modules, and so their ids, alive.
_TIES: WeakValueDictionary[tuple[int, str], Tie] = WeakValueDictionary()


def _registered(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    """Let the Keras variable stand on what is about to take the place of its torch tensor.

    Torch calls it for every tensor that any module gets, but not where `functional_call` puts
    others in for one call.
    """
    tie = _TIES.get((id(module), name))
    if tie is not None and tensor is not None:
        tie.find((module, name), tensor)
        if tie.can_hold():  # else the network's next call says that they have parted
            tie.share()


register_module_parameter_registration_hook(_registered)
register_module_buffer_registration_hook(_registered)


def _could_be(new: Tensor, own: Tensor) -> bool:
    """Whether a tensor can lend its memory to another."""
    return (new.dtype, new.shape, new.is_meta) == (own.dtype, own.shape, own.is_meta)


@dataclass
class Ties:
    """All pairs of a network, and what else it has in common with the Keras model.

    A copy of it has none: copies and pickles of a network stand alone.

    Attributes:
        pairs: of weights.
        norms: batch norms, and the Keras layers that may be frozen.
        wrapped: torch modules, and those of the Keras model that they are copies of.
    """

    pairs: list[Tie] = field(default_factory=list)
    norms: list[tuple[Any, keras.Layer]] = field(default_factory=list)
    wrapped: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)

    def watch(self) -> None:
        """From now on, let the Keras variables follow what torch registers in a tensor's place."""
        _TIES.update({(id(m), name): tie for tie in self.pairs for m, name in tie.places})

    def sync(self) -> None:
        """Let both sides see what was replaced or frozen on one of them; or part, and say so."""
        changed = [tie for tie in self.pairs if tie.has_changed()]
        parted = [tie for tie in changed if not tie.can_hold()]
        if parted:
            tell(
                f"Weights of the torch network ({parted[0].variable.path} first, {len(parted)} in "
                f"all) now have another dtype or form than their Keras variables, or no values, or "
                f"are not one tensor in all places: from here on they stand alone, and the Keras "
                f"model keeps the weights that it had."
            )
            self.pairs = [tie for tie in self.pairs if tie not in parted]
        for tie in changed:
            if tie not in parted:
                tie.sync()
        for module, layer in self.norms:
            if module.frozen is layer.trainable:
                module.frozen = not layer.trainable

    def find(self) -> None:
        """Let Keras follow `.to()`, which puts other buffers in place and registers nothing."""
        for tie in self.pairs:
            tie.find()
        for ours, theirs in self.wrapped:
            for name, own in theirs._buffers.items():
                new = ours._buffers.get(name)
                if own is not None and new is not None and _could_be(new, own):
                    own.data = new
                    ours._buffers[name] = own
        self.sync()

    def __deepcopy__(self, memo: Any) -> Ties:
        return Ties()

    def __reduce__(self) -> tuple[Any, ...]:
        return Ties, ()
