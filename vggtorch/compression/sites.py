"""The layers of a network that can be replaced by cheaper ones, and what each of them costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from typing import Any

import keras
import torch
from torch import Tensor, nn

SMALL = 16  # layers with fewer inputs to an output, or fewer outputs, aren't worth a replacement


@dataclass(frozen=True)
class Site:
    """A convolution or Dense layer that can be replaced, as it stands in the network.

    Attributes:
        name: of the Keras layer.
        child: of the torch network; the layer's own name, as far as torch allows it.
        outputs, inputs: channels that leave and enter.
        kernel: height and width; (1, 1) of a Dense layer.
        stride: of the convolution.
        padding: zeros around the map, rows and columns.
        is_dense: a Dense layer.
        positions: outputs of each channel for one image.
        entering: the shape of what enters, without the batch.
        unpadded: the same before zeros are added that are more on one side of the map.
    """

    name: str
    child: str
    outputs: int
    inputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    is_dense: bool
    positions: int
    entering: tuple[int, ...]
    unpadded: tuple[int, ...]

    @property
    def patch(self) -> int:
        """How many numbers meet the kernel at one position."""
        return self.inputs * self.kernel[0] * self.kernel[1]

    @property
    def multiply_adds(self) -> int:
        """Of the layer as it is, for one image."""
        height, width = self.kernel
        return self.positions * self.outputs * self.inputs * height * width


class _Shapes(torch.fx.Interpreter):
    """Runs a network and notes the shape of each value, without the batch."""

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            n.meta["shape"] = tuple(value.shape[1:])
        return value


@torch.no_grad()
def run_once(network: torch.fx.GraphModule, example: Tensor) -> list[Tensor]:
    """A network's maps of an example (N, C, H, W), whose size decides what layers cost."""
    maps: list[Tensor] = _Shapes(network).run(example)
    return maps


def find_sites(
    model: keras.Model, network: torch.fx.GraphModule, keep: Collection[str] = ()
) -> tuple[list[Site], list[Site]]:
    """What can be replaced, and depthwise convolutions, through which a channel goes by itself.

    Both in the order of the computation, without the layers `keep`. `network` is the model's,
    channels first, after `run_once`.
    """
    layers = {layer.name: layer for layer in model.layers if layer.name not in keep}
    nodes = [node for node in network.graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in nodes)
    found: list[Site] = []
    depthwise: list[Site] = []
    for node in nodes:
        layer: Any = layers.get(node.meta.get("layer"))
        module = network.get_submodule(str(node.target))
        if times[node.target] > 1 or not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        if type(layer) is keras.layers.DepthwiseConv2D and layer.depth_multiplier == 1:
            depthwise.append(_site(layer.name, node, module))
        elif type(layer) in (keras.layers.Conv2D, keras.layers.Dense) and _is_large(module):
            found.append(_site(layer.name, node, module))
    return found, depthwise


def _is_large(module: nn.Conv2d | nn.Linear) -> bool:
    """Whether a replacement is worth it, and known: there is none with groups or dilation."""
    if isinstance(module, nn.Conv2d) and (module.groups > 1 or set(module.dilation) != {1}):
        return False
    return min(module.weight[0].numel(), len(module.weight)) >= SMALL


def _site(name: str, node: torch.fx.Node, module: Any) -> Site:
    """The site of a module that a node calls."""
    outputs, inputs, *kernel = module.weight.shape
    dense = isinstance(module, nn.Linear)
    before: Any = node.args[0]
    read = before
    while read.op == "call_module" and read.meta.get("layer") == name:
        read = read.args[0]
    return Site(
        name,
        str(node.target),
        outputs,
        inputs,
        (1, 1) if dense else tuple(kernel),  # type: ignore[arg-type]
        (1, 1) if dense else module.stride,
        (0, 0) if dense else module.padding,
        dense,
        prod(node.meta["shape"]) // outputs,
        before.meta["shape"],
        read.meta["shape"],
    )
