"""A warning names the line of the user that asked for what is done, from wherever it comes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras

from vggtorch.models import remember_
from vggtorch.telling import tell
from vggtorch.training import data
from vggtorch.weight_sets import DataConfig


@pytest.mark.parametrize("call", ["read_folder", "show_batch"])
def test_a_warning_names_the_users_line(tmp_path, call):
    folder = tiny.pictures(tmp_path / "data", each=2)
    (folder / "red" / "notes.txt").write_text("")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        if call == "read_folder":
            data.read_folder(folder, 16)
        else:
            vt.show_batch(tiny.network(), folder, augment="flip")
    (warning,) = caught
    assert "Left out of" in str(warning.message)
    assert Path(warning.filename) == Path(__file__)


def parted(_: Path) -> None:
    vt.to_torch(tiny.network()).double()


def set_differently(_: Path) -> None:
    model = tiny.network()
    network = vt.to_torch(model)
    model.get_layer("block1_conv1").activation = keras.activations.tanh
    network(torch.rand(1, 16, 16, 3))


def read_in_part(folder: Path) -> None:
    pages = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pages[0].save(folder / "a.tif", save_all=True, append_images=pages[1:])
    vt.preprocess([folder / "a.tif"], "oxford", size=8)


def written_in_an_older_form(folder: Path) -> None:
    vgg = vt.VGG11(weights=None, include_top=False, input_shape=(32, 32, 3))
    remember_(vgg, DataConfig("imagenet"))
    vgg.save(folder / "m.h5")


@pytest.mark.parametrize("ask", [parted, set_differently, read_in_part, written_in_an_older_form])
def test_so_does_each_that_another_file_says(ask, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ask(tmp_path)
    assert [Path(w.filename) for w in caught if w.category is UserWarning] == [Path(__file__)]


def test_a_package_whose_name_begins_as_ours_is_the_users():
    names = {"__name__": "vggtorch_of_mine.script", "tell": tell}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile("tell('so')", "script.py", "exec"), names)
    assert caught[0].filename == "script.py"
