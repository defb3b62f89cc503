"""The gradient of frozen layers to their input, from a quarter of the memory.

torch keeps every activation for backward, also where only the input's gradient is asked for. That
one needs less: of a convolution its weight, of a ReLU which values were positive, of a max pool
where in each window the largest stood. Where the kernels of inference take the input, layers in a
row run as a chain (chains.py).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggtorch.features.chains import (
    KINDS,
    Chain,
    Unit,
    can_freeze,
    convolution_gradient,
    has_disjoint_windows,
    pair,
    pool_gradient,
    takes,
    units_of,
)
from vggtorch.lowering import BatchNorm2d, Workspace


def with_little_kept(network: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same network on the same children, whose backward keeps less where they are frozen."""
    workspace = Workspace() if network.meta.get("winograd") else None
    root: dict[str, Any] = {}
    graph = torch.fx.Graph()
    copies: dict[torch.fx.Node, torch.fx.Node] = {}
    rows = _rows(network)
    for node in network.graph.nodes:
        if node.op != "call_module":
            copies[node] = graph.node_copy(node, copies.__getitem__)
        elif row := rows.get(node):
            name = f"until_{node.name}"
            root[name] = _Frozen(network, [str(call.target) for call in row], workspace)
            copies[node] = graph.call_module(
                name, torch.fx.map_arg(row[0].args, copies.__getitem__)
            )
    return torch.fx.GraphModule(root, graph)


def _rows(network: torch.fx.GraphModule) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """All calls of modules by the last one of each row: one call, or several that can be a chain.

    In a chain each call is the only one that takes what the last gives.
    """
    rows: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    kinds: dict[torch.fx.Node, type] = {}  # of those that can be in a chain
    for node in network.graph.find_nodes(op="call_module"):
        child = network.get_submodule(str(node.target))
        source, *others = node.all_input_nodes
        follows = source in kinds and len(source.users) == 1
        fits = type(child) in KINDS and not others
        if isinstance(child, nn.MaxPool2d):
            fits = fits and has_disjoint_windows(child)
        elif isinstance(child, BatchNorm2d):
            fits = fits and follows and kinds[source] is nn.Conv2d
        rows[node] = [*(rows.pop(source) if fits and follows else ()), node]
        if fits:
            kinds[node] = type(child)
    return rows


class _Frozen(nn.Module):
    """Children in a row as they stand in the network at each call: a chain, or one by one."""

    def __init__(
        self, network: nn.Module, names: Sequence[str], workspace: Workspace | None
    ) -> None:
        super().__init__()
        self.names, self.workspace = names, workspace
        object.__setattr__(self, "network", network)  # not a child of its own child
        self.children_then: list[nn.Module] = []
        self.units: list[Unit] = []

    def forward(self, *values: Tensor) -> Any:
        network: Any = self.network
        children = [network.get_submodule(name) for name in self.names]
        if takes(children, values[0]):
            if not all(map(operator.is_, children, self.children_then)) or not self.units:
                self.children_then, self.units = children, units_of(children, self.workspace)
            return Chain.apply(values[0], self.units, children)
        for child in children:
            values = (_run(child, *values),)
        return values[0]


def _run(child: nn.Module, *values: Tensor) -> Any:
    """What a module gives, by a gradient of our own if it has one."""
    if type(child) is nn.Conv2d and can_freeze(child):
        options = child.stride, child.padding, child.dilation, child.groups
        return _Convolution.apply(*values, child.weight, child.bias, *options)
    if type(child) is nn.ReLU and not child.inplace:
        return _ReLU.apply(*values)
    if type(child) is nn.MaxPool2d and has_disjoint_windows(child):
        return _MaxPool.apply(*values, pair(child.kernel_size))
    return child(*values)


def _layout(x: Tensor) -> torch.memory_format:
    nhwc = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format


class _Convolution(torch.autograd.Function):
    """conv2d of frozen weights."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        return F.conv2d(x, weight, bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, *ctx.options = inputs
        ctx.shape, ctx.layout = x.shape, _layout(x)
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        of_x = convolution_gradient(grad, weight, ctx.shape, ctx.options, ctx.layout)
        return of_x, None, None, None, None, None, None


class _ReLU(torch.autograd.Function):
    """ReLU, of which a byte for each value is kept."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = torch.relu(x)
        return y, y <= 0  # NaN is not, and passes its gradient on, as torch's does

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Tensor:  # type: ignore[override]
        (stopped,) = ctx.saved_tensors
        return grad.masked_fill(stopped, 0)

    @classmethod
    def apply(cls, x: Tensor) -> Tensor:
        """The values alone."""
        return super().apply(x)[0]


class _MaxPool(torch.autograd.Function):
    """A max pool whose windows don't overlap, of which four bytes for each window are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[int, int]) -> Tensor:  # type: ignore[override]
        y, places = F.max_pool2d(x, window, return_indices=True)
        ctx.shape, ctx.window, ctx.layout = x.shape, window, _layout(x)
        ctx.save_for_backward(places.to(torch.int32))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        return pool_gradient(grad, places, ctx.shape, ctx.window, ctx.layout), None
