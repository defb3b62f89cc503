"""A run's folder that can't be had is refused in words that say what to do."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import tiny

from vggtorch.options import as_options
from vggtorch.training.loop import finetune


def test_a_folder_that_can_t_be_made_is_said(config, tmp_path):
    (tmp_path / "file").write_text("")
    changed = dataclasses.replace(config, output_dir=str(tmp_path / "file" / "run"))
    with pytest.raises(OSError, match="run can't be made: Not a dir.* Choose another with outp"):
        finetune(tiny.network(), tiny.dataset(), config=changed)


def test_paths_and_arrays_in_a_list_are_no_data_set(config):
    pairs: list[tuple[Any, str]] = [
        (["photos"], "Received a list of paths; expected one folder, or a table of the paths"),
        (
            (np.zeros((4, 16, 16, 3)), np.zeros(4)),
            "a tuple of arrays; expected a Dataset of pairs: .*TensorDataset.images, la",
        ),
    ]
    for given, message in pairs:
        with pytest.raises(ValueError, match=message):
            finetune(tiny.network(), given, config=config)


@pytest.mark.skipif(os.name != "posix", reason="the message is the system's")
def test_a_folder_that_nothing_can_be_written_into_is_said(config, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), ".lock")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(OSError, match="Nothing can be written into .*: Read-only file") as refused:
        finetune(tiny.network(), tiny.dataset(), config=config)
    said = as_options(str(refused.value))
    assert said.endswith("Read-only file system. Choose another with --output-dir run2, say.")


@pytest.mark.slow
def test_a_run_that_another_left_while_this_one_waited_is_not_carried_on(config, monkeypatch):
    finetune(tiny.network(), tiny.dataset(), config=config)
    last = Path(config.output_dir) / "last.pt"
    content = last.read_bytes()
    last.unlink()
    acquire = filelock.FileLock.acquire

    def wait(lock: Any, *args: Any, **options: Any) -> Any:
        last.write_bytes(content)
        return acquire(lock, *args, **options)

    monkeypatch.setattr(filelock.FileLock, "acquire", wait)
    with pytest.raises(ValueError, match="last.pt exists: the folder holds another run"):
        finetune(tiny.network(), tiny.dataset(), config=config)
    assert last.read_bytes() == content
