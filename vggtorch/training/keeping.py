"""The trained model to keep, which takes raw images, with its card."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import keras

from vggtorch import files, surgery
from vggtorch.models import PREPROCESSING_SUFFIX, as_layers, data_config, remember_, remembered
from vggtorch.paths import as_path
from vggtorch.text import as_command
from vggtorch.training.card import card_of, check_history
from vggtorch.training.checkpoints import version_text
from vggtorch.training.history import History


def save_trained(history: History, folder: str | Path, command: str | None = None) -> keras.Model:
    """Write `model.keras`, its classes, `config.json` and `README.md`, the card, into a folder.

    The model takes RGB images of 0 to 255, (N, H, W, 3); plain Keras loads it without vggtorch.

    >>> import tempfile, keras, torch, vggtorch as vt
    >>> model = keras.Sequential(
    ...     [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3)]
    ... )
    >>> data = torch.utils.data.TensorDataset(torch.rand(3, 8, 8, 3), torch.arange(3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     history = vt.finetune(model, data, config=vt.TrainConfig(epochs=1, output_dir=folder))
    ...     kept = vt.save_trained(history, folder)
    ...     keras.saving.load_model(f"{folder}/model.keras").output_shape
    (None, 3)

    Args:
        history: what `finetune` returned.
        folder: where the files go.
        command: what made the model; by default this process's command line.

    Returns:
        That model.
    """
    check_history(history)
    folder = as_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = with_preprocessing(history.model)
    with files.atomic(folder / "model.keras") as temporary:
        model.save(temporary)
    texts = {
        "classes.json": f"{json.dumps(history.classes, indent=1)}\n",
        "config.json": f"{json.dumps(_configuration(model, history), indent=2)}\n",
        "README.md": card_of(history, model, command or as_command(sys.argv)),
    }
    for name, text in texts.items():
        files.write_text(folder / name, text)
    return model


def with_preprocessing(model: keras.Model) -> keras.Model:
    """A new model that takes RGB of 0 to 255 and preprocesses it itself; it remembers the rest."""
    config, known = data_config(model), remembered(model)
    if isinstance(model, keras.Sequential):  # whose first layer is none of inputs
        model = remember_(surgery.truncate(model, model.layers[-1].name), known)
    if config.arithmetic is None:
        plain = surgery.truncate(model, model.layers[-1].name)
        inside = known if config.weight_set else config
        return remember_(plain, dataclasses.replace(inside, preprocessing_inside=True))
    name = config.arithmetic.name
    image = keras.Input(model.inputs[0].shape[1:], name="image")
    # One layer whose name tells vggtorch.preprocess that only the geometry is left to do.
    layer = keras.Model(image, as_layers(image, name), name=f"{name}{PREPROCESSING_SUFFIX}")
    return surgery.insert(model, model.layers[0].name, [layer])


def _configuration(model: keras.Model, history: History) -> dict[str, Any]:
    """What `config.json` holds, by the names of timm's on the Hugging Face hub."""
    return {
        "architecture": model.name,
        "num_classes": len(history.classes),
        "label_names": list(history.classes),
        "pretrained_cfg": data_config(model).as_dict(),
        "made_by": version_text(),
    }
