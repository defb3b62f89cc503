"""Many images through a trained model: classes to files, scores, features; faults are reported."""

from __future__ import annotations

import csv
import io
import json
import os
from typing import Any

import keras
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import vggtorch as vt
from vggtorch.cli import main
from vggtorch.models import remember_
from vggtorch.training import checkpoints, folders, keeping
from vggtorch.training.prediction import image_files
from vggtorch.weight_sets import DataConfig

pytestmark = pytest.mark.filterwarnings("ignore:Left out of")


@pytest.fixture(scope="module")
def run(history, tmp_path_factory):
    """The folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("kept")
    keeping.save_trained(history, folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Pictures in three folders, one of them broken."""
    folder = tiny.pictures(tmp_path / "photos", each=3, seed=5)
    (folder / "green" / "1.png").write_bytes(b"no image")
    (folder / "green" / "notes.txt").write_text("left out")
    return folder


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    folder = tiny.pictures(tmp_path / "photos", each=2)
    monkeypatch.chdir(tmp_path)
    everything = sorted(path.relative_to(tmp_path) for path in folder.rglob("*.png"))
    assert image_files(["photos"]) == everything
    assert image_files(["photos/**/*.png"]) == everything
    assert image_files(["photos/red/*.png", "photos/red/0.png"]) == everything[-2:]
    assert image_files(["photos/*"]) == image_files(["photos/**"]) == everything
    (tmp_path / "a[1].png").write_bytes((folder / "red" / "0.png").read_bytes())
    assert [path.name for path in image_files(["a[1].png"])] == ["a[1].png"]
    (tmp_path / "empty").mkdir()
    for given, message in (
        ("empty", "empty has no images. Expected .apng, .avif, "),
        ("empt*", "empt* has no images. Expected .apng, .avif, "),
        ("none*.jpg", "No file matches none*.jpg."),
        ("none.jpg", "There is no file none.jpg."),
    ):
        with pytest.raises(ValueError) as caught:
            image_files([given])
        assert str(caught.value).startswith(message)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", ["2", "100"])
def test_predict_writes_a_row_for_each_image_and_passes_over_what_it_cant_read(
    run, photos, tmp_path, batch_size, capsys
):
    table, lines = tmp_path / "found.csv", tmp_path / "found.jsonl"
    words = [str(run), str(photos), "-b", batch_size]
    with pytest.warns(UserWarning, match=r"photos: 1 file \(1 .txt\)\.$"):
        assert main(["predict", *words, "--out", str(table), "--top", "2"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vggtorch: an image can't be read: ") and "green/1.png" in error
    assert main(["predict", *words, "--out", str(lines)]) == 1
    rows = list(csv.DictReader(table.open()))
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(rows) == len(found) == 9
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    model = keras.saving.load_model(run / "model.keras")
    names = vt.data_config(model).label_names
    for row in rows:
        (same,) = [one for one in found if one["path"] == row["path"]]
        if row["error"]:
            assert row["path"].endswith("green/1.png") and same["error"] == row["error"]
            assert row["label"] == "" and "classes" not in same
            continue
        expected = model.predict(vt.preprocess(row["path"], model), verbose=0)[0]
        order = np.argsort(-expected)
        assert [row["label"], row["label_2"]] == [names[i] for i in order[:2]]
        assert float(row["probability"]) == pytest.approx(expected.max(), abs=1e-5)
        assert [one["label"] for one in same["classes"]] == [names[i] for i in order]
        assert [one["probability"] for one in same["classes"]] == pytest.approx(
            sorted(expected, reverse=True), abs=1e-5
        )


@pytest.mark.slow
def test_the_folder_of_a_run_is_converted_as_its_model(run, tmp_path, capsys):
    assert main(["convert", str(run), str(tmp_path / "a.pth")]) == 0
    model = vt.load_model(run)
    state = torch.load(tmp_path / "a.pth", weights_only=True)
    kernel = torch.as_tensor(model.get_layer("block1_conv1").get_weights()[0])  # HWIO -> OIHW
    torch.testing.assert_close(state["block1_conv1.weight"], kernel.permute(3, 2, 0, 1))
    assert "block1_conv1.weight" in capsys.readouterr().out


@pytest.mark.slow
def test_predict_prints_and_ends_with_0_where_all_can_be_read(run, photos, capsys):
    (photos / "green" / "1.png").unlink()
    assert main(["predict", str(run / "model.keras"), str(photos / "*" / "2.png")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.endswith("2.png")] == [
        str(photos / name / "2.png") for name in ("blue", "green", "red")
    ]
    assert len(printed) == 3 * (1 + 3)


def test_images_none_of_which_can_be_read(run, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no")
    out = tmp_path / "found.csv"
    assert main(["predict", str(run), str(tmp_path / "a.png"), "--out", str(out)]) == 1
    assert out.read_text().startswith("path,error\n") and "a.png" in out.read_text()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("predict --model nowhere a.png", "There is no nowhere. Expected the folder of a run"),
        ("predict --model . {photos}", ". has no model.keras. Expected the folder of a run"),
        ("predict {run} nothing.png", "There is no file nothing.png."),
        ("predict {run} https://a.org/b.png", "https://a.org/b.png is an address, not a file."),
        ("predict {run} {photos} -b 0", "Received --batch-size 0; expected a whole number from 1."),
        (
            "evaluate {run} {photos} -b 0",
            "Received --batch-size 0; expected a whole number from 1.",
        ),
        ("predict {run} {photos} --top 0", "Received --top 0; expected a whole number from 1."),
        ("predict nowhere {photos}", "There is no nowhere."),  # before weights are fetched
        ("features {run} {photos} --layer features.2 --out f", "no layer 'features.2'"),
        ("predict {run} {photos} --out found.txt", "expected a name that ends in .csv or .jsonl"),
        ("evaluate {run} nowhere", "There is no nowhere."),
        (
            "features {run} {photos} --layer block1_pool --out a.csv",
            "expected the name of a folder",
        ),
        ("evaluate {run} {photos} -o a.txt", "expected a name that ends in .json or .html"),
        ("features {run} {photos} --layer fc9 --out f", "fc9"),
    ],
)
def test_what_cannot_be_done_is_said(words, message, run, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [word.format(run=run, photos=photos) for word in words.split()]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_evaluate_scores_the_test_images(run, tmp_path, capsys):
    tiny.pictures(tmp_path / "data" / "train", each=1)
    tiny.pictures(tmp_path / "data" / "test", each=4, seed=9)
    out = tmp_path / "figures.json"
    assert main(["evaluate", str(run), str(tmp_path / "data"), "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "12 images of 3 classes in " in printed and "/test\n" in printed
    figures = json.loads(out.read_text())
    model = keras.saving.load_model(run / "model.keras")
    paths = sorted((tmp_path / "data" / "test").rglob("*.png"))
    found = model.predict(vt.preprocess(paths, model), verbose=0).argmax(1)
    truth = np.repeat([0, 1, 2], 4)
    assert figures["accuracy"] == pytest.approx((found == truth).mean())
    assert figures["images"] == 12 and set(figures["classes"]) == {"blue", "green", "red"}
    assert np.array(figures["confusion"]).sum() == 12
    page = tmp_path / "test.html"
    assert main(["evaluate", str(run), str(tmp_path / "data"), "-o", str(page)]) == 0
    assert f"{figures['accuracy']:.1%} of 12 right" in page.read_text()


def test_figures_that_are_no_number_are_null_in_json(run, tmp_path):
    table, out = tmp_path / "labels.csv", tmp_path / "figures.json"
    for i, name in enumerate(tiny.COLOURS):
        Image.new("RGB", (20, 20), tiny.COLOURS[name]).save(tmp_path / f"{name}.png")
        row = f"{name}.png,{name},{'test' if i == 0 else 'train'}\n"
        table.write_text((table.read_text() if i else "path,label,split\n") + row)
    assert main(["evaluate", str(run), str(table), "-o", str(out)]) == 0
    figures = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert figures["images"] == 1 and figures["AUROC"] is None


def test_classes_are_told_by_their_names(run, tmp_path, monkeypatch):
    model = keras.saving.load_model(run / "model.keras")
    folder = tiny.pictures(tmp_path / "data", each=3, seed=9)
    whole, _ = vt.evaluate_folder(model, folder)
    (folder / "blue").rename(tmp_path / "blue")
    part, source = vt.evaluate_folder(model, folder)  # green and red: 1 and 2, not 0 and 1
    assert part.labels.tolist() == [1] * 3 + [2] * 3
    np.testing.assert_allclose(part.probabilities, whole.probabilities[3:], atol=1e-6)
    assert source.classes == ("blue", "green", "red")
    (folder / "red").rename(folder / "pink")
    monkeypatch.setattr(folders, "_checked", None)  # which reads images: refused before
    with pytest.raises(ValueError, match=r"3 classes \(blue, green, red\), .* doesn't know pink"):
        vt.evaluate_folder(model, folder)


@pytest.mark.slow
def test_what_can_t_be_read_stops_an_evaluation_or_is_left_out(run, tmp_path, capsys):
    folder = tiny.pictures(tmp_path / "data", each=2, seed=9)
    (folder / "red" / "torn.png").write_bytes(b"nothing")
    assert main(["evaluate", str(run), str(folder)]) == 1
    assert "torn.png" in (said := capsys.readouterr().err) and "pass --on-unreadable skip" in said
    with pytest.warns(UserWarning, match="1 of 7 images .* They are left out"):
        assert main(["evaluate", str(run), str(folder), "--on-unreadable", "skip"]) == 0
    assert "6 images of 3 classes" in capsys.readouterr().out
    with pytest.raises(ValueError, match="Received on_unreadable='hide'; expected 'skip' or"):
        vt.evaluate_folder(tiny.network(), folder, on_unreadable="hide")  # type: ignore[arg-type]


def test_whatever_a_network_ends_in_its_probabilities_are_scored(tmp_path):
    folder = tiny.pictures(tmp_path / "data", each=2, seed=9)
    config = DataConfig(preprocessing_inside=True)
    dense = tiny.network()
    outputs = keras.layers.Dense(3, name="logits")
    last = keras.layers.Softmax()(outputs(dense.layers[-2].output))
    outputs.set_weights(dense.layers[-1].get_weights())
    layer = keras.Model(dense.inputs, last)
    found = [vt.evaluate_folder(remember_(m, config), folder)[0] for m in (dense, layer)]
    np.testing.assert_allclose(found[0].probabilities, found[1].probabilities, atol=1e-6)
    sigmoid = keras.layers.Activation("sigmoid")(outputs(dense.layers[-2].output))
    model = remember_(keras.Model(dense.inputs, sigmoid), config)
    with pytest.raises(ValueError, match="expected Dense"):
        vt.evaluate_folder(model, folder)


@pytest.mark.slow
def test_features_are_written_read_and_resumed(run, photos, tmp_path, capsys, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = tmp_path / "features.parquet"
    words = ["features", str(run), str(photos), "--layer", "block1_pool", "--out", str(out)]
    assert main([*words, "--shard-size", "4", "-b", "3"]) == 1
    assert "green/1.png" in capsys.readouterr().err
    assert len(list(out.glob("part-*.parquet"))) == 3
    # All readers of Parquet take the folder for one table.
    table = parquet.read_table(out)
    assert table.num_rows == 8 and table.column_names == ["path", "features"]
    found = vt.read_features(out)
    model = keras.saving.load_model(run / "model.keras")
    maps = vt.truncate(model, "block1_pool").predict(vt.preprocess(list(found.paths), model))
    np.testing.assert_allclose(found.values, maps.mean((1, 2)), rtol=1e-4, atol=1e-5)

    # What is there isn't computed again, and what a kill left out is.
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    (out / "part-000001.parquet").unlink()
    assert main([*words, "--shard-size", "4", "-b", "3"]) == 1
    after = {path: path.stat().st_mtime_ns for path in out.glob("part-*.parquet")}
    assert set(after) == set(before)
    assert [path.name for path in before if after[path] != before[path]] == ["part-000001.parquet"]
    np.testing.assert_allclose(vt.read_features(out).values, found.values, rtol=1e-6)
    # Another run's folder is refused.
    assert main([*words, "--shard-size", "5"]) == 1
    assert "features of another run, with other shard_size." in capsys.readouterr().err


@pytest.mark.slow
def test_features_of_an_image_that_was_written_anew_are_made_again(run, tmp_path):
    pytest.importorskip("pyarrow")
    folder, out = tiny.pictures(tmp_path / "data", each=2), tmp_path / "features"
    model = vt.load_model(run)
    options: dict[str, Any] = {"layer": "block2_pool", "shard_size": 2}
    vt.write_features(model, [folder], out, **options)
    before = vt.read_features(out)
    shards = {path: path.read_bytes() for path in out.glob("part-*")}
    changed = folder / "green" / "1.png"
    changed.write_bytes(b"no image")
    (problem,) = vt.write_features(model, [folder], out, **options)
    assert problem[0] == changed
    Image.new("RGB", (20, 24), "white").save(changed)
    assert vt.write_features(model, [folder], out, **options) == []
    after = vt.read_features(out)
    assert after.paths == before.paths
    same = (after.values == before.values).all(1)
    assert same.tolist() == [path != str(changed) for path in before.paths]
    # Only the shard of that image was made again.
    assert [p.name for p in sorted(shards) if p.read_bytes() != shards[p]] == [
        "part-000001.parquet"
    ]


@pytest.mark.slow
def test_processes_share_the_shards(run, photos, tmp_path):
    pytest.importorskip("pyarrow")
    model = keras.saving.load_model(run / "model.keras")
    options: dict[str, Any] = {"layer": "block2_pool", "shard_size": 2, "pooling": "none"}
    problems = []
    for process in (1, 0):
        problems += vt.write_features(
            model, [photos], tmp_path / "f", process=process, processes=2, **options
        )
    alone = vt.write_features(model, [photos], tmp_path / "alone", **options)
    assert problems == alone and len(alone) == 1
    shared, whole = vt.read_features(tmp_path / "f"), vt.read_features(tmp_path / "alone")
    assert shared.paths == whole.paths and len(whole.paths) == 8
    np.testing.assert_array_equal(shared.values, whole.values)
    assert whole.values.shape == (8, 4 * 4 * 6)


@pytest.mark.slow
def test_the_nearest_images_look_alike(run, tmp_path):
    pytest.importorskip("pyarrow")
    model = keras.saving.load_model(run / "model.keras")
    folder = tiny.pictures(tmp_path / "photos", each=4, seed=5)
    vt.write_features(model, [folder], tmp_path / "f", layer="block1_pool")
    table = vt.read_features(tmp_path / "f")
    for row, matches in zip(table.values, table.nearest(table.values, k=3), strict=True):
        cosines = table.values @ row
        cosines /= np.linalg.norm(table.values, axis=1) * np.linalg.norm(row)
        assert [share for _, share in matches] == pytest.approx(sorted(cosines)[:-4:-1], abs=1e-5)
    assert [matches[0][0] for matches in table.nearest(table.values, k=1)] == list(table.paths)
    with pytest.raises(ValueError, match=r"shape \(1, 3\); expected \(N, 4\)"):
        table.nearest(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="queries with NaN or infinite values"):
        table.nearest(np.full((1, 4), np.nan))


def test_a_folder_of_something_else_is_not_written_into(run, photos):
    pytest.importorskip("pyarrow")
    model = keras.saving.load_model(run / "model.keras")
    with pytest.raises(ValueError, match="holds something else than features"):
        vt.write_features(model, [photos], photos, layer="block1_pool")


def test_a_model_that_says_nothing_is_refused_once(photos):
    model = tiny.network()
    with pytest.raises(ValueError, match="does not say which weight set"):
        list(vt.predict_files(model, [photos]))
    remember_(model, DataConfig(preprocessing_inside=True, label_names=("a", "b", "c")))
    found = list(vt.predict_files(model, [photos]))
    assert {name for one in found for name, _ in one.classes} == {"a", "b", "c"}


def test_sizes_differ_and_memory_is_bounded_by_the_batch(run, tmp_path, monkeypatch):
    model = keras.saving.load_model(run / "model.keras")
    for i in range(5):
        Image.new("RGB", (20 + 7 * i, 50 - 5 * i), (50 * i, 0, 0)).save(tmp_path / f"{i}.png")
    sizes = []
    predict = model.predict_on_batch

    def counted(x):
        sizes.append(len(x))
        return predict(x)

    monkeypatch.setattr(model, "predict_on_batch", counted)
    assert len(list(vt.predict_files(model, [tmp_path], batch_size=2))) == 5
    assert sizes == [2, 2, 1]


def test_a_folder_with_a_checkpoint_alone_says_how_to_have_a_model(tmp_path):
    (tmp_path / "last.pt").touch()
    with pytest.raises(ValueError, match=r"with resume=True\), or .*vt\.save_trained\(history"):
        vt.load_model(tmp_path)


def test_one_image_needs_no_list_and_what_is_no_path_is_refused(run, photos):
    model = vt.load_model(run)
    (image,) = vt.predict_files(model, str(photos / "blue" / "0.png"))
    assert image.path == photos / "blue" / "0.png" and image.classes
    letters: Any = np.array(["a", "b", "c"])
    (named,) = vt.predict_files(model, image.path, labels=letters)
    assert {name for name, _ in named.classes} == {"a", "b", "c"}
    with pytest.raises(ValueError, match="Received no images. Expected files, folders or patterns"):
        list(vt.predict_files(model, []))
    with pytest.raises(ValueError, match="Received a ndarray; expected the path of an image"):
        list(vt.predict_files(model, [np.zeros((4, 4, 3))]))  # type: ignore[list-item]
    with pytest.raises(ValueError, match="Received a Image; expected the path of an image"):
        list(vt.predict_files(model, Image.new("RGB", (4, 4))))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Received a TensorDataset; expected the path of a folder"):
        vt.evaluate_folder(model, tiny.dataset())  # type: ignore[arg-type]
    for ask in (
        lambda: list(vt.predict_files("run", [])),
        lambda: vt.evaluate_folder("run", photos),
    ):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="Received a str as the model; expected Keras's"):
            ask()


@pytest.mark.slow
def test_names_that_are_not_utf_8_come_back(run, tmp_path):
    folder = tmp_path / os.fsdecode(b"photos\xff")
    folder.mkdir()
    Image.new("RGB", (20, 20), (200, 50, 50)).save(folder / os.fsdecode(b"caf\xe9.png"))
    (path,) = folder.iterdir()
    out = tmp_path / "found"
    for ending in (".csv", ".jsonl"):
        assert main(["predict", str(run), str(folder), "--out", f"{out}{ending}"]) == 0
    with open(f"{out}.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert next(csv.DictReader(file))["path"] == str(path)
    with open(f"{out}.jsonl", encoding="utf-8") as file:
        assert json.loads(file.readline())["path"] == str(path)
    model = keras.saving.load_model(run / "model.keras")
    vt.write_features(model, [folder], tmp_path / "features", layer="block2_pool")
    assert vt.read_features(tmp_path / "features").paths[0].endswith(r"\udcff/caf\udce9.png")


def test_what_the_terminal_s_encoding_lacks_is_escaped(run, tmp_path, monkeypatch):
    Image.new("RGB", (20, 20)).save(tmp_path / "日本.png")
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    assert main(["predict", str(run), str(tmp_path / "日本.png")]) == 0
    shown.seek(0)
    assert r"\u65e5\u672c.png" in shown.read()


def test_files_of_a_run_are_no_model_and_a_file_is_no_folder(run, photos, tmp_path, capsys):
    for name in ("config.json", "classes.json"):
        assert main(["predict", str(run / name), str(photos)]) == 1
        assert (
            "which is neither a model nor an image. Expected the folder" in capsys.readouterr().err
        )
    checkpoints.write(tmp_path / "last.pt", {"variables": [torch.zeros(3)]})
    assert main(["convert", str(tmp_path / "last.pt"), str(tmp_path / "a.pth")]) == 1
    assert "it is the checkpoint of a run. Take the run's model.keras" in capsys.readouterr().err
    (tmp_path / "model.keras").touch()
    assert main(["evaluate", str(tmp_path / "last.pt"), str(photos)]) == 1
    error = capsys.readouterr().err
    assert "is no model of Keras by its ending. Expected the folder of a run" in error
    assert f"It belongs to a run: pass {tmp_path}." in error
    (tmp_path / "model.onnx").touch()
    assert main(["inspect", str(tmp_path / "model.onnx")]) == 1
    assert "What was exported isn't read back: pass the model" in capsys.readouterr().err
    (tmp_path / "taken").touch()
    words = ["features", str(run), str(photos), "--layer", "block2_pool"]
    assert main([*words, "--out", str(tmp_path / "taken")]) == 1
    assert "which is a file; expected a folder's name." in capsys.readouterr().err


def test_a_network_that_puts_out_logits_predicts_their_probabilities(run, photos):
    model = keras.saving.load_model(run / "model.keras")
    expected = list(vt.predict_files(model, photos))
    model.layers[-1].activation = keras.activations.linear
    found = list(vt.predict_files(model, photos))
    for one, other in zip(found, expected, strict=True):
        assert [name for name, _ in one.classes] == [name for name, _ in other.classes]
        shares = [[share for _, share in each.classes] for each in (one, other)]
        np.testing.assert_allclose(shares[0], shares[1], atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_features_of_a_network_at_a_size_of_the_users(photos, tmp_path, capsys):
    vgg = vt.VGG11(weights=None, include_top=False, input_shape=(48, 48, 3))
    remember_(vgg, "oxford")
    vt.save_weights(vgg, tmp_path / "a.safetensors")
    words = f"features vgg11 {photos / 'red'} --layer block3_pool --pooling none --image-size 48"
    out = tmp_path / "f"
    assert main([*words.split(), "--weights", str(tmp_path / "a.safetensors"), "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "Input: 48x48, crop mode center, crop share 0.875, bilinear; weight set oxford" in said
    found = vt.read_features(out)
    expected = vt.truncate(vgg, "block3_pool").predict(vt.preprocess(list(found.paths), vgg))
    np.testing.assert_allclose(
        found.values, expected.reshape(len(expected), -1), rtol=1e-3, atol=1e-3
    )


@pytest.mark.slow
def test_damaged_features_are_named(run, photos, tmp_path):
    model, out = keras.saving.load_model(run / "model.keras"), tmp_path / "features"
    vt.write_features(model, [photos / "red" / "0.png"], out, layer="block2_pool")
    (out / "part-000000.parquet").write_bytes(b"junk")
    for look in (
        lambda: vt.read_features(out),
        lambda: vt.write_features(model, [photos / "red" / "0.png"], out, layer="block2_pool"),
    ):
        with pytest.raises(ValueError, match=r"part-000000\.parquet is damaged \(.*Delete it; the"):
            look()
    (out / "part-000000.parquet").unlink()
    vt.write_features(model, [photos / "red" / "0.png"], out, layer="block2_pool")
    found = vt.read_features(out)
    with pytest.raises(ValueError, match="Received k=0; expected a whole number from 1"):
        found.nearest(found.values, k=0)
    (out / "_manifest.json").write_text("{")
    with pytest.raises(ValueError, match="_manifest.json is damaged"):
        vt.write_features(model, [photos / "red" / "0.png"], out, layer="block2_pool")
