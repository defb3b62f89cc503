"""On a GPU, where there is one; and what is replayed there."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import keras
import pytest
import torch
import torch.multiprocessing
from small_vgg import DEVICE, assert_close, images, small_vgg

from vggtorch.lowering import Lowered, graphs, lower

needs_gpu = pytest.mark.gpu


@needs_gpu
@pytest.mark.parametrize("training", [True, False])
def test_cuda_equals_keras(training: bool) -> None:
    model = small_vgg()
    twin = small_vgg()
    x = images(model).to(DEVICE)
    with torch.set_grad_enabled(training):
        lowered = lower(model).train(training)
        assert_close(lowered(x), twin(x, training=training), 1e-3)
    assert {p.device.type for p in lowered.parameters()} == {DEVICE}


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_cuda_trains_as_keras(frozen: bool, dtype: torch.dtype) -> None:
    """Also after the parameters were elsewhere, and after an inference."""
    model, twin = small_vgg(), small_vgg()
    for network in (model, twin):
        network.get_layer("block1_conv1").trainable = not frozen
    x = images(model).to(DEVICE)
    lowered = lower(model).to("cpu").to(DEVICE)
    assert {id(p) for p in lowered.state_dict(keep_vars=True).values()} == {
        id(v.value) for v in model.variables
    }
    with torch.inference_mode():
        lowered.eval()(x)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        output = lowered.train()(x)
    expected = twin(x, training=True)
    for y in (output, expected):
        y.float().square().sum().backward()
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for variable, theirs in zip(model.trainable_variables, twin.trainable_variables, strict=True):
        if variable.path != "block2_conv1/bias":  # before batch norm, so its gradient is noise
            exact = theirs.value.grad
            assert (variable.value.grad - exact).norm() < tolerance * exact.norm()


def follows_inputs_and_parameters(model: keras.Model, lowered: Lowered, run: Any) -> None:
    """Whether replays give what Keras gives: other images, other shapes, other weights."""
    kernel = model.get_layer("block1_conv1").kernel.value
    x, few = images(model).to(kernel.device), images(model, 2).to(kernel.device)
    with torch.inference_mode():
        run(x)
    with torch.no_grad():
        first = run(x)
        expected = model(x, training=False)
        for given in (x, few, x * 2):
            assert_close(run(given), model(given, training=False), 1e-3)
        assert_close(first, expected, 1e-3)  # no replay has written over it
        for change in (lambda: kernel.mul_(1.5), lambda: setattr(kernel, "data", kernel * 0.5)):
            change()
            assert not torch.allclose(run(x), expected)
            assert_close(run(x), model(x, training=False), 1e-3)
    assert len(lowered._captured) == 1  # what was captured of other weights is gone
    assert not copy.deepcopy(lowered)._captured


def test_replays_follow_inputs_and_parameters() -> None:
    """Where there is no GPU, with a function that stands for the graph."""
    model = small_vgg()
    lowered: Any = lower(model, cuda_graphs=True).eval()

    def capture(inputs: list[torch.Tensor]) -> Any:
        static = [x.clone() for x in inputs]
        outputs = graphs.Graph.forward(lowered, *static)

        def replay() -> None:
            for mine, new in zip(outputs, graphs.Graph.forward(lowered, *static), strict=True):
                mine.copy_(new)

        return SimpleNamespace(replay=replay), static, outputs

    lowered._capture = capture
    follows_inputs_and_parameters(
        model, lowered, lambda x: lowered._replay([x.permute(0, 3, 1, 2)])[0]
    )
    lowered._captured.clear()
    with torch.no_grad():  # as it is, it doesn't try on a CPU
        assert_close(lowered(images(model)), model(images(model), training=False))
    assert not lowered._captured


def test_what_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = lower(small_vgg(), cuda_graphs=True).eval()
    on_gpu: list[Any] = [SimpleNamespace(is_cuda=True)]
    assert not lowered._replays(on_gpu)  # there may be gradients to come
    with torch.no_grad():
        assert lowered._replays(on_gpu)
        assert not lowered._replays([torch.ones(1)])
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert not lowered._replays(on_gpu)


@needs_gpu
def test_cuda_graphs() -> None:
    model = small_vgg()
    lowered = lower(model, cuda_graphs=True).eval()
    follows_inputs_and_parameters(model, lowered, lowered)
    lowered.train()(images(model).cuda()).sum().backward()  # as without graphs
