"""The original and the network in work, as torch networks that return the maps to be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import keras
import numpy as np
import torch
from keras import KerasTensor
from torch import Tensor, nn

from vggtorch.compression.deletion import THROUGH
from vggtorch.compression.photographs import Photographs
from vggtorch.compression.sites import Site, find_sites, run_once
from vggtorch.files import first_line
from vggtorch.keras_graph import calls, graph_of, operation_copy, producer, producing_call
from vggtorch.lowering import network_of
from vggtorch.measuring import operation_counter
from vggtorch.surgery import cosines, packed, remade, unfit_images

COMPARED = 16  # whole images for the cosines that are returned
BATCH = 8  # of crops
OTHER_PRECISIONS = ("float16", "float64")  # how names of dtypes end: bfloat16 too


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

    @property
    def device(self) -> torch.device:
        """Where they compute."""
        return next(self.original.parameters()).device

    def install_(self, modules: Mapping[Site, nn.Module]) -> None:
        """Put modules into the network in work, in the place of layers."""
        for site, module in modules.items():
            setattr(self.work, site.child, module.to(self.device))

    @contextmanager
    def trying(self, modules: Mapping[Site, nn.Module]) -> Iterator[nn.Module]:
        """The network in work with modules in the place of the original's layers, for a while."""
        self.install_(modules)
        yield self.work
        self.install_({site: getattr(self.original, site.child) for site in modules})

    def maps(self, x: Tensor) -> list[Tensor]:
        """The original's maps of a batch."""
        with torch.no_grad():
            return list(self.original(x))


def networks_of(model: keras.Model, images: Photographs, keep: Sequence[str]) -> Networks:
    """Make both torch networks of a Keras model, with memory of their own, in float32."""
    model = _in_float32(model)
    taps = _taps(model)
    original = _lowered(model, taps).to(memory_format=torch.channels_last)
    for parameter in original.parameters():
        parameter.requires_grad_(False)
    example = images.held_out[:1]
    counter = operation_counter()
    try:
        with counter:
            maps = run_once(original, example)
    except (RuntimeError, ValueError) as error:
        raise unfit_images(model, example, error) from error
    if not all(torch.isfinite(y).all() for y in maps):
        raise ValueError(
            f"{model.name!r} gives NaN or infinite values for these images: look at its weights, "
            f"and at whether the images are preprocessed as it expects."
        )
    sites, depthwise = find_sites(model, original, keep)
    work = torch.fx.GraphModule(original, original.graph).eval()
    return Networks(
        original,
        work,
        _names(taps),
        len(model.outputs),
        tuple(sites),
        tuple(depthwise),
        counter.get_total_flops() // 2,
        tuple(example.shape[1:]),
    )


def _in_float32(model: keras.Model) -> keras.Model:
    """The model itself, or where something in it has another precision, one where nothing has.

    Closed forms and small steps need more digits than half a float32 has.
    """
    dtypes = {d for layer in model.layers for d in (layer.compute_dtype, layer.variable_dtype)}
    dtypes |= {t.dtype for node in calls(graph_of(model, "compress")) for t in node.outputs}
    if not (wrong := sorted(dtype for dtype in dtypes if dtype.endswith(OTHER_PRECISIONS))):
        return model

    def wide(layer: keras.Operation) -> keras.Operation:
        if isinstance(layer, keras.Layer):
            return remade(layer, dtype="float32")
        copied = operation_copy(layer)
        if str(getattr(copied, "dtype", "")).endswith(OTHER_PRECISIONS):
            copied.dtype = "float32"  # of a cast
        return copied

    try:
        clone = keras.models.clone_model(model, clone_function=wide)
        clone.set_weights([np.asarray(weights, "float32") for weights in model.get_weights()])
        if others := [v.path for v in clone.variables if v.dtype in ("float16", "bfloat16")]:
            raise TypeError(f"{others[0]} has a dtype of its own")
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"compress works in float32, and {model.name!r}, with layers of {', '.join(wrong)}, "
            f"can't be made again so: {first_line(error)}"
        ) from error
    return clone


def _taps(model: keras.Model) -> list[KerasTensor]:
    """The maps of a model that are compared.

    These are what pools put out, what enters a convolution with strides, and the outputs. Of a
    depthwise one, whose channels may go, what enters the layer that makes them. Of layers that are
    called several times, whose name stands for all of these maps, none but the outputs; what enters
    such a pool stands for what it puts out.
    """
    outputs = list(model.outputs)
    ends = {id(t) for t in outputs}
    nodes = calls(graph_of(model, "compress"))
    times = Counter(node.operation.name for node in nodes)
    found: dict[int, KerasTensor] = {}
    for node in nodes:
        layer = node.operation
        if node.is_input or np.max(getattr(layer, "strides", None) or 1) == 1:
            continue
        pools = hasattr(layer, "pool_size") and times[layer.name] == 1
        tensor = node.outputs[0] if pools else node.input_tensors[0]
        depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
        passed = THROUGH if depthwise else keras.layers.ZeroPadding2D
        while isinstance(producer(tensor), passed):
            tensor = producing_call(tensor).input_tensors[0]
        if depthwise and isinstance(producer(tensor), keras.layers.Conv2D):
            tensor = producing_call(tensor).input_tensors[0]
        maker = producer(tensor)
        named = not isinstance(maker, keras.layers.InputLayer) and times[maker.name] == 1
        if named and id(tensor) not in ends:
            found[id(tensor)] = tensor
    return [*found.values(), *outputs]


def _names(taps: Sequence[KerasTensor]) -> tuple[str, ...]:
    """The layers that make maps, numbered where one layer makes several."""
    names: list[str] = []
    for tensor in taps:
        name = str(producer(tensor).name)
        same = sum(producer(t).name == name for t in taps[: len(names)])
        names.append(f"{name} {same + 1}" if same else name)
    return tuple(names)


def likeness(networks: Networks, other: nn.Module, images: Tensor) -> dict[str, float]:
    """Cosine between the original's maps and another network's, by tap; the mean over images."""
    sums = dict.fromkeys(networks.taps, 0.0)
    images = packed(images[:COMPARED])
    with torch.no_grad():
        for batch in images.split(BATCH // 4):  # whole images are that much larger
            maps = networks.original(batch), other(batch)
            for name, a, b in zip(networks.taps, *maps, strict=True):
                sums[name] += float(cosines(a, b).sum())
    return {name: value / len(images) for name, value in sums.items()}


def tapped_result(model: keras.Model, networks: Networks) -> nn.Module:
    """A result as a torch network that returns the same maps, in float32 as the original does."""
    model = _in_float32(model)
    made = {node.operation.name: node.outputs[0] for node in calls(graph_of(model, "compress"))}
    inner = networks.taps[: -networks.ends]
    return _lowered(model, [*(made[name] for name in inner), *model.outputs])


def _lowered(model: keras.Model, taps: list[KerasTensor]) -> torch.fx.GraphModule:
    """A torch network with memory of its own that returns a list of these maps."""
    # A keras.Function, unlike a keras.Model, returns a list of one map as a list.
    graph = keras.Function(model.inputs[0], taps)
    return network_of(graph, model.name, data_format="channels_first", share=False).eval()
