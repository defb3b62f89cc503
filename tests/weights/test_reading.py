"""Every form is read as what was written, and what is no checkpoint is refused."""

from __future__ import annotations

import dataclasses
import os
import pickle
from pathlib import Path

import keras
import pytest
import torch
from checkpoint_files import (
    assert_same,
    keras_tensors,
    onnx_state,
    small_state,
    write_legacy_weights,
    write_onnx,
)
from safetensors.torch import load_file, save_file

from vggtorch import files
from vggtorch.weights import conversion, sources
from vggtorch.weights.published import PUBLISHED


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_what_is_written_is_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    sources.write(path, small_state(), "imagenet")
    checkpoint = sources.read(path)
    assert_same(checkpoint.tensors, small_state())
    assert checkpoint.form == "torchvision"
    assert checkpoint.weight_set == "imagenet"
    assert sorted(os.listdir(tmp_path)) == [path.name]


def test_own_safetensors_are_everybodys(tmp_path: Path) -> None:
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:keras.saving.load_model reads:UserWarning")
@pytest.mark.parametrize("ending", ["weights.h5", "keras", "h5", "legacy"])
def test_every_form_of_keras(tmp_path: Path, keras_model: keras.Model, ending: str) -> None:
    expected = keras_tensors(keras_model)
    path = tmp_path / f"a.{ending}"
    if ending == "legacy":
        write_legacy_weights(path, expected)
    elif ending == "weights.h5":
        keras_model.save_weights(path)
    else:
        keras_model.save(path)
    checkpoint = sources.read(path.rename(tmp_path / "any.name"))  # content tells, not the ending
    assert_same(checkpoint.tensors, expected)
    assert checkpoint.form == "keras"
    assert checkpoint.weight_set == ("oxford" if ending in ("keras", "h5") else None)


@pytest.mark.parametrize("channels_last", [False, True])
def test_onnx_as_torch_and_as_tensorflow_export_it(tmp_path: Path, channels_last: bool) -> None:
    import onnxruntime

    state = onnx_state()
    write_onnx(tmp_path / "a", state, channels_last=channels_last)
    checkpoint = sources.read(tmp_path / "a")
    assert checkpoint.form == "onnx"
    names = ["conv0.weight", "conv0.bias", "dense0.weight", "dense0.bias"]
    assert_same(checkpoint.tensors, dict(zip(names, state.values(), strict=True)))
    # The tensors in torch's own layers compute what ONNX Runtime computes from the file.
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    k, b, w, d = (checkpoint.tensors[name] for name in names)
    pooled = torch.nn.functional.max_pool2d(torch.nn.functional.conv2d(x, k, b, padding=1), 2)
    ours = torch.nn.functional.linear(pooled.flatten(1), w, d)
    session = onnxruntime.InferenceSession(tmp_path / "a", providers=["CPUExecutionProvider"])
    torch.testing.assert_close(ours, torch.from_numpy(session.run(None, {"x": x.numpy()})[0]))


def test_onnx_that_is_no_vgg(tmp_path: Path) -> None:
    import onnx

    for setting, numbers in {"strides": [2, 2], "pads": [0, 0, 0, 0]}.items():
        write_onnx(tmp_path / "a", onnx_state(), channels_last=False)
        model = onnx.load(tmp_path / "a")
        next(a for a in model.graph.node[0].attribute if a.name == setting).ints[:] = numbers
        onnx.save(model, tmp_path / "a")
        with pytest.raises(ValueError, match="0 has strides, dilations, groups or another padding"):
            sources.read(tmp_path / "a")
    model.graph.node[0].op_type = "BatchNormalization"
    onnx.save(model, tmp_path / "a")
    with pytest.raises(ValueError, match="export the model in evaluation mode"):
        sources.read(tmp_path / "a")


class _Evil:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("ran",))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_that_would_run_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _Evil()}, "evil.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"evil\.pth can't be loaded: it asks for"):
        sources.read("evil.pth")
    Path("bare.pth").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ValueError, match=r"bare\.pth can't be loaded: its pickle has the instruct"):
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
    with pytest.raises(
        ValueError, match=r"a\.safetensors is damaged: Unknown weight set 'caffe'; expected one of"
    ):
        sources.read(tmp_path / "a.safetensors")


def test_published_name_with_other_bytes(tmp_path: Path) -> None:
    path = tmp_path / "vgg16-397923af.pth"
    torch.save(small_state(), path)
    with pytest.raises(ValueError, match=r"damaged or another file.*expected 397923af"):
        sources.read(path)
    path.write_bytes(path.read_bytes()[:500])  # a download that was cut is to be deleted, too
    with pytest.raises(ValueError, match=r"damaged or another file.*Delete it\."):
        sources.read(path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_numbers_of_8_bits_are_read_as_float32(
    tmp_path: Path, dtype: torch.dtype, ending: str
) -> None:
    state = {key: tensor.to(dtype) for key, tensor in small_state().items()}
    if ending == "pth":
        torch.save(state, tmp_path / "a.pth")
    else:
        save_file(state, tmp_path / "a.safetensors")
    expected = {key: tensor.float() for key, tensor in state.items()}
    assert_same(sources.read(tmp_path / f"a.{ending}").tensors, expected)
    assert_same(sources.from_memory(state).tensors, expected)


def test_the_index_of_several_files_says_how_to_load_them(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"metadata": {"total_size": 1}, "weight_map": {"a.weight": "1.safetensors"}}')
    with pytest.raises(ValueError, match=r"the index of a checkpoint in several files\. Load them"):
        sources.read(path)


def test_features_come_without_the_classifier_that_is_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pth"
    sources.write(path, {**small_state(), "classifier.0.bias": torch.full((3,), torch.nan)})
    with pytest.raises(ValueError, match=r"a\.pth: classifier\.0\.bias holds NaN"):
        sources.read(path)
    file = "vgg16_features-amdegroot-88682ab5.pth"
    published = dataclasses.replace(PUBLISHED[file], sha256=files.sha256(path)[:8])
    monkeypatch.setitem(PUBLISHED, file, published)
    checkpoint = sources.read(path)  # known by its hash, whatever its name
    assert_same(checkpoint.tensors, small_state())
    assert checkpoint.weight_set == "features"


@pytest.mark.slow
def test_timm_names_and_shapes_both_ways(tmp_path: Path) -> None:
    # The classifier by itself, of a network whose last map is 1x1.
    generator = torch.Generator().manual_seed(0)
    state = {
        "pre_logits.fc1.weight": torch.randn(4096, 512, 1, 1, generator=generator),
        "pre_logits.fc1.bias": torch.randn(4096, generator=generator),
        "pre_logits.fc2.weight": torch.randn(4096, 4096, 1, 1, generator=generator),
        "pre_logits.fc2.bias": torch.randn(4096, generator=generator),
        "head.fc.weight": torch.randn(10, 4096, generator=generator),
        "head.fc.bias": torch.randn(10, generator=generator),
    }
    sources.write(tmp_path / "timm.safetensors", state)
    checkpoint = sources.read(tmp_path / "timm.safetensors")
    assert checkpoint.form == "timm"
    tensors = conversion.to_keras(checkpoint.tensors, checkpoint.form)
    traced = conversion.traced(checkpoint.tensors, lambda t: conversion.to_keras(t, "timm"))
    assert traced["fc1/kernel"] == "pre_logits.fc1.weight"
    assert list(traced.values()) == list(state)
    assert torch.equal(tensors["fc1/kernel"], state["pre_logits.fc1.weight"].flatten(1).T)
    assert torch.equal(tensors["predictions/kernel"], state["head.fc.weight"].T)
    assert_same(conversion.keras_to_timm(tensors), state)


def test_files_of_earlier_versions_still_load(tmp_path: Path) -> None:
    values = torch.arange(6.0).reshape(2, 3)
    metadata = {"format": "vggtorch", "weight_set": "oxford", "sha256": "0" * 64, "crc32": "0"}
    save_file({"a/kernel": values}, tmp_path / "old.safetensors", metadata)
    checkpoint = sources.read(tmp_path / "old.safetensors")
    assert torch.equal(checkpoint.tensors["a/kernel"], values)
    assert checkpoint.weight_set == "oxford"


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(ValueError, match=f"{path} is not a regular file; expected"):
            sources.read(path)
    with pytest.raises(FileNotFoundError):
        sources.read(tmp_path / "nothing")


def test_what_safetensors_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a has dtype torch\.complex64; expected one of float64"):
        sources.write(tmp_path / "a.safetensors", {"a": torch.ones(2, dtype=torch.complex64)})
    assert os.listdir(tmp_path) == []
