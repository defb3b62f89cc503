"""What a run and the commands print fits the terminal, and is true of what runs."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import tiny
from rich import progress
from rich.console import Console

import vggtorch as vt
from vggtorch import cli, commands
from vggtorch.cli import main
from vggtorch.compression.report import Compression, LayerChange
from vggtorch.measuring.benchmark import Bench, Result
from vggtorch.measuring.costs import Comparison, Report, Row
from vggtorch.text import table, wrapped
from vggtorch.training.advice import Plan, planned
from vggtorch.training.display import Display, epoch_row
from vggtorch.weight_sets import DataConfig

EPOCH = {
    "loss": 1.0986, "accuracy": 0.3333, "learning_rate": 1.234e-05, "val_loss": 1.0123,
    "val_accuracy": 0.5, "seconds": 123.4,
}  # fmt: skip
MORE = {
    "val_top5_accuracy": 0.9, "val_macro_f1": 0.4, "val_auroc": 0.7, "val_calibration_error": 0.01,
    "of_my_own_and_long": 1234567.0,
}  # fmt: skip


def shown(width: int, terminal: bool, *epochs: dict[str, float]) -> list[str]:
    """What a run shows of epochs."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    display = Display(progress.Progress(console=console))
    for epoch, figures in enumerate(epochs):
        display.end(epoch, figures)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_epochs_are_a_table_in_a_terminal_of_80_columns():
    header, *rows = shown(80, True, EPOCH, EPOCH)
    assert header.split() == ["epoch", *EPOCH]
    assert [row.split()[0] for row in rows] == ["1", "2"]
    assert all(len(row) == len(header) <= 80 for row in rows)
    assert rows[0].split()[1:] == [f"{value:.4g}" for value in EPOCH.values()]


@pytest.mark.parametrize("width", [40, 60, 80, 132, 240])
def test_figures_that_have_no_room_stand_under_the_row(width):
    lines = shown(width, True, EPOCH | MORE, EPOCH | MORE)
    assert all(len(line) <= width for line in lines)
    words = " ".join(lines).split()
    assert all(name in words and f"{value:.4g}" in words for name, value in (EPOCH | MORE).items())
    assert sum(line.startswith("epoch") for line in lines) == 1  # the header, once
    assert len(lines) == 3 if width == 240 else len(lines) > 3


def test_without_a_terminal_an_epoch_is_one_whole_line_whatever_the_width():
    for width in (20, 80, 500):
        (line,) = shown(width, False, EPOCH | MORE)
        named = [f"{name} {value:.4g}" for name, value in (EPOCH | MORE).items()]
        assert line == "  ".join(["epoch 1", *named])


def test_a_new_figure_brings_a_new_header():
    lines = shown(200, True, EPOCH, EPOCH | {"val_auroc": 0.5})
    assert [line.split()[0] for line in lines] == ["epoch", "1", "epoch", "2"]
    assert epoch_row(9, EPOCH, 80)[1].split()[0] == "10"


ROW = Row("block1_conv1", "Conv2DTranspose", (224, 224, 64), 1792, 86_704_128, 2**23, 0.0123)
TABLES: dict[str, Any] = {
    "inspect": Report((ROW, dataclasses.replace(ROW, name="x" * 40)), ROW),
    "compare": Comparison(Report((ROW,), ROW), Report((ROW,), ROW)),
    "bench": Bench(8, (Result("vggtorch, bfloat16", (1234.5,), 12.34, 1e-7),), ()),
    "compress": Compression(
        "multiply-adds", 1e9, 1e8,
        (LayerChange("vgg16/block5_conv3_of_a_nested_model", "depthwise", (128, 256), 1e8, 1e7),),
        {"block5_pool": 0.98}, {"block5_pool": 0.99}, 100, 1.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_a_table_fits_80_columns_and_loses_nothing(name):
    report = TABLES[name]
    narrow, whole = report.as_text(80), str(report)
    assert all(len(line) <= 80 for line in narrow.splitlines())
    assert narrow.split() == whole.split()
    assert report.as_text(1000) == report.as_text() == whole


def test_a_row_of_a_table_that_is_too_wide_takes_several_lines():
    rows = [("layer", "kind", "size", "time"), ("a", "Conv2D", "1", "22 ms")]
    assert table(rows, 2, 22).splitlines() == [
        "layer  kind", "    size   time", "a      Conv2D", "       1  22 ms",
    ]  # fmt: skip
    assert table(rows, 2, 12).splitlines()[1:4] == ["    kind", "    size", "     time"]
    assert table(rows, 2, 80) == table(rows, 2)


def test_columns_stay_in_line_under_characters_that_are_wide_or_have_no_width():
    rows = [("class", "n"), ("日本", "10"), ("e\u0301", "2")]
    assert table(rows, 1).splitlines() == ["class   n", "日本   10", "e\u0301       2"]


def test_lines_are_broken_between_words():
    text = "The plan:\nFreeze every layer.\n    A reason that is long.\n" + "x" * 30
    assert wrapped(text, None) == text
    lines = wrapped(text, 16).splitlines()
    assert lines == [
        "The plan:", "Freeze every", "  layer.", "    A reason", "    that is", "    long.",
        "x" * 30,
    ]  # fmt: skip


@pytest.mark.slow
def test_the_commands_ask_how_wide_the_terminal_is(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiny.keras"
    tiny.network().save(path)
    for module in (cli, commands):
        monkeypatch.setattr(module, "terminal_width", lambda: 50)
    for command in (
        ["inspect", str(path)],
        ["inspect", str(path), "--before", str(path)],
        ["bench", str(path), "--batch", "1", "--repeats", "1"],
        ["weights"],
    ):
        assert main(command) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines and all(len(line) <= 50 or "/" in line for line in lines)


def plan(given: dict[str, Any], images: int = 60, similarity: Any = None) -> Plan:
    layers = [f"block{b}_{name}" for b in range(1, 6) for name in ("conv1", "pool")]
    return planned(layers, images, 3, similarity, given)


def said(plan: Plan, **images: Any) -> tuple[set[str], set[str]]:
    """The decisions that are followed, and those that are not."""
    images = {"crop_pct": plan.crop_pct or 0.875} | images
    lines = plan.as_it_runs(DataConfig(**images)).splitlines()
    decisions = {reason.decision for reason in plan.reasons}
    others = {d for d in decisions if f"By your settings, not: {d}" in lines}
    return decisions & set(lines), others


@pytest.mark.parametrize("similarity", [None, "similar", "different"])
@pytest.mark.parametrize("images", [60, 900, 3000])
def test_of_a_plan_that_nothing_overrides_every_reason_holds(images, similarity):
    found = plan({}, images, similarity)
    text = found.as_it_runs(DataConfig(crop_pct=found.crop_pct or 0.875))
    assert text == str(found)
    assert all(reason.settings for reason in found.reasons)
    # What has no say in the reasons changes none of them.
    other = plan(
        {"learning_rate": 0.5, "epochs": 25, "batch_size": 3, "seed": 1}, images, similarity
    )
    assert said(other, crop_pct=found.crop_pct or 0.875) == said(found)


FREEZE, LEVELS = "Freeze every pretrained layer and train", "Put the head on the maps"
CACHED, TENTH = "Run the frozen layers once", "Hold out a tenth"
POOLED, WHOLE, SMOOTHED = "Pool each feature map", "Resize the shorter side", "Smooth the labels"
LAST = "Keep the weights of the last"
BEGIN, THEN, EACH = "Begin with all", "Then unfreeze", "Each block learns"


@pytest.mark.parametrize(
    ("given", "images", "changed"),
    [
        ({"head": "linear"}, 60, {FREEZE, LEVELS, POOLED}),
        ({"head": "mlp"}, 3000, {POOLED}),
        ({"cut": "block4_pool"}, 60, set()),  # what is frozen goes with it
        ({"freeze": "block4_pool"}, 60, {FREEZE}),
        ({"unfreeze": ((2, "block5_conv1"),)}, 60, {FREEZE}),
        ({"augment": "none"}, 60, {CACHED}),
        ({"augment": "crop"}, 60, {CACHED}),
        ({"cache": False}, 60, {CACHED}),
        ({"mixup": 0.2}, 60, {CACHED}),
        ({"validation_split": 0.3}, 900, {TENTH}),
        ({"label_smoothing": 0.0}, 60, {SMOOTHED}),
        ({"restore_best_weights": True}, 60, {LAST}),
        ({"patience": 3}, 60, {LAST}),
        ({"monitor": "loss"}, 60, {LAST}),
        ({"schedule": "constant"}, 60, {LAST}),
        ({"schedule": "constant", "restore_best_weights": False}, 60, set()),
        ({"crop_pct": 0.875}, 60, {WHOLE}),
        ({"epochs": 2}, 3000, {BEGIN, THEN}),
        ({"freeze": "block4_pool"}, 3000, {BEGIN, THEN}),  # block5 trains, and by its rate
        ({"unfreeze": ((5, "block4_conv1"),)}, 3000, {BEGIN, THEN}),
        ({"layer_decay": 1.0}, 3000, {EACH}),
    ],
)
def test_a_reason_that_a_setting_overrides_is_said_to_be(given, images, changed):
    followed, others = said(plan(given, images))
    before, _ = said(plan({}, images))

    def among(starts: set[str]) -> set[str]:
        return {start for start in starts if any(start.startswith(c) for c in changed)}

    assert others == among(before)
    assert all(any(start.startswith(c) for start in others) for c in changed)
    assert followed == before - others


def test_the_crop_of_the_model_counts_too():
    found = plan({})
    assert WHOLE in " ".join(said(found, crop_mode="squash")[1])


@pytest.mark.slow
def test_a_run_says_the_plan_as_it_runs(images, tmp_path, capsys):
    model = tiny.network(None)
    from vggtorch.models import remember_

    remember_(model, "oxford")
    folder = str(tmp_path / "run")
    vt.finetune(model, images, epochs=1, output_dir=folder, label_smoothing=0.2, head="linear")
    err = capsys.readouterr().err
    assert "By your settings, not: Smooth the labels by 0.1." in err
    assert "\nSmooth the labels" not in err and "\nPut the head on the maps" not in err
