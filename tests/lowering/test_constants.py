"""What is made from parameters is made anew when one of them changes, in whatever way."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
from keras import layers

from vggtorch.lowering.constants import ROW, ROWS, AllParameters, ParameterCache, Snapshot

LARGE = 2 * ROW * ROWS  # so many numbers of four bytes are read as sums

TENSORS: dict[str, Callable[[], Tensor]] = {
    "small": lambda: torch.randn(7, 3, 3, 3),
    "three bytes' worth": lambda: torch.randn(3).bfloat16(),
    "none": lambda: torch.randn(0),
    "one": lambda: torch.randn(()),
    "double": lambda: torch.randn(5).double(),
    "whole numbers": lambda: torch.arange(5),
    "large": lambda: torch.randn(64, 128, 3, 3),
    "just large": lambda: torch.randn(LARGE),
    "nearly large": lambda: torch.randn(LARGE - 1),
    "large, in half": lambda: torch.randn(128, 128, 3, 3).bfloat16(),
    "large, channels last": lambda: torch.randn(64, 128, 3, 3).to(
        memory_format=torch.channels_last
    ),
    "large, begins within eight bytes": lambda: torch.randn(LARGE + 10)[1:],
    "transposed": lambda: torch.randn(300, 300).t(),
    "with gaps": lambda: torch.randn(300, 600)[:, ::2],
    "large, negated": lambda: torch._neg_view(torch.randn(300, 300)),
    "not a number": lambda: torch.full((300, 300), torch.nan),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_snapshot_tells_every_change_of_one_number(name: str) -> None:
    tensor = TENSORS[name]()
    others = [torch.randn(5), tensor, torch.randn(LARGE)]
    snapshot = Snapshot(others)
    assert snapshot.is_same(others)
    for place in {0, tensor.numel() // 2, tensor.numel() - 1} if tensor.numel() else ():
        at = torch.unravel_index(torch.tensor(place), tensor.shape)
        before = tensor[at].clone()
        if tensor.is_floating_point() and before == before:
            tensor.data[at] = torch.nextafter(before, before + 1)
        else:
            tensor.data[at] = 1_000
        assert not snapshot.is_same(others)
        tensor.data[at] = before
        assert snapshot.is_same(others) or before != before  # there are many NaN


@pytest.mark.parametrize("channels", [64, 96, 128, 512])
def test_a_snapshot_tells_changes_of_place_and_sign(channels: int) -> None:
    kernel = torch.randn(channels, channels, 3, 3)
    snapshot = Snapshot([kernel])
    edits: list[Callable[[Tensor], Tensor]] = [
        lambda k: k.roll(1, 0),
        lambda k: k.roll(1, 1),
        lambda k: k.roll(channels // 2, 0),
        lambda k: k.flip(0),
        lambda k: k.flip(2, 3),
        lambda k: k.transpose(0, 1),
        lambda k: k.transpose(2, 3),
        lambda k: -k,
        lambda k: 2 * k,
        # Here the end of the memory, which is compared number by number, stays what it was.
        lambda k: torch.cat([k[:2].flip(0), k[2:]]),
        lambda k: torch.cat([k[: channels // 2].flip(0), k[channels // 2 :]]),
        lambda k: torch.cat([k[:1].roll(2, 1), k[1:]]),
        lambda k: torch.cat([k[:1].flip(2, 3), k[1:]]),
    ]
    for edit in edits:
        before = kernel.clone()
        kernel.data.copy_(edit(before))
        assert not snapshot.is_same([kernel])
        kernel.data.copy_(before)
        assert snapshot.is_same([kernel])
    kernel[0] = 0.0  # not by `.data`
    kernel.data.copy_(before)
    assert not snapshot.is_same([kernel])


def test_a_snapshot_is_of_these_very_tensors() -> None:
    tensor = torch.randn(5)
    snapshot = Snapshot([tensor])
    assert not snapshot.is_same([tensor.clone()])
    assert not snapshot.is_same([tensor, tensor])
    tensor.data = tensor.data.clone()
    assert not snapshot.is_same([tensor])


def test_only_what_was_looked_at_since_the_last_change_is_taken_for_granted() -> None:
    a, b = torch.zeros(1), torch.zeros(1)
    made = []

    def cache_of(tensor: Tensor) -> ParameterCache:
        def make() -> float:
            made.append(float(tensor))
            return made[-1]

        return ParameterCache(make, lambda: [tensor])

    caches = [cache_of(a), cache_of(b)]
    assert [cache(None) for cache in caches] == [0, 0]
    a.data.fill_(-1)
    assert [cache(None) for cache in caches] == [-1, 0]
    made.clear()
    a.data.fill_(0)
    together = AllParameters(caches, at_once=True)
    together.look()
    assert [cache(None) for cache in caches] == [0, 0]
    a.data.fill_(1)
    b.data.fill_(1)
    together.look()
    assert caches[0](None) == 1
    together.look()  # nothing has changed, but the second cache hasn't looked
    assert [cache(None) for cache in caches] == [1, 1]
    together.look()
    assert [cache(None) for cache in caches] == [1, 1]
    assert caches[0]("other settings") == 1
    assert made == [0, 1, 1, 1]


def in_a_thread(run: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def test_threads_get_what_is_made_for_their_own_settings() -> None:
    """Another thread asks while the first is making, with the same settings or others."""
    tensor, found = torch.zeros(1), list[str]()

    def make(settings: str) -> str:
        if not found:
            found.append("")
            found[:] = [in_a_thread(partial(cache, s, s)) for s in ("a", "b")]
        return settings

    cache = ParameterCache(make, lambda: [tensor])
    assert cache("a", "a") == "a"
    assert found == ["a", "b"]
    assert [cache(s, s) for s in "aba"] == ["a", "b", "a"]


class Asks(nn.Module):
    """Lets another thread call the network that it stands in, under autocast."""

    network: Any = None

    def forward(self, x: Tensor) -> Tensor:
        network, self.network = self.network, None
        if network is not None:

            def ask() -> Tensor:
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                    return network(torch.zeros(2, 6, 6, 2))

            assert in_a_thread(ask).dtype == torch.bfloat16
        return x


def test_another_threads_autocast_is_its_own() -> None:
    chain = [layers.Activation("linear", name="asks"), layers.Conv2D(4, 3)]
    model = keras.Sequential([keras.Input((6, 6, 2)), *chain])
    network = vt.to_torch(model)
    network.asks = asks = Asks()
    images = torch.randn(2, 6, 6, 2)
    with torch.no_grad():
        expected = network.eval()(images)
        object.__setattr__(asks, "network", network)  # no child of itself
        found = network(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Writes(nn.Module):
    """Writes to a layer that comes after it, where no version shows it."""

    def __init__(self, where: list[nn.Conv2d]) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.where:
            conv.weight.data.add_(1.0)
        return x


def test_what_a_module_in_the_network_writes_counts_at_once() -> None:
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(3, 3, name="before")(inputs)
    x = layers.Activation("linear", name="between")(x)
    model = keras.Model(inputs, layers.Conv2D(4, 3, name="after")(x))
    network = vt.to_torch(model, share=False)
    network.between = Writes([])
    network.eval()
    images = torch.randn(2, 6, 6, 2)
    with torch.no_grad():
        network(images)
        network.between.where.append(network.after)
        for _ in range(3):
            maps = network.before(images.permute(0, 3, 1, 2))
            weight = network.after.weight + 1.0
            expected = torch.conv2d(maps, weight, network.after.bias).permute(0, 2, 3, 1)
            torch.testing.assert_close(network(images), expected)
