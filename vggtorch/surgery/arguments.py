"""What is handed over to show a network what it sees, and how long that may take, checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Real
from typing import Any

import keras
import numpy as np
import torch

from vggtorch.checks import is_whole, whole
from vggtorch.files import first_line


def checked_images(images: Any, original: keras.Model, fewest: int = 10) -> np.ndarray:
    """Images that are to show a network what it sees, as one float32 array.

    They may be one array or tensor, or several: images, or batches of them as a loader gives them.

    Raises:
        ValueError: they are fewer than `fewest`, all the same, of several shapes or of another than
            the model takes, not finite, or no images at all; or the model has several inputs.
    """
    if len(original.inputs) != 1:
        raise ValueError(f"Received a model with {len(original.inputs)} inputs; expected one.")
    shape = tuple(original.inputs[0].shape)
    arrays = [_array(item) for item in _items(images)]
    if arrays and all(array.ndim == len(shape) for array in arrays):  # batches
        arrays = [image for batch in arrays for image in batch]
    if len(arrays) < fewest:
        raise ValueError(f"Received {len(arrays)} images; expected {fewest} at least, better 100.")
    if len(shapes := sorted({array.shape for array in arrays})) > 1:
        raise ValueError(
            f"Received images of {len(shapes)} shapes, such as {shapes[0]} and {shapes[1]}; "
            f"expected one: preprocess them to one size."
        )
    stacked = np.stack(arrays)
    if stacked.ndim != len(shape) or any(
        a not in (None, b) for a, b in zip(shape, stacked.shape, strict=True)
    ):
        raise ValueError(
            f"Received images of shape {stacked.shape}; expected {shape}, preprocessed as the "
            f"model expects."
        )
    if not np.isfinite(stacked).all():
        raise ValueError("Received images with NaN or infinite values; leave those out.")
    if all(np.array_equal(stacked[0], image) for image in stacked[1:]):
        raise ValueError(
            f"Received {len(stacked)} images that are all the same; expected images of the kind "
            f"that the network is to see."
        )
    return stacked


def _items(images: Any) -> list[Any]:
    if isinstance(images, Mapping):
        raise ValueError(
            f"Received a {type(images).__name__} for images; expected an array or tensor "
            f"(N, H, W, C), or several of images: list(images.values()), say."
        )
    named = [images] if isinstance(images, str | os.PathLike) else images
    try:
        items = list(named)
    except TypeError as error:
        raise ValueError(
            f"Received {type(images).__name__} for images; expected an array or tensor "
            f"(N, H, W, C), or several of images."
        ) from error
    if any(isinstance(item, str | os.PathLike) for item in items):
        raise ValueError(
            f"Received the path {str(items[0])!r} for images; expected preprocessed images. "
            f"vt.preprocess([path, ...], model) reads files."
        )
    return items


def _array(item: Any) -> np.ndarray:
    if isinstance(item, tuple | list | dict) and not _is_of_numbers(item):
        raise ValueError(
            f"Received a {type(item).__name__} of {len(item)} for an image; expected an array or "
            f"tensor. Leave labels out: [image for image, label in data]."
        )
    try:
        return np.asarray(keras.ops.convert_to_numpy(item), np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Received {type(item).__name__} for an image; expected an array or tensor of numbers."
        ) from error


def _is_of_numbers(item: Any) -> bool:
    """Whether nested lists hold nothing but numbers, so that they are an array."""
    while isinstance(item, list | tuple) and item:
        item = item[0]
    return isinstance(item, Real)


def unfit_images(model: keras.Model, images: torch.Tensor, error: Exception) -> ValueError:
    """The error for images (N, C, H, W) whose size a model can't take."""
    return ValueError(
        f"{model.name!r} can't compute images of shape {tuple(images.shape[1:])} (C, H, W): "
        f"{first_line(error)}"
    )


def checked_effort(steps: Any, seconds: Any, seed: Any) -> None:
    """Refuse steps of an optimizer, seconds of wall-clock time and seeds that can't be meant."""
    whole("steps", steps, 0)
    if not isinstance(seconds, Real) or not float(seconds) >= 0:
        raise ValueError(f"Received seconds={seconds!r}; expected a number from 0.")
    if not is_whole(seed) or not 0 <= seed < 1 << 63:
        raise ValueError(f"Received seed={seed!r}; expected a whole number from 0.")
