"""Images in any range and layout, checked and turned into what a weight set expects."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from vggtorch.weight_sets import WeightSet

LAYOUTS = {"channels_first": "(N, {}, H, W)", "channels_last": "(N, H, W, {})"}


def _is_range(value: Any) -> bool:
    """Whether a value is two finite numbers, the smaller one first."""
    numbers = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else []
    real = all(isinstance(number, Real) for number in numbers)
    return real and len(numbers) == 2 and -inf < numbers[0] < numbers[1] < inf


@dataclass(frozen=True)
class Pixels:
    """How images are given, and what the network behind expects.

    Attributes:
        value_range: what black and white are in the images given.
        data_format: "channels_first" or "channels_last".
        channels: of an image.
        expected: the weight set's arithmetic; None for images that go in as they are.
        scaled: whether a network with its preprocessing inside wants pixels of 0 to 255.
    """

    value_range: tuple[float, float]
    data_format: str
    channels: int
    expected: WeightSet | None
    scaled: bool = False

    def __post_init__(self) -> None:
        if self.data_format not in LAYOUTS:
            raise ValueError(
                f"Received data_format={self.data_format!r}; expected 'channels_last' or "
                f"'channels_first'."
            )
        if not _is_range(self.value_range):
            raise ValueError(
                f"Received value_range={self.value_range!r}; expected the values of black and of "
                f"white, such as (0, 1) or (0, 255)."
            )
        if self.expected is not None and self.channels != 3:
            raise ValueError(
                f"Received normalization={self.expected.name!r} for images of {self.channels} "
                f"channels; it is for RGB. Pass None, and images that are ready for the network."
            )
        low, high = self.value_range
        object.__setattr__(self, "value_range", (low, high))

    @property
    def normalises(self) -> bool:
        """Whether the images' range matters."""
        return self.expected is not None or self.scaled

    def check(self, images: Tensor, *, values: bool = True) -> None:
        """Raise ValueError for what can't be such images; `values` asks for a look at the range."""
        if not isinstance(images, Tensor):
            raise ValueError(
                f"Received {type(images).__name__}; expected a tensor of images. vt.preprocess "
                f"reads files, PIL images and arrays."
            )
        axis = 1 if self.data_format == "channels_first" else -1
        expected = LAYOUTS[self.data_format].format(self.channels)
        if images.ndim != 4 or images.shape[axis] != self.channels or 0 in images.shape[1:]:
            hint = ""
            if images.ndim == 4 and images.shape[-1 if axis == 1 else 1] == self.channels:
                other = next(name for name in LAYOUTS if name != self.data_format)
                hint = f" They look {other}: pass data_format={other!r}."
            elif images.ndim == 3:
                hint = " One image is a batch of one: images[None]."
            elif images.ndim == 4 and images.shape[axis] == 1:
                repeats = tuple(self.channels if i == axis % 4 else 1 for i in range(4))
                hint = f" They look grey: images.repeat{repeats}."
            raise ValueError(
                f"Received images of shape {tuple(images.shape)}; expected {expected}.{hint}"
            )
        if images.is_complex() or (not images.is_floating_point() and images.dtype != torch.uint8):
            raise ValueError(f"Received images of dtype {images.dtype}; expected uint8 or float.")
        if images.dtype == torch.uint8 and self.normalises and self.value_range != (0, 255):
            raise ValueError(
                f"Received images of dtype torch.uint8 with value_range={self.value_range}; "
                f"expected value_range=(0, 255)."
            )
        if values and self.normalises and images.is_floating_point() and images.numel():
            self._check_range(images.detach())

    def _check_range(self, images: Tensor) -> None:
        """Raise ValueError where values are so far outside that another range must be meant.

        An image that is being optimised leaves its range a little, which is right.
        """
        try:
            low, high = (float(value) for value in images.aminmax())
        except RuntimeError:  # under torch.func's transforms and without values there is no look
            return
        black, white = self.value_range
        span = white - black
        if low < black - span or high > white + span:
            raise ValueError(
                f"Received values from {low:.3g} to {high:.3g} with value_range="
                f"{self.value_range}. Pass the range that the images have, such as "
                f"value_range=(0, 255), and the images before any normalisation."
            )
        if span >= 255 and low >= -1 and high <= 1 and bool((images != images.round()).any()):
            raise ValueError(
                f"Received values from {low:.3g} to {high:.3g} with value_range="
                f"{self.value_range}, which look scaled to 0 to 1: pass value_range=(0, 1)."
            )

    def channels_first(self, value: Tensor) -> Tensor:
        """Images, or maps in their layout, as (N, C, H, W); other values as they are."""
        last = self.data_format == "channels_last" and value.ndim == 4
        return value.permute(0, 3, 1, 2) if last else value  # NHWC -> NCHW view

    def as_given(self, value: Tensor) -> Tensor:
        """Maps (N, C, H, W) in the layout of the images; other values as they are."""
        last = self.data_format == "channels_last" and value.ndim == 4
        return value.permute(0, 2, 3, 1) if last else value  # NCHW -> NHWC view

    def normalise(self, images: Tensor) -> Tensor:
        """The network's input, (N, C, H, W), in the arithmetic of the weight set's reference."""
        if not images.is_floating_point() or images.dtype in (torch.float16, torch.bfloat16):
            images = images.float()  # pixel values have more digits than these
        images = self.channels_first(images)
        if not self.normalises:
            return images
        black, white = self.value_range
        if black:
            images = images - black
        divisor = (white - black) / 255 * (self.expected.scale if self.expected else 1)
        if divisor != 1:
            images = images / divisor if divisor > 1 else images * (1 / divisor)
        if self.expected is None:
            return images
        if self.expected.bgr:
            images = images.flip(1)
        images = images - images.new_tensor(self.expected.mean).view(1, 3, 1, 1)
        if self.expected.std != (1.0, 1.0, 1.0):
            images = images / images.new_tensor(self.expected.std).view(1, 3, 1, 1)
        return images
