"""New heads, and the logits of any network."""

from __future__ import annotations

import dataclasses
import warnings

import keras
import numpy as np
import pytest
import tiny
import torch

from vggtorch import surgery
from vggtorch.models import remember_, weight_set
from vggtorch.training.config import TrainConfig
from vggtorch.training.heads import logits_network, with_head
from vggtorch.training.loop import finetune


@pytest.mark.parametrize(
    ("head", "layers"),
    [
        ("tutorial", "norm conv pool flatten hidden dropout predictions"),
        ("linear", "mean max pool norm predictions"),
        ("mlp", "mean max pool norm dropout hidden norm2 dropout2 predictions"),
    ],
)
def test_heads(head, layers):
    base = remember_(tiny.network(None), "oxford")
    before = tiny.weights(base)
    config = TrainConfig(head=head, cut="block1_pool")
    model = with_head(base, config, 5)
    assert [name for layer in model.layers if (name := layer.name).startswith("head")] == [
        f"head_{name}" for name in layers.split()
    ]
    assert model.output_shape == (None, 5)
    with warnings.catch_warnings():  # it is called with images, not with a list of them
        warnings.simplefilter("error")
        model(np.zeros((1, 16, 16, 3), np.float32))
    assert weight_set(model) == "oxford"
    again = with_head(base, config, 5)
    assert all(map(np.array_equal, tiny.weights(model), tiny.weights(again)))
    assert all(map(np.array_equal, tiny.weights(base), before))
    assert "block2_conv1" not in [layer.name for layer in model.layers]
    keras.models.clone_model(surgery.truncate(model, "block1_pool"))


def test_dense_layers_of_a_head_begin_as_torch_s_do():
    model = with_head(tiny.network(None), TrainConfig(head="multilevel"), 40)
    for name in ("head_hidden", "head_predictions"):
        found = model.get_layer(name).kernel.value.detach()
        inputs, outputs = found.shape
        expected = torch.nn.Linear(inputs, outputs).weight
        assert found.abs().max().item() == pytest.approx(inputs**-0.5, rel=0.01)
        assert found.std().item() == pytest.approx(expected.std().item(), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["tutorial", "linear", "mlp"])
def test_heads_learn_the_same_from_maps_of_any_scale(head, images, config):
    losses = []
    for scale in (1, 1000):  # `oxford`'s maps are as large as pixel values
        base = tiny.network(None)
        kernel = base.get_layer("block1_conv1").kernel
        kernel.assign(kernel * scale)
        folder = f"{config.output_dir}-{scale}"
        config = dataclasses.replace(
            config, head=head, cut="block1_pool", freeze="block1_pool", output_dir=folder
        )
        losses.append(tiny.curve(finetune(base, images, config=config)))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-2)


def test_a_head_needs_feature_maps(images, config):
    with pytest.raises(ValueError, match=r"needs feature maps .*cut='block5_pool'"):
        finetune(tiny.network(), images, config=dataclasses.replace(config, head="linear"))


@pytest.mark.slow
def test_logits_and_softmax_learn_alike_and_softmax_comes_back(config):
    model = tiny.network(dropout=0.0)
    linear = tiny.network(dropout=0.0)
    linear.get_layer("predictions").activation = keras.activations.linear
    first = finetune(model, tiny.dataset(), config=config)
    second = finetune(
        linear,
        tiny.dataset(),
        config=dataclasses.replace(config, output_dir=config.output_dir + "2"),
    )
    assert tiny.curve(first) == tiny.curve(second)
    np.testing.assert_allclose(model(tiny.dataset().tensors[0]).detach().sum(1), 1, rtol=1e-5)


def dense_softmax():
    return [keras.layers.Dense(3, activation="softmax", name="end")]


def lora_softmax():
    layer = keras.layers.Dense(3, activation="softmax", name="end")
    layer.build((None, 147))
    layer.enable_lora(2)
    return [layer]


ENDS = {
    "dense": dense_softmax,
    "activation": lambda: [keras.layers.Dense(3), keras.layers.Activation("softmax")],
    "nested": lambda: [keras.Sequential([keras.Input((147,)), *dense_softmax()])],
    "lora": lora_softmax,
    "einsum": lambda: [keras.layers.EinsumDense("ab,bc->ac", 3, "softmax", None)],
}


@pytest.mark.parametrize("end", ENDS)
def test_a_network_to_logits_leaves_the_model_as_it_is(end):
    layers = [keras.Input((7, 7, 3)), keras.layers.Conv2D(3, 1), keras.layers.Flatten()]
    model = keras.Sequential([*layers, *ENDS[end]()])
    x, config = torch.rand(4, 7, 7, 3), model.get_config()
    expected = model(x, training=False).detach()
    network = logits_network(model, model.inputs[0]).eval()
    torch.testing.assert_close(network(x).softmax(1), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(network(x), expected)
    torch.testing.assert_close(model(x, training=False).detach(), expected, rtol=1e-5, atol=1e-6)
    assert model.get_config() == config
    assert {id(v.value) for v in model.trainable_variables} <= {id(p) for p in network.parameters()}


def test_another_activation_at_the_end(config):
    model = tiny.network()
    model.get_layer("predictions").activation = keras.activations.sigmoid
    with pytest.raises(ValueError, match=r"activation sigmoid\); expected Dense\(classes, activ"):
        finetune(model, tiny.dataset(), config=config)
