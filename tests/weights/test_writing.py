"""What is written is there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_files import first_block, full_disk, small_state

from vggtorch import files
from vggtorch.weights import sources


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_full_disk_leaves_the_old_file_whole(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    sources.write(path, small_state())
    old = path.read_bytes()
    with (
        full_disk(),
        pytest.raises(OSError, match=rf"Could not write .*a\.{ending}: .*before is unchanged"),
    ):
        sources.write(path, first_block())
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == [path.name]  # nothing is left lying about


@pytest.fixture
def read_only_folder() -> Iterator[Path]:
    """A folder with a checkpoint in it that this process, root or not, can't write to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources.write(folder / "a.safetensors", small_state())
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        yield folder
        os.seteuid(user)
        folder.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs POSIX's permissions")
def test_read_only_folder(read_only_folder: Path) -> None:
    path = read_only_folder / "a.safetensors"
    old = path.read_bytes()
    with pytest.raises(OSError, match=r"Could not write .*Permission denied.*before is unchanged"):
        sources.write(path, first_block())
    assert path.read_bytes() == old


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("torch's")])
def test_what_cannot_be_written_is_named_and_the_old_file_stays(
    tmp_path: Path, error: Exception
) -> None:
    path = tmp_path / "a.txt"
    for old in (None, "old"):
        kept = "" if old is None else " The file that was there before is unchanged."
        message = rf"Could not write .*a\.txt: [\w' ]+\.{kept}$"
        with pytest.raises(OSError, match=message), files.atomic(path) as temporary:
            temporary.write_text("half")
            raise error
        assert os.listdir(tmp_path) == ([] if old is None else ["a.txt"])
        assert old is None or path.read_text() == old
        path.write_text("old")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "target"
    target.write_text("old")
    link.symlink_to(target)
    with files.atomic(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink() and target.read_text() == "new"
