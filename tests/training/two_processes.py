"""Train on this process's part of each batch and write the losses, alone or as one of two."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny  # isort: skip  (before keras: it selects Keras's torch backend)
import keras
from accelerate import PartialState

from vggtorch.training.callbacks import Callback
from vggtorch.training.config import TrainConfig
from vggtorch.training.loop import finetune
from vggtorch.training.stopping import Terminated


class Stopped(Callback):
    """Sends the last process SIGTERM in the middle of the second epoch."""

    def on_step_end(self, step: int, loss: float) -> None:
        state = PartialState()
        if step == 2 and state.process_index == state.num_processes - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def train(folder: Path, images: Path) -> None:
    """Images mixed and weighted, images from a cache, the same stopped and carried on; losses."""
    mixing: dict[str, Any] = {"mixup": 0.4, "cutmix": 1.0, "class_weight": (1.0, 2.0, 0.5)}
    for name, options in (
        ("mixed", mixing),
        ("cached", {"cache": True}),
        ("stopped", {"cache": True}),
    ):
        config = TrainConfig(
            epochs=3, batch_size=17, seed=3,  # of 18 images: a process gets none of the last
            freeze="block1_pool", unfreeze=((1, "block1_conv1"),), image_size=16, augment="crop",
            cache_copies=2, output_dir=str(folder / name), **{"cache": False} | options,
        )  # fmt: skip
        if name == "stopped":
            try:
                finetune(network(), images, config=config, callbacks=[Stopped()])
            except Terminated:
                config = replace(config, resume=True)
        history = finetune(network(), images, config=config)
        if PartialState().is_main_process:
            result = {"processes": PartialState().num_processes, "epochs": history.epochs}
            (folder / f"{name}.json").write_text(json.dumps(result))


def network() -> keras.Model:
    model = tiny.network(3, dropout=0.0, batch_norm=True)
    model.get_layer("block2_conv1").kernel.regularizer = keras.regularizers.L2(0.1)
    return model


def train_as_one_of_two(folder: Path, images: Path) -> None:
    train(folder, images)
    PartialState().destroy_process_group()
