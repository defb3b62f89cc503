"""What `to_torch` does where the two sides can share memory no more, or only in part."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path
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
    with pytest.warns(UserWarning, match=r"Weights of .* \(conv/kernel first, 2 in all\)"):
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
    with pytest.warns(UserWarning, match=r"Weights of .* \(conv/kernel first, 1 in all\)"):
        network.state_dict()
    assert model.get_layer("conv").kernel.shape == (3, 3, 3, 4)


def test_weights_without_values_part_and_say_so():
    model = model_of()
    before = model.get_weights()
    network = vt.to_torch(model).eval()
    with pytest.warns(UserWarning, match="4 in all.* or no values"):
        network.to("meta")
    assert network(torch.empty(2, 8, 8, 3, device="meta")).shape == (2, 2)
    network.to_empty(device="cpu")
    assert all((a == b).all() for a, b in zip(model.get_weights(), before, strict=True))


def with_every_kind() -> keras.Model:
    """Weights of a convolution, state of a norm, and a layer that Keras runs."""
    i = keras.Input((6, 6, 3))
    x = L.BatchNormalization(name="norm")(L.Conv2D(4, 3, name="conv")(i))
    return keras.Model(i, L.LSTM(2, name="lstm")(L.Reshape((16, 4))(x)))


def by_del(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    delattr(module, name)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor)


def by_load(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    module.load_state_dict({**module.state_dict(), name: tensor}, assign=True)


def twice(module: nn.Module, name: str, tensor: Any) -> None:
    for one in (tensor.detach()[:1], tensor):
        setattr(module, name, type(tensor)(one))


def by_data(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    getattr(module, name).data = tensor.detach()


def by_swap(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    torch.utils.swap_tensors(getattr(module, name), tensor)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["conv.weight", "norm.running_var", "lstm.lstm_cell_kernel"])
@pytest.mark.parametrize("replace", [setattr, by_del, by_load, twice, by_data, by_swap])
def test_what_takes_a_parameters_place_is_keras_s_too(
    replace: Callable[..., None], place: str, tmp_path: Path
) -> None:
    """At once, in predict, in save and under accelerate_; and so is every later step on it."""
    model, x = with_every_kind(), torch.rand(2, 6, 6, 3)
    network = vt.to_torch(model).eval()
    fast = vt.accelerate_(keras.Model(model.input, model.output))
    child, _, name = place.partition(".")
    module = network.get_submodule(child)
    old = getattr(module, name)
    new = torch.rand_like(old) + 1
    replace(module, name, nn.Parameter(new.clone()) if old.requires_grad else new.clone())
    if replace in (by_data, by_swap):  # torch tells nobody, and the network must look
        network.state_dict()
    for step in (1, 2):
        value = getattr(module, name)
        assert (value == new * step).all()
        model.save(tmp_path / "m.keras")
        found = [
            torch.as_tensor(run.predict(x, verbose=0))
            for run in (model, fast, keras.saving.load_model(tmp_path / "m.keras"))
        ]
        expected = network(x).detach()
        for one in found:
            torch.testing.assert_close(one, expected)
        with torch.no_grad():
            value.mul_(2)


def test_what_stands_in_for_one_call_leaves_keras_alone() -> None:
    model, x = with_every_kind(), torch.rand(2, 6, 6, 3)
    before, network = model.get_weights(), vt.to_torch(model).eval()
    others: dict[str, torch.Tensor] = {
        name: nn.Parameter(torch.zeros_like(p)) for name, p in network.named_parameters()
    }
    assert torch.func.functional_call(network, others, (x,)).abs().max() == 0
    network(x)
    assert all((a == b).all() for a, b in zip(model.get_weights(), before, strict=True))


@pytest.mark.parametrize(
    "new",
    [
        torch.zeros(3, 3, 3, 4),
        torch.zeros(4, 3, 5, 5),
        torch.zeros(4, 3, 3, 3).double(),
        torch.zeros(4, 3, 3, 3, device="meta"),
        torch.zeros(4, 3, 3, 3).as_subclass(type("Quantized", (torch.Tensor,), {})),
    ],
    ids=["another order", "another size", "another dtype", "no values", "another class"],
)
def test_what_keras_cannot_hold_stands_alone_and_says_so(new: torch.Tensor) -> None:
    model = model_of()
    before, network = model.get_weights(), vt.to_torch(model)
    network.conv.weight = nn.Parameter(new)
    with pytest.warns(UserWarning, match=r"Weights of .* \(conv/kernel first, 1 in all\)"):
        network.state_dict()
    network.conv.weight = nn.Parameter(torch.zeros(4, 3, 3, 3))
    network.state_dict()
    assert all((a == b).all() for a, b in zip(model.get_weights(), before, strict=True))


def in_inference_mode(network: Any) -> None:
    with torch.inference_mode():
        network.conv.weight = nn.Parameter(torch.zeros(4, 3, 3, 3))


def test_what_cannot_learn_stands_alone_and_says_so() -> None:
    model = model_of()
    network = vt.to_torch(model)
    in_inference_mode(network)
    with pytest.warns(UserWarning, match=r"Weights of .* \(conv/kernel first, 1 in all\)"):
        network.state_dict()
    assert not model.get_layer("conv").kernel.value.is_inference()


@pytest.mark.parametrize("both", [False, True])
def test_a_weight_in_two_places_stays_one_or_parts(both: bool) -> None:
    dense, i = L.Dense(3, name="dense"), keras.Input((3,))
    model = keras.Model(i, L.Flatten()(dense(L.Reshape((1, 3))(dense(i)))))
    network = vt.to_torch(model).eval()
    places = [m for m in network.modules() if isinstance(m, nn.Linear)]
    assert len(places) == 2 and places[0].weight is places[1].weight
    before = dense.kernel.value.detach().clone()
    weight = nn.Parameter(torch.eye(3) * 2)
    for module in places[: 2 if both else 1]:
        module.weight = weight
    if both:
        assert (dense.kernel.value == weight).all()
    else:
        with pytest.warns(UserWarning, match=r"\(dense/kernel first, 1 in all\).* not one tensor"):
            network.state_dict()
        assert (dense.kernel.value == before).all()


@pytest.mark.slow
def test_copies_of_a_child_leave_keras_alone() -> None:
    model = model_of()
    before, network = model.get_weights(), vt.to_torch(model)
    for twin in (copy.deepcopy(network), vt.to_torch(model, share=False)):
        twin.conv.weight = nn.Parameter(torch.zeros(4, 3, 3, 3))
        twin.load_state_dict({k: v * 0 for k, v in twin.state_dict().items()}, assign=True)
    conv = network.conv
    del network
    gc.collect()
    conv.weight = nn.Parameter(torch.zeros(4, 3, 3, 3))  # it has no network any more
    assert all((a == b).all() for a, b in zip(model.get_weights(), before, strict=True))


def test_a_copy_of_another_dtype_says_nothing() -> None:
    network = vt.to_torch(with_every_kind(), share=False)
    network.double()  # a warning would fail
    assert network.lstm.lstm_cell_kernel.dtype == torch.float64


def test_what_is_frozen_here_stays_so_where_its_memory_is_replaced() -> None:
    network = vt.to_torch(model_of())
    network.conv.weight.requires_grad_(False)
    vector = nn.utils.parameters_to_vector(network.parameters())
    nn.utils.vector_to_parameters(2 * vector, network.parameters())
    learn = {name for name, p in network.named_parameters() if p.requires_grad}
    assert learn == {"conv.bias", "out.weight", "out.bias"}
    assert torch.equal(nn.utils.parameters_to_vector(network.parameters()), 2 * vector)


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
