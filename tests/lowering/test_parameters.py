"""The parameters are the Keras model's own, whoever changes, freezes or saves them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from keras import layers
from small_vgg import (
    FUSED,
    assert_close,
    dropout_vgg,
    images,
    on_keras,
    operations,
    small_vgg,
    step,
)

from vggtorch.lowering import kernels, to_torch


def test_the_parameters_are_the_keras_models_own() -> None:
    model = small_vgg()
    values = model.get_weights()
    module = on_keras(model)
    assert {id(p) for p in module.parameters()} == {id(v.value) for v in model.trainable_variables}
    assert {id(b) for b in module.buffers()} == {id(v.value) for v in model.non_trainable_variables}
    assert "block1_conv1/kernel" in module.state_dict()
    for value, expected in zip(model.get_weights(), values, strict=True):
        np.testing.assert_array_equal(value, expected)
    for name in ("block1_conv1", "block2_conv1"):
        assert model.get_layer(name).kernel.value.permute(3, 2, 0, 1).is_contiguous()
    assert model.get_layer("fc1").kernel.value.t().is_contiguous()


def test_two_nested_models_may_have_a_layer_of_one_name() -> None:
    x = image = keras.Input((4,))
    for _ in range(3):
        x = keras.Model(inner := keras.Input((4,)), layers.BatchNormalization(name="norm")(inner))(
            x
        )
    model = keras.Model(image, x)
    assert len({v.path for v in model.variables}) == 4
    module = on_keras(model)
    assert {id(p) for p in module.parameters()} == {id(v.value) for v in model.trainable_variables}
    assert {id(b) for b in module.buffers()} == {id(v.value) for v in model.non_trainable_variables}


def test_trained_from_either_side() -> None:
    model = small_vgg()
    x, y = images(model), torch.tensor([0, 1, 2, 3])
    lowered = on_keras(model).train()
    optimizer = torch.optim.SGD([p for p in lowered.parameters() if p.requires_grad], lr=0.01)
    F.nll_loss(lowered(x).log(), y).backward()
    optimizer.step()
    with torch.no_grad():
        assert_close(lowered.eval()(x), model(x, training=False))
    before = model.get_weights()
    model.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy")
    model.fit(x, y, verbose=0)
    assert not np.array_equal(model.get_weights()[0], before[0])
    with torch.no_grad():
        assert_close(lowered.eval()(x), model(x, training=False))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.mul_(1.5),
        lambda p: p.data.mul_(1.5),
        lambda p: setattr(p, "data", p.data * 1.5),
        lambda p: p.copy_(torch.zeros_like(p)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_prepared_follows_the_parameters(change: Any, dtype: torch.dtype) -> None:
    model = small_vgg()
    module = on_keras(model).eval()
    x = images(model)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2

    def lowered(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return module(x)

    with torch.no_grad():
        before = lowered(x)
        for name in ("block1_conv1", "block2_conv1", "fc1"):
            change(model.get_layer(name).kernel.value)
            after = lowered(x)
            assert not torch.allclose(after, before)
            assert_close(after.float(), model(x, training=False), tolerance)
            before = after
        model.get_layer("block2_bn1").moving_mean.assign(np.ones(16))
        assert_close(lowered(x).float(), model(x, training=False), tolerance)


def test_saved_loaded_moved_and_copied(tmp_path: Path) -> None:
    model = small_vgg()
    x = images(model)
    lowered = on_keras(model).eval()
    expected = lowered(x).detach()
    path = f"{tmp_path}/weights.weights.h5"
    model.save_weights(path)
    state = copy.deepcopy(lowered.state_dict())
    with torch.no_grad():
        lowered(x)  # leaves prepared weights, which copies must do without
    twin = copy.deepcopy(lowered.network)

    def zero() -> None:
        for p in lowered.parameters():
            p.data.zero_()

    zero()
    model.load_weights(path)
    assert_close(lowered(x).detach(), expected)
    zero()
    lowered.load_state_dict(state)
    assert_close(model(x, training=False).detach(), expected)
    zero()
    assert_close(twin(x).detach(), expected)  # a copy has parameters of its own
    lowered.load_state_dict(state)
    lowered.to("cpu").to(memory_format=torch.contiguous_format)
    assert {id(p) for p in lowered.state_dict(keep_vars=True).values()} == {
        id(v.value) for v in model.variables
    }
    assert_close(lowered(x).detach(), expected)


def test_a_frozen_prefix_keeps_nothing_for_backward() -> None:
    model = small_vgg()
    for layer in model.layers[:-2]:
        layer.trainable = False
    x = images(model)
    saved: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        on_keras(model).train()(x).sum().backward()
    assert not [shape for shape in saved if len(shape) == 4]
    assert model.get_layer("fc1").kernel.value.grad is not None


@pytest.mark.parametrize("until", ["block1_conv1", "block1_pool", "block2_conv1", "fc1"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_frozen_layers_train_as_keras(until: str, checkpoint: bool) -> None:
    """Wherever the boundary is between those that run as in inference and those that learn."""
    model, twin = small_vgg(), small_vgg()
    for network in (model, twin):
        for layer in network.layers:
            layer.trainable = False
            if layer.name == until:
                break
    lowered = on_keras(model, checkpoint=checkpoint).train()
    x = images(model)
    assert (FUSED in operations(lowered, x)) == kernels.has_fused_ops(x, x.dtype)
    output, left = step(model, lowered)
    twin(x, training=True)  # counted by batch norm
    expected, expected_left = step(twin, lambda x: twin(x, training=True))
    assert_close(output, expected, 1e-4)
    for actual, value in zip(left, expected_left, strict=True):
        assert_close(actual, value, 1e-4)


def test_layers_that_thaw_or_freeze_are_noticed() -> None:
    model = small_vgg()
    x, kernel = images(model), model.get_layer("block1_conv1").kernel.value
    lowered = on_keras(model).train()
    for trainable in (False, True, False):
        model.trainable = trainable
        kernel.grad = None
        output = lowered(x)
        assert output.requires_grad == trainable
        if trainable:
            output.square().sum().backward()  # probabilities alone sum up to 1 whatever the kernel
            assert kernel.grad is not None and kernel.grad.any()
        else:
            assert_close(output, model(x, training=True).detach())


def test_gradients_of_the_input_go_through_frozen_layers() -> None:
    """As adversarial examples and style transfer take them."""
    model = small_vgg()
    model.trainable = False
    found = []
    for run in (on_keras(model).train(), on_keras(model).eval(), lambda x: model(x, training=True)):
        x = images(model).requires_grad_()
        run(x).square().sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    assert_close(found[0], found[2], 1e-4)
    assert_close(found[1], found[2], 1e-4)


def test_frozen_dropout_still_drops() -> None:
    model = dropout_vgg()
    model.trainable = False
    lowered = on_keras(model).train()
    x = images(model)
    assert not torch.equal(lowered(x), lowered(x))
    with torch.no_grad():
        assert not torch.equal(lowered(x), lowered(x))


def test_evaluation_sees_weights_that_were_written_through_data() -> None:
    """As averages of weights are often put in place; here where no sample of them is taken."""
    model = small_vgg()
    kernel = model.get_layer("block2_conv1").kernel.value
    lowered = on_keras(model).eval()
    x = images(model)
    with torch.no_grad():
        before = lowered(x)
        lowered.train()
        kernel.data[1, 1, 1, 1] += 1
        after = lowered.eval()(x)
    assert not torch.equal(before, after)
    assert_close(after, model(x, training=False).detach())


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_sparse_weight_is_multiplied_with() -> None:
    image = keras.Input((8,))
    network: Any = to_torch(
        keras.Model(image, keras.layers.Dense(4, name="fc")(image)), share=False
    )
    x = torch.randn(2, 8)
    with torch.no_grad():
        expected = network(x)
        network.fc.weight = torch.nn.Parameter(
            network.fc.weight.to_sparse_csr(), requires_grad=False
        )
        assert_close(network(x), expected)
