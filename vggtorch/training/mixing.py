"""Mixup and cutmix: every image of a batch mixed with its neighbour, and so are their labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from vggtorch.training.config import TrainConfig
from vggtorch.training.data import seeded

if TYPE_CHECKING:
    from torchvision.transforms import v2

_TAG = 2**31 - 1  # keeps these random numbers apart from those of layers in a process


def mixed(
    images: torch.Tensor,
    labels: torch.Tensor,
    partners: tuple[torch.Tensor, torch.Tensor],
    classes: int,
    config: TrainConfig,
    step: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, H, W, C) mixed with their partners, and shares of classes (N, classes).

    They are torchvision's MixUp and CutMix, which mix an image with the one before it in the batch.
    With both, one of them is chosen for each batch. What is drawn follows from (seed, step), the
    same in every process.

    Sources: Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018; Yun et al., "CutMix",
    2019.
    """
    others, other_labels = partners
    with seeded(config.seed, step, _TAG):
        transform = _chosen(config, classes)
        # torchvision reads the height and width of channels-first images.
        like = torch.empty(1, 3, *images.shape[1:3], device="meta")
        drawn = transform.make_params([like])
    if "box" in drawn:
        left, top, right, bottom = drawn["box"]
        images = images.clone()
        images[:, top:bottom, left:right] = others[:, top:bottom, left:right]
        share = drawn["lam_adjusted"]
    else:
        share = drawn["lam"]
        images = others * (1.0 - share) + images * share
    first, second = (F.one_hot(y, classes).float() for y in (labels, other_labels))
    return images, second * (1.0 - share) + first * share


def _chosen(config: TrainConfig, classes: int) -> v2.MixUp | v2.CutMix:
    from torchvision.transforms import v2

    alphas = {v2.MixUp: config.mixup, v2.CutMix: config.cutmix}
    known = [kind(alpha=alpha, num_classes=classes) for kind, alpha in alphas.items() if alpha]
    return known[0] if len(known) == 1 else known[int(torch.randint(len(known), ()))]


def mixes(config: TrainConfig) -> bool:
    """Whether images of a batch are mixed."""
    return bool(config.mixup or config.cutmix)
