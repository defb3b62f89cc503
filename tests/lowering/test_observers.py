"""Hooks, counters, transforms and exchanged parameters see each module run by itself."""

from __future__ import annotations

from typing import Any

import keras
import pytest
import torch
import torch.multiprocessing
from small_vgg import assert_close, images, on_keras, small_vgg
from torch.utils.flop_counter import FlopCounterMode

from vggtorch.lowering import running, to_torch


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_hooks_see_what_each_layer_gives(
    training: bool, checkpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole batch, although otherwise layers are fused and images run in groups."""
    monkeypatch.setattr(running, "GROUP_BYTES", 1)
    model = small_vgg()
    x = images(model)
    names = ["block1_conv1", "block2_relu1", "block2_pool", "fc1"]
    last = ["block1_conv1_relu", "block2_relu1", "block2_pool", "fc1_relu"]
    parts = keras.Model(model.input, [model.get_layer(name).output for name in names])
    lowered = on_keras(model, checkpoint=checkpoint).train(training)
    network: Any = lowered.network
    expected = parts(x, training=training)
    seen: dict[str, torch.Tensor] = {}

    def see(name: str, y: torch.Tensor) -> None:
        seen[name] = y.detach().permute(0, 2, 3, 1) if y.ndim == 4 else y.detach()

    hooks = [
        getattr(network, child).register_forward_hook(lambda _, __, y, name=name: see(name, y))
        for name, child in zip(names, last, strict=True)
    ]
    with torch.set_grad_enabled(training):
        lowered(x)
        for name, value in zip(names, expected, strict=True):
            assert_close(seen[name], value.detach(), 1e-4)
        for hook in hooks:
            hook.remove()
        seen.clear()
        lowered(x)
    assert not seen


def test_gradients_of_a_hooked_map() -> None:
    """As Grad-CAM takes them."""
    model = small_vgg()
    lowered = on_keras(model).eval()
    found: list[torch.Tensor] = []
    conv: Any = lowered.network.block1_conv1
    conv.register_full_backward_hook(lambda _, __, of_y: found.append(of_y[0]))
    lowered(images(model))[:, 0].sum().backward()
    assert found[0].shape == (4, 8, 16, 16) and found[0].any()


@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_each_kind_of_hook_is_called(kind: str, of_all: bool) -> None:
    network, seen = to_torch(small_vgg()), []
    relu: Any = network.block2_relu1
    if of_all:
        register: Any = getattr(torch.nn.modules.module, f"register_module_{kind}_hook")
    else:
        register = getattr(relu, f"register_{kind}_hook")
    hook = register(lambda module, *_: seen.append(module))
    try:
        network(images()).square().sum().backward()
    finally:
        hook.remove()
    assert relu in seen


@pytest.mark.parametrize("training", [False, True])
def test_operations_are_counted(training: bool) -> None:
    """A count of floating-point operations must not miss fused ones."""
    model = small_vgg()
    lowered = on_keras(model).train(training)
    with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
        lowered(images(model))
    convolutions = 16 * 16 * 9 * 3 * 8 + 8 * 8 * 9 * 8 * 16
    assert counter.get_total_flops() == 2 * 4 * (convolutions + 4 * 4 * 16 * 32 + 32 * 10)


def exchanged(factor: float) -> tuple[dict[str, torch.Tensor], keras.Model]:
    """Other parameters, by name, and a Keras model that has them."""
    twin = small_vgg()
    for kernel in twin.trainable_variables:
        kernel.assign(kernel * factor)
    return {name: p.detach() for name, p in to_torch(twin).named_parameters()}, twin


@pytest.mark.parametrize("training", [False, True])
def test_parameters_of_one_call(training: bool) -> None:
    """functional_call, as averaged weights or ensembles are evaluated."""
    model = small_vgg()
    network = to_torch(model).train(training)
    x = images(model)
    with torch.set_grad_enabled(training):
        expected = [model(x, training=training)]
        found = [network(x)]
        for factor in (1.5, 0.5):
            parameters, twin = exchanged(factor)
            found.append(torch.func.functional_call(network, parameters, (x,)))
            expected.append(twin(x, training=training))
            del parameters  # so that the next may stand where these stood
        found.append(network(x))
    for actual, value in zip(found, [*expected, expected[0]], strict=True):
        assert_close(actual.detach(), value.detach(), 1e-4)


@pytest.mark.slow
def test_transforms() -> None:
    """Derivatives in forward mode, and one gradient for each image."""
    model = small_vgg()
    model.get_layer("block2_bn1").trainable = False  # or images would depend on each other
    lowered = to_torch(model).train()
    x, of_x = images(model), images(model).flip(0)
    of_y = torch.func.jvp(lowered, (x,), (of_x,))[1].detach()
    weights = torch.randn(of_y.shape)
    (gradient,) = torch.autograd.grad(lowered(x.requires_grad_()), x, weights)
    assert_close((of_y * weights).sum(), (gradient * of_x).sum(), 1e-3)
    x = x.detach()

    parameters = dict(lowered.named_parameters())
    trained = {name: p.detach() for name, p in parameters.items() if p.requires_grad}

    def loss(trained: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        output = torch.func.functional_call(lowered, trained, (image.unsqueeze(0),))
        return output.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x)
    lowered(x).square().sum().backward()
    for name, gradients in each.items():
        expected = parameters[name].grad
        assert expected is not None
        assert_close(gradients.sum(0), expected, 1e-4)
