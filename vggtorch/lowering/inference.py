"""`optimize_for_inference`: a Keras model as it is now, prepared to answer fast on a CPU.

What `to_torch` returns follows every change of its weights, so it must look for changes at each
call, and keeps weights in the order that torch's tools know. An engine gives both up, as an
exported file does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import keras
import torch
from torch import Tensor

from vggtorch import keras_graph
from vggtorch.lowering import kernels
from vggtorch.lowering.fixed import Wide, cast_from, with_fixed_weights
from vggtorch.lowering.plan import Plan, filled
from vggtorch.lowering.recorded import Recorded
from vggtorch.lowering.running import run_segments, run_steps
from vggtorch.lowering.settings import graph_to_read
from vggtorch.lowering.steps import Segment, Step, in_plain_order, repeats
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

    **Shapes.** For the first four shapes of inputs, oneDNN prepares the convolutions and what is
    around them when such inputs first come. That call takes longer, and torch keeps what was
    prepared, about as much as the weights take for each shape, as long as the process runs. Other
    shapes are computed without that, by up to a half slower.

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
        >>> engine = vt.optimize_for_inference(vgg, winograd=True)
        >>> engine(torch.rand(2, 32, 32, 3)).shape
        torch.Size([2, 1, 1, 512])
    """
    check_data_format(data_format)
    graph = graph_to_read(model, "optimize_for_inference")
    _check(model, dtype)
    with torch.inference_mode(False), torch.no_grad():
        network = network_of(graph, model.name, data_format=data_format, share=False).eval()
        half = dtype if dtype == torch.bfloat16 else None
        plan = Plan(network._written, network, checkpoint=False, winograd=winograd)
        return InferenceEngine(plan, half)


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
    if dtype == torch.bfloat16 and not kernels.has_fused_ops(torch.zeros(1, device="cpu"), dtype):
        raise ValueError(
            "Received dtype=torch.bfloat16, which this CPU, or this build of torch, has no fast "
            "kernels for. Leave dtype out."
        )


class InferenceEngine:
    """What `optimize_for_inference` returns."""

    def __init__(self, plan: Plan, dtype: torch.dtype | None) -> None:
        self._plan, self._half = plan, dtype
        self._lock = threading.Lock()
        self._segments = [
            replace(segment, steps=[_fixed(step, dtype) for step in segment.steps])
            for segment in plan.ways.with_settled(len(plan.ways.steps)).segments
        ]
        # What runs a segment, by its first and last output.
        self._parts: dict[tuple[int, int], list[Callable[[dict[int, Any]], None]]] = {}

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
            run_segments(self._segments, values, self._run)
        plain = self._plan.is_plain(inputs)
        for number in self._plan.ways.outputs:
            if self._half is not None:
                values[number] = cast_from(self._half, values[number])
            if plain:
                values[number] = in_plain_order(values[number])
        return filled(self._plan.structure, values)

    def _run(self, segment: Segment, values: dict[int, Any]) -> None:
        # Not by the segment itself: images of each shape run through other parts of one, though
        # mostly with the same steps.
        key = segment.steps[0].output, segment.steps[-1].output
        if key not in self._parts:  # steps are recorded by running them once more
            self._parts[key] = [
                Recorded(list(steps)) if recordable else partial(run_steps, list(steps))
                for recordable, steps in groupby(segment.steps, _repeats)
            ]
        for part in self._parts[key]:
            part(values)

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
            checked.append(x if self._half is None else cast_from(self._half, x))
        if layout := self._plan.layout_meant(checked):
            raise ValueError(
                f"Received inputs of the shapes {[tuple(x.shape) for x in checked]}, which look "
                f"{layout}: pass data_format={layout!r} to optimize_for_inference."
            )
        return checked

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "An inference engine can't be copied or pickled. Save the Keras model, and make it "
            "anew; or export it (vt.export)."
        )


def _repeats(step: Step) -> bool:
    return repeats(replace(step, run=step.run.run) if isinstance(step.run, Wide) else step)


def _fixed(step: Step, dtype: torch.dtype | None) -> Step:
    return replace(step, run=with_fixed_weights(step.run, dtype))
