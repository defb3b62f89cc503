"""Damaged and hostile files load right or not at all."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from checkpoint_files import (
    onnx_state,
    write_legacy_weights,
    write_onnx,
)

from vggtorch.weights import readers, sources


def safetensors_file(path: Path, header: bytes, values: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + values)
    return path


_ENTRY = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
         '"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "invalid offset"),
        ('{"a":' + "[" * 100_000, "damaged"),
        ('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', "invalid shape"),
        ('{"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}', "dtype torch.int32"),
        ('{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}', "dtype torch.int64"),
        ('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[8,0]}}', "invalid value: integer `-2`"),
        ('{"a":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}', "expected usize"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "not fully covered"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
         '"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "invalid offset"),
        ('{"__metadata__":{"weight_set":7},' + _ENTRY + "}", "expected a string"),
        ('{"__metadata__":{"checksum":"0"},' + _ENTRY + "}", "does not match the checksum in it"),
        ('{"__metadata__":{"writer":"vggtorch"},' + _ENTRY + "}", "does not match the checksum"),
        ('{"a":7}', "damaged"),
        ("{}", "not fully covered"),
    ],
)  # fmt: skip
def test_hostile_safetensors_headers(tmp_path: Path, header: str, message: str) -> None:
    path = safetensors_file(tmp_path / "a", header.encode(), bytes(8))
    with pytest.raises(ValueError, match=message) as caught:
        sources.read(path)
    assert str(path) in str(caught.value)


def test_header_that_claims_more_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="header too large"):
        sources.read(tmp_path / "a")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(1).expand(10**12), "a tensor in it claims more values than are stored"),
        (torch.zeros(2, dtype=torch.int32), "a has dtype torch.int32"),
        (torch.zeros(2, dtype=torch.complex64), "a has dtype torch.complex64"),
        (torch.eye(2).to_sparse(), "asks for 'torch._utils._rebuild_sparse_tensor'"),
        (torch.tensor([1.0, torch.inf]), "a holds NaN or infinite values"),
        ("text", "'a' is a str, expected a tensor"),
        ({"b": torch.zeros(2)}, "'a' is a dict, expected a tensor"),
    ],
)
def test_state_dicts_that_are_none(tmp_path: Path, value: object, message: str) -> None:
    torch.save({"a": value}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        sources.read(tmp_path / "a.pth")


def test_names_with_and_without_a_prefix(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1), "module.a": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a name stands in it with and without 'module\.'"):
        sources.read(tmp_path / "a.pth")


def test_archives_that_hide_something(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**7))
    with pytest.raises(ValueError, match="its members are compressed"):
        sources.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/data.pkl", b"2")
    with pytest.raises(ValueError, match="a member of the archive is there twice"):
        sources.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(ValueError, match="can't be loaded: .* neither PyTorch's nor Keras's"):
        sources.read(path)


@pytest.mark.slow
def test_whole_archives_of_others_are_named_and_not_called_damaged(tmp_path: Path) -> None:
    network = torch.nn.Linear(2, 2)
    written = {
        "a.pt": (lambda p: torch.jit.save(torch.jit.script(network), p), "a TorchScript program"),
        "a.pt2": (
            lambda p: torch.export.save(torch.export.export(network, (torch.ones(1, 2),)), p),
            "a program of torch.export",
        ),
        "a.npz": (lambda p: np.savez(p, weight=np.ones(2)), "it holds NumPy's arrays"),
        "b.npz": (lambda p: np.savez_compressed(p, weight=np.ones(2)), "it holds NumPy's arrays"),
    }
    for name, (write, message) in written.items():
        write(str(tmp_path / name))
        with pytest.raises(ValueError, match=f"{name} can't be loaded: .*{message}"):
            sources.read(tmp_path / name)
    program = torch.export.load(tmp_path / "a.pt2")
    for state in (torch.jit.load(tmp_path / "a.pt").state_dict(), program.state_dict):
        assert set(state) == {"weight", "bias"}  # as the messages say


@pytest.mark.slow
def test_hdf5_that_reaches_out_of_itself(tmp_path: Path) -> None:
    other = tmp_path / "other.h5"
    write_legacy_weights(other, {"c/kernel": torch.zeros(2, 2)})
    path = tmp_path / "a.h5"

    def write(change: Callable[[h5py.Group], None], message: str) -> None:
        with h5py.File(path, "w") as file:
            file.attrs["layer_names"] = ["c"]
            file.create_group("c").attrs["weight_names"] = ["k"]
            change(file["c"])
        with pytest.raises(ValueError, match=message) as caught:
            sources.read(path)
        assert str(path) in str(caught.value)

    def link(group: h5py.Group) -> None:
        group["k"] = h5py.ExternalLink(str(other), "/c/c/c_kernel_1:0")

    def external(group: h5py.Group) -> None:
        group.create_dataset("k", (4,), "f4", external=[(str(other), 0, 16)])

    def huge(group: h5py.Group) -> None:
        group.create_dataset("k", (10**6, 10**6), "f4", chunks=(10, 10))

    def integers(group: h5py.Group) -> None:
        group["k"] = np.zeros(3, np.int32)

    write(link, "k is a link")
    write(external, "k keeps its values outside of the file")
    write(huge, "k is chunked, compressed or empty")
    write(integers, "c/k has dtype torch.int32, expected floating point")


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["while True: pass", "import os; os.abort()"])
def test_hdf5_library_that_hangs_or_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    path = tmp_path / "a.h5"
    write_legacy_weights(path, {"c/kernel": torch.zeros(2, 2)})
    (tmp_path / "hdf5.py").write_text(trouble)
    monkeypatch.setattr(readers, "__file__", str(tmp_path / "readers.py"))
    monkeypatch.setattr(readers, "H5_TIMEOUT", 1.0)
    with pytest.raises(ValueError, match=r"a\.h5 .*(not understood in 1\.0 s|crashes on it)"):
        sources.read(path)


def test_onnx_with_values_in_another_file(tmp_path: Path) -> None:
    import onnx

    write_onnx(tmp_path / "a", onnx_state(), channels_last=False)
    onnx.save(
        onnx.load(tmp_path / "a"), tmp_path / "b", save_as_external_data=True, size_threshold=0
    )
    with pytest.raises(ValueError, match="can't be loaded: its values stand in another file"):
        sources.read(tmp_path / "b")
