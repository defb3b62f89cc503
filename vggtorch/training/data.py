"""Images for training: folders, torch Datasets and DataLoaders, all read in one way.

A source is indexed by a list of keys and returns one batch. A key is (index of an image, index of
an augmentation): augmentation 0 is the plain image, and odd ones are mirrored where the images may
be. Every random number comes from (seed, augmentation, index), so what an epoch sees doesn't depend
on the number of workers or processes, or on whether the run was interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import keras
import numpy as np
import torch
from torch.utils.data import default_collate

from vggtorch import files
from vggtorch.models import data_config, fitted, preprocess, read_image
from vggtorch.training.config import Augment, TrainConfig
from vggtorch.training.folders import Labelled, read_classes, stamp_of
from vggtorch.training.items import (
    as_array,
    as_images,
    as_labels,
    check_alike,
    checked,
    image_and_label,
    label_names,
)
from vggtorch.training.splits import as_part
from vggtorch.training.tables import TablePart
from vggtorch.weight_sets import CROP_PCT, DataConfig

Key = tuple[int, int]  # (index, augmentation)
BatchPlan = Callable[[int], list[list[int]]]  # epoch -> index lists, one for each optimizer step


DEFAULT_SIZE = 224  # where neither the model nor the user says any


def images_for(model: keras.Model, config: TrainConfig) -> DataConfig:
    """What images are brought to for a model, in training and ever after.

    The configuration goes before what the model remembers; the size of the model's input is fixed.

    Raises:
        ValueError: another size than the model's, or a model of several inputs.
    """
    if len(model.inputs) != 1:
        raise ValueError(f"{model.name} takes {len(model.inputs)} inputs; expected one, of images.")
    known, asked = data_config(model), config.image_size
    height, width = known.size or (DEFAULT_SIZE, DEFAULT_SIZE)
    if asked is not None and (asked, asked) != (height, width):
        if None not in model.inputs[0].shape[1:]:
            raise ValueError(
                f"Received image_size={asked}; {model.name} takes images of {height}x{width}. "
                f"Leave image_size out, or build the model for {asked}x{asked}."
            )
        height = width = asked
    crop_mode = config.crop_mode or known.crop_mode
    crop_pct = config.crop_pct
    if crop_pct is None:  # only where the user chooses the mode does its own share go with it
        crop_pct = known.crop_pct
        if config.crop_mode not in (None, known.crop_mode):
            crop_pct = CROP_PCT if crop_mode == "center" else 1.0
    return dataclasses.replace(
        known,
        input_size=(3, height, width),
        crop_mode=crop_mode,
        crop_pct=crop_pct,
        interpolation=config.interpolation or known.interpolation,
    )


def geometry_text(images: DataConfig) -> str:
    """What images are brought to, in words."""
    height, width = images.size or (DEFAULT_SIZE, DEFAULT_SIZE)
    return (
        f"{height}x{width}, crop mode {images.crop_mode}, crop share {images.crop_pct:g}, "
        f"{images.interpolation}; weight set {images.weight_set or 'not known'}"
    )


class Source(Protocol):
    """What the training loop reads from."""

    def __len__(self) -> int: ...

    def __getitem__(self, keys: Sequence[Key]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, H, W, 3), uint8 or ready for the model, and labels (N,) for these keys."""


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU random numbers from `numbers`; put them back after."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@dataclass(frozen=True)
class Folder:
    """Images with labels: of a folder as torchvision's ImageFolder has it, or of a table.

    Attributes:
        images: the files, sorted, with their labels, and how they were found.
        classes: their names, sorted.
        digest: SHA-256 over names and contents of all files.
        data_config: what the images are brought to.
        augment: what augmentations other than 0 do to an image.
        seed: where random augmentation starts.
        root: the folder or the table.
    """

    images: tuple[Labelled, ...]
    classes: tuple[str, ...]
    digest: str
    data_config: DataConfig
    augment: Augment
    seed: int
    root: Path

    @property
    def paths(self) -> tuple[Path, ...]:
        """The image files."""
        return tuple(image.path for image in self.images)

    @property
    def labels(self) -> tuple[int, ...]:
        """The index into `classes` of each."""
        return tuple(image.label for image in self.images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, keys: Sequence[Key]) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.stack([self._image(*key) for key in keys])
        return images, torch.tensor([self.images[index].label for index, _ in keys])

    def _image(self, index: int, augmentation: int) -> torch.Tensor:
        from torchvision.transforms.v2 import functional as F

        (path, _, digest, stamp), size = self.images[index], self.data_config.size
        assert size is not None
        try:
            if stamp_of(path) != stamp and files.sha256(path) != digest:
                raise ValueError("it holds another image")
            picture = read_image(path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} could be read when training began and now can't ({error}). "
                f"Put it back, and resume the run."
            ) from error
        if augmentation == 0 or self.augment in ("none", "flip"):
            image = F.pil_to_tensor(fitted(picture, self.data_config, size))  # (3, H, W)
        else:
            with seeded(self.seed, augmentation, index):
                image = _random_view(F.pil_to_tensor(picture), self.data_config, self.augment)
        if augmentation % 2 and self.augment != "none":
            image = F.horizontal_flip(image)
        return image.permute(1, 2, 0).contiguous()  # CHW -> HWC


def _random_view(image: torch.Tensor, images: DataConfig, augment: Augment) -> torch.Tensor:
    from torchvision.transforms import InterpolationMode, v2

    crop = v2.RandomResizedCrop(
        images.size,
        scale=(0.5, 1.0),
        interpolation=InterpolationMode(images.interpolation),
        antialias=True,
    )
    image = crop(image)
    return v2.TrivialAugmentWide()(image) if augment == "trivial" else image


def read_folder(
    folder: str | Path | TablePart,
    size: int | DataConfig,
    augment: Augment = "none",
    on_unreadable: Literal["skip", "stop"] = "stop",
    seed: int = 0,
    label_pattern: str | None = None,
) -> Folder:
    """Read and check every image of a folder or a table once, as `read_classes` does.

    `size` is what the images are brought to: height and width, or all of it.
    """
    images_as = DataConfig(input_size=(3, size, size)) if isinstance(size, int) else size
    part = as_part(folder)
    root = part.path if isinstance(part, TablePart) else part
    classes, images = read_classes(part, on_unreadable, label_pattern)
    base = root.parent if isinstance(part, TablePart) else root
    digest = hashlib.sha256()
    for image in images:
        # A folder's name says the class already.
        label = "" if part is root and label_pattern is None else f"{classes[image.label]}\0"
        path = os.path.relpath(image.path, base)
        digest.update(os.fsencode(f"{label}{path}\0{image.digest}\n"))
    return Folder(tuple(images), tuple(classes), digest.hexdigest(), images_as, augment, seed, root)


def with_classes(folder: Folder, classes: tuple[str, ...]) -> Folder:
    """The same images with the labels that they have among these classes."""
    places = [classes.index(name) for name in folder.classes]
    images = tuple(image._replace(label=places[image.label]) for image in folder.images)
    found = dataclasses.replace(folder, images=images, classes=classes)
    digest = hashlib.sha256(repr((folder.digest, found.labels, classes)).encode()).hexdigest()
    return dataclasses.replace(found, digest=digest)


def _held(images: int, share: float) -> int:
    """How many images of a class are held out."""
    return max(1, round(share * images))


def check_hold_out(counts: Mapping[str, int], share: float) -> None:
    """See that images to train on are left of each class, of which there are so many."""
    for name, images in counts.items():
        if _held(images, share) >= images:
            there = "one image, which" if images == 1 else f"{images} images, all of which"
            raise ValueError(
                f"Class {name!r} has {there} would be held out for validation. Add images, or pass "
                f"a validation folder."
            )


def hold_out(folder: Folder, share: float) -> tuple[Folder, Folder]:
    """Split a folder in two, `share` of every class going to the second; the same every time."""
    counts = np.bincount(folder.labels, minlength=len(folder.classes)).tolist()
    check_hold_out(dict(zip(folder.classes, counts, strict=True)), share)
    rng = np.random.default_rng(folder.seed)
    labels = np.array(folder.labels)
    held = np.zeros(len(folder), dtype=bool)
    for label in range(len(folder.classes)):
        members = rng.permutation(np.flatnonzero(labels == label))
        held[members[: _held(len(members), share)]] = True

    def part(mask: np.ndarray, augment: Augment) -> Folder:
        return dataclasses.replace(
            folder,
            images=tuple(itertools.compress(folder.images, mask)),
            digest=hashlib.sha256(folder.digest.encode() + mask.tobytes()).hexdigest(),
            augment=augment,
        )

    return part(~held, folder.augment), part(held, "none")


@dataclass(frozen=True)
class DatasetSource:
    """A Dataset of (image, label), with the collate function of the loader it came in.

    An image is a PIL image, which is brought to the model's size; or uint8 RGB of that size; or
    floating point and ready for the model. What the dataset itself draws at random is seeded by
    (seed, augmentation, index).
    """

    dataset: Any  # torch.utils.data.Dataset, or anything with its two methods
    collate: Callable[[list], Any]
    seed: int
    data_config: DataConfig

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, where the dataset has them."""
        return label_names(self.dataset)

    @property
    def content_name(self) -> str | None:
        """What stands for the dataset's content, where its maker says so: then it isn't read."""
        name = getattr(self.dataset, "content_name", None)
        return name if isinstance(name, str) else None

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, keys: Sequence[Key]) -> tuple[torch.Tensor, torch.Tensor]:
        items = [self._item(*key) for key in keys]
        if self.collate is default_collate:
            check_alike([image for image, _ in map(checked, items)])
        images, labels = image_and_label(self.collate(items))
        images, labels = as_images(images, self.data_config), as_labels(labels)
        if not len(images) == len(labels) == len(keys):
            raise ValueError(
                f"The DataLoader's collate_fn makes {len(images)} images and {len(labels)} labels "
                f"of {len(keys)} items; expected as many. Leave images out, or repeat them, in the "
                f"Dataset or by its sampler."
            )
        return images, labels

    @functools.cached_property
    def plain(self) -> tuple[str, list[int]]:
        """SHA-256 over all plain images and their labels, and the labels; reads them all, once."""
        return _content(self, 0)

    def _item(self, index: int, augmentation: int) -> Any:
        with seeded(self.seed, augmentation, index):
            item = self.dataset[index]
        if isinstance(item, Mapping) and self.collate is not default_collate:
            return item  # which the user's own function takes
        image, label = image_and_label(item)
        try:
            return as_array(image, self.data_config), label
        except ValueError as error:
            raise ValueError(f"Image {index} of the Dataset can't be taken: {error}") from error


def check_fits(source: Folder | DatasetSource | None, model: keras.Model) -> None:
    """See that a Dataset's images have the shape that the model takes; files are brought to it."""
    expected = model.inputs[0].shape[1:]
    sides = "x".join(str(edge or "any") for edge in expected)
    if isinstance(source, Folder) and (len(expected) != 3 or expected[-1] not in (None, 3)):
        raise ValueError(
            f"{model.name} takes {sides}; files give RGB images, height x width x 3. Build the "
            f"model for these, or pass a Dataset."
        )
    if not isinstance(source, DatasetSource) or source.content_name is not None:
        return
    received = tuple(source[[(0, 0)]][0].shape[1:])
    pairs = zip(expected, received, strict=False)
    if len(received) != len(expected) or any(e not in (None, r) for e, r in pairs):
        hint = "Give PIL images, which are brought to the size, or resize them in the Dataset."
        if len(received) > len(expected):
            hint = "An item is one image, not a batch."
        elif received[-1] != expected[-1] and len(received) == len(expected):
            hint = "Give PIL images, which become RGB of the size whatever they are."
        raise ValueError(
            f"The Dataset gives images of shape {received}; {model.name} takes {sides}. {hint}"
        )


def check_labels(labels: torch.Tensor, model: keras.Model) -> None:
    """See that a model has a class for each of these labels."""
    if not len(labels):
        return
    low, high, classes = int(labels.min()), int(labels.max()), model.output_shape[1]
    if low < 0 or high >= classes:
        raise ValueError(
            f"Received labels from {low} to {high}; expected 0 to {classes - 1}, as "
            f"{model.name} puts out {classes} classes."
        )


def shuffled(count: int, batch_size: int, seed: int) -> BatchPlan:
    """Each epoch's batches: a permutation of (seed, epoch), cut into pieces of `batch_size`."""

    def plan(epoch: int) -> list[list[int]]:
        order = np.random.default_rng([seed, epoch]).permutation(count).tolist()
        return [order[i : i + batch_size] for i in range(0, count, batch_size)]

    return plan


def in_order(count: int, batch_size: int, augmentation: int = 0) -> list[list[Key]]:
    """Every image once, unshuffled, in one augmentation."""
    keys = [(index, augmentation) for index in range(count)]
    return [keys[i : i + batch_size] for i in range(0, count, batch_size)]


def fingerprint(source: Folder | DatasetSource, augmentations: int) -> tuple[str, list[int]]:
    """SHA-256 over all that so many augmentations of a source can return, and the labels."""
    if isinstance(source, Folder):
        images = source.data_config.as_dict()
        recipe = f"{source.digest} {images} {source.augment} {source.seed} {augmentations}"
        return hashlib.sha256(recipe.encode()).hexdigest(), list(source.labels)
    plain, labels = source.plain
    others = [_content(source, augmentation)[0] for augmentation in range(1, augmentations)]
    return hashlib.sha256(repr([plain, *others]).encode()).hexdigest(), labels


def _content(source: DatasetSource, augmentation: int) -> tuple[str, list[int]]:
    """SHA-256 over all images and labels in one augmentation, and the labels."""
    digest = hashlib.sha256()
    labels: list[int] = []
    for keys in in_order(len(source), 32, augmentation):
        x, y = source[keys]
        digest.update(str((x.shape, x.dtype)).encode())
        digest.update(np.ascontiguousarray(x.numpy()).tobytes())
        digest.update(y.numpy().tobytes())
        labels += y.tolist()
    return digest.hexdigest(), labels


def arithmetic_of(model: keras.Model) -> str | None:
    """The weight set whose arithmetic images need before a model; None where it does its own."""
    left = data_config(model).arithmetic
    return None if left is None else left.name


def as_input(images: torch.Tensor, weights: str | None) -> torch.Tensor:
    """What a network of this weight set takes: uint8 RGB is preprocessed, floats pass as they are.

    Without a weight set the network gets the values of 0 to 255.
    """
    if images.dtype != torch.uint8:
        return images
    if weights is None:
        return images.float()
    return cast(torch.Tensor, preprocess(images, weights))


def augmentation_index(index: int, epoch: int) -> int:
    """Which augmentation of an image an epoch sees; mirrored (odd) in every other epoch.

    Source: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024 (alternating flip).
    """
    return 2 * epoch + 2 - (index + epoch) % 2
