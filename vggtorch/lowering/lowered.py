"""A Keras model as a plain torch.nn.Module on the very same parameters, run the fast way.

`Lowered` is the outermost graph (graphs.py): it takes and returns what the Keras model does.
`lower` makes it of a model, `between` of the layers between two tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import torch
from torch import Tensor

from vggtorch import keras_graph
from vggtorch.lowering.conventions import LoweringOptions, to_nchw, to_nhwc
from vggtorch.lowering.graphs import Graph
from vggtorch.weights import keras_to_torchvision


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
        options: LoweringOptions,
        data_format: str,
        *,
        any_size: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        super().__init__(model, options)
        self.data_format, self.cuda_graphs = data_format, cuda_graphs
        # By the inputs' shapes and layouts; all read the parameters at these addresses.
        self._captured: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]] = {}
        self._captured_addresses: list[int] = []
        self.input_dtypes = [getattr(torch, x.dtype) for x in model.inputs]
        # Shapes as the caller has them: the Keras model's, unless asked for the other layout.
        axes = {(True, "channels_first"): (0, 3, 1, 2), (False, "channels_last"): (0, 2, 3, 1)}
        order = axes.get((options.channels_last, data_format), (0, 1, 2, 3))
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
        self._structure = keras.tree.map_structure(
            lambda x: number[id(x)], keras_graph.output_structure(model)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Lowered:
        """What `.to()`, `.cuda()` and `.half()` do; refused where the Keras model can't follow."""
        for dtype in {p.dtype for p in self.parameters()}:
            after = fn(torch.empty(0, dtype=dtype)).dtype
            if after != dtype:
                raise ValueError(
                    f"Received a conversion from {dtype} to {after}, but the parameters are the "
                    f"Keras model's own, whose variables are {dtype}. {_advice(after)}"
                )
        super()._apply(fn, recurse)
        return self

    def forward(self, inputs: Any) -> Any:  # type: ignore[override]
        """Run the model on a tensor, or on the list or dict that the Keras model takes."""
        if isinstance(inputs, torch.fx.Proxy):
            raise ValueError(
                "torch.fx can't trace what lower returns, whose forward picks its steps. "
                "Take vt.to_torch(model), which is a torch.fx.GraphModule already."
            )
        flat = [inputs] if isinstance(inputs, Tensor) else keras.tree.flatten(inputs)
        if len(flat) != len(self._inputs):
            raise ValueError(f"Received {len(flat)} inputs; this model takes {len(self._inputs)}.")
        values = []
        for x, shape, dtype in zip(flat, self.input_shapes, self.input_dtypes, strict=True):
            # As in Keras, a batch size that the model was built with doesn't bind.
            if x.ndim != len(shape) or any(
                expected not in (None, received)
                for expected, received in zip(shape[1:], x.shape[1:], strict=True)
            ):
                raise ValueError(
                    f"Received an input of shape {tuple(x.shape)}; expected {shape} with "
                    f"data_format={self.data_format!r}. Reshape the input, or lower the model "
                    f"with the data_format that the input has."
                )
            x = x.to(dtype)
            values.append(to_nchw(x) if self.data_format == "channels_last" else x)
        if self.cuda_graphs and self._replays(values):
            outputs = self._replay(values)
        else:
            outputs = super().forward(*values)
        if self.data_format == "channels_last":
            outputs = [self._to_keras(y) for y in outputs]
        if isinstance(self._structure, int):
            return outputs[0]
        return keras.tree.map_structure(lambda i: outputs[i], self._structure)

    def _to_keras(self, x: Tensor) -> Tensor:
        """NCHW -> NHWC, a view that carries the same mask."""
        if x.ndim != 4:
            return x
        y = to_nhwc(x)
        keras_graph.copy_mask_(x, y)
        return y

    def _replays(self, inputs: list[Tensor]) -> bool:
        """Whether this is inference on a GPU, of which a graph can be replayed."""
        # Never capture under autocast: its cast weights are freed on exit, and the replay would
        # read freed memory.
        recast = torch.is_autocast_enabled("cuda")
        learns = self.training or torch.is_grad_enabled()
        return all(x.is_cuda for x in inputs) and not (learns or recast or self.is_observed())

    def _replay(self, inputs: list[Tensor]) -> list[Tensor]:
        """Run the CUDA graph of inference for inputs of these shapes and layouts."""
        # On a GPU nothing is prepared of the parameters, so a graph sees all that is written to
        # them, and is out of date only where they stand elsewhere.
        now = [p.data_ptr() for p in (*self.parameters(), *self.buffers())]
        if now != self._captured_addresses:
            self._captured, self._captured_addresses = {}, now
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
        return vars(self) | {"_captured": {}, "_captured_addresses": []}  # can't be copied

    def torchvision_state_dict(self) -> dict[str, Tensor]:
        """`state_dict` with torchvision's keys, shapes and order; of a VGG, whole or in part.

        The tensors share the parameters' memory, but for fc1's kernel, which is a copy: torchvision
        flattens the last map in another order.

        Raises:
            ValueError: layers that torchvision's VGG doesn't have.
        """
        tensors = {key.replace(".", "/"): value for key, value in self.state_dict().items()}
        return keras_to_torchvision(tensors)


def _advice(dtype: torch.dtype) -> str:
    if dtype in (torch.bfloat16, torch.float16):
        return (
            f"Use lower(model, dtype={dtype}) or torch.autocast to compute in {dtype}, or "
            f"vt.to_torch(model), whose parameters can part from the Keras model's."
        )
    return (
        "Use vt.to_torch(model), whose parameters can part from the Keras model's, or build the "
        "Keras model under keras.config.set_dtype_policy."
    )


def lower(
    model: keras.Model,
    *,
    data_format: str | None = None,
    dtype: torch.dtype | None = None,
    checkpoint: bool = False,
    cuda_graphs: bool = False,
) -> Lowered:
    """Return a torch module that runs a Keras model on the model's own parameters, the fast way.

    `train()` and `eval()` decide what Keras's `training` argument does; train either and both
    change. Frozen layers at the front of the network run in training as in inference, which is
    faster and keeps nothing. The kernels' storage is put in another order in place; their values
    stay, but `kernel.view(-1)` is no longer possible (`torch.nn.utils.parameters_to_vector`).

    What torch's tools look for, an nn.Conv2d or nn.ReLU, isn't inside: quantization, pruning of
    whole classes, attribution and fx want `vt.to_torch(model)`. Hooks, parametrizations, compilers
    and transforms work: they see each module run by itself.

    Args:
        model: a Functional or Sequential model; layers without a module of their own run as Keras
            runs them.
        data_format: layout of 4-D inputs and outputs, "channels_last" (N, H, W, C) or
            "channels_first" (N, C, H, W); the Keras model's own by default.
        dtype: what layers compute in that Keras would run in float32, as a mixed dtype policy
            would do; the parameters stay as they are.
        checkpoint: in training, keep only what pools put out and compute the activations between
            them again in backward: the same gradients from a fraction of the memory, in up to a
            third more time. Blocks in which a layer runs as Keras runs it are kept whole.
        cuda_graphs: on a GPU, replay inference as a CUDA graph, which spares small batches the time
            that it takes to launch each kernel. A graph, with memory of its own, is captured for
            each shape of the inputs, and again when a parameter has moved.

    Raises:
        ValueError: a model that isn't a graph of layers, or an unknown data_format or dtype; and
            later where a module is assigned to the result, which would have no effect.

    Example:
        >>> import keras, torch, vggtorch as vt
        >>> image = keras.Input((8, 8, 3))
        >>> x = keras.layers.Conv2D(4, 3, activation="relu", name="conv")(image)
        >>> model = keras.Model(image, keras.layers.Dense(2)(keras.layers.Flatten()(x)))
        >>> network = vt.lower(model, data_format="channels_first").train()
        >>> loss = network(torch.rand(5, 3, 8, 8)).square().mean()
        >>> loss.backward()
        >>> network.conv.kernel is model.get_layer("conv").kernel.value
        True
    """
    graph = keras_graph.graph_of(model, "lower")
    _check(data_format, dtype)
    own = keras_graph.data_format(graph)
    options = LoweringOptions(own == "channels_last", dtype, checkpoint)
    return Lowered(graph, options, data_format or own, cuda_graphs=cuda_graphs)


def between(inputs: keras.KerasTensor, outputs: Any, *, data_format: str | None = None) -> Lowered:
    """Lower what a Keras model does between its tensors, on its own Parameters.

    The model isn't changed. Height and width may differ from the model's where its layers allow it.

    Args:
        inputs: where it starts: `model.input`, or the `output` of a layer.
        outputs: where it ends: one such tensor, or a list of them.
        data_format: layout of 4-D inputs and outputs, as `lower` takes it.

    Raises:
        ValueError: a path from the model's input to `outputs` that goes around `inputs`.
    """
    _check(data_format)
    function = keras.Function(inputs, outputs)  # makes no nodes, so `layer.output` stays what it is
    own = keras_graph.data_format(function)
    options = LoweringOptions(own == "channels_last", None)
    return Lowered(function, options, data_format or own, any_size=True)


def _check(data_format: str | None, dtype: torch.dtype | None = None) -> None:
    if data_format not in (None, "channels_last", "channels_first"):
        raise ValueError(
            f"Received data_format={data_format!r}; expected 'channels_last' or 'channels_first'."
        )
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"Received dtype={dtype!r}; expected torch.float32, torch.bfloat16 or torch.float16."
        )
