"""Surgery on a model as a whole: nested models dissolved, and layers under other names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import keras
from keras import KerasTensor

from vggtorch.keras_graph import Functional, functional, input_structure, producer
from vggtorch.models import remember_, remembered
from vggtorch.surgery.naming import flat_names, names_by_id
from vggtorch.surgery.rebuild import Rebuild
from vggtorch.surgery.wiring import Wiring, owner


def flatten(model: keras.Model) -> Functional:
    """`model` with all nested Functional and Sequential models dissolved into one graph.

    What was shared stays shared: the layers of a nested model that is called twice are called
    twice. Layers keep their names; where several have one, those of nested models get the names of
    their models before it, `left_block1_conv1`. Models that run code of their own stay layers.

    >>> import keras, vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> model = keras.Sequential([vgg, keras.layers.Flatten(), keras.layers.Dense(2)])
    >>> [layer.name for layer in vt.flatten(model).layers][1:4]
    ['block1_conv1', 'block1_conv2', 'block1_pool']

    Raises:
        ValueError: the model isn't a graph of layers, or a nested model is called in a way that
            its layers can't be called in: with a mask of its own, or an input of another rank.
    """
    wiring = Wiring(model, "flatten")
    rebuild = Rebuild(wiring, names=flat_names(wiring), dissolves=True)
    result = rebuild.model(wiring, input_structure(wiring.functional), wiring.functional.output)
    return remember_(result, remembered(model))


def names_when_flat(model: keras.Model, names: Iterable[str], verb: str) -> list[str]:
    """What layers are called once `flatten` has dissolved what is nested; of a model, all of its.

    Args:
        model: any model that is a graph of layers.
        names: full names such as "vgg16/block5_conv3", or shorter ones that are clear.
        verb: the function that is called, for errors.

    Raises:
        ValueError: a layer isn't there, or a name could be that of several.
    """
    wiring = Wiring(model, verb)
    flat = flat_names(wiring)
    found = []
    for name in names:
        place, own = wiring.find(name)
        layer = place.operations[own]
        inside = [layer]
        if functional(layer) is not None:
            inside = [
                operation
                for graph in place.inside(own).all_graphs()
                for operation in graph.operations.values()
                if functional(operation) is None
            ]
        found += [flat.get(id(part), part.name) for part in inside]
    return found


def rename(model: keras.Model, names: Mapping[str, str] | str) -> Functional:
    """`model` with other names for its layers, from which the names of its weights come.

    `names` has the new name for the old one, which may be a full name such as
    "vgg16/block5_conv3"; the new one is the layer's own. A text is written before the names of all
    of the model's own layers (those of a nested model stay as they are, behind its new name). Two
    networks with different prefixes can be parts of one model.

    >>> import vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> left = vt.rename(vgg, "left_")
    >>> left.layers[1].name, list(vt.named_variables(left))[0]
    ('left_block1_conv1', 'left_block1_conv1/kernel')
    >>> vt.rename(vgg, {"block5_conv3": "last"}).get_layer("last").kernel.path
    'last/kernel'

    Raises:
        ValueError: no layer has an old name, or several would have one new name.
    """
    wiring = Wiring(model, "rename")
    wanted = names_by_id(wiring, names)
    inputs = input_structure(wiring.functional)
    if isinstance(inputs, dict):  # Keras wants its keys to be the names of the inputs
        inputs = {
            wanted.get(id(producer(part)), key) if _is_named(part, key) else key: part
            for key, part in inputs.items()
        }
    return Rebuild(wiring, names=wanted).model(wiring, inputs, wiring.functional.output)


def _is_named(part: Any, key: str) -> bool:
    """Whether a part of a model's inputs is one input, called by its key."""
    return isinstance(part, KerasTensor) and owner(part) == key
