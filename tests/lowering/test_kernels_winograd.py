"""Winograd's convolution: what it computes, and where it is taken."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from vggtorch.lowering import winograd


@pytest.mark.parametrize("dtype, error", [(torch.float32, 4e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("chunk_bytes", [8 << 20, 1])
@pytest.mark.parametrize(
    "shape, padding",
    [((3, 24, 16, 16), 1), ((2, 16, 7, 5), 1), ((1, 8, 3, 3), 0), ((2, 8, 13, 18), 0)],
)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_winograds_convolution_is_the_convolution(
    dtype: torch.dtype, error: float, chunk_bytes: int, shape: tuple[int, ...], padding: int,
    activation: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """For whole images and rows of tiles at a time, sizes that tiles don't fill, any bias."""
    monkeypatch.setattr(winograd, "CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype, memory_format=torch.channels_last)
    weight, bias = torch.randn(12, shape[1], 3, 3).to(dtype), torch.randn(12).to(dtype)
    for given in (bias, None):
        convolution = winograd.WinogradConv2d(activation, weight, given)
        found = convolution(x, (padding, padding), winograd.Workspace())
        expected = torch.nn.functional.conv2d(
            x.double(), weight.double(), None if given is None else given.double(), padding=padding
        )
        if activation != "none":
            expected = expected.clamp(0, 6 if activation == "relu6" else None)
        assert found.shape == expected.shape
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert (found - expected).norm() <= error * expected.norm()


def test_winograd_is_taken_where_it_pays_and_nowhere_else() -> None:
    conv = torch.nn.Conv2d(256, 256, 3, padding=1)
    large, small = torch.zeros(1, 256, 56, 56), torch.zeros(1, 256, 8, 8)
    assert winograd.pays(conv, large) and winograd.pays(conv, large.bfloat16())
    assert not winograd.pays(conv, small)
    assert not winograd.pays(conv, large.double())
    for other in (
        {"kernel_size": 5}, {"stride": 2}, {"dilation": 2}, {"groups": 2}, {"kernel_size": (3, 1)},
    ):  # fmt: skip
        options: dict[str, Any] = {"kernel_size": 3, "padding": 1, **other}
        assert not winograd.pays(torch.nn.Conv2d(256, 256, **options), large)
    assert not winograd.pays(torch.nn.Conv2d(64, 64, 3), torch.zeros(1, 64, 224, 224))


CASES = [((3, 24, 16, 16), 1), ((2, 16, 7, 5), 1), ((1, 8, 3, 3), 0), ((2, 8, 6, 9), (3, 2))]


def learns(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, padding: Any) -> Any:
    """Output, and gradients of all three for one of the output, Winograd's way."""
    padding = padding if isinstance(padding, tuple) else (padding, padding)
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = winograd.WinogradConvolution.apply(*inputs, padding, winograd.Workspace(), True)
    return y, inputs, torch.autograd.grad(y, inputs, y.detach().cos(), retain_graph=True)


@pytest.mark.parametrize("dtype, error", [(torch.float32, 4e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("chunk_bytes", [8 << 20, 1])
@pytest.mark.parametrize("shape, padding", CASES)
def test_its_gradients_are_the_convolutions(
    dtype: torch.dtype, error: float, chunk_bytes: int, shape: tuple[int, ...], padding: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(winograd, "CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype, memory_format=torch.channels_last)
    weight, bias = torch.randn(12, shape[1], 3, 3).to(dtype), torch.randn(12).to(dtype)
    y, _, found = learns(x, weight, bias, padding)
    exact: Any = [t.double().requires_grad_() for t in (x, weight, bias)]
    conv2d: Any = torch.nn.functional.conv2d
    z = conv2d(*exact, padding=padding)
    expected = torch.autograd.grad(z, exact, y.detach().cos().double())
    for actual, value in zip((y, *found), (z, *expected), strict=True):
        assert actual.shape == value.shape and actual.dtype == dtype
        assert (actual - value).norm() <= error * value.norm()


@pytest.mark.parametrize("images", [True, False])
def test_gradients_of_its_gradients_are_the_convolutions(images: bool) -> None:
    torch.manual_seed(0)
    inputs = [t.requires_grad_() for t in (torch.randn(2, 4, 6, 6), torch.randn(3, 4, 3, 3))]
    bias, workspace = torch.randn(3, requires_grad=True), winograd.Workspace()

    def second(convolve: Any) -> Any:
        first = torch.autograd.grad(convolve().sin().sum(), inputs, create_graph=True)
        squares = torch.stack([g.square().sum() for g in first])
        return torch.autograd.grad(squares.sum(), [*inputs, bias])

    apply = winograd.WinogradConvolution.apply
    found = second(lambda: apply(*inputs, bias, (1, 1), workspace, images))
    conv2d: Any = torch.nn.functional.conv2d
    expected = second(lambda: conv2d(*inputs, bias, padding=1))
    for actual, value in zip(found, expected, strict=True):
        assert (actual - value).norm() <= 1e-4 * value.norm()


def test_one_of_many_gradients_at_once() -> None:
    y, inputs, _ = learns(torch.randn(1, 4, 6, 6), torch.randn(3, 4, 3, 3), torch.randn(3), 1)
    many = torch.randn(5, *y.shape)
    found = torch.autograd.grad(y, inputs, many, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(many):
        expected = torch.autograd.grad(y, inputs, grad, retain_graph=True)
        torch.testing.assert_close([f[i] for f in found], list(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 3e37])
@pytest.mark.parametrize("where", ["image", "weight", "gradient"])
def test_what_is_not_finite_is_what_torch_makes_of_it(number: float, where: str) -> None:
    torch.manual_seed(0)
    values = {"image": torch.randn(2, 4, 9, 9), "weight": torch.randn(3, 4, 3, 3),
              "gradient": torch.randn(2, 3, 9, 9)}  # fmt: skip
    values[where][0, 1, 1, 1] = number
    bias = torch.zeros(3)

    def outputs(convolve: Any) -> list[torch.Tensor]:
        inputs: list[Any] = [
            v.clone().requires_grad_() for v in (values["image"], values["weight"], bias)
        ]
        y = convolve(*inputs)
        return [y, *torch.autograd.grad(y, inputs, values["gradient"])]

    workspace = winograd.Workspace()
    found = outputs(
        lambda *inputs: winograd.WinogradConvolution.apply(*inputs, (1, 1), workspace, True)
    )
    conv2d: Any = torch.nn.functional.conv2d
    expected = outputs(lambda *inputs: conv2d(*inputs, padding=1))
    for actual, value in zip(found, expected, strict=True):
        value = value.detach()
        # A tile's numbers are added up, so that the largest decides how exact the others are.
        largest = float(value.nan_to_num(0, 0, 0).abs().max())
        torch.testing.assert_close(actual, value, rtol=0, atol=1e-5 * largest, equal_nan=True)


def test_a_gradient_pays_sooner_than_images_do() -> None:
    conv = torch.nn.Conv2d(128, 128, 3, padding=1)
    x = torch.zeros(8, 128, 112, 112)
    assert winograd.gradient_pays(conv, x) and not winograd.pays(conv, x)
    assert not winograd.gradient_pays(torch.nn.Conv2d(64, 64, 3, padding=1), x[:, :64])


def test_each_thread_has_a_workspace_of_its_own() -> None:
    workspace, found = winograd.Workspace(), []
    mine = workspace.take("a", (4,), torch.float32)
    thread = threading.Thread(target=lambda: found.append(workspace.take("a", (4,), torch.float32)))
    thread.start()
    thread.join()
    assert found[0].data_ptr() != mine.data_ptr()
    assert workspace.take("a", (2,), torch.float32).data_ptr() == mine.data_ptr()


def test_memory_taken_in_inference_mode_may_be_written_to_outside() -> None:
    workspace = winograd.Workspace()
    with torch.inference_mode():
        workspace.take("a", (4,), torch.float32).zero_()
    assert workspace.take("a", (4,), torch.float32).fill_(1.0).sum() == 4
