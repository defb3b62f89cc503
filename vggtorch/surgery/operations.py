"""Cut, extend and rearrange a Keras model by layer name: Model -> new Model.

The model that comes in stays exactly as it was. The result stands alone: it has layers of its own
(made from the old ones' configs), values of its own (each tensor copied once, in its memory
layout), the old names, and one node for each call of a layer, so that it can be cut again, saved,
cloned and run by torch. It isn't compiled, whatever the input was. It keeps the input's class, and
with it the weight set whose preprocessing it expects.

New layers are used as they are: after `replace(model, names, new)`, `new` is the layer in the
result. They must therefore be fresh: a layer that was called before is refused. A new layer whose
automatic name is taken is renamed; one whose chosen name is taken is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import keras
import torch
from keras import KerasTensor as Tensor
from keras.layers import Layer, TorchModuleWrapper

from vggtorch.keras_graph import Functional, calls_of, producing_call
from vggtorch.surgery.built_in import (
    forget_before_,
    forget_images_,
    forget_preprocessing_,
    refuse_half,
    with_flips,
)
from vggtorch.surgery.composition import compose_
from vggtorch.surgery.copying import copy_
from vggtorch.surgery.crossing import Crossing
from vggtorch.surgery.distillation import distill_
from vggtorch.surgery.masks import reads
from vggtorch.surgery.splicing import Change, rebuilt, splice
from vggtorch.surgery.wiring import Wiring, distinct, layer_names, owner
from vggtorch.telling import tell

New: TypeAlias = Layer | torch.nn.Module | Sequence[Layer | torch.nn.Module]


def truncate(
    model: keras.Model, layers: str | Sequence[str], *, start: str | None = None
) -> Functional:
    """The part of `model` that computes the outputs of `layers`, as a model of its own.

    One name gives one output, a list of names a list of outputs in that order. With `start`, the
    part begins after that layer: the tensor it puts out is the new model's input. If that is no
    image any more, the weight set is forgotten, with a warning. Inputs that are no longer needed
    are dropped.

    >>> import vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> vt.truncate(vgg, "block2_pool").output_shape
    (None, 8, 8, 128)
    >>> [layer.name for layer in vt.truncate(vgg, "block2_conv1", start="block1_conv2").layers]
    ['block1_conv2_output', 'block1_pool', 'block2_conv1']

    Raises:
        ValueError: an unknown name, a layer with several outputs, or a `start` that some path to
            `layers` goes around.
    """
    wiring = Wiring(model, "truncate")
    names = layer_names(layers, "truncate")
    outputs = [wiring.output_of(name) for name in names]
    for name, tensor in zip(names, outputs, strict=True):
        if producing_call(tensor).is_input:
            raise ValueError(f"truncate at {name!r} leaves no layer: {name!r} is an input.")
    ends = outputs[0] if isinstance(layers, str) else outputs
    if start is None:
        return rebuilt(wiring, wiring.inputs_of(outputs), ends)
    begin = wiring.output_of(start)
    refuse_half(wiring, begin)
    wiring.check_cut(begin, dict(zip(names, outputs, strict=True)))
    result = rebuilt(wiring, begin, ends)
    forget_images_(result, wiring, begin)
    return result


def stack(model: keras.Model, head: New) -> Functional:
    """`model` with `head` on top of its output.

    `head` is a layer, a list of layers, a model (which becomes one layer of the result), or a
    torch.nn.Module. A torch module sees what the layer below puts out (channels last, unless that
    was flattened) and is pickled whole when the result is saved, so that loading it needs
    `keras.saving.load_model(path, safe_mode=False)`.

    >>> import keras, vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10, name="classes")]
    >>> vt.stack(vgg, head).output_shape
    (None, 10)

    Raises:
        ValueError: the model has several outputs, or the head can't take its output.
    """
    wiring = Wiring(model, "stack")
    if len(wiring.outputs) != 1:
        names = ", ".join(repr(owner(t)) for t in wiring.outputs)
        raise ValueError(
            f"stack needs a model with one output; {model.name!r} has {len(wiring.outputs)} "
            f"({names}). Cut it to one first: truncate(model, name)."
        )
    (output,) = wiring.outputs
    return splice(wiring, [(wiring, [(output, output)], _new_layers(wiring, head))])


def insert(model: keras.Model, after: str, layers: New) -> Functional:
    """`model` with new layers after the layer `after`, for all that read its output.

    Where `after` is called several times, the new layers follow each call and are shared as it is.
    New layers that read the images before all others make the model forget its weight set, with a
    warning, unless they leave colours alone.

    >>> import keras, vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> result = vt.insert(vgg, "block1_pool", keras.layers.BatchNormalization(name="block1_norm"))
    >>> [layer.name for layer in result.layers][3:6]
    ['block1_pool', 'block1_norm', 'block2_conv1']

    Raises:
        ValueError: what follows can't take the new layers' output.
    """
    wiring = Wiring(model, "insert")
    place, name = wiring.find(after)
    pairs = [(t, t) for t in place.outputs_of(name)]
    added = _new_layers(wiring, layers)
    result = splice(wiring, [(place, pairs, added)])
    forget_before_(result, place, added)
    return result


def remove(model: keras.Model, layers: str | Iterable[str]) -> Functional:
    """`model` without `layers`: what read one of them reads what it read.

    A block with branches can go as a whole, all its layers named, if it has one way in.

    >>> import vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> result = vt.remove(vgg, ["block4_conv2", "block4_conv3"])
    >>> [layer.name for layer in result.layers if layer.name.startswith("block4")]
    ['block4_conv1', 'block4_pool']

    Raises:
        ValueError: a layer joins several tensors or is an input, or what follows can't take the
            tensor that it would now get.
    """
    wiring = Wiring(model, "remove")
    named: dict[int, tuple[Wiring, list[str]]] = {}
    for name in layer_names(layers, "remove"):
        place, own = wiring.find(name)
        named.setdefault(id(place.model), (place, []))[1].append(own)
    return splice(wiring, [(place, _bypasses(place, own), ()) for place, own in named.values()])


def _bypasses(place: Wiring, names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """What each layer of one graph puts out, with what is read instead once it is gone."""
    nodes = [node for group in with_flips(place, place.nodes_of(names)) for node in group]
    bypass: dict[int, Tensor] = {}
    pairs = []
    for node in nodes:
        sources = distinct(bypass.get(id(t), t) for t in reads(node))
        if len(sources) != 1:
            joined = ", ".join(repr(owner(t)) for t in sources)
            raise ValueError(
                f"remove can't take out {place.prefix + node.operation.name!r}: it joins "
                f"{len(sources)} tensors (from {joined}), and what follows could read only one. "
                f"Remove the whole block with one way in, or replace it."
            )
        for tensor in node.outputs:
            bypass[id(tensor)] = sources[0]
            pairs.append((tensor, sources[0]))
    if all(producing_call(bypass.get(id(t), t)).is_input for t in place.outputs):
        raise ValueError(f"remove would leave no layer of {place.model.name!r} but its inputs.")
    return pairs


def replace(
    model: keras.Model,
    layers: str | Iterable[str],
    new: New,
    *,
    init: Literal["compose", "copy", "distill"] | None = None,
    images: Any = None,
) -> Functional:
    """`model` with `new` in place of `layers`, all other weights kept.

    `layers` is one layer, or a set of layers with one way in and one way out (branches between
    them included, if all their layers are named). Where one layer is called several times, `new`
    replaces each call and is shared as it was. Layers may stand in a nested model and around it,
    "vgg16/block5_conv3" and "head", say: `new` then stands where the last of them stood.

    With `init=None`, `new` keeps the weights it has, or its random ones. "copy" gives
    the new layers the weights of the replaced ones, in their order and by equal shapes: for other
    strides, dilation, padding or activation, for layers without weights between them, and for
    Flatten and Dense as convolutions, or back. "compose" gives a single new layer the product of
    the linear layers that it replaces. "distill" then trains the new
    layers alone, on a few hundred preprocessed `images` (N, H, W, C) without labels, until the
    layers behind them see what they saw before: `distill_` with its defaults, two minutes at most.
    To learn how well the result matches, call `compose_` or `distill_` on what `init=None` gives:
    they say it.

    >>> import keras, vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> new = keras.layers.Conv2D(64, 5, padding="same", activation="relu", name="block1_conv")
    >>> result = vt.replace(vgg, ["block1_conv1", "block1_conv2"], new)
    >>> [layer.name for layer in result.layers][1:3]
    ['block1_conv', 'block1_pool']

    Raises:
        ValueError: the set has more than one way in or out (the message names the edges), or what
            follows can't take what `new` puts out (it gives both shapes); "compose" or "copy" and
            weights that don't fit.
    """
    if init not in (None, "compose", "copy", "distill"):
        raise ValueError(
            f"replace expects init=None, 'compose', 'copy' or 'distill', received {init!r}."
        )
    if (images is not None) != (init == "distill"):
        raise ValueError(
            f"replace expects images with init='distill' and only there; received init={init!r} "
            f"{'without' if images is None else 'with'} images."
        )
    wiring = Wiring(model, "replace")
    names = layer_names(layers, "replace")
    added = _new_layers(wiring, new)
    if init == "compose" and len(added) != 1:
        raise ValueError(
            f"replace with init='compose' needs one new layer, received {len(added)}: what one "
            f"chain composes to can't be shared out among several."
        )
    if len({id(wiring.find(name)[0].model) for name in names}) > 1:
        crossing = Crossing(wiring, names, added)
        changes, place, nodes = crossing.changes, crossing.place, crossing.replaced
        graphs = crossing.graphs()
    else:
        place = wiring.find(names[0])[0]
        groups = with_flips(place, place.nodes_of([wiring.find(name)[1] for name in names]))
        if len(names) > 1:
            groups = [[node for group in groups for node in group]]
        changes = [(place, [place.way_through(group) for group in groups], added)]
        nodes, graphs = [node for group in groups for node in group], [place]
    replaced = list(dict.fromkeys(node.operation for node in nodes))
    result = splice(wiring, changes)
    for graph in graphs:
        forget_preprocessing_(result, graph, replaced)
    if init == "copy":
        copy_(replaced, added)
    elif init == "compose":
        composition = compose_(replaced, added[0])
        if composition.settings:
            tell(
                f"replace with init='compose' gives something else than the layers that it "
                f"replaces: {'; '.join(composition.settings)}. Other settings of "
                f"{added[0].name!r} (use_bias, padding, activation) keep that."
            )
    elif init == "distill":
        distill_(model, result, [place.prefix + layer.name for layer in added], images)
    return result


def replace_where(
    model: keras.Model,
    where: type[Layer] | tuple[type[Layer], ...] | Callable[[Layer], bool],
    make: Callable[[Layer], New],
    *,
    init: Literal["copy"] | None = None,
) -> Functional:
    """`model` with new layers in place of every layer that matches, in one rebuild.

    Layers of nested models match too. A layer that is called several times is made once, and the
    new ones are shared as it was. What `make` returns may have the old layer's name.

    >>> import keras, vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> def average(pool):
    ...     return keras.layers.AveragePooling2D(pool.pool_size, name=pool.name)
    >>> result = vt.replace_where(vgg, keras.layers.MaxPooling2D, average)
    >>> type(result.get_layer("block3_pool")).__name__
    'AveragePooling2D'

    Args:
        model: a Functional or Sequential model; it stays as it was.
        where: a class of layers, several of them, or a function that says whether a layer matches.
        make: gives, for a layer that matches, the new layer or layers in its place, as `replace`
            takes them.
        init: "copy" gives the new layers the weights of the one that they replace, as in
            `replace`; with None they keep those they have.

    Raises:
        ValueError: nothing matches, or one of the layers can't be replaced by what `make` gave.
    """
    if init not in (None, "copy"):
        raise ValueError(f"replace_where expects init=None or 'copy', received {init!r}.")
    if not callable(make):
        raise ValueError(
            f"replace_where expects a function that makes a new layer of the old one, received "
            f"{make!r}."
        )
    wiring = Wiring(model, "replace_where")
    matches, what = _matching(where)
    changes: list[Change] = []
    replaced: dict[str, Layer] = {}
    for path, layer in wiring.layers_by_path().items():
        if not isinstance(layer, Layer) or isinstance(layer, keras.layers.InputLayer):
            continue
        # A shared layer has several paths, and one in a model that goes as a whole goes with it.
        known = layer in replaced.values() or any(path.startswith(f"{x}/") for x in replaced)
        if known or not matches(layer):
            continue
        place, name = wiring.find(path)
        groups = with_flips(place, place.nodes_of([name]))
        made = make(layer)
        if made is None:
            raise ValueError(
                f"replace_where received a function that returned None for {path!r}, not a new "
                f"layer. Let the condition say which layers stay as they are; to take layers out: "
                f"vt.remove."
            )
        added = _new_layers(wiring, made, f" for {path!r}")
        earlier = [layer for _, _, others in changes for layer in others]
        if twice := [layer for layer in added if any(layer is other for other in earlier)]:
            raise ValueError(
                f"replace_where received a function that returned the layer {twice[0].name!r} for "
                f"several layers, which would share it. Let it make a new one for each."
            )
        changes.append((place, [place.way_through(group) for group in groups], added))
        replaced[path] = layer
    if not changes:
        raise ValueError(
            f"replace_where finds no {what} in {model.name!r}: nothing to replace. "
            f"{wiring.listed()}"
        )
    result = splice(wiring, changes)
    for (place, _, new), old in zip(changes, replaced.values(), strict=True):
        forget_preprocessing_(result, place, [old])
        if init == "copy":
            copy_([old], new)
    return result


def _matching(where: Any) -> tuple[Callable[[Layer], bool], str]:
    """A condition on layers as a function, and what it looks for in words."""
    classes = where if isinstance(where, tuple) else (where,)
    if classes and all(isinstance(c, type) and issubclass(c, Layer) for c in classes):
        names = " or ".join(c.__name__ for c in classes)
        return lambda layer: isinstance(layer, classes), f"{names} layer"
    if isinstance(where, type | Layer) or not callable(where):
        raise ValueError(
            f"replace_where expects a class of layers, a tuple of classes, or a function that says "
            f"whether a layer matches; received {where!r}. To replace layers by name: vt.replace."
        )
    name = getattr(where, "__name__", repr(where))
    return lambda layer: bool(where(layer)), f"layer that {name} is true of"


def _new_layers(wiring: Wiring, new: New, purpose: str = "") -> list[Layer]:
    """The new layers as a list, each checked to be fresh."""
    layers = list(new) if isinstance(new, (list, tuple)) else [new]
    if not layers:
        raise ValueError(f"{wiring.verb} received no layers{purpose}.")
    made = []
    for layer in layers:
        if isinstance(layer, torch.nn.Module) and not isinstance(layer, Layer):
            layer = TorchModuleWrapper(layer)
        if not isinstance(layer, Layer) or isinstance(layer, keras.layers.InputLayer):
            raise ValueError(
                f"{wiring.verb} expects Keras layers, a Keras model or a torch.nn.Module, received "
                f"{layer!r}."
            )
        if calls_of(layer) or layer is wiring.model:
            raise ValueError(
                f"The layer {layer.name!r} has been called before and belongs to another model; "
                f"the result would share it. Pass a new layer, for example "
                f"type(layer).from_config(layer.get_config())."
            )
        made.append(layer)
    return made
