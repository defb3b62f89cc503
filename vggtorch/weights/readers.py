"""The forms of file that hold weights, told apart by content; each reader gives named tensors.

Here are PyTorch's and Keras's own forms; `safetensors` and `onnx` have a file each. What readers
raise names no file: `sources.read` does.
"""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from vggtorch.weight_sets import WEIGHT_SETS
from vggtorch.weights import archives, onnx, pickles, safetensors, state_dicts
from vggtorch.weights.state_dicts import UnsupportedError

Tensors = dict[str, torch.Tensor]
Reader = Callable[[Path], tuple[Tensors, Mapping[str, str]]]


def reader_for(path: Path, head: bytes) -> Reader:
    """The reader for a file that begins with `head`; ValueError where it is no checkpoint."""
    text = head.lstrip().lower()
    if not head:
        raise ValueError(f"{path} is empty.")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(
            f"{path} is an HTML page, not a checkpoint: a download met an error or a login page. "
            f"Delete it and download it again."
        )
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not a checkpoint. Run git lfs pull.")
    if b'"weight_map"' in head:
        raise ValueError(
            f"{path} is the index of a checkpoint in several files. Load them as one dict: "
            f"vt.load_weights(model, {{k: t for file in files for k, t in "
            f"safetensors.torch.load_file(file).items()}}); Keras's by model.load_weights(path)."
        )
    if head.startswith(b"PK\x03\x04"):
        return read_zip
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return read_h5
    if len(head) > 8 and head[8:9] == b"{":
        return safetensors.read
    if head.startswith(b"\x80"):
        return read_pickle
    if head[0] in (0x08, 0x12, 0x3A):  # ModelProto's ir_version, producer_name, graph
        return onnx.read
    raise ValueError(
        f"{path} is no checkpoint that can be read; expected PyTorch's .pth, .safetensors, Keras's "
        f".h5 or .keras, or ONNX. It begins with {head[:16]!r}."
    )


# PyTorch


def read_zip(path: Path) -> tuple[Tensors, Mapping[str, str]]:
    """PyTorch's .pth or Keras's .keras, both zip archives whose members are stored as they are."""
    names = archives.check_archive(path)
    if "model.weights.h5" in names:
        with zipfile.ZipFile(path) as archive:
            config = archive.read("config.json").decode()
            member = archive.getinfo("model.weights.h5")
        # The member's own header stands before it, in which two lengths vary.
        with path.open("rb") as file:
            file.seek(member.header_offset + 26)
            start = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))
        return read_h5(path, start, config)
    if not any(name.endswith("data.pkl") for name in names):
        raise UnsupportedError("the archive holds neither PyTorch's nor Keras's weights")
    return state_dicts.state_dict_in(pickles.unpickled(path, mmap=True))


def read_pickle(path: Path) -> tuple[Tensors, Mapping[str, str]]:
    """PyTorch's form before 1.6, a run of pickles; what isn't a tensor is refused unread."""
    return state_dicts.state_dict_in(pickles.unpickled(path))


# HDF5

H5_TIMEOUT = 60.0  # seconds; it is done in one where the machine has nothing else to do
H5_UNSUPPORTED = 3  # exit status of hdf5.py: the file is whole, and nothing that is read here
_H5_DTYPES = {
    "<f2": torch.float16, "bfloat16": torch.bfloat16, "<f4": torch.float32, "<f8": torch.float64,
    "|b1": torch.bool, "|u1": torch.uint8, "|i1": torch.int8, "<i2": torch.int16,
    "<i4": torch.int32, "<i8": torch.int64,
}  # fmt: skip


def read_h5(
    path: Path, start: int = 0, config: str | None = None
) -> tuple[Tensors, Mapping[str, str]]:
    """Keras's .weights.h5 and its legacy .h5, mapped; the form begins at byte `start` of the file.

    Another process finds the weights, since damaged files crash or hang the HDF5 library (hdf5.py).
    The model's configuration is in the form, or is given as `config`.
    """
    script = Path(__file__).with_name("hdf5.py")
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(script), str(path)],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=H5_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"its structure was not understood in {H5_TIMEOUT} s; if the machine is busy, try again"
        ) from None
    if done.returncode < 0:
        raise ValueError("the HDF5 library crashes on it")
    if done.returncode > 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        kind = UnsupportedError if done.returncode == H5_UNSUPPORTED else ValueError
        raise kind(lines[-1] if lines else "the HDF5 library can't read it")
    found = json.loads(done.stdout)
    size = path.stat().st_size
    storage = torch.UntypedStorage.from_file(str(path), False, size)
    tensors = {}
    for key, (offset, shape, code) in found["spans"].items():
        if code not in _H5_DTYPES:
            raise UnsupportedError(f"{key} has dtype {code}, expected numbers as torch has them")
        dtype = _H5_DTYPES[code]
        begin, length = start + offset, math.prod(shape) * dtype.itemsize
        if begin < 0 or begin + length > size:
            raise ValueError(f"{key} claims more values than are stored")
        values = torch.empty(0, dtype=dtype, device="cpu")
        if length:  # on a storage of its own: a copy of it must not take the whole file along
            values.set_(storage[begin : begin + length])
        tensors[key] = values.reshape(shape)
    config = found["config"] if config is None else config
    if config is None:
        return tensors, found["said"]
    return tensors, {**_remembered(json.loads(config)), **found["said"], "whole": "yes"}


def _remembered(config: object) -> dict[str, str]:
    """What a model's configuration tells of images, its nested models' included.

    It stands in a model's `data_config` or, as earlier versions wrote it, in the name of its class,
    such as vggtorch>OxfordModel.
    """
    kinds = {f"{name.capitalize()}Model": name for name in WEIGHT_SETS}
    kinds |= {name: name for name in WEIGHT_SETS}
    found, left = set(), [config]
    whole: dict[str, None] = {}  # what models say themselves, the outermost first
    while left:
        value = left.pop()
        if isinstance(value, dict):
            said = value.get("data_config")
            names = [value.get("registered_name"), value.get("class_name")]
            if isinstance(said, dict):
                names.append(said.get("weight_set"))
                whole[json.dumps(said)] = None
            found |= {kinds.get(str(name).rpartition(">")[2]) for name in names}
            left += value.values()
        elif isinstance(value, list):
            left += value
    found.discard(None)
    if len(found) > 1 or not (found or whole):
        return {}
    told = {"weight_set": str(found.pop())} if found else {}
    return told | ({"data_config": next(iter(whole))} if whole else {})
