"""What other libraries' data sets give, as an image and a label; and streams, kept for training.

Hugging Face's `datasets` and WebDataset give dictionaries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset

from vggtorch.models import fitted, to_rgb
from vggtorch.telling import tell
from vggtorch.text import visible
from vggtorch.weight_sets import DataConfig

IMAGES = ("image", "img", "pixel_values", "jpg", "jpeg", "png", "webp", "pil")
LABELS = ("label", "labels", "fine_label", "cls", "class", "target")
MOST = 4 * 2**30  # bytes of a stream's images that are kept in memory


def image_and_label(item: Any) -> tuple[Any, Any]:
    """The two of an item: a pair, or a dictionary with names that say which is which.

    Raises:
        ValueError: neither, or a dictionary with several images or labels.
    """
    if isinstance(item, Mapping):
        return _only(item, IMAGES, "image"), _only(item, LABELS, "label")
    if isinstance(item, Sequence) and not isinstance(item, str | bytes) and len(item) == 2:
        return item[0], item[1]
    count = f" of {len(item)}" if isinstance(item, Sequence) else ""
    raise ValueError(
        f"The Dataset gives a {type(item).__name__}{count}; expected (image, label), or a "
        f"dictionary with both."
    )


def _only(item: Mapping[str, Any], known: Sequence[str], what: str) -> Any:
    """The one value of a dictionary whose name is among the known ones; `.jpg` is `jpg`."""
    found = [name for name in item if str(name).lower().lstrip(".") in known]
    if len(found) != 1:
        raise ValueError(
            f"The Dataset gives dictionaries with {', '.join(map(repr, item))}; expected one "
            f"{what} among them, named {', '.join(known)}. Rename or remove columns."
        )
    return item[found[0]]


def checked(item: tuple[Any, Any]) -> tuple[Any, Any]:
    """An image and a label, of which torch can make a batch.

    Raises:
        ValueError: a path, bytes or nothing in the place of the image, or no label.
    """
    image, label = item
    if isinstance(image, str | PathLike):
        raise ValueError(
            f"The Dataset gives {str(image)!r} as an image; expected pixels. Open it there "
            f"(`PIL.Image.open`), or pass a folder or a table of paths and labels instead."
        )
    pixels = (Image.Image, np.ndarray, torch.Tensor)
    if not (isinstance(image, pixels) or hasattr(image, "__array__")):
        what = "None" if image is None else f"{type(image).__name__}"
        raise ValueError(
            f"The Dataset gives {what} as an image; expected a PIL image, an array or a tensor. "
            f"(Of Hugging Face's, `dataset.cast_column('image', datasets.Image())` gives such; of "
            f"WebDataset's, `.decode('pil')`.)"
        )
    if not isinstance(image, Image.Image) and len(shape := tuple(np.shape(image))) > 3:
        raise ValueError(
            f"The Dataset gives {shape} as the shape of an image; expected one of three axes. "
            f"An item is one image, not a batch: a DataLoader makes batches."
        )
    if label is None:
        raise ValueError("The Dataset gives None as a label; expected a number from 0.")
    return item


def check_alike(images: Sequence[Any]) -> None:
    """See that images have one shape, so that they can be one batch."""
    shapes = {tuple(getattr(image, "shape", ())) for image in images}
    if len(shapes) > 1:
        raise ValueError(
            f"The Dataset gives images of different shapes {sorted(shapes)[:4]}, which can't be "
            f"one batch. Resize them there, or give PIL images, which are brought to the model's "
            f"size."
        )


def as_images(images: Any, images_as: DataConfig) -> torch.Tensor:
    """A batch of a Dataset's images as a tensor (N, H, W, 3).

    Raises:
        ValueError: values that can be neither RGB of 8 bits nor ready for the model.
    """
    if not isinstance(images, np.ndarray | torch.Tensor):
        raise ValueError(
            f"The Dataset's batches have a {type(images).__name__} of images; expected a tensor."
        )
    images = torch.as_tensor(images)
    if images_as.arithmetic is not None:
        _check_ready(images, images_as)
    if images.ndim == 4 and images.shape[-1] != 3 and images.shape[1] == 3:
        images = images.permute(0, 2, 3, 1)  # NCHW -> NHWC view
    return images


def _check_ready(images: torch.Tensor, images_as: DataConfig) -> None:
    """Refuse what is no uint8 and can't be input of the network either.

    That is what torchvision's ToTensor makes (0 to 1), what Keras's own data sets give (floating
    point of 0 to 255), and what is ready for other weights.
    """
    name = images_as.weight_set
    expected = f"expected uint8 RGB, or floating-point images that are ready for {name!r}"
    if images.dtype == torch.uint8 or not images.numel():
        return
    if not images.is_floating_point():
        raise ValueError(
            f"The Dataset gives images of {images.dtype}; {expected}. Values of 0 to 255 become "
            f"uint8 by `.to(torch.uint8)`."
        )
    low, high = (value.item() for value in images.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("The Dataset gives images with NaN or infinite values; expected numbers.")
    ready = [
        (value - mean) / std
        for mean, std in zip(images_as.mean, images_as.std, strict=True)
        for value in (0.0, 1.0)
    ]
    span = max(ready) - min(ready)
    scaled = low >= 0 and 0.1 < high <= 1
    normalised = False
    if span > 20:  # where values are as far apart as pixels are, such near ones are no image
        scaled = scaled or (-1.01 <= low < -0.5 and 0.5 < high <= 1.01)
        normalised = not scaled and -3 < low < -0.5 and 0.5 < high < 3
    # What is drawn on top, noise say, may reach beyond what pixels become.
    is_far = not (min(ready) - span <= low and high <= max(ready) + span)
    if scaled or normalised or is_far or (low >= 0 and high > max(ready) + 0.01 * span):
        looks = f", which look scaled to {'0' if low >= 0 else '-1'} to 1" if scaled else ""
        if normalised:
            looks = ", which look normalised as for 'imagenet'"
        raise ValueError(
            f"The Dataset gives floating-point images with values from {low:.3g} to {high:.3g}"
            f"{looks}; {expected}, with values from {min(ready):.3g} to {max(ready):.3g}. Leave "
            f"ToTensor, Normalize and division by 255 out: uint8 and PIL images are preprocessed "
            f"here."
        )


def as_labels(labels: Any) -> torch.Tensor:
    """A batch of labels as whole numbers (N,); Keras's own data sets have them as (N, 1).

    Raises:
        ValueError: text, shares of classes, or numbers that aren't whole.
    """
    if isinstance(labels, list | tuple) and any(isinstance(label, str) for label in labels):
        raise ValueError(
            f"The Dataset's labels are text ({labels[0]!r}); expected numbers from 0. "
            f"(`dataset.class_encode_column('label')` makes them so in Hugging Face's.)"
        )
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The Dataset gives labels of several values ({visible(labels, 60)}); expected one "
            f"number from 0 for each image."
        ) from error
    if found.ndim == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.ndim != 1:
        raise ValueError(
            f"The Dataset's labels have the shape {tuple(found.shape)}; expected one number from 0 "
            f"for each image. Of one-hot labels, `labels.argmax(-1)` is that; images are mixed by "
            f"mixup=0.2 or cutmix=1.0, not in the Dataset."
        )
    right = (found >= 0) & (found == found.double().round())  # which NaN isn't either
    if not bool(right.all()):
        wrong = found[~right][0].item()
        raise ValueError(f"The Dataset gives the label {wrong:g}; expected a whole number from 0.")
    return found.long()


def label_names(dataset: Any) -> tuple[str, ...]:
    """The classes' names, where a Dataset has them as torchvision's do or as Hugging Face's do.

    A part of such a Dataset, its DataLoader, and several one behind the other have its names too.
    """
    if isinstance(dataset, Subset | DataLoader):
        return label_names(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        found = {label_names(part) for part in dataset.datasets}
        return found.pop() if len(found) == 1 else ()
    if classes := getattr(dataset, "classes", ()):
        return tuple(map(str, classes))
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        for name in LABELS:
            if names := getattr(features.get(name), "names", None):
                return tuple(map(str, names))
    return ()


def as_array(image: Any, images: DataConfig) -> Any:
    """A PIL image as uint8 (H, W, 3) of the model's size; all else as it is.

    Of an array whose memory torch can't take, a mirrored one say, it's a copy.
    """
    if isinstance(image, np.ndarray) and image.dtype.kind in "biuf":
        return np.require(image, requirements=["C", "W"])
    if not isinstance(image, Image.Image):
        return image
    image = to_rgb(image)
    return np.array(image if images.size is None else fitted(image, images, images.size))


def is_stream(data: Any) -> bool:
    """Whether a Dataset can be read from its beginning only."""
    dataset = data.dataset if isinstance(data, DataLoader) else data
    return isinstance(dataset, IterableDataset) or (
        hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")
    )


class Kept(Dataset):
    """What a stream gave, from its first image to its last, in memory and by index."""

    def __init__(self, stream: Any, images: DataConfig) -> None:
        self.classes = label_names(stream)
        self.items: list[tuple[Any, int]] = []
        size = 0
        for image, label in map(checked, _items(stream)):
            try:
                array = np.asarray(as_array(image, images))
            except ValueError as error:
                place = len(self.items)
                raise ValueError(f"Image {place} of the stream can't be taken: {error}") from error
            size += array.nbytes
            if size > MOST:
                raise ValueError(
                    f"Received a stream of more than {MOST // 2**30} GiB of images "
                    f"({len(self.items)} so far), or one without an end. Expected less, or a "
                    f"Dataset with __len__ and __getitem__: a run that resumes inside an epoch has "
                    f"to know what it has seen. (Hugging Face's `load_dataset('webdataset', "
                    f"data_files=...)` makes one of WebDataset's shards.)"
                )
            if isinstance(label, str | bytes) and label.isdigit():  # as it stands in a shard
                label = int(label)
            self.items.append((array, int(as_labels([label]))))
        if not self.items:
            raise ValueError(f"Received an empty {type(stream).__name__}; expected images.")
        tell(
            f"Read {len(self.items)} images of {type(stream).__name__} into memory "
            f"({size / 2**20:.0f} MiB). Every epoch sees them so, in an order of its own.",
        )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.items[index]


def _items(stream: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """A stream's images and labels one by one, whether it gives them so or in batches."""
    for item in stream:
        image, label = image_and_label(item)
        if getattr(image, "ndim", 3) == 4:
            yield from zip(image, torch.as_tensor(label).tolist(), strict=True)
        elif isinstance(image, list | tuple):
            yield from zip(image, label, strict=True)
        else:
            yield image, label
