"""`PerceptualLoss`: content, style and smoothness of images, measured by a network's features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggtorch.features.extractor import FeatureExtractor


def gram_matrix(features: Tensor) -> Tensor:
    """Which channels go together in each image, (N, C, C), of feature maps (N, C, H, W).

    Divided by C * H * W, as Johnson et al. 2016 do. Of other numbers than float64 the sums are
    float32's.

    Raises:
        ValueError: values of another rank.

    Example:
        >>> import torch
        >>> from vggtorch.features import gram_matrix
        >>> gram_matrix(torch.ones(1, 2, 3, 3))
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]]])
    """
    flat = _maps(features).flatten(2)  # (N, C, H * W)
    return flat @ flat.mT / (flat.shape[1] * flat.shape[2])


def total_variation(images: Tensor) -> Tensor:
    """The sum of differences between neighbouring pixels, (N,), of images (N, C, H, W).

    Of other numbers than float64 it is float32's.

    Raises:
        ValueError: values of another rank.

    Source: tf.image.total_variation; Johnson et al. 2016 use it to keep images smooth.

    Example:
        >>> import torch
        >>> from vggtorch.features import total_variation
        >>> total_variation(torch.tensor([[[[0., 1.], [0., 1.]]]]))
        tensor([2.])
    """
    images = _maps(images)
    down = (images[:, :, 1:] - images[:, :, :-1]).abs().sum((1, 2, 3))
    return down + (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().sum((1, 2, 3))


def _maps(values: Tensor) -> Tensor:
    """Maps (N, C, H, W) in numbers that sums don't leave, as those of 8 or 16 bits would."""
    if not isinstance(values, Tensor) or values.ndim != 4:
        received = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"Received maps of shape {received}; expected (N, C, H, W).")
    return values if values.dtype == torch.float64 else values.float()


def _check_weight(received: str, value: Any) -> None:
    """See that a value, described as `received`, can be the weight of a term."""
    if not (isinstance(value, Real) and 0 <= float(value) < inf):
        raise ValueError(f"Received {received}; expected a number of 0 or more.")


@dataclass(frozen=True)
class Targets:
    """What images are compared with, computed once: see `PerceptualLoss.targets`.

    Attributes:
        content: the features of the content images by tap.
        style: the Gram matrices of the style images by tap.
    """

    content: dict[str, Tensor] = field(default_factory=dict)
    style: dict[str, Tensor] = field(default_factory=dict)


class PerceptualLoss(nn.Module):
    """How far images are from others in content and in style, as a network sees them.

    The content loss of a tap is the mean squared difference of its features. The style loss is the
    squared Frobenius norm of the difference of their Gram matrices (`gram_matrix`), 4 times what
    Gatys et al. define for a layer. Total variation is that of `total_variation`. Each is a mean
    over the images of a batch, is multiplied by its weight, and all are added up.

    Args:
        extractor: the features, with every tap that is named here.
        content: weights by tap.
        style: weights by tap.
        total_variation: its weight.

    Raises:
        ValueError: no weight at all, a tap that the extractor doesn't have, weights that aren't
            numbers, or, when it is called, targets that are missing or of another size.

    Source: Johnson, Alahi and Fei-Fei, "Perceptual Losses for Real-Time Style Transfer and
    Super-Resolution", ECCV 2016; Gatys, Ecker and Bethge, "Image Style Transfer Using Convolutional
    Neural Networks", CVPR 2016.

    Example:
        >>> import torch, vggtorch as vt
        >>> vgg = vt.VGG16(weights=None, include_top=False)
        >>> taps = ["relu1_2", "relu2_2"]
        >>> extractor = vt.FeatureExtractor(vgg, taps, normalization="imagenet")
        >>> loss = vt.PerceptualLoss(extractor, content={"relu2_2": 1}, style={"relu1_2": 10})
        >>> images = torch.rand(2, 3, 32, 32)
        >>> float(loss(images, images))
        0.0
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        content: Mapping[str, float] | None = None,
        style: Mapping[str, float] | None = None,
        total_variation: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(extractor, FeatureExtractor):
            raise ValueError(
                f"Received extractor of type {type(extractor).__name__}; expected "
                f"vt.FeatureExtractor(model, taps), with every tap that has a weight."
            )
        for kind, given in (("content", content), ("style", style)):
            if not isinstance(given, Mapping | None):
                raise ValueError(
                    f"Received {kind}={given!r}; expected weights by tap, {{'relu3_3': 1.0}}, say."
                )
            for tap, weight in (given or {}).items():
                if tap not in extractor.taps:
                    raise ValueError(
                        f"Received a weight of {kind} for {tap!r}, which the extractor doesn't "
                        f"tap. Its taps: {', '.join(extractor.taps)}."
                    )
                _check_weight(f"the weight {weight!r} for {tap!r}", weight)
        self.content, self.style = dict(content or {}), dict(style or {})
        _check_weight(f"{total_variation=}", total_variation)
        self.total_variation = float(total_variation)
        if not (self.content or self.style or total_variation):
            raise ValueError(
                "Received no weights; expected content={'relu3_3': 1.0}, say, or style or "
                "total_variation."
            )
        self.extractor = extractor

    def targets(self, content: Tensor | None = None, style: Tensor | None = None) -> Targets:
        """The features that images are to come near, for many calls with the same targets.

        Args:
            content: images whose content counts, as the extractor takes them.
            style: images whose style counts; of any size, one for all images or one for each.
        """
        with torch.no_grad():
            found = self._features(content) if content is not None and self.content else {}
            same = style is content and bool(found)
            styles = found if same else self._features(style) if style is not None else {}
            return Targets(
                {tap: found[tap] for tap in self.content if found},
                {tap: gram_matrix(styles[tap]) for tap in self.style if styles},
            )

    def terms(
        self, images: Tensor, targets: Tensor | Targets, style: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Each part of the loss, multiplied by its weight: "content/relu3_3" and so on."""
        if not isinstance(targets, Targets):
            targets = self.targets(targets, targets if style is None else style)
        elif style is not None:
            raise ValueError(
                "Received targets and style images; pass both to targets(content, style)."
            )
        for kind in ("content", "style"):
            if taps := {*getattr(self, kind)} - {*getattr(targets, kind)}:
                raise ValueError(
                    f"The targets have no {kind}, which {sorted(taps)} are compared with. Pass "
                    f"{kind} images to targets()."
                )
        terms = {}
        features = self._features(images) if self.content or self.style else {}
        for tap, weight in self.content.items():
            received, wanted = features[tap], targets.content[tap]
            if received.shape != wanted.shape:
                raise ValueError(
                    f"Received images whose {tap!r} is {tuple(received.shape)}, and content images "
                    f"whose {tap!r} is {tuple(wanted.shape)}; expected as many, of one size."
                )
            terms[f"content/{tap}"] = weight * F.mse_loss(received.float(), wanted.float())
        for tap, weight in self.style.items():
            received, wanted = gram_matrix(features[tap]), targets.style[tap]
            if len(wanted) not in (1, len(received)):
                raise ValueError(
                    f"Received {len(received)} images and {len(wanted)} style images; expected one "
                    f"style image, or one for each."
                )
            terms[f"style/{tap}"] = weight * (received - wanted).square().sum((1, 2)).mean()
        if self.total_variation:
            first = self.extractor.pixels.channels_first(images)
            terms["total_variation"] = self.total_variation * total_variation(first).mean()
        return terms

    def forward(
        self, images: Tensor, targets: Tensor | Targets, style: Tensor | None = None
    ) -> Tensor:
        """The loss of images, a scalar.

        Args:
            images: as the extractor takes them.
            targets: images whose content, and whose style unless `style` is given, is wanted; or
                what `targets` has computed of them.
            style: images whose style is wanted.
        """
        return torch.stack([*self.terms(images, targets, style).values()]).sum()

    def _features(self, images: Tensor) -> dict[str, Tensor]:
        first = self.extractor.pixels.channels_first
        return {tap: first(value) for tap, value in self.extractor(images).items()}
