"""Another image size, or another number of channels, for a network that has its weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import keras
import numpy as np
import torch
from keras import KerasTensor
from keras.layers import Layer

from vggtorch.checks import is_whole
from vggtorch.keras_graph import (
    Functional,
    Node,
    data_format,
    device,
    filled,
    input_structure,
    raw_value,
    torch_dtype,
)
from vggtorch.models import PREPROCESSING_SUFFIX, remember_, remembered, weight_set
from vggtorch.surgery.operations import remove
from vggtorch.surgery.rebuild import MisfitError, Rebuild
from vggtorch.surgery.remaking import state
from vggtorch.surgery.wiring import Wiring, owner
from vggtorch.telling import tell

Shape: TypeAlias = Sequence[int | None]
Rule: TypeAlias = Literal["mean", "sum", "zero", "repeat"] | Callable[[np.ndarray, int], np.ndarray]
RULES = ("mean", "sum", "zero", "repeat")
_OUTSIDE = (
    "Take it out, vt.remove, do in the preparation of the images what it does, and change the "
    "input then."
)


def with_input(
    model: keras.Model,
    shape: Shape | Mapping[str, Shape] | None = None,
    channels: int | None = None,
    rule: Rule = "mean",
) -> Functional:
    """`model` for images of another size or with other channels, all other weights kept.

    With other channels, the first kernel is made by a rule from the old one, which has I:

    - "mean", "sum", "zero": the first I keep their weights, and each channel that is added gets the
      mean of them, their sum, or nothing. Where there are fewer than I, each gets the mean, or the
      sum divided by their number, so that one channel of grey gives by "sum" just what it gave as
      three equal ones; "zero" can't take channels away.
    - "repeat": channel i gets the weights of channel i modulo I, times I over their number, so that
      stacked frames which are all equal give just what one of them gave.
    - a function takes the kernel, (..., I, outputs), and the number of channels, and gives the new
      one.

    A network with other channels expects no weight set's preprocessing any more: it is forgotten,
    and taken out where it was built in, with a warning.

    >>> import vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> vt.with_input(vgg, (64, 96, 3)).output_shape
    (None, 2, 3, 512)
    >>> with_depth = vt.with_input(vgg, channels=4, rule="zero")
    >>> with_depth.input_shape, with_depth.get_layer("block1_conv1").kernel.shape
    ((None, 32, 32, 4), (3, 3, 4, 64))

    Args:
        model: a Functional or Sequential model; it stays as it was.
        shape: of one image, (H, W, C), with None where it is open; a dict of them, by the names of
            the inputs, for a model with several.
        channels: C alone.
        rule: how the first kernel is made for other channels.

    Raises:
        ValueError: neither is given, or the network can't take it: a Dense layer behind Flatten
            knows the size of the map (the message says what to insert), or what first reads the
            image is no convolution or Dense layer.

    Source: "repeat" is timm's `adapt_input_conv`, and inflation in Carreira and Zisserman, CVPR
    2017; "mean" for what is added, Wang et al., ECCV 2016.
    """
    if rule not in RULES and not callable(rule):
        raise ValueError(
            f"with_input expects rule={' | '.join(map(repr, RULES))} or a function, received "
            f"{rule!r}."
        )
    wiring = Wiring(model, "with_input")
    shapes = _shapes(wiring, shape, channels)
    resized = [t for t in wiring.functional.inputs if id(t) in shapes]
    axes = [_channel_axis(wiring.functional, t) for t in resized]
    counts = {(t.shape[a], shapes[id(t)][a]) for t, a in zip(resized, axes, strict=True)}
    other = {(old, new) for old, new in counts if old != new}
    known, kept = weight_set(model), remembered(model)
    built_in = _built_in(wiring) if other else []
    if built_in:
        named = {owner(t): shapes[id(t)] for t in resized}
        wiring = Wiring(remove(model, built_in), "with_input")
        shapes = {id(t): named[owner(t)] for t in wiring.functional.inputs if owner(t) in named}
    rebuild = Rebuild(wiring, shapes=shapes, adapt=lambda old, new: _adapted(old, new, other, rule))
    inputs = input_structure(wiring.functional)
    try:
        result = rebuild.model(wiring, inputs, wiring.functional.output)
    except MisfitError as error:
        raise ValueError(f"{error.found} {_advice(wiring, error.layer, bool(other))}") from error
    if not other:
        return remember_(result, kept) if known else result
    _check_constants(result)
    _check_places(result, {new for _, new in other})
    for graph in Wiring(result, "with_input").all_graphs():
        remember_(graph.model, None)
    if known is not None:
        tell(
            f"{model.name!r} expected the preprocessing of {known!r}, which is for RGB. With other "
            f"channels it no longer remembers it{', and it is taken out' if built_in else ''}: "
            f"preprocess the images yourself, the first three channels as before by "
            f"vt.preprocess(rgb, {known!r})."
        )
    return result


def _channel_axis(graph: Functional, tensor: KerasTensor) -> int:
    """The axis of an input's channels, as the graph's layers have it, or else Keras for images."""
    rank = len(tensor.shape)
    usual = keras.config.image_data_format() if rank == 4 else "channels_last"
    return 1 if rank > 2 and data_format(graph, usual) == "channels_first" else rank - 1


def _shapes(
    wiring: Wiring, shape: Shape | Mapping[str, Shape] | None, channels: int | None
) -> dict[int, tuple[int | None, ...]]:
    """The new shape of each input that gets one, batch included, by its id."""
    inputs = {owner(t): t for t in wiring.functional.inputs}
    if shape is None and channels is None:
        raise ValueError("with_input received neither a shape nor channels.")
    if channels is not None and (_size(channels) or 0) < 1:
        raise ValueError(f"with_input received channels={channels!r}; expected 1 or more.")
    if isinstance(shape, Mapping) and not shape:
        raise ValueError("with_input received a dict of no shapes.")
    if not isinstance(shape, Mapping):
        if len(inputs) != 1:
            raise ValueError(
                f"with_input needs shape={{name: shape}} for a model with several inputs; "
                f"{wiring.model.name!r} has {', '.join(map(repr, inputs))}."
            )
        (name,) = inputs
        shape = {name: inputs[name].shape[1:] if shape is None else shape}
    if unknown := [name for name in shape if name not in inputs]:
        raise ValueError(
            f"{wiring.model.name!r} has no inputs {unknown}; its inputs are "
            f"{', '.join(map(repr, inputs))}."
        )
    return {
        id(inputs[name]): _shape(wiring.functional, inputs[name], one, channels)
        for name, one in shape.items()
    }


def _shape(
    graph: Functional, tensor: KerasTensor, given: Shape, channels: int | None
) -> tuple[int | None, ...]:
    """The new shape of an input, batch included, checked."""
    old, axis = tensor.shape, _channel_axis(graph, tensor)
    numbers = list(given) if isinstance(given, Iterable) else []
    new = [old[0], *map(_size, numbers)]
    if len(new) != len(old) or any(
        n is not None and (now is None or now < 1) for n, now in zip(numbers, new[1:], strict=True)
    ):
        raise ValueError(
            f"with_input received the shape {given!r}; expected {len(old) - 1} numbers from 1, or "
            f"None where it is open, as in {tuple(old[1:])}."
        )
    if channels is not None:
        if new[axis] not in (old[axis], channels):
            raise ValueError(
                f"with_input received channels={channels} and the shape {tuple(given)}, which "
                f"has {new[axis]}."
            )
        new[axis] = int(channels)
    if new[axis] is None and old[axis] is not None:
        raise ValueError(
            f"with_input received the shape {tuple(given)}, whose channels are open; they decide "
            f"how many weights the first layer has."
        )
    return tuple(new)


def _size(number: Any) -> int | None:
    """A whole number of Python's or NumPy's as an int; None for all else."""
    return int(number) if is_whole(number) else None


def _built_in(wiring: Wiring) -> list[str]:
    """The full names of the layers that preprocess inside a model."""
    found = wiring.layers_by_path().items()
    return [path for path, layer in found if layer.name.endswith(PREPROCESSING_SUFFIX)]


def _adapted(
    old: Layer, new: Layer, counts: set[tuple[int | None, int | None]], rule: Rule
) -> dict[int, torch.Tensor] | None:
    """The new kernel of a layer that reads the image, by the id of the old one; None for others."""
    kinds = keras.layers.Conv1D | keras.layers.Conv2D | keras.layers.Conv3D | keras.layers.Dense
    differing = [
        (a, b)
        for a, b in zip(state(old), state(new), strict=True)
        if tuple(a.shape) != tuple(b.shape)
    ]
    if not isinstance(old, kinds) or getattr(old, "groups", 1) != 1 or len(differing) != 1:
        return None
    ((before, after),) = differing
    value = raw_value(before)
    # A quantized kernel has steps that a rule's sums and means don't fall on.
    if (before.shape[-2], after.shape[-2]) not in counts or not value.is_floating_point():
        return None
    made = _kernel(value.detach().double().cpu().numpy(), after.shape[-2], rule)
    return {id(before): torch.from_numpy(np.asarray(made)).to(value)}


def _check_constants(result: keras.Model) -> None:
    """Raise where a layer has numbers of its own for each channel that there was before.

    Keras sees that only when images come, and spreads them where one channel is left.
    """
    for graph in Wiring(result, "with_input").all_graphs():
        for node in graph.nodes:
            layer = node.operation
            if node.is_input:
                continue
            shape = node.input_tensors[0].shape
            if isinstance(layer, keras.layers.Rescaling):
                constants = [layer.scale, layer.offset]
                axes = [_channel_axis(graph.functional, node.input_tensors[0]) - len(shape)]
            elif isinstance(layer, keras.layers.Normalization):
                constants, axes = [layer.mean, layer.variance], [a for a in layer.axis if a]
            else:
                continue
            for constant in constants:
                for axis in (a for a in axes if -np.ndim(constant) <= a < np.ndim(constant)):
                    now, numbers = shape[axis], np.shape(constant)[axis]
                    if numbers not in (1, now):
                        raise ValueError(
                            f"with_input can't give {graph.prefix + layer.name!r} "
                            f"({type(layer).__name__}) {now} channels: it has numbers of its own "
                            f"for each of {numbers}. Take it out, vt.remove, or put another in its "
                            f"place, vt.replace, and change the input then."
                        )


def _kernel(kernel: np.ndarray, channels: int, rule: Rule) -> np.ndarray:
    """A kernel (..., I, outputs) for another number of inputs."""
    inputs = kernel.shape[-2]
    expected = (*kernel.shape[:-2], channels, kernel.shape[-1])
    if callable(rule):
        made = np.asarray(rule(kernel.copy(), channels))
        if made.shape != expected:
            raise ValueError(
                f"with_input received a rule that made a kernel of shape {made.shape} from "
                f"{kernel.shape}; expected {expected}."
            )
        if np.isfinite(kernel).all() and not np.isfinite(made).all():
            raise ValueError("with_input received a rule that made NaN or infinite values.")
        return made
    if rule == "repeat":
        return kernel[..., np.arange(channels) % inputs, :] * (inputs / channels)
    total = kernel.sum(-2, keepdims=True)
    if channels < inputs:
        if rule == "zero":
            raise ValueError(
                f"with_input received rule='zero' and {channels} channels in place of {inputs}: "
                f"it fills channels that are added. Use 'sum' or 'mean'."
            )
        return np.repeat(total / (inputs if rule == "mean" else channels), channels, axis=-2)
    added = {"mean": total / inputs, "sum": total, "zero": np.zeros_like(total)}[rule]
    return np.concatenate([kernel, np.repeat(added, channels - inputs, axis=-2)], axis=-2)


def _advice(wiring: Wiring, layer: Any, channels: bool) -> str:
    """What lets a network take another image, for the layer that can't."""
    if channels and not isinstance(layer, keras.layers.Flatten) and _weighs(layer):
        return (
            "With other channels, kernels are made for convolutions (without groups) and Dense "
            "layers alone, in floating point. Put one before it, vt.insert(model, input name, "
            "keras.layers.Conv2D(3, 1)), or another layer in its place, vt.replace, and change the "
            "input then."
        )
    if channels and not _known(layer):
        return f"It takes the channels one by one. {_OUTSIDE}"
    for graph in wiring.all_graphs():
        for node in graph.nodes:
            if isinstance(node.operation, keras.layers.Flatten):
                tensor = node.input_tensors[0]
                axis = _channel_axis(graph.functional, tensor)
                sizes = tuple(n for i, n in enumerate(tensor.shape) if i not in (0, axis))
                if _weighs(layer) and len(sizes) == 2 and None not in sizes:
                    return (
                        f"{graph.prefix + node.operation.name!r} reads a map of "
                        f"{sizes[0]}x{sizes[1]}. To take other sizes as torchvision does: "
                        f"vt.with_input(vt.insert(model, {graph.prefix + owner(tensor)!r}, "
                        f"keras.layers.AdaptiveAveragePooling2D({sizes})), ...)."
                    )
    return (
        "with_input keeps all layers as they are, and an image of this size doesn't go through "
        "them: take one that does (a larger one, where a map would vanish, or a multiple of what "
        "the network halves), or another layer, vt.replace."
    )


def _weighs(layer: Any) -> bool:
    return isinstance(layer, Layer) and bool(layer.weights)


def _check_places(result: keras.Model, counts: Collection[int | None]) -> None:
    """Raise where something before the first kernels takes channels from their places.

    A rule makes the rows of a kernel by their places in the image. An operation that turns RGB to
    BGR would put an added channel before them, and one that picks three would leave it out.
    """
    for graph in Wiring(result, "with_input").all_graphs():
        inner = graph.functional
        images = {id(t) for t in inner.inputs if t.shape[_channel_axis(inner, t)] in counts}
        for node in graph.nodes:
            read = [t for t in node.input_tensors if id(t) in images]
            if node.is_input or not read or _weighs(node.operation):
                continue
            axis = _channel_axis(inner, read[0])
            if not _known(node.operation) and not _in_place(node, read, axis):
                raise ValueError(
                    f"with_input can't give {graph.prefix + node.operation.name!r} "
                    f"({type(node.operation).__name__}) other channels: it puts them in another "
                    f"order, or in another number, before the first kernel reads them. {_OUTSIDE}"
                )
            images |= {id(t) for t in node.outputs}


def _known(operation: Any) -> bool:
    """Whether it is a layer of Keras, which leaves channels where they are or changes a shape."""
    own = isinstance(operation, keras.layers.Lambda | keras.layers.TorchModuleWrapper)
    plain = isinstance(operation, Layer) and type(operation).__module__.startswith("keras.")
    return plain and not own


def _in_place(node: Node, images: Sequence[KerasTensor], axis: int) -> bool:
    """Whether channel i of what is read is seen in channel i of what is made, and there alone."""
    generator = torch.Generator().manual_seed(0)

    def made_up(tensor: KerasTensor) -> torch.Tensor:
        shape = [2 if i == 0 else n or 16 for i, n in enumerate(tensor.shape)]
        values = torch.rand(shape, generator=generator, device="cpu") * 255
        return values.to(torch_dtype(tensor.dtype)).to(device())

    def run(values: dict[int, torch.Tensor]) -> torch.Tensor:
        args, kwargs = filled(node, values)
        with torch.no_grad():
            return keras.tree.flatten(node.operation(*args, **kwargs))[0]

    count = images[0].shape[axis]
    before = {id(t): made_up(t) for t in node.input_tensors}
    first = run(before)
    if first.ndim != len(images[0].shape) or first.shape[axis] != count:
        return False
    for channel in range(count):
        values = dict(before)
        for tensor in images:
            values[id(tensor)] = before[id(tensor)].clone()
            part = values[id(tensor)].select(axis, channel)
            part.copy_(255 - part)
        seen = (run(values) != first).movedim(axis, 0).flatten(1).any(1)
        seen[channel] = False
        if seen.any():
            return False
    return True
