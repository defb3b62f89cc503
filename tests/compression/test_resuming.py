"""A run that was interrupted ends with what it would have ended with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small import images, vgg

import vggtorch as vt
from vggtorch.compression import work

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("where", ["options", "factors", "state"])
def test_a_run_killed_at_any_step_goes_on_there(where, tmp_path, monkeypatch):
    whole, _ = vt.compress(vgg(), 2, images(), steps=41)
    write = work.Notebook.__setitem__

    def killed(self, name, value):
        write(self, name, value)
        if name == where:
            raise KilledError

    with monkeypatch.context() as m:
        m.setattr(work.Notebook, "__setitem__", killed)
        with pytest.raises(KilledError):
            vt.compress(vgg(), 2, images(), steps=41, folder=tmp_path)
    # What stands behind the step that was reached isn't done again.
    with monkeypatch.context() as m:
        if where == "state":
            m.setattr(work, "look", None)
        resumed, found = vt.compress(vgg(), 2, images(), steps=41, folder=tmp_path)
    assert found.steps == 41
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_folder_with_another_run_is_refused(tmp_path):
    vt.compress(vgg(), 2, images(), steps=0, folder=tmp_path)
    for times, pixels in ((3, images()), (2, images(41))):
        with pytest.raises(ValueError, match="belongs to another run"):
            vt.compress(vgg(), times, pixels, steps=0, folder=tmp_path)
    (tmp_path / "compress.pt").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"compress.pt can't be read"):
        vt.compress(vgg(), 2, images(), steps=0, folder=tmp_path)
    torch.save({"format": 0, "mark": ""}, tmp_path / "compress.pt")
    with pytest.raises(ValueError, match=r"has the format 0, which this version can't read"):
        vt.compress(vgg(), 2, images(), steps=0, folder=tmp_path)
