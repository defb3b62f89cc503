"""Files that are written whole or not at all, and the check of a file's hash."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vggtorch.text import visible


def home() -> Path:
    """The folder of downloaded and converted checkpoints: $VGGTORCH_HOME or a user cache folder."""
    if chosen := os.environ.get("VGGTORCH_HOME"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vggtorch"


@contextmanager
def atomic(
    path: str | os.PathLike, *, body: tuple[type[Exception], ...] = (OSError, RuntimeError)
) -> Iterator[Path]:
    """A path beside `path` to write to; what was written there takes the name `path` at the end.

    Until then, and whenever anything fails, the file that stood at `path` before is whole, and
    what was written so far is removed. The name changes only when all bytes are on the disk. The
    path given is hidden and has `path`'s ending.

    Args:
        path: the file.
        body: what the writing raises where it fails; writers that aren't Python's raise
            RuntimeError, too. All else passes as it is.

    Raises:
        OSError: the file can't be written; names `path`, and says whether an older one is there.
    """
    path = Path(os.path.realpath(path))  # write through a link, not over it
    temporary = path.with_name(f".{os.getpid()}-{time.monotonic_ns():x}.{path.name}")
    try:
        with naming(path, *body):
            yield temporary
        with naming(path, OSError):
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all; raises as `atomic` does."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def naming(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    """Inside, errors of writing become an OSError that names the file and what is left of it."""
    try:
        yield
    except kinds as error:
        kept = " The file that was there before is unchanged." if path.exists() else ""
        reason = getattr(error, "strerror", None) or first_line(error)
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"Could not write {path}: {reason}.{kept}") from error


def _sync_folder(folder: Path) -> None:
    """See that a new name in a folder survives a power cut, where the system can be told so."""
    with suppress(OSError, AttributeError):  # Windows has no such flag, some folders can't
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class where it has none."""
    return visible((str(error).strip() or type(error).__name__).splitlines()[0], 1000)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str, actual: str | None = None) -> None:
    """See that a file is the one that was published.

    Args:
        path: the file.
        expected: its SHA-256, or as many of the first digits as are published.
        actual: its SHA-256, where it has been taken already.

    Raises:
        ValueError: it has another hash.
    """
    actual = actual or sha256(path)
    if not actual.startswith(expected):
        raise ValueError(
            f"{path} is damaged or another file: its SHA-256 is {actual}, expected "
            f"{expected}{'...' if len(expected) < 64 else ''}. Delete it."
        )
