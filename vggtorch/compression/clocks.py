"""How long layers and networks take on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from torch import nn

from vggtorch.measuring import in_turns

REPEATS = 5


def _example(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    x = torch.randn(1, *shape, device=device)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


@torch.no_grad()
def seconds_of(module: nn.Module, shape: Sequence[int], device: torch.device) -> float:
    """Median seconds of one image, after a warm-up; `shape` is what enters, without the batch."""
    x, module = _example(shape, device), module.to(device)
    return statistics.median(in_turns({"": lambda: module(x)}, REPEATS, device)[""])


@torch.no_grad()
def ratio_of(slow: nn.Module, fast: nn.Module, shape: Sequence[int], device: torch.device) -> float:
    """How many times as fast one module is as another, measured in turns; the median."""
    x = _example(shape, device)
    times = in_turns({"slow": lambda: slow(x), "fast": lambda: fast(x)}, 2 * REPEATS, device)
    return statistics.median(a / b for a, b in zip(times["slow"], times["fast"], strict=True))
