"""What a hostile file of n bytes costs, in every form but pickles (those: test_pickles.py)."""

from __future__ import annotations

import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from fresh import run

N = 200_000  # bytes of most files, about
BOUND = 64 * 2**20  # bytes of memory more, for each of these files
SECONDS = 10.0  # of processor time

# Reads each file, and prints how much memory more and which time the worst took.
_BOUNDED = """
import resource, time
import vggtorch
from vggtorch.models import read_image
from vggtorch.weights import sources

gc.enable()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

for place, path in enumerate(sys.argv[1:]):
    before, began = peak(), time.process_time()
    try:
        read_image(path) if path.endswith((".png", ".gif", ".tif")) else sources.read(path)
        said = ""
    except ValueError as error:
        said = str(error)
        assert len(said) < 5000, path
    if place:  # the first is harmless, and brings what is imported when it is needed
        print(peak() - before, time.process_time() - began, bool(said), path, sep="|")
"""


def safetensors(path: Path, header: Any, values: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)


def tensor(shape: list[int], end: int = 0) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}


SAFETENSORS: dict[str, Any] = {
    "spaces": b"{}" + b" " * N,
    "many": {f"t{i}": tensor([0]) for i in range(N // 60)},
    "deep": b'{"__metadata__":' + b'{"a":' * (N // 6) + b"1" + b"}" * (N // 6) + b"}",
    "huge and empty": {f"t{i}": tensor([2**60, 0]) for i in range(N // 80)},
    "huge": {"t": tensor([2**31, 2**30], 4)},
    "a long name": {"x" * N: tensor([1], 4)},
}


def chunked(file: h5py.File) -> None:
    file.create_dataset("layers/a/vars/0", shape=(2**33,), dtype="f4", chunks=(2**20,))


def never_written(file: h5py.File) -> None:
    file.create_dataset("layers/a/vars/0", shape=(2**33,), dtype="f4")


def compressed(file: h5py.File) -> None:
    zeros = np.zeros(2**24, "f4")
    file.create_dataset("layers/a/vars/0", data=zeros, compression="gzip", compression_opts=9)


def many(file: h5py.File) -> None:
    for i in range(300):
        file.create_dataset(f"layers/l{i}/vars/0", data=np.zeros(1, "f4"))


def deep(file: h5py.File) -> None:
    group: Any = file
    for _ in range(500):
        group = group.create_group("g")


def endless(file: h5py.File) -> None:
    group = file.create_group("layers")
    group["again"] = group
    group["link"] = h5py.SoftLink("/layers")


def long_names(file: h5py.File) -> None:
    file.attrs["layer_names"] = [b"a" * 60_000]


HDF5 = (chunked, never_written, compressed, many, deep, endless, long_names)


def onnx_model(nodes: int, of: str = "Conv", dims: list[int] | None = None) -> bytes:
    """Many nodes that all read the same two initializers."""
    from onnx import TensorProto, helper

    kernel = helper.make_tensor("k", TensorProto.FLOAT, [256, 64], bytes(4 * 256 * 64), raw=True)
    if dims:
        del kernel.dims[:]
        kernel.dims.extend(dims)
    padding: Any = {"pads": [1, 1, 1, 1]} if of == "Conv" else {}
    made = [helper.make_node(of, [f"x{i}", "k"], [f"x{i + 1}"], **padding) for i in range(nodes)]
    graph = helper.make_graph(made, "g", [], [], [kernel])
    return bytes(helper.make_model(graph).SerializeToString())


def chunk(kind: bytes, content: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png(width: int, height: int, *chunks: bytes, rows: int | None = None) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    values = bytes((height if rows is None else rows) * (1 + (width + 7) // 8))
    data = chunk(b"IDAT", zlib.compress(values))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + data + chunk(b"IEND", b"")


def frames(count: int) -> bytes:
    """A GIF whose frames all have one pixel."""
    start = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    return start + (b"," + bytes(4) + b"\1\0\1\0\0" + b"\x02\x02\x44\x01\x00") * count + b";"


TEXT = zlib.compress(bytes(2**26), 9)  # 64 kB that become 64 MB
OTHERS: dict[str, bytes] = {
    "many nodes.onnx": onnx_model(4000),
    "many products.onnx": onnx_model(4000, "MatMul"),
    "huge.onnx": onnx_model(1, dims=[2**31, 2**31]),
    "nested.onnx": b"\x3a\x7f" * 50_000,
    "text.png": png(8, 8, chunk(b"zTXt", b"a\0\0" + TEXT)),
    "profile.png": png(8, 8, chunk(b"iCCP", b"a\0\0" + TEXT)),
    "large.png": png(60_000, 60_000, rows=1),
    "frames.gif": frames(N // 16),
    "tags.tif": b"II*\0\x08\0\0\0\xff\xff" + b"\0\1\4\0\xff\xff\xff\x7f\0\0\0\0" * (N // 12),
    "loop.tif": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Python has no resource module there")
def test_memory_and_time_are_in_proportion_to_the_file(tmp_path: Path) -> None:
    paths = [tmp_path / "harmless.safetensors", tmp_path / "harmless.weights.h5"]
    safetensors(paths[0], {"t": tensor([1], 4)}, bytes(4))
    with h5py.File(paths[1], "w") as file:
        file["layers/a/vars/0"] = np.zeros(3, "f4")
    for name, header in SAFETENSORS.items():
        paths.append(tmp_path / f"{name}.safetensors")
        safetensors(paths[-1], header, bytes(4))
    for write in HDF5:
        for suffix in (".weights.h5", ".h5"):
            paths.append(tmp_path / f"{write.__name__}{suffix}")
            with h5py.File(paths[-1], "w") as file:
                write(file)
    for name, content in OTHERS.items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(content)
    done = run(_BOUNDED, arguments=paths)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert len(rows) == len(paths) - 1
    for memory, seconds, refused, path in rows[1:]:
        assert int(memory) < BOUND, path
        assert float(seconds) < SECONDS, path
        names = {"many", "huge and empty", "a long name", "text", "profile", "frames"}
        assert (refused == "True") or any(Path(path).name.startswith(name) for name in names), path
