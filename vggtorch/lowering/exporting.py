"""A model as a file that runs without Keras and without vggtorch: ONNX, or torch.export's .pt2."""

from __future__ import annotations

import importlib.util
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

import keras
import torch

from vggtorch import files
from vggtorch.lowering.lowered import lower
from vggtorch.models.preprocessing import weight_set

SIDE = 224  # pixels; to trace with where the model takes any height and width


def export(model: keras.Model, path: str | PathLike, *, data_format: str | None = None) -> None:
    """Write a model for inference; any batch size, and any image size where the model takes that.

    Args:
        model: what `lower` takes; its inputs keep their names, shapes and dtypes.
        path: ends in `.onnx` (the model's weight set is in its metadata), or in `.pt2`, which
            `torch.export.load(path).module()` reads.
        data_format: layout of the inputs and outputs, "channels_last" (N, H, W, C) or
            "channels_first" (N, C, H, W); the Keras model's own by default.

    Raises:
        ValueError: another ending, or what `lower` raises.
        ImportError: `.onnx` without the packages onnx and onnxscript.
        OSError: the file can't be written; one that stood there before is then still whole.
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
    device = next((p.device for p in lowered.parameters()), torch.device("cpu"))
    images, dynamic = [], []
    for shape, dtype in zip(lowered.input_shapes, lowered.input_dtypes, strict=True):
        # Two images, because torch.export takes a batch of one for a constant.
        sizes = (2, *(SIDE if n is None else n for n in shape[1:]))
        images.append(torch.zeros(sizes, dtype=dtype, device=device))
        dynamic.append({i: torch.export.Dim.AUTO for i, n in enumerate(shape) if n is None})
    arguments: tuple[Any, ...] = (images,) if len(images) > 1 else (images[0],)
    with torch.no_grad():
        program = torch.export.export(
            lowered, arguments, dynamic_shapes=(dynamic if len(images) > 1 else dynamic[0],)
        )
    with files.atomic(path) as temporary:
        if path.suffix == ".pt2":
            with warnings.catch_warnings():
                # The kernels' storage is in another order than their axes, which it keeps whole.
                warnings.filterwarnings("ignore", message="No complete tensor found")
                torch.export.save(program, temporary)
            return
        names = [tensor.name for tensor in model.inputs]
        graph = torch.onnx.export(program, input_names=names, dynamo=True, verbose=False)
        assert graph is not None
        if name := weight_set(model):
            graph.model.metadata_props["weight_set"] = name
        graph.save(temporary, external_data=False)
