"""Where the channels of a network go: each one followed from the layer that makes it.

A layer with a kernel makes new channels and reads those that enter it; a batch norm, a pool or an
activation passes them on, one by one; an Add makes one of two. `Flow` walks the graph once and
gives every channel of every tensor an id. From then on it knows which channels can go only
together, which have to stay and why, and along which axes the weights of each layer follow them.
What each layer does to channels is said in `channel_rules`; what enters a layer that has no rule
has to stay as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import keras
import numpy as np

from vggtorch.keras_graph import (
    Node,
    all_layers,
    functional,
    raw_value,
    seed_generators,
)
from vggtorch.surgery.masks import reads
from vggtorch.surgery.wiring import Wiring, call_inputs, needed, owner

Ids: TypeAlias = np.ndarray
Sized: TypeAlias = tuple[tuple[int | None, ...], int, Ids]


@dataclass(frozen=True)
class Channels:
    """The channels of one tensor: the axis along which they stand, and the id at each position."""

    axis: int
    ids: Ids


@dataclass
class Following:
    """How one layer follows its channels.

    Attributes:
        layer: the layer itself.
        path: its full name.
        shape: of the tensor that it reads.
        read: the ids along an axis of that tensor; None if it makes channels from none.
        weights: by the id() of a variable, the ids along some of its axes.
        settings: arguments that count channels, and the ids that they count; where an argument is
            a shape, with that shape and the axis.
        groups: of a grouped convolution, whose kernel holds an equal share of both for each group.
    """

    layer: keras.Layer
    path: str
    shape: tuple[int | None, ...]
    read: Channels | None
    weights: dict[int, dict[int, Ids]] = field(default_factory=dict)
    settings: Mapping[str, Ids | Sized] = field(default_factory=dict)
    groups: int = 1

    def arrays(self) -> list[Ids]:
        """All ids that this layer follows, always in the same order."""
        counted = [ids[2] if isinstance(ids, tuple) else ids for ids in self.settings.values()]
        axes = [ids for by_axis in self.weights.values() for ids in by_axis.values()]
        return [*([self.read.ids] if self.read else []), *counted, *axes]


@dataclass(frozen=True)
class Call:
    """One call of a layer or operation, with the channels that enter it.

    Attributes:
        node: the call in the graph.
        path: the full name of the layer.
        tensors: what it takes, less the masks that Keras hands on by itself.
        entering: the channels of each of these tensors; None where nobody made any.
    """

    node: Node
    path: str
    tensors: list[keras.KerasTensor]
    entering: list[Channels | None]

    @property
    def layer(self) -> Any:
        """The layer or operation itself."""
        return self.node.operation

    @property
    def channels(self) -> Channels:
        """The channels of the first tensor that enters, where it is known to have some."""
        (channels, *_) = self.entering
        assert channels is not None
        return channels

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The shape of the first tensor that enters."""
        return tuple(self.tensors[0].shape)

    @property
    def what(self) -> str:
        """The layer as messages name it."""
        return f"{self.path!r} ({type(self.layer).__name__})"


@dataclass(frozen=True)
class Rule:
    """What a kind of layer does to channels.

    Attributes:
        apply: notes it in the flow, and gives the channels of what the layer puts out.
        makes: it makes channels, whatever enters; others are asked only where channels do.
        joins: takes several tensors; where others do, all that enters has to stay.
    """

    apply: Callable[[Flow, Call], Channels | list[Channels | None] | None]
    makes: bool = False
    joins: bool = False


class Flow:
    """The channels of a model, followed through its graph and the models nested in it.

    `rule_of` gives the rule of a layer or operation, `channel_rules.rule_of`.

    Attributes:
        made: by id, the full name of the layer that makes a channel, and its place there.
        put_out: by the full name of a layer, the channels of its output, once for each call.
        held: ids that have to stay, with the reason.
        outputs: the channels that the model puts out, each with the name of the layer they leave.
        ties: ids that were made one, with the layer that did it.
        following: by the id() of a layer, how it follows its channels.
        calls: every call, in the order they run, with the channels of what it puts out.
    """

    def __init__(self, wiring: Wiring, rule_of: Callable[[Any], Rule | None]):
        self.made: dict[int, tuple[str, int]] = {}
        self.put_out: dict[str, list[Channels]] = {}
        self.held: list[tuple[Ids, str]] = []
        self.ties: list[tuple[Ids, str]] = []
        self.following: dict[int, Following] = {}
        self.calls: list[tuple[Call, Sequence[Channels | None]]] = []
        self._parents: list[int] = []
        self._joined: dict[int, tuple[int, ...]] = {}
        self._of_layer: dict[int, Ids] = {}
        self._rule_of = rule_of
        leaving = self._walk(wiring, [None] * len(wiring.functional.inputs))
        self.outputs = [
            (owner(tensor), channels)
            for tensor, channels in zip(wiring.outputs, leaving, strict=True)
            if channels is not None
        ]
        self.root = np.array([self._find(i) for i in range(len(self._parents))], dtype=int)

    def _walk(self, wiring: Wiring, entering: Sequence[Channels | None]) -> list[Channels | None]:
        now: dict[int, Channels | None] = {}
        for tensor, channels in zip(wiring.functional.inputs, entering, strict=True):
            now[id(tensor)] = channels
        # Calls that only compute masks are left out: Keras makes them again for the new model.
        computing = set(needed(wiring.outputs))
        for node in (n for n in wiring.nodes if n.is_input or n in computing):
            path = wiring.prefix + node.operation.name
            if node.is_input:
                shape, channels = tuple(node.outputs[0].shape), now[id(node.outputs[0])]
                if channels is not None:  # the input of a nested model
                    sized = {"batch_shape": (shape, channels.axis, channels.ids)}
                    self.follow(Following(node.operation, path, shape, channels, settings=sized))
                continue
            inner = functional(node.operation)
            tensors = reads(node) if inner is None else call_inputs(inner, node)
            call = Call(node, path, tensors, [now[id(t)] for t in tensors])
            results = self._call(call, wiring)
            self.calls.append((call, results))
            for tensor, channels in zip(node.outputs, results, strict=True):
                now[id(tensor)] = channels
                if channels is not None:
                    self.put_out.setdefault(path, []).append(channels)
        return [now[id(t)] for t in wiring.outputs]

    def _call(self, call: Call, wiring: Wiring) -> Sequence[Channels | None]:
        nothing = [None] * len(call.node.outputs)
        if functional(call.layer) is not None:
            return self._walk(wiring.inside(call.layer.name), call.entering)
        rule = self._rule_of(call.layer)
        if rule is None:
            self.hold(call, "may mix them: it is none of the layers whose channels are known")
            return nothing
        if not rule.joins and len(call.entering) != 1:
            self.hold(call, f"joins {len(call.entering)} tensors in a way of its own")
            return nothing
        if not rule.makes and all(channels is None for channels in call.entering):
            return nothing
        result = rule.apply(self, call)
        return result if isinstance(result, list) else [result, *nothing[1:]]

    # Ids

    def new(self, count: int) -> Ids:
        """Fresh ids."""
        start = len(self._parents)
        self._parents.extend(range(start, start + count))
        return np.arange(start, start + count)

    def made_by(self, call: Call, count: int) -> Ids:
        """The ids of the channels that a layer makes, the same at every call of it."""
        if id(call.layer) not in self._of_layer:
            ids = self._of_layer[id(call.layer)] = self.new(count)
            self.made.update({int(c): (call.path, place) for place, c in enumerate(ids)})
        return self._of_layer[id(call.layer)]

    def hold(self, call: Call, reason: str) -> None:
        """Let all channels that enter a call stay as they are."""
        for channels in call.entering:
            if channels is not None:
                self.held.append((channels.ids, f"{call.what} reads them, and {reason}"))

    def tie(self, a: Ids, b: Ids, what: str) -> None:
        """Let two rows of channels go only together, position by position."""
        for one, other in zip(a.tolist(), b.tolist(), strict=True):
            self._parents[self._find(one)] = self._find(other)
        self.ties.append((a, what))

    def join(self, rows: Sequence[Ids], what: str) -> Ids:
        """The ids of channels each of which is made of one channel of every row."""
        if len(rows) == 1:
            return rows[0]
        ids = self.new(len(rows[0]))
        for row in rows:
            self.tie(ids, row, what)
        for one, *others in zip(ids.tolist(), *(row.tolist() for row in rows), strict=True):
            self._joined[one] = tuple(others)
        return ids

    def sources(self, ids: Ids) -> set[int]:
        """The channels that some channels are, or are made of."""
        found: set[int] = set()
        todo = ids.tolist()
        while todo:
            one = todo.pop()
            if one not in found:
                found.add(one)
                todo.extend(self._joined.get(one, ()))
        return found

    def _find(self, one: int) -> int:
        parents = self._parents
        while parents[one] != one:
            parents[one] = parents[parents[one]]
            one = parents[one]
        return one

    # What rules are written with

    def follow(self, new: Following) -> None:
        """Note how a layer follows its channels; each further call of it must follow the same."""
        old = self.following.setdefault(id(new.layer), new)
        if old is not new:
            for a, b in zip(old.arrays(), new.arrays(), strict=True):
                self.tie(a, b, f"{new.path!r}, which is called on both,")

    def along(self, call: Call, axis: int, place: int = 0) -> Ids:
        """The ids along an axis of what enters a call, where new ones are held that nobody made."""
        channels, tensor = call.entering[place], call.tensors[place]
        if channels is not None and channels.axis == axis:
            return channels.ids
        ids = self.new(tensor.shape[axis])
        source = call.path.removesuffix(call.layer.name) + owner(tensor)
        reason = f"{call.what} ties them to what {source!r} puts out, which stays as it is"
        self.held.append((ids, reason))
        return ids

    def read(self, call: Call, axis: int) -> Ids:
        """The ids along the axis that a layer with a kernel reads."""
        if call.entering[0] is not None and call.entering[0].axis != axis:
            self.hold(call, f"reads along axis {axis}, not along their axis")
        return self.along(call, axis)

    def weigh(
        self,
        call: Call,
        weights: Mapping[str, Mapping[int, Ids]],
        read: Channels | None,
        made: Ids | None = None,
        count: str | None = None,
        *,
        holder: Any = None,
        groups: int = 1,
    ) -> None:
        """Note along which axes the weights of a layer follow the channels it reads and makes.

        `count` is the argument that says how many it makes; `holder` has the weights, if not the
        layer itself. A layer with other variables than those named (LoRA, quantization) keeps its
        channels.
        """
        holder = holder or call.layer
        named = {name: getattr(holder, name, None) for name in weights}
        named = {name: variable for name, variable in named.items() if variable is not None}
        seeds = {id(g.state) for part in all_layers(call.layer) for g in seed_generators(part)}
        own = {id(v) for v in call.layer.variables} - seeds
        if own != {id(v) for v in named.values()}:
            names = ", ".join(v.name for v in call.layer.variables)
            reason = f"{call.what} has weights of a form of its own ({names})"
            self.held += [(c, reason) for c in (read.ids if read else None, made) if c is not None]
            return
        followed: dict[int, dict[int, Ids]] = {
            id(variable): {axis % raw_value(variable).ndim: i for axis, i in weights[name].items()}
            for name, variable in named.items()
        }
        settings = {} if count is None or made is None else {count: made}
        self.follow(Following(call.layer, call.path, call.shape, read, followed, settings, groups))
