"""Which reasons of a plan hold for what runs: a setting of the user's may take another way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from vggtorch.training.advice import Plan, Reason
from vggtorch.training.config import TrainConfig
from vggtorch.training.mixing import mixes
from vggtorch.weight_sets import DataConfig


def plan_as_it_runs(plan: Plan, images: DataConfig) -> str:
    """A plan's decisions with their reasons, and which ones its settings have taken another way.

    Args:
        plan: as it runs.
        images: what images are brought to.
    """
    followed = tuple(reason for reason in plan.reasons if holds(reason, plan, images))
    others = [reason.decision for reason in plan.reasons if reason not in followed]
    lines = [f"By your settings, not: {decision}" for decision in others]
    return "\n".join([*filter(None, [str(dataclasses.replace(plan, reasons=followed))]), *lines])


def holds(reason: Reason, config: TrainConfig, images: DataConfig) -> bool:
    """Whether a decision is what a configuration does."""
    for start, is_so in _DECISIONS:
        if reason.decision.startswith(start):
            return is_so(reason.decision, config, images)
    return True


def _frozen_whole(config: TrainConfig) -> bool:
    return config.freeze is not None and config.freeze == config.cut


# How a decision of `advise` begins, and whether it is what runs; the first that fits counts.
_DECISIONS: tuple[tuple[str, Callable[[str, TrainConfig, DataConfig], bool]], ...] = (
    (
        "Freeze every pretrained layer and train",
        lambda d, c, _: _frozen_whole(c) and not c.unfreeze and f" {c.head} head" in d,
    ),
    (
        "Freeze every layer up to",
        lambda d, c, _: f" {c.freeze} and" in d and not c.unfreeze and f" {c.head} head" in d,
    ),
    ("Put the head on the maps of the last three", lambda d, c, _: c.head == "multilevel"),
    ("Cut at", lambda d, c, _: d == f"Cut at {c.cut}."),
    (
        "Run the frozen layers once, on each image and its mirror image.",
        lambda d, c, _: (
            bool(c.cache and c.freeze and c.augment == "flip" and c.cache_copies == 2)
            and not mixes(c)
        ),
    ),
    ("Hold out a tenth", lambda d, c, _: c.validation_split == 0.1),
    (
        "Pool each feature map to its mean and maximum under the head, and its quarters",
        lambda d, c, _: c.head == "multilevel",
    ),
    (
        "Pool each feature map to its mean and maximum",
        lambda d, c, _: c.head in ("linear", "mlp"),
    ),
    (
        "Resize the shorter side to the size, and cut nothing off it.",
        lambda d, c, images: images.crop_mode == "center" and images.crop_pct == 1,
    ),
    ("Smooth the labels", lambda d, c, _: d == f"Smooth the labels by {c.label_smoothing}."),
    (
        "Begin with all pretrained layers frozen",
        lambda d, c, _: (
            bool(_frozen_whole(c) and c.unfreeze) and f" {c.unfreeze[0][0]} epochs" in d
        ),
    ),
    ("Then unfreeze", lambda d, c, _: bool(c.unfreeze) and f" {c.unfreeze[-1][1]}." in d),
    ("Each block learns", lambda d, c, _: bool(c.unfreeze) and f" {c.layer_decay} times" in d),
)
