"""Weights into models and out of them by layer name, and checkpoints from one form into another."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from os import PathLike
from pathlib import Path

import keras
import torch

from vggtorch import files, weights
from vggtorch.architectures import ARCHITECTURES, CLASSES, GRID, WIDTHS, architecture_named
from vggtorch.models.filling import (
    VGG_LAYERS,
    check_fit,
    fill_,
    named_variables,
    path_of,
    tensors_of,
)
from vggtorch.models.memory import remember_, weight_set
from vggtorch.models.vgg import constructor
from vggtorch.weights import Shape


def load_weights(model: keras.Model, source: str | PathLike) -> keras.Model:
    """Load weights into a model by layer name, in place; also into keras.applications' own.

    A model that was cut takes its part of a published checkpoint, and layers that were added to it
    keep their values. Nothing is changed unless everything fits.

    Args:
        model: any Keras model with VGG's layers, or the one that a file was saved from.
        source: `imagenet`, `features`, `oxford`, or the path of a checkpoint.

    Returns:
        The model, which from now on remembers the weight set.

    Raises:
        ValueError: names or shapes that differ (with both lists), or a damaged file.
        OSError: the checkpoint can't be had.

    Example:
        >>> import tempfile
        >>> import vggtorch as vt
        >>> first, second = (vt.VGG11(weights=None, include_top=False) for _ in range(2))
        >>> part = vt.truncate(second, "block1_pool")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vt.save_weights(vt.truncate(first, "block2_pool"), f"{folder}/two.safetensors")
        ...     part = vt.load_weights(part, f"{folder}/two.safetensors")  # takes what it has
        >>> bool((part.get_weights()[0] == first.get_weights()[0]).all())
        True
    """
    variables = named_variables(model)
    shapes = {
        key: tuple(variable.shape)
        for key, variable in variables.items()
        if key.split("/")[0] in VGG_LAYERS
    }
    candidates = weights.identify(shapes) or list(ARCHITECTURES.values())
    candidates = [a for a in candidates if a.name == model.name] or candidates
    include_top = any(key.startswith(("fc1/", "fc2/", "predictions/")) for key in shapes)
    tensors, weight_set = tensors_of(source, candidates, include_top=include_top)
    check_fit(variables, tensors, source)
    for key, variable in variables.items():
        if key in tensors:
            variable.assign(tensors[key])
    remember_(model, weight_set)
    return model


def save_weights(model: keras.Model, path: str | PathLike) -> None:
    """Save a model's weights; the ending chooses the form.

    Args:
        model: any Keras model; for .pth and .bin, VGG layers only.
        path: `.safetensors` (Keras names, weight set kept), `.weights.h5` (Keras 3's own form),
            `.pth` (torchvision's keys and layout) or `.bin` (timm's).

    Raises:
        ValueError: another ending, or layers that torchvision has no keys for.
        OSError: the file can't be written; one that stood there before is then still whole.

    Example:
        >>> import tempfile, torch
        >>> import vggtorch as vt
        >>> model = vt.truncate(vt.VGG11(weights=None, include_top=False), "block1_pool")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     vt.save_weights(model, f"{folder}/block1.pth")
        ...     list(torch.load(f"{folder}/block1.pth"))  # torchvision's names
        ['features.0.weight', 'features.0.bias']
    """
    if str(path).endswith(".weights.h5"):
        with files.atomic(path) as temporary:
            model.save_weights(temporary)
    else:
        tensors = {key: variable.value for key, variable in named_variables(model).items()}
        _write(path, tensors, weight_set(model))


def _write(
    path: str | PathLike, tensors: Mapping[str, torch.Tensor], weight_set: str | None
) -> None:
    """Write Keras-named tensors by the names that the ending asks for."""
    weights.write(path, _renamed(path, tensors), weight_set)


def _renamed(
    path: str | PathLike, tensors: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Keras-named tensors as they are, or as torchvision's (.pth) or timm's (.bin)."""
    if str(path).endswith(".pth"):
        return weights.keras_to_torchvision(tensors)
    if str(path).endswith(".bin"):
        return weights.keras_to_timm(tensors)
    return tensors


def convert(
    source: str | PathLike, target: str | PathLike, architecture: str | None = None
) -> list[tuple[str, Shape, str, Shape]]:
    """Write a checkpoint in another form.

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
    checkpoint = weights.read(path_of(source, [architecture_named(architecture or "vgg16")]))
    tensors = weights.to_keras(checkpoint.tensors, checkpoint.form)
    network = weights.architecture_of(tensors, architecture)
    order = [rule.keras_key for rule in weights.rules(network, include_top=True)]
    tensors = {key: tensors[key] for key in order if key in tensors}
    if str(target).endswith((".h5", ".keras")):
        # Keras orders these forms by the layers of a model, so one is built around the tensors.
        grid, classes = GRID, CLASSES
        if top := "predictions/bias" in tensors:
            grid = isqrt(tensors["fc1/kernel"].shape[0] // WIDTHS[-1])
            classes = len(tensors["predictions/bias"])
        size = grid * 2 ** len(WIDTHS)
        with keras.device("meta"):
            model = constructor(network.name)(
                weights=None, include_top=top, classes=classes, input_shape=(size, size, 3)
            )
        check_fit(named_variables(model), tensors, source)
        remember_(fill_(model, tensors), checkpoint.weight_set)
        if str(target).endswith(".weights.h5"):
            save_weights(model, target)
        else:
            with files.atomic(target) as temporary:
                model.save(temporary)
    else:
        _write(target, tensors, checkpoint.weight_set)
    before = weights.traced(
        checkpoint.tensors, lambda read: weights.to_keras(read, checkpoint.form)
    )
    after = weights.traced(tensors, lambda read: _renamed(target, read))
    written = _renamed(target, tensors)
    return [
        (name, tuple(checkpoint.tensors[name].shape), key, tuple(written[key].shape))
        for key in after
        for name in [before[after[key]]]
    ]


def model_from_name(name: str | PathLike) -> keras.Model:
    """A model to look at: a network by its name, with random weights, or a .keras file.

    Raises:
        ValueError: neither of the two.
    """
    if str(name) in ARCHITECTURES:
        return constructor(str(name))(weights=None)
    if not Path(name).is_file():
        raise ValueError(
            f"Received {str(name)!r}; expected one of {', '.join(ARCHITECTURES)} or a .keras file."
        )
    return keras.saving.load_model(name)
