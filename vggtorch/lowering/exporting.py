"""A model as a file that runs without Keras and without vggtorch: ONNX, or torch.export's .pt2."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves  # in the order of a dict, as exported files have it

from vggtorch import files, keras_graph
from vggtorch.lowering.layer_modules import KerasLayer
from vggtorch.lowering.network import TorchNetwork
from vggtorch.lowering.settings import graph_to_read
from vggtorch.lowering.writing import check_data_format, network_of
from vggtorch.models import data_config
from vggtorch.paths import EXPORTED, check_out

# Height and width, in pixels, for models that take any: to trace with, and to check with.
TRACED, CHECKED, SMALL, ODD = (224, 224), (160, 192), (33, 40), (45, 51)
_ADAPTIVE = (
    torch.nn.AdaptiveAvgPool1d, torch.nn.AdaptiveAvgPool2d, torch.nn.AdaptiveAvgPool3d,
    torch.nn.AdaptiveMaxPool1d, torch.nn.AdaptiveMaxPool2d, torch.nn.AdaptiveMaxPool3d,
)  # fmt: skip
SIDES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}  # of open axes
DATA_CONFIG = "data_config.json"  # in a .pt2 file


def export(model: keras.Model, path: str | PathLike, *, data_format: str | None = None) -> None:
    """Write a model for inference; any batch size and any image size that the model itself takes.

    It takes what the model takes: images that `preprocess` has made ready, unless the model was
    built with `include_preprocessing`. What was written is run at a second batch size and image
    size, for one small image and at odd sizes, and must give what the model gives; ONNX in ONNX
    Runtime, where that is installed.

    Args:
        model: what `to_torch` takes; its inputs keep their names, shapes and dtypes.
        path: ends in `.onnx`, whose open axes are called batch, height and width and whose outputs
            have the names of a dict or of the layers (`image_` for an input `image` that is an
            output too), or in `.pt2`, which `torch.export.load(path).module()` reads. What the
            model expects of an image, and its classes, go with it as JSON: in the metadata
            `data_config` of the one, in the extra file `data_config.json` of the other.
        data_format: layout of the inputs and outputs, "channels_last" (N, H, W, C) or
            "channels_first" (N, C, H, W); the Keras model's own by default.

    Raises:
        ValueError: another ending, what `to_torch` raises, or a model of which the file would not
            compute the same for all batches and sizes; nothing is written then.
        ImportError: `.onnx` without the packages onnx and onnxscript.
        OSError: the file can't be written; one that stood there before is then still whole.

    Example:
        >>> import keras, pathlib, tempfile, torch, vggtorch as vt
        >>> image = keras.Input((4,))
        >>> model = keras.Model(image, keras.layers.Dense(2)(image))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "model.pt2"
        ...     vt.export(model, path)
        ...     torch.export.load(path).module()(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """
    check_out(path, EXPORTED, "")
    path = Path(path)
    if path.suffix == ".onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise ImportError(
            "Writing ONNX needs the packages onnx and onnxscript. "
            "Install them with: pip install 'vggtorch[onnx]'"
        )
    check_data_format(data_format)
    graph = graph_to_read(model, "export")
    network = network_of(graph, model.name, data_format=data_format).eval()
    inputs = [_Input.of(tensor, graph, data_format) for tensor in graph.inputs]
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    # Two images, because torch.export takes a batch of one for a constant.
    images = tuple(x.example(2, TRACED).to(device) for x in inputs)
    dynamic = tuple(
        {i: torch.export.Dim.AUTO for i, n in enumerate(x.shape) if n is None} for x in inputs
    )
    with torch.no_grad():
        program = torch.export.export(network, images, dynamic_shapes=dynamic)
    # torch takes a size that isn't 1 while it traces for one that never is, and guards it, because
    # the strides of a map of one pixel say nothing of its memory format; torch 2.11 also guards
    # whether a pool, by its stride, reaches the last pixel. No operation here depends on either,
    # so these guards go, and no others; `_check` runs a small image and odd ones.
    strides = {str(s) for m in network.modules() for s in np.ravel(getattr(m, "stride", 1))}
    unneeded = re.compile(rf" != 1$|% ({'|'.join(map(re.escape, strides))})\) [!=]= 0$")
    program._guards_code = [code for code in program._guards_code if not unneeded.search(code)]
    others = [
        tuple(x.example(batch, size).to(device) for x in inputs)
        for batch, size in ((3, CHECKED), (1, SMALL), (2, ODD))
    ]
    _check(network, program.module(), others)
    config = data_config(model)
    described = json.dumps(config.as_dict())
    if path.suffix == ".pt2":
        content = io.BytesIO()  # where a disk is full, torch's own writer aborts the process
        torch.export.save(program, content, extra_files={DATA_CONFIG: described})
        with files.atomic(path) as temporary:
            temporary.write_bytes(content.getbuffer())
        return
    names = [x.name for x in inputs]
    written = torch.onnx.export(program, input_names=names, dynamo=True, verbose=False)
    assert written is not None
    _name_axes_(written.model, inputs)
    _name_outputs_(written.model, graph)
    written.model.metadata_props["data_config"] = described
    if name := config.weight_set:
        written.model.metadata_props["weight_set"] = name
    with files.atomic(path) as temporary:
        written.save(temporary, external_data=False)
        if importlib.util.find_spec("onnxruntime"):
            _check(network, _onnx_runtime(network, temporary), others)


@dataclass(frozen=True)
class _Input:
    """An input of the exported network.

    Attributes:
        name: the Keras model's.
        shape: None where the model leaves it open.
        dtype: torch's.
        spatial: which axes are height and width, or the like.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    spatial: range

    @classmethod
    def of(
        cls, tensor: keras.KerasTensor, graph: keras.Function, data_format: str | None
    ) -> _Input:
        """An input of the graph, its axes in the order of `data_format`."""
        own, shape = keras_graph.data_format(graph), tuple(tensor.shape)
        rank = len(shape)
        if rank > 2 and data_format not in (None, own):
            batch, *rest = shape
            rest = [rest[-1], *rest[:-1]] if own == "channels_last" else [*rest[1:], rest[0]]
            shape = (batch, *rest)
        first = 2 if (data_format or own) == "channels_first" else 1
        dtype = keras_graph.torch_dtype(tensor.dtype)
        return cls(tensor.name, shape, dtype, range(first, first + rank - 2))

    def example(self, batch: int, size: tuple[int, int]) -> Tensor:
        """An input of this batch and size wherever the model leaves them open."""
        given = dict(zip(self.spatial, size, strict=False)) | {0: batch}
        whole = [given.get(i, size[0]) if n is None else n for i, n in enumerate(self.shape)]
        # Random whole numbers would run out of an embedding's table.
        if not self.dtype.is_floating_point:
            return torch.zeros(whole, dtype=self.dtype, device="cpu")
        generator = torch.Generator().manual_seed(0)
        return torch.rand(whole, generator=generator, device="cpu").to(self.dtype)


def _name_axes_(model: Any, inputs: Sequence[_Input]) -> None:
    """Call the open axes of an ONNX model batch, height and width, which torch numbers (s13)."""
    from onnxscript import ir

    names: dict[str, str] = {}
    for value, x in zip(model.graph.inputs, inputs, strict=True):
        known = {0: "batch"} | dict(zip(x.spatial, SIDES.get(len(x.spatial), ()), strict=False))
        for axis, size in enumerate(value.shape):
            if isinstance(size, int) or str(size.value) in names:
                continue
            name = known.get(axis, f"{x.name}_{axis}")
            while name in names.values():
                name += "_"
            names[str(size.value)] = name
    if not names:
        return
    symbol = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    made = (value for node in model.graph.all_nodes() for value in node.outputs)
    for value in {*model.graph.inputs, *made}:
        if value.shape is not None:
            value.shape = ir.Shape(
                size
                if isinstance(size, int)
                else symbol.sub(lambda found: names[found[0]], str(size.value))
                for size in value.shape
            )


def _name_outputs_(model: Any, graph: keras.Function) -> None:
    """Call each output of an ONNX model by its key in a dict, or as the Keras layer is called.

    With underscores behind it where another value is called so, as an input that is an output too.
    """
    made = (value for node in model.graph.all_nodes() for value in node.outputs)
    values = {*model.graph.inputs, *model.graph.initializers.values(), *made}
    taken = {value.name for value in values.difference(model.graph.outputs)}
    paths = keras.tree.flatten_with_path(keras_graph.output_structure(graph))
    for value, (path, tensor) in zip(model.graph.outputs, paths, strict=True):
        keys = [key for key in path if isinstance(key, str)]
        name = "_".join(keys) or keras_graph.producer(tensor).name
        while name in taken:
            name += "_"
        value.name = name
        taken.add(name)


def _onnx_runtime(network: TorchNetwork, path: Path) -> Callable[..., Any]:
    """The written file as a function of tensors."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)  # what fails is raised
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        kinds = sorted({str(p.dtype) for p in network.parameters()})
        traced = f" traced{through}" if (through := _through(network)) else ""
        raise ValueError(
            f"ONNX Runtime refuses this model: {_first_line(error)} Its weights are "
            f"{', '.join(kinds) or 'none'}{traced}. Build it in "
            f"float32, with numbers of the same dtype as the tensors that they meet, or export "
            f"to .pt2."
        ) from error
    names = [x.name for x in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        arrays = {name: x.cpu().numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(y) for y in session.run(None, arrays)]

    return run


@torch.no_grad()
def _check(
    network: TorchNetwork, run: Callable[..., Any], others: Sequence[Sequence[Tensor]]
) -> None:
    """See that what was exported gives at other batches and sizes what the model gives."""
    hint = (
        f"The model is traced{_through(network)}, and what is written holds for one batch "
        f"and image size only. Give the model fixed ones: keras.Input(shape, batch_size=n)."
    )
    for inputs in others:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        try:
            expected = tree_leaves(network(*inputs))
        except Exception:  # the model itself takes images of certain sizes only
            continue
        try:
            found = tree_leaves(run(*inputs))
        except Exception as error:
            raise ValueError(
                f"The exported model fails at inputs of shape {shapes}: {_first_line(error)} {hint}"
            ) from error
        for one, other in zip(found, expected, strict=True):
            one, other = one.cpu().double(), other.cpu().double()
            differs = one.shape != other.shape
            if differs or (one - other).abs().max() > 1e-2 * (1 + other.abs().max()):
                raise ValueError(
                    f"The exported model computes something else than the model at inputs of shape "
                    f"{shapes}. {hint}"
                )


def _through(network: TorchNetwork) -> str:
    """Which layers are traced with the numbers that they see: Keras's code, and adaptive pools."""
    names = [
        f"the Keras code of {m.operation[0].name!r} ({type(m.operation[0]).__name__})"
        if isinstance(m, KerasLayer)
        else f"{name.rpartition('.')[2]!r} ({type(m).__name__})"
        for name, m in network.named_modules()
        if isinstance(m, KerasLayer) or (isinstance(m, _ADAPTIVE) and m.output_size != 1)
    ]
    return f" through {', '.join(names[:5])}" if names else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".") + "."
