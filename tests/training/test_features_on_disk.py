"""Features on disk are as they were written, or made anew; a full disk is said."""

from __future__ import annotations

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from filelock import FileLock
from test_features import cached, count_runs, frozen

from vggtorch.training import data, loaders


@pytest.fixture
def folder(tmp_path):
    return data.read_folder(tiny.pictures(tmp_path / "data"), 16, augment="flip")


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix != ".lock")


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["value", "header", "digest", "cut", "longer", "empty"])
def test_damaged_features_are_made_anew(folder, tmp_path, monkeypatch, damage):
    expected = np.array(cached(frozen(), folder, tmp_path / "f", copies=2).values)
    (path,) = files_of(tmp_path / "f")
    content = bytearray(path.read_bytes())
    if damage in ("value", "header", "digest"):
        content[{"value": 2000, "header": 20, "digest": -1}[damage]] ^= 1
    else:
        content = {"cut": content[:-7], "longer": content + b"?", "empty": content[:0]}[damage]
    path.write_bytes(content)
    runs = count_runs(monkeypatch)
    with pytest.warns(UserWarning, match=r"\.npy isn't as it was written, and is made anew"):
        again = cached(frozen(), folder, tmp_path / "f", copies=2)
    np.testing.assert_array_equal(again.values, expected)
    cached(frozen(), folder, tmp_path / "f", copies=2)
    assert len(runs) == 1
    assert files_of(tmp_path / "f") == [path]


def test_the_file_is_numpys(folder, tmp_path):
    found = cached(frozen(), folder, tmp_path / "f")
    (path,) = files_of(tmp_path / "f")
    np.testing.assert_array_equal(np.load(path), found.values)


def test_a_disk_that_fills_while_features_are_written(folder, tmp_path, monkeypatch):
    """A limit of the file's size stands for the disk; a memory map would end in SIGBUS there."""
    resource = pytest.importorskip("resource", reason="needs limits on a process, as on POSIX")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"Could not write .*f/\w+\.npy: File too large"
        ) as caught:
            cached(frozen(), folder, tmp_path / "f")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert files_of(tmp_path / "f") == []
    cached(frozen(), folder, tmp_path / "f")


@pytest.mark.parametrize("error", [RuntimeError("mine"), FileNotFoundError(2, "gone", "a.png")])
def test_what_the_images_raise_is_not_taken_for_a_full_disk(tmp_path, error):
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 40

        def __getitem__(self, index):
            if index == 39 and made:
                raise error
            return torch.zeros(16, 16, 3), 0

    made: list[int] = []
    source = loaders.as_source(Broken(), 0, 4)[0]
    source.plain  # noqa: B018 - which reads all of them
    made.append(1)
    with pytest.raises(type(error)) as caught:
        cached(frozen(), source, tmp_path / "f")
    assert caught.value is error
    assert files_of(tmp_path / "f") == []


def test_what_killed_runs_left_does_not_count_as_used(folder, tmp_path, monkeypatch):
    (tmp_path / "f").mkdir()
    left = tmp_path / "f" / ".123-4.0123456789abcdef0123456789abcdef.npy"
    written = tmp_path / "f" / ".123-4.ffff456789abcdef0123456789abcdef.npy"
    for path in (left, written):
        path.write_bytes(bytes(10**6))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage(10**6, 0, 10 if left.exists() else 10**6)
    )
    with FileLock(written.with_name(f"{written.name.split('.', 2)[2]}.lock")):
        cached(frozen(), folder, tmp_path / "f")
    assert not left.exists()
    assert written.exists()
    assert os.path.getsize(written) == 10**6
