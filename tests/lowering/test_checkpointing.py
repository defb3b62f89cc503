"""Activations that backward computes again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import keras
import pytest
import torch
import torch.multiprocessing
from keras import layers
from small_vgg import assert_close, dropout_vgg, images, on_keras, small_vgg, step
from torch import nn

from vggtorch.lowering import to_torch


def kept(run: Any, x: torch.Tensor) -> int:
    """Bytes that a call keeps for backward."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor._base, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(x)
    return sum(storages.values())


@pytest.mark.slow
def test_checkpointing_keeps_less_and_changes_nothing() -> None:
    """Dropout must drop the same, and batch norm must count a batch once."""
    found, memory = [], []
    for checkpoint in (False, True):
        model = dropout_vgg()
        lowered = on_keras(model, checkpoint=checkpoint).train()
        torch.manual_seed(5)
        output, left = step(model, lowered)
        found.append([output, *left])
        memory.append(kept(lowered, images(model)))
        with torch.no_grad():
            assert_close(lowered.eval()(images(model)), model(images(model), training=False))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)
    assert memory[1] < memory[0] / 4


def test_a_remat_scope_is_followed() -> None:
    memory = []
    for scope in (contextlib.nullcontext(), keras.RematScope()):
        with scope:
            model = dropout_vgg()
        memory += [kept(network, images(model)) for network in (to_torch(model), on_keras(model))]
    assert max(memory[2:]) < min(memory[:2]) / 3


def attend(x: Any) -> Any:
    """A layer that is called with the same tensor twice."""
    rows = layers.Reshape((36, 8))(x)
    rows = layers.MultiHeadAttention(2, 4, dropout=0.5, seed=3)(rows, rows)
    return layers.Reshape((6, 6, 8))(rows)


@pytest.mark.parametrize("draw", [lambda x: layers.SpatialDropout2D(0.5, seed=3)(x), attend])
def test_checkpointing_leaves_keras_layers_alone(draw: Callable[[Any], Any]) -> None:
    """A seeded layer counts its calls, so that a second one would not repeat the first."""
    found = []
    for checkpoint in (False, True):
        keras.utils.set_random_seed(0)
        image = keras.Input((8, 8, 3))
        x = draw(layers.Conv2D(8, 3)(image))
        x = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3)(x))
        model = keras.Model(image, x)
        output, _ = step(model, on_keras(model, checkpoint=checkpoint).train())
        grads = [v.value.grad for v in model.trainable_variables]
        found.append([output, *grads])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("train", [False, True])
def test_what_stands_in_for_one_call_is_there_again_in_backward(train: bool) -> None:
    model = small_vgg()
    results = []
    for checkpoint in (False, True):
        network = to_torch(model, share=False, checkpoint=checkpoint).train(train)
        tensors = {
            name: (1.1 * tensor.detach()).requires_grad_(name in dict(network.named_parameters()))
            for name, tensor in network.state_dict().items()
            if tensor.is_floating_point()
        }
        y = torch.func.functional_call(network, tensors, (images(model),))
        learn = [tensor for tensor in tensors.values() if tensor.requires_grad]
        results.append([*torch.autograd.grad(y.square().sum(), learn), *tensors.values()])
        assert not any(p.grad is not None for p in network.parameters())
        assert all(p.is_leaf for p in network.parameters())
    for plain, again in zip(*results, strict=True):
        assert_close(again.detach(), plain.detach(), 1e-5)
