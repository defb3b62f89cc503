"""`LPIPS`: how different two images look, by a network's features and weights for its channels."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

import keras
import torch
from torch import Tensor, nn

from vggtorch.features.extractor import FeatureExtractor
from vggtorch.paths import as_path
from vggtorch.weights import read

TAPS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")  # of VGG16
EPSILON = 1e-10  # as the lpips package has it


class LPIPS(nn.Module):
    """The distance of Learned Perceptual Image Patch Similarity, on VGG16.

    The features behind the last ReLU of each block are scaled to length 1 at each place; their
    squared differences, weighted by channel, are averaged over places and added up. With
    torchvision's weights (`imagenet`) this is `lpips.LPIPS(net="vgg")`. Other VGG weights give
    other distances, which the published linear layers were not made for.

    The gradient is finite where features are 0 everywhere at a place; that of the lpips package is
    NaN there.

    Args:
        source: a VGG16, a weight set or a checkpoint's path, as
            `FeatureExtractor` takes them.
        linear: the weights by channel: a file of the lpips package (`vgg.pth`) or its tensors by
            name, such as "lin0.model.1.weight". By default the file of the installed package.
        normalization: as `FeatureExtractor` has it, like all that follow.
        value_range: what black and white are in the images given.
        data_format: layout of the images.
        checkpoint: compute maps again in backward.

    Raises:
        ValueError: linear layers that don't fit, or what FeatureExtractor refuses.
        ImportError: the lpips package isn't installed, where no linear layers are given.

    Source: Zhang, Isola, Efros, Shechtman and Wang, "The Unreasonable Effectiveness of Deep
    Features as a Perceptual Metric", CVPR 2018; github.com/richzhang/PerceptualSimilarity.

    Example:
        >>> import torch, vggtorch as vt
        >>> ones = {f"lin{i}.model.1.weight": torch.ones(1, width, 1, 1)
        ...         for i, width in enumerate((64, 128, 256, 512, 512))}
        >>> vgg = vt.VGG16(weights=None, include_top=False)
        >>> lpips = vt.LPIPS(vgg, ones, normalization="imagenet")
        >>> images = torch.rand(2, 3, 32, 32)
        >>> lpips(images, images).flatten()
        tensor([0., 0.])
    """

    def __init__(
        self,
        source: keras.Model | str | os.PathLike,
        linear: str | os.PathLike | Mapping[str, Tensor] | None = None,
        *,
        normalization: str | None = "model",
        value_range: tuple[float, float] = (0, 1),
        data_format: str = "channels_first",
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.extractor = FeatureExtractor(
            source,
            TAPS,
            normalization=normalization,
            value_range=value_range,
            data_format=data_format,
            checkpoint=checkpoint,
        )
        tensors = _linear_layers(linear)
        for i in range(len(TAPS)):
            width = self.extractor.network.get_submodule(f"block{i + 1}_conv1").out_channels
            name = f"lin{i}.model.1.weight"
            weight = torch.as_tensor(tensors[name]) if name in tensors else None
            if weight is None or weight.shape != (1, width, 1, 1):
                found = "none" if weight is None else f"one of shape {tuple(weight.shape)}"
                raise ValueError(
                    f"Expected the linear layer {name!r} of shape {(1, width, 1, 1)}, and found "
                    f"{found}. The file for VGG is vgg.pth of the lpips package."
                )
            self.register_buffer(f"lin{i}", weight.detach().float().clone())

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """The distance of each pair of images, (N, 1, 1, 1); gradients flow to both."""
        features, wanted = self.extractor(images), self.extractor(others)
        if images.shape != others.shape:
            raise ValueError(
                f"Received images of shapes {tuple(images.shape)} and {tuple(others.shape)}; "
                f"expected as many of one size."
            )
        total = images.new_zeros(())
        first = self.extractor.pixels.channels_first
        for i, tap in enumerate(TAPS):
            a, b = first(features[tap]), first(wanted[tap])
            difference = (_unit(a) - _unit(b)).square()
            weight: Tensor = getattr(self, f"lin{i}").to(difference.dtype)
            total = total + nn.functional.conv2d(difference, weight).mean((2, 3), keepdim=True)
        return total


def _unit(features: Tensor) -> Tensor:
    """Each place's features, (N, C, H, W), scaled to length 1."""
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + EPSILON)


def _linear_layers(linear: str | os.PathLike | Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    if isinstance(linear, Mapping):
        return linear
    if linear is None:
        package = importlib.util.find_spec("lpips")
        if package is None or package.origin is None:
            raise ImportError(
                "The linear layers of LPIPS come with the lpips package, which is not installed. "
                "Run pip install lpips, or pass linear=, the path of its vgg.pth."
            )
        linear = Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth"
    return read(as_path(linear, "linear")).tensors
