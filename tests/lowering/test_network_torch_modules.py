"""torch's modules inside of Keras models: children like any others, their tensors shared."""

import copy
import warnings

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
import numpy as np
import pytest
import torch
from keras import layers as L
from torch import nn
from torch.nn.utils import prune

from vggtorch.lowering.layer_modules import KerasLayer

X = torch.rand(6, 4, generator=torch.Generator().manual_seed(1))


def wrapped():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    i = keras.Input((4,))
    x = L.TorchModuleWrapper(module, output_shape=(None, 3), name="torch")(i)
    return keras.Model(i, L.Dense(2, name="dense")(x)), module


def inside():
    class Mine(L.Layer):
        def __init__(self):
            super().__init__()
            self.linear, self.dense = nn.Linear(4, 3), L.Dense(2)

        def build(self, shape):
            self.dense.build((None, 3))

        def call(self, x):
            return self.dense(self.linear(x))

        def compute_output_shape(self, shape):
            return shape[0], 2

    i = keras.Input((4,))
    return keras.Model(i, Mine()(i))


def test_a_wrapped_module_is_the_child_itself():
    model, module = wrapped()
    network = vt.to_torch(model)
    child = network.get_submodule("torch")
    assert isinstance(child, nn.Sequential)
    assert [type(m) for m in child] == [nn.Linear, nn.BatchNorm1d]
    assert {"torch.0.weight", "torch.1.running_mean", "torch.1.running_var"} <= {
        *network.state_dict()
    }
    network.train()
    model.predict(X.numpy(), verbose=0)  # Keras sets its own module to evaluation
    torch.testing.assert_close(network(X), network(X))
    assert child[1].num_batches_tracked == 2 and child.training
    ours, theirs = (m[1].get_buffer("running_mean") for m in (child, module))
    assert torch.equal(ours, theirs)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    network(X).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(network.eval()(X), model(X, training=False))


def test_its_buffers_stay_one_where_the_network_is_moved():
    model, module = wrapped()
    network, before = vt.to_torch(model), module[1].running_mean.data_ptr()
    network._apply(torch.clone)  # what `.to()` does, without another device
    assert module[1].running_mean.data_ptr() != before
    network(X)
    assert module[1].num_batches_tracked == 1
    assert network.get_submodule("torch.1").running_mean is module[1].running_mean
    torch.testing.assert_close(network.eval()(X), model(X, training=False))
    with pytest.warns(UserWarning, match="stand alone"):
        network.double()
    assert module[1].running_mean.dtype == torch.float32


def test_a_buffer_that_one_side_has_not_stays_the_others():
    module = nn.Linear(3, 3)
    module.register_buffer("ours", None)
    module.register_buffer("theirs", torch.ones(3))
    i = keras.Input((3,))
    network = vt.to_torch(
        keras.Model(i, L.TorchModuleWrapper(module, output_shape=(None, 3), name="linear")(i))
    )
    network.linear.ours, network.linear.theirs = torch.zeros(3), None
    network.to("cpu")
    assert module.ours is None and torch.equal(module.theirs, torch.ones(3))
    assert torch.equal(network.linear.ours, torch.zeros(3)) and network.linear.theirs is None


def test_its_buffers_move_with_what_keras_runs():
    i = keras.Input((5, 4))
    x = L.TorchModuleWrapper(nn.BatchNorm1d(5), output_shape=(None, 5, 4))(L.Masking()(i))
    model = keras.Model(i, x)
    network = vt.to_torch(model)
    network._apply(torch.clone)
    before = model.layers[-1].module.running_mean.data_ptr()
    network._apply(torch.clone)
    assert model.layers[-1].module.running_mean.data_ptr() != before


@pytest.mark.parametrize("build", [lambda: wrapped()[0], inside])
def test_its_parameters_are_honoured(build):
    model = build()
    network, own = vt.to_torch(model).eval(), vt.to_torch(model, share=False).eval()
    expected = model(X, training=False).detach()
    zeros = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    assert not torch.func.functional_call(network, zeros, (X,)).any()
    with torch.no_grad():
        for p in own.parameters():
            p.zero_()
    assert not own(X).any()
    torch.testing.assert_close(network(X).detach(), expected)
    torch.testing.assert_close(model(X, training=False).detach(), expected)
    with torch.no_grad():
        for p in network.parameters():
            p.zero_()
    assert not model(X, training=False).any()


def test_several_inputs_run_as_keras_runs_them():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.product = nn.Bilinear(4, 4, 2)

        def forward(self, a, b):
            return self.product(a, b)

    a, b = keras.Input((4,)), keras.Input((4,))
    model = keras.Model([a, b], L.TorchModuleWrapper(Both(), output_shape=(None, 2))(a, b))
    network = vt.to_torch(model)
    assert any(isinstance(m, KerasLayer) for m in network.modules())
    torch.testing.assert_close(network(X, X), model([X, X]))
    zeros = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    assert not torch.func.functional_call(network, zeros, (X, X)).any()


def test_fit_trains_it_as_keras_does():
    weights = []
    for accelerated in (False, True):
        model, module = wrapped()
        keras.utils.set_random_seed(0)
        model.get_layer("dense").kernel.assign(np.ones((3, 2)))
        if accelerated:
            vt.accelerate_(model)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(X.numpy(), np.ones((6, 2)), epochs=3, shuffle=False, verbose=0)
        weights.append([*model.get_weights(), module[1].running_mean.numpy()])
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def momentum(module):
    module[1].momentum = 0.5


def activation(module):
    module[2] = nn.Sigmoid()


def one_more(module):
    module.append(nn.Hardtanh(0, 0.3))


def weight(module):
    module[1].weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))


def statistics(module):
    module[1].running_mean = torch.ones(3)


def forward(module):
    module[2].forward = lambda x: 3 * x


def parametrized(module):
    nn.utils.parametrizations.weight_norm(module[0])


def pruned(module):
    prune.l1_unstructured(module[0], "weight", amount=0.5)


def hook(module):
    module[2].register_forward_hook(lambda module, inputs, output: 2 * output)


EDITS = (momentum, activation, one_more, weight, statistics, forward, parametrized, pruned)


STATISTICS = "1.running_mean", "1.running_var", "1.num_batches_tracked"


def of_three():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
    i = keras.Input((4,))
    x = L.TorchModuleWrapper(module, output_shape=(None, 3), name="torch")(i)
    return keras.Model(i, x), module


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("edit", (*EDITS, hook))
def test_edits_of_the_module_count_in_an_accelerated_model(edit):
    results = []
    for accelerated in (False, True):
        model, module = of_three()
        if accelerated:
            vt.accelerate_(model)
        model.predict(X.numpy(), verbose=0)
        edit(module)
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(X.numpy(), np.ones((6, 3)), epochs=2, shuffle=False, verbose=0)
        results.append([model.predict(X.numpy(), verbose=0), *module.state_dict().values()])
    for stock, ours in zip(*results, strict=True):
        np.testing.assert_allclose(ours, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("edit", EDITS)
def test_edits_of_the_module_are_warned_of_once_and_taken_by_the_next_network(edit):
    model, module = of_three()
    network = vt.to_torch(model).eval()
    expected = network(X)
    edit(module)
    with pytest.warns(UserWarning, match=r"torch.* changed in Keras after to_torch"):
        seen = network(X)
    assert edit in (weight, statistics) or torch.equal(seen, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(X)
    edited = model(X, training=False)
    for share in (True, False):
        torch.testing.assert_close(vt.to_torch(model, share=share).eval()(X), edited)


def test_running_the_keras_model_is_no_edit_of_the_module():
    model, module = of_three()
    network = vt.to_torch(model)
    module.register_full_backward_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for training in (True, False):
            model(X, training=training)
            network(X)


def test_a_frozen_module_trains_its_statistics_as_in_keras():
    means = []
    for run in ("keras", "accelerated", "torch"):
        model, module = of_three()
        vt.freeze_(model, "torch")
        called = vt.accelerate_(model) if run == "accelerated" else model
        if run == "torch":
            vt.to_torch(model).train()(X)
        else:
            called(X, training=True)
        assert not any(p.requires_grad for p in module.parameters())
        means.append(module[1].running_mean)
    assert means[0].any()
    torch.testing.assert_close(means[1:], [means[0]] * 2)


@pytest.mark.parametrize("share", [True, False])
def test_what_is_the_modules_own_and_what_is_shared(share):
    model, module = of_three()
    module[0].register_parameter("late", nn.Parameter(torch.ones(2)))  # Keras doesn't know it
    before, network = copy.deepcopy(module.state_dict()), vt.to_torch(model, share=share).train()
    network(X)
    network.torch[0].weight = nn.Parameter(torch.zeros(3, 4))
    with torch.no_grad():
        network.torch[0].late.zero_()
    changed = {name for name, value in module.state_dict().items() if (value != before[name]).any()}
    assert changed == ({"0.weight", "0.late", *STATISTICS} if share else set())


def behind_a_relu(pool):
    """A network of one convolution and this pool, and what its convolution gives."""
    i = keras.Input((None, None, 3))
    x = L.MaxPooling2D(2, name="pool")(L.Conv2D(4, 2, activation="relu", name="conv")(i))
    network = vt.to_torch(keras.Model(i, x), share=False)
    network.pool = pool
    conv = network.conv
    return network, lambda x: torch.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias).relu()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 3}, {"stride": 1}, {"padding": 1}, {"dilation": 2}, {"ceil_mode": True}],
)
def test_a_pool_behind_a_relu_is_what_it_is_set_to(options, grad):
    new = nn.MaxPool2d(**{"kernel_size": 2, "stride": 2, **options})
    changed = nn.MaxPool2d(2)
    for pool in (new, changed):
        network, maps = behind_a_relu(pool)
        x = torch.randn(2, 8, 8, 3)
        with torch.set_grad_enabled(grad):
            if pool is changed:
                network(x)
                vars(pool).update(options)
            found, expected = network(x), pool(maps(x)).permute(0, 2, 3, 1)
            torch.testing.assert_close(found, expected)
            if grad:
                weight = network.conv.weight
                grads = [torch.autograd.grad(y.square().sum(), weight) for y in (found, expected)]
                torch.testing.assert_close(*grads)


def test_a_map_too_small_for_its_pool_is_refused_as_torch_refuses_it():
    network, maps = behind_a_relu(nn.MaxPool2d(2))
    with torch.no_grad():
        for size in ((3, 2), (2, 3)):
            x = torch.randn(2, *size, 3)
            with pytest.raises(RuntimeError) as torchs:
                network.pool(maps(x))
            with pytest.raises(RuntimeError) as ours:
                network(x)
            assert str(torchs.value) in str(ours.value)
