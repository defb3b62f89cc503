"""What is expected of an image: each weight set's arithmetic, and all that a model expects."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class WeightSet:
    """The arithmetic that turns RGB values of 0 to 255 into the network's input.

    Attributes:
        name: `imagenet`, `features` or `oxford`.
        bgr: the channels are reversed first; `mean` and `std` are then in BGR order.
        scale: divides the 0-255 values first.
        mean: subtracted from each channel.
        std: divides each channel last.
        source: where the numbers come from.
    """

    name: str
    bgr: bool
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source: str


WEIGHT_SETS = {
    s.name: s
    for s in (
        WeightSet(
            "imagenet",
            bgr=False,
            scale=255.0,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
            source="torchvision IMAGENET1K_V1",
        ),
        WeightSet(
            "features",
            bgr=False,
            scale=255.0,
            mean=(0.48235, 0.45882, 0.40784),
            std=(1 / 255, 1 / 255, 1 / 255),
            source="torchvision VGG16_Weights.IMAGENET1K_FEATURES",
        ),
        WeightSet(
            "oxford",
            bgr=True,
            scale=1.0,
            mean=(103.939, 116.779, 123.68),
            std=(1.0, 1.0, 1.0),
            source="keras.applications.vgg16.preprocess_input",
        ),
    )
}


def weight_set_named(name: str) -> WeightSet:
    """The weight set of this name; ValueError where there is none."""
    if name not in WEIGHT_SETS:
        raise ValueError(f"Unknown weight set {name!r}; expected one of {', '.join(WEIGHT_SETS)}.")
    return WEIGHT_SETS[name]


CropMode = Literal["center", "squash", "border"]
Interpolation = Literal["bilinear", "bicubic"]
CROP_PCT = 0.875  # 224 of 256 pixels, which torchvision and keras.applications evaluate by


@dataclass(frozen=True)
class DataConfig:
    """How an image becomes what a model expects: size, crop, interpolation, arithmetic, classes.

    An image that already has the size isn't touched. The names and values are those of timm's
    `pretrained_cfg` where it has one.

    >>> from vggtorch.weight_sets import DataConfig
    >>> config = DataConfig("imagenet", input_size=(3, 96, 160), crop_mode="squash", crop_pct=1.0)
    >>> config.size, config.mean
    ((96, 160), (0.485, 0.456, 0.406))

    Attributes:
        weight_set: whose arithmetic the weights expect; None where it isn't known.
        preprocessing_inside: the model does that arithmetic itself, and takes RGB of 0 to 255.
        input_size: (3, height, width) that images are brought to; None where it is open.
        crop_pct: an image is resized to the size divided by this, rounded down, then its centre
            is cropped.
        crop_mode: `center` resizes the shorter side (what juts out is lost); `squash` both,
            whatever the aspect ratio; `border` the longer side, with `fill` around.
        interpolation: of resizing, antialiased as by PIL.
        fill: RGB of 0 to 255 around an image in the mode `border`.
        label_names: the classes of the model's outputs; empty where they aren't known.

    Raises:
        ValueError: a value out of its range.

    Source: timm's `timm.data.create_transform` and `resolve_data_config`.
    """

    weight_set: str | None = None
    preprocessing_inside: bool = False
    input_size: tuple[int, int, int] | None = None
    crop_pct: float = CROP_PCT
    crop_mode: CropMode = "center"
    interpolation: Interpolation = "bilinear"
    fill: tuple[int, int, int] = (124, 116, 104)  # the mean colour of ImageNet's images
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.weight_set is not None:
            weight_set_named(self.weight_set)
        for name, choices in (("crop_mode", CropMode), ("interpolation", Interpolation)):
            if (value := getattr(self, name)) not in typing.get_args(choices):
                expected = ", ".join(map(repr, typing.get_args(choices)))
                raise ValueError(f"Received {name}={value!r}; expected one of {expected}.")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(
                f"Received crop_pct={self.crop_pct!r}; expected a number above 0 and at most 1."
            )
        size = self.input_size
        if size is not None and (len(size) != 3 or size[0] != 3 or min(size) < 1):
            raise ValueError(f"Received input_size={size!r}; expected (3, height, width).")

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width that images are brought to; None where they are open."""
        return None if self.input_size is None else self.input_size[1:]

    @property
    def arithmetic(self) -> WeightSet | None:
        """What remains to be done to RGB of 0 to 255; None for nothing, or nothing known."""
        left = self.weight_set is not None and not self.preprocessing_inside
        return WEIGHT_SETS[str(self.weight_set)] if left else None

    @property
    def channel_order(self) -> Literal["rgb", "bgr"]:
        """The order in which the model takes the channels, and in which `mean` and `std` are."""
        return "bgr" if self.arithmetic and self.arithmetic.bgr else "rgb"

    @property
    def mean(self) -> tuple[float, ...]:
        """What is subtracted from each channel, as a share of 255."""
        done = self.arithmetic
        return tuple(mean * done.scale / 255 for mean in done.mean) if done else (0.0,) * 3

    @property
    def std(self) -> tuple[float, ...]:
        """What then divides each channel, as a share of 255; 1/255 leaves RGB of 0 to 255."""
        done = self.arithmetic
        return tuple(std * done.scale / 255 for std in done.std) if done else (1 / 255,) * 3

    def resized(self, size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
        """Height and width that an image of `size` is resized to before its centre is cropped."""
        wanted = [math.floor(edge / self.crop_pct) for edge in target]
        if self.crop_mode == "squash":
            return wanted[0], wanted[1]
        ratios = [edge / goal for edge, goal in zip(size, wanted, strict=True)]
        if self.crop_mode == "border":
            ratio = max(ratios)
        elif wanted[0] == wanted[1]:  # torchvision's rule for the longer side
            short, long = sorted(size)
            longer = int(wanted[0] * long / short)
            return (wanted[0], longer) if size[0] <= size[1] else (longer, wanted[0])
        else:
            ratio = min(ratios)
        height, width = (max(1, round(edge / ratio)) for edge in size)
        return height, width

    def as_dict(self) -> dict[str, Any]:
        """All fields, and the numbers that follow from the weight set, as JSON has them."""
        fields = dataclasses.asdict(self)
        fields |= {"channel_order": self.channel_order, "mean": self.mean, "std": self.std}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> DataConfig:
        """What `as_dict` made a dictionary of; names that aren't fields are left out."""
        names = {field.name for field in dataclasses.fields(cls)}
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
            if name in names
        }
        return cls(**known)
