"""Files that are written whole or not at all, and digests that are remembered.

A file's digest is remembered with its size, times and inode (`sha256`), so that hundreds of
megabytes are hashed once and not at every load: on a file that nobody has written to since, as the
file system tells, the hash can only differ if the disk itself failed, and that is what
`vggtorch weights verify` is for, which hashes everything afresh.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def home() -> Path:
    """The folder of downloaded and converted checkpoints: $VGGTORCH_HOME or a user cache folder."""
    if chosen := os.environ.get("VGGTORCH_HOME"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vggtorch"


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to; what was written there takes the name `path` at the end.

    Until then, and whenever anything fails, what stood at `path` before is whole. The path given
    has `path`'s ending. Raises OSError that names `path` where it can't be written.
    """
    path = Path(os.path.realpath(path))  # write through a link, not over it
    temporary = path.with_name(f".{os.getpid()}-{time.monotonic_ns():x}.{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # PyTorch's writer has no OSError of its own
        kept = " The file that was there before is unchanged." if path.exists() else ""
        reason = getattr(error, "strerror", None) or first_line(error)
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"Could not write {path}: {reason}.{kept}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def first_line(error: Exception) -> str:
    """The first line of its message, or what it is where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def stamp(path: Path) -> list[int]:
    """What changes when a file is written to: size, times, inode, device."""
    s = path.stat()
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev]


def sha256(path: Path, *, fresh: bool = False) -> str:
    """SHA-256 of a file, remembered for as long as nobody writes to it.

    `fresh` hashes it in any case.
    """
    return once(path, "sha256", compute_sha256, fresh=fresh)


def once(path: Path, kind: str, digest: Callable[[Path], str], *, fresh: bool) -> str:
    """A digest of a file, computed once for as long as nobody writes to the file."""
    path = path.resolve()
    before = stamp(path)
    value = None if fresh else remembered(path, kind)
    if value is None:
        value = digest(path)
        remember(path, kind, value, before)
    return value


def _memory(path: Path, kind: str) -> Path:
    name = hashlib.sha256(f"{path}:{kind}".encode()).hexdigest()[:32]
    return home() / "digests" / f"{name}.json"


def remembered(path: Path, kind: str) -> str | None:
    """A digest of a file, if it is known and nobody has written to the file since."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        record = json.loads(_memory(path, kind).read_text())
        if record["stamp"] == stamp(path):
            return str(record[kind])
    return None


def remember(path: Path, kind: str, digest: str, before: list[int]) -> None:
    """Note the digest of a file whose stamp was `before` when it began to be taken."""
    # A clock tick is 10 ms at most: from then on another write would show in the times.
    time.sleep(max(0, before[2] + 12_000_000 - time.time_ns()) / 1e9)
    if stamp(path) != before:
        return
    memory = _memory(path, kind)
    with suppress(OSError):  # a read-only home costs time, not correctness
        memory.parent.mkdir(parents=True, exist_ok=True)
        with atomic(memory) as temporary:
            record = {"stamp": before, kind: digest, "path": str(path)}
            temporary.write_text(json.dumps(record))


def compute_sha256(path: Path) -> str:
    """SHA-256 of a file as it is now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def crc32(path: Path, begin: int) -> str:
    """CRC-32 of a file from byte `begin` on."""
    crc = 0
    with path.open("rb") as file:
        file.seek(begin)
        while block := file.read(1 << 18):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def check(path: Path, expected: str, actual: str | None = None) -> None:
    """ValueError where a file's SHA-256, `actual` if it is known, doesn't begin as expected."""
    actual = actual or sha256(path)
    if not actual.startswith(expected):
        raise ValueError(
            f"{path} is damaged or another file: its SHA-256 is {actual}, expected "
            f"{expected}{'...' if len(expected) < 64 else ''}. Delete it."
        )
