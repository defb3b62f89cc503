"""`to_torch`: torch's own modules, on the Keras model's memory, that compute what Keras does."""

import copy
import pickle

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
import numpy as np
import pytest
import torch
from keras import layers as L
from torch import nn

from vggtorch.lowering import to_torch
from vggtorch.lowering.layer_modules import KerasLayer, MixedConv2d, Permute


@pytest.fixture(autouse=True)
def group_bytes():
    """These networks run whole batches: no need to run each test twice, as conftest.py does."""


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    keras.utils.set_random_seed(0)


def vgg(batch_norm=False, size=32, **options):
    options = {"classes": 10, "include_top": True, **options}
    return vt.VGG11(weights=None, input_shape=(size, size, 3), batch_norm=batch_norm, **options)


def images(n=2, size=32):
    return torch.rand(n, size, size, 3, generator=torch.Generator().manual_seed(1))


def small(batch_norm=True):
    i = keras.Input((8, 8, 3), name="image")
    x = L.Conv2D(4, 3, padding="same", activation="relu", name="conv")(i)
    if batch_norm:
        x = L.BatchNormalization(name="norm")(x)
    x = L.Flatten(name="flatten")(x)
    return keras.Model(i, L.Dense(3, activation="softmax", name="logits")(x), name="small")


def run_keras(model, x, training=False):
    return model(x, training=training)


def relative(a, b):
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


# What it is


@pytest.mark.slow
def test_children_are_torchs_own_classes_under_the_layers_names():
    network = to_torch(vgg())
    assert isinstance(network, torch.fx.GraphModule)
    kinds = {name: type(child) for name, child in network.named_children()}
    assert list(kinds)[:6] == [
        "block1_conv1", "block1_conv1_relu", "block1_pool",
        "block2_conv1", "block2_conv1_relu", "block2_pool",
    ]  # fmt: skip
    assert list(kinds)[-6:] == [
        "fc1", "fc1_relu", "fc2", "fc2_relu", "predictions", "predictions_softmax"
    ]  # fmt: skip
    assert kinds["flatten"] is nn.Flatten
    assert kinds.pop("flatten_permute") is Permute  # Keras flattens (N, H, W, C)
    assert set(kinds.values()) == {
        nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Flatten, nn.Linear, nn.Softmax
    }  # fmt: skip
    assert network.block2_conv1.weight.shape == (128, 64, 3, 3)
    assert network.fc1.weight.shape == (4096, 512)


@pytest.mark.slow
def test_batch_norm_is_torchs_with_statistics_as_buffers():
    network = to_torch(vgg(batch_norm=True, include_top=False))
    norm = network.block1_bn1
    assert isinstance(norm, nn.BatchNorm2d) and norm.eps == 1e-5
    assert norm.momentum == pytest.approx(0.1)
    assert set(dict(norm.named_buffers())) == {
        "running_mean", "running_var", "num_batches_tracked"
    }  # fmt: skip
    names = [name for name, _ in network.named_parameters()]
    assert not any("running" in name or "moving" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("data_format", [None, "channels_last", "channels_first"])
def test_vgg_is_bit_identical_to_keras_in_either_layout(data_format):
    model, x = vgg(include_top=False, size=64), images(size=64)
    expected = run_keras(model, x)
    network = to_torch(model, data_format=data_format).eval()
    if data_format == "channels_first":
        received = network(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    else:
        received = network(x)
    assert torch.equal(received, expected)


@pytest.mark.slow
def test_training_with_batch_norm_moves_the_statistics_as_keras_does():
    model = vgg(batch_norm=True, include_top=False)
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    x = images(4)
    expected = run_keras(twin, x, training=True)
    received = to_torch(model).train()(x)
    assert relative(received, expected) < 1e-4
    for a, b in zip(model.non_trainable_variables, twin.non_trainable_variables, strict=True):
        assert torch.allclose(a.value, b.value, rtol=1e-5, atol=1e-6), a.path


def test_nan_stays_nan():
    model = small(batch_norm=False)
    network = to_torch(model).eval()
    x = images(2, 8)
    x[0, 0, 0, 0] = float("nan")
    assert network(x)[0].isnan().all() and network(x)[1].isfinite().all()


# One memory


def test_a_step_on_either_side_is_seen_by_both(tmp_path):
    model, x = small(), images(4, 8)
    network = to_torch(model)
    optimizer = torch.optim.SGD(network.parameters(), 0.5)
    before = model.get_weights()
    network.train()(x)[:, 0].sum().backward()
    optimizer.step()
    assert not np.array_equal(before[0], model.get_weights()[0])
    assert relative(network.eval()(x), run_keras(model, x)) < 1e-6
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert relative(network(x), run_keras(again, x)) < 1e-6

    model.compile("sgd", "sparse_categorical_crossentropy")
    kernel = network.conv.weight.detach().clone()
    model.fit(x.numpy(), np.array([0, 1, 2, 0]), epochs=1, verbose=0)
    assert not torch.equal(kernel, network.conv.weight)
    assert relative(network(x), run_keras(model, x)) < 1e-6


def test_loading_on_either_side_is_seen_by_both():
    model, other, x = small(), small(), images(2, 8)
    network, source = to_torch(model).eval(), to_torch(other).eval()
    network.load_state_dict(source.state_dict())
    assert torch.equal(network(x), source(x)) and torch.equal(
        run_keras(model, x), run_keras(other, x)
    )
    other.set_weights([w + 0.5 for w in other.get_weights()])
    network.load_state_dict({k: v.clone() for k, v in source.state_dict().items()}, assign=True)
    assert torch.equal(network(x), source(x))
    assert torch.equal(run_keras(model, x), run_keras(other, x))


def test_storage_replaced_on_either_side_is_carried_over():
    model, x = small(batch_norm=False), images(2, 8)
    network = to_torch(model).eval()
    vector = nn.utils.parameters_to_vector(network.parameters())
    nn.utils.vector_to_parameters(vector * 2, network.parameters())
    doubled = network(x)
    assert relative(doubled, run_keras(model, x)) < 1e-6
    kernel = model.get_layer("conv").kernel.value
    kernel.data = kernel.detach().clone() * 3
    assert relative(network(x), run_keras(model, x)) < 1e-6
    assert not torch.equal(network(x), doubled)


def test_freezing_a_keras_layer_freezes_its_weights_here():
    model, x = small(), images(4, 8)
    network = to_torch(model).train()
    model.get_layer("norm").trainable = False
    model.get_layer("conv").trainable = False
    assert [n for n, p in network.named_parameters() if p.requires_grad] == [
        "logits.weight", "logits.bias"
    ]  # fmt: skip
    mean = network.norm.running_mean.clone()
    assert torch.equal(network(x), network.eval()(x))
    assert torch.equal(network.norm.running_mean, mean)
    model.get_layer("norm").trainable = True
    network.train()(x)
    assert not torch.equal(network.norm.running_mean, mean)


def test_another_dtype_leaves_keras_alone_and_says_so():
    model, x = small(), images(2, 8)
    weights, expected = model.get_weights(), run_keras(model, x)
    network = to_torch(model).eval()
    with pytest.warns(UserWarning, match="from here on they stand alone"):
        network.double()
    assert relative(network(x.double()).float(), expected) < 1e-5
    with torch.no_grad():
        network.conv.weight.zero_()
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))


def test_moving_the_network_moves_the_keras_variables():
    model = small()
    network = to_torch(model)
    pointer = network.conv.weight.data_ptr()
    network._apply(lambda t: t.clone())  # what .to(device) does, on the one device that is here
    assert network.conv.weight.data_ptr() != pointer
    assert model.get_layer("conv").kernel.value.data_ptr() == network.conv.weight.data_ptr()
    moving = model.get_layer("norm").moving_mean.value
    assert moving.data_ptr() == network.norm.running_mean.data_ptr()


@pytest.mark.parametrize("how", ["copy", "pickle", "share=False"])
def test_copies_stand_alone(how):
    model, x = small(), images(2, 8)
    weights = model.get_weights()
    if how == "share=False":
        twin = to_torch(model, share=False).eval()
    else:
        network = to_torch(model).eval()
        twin = copy.deepcopy(network) if how == "copy" else pickle.loads(pickle.dumps(network))
    assert relative(twin(x), run_keras(model, x)) < 1e-6
    with torch.no_grad():
        for p in (*twin.parameters(), *twin.buffers()):
            p.zero_()
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))


def test_a_replaced_child_is_what_runs():
    model, x = small(), images(2, 8)
    network = to_torch(model).eval()
    network.logits = nn.Linear(256, 5)
    assert network(x).shape == (2, 5)
    network(x)[:, 0].sum().backward()
    assert network.logits.weight.grad is not None


# Graphs


def branched():
    i = keras.Input((9, 9, 3))
    conv = L.Conv2D(4, 3, padding="same", name="shared")
    a, b = conv(i), L.LeakyReLU()(conv(i * 2.0 - 1.0))
    x = L.Concatenate()([L.Add()([a, b]), L.Average()([a, b, a]), L.Maximum()([a, b])])
    x = L.Multiply()([x, L.GlobalAveragePooling2D(keepdims=True)(x)])
    return keras.Model(i, [L.GlobalMaxPooling2D()(x), x])


def nested():
    inner = keras.Sequential(
        [keras.Input((9, 9, 3)), L.Conv2D(4, 3, activation="softmax"), L.MaxPooling2D()], name="in"
    )
    i = keras.Input((9, 9, 3))
    return keras.Model(i, L.Subtract()([inner(i), inner(i + 1.0)]))


def sequences():
    i = keras.Input((7,), dtype="int32")
    x = L.Embedding(20, 8, mask_zero=True)(i)
    x = L.LayerNormalization()(x)
    x = L.MultiHeadAttention(2, 4)(x, x)
    return keras.Model(i, L.LSTM(3)(x))


def one_dimension():
    i = keras.Input((12, 3))
    x = L.Conv1D(6, 3, strides=2, padding="same", activation="gelu")(i)
    x = L.BatchNormalization()(L.SpatialDropout1D(0.3)(x))
    x = L.Conv1D(4, 2, padding="causal")(L.AveragePooling1D(2)(x))
    return keras.Model(i, L.Permute((2, 1))(L.Reshape((-1, 2))(x)))


def decoder():
    i = keras.Input((5, 6, 3))
    x = L.Conv2DTranspose(4, 4, strides=2, padding="same", activation="tanh")(i)
    x = L.Conv2DTranspose(4, 3, strides=2, padding="same")(x)  # uneven: as Keras runs it
    x = L.Conv2DTranspose(3, 3, strides=2)(L.UpSampling2D()(x))
    x = L.SeparableConv2D(6, 3, strides=2, padding="same", depth_multiplier=2)(x)
    x = L.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(L.Cropping2D(((1, 0), (2, 1)))(x))
    return keras.Model(i, L.Dense(2, activation="log_softmax")(L.ZeroPadding2D(1)(x)))


def dropouts():
    i = keras.Input((9, 9, 3))
    x = L.Dropout(0.5, noise_shape=(None, 1, 1, 3))(L.Dropout(0.5)(i))
    return keras.Model(i, L.Rescaling([1.0, 2.0, 3.0], 0.5)(L.PReLU()(x)))


def channels_first():
    i = keras.Input((3, 9, 9))
    x = L.Conv2D(4, 3, strides=2, padding="same", data_format="channels_first")(i)
    x = L.BatchNormalization(axis=1)(x)
    x = L.MaxPooling2D(2, data_format="channels_first")(x)
    return keras.Model(i, L.Flatten(data_format="channels_first")(x))


MODELS = [branched, nested, sequences, one_dimension, decoder, dropouts]


def example(model):
    (shape,), dtype = [t.shape for t in model.inputs], model.inputs[0].dtype
    if dtype == "int32":
        return torch.randint(0, 20, (3, *shape[1:]), dtype=torch.int32)
    return torch.randn(3, *shape[1:])


@pytest.mark.parametrize("build", MODELS)
def test_any_graph_computes_what_keras_does(build):
    model = build()
    x = example(model)
    expected, received = run_keras(model, x), to_torch(model).eval()(x)
    for a, b in zip(keras.tree.flatten(received), keras.tree.flatten(expected), strict=True):
        assert a.shape == b.shape and relative(a, b) < 1e-5


@pytest.mark.parametrize("build", [branched, nested, one_dimension, decoder, sequences])
def test_gradients_are_keras_gradients(build):
    model = build()
    x = example(model)
    outputs = keras.tree.flatten(run_keras(model, x))
    sum((y * torch.arange(y.numel()).view(y.shape)).sum() for y in outputs).backward()
    expected = {v.path: v.value.grad.clone() for v in model.trainable_variables}
    network = to_torch(model, share=False).eval()
    outputs = keras.tree.flatten(network(x))
    sum((y * torch.arange(y.numel()).view(y.shape)).sum() for y in outputs).backward()
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(gradients) == len(expected)
    received = sorted(float(g.double().norm()) for g in gradients)
    norms = sorted(float(g.double().norm()) for g in expected.values())
    assert received == pytest.approx(norms, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, 4])
def test_padding_same_at_every_size(kernel, stride):
    i = keras.Input((None, None, 2))
    outputs = [
        L.Conv2D(3, kernel, strides=stride, padding="same")(i),
        L.MaxPooling2D(kernel, stride, padding="same")(i),
        L.AveragePooling2D(kernel, stride, padding="same")(i),
    ]
    model = keras.Model(i, outputs)
    network = to_torch(model).eval()
    for size in (5, 6, 7, 8):
        x = torch.randn(1, size, size + 1, 2)
        for a, b in zip(network(x), run_keras(model, x), strict=True):
            assert a.shape == b.shape and relative(a, b) < 1e-5, (size, a.shape)


def test_training_reaches_layers_inside_layers_that_do_not_take_it():
    class Block(L.Layer):
        def __init__(self):
            super().__init__()
            self.drop = L.Dropout(0.5)

        def call(self, x):
            return self.drop(x)

    i = keras.Input((100,))
    network = to_torch(keras.Model(i, Block()(i)))
    x = torch.ones(2, 100)
    assert torch.equal(network.eval()(x), x)
    assert 0 < (network.train()(x) == 0).float().mean() < 1


def test_layers_that_keras_runs_draw_anew_in_training():
    i = keras.Input((50,))
    network = to_torch(keras.Model(i, L.Dropout(0.5, seed=1)(i))).train()
    x = torch.ones(2, 50)
    a, b = network(x), network(x)
    assert 0 < (a == 0).float().mean() < 1 and not torch.equal(a, b)
    assert torch.equal(network.eval()(x), x)


def test_layers_that_keras_runs_follow_to_a_device_and_not_to_a_dtype():
    model = sequences()
    x = example(model)
    expected, network = run_keras(model, x), to_torch(model).eval()
    network._apply(lambda t: t.clone())
    assert torch.equal(network(x), expected)
    layer = next(m for m in network.modules() if isinstance(m, KerasLayer))
    (operation,) = layer.operation
    assert operation.variables[0].value is getattr(layer, layer.names[0])
    with pytest.warns(UserWarning, match="from here on they stand alone"):
        network.double()
    assert {v.value.dtype for v in model.trainable_variables} == {torch.float32}
    assert torch.equal(run_keras(model, x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("how", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_copies_with_layers_that_keras_runs_stand_alone(how):
    model = sequences()
    x = example(model)
    expected, network = run_keras(model, x), to_torch(model).eval()
    twin = how(network)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert twin(x).abs().max() == 0
    assert torch.equal(network(x), expected) and torch.equal(run_keras(model, x), expected)


def test_inputs_go_in_one_by_one_or_by_name():
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    model = keras.Model({"a": a, "b": b}, {"sum": L.Add()([a, b]), "dense": L.Dense(2)(a)})
    x, y = torch.rand(2, 3), torch.rand(2, 3)
    network = to_torch(model)
    expected = run_keras(model, {"a": x, "b": y})
    for received in (network(x, y), network(b=y, a=x)):
        assert set(received) == {"sum", "dense"}
        assert torch.equal(received["sum"], expected["sum"])


@pytest.mark.parametrize("names", [("self", "torch"), ("a.b", "a b"), ("lambda", "1")])
def test_inputs_of_any_name(names):
    a, b = (keras.Input((3,), name=name) for name in names)
    model = keras.Model([a, b], L.Concatenate()([L.Subtract()([a, b]), L.Dense(2)(a)]))
    network = to_torch(model)
    x, y = torch.rand(2, 3), torch.rand(2, 3)
    inputs = [node.target for node in network.graph.nodes if node.op == "placeholder"]
    expected = run_keras(model, [x, y])
    for received in (network(x, y), network(**dict(zip(inputs, (x, y), strict=True)))):
        torch.testing.assert_close(received, expected)


def test_functional_call_reaches_layers_that_run_as_keras_runs_them():
    model = sequences()
    network = to_torch(model).eval()
    x = example(model)
    expected = network(x)
    weights = model.get_weights()
    zeros = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    assert torch.equal(torch.func.functional_call(network, zeros, x), torch.zeros_like(expected))
    assert torch.equal(network(x), expected)
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))


def test_mixed_precision_is_computed_as_keras_does():
    i = keras.Input((8, 8, 3))
    conv = L.Conv2D(4, 3, activation="relu", dtype="mixed_bfloat16")
    model = keras.Model(i, L.Dense(2, dtype="float32")(conv(i)))
    network, x = to_torch(model).eval(), images(2, 8)
    assert type(getattr(network, conv.name)) is MixedConv2d
    assert getattr(network, conv.name).weight.dtype == torch.float32
    assert relative(network(x), run_keras(model, x)) < 1e-2


def test_channels_first_models_need_no_permutation():
    model = channels_first()
    network = to_torch(model)
    assert network.code.count("permute") == 0
    x = torch.randn(2, 3, 9, 9)
    meta = keras.models.clone_model(model)
    meta.set_weights(model.get_weights())
    assert relative(network.eval()(x), run_keras(meta, x)) < 1e-5


def test_a_subclassed_model_and_a_wrong_layout_are_refused():
    class Mine(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="subclassed model .Mine.*to_torch needs a Functional"):
        to_torch(Mine())
    with pytest.raises(ValueError, match="Received data_format='NCHW'; expected"):
        to_torch(small(), data_format="NCHW")
