"""The frozen prefix of a network, run once: where it ends, and its features on disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import torch
from filelock import FileLock, Timeout

from vggtorch import files, keras_graph
from vggtorch.lowering import between
from vggtorch.telling import tell
from vggtorch.training.config import TrainConfig
from vggtorch.training.data import DatasetSource, Folder, Key, as_input, fingerprint, in_order
from vggtorch.training.identity import network_digest
from vggtorch.training.reading import loaded


def frozen_end(model: keras.Model) -> keras.KerasTensor:
    """The last tensor before which nothing trains and nothing is random; the input if none is.

    Everything after it depends on the image through this tensor alone.
    """
    nodes = keras_graph.calls(keras_graph.graph_of(model, "finetune"))
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


def _is_frozen(operation: keras.Operation) -> bool:
    """Whether the operation always gives the same output for the same input while we train."""
    if not isinstance(operation, keras.layers.Layer):
        return True
    return not any(
        (layer.trainable and keras_graph.own_variables(layer)) or keras_graph.seed_generators(layer)
        for layer in keras_graph.all_layers(operation)
    )


@dataclass(frozen=True)
class Features:
    """A source of features on disk: augmentation a of an image is its copy a, modulo the copies.

    Attributes:
        values: (copies, images, ...), memory-mapped.
        labels: (images,).
        digest: a hash of all that the values depend on.
    """

    values: np.ndarray
    labels: torch.Tensor
    digest: str

    def __len__(self) -> int:
        return self.values.shape[1]

    def __getitem__(self, keys: Sequence[Key]) -> tuple[torch.Tensor, torch.Tensor]:
        indices, augmentations = np.array(keys).T
        values = self.values[augmentations % len(self.values), indices]
        return torch.from_numpy(values).float(), self.labels[torch.from_numpy(indices)]


def cached_features(
    prefix: keras.Model,
    source: Folder | DatasetSource | Features,
    config: TrainConfig,
    *,
    weights: str | None,
    copies: int,
    accelerator: Any,
    advance: Callable[[int], None],
) -> Features:
    """What `prefix` makes of every image, computed once and kept where the configuration says.

    The file's name is a hash of all that its content depends on, so that it can't be stale, the
    file takes that name only when it's whole, and it ends in its own SHA-256: one that was damaged
    later is made anew. Processes share the work, and the folder.

    `prefix` is the frozen part of a network, which expects the preprocessing of the weight set
    `weights`, or what follows such a part, whose features are the source. Each image has so many
    copies, the plain one first. `advance` is told how many more images are done.

    Raises:
        ValueError: not enough free space, or features beyond half precision.
        OSError: the file can't be written.
    """
    from accelerate.utils import broadcast_object_list

    if isinstance(source, Features):
        images, labels = source.digest, source.labels.tolist()
    else:
        images, labels = fingerprint(source, copies)
    is_half = config.cache_dtype == "float16"
    network = network_digest(prefix, flags=False, values=True)
    recipe = [images, weights, copies, is_half, accelerator.mixed_precision, network]
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    folder = Path(config.cache_dir or Path(config.output_dir) / "features")
    path = folder / f"{key[:32]}.npy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"The folder {folder}, where features of frozen layers go, can't be made: "
            f"{error.strerror}. Choose another (cache_dir), or set cache=False."
        ) from error
    with FileLock(f"{path}.lock") if accelerator.is_main_process else contextlib.nullcontext():
        if broadcast_object_list([accelerator.is_main_process and not _is_whole(path)])[0]:
            _compute(prefix, source, path, config, weights, copies, accelerator, advance)
        accelerator.wait_for_everyone()
    return Features(np.load(path, mmap_mode="r"), torch.tensor(labels), key)


def _compute(
    prefix: keras.Model,
    source: Folder | DatasetSource | Features,
    path: Path,
    config: TrainConfig,
    weights: str | None,
    copies: int,
    accelerator: Any,
    advance: Callable[[int], None],
) -> None:
    from accelerate.utils import broadcast_object_list

    is_main, dtype = accelerator.is_main_process, np.dtype(config.cache_dtype)
    # Only writing fails for want of room; what the images and the network raise keeps its name.
    with files.atomic(path, body=()) if is_main else contextlib.nullcontext(path) as temporary:
        layout: list[Any] = [None]
        if is_main:
            images, _ = source[[(0, 0)]]
            made = prefix.compute_output_shape(tuple(images.shape))
            shape = (copies, len(source), *made[1:])
            _clear(path)
            _check_space(path.parent, shape, dtype.itemsize)
            with files.naming(path, OSError), temporary.open("wb") as file:
                described = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, described)
                layout = [(temporary, file.tell(), shape)]
        # All processes write to the file that the main process made, each its own images. Writing
        # to a memory map would kill the process where the disk is full.
        temporary, begin, shape = broadcast_object_list(layout)[0]
        size = int(np.prod(shape[2:])) * dtype.itemsize  # of one image, in bytes
        keys = [some for copy in range(copies) for some in in_order(len(source), 32, copy)]
        mine = keys[accelerator.process_index :: accelerator.num_processes]
        module = between(prefix.inputs[0], prefix.outputs[0]).eval()
        for some, (images, _) in zip(mine, loaded(source, mine, config.num_workers), strict=True):
            try:
                with torch.no_grad(), accelerator.autocast():
                    outputs = module(as_input(images.to(accelerator.device), weights))
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"The GPU's memory doesn't suffice to run the frozen layers on {len(images)} "
                    f"images at a time ({error}). Set a smaller image_size, or cache=False."
                ) from error
            found = outputs.float().cpu().numpy()
            if dtype == np.float16 and np.abs(found).max() > np.finfo(np.float16).max:
                raise ValueError(
                    f"Features reach {np.abs(found).max():.3g}, and half precision ends at 65504. "
                    f"Set cache_dtype='float32'."
                )
            (first, copy), (last, _) = some[0], some[-1]
            assert found.shape == (last + 1 - first, *shape[2:])
            with files.naming(path, OSError), temporary.open("rb+") as file:
                file.seek(begin + (copy * shape[1] + first) * size)
                file.write(np.ascontiguousarray(found.astype(dtype)).data)
            advance(len(some))
        accelerator.wait_for_everyone()
        if is_main:
            with files.naming(path, OSError), temporary.open("rb+") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
                file.write(digest)


def _is_whole(path: Path) -> bool:
    """Whether there are features at a path, as they were written; warns of damaged ones."""
    if not path.exists():
        return False
    digest, left = hashlib.sha256(), path.stat().st_size - hashlib.sha256().digest_size
    with path.open("rb") as file:
        while left > 0:
            block = file.read(min(left, 1 << 20))
            digest.update(block)
            left -= len(block) or left
        whole = digest.digest() == file.read()
    if not whole:
        tell(f"{path} isn't as it was written, and is made anew.")
    return whole


def _clear(path: Path) -> None:
    """Remove what killed runs have left half written, before it counts as used space."""
    for left in path.parent.glob(".*-*.npy"):
        name = left.name.split(".", 2)[2]
        lock = FileLock(path.with_name(f"{name}.lock"), timeout=0)
        # Another process may be writing the features of another network just now.
        with (
            contextlib.suppress(Timeout),
            lock if name != path.name else contextlib.nullcontext(),
        ):
            left.unlink(missing_ok=True)


def _check_space(folder: Path, shape: tuple[int, ...], itemsize: int) -> None:
    needed, free = int(np.prod(shape)) * itemsize, shutil.disk_usage(folder).free
    if needed > 0.95 * free:
        raise ValueError(
            f"The features of {shape[1]} images in {shape[0]} copies need {needed / 1e9:.2f} GB in "
            f"{folder}, where {free / 1e9:.2f} GB are free. Make room, choose another folder, "
            f"smaller images or fewer cache_copies, set cache_dtype='float16', or cache=False."
        )
