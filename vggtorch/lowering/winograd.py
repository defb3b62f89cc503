"""3x3 convolutions with a fraction of the multiplications, by Winograd's minimal filtering.

An output tile of m x m pixels is computed from (m + 2) x (m + 2) transformed numbers for each
channel, so that 16 or 36 multiplications take the place of the convolution's 4 * 9 or 16 * 9:

    outputs = A' ((G kernel G') * (B' images B)) A

The gradient of the images is such a convolution of the outputs' gradient with the flipped kernel;
the kernel's, in which this is linear, sums (B' images B) * (A gradient A') over the tiles, with as
few multiplications, and goes back through G.
Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016, whose
F(2x2, 3x3) and F(4x4, 3x3) these are.
"""

# ruff: noqa: D102  (forward and backward do what their class says)
from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What is between two products has about this many bytes for each thread, to stay in the cache.
CHUNK_BYTES = 8 << 20
# The tiles of one call must be this many, or reading the transformed kernels takes longer than what
# they spare; and so must the channels, or transforming the images does.
MIN_TILES = {torch.float32: 32, torch.bfloat16: 128}
MIN_CHANNELS = {torch.float32: 160, torch.bfloat16: 256}
GRADIENT_MIN_CHANNELS = {torch.float32: 96, torch.bfloat16: 256}
# The transformed numbers are up to so many times as large as the sums of the convolution can be.
GROWTH = 1e5


@dataclass(frozen=True)
class Transform:
    """The matrices of F(m x m, 3x3): of the images (B'), of the kernel (G), of the outputs (A')."""

    images: tuple[tuple[float, ...], ...]
    kernel: tuple[tuple[float, ...], ...]
    outputs: tuple[tuple[float, ...], ...]

    def matrix(self, name: str, dtype: torch.dtype, *, both: bool) -> Tensor:
        """One of them for one axis, or for both at once: rows and columns are pairs then."""
        one = torch.tensor(getattr(self, name), dtype=torch.float64, device="cpu")
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
    """Memory for what is between two products, used again by every convolution of a network.

    Each thread has its own.
    """

    def __init__(self) -> None:
        self.local = threading.local()

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, valid until the next of this name is taken."""
        memory, nbytes = vars(self.local), math.prod(shape) * dtype.itemsize
        held = memory.get(name)
        if held is None or held.nbytes < nbytes:
            held = memory[name] = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        return held[:nbytes].view(dtype).view(*shape)

    def release(self) -> None:
        """Let go of this thread's memory, until it is asked for again."""
        vars(self.local).clear()


def pays(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether this convolution of x (N, I, H, W) can be computed so, and is faster then."""
    return _pays(conv, x, MIN_CHANNELS)


def gradient_pays(conv: nn.Conv2d, x: Tensor) -> bool:
    """The same of the gradient of its kernel."""
    return _pays(conv, x, GRADIENT_MIN_CHANNELS)


def _pays(conv: nn.Conv2d, x: Tensor, min_channels: dict[torch.dtype, int]) -> bool:
    if x.dtype not in TRANSFORMS or not (
        conv.weight.shape[2:] == (3, 3)
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.groups == 1
    ):
        return False
    high, wide = _tiles(x.shape, conv.padding, len(TRANSFORMS[x.dtype].outputs))
    # The transforms cost as much for each channel that comes in and for each that goes out.
    out, into = conv.weight.shape[:2]
    channels = 2 * into * out / (into + out)
    return len(x) * high * wide >= MIN_TILES[x.dtype] and channels >= min_channels[x.dtype]


def _tiles(shape: Sequence[int], padding: Any, m: int) -> tuple[int, int]:
    """How many tiles of m x m cover the output for images (N, C, H, W), down and across."""
    high, wide = (-(-(s + 2 * p - 2) // m) for s, p in zip(shape[2:], padding, strict=True))
    return high, wide


@functools.cache
def filtering(dtype: torch.dtype) -> Filtering:
    """What computes Winograd's way in a dtype."""
    return Filtering(dtype)


class Filtering:
    """Convolutions and their gradients in one dtype; images are (N, C, H, W), channels last."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.transform = TRANSFORMS[dtype]
        self.m = len(self.transform.outputs)
        self.a = self.m + 2
        # In bfloat16 both axes at once: between them numbers would be rounded once more, and
        # products of so few rows are slow there.
        self.both = dtype == torch.bfloat16
        self.images = self.transform.matrix("images", dtype, both=self.both)
        self.outputs = self.transform.matrix("outputs", dtype, both=self.both)
        self.kernel = self.transform.matrix("kernel", dtype, both=True)

    def kernels(
        self, weight: Tensor, workspace: Workspace | None = None, *, back: bool = False
    ) -> Tensor:
        """A weight (O, I, 3, 3) transformed, (a * a, I, O), in a workspace or memory of its own.

        back: of the kernel that takes gradients of outputs to those of images, (a * a, O, I).
        """
        out, into = weight.shape[:2]
        flat = weight.permute(2, 3, 1, 0).reshape(9, into * out)
        shape = self.a**2, into * out
        result = None if workspace is None else workspace.take("kernels", shape, self.dtype)
        result = torch.mm(self.kernel.flip(1) if back else self.kernel, flat, out=result)
        kernels = result.view(-1, into, out)
        return kernels.mT if back else kernels

    def convolve(
        self, x: Tensor, kernels: Tensor, bias: Tensor | None, activation: str,
        padding: Sequence[int], workspace: Workspace,
    ) -> Tensor:  # fmt: skip
        """The output (N, O, H, W) of a convolution, bias and activation for x (N, I, H, W)."""
        m, (n, _, height, width) = self.m, x.shape
        high, wide = _tiles(x.shape, padding, m)
        out_height, out_width = height + 2 * padding[0] - 2, width + 2 * padding[1] - 2
        shape = n, kernels.shape[2], m * high, m * wide
        new: Any = {"dtype": x.dtype, "device": x.device}
        # No view, since autograd refuses to let views from its functions be written to.
        result = torch.empty(shape, memory_format=torch.channels_last, **new)
        pixels = result.permute(0, 2, 3, 1)
        for images, rows in self._chunks(n, high, wide, max(kernels.shape[1:])):
            part = self._windows(x[images], rows, wide, padding, workspace)
            target = pixels[images, m * rows.start : m * rows.stop]
            self._run(part, target, kernels, bias, activation, workspace)
        if result.shape[2:] == (out_height, out_width):
            return result
        return result[:, :, :out_height, :out_width].clone(memory_format=torch.channels_last)

    def weight_gradient(
        self, x: Tensor, grad: Tensor, padding: Sequence[int], workspace: Workspace
    ) -> Tensor:
        """The gradient (O, I, 3, 3) of a convolution's weight, by x and the outputs' gradient."""
        m, n, into, out = self.m, len(x), x.shape[1], grad.shape[1]
        high, wide = _tiles(x.shape, padding, m)
        # Not in bfloat16, because there are as many summands as tiles.
        precise = torch.promote_types(self.dtype, torch.float32)
        sums = workspace.take("kernels", (self.a**2, into, out), precise).zero_()
        for images, rows in self._chunks(n, high, wide, max(into, out)):
            part = self._windows(x[images], rows, wide, padding, workspace)
            moved = self._transformed(part, len(rows), wide, workspace)
            of_outputs = self._spread(grad[images], rows, wide, workspace)
            a, b = moved.view(self.a**2, -1, into).mT, of_outputs.view(self.a**2, -1, out)
            if self.dtype == precise:
                sums.baddbmm_(a, b)
            else:
                products = workspace.take("products", sums.shape, self.dtype)
                sums += torch.bmm(a, b, out=products)
        kernel = self.kernel.to(precise).t() @ sums.view(self.a**2, -1)
        return kernel.to(self.dtype).view(3, 3, into, out).permute(3, 2, 0, 1)

    def _chunks(self, n: int, high: int, wide: int, channels: int) -> Iterator[tuple[slice, range]]:
        """Whole images at a time, or rows of tiles of one, so that they stay in the cache."""
        tile_bytes = self.a**2 * channels * self.dtype.itemsize
        count = max(1, CHUNK_BYTES * torch.get_num_threads() // tile_bytes)
        images = max(1, count // (high * wide))
        rows = high if images > 1 else min(high, max(1, count // wide))
        for i in range(0, n, images):
            for row in range(0, high, rows):
                yield slice(i, min(i + images, n)), range(row, min(row + rows, high))

    def _windows(
        self, x: Tensor, rows: range, wide: int, padding: Sequence[int], workspace: Workspace
    ) -> Tensor:
        """What the tiles in some rows see of x: (N, m * rows + 2, m * wide + 2, I)."""
        size = self.m * len(rows) + 2, self.m * wide + 2
        start = self.m * rows.start - padding[0], -padding[1]
        return _cut(x.permute(0, 2, 3, 1), start, size, workspace.take)

    def _run(
        self, x: Tensor, target: Tensor, kernels: Tensor, bias: Tensor | None, activation: str,
        workspace: Workspace,
    ) -> None:  # fmt: skip
        """Some rows of tiles: x (N, H + 2, W + 2, I) into target (N, H, W, O)."""
        m, a = self.m, self.a
        into, out = kernels.shape[1:]
        n, high, wide = len(x), target.shape[1] // m, target.shape[2] // m
        tiles = n * high * wide
        moved = self._transformed(x, high, wide, workspace)
        sums = workspace.take("sums", (a * a, tiles, out), x.dtype)
        torch.bmm(moved.view(a * a, tiles, into), kernels, out=sums)
        if bias is not None:
            sums[a + 1] += bias  # which each output takes once, as its matrix has it
        back = workspace.take("moved", (m * m, tiles * out), x.dtype)
        if self.both:
            torch.mm(self.outputs, sums.view(a * a, -1), out=back)
        else:
            half = workspace.take("gathered", (m, a, tiles * out), x.dtype)
            torch.mm(self.outputs, sums.view(a, -1), out=half.view(m, -1))
            torch.bmm(self.outputs.expand(m, m, a), half, out=back.view(m, m, -1))
        pixels = back.view(m, m, n, high, wide, out).permute(2, 3, 0, 4, 1, 5)
        view = target.view(n, high, m, wide, m, out)
        if activation == "none":
            view.copy_(pixels)
        else:
            torch.clamp(pixels, 0, 6 if activation == "relu6" else None, out=view)

    def _transformed(self, x: Tensor, high: int, wide: int, workspace: Workspace) -> Tensor:
        """The windows of x (N, H + 2, W + 2, I), transformed: (a * a, N * high * wide * I)."""
        m, a, (n, _, width, into) = self.m, self.a, x.shape
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

    def _spread(self, grad: Tensor, rows: range, wide: int, workspace: Workspace) -> Tensor:
        """The gradient of some rows of tiles, transformed: (a * a, N * rows * wide * O)."""
        m, a, (n, out) = self.m, self.a, grad.shape[:2]
        tiles = n * len(rows) * wide
        size = m * len(rows), m * wide
        cut = _cut(grad.permute(0, 2, 3, 1), (m * rows.start, 0), size, workspace.take)
        # "moved" and "kernels" are in use.
        gathered = workspace.take("gathered", (m, m, n, len(rows), wide, out), grad.dtype)
        gathered.copy_(cut.view(n, len(rows), m, wide, m, out).permute(2, 4, 0, 1, 3, 5))
        spread = workspace.take("sums", (a * a, tiles * out), grad.dtype)
        matrix = self.outputs.t()
        if self.both:
            torch.mm(matrix, gathered.view(m * m, -1), out=spread)
        else:
            half = workspace.take("lines", (m, a, tiles * out), grad.dtype)
            torch.bmm(matrix.expand(m, a, m), gathered.view(m, m, -1), out=half)
            torch.mm(matrix, half.view(m, -1), out=spread.view(a, -1))
        return spread


def _cut(x: Tensor, start: tuple[int, int], size: tuple[int, int], take: Any) -> Tensor:
    """A part of x (N, H, W, C) in memory of its own, zeros where it reaches beyond x."""
    result: Tensor = take("padded", (len(x), *size, x.shape[3]), x.dtype)
    inside, source = [], []
    for axis, (first, count) in enumerate(zip(start, size, strict=True)):
        low = max(first, 0)
        high = max(low, min(first + count, x.shape[1 + axis]))
        source.append(slice(low, high))
        inside.append(slice(low - first, high - first))
    rows, columns = inside
    result[:, : rows.start] = 0
    result[:, rows.stop :] = 0
    result[:, rows, : columns.start] = 0
    result[:, rows, columns.stop :] = 0
    result[:, rows, columns] = x[:, source[0], source[1]]
    return result


class WinogradConv2d:
    """A 3x3 convolution whose weight (O, I, 3, 3) is transformed once, its bias and activation.

    Args:
        activation: "none", "relu" or "relu6".
    """

    def __init__(self, activation: str, weight: Tensor, bias: Tensor | None) -> None:
        self.filtering = filtering(weight.dtype)
        self.kernels = self.filtering.kernels(weight)
        self.bias, self.activation = bias, activation

    def __call__(self, x: Tensor, padding: Sequence[int], workspace: Workspace) -> Tensor:
        """The output (N, O, H, W), channels last in memory, for x (N, I, H, W), which is finite."""
        arguments = self.kernels, self.bias, self.activation, padding, workspace
        return self.filtering.convolve(x, *arguments)


class WinogradConvolution(torch.autograd.Function):
    """A 3x3 convolution with bias that learns: the kernel's gradient is computed Winograd's way.

    With `images=True` the outputs and the images' gradient are too. What comes out with numbers
    that aren't finite, because some that came in weren't, or because they are too large for the
    transforms, is computed as torch does.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, padding: Any, workspace: Workspace,
        images: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.workspace, ctx.images = padding, workspace, images
        if images:
            way = filtering(x.dtype)
            kernels = way.kernels(weight, workspace)
            y = way.convolve(x, kernels, bias, "none", padding, workspace)
            if finite(y) is not None:
                return y
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        padding, workspace = ctx.padding, ctx.workspace
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        x_grad = weight_grad = None
        # What is computed in a workspace has no gradients, which create_graph=True would need,
        # nor room for a gradient that stands for many, as in vmap.
        if not torch.is_grad_enabled():
            way = filtering(x.dtype)
            with suppress(RuntimeError), torch.autocast("cpu", enabled=False):
                if of_x and ctx.images:
                    kernels = way.kernels(weight, workspace, back=True)
                    around = [2 - p for p in padding]
                    x_grad = way.convolve(grad, kernels, None, "none", around, workspace)
                if of_weight:
                    weight_grad = way.weight_gradient(x, grad, padding, workspace)
            x_grad, weight_grad = finite(x_grad), finite(weight_grad)
        rest = of_x and x_grad is None, of_weight and weight_grad is None
        if any(rest):
            by_torch = torch.ops.aten.convolution_backward(
                grad, x, weight, None, (1, 1), padding, (1, 1), False, (0, 0), 1, (*rest, False)
            )
            x_grad = by_torch[0] if rest[0] else x_grad
            weight_grad = by_torch[1] if rest[1] else weight_grad
        return x_grad, weight_grad, grad.sum((0, 2, 3)) if of_bias else None, None, None, None


def finite(result: Tensor | None) -> Tensor | None:
    """None in place of a tensor, dense in memory, with NaN or infinity."""
    if result is None:
        return None
    low, high = torch.aminmax(result.as_strided((result.numel(),), (1,)))
    return result if math.isfinite(low) and math.isfinite(high) else None
