"""Random small networks of many kinds, and images for them, for tests of whole ways through."""

from __future__ import annotations

import random
from typing import Any

import keras
import numpy as np
import torch
from keras import layers as kl

from vggtorch.keras_graph import all_layers, raw_value

POLICIES = ["float32", "float32", "float32", "float64", "mixed_bfloat16", "bfloat16"]
TAKEN = ["forward", "training", "weight", "children", "T", "half", "to", "class", "0a", "a b"]


class Drawn:
    """A network drawn with a seed: branches, nested and shared models, one or two outputs.

    Attributes:
        model: it.
        images: 24 for it.
        choose: what else is drawn comes from this.
    """

    def __init__(self, seed: int) -> None:
        self.choose = choose = random.Random(seed)
        keras.utils.set_random_seed(seed)
        self.first = choose.random() < 0.2
        self.policy = choose.choice(POLICIES)
        self.names = [*(f"layer{i}" for i in range(99, 0, -1)), *TAKEN[: choose.choice([0, 10])]]
        self.axis = 1 if self.first else -1
        self.layout: dict[str, Any] = {"data_format": "channels_first"} if self.first else {}
        size = choose.choice([8, 11, 12, 16])
        shape = (3, size, size) if self.first else (size, size, 3)
        inputs = keras.Input(shape, dtype=choose.choice([None, self.policy.removeprefix("mixed_")]))
        tensors = [self.conv()(inputs)]
        for _ in range(choose.randint(2, 7)):
            tensors.append(self.step(tensors, nests=True))
        outputs: Any = [self.head(tensors[-1]), *choose.sample(tensors, choose.choice([0, 0, 1]))]
        if choose.random() < 0.3:
            outputs = {str(i): y for i, y in enumerate(outputs)}
        self.model = keras.Model(inputs, outputs, name=choose.choice(["net", "forward"]))
        for layer in all_layers(self.model, include_self=False):
            layer.trainable = choose.random() < 0.9
        with torch.no_grad():
            for variable in self.model.weights:
                raw_value(variable).add_(0.05 * torch.rand(variable.shape))
        noise = np.random.default_rng(seed).normal(size=(24, size, size, 3)).astype("float32")
        images = noise.cumsum(1).cumsum(2) / size + 0.05 * noise
        self.images = images.transpose(0, 3, 1, 2) if self.first else images

    def base(self) -> dict[str, Any]:
        return {"name": self.names.pop(), "dtype": self.policy}

    def activation(self) -> str:
        return self.choose.choice(["relu", "relu", "relu", "linear", "linear", "gelu", "tanh"])

    def conv(self, filters: int = 0, **options: Any) -> keras.Layer:
        choose = self.choose
        options = {"padding": "same", "activation": self.activation()} | options
        options["use_bias"] = choose.random() < 0.8
        if choose.random() < 0.2:
            options |= {
                "kernel_regularizer": "l2",
                "kernel_constraint": keras.constraints.MaxNorm(9),
            }
        filters = filters or choose.choice([8, 16, 20, 32])
        size = choose.choice([1, 3, 3, 3, (3, 5), 2])
        return kl.Conv2D(filters, size, **self.base(), **self.layout, **options)

    def step(self, tensors: list[Any], nests: bool = False) -> Any:
        """A layer, or several, on one of the last tensors."""
        choose, layout = self.choose, self.layout
        x = tensors[-1] if choose.random() < 0.8 else choose.choice(tensors)
        same = [t for t in tensors if t.shape == x.shape and t is not x]
        channels = x.shape[self.axis]
        high = min(x.shape[2:] if self.first else x.shape[1:3])
        steps: list[Any] = [lambda: self.conv()(x)] * 5
        steps += [
            lambda: self.conv(strides=2 if high > 5 else 1)(x),
            lambda: self.conv(dilation_rate=2)(x),
            lambda: kl.DepthwiseConv2D(3, padding="same", **self.base(), **layout)(x),
            lambda: kl.SeparableConv2D(16, 3, padding="same", **self.base(), **layout)(x),
            lambda: kl.BatchNormalization(axis=self.axis, **self.base())(x),
            lambda: kl.Activation(self.activation(), **self.base())(x),
            lambda: kl.MaxPooling2D(2, 2 if high > 5 else 1, "same", **self.base(), **layout)(x),
            lambda: kl.SpatialDropout2D(0.2, **self.base(), **layout)(x),
            lambda: kl.ZeroPadding2D(((0, 1), (1, 0)), **self.base(), **layout)(x),
            lambda: keras.ops.relu(x * 0.5),
            lambda: kl.Add(**self.base())([x, self.conv(channels)(x)]),
            lambda: kl.Concatenate(axis=self.axis, **self.base())([x, self.conv()(x)]),
        ]
        steps += [lambda: kl.Maximum(**self.base())([x, choose.choice(same)])] * bool(same)
        steps += [lambda: self.nested(x)] * (2 * nests)
        return choose.choice(steps)()

    def nested(self, x: Any) -> Any:
        """A Sequential or Functional model, called once or, where that fits, twice."""
        name = self.names.pop()
        if self.choose.random() < 0.4:
            model = keras.Sequential([self.conv(), self.conv(x.shape[self.axis])], name=name)
        else:
            tensors = [keras.Input(x.shape[1:])]
            for _ in range(self.choose.randint(1, 3)):
                tensors.append(self.step(tensors))
            model = keras.Model(tensors[0], tensors[-1], name=name)
        y = model(x)
        return model(y) if y.shape == x.shape and self.choose.random() < 0.3 else y

    def head(self, x: Any) -> Any:
        layout = self.layout
        if (kind := self.choose.choice(["map", "flat", "pool"])) == "map":
            return x
        flat = kl.Flatten if kind == "flat" else kl.GlobalAveragePooling2D
        x = flat(name=self.names.pop(), **layout)(x)
        return kl.Dense(6, **self.base())(kl.Dense(20, activation="relu", **self.base())(x))
