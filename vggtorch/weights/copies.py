"""Converted copies: Keras's tensors of a checkpoint, mapped from the second load on.

A copy stands in `converted/` of the cache, as safetensors, with every kernel stored output channels
first, (O, H, W, I) and (out, in), behind its Keras shape: that is the order in which convolution
and matrix product read, without a further copy. Models share the memory of their copy. That is
safe because only this file writes copies, and it replaces one only by renaming a new one; a user's
own file, which may be written to at any time, is never what a model stands on.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock

from vggtorch import files
from vggtorch.telling import tell
from vggtorch.weights import conversion, safetensors, sources
from vggtorch.weights.published import PUBLISHED
from vggtorch.weights.sources import Checkpoint

# Another layout makes all copies anew.
_LAYOUT = "keras, output channels first, fc1 unflattened, others under their names, data_config"
_UNTOUCHED = 315532800  # 1980-01-01 in seconds, exact on every file system


def converted(source: str | os.PathLike | Mapping[str, Any]) -> Checkpoint:
    """A checkpoint's Keras tensors, mapped from a copy that is made at the first load.

    Without room for a copy the tensors are in memory, and every load converts anew. Tensors of
    layers that aren't VGG's keep the names and axes that they have in torch.

    Args:
        source: any file that `sources.read` reads, or a state_dict in memory, of which there is no
            copy.

    Raises:
        ValueError: the file is no checkpoint, damaged, or fits no VGG network.
        OSError: the file can't be read.
    """
    if isinstance(source, Mapping):
        return _in_keras_form(sources.from_memory(source))
    path = Path(source).resolve()
    copy = _place(path)
    if found := _read_copy(copy):
        return found
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(copy.parent / ".lock"):
            # Nobody else writes here now: these are of processes that were killed.
            for left in copy.parent.glob(".*.safetensors"):
                left.unlink()
            found = _read_copy(copy)  # another process may have been faster
            return found or _make_copy(path, copy)
    except OSError as error:
        tell(f"Loading stays slow: {error}")
    found = _in_keras_form(sources.read(path, whole_numbers=True))
    # Some are mapped from the user's file, which may change; those of the model must not.
    return replace(found, tensors={key: tensor.clone() for key, tensor in found.tensors.items()})


def _in_keras_form(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint with Keras's tensors; its origin stays."""
    tensors = conversion.to_keras(checkpoint.tensors, checkpoint.form)
    return replace(checkpoint, form="keras", tensors=tensors)


def _place(source: Path) -> Path:
    """Where the converted copy of a file stands, as long as nobody writes to the file.

    The name has what the file system says of the source, which costs no reading. That doesn't
    change when a file is written to twice within a tick of the file system's clock (10 ms or less)
    and converted between the two, nor when a disk fails; `vggtorch weights verify` hashes.
    """
    s = source.stat()
    said = (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev)
    key = hashlib.sha256(repr((str(source), said, _LAYOUT)).encode()).hexdigest()[:16]
    return files.home() / "converted" / f"{source.stem}-{key}.safetensors"


def _read_copy(copy: Path) -> Checkpoint | None:
    """A converted copy, mapped; None if there is none, or not as it was written."""
    with suppress(OSError, ValueError, KeyError):
        if copy.stat().st_mtime != _UNTOUCHED:
            return None
        tensors, metadata = safetensors.mapped(copy)
        for key, tensor in tensors.items():
            if key.endswith("/kernel"):
                tensors[key] = tensor.movedim(0, -1)  # (O, ..., I) -> (..., I, O) view
        origin: Any = metadata["form"]
        if origin != "keras":  # there fc1 may be a convolution of the user's
            tensors = conversion.flattened(tensors)
        return Checkpoint(tensors, "keras", copy, origin, **sources.said_of(metadata))
    return None


def _make_copy(source: Path, copy: Path) -> Checkpoint:
    """Convert a checkpoint, write and map the copy, and delete the copies that it replaces.

    Raises:
        ValueError: as `converted` does.
        OSError: the source was written to while it was read, or there is no room for the copy.
    """
    checkpoint = sources.read(source, whole_numbers=True)
    tensors = conversion.to_views(checkpoint.tensors, checkpoint.form)
    stored = {
        # (..., I, O) -> (O, ..., I) view
        key: tensor.movedim(-1, 0) if key.endswith("/kernel") else tensor
        for key, tensor in tensors.items()
    }
    metadata = {"source": str(source), "form": checkpoint.form, **checkpoint.said}
    with files.atomic(copy) as temporary:
        safetensors.write(temporary, stored, metadata)
        if _place(source) != copy:
            raise OSError(f"{source} was written to meanwhile")
        # Who writes to the copy later leaves another time on it, and `_read_copy` sees that.
        os.utime(temporary, (_UNTOUCHED, _UNTOUCHED))
    _delete_older(copy, source)
    made = _read_copy(copy)
    if made is None:
        raise OSError(f"{copy} can't be read back")
    return made


def _delete_older(newest: Path, source: Path) -> None:
    """Delete the copies of what `source` held before, and of sources that are no more."""
    for copy in newest.parent.glob("*.safetensors"):
        with suppress(OSError, ValueError, KeyError):
            origin = Path(safetensors.mapped(copy)[1]["source"])
            if copy != newest and (origin == source or not origin.exists()):
                copy.unlink()


def verify() -> dict[Path, str | None]:
    """Read all that is here afresh, published checkpoints and converted copies.

    Returns:
        The path of each -> what is wrong with it, or None. A damaged copy is deleted, and made
        again at the next load.
    """
    found: dict[Path, str | None] = {}
    for published in PUBLISHED.values():
        for path in sources.local_copies(published):
            try:
                files.check_sha256(path, published.sha256)
                found[path] = None
            except ValueError as error:
                found[path] = str(error)
    for copy in sorted((files.home() / "converted").glob("[!.]*.safetensors")):
        try:
            safetensors.read(copy)
            found[copy] = None
        except ValueError as error:
            copy.unlink()
            found[copy] = f"{copy} is damaged: {error}. It is deleted, and made at the next load."
    return found
