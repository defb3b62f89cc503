"""The layers of a network that can be replaced by cheaper ones, and what each of them costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

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

    @property
    def patch(self) -> int:
        """How many numbers meet the kernel at one position."""
        return self.inputs * self.kernel[0] * self.kernel[1]

    @property
    def multiply_adds(self) -> int:
        """Of the layer as it is, for one image."""
        height, width = self.kernel
        return self.positions * self.outputs * self.inputs * height * width


def find_sites(
    model: keras.Model, network: torch.fx.GraphModule, example: Tensor, keep: Collection[str] = ()
) -> list[Site]:
    """The sites of a model in the order of its computation, those of the layers `keep` left out.

    Args:
        model: the Keras model.
        network: its torch network, channels first.
        example: an input (N, C, H, W), whose size decides the number of positions.
        keep: layers that stay as they are.
    """

    def wanted(layer: keras.Layer, module: nn.Module) -> bool:
        if type(layer) not in (keras.layers.Conv2D, keras.layers.Dense):
            return False
        if isinstance(module, nn.Conv2d) and (module.groups > 1 or set(module.dilation) != {1}):
            return False
        weight = getattr(module, "weight", None)
        return weight is not None and min(weight[0].numel(), len(weight)) >= SMALL

    return _found(model, network, example, keep, wanted)


def find_depthwise(
    model: keras.Model, network: torch.fx.GraphModule, example: Tensor, keep: Collection[str] = ()
) -> list[Site]:
    """Depthwise convolutions, through which a channel goes by itself, as sites of one input."""

    def wanted(layer: keras.Layer, module: nn.Module) -> bool:
        return type(layer) is keras.layers.DepthwiseConv2D and layer.depth_multiplier == 1

    return _found(model, network, example, keep, wanted)


def _found(
    model: keras.Model,
    network: torch.fx.GraphModule,
    example: Tensor,
    keep: Collection[str],
    wanted: Callable[[keras.Layer, nn.Module], bool],
) -> list[Site]:
    layers = {layer.name: layer for layer in model.layers}
    nodes = [node for node in network.graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in nodes)
    found: dict[str, Site] = {}
    hooks = []
    for node in nodes:
        child, layer = str(node.target), layers.get(node.meta.get("layer"))
        module = network.get_submodule(child)
        if layer is None or layer.name in keep or not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        if times[child] == 1 and wanted(layer, module):
            hooks.append(module.register_forward_hook(_noting(layer.name, child, found)))
    try:
        with torch.no_grad():
            network(example[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def _noting(name: str, child: str, found: dict[str, Site]) -> Callable[..., None]:
    """A hook that adds a module to the sites, at its first call."""

    def note(module: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        outputs, inputs, *kernel = tuple(module.weight.shape)  # type: ignore[arg-type]
        dense = isinstance(module, nn.Linear)
        found[name] = Site(
            name,
            child,
            outputs,
            inputs,
            (1, 1) if dense else tuple(kernel),  # type: ignore[arg-type]
            (1, 1) if dense else module.stride,  # type: ignore[arg-type]
            (0, 0) if dense else module.padding,  # type: ignore[arg-type]
            dense,
            y[0].numel() // outputs,
            tuple(args[0].shape[1:]),
        )

    return note
