"""What a run begins with: its configuration, and the lines that say what will happen."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import keras
import torch
from torch.utils.data import DataLoader

from vggtorch.text import visible
from vggtorch.training.advice import Plan, Similarity, planned
from vggtorch.training.config import ELSEWHERE, NO_SETTINGS, TrainConfig
from vggtorch.training.data import Folder, check_fits, geometry_text, images_for
from vggtorch.training.features import frozen_end
from vggtorch.training.folders import images_by_class
from vggtorch.training.heads import check_frozen, with_head
from vggtorch.training.items import label_names
from vggtorch.training.mixing import mixes
from vggtorch.training.run import Images, RunData, read_data
from vggtorch.training.splits import are_files, as_part, splits_of
from vggtorch.weight_sets import DataConfig

NAMED = 12  # classes that the first lines list


def settle_config(
    model: keras.Model,
    train: Images,
    config: TrainConfig | None,
    settings: Mapping[str, Any],
    similarity: Similarity | None = None,
) -> TrainConfig:
    """The configuration with the settings; by advice where there is none and a head is missing.

    Raises:
        ValueError: a setting that there isn't.
    """
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    for name in settings:
        if name not in known:
            if name in NO_SETTINGS:
                raise ValueError(
                    f"Received {name}={settings[name]!r}, which is no setting. {NO_SETTINGS[name]}"
                )
            near = (
                [ELSEWHERE[name]] if name in ELSEWHERE else difflib.get_close_matches(name, known)
            )
            hint = f" Perhaps {near[0]}?" if near else f" Expected {', '.join(sorted(known))}."
            raise ValueError(f"Received {name}={settings[name]!r}, which is no setting.{hint}")
    if config is not None:
        if not isinstance(config, TrainConfig):
            raise ValueError(
                f"Received config={config!r}; expected a TrainConfig, or settings by their names: "
                f"epochs=5, say."
            )
        return dataclasses.replace(config, **settings)
    shape = model.output_shape
    pattern = settings.get("label_pattern")
    counts = _counts(train, pattern)
    # A network that ends in feature maps can't classify anything as it is.
    if counts is None or not isinstance(shape, tuple) or len(shape) != 4:
        return TrainConfig(**settings)
    layers = [layer.name for layer in model.layers]
    files = are_files(splits_of(train).train)
    return planned(layers, *counts, similarity, settings, are_files=files)


def _counts(train: Images, pattern: str | None) -> tuple[int, int] | None:
    """How many images and classes there are to learn from; None where the data doesn't say."""
    part = splits_of(train).train
    if are_files(part):
        counts = images_by_class(as_part(part), pattern)
        return sum(counts.values()), len(counts)
    dataset, classes = part.dataset if isinstance(part, DataLoader) else part, label_names(part)
    return (len(dataset), len(classes)) if classes and hasattr(dataset, "__len__") else None


def read_and_fit(
    model: keras.Model, train: Images, validation: Images | None, config: TrainConfig
) -> tuple[keras.Model, RunData]:
    """The model that trains, with its new head if there is to be one, and data that fit it.

    Raises:
        ValueError: data that can't be right, or that the model or the configuration contradicts.
    """
    read = read_data(train, validation, config, images_for(model, config))
    for part in (read.training, read.validation, read.test):
        check_fits(part, model)
    if config.head is None:
        return model, read
    whole, model = model, with_head(model, config, len(read.classes))
    check_frozen(whole, model, config)
    return model, read


def _called(given: Any) -> str:
    """An optimizer or a loss of Keras by its name."""
    return visible(getattr(given, "name", getattr(given, "__name__", given)), 60)


def first_lines(
    model: keras.Model, read: RunData, config: TrainConfig, images: DataConfig, device: torch.device
) -> str:
    """What is about to happen: classes, images by split, device, input, what trains and why."""
    lines = []
    if isinstance(config, Plan):
        lines.append(f"The plan:\n{config.as_it_runs(images)}")
    if read.classes:
        more = f", and {len(read.classes) - NAMED} more" if len(read.classes) > NAMED else ""
        named = ", ".join(map(visible, read.classes[:NAMED]))
        lines.append(f"{len(read.classes)} classes: {named}{more}")
    each = sum(map(len, read.plan(0)))
    drawn = f" ({each} in an epoch, by the DataLoader)" if each != len(read.training) else ""
    parts = [f"{len(read.training)} train{drawn}"]
    if read.validation is not None:
        same = ""
        if read.held_out and isinstance(read.training, Folder):
            is_folder = read.training.root.is_dir()
            same = f" (held out of the same {'folder' if is_folder else 'table'})"
        parts.append(f"{len(read.validation)} validate{same}")
    if read.test is not None:
        parts.append(f"{len(read.test)} test (scored once, at the end)")
    lines.append(f"Images: {', '.join(parts)}")
    cores = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    lines.append(f"Device: {device}{cores}, {config.precision}")
    lines.append(f"Input: {geometry_text(images)}")
    is_frozen = frozen_end(model) is not model.inputs[0]
    if mixes(config) and config.cache and is_frozen:
        lines.append("Cached: nothing; frozen layers run in every step, as mixed images are new")
    of_cache = ("cache_copies", "cache_dtype", "cache_dir")
    unused = [n for n in of_cache if getattr(config, n) != getattr(TrainConfig, n)]
    if unused and not (config.cache and (is_frozen or config.unfreeze)):
        because = ", as no layer is frozen" if config.cache else ""
        lines.append(f"Cached: nothing{because}, so that nothing follows from {', '.join(unused)}")
    if getattr(model, "compiled", False):
        used = [
            f"{n} {_called(v)}" for n in ("optimizer", "loss") if (v := getattr(model, n, None))
        ]
        lines.append(
            f"Not used: what {model.name} was compiled with ({', '.join(used)}); a run has its own "
            f"optimizer, and cross-entropy as the loss"
        )
    trained = sum(v.value.numel() for v in model.trainable_variables)
    training = [layer for layer in model.layers if layer.trainable_variables]
    names = [layer.name for layer in training]
    is_nested = any(isinstance(layer, keras.Model) for layer in training)
    blocks = {name.partition("_")[0] for name in names}
    if config.layer_decay != 1 and len(blocks) == 1 and not (is_nested or config.unfreeze):
        lines.append("Without effect: layer_decay, as layers of one block alone train")
    shown = names if len(names) <= 4 else [names[0], "...", names[-1]]
    lines.append(
        f"Trains: {', '.join(shown)}, {trained:,} of {model.count_params():,} parameters"
        + "".join(f"; from epoch {epoch + 1} on {name} too" for epoch, name in config.unfreeze)
    )
    return "\n".join(lines)
