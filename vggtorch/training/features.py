"""The frozen prefix of a network, run once: where it ends, and its features on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch
from filelock import FileLock

from vggtorch.lowering.lowered import part
from vggtorch.training.data import Folder, Items, Key, as_input, batches, fingerprint, in_order


def frozen_end(model: keras.Model) -> keras.KerasTensor:
    """The last tensor before which nothing trains and nothing is random; the input if none is.

    Everything after it depends on the image through this tensor alone.
    """
    nodes = _nodes(model)
    end, made = model.inputs[0], []
    for i, node in enumerate(nodes):
        if not _is_frozen(node.operation):
            break
        made += node.output_tensors
        needed = {id(t) for later in nodes[i + 1 :] for t in later.input_tensors}
        needed |= {id(t) for t in model.outputs}
        open_tensors = [t for t in made if id(t) in needed]
        if len(open_tensors) == 1:
            end = open_tensors[0]
    return end


def _nodes(model: keras.Model) -> list[Any]:
    """Every call of a layer or operation, in an order in which they can run."""
    levels = sorted(model._nodes_by_depth.items(), reverse=True)
    return [node for _, level in levels for node in level]


def _is_frozen(operation: keras.Operation) -> bool:
    """Whether the operation always gives the same output for the same input while we train."""
    if not isinstance(operation, keras.layers.Layer):
        return True
    return not any(
        (layer.trainable and layer._trainable_variables + layer._non_trainable_variables)
        or layer._seed_generators
        for layer in operation._flatten_layers()
    )


@dataclass(frozen=True)
class Features:
    """A source of features on disk: draw d of an image is its copy d, modulo the copies."""

    values: np.ndarray  # (copies, images, ...) memory-mapped
    labels: torch.Tensor

    def __len__(self) -> int:
        return self.values.shape[1]

    def __getitem__(self, keys: Sequence[Key]) -> tuple[torch.Tensor, torch.Tensor]:
        indices, draws = np.array(keys).T
        values = self.values[draws % len(self.values), indices]
        return torch.from_numpy(values).float(), self.labels[torch.from_numpy(indices)]


def cached_features(
    prefix: keras.Model,
    source: Folder | Items,
    folder: Path,
    *,
    weights: str | None,
    copies: int,
    half: bool,
    workers: int,
    accelerator: Any,
    advance: Callable[[int], None],
) -> Features:
    """What `prefix` makes of every image, computed once and kept in `folder`.

    The file's name is a hash of all that its content depends on, so that it can't be stale, and
    the file takes that name only when it's whole. Processes share the work, and the folder.

    Args:
        prefix: the frozen part of a network.
        source: the images.
        folder: where the file goes.
        weights: the weight set whose preprocessing the network expects.
        copies: draws of each image; draw 0 is the plain one.
        half: keep half precision.
        workers: processes that read images.
        accelerator: accelerate.Accelerator.
        advance: is told how many more images are done.

    Raises:
        ValueError: not enough free space, or features beyond half precision.
    """
    images, labels = fingerprint(source, copies)
    recipe = [images, weights, copies, half, accelerator.mixed_precision, _digest(prefix)]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    path = folder / f"{key[:32]}.npy"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock") if accelerator.is_main_process else contextlib.nullcontext():
        accelerator.wait_for_everyone()
        if not path.exists():
            _compute(prefix, source, path, weights, copies, half, workers, accelerator, advance)
        accelerator.wait_for_everyone()
    return Features(np.load(path, mmap_mode="r"), torch.tensor(labels))


def _digest(prefix: keras.Model) -> str:
    """SHA-256 of a network: its operations, how they are connected, every weight; not the names."""
    digest = hashlib.sha256()
    number: dict[int, int] = {}  # of each tensor, in the order of their making
    for node in _nodes(prefix):
        operation = node.operation
        config = {key: value for key, value in operation.get_config().items() if key != "name"}
        arguments = [
            number[id(x)] if isinstance(x, keras.KerasTensor) else repr(x)
            for x in keras.tree.flatten([node.arguments.args, node.arguments.kwargs])
        ]
        number |= {id(x): len(number) + i for i, x in enumerate(node.output_tensors)}
        described = [type(operation).__name__, config, arguments]
        digest.update(json.dumps(described, default=str, sort_keys=True).encode())
        for weight in getattr(operation, "weights", ()):
            digest.update(np.ascontiguousarray(keras.ops.convert_to_numpy(weight)).tobytes())
    return digest.hexdigest()


def _compute(
    prefix: keras.Model,
    source: Folder | Items,
    path: Path,
    weights: str | None,
    copies: int,
    half: bool,
    workers: int,
    accelerator: Any,
    advance: Callable[[int], None],
) -> None:
    shape = (copies, len(source), *_feature_shape(prefix, source))
    dtype = np.dtype(np.float16 if half else np.float32)
    temporary = path.with_suffix(".partial")
    if accelerator.is_main_process:
        _check_space(path.parent, shape, dtype.itemsize)
        np.lib.format.open_memmap(temporary, "w+", dtype, shape)
    accelerator.wait_for_everyone()
    values = np.lib.format.open_memmap(temporary, "r+")
    keys = [some for copy in range(copies) for some in in_order(len(source), 32, copy)]
    mine = keys[accelerator.process_index :: accelerator.num_processes]
    module = part(prefix.inputs[0], prefix.outputs[0]).eval()
    for some, (images, _) in zip(mine, batches(source, mine, workers), strict=True):
        with torch.no_grad(), accelerator.autocast():
            found = module(as_input(images.to(accelerator.device), weights)).float().cpu().numpy()
        if half and np.abs(found).max() > np.finfo(np.float16).max:
            raise ValueError(
                f"Features reach {np.abs(found).max():.3g}, and half precision ends at 65504. Set "
                f"cache_half=False."
            )
        (first, copy), (last, _) = some[0], some[-1]
        values[copy, first : last + 1] = found
        advance(len(some))
    values.flush()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _feature_shape(prefix: keras.Model, source: Folder | Items) -> tuple[int, ...]:
    images, _ = source[[(0, 0)]]
    return tuple(prefix.compute_output_shape(tuple(images.shape))[1:])


def _check_space(folder: Path, shape: tuple[int, ...], itemsize: int) -> None:
    needed, free = int(np.prod(shape)) * itemsize, shutil.disk_usage(folder).free
    if needed > 0.95 * free:
        raise ValueError(
            f"The features of {shape[1]} images in {shape[0]} copies need {needed / 1e9:.2f} GB in "
            f"{folder}, where {free / 1e9:.2f} GB are free. Make room, choose another folder, "
            f"smaller images or fewer cache_copies, set cache_half=True, or set cache=False."
        )
