"""A warning names the line of the user that asked for what is done, from wherever it comes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import tiny

import vggtorch as vt
from vggtorch.training import data, telling


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


def test_a_folder_whose_name_begins_as_the_packages_is_the_users():
    beside = f"{Path(telling.PACKAGE)}-of-mine/script.py"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(compile("tell('so')", beside, "exec"), {"tell": telling.tell})
    assert caught[0].filename == beside
