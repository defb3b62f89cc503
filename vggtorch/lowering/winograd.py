"""3x3 convolutions with a fraction of the multiplications, by Winograd's minimal filtering.

An output tile of m x m pixels is computed from (m + 2) x (m + 2) transformed numbers for each
channel, so that 16 or 36 multiplications take the place of the convolution's 4 * 9 or 16 * 9.
Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016, whose
F(2x2, 3x3) and F(4x4, 3x3) these are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# What is between two products has about this many bytes for each thread, to stay in the cache.
CHUNK_BYTES = 8 << 20
# The tiles of one call must be this many, or reading the transformed kernels takes longer than what
# they spare; and so must the channels, or transforming the images does.
MIN_TILES = {torch.float32: 32, torch.bfloat16: 128}
MIN_CHANNELS = {torch.float32: 160, torch.bfloat16: 256}
# The transformed numbers are up to so many times as large as the sums of the convolution can be.
GROWTH = 1e5


@dataclass(frozen=True)
class Transform:
    """The matrices of F(m x m, 3x3): of the images, of the kernel and of the outputs."""

    images: tuple[tuple[float, ...], ...]
    kernel: tuple[tuple[float, ...], ...]
    outputs: tuple[tuple[float, ...], ...]

    def matrix(self, name: str, dtype: torch.dtype, *, both: bool) -> Tensor:
        """One of them for one axis, or for both at once: rows and columns are pairs then."""
        one = torch.tensor(getattr(self, name), dtype=torch.float64)
        return (torch.kron(one, one) if both else one).to(dtype)


F2 = Transform(
    images=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    kernel=((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    outputs=((1, 1, 1, 0), (0, 1, -1, -1)),
)
F4 = Transform(
    images=(
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
    kernel=(
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    outputs=((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
)
# The larger one's numbers cancel, which eight bits of a bfloat16 are too few for.
TRANSFORMS = {torch.float32: F4, torch.bfloat16: F2}


class Workspace:
    """Memory for what is between two products, used again by every convolution of a network."""

    def __init__(self) -> None:
        self.memory: dict[Any, Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, valid until the next of this name is taken."""
        count = math.prod(shape)
        held = self.memory.get((name, dtype))
        if held is None or held.numel() < count:
            held = self.memory[name, dtype] = torch.empty(count, dtype=dtype)
        return held[:count].view(*shape)


def pays(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether this convolution of x (N, I, H, W) can be computed so, and is faster then."""
    if x.dtype not in TRANSFORMS or not (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.groups == 1
    ):
        return False
    high, wide = _tiles(x.shape, conv.padding, len(TRANSFORMS[x.dtype].outputs))
    # The transforms cost as much for each channel that comes in and for each that goes out.
    out, into = conv.weight.shape[:2]
    channels = 2 * into * out / (into + out)
    return len(x) * high * wide >= MIN_TILES[x.dtype] and channels >= MIN_CHANNELS[x.dtype]


def _tiles(shape: Sequence[int], padding: Any, m: int) -> tuple[int, int]:
    """How many tiles of m x m cover the output for images (N, C, H, W), down and across."""
    high, wide = (-(-(s + 2 * p - 2) // m) for s, p in zip(shape[2:], padding, strict=True))
    return high, wide


class WinogradConv2d:
    """A 3x3 convolution of `weight` (O, I, 3, 3), its bias and activation.

    Args:
        activation: "none", "relu" or "relu6".
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str) -> None:
        dtype = weight.dtype
        self.transform = TRANSFORMS[dtype]
        self.m = len(self.transform.outputs)
        # In bfloat16 both axes at once: between them numbers would be rounded once more, and
        # products of so few rows are slow there.
        self.both = dtype == torch.bfloat16
        self.images = self.transform.matrix("images", dtype, both=self.both)
        self.outputs = self.transform.matrix("outputs", dtype, both=self.both)
        kernel = self.transform.matrix("kernel", torch.float64, both=True)
        out, into = weight.shape[:2]
        flat = weight.permute(2, 3, 1, 0).reshape(9, into * out).double()
        self.kernels = (kernel @ flat).to(dtype).view(-1, into, out)
        self.bias, self.activation = bias, activation

    def __call__(self, x: Tensor, padding: Sequence[int], workspace: Workspace) -> Tensor:
        """The output (N, O, H, W), channels last in memory, for x (N, I, H, W), which is finite."""
        m, (n, _, height, width) = self.m, x.shape
        high, wide = _tiles(x.shape, padding, m)
        out_height, out_width = height + 2 * padding[0] - 2, width + 2 * padding[1] - 2
        into, out = self.kernels.shape[1:]
        padded = workspace.take("padded", (n, m * high + 2, m * wide + 2, into), x.dtype)
        _put_(padded, x.permute(0, 2, 3, 1), padding)
        result = x.new_empty(n, m * high, m * wide, out)
        # Whole images at a time, or rows of tiles of one.
        tile_bytes = len(self.kernels) * max(into, out) * x.element_size()
        count = max(1, CHUNK_BYTES * torch.get_num_threads() // tile_bytes)
        images = max(1, count // (high * wide))
        rows = high if images > 1 else min(high, max(1, count // wide))
        for i in range(0, n, images):
            for row in range(0, high, rows):
                part = padded[i : i + images, m * row : m * min(row + rows, high) + 2]
                target = result[i : i + images, m * row : m * min(row + rows, high)]
                self._run(part, target, workspace)
        if result.shape[1:3] != (out_height, out_width):
            result = result[:, :out_height, :out_width].contiguous()
        return result.permute(0, 3, 1, 2)

    def _run(self, x: Tensor, target: Tensor, workspace: Workspace) -> None:
        """Some rows of tiles: x (N, H + 2, W + 2, I) into target (N, H, W, O)."""
        m, a = self.m, self.m + 2
        into, out = self.kernels.shape[1:]
        n, high, wide = len(x), target.shape[1] // m, target.shape[2] // m
        tiles = n * high * wide
        moved = self._transformed(x, high, wide, workspace)
        sums = workspace.take("sums", (a * a, tiles, out), x.dtype)
        torch.bmm(moved.view(a * a, tiles, into), self.kernels, out=sums)
        if self.bias is not None:
            sums[a + 1] += self.bias  # which each output takes once, as its matrix has it
        back = workspace.take("moved", (m * m, tiles * out), x.dtype)
        if self.both:
            torch.mm(self.outputs, sums.view(a * a, -1), out=back)
        else:
            half = workspace.take("gathered", (m, a, tiles * out), x.dtype)
            torch.mm(self.outputs, sums.view(a, -1), out=half.view(m, -1))
            torch.bmm(self.outputs.expand(m, m, a), half, out=back.view(m, m, -1))
        pixels = back.view(m, m, n, high, wide, out).permute(2, 3, 0, 4, 1, 5)
        view = target.view(n, high, m, wide, m, out)
        if self.activation == "none":
            view.copy_(pixels)
        else:
            torch.clamp(pixels, 0, 6 if self.activation == "relu6" else None, out=view)

    def _transformed(self, x: Tensor, high: int, wide: int, workspace: Workspace) -> Tensor:
        """The windows of x (N, H + 2, W + 2, I), transformed: (a * a, N * high * wide * I)."""
        m, a, (n, _, width, into) = self.m, self.m + 2, x.shape
        by_image, by_row, by_column, _ = x.stride()
        shape = a, a, n, high, wide, into
        gathered = workspace.take("gathered", shape, x.dtype)
        moved = workspace.take("moved", (a * a, n * high * wide * into), x.dtype)
        if self.both:
            strides = by_row, by_column, by_image, m * by_row, m * by_column, 1
            gathered.copy_(x.as_strided(shape, strides))
            torch.mm(self.images, gathered.view(a * a, -1), out=moved)
            return moved
        lines = workspace.take("lines", (n, high, a, width * into), x.dtype)
        for image, line in zip(x, lines, strict=True):
            windows = image.as_strided((high, a, width * into), (m * by_row, by_row, 1))
            torch.bmm(self.images.expand(high, a, a), windows, out=line)
        by_image, by_tile, by_row, _ = lines.stride()
        strides = by_row, into, by_image, by_tile, m * into, 1
        gathered.copy_(lines.as_strided(shape, strides))
        torch.bmm(self.images.expand(a, a, a), gathered.view(a, a, -1), out=moved.view(a, a, -1))
        return moved


def _put_(padded: Tensor, x: Tensor, padding: Sequence[int]) -> None:
    """Write x (N, H, W, C) into the larger tensor, and zeros around it."""
    (top, left), (height, width) = padding, x.shape[1:3]
    padded[:, :top] = 0
    padded[:, top + height :] = 0
    padded[:, :, :left] = 0
    padded[:, :, left + width :] = 0
    padded[:, top : top + height, left : left + width] = x
