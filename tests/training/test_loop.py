"""The loop as a whole: what comes out is what Keras's fit gives, however the run is done."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tiny
import two_processes
from fresh import as_two
from torch.utils.data import DataLoader

from vggtorch.training import checkpoints, data
from vggtorch.training.loop import finetune
from vggtorch.training.optimization import learning_rate
from vggtorch.training.run import load_checkpoint_


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("regularizer", [None, keras.regularizers.L1L2(0.01, 0.02)])
def test_the_losses_are_those_of_keras_fit(config, optimizer, smoothing, regularizer):
    schedule = "constant" if optimizer == "sgd" else "cosine"  # Keras's velocity holds the rate
    config = dataclasses.replace(
        config, optimizer=optimizer, schedule=schedule, warmup=0.0 if optimizer == "sgd" else 0.2,
        weight_decay=0.0, learning_rate=1e-2, label_smoothing=smoothing, seed=5,
    )  # fmt: skip
    train, held = tiny.dataset(), tiny.dataset(9, seed=1)
    plan = data.shuffled(len(train), config.batch_size, config.seed)
    steps = config.epochs * len(plan(0))

    class Schedule(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return learning_rate(config, int(step), steps)

        def get_config(self):
            return {}

    reference = tiny.regularized(tiny.network(dropout=0.0), regularizer)
    reference.compile(
        keras.optimizers.SGD(Schedule(), momentum=0.9)
        if optimizer == "sgd"
        else keras.optimizers.Adam(Schedule(), epsilon=1e-8),
        keras.losses.CategoricalCrossentropy(label_smoothing=smoothing),
    )
    expected = []
    for epoch in range(config.epochs):
        order = sum(plan(epoch), [])
        x, y = train.tensors[0][order], keras.utils.to_categorical(train.tensors[1][order], 3)
        run = reference.fit(x, y, config.batch_size, shuffle=False, verbose=0)
        expected.append(run.history["loss"][0])

    model = tiny.regularized(tiny.network(dropout=0.0), regularizer)
    history = finetune(model, train, held, config)
    np.testing.assert_allclose(tiny.curve(history), expected, rtol=2e-4)
    load_checkpoint_(model, Path(config.output_dir) / "last.pt")
    for ours, theirs in zip(tiny.weights(model), tiny.weights(reference), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4)
    logits = model(held.tensors[0], training=False).detach()
    loss = keras.losses.SparseCategoricalCrossentropy()(held.tensors[1], logits)
    penalty = sum(float(loss.detach()) for loss in model.losses)
    np.testing.assert_allclose(history.epochs[-1]["val_loss"], float(loss) + penalty, rtol=1e-4)


@pytest.mark.slow
def test_it_learns(images, config):
    config = dataclasses.replace(config, epochs=12, learning_rate=1e-2)
    history = finetune(tiny.network(), images, config=config)
    assert history.classes == ("blue", "green", "red")
    assert history.epochs[history.kept_epoch]["val_accuracy"] == max(
        tiny.curve(history, "val_accuracy")
    )
    assert max(tiny.curve(history, "val_accuracy")) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [None, "block1_pool"])
def test_a_sequential_model_trains_as_the_functional_one_does(images, config, freeze):
    config = dataclasses.replace(config, freeze=freeze)
    functional, layers = tiny.network(dropout=0.0), tiny.network(dropout=0.0).layers
    sequential = keras.Sequential([keras.Input((16, 16, 3)), *layers[1:]])
    expected = finetune(functional, images, config=config)
    config = dataclasses.replace(config, output_dir=config.output_dir + "2")
    found = finetune(sequential, images, config=config)
    assert found.model is sequential
    assert tiny.curve(found) == tiny.curve(expected)
    assert all(map(np.array_equal, tiny.weights(sequential), tiny.weights(functional)))


@pytest.mark.slow
def test_a_cached_prefix_changes_nothing(images, config):
    model, other = tiny.network(dropout=0.0), tiny.network(dropout=0.0)
    config = dataclasses.replace(config, freeze="block2_pool")
    cached = finetune(model, images, config=config)
    config = dataclasses.replace(config, cache=False, output_dir=config.output_dir + "2")
    plain = finetune(other, images, config=config)
    for figure in ("loss", "accuracy", "val_loss", "val_accuracy"):
        np.testing.assert_allclose(tiny.curve(cached, figure), tiny.curve(plain, figure), rtol=1e-4)


@pytest.mark.slow
def test_a_loader_gives_its_own_batches(config):
    loader = DataLoader(tiny.dataset(), batch_size=5, shuffle=True)
    history = finetune(tiny.network(), loader, DataLoader(tiny.dataset(9), batch_size=4), config)
    progress = checkpoints.read(Path(config.output_dir) / "last.pt")["progress"]
    assert progress["done"] == 3 * 4
    assert history.classes == ("0", "1", "2")


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(images, tmp_path, one_thread):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    two_processes.train(tmp_path / "one", images)
    as_two(two_processes.train_as_one_of_two, tmp_path / "two", images)
    # What was stopped by a signal to one process ends as what ran through.
    for first, second in (("mixed", "mixed"), ("cached", "cached"), ("cached", "stopped")):
        one, two = (
            json.loads((tmp_path / n / f"{name}.json").read_text())
            for n, name in (("one", first), ("two", second))
        )
        assert (one["processes"], two["processes"]) == (1, 2)
        for a, b in zip(one["epochs"], two["epochs"], strict=True):
            for figure in set(a) - {"seconds"}:
                np.testing.assert_allclose(a[figure], b[figure], rtol=1e-4, err_msg=figure)


@pytest.mark.slow
@pytest.mark.parametrize("patience", [None, 2])
def test_the_last_epochs_weights_are_kept_where_the_best_ones_are_not_asked_for(config, patience):
    train, held = tiny.dataset(), tiny.dataset(9)
    config = dataclasses.replace(
        config, epochs=9, learning_rate=1e-12, patience=patience, restore_best_weights=False
    )
    history = finetune(tiny.network(dropout=0.0), train, held, config)
    # Nothing is learned, so the first epoch is the best, and stays so until patience ends.
    accuracies = tiny.curve(history, "val_accuracy")
    assert accuracies == [accuracies[0]] * len(accuracies)
    assert len(history.epochs) == (9 if patience is None else patience + 1)
    assert history.kept_epoch == len(history.epochs) - 1
    content = checkpoints.read(Path(config.output_dir) / "best.pt")
    assert content["progress"]["epoch"] == len(history.epochs)
    assert history.evaluation is not None
    assert history.evaluation.loss == history.epochs[-1]["val_loss"]


@pytest.mark.slow
def test_patience(config):
    train, held = tiny.dataset(), tiny.dataset(9)
    config = dataclasses.replace(config, epochs=9, patience=2, learning_rate=1e-12)
    history = finetune(tiny.network(dropout=0.0), train, held, config)
    assert len(history.epochs) == history.kept_epoch + 3
    content = checkpoints.read(Path(config.output_dir) / "best.pt")
    assert content["progress"]["kept_epoch"] == history.kept_epoch
    assert content["progress"]["epoch"] == history.kept_epoch + 1


@pytest.mark.slow
def test_tensorboard(images, config):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = finetune(
        tiny.network(), images, config=dataclasses.replace(config, log_with=("tensorboard",))
    )
    events = loader.EventAccumulator(f"{config.output_dir}/vggtorch")
    events.Reload()
    found = [event.value for event in events.Scalars("val_loss")]
    np.testing.assert_allclose(found, tiny.curve(history, "val_loss"), rtol=1e-6)
