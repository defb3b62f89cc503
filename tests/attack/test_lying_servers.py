"""Whatever a server answers, a download ends soon: with the right file, or with an error."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vggtorch.weights import downloads

CONTENT = random.Random(0).randbytes(100_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
OK = b"HTTP/1.1 200 OK\r\n"


def answer(body: bytes, *headers: str, status: bytes = OK) -> bytes:
    return status + "".join(f"{h}\r\n" for h in headers).encode("latin1") + b"\r\n" + body


def moved(to: str) -> bytes:
    return answer(b"", f"Location: {to}", "Content-Length: 0", status=b"HTTP/1.1 302 Found\r\n")


LENGTH = f"Content-Length: {len(CONTENT)}"
RIGHT = {
    "as it should": answer(CONTENT, LENGTH),
    "without a length": answer(CONTENT),
    "with HTTP 1.0": answer(CONTENT, status=b"HTTP/1.0 200 OK\r\n"),
    "in chunks": answer(
        b"".join(b"%x\r\n%b\r\n" % (1000, CONTENT[i : i + 1000]) for i in range(0, 100_000, 1000))
        + b"0\r\n\r\n",
        "Transfer-Encoding: chunked",
    ),
    "with a length of 5000 digits": answer(CONTENT, "Content-Length: " + "9" * 5000),
    "more than it announced": answer(CONTENT + b"more", LENGTH),
}
LIES = {
    "nothing": b"",
    "no HTTP": b"\x00\xff\x00\xff\r\n\r\n",
    "a status of words": answer(CONTENT, status=b"HTTP/1.1 fine\r\n"),
    "a status that does not exist": answer(b"", status=b"HTTP/1.1 999 No\r\n"),
    "a reason that clears the screen": answer(b"", status=b"HTTP/1.1 404 \x1b[2J\x1b]0;x\x07\r\n"),
    "a reason of 60 kB": answer(b"", status=b"HTTP/1.1 404 " + b"x" * 60_000 + b"\r\n"),
    "an endless header": OK + b"X: " + b"x" * 200_000,
    "a thousand headers": OK + b"X: y\r\n" * 1000 + b"\r\n",
    "a page of a login": answer(b"<html>log in", "Content-Type: text/html"),
    "one byte less": answer(CONTENT[:-1], LENGTH),
    "one bit else": answer(CONTENT[:-1] + bytes([CONTENT[-1] ^ 1]), LENGTH),
    "another file": answer(CONTENT[::-1], LENGTH),
    "an empty file": answer(b"", "Content-Length: 0"),
    "a length of -1": answer(CONTENT[:100], "Content-Length: -1"),
    "a length of words": answer(CONTENT[:100], "Content-Length: many"),
    "a length of superscripts": answer(CONTENT[:100], "Content-Length: \u00b2"),
    "a length of a terabyte": answer(CONTENT, "Content-Length: 1000000000000"),
    "chunks of lies": answer(b"ffffffff\r\nshort", "Transfer-Encoding: chunked"),
    "chunks of no number": answer(b"zz\r\n", "Transfer-Encoding: chunked"),
    "a part that nobody asked for": answer(
        CONTENT[50:], "Content-Range: bytes 50-99999/100000", status=b"HTTP/1.1 206 Part\r\n"
    ),
    "compressed": answer(b"\x1f\x8b" + bytes(100), "Content-Encoding: gzip"),
    "a way to a file": moved("file:///etc/passwd"),
    "a way to ftp": moved("ftp://127.0.0.1/x"),
    "a way to data": moved("data:,x"),
    "a way to nowhere": moved("http://127.0.0.1:1/x"),
    "a way without end": moved("/again"),
    "a way of control characters": moved("http://127.0.0.1/\x1b[2J"),
}
SLOW = ("one byte at a time", "one header at a time", "silence")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    """A server that answers what `say` holds, and its address."""
    for name, value in {"PAUSE": 0.0, "TIMEOUT": 0.5, "PATIENCE": 1.0, "ATTEMPTS": 2}.items():
        monkeypatch.setattr(downloads, name, value)
    listening = socket.create_server(("127.0.0.1", 0))
    state: dict = {"url": f"http://127.0.0.1:{listening.getsockname()[1]}/w.pth", "asked": 0}

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    def talk(connection: socket.socket) -> None:
        state["asked"] += 1
        say = state["say"]
        try:
            with connection:
                connection.recv(1 << 16)
                if say == "silence":
                    time.sleep(5)
                elif isinstance(say, str):
                    connection.sendall(OK if "header" in say else answer(b"", LENGTH))
                    for _ in range(200):
                        connection.sendall(b"X: y\r\n" if "header" in say else b"x")
                        time.sleep(0.1)
                else:
                    connection.sendall(say)
        except OSError:
            pass  # the client has gone

    threading.Thread(target=serve, daemon=True).start()
    yield state
    listening.close()


@pytest.mark.parametrize("manner", RIGHT)
def test_the_right_file_in_any_manner(
    tmp_path: Path, server: dict, monkeypatch: pytest.MonkeyPatch, manner: str
) -> None:
    for name in ("TIMEOUT", "PATIENCE"):  # a busy machine may let an honest server wait
        monkeypatch.setattr(downloads, name, 60.0)
    server["say"] = RIGHT[manner]
    downloads.download(server["url"], tmp_path / "w.pth", DIGEST)
    assert (tmp_path / "w.pth").read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("w.pth")] == ["w.pth"]


@pytest.mark.slow
@pytest.mark.parametrize("manner", [*LIES, *SLOW])
def test_a_lie_is_an_error_and_soon(tmp_path: Path, server: dict, manner: str) -> None:
    server["say"] = LIES.get(manner, manner)
    with pytest.raises((OSError, ValueError)) as caught:
        downloads.download(server["url"], tmp_path / "w.pth", DIGEST)
    message = str(caught.value)
    assert server["url"] in message
    assert message.isprintable() and len(message) < 2000
    assert not (tmp_path / "w.pth").exists()
    assert server["asked"] <= 30
