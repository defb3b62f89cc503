"""The weights in an ONNX file, read from its bytes.

A small reader of the protobuf form (protobuf.dev/programming-guides/encoding, onnx.proto3), so that
the `oxford` weights need no further package.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import cast

import torch

from vggtorch.weights.state_dicts import UnsupportedError

Node = tuple[str, list[str], list[str], dict[str, list[int]]]


def read(path: Path) -> tuple[dict[str, torch.Tensor], Mapping[str, str]]:
    """The weights of Conv, Gemm and MatMul nodes in graph order.

    Named `conv0.weight`, `dense0.bias` and so on, laid out as torch does: (O, I, H, W), (out, in).
    """
    with path.open("rb") as file:
        model = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    fields = list(_fields(model))
    graphs = [value for field, value in fields if field == 7]
    properties = [dict(_fields(_bytes(value))) for field, value in fields if field == 14]
    metadata = {_text(entry.get(1, b"")): _text(entry.get(2, b"")) for entry in properties}
    if len(graphs) != 1 or not isinstance(graphs[0], memoryview):
        raise ValueError("it is not an ONNX model")
    initializers: dict[str, memoryview] = {}
    nodes = []
    for field, value in _fields(graphs[0]):
        if field == 5:
            name = _text(dict(_fields(_bytes(value))).get(8, b""))
            if name in initializers:
                raise ValueError(f"initializer {name} is there twice")
            initializers[name] = _bytes(value)
        elif field == 1:
            nodes.append(_node(_bytes(value)))
    return _weights(nodes, initializers), metadata


def _weights(
    nodes: Iterable[Node], initializers: Mapping[str, memoryview]
) -> dict[str, torch.Tensor]:
    """The weights of a graph, by what the nodes do with them."""
    constant = lru_cache(None)(lambda name: _tensor(initializers[name]))  # whoever shares it
    tensors: dict[str, torch.Tensor] = {}
    convolutions = dense = channels = 0
    channels_last = False
    previous = None  # the output of a MatMul whose bias has not come yet
    for kind, inputs, outputs, attributes in nodes:
        constants = [name for name in inputs if name in initializers]
        weighted = kind in ("Conv", "Gemm", "MatMul") or (kind == "Add" and previous in inputs)
        weights = [constant(name) for name in constants] if weighted else []
        if kind == "BatchNormalization":
            raise ValueError("its batch norm stands apart; export the model in evaluation mode")
        if kind == "Conv":
            settings = [attributes.get(key, [1]) for key in ("group", "strides", "dilations")]
            # Instead of numbers, `auto_pad` may say that a map keeps its size.
            settings.append(attributes.get("pads", [1 if "auto_pad" in attributes else 0]))
            if any(n != 1 for numbers in settings for n in numbers):
                raise ValueError(
                    f"convolution {convolutions} has strides, dilations, groups or another padding "
                    f"than VGG's of 1"
                )
            names = (f"conv{convolutions}.weight", f"conv{convolutions}.bias")
            tensors.update(zip(names, weights, strict=False))
            convolutions += 1
            channels = weights[0].shape[0] if weights else 0
            channels_last = False
        elif kind == "Transpose":
            channels_last = channels_last or attributes.get("perm") == [0, 2, 3, 1]
        elif kind in ("Gemm", "MatMul") and weights:
            transposed = kind == "Gemm" and attributes.get("transB") == [1]
            weight = weights[0] if transposed else weights[0].t()  # (in, out) -> (out, in)
            if channels_last and dense == 0 and channels:
                # The graph flattens H, W, C, as TensorFlow does; torch flattens C, H, W.
                grid = math.isqrt(weight.shape[1] // channels)
                hwc = weight.reshape(-1, grid, grid, channels)
                weight = hwc.permute(0, 3, 1, 2).reshape(weight.shape)
            tensors[f"dense{dense}.weight"] = weight
            if kind == "Gemm" and len(weights) > 1:
                tensors[f"dense{dense}.bias"] = weights[1]
            previous = outputs[0] if kind == "MatMul" and outputs else None
            dense += 1
        elif kind == "Add" and weights:
            tensors[f"dense{dense - 1}.bias"] = weights[0]
            previous = None
    return tensors


def _fields(buffer: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protobuf message: number and value; ValueError where it breaks its frame."""
    position = 0
    while position < len(buffer):
        tag, position = _varint(buffer, position)
        field, wire = tag >> 3, tag & 7
        if wire not in (0, 1, 2, 5):
            raise ValueError(f"a field in it has the unknown wire type {wire}")
        length = {1: 8, 5: 4}.get(wire, 0)
        if wire in (0, 2):
            length, position = _varint(buffer, position)
        if wire == 0:
            yield field, length
            continue
        if length > len(buffer) - position:
            raise ValueError("a field in it is longer than the rest of the file: truncated")
        yield field, buffer[position : position + length]
        position += length


def _varint(buffer: memoryview, position: int) -> tuple[int, int]:
    """A number of seven bits in each byte, the lowest first, and the position behind it."""
    value = 0
    for i, byte in enumerate(buffer[position : position + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, position + i + 1
    raise ValueError("a number in it has no end")


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a message in it is a number")
    return value


def _text(value: int | memoryview | bytes) -> str:
    return bytes(value if isinstance(value, bytes) else _bytes(value)).decode()


def _integers(buffer: memoryview, field: int) -> list[int]:
    """A repeated int64, which stands in a message one by one or packed."""
    numbers: list[int] = []
    for number, value in _fields(buffer):
        if number != field:
            continue
        if isinstance(value, int):
            numbers.append(value)
            continue
        position = 0
        while position < len(value):
            one, position = _varint(value, position)
            numbers.append(one)
    return numbers


def _node(buffer: memoryview) -> Node:
    """A NodeProto's op_type, inputs, outputs, and those of its attributes that are integers."""
    kind, inputs, outputs, attributes = "", [], [], {}
    for field, value in _fields(buffer):
        if field == 1:
            inputs.append(_text(value))
        elif field == 2:
            outputs.append(_text(value))
        elif field == 4:
            kind = _text(value)
        elif field == 5:
            attribute = _bytes(value)
            name = _text(dict(_fields(attribute)).get(1, b""))
            attributes[name] = _integers(attribute, 3) or _integers(attribute, 8)
    return kind, inputs, outputs, attributes


def _tensor(buffer: memoryview) -> torch.Tensor:
    """A TensorProto of floating point as a tensor on the file's own memory."""
    fields = dict(_fields(buffer))
    if fields.get(14, 0) != 0 or 13 in fields:
        raise UnsupportedError(
            "its values stand in another file. Put them into this one: "
            "onnx.save(onnx.load(path), path)"
        )
    shape = _integers(buffer, 1)
    dtype = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}.get(
        cast(int, fields.get(2, 0))
    )
    name = _text(fields.get(8, b""))
    if dtype is None:
        raise ValueError(f"initializer {name} is not floating point")
    raw = _bytes(fields.get(9, fields.get(4, memoryview(b""))))  # raw_data, or packed float_data
    if 9 not in fields and dtype != torch.float32:
        raise ValueError(f"initializer {name} has no raw data")
    if len(shape) > 8 or math.prod(shape) * dtype.itemsize != len(raw):
        raise ValueError(f"initializer {name} has shape {shape} but {len(raw)} bytes")
    if not len(raw):
        return torch.empty(shape, dtype=dtype, device="cpu")
    # A copy: the file is mapped for reading alone, and a weight must be one that can be trained.
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)
