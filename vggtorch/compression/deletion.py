"""Channels between two layers that can go: whose, which of them first, and what is left of both.

Y. He, X. Zhang, J. Sun: Channel Pruning for Accelerating Very Deep Neural Networks, 2017. Channels
go in the order of what they contribute; the layer that reads the others is fitted anew.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import keras
import torch

from vggtorch.compression.factors import Factors, Part
from vggtorch.compression.rows import Rows
from vggtorch.compression.sites import Site
from vggtorch.keras_graph import Node, calls, graph_of

# Layers through which a channel goes by itself.
THROUGH = (
    keras.layers.Activation,
    keras.layers.ReLU,
    keras.layers.LeakyReLU,
    keras.layers.ELU,
    keras.layers.BatchNormalization,
    keras.layers.ZeroPadding2D,
    keras.layers.MaxPooling2D,
    keras.layers.AveragePooling2D,
    keras.layers.Dropout,
    keras.layers.SpatialDropout2D,
)
MIXING = ("softmax", "log_softmax", "glu", "sparsemax")  # activations that are not by channel
KEPT = (0.85, 0.7, 0.55, 0.4, 0.28)  # shares of the channels, which are tried


def pairs_of(
    model: keras.Model, sites: Sequence[Site], taps: Collection[str]
) -> list[tuple[Site, Site]]:
    """Convolutions whose channels only one other convolution reads; each in one pair at most.

    Args:
        model: the Keras model.
        sites: the layers that may be changed.
        taps: layers whose maps are compared, and so keep all their channels.
    """
    by_name = {site.name: site for site in sites if not site.is_dense}
    readers: dict[int, list[Node]] = {}
    nodes = {}
    for node in calls(graph_of(model, "compress")):
        nodes[node.operation.name] = node
        for tensor in node.input_tensors:
            readers.setdefault(id(tensor), []).append(node)
    outputs = {id(tensor) for tensor in model.outputs}
    pairs: list[tuple[Site, Site]] = []
    taken: set[str] = set()
    for first in by_name.values():
        if first.name in taken:
            continue
        node = nodes[first.name]
        while _goes_through(node, first.name) and node.operation.name not in taps:
            following = readers.get(id(node.outputs[0]), [])
            if len(following) != 1 or id(node.outputs[0]) in outputs:
                break
            (node,) = following
            second = by_name.get(node.operation.name)
            if second is not None and node.operation.use_bias and second.name not in taken:
                pairs.append((first, second))
                taken |= {first.name, second.name}
                break
    return pairs


def _goes_through(node: Node, first: str) -> bool:
    """Whether each channel that a call puts out comes of one channel, or of the first layer."""
    layer = node.operation
    name = getattr(getattr(layer, "activation", None), "__name__", "linear")
    return name not in MIXING and (layer.name == first or isinstance(layer, THROUGH))


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
    return Factors("channels", (Part("", weight, (0, 1)),), bias, reads=kept)


def giving(weight: torch.Tensor, bias: torch.Tensor, kept: torch.Tensor) -> Factors:
    """The layer that gives only the channels `kept`."""
    return Factors("channels", (Part("", weight[kept], (0, 1)),), bias[kept], gives=kept)
