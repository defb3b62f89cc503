"""Checkpoints from one form into another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import isqrt
from os import PathLike

import keras
import torch

from vggtorch import files, paths, weights
from vggtorch.architectures import CLASSES, FEATURES, GRID, WIDTHS, architecture_named
from vggtorch.keras_graph import warn_of_older_form
from vggtorch.models.filling import named_variables, path_of
from vggtorch.models.leftovers import fill_from_
from vggtorch.models.loading import ENDINGS, MODELS, load_model, save_weights
from vggtorch.models.memory import remembered
from vggtorch.models.torch_form import in_torch_form
from vggtorch.models.vgg import constructor
from vggtorch.weights import Shape


def _renamed(
    path: str | PathLike, tensors: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """VGG's Keras-named tensors as they are, or as torchvision's (.pth) or timm's (.bin)."""
    if str(path).endswith(".pth"):
        return weights.keras_to_torchvision(tensors)
    if str(path).endswith(".bin"):
        return weights.keras_to_timm(tensors)
    return tensors


def convert(
    source: str | PathLike, target: str | PathLike, architecture: str | None = None
) -> list[tuple[str, Shape, str, Shape]]:
    """Write a checkpoint in another form.

    A file of weights alone can be that of a VGG network, or of a part of one: what kinds of layers
    others are it does not say. A whole model, `.keras` or Keras's `.h5`, can be any.

    Args:
        source: a weight set or a checkpoint of any form that can be read.
        target: the ending chooses the form: `.safetensors`, `.pth` (torchvision's names), `.bin`
            (timm's), `.weights.h5`, or with the network around the weights `.keras` or `.h5`.
        architecture: a name in ARCHITECTURES; recognised from the tensors where it isn't given.

    Returns:
        Name and shape in the source, name and shape in the target of each tensor, in network order.

    Raises:
        ValueError: the source fits no network, or not this one, or the target has another ending.
        OSError: the source can't be had or the target can't be written.
    """
    if isinstance(source, str | PathLike):
        paths.check_weights(source, "")
    path = path_of(source, [architecture_named(architecture or "vgg16")])
    checkpoint = weights.read(path, whole_numbers=True)
    tensors = weights.to_keras(checkpoint.tensors, checkpoint.form)
    try:
        network = weights.architecture_of(tensors, architecture)
    except ValueError as error:
        if architecture is None and checkpoint.whole:
            return _convert_model(path, target)
        raise ValueError(
            f"{error} A file of weights does not say what kinds of layers others are; a model that "
            f"was saved whole (.keras) does, and can be converted (where you have the model: "
            f"vt.load_weights(model, source), then vt.save_weights(model, target))."
        ) from error
    order = [rule.keras_key for rule in weights.rules(network, include_top=True)]
    tensors = {key: tensors[key] for key in order if key in tensors}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{source}: {key} has dtype {tensor.dtype}, expected floating point.")
    written = _renamed(target, tensors)
    if str(target).endswith((".h5", ".keras")):
        # Keras orders these forms by the layers of a model, so one is built around the tensors.
        grid, classes = GRID, len(tensors.get("predictions/bias", ()))
        if "fc1/kernel" in tensors:
            grid = isqrt(tensors["fc1/kernel"].shape[0] // WIDTHS[-1])
        size, top = grid * 2 ** len(WIDTHS), list(tensors)[-1].partition("/")[0]
        with keras.device("meta"):
            model = constructor(network.name)(
                weights=None,
                include_top=top not in FEATURES,
                classes=classes or CLASSES,
                input_shape=(size, size, 3),
            )
            if top in ("fc1", "fc2"):
                model = keras.Model(model.input, model.get_layer(top).output, name=model.name)
        keras_named = replace(checkpoint, form="keras", tensors=tensors)
        fill_from_(model, keras_named, source, classes=classes)
        _save(model, target)
    else:
        weights.write(target, written, checkpoint.weight_set, checkpoint.data_config)
    before = weights.traced(
        checkpoint.tensors, lambda read: weights.to_keras(read, checkpoint.form)
    )
    after = weights.traced(tensors, lambda read: _renamed(target, read))
    names = {before[keras_key]: new for new, keras_key in after.items()}
    return _listed(checkpoint.tensors, names, written)


def _convert_model(
    source: str | PathLike, target: str | PathLike
) -> list[tuple[str, Shape, str, Shape]]:
    """As `convert`, of a model that was saved whole."""
    model = load_model(source)
    tensors = {key: variable.value for key, variable in named_variables(model).items()}
    written, names = tensors, {key: key for key in tensors}
    if str(target).endswith((".pth", ".bin")):
        in_torch = partial(in_torch_form, model, timm=str(target).endswith(".bin"))
        written = in_torch(tensors)
        traced = {old: new for new, old in weights.traced(tensors, in_torch).items()}
        names = {key: traced[key] for key in tensors}
    _save(model, target)
    return _listed(tensors, names, written)


def _listed(
    read: Mapping[str, torch.Tensor], names: Mapping[str, str], written: Mapping[str, torch.Tensor]
) -> list[tuple[str, Shape, str, Shape]]:
    """Name and shape of each tensor as it was read and as it was written."""
    return [
        (old, tuple(read[old].shape), new, tuple(written[new].shape)) for old, new in names.items()
    ]


def _save(model: keras.Model, target: str | PathLike) -> None:
    """Write a model whole where the ending is that of Keras's forms, and else its weights."""
    if str(target).endswith(ENDINGS) or not str(target).endswith(MODELS):
        save_weights(model, target)
        return
    with files.atomic(target) as temporary:
        keras.saving.save_model(model, temporary)
    warn_of_older_form(target, remembered(model))
