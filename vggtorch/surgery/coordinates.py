"""The weights of new layers in coordinates in which one size of step suits them all.

This is also the one file of the room that knows how lowered modules hold their weights: `part` runs
what lies between two tensors of a Keras graph, `linears` finds the products in it, and `Moments`,
`least_squares_` and `Coordinates` read and write their kernels and biases.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggtorch import lowering
from vggtorch.lowering import Conv2D, Dense

DAMPING = 1e-3  # of the mean variance of the inputs
Linear = Conv2D | Dense


# Parts of Keras graphs as torch modules


def part(start: keras.KerasTensor, ends: Sequence[keras.KerasTensor]) -> nn.Module:
    """The layers between tensors of a model as a torch module; takes and returns NCHW."""
    return lowering.between(start, list(ends), data_format="channels_first").eval()


def linears(graph: nn.Module, parameters: Sequence[Tensor]) -> list[Linear]:
    """The modules of a graph that multiply with one of these parameters."""
    return [
        module
        for module in graph.modules()
        if isinstance(module, Linear) and any(module.kernel is p for p in parameters)
    ]


# Kernels as matrices


def _matrix(module: Linear, kernel: Tensor) -> Tensor:
    """A kernel, or its gradient, as (inputs of one output, outputs); rows as in `_patches`."""
    if isinstance(module, Dense):
        return kernel
    if module.depthwise:
        return kernel.flatten(2).flatten(0, 1)  # HWCM -> (HW, CM)
    return kernel.permute(2, 0, 1, 3).flatten(0, 2)  # HWIO -> (IHW, O)


def _kernel(module: Linear, matrix: Tensor) -> Tensor:
    """The inverse of `_matrix`."""
    if isinstance(module, Dense) or module.depthwise:
        return matrix.reshape(module.kernel.shape)
    height, width, inputs, outputs = module.kernel.shape
    return matrix.reshape(inputs, height, width, outputs).permute(1, 2, 0, 3)


def _patches(module: Linear, x: Tensor) -> Tensor:
    """What meets the kernel at each position, and a one for the bias: (positions, inputs + 1)."""
    if isinstance(module, Dense):
        rows = x.flatten(0, -2)
    else:
        x, padding = module.pad(x)
        size = module.kernel.shape[:2]
        columns = F.unfold(x, size, module.dilation, padding, module.stride)  # (N, IHW, positions)
        if module.depthwise:
            columns = columns.unflatten(1, (x.shape[1], -1)).flatten(0, 1)  # (NC, HW, positions)
        elif module.kernel.shape[2] != x.shape[1]:
            # The groups of a convolution share one average of what they meet.
            columns = columns.unflatten(1, (x.shape[1] // module.kernel.shape[2], -1)).flatten(0, 1)
        rows = columns.transpose(1, 2).flatten(0, 1)
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1)


def _write_(module: Linear, stacked: Tensor) -> None:
    """Write [kernel matrix; bias] into a layer."""
    size = len(stacked) - (module.bias is not None)
    module.kernel.copy_(_kernel(module, stacked[:size]))
    if module.bias is not None:
        module.bias.copy_(stacked[size])


# What meets the kernels on a sample of images


@dataclass
class Moments:
    """Sums over a sample of the positions at one layer, in float64.

    Attributes:
        module: the layer.
        patches: patch by patch, (D + 1, D + 1); the last row and column are the one's.
        targets: patch by wanted output, (D + 1, O); None where nothing is wanted.
        count: positions counted in.
    """

    module: Linear
    patches: Any = 0.0
    targets: Any = None
    count: int = 0

    def add(self, x: Tensor, target: Tensor | None, generator: torch.Generator) -> None:
        """Count in the maps (N, C, H, W) that enter the layer, and those that it should give."""
        wanted = len(_matrix(self.module, self.module.kernel)) // 4 + 512
        for i in range(len(x)):  # patches overlap, so those of a whole batch take much memory
            rows = _patches(self.module, x[i : i + 1])
            kept = torch.randperm(len(rows), generator=generator)[:wanted].to(rows.device)
            rows = rows[kept].double()
            self.count += len(rows)
            self.patches = self.patches + rows.T @ rows
            if target is not None:
                y = target[i : i + 1].movedim(1, -1).flatten(0, -2)[kept].double()
                self.targets = (0.0 if self.targets is None else self.targets) + rows.T @ y

    @property
    def second(self) -> Tensor:
        """E[patch patch^T], without the one's row and column if the layer has no bias."""
        size = len(self.patches) - (self.module.bias is None)
        return self.patches[:size, :size] / self.count


def measure_moments(
    graph: nn.Module,
    trained: Sequence[Tensor],
    aimed: keras.Layer | None,
    target: nn.Module,
    batches: Iterable[Tensor],
    generator: torch.Generator,
) -> list[Moments]:
    """Moments at each product of a graph that is trained.

    At the last product of the layer `aimed`, also with what it should give: the target's output.
    """
    moments = [Moments(module) for module in linears(graph, trained)]
    variables = [] if aimed is None else [v.value for v in aimed.variables]
    last = next(reversed(linears(graph, variables)), None)
    entered: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        entered[module] = args[0].detach()

    hooks = [m.module.register_forward_pre_hook(keep) for m in moments]
    for images in batches:
        graph(images)
        (y,) = target(images)
        for moment in moments:
            wanted = y if moment.module is last else None
            moment.add(entered[moment.module], wanted, generator)
    for hook in hooks:
        hook.remove()
    return moments


def least_squares_(moments: Moments) -> None:
    """Give a layer the weights whose outputs come nearest to the wanted ones."""
    second = moments.second
    ridge = 1e-9 * second.diagonal().mean() * torch.eye(len(second), device=second.device)
    targets = moments.targets[: len(second)] / moments.count
    _write_(moments.module, torch.linalg.solve(second + ridge.double(), targets).float())


# The coordinates


class Coordinates:
    """The weights of a layer in coordinates in which one size of step suits them all.

    Neighbouring pixels are nearly equal, which gives the kernel of a layer that looks at
    photographs a problem of condition 1e5 and more, and makes Adam slow. With S the second moment
    of a patch and a one (for the bias), [kernel; bias] = S^-1/2 theta makes it round. Each column
    of theta, which is one output channel, is then measured by its own size.
    """

    def __init__(self, moments: Moments) -> None:
        self.module, second = moments.module, moments.second
        self.parameters = [p for p in (self.module.kernel, self.module.bias) if p is not None]
        # Inputs are measured in units of their own size, so that the constant one beside them is
        # neither large nor small.
        size = len(moments.patches) - 1
        units = torch.ones_like(second[0])
        units[:size] = second.diagonal()[:size].mean().sqrt()
        values, vectors = torch.linalg.eigh(second / units / units[:, None])
        values = values.clamp_min(0) + DAMPING * values.mean()
        self.inverse = ((vectors * values.rsqrt()) @ vectors.T / units[:, None]).float()
        theta = ((vectors * values.sqrt()) @ vectors.T * units).float()
        theta = theta @ self._stack([p.detach() for p in self.parameters])
        scale = theta.square().mean(0).sqrt()
        self.scale = scale.clamp_min(0.1 * float(scale.mean()) + 1e-12)
        self.theta = theta / self.scale

    def _stack(self, values: Sequence[Tensor]) -> Tensor:
        return torch.cat([_matrix(self.module, values[0]), *(bias[None] for bias in values[1:])])

    def take_(self, gradients: Sequence[Tensor]) -> None:
        """Turn the parameters' gradients into theta's."""
        self.theta.grad = self.inverse.T @ self._stack(gradients) * self.scale

    def write_(self) -> None:
        """Give the layer the weights that theta stands for."""
        _write_(self.module, self.inverse @ (self.theta * self.scale))


class Scaled:
    """A parameter of another kind, such as a batch norm's scale, measured by its own size."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameters = [parameter]
        self.scale = 0.1 * parameter.detach().square().mean().sqrt().clamp_min(0.1)
        self.theta = parameter.detach() / self.scale

    def take_(self, gradients: Sequence[Tensor]) -> None:
        """Turn the parameter's gradient into theta's."""
        self.theta.grad = gradients[0] * self.scale

    def write_(self) -> None:
        """Give the parameter the value that theta stands for."""
        self.parameters[0].copy_(self.theta * self.scale)


def coordinates_of(
    moments: Sequence[Moments], trained: Sequence[Tensor]
) -> list[Coordinates | Scaled]:
    """Coordinates for every trained parameter, those of products by their moments."""
    products = [Coordinates(m) for m in moments]
    done = {id(p) for c in products for p in c.parameters}
    return [*products, *(Scaled(p) for p in trained if id(p) not in done)]
