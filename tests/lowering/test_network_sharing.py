"""What `to_torch` does where the two sides can share memory no more, or only in part."""

from typing import Any

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
import pytest
import torch
from keras import layers as L
from torch import nn

from vggtorch.lowering.layer_modules import KerasLayer


@pytest.fixture(autouse=True)
def group_bytes():
    """These networks run whole batches: no need to run each test twice, as conftest.py does."""


def model_of(**options: Any) -> keras.Model:
    i = keras.Input((8, 8, 3))
    x = L.Conv2D(4, 3, name="conv", **options)(i)
    return keras.Model(i, L.Dense(2, name="out")(L.Flatten()(x)))


def test_a_child_of_another_dtype_parts_alone_and_says_so():
    model = model_of()
    network = vt.to_torch(model)
    network.conv.double()
    with pytest.warns(UserWarning, match="2 weights of the torch network, conv/kernel first"):
        names = [name for name, _ in network.named_parameters()]
    assert len(names) == 4
    assert model.get_layer("conv").kernel.value.dtype == torch.float32
    with torch.no_grad():
        network.out.bias.fill_(7)
    assert (model.get_layer("out").bias.value == 7).all()  # which still shares its memory


def test_a_weight_of_another_shape_parts_and_says_so():
    model = model_of()
    network = vt.to_torch(model).eval()
    network.conv.weight.data = network.conv.weight.data[:2]
    with pytest.warns(UserWarning, match="1 weights of the torch network, conv/kernel first"):
        network.state_dict()
    assert model.get_layer("conv").kernel.shape == (3, 3, 3, 4)


def test_weights_without_values_part_and_say_so():
    model = model_of()
    before = model.get_weights()
    network = vt.to_torch(model).eval()
    with pytest.warns(UserWarning, match="4 weights .* or no values"):
        network.to("meta")
    assert network(torch.empty(2, 8, 8, 3, device="meta")).shape == (2, 2)
    network.to_empty(device="cpu")
    assert all((a == b).all() for a, b in zip(model.get_weights(), before, strict=True))


def test_state_dict_has_what_keras_has_replaced():
    model = model_of()
    network = vt.to_torch(model)
    kernel = model.get_layer("conv").kernel.value
    kernel.data = torch.zeros_like(kernel)
    assert network.state_dict()["conv.weight"].abs().max() == 0


@pytest.mark.parametrize("share", [True, False])
def test_a_layer_that_keras_runs_twice_has_one_set_of_weights(share):
    i = keras.Input((5, 3))
    lstm = L.LSTM(4)
    model = keras.Model(i, L.Add()([lstm(i), lstm(i * 2.0)]))
    network = vt.to_torch(model, share=share)
    assert sum(isinstance(m, KerasLayer) for m in network.modules()) == 2
    assert len(list(network.parameters())) == 3


def test_a_layer_in_two_networks_is_one_module_in_both_wherever_it_is_moved():
    norm, a, b = L.BatchNormalization(), keras.Input((4,)), keras.Input((4,))
    inner = keras.Model(a, norm(a), name="inner")
    network = vt.to_torch(keras.Model(b, L.Add()([inner(b), norm(b)])))
    network._apply(lambda t: t.clone())
    modules: set[Any] = {m for m in network.modules() if isinstance(m, nn.BatchNorm1d)}
    (module,) = modules
    network.train()(torch.rand(8, 4) + 3)
    assert (module.running_mean > 0).all()
    assert torch.equal(norm.moving_mean.value, module.running_mean)


def test_regularizers_are_warned_of():
    with pytest.warns(UserWarning, match=r"regularizers \('conv/kernel' first, 1 in all\)"):
        vt.to_torch(model_of(kernel_regularizer="l2"))
    with pytest.warns(UserWarning, match=r"regularizers \('conv' first, 1 in all\)"):
        vt.to_torch(model_of(activity_regularizer="l1"))
