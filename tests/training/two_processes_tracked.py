"""Train under trackers as one of two processes: stopped in the second epoch, and carried on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tiny  # isort: skip  (before keras: it selects Keras's torch backend)
from accelerate import PartialState
from two_processes import Stopped

from vggtorch.training.config import TrainConfig
from vggtorch.training.loop import finetune
from vggtorch.training.stopping import Terminated


def config_in(folder: Path) -> TrainConfig:
    return TrainConfig(
        epochs=3, batch_size=9, seed=3, image_size=16, output_dir=str(folder / "run")
    )  # fmt: skip


def train_as_one_of_two(folder: Path, images: Path, trackers: tuple[str, ...]) -> None:
    config = replace(config_in(folder), log_with=trackers)
    try:
        finetune(tiny.network(dropout=0.0), images, config=config, callbacks=[Stopped()])
        raise AssertionError("it wasn't stopped")
    except Terminated:
        pass
    for _ in range(2):  # a run that has ended already adds nothing
        finetune(tiny.network(dropout=0.0), images, config=replace(config, resume=True))
    PartialState().destroy_process_group()
