"""Batch norm by Keras's rules as subclasses of torch.nn's."""

# ruff: noqa: D102  (forward does what its class says)
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggtorch.lowering.layer_modules import Leaf


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; so is the gradient with respect to it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return _SumOverProcesses.forward(ctx, gradient)


class KerasBatchNorm(Leaf, nn.modules.batchnorm._BatchNorm):
    """Batch norm by Keras's rules: a biased moving variance, and inference while it is frozen.

    Attributes:
        frozen: follows the Keras layer's `trainable`, which False turns to inference.
        synchronized: trains on the moments of all processes' images together.
        counted: this batch is in the moving statistics already; checkpointing runs it again.
    """

    frozen = False
    synchronized = False
    counted = False

    @property
    def learns(self) -> bool:
        """Whether it normalises by the batch's own moments, as it must where it has no others."""
        return (self.training and not self.frozen) or self.running_mean is None

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        if mean is None or variance is None:  # `track_running_stats` was set to False
            return super().forward(x)
        self._check_input_dim(x)  # one image without a batch would be normalised along its height
        if not self.learns:
            return F.batch_norm(x, mean, variance, self.weight, self.bias, False, 0.0, self.eps)
        normalise = self._over_processes if self.synchronized else self._alone
        y, *moments = normalise(x)
        if self.counted:
            return y
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        step = self.momentum
        if step is None:  # a plain mean over all batches, which update_bn asks for
            step = 1.0 / float(self.num_batches_tracked or 1)
        with torch.no_grad():
            for kept, found in zip((mean, variance), moments, strict=True):
                kept.lerp_(found.to(kept.dtype), step)
        return y

    def _alone(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x normalised by the batch's own moments; and these, mean and biased variance.

        torch keeps the unbiased variance; it is asked for the batch's own, and that is undone.
        """
        n = x.numel() // x.shape[1]
        kept: Any = self.running_mean
        mean, variance = torch.zeros_like(kept), torch.zeros_like(kept)
        # Not F.batch_norm, which refuses one value for each channel; Keras takes it.
        y = torch.batch_norm(
            x, self.weight, self.bias, mean, variance, True, 1.0, self.eps,
            torch.backends.cudnn.enabled,
        )  # fmt: skip
        return y, mean, variance * ((n - 1) / n) if n > 1 else torch.zeros_like(variance)

    def _over_processes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same for a process's part of a batch, which may be empty.

        The moments are those of all processes' images together; torch.nn.SyncBatchNorm does so on
        GPUs only.
        """
        wide = x.float()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [-1 if axis == 1 else 1 for axis in range(x.ndim)]
        count = _SumOverProcesses.apply(wide.new_tensor(x.numel() // x.shape[1]))
        mean = _SumOverProcesses.apply(wide.sum(axes)) / count
        centred = wide - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(axes)) / count
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        y = centred * scale.view(shape)
        if self.bias is not None:
            y = y + self.bias.view(shape)
        return y.to(x.dtype), mean, variance

    def __prepare_scriptable__(self) -> None:
        """Say why torch.jit.script can't take it, which asks every module for a form that it can.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "torch.jit.script can't take a batch norm by Keras's rules. Use torch.jit.trace or "
            "torch.export.export, or first put torch's own nn.BatchNorm2d in its place, as "
            "docs/torch.md shows."
        )


class BatchNorm1d(KerasBatchNorm, nn.BatchNorm1d):
    """nn.BatchNorm1d by Keras's rules; x is (N, C) or (N, C, L)."""


class BatchNorm2d(KerasBatchNorm, nn.BatchNorm2d):
    """nn.BatchNorm2d by Keras's rules; x is (N, C, H, W)."""


class BatchNorm3d(KerasBatchNorm, nn.BatchNorm3d):
    """nn.BatchNorm3d by Keras's rules; x is (N, C, D, H, W)."""


def synchronize_(module: nn.Module, synchronized: bool) -> None:
    """Let all batch norms inside train on all processes' images together, or on their own only."""
    for child in module.modules():
        if isinstance(child, KerasBatchNorm):
            child.synchronized = synchronized
