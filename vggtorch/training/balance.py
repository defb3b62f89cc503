"""Classes of unequal size: weights of their losses, and batches that draw them equally often."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vggtorch.training.config import TrainConfig
from vggtorch.training.data import BatchPlan, DatasetSource, Folder


def labels_of(source: Folder | DatasetSource) -> list[int]:
    """Every image's label; of a Dataset they are known only after it was read."""
    return list(source.labels) if isinstance(source, Folder) else source.plain[1]


def class_weights(
    config: TrainConfig, source: Folder | DatasetSource, plan: BatchPlan, names: Sequence[str]
) -> torch.Tensor | None:
    """What each class's loss is multiplied by, (classes,); None where it is 1 for all.

    `balanced` is scikit-learn's: images / (classes * images of the class). Of a DataLoader
    those images count that its sampler gives, as often as it does.

    Raises:
        ValueError: weights of other classes than there are, or labels beyond them.
    """
    given = config.class_weight
    if given is None:
        return None
    if isinstance(given, str):
        labels = labels_of(source)
        if isinstance(source, DatasetSource):  # as often as its sampler gives each
            batches = itertools.chain.from_iterable(map(plan, range(config.epochs)))
            labels = [labels[index] for batch in batches for index in batch]
        counts = _counts(labels, names)
        return torch.from_numpy(counts.sum() / len(names) / counts).float()
    if isinstance(given, Mapping):
        found: dict[int, float] = {}
        for key, weight in given.items():
            index = names.index(key) if key in names else key
            if index not in range(len(names)):
                raise ValueError(
                    f"Received class_weight={dict(given)!r}; there is no class {key!r}, only "
                    f"{', '.join(names)}."
                )
            if index in found:
                raise ValueError(
                    f"Received class_weight={dict(given)!r}, which has the class {names[index]} "
                    f"twice."
                )
            found[int(index)] = float(weight)
        given = [found.get(index, 1.0) for index in range(len(names))]
    elif len(given) != len(names):
        raise ValueError(
            f"Received class_weight={given!r}, {len(given)} numbers for {len(names)} classes. "
            f"Expected one for each, in the order {', '.join(names)}."
        )
    return torch.tensor(given, dtype=torch.float32, device="cpu")


def _counts(labels: Sequence[int], names: Sequence[str]) -> np.ndarray:
    """How many images each class has."""
    counts = np.bincount(labels, minlength=len(names))
    if not counts.all() or len(counts) > len(names):
        empty = [name for name, count in zip(names, counts, strict=False) if not count]
        raise ValueError(
            f"Balanced classes need an image of each of the {len(names)}; the training data has "
            f"labels up to {len(counts) - 1}, and none of {', '.join(empty) or 'those above'}."
        )
    return counts


def balanced(labels: Sequence[int], batch_size: int, seed: int) -> BatchPlan:
    """Each epoch draws as many images as there are, with replacement, every class equally often.

    As torch's WeightedRandomSampler does with 1 / (images of the class), from (seed, epoch).
    """
    counts = np.bincount(labels)
    chances = 1 / counts[labels]
    chances /= chances.sum()

    def plan(epoch: int) -> list[list[int]]:
        rng = np.random.default_rng([seed, epoch])
        order = rng.choice(len(labels), size=len(labels), p=chances).tolist()
        return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    return plan
