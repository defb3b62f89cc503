from __future__ import annotations

import errno
import os
import resource
from typing import Any

import pytest
import torch

from vggtorch.training import checkpoints

CONTENT: dict[str, Any] = {
    "weights": [torch.arange(6.0).reshape(2, 3), torch.tensor(3)],
    "progress": {"epoch": 2},
}


def test_round_trip(tmp_path):
    checkpoints.write(tmp_path / "last.pt", CONTENT, also=tmp_path / "best.pt")
    for name in ("last.pt", "best.pt"):
        found = checkpoints.read(tmp_path / name)
        assert found["progress"] == {"epoch": 2}
        assert all(map(torch.equal, found["weights"], CONTENT["weights"]))
        assert set(found["versions"]) == {"vggtorch", "keras", "torch"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "last.pt"]


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    (tmp_path / ".123-4.last.pt").write_text("half")
    checkpoints.write(tmp_path / "last.pt", CONTENT)
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_writing_last_again_leaves_best(tmp_path):
    checkpoints.write(tmp_path / "last.pt", CONTENT, also=tmp_path / "best.pt")
    checkpoints.write(tmp_path / "last.pt", CONTENT | {"progress": {"epoch": 3}})
    assert checkpoints.read(tmp_path / "best.pt")["progress"] == {"epoch": 2}
    assert checkpoints.read(tmp_path / "last.pt")["progress"] == {"epoch": 3}


@pytest.mark.slow
def test_a_drive_without_second_names_has_the_best_one_as_a_copy(tmp_path, monkeypatch):
    """As FAT and some network drives are."""

    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    last, best = tmp_path / "last.pt", tmp_path / "best.pt"
    checkpoints.write(last, CONTENT, also=best)
    assert last.read_bytes() == best.read_bytes() and not last.samefile(best)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "last.pt"]


@pytest.mark.slow
def test_any_flipped_byte_is_noticed_or_harmless(tmp_path):
    path = tmp_path / "last.pt"
    checkpoints.write(path, CONTENT)
    whole = path.read_bytes()
    noticed = 0
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        try:
            found = checkpoints.read(path)
        except ValueError as error:
            assert "last.pt" in str(error)
            noticed += 1
        else:  # padding of the zip file
            assert all(map(torch.equal, found["weights"], CONTENT["weights"]))
    assert noticed > 50


def test_truncated_or_foreign_file(tmp_path):
    path = tmp_path / "last.pt"
    checkpoints.write(path, CONTENT)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="isn't a checkpoint of vggtorch, or is damaged"):
        checkpoints.read(path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="isn't a checkpoint of vggtorch, or is damaged"):
        checkpoints.read(path)


def test_another_format(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "FORMAT", 99)
    checkpoints.write(tmp_path / "last.pt", CONTENT)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format 99, and this vggtorch reads 2"):
        checkpoints.read(tmp_path / "last.pt")


@pytest.mark.parametrize("call", ["fsync", "link", "replace"])
def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, call):
    last, best = tmp_path / "last.pt", tmp_path / "best.pt"
    checkpoints.write(last, CONTENT, also=best)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match=r"Could not write .*: No space left on device\. The file"):
        checkpoints.write(last, CONTENT | {"progress": {"epoch": 3}}, also=best)
    monkeypatch.undo()
    assert checkpoints.read(last)["progress"] == checkpoints.read(best)["progress"] == {"epoch": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "last.pt"]


def test_what_a_disk_refuses_is_said_in_its_words(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        with pytest.raises(OSError, match=r"Could not write .*last\.pt: File too large\."):
            checkpoints.write(tmp_path / "last.pt", CONTENT | {"tensor": torch.zeros(2**16)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
