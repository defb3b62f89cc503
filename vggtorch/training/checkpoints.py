"""Checkpoint files: written whole or not at all, read only if every byte is as it was written."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import keras
import torch

import vggtorch
from vggtorch import files, weights

FORMAT = 2  # 1 knew less of what makes a run
# By which a drive says that its files have one name each, as memory cards and some networks do.
_NO_LINKS = {errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}


def write(path: Path, content: dict[str, Any], also: Path | None = None) -> None:
    """Write tensors and plain values to a file; `also` becomes a second name of it, first.

    In this order a kill in between leaves `also` ahead of `path`, and the resumed run, which
    repeats that epoch, writes the same again.

    Raises:
        OSError: it couldn't be written; the file that was there is whole.
    """
    content = {"format": FORMAT, "versions": versions(), **content}
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(".*.pt"):  # by a run that was killed while it wrote
        left.unlink()
    with files.atomic(path) as temporary:
        with temporary.open("wb") as file:
            try:
                torch.save(content | {"sha256": digest(content)}, file)
            except RuntimeError as error:  # torch's writer has another word for a full disk
                cause = error.__context__
                raise (cause if isinstance(cause, OSError) else error) from None
        if also is not None:
            with files.atomic(also) as second:
                try:
                    os.link(temporary, second)
                except OSError as error:
                    if error.errno not in _NO_LINKS:
                        raise
                    shutil.copyfile(temporary, second)


def versions() -> dict[str, str]:
    """The versions that decide on results."""
    own, keras_version, torch_version = vggtorch.__version__, keras.__version__, torch.__version__
    return {"vggtorch": own, "keras": keras_version, "torch": str(torch_version)}


def version_text() -> str:
    """The versions as people read them."""
    return ", ".join(f"{name} {version}" for name, version in versions().items())


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote, on the CPU.

    Raises:
        ValueError: no checkpoint, a damaged one, or one of another format.
    """
    try:
        content = weights.unpickled(path)
        expected = content.pop("sha256")
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise ValueError(
            f"{path} isn't a checkpoint of vggtorch, or is damaged ({files.first_line(error)}). "
            f"Take another one, or begin anew in another folder."
        ) from error
    if digest(content) != expected:
        raise ValueError(
            f"{path} is damaged: its content isn't what its hash says. Take another checkpoint, or "
            f"begin anew in another folder."
        )
    if content["format"] != FORMAT:
        raise ValueError(
            f"{path} has format {content['format']}, and this vggtorch reads {FORMAT}. Read it "
            f"with the vggtorch that wrote it ({content['versions']})."
        )
    return content


def digest(value: Any) -> str:
    """SHA-256 over nested dicts, lists, plain values and tensors."""
    sha = hashlib.sha256()

    def update(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                sha.update(f"{key!r}:".encode())
                update(item)
        elif isinstance(value, list | tuple):
            for item in value:
                update(item)
        elif isinstance(value, torch.Tensor):
            array = value.detach().cpu().contiguous()
            sha.update(f"{array.dtype} {tuple(array.shape)}".encode())
            sha.update(array.reshape(-1).view(torch.uint8).numpy().data)
        else:
            sha.update(f"{value!r};".encode())

    update(value)
    return sha.hexdigest()
