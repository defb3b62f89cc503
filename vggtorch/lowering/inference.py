"""`optimize_for_inference`: a Keras model as it is now, prepared to answer fast on a CPU.

What `to_torch` returns follows every change of its weights, so it must look for changes at each
call, and keeps weights in the order that torch's tools know. An engine gives both up, as an
exported file does.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import keras
import torch
from torch import Tensor, nn

from vggtorch import keras_graph
from vggtorch.lowering import kernels
from vggtorch.lowering.fused import SAFE, FusedConv2d, FusedLinear, PreparedWeight
from vggtorch.lowering.layer_modules import KerasLayer
from vggtorch.lowering.plan import Plan, filled
from vggtorch.lowering.running import run_segments
from vggtorch.lowering.steps import Call, Segment
from vggtorch.lowering.winograd import GROWTH, WinogradConv2d, Workspace, pays
from vggtorch.lowering.writing import check_data_format, network_of


def optimize_for_inference(
    model: keras.Model,
    *,
    dtype: torch.dtype | None = None,
    winograd: bool = False,
    data_format: str | None = None,
) -> InferenceEngine:
    """Return a function that computes what a Keras model does, as it is now, fast on a CPU.

    It stands where you would else export the model to an engine: the weights are copied once, in
    the order that the CPU's kernels like best, and never change again. It has no gradients,
    parameters or modules; for these there is `to_torch`.

    **Winograd.** `winograd=True` computes 3x3 convolutions with half to a quarter of the
    multiplications. It is an option, because the results differ from Keras's by more than the last
    bits: a layer's output by 2e-6 of its size in float32 (6e-7 without), and in bfloat16, where the
    tiles are smaller, by 0.5 % (0.25 % without). The weights of these layers take four times the
    memory, in bfloat16 1.8 times. Layers with few channels and maps with few pixels are computed as
    without it, which is faster there.

    Args:
        model: a Functional or Sequential model, with any layers, on the CPU.
        dtype: torch.bfloat16 for a model in float32 whose 2-D convolutions and products are to be
            computed in that; other layers with weights stay in float32. The model's own by default.
        winograd: whether 3x3 convolutions may be computed by Winograd's minimal filtering.
        data_format: layout of inputs and outputs with three axes or more, as `to_torch` has it.

    Returns:
        A function of the model's inputs, by position or by their names, as torch tensors; it
        returns what the model returns in inference, float32 where it computes in bfloat16. Threads
        that call it at once are served one after the other.

    Raises:
        ValueError: a model that isn't a graph of layers or isn't on the CPU, a dtype that it or the
            CPU hasn't, or an unknown data_format.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016.

    Example:
        >>> import torch, vggtorch as vt
        >>> vgg = vt.VGG11(weights=None, include_top=False, input_shape=(32, 32, 3))
        >>> engine = vt.optimize_for_inference(vgg, dtype=torch.bfloat16)
        >>> engine(torch.rand(2, 32, 32, 3)).shape
        torch.Size([2, 1, 1, 512])
    """
    check_data_format(data_format)
    graph = keras_graph.graph_of(model, "optimize_for_inference")
    _check(model, dtype)
    with torch.inference_mode(False), torch.no_grad():
        network = network_of(graph, model.name, data_format=data_format, share=False).eval()
        half = dtype if dtype == torch.bfloat16 else None
        return InferenceEngine(Plan(network._written, network, False), half, winograd)


def _check(model: keras.Model, dtype: torch.dtype | None) -> None:
    """Raise what `optimize_for_inference` does of a model that can't run here in this dtype."""
    devices = {str(v.value.device) for v in model.variables} - {"cpu"}
    if devices:
        raise ValueError(
            f"optimize_for_inference prepares weights for a CPU, and those of {model.name} are on "
            f"{', '.join(sorted(devices))}. There, use "
            f'torch.compile(vt.to_torch(model), mode="reduce-overhead").'
        )
    if dtype is None:
        return
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"Received dtype={dtype}; expected torch.float32 or torch.bfloat16.")
    found = {
        layer.dtype_policy.name
        for layer in keras_graph.all_layers(model)
        if not isinstance(layer, keras.layers.InputLayer)
    }
    if found - {"float32"}:
        raise ValueError(
            f"Received dtype={dtype} for {model.name}, whose layers have the dtype policies "
            f"{sorted(found)}. It can be chosen for a model in float32; others compute as their "
            f"policies say: leave dtype out."
        )
    if dtype == torch.bfloat16 and not kernels.has_fused_ops(torch.zeros(1), dtype):
        raise ValueError(
            "Received dtype=torch.bfloat16, which this CPU, or this build of torch, has no fast "
            "kernels for. Leave dtype out."
        )


class InferenceEngine:
    """What `optimize_for_inference` returns."""

    def __init__(self, plan: Plan, dtype: torch.dtype | None, winograd: bool) -> None:
        self._plan, self._half = plan, dtype
        self._lock = threading.Lock()
        workspace = Workspace() if winograd else None
        segments = plan.plans.fast(len(plan.plans.steps))
        self._segments = [_fixed(segment, workspace, dtype) for segment in segments]

    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """What the model returns for these inputs."""
        inputs = self._checked(self._plan.in_order(args, kwargs))
        if kernels.is_intercepted():
            raise RuntimeError(
                "An inference engine can't be traced, compiled, transformed or looked into: its "
                "weights are prepared for one kernel each. Use vt.to_torch(model) for that."
            )
        # Not in inference mode, whose tensors can't be written to at the next call outside of it.
        modes = torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False)
        with self._lock, modes[0], modes[1], modes[2]:
            values: dict[int, Any] = dict(enumerate(inputs))
            run_segments(self._segments, values)
        if self._half is not None:
            for number in self._plan.plans.outputs:
                values[number] = _as(torch.float32, values[number], of=self._half)
        return filled(self._plan.structure, values)

    def _checked(self, inputs: Sequence[Any]) -> list[Tensor]:
        """The inputs, if they are what the network takes."""
        names, ranks = self._plan.names, self._plan.ranks
        if len(inputs) != len(names):
            raise ValueError(f"Expected the inputs {names}, by position or by name.")
        checked = []
        for name, rank, x in zip(names, ranks, inputs, strict=True):
            if not isinstance(x, Tensor) or x.device.type != "cpu" or x.ndim != rank:
                got = f"{tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x)
                raise ValueError(
                    f"The input {name!r} must be a torch tensor with {rank} axes on the CPU; "
                    f"received {got}."
                )
            if torch.is_grad_enabled() and x.requires_grad:
                raise ValueError(
                    f"The input {name!r} requires a gradient, and an inference engine has none. "
                    f"Use vt.to_torch(model), or call it under torch.no_grad()."
                )
            checked.append(x if self._half is None else _as(torch.float32, x, of=self._half))
        return checked

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "An inference engine can't be copied or pickled. Save the Keras model, and make it "
            "anew; or export it (vt.export)."
        )


def _fixed(segment: Segment, workspace: Workspace | None, dtype: torch.dtype | None) -> Segment:
    """The segment with weights that don't change, in another dtype if one is named."""
    steps = []
    for step in segment.steps:
        run = step.run
        if type(run) is FusedConv2d:
            step = replace(step, run=FixedConv2d(run, workspace, dtype))
        elif type(run) is FusedLinear:
            step = replace(step, run=FixedLinear(run, dtype))
        elif dtype is not None and _is_wide(run):
            step = replace(step, run=Wide(run, dtype))
        steps.append(step)
    return replace(segment, steps=steps)


def _is_wide(run: Any) -> bool:
    """Whether it has numbers of its own in float32, or makes probabilities."""
    module = run.target if isinstance(run, Call) else run
    if not isinstance(module, nn.Module):
        return False
    wide = isinstance(module, KerasLayer | nn.Softmax | nn.LogSoftmax)
    return wide or any(True for _ in (*module.parameters(), *module.buffers()))


def _as(dtype: torch.dtype, value: Any, *, of: torch.dtype) -> Any:
    """A tensor of one dtype in another; anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype == of else value


class Wide:
    """A step that computes in float32 among others that don't."""

    def __init__(self, run: Any, half: torch.dtype) -> None:
        self.run, self.half = run, half

    def __call__(self, *inputs: Any) -> Any:
        """What it gives for these inputs in float32."""
        return self.run(*(_as(torch.float32, x, of=self.half) for x in inputs))


class FixedConv2d(FusedConv2d):
    """A fused convolution whose weights are prepared once; with a workspace also by Winograd's."""

    def __init__(
        self, fused: FusedConv2d, workspace: Workspace | None, dtype: torch.dtype | None
    ) -> None:
        mixed = fused.mixed or dtype is not None
        super().__init__(fused.conv, fused.norm, fused.activation, mixed, fused.adds)
        self.workspace, self.dtype = workspace, dtype
        self.growth = self._growth()
        self.direct: tuple[PreparedWeight, Tensor | None] | None = None
        self.winograd: WinogradConv2d | None = None

    def _dtype(self, x: Tensor) -> torch.dtype:
        return super()._dtype(x) if self.dtype is None else self.dtype

    def _made(self, tensors: list[Tensor], settings: Any, *args: Any) -> tuple[Any, float, float]:
        return None, *self.growth

    def _convolved(
        self, x: Tensor, others: list[Tensor], prepared: Any, options: Any, bound: float
    ) -> Tensor:
        fits = self.workspace is not None and not others and bound * GROWTH < SAFE
        if fits and pays(self.conv, x):
            if self.winograd is None:
                self.winograd = WinogradConv2d(*self.folded_in(x.dtype), self.kind)
            return self.winograd(x, options[1], cast(Workspace, self.workspace))
        if self.direct is None:
            self.direct = self.prepared_in(x.dtype, options)
        return super()._convolved(x, others, self.direct, options, bound)

    def _one_by_one(self, *inputs: Tensor) -> Tensor:
        if self.dtype is None:
            return super()._one_by_one(*inputs)
        wide = (_as(torch.float32, x, of=self.dtype) for x in inputs)
        return super()._one_by_one(*wide).to(self.dtype)


class FixedLinear(FusedLinear):
    """A fused product (N, ..., in) to (N, ..., out) whose weight is prepared once.

    As it was it is no longer kept, because it is often most of a network.
    """

    def __init__(self, fused: FusedLinear, dtype: torch.dtype | None) -> None:
        super().__init__(fused.linear, fused.activation, fused.mixed)
        self.dtype = dtype
        self.prepared: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The product of the last axis, and the activation behind it."""
        if self.prepared is None:
            dtype = x.dtype if self.dtype is None else self.dtype
            fits = self.mixed or self.dtype is not None or dtype == self.linear.weight.dtype
            if not (fits and kernels.has_fused_ops(x, dtype)):
                return self._activated(self.linear(x))
            weight = kernels.prepared_linear_weight(self.linear.weight.to(dtype))
            bias = None if self.linear.bias is None else self.linear.bias.to(dtype)
            self.prepared = weight, bias
            del self.linear
        if self.dtype is not None:
            x = x.to(self.dtype)
        elif x.dtype != self.prepared[0].dtype:
            raise ValueError(f"Received {x.dtype} where {self.prepared[0].dtype} is expected.")
        return self._activated(kernels.linear(x, *self.prepared))
