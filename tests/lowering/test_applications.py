"""keras.applications compute what Keras does: in inference and in training, one image in a group.

`APPLICATIONS=all pytest tests/lowering/test_applications.py` tries all of them.
"""

from __future__ import annotations

import inspect
import itertools
import math
import os
from collections.abc import Iterator
from typing import Any

import keras
import pytest
import torch
from precision import computing_in
from small_vgg import on_keras, randomise

from vggtorch.lowering import running, to_torch

ALL = [
    name
    for name, make in vars(keras.applications).items()
    if name[0].isupper()
    and inspect.isfunction(make)
    and name != "NASNetMobile"  # which Keras refuses to build on torch
]
SOME = ["ConvNeXtTiny", "DenseNet121", "EfficientNetV2B0", "MobileNetV3Small", "ResNet50V2"]
ROUNDING = 1e-4  # in float32 Keras's gradients of EfficientNetV2B3 are half of that off float64's
SIZES = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "policy")]


@pytest.fixture(autouse=True)
def group_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image in each group, always."""
    monkeypatch.setattr(running, "GROUP_BYTES", 1)


@pytest.fixture
def policy(dtype: str) -> Iterator[None]:
    with computing_in(dtype):
        yield


def off(found: Any, expected: Any) -> float:
    """The distance of all numbers together, by the length of what is expected."""
    distance = length = 0.0
    for actual, wanted in zip(found, expected, strict=True):
        wanted = wanted.detach().double()
        distance += float((actual.detach().double() - wanted).square().sum())
        length += float(wanted.square().sum())
    return math.sqrt(distance / length)


def parts(tensors: list[torch.Tensor], most: int = 100_000_000) -> list[list[torch.Tensor]]:
    """The tensors in lists of so many numbers, whose gradients fit in the memory of most machines.

    ConvNeXtXLarge in float64 would else need 9 GB.
    """
    found: list[list[torch.Tensor]] = [[]]
    for tensor in tensors:
        if sum(t.numel() for t in found[-1]) + tensor.numel() > most:
            found.append([])
        found[-1].append(tensor)
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ALL if os.environ.get("APPLICATIONS") == "all" else SOME)
def test_networks_equal_keras(name: str, dtype: str) -> None:
    keras.utils.set_random_seed(0)
    size = SIZES.get(name, 32)
    make = getattr(keras.applications, name)
    model = randomise(
        make(weights=None, include_top=False, input_shape=(size, size, 3), pooling="avg")
    )
    for layer in model.layers:  # which draw anew in each run
        for rate in {"rate", "drop_path_rate"} & set(vars(layer)):
            setattr(layer, rate, 0.0)
    exact = dtype == "float64"
    trained = [v.value for v in model.trainable_variables]
    state = [v.value for v in model.non_trainable_variables]
    before = [value.clone() for value in state]

    def images(seed: int) -> torch.Tensor:
        x = 255 * torch.rand(3, size, size, 3, generator=torch.Generator().manual_seed(seed))
        return x.to(getattr(torch, dtype))

    def trains_alike(x: torch.Tensor, training: bool, part: list[torch.Tensor]) -> float:
        results = []
        for run in (module.train(training), lambda x: model(x, training=training)):
            y = run(x)
            grads = torch.autograd.grad(y.square().mean(), part)
            results.append([[y], grads, [value.clone() for value in state] or [y]])
            with torch.no_grad():
                for value, was in zip(state, before, strict=True):
                    value.copy_(was)
        return sum(off(mine, theirs) for mine, theirs in zip(*results, strict=True))

    with torch.no_grad():
        expected = model(images(0), training=False)
        found = to_torch(model).eval()(images(0))
    assert found.dtype == expected.dtype
    assert off([found], [expected]) < (1e-10 if exact else ROUNDING)
    module = on_keras(model)
    # Batch norm over few pixels multiplies rounding: in float32 training can't be compared.
    for training, part in itertools.product((False, True) if exact else (False,), parts(trained)):
        limit = (1e-5 if training else 1e-10) if exact else ROUNDING
        # In float32 rounding turns a ReLU of some batch on or off, which all gradients before it
        # tell; hardly so in each of three.
        for seed in (1,) if exact else (1, 2, 3):
            error = trains_alike(images(seed), training, part)
            if error < limit:
                break
        assert error < limit
