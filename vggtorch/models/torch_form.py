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

from collections.abc import Iterator, Mapping
from math import prod

import keras
import torch
from keras import layers

from vggtorch import weights
from vggtorch.keras_graph import LayerScale, calls, functional
from vggtorch.models.filling import VGG_LAYERS, named_variables
from vggtorch.models.rows import FEATURES
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
    places = dict(places_of(model, ()))
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


def places_of(
    model: keras.Model, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], object]]:
    """The layers of a model that are no models, those of nested models too, by their full names."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from places_of(layer, (*path, layer.name))
        yield (*path, layer.name), layer


def rule_of(layer: object, variable: keras.Variable) -> Rule:
    """How the axes of a layer's own variable move to those of the modules that `to_torch` makes."""
    return _rule(layer, "", "", variable.name, tuple(variable.shape), None)


def _rule(
    layer: object, prefix: str, key: str, tail: str, shape: Shape, flat: Shape | None
) -> Rule:
    """The rule of one weight; `flat` is the map (H, W, C) whose values are the layer's inputs."""

    def rule(name: str, split: Shape, order: Shape, torch_shape: Shape | None = None) -> Rule:
        return Rule(f"{prefix}{name}", key, torch_shape or split, split, order, shape)

    def same(name: str) -> Rule:
        return weights.unmoved(f"{prefix}{name}", key, shape)

    def vector(name: str) -> Rule:
        if flat is None or shape != (prod(flat),):
            return same(name)
        *grid, channels = flat
        return rule(name, (channels, *grid), (*range(1, len(flat)), 0), shape)

    def depthwise(name: str) -> Rule:
        *spatial, channels, multiplier = shape
        split = (channels, multiplier, *spatial)
        return rule(
            name, split, (*range(2, len(split)), 0, 1), (channels * multiplier, 1, *spatial)
        )

    rank = len(shape)
    # The last two axes exchanged and brought to the front: (..., I, O) -> (O, I, ...).
    reversed_shape, order = (*shape[:-3:-1], *shape[:-2]), (*range(2, rank), 1, 0)
    if isinstance(layer, layers.DepthwiseConv1D | layers.DepthwiseConv2D) and tail == "kernel":
        return depthwise(".weight")
    if isinstance(layer, layers.SeparableConv1D | layers.SeparableConv2D):
        if tail == "depthwise_kernel":
            return depthwise("_depthwise.weight")
        if tail == "pointwise_kernel":
            return rule("_pointwise.weight", reversed_shape, order)
        if tail == "bias":
            return vector("_pointwise.bias")
    if isinstance(layer, layers.Dense) and tail == "kernel" and flat and shape[0] == prod(flat):
        *grid, channels = flat
        split, units = (shape[1], channels, *grid), shape[::-1]
        return rule(".weight", split, (*range(2, len(split)), 1, 0), units)
    if isinstance(layer, (*_CONVOLUTIONS, layers.Dense)) and tail == "kernel":
        return rule(".weight", reversed_shape, order)
    if isinstance(layer, layers.PReLU) and tail == "alpha":
        count, ones = max(shape), (1,) * (rank - 1)
        if rank == 1:
            return vector(".weight")
        if shape in ((count, *ones), (*ones, count)):  # one for each channel
            return rule(".weight", (count,), (0,))
    if isinstance(layer, _NORMS):
        names = {"gamma": "weight", "beta": "bias", "scale": "weight"}
        names |= {"moving_mean": "running_mean", "moving_variance": "running_var"}
        return vector(f".{names.get(tail, tail)}")
    if isinstance(layer, layers.TorchModuleWrapper):
        return same(f".{tail}")
    if isinstance(layer, layers.Embedding | LayerScale) and tail in ("embeddings", "gamma"):
        return same(".weight")
    plain = tail.replace("/", "_").replace(".", "_")
    return same(f".{plain}")


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


def in_torch_form(model: keras.Model, *, timm: bool = False) -> dict[str, torch.Tensor]:
    """A model's weights by torchvision's names (or timm's), and by `to_torch`'s where it has none.

    Raises:
        ValueError: a layer whose name would be taken for something else when it is read.
    """
    tensors = {key: variable.value for key, variable in named_variables(model).items()}
    part = _torchvision_part(tensors)
    convert = weights.keras_to_timm if timm else weights.keras_to_torchvision
    state = convert({key: tensors[key] for key in part}) if part else {}
    theirs = set(state)
    for rule in torch_rules(model, torchvision=bool(part)):
        if rule.keras_key in part:
            continue
        if rule.torch_key in state:
            raise _unclear(rule.keras_key)
        state[rule.torch_key] = rule.to_torch(tensors[rule.keras_key])
        if rule.torch_key.endswith(".running_var"):
            module = rule.torch_key.removesuffix(".running_var")
            state[f"{module}.num_batches_tracked"] = torch.tensor(0)
        if not weights.is_plain_name(rule.torch_key, theirs, state):
            raise _unclear(rule.keras_key)
    return state


def names_in_torch(model: keras.Model, *, timm: bool = False) -> dict[str, str]:
    """The names that `in_torch_form` gives -> those of the model's weights."""
    tensors = {key: variable.value for key, variable in named_variables(model).items()}
    part = _torchvision_part(tensors)
    convert = weights.keras_to_timm if timm else weights.keras_to_torchvision
    vgg = {key: tensor for key, tensor in tensors.items() if key in part}
    names = weights.traced(vgg, convert) if vgg else {}
    rules = torch_rules(model, torchvision=bool(part))
    return names | {r.torch_key: r.keras_key for r in rules if r.keras_key not in part}


def _torchvision_part(tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """The weights that torchvision has names for: a whole VGG, a part, or its convolutions."""
    for names in (VGG_LAYERS, FEATURES):
        part = {k: tuple(t.shape) for k, t in tensors.items() if k.split("/")[0] in names}
        if weights.identify(part):
            return set(part)
    return set()


def _unclear(key: str) -> ValueError:
    return ValueError(
        f"The layer {key.rsplit('/', 1)[0]!r} has a name that would be taken for another layer's, "
        f"or for a wrapper's, in a file of torch's form. Rename it, or save to .safetensors or "
        f".weights.h5, which keep Keras's names."
    )
