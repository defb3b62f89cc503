"""What all files of this room agree on: the options of a lowering, layouts, dtypes and padding.

Every 4-D tensor of a channels_last model is an NCHW view of NHWC memory here, which torch calls
channels-last, so that going from one layout to the other never copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import keras
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggtorch import keras_graph


@dataclass(frozen=True)
class LoweringOptions:
    """What is true of a whole graph: its layout, what it computes in, what backward keeps.

    Attributes:
        channels_last: 4-D tensors are NHWC in Keras, so NCHW views of NHWC memory here.
        dtype: computes in this dtype where Keras would in float32; None leaves it to Keras.
        checkpoint: backward computes activations between pools again instead of keeping them.
    """

    channels_last: bool
    dtype: torch.dtype | None
    checkpoint: bool = False

    def axis(self, axis: int, rank: int) -> int:
        """Where an axis of a Keras tensor is here."""
        return (0, 2, 3, 1)[axis % 4] if rank == 4 and self.channels_last else axis % rank

    def compute_dtype(self, layer: keras.Layer) -> torch.dtype:
        """What the layer computes in."""
        dtype: torch.dtype = getattr(torch, layer.compute_dtype)
        return self.dtype if dtype == torch.float32 and self.dtype is not None else dtype


def lay_out_(kernel: nn.Parameter) -> None:
    """Put a kernel's numbers in O, H, W, I order in memory; same Parameter, shape and values.

    A kernel (H, W, I, O) permuted to OIHW is then in torch's channels-last order, and one of
    (I, O) transposed is contiguous, so that torch's operations take them as they are.
    """
    rank = kernel.ndim
    outputs_first = kernel.detach().permute(rank - 1, *range(rank - 1))
    if not outputs_first.is_contiguous():
        kernel.data = outputs_first.contiguous().permute(*range(1, rank), 0)


def to_nchw(x: Tensor) -> Tensor:
    """NHWC -> NCHW, a view."""
    return x.permute(0, 3, 1, 2) if x.ndim == 4 else x


def to_nhwc(x: Tensor) -> Tensor:
    """NCHW -> NHWC, a view."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What Keras does to a layer's input; under torch.autocast the operation itself decides."""
    if x.dtype == dtype or not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(dtype)


def product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a convolution or product of x computes in: torch.autocast's choice, or its own dtype."""
    device = x.device.type
    if dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


def same_padding(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> list[tuple[int, int]]:
    """Rows before and after, columns before and after, that Keras's padding="same" adds."""
    axes = zip(size, kernel, stride, dilation, strict=True)
    return [keras_graph.same_padding(*axis) for axis in axes]


def pad(x: Tensor, padding: list[tuple[int, int]], mode: str) -> tuple[Tensor, tuple[int, int]]:
    """Leave even padding to the operation; pad here what is uneven."""
    (top, bottom), (left, right) = padding
    if top == bottom and left == right:
        return x, (top, left)
    return F.pad(x, (left, right, top, bottom), mode=mode), (0, 0)
