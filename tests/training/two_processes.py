"""Train on this process's part of each batch and write the losses: started by torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tiny  # isort: skip  (before keras: it selects Keras's torch backend)
import keras
from accelerate import PartialState

from vggtorch.training.config import TrainConfig
from vggtorch.training.loop import finetune

if __name__ == "__main__":
    folder, images = map(Path, sys.argv[1:])
    mixing: dict[str, Any] = {"mixup": 0.4, "cutmix": 1.0, "class_weight": (1.0, 2.0, 0.5)}
    config = TrainConfig(
        epochs=3, batch_size=17, seed=3,  # of 18 images, so that a process gets none of the last
        freeze="block1_pool", unfreeze=((1, "block1_conv1"),), image_size=16, augment="crop",
        cache_copies=2, cache="cached" in folder.name, output_dir=str(folder),
        **(mixing if "mixed" in folder.name else {}),
    )  # fmt: skip
    network = tiny.network(3, dropout=0.0, batch_norm=True)
    network.get_layer("block2_conv1").kernel.regularizer = keras.regularizers.L2(0.1)
    history = finetune(network, images, config=config)
    if PartialState().is_main_process:
        result = {"processes": PartialState().num_processes, "epochs": history.epochs}
        (folder / "history.json").write_text(json.dumps(result))
    PartialState().destroy_process_group()
