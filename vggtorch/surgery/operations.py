"""Cut, extend and rearrange a Keras model by layer name: Model -> new Model.

Every operation is one or more splices ("whoever read tensor A now reads tensor B after these new
layers") given to one function, `_rebuild`, which walks the old graph once and makes a new one.

The model that comes in stays exactly as it was. The result stands alone: it has layers of its own
(made from the old ones' configs), values of its own (each tensor copied once, in its memory
layout), the old names, and one node for each call of a layer, so that it can be cut again, saved,
cloned and lowered. It isn't compiled, whatever the input was. It keeps the input's class, and with
it the weight set whose preprocessing it expects.

New layers are used as they are: after `replace(model, names, new)`, `new` is the layer in the
result. They must therefore be fresh: a layer that was called before is refused. A new layer whose
automatic name is taken is renamed; one whose chosen name is taken is an error.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any, Literal, TypeAlias

import keras
import torch
from keras import KerasTensor as Tensor
from keras.layers import Layer, TorchModuleWrapper
from keras.src.backend.torch.core import to_torch_dtype
from keras.src.models.functional import Functional, functional_like_constructor
from keras.src.ops.node import Node
from keras.src.saving.serialization_lib import SafeModeScope
from keras.src.utils.naming import to_snake_case

from vggtorch.surgery.composition import compose_
from vggtorch.surgery.distillation import fit_

New: TypeAlias = Layer | torch.nn.Module | Sequence[Layer | torch.nn.Module]


# What users call ---------------------------------------------------------------------------------


def truncate(
    model: keras.Model, layers: str | Sequence[str], *, start: str | None = None
) -> Functional:
    """The part of `model` that computes the outputs of `layers`, as a model of its own.

    One name gives one output, a list of names a list of outputs in that order. With `start`, the
    part begins after that layer: the tensor it puts out is the new model's input. Inputs that are
    no longer needed are dropped.

    Raises ValueError for an unknown name, a layer with several outputs, and a `start` that some
    path to `layers` goes around.
    """
    graph = _Graph(model)
    names = _names(layers, "truncate")
    outputs = [graph.only_output(name, "truncate") for name in names]
    for name, tensor in zip(names, outputs, strict=True):
        if _node(tensor).is_input:
            raise ValueError(f"truncate at {name!r} leaves no layer: {name!r} is an input.")
    if start is None:
        inputs = graph.inputs_of(outputs)
    else:
        inputs = graph.only_output(start, "truncate")
        graph.check_cut(inputs, names, outputs)
    return _rebuild(graph, inputs, outputs[0] if isinstance(layers, str) else outputs)


def stack(model: keras.Model, head: New) -> Functional:
    """`model` with `head` on top of its output.

    `head` is a layer, a list of layers, a model (which becomes one layer of the result), or a
    torch.nn.Module. A torch module sees what the layer below puts out (channels last, unless that
    was flattened) and is pickled whole when the result is saved, so that loading it needs
    `keras.saving.load_model(path, safe_mode=False)`.

    Raises ValueError if the model has several outputs or the head can't take its output.
    """
    graph = _Graph(model)
    if len(graph.outputs) != 1:
        names = ", ".join(repr(_owner(t)) for t in graph.outputs)
        raise ValueError(
            f"stack needs a model with one output; {model.name!r} has {len(graph.outputs)} "
            f"({names}). Cut it to one first: truncate(model, name)."
        )
    (output,) = graph.outputs
    return _splice(graph, [(output, output)], _new_layers(graph, head, "stack"))


def insert(model: keras.Model, after: str, layers: New) -> Functional:
    """`model` with new layers after the layer `after`, for all that read its output.

    Where `after` is called several times, the new layers follow each call and are shared as it is.

    Raises ValueError if what follows can't take the new layers' output.
    """
    graph = _Graph(model)
    tensors = graph.outputs_of(after, "insert")
    return _splice(graph, [(t, t) for t in tensors], _new_layers(graph, layers, "insert"))


def remove(model: keras.Model, layers: str | Iterable[str]) -> Functional:
    """`model` without `layers`: what read one of them reads what it read.

    A block with branches can go as a whole, all its layers named, if it has one way in.

    Raises ValueError for a layer that joins several tensors, an input layer, and if what follows
    can't take the tensor it would now get.
    """
    graph = _Graph(model)
    names = _names(layers, "remove")
    bypass: dict[int, Tensor] = {}
    pairs = []
    for node in graph.nodes_of(names, "remove"):
        sources = _distinct(bypass.get(id(t), t) for t in node.input_tensors)
        if len(sources) != 1:
            joined = ", ".join(repr(_owner(t)) for t in sources)
            raise ValueError(
                f"remove can't take out {node.operation.name!r}: it joins {len(sources)} tensors "
                f"(from {joined}), and what follows could read only one. Remove the whole block "
                f"with one way in, or replace it."
            )
        for tensor in node.outputs:
            bypass[id(tensor)] = sources[0]
            pairs.append((tensor, sources[0]))
    if all(_node(bypass.get(id(t), t)).is_input for t in graph.outputs):
        raise ValueError(f"remove would leave no layer of {model.name!r} but its inputs.")
    return _splice(graph, pairs, [])


def replace(
    model: keras.Model,
    layers: str | Iterable[str],
    new: New,
    *,
    init: Literal["compose", "fit"] | None = None,
    images: Any = None,
) -> Functional:
    """`model` with `new` in place of `layers`, all other weights kept.

    `layers` is one layer, or a set of layers with one way in and one way out (branches between
    them included, if all their layers are named). Where one layer is called several times, `new`
    replaces each call and is shared as it was.

    With `init=None`, `new` keeps the weights it has, or its random ones. "compose" gives a single
    new layer the product of the linear layers that it replaces. "fit" then trains the new layers
    alone, on a few hundred preprocessed `images` (N, H, W, C) without labels, until the layers
    behind them see what they saw before: `fit_` with its defaults, two minutes at most. To learn
    how well the result matches, call `compose_` or `fit_` on what `init=None` gives: they say it.

    Raises ValueError if the set has more than one way in or out (it names the edges), and if what
    follows can't take what `new` puts out (it gives both shapes).
    """
    if init not in (None, "compose", "fit"):
        raise ValueError(f"replace expects init=None, 'compose' or 'fit', received {init!r}.")
    if (images is not None) != (init == "fit"):
        raise ValueError(
            f"replace expects images with init='fit' and only there; received init={init!r} "
            f"{'without' if images is None else 'with'} images."
        )
    graph = _Graph(model)
    names = _names(layers, "replace")
    nodes = graph.nodes_of(names, "replace")
    if len(names) == 1:
        pairs = [graph.way_through([node]) for node in nodes]
    else:
        pairs = [graph.way_through(nodes)]
    added = _new_layers(graph, new, "replace")
    if init == "compose" and len(added) != 1:
        raise ValueError(
            f"replace with init='compose' needs one new layer, received {len(added)}: what one "
            f"chain composes to can't be shared out among several."
        )
    result = _splice(graph, pairs, added)
    if init == "compose":
        compose_(list(dict.fromkeys(node.operation for node in nodes)), added[0])
    elif init == "fit":
        fit_(model, result, [layer.name for layer in added], images)
    return result


def freeze_(model: keras.Model, until: str | None = None) -> keras.Model:
    """Freeze the layer `until` and all that it depends on; everything if None. Returns `model`.

    Works in place. `until` may be a layer inside a nested model.
    """
    layers, nested = _reach(model, until, forward=False)
    for layer in layers:
        layer.trainable = False
    if nested is not None:
        freeze_(nested, until)
    return model


def unfreeze_(model: keras.Model, since: str | None = None) -> keras.Model:
    """Unfreeze the layer `since` and all that depends on it; everything if None. Returns `model`.

    Works in place. `since` may be a layer inside a nested model.
    """
    layers, nested = _reach(model, since, forward=True)
    if not model.trainable:  # frozen as a whole: from now on its layers say what is
        model.trainable = True
        for layer in model.layers:
            layer.trainable = False
    for layer in layers:
        layer.trainable = True
    if nested is not None:
        unfreeze_(nested, since)
    return model


def _reach(
    model: keras.Model, name: str | None, *, forward: bool
) -> tuple[list[Layer], keras.Model | None]:
    """The layers before (or after) a name, itself included, and the nested model that has it.

    Where a nested model has it, the layers are those before (or after) that model.
    """
    graph = _Graph(model)
    nested = None if name is None else graph.nested_with(name)
    if name is None:
        reached = set(graph.nodes)
    else:
        reached = set(graph.nodes_named(name if nested is None else nested.name))
        if forward:
            for node in graph.nodes:
                if any(_node(t) in reached for t in node.input_tensors):
                    reached.add(node)
        else:
            reached = set(_needed([t for node in reached for t in node.outputs], {}, set()))
    operations = {id(node.operation): node.operation for node in graph.nodes if node in reached}
    layers = [op for op in operations.values() if isinstance(op, Layer)]
    return [layer for layer in layers if layer is not nested], nested


# The graph of a model ----------------------------------------------------------------------------


class _Graph:
    """The nodes of a model in the order they run, and what can be asked of them by name."""

    def __init__(self, model: keras.Model):
        self.model = model
        self.functional = _functional(model)
        self.outputs: list[Tensor] = self.functional.outputs
        self.nodes = _needed([*self.outputs, *self.functional.inputs], {}, set())
        self.readers: dict[int, list[Node]] = {}
        for node in self.nodes:
            for tensor in _distinct(node.input_tensors):
                self.readers.setdefault(id(tensor), []).append(node)

    def nodes_named(self, name: str) -> list[Node]:
        """The nodes of one layer: one for each call."""
        nodes = [node for node in self.nodes if node.operation.name == name]
        if not nodes:
            known = list(dict.fromkeys(node.operation.name for node in self.nodes))
            message = _unknown(name, known, self.model.name)
            if (nested := self.nested_with(name)) is not None:
                message += f" It is a layer of {nested.name!r}, which is nested in it."
            raise ValueError(message)
        return nodes

    def nested_with(self, name: str) -> keras.Model | None:
        """The nested model that has the layer `name`, at any depth, if this graph hasn't."""
        operations = {node.operation.name: node.operation for node in self.nodes}
        if name in operations:
            return None
        for operation in operations.values():
            if isinstance(operation, keras.Model) and name in {
                layer.name for layer in operation._flatten_layers(include_self=False)
            }:
                return operation
        return None

    def nodes_of(self, names: Sequence[str], verb: str) -> list[Node]:
        """The nodes of several layers, in the order they run; none of them an input."""
        wanted = {node for name in names for node in self.nodes_named(name)}
        for node in wanted:
            if node.is_input:
                raise ValueError(
                    f"{verb} can't take {node.operation.name!r}: it is an input of "
                    f"{self.model.name!r}. Name a layer behind it."
                )
        return [node for node in self.nodes if node in wanted]

    def outputs_of(self, name: str, verb: str) -> list[Tensor]:
        """The output of each call of a layer, one tensor for each call."""
        nodes = self.nodes_named(name)
        for node in nodes:
            if len(node.outputs) != 1:
                raise ValueError(
                    f"{verb} needs a layer with one output; {name!r} has {len(node.outputs)}."
                )
        return [node.outputs[0] for node in nodes]

    def only_output(self, name: str, verb: str) -> Tensor:
        """The one output of a layer that is called once."""
        tensors = self.outputs_of(name, verb)
        if len(tensors) != 1:
            raise ValueError(
                f"{verb} needs a layer with one output; {name!r} is shared, called "
                f"{len(tensors)} times, and so has {len(tensors)}. Name a layer before or after it."
            )
        return tensors[0]

    def inputs_of(self, outputs: Sequence[Tensor]) -> Any:
        """The model's inputs, less those that `outputs` don't depend on."""
        needed = set(_needed(outputs, {}, set()))
        struct = self.functional.input
        if all(_node(t) in needed for t in self.functional.inputs):
            return struct
        if isinstance(struct, dict):
            return {name: t for name, t in struct.items() if _node(t) in needed}
        kept = [t for t in self.functional.inputs if _node(t) in needed]
        return kept[0] if len(kept) == 1 else kept

    def check_cut(self, start: Tensor, names: Sequence[str], outputs: Sequence[Tensor]) -> None:
        """Raise unless every path from the inputs to `outputs` goes through `start`."""
        behind = {_node(start)}
        for node in self.nodes:
            if any(_node(t) in behind for t in node.input_tensors):
                behind.add(node)
        for name, tensor in zip(names, outputs, strict=True):
            if tensor is start or _node(tensor) not in behind:
                raise ValueError(
                    f"truncate can't start at {_owner(start)!r} and end at {name!r}: {name!r} "
                    f"doesn't come after it."
                )
        around = [
            f"{_owner(t)!r} -> {node.operation.name!r}"
            for node in _needed(outputs, {}, {id(start)})
            for t in _distinct(node.input_tensors)
            if node in behind and _node(t) not in behind
        ]
        if around:
            raise ValueError(
                f"A model that starts at {_owner(start)!r} would be open: "
                f"{', '.join(around)} goes around it. Start where all paths meet."
            )

    def way_through(self, nodes: Sequence[Node]) -> tuple[Tensor, Tensor]:
        """(way out, way in) of a set of nodes; raises if there is more than one of either."""
        inside = set(nodes)
        ways_in = [
            (t, node)
            for node in nodes
            for t in _distinct(node.input_tensors)
            if _node(t) not in inside
        ]
        ways_out: list[tuple[Tensor, str]] = []
        for tensor in (t for node in nodes for t in node.outputs):
            for reader in self.readers.get(id(tensor), []):
                if reader not in inside:
                    ways_out.append((tensor, repr(reader.operation.name)))
            if any(tensor is t for t in self.outputs):
                ways_out.append((tensor, "the model's output"))
        sources = _distinct(t for t, _ in ways_in)
        results = _distinct(t for t, _ in ways_out)
        layers = ", ".join(dict.fromkeys(repr(node.operation.name) for node in nodes))
        if len(sources) != 1:
            edges = ", ".join(f"{_owner(t)!r} -> {n.operation.name!r}" for t, n in ways_in)
            raise ValueError(
                f"replace needs layers with one way in; {layers} have {len(sources)}: {edges}. "
                f"Name every layer between the way in and the way out."
            )
        if len(results) != 1:
            edges = ", ".join(f"{_owner(t)!r} -> {reader}" for t, reader in ways_out)
            raise ValueError(
                f"replace needs layers with one way out; {layers} have {len(results)}: {edges}. "
                f"Name every layer between the way in and the way out."
            )
        return results[0], sources[0]


def _functional(model: keras.Model) -> Functional:
    """The graph inside a model; a ValueError where there is none."""
    if isinstance(model, Functional):
        return model
    if isinstance(model, keras.Sequential):
        if model._functional is None:
            raise ValueError(
                f"The Sequential model {model.name!r} has no graph yet: it doesn't know its input "
                f"shape. Begin it with keras.Input(...) or call model.build(input_shape) first."
            )
        return model._functional
    if isinstance(model, keras.Model):
        raise ValueError(
            f"{model.name!r} is a subclassed model ({type(model).__name__}): how its layers are "
            f"wired is known only to its call(). Surgery works on Functional and Sequential models."
        )
    raise ValueError(f"Expected a Keras model, received {type(model).__name__}.")


def _needed(outputs: Iterable[Tensor], splices: dict[int, _Splice], cut: set[int]) -> list[Node]:
    """The nodes that `outputs` depend on, each after those it reads.

    `splices` say which tensors are read in place of others; nothing is needed for a tensor whose
    id is in `cut`.
    """

    def origins(tensors: Iterable[Tensor]) -> list[Node]:
        nodes = []
        for t in tensors:
            while id(t) in splices and splices[id(t)].source is not t:
                t = splices[id(t)].source
            if id(t) not in cut:
                nodes.append(_node(t))
        return nodes

    order: list[Node] = []
    done: set[Node] = set()
    todo = origins(outputs)[::-1]
    while todo:  # not recursive: graphs are deeper than Python's stack
        node = todo[-1]
        waiting = [] if node in done else [n for n in origins(node.input_tensors) if n not in done]
        if waiting:
            todo.extend(reversed(waiting))
            continue
        todo.pop()
        if node not in done:
            done.add(node)
            order.append(node)
    return order


def _node(tensor: Tensor) -> Node:
    operation, index, _ = tensor._keras_history
    return operation._inbound_nodes[index]


def _owner(tensor: Tensor) -> str:
    return tensor._keras_history.operation.name


def _distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(t): t for t in tensors}.values())  # Keras tensors overload ==


def _names(layers: str | Iterable[str], verb: str) -> list[str]:
    names = [layers] if isinstance(layers, str) else list(layers)
    if not names:
        raise ValueError(f"{verb} received no layer names.")
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{verb} expects layer names, received {name!r}.")
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})
        raise ValueError(f"{verb} received a layer name twice: {', '.join(map(repr, twice))}.")
    return names


def _unknown(name: str, known: Sequence[str], model: str) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    listed = known if len(known) <= 40 else [*known[:20], "...", *known[-20:]]
    return f"{model!r} has no layer {name!r}.{hint} Its layers: {', '.join(listed)}."


# New layers --------------------------------------------------------------------------------------


def _new_layers(graph: _Graph, new: New, verb: str) -> list[Layer]:
    """The new layers as a list, each checked to be fresh."""
    layers = list(new) if isinstance(new, (list, tuple)) else [new]
    if not layers:
        raise ValueError(f"{verb} received no layers.")
    made = []
    for layer in layers:
        if isinstance(layer, torch.nn.Module) and not isinstance(layer, Layer):
            layer = TorchModuleWrapper(layer)
        if not isinstance(layer, Layer) or isinstance(layer, keras.layers.InputLayer):
            raise ValueError(
                f"{verb} expects Keras layers, a Keras model or a torch.nn.Module, received "
                f"{layer!r}."
            )
        if layer._inbound_nodes or layer is graph.model:
            raise ValueError(
                f"The layer {layer.name!r} has been called before and belongs to another model; "
                f"the result would share it. Pass a new layer, for example "
                f"type(layer).from_config(layer.get_config())."
            )
        made.append(layer)
    return made


def _settle_names_(layers: Sequence[Layer], taken: set[str]) -> None:
    """Rename new layers whose automatic name is taken; refuse a chosen one that is."""
    taken = set(taken)
    for layer in {id(layer): layer for layer in layers}.values():
        if layer.name in taken:
            base = to_snake_case(type(layer).__name__)
            if not re.fullmatch(rf"{re.escape(base)}(_\d+)?", layer.name):
                raise ValueError(
                    f"The name {layer.name!r} of a new layer is taken. Give it another name."
                )
            layer.name = next(
                name for n in range(1, len(taken) + 2) if (name := f"{base}_{n}") not in taken
            )
        taken.add(layer.name)


# The rebuild -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Splice:
    """Whoever read one tensor reads `layers` applied to `source` instead."""

    source: Tensor
    layers: Sequence[Layer]


def _splice(
    graph: _Graph, pairs: Sequence[tuple[Tensor, Tensor]], new: Sequence[Layer]
) -> Functional:
    """Rebuild with (read before, read now) pairs, `new` being applied to what is read now.

    The new layers are built only once the whole graph has been seen to fit, with copies of them
    in their place.
    """

    def splices(layers: Sequence[Layer]) -> dict[int, _Splice]:
        return {id(before): _Splice(now, layers) for before, now in pairs}

    inputs, outputs = graph.functional.input, graph.functional.output
    kept = _needed([*graph.outputs, *graph.functional.inputs], splices(new), set())
    _settle_names_(new, {node.operation.name for node in kept})
    if new:
        copies = {id(layer): _copy(layer, weights=False) for layer in new}
        trial = splices([copies[id(layer)] for layer in new])
        _rebuild(graph, inputs, outputs, trial, weights=False)
    return _rebuild(graph, inputs, outputs, splices(new))


def _rebuild(
    graph: _Graph,
    inputs: Any,
    outputs: Any,
    splices: dict[int, _Splice] | None = None,
    *,
    weights: bool = True,
) -> Functional:
    """A new model from `inputs` to `outputs`, both structures of the old graph's tensors.

    `splices` maps the id of an old tensor to what is read in its place. Without `weights` the
    result has no values: it only shows that everything fits.
    """
    splices = splices or {}
    device = next((v._value.device for v in graph.model.variables), None)
    made = {id(t): _copy_input(t) for t in keras.tree.flatten(inputs)}  # old tensor -> new one
    read: dict[int, Tensor] = {}  # the same where a splice stands between
    copies: dict[int, Any] = {}  # old operation -> new one

    def reading(tensor: Tensor) -> Tensor:
        if id(tensor) not in splices:
            return made[id(tensor)]
        if id(tensor) not in read:
            splice = splices[id(tensor)]
            x = made[id(tensor)] if splice.source is tensor else reading(splice.source)
            for layer in splice.layers:
                with _on(device if weights else "meta"):
                    x = _call_new(layer, x)
            read[id(tensor)] = x
        return read[id(tensor)]

    for node in _needed(keras.tree.flatten(outputs), splices, set(made)):
        old = node.operation
        first_call = id(old) not in copies
        if first_call:
            copies[id(old)] = _copy(old, weights)
        new = copies[id(old)]
        args, kwargs = node.arguments.fill_in({id(t): reading(t) for t in node.input_tensors})
        with _on(_where(old)):
            results = _call_kept(new, args, kwargs, node)
        if first_call and isinstance(old, Layer) and not _has_graph(old):
            _check_state(old, new, node, args, kwargs)
            if weights:
                _carry_(old, new)
        made.update({id(t): result for t, result in zip(node.outputs, results, strict=True)})

    model = graph.model
    result = (type(model) if _is_plain(model) else Functional)(
        inputs=keras.tree.map_structure(lambda t: made[id(t)], inputs),
        outputs=keras.tree.map_structure(reading, outputs),
        name=model.name,
        trainable=model.trainable,
    )
    result.dtype_policy = model.dtype_policy
    return result


def _call_new(layer: Layer, x: Tensor) -> Tensor:
    try:
        if isinstance(layer, TorchModuleWrapper) and layer.output_shape is None:
            layer.output_shape = _torch_output_shape(layer.module, x)
        y = layer(x)
    except Exception as error:
        raise ValueError(
            f"The new layer {layer.name!r} ({type(layer).__name__}) can't take its input of shape "
            f"{x.shape}: {error}"
        ) from error
    if not isinstance(y, Tensor):
        raise ValueError(
            f"The new layer {layer.name!r} ({type(layer).__name__}) must put out one tensor; it "
            f"puts out {len(keras.tree.flatten(y))}."
        )
    return y


def _call_kept(new: Any, args: Any, kwargs: Any, node: Node) -> list[Tensor]:
    try:
        if isinstance(new, TorchModuleWrapper) and args[0].shape != node.input_tensors[0].shape:
            new.output_shape = _torch_output_shape(new.module, *args)
        return keras.tree.flatten(new(*args, **kwargs))
    except Exception as error:
        raise _misfit(node, args, kwargs, str(error)) from error


def _torch_output_shape(module: torch.nn.Module, x: Tensor) -> tuple[int | None, ...]:
    """The shape that a torch module puts out for `x`, which Keras doesn't find out."""
    state = [*module.named_parameters(), *module.named_buffers()]
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in state}

    def run(size: int) -> torch.Size:
        shape = [size if n is None else n for n in x.shape]
        argument = torch.empty(shape, dtype=to_torch_dtype(x.dtype), device="meta")
        return torch.func.functional_call(module, meta, argument).shape

    # Where two sizes for what is unknown give two results, the result is unknown.
    return tuple(a if a == b else None for a, b in zip(run(83), run(89), strict=True))


def _misfit(node: Node, args: Any, kwargs: Any, reason: str) -> ValueError:
    """The error for a kept layer that can't take what it would now get."""
    before = [t.shape for t in node.input_tensors]
    now = [t.shape for t in keras.tree.flatten((args, kwargs)) if isinstance(t, Tensor)]
    what = f"{node.operation.name!r} ({type(node.operation).__name__})"
    if now == before:
        return ValueError(f"The layer {what} can't be called again as it was: {reason}")
    sources = ", ".join(repr(_owner(t)) for t in node.input_tensors)
    return ValueError(
        f"The layer {what} expects {_shapes(before)} (from {sources}) and would now get "
        f"{_shapes(now)}. Surgery keeps the layers that follow as they are: put something in "
        f"place that gives {_shapes(before)}."
    )


def _shapes(shapes: Sequence[tuple[int | None, ...]]) -> str:
    return str(shapes[0]) if len(shapes) == 1 else f"[{', '.join(map(str, shapes))}]"


# Copies of layers --------------------------------------------------------------------------------


def _copy_input(tensor: Tensor) -> Tensor:
    """A new input that stands for `tensor`, which may come from the middle of the graph."""
    old = tensor._keras_history.operation
    if not isinstance(old, keras.layers.InputLayer):
        return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=f"{old.name}_output")
    new = type(old).from_config(old.get_config())
    new.trainable, new.dtype_policy = old.trainable, old.dtype_policy
    return new.output


def _copy(old: Any, weights: bool) -> Any:
    """A layer like `old` that hasn't been called; models come with their weights, if wanted."""
    if not isinstance(old, Layer):  # a stateless operation, such as keras.ops.add
        new = object.__new__(type(old))
        vars(new).update(vars(old), _inbound_nodes=[], _outbound_nodes=[])
        return new
    if isinstance(old, Functional) and _has_graph(old):
        return _rebuild(_Graph(old), old.input, old.output, weights=weights)
    if _has_graph(old):
        return _copy_sequential(old, weights)
    try:
        with SafeModeScope(False):  # the user's own objects: nothing is unpickled
            return _from_config(old)
    except Exception as error:
        raise ValueError(
            f"The layer {old.name!r} ({type(old).__name__}) can't be made again from its config, "
            f"which saving needs too: {error}"
        ) from error


def _from_config(old: Layer) -> Layer:
    base = {"name": old.name, "trainable": old.trainable, "dtype": old.dtype_policy}
    # Two layers hold what a config can't carry: code and torch modules.
    if isinstance(old, TorchModuleWrapper):
        return type(old)(copy.deepcopy(old.module), output_shape=old.output_shape, **base)
    if isinstance(old, keras.layers.Lambda):
        return type(old)(
            old.function,
            output_shape=old._output_shape,
            mask=old.mask,
            arguments=old.arguments,
            **base,
        )
    config = old.get_config()
    for key, value in config.items():  # nor can it write down a function that Keras doesn't know
        live = getattr(old, key, None)
        if isinstance(live, FunctionType | BuiltinFunctionType) and not isinstance(value, str):
            config[key] = live
    # A regulariser's factor may be a tensor, which nothing would bring back from the meta device.
    device = _where(old)
    with _on(None if device == "meta" else device):
        new = type(old).from_config(config)
    if old.built and type(old).build_from_config is not Layer.build_from_config:
        with _on(device):
            new.build_from_config(old.get_build_config())  # it makes its state in its own way
    return new


def _copy_sequential(old: keras.Sequential, weights: bool) -> keras.Sequential:
    copies = {id(layer): _copy(layer, weights) for layer in old._layers}
    with _on(_where(old)):
        new = type(old)(
            [copies[id(layer)] for layer in old._layers], name=old.name, trainable=old.trainable
        )
    for layer in old.layers:
        if weights and not _has_graph(layer):
            _carry_(layer, copies[id(layer)])
    if weights:
        new._track_variables()  # Keras listed the Parameters that were replaced
        new._functional._track_variables()
    return new


def _is_plain(model: keras.Model) -> bool:
    """Whether a model's class is made by Class(inputs, outputs), as keras.Model is."""
    return isinstance(model, Functional) and functional_like_constructor(type(model))


def _has_graph(layer: Layer) -> bool:
    """Whether a layer is a model that is copied by walking its graph, not by its config."""
    return _is_plain(layer) or (type(layer) is keras.Sequential and layer._functional is not None)


def _where(layer: Any) -> str | None:
    """The device to build a copy on: none at all for Keras's layers, whose state is known.

    Others may keep tensors anywhere, made when they are built, and are built for real.
    """
    if not isinstance(layer, Layer):
        return None
    if all(
        type(sub).__module__.startswith("keras.") for sub in layer._flatten_layers()
    ) and not any(isinstance(sub, TorchModuleWrapper) for sub in layer._flatten_layers()):
        return "meta"
    return next((v._value.device for v in layer.variables), None)


def _on(device: torch.device | str | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if device is None else keras.device(str(device))


def _check_state(old: Layer, new: Layer, node: Node, args: Any, kwargs: Any) -> None:
    """Raise unless `new`, just built, has the variables that `old` has."""
    before = [tuple(v.shape) for v in old.variables]
    now = [tuple(v.shape) for v in new.variables]
    if len(before) != len(now) or len(old._flatten_layers()) != len(new._flatten_layers()):
        raise ValueError(
            f"The layer {old.name!r} ({type(old).__name__}) has {len(before)} variables, but made "
            f"again from its config it has {len(now)}: its get_config() doesn't say all."
        )
    if before != now:
        raise _misfit(node, args, kwargs, f"its weights have shapes {before}, now {now}")


def _carry_(old: Layer, new: Layer) -> None:
    """Give `new` the values, trainable flags and other tensors of `old`, each copied once."""
    layers = list(zip(old._flatten_layers(), new._flatten_layers(), strict=True))
    for source, target in layers:
        target.trainable = source.trainable  # parents first: it reaches down
        for name, tensor in vars(source).items():
            if isinstance(tensor, torch.Tensor):  # Normalization's mean, for one
                setattr(target, name, tensor.detach().clone())
        for name, parameter in source.named_parameters(recurse=False):
            target.get_parameter(name).data = parameter.detach().clone()
    buffers = dict(new.named_buffers())
    for name, buffer in old.named_buffers():
        buffers[name].data = buffer.detach().clone()
    for source, target in zip(old.variables, new.variables, strict=True):
        target.trainable = source.trainable
        value = source._value.detach().clone()  # keeps the memory format
        if target._value.is_meta and not value.is_meta:
            target._value = torch.nn.Parameter(value, requires_grad=source._value.requires_grad)
        else:  # a torch module may hold this very Parameter
            target._value.data = value
            target._value.requires_grad = source._value.requires_grad
    for _, target in layers:
        if hasattr(target, "_torch_params"):
            target._track_variables()  # Keras listed the Parameters that were replaced
