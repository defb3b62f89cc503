"""Maps that a network gives out, or hands to modules of the user's, lie in memory as torch's do.

They may be viewed in other shapes, and written to before backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import pytest
import torch
from keras import layers
from small_vgg import randomise
from torch import nn

from vggtorch.lowering import to_torch


class Flat(nn.Module):
    """What only takes maps that lie in memory in the order of their axes."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(len(x), -1).view_as(x)


WRITERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nothing": lambda y: y,
    "relu_": torch.relu_,
    "mul_": lambda y: y.mul_(3),
    "silu in place": lambda y: nn.functional.silu(y, inplace=True),
    "a view": lambda y: y.view(len(y), -1),
    "a part set": lambda y: y[:, 0].zero_().sum() + y.sum(),
    "a view scaled": lambda y: y.view(-1).mul_(3),
}
# What takes the place of an activation behind a pool.
BEHIND: dict[str, Callable[[], nn.Module]] = {
    "view": Flat,
    "silu": lambda: nn.SiLU(inplace=True),
    "dropout": lambda: nn.Dropout(0.0, inplace=True),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("write", "behind"),
    [*((write, nn.Identity) for write in WRITERS.values())]
    + [(torch.relu_, behind) for behind in BEHIND.values()],
    ids=[*WRITERS, *BEHIND],
)
def test_maps_may_be_viewed_and_written_to(
    write: Callable[[torch.Tensor], torch.Tensor],
    behind: Callable[[], nn.Module],
    layout: torch.memory_format,
) -> None:
    """Those that come out, and those that a module in the place of one gets, as torch's own."""
    image = keras.Input((16, 16, 3))
    z = layers.MaxPooling2D(name="pool")(layers.Conv2D(4, 3, activation="relu", name="a")(image))
    z = layers.Conv2D(4, 3, activation="relu", name="b")(layers.Activation("tanh", name="t")(z))
    made = randomise(keras.Model(image, layers.MaxPooling2D(name="last")(z)))
    ours = to_torch(made, data_format="channels_first")
    ours.t = behind()
    hand = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), behind(), nn.Conv2d(4, 4, 3), nn.ReLU(),
        nn.MaxPool2d(2),
    )  # fmt: skip
    hand[0].load_state_dict(ours.a.state_dict())
    hand[4].load_state_dict(ours.b.state_dict())
    x = torch.randn(4, 3, 16, 16).contiguous(memory_format=layout)
    for training in (False, True):
        found = []
        for network in (ours.train(training), hand.train(training)):
            network.zero_grad()
            try:
                y = network(x)
                strides, kept = y.stride(), write(y)
                kept.square().sum().backward()
                found.append([y, kept, *(p.grad for p in network.parameters())])
                found[-1].append(torch.tensor(strides))
            except RuntimeError as error:  # a map in another order has no such views
                assert "view size" in str(error)
                found.append([])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("write", [torch.relu_, lambda y: y.mul_(3)], ids=["relu_", "mul_"])
def test_an_activation_of_the_users_may_write_to_what_it_gets(
    write: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    image = keras.Input((8, 8, 3))
    pooled = layers.MaxPooling2D()(layers.Conv2D(4, 3, activation="relu", name="a")(image))
    written = layers.GlobalAveragePooling2D()(layers.Activation(write)(pooled))
    network: Any = to_torch(keras.Model(image, written))
    x = torch.randn(2, 8, 8, 3)
    found = network(x)
    expected = write(nn.functional.max_pool2d(network.a(x.permute(0, 3, 1, 2)).relu(), 2))
    weight = network.a.weight
    expected = expected.mean((2, 3))
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        *(torch.autograd.grad(y.square().sum(), weight) for y in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_relu_of_a_view_leaves_the_images_as_they_were() -> None:
    image = keras.Input((4, 4, 3))
    network = to_torch(keras.Model(image, layers.ReLU()(layers.Flatten()(image)))).eval()
    x = torch.randn(2, 4, 4, 3)
    before = x.clone()
    with torch.no_grad():
        torch.testing.assert_close(network(x), x.relu().flatten(1))
    assert torch.equal(x, before)


def test_a_pool_of_what_may_be_negative_takes_the_largest() -> None:
    image = keras.Input((9, 8, 3))
    convolved = layers.Conv2D(4, 1, bias_initializer=keras.initializers.Constant(-9))(image)
    model = keras.Model(image, layers.MaxPooling2D()(convolved))
    x = torch.rand(2, 9, 8, 3)
    with torch.no_grad():
        torch.testing.assert_close(to_torch(model).eval()(x), model(x, training=False))
