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
    rows = {row[-1]: row for row in _rows(network)}
    inside = {node for row in rows.values() for node in row[:-1]}
    for node in network.graph.nodes:
        if node in inside:
            continue
        name = str(node.target)
        if node in rows:
            first, names = rows[node][0], [str(n.target) for n in rows[node]]
            name = f"until_{node.name}"
            root[name] = _Row(network, names, workspace)
            copies[node] = graph.call_module(name, (copies[first.all_input_nodes[0]],))
            continue
        if node.op == "call_module":
            root[name] = _Frozen(network, name)
        elif node.op == "get_attr":
            root[name] = getattr(network, name)
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return torch.fx.GraphModule(root, graph)


def _rows(network: torch.fx.GraphModule) -> list[list[torch.fx.Node]]:
    """Calls of modules that can be in a chain, each the only one that takes what the last gives."""

    def kind(node: torch.fx.Node) -> type | None:
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            return None
        child = network.get_submodule(str(node.target))
        if type(child) is nn.MaxPool2d and not has_disjoint_windows(child):
            return None
        found = type(child) in KINDS and isinstance(node.args[0], torch.fx.Node)
        return type(child) if found else None

    def follows(row: list[torch.fx.Node]) -> torch.fx.Node | None:
        users = list(row[-1].users)
        if len(users) != 1 or kind(users[0]) is None:
            return None
        norm_alone = kind(users[0]) is BatchNorm2d and kind(row[-1]) is not nn.Conv2d
        return None if norm_alone else users[0]

    rows: list[list[torch.fx.Node]] = []
    taken: set[torch.fx.Node] = set()
    for node in network.graph.nodes:
        if node in taken or kind(node) in (None, BatchNorm2d):
            continue
        row = [node]
        while (after := follows(row)) is not None:
            row.append(after)
        taken.update(row)
        if len(row) > 1 or kind(node) is nn.Conv2d:
            rows.append(row)
    return rows


class _Row(nn.Module):
    """Children in a row as they stand in the network at each call: a chain, or one by one."""

    def __init__(
        self, network: nn.Module, names: Sequence[str], workspace: Workspace | None
    ) -> None:
        super().__init__()
        self.workspace = workspace
        object.__setattr__(self, "network", network)  # not a child of its own child
        self.one_by_one = [_Frozen(network, name) for name in names]
        self.children_then: list[nn.Module] = []
        self.units: list[Unit] = []

    def forward(self, x: Tensor) -> Any:
        network: Any = self.network
        children = [network.get_submodule(one.name) for one in self.one_by_one]
        if all(type(child) in KINDS for child in children) and takes(children, x):
            if not all(map(operator.is_, children, self.children_then)) or not self.units:
                self.children_then, self.units = children, units_of(children, self.workspace)
            return Chain.apply(x, self.units, children)
        for one in self.one_by_one:
            x = one(x)
        return x


class _Frozen(nn.Module):
    """A child as it stands in the network at each call, by a gradient of our own if it has one."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.name = name
        object.__setattr__(self, "network", network)  # not a child of its own child

    def forward(self, *values: Tensor) -> Any:
        network: Any = self.network
        child = network.get_submodule(self.name)
        if len(values) == 1:
            (x,) = values
            if type(child) is nn.Conv2d and can_freeze(child):
                options = child.stride, child.padding, child.dilation, child.groups
                return _Convolution.apply(x, child.weight, child.bias, *options)
            if type(child) is nn.ReLU and not child.inplace:
                return _ReLU.apply(x)
            if type(child) is nn.MaxPool2d and has_disjoint_windows(child):
                return _MaxPool.apply(x, pair(child.kernel_size))
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
        stride, padding, dilation, groups = ctx.options
        # Of x torch looks at the shape and the layout alone, so its memory is never touched.
        x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.layout)
        of_x, _, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, pair(stride), pair(padding), pair(dilation), False, (0, 0),
            groups, (True, False, False),
        )  # fmt: skip
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
