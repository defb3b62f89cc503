"""A model's weights as torch has them: under which names, and in which order of axes.

Layers of VGG have torchvision's names, where they are a network of torchvision's or a part of one.
All other layers have the names of `to_torch`: `logits.weight` (out, in), `conv.weight`
(O, I, H, W), `bn.running_mean`; of a layer that torch has no counterpart for, Keras's own names and
axes.

Beside torchvision's names a Dense behind a Flatten reads its map as torch flattens it, (C, H, W),
so that the file is right for torchvision's `features` with nn.Flatten and nn.Linear behind it. A
file without torchvision's names is that of `to_torch`, whose Flatten is Keras's, (H, W, C).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import keras
import torch
from keras import layers

from vggtorch import weights
from vggtorch.architectures import FEATURES, LAYERS
from vggtorch.keras_graph import LayerScale, calls, functional
from vggtorch.models.filling import named_variables
from vggtorch.weights import Rule, Shape

_CONVOLUTIONS = (
    layers.Conv1D, layers.Conv2D, layers.Conv3D,
    layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose,
)  # fmt: skip
_NORMS = (
    layers.BatchNormalization, layers.GroupNormalization, layers.LayerNormalization,
    layers.RMSNormalization,
)  # fmt: skip
# What has the features of a flattened map in the same order as its input.
_ELEMENTWISE = (
    layers.Activation, layers.AlphaDropout, layers.BatchNormalization, layers.Dropout, layers.ELU,
    layers.GaussianDropout, layers.GaussianNoise, layers.Identity, layers.LayerNormalization,
    layers.LeakyReLU, layers.PReLU, layers.ReLU, layers.Rescaling, layers.Softmax,
)  # fmt: skip


def torch_rules(model: keras.Model, *, torchvision: bool) -> list[Rule]:
    """Where each of a model's weights stands in torch, by the names of `to_torch`.

    Args:
        model: any model.
        torchvision: the file has torchvision's names too, so that flattened maps are (C, H, W).
    """
    flat = _flat_inputs(model) if torchvision else {}
    places = places_of(model)
    found = []
    for key, variable in named_variables(model).items():
        parts = key.split("/")
        own = tuple(parts[:-1])  # of a model's own weight
        path = next((p for n in range(len(parts), 0, -1) if (p := tuple(parts[:n])) in places), own)
        layer = places.get(path)
        prefix = ".".join(part.replace(".", "_") for part in path)
        tail, shape = "/".join(parts[len(path) :]), tuple(variable.shape)
        found.append(_rule(layer, prefix, key, tail, shape, flat.get(id(layer))))
    return found


def places_of(model: keras.Model, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], keras.Layer]:
    """The layers of a model by their full names, nested models and then the layers in them too."""
    places = {}
    for layer in model.layers:
        place = (*path, layer.name)
        places[place] = layer
        if isinstance(layer, keras.Model):
            places |= places_of(layer, place)
    return places


def rule_of(layer: object, variable: keras.Variable) -> Rule:
    """How the axes of a layer's own variable move to those of the modules that `to_torch` makes."""
    return _rule(layer, "", "", variable.name, tuple(variable.shape), None)


def _rule(
    layer: object, prefix: str, key: str, tail: str, shape: Shape, flat: Shape | None
) -> Rule:
    """The rule of one weight; `flat` is the map (H, W, C) whose values are the layer's inputs."""

    def same(name: str) -> Rule:
        return weights.unmoved(f"{prefix}{name}", key, shape)

    def kernel(name: str, flattened: Shape = ()) -> Rule:
        return weights.kernel(f"{prefix}{name}", key, shape, flattened)

    def depthwise(name: str) -> Rule:
        *spatial, channels, multiplier = shape
        split, order = (channels, multiplier, *spatial), (*range(2, len(shape)), 0, 1)
        torch_shape = (channels * multiplier, 1, *spatial)
        return Rule(f"{prefix}{name}", key, torch_shape, split, order, shape)

    def vector(name: str) -> Rule:
        if flat is None or shape != (prod(flat),):
            return same(name)
        *grid, channels = flat
        order = (*range(1, len(flat)), 0)
        return Rule(f"{prefix}{name}", key, shape, (channels, *grid), order, shape)

    if isinstance(layer, layers.DepthwiseConv1D | layers.DepthwiseConv2D) and tail == "kernel":
        return depthwise(".weight")
    if isinstance(layer, layers.SeparableConv1D | layers.SeparableConv2D):
        if tail == "depthwise_kernel":
            return depthwise("_depthwise.weight")
        return (
            kernel("_pointwise.weight") if tail == "pointwise_kernel" else same("_pointwise.bias")
        )
    if isinstance(layer, (*_CONVOLUTIONS, layers.Dense)) and tail == "kernel":
        return kernel(".weight", flat if flat and shape[0] == prod(flat) else ())
    if isinstance(layer, layers.PReLU):
        count, ones = max(shape), (1,) * (len(shape) - 1)
        if not ones:
            return vector(".weight")
        if shape in ((count, *ones), (*ones, count)):  # one for each channel
            return Rule(f"{prefix}.weight", key, (count,), (count,), (0,), shape)
    if isinstance(layer, _NORMS):
        names = {ours: theirs for theirs, ours in weights.NORM.items()} | {"scale": "weight"}
        return vector(f".{names.get(tail, tail)}")
    if isinstance(layer, layers.TorchModuleWrapper):
        return same(f".{tail}")
    if isinstance(layer, layers.Embedding | LayerScale) and tail in ("embeddings", "gamma"):
        return same(".weight")
    return same(f".{tail.replace('/', '_').replace('.', '_')}")


def _flat_inputs(model: keras.Model) -> dict[int, Shape]:
    """The map (H, W, C) that stands flattened before a layer, by the layer's id."""
    found: dict[int, Shape] = {}

    def walk(graph: keras.Function, maps: dict[int, Shape]) -> Shape | None:
        for call in calls(graph):
            if len(call.input_tensors) != 1 or len(call.outputs) != 1:
                continue
            layer, (x,), (y,) = call.operation, call.input_tensors, call.outputs
            before, inner = maps.get(id(x)), functional(layer)
            flattens = isinstance(layer, layers.Flatten | layers.Reshape) and len(y.shape) == 2
            if inner is not None:
                after = walk(inner, {id(inner.inputs[0]): before} if before else {})
            elif flattens and len(x.shape) > 2:
                after = _flattened(layer, tuple(x.shape[1:]))
            elif before is not None:
                found[id(layer)] = before
                after = before if isinstance(layer, _ELEMENTWISE) else None
            else:
                continue
            if after is not None:
                maps[id(y)] = after
        return maps.get(id(graph.outputs[0]))

    graph = functional(model)
    if graph is not None:
        walk(graph, {})
    return found


def _flattened(layer: keras.Layer, size: tuple[int | None, ...]) -> Shape | None:
    """The order, channels last, in which a layer flattens a map; None where torch has the same."""
    last = getattr(layer, "data_format", keras.config.image_data_format()) == "channels_last"
    if not last and isinstance(layer, layers.Reshape):  # (C, H, W) as it stands
        return None
    known = tuple(n for n in size if n is not None)
    if len(known) < len(size):
        return None
    return known if last else (*known[1:], known[0])  # Keras flattens (H, W, C) from (C, H, W) too


def in_torch_form(
    model: keras.Model, tensors: Mapping[str, torch.Tensor], *, timm: bool = False
) -> dict[str, torch.Tensor]:
    """A model's named tensors by torchvision's (or timm's) names, and to_torch's for other layers.

    Raises:
        ValueError: a layer whose name would be taken for something else when it is read.
    """
    part = _torchvision_part(tensors)
    convert = weights.keras_to_timm if timm else weights.keras_to_torchvision
    state = convert({key: tensors[key] for key in part}) if part else {}
    theirs = set(state)
    for rule in torch_rules(model, torchvision=bool(part)):
        if rule.keras_key in part:
            continue
        taken = rule.torch_key in state
        state[rule.torch_key] = rule.to_torch(tensors[rule.keras_key])
        if taken or not weights.is_plain_name(rule.torch_key, theirs, state):
            raise ValueError(
                f"The layer {rule.keras_key.rsplit('/', 1)[0]!r} has a name that would be taken "
                f"for another layer's, or for a wrapper's, in a file of torch's form. Rename it, "
                f"or save to .safetensors or .weights.h5, which keep Keras's names."
            )
    return weights.with_counters(state)


def _torchvision_part(tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """The weights that torchvision has names for: a whole VGG, a part, or its convolutions."""
    for names in (LAYERS, FEATURES):
        part = {k: tuple(t.shape) for k, t in tensors.items() if k.split("/")[0] in names}
        if weights.identify(part):
            return set(part)
    return set()
