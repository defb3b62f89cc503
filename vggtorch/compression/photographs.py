"""The images that layers are fitted to, checked, and those that are held out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import torch
from torch import Tensor, nn

from vggtorch.keras_graph import data_format, raw_value
from vggtorch.models import PREPROCESSING_SUFFIX, weight_set
from vggtorch.surgery import checked_images, crops, held_out_of
from vggtorch.weight_sets import weight_set_named

CROP = 112  # height and width of the crops that layers are fitted to
FEWEST = 20  # of which two are held out


@dataclass(frozen=True)
class Photographs:
    """Images, (N, C, H, W), in two parts, on the device of the model's weights.

    Attributes:
        shown: those that layers are fitted to.
        held_out: a tenth of all, that tells how good the fit is.
        size: height and width of a crop; that of the whole image where the network can't take
            less. Of what are no images, all axes behind the channels.
    """

    shown: Tensor
    held_out: Tensor
    size: tuple[int, ...]

    def crops(self, number: int, generator: torch.Generator, held_out: bool = False) -> Tensor:
        """Squares at random places of the images in turn, or of random ones if there are more."""
        source = self.held_out if held_out else self.shown
        if number >= len(source):
            which = torch.arange(number, device="cpu") % len(source)
        else:
            which = torch.randperm(len(source), generator=generator, device="cpu")[:number]
        return crops(source, which, self.size, generator)

    def cropped(self, network: nn.Module) -> Photographs:
        """The same with smaller crops, if a network takes them; a Dense layer behind Flatten can't.

        What are no images stay whole.
        """
        smaller = dataclasses.replace(self, size=tuple(min(CROP, n) for n in self.size))
        if len(self.size) != 2 or smaller.size == self.size:
            return self
        try:
            with torch.no_grad():
                network(smaller.crops(1, torch.Generator(), held_out=True))
        except (RuntimeError, ValueError):
            return self
        return smaller


def split(model: keras.Model, images: Any, seed: int) -> Photographs:
    """Check images against what a model takes, and hold some of them out."""
    array = checked_images(images, model, FEWEST)
    if not str(kind := model.inputs[0].dtype).startswith(("float", "bfloat")):
        raise ValueError(
            f"Received a model that takes {kind}; expected one of floats, as images are."
        )
    _check_values(array, model)
    device = next((raw_value(v).device for v in model.variables), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    held_out, shown = held_out_of(array, data_format(model), device, generator)
    return Photographs(shown, held_out, tuple(shown.shape[2:]))


def _check_values(images: np.ndarray, model: keras.Model) -> None:
    """Refuse values that the preprocessing of the model's weight set doesn't give."""
    name = weight_set(model)
    if name is None or images.shape[-1] != 3:
        return
    low, high = float(images.min()), float(images.max())
    expected = weight_set_named(name)
    top = 255 / expected.scale
    bounds = [
        [(value - mean) / std for mean, std in zip(expected.mean, expected.std, strict=True)]
        for value in (0.0, top)
    ]
    least, most = min(bounds[0]), max(bounds[1])
    advice = f"vt.preprocess(images, {name!r}) gives what the model expects"
    if any(layer.name.endswith(PREPROCESSING_SUFFIX) for layer in model.layers):
        least, most = 0.0, 255.0
        advice = "the model preprocesses by itself and expects RGB of 0 to 255"
    slack = 0.02 * (most - least)
    if low < least - slack or high > most + slack:
        reason = "which are outside of it"
    elif high - low < 0.2 * (most - least) or (least < 0 <= low):
        reason = "which is what unprocessed images look like"
    else:
        return
    raise ValueError(
        f"Received images with values from {low:.4g} to {high:.4g}, {reason}; expected "
        f"{least:.4g} to {most:.4g}: {advice}."
    )
