"""Dtype policies, the dtype of lower, and autocast."""

from __future__ import annotations

from typing import Any

import keras
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from precision import needs_bfloat16
from small_vgg import assert_close, images, on_keras, small_vgg

import vggtorch as vt
from vggtorch.lowering import fused, kernels


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_dtype_policies(policy: str) -> None:
    model = small_vgg(dtype=policy)
    x = images(model)
    lowered = on_keras(model)
    expected = model(x, training=False).detach()
    assert_close(lowered.eval()(x).detach(), expected, 3e-2)
    with torch.no_grad():
        assert_close(lowered(x), expected, 3e-2)
    output = lowered.train()(x)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    for variable in model.trainable_variables:
        assert variable.value.grad.dtype == variable.value.dtype


def test_autocast_computes_as_the_mixed_policy_does() -> None:
    model, mixed = small_vgg(), small_vgg(dtype="mixed_bfloat16")
    mixed.set_weights(model.get_weights())
    x = images(model)
    module = on_keras(model).eval()
    expected = mixed(x, training=False).detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(module(x).detach().float(), expected, 3e-2)
        with torch.no_grad():
            assert_close(module(x).float(), expected, 3e-2)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_computes_in_bfloat16(frozen: bool) -> None:
    """Convolutions and products; from them on, everything that autocast leaves in bfloat16."""
    model = small_vgg()
    if frozen:
        model.get_layer("block1_conv1").trainable = False
    x = images(model)
    lowered = on_keras(model).train()
    seen: list[torch.dtype] = []
    norm: Any = lowered.network.block2_bn1
    hook = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        lowered(x)
        hook.remove()
        output = lowered(x)
        with torch.no_grad():
            fused = lowered.eval()(x)
    assert seen == [torch.bfloat16]
    output.float().square().sum().backward()
    twin = small_vgg()
    for _ in range(2):  # counted by batch norm
        expected = twin(x, training=True)
    expected.square().sum().backward()
    assert_close(output.detach().float(), expected.detach(), 5e-2)
    for name in ("block2_conv1", "fc1", "predictions"):
        grad = model.get_layer(name).kernel.value.grad
        assert grad.dtype == torch.float32
        exact = twin.get_layer(name).kernel.value.grad
        assert (grad - exact).norm() < 0.1 * exact.norm()
    assert_close(fused.float(), twin(x, training=False).detach(), 5e-2)
    assert lowered(x).dtype == torch.float32  # the next call is nobody's autocast
    with torch.no_grad():
        assert_close(lowered(x), model(x, training=False))


def test_a_large_batch_of_mixed_precision_is_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product computes small batches in its weight's own dtype, exactly, and large in bf16."""
    for many_rows in (1, 100):
        monkeypatch.setattr(fused, "MANY_ROWS", many_rows)
        keras.utils.set_random_seed(0)
        image = keras.Input((256,))
        model = keras.Model(image, keras.layers.Dense(32, name="fc")(image))
        module, fc = on_keras(model).train(), model.get_layer("fc")
        x = torch.randn(4, 256).bfloat16().float()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        exact = F.linear(x, fc.kernel.value.t(), fc.bias.value).bfloat16()
        assert torch.equal(y, exact) == (
            many_rows == 100 and kernels.has_fused_ops(x, torch.float32)
        )
        assert_close(y.detach(), exact.detach(), 2e-2)
        y.float().sum().backward()
        assert fc.kernel.value.grad.dtype == torch.float32


def test_reshapes_compute_in_the_policys_dtype_too() -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    image = keras.Input((16, 15, 3))
    x = keras.layers.Conv2D(4, 3)(keras.layers.Permute((2, 1, 3))(image))
    rows = keras.layers.Reshape((45, 16))(image)
    model = keras.Model(image, [keras.layers.Dense(3)(x), keras.layers.Conv1D(4, 3)(rows), rows])
    keras.config.set_dtype_policy("float32")
    inputs = images(model)
    for actual, expected in zip(on_keras(model)(inputs), model(inputs), strict=True):
        assert_close(actual.detach().float(), expected.detach().float(), 1e-2)
        assert actual.dtype == expected.dtype


@needs_bfloat16
@pytest.mark.parametrize(("rows", "inside"), [(4, torch.float32), (200, torch.bfloat16)])
def test_a_few_rows_of_inference_are_not_worth_a_cast_of_the_weight(
    rows: int, inside: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    product = kernels.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        used.append((x.dtype, weight.dtype))
        return product(x, weight, bias)

    monkeypatch.setattr(kernels, "linear", linear)
    inputs = keras.Input((64,))
    model = keras.Model(inputs, keras.layers.Dense(32, bias_initializer="normal")(inputs))
    x = torch.randn(rows, 64)
    module = on_keras(model).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert used == [(inside, inside)] and y.dtype == torch.bfloat16
    kernel, bias = (torch.as_tensor(w).to(inside) for w in model.get_weights())
    assert_close(y.float(), (x.to(inside) @ kernel + bias).float(), 1e-2)


def _pair(first: str, second: str) -> list[keras.KerasTensor]:
    return [keras.Input((8, 8, 3), dtype=dtype) for dtype in (first, second)]


@pytest.mark.parametrize("operation", [keras.ops.add, keras.ops.multiply, keras.ops.arctan2])
@pytest.mark.parametrize("head", ["none", "conv", "add", "operation", "nested"])
def test_an_operation_on_float64_computes_as_keras_does(operation: Any, head: str) -> None:
    inputs = _pair("float64", "float32")
    y = operation(*inputs)
    if head == "add":
        y = keras.layers.Add()([y, inputs[1]])
    elif head == "operation":
        y = keras.layers.Dense(2)(keras.ops.subtract(y, 0.5))
    elif head == "nested":
        image = keras.Input((8, 8, 3))
        y = keras.Model(image, keras.layers.Conv2D(2, 3)(image))(y)
    elif head == "conv":
        y = keras.layers.Conv2D(2, 3)(y)
    model = keras.Model(inputs, y)
    given = torch.rand(2, 8, 8, 3, dtype=torch.float64), torch.rand(2, 8, 8, 3)
    expected, found = model(given), vt.to_torch(model)(*given)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layer", [keras.layers.Flatten(), keras.layers.Reshape((-1,))])
@pytest.mark.parametrize(
    "operation", [lambda x: keras.ops.greater(x, 0.5), lambda x: keras.ops.argmax(x, 1)]
)
def test_what_an_operation_on_float64_gives_besides_floats_stays_what_it_is(
    operation: Any, layer: Any
) -> None:
    image = keras.Input((4, 3), dtype="float64")
    model = keras.Model(image, layer(operation(image)))
    x = torch.rand(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(vt.to_torch(model)(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "int32", "uint8"])
@pytest.mark.parametrize("reader", ["rescaling", "conv", "flatten", "operation", "pool", "nested"])
def test_what_enters_is_cast_to_its_inputs_dtype_as_keras_does(dtype: str, reader: str) -> None:
    image = keras.Input((8, 8, 3), dtype=dtype)
    calls = {
        "rescaling": keras.layers.Rescaling(0.5),
        "conv": lambda x: keras.layers.Conv2D(2, 3)(keras.layers.Rescaling(1.0)(x)),
        "flatten": keras.layers.Flatten(),
        "operation": lambda x: keras.ops.multiply(x, 2),
        "pool": keras.layers.MaxPooling2D(),
        "nested": keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Rescaling(0.5)]),
    }
    model = keras.Model(image, calls[reader](image))
    given = torch.rand(2, 8, 8, 3) * 100
    expected, found = model(given), vt.to_torch(model)(given)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
