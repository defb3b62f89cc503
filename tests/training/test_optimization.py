"""What trains in which epoch, how fast, and the average of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import keras
import numpy as np
import pytest
import tiny
import torch

from vggtorch.training import checkpoints, data, loop
from vggtorch.training.config import TrainConfig
from vggtorch.training.loop import finetune
from vggtorch.training.optimization import learning_rate, make_optimizer, trained_parameters


def test_learning_rate_is_keras_cosine_decay():
    config = TrainConfig(learning_rate=0.3, warmup=0.25)
    reference = keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=30, warmup_target=0.3, warmup_steps=10
    )
    found = [learning_rate(config, step, 40) for step in range(40)]
    np.testing.assert_allclose(
        found[:10], [float(reference(step + 1)) for step in range(10)], rtol=1e-5
    )
    np.testing.assert_allclose(
        found[10:], [float(reference(step)) for step in range(10, 40)], rtol=1e-4
    )


def changed_layers(before, model):
    return {
        layer.name
        for layer in model.layers
        for old, weight in zip(before[layer.name], layer.weights, strict=True)
        if not np.array_equal(old, keras.ops.convert_to_numpy(weight))
    }


def snapshot(model):
    return {
        layer.name: [keras.ops.convert_to_numpy(w) for w in layer.weights] for layer in model.layers
    }


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False])
def test_layers_thaw_on_schedule_and_frozen_batch_norm_stays(images, config, cache, monkeypatch):
    model = tiny.network(batch_norm=True)
    config = dataclasses.replace(
        config, freeze="block2_pool", unfreeze=((1, "block2_bn1"), (2, "block1_conv1")), cache=cache
    )
    seen, before = [], snapshot(model)
    real = checkpoints.write

    def write(*arguments, **options):
        seen.append(changed_layers(before, model))
        real(*arguments, **options)

    monkeypatch.setattr(checkpoints, "write", write)
    finetune(model, images, config=config)
    assert seen[0] == {"predictions"}
    assert seen[1] == {"block2_bn1", "predictions"}
    assert seen[2] == {
        "block1_conv1", "block1_bn1", "block2_conv1", "block2_bn1", "predictions",
    }  # fmt: skip


def test_rates_fall_with_depth_and_biases_do_not_decay():
    model = tiny.network(batch_norm=True)
    config = TrainConfig(layer_decay=0.5, weight_decay=0.1, learning_rate=1.0)
    optimizer = make_optimizer(
        model, trained_parameters(model, config), config, torch.device("cpu")
    )
    found = {
        id(p): (group["scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    scales = {"block1": 0.25, "block2": 0.5, "predictions": 1.0}
    for layer in model.layers:
        for variable in layer.trainable_variables:
            decay = 0.1 if variable.path.endswith("kernel") else 0.0
            assert found[id(variable.value)] == (scales[layer.name.split("_")[0]], decay)
    assert len(found) == len(model.trainable_variables)


def test_blocks_inside_a_nested_network_have_their_own_rates(config):
    config = dataclasses.replace(config, layer_decay=0.5, weight_decay=0.1)
    inner = tiny.network(classes=None)
    layers = keras.layers
    model = keras.Sequential([inner, layers.Flatten(), layers.Dense(3, name="predictions")])
    trained = trained_parameters(model, config)
    optimizer = make_optimizer(model, trained, config, torch.device("cpu"))
    scales = {id(p): g["scale"] for g in optimizer.param_groups for p in g["params"]}
    found = {v.path.split("/")[-2]: scales[id(v.value)] for v in model.trainable_variables}
    assert found == {"block1_conv1": 0.25, "block2_conv1": 0.5, "predictions": 1.0}


def test_an_unknown_layer_to_freeze(images, config):
    config = dataclasses.replace(config, freeze="block2_pol")
    with pytest.raises(ValueError, match="block2_pool"):
        finetune(tiny.network(), images, config=config)


@pytest.mark.slow
def test_averaged_weights_are_what_is_kept(images, config):
    model = tiny.network()
    config = dataclasses.replace(config, ema_decay=0.5, epochs=2)
    history = finetune(model, images, config=config)
    content = checkpoints.read(Path(config.output_dir) / "best.pt")
    for i, value in content["average"].items():
        assert torch.equal(model.variables[i].value.detach(), value)
        assert not torch.equal(content["variables"][i], value)
    folder = data.hold_out(data.read_folder(images, 16), config.validation_split)[1]
    x, y = folder[[(i, 0) for i in range(len(folder))]]
    loss = keras.losses.SparseCategoricalCrossentropy()(y, model(x.float(), training=False))
    best = history.epochs[history.kept_epoch]
    np.testing.assert_allclose(best["val_loss"], loss.item(), rtol=1e-4)


@pytest.mark.slow
def test_the_average_follows_its_formula(config, monkeypatch):
    config = dataclasses.replace(config, ema_decay=0.4, epochs=1)
    values: list[dict[int, torch.Tensor]] = []
    real = loop.train_step_

    def step(state, *rest):
        if not values:
            values.append({i: p.detach().clone() for i, p in state.trained.items()})
        result = real(state, *rest)
        decay = min(0.4, (1 + state.progress.done) / (10 + state.progress.done))
        expected = {
            i: values[-1][i] * decay + p.detach() * (1 - decay) for i, p in state.trained.items()
        }
        for i, value in expected.items():
            torch.testing.assert_close(state.average[i], value)
        values.append({i: value.clone() for i, value in state.average.items()})
        return result

    monkeypatch.setattr(loop, "train_step_", step)
    finetune(tiny.network(), tiny.dataset(), config=config)
    assert len(values) == 5
