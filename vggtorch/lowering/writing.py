"""`to_torch`: a Keras model as a network of torch's own modules, on the Keras model's memory.

The Keras graph is walked once and written down as a torch.fx graph, so the result is what torch's
tools take for a network: its children are torch.nn's classes, its forward is plain code, and it
can be traced, quantised, pruned, exported and compiled as any other.
"""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import takewhile
from typing import Any

import keras
import torch
from keras import layers
from torch import nn

from vggtorch import keras_graph
from vggtorch.lowering.calls import (
    MERGES,
    dtype_of,
    fits,
    in_layout,
    is_plain,
    masks_inside,
    one_dtype,
    returned,
)
from vggtorch.lowering.converters import convert
from vggtorch.lowering.layer_modules import KerasLayer, Permute
from vggtorch.lowering.network import TorchNetwork, identifier, names_in_use
from vggtorch.lowering.settings import Settings, graph_to_read, has_other_code
from vggtorch.lowering.sites import Axes, Piece, Site
from vggtorch.lowering.ties import Ties
from vggtorch.telling import tell


def to_torch(
    model: keras.Model,
    *,
    data_format: str | None = None,
    share: bool = True,
    checkpoint: bool = False,
    winograd: bool = False,
) -> TorchNetwork:
    """Return a Keras model as a torch network of torch's own modules.

    Its children have the layers' names and are torch's own classes: `block1_conv1` is an nn.Conv2d
    and `block1_conv1_relu` the nn.ReLU behind it. Weights are (O, I, H, W) and (out, in). A batch
    norm is an nn.BatchNorm2d with Keras's rules, its moving statistics buffers. A layer that torch
    has no exact module for runs inside a module as Keras runs it; so do those behind a mask.

    **One memory.** Each weight stands on the memory of its Keras variable: an optimizer's step,
    `load_state_dict` or `set_weights` on either side is seen by both, and a saved Keras model has
    what torch has learned; so it has a parameter that you put in the place of another. Gradients
    are each side's own. `.to(device)` moves both; freezing a Keras layer freezes its weights here,
    from the next call or the next look at `parameters()`; `requires_grad` set here is torch's own
    affair. Replacing a child, or converting to another dtype or shape (with a warning), leaves the
    Keras model with what it had. `copy.deepcopy` and pickles stand alone. Kernels of
    the Keras model are views in another order from then on, so flatten them
    (`parameters_to_vector`) on the torch side.

    **Speed.** On a CPU a call runs faster than its modules one by one: convolutions with their
    batch norm, addition and ReLU in one, pools before ReLUs, a few images at a time, frozen leading
    layers as in inference. Whatever looks on or changes something gets the modules one by one:
    hooks, tracers, compilers, transforms, dispatch modes, modules with another forward. A module
    that you put in the place of another runs as it is. On a GPU torch's own operations run; for
    small batches there use `torch.compile(network, mode="reduce-overhead")`.

    **What is read once.** Strides, activations, dropout rates: changes of a layer other than of its
    weights and of `trainable` need another `to_torch`, and the next call warns of them. Penalties
    of Keras's regularizers are no part of what the network returns; a model that has them is warned
    of.

    **Modes.** `train()` and `eval()` are Keras's `training=True` and `training=False`, and the
    network starts in the first, as every torch module does.

    Args:
        model: a Functional or Sequential model, with any layers.
        data_format: layout of inputs and outputs with three axes or more, "channels_last"
            (N, H, W, C) or "channels_first" (N, C, H, W); the Keras model's own by default.
        share: False gives the network a memory of its own.
        checkpoint: in training, keep only what pools put out and compute the activations between
            them again in backward: the same gradients from a fraction of the memory, in up to a
            third more time. Blocks in which a layer runs as Keras runs it are kept whole. Layers
            that were made in a keras.RematScope ask for it, under `accelerate_` too.
        winograd: on a CPU, 3x3 convolutions and their gradients may be computed by Winograd's
            minimal filtering where that is faster: a step of VGG16 takes three quarters of the time
            in float32. Outputs and gradients of a layer then differ from Keras's by more than the
            last bits: by 3e-6 of their size in float32 (6e-7 without), by 0.5 % in bfloat16
            (0.25 %).

    Returns:
        The network. It takes the model's inputs one by one, by position or by their names, and
        returns what the model returns.

    Raises:
        ValueError: a model that isn't a graph of layers, or an unknown data_format.

    Example:
        >>> import torch, vggtorch as vt
        >>> vgg = vt.VGG11(weights=None, include_top=False, input_shape=(32, 32, 3))
        >>> network = vt.to_torch(vgg, data_format="channels_first").eval()
        >>> network.block1_conv1
        Conv2d(3, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
        >>> network(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 512, 1, 1])
    """
    check_data_format(data_format)
    graph = graph_to_read(model, "to_torch")
    _warn_of_penalties(model)
    network = network_of(graph, model.name, data_format=data_format, share=share, winograd=winograd)
    if checkpoint:
        network.meta["checkpoint"] = True
    if share:
        network._settings = Settings(_read_layers(model, network))
    return network


def _read_layers(model: keras.Model, network: TorchNetwork) -> list[keras.Layer]:
    """The layers that the network was written by; the others it asks at each call."""
    asked = {
        id(layer)
        for module in network.modules()
        if isinstance(module, KerasLayer) and isinstance(module.operation[0], keras.Layer)
        for layer in keras_graph.all_layers(module.operation[0])
    }
    return [layer for layer in keras_graph.all_layers(model) if id(layer) not in asked]


def check_data_format(data_format: str | None) -> None:
    """Raise the ValueError of an unknown data_format."""
    if data_format not in (None, "channels_last", "channels_first"):
        raise ValueError(
            f"Received data_format={data_format!r}; expected 'channels_last' or 'channels_first'."
        )


@torch.inference_mode(False)  # what is made in it, an accelerated model's first call, can't learn
def network_of(
    graph: keras.Function,
    name: str,
    *,
    data_format: str | None = None,
    share: bool = True,
    winograd: bool = False,
    own_modules: bool = False,
) -> TorchNetwork:
    """What `to_torch` returns, for any graph of Keras layers.

    own_modules: torch modules in it are the Keras model's own, which Keras runs, and not copies.
    """
    outer = "keras"
    if data_format not in (None, keras_graph.data_format(graph)):
        outer = "first" if data_format == "channels_first" else "last"
    common = _Common(share, own_modules)
    network = _Builder(graph, common, outer).build(name)
    if winograd:
        network.meta["winograd"] = True
    if any(map(keras_graph.rematerializes, graph.operations)):
        network.meta["checkpoint"] = True
    if share:
        network._ties = common.ties
        for module in network.modules():
            if isinstance(module, KerasLayer):
                common.ties.pairs += module.ties()
        common.ties.watch()
    return network


def _warn_of_penalties(model: keras.Model) -> None:
    """Say that a torch loop over the network leaves out what Keras's fit adds to the loss."""
    penalised = [v.path for v in model.trainable_variables if v.regularizer is not None]
    layers_inside = keras_graph.all_layers(model)
    penalised += [x.name for x in layers_inside if x.activity_regularizer is not None]
    if penalised:
        tell(
            f"{model.name!r} has regularizers ({penalised[0]!r} first, {len(penalised)} in all), "
            f"whose penalties the torch network doesn't know: in a torch loop use the optimizer's "
            f"weight_decay, or train by Keras's fit."
        )


_OPERATORS: dict[str | None, Callable[..., Any]] = {
    "Add": operator.add,
    "Subtract": operator.sub,
    "Multiply": operator.mul,
    "Divide": operator.truediv,
    "TrueDivide": operator.truediv,
    "Negative": operator.neg,
}


@dataclass
class _Common:
    """What the builders of a network and of the networks nested in it have in common.

    Attributes:
        share: whether torch's tensors are on the Keras variables' memory.
        own_modules: whether Keras runs the torch modules that are in its model.
        ties: the pairs of both.
        pieces: the modules of each layer by its id and its input's rank and dtype; a layer that is
            called in several networks is one module in all of them.
        copies: what stands for the variables of layers that Keras runs, without `share`.
    """

    share: bool
    own_modules: bool = False
    ties: Ties = field(default_factory=Ties)
    pieces: dict[tuple[int, int, str], list[Piece]] = field(default_factory=dict)
    copies: dict[int, nn.Parameter] = field(default_factory=dict)


class _Builder:
    """Writes a Keras graph down as a torch.fx graph.

    Each Keras tensor has a value here in one or two orders of axes: as Keras has it ("keras") and
    with the channels moved from the end to axis 1 ("first"). A step takes the one that it needs,
    which is made of the other by a permutation, a view, when it isn't there.
    """

    def __init__(self, model: keras.Function, common: _Common, outer: str = "keras") -> None:
        self.model, self.common, self.outer = model, common, outer
        self.root = nn.Module()
        self.graph = torch.fx.Graph()
        self.values: dict[int, dict[str, torch.fx.Node]] = {}  # by the id of a Keras tensor
        self.names: dict[tuple[int, int, str], list[str]] = {}  # of layers' modules
        self.nested: dict[int, str] = {}  # names of models inside
        self.hidden: set[int] = set()  # tensors that may carry a mask which they don't show
        self.wider: set[int] = set()  # that may be float64 where Keras says otherwise

    def build(self, name: str) -> TorchNetwork:
        inputs = {id(tensor): tensor for tensor in self.model.inputs}
        names: list[str] = []
        for tensor in inputs.values():
            names.append(identifier(keras_graph.producer(tensor).name, names))
            node = self.graph.placeholder(names[-1])
            axes = "first" if self.outer == "first" and len(tensor.shape) > 2 else "keras"
            shape = in_layout(tensor.shape, self.outer)
            node.meta |= {"rank": len(tensor.shape), "axes": axes, "shape": shape}
            if self.outer == "last" and len(tensor.shape) > 2:
                node = self._permuted(node, len(tensor.shape), to_first=True)
            self.values[id(tensor)] = {axes: node}
        for call in keras_graph.calls(self.model):
            if not call.is_input:
                self._step(call)
        outputs = {id(t): self._outgoing(t) for t in self.model.outputs}
        structure = returned(self.model)
        found = [outputs[id(t)] for t in keras.tree.flatten(structure)]
        self.graph.output(keras.tree.pack_sequence_as(structure, found))  # dicts in Keras's order
        self.graph.lint()
        return TorchNetwork(self.root, self.graph, class_name=identifier(name))

    # Values

    def _permuted(self, node: torch.fx.Node, rank: int, *, to_first: bool) -> torch.fx.Node:
        order = (0, rank - 1, *range(1, rank - 1)) if to_first else _channels_last(rank)
        permuted = self.graph.call_method("permute", (node, *order))
        permuted.meta["axes"] = "first" if to_first else "keras"
        return permuted

    def _outgoing(self, tensor: keras.KerasTensor) -> torch.fx.Node:
        rank = len(tensor.shape)
        if self.outer == "last" and rank > 2:
            return self._permuted(self.value(tensor, "keras"), rank, to_first=False)
        return self.value(tensor, "first" if self.outer == "first" else "keras")

    def value(self, tensor: keras.KerasTensor, axes: str) -> torch.fx.Node:
        """A Keras tensor's value with its axes in this order."""
        known, rank = self.values[id(tensor)], len(tensor.shape)
        if rank <= 2 or (axes == "any" and known):
            return next(iter(known.values()))
        if axes not in known:
            known[axes] = self._permuted(next(iter(known.values())), rank, to_first=axes == "first")
        return known[axes]

    def _cheapest(self, tensors: Sequence[keras.KerasTensor]) -> str:
        """The order of axes that needs the fewest permutations for all of these."""
        first = sum("first" in self.values[id(t)] for t in tensors)
        return "first" if 2 * first >= len(tensors) else "keras"

    # Steps

    def _step(self, call: keras_graph.Node) -> None:
        last = next(iter(reversed(self.graph.nodes)), None)
        masked = any(keras_graph.keras_mask(t) is not None for t in call.input_tensors)
        # Keras doesn't show on a nested model's output a mask that begins inside or passes through.
        hidden = any(id(t) in self.hidden for t in call.input_tensors)
        if hidden or masks_inside(call.operation, masked):
            self.hidden |= {id(tensor) for tensor in call.outputs}
            masked = True
        if masked or not self._written(call):
            module = KerasLayer(call, None if self.common.share else self.common.copies)
            name, several = self._add(call.operation.name, module), len(call.outputs) > 1
            paths = [(i,) if several else () for i in range(len(call.outputs))]
            inputs = [self._to(t, "keras") for t in call.input_tensors]
            self._call_module(call, name, inputs, paths)
        # torch computes in float64 where one value is that, which Keras's rules don't know of.
        wide = {self._dtype(t) for t in call.input_tensors} & {"float64", "float"}
        if wide and not isinstance(call.operation, keras.Layer):
            floats = (t for t in call.outputs if "float" in t.dtype and t.dtype != "float64")
            self.wider |= set(map(id, floats))
        for node in takewhile(lambda node: node is not last, reversed(self.graph.nodes)):
            node.meta["layer"] = call.operation.name

    def _written(self, call: keras_graph.Node) -> bool:
        """Write a call down as torch's own modules and functions; False where these can't do it."""
        layer = call.operation
        if not isinstance(layer, keras.Layer):
            return self._operator(call)
        if not is_plain(call) or has_other_code(layer):
            return False
        if self.common.own_modules and type(layer) is layers.TorchModuleWrapper:
            return False
        if inner := keras_graph.functional(layer):
            return self._nested(call, inner)
        if layer.activity_regularizer is not None:
            return False
        # Keras computes with the adapter, or in whole numbers.
        if getattr(layer, "lora_enabled", False) or layer.quantization_mode is not None:
            return False
        if type(layer) in (layers.Reshape, layers.Permute):
            return self._reshape(call)
        merges = type(layer) in MERGES or type(layer) is layers.Concatenate
        return self._merge(call) if merges else self._as_torch(call)

    def _set(self, tensor: keras.KerasTensor, axes: str, node: torch.fx.Node) -> None:
        self.values[id(tensor)] = {axes: node}
        node.meta |= {"axes": axes, "is_output": True}

    def _as_torch(self, call: keras_graph.Node) -> bool:
        """Write down a call of a layer that torch.nn has modules for."""
        layer, tensors, pieces = call.operation, call.input_tensors, self.common.pieces
        if len(tensors) != 1 or len(call.outputs) != 1:
            return False
        rank, dtype = len(tensors[0].shape), self._dtype(tensors[0])
        key = (id(layer), rank, dtype)
        if key not in pieces:
            pieces[key] = convert(Site(layer, tensors, self.common.ties, self.common.share, dtype))
        if not pieces[key]:
            return False
        if key not in self.names:
            self.names[key] = [self._add(layer.name + p.suffix, p.module) for p in pieces[key]]
        wanted = [self._axes(piece.axes, layer) for piece in pieces[key]]
        known = self.values[id(tensors[0])]
        if type(layer) is layers.Flatten and rank > 2 and "keras" not in known:
            # A child and not a call of `permute`, because an nn.Sequential of all children would
            # leave that out, and the flat numbers, of the same shape, would be in another order.
            name = self._add(f"{layer.name}_permute", Permute(*_channels_last(rank)))
            known["keras"] = self.graph.call_module(name, (known["first"],))
            known["keras"].meta["axes"] = "keras"
        axes = self._cheapest(tensors) if wanted[0] == "any" else wanted[0]
        node = self._cast(call, axes)
        for name, order in zip(self.names[key], wanted, strict=True):
            if order not in ("any", axes) and rank > 2:
                node = self._permuted(node, rank, to_first=order == "first")
                axes = order
            node = self.graph.call_module(name, (node,))
            node.meta["axes"] = axes
        self._set(call.outputs[0], axes, node)
        return True

    def _cast(self, call: keras_graph.Node, axes: str) -> torch.fx.Node:
        """A layer's one input in the dtype that the layer computes in, as Keras casts it.

        It doesn't cast a LayerNormalization's, which computes in float32, nor whole numbers but
        those that a Normalization gets.
        """
        layer, (tensor,) = call.operation, call.input_tensors
        given, wanted = self._dtype(tensor), layer.compute_dtype
        floats = layer.autocast and "float" in given and "float" in wanted
        casts = floats or type(layer) is layers.Normalization
        return self._to(tensor, axes, wanted if casts else given)

    def _to(self, tensor: Any, axes: str, dtype: str | None = None) -> torch.fx.Node:
        """A Keras tensor's value in the dtype in which it is computed with, if that is known.

        Keras casts what enters a model to its Input's dtype. Where all is in that one, or it is
        the default, it is left to torch, so that the network can be converted to another.
        """
        node, given = self.value(tensor, axes), self._dtype(tensor)
        casts = [] if dtype in (None, given) else [dtype]
        enters = isinstance(keras_graph.producer(tensor), layers.InputLayer)
        if enters and given != keras.config.floatx() and (dtype != given or "float" not in given):
            casts.insert(0, given)
        for name in casts:
            node = self.graph.call_method("to", (node, keras_graph.torch_dtype(name)))
        return node

    def _dtype(self, tensor: keras.KerasTensor) -> str:
        """The dtype of a Keras tensor's value, "float" where it is known when the network runs."""
        return "float" if id(tensor) in self.wider else dtype_of(tensor)

    def _axes(self, axes: Axes, layer: Any) -> str:
        """The order of axes that a module wants; in a channels_first layer both are the same."""
        return "keras" if getattr(layer, "data_format", "") == "channels_first" else axes

    def _reshape(self, call: keras_graph.Node) -> bool:
        """Write down a call of a layer that gives the same numbers with other axes."""
        layer = call.operation
        x = self._cast(call, "keras")
        if type(layer) is layers.Permute:
            node = self.graph.call_method("permute", (x, 0, *layer.dims))
        else:
            node = self._reshaped(x, len(call.input_tensors[0].shape), layer.target_shape)
        self._set(call.outputs[0], "keras", node)
        return True

    def _reshaped(self, x: torch.fx.Node, rank: int, shape: Sequence[int]) -> torch.fx.Node:
        """All but the batch in another shape, not by the batch's size, which an export fixes."""
        if rank > 2:
            x = self.graph.call_method("flatten", (x, 1))
        if rank == 1 or len(shape) == 0:
            size = self.graph.call_method("size", (x, 0))
            return self.graph.call_method("reshape", (x, size, *shape))
        return self.graph.call_method("unflatten", (x, 1, tuple(shape))) if len(shape) > 1 else x

    def _merge(self, call: keras_graph.Node) -> bool:
        """Write down a sum, product, concatenation and the like of several tensors."""
        layer, tensors = call.operation, call.input_tensors
        if len(tensors) < 2 or one_dtype(call, self._dtype) != layer.compute_dtype:
            return False
        axes = self._cheapest(tensors)
        values = [self.value(t, axes) for t in tensors]
        if type(layer) is layers.Concatenate:
            rank = len(tensors[0].shape)
            axis = layer.axis % rank
            if axes == "first" and axis > 0:
                axis = 1 if axis == rank - 1 else axis + 1
            node = self.graph.call_function(torch.cat, (values, axis))
        else:
            function = MERGES[type(layer)]
            node = reduce(lambda a, b: self.graph.call_function(function, (a, b)), values)
        if type(layer) is layers.Average:
            node = self.graph.call_function(operator.truediv, (node, len(values)))
        self._set(call.outputs[0], axes, node)
        return True

    def _operator(self, call: keras_graph.Node) -> bool:
        """Write down an operator between tensors and numbers."""
        kind, args = keras_graph.operation_kind(call.operation), call.arguments.args
        known = all(isinstance(a, keras.KerasTensor | int | float) for a in args)
        known = known and kind in _OPERATORS and not call.arguments.kwargs
        if not (known and one_dtype(call, self._dtype)):
            return False
        axes = self._cheapest(call.input_tensors)
        values = (self._to(a, axes) if isinstance(a, keras.KerasTensor) else a for a in args)
        node = self.graph.call_function(_OPERATORS[kind], tuple(values))
        self._set(call.outputs[0], axes, node)
        return True

    def _nested(self, call: keras_graph.Node, inner: keras.Function) -> bool:
        """Write down a call of a model as that of a network of its own."""
        model, given = call.operation, call.arguments.args[0]
        if not fits(given, inner):
            return False
        if id(model) not in self.nested:
            network = _Builder(inner, self.common).build(model.name)
            self.nested[id(model)] = self._add(model.name, network)
        # It begins with a cast to the dtypes that it was built with.
        pairs = zip(call.input_tensors, inner.inputs, strict=True)
        inputs = [self._to(tensor, "keras", entry.dtype) for tensor, entry in pairs]
        paths = keras.tree.flatten_with_path(returned(inner))
        self._call_module(call, self.nested[id(model)], inputs, [path for path, _ in paths])
        return True

    def _call_module(
        self, call: keras_graph.Node, name: str, inputs: list[torch.fx.Node], paths: Sequence[Any]
    ) -> None:
        """Call a child with these inputs; `paths`: where in what it gives outputs are."""
        node = self.graph.call_module(name, tuple(inputs))
        for tensor, path in zip(call.outputs, paths, strict=True):
            part = node
            for key in path:
                part = self.graph.call_function(operator.getitem, (part, key))
            self._set(tensor, "keras", part)

    def _add(self, name: str, module: nn.Module) -> str:
        """Add a child under a name that is free and that torch allows; the name it got."""
        name = name.replace(".", "_").replace("/", "_")
        while (
            keyword.iskeyword(name)
            or name in names_in_use()
            or hasattr(self.root, name)
            or hasattr(TorchNetwork, name)
        ):
            name += "_"
        self.root.add_module(name, module)
        return name


def _channels_last(rank: int) -> tuple[int, ...]:
    """The axes of (N, C, ...) in the order (N, ..., C)."""
    return (0, *range(2, rank), 1)
