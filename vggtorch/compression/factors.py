"""Cheaper layers in the place of one, in closed form from what the layer sees and is to give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggtorch.compression.rows import NEW, Rows
from vggtorch.compression.sites import Site

# Of the layers in the place of one, what is added to its name, and along which axes (0 rows,
# 1 columns) they take its stride and padding. The last of all has the old name itself.
PARTS: dict[str, tuple[tuple[str, tuple[int, ...]], ...]] = {
    "low rank": (("_rank", (0, 1)), ("", ())),
    "separated": (("_vertical", (0,)), ("_horizontal", (1,)), ("", ())),
    "bottleneck": (("_narrow", ()), ("_core", (0, 1)), ("", ())),
    "channels": (("", (0, 1)),),
}


@dataclass(frozen=True)
class Part:
    """One of the layers that stand in for another.

    Attributes:
        suffix: what is added to the old layer's name; the last of all has the old name itself.
        weight: (O, I, H, W).
        axes: the axes (0 rows, 1 columns) along which it takes the old layer's stride and padding.
    """

    suffix: str
    weight: Tensor
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Factors:
    """Layers that stand in for one.

    Attributes:
        method: how they were made.
        parts: in their order.
        bias: of the last part; None where it has none.
        reads: the channels that enter, where the others are deleted.
        gives: the channels that leave, likewise.
    """

    method: str
    parts: tuple[Part, ...]
    bias: Tensor | None
    reads: Tensor | None = None
    gives: Tensor | None = None

    def __call__(self, patches: Tensor) -> Tensor:
        """What they give at positions whose patches (N, I, H, W) are given, (N, O)."""
        if self.reads is not None:
            patches = patches[:, self.reads]
        for part in self.parts:
            patches = F.conv2d(patches, part.weight)
        return patches.flatten(1) + (0 if self.bias is None else self.bias)

    @classmethod
    def of(
        cls,
        method: str,
        weights: Sequence[Tensor],
        bias: Tensor | None,
        reads: Tensor | None = None,
        gives: Tensor | None = None,
    ) -> Factors:
        """What a method puts in the place of a layer, with these weights."""
        parts = [
            Part(suffix if weight is not weights[-1] else "", weight, axes)
            for weight, (suffix, axes) in zip(weights, PARTS[method], strict=False)
        ]
        return cls(method, tuple(parts), bias, reads, gives)

    @classmethod
    def random(cls, site: Site, method: str, ranks: Sequence[int]) -> Factors:
        """Layers of these ranks with random weights, to see how long they take."""
        weights = [torch.randn(shape, **NEW) for shape in shapes(site, method, ranks)]
        return cls.of(method, weights, torch.zeros(site.outputs, **NEW))

    def module(self, site: Site) -> nn.Sequential:
        """The layers as a torch module that takes the place of the old one's."""
        children: list[nn.Module] = []
        for part in self.parts:
            outputs, inputs, *size = part.weight.shape
            bias = self.bias if part is self.parts[-1] else None
            stride, padding = geometry(site, part.axes)
            options = {"bias": bias is not None, **NEW}
            child: nn.Linear | nn.Conv2d
            if site.is_dense:
                child = nn.Linear(inputs, outputs, **options)
            else:
                child = nn.Conv2d(inputs, outputs, (size[0], size[1]), stride, padding, **options)
            with torch.no_grad():
                child.weight.copy_(part.weight.reshape(child.weight.shape))
                if bias is not None:
                    child.bias.copy_(bias)  # type: ignore[union-attr]
            children.append(child.to(memory_format=torch.channels_last))
        if self.reads is not None:
            children.insert(0, _Reading(self.reads))
        if self.gives is not None:
            children.append(_Giving(self.gives, site.outputs))
        return nn.Sequential(*children)


class _Reading(nn.Module):
    """Takes some channels of a map; they are deleted once the Keras model is built."""

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.kept]


class _Giving(nn.Module):
    """Gives a map with zeros in place of the channels that are to be deleted."""

    kept: Tensor

    def __init__(self, kept: Tensor, outputs: int) -> None:
        super().__init__()
        self.register_buffer("kept", kept)
        self.outputs = outputs

    def forward(self, y: Tensor) -> Tensor:
        whole = y.new_zeros(len(y), self.outputs, *y.shape[2:])
        return whole.index_copy(1, self.kept, y)


def geometry(site: Site, axes: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The stride and padding of a part that takes those of the old layer along some axes."""
    rows, columns = (axis in axes for axis in (0, 1))
    stride = site.stride[0] if rows else 1, site.stride[1] if columns else 1
    padding = site.padding[0] if rows else 0, site.padding[1] if columns else 0
    return stride, padding


def low_rank(rows: Rows, rank: int) -> Factors:
    """The kernel to `rank` channels, then 1 x 1.

    X. Zhang, J. Zou, K. He, J. Sun: Accelerating Very Deep Convolutional Networks for
    Classification and Detection, 2016. Of a Dense layer this is the truncated singular value
    decomposition, where inputs are measured by their covariance.
    """
    down, up, bias = rows.responses.cut(rank)
    first = torch.einsum("ro,oihw->rihw", down, rows.weight)
    return Factors.of("low rank", [first, up[:, :, None, None]], bias)


def separated(rows: Rows, rank: int, second_rank: int | None = None) -> Factors:
    """H x 1 to `rank` channels, then 1 x W; or 1 x W to `second_rank` channels, and then 1 x 1.

    M. Jaderberg, A. Vedaldi, A. Zisserman: Speeding up Convolutional Neural Networks with Low Rank
    Expansions, 2014; three layers as in Zhang et al. 2016.
    """
    outputs, inputs, height, width = rows.weight.shape
    down, matrix, bias = rows.columns.regress(rank)  # (rank, I H), (rank W, O), (O)
    vertical = down.reshape(-1, inputs, height, 1)
    kernel = matrix.T.reshape(outputs, -1, 1, width)
    if second_rank is None:
        return Factors.of("separated", [vertical, kernel], bias)
    lower, up, bias = rows.columns.given(rank, matrix).cut(second_rank)
    horizontal = torch.einsum("ro,oihw->rihw", lower, kernel)
    return Factors.of("separated", [vertical, horizontal, up[:, :, None, None]], bias)


def bottleneck(rows: Rows, rank: int, second_rank: int) -> Factors:
    """1 x 1 to `rank` channels, the kernel from these to `second_rank`, then 1 x 1.

    Y.-D. Kim et al.: Compression of Deep Convolutional Neural Networks for Fast and Low Power
    Mobile Applications, 2016 (Tucker-2), here of what enters the layer and what is to leave it.
    """
    outputs, _, height, width = rows.weight.shape
    down, matrix, _ = rows.pixels.regress(rank)  # (rank, I), (rank H W, O)
    kernel = matrix.T.reshape(outputs, -1, height, width)
    lower, up, bias = rows.pixels.given(rank, matrix).cut(second_rank)
    core = torch.einsum("ro,oihw->rihw", lower, kernel)
    return Factors.of("bottleneck", [down[:, :, None, None], core, up[:, :, None, None]], bias)


# What layers of some ranks cost

METHODS: dict[str, Callable[..., Factors]] = {
    "low rank": low_rank,
    "separated": separated,
    "bottleneck": bottleneck,
}
_RATIOS = {"low rank": (None,), "separated": (None, 1.2), "bottleneck": (1.0,)}
SHARES = (0.6, 0.45, 0.34, 0.25, 0.18, 0.13, 0.09)  # of a layer's cost, which are tried
LANES = 16  # numbers that a processor multiplies at once; tensor cores take 8 or 16


def whole_vectors(channels: int, lanes: int = LANES) -> int:
    """The most channels, up to so many, that fill whole vectors: a part takes as long as all.

    In VGG16 compressed four times, ranks such as 19, 23, 38 and 83 would cost seven in a hundred
    multiply-adds more on AVX512 than are counted, most of them in block 1.
    """
    return channels if channels < lanes else channels - channels % lanes


def shapes(site: Site, method: str, ranks: Sequence[int]) -> list[tuple[int, ...]]:
    """The shapes (O, I, H, W) of the weights that a method puts in the place of one."""
    (height, width), first = site.kernel, ranks[0]
    if method == "low rank":
        return [(first, site.inputs, height, width), (site.outputs, first, 1, 1)]
    if method == "bottleneck":
        core = (ranks[1], first, height, width)
        return [(first, site.inputs, 1, 1), core, (site.outputs, ranks[1], 1, 1)]
    vertical = (first, site.inputs, height, 1)
    if len(ranks) == 1:
        return [vertical, (site.outputs, first, 1, width)]
    return [vertical, (ranks[1], first, 1, width), (site.outputs, ranks[1], 1, 1)]


def multiply_adds(site: Site, method: str, ranks: Sequence[int]) -> int:
    """Of the layers that a method puts in the place of one, for one image."""
    # A layer before the one that takes the stride and padding of an axis sees all of the axis.
    first = site.positions
    if method != "low rank":
        _, high, wide = site.unpadded
        padded = site.entering[2] + 2 * site.padding[1]
        across = (padded - site.kernel[1]) // site.stride[1] + 1
        first = high * wide if method == "bottleneck" else site.positions // across * wide
    return sum(
        prod(shape) * (site.positions if i else first)
        for i, shape in enumerate(shapes(site, method, ranks))
    )


def ranks_for(site: Site, method: str, share: float, lanes: int = LANES) -> list[tuple[int, ...]]:
    """The ranks with which a method costs at most this share of a layer's multiply-adds.

    Those above `lanes` are multiples of it.
    """
    if method != "low rank" and (min(site.kernel) == 1 or site.is_dense):
        return []
    budget = share * site.multiply_adds
    found = []
    for ratio in _RATIOS[method]:

        def ranks(first: int, ratio: float | None = ratio) -> tuple[int, ...]:
            if ratio is None:
                return (first,)
            second = round(first * ratio)
            if second > lanes:  # the nearest
                second = whole_vectors(second + lanes // 2, lanes)
            return first, min(site.outputs, max(1, second))

        most = {
            "low rank": min(site.outputs, site.inputs * site.kernel[0] * site.kernel[1]),
            "separated": min(site.inputs * site.kernel[0], site.outputs * site.kernel[1]),
            "bottleneck": site.inputs,
        }[method]
        every = (n for n in range(most, 0, -1) if n == whole_vectors(n, lanes))
        fits = (n for n in every if multiply_adds(site, method, ranks(n)) <= budget)
        if first := next(fits, 0):
            found.append(ranks(first))
    return found
