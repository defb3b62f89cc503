"""Checkpoints of every form, small enough to be written in a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import torch


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


def first_block() -> dict[str, torch.Tensor]:
    """block1_conv1 of any VGG, at its real size, with another value each."""
    weight = torch.arange(64 * 3 * 3 * 3.0).reshape(64, 3, 3, 3)
    return {"features.0.weight": weight, "features.0.bias": torch.arange(64.0)}


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


@contextmanager
def full_disk() -> Iterator[None]:
    """Inside, no file of this process can grow beyond 1000 bytes; pytest's own output neither."""
    resource = pytest.importorskip("resource", reason="needs limits on a process, as on POSIX")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
