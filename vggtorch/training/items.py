"""What other libraries' data sets give, as an image and a label; and streams, kept for training.

Hugging Face's `datasets` and WebDataset give dictionaries.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from vggtorch.models import fitted, to_rgb
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


def label_names(dataset: Any) -> tuple[str, ...]:
    """The classes' names, where a Dataset has them as torchvision's do or as Hugging Face's do."""
    if classes := getattr(dataset, "classes", ()):
        return tuple(map(str, classes))
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        for name in LABELS:
            if names := getattr(features.get(name), "names", None):
                return tuple(map(str, names))
    return ()


def as_array(image: Any, images: DataConfig) -> Any:
    """A PIL image as uint8 (H, W, 3) of the model's size; all else as it is."""
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
        self.classes = label_names(stream.dataset if isinstance(stream, DataLoader) else stream)
        self.items: list[tuple[Any, int]] = []
        size = 0
        for image, label in _items(stream):
            array = np.asarray(as_array(image, images))
            size += array.nbytes
            if size > MOST:
                raise ValueError(
                    f"Received a stream of more than {MOST // 2**30} GiB of images "
                    f"({len(self.items)} so far), or one without an end. Expected less, or a "
                    f"Dataset with __len__ and __getitem__: a run that resumes inside an epoch has "
                    f"to know what it has seen. (Hugging Face's `load_dataset('webdataset', "
                    f"data_files=...)` makes one of WebDataset's shards.)"
                )
            self.items.append((array, int(label)))
        warnings.warn(
            f"Read {len(self.items)} images of {type(stream).__name__} into memory "
            f"({size / 2**20:.0f} MiB). Every epoch sees them so, in an order of its own.",
            stacklevel=4,
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
