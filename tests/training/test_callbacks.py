"""What users have called in between, and what it may change."""

from __future__ import annotations

import dataclasses
import math

import keras
import numpy as np
import pytest
import tiny

from vggtorch.training import loop
from vggtorch.training.callbacks import Callback, check_callbacks
from vggtorch.training.config import METRICS, TrainConfig
from vggtorch.training.loop import finetune


class Recorder(Callback):
    def __init__(self):
        self.calls: list[tuple] = []

    def on_train_begin(self, model, config):
        self.calls.append(("begin", model.name))

    def on_step_end(self, step, loss):
        self.calls.append(("step", step, loss))

    def on_epoch_end(self, epoch, figures, evaluation):
        import torchmetrics  # not above, because it takes a second and a half

        f1 = torchmetrics.F1Score("multiclass", num_classes=3, average="macro")
        figures["val_f1"] = f1(evaluation.logits, evaluation.labels)
        self.calls.append(("epoch", epoch, dict(figures)))

    def on_train_end(self, history):
        self.calls.append(("end", history))


class Unfreezer(Callback):
    def __init__(self, model):
        self.model = model

    def on_epoch_end(self, epoch, figures, evaluation):
        self.model.get_layer("block2_conv1").trainable = True


def test_what_a_callback_unfreezes_too_late_is_refused(config):
    model = tiny.network()
    model.get_layer("block2_conv1").trainable = False
    with pytest.raises(ValueError, match=r"block2_conv1/kernel, .* was unfrozen while the run tra"):
        finetune(model, tiny.dataset(), config=config, callbacks=[Unfreezer(model)])


@pytest.mark.slow
def test_callbacks_are_called_in_between_and_may_add_figures(config):
    seen = Recorder()
    config = dataclasses.replace(config, epochs=2, batch_size=10, metrics=("macro_f1", "auroc"))
    history = finetune(tiny.network(), tiny.dataset(), tiny.dataset(9), config, callbacks=[seen])
    names = [call[0] for call in seen.calls]
    assert names == ["begin", "step", "step", "epoch", "step", "step", "epoch", "end"]
    steps = [call for call in seen.calls if call[0] == "step"]
    assert [step for _, step, _ in steps] == [0, 1, 2, 3]
    for epoch in (0, 1):
        mean = np.mean([loss for _, _, loss in steps[2 * epoch : 2 * epoch + 2]])
        assert mean == pytest.approx(history.epochs[epoch]["loss"])
        row = history.epochs[epoch]
        assert row["val_f1"] == pytest.approx(row["val_macro_f1"], abs=1e-6)
        assert isinstance(row["val_f1"], float)
    assert history.evaluation is not None
    assert history.epochs[history.kept_epoch]["val_auroc"] == history.evaluation.auroc
    assert seen.calls[-1][1] is history


class Stop:
    """No subclass; some of the methods do."""

    def on_epoch_end(self, epoch, figures, evaluation):
        return np.array(epoch == 1)


@pytest.mark.slow
def test_a_callback_may_end_the_run_which_is_then_at_its_end(config):
    config = dataclasses.replace(config, epochs=5, resume=True)
    history = finetune(tiny.network(), tiny.dataset(), config=config, callbacks=[Stop()])
    assert len(history.epochs) == 2
    again = finetune(tiny.network(), tiny.dataset(), config=config)
    assert again.epochs == history.epochs


def test_the_kept_epoch_is_best_in_what_is_monitored():
    best = {"val_loss": 1.0, "val_accuracy": 0.5, "val_auroc": 0.7, "val_calibration_error": 0.2}
    other = {"val_loss": 0.9, "val_accuracy": 0.4, "val_auroc": 0.8, "val_calibration_error": 0.3}

    def chosen(*epochs):
        return [loop._best(epochs, TrainConfig(monitor=m)) for m in ("accuracy", "auroc", "loss")]

    assert chosen(best, other) == [0, 1, 1] and chosen(best, best) == [0, 0, 0]
    assert loop._best([best, other], TrainConfig(monitor="calibration_error")) == 0
    nan = {**best, "val_loss": math.nan, "val_auroc": math.nan}
    # A figure that isn't there is the worst.
    assert chosen(best, nan) == [0, 0, 0] and chosen(nan, best) == [1, 1, 1]
    assert chosen({"loss": 1.0}, {"loss": 2.0}) == [1, 1, 1]


def test_every_metric_has_a_figure(history):
    figures = history.evaluation.figures()
    for name in METRICS:
        said = {"macro_f1": "macro F1", "auroc": "AUROC"}.get(name, name.replace("_", " "))
        expected = figures.get(said, 1.0)  # of three classes, all are among the first five
        assert history.evaluation.figure(name) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ("auroc",)}, "metrics='auroc' and no validation data"),
        ({"monitor": "loss"}, "monitor='loss' and no validation data"),
    ],
)
def test_figures_of_no_images_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        finetune(tiny.network(), tiny.dataset(), config=config, **settings)
    with pytest.raises(ValueError, match="metrics='recall'; expected some of accuracy, top5"):
        TrainConfig(metrics=("recall",))


def test_other_callbacks_are_refused(config):
    with pytest.raises(ValueError, match=r"of keras.*EarlyStopping with on_.*; expected an object"):
        check_callbacks([keras.callbacks.EarlyStopping()])
    with pytest.raises(ValueError, match="callback of builtins.int; expected"):
        check_callbacks([5])

    class Wrong(Callback):
        def on_epoch_end(self, epoch, figures, evaluation):
            figures["note"] = "good"

    with pytest.raises(ValueError, match="put note='good' among the figures; expected a number"):
        finetune(tiny.network(), tiny.dataset(), config=config, callbacks=[Wrong()])


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (Callback(), "Received callbacks=Callback; expected a list of such objects"),
        ([Callback], r"Received the class Callback as a callback; expected .* Callback\(\)"),
    ],
)
def test_callbacks_are_objects_in_a_list(callbacks, message):
    with pytest.raises(ValueError, match=message):
        check_callbacks(callbacks)


def test_figures_are_added_and_not_removed(config):
    class Remover(Callback):
        def on_epoch_end(self, epoch, figures, evaluation):
            del figures["loss"]

    with pytest.raises(ValueError, match="A callback has removed loss from an epoch's figures"):
        loop.finetune(tiny.network(), tiny.dataset(), config=config, callbacks=[Remover()])
