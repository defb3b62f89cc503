"""stack takes heads of every kind and names them."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
from contract import check, equal, identity, run, vgg
from keras import layers as kl

from vggtorch.models import remember_, weight_set
from vggtorch.surgery import insert, stack, truncate

pytestmark = pytest.mark.usefixtures("one_thread")


def test_weight_set_and_class_are_carried_on():
    model, _ = vgg()
    model = remember_(truncate(model, "block2_pool"), "oxford")
    result = stack(model, kl.Flatten())
    assert weight_set(result) == "oxford"
    assert weight_set(keras.models.clone_model(result)) == "oxford"


@pytest.mark.slow
def test_a_head_of_every_kind(tmp_path):
    model, x = vgg()
    model = stack(truncate(model, "block1_pool"), kl.GlobalAveragePooling2D(name="mean"))
    y = run(model, x)

    head = keras.Sequential([kl.Dense(5), kl.Dense(2)], name="head")
    result = stack(model, head)
    assert result.get_layer("head") is head
    equal(run(result, x), head(y))

    inputs = keras.Input((64,))
    head = keras.Model(inputs, kl.Dense(3)(inputs), name="functional")
    result = stack(model, head)
    check(model, result, new=[head])
    equal(run(result, x), head(y))

    module = torch.nn.Sequential(torch.nn.Linear(64, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    result = stack(model, module)
    assert result.output_shape == (None, 4)
    assert result.layers[-1].module is module
    equal(run(result, x), module.eval()(y))
    result.compile("sgd", "mse")
    result.fit(x, np.ones((2, 4)), verbose=0)
    again = insert(result, "mean", identity())
    assert again.layers[-1].module is not module
    equal(run(again, x), run(result, x))
    larger = insert(stack(vgg()[0], torch.nn.ReLU()), "block4_pool", kl.UpSampling2D())
    assert larger.output_shape == (None, 2, 2, 512)
    assert run(larger, x).shape == (2, 2, 2, 512)
    result.save(tmp_path / "torch.keras")
    loaded = keras.saving.load_model(tmp_path / "torch.keras", safe_mode=False)
    equal(run(loaded, x), run(result, x))


@pytest.mark.slow
def test_automatic_names_give_way():
    model, x = vgg()
    first = stack(model, [kl.Flatten(), kl.Dense(4)])
    dense = kl.Dense(4)
    dense.name = first.layers[-1].name  # as if made in another session
    result = stack(first, dense)
    assert result.layers[-1] is dense
    assert len({layer.name for layer in result.layers}) == len(result.layers)
    equal(run(result, x), dense(run(first, x)))
