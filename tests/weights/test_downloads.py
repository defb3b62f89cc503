"""Downloads end with the right file or with a clear error, whatever the server does."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import multiprocessing
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_files import (
    small_state,
)
from huggingface_hub import constants

from vggtorch import files
from vggtorch.weights import downloads, sources
from vggtorch.weights.hub import _knock
from vggtorch.weights.published import PUBLISHED

CONTENT = random.Random(0).randbytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT in the manner that the path names, and counts what it was asked."""

    protocol_version = "HTTP/1.1"
    asked: list[tuple[str, str | None]]

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        manner = self.path.strip("/").split("/")[0]
        self.asked.append((manner, self.headers["Range"]))
        times = sum(manner == m for m, _ in self.asked)
        if manner in ("404", "500"):
            self.send_error(int(manner))
            return
        if manner == "trouble" and times < 3:
            self.send_error(503)
            return
        if manner in ("loop", "file", "ftp", "data"):
            self.send_response(302)
            here = self.path if manner == "loop" else f"{manner.upper()}://127.0.0.1/{manner}"
            self.send_header("Location", here)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = CONTENT if manner != "wrong" else CONTENT[:-1] + b"?"
        start = 0
        if self.headers["Range"] and manner != "from-the-start":
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        rest = content[start:]
        if manner == "slow":
            for i in range(0, len(rest), 30_000):
                self.wfile.write(rest[i : i + 30_000])
                time.sleep(0.02)
        elif manner == "silent":
            time.sleep(1.5)
        elif manner == "cut" or (manner in ("cut-once", "from-the-start") and times == 1):
            self.wfile.write(rest[: len(rest) // 2])
            self.wfile.flush()
        else:
            self.wfile.write(rest)
        self.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a file server on this machine."""
    _Handler.asked = []
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    monkeypatch.setattr(downloads, "TIMEOUT", 0.5)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as running:
        # It looks every hundredth of a second whether it shall stop.
        threading.Thread(target=running.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize(
    ("manner", "ranges"),
    [
        ("well", [None]),
        ("slow", [None]),
        ("trouble", [None, None, None]),
        ("cut-once", [None, "bytes=150000-"]),
        ("from-the-start", [None, "bytes=150000-"]),
    ],
)
def test_download_ends_with_the_right_file(
    tmp_path: Path, server: str, manner: str, ranges: list[str | None]
) -> None:
    target = tmp_path / "weights.pth"
    downloads.download(f"{server}/{manner}/weights.pth", target, DIGEST[:8])
    assert target.read_bytes() == CONTENT
    assert set(os.listdir(tmp_path)) - {"home"} == {target.name}
    assert [asked for _, asked in _Handler.asked] == ranges


@pytest.mark.slow
@pytest.mark.parametrize(
    ("manner", "message"),
    [
        ("404", "HTTP Error 404"),
        ("500", "HTTP Error 500"),
        ("loop", "infinite loop"),
        ("file", "Redirection to url 'FILE://127.0.0.1/file' is not allowed"),
        ("data", "Redirection to url 'DATA://127.0.0.1/data' is not allowed"),
        ("ftp", "the server sends on to ftp://127.0.0.1/ftp"),
        ("cut", r"broke off after \d+ of 300000 bytes"),
        ("silent", "timed out"),
        ("wrong", "served a file whose SHA-256 is .*it was deleted"),
    ],
)
def test_download_fails_clearly(tmp_path: Path, server: str, manner: str, message: str) -> None:
    target = tmp_path / "weights.pth"
    with pytest.raises((OSError, ValueError), match=message) as caught:
        downloads.download(f"{server}/{manner}/weights.pth", target, DIGEST[:8])
    assert f"/{manner}/weights.pth" in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize("address", ["file:///etc/hostname", "ftp://127.0.0.1/a", "/a.pth", ""])
def test_what_is_no_address_on_http_is_not_opened(tmp_path: Path, address: str) -> None:
    with pytest.raises(OSError, match=f"^{address}: expected an address on http or https"):
        downloads.download(address, tmp_path / "weights.pth", DIGEST)
    assert os.listdir(tmp_path) == []


def test_download_goes_on_in_the_next_run(tmp_path: Path, server: str) -> None:
    target = tmp_path / "weights.pth"
    part = tmp_path / "weights.pth.part"
    part.write_bytes(CONTENT[:100_000])
    downloads.download(f"{server}/well/weights.pth", target, DIGEST)
    assert target.read_bytes() == CONTENT
    assert [asked for _, asked in _Handler.asked] == ["bytes=100000-"]
    # A part that is whole already, one that is longer, and one of another file.
    for left in (CONTENT, CONTENT + b"more", b"?" * 100_000):
        target.unlink()
        part.write_bytes(left)
        downloads.download(f"{server}/well/weights.pth", target, DIGEST)
        assert target.read_bytes() == CONTENT
        assert not part.exists()


def test_no_server_is_not_asked_twice(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"http://127\.0\.0\.1:1/a: .*refused"):
        downloads.download("http://127.0.0.1:1/a", tmp_path / "a", "00")


def test_announced_size_is_held_against_reason(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "LARGEST", 1000)
    with pytest.raises(OSError, match="announces 300000 bytes, more than any checkpoint has"):
        downloads.download(f"{server}/well/a", tmp_path / "a", DIGEST)


@pytest.fixture
def hub(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """A Hugging Face client that has timm's vgg16 behind it; what it was asked."""
    import huggingface_hub

    cached = tmp_path / "hub" / "model.safetensors"
    asked: dict[str, list] = {"calls": []}

    def hf_hub_download(repository: str, file: str, local_files_only: bool = False) -> str:
        asked["calls"].append((repository, file, local_files_only))
        if local_files_only and not cached.exists():
            raise FileNotFoundError("not in the cache")
        cached.parent.mkdir(exist_ok=True)
        sources.write(cached, small_state())
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"{server}/404")
    monkeypatch.setattr("torchvision.models.get_weight", lambda name: FakeWeights(f"{server}/404"))
    monkeypatch.setenv("VGGTORCH_OFFLINE", "0")
    return asked


@dataclasses.dataclass
class FakeWeights:
    url: str


def test_hub_where_torchvisions_site_fails(
    hub: dict[str, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"hub \(timm/vgg16.*damaged or another file"):
        sources.find("imagenet", include_top=True)
    cached = tmp_path / "hub" / "model.safetensors"
    row = next(k for k in PUBLISHED.values() if k.address.startswith("timm/vgg16.tv"))
    published = dataclasses.replace(row, sha256=files.sha256(cached))
    monkeypatch.setitem(PUBLISHED, row.file, published)
    cached.unlink()
    hub["calls"].clear()
    assert sources.find("imagenet", include_top=True) == cached
    asked = ("timm/vgg16.tv_in1k", "model.safetensors")
    assert hub["calls"] == [(*asked, True), (*asked, False)]
    # Once it is in the client's own cache, no network is needed.
    monkeypatch.setenv("VGGTORCH_OFFLINE", "1")
    assert sources.find("imagenet", include_top=True) == cached
    assert hub["calls"][2:] == [(*asked, True)]


def test_closed_network_names_the_set_that_needs_no_site(
    hub: dict[str, list], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(FileNotFoundError) as caught:
        sources.find("imagenet", include_top=False)
    message = str(caught.value)
    assert "torchvision (VGG16_Weights.IMAGENET1K_V1): http://" in message
    assert "HTTP Error 404" in message
    assert "refused" in message  # the hub, which was not left to try for half a minute
    assert "weights='oxford' needs none of these sites" in message
    assert hub["calls"] == [("timm/vgg16.tv_in1k", "model.safetensors", True)]
    with pytest.raises(
        FileNotFoundError, match="weights='oxford' and include_top=False needs none"
    ):
        sources.find("imagenet", include_top=True)
    with pytest.raises(FileNotFoundError, match="VGG16 with weights='oxford' needs none"):
        sources.find("imagenet", "vgg19", include_top=False)


def _find_from(address: str, digest: str) -> bytes:
    """In a process of its own: what `find` gives where torchvision's site is `address`."""
    from unittest import mock

    file = "vgg16-397923af.pth"
    published = dataclasses.replace(PUBLISHED[file], sha256=digest)
    with (
        mock.patch.dict(PUBLISHED, {file: published}),
        mock.patch.dict(os.environ, {"VGGTORCH_OFFLINE": "0"}),
        mock.patch("torchvision.models.get_weight") as get_weight,
    ):
        get_weight.return_value.url = address
        return sources.find("imagenet", include_top=True).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_eight_processes_cost_one_download(tmp_path: Path, server: str) -> None:
    arguments = [(f"{server}/slow/vgg16.pth", DIGEST)] * 8
    with multiprocessing.get_context("fork").Pool(8) as pool:
        assert pool.starmap(_find_from, arguments) == [CONTENT] * 8
    assert _Handler.asked == [("slow", None)]


@pytest.mark.parametrize("answer", [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: " + b"a" * 99_999])
def test_what_is_no_hub_is_named_as_one_that_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        monkeypatch.setenv("VGGTORCH_OFFLINE", "0")
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        with pytest.raises(OSError, match=f"{address} can't be reached"):
            _knock()


def test_an_endpoint_that_is_no_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGGTORCH_OFFLINE", "0")
    for address in ("http://[::1", "hub"):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        with pytest.raises(OSError, match="can't be reached"):
            _knock()


def test_a_hub_that_sends_on_to_another_scheme_is_not_followed(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGGTORCH_OFFLINE", "0")
    monkeypatch.setattr(constants, "ENDPOINT", f"{server}/ftp/hub")
    with pytest.raises(OSError, match="can't be reached .*the server sends on to ftp://"):
        _knock()
