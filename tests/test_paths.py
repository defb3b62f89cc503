"""A misspelt path is refused at once, by a line that says what it may have been meant for."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from fresh import run
from PIL import Image

from vggtorch import paths
from vggtorch.cli import main

TYPED = [
    ("finetune phots", "There is no phots. Perhaps photos? Expected a folder with a subfolder"),
    ("finetune labels.cvs", "There is no labels.cvs. Perhaps labels.csv? Expected a folder"),
    ("finetune photos.zip", "photos.zip isn't a folder. It's an archive: unpack it. Expected"),
    ("finetune labels.parquet", "It may be a table of another form: write it as CSV"),
    ("finetune photos validtion", "There is no validtion. Perhaps validation? Expected a folder"),
    ("finetune photos --weights nowhere.pth", "Received --weights nowhere.pth; expected one of"),
    ("finetune photos --weights imagnet", "an existing file. Perhaps imagenet?"),
    ("finetune photos", "run/last.pt exists: the folder holds another run. Pass --resume to carry"),
    ("finetune photos -o labels.csv", "--output-dir labels.csv, which is a file; expected a f"),
    ("lr_find phots", "There is no phots. Perhaps photos?"),
    ("lr_find photos --picture a.png", "Received --picture a.png; expected a name that ends in"),
    ("show_batch phots", "There is no phots. Perhaps photos?"),
    ("show_batch photos --picture no/a.png", "Received --picture no/a.png, and there is no folder"),
    ("inspect vgg61", "hf://owner/name. Or one of vgg11, "),
    ("inspect modle.keras", "There is no modle.keras. Perhaps model.keras? Expected the folder"),
    ("inspect vgg16 --before modle.keras", "There is no modle.keras. Perhaps model.keras?"),
    ("inspect vgg16 --draw a.png", "Received --draw a.png; expected a name that ends in .svg."),
    ("bench ann/cats", "On the Hugging Face hub it would be hf://ann/cats."),
    ("bench https://huggingface.co/ann/cats", "expected hf://ann/cats, as Keras writes it."),
    ("export vgg16 a.txt", "Received 'a.txt'; expected a name that ends in .onnx or .pt2."),
    ("export vgg16 photos/x/a.onnx", "Received 'photos/x/a.onnx', and there is no folder"),
    ("export vgg16 a.onnx --weights b.pth", "Received --weights b.pth; expected one of imagenet"),
    ("predict", "Missing argument"),
    ("predict rnu photos", "There is no rnu. Perhaps run? Expected the folder of a run"),
    ("predict run", "Received the model run and no images. Expected files, folders or patterns"),
    ("predict run photos/a/no.png", "There is no file photos/a/no.png."),
    ("predict run 'photos/*.gif'", "No file matches photos/*.gif."),
    ("predict run photos -o a.xlsx", "Received --out a.xlsx; expected a name that ends in .csv or"),
    ("predict run photos -o photos", "Received --out photos; expected a name"),
    ("predict photos --model rnu", "There is no rnu. Perhaps run?"),
    ("evaluate rnu photos", "There is no rnu. Perhaps run?"),
    ("evaluate run phots/test", "There is no phots/test. Expected a folder with a subfolder"),
    ("evaluate run photos -o no/a.html", "Received --out no/a.html, and there is no folder"),
    ("features run phots", "There is no file phots. Perhaps photos?"),
    ("compress run phots --times 2 --out a.keras", "There is no file phots. Perhaps photos?"),
    ("compress run photos --times 2 --out a.h5", "--out a.h5; expected a name that ends in .keras"),
    ("convert modle.keras a.pth", "Received 'modle.keras'; expected one of imagenet, features,"),
    ("convert gone/model.keras a.pth", "features, oxford or the path of an existing file.\n"),
    ("convert model.keras a.txt", "Received 'a.txt'; expected a name that ends in .safetensors"),
    ("push rnu ann/cats", "There is no folder rnu. Perhaps run? Expected that of a run that has"),
    ("predict photos run", "Received the model run among the images, in place 2. Expected one"),
    ("predict --model run photos run", "Received the model run among the images, in place 2."),
    ("predict run photos --weights oxford", "--weights oxford with the model run, which says that"),
    ("predict run photos --architecture vgg16", "--architecture vgg16 with the model run, which"),
    ("predict vgg11 photos --architecture vgg16", "--architecture vgg16 with the model vgg11"),
    ("features run photos --weights oxford", "--weights oxford with the model run, which says"),
    ("features run photos --image-size 64", "--image-size 64 with the model run, which says"),
    ("compress vgg11 photos --times 2 --out a.keras --image-size 64", "Add --no-top, or leave"),
    ("export run a.onnx --weights oxford", "--weights oxford with the model run, which says that"),
    ("compress run photos --times 2 --out a.keras --no-top", "--no-top with the model run, which"),
    ("finetune ''", "Received an empty name; expected a path. This folder's is '.'."),
    ("finetune photos ''", "Received an empty name; expected a path."),
    ("finetune photos --weights https://a.b/c.pth", "An address isn't fetched: download the file"),
    ("finetune photos --weights ''", "Received --weights ''; expected a path."),
    ("show_batch photos --picture ''", "Received --picture ''; expected a path."),
    ("predict '' photos", "Received an empty name; expected a path."),
    ("predict run ''", "Received an empty name; expected a path."),
    ("predict run photos -o ''", "Received --out ''; expected a path."),
    ("evaluate run ''", "Received an empty name; expected a path."),
    ("evaluate run photos -o ''", "Received --out ''; expected a path."),
    ("inspect vgg16 --before ''", "Received an empty name; expected a path."),
    ("inspect vgg16 --draw ''", "Received --draw ''; expected a path."),
    ("compress run '' --times 2 --out a.keras", "Received an empty name; expected a path."),
    ("convert '' a.pth", "Received an empty name; expected a path."),
    ("demo --page no/a.html", "Received --page no/a.html, and there is no folder"),
]  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with photographs, a table, and a run."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos/a", "photos/b", "validation/a", "run"):
        os.makedirs(name)
    for name in ("labels.csv", "photos.zip", "labels.parquet", "model.keras", "run/last.pt"):
        (tmp_path / name).write_text("")
    Image.new("RGB", (4, 4)).save("photos/a/1.png")
    return tmp_path


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("command", "message"), TYPED)
def test_what_is_not_there_is_refused_in_the_words_of_the_command_line(command, message, capsys):
    assert main(shlex.split(command)) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    for python in ("TrainConfig", "vt.", "=", "True"):
        assert python not in error


@pytest.mark.slow
def test_it_is_refused_before_anything_heavy_is_imported(place):
    commands = [shlex.split(command) for command, _ in TYPED]
    result = run(
        f"""
        import sys
        sys.path.insert(0, {os.path.dirname(os.path.dirname(paths.__file__))!r})
        from vggtorch.cli import main
        for command in {commands}:
            assert main(command), command
            assert not {{"keras", "torch", "PIL", "numpy"}} & set(sys.modules), command
        """,
        cwd=place,
    )
    assert result.returncode == 0, result.stderr


def test_a_path_that_is_much_like_another_is_named(place):
    (place / "photos" / ".hidden").mkdir()
    assert paths.near("phtos/a/1.png") == " Perhaps photos/a/1.png?"
    assert paths.near(place / "photos" / "a" / "2.png") == f" Perhaps {place}/photos/a/1.png?"
    for name in ("entirely else", "phtos/c", "photos/hidden", "", "/"):
        assert paths.near(name) == ""
    (place / "here.svg").symlink_to("run/there.svg")
    paths.check_out("here.svg", (".svg",))
    (place / "gone.svg").symlink_to("gone/there.svg")
    with pytest.raises(ValueError, match="out='gone.svg', and there is no folder .*gone"):
        paths.check_out("gone.svg", (".svg",))


def test_a_folder_that_nothing_can_be_written_to_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(paths.os, "access", lambda *_: False)
    with pytest.raises(OSError, match=f"nothing can be written into {tmp_path}"):
        paths.check_out(tmp_path / "a.svg", (".svg",))


def test_the_home_folder_is_pointed_at(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match=f"There is no ~/photos. Perhaps {tmp_path / 'photos'}?"):
        paths.check_data(Path("~/photos"))
