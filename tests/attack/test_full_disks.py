"""A disk that fills in the middle of anything written is an error that names the file.

A limit on the size of files stands for the disk. It is set to 0, and then to larger and larger
parts of what is written, so that every call that makes a file grow fails once.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import keras
import pytest
import tiny
import torch

import vggtorch as vt
from vggtorch import files
from vggtorch.models import remember_
from vggtorch.training import (
    TrainConfig,
    checkpoints,
    finetune,
    plot_rates,
    rate_search,
    save_trained,
    write_report,
)
from vggtorch.weights import copies, sources

resource = pytest.importorskip("resource", reason="needs limits on a process, as on POSIX")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("onnx_operators")]


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Inside, no file can grow beyond so many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(epochs=1, batch_size=6, image_size=16, output_dir=str(folder / "run"))
    data = tiny.pictures(folder / "data", each=4)
    return finetune(remember_(tiny.network(), "oxford"), data, config=config)


def block() -> keras.Model:
    model = vt.truncate(vt.VGG11(weights=None, include_top=False), "block2_pool")
    return remember_(model, "imagenet")


# What is written -> how, given the trained history and a folder that has `block.pth`.
WRITERS: dict[str, Callable] = {
    "model.keras": lambda history, folder: save_trained(history, folder),
    "classes.json": lambda history, folder: save_trained(history, folder),
    "config.json": lambda history, folder: save_trained(history, folder),
    "README.md": lambda history, folder: save_trained(history, folder),
    "report.html": lambda history, folder: write_report(history, folder / "report.html"),
    "rates.svg": lambda _, folder: plot_rates(
        rate_search.RateSearch((1e-4, 1e-3, 1e-2), (1.0, 0.5, 0.9)),
        folder / "rates.svg",
    ),
    "last.pt": lambda history, folder: checkpoints.write(
        folder / "last.pt", {"variables": [v.value for v in history.model.variables]}
    ),
    **{
        name: lambda _, folder, name=name: vt.save_weights(block(), folder / name)
        for name in ("w.safetensors", "w.pth", "w.bin", "w.weights.h5")
    },
    **{
        name: lambda _, folder, name=name: vt.export(tiny.network(), folder / name)
        for name in ("m.pt2", "m.onnx")
    },
}  # fmt: skip


@contextmanager
def room_for_one(path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, that file can't grow beyond so many bytes; others can."""
    atomic = files.atomic

    @contextmanager
    def limited(target, **options):
        room = room_for(size if Path(target) == path else 1 << 40)
        with atomic(target, **options) as temporary, room:
            yield temporary

    with monkeypatch.context() as patch:
        patch.setattr(files, "atomic", limited)
        yield


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.filterwarnings("ignore")
def test_nothing_older_is_lost(history, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write, path = WRITERS[name], tmp_path / name
    write(history, tmp_path)
    size = path.stat().st_size
    path.write_bytes(b"older")
    others = {p.name for p in tmp_path.iterdir()}
    for part in (0.3,) if name == "m.onnx" else (0.0, 0.3, 0.9):  # which takes seconds
        room = room_for_one(path, int(part * size), monkeypatch)
        with room, pytest.raises(OSError, match="Could not write") as caught:
            write(history, tmp_path)
        assert str(path) in str(caught.value)
        assert "The file that was there before is unchanged" in str(caught.value)
        assert path.read_bytes() == b"older"
        assert {p.name for p in tmp_path.iterdir()} == others
    write(history, tmp_path)
    assert path.stat().st_size == pytest.approx(size, rel=0.1)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_every_call_of_the_writer_itself_may_fail(tmp_path, monkeypatch, call, number):
    path = tmp_path / "a"
    path.write_text("older")

    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fails)
    expected = pytest.raises(OSError, match=r"Could not write .*a: .*unchanged")
    with expected as caught, files.atomic(path) as temporary:
        temporary.write_text("newer")
    assert caught.value.errno == number
    assert path.read_text() == "older"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.filterwarnings("ignore:Loading stays slow")
def test_a_converted_copy_that_does_not_fit_leaves_nothing_and_is_not_needed(tmp_path):
    path = tmp_path / "a.pth"
    vt.save_weights(block(), path)
    expected = sources.read(path).tensors
    for size in (0, 1000, 100_000):
        with room_for(size):
            found = copies.converted(path)
        assert torch.equal(found.tensors["block1_conv1/bias"], expected["features.0.bias"])
        left = {p.name for p in (tmp_path / "home" / "converted").glob("*")} - {".lock"}
        assert left == set()
