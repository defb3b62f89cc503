"""Batches as they are read: by worker processes, and each process of a run its part."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from vggtorch.training.data import Key, Source


def loaded(
    source: Source, keys: Sequence[Sequence[Key]], num_workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches with these keys, images and labels, in this order.

    Raises:
        ValueError: what a worker raised, or that one was killed.
    """
    batches: DataLoader[Any] = DataLoader(
        source,  # type: ignore[arg-type]
        batch_size=None,  # a key list is a batch already
        sampler=keys,  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    with clear_errors(num_workers):
        yield from batches


@contextlib.contextmanager
def clear_errors(num_workers: int) -> Iterator[None]:
    """Inside, errors of the workers that read images become a ValueError that says what to do.

    That one was killed is noticed by a signal, at any moment, or where it handed something over.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        broken = num_workers and not isinstance(error, RuntimeError)
        if "Caught " in str(error) or not (broken or "DataLoader worker (pid" in str(error)):
            raise
        if broken:
            # A worker's connections break a moment before the signal of its death comes, for which
            # torch would raise an error of its own later, anywhere.
            with contextlib.suppress(RuntimeError):
                time.sleep(5)
        raise ValueError(
            f"A process that reads images was killed, for want of memory perhaps. Carry the run on "
            f"with resume=True, and fewer of them than num_workers={num_workers}."
        ) from error
    except ValueError as error:
        # A worker's error comes as the text of its traceback, of which the last line says it.
        text = str(error).strip().rpartition("\nValueError: ")[2]
        if text == str(error).strip():
            raise
        raise ValueError(text) from error


class Batch(NamedTuple):
    """The part of a batch that this process runs, and the size of the whole batch.

    `partners` are the images, and their labels, that stand before these in the whole batch.
    """

    images: torch.Tensor
    labels: torch.Tensor
    size: int
    partners: tuple[torch.Tensor, torch.Tensor] | None = None


def shared_batches(
    source: Source,
    keys: list[list[Key]],
    num_workers: int,
    accelerator: Any,
    *,
    in_pairs: bool = False,
) -> Iterator[Batch]:
    """Of each batch the part that this process runs; the images are dealt out one by one.

    A batch of fewer images than processes leaves some processes without a part. They take part in
    the step all the same, because the others wait for them: with images of length 0. `in_pairs`,
    each image comes with the one before it in the batch.
    """
    first, processes = accelerator.process_index, accelerator.num_processes
    mine = [batch[first::processes] for batch in keys]
    listed = [some or batch[:1] for some, batch in zip(mine, keys, strict=True)]
    if in_pairs and processes > 1:  # one process has the others of the batch already
        rolled = [[*batch[-1:], *batch[:-1]][first::processes] for batch in keys]
        listed = [[*some, *before] for some, before in zip(listed, rolled, strict=True)]
    found = loaded(source, listed, num_workers)
    for batch, some, (images, labels) in zip(keys, mine, found, strict=True):
        count, partners = len(some), None
        if in_pairs and processes > 1:
            partners = images[len(images) - count :], labels[len(labels) - count :]
        elif in_pairs:
            partners = images.roll(1, 0), labels.roll(1, 0)
        yield Batch(images[:count], labels[:count], len(batch), partners)
