"""What a hostile file of n bytes costs, in every form but pickles (those: test_pickles.py)."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

N = 200_000  # bytes of most files, about
BOUND = 64 * 2**20  # bytes of memory more, for each of these files
SECONDS = 10.0  # of processor time

# Reads each file, and prints how much memory more and which time the worst took.
_BOUNDED = """
import resource, sys, time
import vggtorch
from vggtorch.weights import sources

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

for place, path in enumerate(sys.argv[1:]):
    before, began = peak(), time.process_time()
    try:
        sources.read(path)
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
    done = subprocess.run(
        [sys.executable, "-c", _BOUNDED, *map(str, paths)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines()]
    assert len(rows) == len(paths) - 1
    for memory, seconds, refused, path in rows[1:]:
        assert int(memory) < BOUND, path
        assert float(seconds) < SECONDS, path
        names = {"many", "huge and empty", "a long name"}
        assert (refused == "True") or any(Path(path).name.startswith(name) for name in names), path
