"""Winograd's convolution: what it computes, and where it is taken."""

from __future__ import annotations

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
        convolution = winograd.WinogradConv2d(weight, given, activation)
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
