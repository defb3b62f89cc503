"""Channels between two layers that can go: whose, which of them first, and what is left of both.

Y. He, X. Zhang, J. Sun: Channel Pruning for Accelerating Very Deep Neural Networks, 2017. Channels
go in the order of what they contribute; the layer that reads the others is fitted anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import keras
import torch

from vggtorch.compression.factors import Factors, whole_vectors
from vggtorch.compression.rows import Rows
from vggtorch.compression.sites import Site
from vggtorch.keras_graph import Node, calls, graph_of
from vggtorch.surgery import deletable_channels

# Layers through which a channel goes by itself.
THROUGH = (
    keras.layers.Activation,
    keras.layers.ReLU,
    keras.layers.LeakyReLU,
    keras.layers.ELU,
    keras.layers.BatchNormalization,
    keras.layers.DepthwiseConv2D,
    keras.layers.ZeroPadding2D,
    keras.layers.MaxPooling2D,
    keras.layers.AveragePooling2D,
    keras.layers.Dropout,
    keras.layers.SpatialDropout2D,
)
KEPT = (0.85, 0.7, 0.55, 0.4, 0.28)  # shares of the channels, which are tried


@dataclass(frozen=True)
class Pair:
    """Two convolutions of which the second alone reads the first's channels.

    Attributes:
        first, second: the two.
        between: depthwise convolutions between them, which have the first's channels too.
    """

    first: Site
    second: Site
    between: tuple[Site, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """All of them in their order."""
        return self.first, *self.between, self.second

    @property
    def name(self) -> str:
        """The names of both."""
        return f"{self.first.name}+{self.second.name}"


def numbers_of(pair: Pair) -> list[int]:
    """How many channels may stay."""
    every = [whole_vectors(round(share * pair.first.outputs)) for share in KEPT]
    return list(dict.fromkeys(every))


def pairs_of(
    model: keras.Model,
    sites: Sequence[Site],
    depthwise: Sequence[Site],
    taps: Collection[str],
    keep: Collection[str] = (),
) -> list[Pair]:
    """Convolutions whose channels only one other convolution reads; each in one pair at most.

    The maps of the layers `taps` are compared, and so keep all their channels.
    """
    narrowed = {site.name: site for site in depthwise}
    by_name = {site.name: site for site in sites if not site.is_dense}
    readers: dict[int, list[Node]] = {}
    nodes: dict[str, Node] = {}
    times: Counter[str] = Counter()
    units = (unit for unit in deletable_channels(model) if len(unit) == 1)
    alone = Counter(name for unit in units for name in unit)  # channels that can go by themselves
    for node in calls(graph_of(model, "compress")):
        times[node.operation.name] += 1
        nodes[node.operation.name] = node
        for tensor in node.input_tensors:
            readers.setdefault(id(tensor), []).append(node)
    outputs = {id(tensor) for tensor in model.outputs}
    pairs: list[Pair] = []

    def passes(layer: keras.Operation) -> bool:
        """Whether a layer may lose channels, and has them in the order in which they enter it."""
        if isinstance(layer, keras.layers.DepthwiseConv2D) and layer.name not in narrowed:
            return False
        has_weights = bool(getattr(layer, "variables", ()))
        stays = has_weights and (layer.name in keep or times[layer.name] > 1)
        return isinstance(layer, THROUGH) and not stays

    taken: set[str] = set()
    for first in by_name.values():
        if first.name in taken or alone[first.name] < first.outputs:
            continue
        node = nodes[first.name]
        between: list[Site] = []
        while node.operation.name not in taps:
            following = readers.get(id(node.outputs[0]), [])
            if len(following) != 1 or id(node.outputs[0]) in outputs:
                break
            (node,) = following
            second = by_name.get(node.operation.name)
            if second is not None and second.name not in taken:
                pairs.append(Pair(first, second, tuple(between)))
                taken |= {first.name, second.name}
            if second is not None or not passes(node.operation):
                break
            if node.operation.name in narrowed:
                between.append(narrowed[node.operation.name])
    return pairs


def order_of(rows: Rows) -> torch.Tensor:
    """The channels that a layer reads, those that contribute most to its outputs first."""
    energy = rows.patches.square().mean(0)  # (I, H, W)
    effect = torch.einsum("pq,qihw->pihw", rows.roots[0], rows.weight).square().sum(0)
    return (energy * effect).sum((1, 2)).argsort(descending=True, stable=True)


def reading(rows: Rows, kept: torch.Tensor) -> Factors:
    """The layer that reads only the channels `kept`, fitted to what it is to give."""
    x = rows.patches[:, kept].flatten(1)
    old = rows.weight[:, kept].flatten(1).T  # (c H W, O)
    mean, y_mean = x.mean(0), rows.outputs.mean(0)
    x = x - mean
    second = (x.T @ x / len(x)).double()
    second.diagonal().add_(rows.noise)
    wanted = (x.T @ (rows.outputs - y_mean) / len(x) + rows.noise * old).double()
    matrix = torch.cholesky_solve(wanted, torch.linalg.cholesky(second)).float()
    weight = matrix.T.reshape(len(y_mean), len(kept), *rows.weight.shape[2:])
    bias = y_mean - mean @ matrix
    return Factors.of("channels", [weight], bias, reads=kept)


def giving(weight: torch.Tensor, bias: torch.Tensor | None, kept: torch.Tensor) -> Factors:
    """The layer that gives only the channels `kept`."""
    own = None if bias is None else bias[kept]
    return Factors.of("channels", [weight[kept]], own, gives=kept)
