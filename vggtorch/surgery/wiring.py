"""The graph of a model: its calls in the order they run, and what can be asked of them by name.

`Wiring` is what every surgery begins with. It also holds the errors that speak of the graph: a name
that no layer has, a path that goes around a cut, a set of layers with two ways in.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import keras
from keras import KerasTensor as Tensor
from keras.layers import Layer

from vggtorch.architectures import ARCHITECTURES
from vggtorch.keras_graph import (
    Functional,
    Node,
    calls,
    functional,
    graph_of,
    input_structure,
    producer,
    producing_call,
)
from vggtorch.surgery.masks import reads

# Who reads a tensor (None: the model's output does), the tensor, and how messages name the reader.
Reading = tuple[Node | None, Tensor, str]


class Wiring:
    """The calls of a model's layers, and what can be asked of them by name.

    Attributes:
        model: the model itself.
        functional: its graph, which a Sequential model has inside.
        nodes: every call of a layer or operation, each after those whose results it takes.
        reads: every tensor that a call reads, behind the call.
        prefix: of the full names of its layers, such as "vgg16/" for a model that is nested in the
            one that the user passed; messages speak of layers by their full names.
    """

    def __init__(self, model: keras.Model, verb: str, prefix: str = ""):
        self.model, self.verb, self.prefix = model, verb, prefix
        self.functional = graph_of(model, verb)
        self.outputs: list[Tensor] = self.functional.outputs
        self.nodes = calls(self.functional)
        self._own = set(self.nodes)
        self.reads = [(node, tensor) for node in self.nodes for tensor in distinct(reads(node))]

    @property
    def operations(self) -> dict[str, keras.Operation]:
        """The layers and operations by name, in the order they run."""
        return {node.operation.name: node.operation for node in self.nodes}

    def inside(self, name: str) -> Wiring:
        """The wiring of a nested model."""
        return Wiring(self.operations[name], self.verb, f"{self.prefix}{name}/")

    def nested(self) -> dict[str, Wiring]:
        """The wirings of the models that are nested in this one, by name."""
        names = (name for name, x in self.operations.items() if functional(x) is not None)
        return {name: self.inside(name) for name in names}

    def all_graphs(self) -> Iterator[Wiring]:
        """All graphs, that of the model itself first, then those of nested models at any depth."""
        yield self
        for nested in self.nested().values():
            yield from nested.all_graphs()

    def layers_by_path(self) -> dict[str, keras.Operation]:
        """All layers, those of nested models among them as "vgg16/block1_conv1"."""
        found: dict[str, keras.Operation] = {}
        nested = self.nested()
        for name, operation in self.operations.items():
            found[name] = operation
            if name in nested:
                inner = nested[name].layers_by_path()
                found.update({f"{name}/{path}": x for path, x in inner.items()})
        return found

    def route(self, name: str) -> list[str]:
        """The names of the nested models that lead to a layer, from the outside, and its own."""
        if not isinstance(name, str):
            raise ValueError(f"{self.verb} expects the name of one layer, received {name!r}.")
        if name in self.operations:
            return [name]
        layers = self.layers_by_path()
        found = [name] if name in layers else [p for p in layers if p.endswith(f"/{name}")]
        if len({id(layers[path]) for path in found}) > 1:
            raise ValueError(
                f"{self.verb} received {name!r}, which stands in {len(found)} nested models of "
                f"{self.model.name!r}. Pass its full name: {' or '.join(map(repr, found))}."
            )
        if not found:
            raise self._no_such_layer(name, list(layers))
        return found[0].split("/")

    def find(self, name: str) -> tuple[Wiring, str]:
        """The graph that a layer stands in, this one or that of a nested model, and its own name.

        `name` is a full name such as "vgg16/block5_conv3", or the layer's own where it is clear.
        """
        wiring, (*nested, own) = self, self.route(name)
        for step in nested:
            wiring = wiring.inside(step)
        return wiring, own

    def origin(self, tensor: Tensor) -> Node:
        """The call in this graph that makes a tensor, or that calls the nested model it is in."""
        call = producing_call(tensor)
        if call in self._own:
            return call
        return next(node for node in self.nodes if holds(node.operation, tensor))

    def output_of(self, name: str) -> Tensor:
        """The one output of a layer at any depth, which is computed once."""
        wiring, route = self, self.route(name)
        for depth, step in enumerate(route, 1):
            if (times := len(wiring.nodes_named(step))) != 1:
                nested = depth < len(route)
                why = f"because {wiring.prefix + step!r} is " if nested else ""
                beside = f", or one of {self.model.name!r} itself" if nested else ""
                raise ValueError(
                    f"{self.verb} needs a layer with one output; {name!r} is shared, {why}called "
                    f"{times} times, and so has {times}. Name a layer before or after it{beside}."
                )
            if depth < len(route):
                wiring = wiring.inside(step)
        return wiring.outputs_of(step)[0]

    def _no_such_layer(self, name: str, paths: Sequence[str]) -> ValueError:
        near = difflib.get_close_matches(name, paths, n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        head, _, rest = name.partition("/")
        operation = self.operations.get(head)
        if rest and operation is not None and functional(operation) is None:
            hint += f" {head!r} ({type(operation).__name__}) is no graph of layers with names."
        hint += _in_torchvision(self.model.name, name, self.operations)
        return ValueError(f"{self.model.name!r} has no layer {name!r}.{hint} {self.listed()}")

    def listed(self) -> str:
        """The names of the layers, as the end of a message."""
        names = list(self.operations)
        shown = names if len(names) <= 40 else [*names[:20], "...", *names[-20:]]
        return f"Its layers: {', '.join(shown)}."

    def nodes_named(self, name: str) -> list[Node]:
        """The nodes of one layer of this very graph: one for each call."""
        return [node for node in self.nodes if node.operation.name == name]

    def nodes_of(self, names: Sequence[str]) -> list[Node]:
        """The nodes of several layers, in the order they run; none of them an input."""
        wanted = {node for name in names for node in self.nodes_named(name)}
        nodes = [node for node in self.nodes if node in wanted]
        for node in nodes:
            if node.is_input:
                raise ValueError(
                    f"{self.verb} can't take {node.operation.name!r}: it is an input of "
                    f"{self.model.name!r}. Name a layer behind it."
                )
        return nodes

    def outputs_of(self, name: str) -> list[Tensor]:
        """The output of each call of a layer, one tensor for each call."""
        nodes = self.nodes_named(name)
        for node in nodes:
            if len(node.outputs) != 1:
                raise ValueError(
                    f"{self.verb} needs a layer with one output; {self.prefix + name!r} has "
                    f"{len(node.outputs)}."
                )
        return [node.outputs[0] for node in nodes]

    def readers_of(self, nodes: Iterable[Node]) -> set[Node]:
        """These nodes and all that depend on them."""
        reached = set(nodes)
        for node in self.nodes:
            if any(producing_call(t) in reached for t in node.input_tensors):
                reached.add(node)
        return reached

    def inputs_of(self, outputs: Sequence[Tensor]) -> Any:
        """The model's inputs, less those that `outputs` don't depend on."""
        used = set(needed(outputs, origin=self.origin))
        struct = self.functional.input
        if all(producing_call(t) in used for t in self.functional.inputs):
            return struct
        if isinstance(struct, dict):
            return _pruned(struct, lambda t: producing_call(t) in used)
        kept = [t for t in self.functional.inputs if producing_call(t) in used]
        return kept[0] if len(kept) == 1 else kept

    def check_cut(self, start: Tensor, ends: Mapping[str, Tensor]) -> None:
        """Raise unless every path from the inputs to `ends`, by their names, goes through `start`.

        All of these may be tensors of nested models.
        """
        first = self.origin(start)
        inside = first is not producing_call(start)  # in a model that is nested in this one
        behind = self.readers_of([first])
        for name, tensor in ends.items():
            node = self.origin(tensor)
            if tensor is start or node not in behind or (node is first and not inside):
                raise ValueError(
                    f"{self.verb} can't start at {owner(start)!r} and end at {name!r}: {name!r} "
                    f"doesn't come after it."
                )
        cut = {id(t) for t in first.outputs} if inside else {id(start)}
        within = {name: t for name, t in ends.items() if inside and self.origin(t) is first}
        path = needed((t for n, t in ends.items() if n not in within), cut=cut, origin=self.origin)
        around = [
            f"{owner(t)!r} -> {self.prefix + node.operation.name!r}"
            for node in path
            for t in distinct(node.input_tensors)
            if node in behind and producing_call(t) not in behind
        ]
        if around:
            raise ValueError(
                f"A model that starts at {owner(start)!r} would be open: "
                f"{', '.join(around)} goes around it. Start where all paths meet."
            )
        if inside:  # what goes around `start` may also do so inside of the nested model
            read = {id(t) for node in path for t in node.input_tensors} | {*map(id, ends.values())}
            nested = self.inside(first.operation.name)
            pairs = zip(nested.outputs, first.outputs, strict=True)
            made = {id(outer): inner for inner, outer in pairs if id(outer) in read}
            within = {name: made.get(id(t), t) for name, t in within.items()}
            nested.check_cut(start, {owner(t): t for t in made.values()} | within)

    def way_through(self, nodes: Sequence[Node]) -> tuple[Tensor, Tensor]:
        """(way out, way in) of a set of nodes; raises if there is more than one of either."""
        readings: list[Reading] = [(node, t, repr(node.operation.name)) for node, t in self.reads]
        readings += [(None, t, "the model's output") for t in distinct(self.outputs)]

        def refusal(direction: str, layers: str, ways: str) -> str:
            return f"{self.verb} needs layers with one way {direction}; {layers} have {ways}."

        return ways_through(readings, set(nodes), refusal)


def ways_through(
    readings: Sequence[Reading], nodes: Set[Node], refusal: Callable[[str, str, str], str]
) -> tuple[Tensor, Tensor]:
    """The one way out of a set of nodes and the one way in, among all that is read in their graph.

    Where there isn't one, `refusal` words the error: of "in" or "out", the layers, and their ways.
    """
    made = {id(t) for node in nodes for t in node.outputs}
    ways = {
        "in": [(t, what) for n, t, what in readings if n in nodes and id(t) not in made],
        "out": [(t, what) for n, t, what in readings if n not in nodes and id(t) in made],
    }
    for direction, edges in ways.items():
        if (number := len(distinct(t for t, _ in edges))) != 1:
            layers = ", ".join(dict.fromkeys(what for n, _, what in readings if n in nodes))
            listed = ", ".join(f"{owner(t)!r} -> {what}" for t, what in edges)
            advice = "Name every layer between the way in and the way out"
            raise ValueError(refusal(direction, layers, f"{number}: {listed}. {advice}"))
    return ways["out"][0][0], ways["in"][0][0]


def _pruned(structure: Any, stays: Callable[[Tensor], bool]) -> Any:
    """A structure without the tensors that don't stay, and without what is empty then: None."""
    if isinstance(structure, dict):
        parts = {name: _pruned(part, stays) for name, part in structure.items()}
        return {name: part for name, part in parts.items() if part is not None} or None
    if isinstance(structure, list | tuple):
        return [p for p in (_pruned(part, stays) for part in structure) if p is not None] or None
    return structure if stays(structure) else None


def _in_torchvision(network: str, name: str, known: Iterable[str]) -> str:
    """What a layer's name in torchvision, such as features.9, means here; empty if it isn't one."""
    before = re.sub(r"\d+$", lambda number: str(int(number[0]) - 1), name)  # a ReLU's convolution
    meant = {
        layer.name
        for each in (
            [ARCHITECTURES[network]] if network in ARCHITECTURES else ARCHITECTURES.values()
        )
        for layer in (*each.features(), *each.classifier())
        if layer.torch_path == name or (layer.torch_path == before and layer.kind != "pool")
    }
    meant &= set(known)
    return f" torchvision's {name} is {meant.pop()!r} here." if len(meant) == 1 else ""


def needed(
    outputs: Iterable[Tensor],
    read_instead: Mapping[int, Tensor] | None = None,
    cut: Set[int] = frozenset(),
    origin: Callable[[Tensor], Node] = producing_call,
    reading: Callable[[Node], Sequence[Tensor]] = reads,
) -> list[Node]:
    """The calls that `outputs` depend on, each after those whose results it takes.

    `read_instead` says, by the ids of tensors, which ones are read in their place; nothing is
    needed for a tensor whose id is in `cut`. `origin` says which call a tensor comes from, and
    `reading` what a call reads.
    """
    instead = read_instead or {}

    def origins(tensors: Iterable[Tensor]) -> list[Node]:
        nodes = []
        for t in tensors:
            while instead.get(id(t), t) is not t:
                t = instead[id(t)]
            if id(t) not in cut:
                nodes.append(origin(t))
        return nodes

    order: dict[Node, None] = {}
    todo = origins(outputs)[::-1]
    while todo:  # a recursion would run out of Python's stack on deep graphs
        node = todo[-1]
        waiting = [n for n in origins(reading(node)) if n not in order]
        if waiting and node not in order:
            todo.extend(reversed(waiting))
        else:
            order[todo.pop()] = None
    return list(order)


def holds(operation: Any, tensor: Tensor) -> bool:
    """Whether a tensor is made inside of a model, or of one nested in it."""
    graph = functional(operation)
    if graph is None:
        return False
    nodes = calls(graph)
    return producing_call(tensor) in nodes or any(holds(n.operation, tensor) for n in nodes)


def call_inputs(graph: Functional, node: Node) -> list[Tensor]:
    """What a nested model is called with, in the order of its inputs."""
    given = (*node.arguments.args, node.arguments.kwargs.get("inputs"))[0]
    expected = input_structure(graph)
    if isinstance(given, dict):
        names = expected if isinstance(expected, dict) else [t.name for t in graph.inputs]
        given = {name: given[name] for name in names}
        if not isinstance(expected, dict):
            return list(given.values())
    return list(keras.tree.flatten(given))


def owner(tensor: Tensor) -> str:
    """The name of the layer or operation that made a tensor."""
    return str(producer(tensor).name)


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor once, in order; Keras's tensors overload ==, so that a set won't do."""
    return list({id(t): t for t in tensors}.values())


def layer_names(layers: str | Iterable[str], verb: str) -> list[str]:
    """The names that a user passed as a list, each of them once."""
    if isinstance(layers, Tensor):  # such as model.get_layer("block5_pool").output
        layers = producer(layers)
    if not isinstance(layers, Iterable) or isinstance(layers, bytes | Layer):
        what = f"{layers!r}; pass its name" if isinstance(layers, Layer) else repr(layers)
        raise ValueError(f"{verb} expects a layer's name or several names, received {what}.")
    names = [layers] if isinstance(layers, str) else list(layers)
    if not names:
        raise ValueError(f"{verb} received no layer names.")
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{verb} expects layer names, received {name!r}.")
    if len(set(names)) != len(names):
        twice = dict.fromkeys(n for n in names if names.count(n) > 1)
        raise ValueError(f"{verb} received a layer name twice: {', '.join(map(repr, twice))}.")
    return names
