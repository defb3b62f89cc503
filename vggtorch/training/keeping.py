"""The trained model to keep, which takes raw images, and its card."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import keras

from vggtorch import files, surgery
from vggtorch.models import (
    PREPROCESSING_SUFFIX,
    as_layers,
    data_config,
    recipe,
    remember_,
    remembered,
)
from vggtorch.text import as_code, as_command, in_markdown
from vggtorch.training.checkpoints import version_text
from vggtorch.training.data import DEFAULT_SIZE
from vggtorch.training.loop import History


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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = with_preprocessing(history.model)
    with files.atomic(folder / "model.keras") as temporary:
        model.save(temporary)
    with files.atomic(folder / "classes.json") as temporary:
        temporary.write_text(f"{json.dumps(history.classes, indent=1)}\n", encoding="utf-8")
    with files.atomic(folder / "config.json") as temporary:
        described = json.dumps(_configuration(model, history), indent=2)
        temporary.write_text(f"{described}\n", encoding="utf-8")
    with files.atomic(folder / "README.md") as temporary:
        card = _card(history, model, command or as_command(sys.argv))
        temporary.write_text(card, encoding="utf-8")
    return model


def with_preprocessing(model: keras.Model) -> keras.Model:
    """A new model that takes RGB of 0 to 255 and preprocesses it itself; it remembers the rest."""
    config = data_config(model)
    if config.arithmetic is None:
        plain = surgery.truncate(model, model.layers[-1].name)
        inside = remembered(plain) if config.weight_set else config
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


def _card(history: History, model: keras.Model, command: str) -> str:
    config, best = history.config, history.epochs[history.best_epoch]
    figures = "\n".join(f"| {name} | {value:.4g} |" for name, value in best.items())
    images = data_config(model)
    size = images.size or (DEFAULT_SIZE, DEFAULT_SIZE)
    steps = "".join(f"    {line}\n" if line else "\n" for line in recipe(images, size).split("\n"))
    return f"""# {in_markdown(history.model.name)}, fine-tuned on {len(history.classes)} classes

A Keras model. Input: RGB images of 0 to 255 (not of 0 to 1), {tuple(model.inputs[0].shape)}: the
arithmetic of the weight set is inside. Output: one value for each name in `classes.json`. Images
were brought to {size[0]}x{size[1]} so, with crop mode {images.crop_mode}, and must be again:

{steps}
    import keras

    model = keras.saving.load_model("model.keras")
    probabilities = model.predict(np.stack([prepared("image.jpg")]))

`vggtorch predict` does the same. `config.json` has all of it by timm's names, and so have the
metadata (`data_config`) of a model that is exported to ONNX.

- Classes: {", ".join(map(in_markdown, history.classes))}
- Pretrained weights: {images.weight_set or "not known"}
- Cut at {in_markdown(config.cut or "the end")}, head {config.head or "its own"}, frozen up to
  {in_markdown(config.freeze)}
- Training: {len(history.epochs)} epochs of batches of {config.batch_size}, {config.optimizer},
  learning rate {config.learning_rate:g}, augmentation {config.augment}, seed {config.seed}
- Made by {as_code(command)} with {version_text()}

Epoch {history.best_epoch + 1}, whose weights these are:

| figure | value |
|---|---|
{figures}

Measured on images like the training images; on others expect less, and measure.
"""
