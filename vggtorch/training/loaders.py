"""A torch Dataset or DataLoader as a source of images: its batches, and what judges by it."""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import Any

from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from vggtorch.text import visible
from vggtorch.training.data import BatchPlan, DatasetSource, seeded, shuffled
from vggtorch.training.items import Kept, is_stream
from vggtorch.weight_sets import DataConfig


def as_source(
    data: Dataset[Any] | DataLoader[Any],
    seed: int,
    batch_size: int,
    data_config: DataConfig | None = None,
) -> tuple[DatasetSource, BatchPlan]:
    """A torch Dataset or DataLoader as a source, and the batches of each epoch.

    A DataLoader's own sampler decides on the batches, drawing its random numbers from
    (seed, epoch); a Dataset is shuffled into batches of `batch_size`. A stream is read once.
    """
    images = data_config or DataConfig()
    if isinstance(data, os.PathLike | bytes):
        raise ValueError(f"Received a {type(data).__name__}; expected a Path or a text: str(path).")
    if is_stream(data):
        batch_size = getattr(data, "batch_size", None) or batch_size
        with seeded(seed):
            data = Kept(data, images)
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if hasattr(dataset, "iloc"):
        raise ValueError(
            f"Received a {type(dataset).__name__}; expected a folder, a table's path or a Dataset. "
            f"Write it with `.to_csv('labels.csv', index=False)`, with columns path and label, and "
            f"pass 'labels.csv'."
        )
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            f"Received {type(dataset).__name__}, which has no length. Expected a folder, a table, "
            f"or a Dataset with __len__ and __getitem__: a run that resumes inside an epoch has to "
            f"know what it has seen."
        )
    if not len(dataset):
        raise ValueError(f"Received an empty {type(dataset).__name__}; expected images.")
    if not isinstance(data, DataLoader):
        source = DatasetSource(dataset, default_collate, seed, images)
        return source, shuffled(len(dataset), batch_size, seed)
    sampler = data.batch_sampler
    if sampler is None:
        raise ValueError("Received a DataLoader with batch_size=None. Expected one with batches.")
    most = 100 * (len(dataset) + 1)
    if getattr(data.sampler, "num_replicas", 1) > 1:
        raise ValueError(
            f"Received a DataLoader with a {type(data.sampler).__name__} of one process among "
            f"several. Expected a sampler of all images: each batch is shared among the processes."
        )
    generators = [getattr(owner, "generator", None) for owner in (data, data.sampler)]

    def plan(epoch: int) -> list[list[int]]:
        for owner in (sampler, data.sampler):
            if callable(set_epoch := getattr(owner, "set_epoch", None)):
                set_epoch(epoch)  # torch's name for it, of DistributedSampler
        for generator in generators:
            if generator is not None:
                generator.manual_seed((seed + epoch) % 2**63)
        with seeded(seed, epoch):
            batches = [
                [_number(index, len(dataset)) for index in batch]
                for batch in itertools.islice(sampler, most + 1)
            ]
        if len(batches) > most:
            raise ValueError(
                f"The DataLoader's sampler gives more than {most} batches of {len(dataset)} "
                f"images, or has no end. Expected the batches of one epoch."
            )
        if not batches:
            raise ValueError(
                f"The DataLoader gives no batch of its {len(dataset)} images. Expected one at "
                f"least: a smaller batch_size, or drop_last=False."
            )
        return batches

    return DatasetSource(dataset, data.collate_fn, seed, images), plan


def _number(index: Any, count: int) -> int:
    """What a sampler gives for one of so many images, a tensor perhaps, as its number from 0."""
    try:
        return range(count)[index]
    except (TypeError, IndexError) as error:
        raise ValueError(
            f"The DataLoader's sampler gives {visible(repr(index), 60)}; expected the number of an "
            f"image, below {count}."
        ) from error


def drawn(source: DatasetSource, plan: BatchPlan) -> DatasetSource:
    """Those images of a DataLoader's Dataset that its sampler gives in its first epoch.

    A `SubsetRandomSampler` over a part of the images that train, say, judges by that part alone.
    """
    chosen = [index for batch in plan(0) for index in batch]
    if sorted(chosen) == list(range(len(source))):
        return source
    return dataclasses.replace(source, dataset=Subset(source.dataset, chosen))
