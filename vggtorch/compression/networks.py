"""The original and the network in work, as torch networks that return the maps to be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import keras
import numpy as np
import torch
from keras import KerasTensor
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vggtorch.compression.deletion import THROUGH
from vggtorch.compression.photographs import Photographs
from vggtorch.compression.sites import Site, find_depthwise, find_sites
from vggtorch.keras_graph import calls, graph_of, producer, producing_call
from vggtorch.lowering import to_torch

COMPARED = 16  # whole images for the cosines that are returned
BATCH = 8  # of crops


@dataclass(frozen=True)
class Networks:
    """The original, the network in work (which shares what isn't replaced), and their maps.

    Attributes:
        original, work: torch networks (N, C, H, W) -> maps, the network's outputs last.
        taps: names of the layers whose maps these are.
        ends: how many of them are the network's outputs.
        sites: what can be replaced, counted at the size of whole images.
        depthwise: layers that become narrower with those around them.
        total: multiply-adds of the whole for one image.
        entering: the shape of an image, without the batch.
    """

    original: nn.Module
    work: nn.Module
    taps: tuple[str, ...]
    ends: int
    sites: tuple[Site, ...]
    depthwise: tuple[Site, ...]
    total: int
    entering: tuple[int, ...]

    def install_(self, modules: Mapping[str, nn.Module]) -> None:
        """Put modules into the network in work, by the names of children."""
        for child, module in modules.items():
            setattr(self.work, child, module)

    def remove_(self, site: Site) -> None:
        """Give the network in work the original's layer back."""
        setattr(self.work, site.child, getattr(self.original, site.child))

    def maps(self, x: Tensor) -> list[Tensor]:
        """The original's maps of a batch."""
        with torch.no_grad():
            return list(self.original(x))


def networks_of(model: keras.Model, images: Photographs, keep: Sequence[str]) -> Networks:
    """Make both torch networks of a Keras model, with memory of their own."""
    tapped, names = _tapped(model)
    original = to_torch(tapped, data_format="channels_first", share=False).eval()
    original = original.to(memory_format=torch.channels_last)
    for parameter in original.parameters():
        parameter.requires_grad_(False)
    example = images.held_out[:1]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        original(example)
    work = torch.fx.GraphModule(original, original.graph).eval()
    return Networks(
        original,
        work,
        names,
        len(model.outputs),
        tuple(find_sites(model, original, example, keep)),
        tuple(find_depthwise(model, original, example, keep)),
        counter.get_total_flops() // 2,
        tuple(example.shape[1:]),
    )


def _tapped(model: keras.Model) -> tuple[keras.Model, tuple[str, ...]]:
    """The model with the maps to be compared as its outputs, and the names of their layers.

    These are what pools put out, what enters a convolution with strides, and the outputs. Of a
    depthwise one, whose channels may go, what enters the layer that makes them.
    """
    outputs = list(model.outputs)
    ends = {id(t) for t in outputs}
    found: dict[int, KerasTensor] = {}
    for node in calls(graph_of(model, "compress")):
        layer = node.operation
        if node.is_input or np.max(getattr(layer, "strides", None) or 1) == 1:
            continue
        tensor = node.outputs[0] if hasattr(layer, "pool_size") else node.input_tensors[0]
        depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
        passed = THROUGH if depthwise else keras.layers.ZeroPadding2D
        while isinstance(producer(tensor), passed):
            tensor = producing_call(tensor).input_tensors[0]
        if depthwise and isinstance(producer(tensor), keras.layers.Conv2D):
            tensor = producing_call(tensor).input_tensors[0]
        if id(tensor) not in ends and not isinstance(producer(tensor), keras.layers.InputLayer):
            found[id(tensor)] = tensor
    tensors = [*found.values(), *outputs]
    return keras.Model(model.inputs, tensors), tuple(str(producer(t).name) for t in tensors)


def likeness(networks: Networks, other: nn.Module, images: Tensor) -> dict[str, float]:
    """Cosine between the original's maps and another network's, by tap; the mean over images."""
    sums = dict.fromkeys(networks.taps, 0.0)
    images = images[:COMPARED].contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for batch in images.split(BATCH // 4):  # whole images are that much larger
            maps = networks.original(batch), other(batch)
            for name, a, b in zip(networks.taps, *maps, strict=True):
                sums[name] += float((_unit(a) * _unit(b)).sum())
    return {name: value / len(images) for name, value in sums.items()}


def _unit(maps: Tensor) -> Tensor:
    """Each map divided by its size; torch's own cosine takes small ones for zero."""
    flat = maps.flatten(1)
    return flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-30)


def tapped_result(model: keras.Model, taps: Sequence[str]) -> nn.Module:
    """A result as a torch network that returns the same maps."""
    made = {node.operation.name: node.outputs[0] for node in calls(graph_of(model, "compress"))}
    tensors = [made[name] for name in taps]
    return to_torch(
        keras.Model(model.inputs, tensors), data_format="channels_first", share=False
    ).eval()
