"""A Keras model as a plain torch.nn.Module on the very same parameters, run the fast way.

`Lowered` is the outermost graph (vggtorch/graphs.py): it takes and returns what the Keras model
does. `lower` makes it of a model, `part` of a part of one, and `accelerate_` puts it inside the
Keras model itself.
"""

# ruff: noqa: D102  (forward does what its class says)
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch
from keras import layers
from keras.src.backend.common.stateless_scope import in_stateless_scope
from torch import Tensor

from vggtorch.lowering.fused import state
from vggtorch.lowering.graphs import Graph, functional
from vggtorch.lowering.modules import Format, lay_out_, to_keras, to_torch
from vggtorch.weights import conversion


class Lowered(Graph):
    """What `lower` returns: takes and returns what the Keras model does."""

    # Declared here so that no layer of the same name takes their place.
    data_format = "channels_last"
    cuda_graphs = False
    input_dtypes: Sequence[torch.dtype] = ()
    input_shapes: Sequence[tuple[int | None, ...]] = ()

    def __init__(
        self,
        model: keras.Function,
        format: Format,
        data_format: str,
        *,
        any_size: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__(model, format)
        self.data_format, self.cuda_graphs = data_format, cuda_graphs
        # By the inputs' shapes and layouts; all are of the parameters that had this state.
        self._captured: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]] = {}
        self._captured_state: Any = None
        self.input_dtypes = [getattr(torch, x.dtype) for x in model.inputs]
        # Shapes as the caller has them: the Keras model's, unless asked for the other layout.
        axes = {(True, "channels_first"): (0, 3, 1, 2), (False, "channels_last"): (0, 2, 3, 1)}
        order = axes.get((format.channels_last, data_format), (0, 1, 2, 3))
        self.input_shapes = [
            tuple(x.shape[i] for i in order) if len(x.shape) == 4 else tuple(x.shape)
            for x in model.inputs
        ]
        if any_size:
            channels = 3 if data_format == "channels_last" else 1
            self.input_shapes = [
                tuple(n if i == channels else None for i, n in enumerate(shape))
                if len(shape) == 4
                else shape
                for shape in self.input_shapes
            ]
        number = {id(tensor): i for i, tensor in enumerate(model.outputs)}
        self._structure = keras.tree.map_structure(lambda x: number[id(x)], model._outputs_struct)

    def train(self, mode: bool = True) -> Lowered:
        if mode != self.training:
            self._captured_state = None
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Lowered:
        """What `.to()`, `.cuda()` and `.half()` do; refused where the Keras model can't follow."""
        for dtype in {p.dtype for p in self.parameters()}:
            after = fn(torch.empty(0, dtype=dtype)).dtype
            if after != dtype:
                raise ValueError(
                    f"Received a conversion from {dtype} to {after}, but the parameters are the "
                    f"Keras model's own, whose variables are {dtype}. Use lower(model, "
                    f"dtype={after}) or torch.autocast to compute in {after}."
                )
        super()._apply(fn, recurse)
        return self

    def forward(self, inputs: Any) -> Any:  # type: ignore[override]
        """Run the model on a tensor, or on the list or dict that the Keras model takes."""
        flat = [inputs] if isinstance(inputs, Tensor) else keras.tree.flatten(inputs)
        if len(flat) != len(self._inputs):
            raise ValueError(f"Received {len(flat)} inputs; this model takes {len(self._inputs)}.")
        values = []
        for x, shape, dtype in zip(flat, self.input_shapes, self.input_dtypes, strict=True):
            if x.ndim != len(shape) or any(
                expected not in (None, received)
                for expected, received in zip(shape, x.shape, strict=True)
            ):
                raise ValueError(
                    f"Received an input of shape {tuple(x.shape)}; expected {shape} with "
                    f"data_format={self.data_format!r}. Reshape the input, or lower the model "
                    f"with the data_format that the input has."
                )
            x = x.to(dtype)
            values.append(to_torch(x) if self.data_format == "channels_last" else x)
        if self.cuda_graphs and self._replays(values):
            outputs = self._replay(values)
        else:
            outputs = super().forward(*values)
        if self.data_format == "channels_last":
            outputs = [to_keras(y) for y in outputs]
        if isinstance(self._structure, int):
            return outputs[0]
        return keras.tree.map_structure(lambda i: outputs[i], self._structure)

    def _replays(self, inputs: list[Tensor]) -> bool:
        """Whether this is inference on a GPU, of which a graph can be replayed."""
        # Autocast keeps what it has cast only while it is on, and a graph would read it afterwards.
        recast = torch.is_autocast_enabled("cuda")
        learns = self.training or torch.is_grad_enabled()
        return all(x.is_cuda for x in inputs) and not (learns or recast or self.is_observed())

    def _replay(self, inputs: list[Tensor]) -> list[Tensor]:
        """Run the CUDA graph of inference for inputs of these shapes and layouts."""
        now = state(self.parameters())
        if now != self._captured_state:  # what was prepared of the parameters is out of date
            self._captured, self._captured_state = {}, now
        # What was made in inference mode can't be written to outside of it.
        mode = torch.is_inference_mode_enabled()
        key = (mode, *((x.shape, x.stride(), x.device) for x in inputs))
        if key not in self._captured:
            self._captured[key] = self._capture(inputs)
        graph, static, outputs = self._captured[key]
        for mine, given in zip(static, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return [y.clone() for y in outputs]  # the next replay overwrites them

    def _capture(
        self, inputs: list[Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]:
        """A CUDA graph of inference, and where it reads its inputs and writes its outputs.

        As https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs describes.
        """
        with torch.cuda.device(inputs[0].device):
            static = [x.clone() for x in inputs]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # prepares weights; cuDNN and cuBLAS set themselves up
                for _ in range(3):
                    super().forward(*static)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = super().forward(*static)
        return graph, static, outputs

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_captured": {}, "_captured_state": None}  # can't be copied

    def torchvision_state_dict(self) -> dict[str, Tensor]:
        """`state_dict` with torchvision's keys, shapes and order; of a VGG, whole or in part.

        The tensors share the parameters' memory, but for fc1's kernel, which is a copy: torchvision
        flattens the last map in another order.

        Raises:
            ValueError: layers that torchvision's VGG doesn't have.
        """
        tensors = {key.replace(".", "/"): value for key, value in self.state_dict().items()}
        return conversion.keras_to_torchvision(tensors)


def lower(
    model: keras.Model,
    *,
    data_format: str | None = None,
    dtype: torch.dtype | None = None,
    checkpoint: bool = False,
    cuda_graphs: bool = False,
) -> Lowered:
    """Return a torch module that runs a Keras model on the model's own parameters.

    `train()` and `eval()` decide what Keras's `training` argument does; train either and both
    change. Frozen layers at the front of the network run in training as in inference, which is
    faster and keeps nothing. The kernels' storage is put in another order in place; their values
    stay.

    Args:
        model: a Functional or Sequential model; any layers, the fast way for those in `HANDLERS`.
        data_format: layout of 4-D inputs and outputs, "channels_last" (N, H, W, C) or
            "channels_first" (N, C, H, W); the Keras model's own by default.
        dtype: what layers compute in that Keras would run in float32, as a mixed dtype policy
            would do; the parameters stay as they are.
        checkpoint: in training, keep only what pools put out and compute the activations between
            them again in backward: the same gradients from a fraction of the memory, in up to a
            third more time. Blocks in which a layer runs as Keras runs it are kept whole.
        cuda_graphs: on a GPU, replay inference as a CUDA graph, which spares small batches the time
            that it takes to launch each kernel. A graph, with memory of its own, is captured for
            each shape of the inputs, and again when a parameter has changed.

    Raises:
        ValueError: a model that isn't a graph of layers, or an unknown data_format or dtype.
    """
    graph = functional(model)
    if graph is None:
        raise ValueError(
            f"Received {model!r}, which is not a Functional model or a built Sequential one; "
            f"only a graph of layers can be lowered. Build the model from keras.Input, or call "
            f"the Keras model itself in the torch loop."
        )
    _check(data_format, dtype)
    own = layout(graph)
    format = Format(own == "channels_last", dtype, checkpoint)
    return Lowered(graph, format, data_format or own, cuda_graphs=cuda_graphs)


def part(inputs: keras.KerasTensor, outputs: Any, *, data_format: str | None = None) -> Lowered:
    """Lower what a Keras model does between its tensors, on its own Parameters.

    The model isn't changed. Height and width may differ from the model's where its layers allow it.

    Args:
        inputs: where the part starts: `model.input`, or the `output` of a layer.
        outputs: where it ends: one such tensor, or a list of them.
        data_format: layout of 4-D inputs and outputs, as `lower` takes it.

    Raises:
        ValueError: a path from the model's input to `outputs` that goes around `inputs`.
    """
    _check(data_format)
    function = keras.Function(inputs, outputs)  # makes no nodes, so `layer.output` stays what it is
    own = layout(function)
    return Lowered(
        function, Format(own == "channels_last", None), data_format or own, any_size=True
    )


def _check(data_format: str | None, dtype: torch.dtype | None = None) -> None:
    if data_format not in (None, "channels_last", "channels_first"):
        raise ValueError(
            f"Received data_format={data_format!r}; expected 'channels_last' or 'channels_first'."
        )
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"Received dtype={dtype!r}; expected torch.float32, torch.bfloat16 or torch.float16."
        )


def layout(model: keras.Function) -> str:
    """The layout that the model's spatial layers have; Flatten has an option of the same name."""
    for operation in model.operations:
        for layer in operation._flatten_layers() if isinstance(operation, keras.Layer) else ():
            if hasattr(layer, "data_format") and not isinstance(layer, layers.Flatten):
                return str(layer.data_format)
    return str(keras.config.image_data_format())


def accelerate_(model: keras.Model, compile: bool = False, enabled: bool = True) -> keras.Model:
    """Make a Keras model run its lowered module in fit, evaluate, predict and calls, in place.

    Results, callbacks, metrics, saving and surgery stay what they are; neither a saved model nor a
    clone of this one is accelerated. Call it again after layers were changed otherwise than by
    training or by their `trainable` flags. Returns the model.

    Args:
        model: what `lower` takes.
        compile: run the module through torch.compile.
        enabled: False gives the model its own `call` back.
    """
    model.__dict__.pop("call", None)
    if not enabled:
        return model
    lowered = lower(model)
    run = torch.compile(lowered) if compile else lowered
    graph = getattr(model, "_functional", model)  # a Sequential model has its graph inside
    laid_out: Any = None  # the optimizer whose slots have the layout of their kernels

    def call(inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        # Keras's own way where it works out shapes, which it does on tensors that are not real.
        if mask is not None or in_stateless_scope():
            return type(model).call(model, inputs, training=training, mask=mask)
        values = graph._standardize_inputs(inputs)
        if any(x is None or x.is_meta for x in values):
            return type(model).call(model, inputs, training=training, mask=mask)
        if lowered.training != bool(training):
            lowered.train(bool(training))
        nonlocal laid_out
        optimizer = getattr(model, "optimizer", None)  # None before compile()
        if training and optimizer is not laid_out and optimizer and optimizer.built:
            _lay_out_slots_(optimizer, lowered)
            laid_out = optimizer
        return run(values)

    model.__dict__["call"] = call
    return model


def _lay_out_slots_(optimizer: keras.Optimizer, lowered: Lowered) -> None:
    """Give momentum and the like the layout of their kernels; mixed layouts make updates slow."""
    shapes = {p.shape for p in lowered.parameters() if not p.is_contiguous()}
    for variable in optimizer.variables:
        if variable.value.shape in shapes:
            lay_out_(variable.value)
