"""Which part of the data trains, validates and tests, whatever its folders are called."""

from __future__ import annotations

import shutil
import warnings

import pytest
import tiny
from PIL import Image

import vggtorch as vt
from vggtorch.training import find_splits
from vggtorch.training.data import Folder, images_for
from vggtorch.training.run import read_data
from vggtorch.training.splits import tell_beside
from vggtorch.training.splits import test_part as part_to_evaluate
from vggtorch.training.tables import TablePart


def folders_in(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    "names",
    [
        ("training_set", "test_set"),
        ("seg_train", "seg_test", "seg_pred"),
        ("Train_Images", "Val_Images"),
        ("train1", "dev1"),
        ("trainset", "validset", "testset"),
        ("trainA", "testA", "trainB", "testB"),
        ("train", "eval"),
        ("train", "holdout", "bus"),
        ("1_train", "2_test"),
        ("01-training", "02 validation"),
    ],
)
def test_parts_of_unknown_names_are_not_taken_for_classes(tmp_path, names):
    folders_in(tmp_path, *names)
    with pytest.raises(ValueError, match=rf"the folders {names[0]} and .* Rename them to train, v"):
        find_splits(tmp_path)


@pytest.mark.parametrize(
    "names",
    [("train_station", "test_tube"), ("train", "bus"), ("strain", "stress"), ("interval", "train")],
)
def test_classes_that_sound_like_parts_are_classes(tmp_path, names):
    assert find_splits(folders_in(tmp_path, *names)) == (tmp_path, None, None)


def test_parts_of_which_none_trains_are_refused(tmp_path):
    folders_in(tmp_path, "val", "test")
    with pytest.raises(ValueError, match="has test and val, and nothing to train on"):
        find_splits(tmp_path)


def test_images_beside_the_parts_are_said(tmp_path):
    Image.new("RGB", (9, 9)).save(folders_in(tmp_path, "train/a", "train/b") / "0.png")
    with pytest.warns(UserWarning, match="Left out of .*: the images beside train, which"):
        tell_beside(tmp_path)


def test_an_evaluation_never_takes_what_trained(tmp_path):
    folders_in(tmp_path, "val", "test")
    assert part_to_evaluate(tmp_path) == tmp_path / "test"
    folders_in(tmp_path, "train")
    assert part_to_evaluate(tmp_path) == tmp_path / "test"
    (tmp_path / "test").rmdir()
    with pytest.raises(ValueError, match=f"train and val, and no test. Pass .*: {tmp_path}/val, s"):
        part_to_evaluate(tmp_path)


def test_a_tables_rows_that_train_are_never_evaluated_on(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("path,label,split\na.png,cat,train\nb.png,cat,val\n")
    with pytest.raises(ValueError, match="to train on and to validate with, and none of the spl"):
        part_to_evaluate(table)
    table.write_text("path,label,split\na.png,cat,train\nb.png,cat,val\nc.png,cat,test\n")
    assert part_to_evaluate(table) == TablePart(table, "test")


def test_parts_inside_of_the_classes_are_refused(tmp_path):
    for name in ("cat", "dog"):
        tiny.pictures(tmp_path / name / "train", each=1)
        tiny.pictures(tmp_path / name / "Test", each=1)
    with pytest.raises(ValueError, match=r"Each class in .* the folders Test, train. .*train/cat."):
        vt.finetune(tiny.network(), tmp_path)


def test_folds_that_count_as_classes_are_said(tmp_path, config):
    images = images_for(tiny.network(), config)
    for number in (1, 2):
        tiny.pictures(tmp_path / "folds" / f"fold{number}", each=3, seed=number)
        tiny.pictures(tmp_path / "days" / f"day{number}", each=3, seed=number)
    (tmp_path / "days" / "day2" / "red").rename(tmp_path / "days" / "day2" / "purple")
    with pytest.warns(
        UserWarning, match=r"fold1 and fold2 .* the same folders: blue, green, red\."
    ):
        assert read_data(tmp_path / "folds", None, config, images).classes == ("fold1", "fold2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_data(tmp_path / "days", None, config, images).classes == ("day1", "day2")


def test_a_train_folder_with_folders_that_counts_as_a_class_is_said(tmp_path, config):
    tiny.pictures(tmp_path / "train", each=3)
    (tiny.pictures(tmp_path / "others", seed=1) / "red").rename(tmp_path / "unlabelled")
    shutil.rmtree(tmp_path / "others")
    images = images_for(tiny.network(), config)
    with pytest.warns(UserWarning, match="train is taken for a class, as unlabelled .*blue, green"):
        assert read_data(tmp_path, None, config, images).classes == ("train", "unlabelled")


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_rare_class_may_be_missing_where_nothing_is_learned(tmp_path, config, part):
    tiny.pictures(tmp_path / "train")
    shutil.rmtree(tiny.pictures(tmp_path / part, seed=1) / "green")
    with pytest.warns(UserWarning, match=r"No images of green in the (validation|test) data, whos"):
        read = read_data(tmp_path, None, config, images_for(tiny.network(), config))
    found = read.validation if part == "val" else read.test
    assert isinstance(found, Folder) and read.classes == ("blue", "green", "red") == found.classes
    assert {path.parent.name for path in found.paths} == {"blue", "red"}
    assert [found.classes[label] for label in found.labels] == [p.parent.name for p in found.paths]
