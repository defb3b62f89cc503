"""What a folder of images holds is counted and said, and damaged images are named."""

import errno
import os
import shutil
import warnings
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from vggtorch.models import images
from vggtorch.paths import SUFFIXES
from vggtorch.training import data, find_splits, folders, loaders


def folders_in(tmp_path, *names):
    for name in names:
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize("name", ["val", "valid", "validation", "dev", "Val"])
def test_a_validation_folder_validates(tmp_path, name):
    assert find_splits(tmp_path) == (tmp_path, None, None)
    folders_in(tmp_path, "train", name)
    assert find_splits(tmp_path) == (tmp_path / "train", tmp_path / name, None)


def test_a_lone_train_folder_holds_the_classes_and_one_beside_others_is_a_class(tmp_path):
    folders_in(tmp_path, "train")
    assert find_splits(tmp_path) == (tmp_path / "train", None, None)
    folders_in(tmp_path, "bus", "car")
    assert find_splits(tmp_path) == (tmp_path, None, None)


def test_a_test_folder_is_never_taken_for_validation(tmp_path):
    folders_in(tmp_path, "train", "test")
    assert find_splits(tmp_path) == (tmp_path / "train", None, tmp_path / "test")
    folders_in(tmp_path, "val")
    assert find_splits(tmp_path) == (tmp_path / "train", tmp_path / "val", tmp_path / "test")


@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing"), ("TRAIN", "test")])
def test_parts_under_other_names_are_no_classes(tmp_path, names):
    folders_in(tmp_path, *names)
    assert find_splits(tmp_path) == (tmp_path / names[0], None, tmp_path / names[1])


def test_folders_beside_the_parts_are_said_and_two_for_one_part_refused(tmp_path, config):
    from vggtorch.training.run import read_data

    tiny.pictures(tmp_path / "train")
    tiny.pictures(tmp_path / "val", seed=1)
    folders_in(tmp_path, "extra", ".hidden")
    assert find_splits(tmp_path) == (tmp_path / "train", tmp_path / "val", None)
    with pytest.warns(UserWarning, match=f"^Left out of {tmp_path}: the folders extra, which"):
        read_data(tmp_path, None, config, data.images_for(tiny.network(), config))
    folders_in(tmp_path, "valid")
    with pytest.raises(ValueError, match="two folders for one part, val and valid"):
        find_splits(tmp_path)


def test_images_of_hidden_and_of_linked_folders_are_counted(tmp_path):
    folder, other = tiny.pictures(tmp_path / "data"), tiny.pictures(tmp_path / "other", seed=1)
    (folder / "red" / ".ipynb_checkpoints").mkdir()
    (folder / "red" / "0.png").rename(folder / "red" / ".ipynb_checkpoints" / "0-checkpoint.png")
    (folder / "red" / "more").symlink_to(other / "red")
    with pytest.warns(UserWarning, match=r"2 files \((1 hidden|1 linked folder), (?!\1)1 "):
        assert len(data.read_folder(folder, 16)) == 23


def test_a_class_that_is_a_link_to_nothing_is_said(tmp_path):
    folder = tiny.pictures(tmp_path / "data", each=1)
    (folder / "white").symlink_to(tmp_path / "of another drive")
    with pytest.warns(UserWarning, match="1 link to nothing beside the classes' folders"):
        assert data.read_folder(folder, 16).classes == ("blue", "green", "red")


def test_a_folder_that_can_t_be_looked_into_is_an_error(tmp_path, monkeypatch):
    def scandir(path, scandir=os.scandir):
        if str(path).endswith("red"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    folder = tiny.pictures(tmp_path / "data", each=1)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="red"):
        folders.images_under(folder)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("^[a-z]+_", "expected a group around the label"),
        ("^(.+", "isn't a regular expression: missing"),
    ],
)
def test_patterns_that_find_no_labels(tmp_path, pattern, message):
    tiny.pictures(tmp_path)
    with pytest.raises(ValueError, match=message):
        data.read_folder(tmp_path, 16, label_pattern=pattern)


@pytest.mark.slow
def test_files_that_train_and_judge_are_said(tmp_path, config):
    from vggtorch.training.run import read_data

    train, test = tiny.pictures(tmp_path / "train"), tiny.pictures(tmp_path / "test", seed=1)
    images = data.images_for(tiny.network(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_data(tmp_path, None, config, images)
    shutil.copy(train / "red" / "0.png", test / "red" / "again.png")
    with pytest.warns(UserWarning, match=r"1 of 25 test images are files .*again.png is .*0\.png"):
        read_data(tmp_path, None, config, images)
    for number in range(8):
        shutil.copy(train / "red" / "0.png", train / "red" / f"{number}.png") if number else None
    with pytest.warns(UserWarning, match="validation images are files of the training data again"):
        read_data(train, None, config, images)


def test_a_run_on_train_and_test_holds_out_a_part_of_train(tmp_path, config):
    from vggtorch.training.run import read_data

    tiny.pictures(tmp_path / "data" / "train")
    tiny.pictures(tmp_path / "data" / "test", each=2, seed=1)
    images = data.images_for(tiny.network(), config)
    read = read_data(tmp_path / "data", None, config, images)
    assert isinstance(read.training, data.Folder)
    assert isinstance(read.validation, data.Folder)
    assert len(read.validation) == 6
    assert len(read.training) == 18
    assert all("train" in p.parts for p in read.validation.paths + read.training.paths)
    assert isinstance(read.test, data.Folder) and all("test" in p.parts for p in read.test.paths)
    # A validation folder of the user's own is told apart from the classes too.
    other = tiny.pictures(tmp_path / "other", each=1)
    with pytest.warns(UserWarning, match="1 of 3 validation images are files of the training"):
        read = read_data(tmp_path / "data", other, config, images)
    assert (len(read.training), len(read.validation or ())) == (24, 3)


@pytest.mark.parametrize("part", ["val", "test"])
def test_other_classes_are_refused_before_any_image_is_read(tmp_path, config, monkeypatch, part):
    from vggtorch.training.loop import finetune

    monkeypatch.setattr(folders, "_checked", None)  # which reads them
    tiny.pictures(tmp_path / "data" / "train")
    (tiny.pictures(tmp_path / "data" / part) / "red").rename(tmp_path / "data" / part / "pink")
    message = r"only in the training data \['red'\].*(test|validation) data \['pink'"
    with pytest.raises(ValueError, match=message):
        finetune(tiny.network(), tmp_path / "data", config=config)
    held = {"train": tmp_path / "data" / "train", part: tmp_path / "data" / part}
    with pytest.raises(ValueError, match=message):
        finetune(tiny.network(), held, config=config)
    if part == "val":
        with pytest.raises(ValueError, match=message):
            finetune(tiny.network(), held["train"], held["val"], config=config)


def test_a_class_of_one_image_is_refused_before_any_is_read(tmp_path, config, monkeypatch):
    from vggtorch.training.loop import finetune

    monkeypatch.setattr(folders, "_checked", None)
    folder = tiny.pictures(tmp_path / "data")
    for path in sorted((folder / "red").iterdir())[1:]:
        path.unlink()
    with pytest.raises(ValueError, match="'red' has one image, which would be"):
        finetune(tiny.network(), folder, config=config)


@pytest.mark.parametrize(
    ("first", "second"), [("Red", "red"), ("caf\xe9", "cafe\u0301"), ("stra\xdfe", "strasse")]
)
def test_classes_that_look_like_one_are_said(tmp_path, first, second):
    folder = tiny.pictures(tmp_path / "data", each=1)
    (folder / "blue").rename(folder / first)
    (folder / "red").rename(folder / second)
    with pytest.warns(UserWarning, match="in capitals or in how letters are coded alone") as caught:
        assert len(data.read_folder(folder, 16).classes) == 3
    (said,) = [str(w.message) for w in caught]
    assert f"{first!a} and {second!a}" in said or f"{second!a} and" in said


def test_a_folder_of_12_bits_in_16_is_said(tmp_path):
    folder = tiny.pictures(tmp_path / "data", each=1)
    for name, value in (("a", 300), ("b", 3600)):
        Image.fromarray(np.full((20, 20), value, np.uint16)).save(folder / "red" / f"{name}.tif")
    with pytest.warns(UserWarning, match=r"2 images of 16 bits in .*, with no value above 3598\. "):
        data.read_folder(folder, 16)
    Image.fromarray(np.full((20, 20), 65535, np.uint16)).save(folder / "red" / "white.png")
    with warnings.catch_warnings(action="error", category=UserWarning):  # 16 bits are used as such
        data.read_folder(folder, 16)


def test_files_of_several_frames_are_counted(tmp_path):
    folder = tiny.pictures(tmp_path / "data", each=1)
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    for suffix in ("gif", "webp", "tif", "apng"):
        frames[0].save(folder / "red" / f"a.{suffix}", "PNG" if suffix == "apng" else None,
                       save_all=True, append_images=frames[1:])  # fmt: skip
    frames[0].save(folder / "red" / "still.gif")
    frames[0].save(folder / "red" / "a.mpo", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning) as caught:
        assert len(data.read_folder(folder, 16)) == 9
    said = [str(w.message) for w in caught]
    expected = f"4 files in {folder} with several frames or pages: of each the first is read."
    assert said == [expected]


def test_validation_beside_the_data_gives_way_to_what_was_passed_and_that_is_said(tmp_path, config):
    from vggtorch.training.run import read_data

    for i, name in enumerate(("train", "val", "other")):
        tiny.pictures(tmp_path / name, seed=i)
    (tmp_path / "other").rename(tmp_path.parent / f"{tmp_path.name}-other")
    images = data.images_for(tiny.network(), config)
    with pytest.warns(UserWarning, match=f"of its own, {tmp_path / 'val'}, which aren't used: th"):
        read = read_data(tmp_path, f"{tmp_path}-other", config, images)
    assert isinstance(read.validation, data.Folder)
    assert {path.parent.parent.name for path in read.validation.paths} == {f"{tmp_path.name}-other"}


def test_folders_of_the_system_are_no_classes_and_hold_no_images(tmp_path):
    folder = tiny.pictures(tmp_path / "data", each=1)
    (folder / "__MACOSX" / "red").mkdir(parents=True)
    (folder / "__MACOSX" / "red" / "._0.png").touch()
    thumbnail = folder / "red" / "@eaDir" / "0.png" / "SYNOPHOTO_THUMB_M.jpg"
    deleted = folder / "$RECYCLE.BIN" / "S-1-5" / "$R1.jpg"
    for path in (thumbnail, deleted):
        path.parent.mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(path)
    (folder / "lost+found").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(data.read_folder(folder, 16)) == 3
    assert set(folders.images_by_class(folder)) == {"blue", "green", "red"}


@pytest.mark.slow
def test_runs_and_features_in_the_folder_of_images_are_no_classes(tmp_path, monkeypatch, config):
    from vggtorch.training.loop import finetune

    tiny.pictures(tmp_path / "data" / "train")
    monkeypatch.chdir(tmp_path / "data" / "train")  # as who types `vggtorch finetune .` there
    for name in ("run", "run2"):
        with pytest.warns(UserWarning, match="folder of a run or of features"):
            history = finetune(tiny.network(), ".", epochs=1, output_dir=name)
        assert history.classes == ("blue", "green", "red")
    with pytest.warns(UserWarning, match=r"2 files \(2 folder of a run or of features\)"):
        data.read_folder(".", 16)
    folders_in(tmp_path / "data", "features")
    (tmp_path / "data" / "features" / "_manifest.json").touch()
    assert find_splits(tmp_path / "data") == (tmp_path / "data" / "train", None, None)
    for output in (".", "red", tmp_path / "data" / "train" / "blue"):
        with pytest.raises(ValueError, match="which holds images of the data. Choose another"):
            finetune(tiny.network(), ".", epochs=1, output_dir=str(output))
    assert not (tmp_path / "data" / "train" / "red" / ".lock").exists()


def test_images_without_labels_beside_the_training_images_have_a_hint(tmp_path):
    train, test = tiny.pictures(tmp_path / "Train"), tmp_path / "test"
    for folder in (test, test / "unknown"):
        folder.mkdir()
        Image.new("RGB", (9, 9)).save(folder / "1.png")
        with pytest.raises(ValueError, match=f"can't judge anything: pass {train} alone"):
            data.read_folder(test, 16)


def test_one_class_alone_is_refused(tmp_path):
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"one class alone, 'photos', .* pass .*photos\."):
        data.read_folder(tmp_path, 16)
    with pytest.raises(ValueError, match=r"one class alone, 'cats', .* several classes\.$"):
        data.read_folder(tmp_path / "photos", 16)


def test_what_is_left_out_is_counted_in_one_line(tmp_path):
    folder = tiny.pictures(tmp_path / "data")
    for name in ("a.txt", "b.txt", "c.svg", "README", ".DS_Store", "Thumbs.db", "._0.png"):
        (folder / "red" / name).touch()
    (folder / "blue" / "gone.png").symlink_to(folder / "nowhere.png")
    Image.new("RGB", (9, 9)).save(folder / "unsorted.png")
    with pytest.warns(UserWarning) as caught:
        found = data.read_folder(folder, 16)
    (said,) = [str(w.message) for w in caught]
    assert len(found) == 24
    assert "\n" not in said
    assert said.startswith(f"Left out of {folder}: 7 files (2 .txt, ")
    for part in (
        "1 .svg",
        "1 without an ending",
        "1 hidden",
        "1 no regular file",
        "1 images besid",
    ):
        assert part in said


def test_a_class_without_images_is_refused_before_any_is_read(tmp_path, monkeypatch):
    folder = folders_in(tiny.pictures(tmp_path / "data"), "yellow", "pink")
    monkeypatch.setattr(folders, "_checked", None)  # which reads them
    for look in (folders.images_by_class, lambda part: data.read_folder(part, 16)):
        with pytest.raises(ValueError, match="No images for pink, yellow in .*of every class: add"):
            look(folder)


def test_the_same_file_in_two_classes_is_said(tmp_path):
    folder = tiny.pictures(tmp_path / "data")
    shutil.copy(folder / "blue" / "0.png", folder / "red" / "also blue.png")
    shutil.copy(folder / "blue" / "0.png", folder / "blue" / "again.png")  # no contradiction
    (folder / "green" / "link.png").symlink_to(folder / "red" / "1.png")
    with pytest.warns(UserWarning) as caught:
        assert len(data.read_folder(folder, 16)) == 27
    (said,) = [str(w.message) for w in caught]
    assert said.startswith(f"2 images in {folder} of the same content as one of another class: ")
    assert said.endswith("say. One of the two labels is wrong.")
    assert f"{folder / 'red' / '1.png'} (red) is {folder / 'green' / 'link.png'} (green)" in said


def test_a_table_of_labels_beside_a_folder_of_images_is_pointed_at(tmp_path):
    folder = folders_in(tmp_path, "images") / "images"
    with pytest.raises(ValueError, match="takes them there.$"):
        data.read_folder(folder, 16)
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(
        ValueError, match=r"Perhaps .*train\.csv has them, and can be passed itself."
    ):
        data.read_folder(folder, 16)


@pytest.mark.parametrize(
    ("images_of_red", "message"),
    [(1, "'red' has one image, which would be"), (2, "'red' has 2 images, all of which would be")],
)
def test_a_class_that_would_be_held_out_whole_is_refused(tmp_path, images_of_red, message):
    folder = tiny.pictures(tmp_path / "data")
    for path in sorted((folder / "red").iterdir())[images_of_red:]:
        path.unlink()
    with pytest.raises(ValueError, match=message):
        data.hold_out(data.read_folder(folder, 16), 0.9)


@pytest.mark.slow
def test_messages_on_many_files_stay_short(tmp_path):
    folder = tiny.pictures(tmp_path / "data", each=1)
    for i in range(300):
        (folder / "red" / f"empty{i}.png").touch()
        (folder / "blue" / f"{i}.{'x' * 50}{i}").touch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(ValueError, match=r"300 of 303 images .* And 290 more. Mend") as refused:
            data.read_folder(folder, 16)
        data.read_folder(folder, 16, on_unreadable="skip")
    assert len(str(refused.value)) < 3000
    assert len(caught) == 3
    assert all(len(str(w.message)) < 3000 for w in caught)


def test_every_format_trains_that_can_be_predicted(tmp_path):
    folder = tiny.pictures(tmp_path / "data", each=1)
    writable = {".bmp", ".gif", ".jpg", ".jpeg", ".jp2", ".png", ".ppm", ".tif", ".tiff", ".webp"}
    assert writable < SUFFIXES
    for suffix in writable:
        Image.new("RGB", (20, 20), (200, 50, 50)).save(folder / "red" / f"a{suffix}")
    found = data.read_folder(folder, 16)
    assert {p.suffix for p in found.paths} == writable
    for index, path in enumerate(found.paths):
        if path.stem == "a":
            np.testing.assert_allclose(found[[(index, 0)]][0][0, 8, 8], (200, 50, 50), atol=4)


def test_a_photograph_lying_on_its_side_trains_upright(tmp_path):
    folder = tiny.pictures(tmp_path / "data", each=1)
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16] = 255  # stored with white on the left; turned clockwise, white is on top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(folder / "red" / "0.png", exif=exif)
    found = data.read_folder(folder, 16)
    image = found[[(found.paths.index(folder / "red" / "0.png"), 0)]][0][0]
    assert image[2].min() > 250
    assert image[13].max() < 5


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, IndexError])
def test_whatever_pil_raises_is_skipped_when_asked(tmp_path, monkeypatch, error):
    folder, real = tiny.pictures(tmp_path / "data"), images.to_rgb

    def fail(image):
        if image.size == (7, 7):
            raise error("broken inside")
        return real(image)

    monkeypatch.setattr(images, "to_rgb", fail)
    Image.new("RGB", (7, 7)).save(folder / "red" / "7.png")
    with pytest.raises(ValueError, match=r"1 of 24 images .*7.png: broken inside\. Mend"):
        data.read_folder(folder, 16)
    with pytest.warns(UserWarning, match="7.png: broken inside. They are left out"):
        assert len(data.read_folder(folder, 16, on_unreadable="skip")) == 23


def test_a_folder_is_checked_with_few_large_images_at_once(tmp_path, monkeypatch):
    import threading
    import time

    folder, real, lock = tiny.pictures(tmp_path / "data"), images.to_rgb, threading.Lock()
    held, most = [0], [0]

    def watched(image):
        with lock:
            held[0] += image.width * image.height
            most[0] = max(most[0], held[0])
        time.sleep(0.005)
        try:
            return real(image)
        finally:
            with lock:
                held[0] -= image.width * image.height

    monkeypatch.setattr(images, "to_rgb", watched)
    monkeypatch.setattr(folders, "PIXELS_AT_ONCE", 2 * 20 * 24)
    data.read_folder(folder, 16)
    assert 0 < most[0] <= 2 * 20 * 24


def test_a_dataset_of_pil_images_is_read_as_files_are():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    dataset: Any = [(image, 0), (image, 1)]
    source, _ = loaders.as_source(dataset, seed=0, batch_size=2)
    assert source[[(0, 0)]][0].min() == 255
