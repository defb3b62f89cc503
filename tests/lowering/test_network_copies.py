"""Copies and pickles of a network keep what those of any torch module keep."""

import copy
import pickle

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
import pytest
import torch
from keras import layers as L
from torch import nn

from vggtorch.lowering import TorchNetwork, to_torch


def double(module, args, output):
    """A hook that can be pickled."""
    return 2 * output


def pickled(network):
    return pickle.loads(pickle.dumps(network))


@pytest.fixture
def network():
    keras.utils.set_random_seed(0)
    i = keras.Input((8, 8, 3), name="image")
    x = L.ReLU(name="relu")(L.BatchNormalization(name="norm")(L.Conv2D(4, 3, name="conv")(i)))
    return to_torch(keras.Model(i, L.Dense(2)(L.Flatten()(x)), name="small")).eval()


X = torch.rand(2, 8, 8, 3, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickled])
def test_what_the_graph_does_not_use_is_kept(network, how):
    network.note = "of the user"
    network.meta["about"] = "of the user"
    network.register_parameter("scale", nn.Parameter(torch.ones(2)))
    network.register_buffer("seen", torch.ones(3))
    network.head = nn.Linear(2, 5)
    expected = network(X)
    network.register_forward_hook(double)
    network.relu.register_forward_hook(double)
    twin = how(network)
    assert type(twin).__name__ == "small" and isinstance(twin, TorchNetwork)
    assert (twin.note, twin.meta["about"], twin.training) == ("of the user", "of the user", False)
    assert list(twin.state_dict()) == list(network.state_dict())
    assert torch.equal(twin(X), network(X))
    assert not torch.allclose(twin(X), expected)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickled])
def test_copies_of_copies_of_edited_networks(network, how):
    network.relu = nn.GELU()
    twin = how(how(network))
    assert torch.equal(twin(X), network(X))
    twin.relu = nn.Tanh()
    assert not torch.allclose(twin(X), network(X))
    (relu,) = (node for node in twin.graph.nodes if node.target == "relu")
    relu.target = "norm"
    twin.recompile()
    assert twin.code != network.code
    assert type(network.relu) is nn.GELU


def test_a_shallow_copy_has_the_same_weights(network):
    twin = copy.copy(network)
    assert all(p is q for p, q in zip(twin.parameters(), network.parameters(), strict=True))


def test_checkpointing_is_copied():
    i = keras.Input((8, 8, 3))
    network = vt.to_torch(keras.Model(i, L.Conv2D(2, 3)(i)), checkpoint=True)
    for how in (copy.copy, copy.deepcopy, pickled):
        assert how(network).meta["checkpoint"]


def test_the_pickle_of_a_compiled_network_is_one_that_is_not(network):
    network.compile(backend="eager")
    twin = pickled(network)
    torch.testing.assert_close(twin(X), network(X))
    assert not twin.is_watched() and network.is_watched()  # its modules run, which torch compiles


def test_a_network_without_batch_norm_is_scripted():
    i = keras.Input((8, 8, 3))
    x = L.MaxPooling2D()(L.Conv2D(4, 3, activation="relu")(i))
    network = to_torch(keras.Model(i, L.Dense(2, activation="softmax")(L.Flatten()(x)))).eval()
    assert torch.allclose(torch.jit.script(network)(X), network(X), atol=1e-6)
