"""Kill a training run at random moments, resume it, and compare its weights with an unharmed one's.

It forks, so it doesn't run on Windows.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import tiny
import torch
from fresh import fork

from vggtorch.training.config import TrainConfig
from vggtorch.training.loop import finetune


def train(folder: Path, data: Path) -> None:
    config = TrainConfig(
        head="mlp", freeze="block2_pool", unfreeze=((2, "block2_conv1"),), epochs=4, batch_size=6,
        augment="crop", cache_copies=2, ema_decay=0.9, layer_decay=0.5, max_grad_norm=1.0,
        image_size=16, checkpoint_steps=1, resume=True, output_dir=str(folder),
    )  # fmt: skip
    finetune(tiny.network(None, batch_norm=True), data, config=config)


def in_child(folder: Path, data: Path, kill_after: float | None) -> tuple[bool, float]:
    """Whether the run ended by itself, and after how many seconds."""
    began = time.perf_counter()
    child = fork(train, folder, data)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if status not in (0, signal.SIGKILL):
        raise AssertionError(f"the run failed with status {status}")
    return status == 0, time.perf_counter() - began


def state(folder: Path) -> list[torch.Tensor]:
    found = []
    for name in ("last.pt", "best.pt"):
        content = torch.load(folder / name, weights_only=True)
        found += content["variables"] + list(content["average"].values())
        for values in content["optimizer"]["state"].values():
            found += list(values.values())
    return found


def kill(place: Path, count: int) -> None:
    """Kill runs so often, and see that they end with the weights of one that was left alone."""
    data = tiny.pictures(place / "data")
    _, seconds = in_child(place / "alone", data, None)
    expected = state(place / "alone")

    rng = random.Random(0)
    kills = runs = at_work = 0
    while kills < count:
        folder = place / f"killed{runs}"
        finished = False
        while not finished:
            wait = rng.uniform(0, seconds) if kills < count else None
            finished, _ = in_child(folder, data, wait)
            kills += not finished
            at_work += not finished and (folder / "last.pt").exists()
        found = state(folder)
        if len(found) != len(expected) or not all(map(torch.equal, found, expected)):
            raise AssertionError(f"run {runs}, killed and resumed, ended with other weights")
        shutil.rmtree(folder)
        runs += 1
    print(f"{kills} kills ({at_work} after a first checkpoint) in {runs} runs: same weights")
