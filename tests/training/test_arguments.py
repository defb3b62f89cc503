"""Arguments of a wrong kind are refused with what is expected, by every function of this room."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

import vggtorch as vt
from vggtorch.models import remember_
from vggtorch.options import _OPTIONS_ELSEWHERE
from vggtorch.training import ELSEWHERE, FeatureTable
from vggtorch.weight_sets import DataConfig


@pytest.fixture(scope="module")
def model():
    config = DataConfig(preprocessing_inside=True, label_names=tuple(tiny.COLOURS))
    return remember_(tiny.network(), config)


@pytest.mark.parametrize("wrong", ["8", 1.5, True, None, -1, [8], float("nan"), np.float32(2)])
def test_counts_are_whole_numbers(wrong, model, images, history, tmp_path):
    table = FeatureTable(("a", "b"), np.eye(2))
    layer, folder = "block1_pool", tmp_path / "features"
    calls: dict[str, Callable[[Any], Any]] = {
        "top": lambda n: list(vt.predict_files(model, images, top=n)),
        "batch_size": lambda n: list(vt.predict_files(model, images, batch_size=n)),
        "batch_size ": lambda n: vt.evaluate_folder(model, images, batch_size=n),
        "num_workers": lambda n: vt.evaluate_folder(model, images, num_workers=n),
        "shard_size": lambda n: vt.write_features(model, images, folder, layer=layer, shard_size=n),
        "process": lambda n: vt.write_features(model, images, folder, layer=layer, process=n),
        "processes": lambda n: vt.write_features(model, images, folder, layer=layer, processes=n),
        "count": lambda n: vt.show_batch(model, images, count=n),
        "epoch": lambda n: vt.show_batch(model, images, epoch=n),
        "steps": lambda n: vt.find_learning_rate(model, images, steps=n),
        "k": lambda n: table.nearest(np.eye(2), k=n),
        "mistakes": lambda n: vt.write_report(history, tmp_path / "report.html", mistakes=n),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"Received {name.strip()}=.*; expected a whole numb"):
            call(wrong)
    assert not folder.exists()


@pytest.mark.slow
def test_whole_numbers_of_numpy_are_counts(model, images, tmp_path):
    four: Any = np.int64(4)
    assert len(list(vt.predict_files(model, images, top=four, batch_size=four))) == 24
    assert vt.evaluate_folder(model, images, batch_size=four)[0].labels.shape == (24,)
    folder = tmp_path / "features"
    vt.write_features(
        model,
        images,
        folder,
        layer="block1_pool",
        shard_size=four,
        process=four,
        processes=four + 1,
    )
    assert [path.name for path in folder.glob("part-*")] == ["part-000004.parquet"]


def test_queries_are_numbers():
    table = FeatureTable(("a", "b"), np.eye(2))
    for wrong in (np.array([["a", "b"]]), np.eye(2) * 1j, np.array([[None, 1]])):
        with pytest.raises(ValueError, match="Received queries of dtype .*; expected numbers"):
            table.nearest(wrong)
    assert table.nearest([[2, 1]], 1)[0][0][0] == "a"  # type: ignore[arg-type]


def test_a_process_is_one_of_them(model, images, tmp_path):
    with pytest.raises(ValueError, match="Received process=2 of 2; expected a number below"):
        vt.write_features(model, images, tmp_path / "f", layer="flatten", process=2, processes=2)


@pytest.mark.parametrize("wrong", [5, None, b"run", "", ["run"]])
def test_paths_are_texts_and_not_empty(wrong, model, images, history):
    calls: list[Callable[[Any], Any]] = [
        vt.load_model,
        vt.read_features,
        lambda path: vt.write_features(model, images, path, layer="block1_pool"),
        lambda path: vt.write_predictions(vt.predict_files(model, images), path),
        lambda path: vt.load_checkpoint_(model, path),
        lambda path: vt.export(model, path),
        lambda path: vt.save_trained(history, path),
        lambda path: vt.write_report(history, path),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="Received .*; expected a path"):
            call(wrong)


def test_an_empty_name_is_not_the_folder_that_one_is_in(model, tmp_path, monkeypatch):
    """As an unset variable of the shell would have it."""
    images = tiny.pictures(tmp_path / "data")
    monkeypatch.chdir(images)
    calls: list[Callable[[], Any]] = [
        lambda: vt.finetune(model, ""),
        lambda: vt.finetune(model, images, "", output_dir=str(tmp_path / "run")),
        lambda: vt.show_batch(model, ""),
        lambda: vt.find_learning_rate(model, ""),
        lambda: vt.evaluate_folder(model, ""),
        lambda: list(vt.predict_files(model, "")),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=r"Received .*; expected a path\. This folder's is '\.'"
        ):
            call()
    assert vt.evaluate_folder(model, ".")[0].labels.shape == (24,)


def test_what_is_no_history_is_refused(model, tmp_path):
    for call in (vt.save_trained, vt.write_report):
        with pytest.raises(ValueError, match="Received a Functional; expected the History that fi"):
            call(model, tmp_path / "a.html")
    assert not list(Path(tmp_path).iterdir())


def test_names_from_elsewhere_mean_settings_that_there_are():
    known = {field.name for field in dataclasses.fields(vt.TrainConfig)}
    assert set(ELSEWHERE.values()) <= known | {"validation"}
    assert not known & set(ELSEWHERE) and not known & {"model", "arch"}
    assert set(_OPTIONS_ELSEWHERE.values()) >= {"architecture", "weights", "out", "top"}
