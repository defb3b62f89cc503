"""Converted copies follow their source, survive what happens to files, and cost one conversion."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from checkpoint_files import assert_same, first_block, full_disk

import vggtorch as vt
from vggtorch import files
from vggtorch.weights import conversion, copies, sources
from vggtorch.weights.copies import converted
from vggtorch.weights.published import PUBLISHED

EXPECTED = conversion.to_keras(first_block(), "torchvision")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint in torchvision's form."""
    path = tmp_path / "a.pth"
    sources.write(path, first_block())
    return path


@pytest.fixture
def converting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The form of every checkpoint that was converted."""
    forms: list[str] = []
    to_views = conversion.to_views

    def noted(tensors: Mapping[str, torch.Tensor], form: str) -> dict[str, torch.Tensor]:
        forms.append(form)
        return to_views(tensors, form)

    monkeypatch.setattr(conversion, "to_views", noted)
    return forms


def all_copies() -> list[Path]:
    return sorted((files.home() / "converted").glob("*.safetensors"))


def test_the_second_load_maps_the_copy(path: Path, converting: list[str]) -> None:
    for _ in range(3):
        checkpoint = converted(path)
        assert checkpoint.form == "keras"
        assert_same(checkpoint.tensors, EXPECTED)
        kernel = checkpoint.tensors["block1_conv1/kernel"]
        # (O, H, W, I) in memory, which a convolution reads as channels-last without a copy.
        assert kernel.shape == (3, 3, 3, 64)
        assert kernel.permute(3, 0, 1, 2).is_contiguous()
        kernel.zero_()  # as training does: into memory, never into the file
    assert converting == ["torchvision"]


def test_a_copy_follows_its_source(path: Path) -> None:
    old = converted(path)
    changed = {key: tensor + 1 for key, tensor in first_block().items()}
    sources.write(path, changed)
    new = converted(path)
    assert_same(new.tensors, conversion.to_keras(changed, "torchvision"))
    assert all_copies() == [new.path] != [old.path]


def test_a_source_with_its_old_time_and_size_is_known_to_be_another(path: Path) -> None:
    converted(path)
    times = path.stat()
    changed = {key: tensor + 1 for key, tensor in first_block().items()}
    sources.write(path, changed)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert_same(converted(path).tensors, conversion.to_keras(changed, "torchvision"))


def test_copies_of_sources_that_are_no_more_are_deleted(path: Path) -> None:
    converted(path)
    other = path.rename(path.with_name("b.pth"))
    copy = converted(other).path
    assert all_copies() == [copy]


def test_a_damaged_copy_is_made_again(path: Path, converting: list[str]) -> None:
    copy = converted(path).path
    whole = copy.read_bytes()
    for damage in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"<html>"):
        copy.write_bytes(damage)
        converting.clear()
        assert_same(converted(path).tensors, EXPECTED)
        assert copy.read_bytes() == whole
        converted(path)
        assert converting == ["torchvision"]


def test_verify_finds_what_the_file_system_did_not_tell(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vggtorch.cli import main

    copy = converted(path).path
    times, content = copy.stat(), copy.read_bytes()
    for position in (20, -1):  # in the header, in the values
        damaged = bytearray(content)
        damaged[position] ^= 1
        copy.write_bytes(damaged)
        # As if the disk itself had failed: what tells of a write is as it was.
        os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))
        assert main(["weights", "verify"]) == 1
        assert f"{copy} is damaged: " in capsys.readouterr().out
        assert not copy.exists()
        assert_same(converted(path).tensors, EXPECTED)
        assert copy.read_bytes() == content


def test_a_copy_of_another_layout_is_made_again(
    path: Path, converting: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(copies, "_LAYOUT", "another version's")
        converted(path)
    for _ in range(2):
        converted(path)
    assert len(converting) == 2
    assert len(all_copies()) == 1


def is_mapped(tensor: torch.Tensor, path: Path) -> bool:
    """Whether a tensor's memory is a file's, as Linux says; other systems aren't asked."""
    if not Path("/proc/self/maps").exists():
        return True
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            return line.endswith(str(path))
    return False


@pytest.mark.slow
def test_flattening_fc1_of_a_copy_costs_no_memory(tmp_path: Path) -> None:
    # fc1 of a network whose last map is 2x2: its rows go from C, H, W to H, W, C.
    generator = torch.Generator().manual_seed(0)
    state = {"classifier.0.weight": torch.randn(4096, 512 * 4, generator=generator)}
    path = tmp_path / "a.pth"
    sources.write(path, state)
    for _ in range(2):
        copy = converted(path)
        assert_same(copy.tensors, conversion.to_keras(state, "torchvision"))
        assert copy.tensors["fc1/kernel"].T.is_contiguous()
        assert is_mapped(copy.tensors["fc1/kernel"], copy.path)


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("ending", ["safetensors", "pth", "weights.h5"])
@pytest.mark.parametrize("room", [True, False])
@pytest.mark.filterwarnings("ignore:Loading stays slow")
def test_a_model_keeps_its_values_whatever_happens_to_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, room: bool
) -> None:
    path, other = tmp_path / f"a.{ending}", tmp_path / f"b.{ending}"
    shape = {"include_top": False, "input_shape": (32, 32, 3)}
    for target in (path, other):
        vt.save_weights(vt.VGG11(weights=None, **shape), target)
    if not room:
        (tmp_path / "file").write_text("not a folder")
        monkeypatch.setenv("VGGTORCH_HOME", str(tmp_path / "file"))
    model = vt.VGG11(weights=path, **shape)
    expected = [v.numpy().copy() for v in model.variables]
    path.write_bytes(other.read_bytes())  # over it in place, as cp does
    assert all((v.numpy() == e).all() for v, e in zip(model.variables, expected, strict=True))
    path.write_bytes(b"")
    assert all((v.numpy() == e).all() for v, e in zip(model.variables, expected, strict=True))


def test_a_copy_of_a_published_checkpoint(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = "vgg16-397923af.pth"
    published = dataclasses.replace(PUBLISHED[file], sha256=files.sha256(path)[:8])
    monkeypatch.setitem(PUBLISHED, file, published)
    for _ in range(2):
        assert converted(path).weight_set == "imagenet"
    # It has only the name of one: nothing of it stays.
    damaged = path.rename(tmp_path / "vgg19-dcbb9e9d.pth")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"damaged or another file.*expected dcbb9e9d"):
            converted(damaged)
    assert [copy.name.split("-")[0] for copy in all_copies()] == ["a"]


def test_a_source_that_changes_while_it_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_views = conversion.to_views

    def interrupted(tensors: Mapping[str, torch.Tensor], form: str) -> dict[str, torch.Tensor]:
        sources.write(path, {key: tensor + 1 for key, tensor in first_block().items()})
        return to_views(tensors, form)

    monkeypatch.setattr(conversion, "to_views", interrupted)
    with pytest.warns(UserWarning, match="Loading stays slow: .*was written to meanwhile"):
        converted(path)
    assert all_copies() == []


def _convert_and_count(path: Path, folder: Path) -> bool:
    """In a process of its own: load, and note it where that took a conversion."""
    to_views = conversion.to_views

    def counted(tensors: Mapping[str, torch.Tensor], form: str) -> dict[str, torch.Tensor]:
        (folder / str(os.getpid())).touch()
        time.sleep(0.2)
        return to_views(tensors, form)

    conversion.to_views = counted
    kernel = converted(path).tensors["block1_conv1/kernel"]
    return torch.equal(kernel, first_block()["features.0.weight"].permute(2, 3, 1, 0))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_eight_processes_cost_one_conversion(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "converted by"
    folder.mkdir()
    with multiprocessing.get_context("fork").Pool(8) as pool:
        assert pool.starmap(_convert_and_count, [(path, folder)] * 8) == [True] * 8
    assert len(os.listdir(folder)) == 1


def test_what_a_killed_process_left_is_removed_and_never_reported(path: Path) -> None:
    folder = files.home() / "converted"
    folder.mkdir(parents=True)
    left = folder / ".77-1234.a-0123456789abcdef.safetensors"
    left.write_bytes(b"half of a copy")
    assert copies.verify() == {}
    copy = converted(path).path
    assert not left.exists()
    assert copies.verify() == {copy: None}


def test_no_room_for_a_copy(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("VGGTORCH_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="Loading stays slow: .*file/converted"):
        assert_same(converted(path).tensors, EXPECTED)


def test_full_disk_while_converting(path: Path) -> None:
    with full_disk(), pytest.warns(UserWarning, match="Loading stays slow: .*Could not write"):
        checkpoint = converted(path)
    assert_same(checkpoint.tensors, EXPECTED)
    assert all_copies() == []
