from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tiny
import torch
from torch.utils.data import DataLoader, TensorDataset

from vggtorch import surgery
from vggtorch.models.preprocessing import remember_, weight_set
from vggtorch.training import checkpoints, data
from vggtorch.training import loop as training
from vggtorch.training.config import TrainConfig
from vggtorch.training.loop import find_learning_rate, finetune, load_checkpoint_


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.pictures(tmp_path_factory.mktemp("images") / "data")


@pytest.fixture
def config(tmp_path):
    return TrainConfig(epochs=3, batch_size=6, image_size=16, folder=str(tmp_path / "run"))


def dataset(count=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, 16, 3, generator=generator) * 100 + 100
    return TensorDataset(x, torch.arange(count) % 3)


def curve(history, name="loss"):
    return [epoch[name] for epoch in history.epochs]


# The reference: Keras


def regularized(network, regularizer):
    for layer in network.layers:
        if hasattr(layer, "kernel"):
            layer.kernel.regularizer = regularizer
    return network


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("regularizer", [None, keras.regularizers.L1L2(0.01, 0.02)])
def test_the_losses_are_those_of_keras_fit(config, optimizer, smoothing, regularizer):
    schedule = "constant" if optimizer == "sgd" else "cosine"  # Keras's velocity holds the rate
    config = dataclasses.replace(
        config, optimizer=optimizer, schedule=schedule, warmup=0.0 if optimizer == "sgd" else 0.2,
        weight_decay=0.0, learning_rate=1e-2, label_smoothing=smoothing, seed=5,
    )  # fmt: skip
    train, held = dataset(), dataset(9, seed=1)
    plan = data.shuffled(len(train), config.batch_size, config.seed)
    steps = config.epochs * len(plan(0))

    class Schedule(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return training.learning_rate(config, int(step), steps)

        def get_config(self):
            return {}

    reference = regularized(tiny.network(dropout=0.0), regularizer)
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

    model = regularized(tiny.network(dropout=0.0), regularizer)
    history = finetune(model, train, held, config)
    np.testing.assert_allclose(curve(history), expected, rtol=2e-4)
    load_checkpoint_(model, Path(config.folder) / "last.pt")
    for ours, theirs in zip(tiny.weights(model), tiny.weights(reference), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4)
    logits = model(held.tensors[0], training=False).detach()
    loss = keras.losses.SparseCategoricalCrossentropy()(held.tensors[1], logits)
    penalty = float(sum(model.losses))
    np.testing.assert_allclose(history.epochs[-1]["val_loss"], float(loss) + penalty, rtol=1e-4)


def test_activity_regularisers_are_refused(config):
    model = tiny.network()
    model.get_layer("block1_conv1").activity_regularizer = keras.regularizers.L2(0.1)
    with pytest.raises(ValueError, match="block1_conv1 have an activity_regularizer"):
        finetune(model, dataset(), config=config)


def test_learning_rate_is_keras_cosine_decay():
    config = TrainConfig(learning_rate=0.3, warmup=0.25)
    reference = keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=30, warmup_target=0.3, warmup_steps=10
    )
    found = [training.learning_rate(config, step, 40) for step in range(40)]
    np.testing.assert_allclose(
        found[:10], [float(reference(step + 1)) for step in range(10)], rtol=1e-5
    )
    np.testing.assert_allclose(
        found[10:], [float(reference(step)) for step in range(10, 40)], rtol=1e-4
    )


def test_it_learns(images, config):
    config = dataclasses.replace(config, epochs=12, learning_rate=1e-2)
    history = finetune(tiny.network(), images, config=config)
    assert history.classes == ("blue", "green", "red")
    assert history.epochs[history.best_epoch]["val_accuracy"] == max(curve(history, "val_accuracy"))
    assert max(curve(history, "val_accuracy")) >= 0.8


# One batch, however it is run


def test_two_processes_give_the_losses_of_one(images, tmp_path):
    script = Path(__file__).with_name("two_processes.py")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (script.parents[2], script.parents[1]))),
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for name in ("images", "cached"):
        results = []
        for processes in (1, 2):
            folder = tmp_path / f"{name}{processes}"
            launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            subprocess.run(
                [sys.executable, *(launch if processes == 2 else []), script, folder, images],
                env=environment, check=True, capture_output=True, timeout=300,
            )  # fmt: skip
            results.append(json.loads((folder / "history.json").read_text()))
        one, two = results
        assert (one["processes"], two["processes"]) == (1, 2)
        for a, b in zip(one["epochs"], two["epochs"], strict=True):
            for figure in set(a) - {"seconds"}:
                np.testing.assert_allclose(a[figure], b[figure], rtol=1e-4, err_msg=figure)


def test_pieces_of_a_batch_add_up_to_it(config):
    losses = [
        curve(
            finetune(
                regularized(tiny.network(dropout=0.0), keras.regularizers.L2(0.02)),
                dataset(),
                config=dataclasses.replace(config, accumulate=n, folder=f"{config.folder}{n}"),
            )
        )
        for n in (1, 4)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_out_of_memory_runs_the_batch_in_pieces(config, monkeypatch):
    expected = curve(finetune(tiny.network(dropout=0.0), dataset(), config=config))
    real = torch.nn.functional.cross_entropy

    def small_gpu(outputs, labels, **options):
        if len(labels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(outputs, labels, **options)

    monkeypatch.setattr(training.F, "cross_entropy", small_gpu)
    config = dataclasses.replace(config, folder=config.folder + "2")
    with pytest.warns(UserWarning, match=r"from step 0 on, each batch of 6 runs in 4 pieces"):
        history = finetune(tiny.network(dropout=0.0), dataset(), config=config)
    np.testing.assert_allclose(curve(history), expected, rtol=1e-5)


def test_out_of_memory_with_one_image_is_an_error(config, monkeypatch):
    def no_gpu(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(training.F, "cross_entropy", no_gpu)
    with (
        pytest.warns(UserWarning, match="pieces"),
        pytest.raises(
            ValueError, match="memory doesn't suffice for batches of 6 .* smaller batch_size"
        ),
    ):
        finetune(tiny.network(), dataset(), config=config)


def test_a_cached_prefix_changes_nothing(images, config):
    model, other = tiny.network(dropout=0.0), tiny.network(dropout=0.0)
    config = dataclasses.replace(config, freeze="block2_pool")
    cached = finetune(model, images, config=config)
    config = dataclasses.replace(config, cache=False, folder=config.folder + "2")
    plain = finetune(other, images, config=config)
    for figure in ("loss", "accuracy", "val_loss", "val_accuracy"):
        np.testing.assert_allclose(curve(cached, figure), curve(plain, figure), rtol=1e-4)


def test_a_loader_gives_its_own_batches(config):
    loader = DataLoader(dataset(), batch_size=5, shuffle=True)
    history = finetune(tiny.network(), loader, DataLoader(dataset(9), batch_size=4), config)
    progress = checkpoints.read(Path(config.folder) / "last.pt")["progress"]
    assert progress["done"] == 3 * 4
    assert history.classes == ("0", "1", "2")


def test_bf16_and_back(images, config):
    losses: list[list[float]] = []
    for precision in ("fp32", "bf16", "fp32"):
        folder = f"{config.folder}{len(losses)}"
        changed = dataclasses.replace(config, precision=precision, folder=folder)
        losses.append(curve(finetune(tiny.network(dropout=0.0), images, config=changed)))
    assert losses[0] == losses[2] != losses[1]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.1)


# What trains


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


@pytest.mark.parametrize("cache", [True, False])
def test_layers_thaw_on_schedule_and_frozen_batch_norm_stays(images, config, cache, monkeypatch):
    model = tiny.network(batch_norm=True)
    config = dataclasses.replace(
        config, freeze="block2_pool", unfreeze=((1, "block2_bn1"), (2, "block1_conv1")), cache=cache
    )
    seen, before = [], snapshot(model)
    real = training._save

    def save(run, is_best):
        seen.append(changed_layers(before, run.model))
        real(run, is_best)

    monkeypatch.setattr(training, "_save", save)
    finetune(model, images, config=config)
    assert seen[0] == {"predictions"}
    assert seen[1] == {"block2_bn1", "predictions"}
    assert seen[2] == {
        "block1_conv1", "block1_bn1", "block2_conv1", "block2_bn1", "predictions",
    }  # fmt: skip


def test_rates_fall_with_depth_and_biases_do_not_decay():
    model = tiny.network(batch_norm=True)
    config = TrainConfig(layer_decay=0.5, weight_decay=0.1, learning_rate=1.0)
    optimizer = training._optimizer(
        model, training._trained(model, config), config, torch.device("cpu")
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


def test_an_unknown_layer_to_freeze(images, config):
    config = dataclasses.replace(config, freeze="block2_pol")
    with pytest.raises(ValueError, match="block2_pool"):
        finetune(tiny.network(), images, config=config)


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
    model = training.with_head(base, config, 5)
    assert [name for layer in model.layers if (name := layer.name).startswith("head")] == [
        f"head_{name}" for name in layers.split()
    ]
    assert model.output_shape == (None, 5)
    assert weight_set(model) == "oxford"
    again = training.with_head(base, config, 5)
    assert all(map(np.array_equal, tiny.weights(model), tiny.weights(again)))
    assert all(map(np.array_equal, tiny.weights(base), before))
    assert "block2_conv1" not in [layer.name for layer in model.layers]
    keras.models.clone_model(surgery.truncate(model, "block1_pool"))


@pytest.mark.parametrize("head", ["tutorial", "linear", "mlp"])
def test_heads_learn_the_same_from_maps_of_any_scale(head, images, config):
    losses = []
    for scale in (1, 1000):  # `oxford`'s maps are as large as pixel values
        base = tiny.network(None)
        kernel = base.get_layer("block1_conv1").kernel
        kernel.assign(kernel * scale)
        folder = f"{config.folder}-{scale}"
        config = dataclasses.replace(
            config, head=head, cut="block1_pool", freeze="block1_pool", folder=folder
        )
        losses.append(curve(finetune(base, images, config=config)))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-2)


def test_a_head_needs_feature_maps(images, config):
    with pytest.raises(ValueError, match=r"needs feature maps .*cut='block5_pool'"):
        finetune(tiny.network(), images, config=dataclasses.replace(config, head="linear"))


def test_logits_and_softmax_learn_alike_and_softmax_comes_back(config):
    model = tiny.network(dropout=0.0)
    linear = tiny.network(dropout=0.0)
    linear.get_layer("predictions").activation = keras.activations.linear
    first = finetune(model, dataset(), config=config)
    second = finetune(
        linear, dataset(), config=dataclasses.replace(config, folder=config.folder + "2")
    )
    assert curve(first) == curve(second)
    np.testing.assert_allclose(model(dataset().tensors[0]).detach().sum(1), 1, rtol=1e-5)


def test_averaged_weights_are_what_is_kept(images, config):
    model = tiny.network()
    config = dataclasses.replace(config, ema=0.5, epochs=2)
    history = finetune(model, images, config=config)
    content = checkpoints.read(Path(config.folder) / "best.pt")
    for i, value in content["average"].items():
        assert torch.equal(model.variables[i].value.detach(), value)
        assert not torch.equal(content["variables"][i], value)
    folder = data.hold_out(data.read_folder(images, 16), config.holdout)[1]
    x, y = folder[[(i, 0) for i in range(len(folder))]]
    loss = keras.losses.SparseCategoricalCrossentropy()(y, model(x.float(), training=False))
    best = history.epochs[history.best_epoch]
    np.testing.assert_allclose(best["val_loss"], float(loss), rtol=1e-4)


def test_the_average_follows_its_formula(config, monkeypatch):
    config = dataclasses.replace(config, ema=0.4, epochs=1)
    values: list[dict[int, torch.Tensor]] = []
    real = training._step

    def step(run, *rest):
        if not values:
            values.append({i: p.detach().clone() for i, p in run.trained.items()})
        result = real(run, *rest)
        decay = min(0.4, (1 + run.progress.done) / (10 + run.progress.done))
        expected = {
            i: values[-1][i] * decay + p.detach() * (1 - decay) for i, p in run.trained.items()
        }
        for i, value in expected.items():
            torch.testing.assert_close(run.average[i], value)
        values.append({i: value.clone() for i, value in run.average.items()})
        return result

    monkeypatch.setattr(training, "_step", step)
    finetune(tiny.network(), dataset(), config=config)
    assert len(values) == 5


# Nothing is lost


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sgd": {"optimizer": "sgd", "batch_norm": True},
    "averaged": {"ema": 0.9, "augment": "trivial", "clip_norm": 0.5},
    "thawing": {
        "freeze": "block2_pool", "unfreeze": ((1, "block2_conv1"),), "augment": "crop",
        "cache_copies": 3, "layer_decay": 0.5, "batch_norm": True,
    },
    "head": {"head": "mlp", "freeze": "block2_pool", "schedule": "constant"},
}  # fmt: skip


class Killed(BaseException):
    pass


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_ends_as_if_nothing_had_happened(images, config, variant, monkeypatch):
    options = dict(VARIANTS[variant])
    batch_norm, head = options.pop("batch_norm", False), "head" in options
    config = dataclasses.replace(config, checkpoint_steps=1, resume=True, **options)

    def run(folder):
        model = tiny.network(None if head else 3, batch_norm=batch_norm)
        return finetune(model, images, config=dataclasses.replace(config, folder=folder))

    expected = run(config.folder + "0")
    real, calls = training._step, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) % 5 == 0:
            raise Killed
        return real(*arguments)

    monkeypatch.setattr(training, "_step", interrupted)
    for _ in range(20):
        torch.rand(3)
        try:
            found = run(config.folder)
            break
        except Killed:
            continue
    assert len(calls) > 9
    for a, b in zip(tiny.weights(found.model), tiny.weights(expected.model), strict=True):
        np.testing.assert_array_equal(a, b)
    figures = [[{**e, "seconds": 0} for e in history.epochs] for history in (found, expected)]
    assert figures[0] == figures[1]
    assert found.best_epoch == expected.best_epoch


def test_killed_at_random_moments(tmp_path):
    script = Path(__file__).with_name("killed.py")
    path = os.pathsep.join(map(str, (script.parents[2], script.parents[1])))
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, script, tmp_path, "--kills", "4"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "4 kills" in result.stdout
    assert "same weights" in result.stdout


def test_a_finished_run_resumes_to_what_it_was(images, config):
    first = finetune(tiny.network(), images, config=config)
    again = finetune(tiny.network(), images, config=dataclasses.replace(config, resume=True))
    assert again.epochs == first.epochs
    assert all(map(np.array_equal, tiny.weights(again.model), tiny.weights(first.model)))


def test_a_run_is_not_overwritten(images, config):
    finetune(tiny.network(), images, config=config)
    with pytest.raises(ValueError, match=r"last.pt exists: .* Pass resume=True .* another folder"):
        finetune(tiny.network(), images, config=config)


@pytest.mark.parametrize("what", ["config", "data", "model"])
def test_another_run_is_not_resumed(images, config, what, tmp_path):
    finetune(tiny.network(), images, config=config)
    config, model = dataclasses.replace(config, resume=True), tiny.network()
    message = {
        "config": r"belongs to another run: learning_rate=0.5 \(was 0.001\)",
        "data": "was written for other images",
        "model": "holds 7 tensors, whose shapes aren't those of the 15 of tiny",
    }[what]
    if what == "config":
        config = dataclasses.replace(config, learning_rate=0.5)
    elif what == "data":
        images = tiny.pictures(tmp_path / "other", seed=1)
    else:
        model = tiny.network(batch_norm=True)
    with pytest.raises(ValueError, match=message):
        finetune(model, images, config=config)


def test_a_loss_that_is_not_finite_stops_and_the_checkpoint_is_good(config):
    train = dataset()
    train.tensors[0][13, 0, 0, 0] = math.nan
    config = dataclasses.replace(config, batch_size=1, checkpoint_steps=1)
    with pytest.raises(FloatingPointError, match=r"The loss is nan .*That step was not taken"):
        finetune(tiny.network(), train, config=config)
    content = checkpoints.read(Path(config.folder) / "last.pt")
    assert all(torch.isfinite(tensor).all() for tensor in content["variables"])
    assert content["progress"]["done"] == sum(data.shuffled(20, 1, 0)(0), []).index(13)


def test_a_gradient_that_is_not_finite_stops(config):
    model = tiny.network(dropout=0.0)

    class Root(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x

        @staticmethod
        def backward(context, gradient):
            return gradient * math.inf

    before = tiny.weights(model)
    head = model.get_layer("predictions")
    real = type(head).call
    head.call = lambda x, training=None: Root.apply(real(head, x))
    from vggtorch.lowering import modules

    handlers = dict(modules.HANDLERS)
    modules.HANDLERS.pop(keras.layers.Dense)
    try:
        with pytest.raises(FloatingPointError, match="norm of its gradient"):
            finetune(model, dataset(), config=config)
    finally:
        modules.HANDLERS.update(handlers)
    assert all(map(np.array_equal, tiny.weights(model), before))


def test_patience(config):
    train, held = dataset(), dataset(9)
    config = dataclasses.replace(config, epochs=9, patience=2, learning_rate=1e-12)
    history = finetune(tiny.network(dropout=0.0), train, held, config)
    assert len(history.epochs) == history.best_epoch + 3
    content = checkpoints.read(Path(config.folder) / "best.pt")
    assert content["progress"]["best_epoch"] == history.best_epoch
    assert content["progress"]["epoch"] == history.best_epoch + 1


# Data and models that don't fit


def test_classes_that_differ(images, config, tmp_path):
    other = tiny.pictures(tmp_path / "other")
    (other / "red").rename(other / "violet")
    with pytest.raises(
        ValueError,
        match=r"only in the training data \['red'\], only in the validation data \['violet'\]",
    ):
        finetune(tiny.network(), images, other, config)


def test_a_model_with_another_number_of_classes(images, config):
    with pytest.raises(
        ValueError, match=r"has 3 classes \(blue, green, red\), and tiny puts out 4"
    ):
        finetune(tiny.network(4), images, config=config)
    with pytest.raises(ValueError, match=r"expected \(N, classes\). Stack a head"):
        finetune(tiny.network(None), images, config=config)


def test_labels_out_of_range(config):
    with pytest.raises(ValueError, match="Received labels from 0 to 2; expected 0 to 1"):
        finetune(tiny.network(2), dataset(), config=config)


def test_another_activation_at_the_end(config):
    model = tiny.network()
    model.get_layer("predictions").activation = keras.activations.sigmoid
    with pytest.raises(ValueError, match=r"activation sigmoid\); expected Dense\(classes, activ"):
        finetune(model, dataset(), config=config)


def test_options_that_the_data_contradicts(images, config):
    with pytest.raises(ValueError, match="Received patience=2 and no validation data"):
        finetune(tiny.network(), dataset(), config=dataclasses.replace(config, patience=2))
    with pytest.raises(ValueError, match="cache_copies=2 with augment='none'"):
        finetune(tiny.network(), images, config=dataclasses.replace(config, cache_copies=2))
    model = tiny.network()
    model.trainable = False
    with pytest.raises(ValueError, match="No layer of tiny trains. Unfreeze some"):
        finetune(model, images, config=config)


def test_broken_images_are_skipped_if_asked(config, tmp_path):
    folder = tiny.pictures(tmp_path / "data")
    (folder / "red" / "3.png").write_text("no image")
    with pytest.raises(ValueError, match="1 of 24 images"):
        finetune(tiny.network(), folder, config=config)
    with pytest.warns(UserWarning, match="Training goes on without them"):
        finetune(tiny.network(), folder, config=dataclasses.replace(config, broken="skip"))


def test_tensorboard(images, config):
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = finetune(tiny.network(), images, config=dataclasses.replace(config, tensorboard=True))
    events = loader.EventAccumulator(config.folder)
    events.Reload()
    found = [event.value for event in events.Scalars("val_loss")]
    np.testing.assert_allclose(found, curve(history, "val_loss"), rtol=1e-6)


# How fast to learn


def test_the_search_finds_a_rate_and_leaves_no_trace(config, images):
    model = tiny.network()
    before = tiny.weights(model)
    config = dataclasses.replace(config, batch_size=18)
    search = find_learning_rate(model, images, config, lowest=1e-6, highest=1e4, steps=60)
    assert all(map(np.array_equal, tiny.weights(model), before))
    assert len(search.rates) == len(search.losses) <= 60
    assert search.rates[0] == pytest.approx(1e-6)
    assert search.rates[1] / search.rates[0] == pytest.approx(1e10 ** (1 / 59))
    first = len(search.losses) // 10
    assert 10 * search.suggestion == search.rates[int(np.argmin(search.losses[first:])) + first]
    assert 1e-6 < search.suggestion < 10
    assert 20 < len(search.rates) < 60  # it stopped where the loss rose
    assert not (Path(config.folder) / "last.pt").exists()
