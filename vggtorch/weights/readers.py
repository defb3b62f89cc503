"""The forms of file that hold weights; each reader gives the named tensors of one.

What they raise names no file: `sources.read` does.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch

from vggtorch import files
from vggtorch.weight_sets import WEIGHT_SETS

ZIP = b"PK\x03\x04"
Reader = Callable[[Path], tuple[dict[str, torch.Tensor], Mapping[str, str]]]


def reader(path: Path, head: bytes) -> Reader:
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
    if head.startswith(ZIP):
        return read_zip
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return read_h5
    if len(head) > 8 and head[8:9] == b"{":
        return read_safetensors
    if head.startswith(b"\x80"):
        return read_pickle
    if head[0] in (0x08, 0x12, 0x3A):  # ModelProto's ir_version, producer_name, graph
        return read_onnx
    raise ValueError(
        f"{path} is no checkpoint that can be read; expected PyTorch's .pth, .safetensors, Keras's "
        f".h5 or .keras, or ONNX. It begins with {head[:16]!r}."
    )


# safetensors

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
_LAST = 512  # bytes that a header has left for what is known last: its hashes, and a weight set


def write_safetensors(
    file: IO[bytes],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    last: Callable[[], Mapping[str, str]] = dict,
) -> str:
    """Write the safetensors form, with the CRC-32 of its data and the SHA-256 of its header in it.

    The header is padded so that the data begins on a page of its own. `last` is asked for further
    metadata, short ones, when the data is written. Returns the data's CRC-32.
    """
    codes = {dtype: code for code, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    begin = len(json.dumps(header)) + _LAST
    begin += -begin % mmap.PAGESIZE

    file.seek(begin)
    crc = 0
    with ThreadPoolExecutor(1) as thread:  # the checksum takes as long as writing
        for tensor in tensors.values():
            for block in _blocks(tensor.detach().cpu()):
                summed = thread.submit(zlib.crc32, block, crc)
                file.write(block)
                crc = summed.result()
    header["__metadata__"] = {**metadata, **last(), "crc32": f"{crc:08x}"}
    header["__metadata__"]["header_sha256"] = header_sha256(header)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    assert 8 + len(encoded) <= begin
    file.seek(0)
    file.write(struct.pack("<Q", begin - 8) + encoded.ljust(begin - 8))
    return f"{crc:08x}"


def _blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """A tensor's bytes in order, in blocks that stay in the processor's cache.

    NumPy makes them contiguous: torch would do it on all cores, and wait there for the one that
    hashes meanwhile.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    array = np.atleast_1d(tensor.view(integers).numpy())
    rows = max(1, (1 << 22) // max(1, array[:1].nbytes))
    for i in range(0, len(array), rows):
        yield np.ascontiguousarray(array[i : i + rows]).reshape(-1).view(np.uint8).data


def header_sha256(header: Mapping[str, Any]) -> str:
    """SHA-256 of all that a safetensors header says but for this hash."""
    metadata = {k: v for k, v in header["__metadata__"].items() if k != "header_sha256"}
    said = json.dumps({**header, "__metadata__": metadata}, sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def read_safetensors(
    path: Path, *, fresh: bool = False
) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """Named tensors, mapped, and metadata; a CRC-32 in it is compared, `fresh` or as remembered."""
    size = path.stat().st_size
    header, begin = safetensors_header(path, size)
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its __metadata__ is not a mapping of names to text")
    ours = "crc32" in metadata or "header_sha256" in metadata
    if ours and metadata.get("header_sha256") != header_sha256(header):
        raise ValueError("its header does not match the SHA-256 in it")
    header.pop("__metadata__", None)
    spans = []
    for key, entry in header.items():
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in _DTYPES:
            raise ValueError(f"{key} has dtype {dtype}, expected floating point")
        if not all(type(n) is int and n >= 0 for n in (*shape, start, end)) or len(shape) > 8:
            raise ValueError(f"{key} has shape {shape} at {start} to {end}")
        if math.prod(shape) * _DTYPES[dtype].itemsize != end - start:
            raise ValueError(f"{key} has shape {shape} but {end - start} bytes")
        spans.append((start, end))
    spans.sort()
    if [start for start, _ in spans] + [size - begin] != [0] + [end for _, end in spans]:
        raise ValueError("its tensors do not fill the file: truncated, or its header is damaged")
    if expected := metadata.get("crc32"):  # the first version wrote none
        crc32 = files.once(path, "crc32", lambda file: files.crc32(file, begin), fresh=fresh)
        if crc32 != expected:
            raise ValueError("its values do not match the CRC-32 in its header")
    # Mapped privately: pages are read when touched, and writing to a tensor never reaches the file.
    storage = torch.UntypedStorage.from_file(str(path), False, size)
    tensors = {}
    for key, entry in header.items():
        start, end = entry["data_offsets"]
        dtype = _DTYPES[entry["dtype"]]
        tensors[key] = _mapped(storage, begin + start, end - start, dtype, entry["shape"])
    return tensors, metadata


def safetensors_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begins."""
    with path.open("rb") as file:
        if size < 8:
            raise ValueError("it is too short for a header")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, 100_000_000):
            raise ValueError(f"its header claims {length} bytes in a file of {size}")
        header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a name stands in its header twice")
    return mapping


def _mapped(
    storage: Any, begin: int, length: int, dtype: torch.dtype, shape: list[int]
) -> torch.Tensor:
    """A tensor on a stretch of a mapped file.

    Its storage is its own: copying or pickling one tensor must not take the whole file along.
    """
    if not length:
        return torch.empty(shape, dtype=dtype)
    return torch.empty(0, dtype=dtype).set_(storage[begin : begin + length]).reshape(shape)


# PyTorch


def read_zip(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """PyTorch's .pth or Keras's .keras, both zip archives whose members are stored as they are."""
    with zipfile.ZipFile(path) as archive:
        names = stored(archive)
        if "model.weights.h5" in names:
            # A model of ours remembers its weight set in its class (preprocessing.py).
            kind = json.loads(archive.read("config.json")).get("class_name")
            weight_set = {f"{name.capitalize()}Model": name for name in WEIGHT_SETS}.get(kind)
            # The member's own header stands before it, in which two lengths vary.
            member = archive.getinfo("model.weights.h5")
            with path.open("rb") as file:
                file.seek(member.header_offset + 26)
                start = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))
            return _h5_tensors(path, start), {"weight_set": weight_set} if weight_set else {}
    if not any(name.endswith("data.pkl") for name in names):
        raise ValueError("the archive holds neither PyTorch's nor Keras's weights")
    return _unwrapped(torch.load(path, map_location="cpu", weights_only=True, mmap=True)), {}


def stored(archive: zipfile.ZipFile) -> list[str]:
    """The names of an archive's members; ValueError where one is there twice, or compressed."""
    members = archive.infolist()
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        raise ValueError("a member of the archive is there twice")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its members are compressed, which neither PyTorch nor Keras does")
    return names


def read_pickle(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """PyTorch's form before 1.6, a run of pickles; what isn't a tensor is refused unread."""
    return _unwrapped(torch.load(path, map_location="cpu", weights_only=True)), {}


def _unwrapped(loaded: object) -> dict[str, torch.Tensor]:
    """The state_dict in what torch.load gave, which may stand inside a training checkpoint."""
    if isinstance(loaded, dict):
        for key in ("state_dict", "model_state_dict", "model"):
            if isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError("it does not hold a state_dict")
    tensors = {}
    for key, value in loaded.items():
        if not isinstance(key, str) or type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise ValueError(f"{key!r} is a {type(value).__name__}, expected a tensor")
        tensor = value.detach()
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(f"{key} is not a plain tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{key} claims more values than are stored")
        tensors[key.removeprefix("module.")] = tensor  # of DataParallel
    if len(tensors) != len(loaded):
        raise ValueError("a name stands in it with and without 'module.'")
    return tensors


# HDF5

H5_TIMEOUT = 20.0  # seconds
_H5_DTYPES = {"<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64}


def read_h5(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """Keras's .weights.h5 and its legacy .h5."""
    return _h5_tensors(path, 0), {}


def _h5_tensors(path: Path, start: int) -> dict[str, torch.Tensor]:
    """The weights in Keras's forms of HDF5, mapped; `start` is where the form begins in the file.

    Another process finds them, since damaged files crash or hang the HDF5 library (hdf5.py).
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
        raise ValueError(f"its structure was not understood in {H5_TIMEOUT} s") from None
    if done.returncode < 0:
        raise ValueError("the HDF5 library crashes on it")
    if done.returncode > 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(lines[-1] if lines else "the HDF5 library can't read it")
    size = path.stat().st_size
    storage = torch.UntypedStorage.from_file(str(path), False, size)
    tensors = {}
    for key, (offset, shape, code) in json.loads(done.stdout).items():
        if code not in _H5_DTYPES:
            raise ValueError(f"{key} has dtype {code}, expected floating point")
        begin, length = start + offset, math.prod(shape) * _H5_DTYPES[code].itemsize
        if begin < 0 or begin + length > size:
            raise ValueError(f"{key} claims more values than are stored")
        tensors[key] = _mapped(storage, begin, length, _H5_DTYPES[code], shape)
    return tensors


# ONNX


def read_onnx(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """The weights of Conv, Gemm and MatMul nodes in graph order.

    A small reader of the protobuf form (protobuf.dev/programming-guides/encoding, onnx.proto3), so
    that the `oxford` weights need no further package.
    """
    with path.open("rb") as file:
        model = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    fields = list(_fields(model))
    graphs = [value for field, value in fields if field == 7]
    properties = [dict(_fields(_bytes(value))) for field, value in fields if field == 14]
    metadata = {_text(entry.get(1, b"")): _text(entry.get(2, b"")) for entry in properties}
    if len(graphs) != 1 or not isinstance(graphs[0], memoryview):
        raise ValueError("it is not an ONNX model")
    initializers: dict[str, memoryview] = {}
    nodes = []
    for field, value in _fields(graphs[0]):
        if field == 5:
            name = _text(dict(_fields(_bytes(value))).get(8, b""))
            if name in initializers:
                raise ValueError(f"initializer {name} is there twice")
            initializers[name] = _bytes(value)
        elif field == 1:
            nodes.append(_onnx_node(_bytes(value)))

    tensors: dict[str, torch.Tensor] = {}
    convolutions = dense = channels = 0
    channels_last = False
    previous = None  # the output of a MatMul whose bias has not come yet
    for kind, inputs, outputs, attributes in nodes:
        constants = [initializers[name] for name in inputs if name in initializers]
        weighted = kind in ("Conv", "Gemm", "MatMul") or (kind == "Add" and previous in inputs)
        weights = [_onnx_tensor(constant) for constant in constants] if weighted else []
        if kind == "BatchNormalization":
            raise ValueError("its batch norm stands apart; export the model in evaluation mode")
        if kind == "Conv":
            settings = [attributes.get(key, [1]) for key in ("group", "strides", "dilations")]
            if any(n != 1 for numbers in settings for n in numbers):
                raise ValueError(f"convolution {convolutions} has strides, dilations or groups")
            names = (f"conv{convolutions}.weight", f"conv{convolutions}.bias")
            tensors.update(zip(names, weights, strict=False))
            convolutions += 1
            channels = weights[0].shape[0] if weights else 0
            channels_last = False
        elif kind == "Transpose":
            channels_last = channels_last or attributes.get("perm") == [0, 2, 3, 1]
        elif kind in ("Gemm", "MatMul") and weights:
            weight = weights[0]
            if kind == "MatMul" or attributes.get("transB") != [1]:
                weight = weight.t()  # (in, out) -> (out, in)
            if channels_last and dense == 0 and channels:
                # The graph flattens H, W, C, as TensorFlow does; torch flattens C, H, W.
                grid = math.isqrt(weight.shape[1] // channels)
                hwc = weight.reshape(-1, grid, grid, channels)
                weight = hwc.permute(0, 3, 1, 2).reshape(weight.shape)
            tensors[f"dense{dense}.weight"] = weight
            if kind == "Gemm" and len(weights) > 1:
                tensors[f"dense{dense}.bias"] = weights[1]
            previous = outputs[0] if kind == "MatMul" and outputs else None
            dense += 1
        elif kind == "Add" and weights:
            tensors[f"dense{dense - 1}.bias"] = weights[0]
            previous = None
    return tensors, metadata


def _fields(buffer: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message: number and value; ValueError where it breaks its frame."""
    position, end = 0, len(buffer)

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while position < end and shift < 70:
            byte = buffer[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number in it has no end")

    while position < end:
        tag = varint()
        wire = tag & 7
        if wire == 0:
            yield tag >> 3, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"a field in it has the unknown wire type {wire}")
        length = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if length > end - position:
            raise ValueError("a field in it is longer than the rest of the file: truncated")
        yield tag >> 3, buffer[position : position + length]
        position += length


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a message in it is a number")
    return value


def _text(value: int | memoryview | bytes) -> str:
    return bytes(value if isinstance(value, bytes) else _bytes(value)).decode()


def _integers(buffer: memoryview, field: int) -> list[int]:
    """A repeated int64, which stands in a message one by one or packed."""
    numbers: list[int] = []
    for number, value in _fields(buffer):
        if number != field:
            continue
        if isinstance(value, int):
            numbers.append(value)
        else:
            position = 0
            while position < len(value):
                stop = position
                while stop < len(value) and value[stop] > 127:
                    stop += 1
                byte = bytes(value[position : stop + 1])
                numbers.append(sum((b & 127) << (7 * i) for i, b in enumerate(byte[:10])))
                position = stop + 1
    return numbers


def _onnx_node(
    buffer: memoryview,
) -> tuple[str, list[str], list[str], dict[str, list[int]]]:
    """A NodeProto's op_type, inputs, outputs, and those of its attributes that are integers."""
    kind, inputs, outputs, attributes = "", [], [], {}
    for field, value in _fields(buffer):
        if field == 1:
            inputs.append(_text(value))
        elif field == 2:
            outputs.append(_text(value))
        elif field == 4:
            kind = _text(value)
        elif field == 5:
            attribute = _bytes(value)
            name = _text(dict(_fields(attribute)).get(1, b""))
            attributes[name] = _integers(attribute, 3) or _integers(attribute, 8)
    return kind, inputs, outputs, attributes


def _onnx_tensor(buffer: memoryview) -> torch.Tensor:
    """A TensorProto of floating point as a tensor on the file's own memory."""
    fields = dict(_fields(buffer))
    if fields.get(14, 0) != 0 or 13 in fields:
        raise ValueError("its values stand in another file")
    shape = _integers(buffer, 1)
    dtype = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}.get(
        cast(int, fields.get(2, 0))
    )
    name = _text(fields.get(8, b""))
    if dtype is None:
        raise ValueError(f"initializer {name} is not floating point")
    raw = _bytes(fields.get(9, fields.get(4, memoryview(b""))))  # raw_data, or packed float_data
    if 9 not in fields and dtype != torch.float32:
        raise ValueError(f"initializer {name} has no raw data")
    if len(shape) > 8 or math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"initializer {name} has shape {shape} but {len(raw)} bytes")
    if not len(raw):
        return torch.empty(shape, dtype=dtype)
    # A copy: the file is mapped for reading alone, and a weight must be one that can be trained.
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)
