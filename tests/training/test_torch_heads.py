"""What torch modules and adapted layers hold goes with a run, and comes back from it."""

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
import numpy as np
import pytest
import tiny
import torch
from keras import layers

from vggtorch.measuring import bench


def model() -> keras.Model:
    """A network with a Normalization, not adapted yet, and a head of torch's with a batch norm."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((16, 16, 3))
    x = layers.Normalization(name="scaling")(inputs)
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, name="conv")(x))
    head = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    return vt.stack(keras.Model(inputs, x), head)


def buffers(of: keras.Model) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in of.layers[-1].module.buffers()]


@pytest.mark.slow
def test_a_checkpoint_has_them(tmp_path):
    trained = model()
    trained.get_layer("scaling").adapt(np.random.default_rng(0).normal(90, 40, (20, 16, 16, 3)))
    config = vt.TrainConfig(epochs=2, batch_size=8, output_dir=str(tmp_path))
    result = vt.finetune(trained, tiny.dataset(), config=config).model
    again = vt.load_checkpoint_(model(), tmp_path / "last.pt")
    assert int(buffers(result)[2]) > 0  # batches that its batch norm has counted
    for found, expected in zip(buffers(again), buffers(result), strict=True):
        assert torch.equal(found, expected)
    x = tiny.dataset(4, seed=1).tensors[0]
    assert torch.equal(again(x, training=False), result(x, training=False))
    assert not torch.allclose(model()(x, training=False), result(x, training=False))


def test_a_search_for_the_rate_and_a_benchmark_leave_them_as_they_were():
    network = model()
    before = buffers(network)
    config = vt.TrainConfig(batch_size=8)
    vt.find_learning_rate(network, tiny.dataset(), config=config, steps=3)
    bench(network, 4, repeats=1)
    for found, expected in zip(buffers(network), before, strict=True):
        assert torch.equal(found, expected)
