"""The weights of new layers in coordinates in which one size of step suits them all.

`part` runs what lies between two tensors of a Keras graph, `linears` finds the products in it, and
`Moments`, `least_squares_` and `Coordinates` read and write their kernels and biases.
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
from vggtorch.lowering import OnKeras, Product

DAMPING = 1e-3  # of the mean variance of the inputs


# Parts of Keras graphs as torch modules


def part(start: keras.KerasTensor, ends: Sequence[keras.KerasTensor]) -> OnKeras:
    """The layers between tensors of a model as a torch module; takes and returns NCHW."""
    return lowering.between(start, list(ends), data_format="channels_first").eval()


def linears(graph: OnKeras, parameters: Sequence[Tensor]) -> list[Product]:
    """The products of a graph that multiply with one of these parameters."""
    return [p for p in graph.products() if any(p.kernel is q for q in parameters)]


# Kernels as matrices


def _matrix(product: Product, kernel: Tensor) -> Tensor:
    """A kernel, or its gradient, as (inputs of one output, outputs); rows as in `_patches`."""
    if not product.convolves:
        return kernel
    if product.is_depthwise:
        return kernel.flatten(2).flatten(0, 1)  # HWCM -> (HW, CM)
    return kernel.permute(2, 0, 1, 3).flatten(0, 2)  # HWIO -> (IHW, O)


def _kernel(product: Product, matrix: Tensor) -> Tensor:
    """The inverse of `_matrix`."""
    if not product.convolves or product.is_depthwise:
        return matrix.reshape(product.kernel.shape)
    height, width, inputs, outputs = product.kernel.shape
    return matrix.reshape(inputs, height, width, outputs).permute(1, 2, 0, 3)


def _patches(product: Product, x: Tensor) -> Tensor:
    """What meets the kernel at each position, and a one for the bias: (positions, inputs + 1)."""
    conv: Any = product.module
    if not product.convolves:
        rows = x.flatten(0, -2)
    else:
        columns = F.unfold(  # (N, IHW, positions)
            x, conv.kernel_size, conv.dilation, conv.padding, conv.stride
        )
        if conv.groups > 1:
            # The groups share one average of what they meet, those of a depthwise kernel too.
            columns = columns.unflatten(1, (conv.groups, -1)).flatten(0, 1)
        rows = columns.transpose(1, 2).flatten(0, 1)
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1)


def _write_(product: Product, stacked: Tensor) -> None:
    """Write [kernel matrix; bias] into a layer."""
    size = len(stacked) - (product.bias is not None)
    product.kernel.copy_(_kernel(product, stacked[:size]))
    if product.bias is not None:
        product.bias.copy_(stacked[size])


# What meets the kernels on a sample of images


@dataclass
class Moments:
    """Sums over a sample of the positions at one layer, in float64.

    Attributes:
        product: the layer.
        patches: of each patch by itself, (D + 1, D + 1): D inputs, and the constant one that the
            bias is multiplied by.
        targets: of each patch by the output that is wanted of it, (D + 1, O); None where none is.
        count: positions counted in.
    """

    product: Product
    patches: Any = 0.0
    targets: Any = None
    count: int = 0

    def add(self, x: Tensor, target: Tensor | None, generator: torch.Generator) -> None:
        """Count in the maps (N, C, H, W) that enter the layer, and those that it should give."""
        wanted = len(_matrix(self.product, self.product.kernel)) // 4 + 512
        for i in range(len(x)):  # patches overlap, so those of a whole batch take much memory
            rows = _patches(self.product, x[i : i + 1].double())
            kept = torch.randperm(len(rows), generator=generator, device="cpu")[:wanted]
            kept = kept.to(rows.device)
            rows = rows[kept]
            self.count += len(rows)
            self.patches = self.patches + rows.T @ rows
            if target is not None:
                y = target[i : i + 1].movedim(1, -1).flatten(0, -2)[kept].double()
                self.targets = (0.0 if self.targets is None else self.targets) + rows.T @ y

    @property
    def second(self) -> Tensor:
        """E[patch patch^T], without the row and column of the constant if there is no bias."""
        size = len(self.patches) - (self.product.bias is None)
        return self.patches[:size, :size] / self.count


def measure_moments(
    graph: OnKeras,
    trained: Sequence[Tensor],
    aimed: keras.Layer | None,
    target: nn.Module,
    batches: Iterable[Tensor],
    generator: torch.Generator,
) -> list[Moments]:
    """Moments at each product of a graph that is trained.

    At the last product of the layer `aimed`, also with what it should give: the target's output.
    """
    moments = [Moments(product) for product in linears(graph, trained)]
    variables = [] if aimed is None else [v.value for v in aimed.variables]
    last = next((p.module for p in reversed(linears(graph, variables))), None)
    entered: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        entered[module] = args[0].detach()

    hooks = [m.product.module.register_forward_pre_hook(keep) for m in moments]
    for images in batches:
        graph(images)
        (y,) = target(images)
        for moment in moments:
            wanted = y if moment.product.module is last else None
            moment.add(entered[moment.product.module], wanted, generator)
    for hook in hooks:
        hook.remove()
    return moments


def least_squares_(moments: Moments) -> None:
    """Give a layer the weights whose outputs come nearest to the wanted ones."""
    second = moments.second
    ridge = 1e-9 * second.diagonal().mean() * torch.eye(len(second), device=second.device)
    targets = moments.targets[: len(second)] / moments.count
    _write_(moments.product, torch.linalg.solve(second + ridge.double(), targets).float())


# The coordinates


class Coordinates:
    """The weights of a layer in coordinates in which one size of step suits them all.

    Neighbouring pixels are nearly equal, which gives the kernel of a layer that looks at
    photographs a problem of condition 1e5 and more, and makes Adam slow. With S the second moment
    of a patch and a one (for the bias), [kernel; bias] = S^-1/2 theta makes it round. Each column
    of theta, which is one output channel, is then measured by its own size.
    """

    def __init__(self, moments: Moments) -> None:
        self.product, second = moments.product, moments.second
        self.parameters = [p for p in (self.product.kernel, self.product.bias) if p is not None]
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
        parts = [_matrix(self.product, values[0]), *(bias[None] for bias in values[1:])]
        return torch.cat(parts).float()

    def take_(self, gradients: Sequence[Tensor]) -> None:
        """Turn the parameters' gradients into theta's."""
        self.theta.grad = self.inverse.T @ self._stack(gradients) * self.scale

    def write_(self) -> None:
        """Give the layer the weights that theta stands for."""
        _write_(self.product, self.inverse @ (self.theta * self.scale))


class Scaled:
    """A parameter of another kind, such as a batch norm's scale, measured by its own size."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameters = [parameter]
        value = parameter.detach().float()
        self.scale = 0.1 * value.square().mean().sqrt().clamp_min(0.1)
        self.theta = value / self.scale

    def take_(self, gradients: Sequence[Tensor]) -> None:
        """Turn the parameter's gradient into theta's."""
        self.theta.grad = gradients[0].float() * self.scale

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
