"""A run that was interrupted ends with what it would have ended with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small import images, vgg

import vggtorch as vt
from vggtorch.compression import joint, resuming, work
from vggtorch.surgery import descent

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


class KilledError(Exception):
    pass


def killed_at(where, patch):
    """Let the next run end as soon as this is written down."""
    write = work.Notebook.__setitem__

    def killed(self, name, value):
        write(self, name, value)
        if name == where:
            raise KilledError

    patch.setattr(work.Notebook, "__setitem__", killed)


@pytest.fixture(scope="module")
def whole(one_thread):
    """What a run that nothing interrupts ends with."""
    return vt.compress(vgg(), 2, images(), steps=41)[0]


@pytest.mark.parametrize("where", ["options", "choice", "factors", "state"])
def test_a_run_killed_at_any_step_goes_on_there(where, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        killed_at(where, m)
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


def test_the_time_of_a_resumed_training_is_that_of_the_whole_run(tmp_path, monkeypatch):
    clock, distance = [0.0], joint.distance

    def second_by_second(*maps):
        clock[0] += 1
        return distance(*maps)

    monkeypatch.setattr(joint, "distance", second_by_second)
    for module in (descent, resuming):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    settings: Any = {"steps": 1000, "seconds": 50.0}  # the time alone decides
    whole, found = vt.compress(vgg(), 2, images(), **settings)
    with monkeypatch.context() as m:
        killed_at("state", m)
        with pytest.raises(KilledError):
            vt.compress(vgg(), 2, images(), folder=tmp_path, **settings)
    clock[0] += 1000  # between one run and the next
    resumed, again = vt.compress(vgg(), 2, images(), folder=tmp_path, **settings)
    assert 20 < found.steps == again.steps < 50
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_resumed_run_has_the_layers_that_were_measured_before(tmp_path, monkeypatch):
    def seconds(module, shape, device):
        return 1e-6 * sum(p.numel() for p in module.parameters())

    monkeypatch.setattr(work, "seconds_of", seconds)
    monkeypatch.setattr(work, "ratio_of", lambda *_: 2.1)
    settings: Any = {"by": "seconds", "steps": 0}
    whole, _ = vt.compress(vgg(), 2, images(), **settings)
    with monkeypatch.context() as m:
        killed_at("factors", m)
        with pytest.raises(KilledError):
            vt.compress(vgg(), 2, images(), folder=tmp_path, **settings)
    monkeypatch.setattr(work, "ratio_of", lambda *_: 1.2)  # a busier machine
    resumed, _ = vt.compress(vgg(), 2, images(), folder=tmp_path, **settings)
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
