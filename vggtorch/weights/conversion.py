"""Pure maps between torchvision's tensors and Keras's: tensors in, tensors out.

Every tensor has one `Rule`: view, permute, view. The way back is derived from the same rule, so a
round trip is exact to the bit. Keras tensors are named `layer/variable` ("block1_conv1/kernel").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import isqrt, prod
from typing import Literal

import torch

from vggtorch.architectures import (
    ARCHITECTURES,
    CLASSES,
    GRID,
    HIDDEN,
    WIDTHS,
    Architecture,
    Layer,
    architecture_named,
)
from vggtorch.text import visible

Shape = tuple[int, ...]
TORCHVISION = re.compile(r"(?:features|classifier)\.\d+\.\w+$")  # torchvision's names of weights
_INSIDE = re.compile(r"(.+)\.features\.\d+\.\w+$")  # the same, of one network among several


@dataclass(frozen=True)
class Rule:
    """Where one tensor stands on both sides, and how its axes move.

    Attributes:
        torch_key: name in torchvision's state_dict.
        keras_key: `layer/variable` in Keras.
        torch_shape: shape in torchvision.
        split: `torch_shape` with every axis that moves on its own made explicit.
        order: the permutation of `split`'s axes that gives Keras's order.
        keras_shape: shape in Keras.
    """

    torch_key: str
    keras_key: str
    torch_shape: Shape
    split: Shape
    order: Shape
    keras_shape: Shape

    def to_view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Keras's view of a torchvision tensor, fc1's kernel not flattened yet: (H, W, C, O)."""
        return tensor.reshape(self.split).permute(self.order)

    def to_torch(self, tensor: torch.Tensor) -> torch.Tensor:
        """Torchvision's view of a Keras tensor, flattened or not; the inverse of `to_view`."""
        permuted = [self.split[axis] for axis in self.order]
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return tensor.reshape(permuted).permute(inverse).reshape(self.torch_shape)


def unmoved(torch_key: str, keras_key: str, shape: Shape) -> Rule:
    """The rule of a tensor that has the same axes on both sides."""
    return Rule(torch_key, keras_key, shape, shape, tuple(range(len(shape))), shape)


def kernel(torch_key: str, keras_key: str, shape: Shape, flattened: Shape = ()) -> Rule:
    """The rule of a kernel, (..., I, O) in Keras and (O, I, ...) in torch.

    Where a matrix (in, out) reads a map (H, W, C) that is `flattened`, torch flattens (C, H, W).
    """
    axes = (*flattened, shape[-1]) if flattened else shape
    split, order = (*axes[:-3:-1], *axes[:-2]), (*range(2, len(axes)), 1, 0)
    return Rule(torch_key, keras_key, shape[::-1] if flattened else split, split, order, shape)


# The weights of a batch norm: torch's name -> Keras's.
NORM = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
_VECTORS = {"conv": {"bias": "bias"}, "dense": {"bias": "bias"}, "batch_norm": NORM, "pool": {}}


def _layer_rules(layer: Layer, grid: int) -> Iterable[Rule]:
    out, path, name = layer.outputs, layer.torch_path, layer.name
    if layer.kind == "conv":
        yield kernel(f"{path}.weight", f"{name}/kernel", (3, 3, layer.inputs, out))
    elif layer.kind == "dense":
        last_map = (grid, grid, WIDTHS[-1]) if name == "fc1" else ()
        yield kernel(f"{path}.weight", f"{name}/kernel", (layer.inputs, out), last_map)
    for theirs, ours in _VECTORS[layer.kind].items():
        yield unmoved(f"{path}.{theirs}", f"{name}/{ours}", (out,))


def rules(
    architecture: Architecture, *, include_top: bool, classes: int = CLASSES, grid: int = GRID
) -> list[Rule]:
    """The rules of one network in its order; fc1 flattens a map of `grid` by `grid` pixels."""
    layers = list(architecture.features())
    if include_top:
        layers += architecture.classifier(classes, grid)
    return [rule for layer in layers for rule in _layer_rules(layer, grid)]


def shortened(names: Iterable[str], most: int = 8) -> str:
    """A list of names for an error message, cut after `most`."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(visible, names[:most])) + more


@dataclass(frozen=True)
class _Candidate:
    """One network held against the tensors at hand: its rules by name, and what does not fit."""

    architecture: Architecture
    table: dict[str, Rule]
    unexpected: list[str]
    missing: list[str]
    differing: list[str]

    @property
    def misfits(self) -> int:
        return len(self.unexpected) + len(self.missing) + len(self.differing)


def _candidates(shapes: Mapping[str, Shape], side: Literal["torch", "keras"]) -> list[_Candidate]:
    """Every network held against `shapes`, the best fit first."""
    # The classifier's sizes are free: they follow the image size and the number of classes.
    names, axis = ("classifier.0.weight", "classifier.6.weight", "classifier.6.bias"), 0
    if side == "keras":
        names, axis = ("fc1/kernel", "predictions/kernel", "predictions/bias"), -1
    fc1, last, bias = (shapes.get(name, ()) for name in names)
    classes = (last or bias or (CLASSES,))[axis]
    grid = isqrt(prod(fc1) // (HIDDEN * WIDTHS[-1])) if len(fc1) == 2 else GRID
    found = []
    for architecture in ARCHITECTURES.values():
        all_rules = rules(architecture, include_top=True, classes=classes, grid=max(1, grid))
        table = {getattr(rule, f"{side}_key"): rule for rule in all_rules}
        differing = []
        for key in sorted(shapes.keys() & table.keys()):
            expected = getattr(table[key], f"{side}_shape")
            if shapes[key] != expected:
                differing.append(f"{key} has {shapes[key]}, expected {expected}")
        unexpected = sorted(shapes.keys() - table.keys())
        # A network may be cut at either end; a gap in its middle means that it is another one.
        present = [i for i, key in enumerate(table) if key in shapes]
        run = list(table)[present[0] : present[-1] + 1] if present else list(table)
        missing = [key for key in run if key not in shapes]
        found.append(_Candidate(architecture, table, unexpected, missing, differing))
    # Among those that fit, the one with the fewest tensors beyond `shapes` is the most likely.
    return sorted(found, key=lambda c: (c.misfits, len(c.table)))


def identify(shapes: Mapping[str, Shape]) -> list[Architecture]:
    """The networks that Keras tensors of these names and shapes can belong to; none to no tensors.

    A part of a network, such as a truncated one, can belong to several; the smallest comes first.
    """
    return [c.architecture for c in _candidates(shapes, "keras") if shapes and not c.misfits]


def _choose(
    shapes: Mapping[str, Shape], side: Literal["torch", "keras"], architecture: str | None = None
) -> _Candidate:
    """The network that the tensors belong to; ValueError with both lists where they fit none."""
    if architecture is not None:
        architecture_named(architecture)
    if not shapes:
        raise ValueError("Received no tensors; expected the weights of a VGG network.")
    chosen = next(
        c for c in _candidates(shapes, side) if architecture in (None, c.architecture.name)
    )
    if chosen.misfits:
        wanted = architecture or f"any VGG network; the nearest is {chosen.architecture.name}"
        raise ValueError(
            f"These tensors are not those of {wanted}. "
            f"Unexpected: {shortened(chosen.unexpected) or 'none'}. "
            f"Missing: {shortened(chosen.missing) or 'none'}. "
            f"Shapes that differ: {shortened(chosen.differing) or 'none'}."
        )
    return chosen


def keras_to_torchvision(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keras's named tensors as torchvision's, whole networks or parts of one.

    They are views where possible: convolutions (O, I, 3, 3), matrices (out, in).

    Raises:
        ValueError: tensors that have no place in the network, or other shapes, with both lists.
    """
    table = _choose(_shapes(tensors), "keras").table
    return with_counters(
        {rule.torch_key: rule.to_torch(tensors[k]) for k, rule in table.items() if k in tensors}
    )


def with_counters(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state_dict with what torch's batch norms count, which Keras does not have, at 0."""
    counted = {}
    for key, tensor in state.items():
        counted[key] = tensor
        if key.endswith(".running_var"):
            count = tensor.new_zeros((), dtype=torch.int64)
            counted[f"{key.removesuffix('running_var')}num_batches_tracked"] = count
    return counted


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, Shape]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def architecture_of(
    tensors: Mapping[str, torch.Tensor], architecture: str | None = None
) -> Architecture:
    """The network that Keras-named tensors belong to; ValueError where they fit none, or not it."""
    return _choose(_shapes(tensors), "keras", architecture).architecture


def to_keras(tensors: Mapping[str, torch.Tensor], form: str) -> dict[str, torch.Tensor]:
    """The tensors of any checkpoint that `sources.read` reads as Keras's named tensors.

    Args:
        tensors: as the file names them.
        form: whose names these are: `keras`, `torchvision`, `timm`, `torch` or `onnx`.

    Raises:
        ValueError: tensors that fit no VGG network.
    """
    views = to_views(tensors, form)
    return views if form == "keras" else flattened(views)


def flattened(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keras's tensors with fc1's kernel, (H, W, C, O) before, flattened to (in, O).

    A view where the output channels stand first in memory, as in a converted copy. They do so in
    the result in any case: that is the order in which a matrix product reads.
    """
    kernel = tensors.get("fc1/kernel")
    if kernel is None or kernel.ndim != 4:
        return dict(tensors)
    return {**tensors, "fc1/kernel": kernel.movedim(-1, 0).flatten(1).movedim(0, -1)}


def to_views(tensors: Mapping[str, torch.Tensor], form: str) -> dict[str, torch.Tensor]:
    """As `to_keras`, but nothing is copied: fc1's kernel stays (H, W, C, O), see `flattened`."""
    if form == "keras":
        return dict(tensors)
    if form == "timm":
        tensors = _timm_to_torchvision(tensors)
    elif form == "onnx":
        return _views(_onnx_to_torchvision(tensors))
    kept = {k: v for k, v in tensors.items() if not k.endswith(".num_batches_tracked")}
    side_by_side = {match[1]: "" for key in kept if (match := _INSIDE.match(key))}
    if side_by_side:
        return _networks(kept, list(side_by_side))
    vgg = {key for key in kept if TORCHVISION.match(key)}
    if _fitting({key: kept[key] for key in vgg}) is None:  # a classifier of the user's own
        vgg = {key for key in vgg if key.startswith("features.")}
        vgg -= _appended(_shapes({key: kept[key] for key in vgg}))
    converted = _views({key: kept[key] for key in vgg}) if vgg else {}
    return converted | {key: tensor for key, tensor in kept.items() if key not in vgg}


def _networks(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> dict[str, torch.Tensor]:
    """As `to_views`, of networks that stand side by side: `left/block1_conv1/kernel`."""
    views: dict[str, torch.Tensor] = {}
    left = dict(tensors)
    for name in names:
        inside = [key for key in left if key.startswith(f"{name}.")]
        one = {key.removeprefix(f"{name}."): left.pop(key) for key in inside}
        for key, tensor in flattened(to_views(one, "torchvision")).items():
            known = "/" in key
            views[f"{name.replace('.', '/')}/{key}" if known else f"{name}.{key}"] = tensor
    return views | left


def _appended(shapes: Mapping[str, Shape]) -> set[str]:
    """What follows the last layer of a network in its numbered row, as detectors append layers."""
    for candidate in _candidates(shapes, "torch"):
        last = max(map(_number, candidate.table))
        behind = all(_number(key) > last for key in candidate.unexpected)
        if behind and not candidate.missing and not candidate.differing:
            return set(candidate.unexpected)
    return set()


def _number(key: str) -> int:
    kind, number, _ = key.split(".")
    return int(number) if kind == "features" else -1


def _fitting(tensors: Mapping[str, torch.Tensor]) -> dict[str, Rule] | None:
    """The rules of a network that has all of torchvision's names and shapes, and perhaps more.

    None where there is none, or where a gap leaves open which of several it is.
    """
    shapes = _shapes(tensors)
    found = [c for c in _candidates(shapes, "torch") if not (c.unexpected or c.differing)]
    named = {tuple(c.table[key].keras_key for key in shapes) for c in found}
    return found[0].table if len(named) == 1 or (found and not found[0].missing) else None


def _views(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Torchvision's named tensors as Keras's, fc1's kernel not flattened yet.

    A convolution may have other numbers of channels than the network's own has. Whether the model
    that they go into has the same ones is seen there.

    Raises ValueError, with both lists, where they are not those of a network.
    """
    table, shapes = _fitting(tensors), _shapes(tensors)
    if table is None:
        nearest = min(_candidates(shapes, "torch"), key=lambda c: c.misfits - len(c.differing))
        table = {key: rule for key, rule in nearest.table.items() if key in tensors}
        if (
            nearest.unexpected
            or nearest.missing
            or any(key.startswith("classifier") for key in tensors)
            or any(len(shapes[key]) != len(rule.split) for key, rule in table.items())
        ):
            _choose(shapes, "torch")  # which raises
        table = {key: replace(rule, split=shapes[key]) for key, rule in table.items()}
    return {r.keras_key: r.to_view(tensors[key]) for key, r in table.items() if key in tensors}


def traced(
    tensors: Mapping[str, torch.Tensor],
    convert: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]],
) -> dict[str, str]:
    """Each name that a map gives -> the name that its tensor had before.

    Found by sending numbers in the tensors' shapes, which take no memory, through the map itself.
    What it adds of its own, `num_batches_tracked`, is left out.
    """
    names = dict(enumerate(tensors, 1))
    numbers = {name: torch.tensor(i).expand(tensors[name].shape) for i, name in names.items()}
    came = {key: int(tensor[(0,) * tensor.ndim]) for key, tensor in convert(numbers).items()}
    return {key: names[i] for key, i in came.items() if i}


# The layers of the classifier by timm's names, whose fc1 and fc2 are convolutions.
_TIMM = {
    "pre_logits.fc1": "classifier.0",
    "pre_logits.fc2": "classifier.3",
    "head.fc": "classifier.6",
}


def _timm_to_torchvision(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's names as torchvision's, and its kernels of (4096, 512, 7, 7) as matrices."""
    renamed = {}
    for key, tensor in tensors.items():
        layer = key.rpartition(".")[0]
        flat = layer in _TIMM and tensor.ndim > 1
        renamed[_TIMM.get(layer, layer) + key.removeprefix(layer)] = (
            tensor.flatten(1) if flat else tensor
        )
    return renamed


def keras_to_timm(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keras's named tensors as timm's; raises ValueError as `keras_to_torchvision` does."""
    names = {ours: theirs for theirs, ours in _TIMM.items()}
    channels = {"classifier.0.weight": WIDTHS[-1], "classifier.3.weight": HIDDEN}
    renamed = {}
    for key, tensor in keras_to_torchvision(tensors).items():
        if inputs := channels.get(key):
            grid = isqrt(tensor.shape[1] // inputs)
            tensor = tensor.reshape(-1, inputs, grid, grid)  # (O, I) -> (O, C, H, W)
        layer = key.rpartition(".")[0]
        renamed[names.get(layer, layer) + key.removeprefix(layer)] = tensor
    return renamed


def _onnx_to_torchvision(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A graph's layers, which have an order and no names that we know, as torchvision's."""
    count = sum(key.startswith("conv") and key.endswith(".weight") for key in tensors)
    plain = {sum(a.depths): a for a in ARCHITECTURES.values() if not a.batch_norm}
    if count not in plain:
        raise ValueError(
            f"Received a graph with {count} convolutions; expected 8, 10, 13 or 16, as VGG11, 13, "
            f"16 and 19 have."
        )
    names = [*(f"conv{i}" for i in range(count)), "dense0", "dense1", "dense2"]
    layers = (*plain[count].features(), *plain[count].classifier())
    paths = dict(zip(names, (x.torch_path for x in layers if x.kind != "pool"), strict=True))
    renamed = {}
    for key, tensor in tensors.items():
        layer, _, variable = key.partition(".")
        if layer in paths:
            renamed[f"{paths[layer]}.{variable}"] = tensor
    return renamed
