"""On a GPU, where there is one; and on which device everything would run."""

from __future__ import annotations

import keras
import pytest
import torch
import torch.multiprocessing
from keras import layers
from small_vgg import DEVICE, assert_close, images, on_keras, small_vgg
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vggtorch.lowering import TorchNetwork, to_torch

needs_gpu = pytest.mark.gpu


@needs_gpu
@pytest.mark.parametrize("training", [True, False])
def test_cuda_equals_keras(training: bool) -> None:
    model = small_vgg()
    twin = small_vgg()
    x = images(model).to(DEVICE)
    with torch.set_grad_enabled(training):
        lowered = on_keras(model).train(training)
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
    lowered = on_keras(model).to("cpu").to(DEVICE)
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


def without_numbers(network: TorchNetwork) -> TorchNetwork:
    """The network with tensors on "cuda" that have no numbers."""
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    tensors[name] = nn.Parameter(fake) if name in module._parameters else fake  # type: ignore[assignment]
    return network


@pytest.mark.parametrize("given", ["channels_last", "channels_first"])
@pytest.mark.parametrize("training", [False, True])
def test_devices_without_a_gpu(training: bool, given: str) -> None:
    """On tensors without numbers torch says on which device each operation would run."""
    network = to_torch(small_vgg(), data_format=given, share=False).train(training)
    shape = (4, 16, 16, 3) if given == "channels_last" else (4, 3, 16, 16)
    with FakeTensorMode():
        output = without_numbers(network)(torch.empty(shape, device="cuda"))
    assert output.device.type == "cuda" and output.shape == (4, 10)


def test_constants_are_where_keras_puts_its_own() -> None:
    with keras.device("meta"):
        image = keras.Input((8, 8, 3))
        x = layers.Rescaling([0.5, 1.0, 2.0], [0.0, 1.0, 2.0])(image)
        x = layers.BatchNormalization()(layers.Normalization(mean=0.5, variance=2.0)(x))
        network = to_torch(keras.Model(image, layers.Conv2D(2, 3)(x)))
        output = network(torch.empty(2, 8, 8, 3, device="meta"))
    assert output.device.type == "meta"
    assert {t.device.type for t in (*network.parameters(), *network.buffers())} == {"meta"}
    with torch.device("meta"):  # torch's own default is nothing to Keras
        network = to_torch(small_vgg())
    assert {t.device.type for t in (*network.parameters(), *network.buffers())} == {"cpu"}
