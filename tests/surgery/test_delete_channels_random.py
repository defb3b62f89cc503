"""Random channels out of random networks: whatever is deleted, the rest computes the same."""

from __future__ import annotations

import random

import keras
import pytest
import torch
from contract import same_snapshot, snapshot
from keras import layers as kl
from poison import check_deletion

from vggtorch.keras_graph import raw_value
from vggtorch.surgery import deletable_channels, delete_channels

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


class Builder:
    """Draws a network of maps of 6x6, with branches, sharing and nested models."""

    def __init__(self, rng):
        self.rng, self.names = rng, iter(range(1000))
        self.made = []  # layers that may be called again

    def draw(self, options):
        return self.rng.choice(options)

    def name(self, kind):
        return f"{kind}{next(self.names)}"

    def width(self):
        return self.rng.randint(2, 5)

    def step(self, tensors, depth):
        x = self.draw(tensors)
        channels = x.shape[-1]
        kind = self.draw(
            ["conv", "conv", "groups", "depth", "norm", "relu", "pool", "separable", "transposed"]
            + ["dense", "join", "join", "add", "gate", "concatenate", "softmax", "again"]
            + ["nested"] * (depth < 2)
        )
        same = {"padding": "same", "name": self.name(kind)}
        if kind == "conv":
            layer = kl.Conv2D(self.width(), 3, activation=self.draw(["relu", None, "gelu"]), **same)
        elif kind == "groups":
            groups = self.draw([g for g in (1, 2, 3) if channels % g == 0])
            layer = kl.Conv2D(2 * groups, 1, groups=groups, **same)
        elif kind == "depth":
            layer = kl.DepthwiseConv2D(3, depth_multiplier=self.draw([1, 1, 2]), **same)
        elif kind == "separable":
            layer = kl.SeparableConv2D(self.width(), 3, **same)
        elif kind == "transposed":
            layer = kl.Conv2DTranspose(self.width(), 3, **same)
        elif kind == "dense":
            layer = kl.Dense(self.width(), name=same["name"])
        elif kind == "norm":
            layer = kl.BatchNormalization(name=same["name"])
        elif kind == "relu":
            layer = self.draw([kl.ReLU, kl.PReLU])(name=same["name"])
        elif kind == "softmax":
            layer = self.draw([kl.Softmax, kl.LayerNormalization])(name=same["name"])
        elif kind == "pool":
            layer = kl.MaxPooling2D(2, strides=1, **same)
        elif kind == "again":
            fitting = [y for y in self.made if y.input.shape[-1] == channels]
            return self.draw(fitting)(x) if fitting else x * 2.0
        elif kind == "nested":
            inside = [keras.Input((6, 6, channels))]
            for _ in range(self.rng.randint(1, 4)):
                inside.append(self.step(inside, depth + 1))
            layer = keras.Model(inside[0], inside[-1], name=same["name"])
        else:
            return self.joined(kind, x, tensors, same["name"])
        y = layer(x)
        if depth == 0 and kind != "nested":
            self.made.append(layer)
        return y

    def joined(self, kind, x, tensors, name):
        if kind == "concatenate":
            return kl.Concatenate(name=name)([x, self.draw(tensors)])
        others = [t for t in tensors if t.shape[-1] == x.shape[-1] and t is not x]
        if kind == "gate" or not others:
            gate = kl.GlobalAveragePooling2D(keepdims=True, name=f"{name}_pool")(x)
            gate = kl.Dense(x.shape[-1], activation="sigmoid", name=f"{name}_gate")(gate)
            return kl.Multiply(name=name)([x, gate])
        if kind == "add":
            return x + self.draw(others)
        return self.draw([kl.Add, kl.Maximum, kl.Average])(name=name)([x, self.draw(others)])


def network(rng):
    builder = Builder(rng)
    tensors = [keras.Input((6, 6, 3), name="image")]
    for _ in range(rng.randint(4, 14)):
        tensors.append(builder.step(tensors, 0))
    last = kl.Flatten(name="flat")(tensors[-1])
    outputs = [kl.Dense(2, name="last")(last)]
    if rng.random() < 0.5:
        outputs.append(kl.GlobalMaxPooling2D(name="side")(builder.draw(tensors[1:])))
    model = keras.Model(tensors[0], outputs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for variable in model.trainable_variables:
            raw_value(variable).add_(0.2 * torch.randn(variable.shape, generator=generator))
    return model


@pytest.mark.parametrize("seed", range(40))
def test_random_channels_of_random_networks(seed):
    rng = random.Random(seed)
    model = network(rng)
    units = deletable_channels(model)
    if not units:
        with pytest.raises(ValueError, match="delete_channels can't delete channels"):
            delete_channels(model, model.layers[1].name, [0])
        return
    gone: dict[str, list[int]] = {}
    for unit in rng.sample(units, max(1, int(rng.choice([0.1, 0.3, 0.6]) * len(units)))):
        for name, numbers in unit.items():
            gone.setdefault(name, []).extend(numbers)
    before = snapshot(model)
    image = torch.randn(2, 6, 6, 3, generator=torch.Generator().manual_seed(1))
    try:
        result = delete_channels(model, gone)
    except ValueError as error:
        assert "groups" in str(error) or "without a channel" in str(error), error
    else:
        check_deletion(model, result, gone, image)
    same_snapshot(before, snapshot(model))
