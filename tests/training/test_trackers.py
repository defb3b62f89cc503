"""Where a run's settings and figures go, in the forms in which the trackers keep them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from tracked import records

from vggtorch.training import Callback
from vggtorch.training.loop import finetune
from vggtorch.training.trackers import check_trackers


class Kept(GeneralTracker):
    """As one of Accelerate's is written."""

    name = "kept"
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.rows: list[tuple[int, dict]] = []
        self.settings: dict[str, Any] = {}
        self.ended = 0

    @property
    def tracker(self):
        return self.rows

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **_):
        self.rows.append((step, values))

    def finish(self):
        self.ended += 1


class Stop(Callback):
    """Ends a run after its first epoch: as asked, by an error, or by Ctrl-C."""

    def __init__(self, error: type[BaseException] | None = None):
        self.error = error

    def on_epoch_end(self, epoch, figures, evaluation):
        if epoch == 1 and self.error is not None:
            raise self.error("stopped")


@pytest.fixture
def split(tmp_path):
    tiny.pictures(tmp_path / "data" / "train")
    tiny.pictures(tmp_path / "data" / "test", each=2, seed=1)
    return tmp_path / "data"


def outcome(history) -> dict[str, float]:
    """What stands behind the epochs' rows."""
    assert history.evaluation is not None and history.test_evaluation is not None
    return {
        "kept_epoch": history.kept_epoch,
        "kept_val_accuracy": history.epochs[history.kept_epoch]["val_accuracy"],
        "test_accuracy": history.test_evaluation.accuracy,
        "test_macro_f1": history.test_evaluation.macro_f1,
        "test_loss": history.test_evaluation.loss,
    }


@pytest.mark.slow
def test_trackers_get_settings_each_epoch_s_figures_and_what_came_out(config, split):
    kept = Kept()
    history = finetune(tiny.network(), split, config=config, log_with=(kept,))
    assert kept.rows[:-1] == list(enumerate(history.epochs))
    step, last = kept.rows[-1]
    assert step == 2 and last.items() >= outcome(history).items()
    assert kept.settings["epochs"] == 3 and kept.settings["optimizer"] == "adamw"
    assert kept.settings["model"] == "tiny" and kept.settings["classes"] == 3
    images = [kept.settings[f"{name}_images"] for name in ("train", "validation", "test")]
    assert images == [18, 6, 6] and kept.settings["input"] == "16x16"
    assert kept.ended == 1


@pytest.mark.slow
def test_a_run_that_is_carried_on_hands_over_the_earlier_epochs_too(config, split):
    first, second = Kept(), Kept()
    with pytest.raises(RuntimeError, match="stopped"):
        finetune(
            tiny.network(), split, config=config, log_with=(first,),
            callbacks=[Stop(RuntimeError)],
        )  # fmt: skip
    assert [step for step, _ in first.rows] == [0] and first.ended == 1
    again = dataclasses.replace(config, resume=True, log_with=(second,))
    history = finetune(tiny.network(), split, config=again)
    assert second.rows[:-1] == list(enumerate(history.epochs))
    assert second.rows[0] == first.rows[0]


@pytest.mark.slow
def test_tensorboard_has_curves_and_settings(config, split):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(RuntimeError, match="stopped"):
        finetune(
            tiny.network(), split, config=config, log_with=("tensorboard",),
            callbacks=[Stop(RuntimeError)],
        )  # fmt: skip
    again = dataclasses.replace(config, resume=True, log_with=("tensorboard",))
    history = finetune(tiny.network(), split, config=again)
    folder = Path(config.output_dir, "vggtorch")
    events = EventAccumulator(str(folder)).Reload()
    for name in ("loss", "val_accuracy"):
        curve = [(event.step, event.value) for event in events.Scalars(name)]
        assert curve == [(i, pytest.approx(e[name])) for i, e in enumerate(history.epochs)]
    for name, value in outcome(history).items():
        assert [event.value for event in events.Scalars(name)] == [pytest.approx(value)]
    (settings, *_) = sorted(folder.glob("*/hparams.yml"))
    assert "batch_size: 6" in settings.read_text()


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory):
    """MLflow with a store of its own, which takes seconds to make."""
    mlflow = pytest.importorskip("mlflow")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}")
    yield mlflow
    mlflow.set_tracking_uri(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_mlflow_has_parameters_curves_and_how_the_run_ended(config, split, mlflow, error, status):
    config = dataclasses.replace(config, log_with=("mlflow",))
    if error is None:
        history = finetune(tiny.network(), split, config=config)
    else:
        with pytest.raises(error, match="stopped"):
            finetune(tiny.network(), split, config=config, callbacks=[Stop(error)])
    run = mlflow.last_active_run()
    assert run.info.status == status
    assert run.data.params["batch_size"] == "6" and run.data.params["model"] == "tiny"
    metrics = mlflow.MlflowClient().get_metric_history(run.info.run_id, "val_loss")
    curve = {metric.step: metric.value for metric in metrics}
    if error is not None:
        assert list(curve) == [0]
        return
    assert curve == {i: pytest.approx(e["val_loss"]) for i, e in enumerate(history.epochs)}
    for name, value in outcome(history).items():
        assert run.data.metrics[name] == pytest.approx(value)


@pytest.mark.slow
@pytest.mark.parametrize(("error", "code"), [(None, 0), (ValueError, 1)])
def test_wandb_has_settings_curves_and_how_the_run_ended(
    config, split, tmp_path, monkeypatch, error, code
):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it has read its settings, perhaps
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    config = dataclasses.replace(config, log_with=("wandb",))
    if error is None:
        history = finetune(tiny.network(), split, config=config)
    else:
        with pytest.raises(error, match="stopped"):
            finetune(tiny.network(), split, config=config, callbacks=[Stop(error)])
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = records(path)
    settings = {u.key: json.loads(u.value_json) for r in found for u in r.config.update}
    assert settings["batch_size"] == 6 and settings["model"] == "tiny"
    rows = [
        {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    assert [r.exit.exit_code for r in found if r.HasField("exit")] == [code]
    if error is not None:
        assert [row["_step"] for row in rows] == [0]
        return
    assert [row["_step"] for row in rows] == [0, 1, 2]
    for row, epoch in zip(rows, history.epochs, strict=True):
        assert row["val_loss"] == pytest.approx(epoch["val_loss"])
    for name, value in outcome(history).items():
        assert rows[-1][name] == pytest.approx(value)


def test_trackers_that_aren_t_there_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="log_with='wandbb'; expected some of .*wandb.*General"):
        check_trackers(["wandbb"])
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ValueError, match="log_with='mlflow', whose package isn't installed: pip i"):
        check_trackers(["mlflow"])


class Offended(Kept):
    def start(self):
        raise RuntimeError("no key; log in first\nand more")

    @property
    def tracker(self):
        raise AttributeError


def test_a_tracker_that_can_t_begin_is_named(config):
    before, offended = Kept(), Offended()
    config = dataclasses.replace(config, log_with=(before, offended))
    with pytest.raises(ValueError, match="log_with='kept', which couldn't begin: no key; log in f"):
        finetune(tiny.network(), tiny.dataset(), config=config)
    assert before.ended == 1 and offended.ended == 0
