"""What trains between two changes of what is frozen, and what goes into it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import keras
import torch

from vggtorch.lowering import synchronize_
from vggtorch.training.config import TrainConfig
from vggtorch.training.data import (
    BatchPlan,
    DatasetSource,
    Folder,
    Key,
    Source,
    arithmetic_of,
    augmentation_index,
)
from vggtorch.training.display import Display
from vggtorch.training.features import Features, cached_features, frozen_end
from vggtorch.training.heads import logits_network
from vggtorch.training.mixing import mixes
from vggtorch.training.optimization import freeze_for_
from vggtorch.training.run import RunData

AGAIN = 10_007  # odd, so that an image comes mirrored the second time


@dataclass(frozen=True)
class Stage:
    """What runs between two changes of what is frozen.

    Attributes:
        module: the part of the model that may change, which puts out logits.
        training, validation: what goes into it: images, or cached features.
        is_cached: the sources are features.
    """

    module: torch.nn.Module
    training: Source
    validation: Source | None
    is_cached: bool

    def keys(self, plan: BatchPlan, epoch: int) -> list[list[Key]]:
        """What each batch of an epoch consists of; features take turns among their copies.

        An image that an epoch has several times is augmented in another way each time.
        """
        times: Counter[int] = Counter()

        def key(index: int) -> Key:
            turn = epoch + AGAIN * times[index]
            times[index] += 1
            return index, index + turn if self.is_cached else augmentation_index(index, turn)

        return [[key(index) for index in batch] for batch in plan(epoch)]


def prepare(
    model: keras.Model,
    read: RunData,
    config: TrainConfig,
    epoch: int,
    accelerator: Any,
    show: Display,
) -> Stage:
    """The part of a model that trains from this epoch on, and what goes into it.

    What is frozen in all epochs runs once; what is frozen in this one runs on what that made.
    """
    # Mixed images are new in every step: what frozen layers make of them can't be kept.
    is_cached = config.cache and not mixes(config)
    ends = [model.inputs[0]]
    for when in (config.epochs - 1, epoch):
        freeze_for_(model, config, when)
        if is_cached and (end := frozen_end(model)) is not ends[-1]:
            ends.append(end)
    module = logits_network(model, ends[-1])
    # Under gradient accumulation each piece is normalised by its own moments, in one process and
    # in several alike.
    whole = config.gradient_accumulation_steps == 1
    synchronize_(module.network, accelerator.num_processes > 1 and whole)
    if len(ends) == 1:
        return Stage(module, read.training, read.validation, is_cached=False)
    prefixes = [keras.Model(start, end) for start, end in pairwise(ends)]

    def features(source: Folder | DatasetSource, copies: int) -> Source:
        found: Folder | DatasetSource | Features = source
        for prefix in prefixes:
            show.begin("frozen layers, once", copies * len(source))
            found = cached_features(
                prefix,
                found,
                config,
                weights=arithmetic_of(model),
                copies=copies,
                accelerator=accelerator,
                advance=show.advance,
            )
        return found

    training = features(read.training, config.cache_copies)
    validation = None if read.validation is None else features(read.validation, 1)
    return Stage(module, training, validation, is_cached=True)
