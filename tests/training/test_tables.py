"""Labels from CSV, JSON lines and files' names are those that pandas and fastai's rule give."""

from __future__ import annotations

import dataclasses
import json
import warnings

import pandas
import pytest
import tiny

from vggtorch.cli import main
from vggtorch.models import remember_
from vggtorch.options import as_options
from vggtorch.training import data, evaluate_folder
from vggtorch.training.config import TrainConfig
from vggtorch.training.folders import images_by_class
from vggtorch.training.loop import finetune
from vggtorch.training.run import read_data
from vggtorch.training.splits import find_splits
from vggtorch.training.tables import TablePart, read_rows
from vggtorch.weight_sets import DataConfig


@pytest.fixture
def table(tmp_path):
    """24 images, of which every fourth of a class validates and one tests, as pandas writes it."""
    tiny.pictures(tmp_path / "data")
    paths = sorted((tmp_path / "data").rglob("*.png"))
    frame = pandas.DataFrame(
        {
            "image_path": [str(p.relative_to(tmp_path)) for p in paths],
            "class": [p.parent.name for p in paths],
            "split": [{"0": "test", "3": "val", "7": "val"}.get(p.stem, "train") for p in paths],
        }
    )
    return frame, tmp_path / "labels.csv"


def images(config):
    return data.images_for(tiny.network(), config)


@pytest.mark.parametrize("form", ["csv", "semicolons", "bars", "tsv", "jsonl"])
def test_a_table_with_splits_is_read_as_pandas_wrote_it(table, config, form):
    frame, path = table
    if form == "jsonl":
        path = path.with_suffix(".jsonl")
        frame.to_json(path, orient="records", lines=True)
    else:
        path = path.with_suffix(".tsv") if form == "tsv" else path
        separator = {"tsv": "\t", "semicolons": ";", "bars": "|"}.get(form, ",")
        frame.to_csv(path, index=False, sep=separator, encoding="utf-8-sig")
    read = read_data(path, None, config, images(config))
    for source, split in ((read.training, "train"), (read.validation, "val"), (read.test, "test")):
        assert isinstance(source, data.Folder)
        expected = frame[frame["split"] == split]
        assert [str(p.relative_to(path.parent)) for p in source.paths] == list(expected.image_path)
        assert [source.classes[label] for label in source.labels] == list(expected["class"])
    assert read.classes == ("blue", "green", "red")
    assert not read.held_out


@pytest.mark.slow
def test_training_on_a_table_is_training_on_the_folder(table, config):
    frame, path = table
    frame.drop(columns="split").to_csv(path, index=False, header=False)
    by_table = finetune(tiny.network(), path, config=config)
    other = dataclasses.replace(config, output_dir=config.output_dir + "2")
    by_folder = finetune(tiny.network(), path.parent / "data", config=other)
    assert tiny.curve(by_table) == tiny.curve(by_folder)
    frame.loc[0, "class"] = "red"
    frame.drop(columns="split").to_csv(path, index=False)
    with pytest.raises(ValueError, match="belongs to another run: other training images"):
        finetune(tiny.network(), path, config=dataclasses.replace(config, resume=True))


def test_splits_in_files_of_their_own_and_classes_that_one_lacks(table, config):
    frame, path = table
    for split in ("train", "val", "test"):
        part = frame[frame["split"] == split].drop(columns="split")
        part[part["class"] != "green"].to_csv(path.with_name(f"{split}.csv"), index=False)
        if split == "train":
            part.to_csv(path.with_name("train.csv"), index=False)
    assert find_splits(path.parent) == tuple(
        TablePart(path.with_name(f"{name}.csv")) for name in ("train", "val", "test")
    )
    with (
        pytest.warns(UserWarning, match="No images of green in the validation data"),
        pytest.warns(UserWarning, match="No images of green in the test data"),
    ):
        by_folder = read_data(path.parent, None, config, images(config))
    with pytest.warns(UserWarning, match="No images of green in the validation data"):
        by_files = read_data(
            path.with_name("train.csv"), path.with_name("val.csv"), config, images(config)
        )
    assert by_folder.validation == by_files.validation
    validation = by_folder.validation
    assert isinstance(validation, data.Folder) and validation.classes == by_folder.classes
    assert {validation.classes[label] for label in validation.labels} == {"blue", "red"}


def test_labels_that_are_numbers_stand_in_their_order(table):
    frame, path = table
    frame = frame.drop(columns="split")
    frame["class"] = [{"blue": 10, "green": 9, "red": 100}[name] for name in frame["class"]]
    frame.to_json(path.with_suffix(".jsonl"), orient="records", lines=True)
    assert data.read_folder(path.with_suffix(".jsonl"), 16).classes == ("9", "10", "100")


def test_labels_that_look_like_quantities_are_said_and_in_order(table):
    _, path = table
    listed = path.with_name("ages.csv")
    listed.write_text("path,label\na.png,10.5\nb.png,9.0\nc.png,-1\n")
    with pytest.warns(UserWarning, match=r"\(-1, 9.0, 10.5\). Each of the 3 becomes a class; a qu"):
        assert list(images_by_class(TablePart(listed))) == ["-1", "9.0", "10.5"]


def test_fastai_s_column_is_valid_splits(table, config):
    frame, path = table
    frame["is_valid"] = frame.pop("split") == "val"
    frame.to_csv(path, index=False)
    read = read_data(path, None, config, images(config))
    assert (len(read.training), len(read.validation or ())) == (18, 6)


def test_labels_from_names_of_files_as_fastai_takes_them(tmp_path, config):
    folder = tiny.pictures(tmp_path / "data")
    for path in sorted(folder.rglob("*.png")):
        path.rename(folder / f"light_{path.parent.name}_{path.stem}.png")
    pattern = "^(.+)_[0-9]+.png$"
    found = data.read_folder(folder, 16, label_pattern=pattern)
    assert found.classes == ("light_blue", "light_green", "light_red")
    assert [found.classes[label] for label in found.labels] == [
        path.stem.rpartition("_")[0] for path in found.paths
    ]
    assert set(images_by_class(folder, pattern).values()) == {8}
    (folder / "odd.png").write_bytes(found.paths[0].read_bytes())
    with pytest.raises(ValueError, match=r"no label in 1 of 25 images in .*data: odd\.png\. Exp"):
        data.read_folder(folder, 16, label_pattern=pattern)
    with pytest.raises(ValueError, match=r"expected a group around the label"):
        TrainConfig(label_pattern="abc")
    with pytest.raises(ValueError, match=r"label_pattern='\(', which isn't a regular expression"):
        TrainConfig(label_pattern="(")
    assert as_options(f"Pass label_pattern={pattern!r}.") == (f"Pass --label-pattern '{pattern}'.")


@pytest.mark.slow
def test_the_commands_take_tables_and_patterns(table, tmp_path, capsys):
    frame, path = table
    frame.to_csv(path, index=False)
    assert main(["finetune", str(path), "--epochs", "0"]) == 1
    assert "expected a whole number from 1" in capsys.readouterr().err
    config = DataConfig(preprocessing_inside=True, label_names=tuple(tiny.COLOURS))
    model = remember_(tiny.network(), config)
    found, source = evaluate_folder(model, path)
    assert len(found.labels) == 3 and all(p.stem == "0" for p in source.paths)
    model.save(tmp_path / "model.keras")
    out = tmp_path / "figures.json"
    assert main(["evaluate", str(tmp_path), str(path), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["accuracy"] == found.accuracy
    flat = tmp_path / "flat"
    flat.mkdir()
    for image in (tmp_path / "data").rglob("0.png"):
        image.rename(flat / f"{image.parent.name}-0.png")
    pattern = ["--label-pattern", "^(.+)-"]
    assert main(["evaluate", str(tmp_path), str(flat), "--out", str(out), *pattern]) == 0
    assert json.loads(out.read_text())["accuracy"] == found.accuracy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a.png,cat\na.png,dog\n",
            r"a\.png stands twice in .*, as 'cat' and, in line 2, 'dog'\. .*folder/a\.png",
        ),
        ("path,label\na.png,\n", r"Line 2 of .*csv has label=''; expected one name"),
        ("path,label\na.png,x,y\n", r"Line 2 of .* has 3 cells; expected 2\. Put names"),
        ("path,label,split\na.png,x,hold\n", r"the split 'hold'; expected one of train, training"),
        ("name,breed\na,b\n", r"has the columns 'name', 'breed'; expected one of paths and one of"),
        ("path,cat,dog\na,0,1\n", r"of one column for each class make one of names"),
        ("path,file,label\na,b,c\n", r"has the columns 'path', 'file', 'label'; expected one of"),
        ("path,label,split\na.png,x,test\n", r"No row of .* has the split train, only test"),
        ("a.png,cat\nb.png,cat\n", r"labels\.csv has one class alone, 'cat'"),
        ("", r"has no rows\. Expected a path and a label"),
        ("a.png,cat\nb.png,dog\n", r"Class 'cat' has one image, which would be held out"),
        (
            "a.png,cat\nb.png,dog\nc.png,cat\nd.png,dog\n",
            r"4 of 4 images in .*labels\.csv can't be read: .*a\.png",
        ),
        ("https://x.y/a.png,cat\n", r"Line 1 of .* has the address https://x.y/a.png, not a file"),
        ('path,label\n"a.png,cat\nb.png,dog\n', r"in another line, up to line 3: 'a.png,cat.*quo"),
        (f"path,label\n{'a' * 140_000}.png,cat\n", r"can't be read as a table: field larger than"),
    ],
)
def test_tables_that_can_t_be_right(tmp_path, config, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_data(tmp_path / "labels.csv", None, config, images(config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"path": "a", "label": [1, 2]}\n', r"Line 1 of .* has label=\[1, 2\]; expected one name"),
        ('{"path": "a", "label": 1}\n{"path": "b"}\n', r"Line 2 of .* lacks label"),
        (
            '{"path": "a", "label": 1}\n{"path": "b", "label": 2, "split": "test"}\n',
            r"Line 2 of .* has split, which its first line lacks. Expected the same names in each",
        ),
        ("[1]\n", r"Line 1 of .* is \[1\]; expected one object, {\"path\": "),
        (f"[{'1, ' * 500}1]\n", r"Line 1 of [^ ]* is [^;]{59}; expected one object"),
        ("{\n", r"Line 1 of .* isn't JSON"),
        ("[" * 99_999, r"Line 1 of .* isn't JSON"),
        (f'{{"path": "a", "label": {"1" * 9999}}}', r"Line 1 of .* isn't JSON"),
    ],
)
def test_lines_of_json_that_can_t_be_right(tmp_path, text, message):
    (tmp_path / "labels.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "labels.jsonl")


def test_a_table_that_is_looked_into_twice_warns_once(table):
    frame, path = table
    pandas.concat([frame, frame[:1]]).assign(note="x").to_csv(path, index=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        _ = find_splits(path), images_by_class(TablePart(path, "train"))  # as of one call
    said = sorted(str(w.message).partition(f"{path}")[0] for w in caught)
    assert said == ["A row repeats another in ", "Columns of "]


def test_what_a_table_has_beside_is_said(table, config):
    frame, path = table
    frame["photographer"] = "me"
    pandas.concat([frame, frame[:2]]).to_csv(path, index=False)
    with pytest.warns(UserWarning) as caught:
        rows = read_rows(path)
    assert len(rows) == 24
    said = " ".join(str(w.message) for w in caught)
    assert "say nothing here: 'photographer'." in said and "2 rows repeat others in" in said
    path.write_text("data/red/0.png,red\ndata/blue/0.png,blue\ngone.png,red\n")
    with pytest.warns(UserWarning, match="1 of 3 images .* They are left out"):
        assert len(data.read_folder(path, 16, on_unreadable="skip")) == 2
    with pytest.raises(ValueError, match=r"which has the labels itself"):
        data.read_folder(path, 16, label_pattern="(a)")


def test_files_of_a_table_that_are_not_there_are_named_and_where_they_were_looked_for(table):
    frame, path = table
    frame["image_path"] = "elsewhere/" + frame["image_path"]
    frame.to_csv(path)  # with pandas's index
    with (
        pytest.warns(UserWarning, match="say nothing here: one without a name\\."),
        pytest.raises(ValueError) as refused,
    ):
        data.read_folder(TablePart(path, "train"), 16)
    message = str(refused.value)
    assert f"{path.parent / frame['image_path'][1]}: there is no such file." in message
    assert f"Paths in labels.csv are relative to its folder, {path.parent}. Mend" in message
    assert "Errno" not in message


@pytest.mark.parametrize(
    ("written", "hint"),
    [
        (lambda path: path.replace("/", "\\"), r"1\.png is there: write slashes instead of backsl"),
        (lambda path: path.removesuffix(".png"), r"1\.png is there: write the files' endings\."),
        (lambda path: path.removeprefix("data/"), r"1\.png is there: write that folder before"),
        (lambda path: f"~/{path}", r"Write the home folder's path instead of ~\."),
        (lambda path: f"a\0{path}", r"'[^']*a\\x00[^']*': a file's name holds no null char"),
    ],
)
def test_files_that_are_written_otherwise_are_pointed_at(table, written, hint):
    frame, path = table
    frame["image_path"] = frame["image_path"].map(written)
    frame.to_csv(path, index=False)
    with pytest.raises(ValueError, match=hint):
        data.read_folder(TablePart(path, "train"), 16)
