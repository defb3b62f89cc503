"""Values between layers: dtypes that meet, whole numbers, and what goes into nested models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import pytest
import torch
from keras import layers
from small_vgg import assert_close
from torch import nn

from vggtorch.lowering import accelerate_, optimize_for_inference, to_torch
from vggtorch.lowering.layer_modules import KerasLayer


@pytest.fixture(autouse=True)
def group_bytes() -> None:
    """No need to run each test twice, as conftest.py does."""


def image(dtype: str) -> Any:
    return keras.Input((6, 5, 3), dtype=dtype)


def check(model: keras.Model, *values: torch.Tensor, tolerance: float = 1e-6) -> None:
    """The network, the engine and the accelerated model give what the model gives."""
    with torch.no_grad():
        given: Any = list(values) if len(values) > 1 else values[0]
        expected = model(given, training=False)
        network, engine = to_torch(model).eval(), optimize_for_inference(model)
        found = [network(*values), engine(*values), accelerate_(model)(given, training=False)]
    for outputs in found:
        keras.tree.assert_same_structure(outputs, expected)
        keras.tree.map_structure(lambda a, b: assert_close(a, b, tolerance), outputs, expected)


NORMS = [layers.LayerNormalization, layers.GroupNormalization, layers.RMSNormalization]
NARROW = "float16", "bfloat16"


@pytest.mark.parametrize("policy", ["float32", "float64", "bfloat16", "mixed_float16"])
@pytest.mark.parametrize("given", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("norm", NORMS)
def test_norms_of_one_dtype_behind_another(norm: Any, given: str, policy: str) -> None:
    groups = {"groups": 3} if norm is layers.GroupNormalization else {}
    model = keras.Model(x := image(given), norm(**groups, dtype=policy)(x))
    narrow = given in NARROW or policy not in ("float32", "float64")
    check(
        model, torch.randn(2, 6, 5, 3).to(getattr(torch, given)), tolerance=1e-2 if narrow else 1e-6
    )


WHOLE: dict[str, Callable[[Any], Any]] = {
    "BatchNormalization": layers.BatchNormalization(),
    "LayerNormalization": layers.LayerNormalization(),
    "Dense": layers.Dense(2),
    "Flatten, Dense": lambda x: layers.Dense(2)(layers.Flatten()(x)),
    "GlobalAveragePooling2D": layers.GlobalAveragePooling2D(),
    "MaxPooling2D": layers.MaxPooling2D(2),
    "ZeroPadding2D": layers.ZeroPadding2D(1),
    "ReLU": layers.ReLU(),
    "Dropout": layers.Dropout(0.5),
    "UpSampling2D": layers.UpSampling2D(2),
    "Rescaling, Conv2D": lambda x: layers.Conv2D(2, 3)(layers.Rescaling(1 / 255)(x)),
    "Normalization": layers.Normalization(mean=[120.0, 110.5, 90.0], variance=[9.5, 1.0, 4.0]),
}


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
@pytest.mark.parametrize("build", WHOLE.values(), ids=WHOLE)
def test_whole_numbers(build: Callable[[Any], Any], dtype: str) -> None:
    x = torch.randint(0, 255, (2, 6, 5, 3)).to(getattr(torch, dtype))
    check(keras.Model(i := image(dtype), build(i)), x)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64"])
def test_an_embedding_takes_numbers_of_any_dtype(dtype: str) -> None:
    """`keras.Input((5,))` is float32, which a newcomer leaves so."""
    tokens = keras.Input((5,), dtype=dtype)
    x = torch.randint(0, 9, (2, 5)).to(getattr(torch, dtype))
    check(keras.Model(tokens, layers.Embedding(9, 3)(tokens)), x)


@pytest.mark.parametrize("policy", ["float64", "bfloat16", "mixed_bfloat16", "mixed_float16"])
def test_a_nested_model_casts_what_it_gets(policy: str) -> None:
    """A Sequential's input has its first layer's dtype, another model's what it was built with."""
    x, outer = torch.randn(2, 6, 5, 3), image("float32")
    inner = keras.Sequential([layers.Conv2D(4, 1, dtype=policy), layers.ReLU(dtype=policy)])
    check(keras.Model(outer, inner(outer)), x, tolerance=1e-2)
    wide = image("float32")
    inner = keras.Model(wide, [3.14159 * wide, layers.Conv2D(4, 1)(wide)])
    before = layers.Conv2D(3, 1, dtype=policy)
    check(keras.Model(outer, inner(before(outer))), x, tolerance=1e-2)
    whole = keras.Input((6, 5, 3), dtype="uint8")
    inner = keras.Sequential([layers.Conv2D(4, 1, dtype=policy)])
    check(keras.Model(whole, inner(whole)), x.to(torch.uint8), tolerance=1e-2)


def two_inputs() -> tuple[Any, Any]:
    return keras.Input((4,), name="z"), keras.Input((4,), name="a")


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("call", [
    lambda p, q: [p, q],
    lambda p, q: {"z": p, "a": q},
    lambda p, q: {"a": p, "z": q},
])  # fmt: skip
def test_nested_models_of_several_inputs(named: bool, call: Callable[[Any, Any], Any]) -> None:
    z, a = two_inputs()
    p, q = keras.Input((4,), name="p"), keras.Input((4,), name="q")
    inner = keras.Model({"z": z, "a": a} if named else [z, a], z - 2.0 * layers.Dense(4)(a))
    if named and isinstance(call(p, q), list):
        pytest.skip("Keras refuses it")
    model = keras.Model([p, q], inner(call(p, q)))
    check(model, torch.randn(2, 4), torch.randn(2, 4))
    if named is not isinstance(call(p, q), list):  # called as it was built
        kinds = [type(m) for m in to_torch(model).modules()]
        assert nn.Linear in kinds and KerasLayer not in kinds


OUTPUTS: dict[str, tuple[Any, Any]] = {
    "a list of one": (lambda x: [2.0 * x], lambda y: [y[0] + 1.0]),  # a call gives the tensor
    "a dict of one": (lambda x: {"b": 2.0 * x}, lambda y: y["b"] + 1.0),
    "a dict": (lambda x: {"b": 2.0 * x, "a": -x}, lambda y: y["a"] - y["b"]),
    "both": (lambda x: [x + 1.0, {"b": 2.0 * x, "a": -x}], lambda y: [y[1]["b"] - 1.0, y[0]]),
}


@pytest.mark.parametrize("inside, behind", OUTPUTS.values(), ids=OUTPUTS)
def test_nested_models_of_named_outputs(inside: Any, behind: Any) -> None:
    x, outer = keras.Input((4,)), keras.Input((4,))
    model = keras.Model(outer, behind(keras.Model(x, inside(x))(outer)))
    check(model, torch.randn(2, 4))
    assert not any(isinstance(m, KerasLayer) for m in to_torch(model).modules())


def test_a_nested_model_of_another_number_of_axes() -> None:
    """Keras takes the last axis away, which has one number."""
    x, outer = keras.Input((4,)), keras.Input((4, 1))
    check(keras.Model(outer, keras.Model(x, layers.Dense(2)(x))(outer)), torch.randn(2, 4, 1))
