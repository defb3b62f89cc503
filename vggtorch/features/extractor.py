"""`FeatureExtractor`: the values of several layers in one pass, as a torch module."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import torch
from torch import Tensor, nn

from vggtorch.architectures import architecture_named
from vggtorch.checks import switch
from vggtorch.features.frozen import with_little_kept
from vggtorch.features.pixels import Pixels
from vggtorch.keras_graph import Functional, graph_of
from vggtorch.keras_graph import data_format as layout_of
from vggtorch.lowering import TorchNetwork, to_torch
from vggtorch.models import constructor, data_config, weight_set
from vggtorch.telling import tell
from vggtorch.weight_sets import WEIGHT_SETS, WeightSet, weight_set_named

# How papers and other projects name the layers of VGG, behind a nested model's name or alone.
_SHORT_NAMES = (
    (r"(^|.*/)conv([1-5])_([1-4])", r"\1block\2_conv\3"),
    (r"(^|.*/)relu([1-5])_([1-4])", r"\1block\2_relu\3"),  # behind a batch norm
    (r"(^|.*/)relu([1-5])_([1-4])", r"\1block\2_conv\3_relu"),
    (r"(^|.*/)pool([1-5])", r"\1block\2_pool"),
)


class FeatureExtractor(nn.Module):
    """The values of several layers in one pass over the images; nothing behind them is computed.

    Called on images it returns a dict with the value of each tap, in their order.

    The network is `to_torch`'s, cut behind the last tap, so a ReLU that is part of a Keras layer is
    a layer of its own: "block1_conv2" is the value before it, "block1_conv2_relu" the one after
    it. The short names "conv1_2", "relu1_2" and "pool1" stand for VGG's layers too, and a layer of
    a nested model has the name "vgg16/block1_conv2", or its own where no other has that.

    Gradients flow to the images; beside the values that are returned they keep a quarter of what
    torch keeps for them. The weights are frozen, and batch norm and dropout run as in inference
    whatever `train()` says, unless `trainable` is set. `.to(torch.bfloat16)` and autocast work as
    with any module; images are normalised in float32.

    Args:
        source: a Keras model with one image as its input, whose weights are then shared, not
            copied; or a weight set (`imagenet`, `features`, `oxford`) or a checkpoint's path, which
            `architecture` is loaded with.
        taps: the names of layers, as `vt.to_torch` has them.
        architecture: the network for a weight set or a path, VGG16 by default.
        normalization: the weight set whose arithmetic the images go through. "model" is the one
            that the model remembers; None takes images that are ready for the network.
        value_range: what black and white are in the images given: (0, 1), (0, 255), (-1, 1).
        data_format: layout of images and features, "channels_first" (N, C, H, W) or "channels_last"
            (N, H, W, C).
        trainable: leave the weights as trainable as they are in the model.
        checkpoint: compute maps again in backward, as `to_torch` does: the same gradients for
            large images from still less memory, in about 1.3 times the time.
        winograd: 3x3 convolutions and their gradients may be computed sooner and less exactly, as
            `to_torch` has it. Large images gain most.

    Raises:
        ValueError: a layer that isn't there or is called several times, a model without one image
            as its input or with an unknown normalisation, and, when it is called, images of another
            shape, layout or range. Of images on a GPU the range is looked at in the first call
            alone, because looking makes the GPU wait.
        OSError: the weights can't be had.

    Source: the interface of torchvision's create_feature_extractor.

    Example:
        >>> import torch, vggtorch as vt
        >>> vgg = vt.VGG16(weights=None, include_top=False)
        >>> extractor = vt.FeatureExtractor(vgg, ["relu1_2", "block2_pool"], normalization="oxford")
        >>> {tap: tuple(value.shape) for tap, value in extractor(torch.rand(1, 3, 64, 64)).items()}
        {'relu1_2': (1, 64, 64, 64), 'block2_pool': (1, 128, 16, 16)}
    """

    def __init__(
        self,
        source: keras.Model | str | os.PathLike,
        taps: Sequence[str],
        *,
        architecture: str | None = None,
        normalization: str | None = "model",
        value_range: tuple[float, float] = (0, 1),
        data_format: str = "channels_first",
        trainable: bool = False,
        checkpoint: bool = False,
        winograd: bool = False,
    ) -> None:
        super().__init__()
        self.taps = _checked_taps(taps)
        trainable = switch("trainable", trainable)
        checkpoint = switch("checkpoint", checkpoint)
        winograd = switch("winograd", winograd)
        given = isinstance(source, keras.Model)
        if given and architecture is not None:
            raise ValueError(
                f"Received architecture={architecture!r} with a model, which is a network already."
            )
        model = source if given else self._load(source, architecture or "vgg16")
        expected, scaled = _normalization(model, normalization)
        graph = graph_of(model, "FeatureExtractor")
        first = layout_of(graph) == "channels_first"
        self.pixels = Pixels(value_range, data_format, _channels(graph, first), expected, scaled)
        self.trainable, self.checkpoint = trainable, checkpoint
        # A network that is loaded here has no other user, so its Keras variables may go.
        network = to_torch(
            model,
            data_format="channels_first",
            share=given,
            checkpoint=checkpoint,
            winograd=winograd,
        )
        _tap_(network, self.taps, "keras" if first else "first")
        self.network = network
        if not trainable:
            network.requires_grad_(False)
            network.eval()
        self._made: tuple[str, torch.fx.GraphModule] | None = None
        self._is_checked = False  # whether the range of images on a GPU has been looked at

    def _load(self, source: str | os.PathLike, architecture: str) -> keras.Model:
        if not isinstance(source, str | os.PathLike):
            raise ValueError(
                f"Received source of type {type(source).__name__}; expected a Keras model, a "
                f"weight set ({', '.join(WEIGHT_SETS)}) or a checkpoint's path. Of a torch network "
                f"torchvision's create_feature_extractor gives the features."
            )
        top = {layer.name for layer in architecture_named(architecture).classifier()} | {"flatten"}
        with_top = any(tap in top or tap.rsplit("_", 1)[0] in top for tap in self.taps)
        return constructor(architecture)(weights=source, include_top=with_top)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The value of each tap for images of the layout and range that were named."""
        compiling = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if not compiling:
            # Looking at values costs no wait where there is no GPU.
            on_cpu = isinstance(images, Tensor) and images.device.type == "cpu"
            self.pixels.check(images, values=on_cpu or not self._is_checked)
            self._is_checked = True
            if not self.trainable and any(p.requires_grad for p in self.network.parameters()):
                self.network.requires_grad_(False)
                tell(
                    "The weights of this extractor were unfrozen, by the module that it is part of "
                    "or with the layers of its Keras model. They stay frozen here: make it with "
                    "trainable=True to train them."
                )
        x = self.pixels.normalise(images)
        weight = next((p for p in self.network.parameters() if p.is_floating_point()), None)
        if weight is not None:
            x = x.to(weight.dtype)
        runner: torch.fx.GraphModule = self.network
        if not (compiling or self.network.is_watched()):
            # How images lie in memory decides how maps do, and to bring these into another order
            # than the fast way puts them out in takes longer.
            x = x.contiguous(memory_format=torch.channels_last)
            autocast = torch.is_autocast_enabled(x.device.type)
            if x.requires_grad and torch.is_grad_enabled() and type(x) is Tensor and not autocast:
                runner = self._with_little_kept()
        try:
            values: dict[str, Tensor] = runner(x)
        except RuntimeError as error:
            if "too small" not in str(error):
                raise
            raise ValueError(
                f"Received images of {x.shape[2]}x{x.shape[3]}, which are too small for the layers "
                f"up to {self.taps[-1]!r} ({error})."
            ) from error
        return {tap: self.pixels.as_given(value) for tap, value in values.items()}

    def train(self, mode: bool = True) -> FeatureExtractor:
        """As torch.nn.Module has it; frozen layers stay in inference."""
        super().train(mode)
        if not self.trainable:
            self.network.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> FeatureExtractor:
        """As torch.nn.Module has it; ValueError where the weights are to stay frozen."""
        if requires_grad and not self.trainable:
            raise ValueError(
                "The weights of this extractor are frozen. Make it with trainable=True, and they "
                "are as trainable as those of the model."
            )
        return super().requires_grad_(requires_grad)

    def extra_repr(self) -> str:
        """What the module adds to its network."""
        expected = self.pixels.expected
        return (
            f"taps={self.taps}, normalization={expected and expected.name!r}, "
            f"value_range={self.pixels.value_range}, data_format={self.pixels.data_format!r}"
        )

    def _with_little_kept(self) -> torch.fx.GraphModule:
        """The network, if it is frozen in a form that keeps less for gradients."""
        if self.checkpoint or self.trainable:
            return self.network
        code = self.network.code  # which is another one when somebody has edited the graph
        if self._made is None or self._made[0] != code:
            # Not a child: its parameters are listed under the network's own names already.
            object.__setattr__(self, "_made", (code, with_little_kept(self.network)))
        assert self._made is not None
        return self._made[1]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles make their own."""
        return self.__dict__ | {"_made": None}


def _checked_taps(taps: Sequence[str]) -> list[str]:
    received, taps = taps, list(taps) if isinstance(taps, Iterable) else []
    if isinstance(received, str) or not taps or not all(isinstance(tap, str) for tap in taps):
        raise ValueError(
            f"Received taps={received!r}; expected a list of layers' names, such as "
            f"['block1_conv2_relu', 'block2_pool']."
        )
    if len(set(taps)) < len(taps):
        raise ValueError(f"Received taps={taps!r}, in which a name stands twice.")
    return taps


def _channels(graph: Functional, first: bool) -> int:
    """The channels of a graph's one image; ValueError where it takes something else."""
    shapes = [tuple(tensor.shape) for tensor in graph.inputs]
    channels = shapes[0][1 if first else -1] if len(shapes) == 1 and len(shapes[0]) == 4 else None
    if channels is None:
        raise ValueError(
            f"Received the model {graph.name!r} with inputs of shape {shapes}; expected one batch "
            f"of images, (N, H, W, channels)."
        )
    return channels


def _normalization(model: keras.Model, name: str | None) -> tuple[WeightSet | None, bool]:
    """The arithmetic for a model's images, and whether the model has its own and wants 0 to 255."""
    if name is None:
        return None, False
    inside = data_config(model).preprocessing_inside
    if name == "model":
        if inside:
            return None, True
        remembered = weight_set(model)
        if remembered is None:
            raise ValueError(
                f"The model {model.name!r} does not say which weight set it belongs to. Pass "
                f"normalization={' | '.join(map(repr, WEIGHT_SETS))}, or None for images that are "
                f"ready for the network."
            )
        name = remembered
    elif inside:
        raise ValueError(
            f"Received normalization={name!r} for {model.name!r}, which has its preprocessing "
            f"inside. Leave normalization out."
        )
    return weight_set_named(name), False


# Taps


def _tap_(network: TorchNetwork, taps: Sequence[str], wanted: str) -> None:
    """Let the network return the values of these layers in a dict, and drop what is behind them.

    wanted: the order of axes with the channels in front, as `to_torch` notes it of each value.
    """
    calls = _inline_(network)
    for node in network.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target).replace(".", "/"), []).append(node)
    values: dict[str, torch.fx.Node] = {}
    for tap in taps:
        name = _layer(tap, calls)
        if len(calls[name]) > 1:
            raise ValueError(
                f"The layer {name!r} is called {len(calls[name])} times, so it has no one value to "
                f"tap. Name a layer before or behind it."
            )
        values[tap] = calls[name][0]
    end = network.graph.output_node()
    with network.graph.inserting_before(end):
        for tap, node in values.items():
            if node.meta.get("axes", wanted) != wanted:
                places = (-1, 1) if wanted == "first" else (1, -1)
                values[tap] = network.graph.call_function(_with_axis_moved, (node, *places))
    end.args = (values,)
    network.graph.eliminate_dead_code()
    network.recompile()
    network.delete_all_unused_submodules()


def _inline_(network: TorchNetwork) -> dict[str, list[torch.fx.Node]]:
    """Write the graphs of nested networks in the place of their calls, at any depth.

    Returns:
        What each nested network gives, by its name, "head/vgg16", and once for each call.
    """
    graph, found = network.graph, dict[str, list[torch.fx.Node]]()
    while nested := [
        (node, inner)
        for node in graph.nodes
        if node.op == "call_module"
        and isinstance(inner := network.get_submodule(str(node.target)), TorchNetwork)
    ]:
        for node, inner in nested:
            place = str(node.target)
            values = dict(zip(inner.graph.find_nodes(op="placeholder"), node.args, strict=True))
            with graph.inserting_before(node):
                given: Any = graph.graph_copy(inner.graph, values)
            for step in inner.graph.nodes:
                if step.op == "call_module":
                    values[step].target = f"{place}.{step.target}"
            if isinstance(given, torch.fx.Node):
                node.replace_all_uses_with(given)
                found.setdefault(place.replace(".", "/"), []).append(given)
            for user in list(node.users):  # each takes one of several outputs
                user.replace_all_uses_with(given[user.args[1]])
                graph.erase_node(user)
            graph.erase_node(node)
        for place, inner in {str(node.target): inner for node, inner in nested}.items():
            layers = nn.Module()
            for name, child in inner.named_children():
                layers.add_module(name, child)
            network.add_submodule(place, layers)
    return found


def _layer(tap: str, calls: dict[str, list[torch.fx.Node]]) -> str:
    """The name in the network of the layer that a tap means, alone or inside of nested models."""
    if tap in calls:
        return tap
    if inside := [name for name in calls if name.endswith(f"/{tap}")]:
        if len(inside) > 1:
            raise ValueError(f"{tap!r} is the name of several layers: {', '.join(inside)}.")
        return inside[0]
    for short, full in _SHORT_NAMES:
        if found := re.fullmatch(short, tap):
            name = found.expand(full)
            if any(known == name or known.endswith(f"/{name}") for known in calls):
                return _layer(name, calls)
    near = difflib.get_close_matches(tap, calls, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(f"No layer {tap!r} can be tapped.{hint} Layers: {', '.join(calls)}.")


def _with_axis_moved(value: Tensor, source: int, target: int) -> Tensor:
    return value.movedim(source, target) if value.ndim > 2 else value  # a view
