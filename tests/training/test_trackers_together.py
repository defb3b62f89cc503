"""Of several processes, and of a run that was stopped and carried on, trackers keep one run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import tiny
import two_processes_tracked
from fresh import as_two
from tracked import records

from vggtorch.training import History
from vggtorch.training.loop import finetune

TRACKERS = tuple(n for n in ("tensorboard", "wandb", "mlflow") if importlib.util.find_spec(n))


@pytest.fixture(scope="module")
def two(images, tmp_path_factory, one_thread):
    """The folder of a run of two processes under all trackers that are installed."""
    folder = tmp_path_factory.mktemp("two")
    for tracker in TRACKERS:  # once, before there are two processes
        importlib.import_module(tracker)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(folder))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        as_two(two_processes_tracked.train_as_one_of_two, folder, images, TRACKERS)
    return folder


@pytest.fixture(scope="module")
def one(images, tmp_path_factory) -> History:
    """What one process comes to, without a stop."""
    config = two_processes_tracked.config_in(tmp_path_factory.mktemp("one"))
    return finetune(tiny.network(dropout=0.0), images, config=config)


def expected(history: History, name: str) -> dict[int, object]:
    return {i: pytest.approx(epoch[name], rel=1e-4) for i, epoch in enumerate(history.epochs)}


@pytest.mark.slow
def test_tensorboard_has_one_run_of_two_processes(two, one):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(two / "run" / "vggtorch")).Reload()
    for name in ("loss", "val_loss", "val_accuracy"):
        curve = [(event.step, event.value) for event in events.Scalars(name)]
        assert len(curve) == 3 and dict(curve) == expected(one, name)
    assert len(events.Scalars("kept_val_accuracy")) == 1
    assert len(list((two / "run" / "vggtorch").glob("*/hparams.yml"))) == 1


@pytest.mark.slow
def test_mlflow_has_one_run_of_two_processes(two, one):
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{two / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("vggtorch")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["batch_size"] == "9"
    for name in ("loss", "val_loss", "val_accuracy"):
        curve = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        assert len(curve) == 3 and dict(curve) == expected(one, name)
    assert len(client.get_metric_history(run.info.run_id, "kept_val_accuracy")) == 1


@pytest.mark.slow
def test_wandb_has_one_run_of_two_processes(two, one):
    pytest.importorskip("wandb")
    # Offline, W&B writes a folder each time that a run is carried on, all with the run's id.
    parts = sorted(two.glob("wandb/offline-run-*/*.wandb"))
    assert len(parts) == 3 and len({path.name for path in parts}) == 1
    found = [records(path) for path in parts]
    rows = [
        {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
        for part in found
        for record in part
        if record.HasField("history")
    ]
    for name in ("loss", "val_loss", "val_accuracy"):
        assert [row["_step"] for row in rows] == [0, 1, 2]
        assert {row["_step"]: row[name] for row in rows} == expected(one, name)
    assert "kept_val_accuracy" in rows[-1]
    exits = [r.exit.exit_code for part in found for r in part if r.HasField("exit")]
    assert exits == [1, 0, 0]


@pytest.mark.slow
def test_a_run_of_mlflow_that_is_gone_is_begun_anew(images, config, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    try:
        config = dataclasses.replace(config, log_with=("mlflow",), resume=True)
        history = finetune(tiny.network(), images, config=config)
        gone = mlflow.last_active_run().info.run_id
        mlflow.delete_run(gone)
        with pytest.warns(UserWarning, match=f"run {gone} can't be carried on .it was deleted"):
            finetune(tiny.network(), images, config=config)
        run = mlflow.last_active_run()
        assert run.info.run_id != gone and run.info.status == "FINISHED"
        curve = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
        assert [m.value for m in curve] == [epoch["loss"] for epoch in history.epochs]
        Path(config.output_dir, "trackers.json").write_text("{")
        with pytest.warns(UserWarning, match="trackers.json can't be read .*begin other runs"):
            finetune(tiny.network(), images, config=config)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            finetune(tiny.network(), images, config=config)
    finally:
        mlflow.set_tracking_uri(before)


@pytest.mark.slow
def test_a_tracker_that_joins_later_gets_all_epochs(images, config):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = finetune(tiny.network(), images, config=config)
    later = dataclasses.replace(config, log_with=("tensorboard",), resume=True)
    for _ in range(2):
        finetune(tiny.network(), images, config=later)
    events = accumulator.EventAccumulator(f"{config.output_dir}/vggtorch").Reload()
    found = [event.value for event in events.Scalars("loss")]
    assert found == pytest.approx([epoch["loss"] for epoch in history.epochs])
