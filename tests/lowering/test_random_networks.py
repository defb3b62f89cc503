"""Networks put together at random compute what Keras computes: outputs, gradients, statistics.

`RANDOM_NETWORKS=1000 pytest tests/lowering/test_random_networks.py` tries more of them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import pytest
import torch
import torch.nn.functional as F
from keras import layers
from precision import computing_in
from small_vgg import on_keras, randomise

from vggtorch.lowering import TorchNetwork, kernels, optimize_for_inference, to_torch, winograd

NETWORKS = int(os.environ.get("RANDOM_NETWORKS", "12"))
ACTIVATIONS = [None, "relu", "relu", "relu6", "gelu", "sigmoid", "softmax", "leaky_relu"]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def convolution(r: random.Random, x: Any) -> Any:
    stride = r.choice([1, 1, 2])
    dilation = r.choice([1, 2]) if stride == 1 else 1
    options = {
        "strides": stride,
        "dilation_rate": dilation,
        "padding": "same",
        "activation": r.choice(ACTIVATIONS),
        "use_bias": r.random() < 0.7,
    }
    kernel = r.choice([1, 2, 3])
    kind = r.choice([layers.Conv2D, layers.Conv2D, layers.SeparableConv2D, layers.DepthwiseConv2D])
    if kind is layers.DepthwiseConv2D:
        return kind(kernel, **options)(x)
    return kind(r.choice([4, 6]), kernel, **options)(x)


def normalised(r: random.Random, x: Any) -> Any:
    x = layers.BatchNormalization(scale=r.random() < 0.8, center=r.random() < 0.8)(x)
    return r.choice([layers.ReLU(), layers.Activation("relu"), layers.ReLU(6), lambda x: x])(x)


def pooled(r: random.Random, x: Any) -> Any:
    kind = r.choice([layers.MaxPooling2D, layers.MaxPooling2D, layers.AveragePooling2D])
    size = min(r.choice([2, 3]), *x.shape[1:3])  # Keras refuses larger ones
    return kind(size, 2, padding=r.choice(["same", "valid"]))(x)


def plain(r: random.Random, x: Any) -> Any:
    return r.choice(
        [
            layers.LayerNormalization(),
            layers.Rescaling(0.5, 0.1),
            layers.ZeroPadding2D(1),
            layers.UpSampling2D(2),
            layers.LeakyReLU(0.1),
            layers.Dense(4, activation="relu"),
            layers.UnitNormalization(),
            lambda x: x * 0.5 + 1,
            lambda x: 1 - x,
            lambda x: keras.ops.tanh(x),
        ]
    )(x)


def joined(r: random.Random, x: Any) -> Any:
    y = layers.Conv2D(x.shape[-1], 3, padding="same", activation="relu")(x)
    kind = r.choice([layers.Add, layers.Multiply, layers.Average, layers.Concatenate])
    return kind()(r.choice([[x, y], [y, x], [x, x], [y, x, y]]))


def nested(r: random.Random, x: Any) -> Any:
    inner = keras.Input(x.shape[1:])
    model = keras.Model(inner, normalised(r, convolution(r, inner)))
    y = model(x)
    return layers.Concatenate()([y, model(x)]) if r.random() < 0.3 else y


def shared(r: random.Random, x: Any) -> Any:
    layer = layers.Conv2D(x.shape[-1], 3, padding="same", activation="relu")
    return layer(layer(x))


STEPS: list[Callable[[random.Random, Any], Any]] = [
    *[convolution] * 4, *[normalised] * 3, *[pooled] * 2, *[plain] * 2, joined, nested, shared,
]  # fmt: skip


def network(seed: int) -> keras.Model:
    r = random.Random(seed)
    keras.utils.set_random_seed(seed)
    x = image = keras.Input((12, 13, 3))
    for _ in range(r.randint(3, 8)):
        y = r.choice(STEPS)(r, x)
        x = y if min(y.shape[1:3]) >= 2 else x
    x = r.choice([layers.Flatten(), layers.GlobalAveragePooling2D(), layers.GlobalMaxPooling2D()])(
        x
    )
    x = layers.Dense(5, activation=r.choice([None, "softmax", "relu"]))(x)
    model = randomise(keras.Model(image, x))
    for layer in model.layers[: r.choice([0, 0, 2, 5])]:
        layer.trainable = False
    return model


def off(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The distance of all numbers together, by the length of what is expected.

    NaN, which Keras's UnitNormalization has for the gradient of zeros, must be where it is there.
    """
    a, b = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (found, expected))
    if not torch.equal(a.isnan(), b.isnan()):
        return torch.inf
    a, b = a.nan_to_num(0.0), b.nan_to_num(0.0)
    return float((a - b).norm() / b.norm().clamp_min(1e-3))


def batch(seed: int) -> torch.Tensor:
    return torch.randn(3, 12, 13, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("winograd_always")
@pytest.mark.parametrize("seed", range(NETWORKS))
def test_random_networks_equal_keras(seed: int) -> None:
    model = network(seed)
    x = batch(seed)
    with torch.no_grad():
        expected = network(seed)(x, training=False)
        engine = optimize_for_inference(model, winograd=True)
        networks = [to_torch(model, winograd=way).eval() for way in (False, True)]
        for run in (*networks, on_keras(model).eval(), engine):
            assert off([run(x)], [expected]) < 1e-4


@pytest.mark.usefixtures("gradients_of_our_own")
@pytest.mark.parametrize("use_winograd", [False, True])
@pytest.mark.parametrize("seed", range(NETWORKS))
def test_random_networks_train_as_keras(seed: int, use_winograd: bool) -> None:
    """In float64, in which rounding turns no ReLU on or off."""
    with computing_in("float64"):
        model, twin = network(seed), network(seed)
        found = []
        ours = on_keras(model, winograd=use_winograd).train()
        for run, of in ((ours, model), (partial(twin, training=True), twin)):
            y = run(batch(seed).double())
            trained = [v.value for v in of.trainable_variables]
            grads = torch.autograd.grad(y.square().sum(), trained) if trained else ()
            state = [v.value for v in of.non_trainable_variables]
            found.append(([y], list(grads) or [y], state or [y]))
    for mine, theirs in zip(*found, strict=True):
        assert off(mine, theirs) < 1e-9


@pytest.fixture
def gradients_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those for float32 and bfloat16, with torch's product in them."""
    monkeypatch.setitem(winograd.TRANSFORMS, torch.float64, winograd.F4)
    for name in ("MIN_TILES", "MIN_CHANNELS", "GRADIENT_MIN_CHANNELS"):
        monkeypatch.setattr(winograd, name, dict.fromkeys(winograd.TRANSFORMS, 0))
    monkeypatch.setattr(
        kernels, "supports_training", lambda x, _: len(x) > 0 and not kernels.is_intercepted()
    )
    monkeypatch.setattr(kernels, "linear", lambda x, weight, bias: F.linear(x, weight, bias))


@pytest.mark.parametrize("seed", range(0, NETWORKS, 4))
def test_the_plan_equals_the_modules_one_by_one(seed: int) -> None:
    made: TorchNetwork = to_torch(network(seed)).eval()
    x = batch(seed)
    with torch.no_grad():
        fast = made(x)
        hook = made.register_forward_hook(lambda *_: None)
        slow = made(x)
        hook.remove()
    assert off([fast], [slow]) < 1e-4
