"""What the table of published checkpoints says is what their publishers say."""

from __future__ import annotations

import http.client
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vggtorch import files
from vggtorch.weights import downloads
from vggtorch.weights.published import PUBLISHED

pytestmark = pytest.mark.network


@contextmanager
def way_to(host: str) -> Iterator[None]:
    """Inside, a host that can't be reached skips the test; whatever it answers doesn't."""
    try:
        yield
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        pytest.skip(f"no way to {host}: {files.first_line(error)}")


def placed(place: str) -> list:
    return [pytest.param(row, id=row.file) for row in PUBLISHED.values() if row.place == place]


@pytest.mark.parametrize("row", placed("torchvision"))
def test_torchvisions_site_has_the_file_in_its_size(row):
    from torchvision.models import get_weight

    weights = get_weight(row.address)
    request = urllib.request.Request(weights.url, method="HEAD")
    with way_to("torchvision's site"), urllib.request.urlopen(request, timeout=20) as response:
        size = int(response.headers["Content-Length"])
    assert size / 2**20 == pytest.approx(weights.meta["_file_size"], abs=0.1)


@pytest.mark.parametrize("row", placed("hub"))
def test_the_hub_has_the_file_with_its_hash(row):
    hub = pytest.importorskip("huggingface_hub")
    repository, _, file = row.address.rpartition("/")
    url = hub.hf_hub_url(repository, file)
    with way_to("the hub"):
        urllib.request.urlopen(hub.constants.ENDPOINT, timeout=20).close()
        found = hub.get_hf_file_metadata(url, timeout=20)
    assert found.etag == row.sha256
    assert found.size is not None and found.size < downloads.LARGEST


@pytest.mark.slow
@pytest.mark.parametrize("row", placed("index"))
def test_the_package_index_has_the_file_with_its_hash(row, tmp_path: Path):
    try:
        downloads.from_index(row.address, tmp_path / row.file, row.sha256)
    except OSError:
        other = subprocess.run([sys.executable, "-m", "pip", "index", "versions", "pip"])
        if other.returncode == 0:
            raise
        pytest.skip("no way to a package index: pip doesn't find itself there either")
    assert files.sha256(tmp_path / row.file) == row.sha256
