"""A new model from an old one: the one walk that every surgery ends in.

It goes through the old graph once, copies each layer with its weights at its first call, and calls
the copies as the old layers were called. A nested model is a layer whose copy is made by the same
walk; its inputs follow what it is called with, so that its own layers say what they can take. What
is shared between models stays shared, because all walks have one set of copies.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

import keras
import torch
from keras import KerasTensor as Tensor
from keras.layers import Layer, TorchModuleWrapper

from vggtorch.keras_graph import (
    Functional,
    Node,
    all_layers,
    calls,
    filled,
    functional,
    is_plain_functional,
    layers_as_given,
    operation_copy,
    own_variables,
    producer,
    producing_call,
    raw_value,
    reads_training,
    track_variables_,
)
from vggtorch.models import remember_, remembered, written_on
from vggtorch.surgery.masks import automatic_masks, carried_masks, reads
from vggtorch.surgery.remaking import (
    carry_,
    check_state,
    on,
    remade,
    state,
    torch_output_shape,
    where,
)
from vggtorch.surgery.wiring import Wiring, call_inputs, holds, needed, owner
from vggtorch.telling import tell

Adapt = Callable[[Layer, Layer], dict[int, torch.Tensor] | None]
Instead = dict[int, tuple[Tensor, Sequence[Layer]]]


class MisfitError(ValueError):
    """A layer that is kept can't take what it would now get.

    Attributes:
        found: the layer and the shapes, as a sentence.
        layer: the layer or operation.
    """

    def __init__(self, found: str, advice: str, layer: Any):
        super().__init__(f"{found} {advice}")
        self.found, self.layer = found, layer


@dataclass
class Rebuild:
    """One new model in the making, with the models that are nested in it.

    Attributes:
        wiring: of the old model.
        instead: by the id of an old tensor, the one read in its place and the layers between.
        weights: whether the new layers get the values of the old ones.
        names: by the id of a layer or operation, the name that its copy gets.
        dissolves: whether nested models are dissolved into the graph around them.
        shapes: of the inputs that are to have others, by the ids of the old tensors, batch
            included.
        adapt: gives the values for weights whose shapes have changed, by the old weights' ids.
        copies: by the id of an old layer or operation, its copy, or a layer with values of its own
            that is called in its place.
        vanished: the ids of tensors that are not made; Concatenate layers do without.
        starts, ends: tensors of nested models at which the new model begins and ends.
    """

    wiring: InitVar[Wiring]
    instead: Instead = field(default_factory=dict)
    weights: bool = True
    names: Mapping[int, str] = field(default_factory=dict)
    dissolves: bool = False
    shapes: dict[int, tuple[int | None, ...]] = field(default_factory=dict)
    adapt: Adapt | None = None
    copies: dict[int, Any] = field(default_factory=dict)
    vanished: Collection[int] = ()
    starts: Sequence[Tensor] = ()
    ends: Sequence[Tensor] = ()

    def __post_init__(self, wiring: Wiring) -> None:
        self.device = next((raw_value(v).device for v in wiring.model.variables), None)
        self._settled = set(self.copies)  # ids of old layers whose copies have their values
        self._values: dict[int, keras.Variable] = {}  # id of an old variable -> the new one
        self._followers: set[int] = set()  # ids of nested models that get inputs of other shapes

    # Models

    def model(self, wiring: Wiring, inputs: Any, outputs: Any) -> Functional:
        """The new model from `inputs` to `outputs`, structures of tensors of `wiring`'s model."""
        made = {id(t): self._input(t) for t in keras.tree.flatten(inputs)}  # old tensor -> new one
        read = self._walk(wiring, keras.tree.flatten(outputs), made)
        model = wiring.model
        result = (type(model) if is_plain_functional(model) else Functional)(
            inputs=keras.tree.map_structure(lambda t: made[id(t)], inputs),
            outputs=keras.tree.map_structure(read, outputs),
            name=self.names.get(id(model), model.name),
            trainable=model.trainable,
        )
        result.dtype_policy = model.dtype_policy
        if (written := written_on(model)) is not None:
            remember_(result, written)
        self._tell_lost(wiring)
        kept = [id(t) for t in keras.tree.flatten(outputs) if id(t) not in self.instead]
        if kept != [id(t) for t in wiring.functional.outputs]:
            # Other outputs than those that the labels are the names of.
            remember_(result, replace(remembered(result), label_names=()))
        return result

    def _tell_lost(self, wiring: Wiring) -> None:
        """Warn of weights that a model of the user's class holds itself, which no layer reads."""
        own = own_variables(wiring.model)
        if own and self.weights:
            tell(
                f"{wiring.model.name!r} ({type(wiring.model).__name__}) holds weights itself, "
                f"{', '.join(variable.name for variable in own)}, which none of its layers reads: "
                f"the result is a graph of its layers, and does without."
            )

    def _walk(
        self,
        wiring: Wiring,
        outputs: Sequence[Tensor],
        made: dict[int, Tensor],
        training: bool | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """Make all that `outputs` need; returns what says which new tensor is read for an old one.

        `made` has the new tensors of the inputs, by the old ones' ids, and gets all others.
        """
        read: dict[int, Tensor] = {}  # old tensor -> what `instead` has read in its place

        def reading(tensor: Tensor) -> Tensor:
            if id(tensor) not in self.instead:
                return made[id(tensor)]
            if id(tensor) not in read:
                source, new_layers = self.instead[id(tensor)]
                x = made[id(tensor)] if source is tensor else reading(source)
                for layer in new_layers:
                    with on(self.device if self.weights else "meta"):
                        x = _call_new(layer, x)
                read[id(tensor)] = x
            return read[id(tensor)]

        def inputs_of(node: Node) -> list[Tensor]:
            entered = any(holds(node.operation, t) for t in self.starts)
            return [] if entered else [t for t in reads(node) if id(t) not in self.vanished]

        sources = {key: now for key, (now, _) in self.instead.items()}
        nodes = needed(outputs, sources, set(made), wiring.origin, inputs_of)
        used = {id(t) for node in nodes for t in inputs_of(node)} | {id(t) for t in outputs}
        for node in nodes:
            if self.dissolves and functional(node.operation) is not None:
                results = self._dissolved(wiring, node, reading, training)
            elif any(holds(node.operation, t) for t in (*self.starts, *self.ends)):
                results = self._cut(wiring, node, reading, made, used)
            else:
                results = self._called(wiring, node, reading, training)
            made.update(results)
        return reading

    def _called(
        self,
        wiring: Wiring,
        node: Node,
        reading: Callable[[Tensor], Tensor],
        training: bool | None,
    ) -> dict[int, Tensor]:
        """Call the copy of a layer as the layer was called; new tensors by the old ones' ids."""
        old = node.operation
        automatic = automatic_masks(node)
        left = [t for t in reads(node) if id(t) not in self.vanished]
        if len(left) == len(reads(node)):
            args, kwargs = filled(node, {id(t): reading(t) for t in left})
        else:  # a Concatenate, which takes one list
            args, kwargs = ([reading(t) for t in left],), {}
        kwargs = {key: value for key, value in kwargs.items() if key not in automatic}
        masks = {name: carried_masks(old, name, args, kwargs) for name in automatic}
        kwargs |= {
            name: m
            for name, m in masks.items()
            if any(t is not None for t in keras.tree.flatten(m))
        }
        if training is not None and reads_training(old):
            kwargs["training"] = training
        graph = functional(old)
        if graph is not None:
            self._follow(graph, node, reading)
        new = self.copy(old, wiring)
        try:
            if isinstance(new, TorchModuleWrapper) and args[0].shape != node.input_tensors[0].shape:
                new.output_shape = torch_output_shape(new.module, *args)
            with on(where(old)):
                results = keras.tree.flatten(new(*args, **kwargs))
        except Exception as error:
            raise _misfit(wiring, node, args, kwargs, str(error)) from error
        if isinstance(old, Layer) and not self._copied_by_graph(old):
            differing = self._settle_(old, new)
            if differing:
                raise _misfit(wiring, node, args, kwargs, differing)
        for name, mask in masks.items():
            before = node.arguments.kwargs[name]
            for a, b in zip(keras.tree.flatten(before), keras.tree.flatten(mask), strict=False):
                self._name_mask_(a, b)
        return {id(t): result for t, result in zip(node.outputs, results, strict=True)}

    def _cut(
        self,
        wiring: Wiring,
        node: Node,
        reading: Callable[[Tensor], Tensor],
        made: dict[int, Tensor],
        used: Collection[int],
    ) -> dict[int, Tensor]:
        """Call a nested model that is cut to what is needed of it."""
        nested = wiring.inside(node.operation.name)
        starts = [t for t in self.starts if holds(node.operation, t)]
        pairs = zip(nested.outputs, node.outputs, strict=True)
        outputs = {id(outer): inner for inner, outer in pairs if id(outer) in used}
        outputs |= {id(t): t for t in self.ends if holds(node.operation, t)}
        flat = list(outputs.values())
        inputs = starts[0] if starts else nested.functional.input
        cut = self.model(nested, inputs, flat if len(flat) > 1 else flat[0])
        if starts:
            results = cut(made[id(starts[0])])
        else:
            args, kwargs = filled(node, {id(t): reading(t) for t in reads(node)})
            results = cut(*args, **kwargs)
        return dict(zip(outputs, keras.tree.flatten(results), strict=True))

    def _dissolved(
        self,
        wiring: Wiring,
        node: Node,
        reading: Callable[[Tensor], Tensor],
        training: bool | None,
    ) -> dict[int, Tensor]:
        """The outputs of a nested model whose layers are called right here."""
        nested = wiring.inside(node.operation.name)
        self._tell_lost(nested)
        automatic = automatic_masks(node)
        kwargs = {k: v for k, v in node.arguments.kwargs.items() if k not in ("inputs", *automatic)}
        if training is None:
            training = kwargs.pop("training", None)
        if any(value is not None for key, value in kwargs.items() if key != "training"):
            raise ValueError(
                f"{wiring.verb} can't dissolve {wiring.prefix + node.operation.name!r}: it is "
                f"called with {', '.join(kwargs)}, which layers outside of a model can't be."
            )
        unaware = [
            x.name
            for x in nested.operations.values()
            if isinstance(x, Layer)
            and not reads_training(x)
            and any(map(reads_training, all_layers(x)))
        ]
        if training and unaware:
            raise ValueError(
                f"{wiring.verb} can't dissolve {wiring.prefix + node.operation.name!r}, which is "
                f"called with training=True: {', '.join(unaware)} can't be told."
            )
        made = {}
        for inner, outer in zip(
            nested.functional.inputs, call_inputs(nested.functional, node), strict=True
        ):
            x = reading(outer)
            if len(x.shape) != len(inner.shape):
                raise ValueError(
                    f"{wiring.verb} can't dissolve {wiring.prefix + node.operation.name!r}: its "
                    f"input has the shape {inner.shape} and it is called with {x.shape}."
                )
            made[id(inner)] = x if x.dtype == inner.dtype else keras.ops.cast(x, inner.dtype)
        read = self._walk(nested, nested.outputs, made, training)
        pairs = zip(nested.outputs, node.outputs, strict=True)
        return {id(outer): read(inner) for inner, outer in pairs}

    # Layers

    def copy(self, old: Any, wiring: Wiring) -> Any:
        """The one copy of a layer or operation of `wiring`'s model."""
        if id(old) not in self.copies:
            self.copies[id(old)] = self._copy(old, wiring)
        return self.copies[id(old)]

    def _copy(self, old: Any, wiring: Wiring) -> Any:
        name = self.names.get(id(old), old.name)
        if not isinstance(old, Layer):  # a stateless operation, such as keras.ops.add
            copied = operation_copy(old)
            copied.name = name
            return copied
        if not self._copied_by_graph(old):
            return remade(old, name)
        inner = Wiring(old, wiring.verb, f"{wiring.prefix}{old.name}/")
        plain = type(old) is keras.Sequential and id(old) not in self._followers
        if plain and not self._changed(functional(old)):
            return self._sequential(old, inner, name)
        return self.model(inner, inner.functional.input, inner.functional.output)

    def _sequential(self, old: keras.Sequential, inner: Wiring, name: str) -> keras.Sequential:
        """A Sequential model whose own row of layers stays as it is."""
        layers = [self.copy(layer, inner) for layer in layers_as_given(old)]
        with on(where(old)):
            new = type(old)(layers, name=name, trainable=old.trainable)
        for layer in old.layers:
            if not self._copied_by_graph(layer):
                differing = self._settle_(layer, self.copies[id(layer)])
                assert differing is None, differing
        if self.weights:
            track_variables_(new)
            track_variables_(functional(new))
        return new

    def _copied_by_graph(self, layer: Any) -> bool:
        """Whether a layer is a model that is copied by walking its graph, not by its config."""
        graph = functional(layer)
        if graph is None:
            return False
        if is_plain_functional(layer) or type(layer) is keras.Sequential:
            return True
        return id(layer) in self._followers or self._changed(graph, deep=True)

    def _changed(self, graph: Functional, deep: bool = False) -> bool:
        """Whether something is to be other in a graph itself, or deep inside of it."""
        tensors = {*self.instead, *(id(t) for t in (*self.starts, *self.ends))}
        return any(
            any(id(t) in tensors for t in node.outputs)
            or (deep and id(node.operation) in self.names)
            or (
                deep
                and (inner := functional(node.operation)) is not None
                and self._changed(inner, deep)
            )
            for node in calls(graph)
        )

    def _settle_(self, old: Layer, new: Layer) -> str | None:
        """Give a copy that has just been built its values, once; says which shapes differ, if any.

        A variable that two layers hold, other than by being one layer, would become two: refused.
        """
        if id(old) in self._settled:
            return None
        self._settled.add(id(old))
        differing = check_state(old, new)
        values = self.adapt(old, new) if differing and self.adapt else None
        if differing and values is None:
            return differing
        for before, after in zip(state(old), state(new), strict=True):
            if self._values.setdefault(id(before), after) is not after:
                raise ValueError(
                    f"The weights {before.path!r} are held by two layers, one of them "
                    f"{old.name!r} ({type(old).__name__}), and would be two weights in the result. "
                    f"Surgery keeps what is shared only where it is one layer in the graph."
                )
        if self.weights:
            carry_(old, new, values)
        return None

    def _input(self, tensor: Tensor) -> Tensor:
        """A new input that stands for `tensor`, which may come from the middle of the graph."""
        old = producer(tensor)
        old = self.copies.get(id(old), old) if id(old) in self._settled else old
        if not isinstance(old, keras.layers.InputLayer):
            name = f"{old.name}_output"
            return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=name)
        config = {**old.get_config(), "name": self.names.get(id(old), old.name)}
        if id(tensor) in self.shapes:
            config["batch_shape"] = self.shapes[id(tensor)]
        made = type(old).from_config(config)
        made.trainable, made.dtype_policy = old.trainable, old.dtype_policy
        self.copies[id(old)] = made
        return made.output

    def _follow(self, graph: Functional, node: Node, reading: Callable[[Tensor], Tensor]) -> None:
        """Let the inputs of a nested model have the shapes of what it is now called with."""
        for inner, outer in zip(graph.inputs, call_inputs(graph, node), strict=True):
            settled = id(producer(inner)) in self._settled  # it has its shape
            if not settled and reading(outer).shape != outer.shape:
                self.shapes[id(inner)] = reading(outer).shape
                self._followers.add(id(node.operation))

    def _name_mask_(self, old: Any, new: Any) -> None:
        """Give the operations that compute a mask the names of those that computed it before."""
        if not (isinstance(old, Tensor) and isinstance(new, Tensor)):
            return
        before, now = producing_call(old), producing_call(new)
        kept = {id(copied) for copied in self.copies.values()}
        if type(before.operation) is not type(now.operation) or id(now.operation) in kept:
            return
        now.operation.name = before.operation.name
        self.copies.setdefault(id(before.operation), now.operation)
        for a, b in zip(before.input_tensors, now.input_tensors, strict=False):
            self._name_mask_(a, b)


def _call_new(layer: Layer, x: Tensor) -> Tensor:
    try:
        if isinstance(layer, TorchModuleWrapper) and layer.output_shape is None:
            layer.output_shape = torch_output_shape(layer.module, x)
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


def _misfit(wiring: Wiring, node: Node, args: Any, kwargs: Any, reason: str) -> ValueError:
    """The error for a kept layer that can't take what it would now get."""
    before = [t.shape for t in reads(node)]
    now = [t.shape for t in keras.tree.flatten((args, kwargs)) if isinstance(t, Tensor)]
    what = f"{wiring.prefix + node.operation.name!r} ({type(node.operation).__name__})"
    if now == before:
        return ValueError(f"The layer {what} can't be called again as it was: {reason}")
    sources = ", ".join(repr(owner(t)) for t in reads(node))
    return MisfitError(
        f"The layer {what} expects {_shapes(before)} (from {sources}) and would now get "
        f"{_shapes(now)}.",
        f"Surgery keeps the layers that follow as they are: put something in place that gives "
        f"{_shapes(before)}.",
        node.operation,
    )


def _shapes(shapes: Sequence[tuple[int | None, ...]]) -> str:
    return str(shapes[0]) if len(shapes) == 1 else f"[{', '.join(map(str, shapes))}]"
