"""The operations of our own against torch's: values, gradients, gradients of gradients, memory."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_vgg import on_keras
from torch import Tensor, nn

import vggtorch  # noqa: F401  # isort: skip  (first: it selects Keras's torch backend)
import keras
from keras import layers

from vggtorch.lowering import OnKeras, kernels
from vggtorch.lowering.fused import TrainedLinear
from vggtorch.lowering.kernels import Convolution, MaxPoolReLU, Product, ReusedMemory

ONE: Any = (1, 1), (1, 1), (1, 1), 1  # stride, padding, dilation and groups


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return Product.apply(x, weight, bias, ReusedMemory())


def same_to_the_second_order(ours: Any, torchs: Any, inputs: list[Tensor]) -> None:
    """Values, strides, gradients and gradients of gradients."""
    found = []
    for run in (ours, torchs):
        y = run(*inputs)
        grads = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        penalty = torch.stack([g.square().sum() for g in grads]).sum()
        once = torch.autograd.grad(run(*inputs).square().sum(), inputs)
        found.append([y, *grads, *once, *torch.autograd.grad(penalty, inputs)])
    for actual, expected in zip(*found, strict=True):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert actual.stride() == expected.stride()


@pytest.mark.parametrize("size", [(2, 8, 1, 1), (2, 1, 3, 3), (1, 8, 1, 3), (2, 8, 3, 3)])
@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_map_of_one_pixel_or_channel_is_added_too(size: Any, activation: str) -> None:
    """Which torch 2.11's operation for it refuses."""
    if not kernels.has_fused_ops(torch.zeros(1), torch.float32):
        pytest.skip("no kernels of oneDNN here")
    other = torch.randn(size).to(memory_format=torch.channels_last)
    x = torch.randn(size[0], 6, *size[2:]).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(size[1], 6, 1, 1), torch.randn(size[1])
    expected = F.conv2d(x, weight, bias) + other
    expected = expected if activation == "none" else expected.relu()
    options = (1, 1), (0, 0), (1, 1), 1
    for kernel in (weight, kernels.prepared_weight(weight, x.shape, *options)):
        found = kernels.conv2d(x, kernel, bias, *options, activation, other)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("large", [0, kernels.LARGE_BYTES])
def test_product_has_torchs_gradients(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LARGE_BYTES", large)
    monkeypatch.setattr(kernels, "PIECE_BYTES", 3 * 20 * 4)  # three rows of seven
    x = torch.randn(5, 20, requires_grad=True)
    weight = torch.randn(7, 20, requires_grad=True)
    bias = torch.randn(7, requires_grad=True)
    same_to_the_second_order(product, F.linear, [x, weight, bias])
    same_to_the_second_order(lambda x, weight: product(x, weight, None), F.linear, [x, weight])


@pytest.mark.parametrize(
    "stride,padding,dilation,groups", [(1, 1, 1, 1), (2, 0, 1, 2), (1, 2, 2, 1)]
)
def test_convolution_has_torchs_gradients(
    stride: int, padding: int, dilation: int, groups: int
) -> None:
    options: Any = (stride,) * 2, (padding,) * 2, (dilation,) * 2, groups
    x = torch.randn(2, 4, 9, 8).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(6, 4 // groups, 3, 3).to(memory_format=torch.channels_last)
    inputs = [x, weight.requires_grad_(), torch.randn(6, requires_grad=True)]
    same_to_the_second_order(
        lambda *inputs: Convolution.apply(*inputs, *options),
        lambda *inputs: F.conv2d(*inputs, *options),
        inputs,
    )


def test_convolution_computes_only_gradients_that_are_asked_for() -> None:
    x, weight, bias = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4)
    for asked in (x, weight, bias):
        asked.requires_grad_()
        Convolution.apply(x, weight, bias, *ONE).sum().backward()
        given = asked.grad
        asked.grad = None
        F.conv2d(x, weight, bias, padding=1).sum().backward()
        torch.testing.assert_close(given, asked.grad)
        asked.requires_grad_(False)


@pytest.mark.parametrize("size,stride,padding", [(2, 2, 0), (3, 2, 1), (3, 1, 0)])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_max_pool_before_relu_has_torchs_gradients(
    size: int, stride: int, padding: int, layout: torch.memory_format
) -> None:
    options: Any = (size,) * 2, (stride,) * 2, (padding,) * 2
    x = torch.randn(2, 4, 9, 8).round(decimals=1)  # with equal maxima
    x = x.contiguous(memory_format=layout).requires_grad_()
    same_to_the_second_order(
        lambda x: MaxPoolReLU.apply(x, *options)[0],
        lambda x: F.max_pool2d(F.relu(x), *options),
        [x],
    )


def test_memory_is_lent_to_one_tensor_at_a_time() -> None:
    memory = ReusedMemory()
    first = memory.lend((3, 4), torch.float32)
    assert first is not None and (first.shape, first.dtype) == ((3, 4), torch.float32)
    address, row = first.data_ptr(), first.t()[0]
    assert memory.lend((3, 4), torch.float32) is None
    del first
    assert memory.lend((3, 4), torch.float32) is None  # a view has it
    numbers = row.numpy()
    del row
    assert memory.lend((3, 4), torch.float32) is None
    del numbers
    again = memory.lend((4, 6), torch.bfloat16)  # as many bytes
    assert again is not None and again.data_ptr() == address
    larger = memory.lend((5, 6), torch.float32)
    assert larger is not None and larger.data_ptr() != address
    for twin in (copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        other = twin.lend((5, 6), torch.float32)
        assert other is not None and other.data_ptr() != larger.data_ptr()


def dense(dtype: str = "float32") -> tuple[OnKeras, nn.Parameter, Tensor]:
    """Small whole numbers, so that float32 is exact in whatever order it adds them."""
    keras.utils.set_random_seed(0)
    image = keras.Input((40,))
    model = keras.Model(image, layers.Dense(30, name="fc", dtype=dtype)(image))
    kernel = model.get_layer("fc").kernel.value
    with torch.no_grad():
        kernel.mul_(10).round_()
    return on_keras(model).train(), kernel, torch.randint(-3, 4, (6, 40)).float()


def gradient(lowered: OnKeras, kernel: nn.Parameter, x: Tensor) -> Tensor:
    lowered(x).float().square().sum().backward()
    assert isinstance(kernel.grad, Tensor)
    return kernel.grad


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_large_gradients_take_the_same_memory_in_each_step(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered, kernel, x = dense(dtype)
    expected = gradient(lowered, kernel, x).clone()
    monkeypatch.setattr(kernels, "LARGE_BYTES", 0)
    lent: list[int | None] = []
    lend = ReusedMemory.lend

    def spy(self: ReusedMemory, *args: Any) -> Tensor | None:
        tensor = lend(self, *args)
        lent.append(None if tensor is None else tensor.data_ptr())
        return tensor

    monkeypatch.setattr(ReusedMemory, "lend", spy)
    for _ in range(3):
        kernel.grad = None
        found = gradient(lowered, kernel, x)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        if dtype == "float32":
            assert found.data_ptr() == lent[0]  # not a copy of it
        del found
    assert len(lent) == 3 and len(set(lent)) == 1


def test_a_gradient_that_is_kept_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LARGE_BYTES", 0)
    lowered, kernel, x = dense()
    kept = gradient(lowered, kernel, x)
    values = kept.clone()
    gradient(lowered, kernel, 2 * x)  # added
    kernel.grad = None
    gradient(lowered, kernel, 3 * x)
    assert torch.equal(kept, values + values_of(2 * x))
    assert kernel.grad is not None and torch.equal(kernel.grad, values_of(3 * x))


def values_of(x: Tensor) -> Tensor:
    """The gradient by the Keras model itself."""
    lowered, kernel, _ = dense()
    with torch.backends.mkldnn.flags(enabled=False):
        return gradient(lowered, kernel, x)


def test_evaluation_lets_go_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LARGE_BYTES", 0)
    module, kernel, x = dense()
    gradient(module, kernel, x)
    plan = module.network._plan
    assert plan is not None
    (step,) = (run for run in plan.ways.fused.values() if isinstance(run, TrainedLinear))
    assert step.gradients.memory is not None
    with torch.no_grad():
        module.eval()(x)
    assert step.gradients.memory is None
    assert kernel.grad is not None and kernel.grad.any()


def test_gradients_under_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Jacobian's rows at once, and gradients image by image."""
    monkeypatch.setattr(kernels, "LARGE_BYTES", 0)
    memory, weight = ReusedMemory(), torch.randn(7, 20, requires_grad=True)
    x = torch.randn(5, 20)
    y = Product.apply(x, weight, None, memory)
    rows = torch.randn(3, 5, 7)
    (batch,) = torch.autograd.grad(y, weight, rows, is_grads_batched=True)
    torch.testing.assert_close(batch, rows.mT @ x)

    def loss(weight: Tensor, image: Tensor) -> Tensor:
        return Product.apply(image.unsqueeze(0), weight, None, memory).sum()

    pooled = MaxPoolReLU.apply(image := torch.randn(2, 3, 4, 4).requires_grad_(), 2, 2, 0)[0]
    rows = torch.randn(5, *pooled.shape)
    (batch,) = torch.autograd.grad(pooled, image, rows, True, is_grads_batched=True)
    torch.testing.assert_close(
        batch, torch.stack([torch.autograd.grad(pooled, image, row, True)[0] for row in rows])
    )

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight.detach(), x)
    torch.testing.assert_close(each, x.unsqueeze(1).expand(5, 7, 20))
