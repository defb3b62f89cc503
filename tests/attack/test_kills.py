"""Processes that are killed at any moment leave nothing that the next one doesn't set right."""

from __future__ import annotations

import os
import random
import signal
import time

import killed
import pytest
import tiny
import torch

import vggtorch as vt
from vggtorch import files
from vggtorch.training import TrainConfig, finetune
from vggtorch.weights import copies, sources

TIMES = float(os.environ.get("VGGTORCH_ATTACK", "1"))
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Threads don't survive a fork."""


def test_kills_in_first_loads(tmp_path):
    """A child that converts a checkpoint for the first time is killed at a random moment."""
    source = tmp_path / "a.pth"
    vt.save_weights(vt.truncate(vt.VGG11(weights=None, include_top=False), "block4_pool"), source)
    expected = sources.read(source).tensors["features.0.bias"]
    rng = random.Random(0)
    kills = 0
    for _ in range(round(10 * TIMES)):
        for copy in (files.home() / "converted").glob("*.safetensors"):
            copy.unlink()
        child = os.fork()
        if child == 0:
            copies.converted(source)
            os._exit(0)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] == signal.SIGKILL
    print(f"{kills} loads killed")
    found = copies.converted(source)
    assert torch.equal(found.tensors["block1_conv1/bias"], expected)
    assert [p.name for p in (files.home() / "converted").iterdir()] in (
        [".lock", found.path.name], [found.path.name, ".lock"], [found.path.name],
    )  # fmt: skip
    assert set(copies.verify().values()) <= {None}


def test_kills_in_training(tmp_path):
    killed.kill(tmp_path, round(3 * TIMES))


def test_two_runs_in_one_folder(tmp_path):
    """The second is refused while the first is at work, and may go on when that is killed."""
    data, run = tiny.pictures(tmp_path / "data", each=4), tmp_path / "run"
    config = TrainConfig(
        epochs=2, batch_size=4, image_size=16, num_workers=1, resume=True, output_dir=str(run)
    )
    child = os.fork()
    if child == 0:
        finetune(tiny.network(), data, config=TrainConfig(**{**vars(config), "epochs": 10_000}))
        os._exit(1)
    while not (run / ".lock").exists():
        time.sleep(0.05)
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    try:
        time.sleep(0.2)
        with pytest.raises(ValueError, match="Another run is at work in"):
            finetune(tiny.network(), data, config=config)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    (run / "last.pt").unlink(missing_ok=True)
    finetune(tiny.network(), data, config=config)  # the dead run's worker may live for seconds
