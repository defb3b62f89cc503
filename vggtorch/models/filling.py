"""A model's variables by name, the tensors that belong to them, and how they get them.

Both `vgg`, which builds models around a checkpoint, and `loading`, which loads into models that
exist, go this way: `tensors_of` a weight set or a file, `check_fit`, then values.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import keras
import torch

from vggtorch import weights
from vggtorch.architectures import ARCHITECTURES, Architecture
from vggtorch.keras_graph import (
    all_layers,
    device,
    raw_value,
    reset_seed_,
    seed_generators,
    set_value_,
    torch_dtype,
    track_variables_,
)
from vggtorch.weight_sets import WEIGHT_SETS

VGG_LAYERS = frozenset(
    layer.name
    for architecture in ARCHITECTURES.values()
    for layer in (*architecture.features(), *architecture.classifier())
)


def named_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """A model's weights by name: `layer/variable`, with the nested model's name before it.

    Trainable weights and state such as moving means; random seeds are not weights.

    Example:
        >>> import vggtorch as vt
        >>> variables = vt.named_variables(vt.VGG11(weights=None, include_top=False))
        >>> list(variables)[:2], variables["block1_conv1/kernel"].shape
        (['block1_conv1/kernel', 'block1_conv1/bias'], (3, 3, 3, 64))
    """
    named = {}
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            inner = named_variables(layer)
            named.update({f"{layer.name}/{key}": variable for key, variable in inner.items()})
        else:
            for variable in layer.weights:
                tail = variable.path.split(f"{layer.name}/", 1)[-1]
                named[f"{layer.name}/{tail}"] = variable
    return named


def fill_(model: keras.Model, tensors: Mapping[str, torch.Tensor]) -> keras.Model:
    """Give a model that was built on the meta device its values, in place, without copying them.

    Layers that have values, such as those before the user's `input_tensor`, keep them.

    Args:
        model: built under `keras.device("meta")`.
        tensors: a tensor for each of `named_variables(model)` that has no value; the variables
            share their memory where the tensors are already on Keras's device and of the
            variable's dtype.
    """
    for key, variable in named_variables(model).items():
        if raw_value(variable).is_meta:
            value = tensors[key].to(device=device(), dtype=torch_dtype(variable.dtype))
            set_value_(variable, value, requires_grad=variable.trainable)
    layers = all_layers(model)
    for generator in (g for layer in layers for g in seed_generators(layer)):
        if raw_value(generator.state).is_meta:
            reset_seed_(generator)
    for layer in layers:
        track_variables_(layer)
    return model


def tensors_of(
    source: str | PathLike, candidates: list[Architecture], *, include_top: bool = False
) -> tuple[dict[str, torch.Tensor], str | None]:
    """The Keras-named tensors of a weight set or a file, and which weight set they are."""
    checkpoint = weights.converted(path_of(source, candidates, include_top=include_top))
    return checkpoint.tensors, checkpoint.weight_set


def path_of(
    source: str | PathLike, candidates: list[Architecture], *, include_top: bool = False
) -> Path:
    """The file of a weight set, or of a path that exists."""
    if isinstance(source, str) and source in WEIGHT_SETS:
        published = [a for a in candidates if weights.publications(source, a.name)] or candidates
        if len(published) > 1:
            names = ", ".join(a.name for a in published)
            raise ValueError(
                f"This model may be a part of any of {names}, so weights={source!r} could mean "
                f"several files. Give the model the name of its network, or pass a path."
            )
        return weights.find(source, published[0].name, include_top=include_top)
    if not Path(source).exists():
        raise ValueError(
            f"Received weights={str(source)!r}; expected one of {', '.join(WEIGHT_SETS)} or "
            f"the path of an existing file."
        )
    return Path(source)


def check_fit(
    variables: Mapping[str, keras.Variable],
    tensors: Mapping[str, torch.Tensor],
    source: str | PathLike,
) -> None:
    """Check that `tensors` are the weights of `variables`, or raise ValueError with the lists.

    A published VGG checkpoint may go beyond a model that was cut out of its network, and knows
    nothing of layers that the user added; apart from that every name must be on both sides.
    """
    in_file = list(dict.fromkeys(key.rsplit("/", 1)[0] for key in tensors))
    in_model = {key.rsplit("/", 1)[0] for key in variables}
    shared = [i for i, layer in enumerate(in_file) if layer in in_model]
    if not shared:
        raise ValueError(
            f"No layer of the model is in {str(source)!r}. The file has "
            f"{weights.shortened(in_file)}; the model has {weights.shortened(in_model)}. "
            f"If the network is nested in the model, load it by itself: "
            f"load_weights(model.get_layer(name), ...)."
        )
    beyond = {*in_file[: shared[0]], *in_file[shared[-1] + 1 :]} & VGG_LAYERS
    published = VGG_LAYERS.issuperset(in_file)
    missing = [
        key
        for key in variables
        if key not in tensors and not (published and key.rsplit("/", 1)[0] not in VGG_LAYERS)
    ]
    unexpected = [
        key for key in tensors if key not in variables and key.rsplit("/", 1)[0] not in beyond
    ]
    differing = [
        f"{key} has {tuple(tensors[key].shape)}, expected {tuple(variables[key].shape)}"
        for key in variables
        if key in tensors and tuple(tensors[key].shape) != tuple(variables[key].shape)
    ]
    if not (missing or unexpected or differing):
        return
    advice = ""
    if missing and all(key.split("/")[0] in ("fc1", "fc2", "predictions") for key in missing):
        advice = " It has no classifier: build the model with include_top=False."
    raise ValueError(
        f"{str(source)!r} does not fit the model. "
        f"Missing in the file: {weights.shortened(missing) or 'none'}. "
        f"Unexpected in the file: {weights.shortened(unexpected) or 'none'}. "
        f"Shapes that differ: {weights.shortened(differing) or 'none'}.{advice}"
    )
