"""What torch's tools change in a lowered network takes effect, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import pytest
import torch
from keras import layers
from small_vgg import assert_close, images, small_vgg
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

from vggtorch.lowering import lower


def assign(lowered: Any) -> None:
    lowered.fc1 = nn.Linear(256, 4)


def assign_by_name(lowered: Any) -> None:
    setattr(lowered, "block1_pool", nn.AvgPool2d(2))  # noqa: B010


def add_module(lowered: Any) -> None:
    lowered.add_module("fc1", nn.Linear(256, 4))
    lowered(images(small_vgg()))


def write_modules(lowered: Any) -> None:
    lowered._modules["fc1"] = nn.Linear(256, 4)
    lowered(images(small_vgg()))


def delete(lowered: Any) -> None:
    del lowered.fc1
    lowered(images(small_vgg()))


def replace_in_nested(lowered: Any) -> None:
    lowered.nested.fc1 = nn.Linear(256, 4)


@pytest.mark.parametrize("edit", [assign, assign_by_name, add_module, write_modules, delete])
def test_other_children_are_refused(edit: Callable[[Any], None]) -> None:
    with pytest.raises(ValueError, match=r"place of '(fc1|block1_pool)'.*vt\.to_torch\(model\)"):
        edit(lower(small_vgg()).eval())


def test_other_children_of_a_nested_model_are_refused() -> None:
    image = keras.Input((16, 16, 3))
    nested = small_vgg()
    nested.name = "nested"
    with pytest.raises(ValueError, match=r"vt\.to_torch\(model\)"):
        replace_in_nested(lower(keras.Model(image, nested(image))))


class Adapter(nn.Module):
    """Adds something to a kernel, as LoRA does."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(shape))

    def forward(self, kernel: torch.Tensor) -> torch.Tensor:
        return kernel + self.delta


@pytest.mark.parametrize("name", ["block1_conv1", "block2_conv1", "fc1"])
def test_parametrizations_take_effect(name: str) -> None:
    model = small_vgg()
    model.trainable = False
    lowered: Any = lower(model).eval()
    x = images(model)
    with torch.no_grad():
        lowered(x)  # leaves prepared weights
    kernel = model.get_layer(name).kernel
    adapter = Adapter(kernel.shape)
    parametrize.register_parametrization(getattr(lowered, name), "kernel", adapter)
    lowered.train()(x).square().sum().backward()
    assert adapter.delta.grad is not None and adapter.delta.grad.any()
    change = torch.randn(kernel.shape) / 10
    with torch.no_grad():
        adapter.delta.copy_(change)
        found = lowered.eval()(x)
    kernel.assign(kernel + change)
    assert_close(found, model(x, training=False).detach())


def test_pruning_takes_effect() -> None:
    model = small_vgg()
    lowered: Any = lower(model).eval()
    x = images(model)
    prune.ln_structured(lowered.block2_conv1, "kernel", amount=0.5, n=1, dim=3)
    with torch.no_grad():
        found = lowered(x)
        kernel = model.get_layer("block2_conv1").kernel
        kernel.assign(lowered.block2_conv1.kernel)
        assert (kernel.numpy() == 0).mean() == 0.5
        assert_close(found, model(x, training=False))


def test_a_module_inside_of_a_layer_may_be_another() -> None:
    model = small_vgg()
    lowered: Any = lower(model).eval()
    x = images(model)
    with torch.no_grad():
        lowered(x)
        lowered.block1_conv1.activation = nn.GELU()
        found = lowered(x)
        model.get_layer("block1_conv1").activation = keras.activations.gelu
        expected = model(x, training=False)
    assert_close(found, expected, 1e-3)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["block1_conv1", "block2_conv1", "block2_bn1", "block2_relu1"])
def test_what_a_hook_keeps_stays_what_it_is(name: str, training: bool) -> None:
    lowered: Any = lower(small_vgg()).train(training)
    kept: list[torch.Tensor] = []
    getattr(lowered, name).register_forward_hook(lambda _, __, y: kept.extend((y, y.clone())))
    with torch.set_grad_enabled(training):
        lowered(images(small_vgg()))
    assert torch.equal(*kept)


@pytest.mark.parametrize("training", [False, True])
def test_full_backward_hooks_on_every_module(training: bool) -> None:
    lowered = lower(small_vgg()).train(training)
    expected = torch.autograd.grad(lowered(images(small_vgg())).square().sum(), lowered.fc1.kernel)  # type: ignore
    seen = set()
    for name, module in list(lowered.named_modules())[1:]:
        module.register_full_backward_hook(lambda _, __, ___, name=name: seen.add(name))
    x = images(small_vgg()).requires_grad_()
    found = torch.autograd.grad(lowered(x).square().sum(), (lowered.fc1.kernel, x))  # type: ignore
    assert_close(found[0], expected[0], 1e-4)
    assert seen == {name for name, _ in lowered.named_modules()} - {""}


def test_global_hooks_see_every_module() -> None:
    model = small_vgg()
    lowered = lower(model).eval()
    seen: list[nn.Module] = []
    hook = nn.modules.module.register_module_forward_hook(lambda m, _, __: seen.append(m))
    try:
        with torch.no_grad():
            lowered(images(model))
    finally:
        hook.remove()
    assert {*lowered.modules()} == {*seen}


def test_a_forward_that_was_replaced_runs() -> None:
    """As tools that wrap the forward of a module do."""
    lowered: Any = lower(small_vgg()).eval()
    real, called = lowered.block1_conv1.forward, []

    def counted(x: Any) -> Any:
        called.append(len(x))
        return real(x)

    lowered.block1_conv1.forward = counted
    with torch.no_grad():
        lowered(images(small_vgg()))
    assert called == [4]


def test_moving_statistics_are_buffers() -> None:
    model = small_vgg()
    lowered = lower(model).train()
    averaged = AveragedModel(lowered)
    for factor in (1.0, 2.0, 3.0):
        model.get_layer("block2_bn1").moving_mean.assign([factor] * 16)
        averaged.update_parameters(lowered)
    mean = dict(averaged.module.named_buffers())["block2_bn1.moving_mean"]
    assert torch.equal(mean, torch.full((16,), 3.0))  # the last, as of torch's own batch norm
    for p in lowered.parameters():
        p.requires_grad = True
    assert lowered.eval()(images(model)).requires_grad
    assert not model.get_layer("block2_bn1").moving_mean.value.requires_grad


def test_functional_call_of_layers_that_run_as_keras_runs_them() -> None:
    keras.utils.set_random_seed(0)
    image = keras.Input((6, 4))
    model = keras.Model(image, layers.PReLU()(layers.LSTM(3)(image)))
    lowered = lower(model).eval()
    x = torch.randn(2, 6, 4)
    parameters = {name: p.detach() * 2 for name, p in lowered.named_parameters()}
    found = torch.func.functional_call(lowered, parameters, (x,)).detach()
    before = model(x).detach()
    assert not torch.allclose(found, before)
    for variable in model.trainable_variables:
        variable.assign(variable * 2)
    assert_close(found, model(x).detach())


def test_init_functions_reach_the_kernel() -> None:
    """An init function for every module whose class name has Conv in it, as DCGAN's."""
    model = small_vgg()
    lowered = lower(model)

    def init(module: nn.Module) -> None:
        if "Conv" in type(module).__name__:
            nn.init.constant_(module.weight.data, 0.25)  # type: ignore[union-attr, arg-type]

    lowered.apply(init)
    assert (model.get_layer("block1_conv1").kernel.numpy() == 0.25).all()


@pytest.mark.parametrize(
    "convert", [lambda lowered: lowered.double(), lambda lowered: lowered.half()]
)
def test_conversions_name_what_can_convert(convert: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"vt\.to_torch\(model\), whose parameters can part"):
        convert(lower(small_vgg()))


def test_tracers_are_sent_to_the_network_of_torch_modules() -> None:
    with pytest.raises(ValueError, match=r"Take vt\.to_torch\(model\)"):
        torch.fx.symbolic_trace(lower(small_vgg()))


@pytest.mark.slow
def test_writing_through_data_is_noticed_everywhere() -> None:
    """Any number of any tensor; nothing but its value says that it changed."""
    model = small_vgg()
    lowered = lower(model).eval()
    x = images(model)
    with torch.no_grad():
        before = lowered(x)
        for variable in model.variables:
            variable.value.data.flatten()  # reading changes nothing
            variable.value.data[(-1,) * variable.value.ndim] += 1.0
            found = lowered(x)
            assert not torch.equal(found, before), variable.path
            assert_close(found, model(x, training=False))
            before = found


def test_checkpoints_take_two_backwards() -> None:
    """As PCGrad takes the gradients of several losses, one after the other."""
    found = []
    for checkpoint in (False, True):
        model = small_vgg()
        lowered: Any = lower(model, checkpoint=checkpoint).train()
        output = lowered(images(model))
        kernel = lowered.block1_conv1.kernel
        one = torch.autograd.grad(output[:, 0].sum(), kernel, retain_graph=True)[0]
        two = torch.autograd.grad(output[:, 1].sum(), kernel)[0]
        found.append((one, two, lowered.block2_bn1.moving_mean.clone()))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, 1e-4)
