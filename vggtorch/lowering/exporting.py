"""A model as a file that runs without Keras and without vggtorch: ONNX, or torch.export's .pt2."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import keras
import torch
from torch import Tensor

from vggtorch import files
from vggtorch.lowering.as_keras import KerasLayer
from vggtorch.lowering.lowered import Lowered, lower
from vggtorch.models import data_config

# Height and width, in pixels, for models that take any: to trace with, and to check with.
TRACED, CHECKED = (224, 224), (160, 192)
DATA_CONFIG = "data_config.json"  # in a .pt2 file


def export(model: keras.Model, path: str | PathLike, *, data_format: str | None = None) -> None:
    """Write a model for inference; any batch size and any image size that the model itself takes.

    What was written is run at a second batch size and image size, and must give what the model
    gives; ONNX in ONNX Runtime, where that is installed. (A `.pt2` of a network with pools doesn't
    take images so small that they end as one pixel.)

    Args:
        model: what `lower` takes; its inputs keep their names, shapes and dtypes.
        path: ends in `.onnx`, or in `.pt2`, which `torch.export.load(path).module()` reads. What
            the model expects of an image, and its classes, go with it as JSON: in the metadata
            `data_config` of the one, in the extra file `data_config.json` of the other.
        data_format: layout of the inputs and outputs, "channels_last" (N, H, W, C) or
            "channels_first" (N, C, H, W); the Keras model's own by default.

    Raises:
        ValueError: another ending, what `lower` raises, or a model of which the file would not
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
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"Received {str(path)!r}; expected a name that ends in .onnx or .pt2.")
    if path.suffix == ".onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise ImportError(
            "Writing ONNX needs the packages onnx and onnxscript. "
            "Install them with: pip install 'vggtorch[onnx]'"
        )
    lowered = lower(model, data_format=data_format).eval()
    # Two images, because torch.export takes a batch of one for a constant.
    images = _inputs(lowered, 2, TRACED)
    dynamic = [
        {i: torch.export.Dim.AUTO for i, n in enumerate(shape) if n is None}
        for shape in lowered.input_shapes
    ]
    with torch.no_grad():
        program = torch.export.export(
            lowered,
            (_as_given(images),),
            dynamic_shapes=(dynamic if len(images) > 1 else dynamic[0],),
        )
    module = program.module()
    _check(lowered, lambda inputs: module(_as_given(inputs)))
    config = data_config(model)
    described = json.dumps(config.as_dict())
    with files.atomic(path) as temporary:
        if path.suffix == ".pt2":
            with warnings.catch_warnings():
                # The kernels' storage is in another order than their axes, which it keeps whole.
                warnings.filterwarnings("ignore", message="No complete tensor found")
                torch.export.save(program, temporary, extra_files={DATA_CONFIG: described})
            return
        names = [tensor.name for tensor in model.inputs]
        graph = torch.onnx.export(program, input_names=names, dynamo=True, verbose=False)
        assert graph is not None
        graph.model.metadata_props["data_config"] = described
        if name := config.weight_set:
            graph.model.metadata_props["weight_set"] = name
        graph.save(temporary, external_data=False)
        if importlib.util.find_spec("onnxruntime"):
            _check(lowered, _onnx_runtime(lowered, temporary))


def _inputs(lowered: Lowered, batch: int, size: tuple[int, int]) -> list[Tensor]:
    """Inputs of this batch and image size wherever the model leaves them open."""
    device = next((p.device for p in lowered.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for shape, dtype in zip(lowered.input_shapes, lowered.input_dtypes, strict=True):
        first = 2 if lowered.data_format == "channels_first" else 1
        given = {0: batch, first: size[0], first + 1: size[1]}
        whole = [given.get(i, size[0]) if n is None else n for i, n in enumerate(shape)]
        # Random whole numbers would run out of an embedding's table.
        x = (
            torch.rand(whole, generator=generator)
            if dtype.is_floating_point
            else torch.zeros(whole)
        )
        inputs.append(x.to(dtype).to(device))
    return inputs


def _as_given(inputs: list[Tensor]) -> Any:
    return inputs if len(inputs) > 1 else inputs[0]


def _onnx_runtime(lowered: Lowered, path: Path) -> Callable[[list[Tensor]], Any]:
    """The written file as a function of tensors."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)  # what fails is raised
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        kinds = sorted({str(m.dtype) for m in lowered.modules() if hasattr(m, "dtype")})
        raise ValueError(
            f"ONNX Runtime refuses this model: {_first_line(error)} Its layers compute in "
            f"{', '.join(kinds) or 'what their inputs are'}{_as_keras(lowered)}. Build it in "
            f"float32, with numbers of the same dtype as the tensors that they meet, or export "
            f"to .pt2."
        ) from error
    names = [x.name for x in session.get_inputs()]

    def run(inputs: list[Tensor]) -> list[Tensor]:
        arrays = {name: x.cpu().numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(y) for y in session.run(None, arrays)]

    return run


def _check(lowered: Lowered, run: Callable[[list[Tensor]], Any]) -> None:
    """See that what was exported gives at another batch and size what the model gives."""
    inputs = _inputs(lowered, 3, CHECKED)
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
    hint = (
        f"The model is{_as_keras(lowered) or ' traced'}, and what is written holds for one batch "
        f"and image size only. Give the model fixed ones: keras.Input(shape, batch_size=n)."
    )
    with torch.no_grad():
        try:
            expected = keras.tree.flatten(lowered(_as_given(inputs)))
        except Exception:  # the model itself takes images of certain sizes only
            return
        try:
            found = keras.tree.flatten(run(inputs))
        except Exception as error:
            raise ValueError(
                f"The exported model fails at inputs of shape {shapes}: {_first_line(error)} {hint}"
            ) from error
    for one, other in zip(found, expected, strict=True):
        one, other = one.cpu().double(), other.cpu().double()
        if one.shape != other.shape or (one - other).abs().max() > 1e-2 * (1 + other.abs().max()):
            raise ValueError(
                f"The exported model computes something else than the model at inputs of shape "
                f"{shapes}. {hint}"
            )


def _as_keras(lowered: Lowered) -> str:
    """Which layers run as Keras runs them, and are traced with the numbers that Keras sees."""
    names = [
        f"{m.operation[0].name!r} ({type(m.operation[0]).__name__})"
        for m in lowered.modules()
        if isinstance(m, KerasLayer)
    ]
    return f" traced through the Keras code of {', '.join(names[:5])}" if names else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".") + "."
