"""Layers that hang together across the borders of nested models, replaced as in one graph.

The head of a model with the last layers of the network nested in it is such a stretch. What enters
it is carried up through the outputs of the models that it begins in, and down through the inputs of
those that it ends in, and the new layers stand where it ends. All that takes is that whoever reads
one tensor reads another, in each of the models that are crossed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from keras import KerasTensor as Tensor
from keras.layers import Layer

from vggtorch.keras_graph import Node
from vggtorch.surgery.built_in import with_flips
from vggtorch.surgery.masks import reads
from vggtorch.surgery.splicing import Change
from vggtorch.surgery.wiring import Reading, Wiring, call_inputs, distinct, ways_through


class Crossing:
    """A model and those nested in it on the way to some layers, seen as one graph.

    Attributes:
        changes: the splices that replace the layers, in all models that are crossed.
        replaced: the calls that go, in the order they run.
        place: the model that the new layers stand in.
    """

    def __init__(self, wiring: Wiring, names: Sequence[str], new: Sequence[Layer]):
        self.wiring, self.verb = wiring, wiring.verb
        self._graphs: dict[tuple[str, ...], Wiring] = {(): wiring}
        self._calls: dict[tuple[str, ...], Node] = {}  # of a nested model, by the way to it
        self._same: dict[int, Tensor] = {}  # a border's tensor -> the one that it is
        named: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            *way, own = wiring.route(name)
            named.setdefault(tuple(way), []).append(own)
        wanted: set[Node] = set()
        for at, own_names in named.items():
            graph = self._opened(at)
            wanted.update(*with_flips(graph, graph.nodes_of(own_names)))
        self.order = list(self._walk(()))
        self.replaced = [node for _, node in self.order if node in wanted]
        if covering := [way for way, call in self._calls.items() if call in wanted]:
            raise ValueError(
                f"{self.verb} received {'/'.join(covering[0])!r} and layers in it: name the nested "
                f"model as a whole, or its layers."
            )
        result, source = self._borders()
        self._gone = {id(t) for node in self.replaced for t in node.outputs}
        self.changes: list[Change] = []
        self._carried: set[int] = set()  # what stands on a border for something else now
        self.place = self._splice(source, result, new)
        for where in self._calls:
            self._check_rest(where)

    def graphs(self) -> list[Wiring]:
        """The model's graph, and those of the nested models that are crossed."""
        return list(self._graphs.values())

    def _opened(self, way: tuple[str, ...]) -> Wiring:
        """The graph of a nested model, which is called once."""
        if way not in self._graphs:
            outer = self._opened(way[:-1])
            nodes = outer.nodes_named(way[-1])
            if len(nodes) > 1:
                raise ValueError(
                    f"{self.verb} received layers in {'/'.join(way)!r} and outside of it, which "
                    f"would have to change with each of its {len(nodes)} calls. Name layers of one "
                    f"model, or make one graph of them first: vt.flatten(model)."
                )
            self._calls[way] = nodes[0]
            self._graphs[way] = outer.inside(way[-1])
        return self._graphs[way]

    def _walk(self, way: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Node]]:
        """All calls in the order they run, those in opened models in the place of these."""
        graph = self._graphs[way]
        for node in graph.nodes:
            inner = next((w for w, call in self._calls.items() if call is node), None)
            if inner is None:
                if way == () or not node.is_input:
                    yield way, node
                continue
            nested = self._graphs[inner]
            given = call_inputs(nested.functional, node)
            for inside, outside in zip(nested.functional.inputs, given, strict=True):
                self._same[id(inside)] = outside
            yield from self._walk(inner)
            for inside, outside in zip(nested.outputs, node.outputs, strict=True):
                self._same[id(outside)] = inside

    def _plain(self, tensor: Tensor) -> Tensor:
        """What a tensor is in the one graph."""
        while id(tensor) in self._same:
            tensor = self._same[id(tensor)]
        return tensor

    def _borders(self) -> tuple[Tensor, Tensor]:
        """What leaves the layers that go, and what enters them."""
        readings: list[Reading] = [
            (node, self._plain(t), repr("/".join([*way, node.operation.name])))
            for way, node in self.order
            for t in distinct(reads(node))
        ]
        outputs = distinct(map(self._plain, self.wiring.outputs))
        readings += [(None, t, "the model's output") for t in outputs]

        def refusal(direction: str, layers: str, ways: str) -> str:
            return (
                f"{self.verb} received layers of several models, {layers}, which are replaced "
                f"together if they have one way {direction}; they have {ways}; or replace those of "
                f"each model by layers of their own, one call after another or by vt.replace_where."
            )

        return ways_through(readings, set(self.replaced), refusal)

    def _home(self, tensor: Tensor) -> tuple[str, ...]:
        """The way to the model that makes a tensor."""
        return next(way for way, node in self.order if any(t is tensor for t in node.outputs))

    def _splice(self, source: Tensor, result: Tensor, new: Sequence[Layer]) -> Wiring:
        """Note all changes; returns where the new layers stand."""
        begin, end = self._home(source), self._home(result)
        deepest = min(len(begin), len(end))
        common = next(n for n in range(deepest, -1, -1) if begin[:n] == end[:n])
        now = source
        for depth in range(len(begin), common, -1):
            way = begin[:depth]
            graph, call = self._graphs[way], self._calls[way]
            border = list(zip(graph.outputs, call.outputs, strict=True))
            now = self._across(way, graph, border, now)
        for depth in range(common, len(end)):
            way = end[: depth + 1]
            inner = self._graphs[way].functional
            border = list(zip(call_inputs(inner, self._calls[way]), inner.inputs, strict=True))
            now = self._across(way, self._graphs[end[:depth]], border, now)
        place = self._graphs[end]
        self.changes.append((place, [(result, now)], new))
        return place

    def _across(
        self,
        way: tuple[str, ...],
        graph: Wiring,
        border: Sequence[tuple[Tensor, Tensor]],
        now: Tensor,
    ) -> Tensor:
        """The tensor behind the border of a nested model that is `now`, which stands before it.

        Where `now` doesn't cross that border, it takes the place of what the layers that go made.
        `border` has tensors of `graph`, where `now` is, and what they are on the other side.
        """
        for near, far in border:
            if near is now:
                return far
        made = [(near, far) for near, far in border if id(self._plain(near)) in self._gone]
        if len(made) != 1:
            raise self._tangled(way)
        ((near, far),) = made
        self._carried |= {id(near), id(far)}
        self.changes.append((graph, [(near, now)], ()))
        return far

    def _check_rest(self, way: tuple[str, ...]) -> None:
        """Raise if a nested model that stays would still need a layer that goes."""
        graph, call = self._graphs[way], self._calls[way]
        gone = [id(self._plain(t)) in self._gone for t in call.outputs]
        borders = [*call.outputs, *call_inputs(graph.functional, call)]
        left = [
            t for t in borders if id(self._plain(t)) in self._gone and id(t) not in self._carried
        ]
        if left and not all(gone):
            raise self._tangled(way)

    def _tangled(self, way: tuple[str, ...]) -> ValueError:
        return ValueError(
            f"{self.verb} received layers that cross the border of {'/'.join(way)!r} in several "
            f"places. Make one graph of the model first: vt.flatten(model)."
        )
