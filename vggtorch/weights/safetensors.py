"""The safetensors form: read by the `safetensors` package, written here in little memory.

The package's own writer wants every tensor contiguous, which would double the memory that a
conversion takes. What stands here writes tensors of any strides in blocks, and puts a checksum of
the whole file into its metadata: the form itself has none.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 64  # bytes; torch aligns the memory that it allocates to as many
_NO_CHECKSUM = b"00000000"  # stands in the checksum's place while it is taken


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors and metadata, with a CRC-32 of the whole file in the metadata."""
    ours = {"checksum": _NO_CHECKSUM.decode(), "writer": "vggtorch"}
    header: dict[str, object] = {"__metadata__": {**ours, **metadata}}
    end = 0
    for key, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _CODES)
            raise ValueError(f"{key} has dtype {tensor.dtype}; expected one of {known}.")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(len(text) + -(8 + len(text)) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    with path.open("wb") as file:
        file.write(head)
        crc = zlib.crc32(head)
        for tensor in tensors.values():
            for block in _blocks(tensor.detach().cpu()):
                file.write(block)
                crc = zlib.crc32(block, crc)
        file.seek(0)
        file.write(head.replace(_NO_CHECKSUM, b"%08x" % crc, 1))


def _blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """A tensor's bytes in order, in blocks that stay in the processor's cache.

    NumPy makes them contiguous, since torch would do it on all cores at once, where another
    thread may be hashing.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[
        tensor.element_size()
    ]
    array = np.atleast_1d(tensor.view(integers).numpy())
    rows = max(1, (1 << 22) // max(1, array[:1].nbytes))
    for i in range(0, len(array), rows):
        yield np.ascontiguousarray(array[i : i + rows]).reshape(-1).view(np.uint8).data


def read(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """The named tensors and the metadata of a file, mapped, after a look at its checksum.

    Raises:
        ValueError: the file is damaged.
    """
    tensors, metadata = mapped(path)
    # Each of the two says that the file is one of ours, should the other be damaged.
    if metadata.keys() & {"checksum", "writer"}:
        written = metadata.get("checksum", "")
        with path.open("rb") as file:
            length = file.read(8)
            text = file.read(int.from_bytes(length, "little"))
            crc = zlib.crc32(length + text.replace(written.encode(), _NO_CHECKSUM, 1))
            while block := file.read(1 << 18):
                crc = zlib.crc32(block, crc)
        if written != f"{crc:08x}":
            raise ValueError("it does not match the checksum in it")
    return tensors, metadata


def mapped(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """As `read`, without a look at the values: that of a large file takes no time.

    The file is mapped privately. A page is read when it is touched, and what is written to a
    tensor never reaches the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    # The package gives names in alphabetical order; in the file they are in network order.
    return dict(sorted(tensors.items(), key=lambda item: item[1].data_ptr())), metadata
