"""The model's card: what one has to know to use it, with front matter for the Hugging Face hub."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras

from vggtorch.models import data_config, recipe
from vggtorch.text import as_code, figure_text, in_markdown, visible
from vggtorch.training.checkpoints import version_text
from vggtorch.training.data import DEFAULT_SIZE, Folder
from vggtorch.training.evaluation import Evaluation
from vggtorch.training.heads import ends_in_logits
from vggtorch.training.history import History
from vggtorch.training.optimization import name_of
from vggtorch.training.tables import SPLITS
from vggtorch.weights import PUBLISHED, publications

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

LICENSES = {  # of pretrained weights, by the hub's names
    "BSD-3-Clause": "bsd-3-clause",
    "MIT": "mit",
    "CC BY 4.0 (VGG, Oxford)": "cc-by-4.0",
}
METRICS = {  # the hub's names for figures; the others go by their own
    "top-5 accuracy": "accuracy",
    "macro F1": "f1",
    "AUROC": "roc_auc",
    "calibration error": "expected_calibration_error",
}
LOADING = """    import os

    os.environ.setdefault("KERAS_BACKEND", "torch")  # before Keras, which asks for another
    import keras

    model = keras.saving.load_model("model.keras")
"""


def check_history(history: object) -> None:
    """See that it is what `finetune` returns, and no model, say."""
    if not isinstance(history, History):
        raise ValueError(
            f"Received a {type(history).__name__}; expected the History that finetune returns. (A "
            f"model alone is kept by model.save.)"
        )


def evaluations(history: History) -> Iterator[tuple[str, Any, Evaluation]]:
    """The name of each split that was scored, its images, and what came out."""
    for name, images, found in (
        ("test", history.test, history.test_evaluation),
        ("validation", history.validation, history.evaluation),
    ):
        if found is not None:
            yield name, images, found


def card_of(history: History, model: keras.Model, command: str) -> str:
    """The card of the model that is kept, as Markdown with what the hub reads as YAML at its head.

    `command`, which made it, is without folders of this machine.
    """
    from huggingface_hub import ModelCardData

    images = data_config(model)
    data = ModelCardData(
        license=license_of(images.weight_set),
        library_name="keras",
        pipeline_tag="image-classification",
        tags=["vggtorch", "vgg", "image-classification", "transfer-learning"],
        base_model=base_of(images.weight_set, history.model.name),
        metrics=["accuracy"],
        model_name=visible(history.model.name),
        eval_results=list(_results(history)) or None,
    )
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n{_text(history, model, command)}"


def license_of(weight_set: str | None) -> str | None:
    """The licence of pretrained weights by the hub's name; None where it isn't known."""
    rows = [row.licence for row in PUBLISHED.values() if row.weight_set == weight_set]
    return LICENSES[rows[0]] if rows else None


def base_of(weight_set: str | None, architecture: str) -> str | None:
    """The repository on the hub that has the pretrained weights; None where none has them."""
    rows = publications(weight_set, architecture) if weight_set else []
    return next((row.address.rpartition("/")[0] for row in rows if row.place == "hub"), None)


def _results(history: History) -> Iterator[EvalResult]:
    from huggingface_hub import EvalResult

    for split, images, found in evaluations(history):
        name = _name_of(images.root) if isinstance(images, Folder) else "own images"
        for figure, value in found.figures().items():
            if math.isfinite(value):
                yield EvalResult(
                    task_type="image-classification",
                    dataset_type="imagefolder",
                    dataset_name=visible(name),
                    dataset_split=split,
                    metric_type=METRICS.get(figure, figure),
                    metric_name=figure,
                    metric_value=round(value, 6),
                )


def _name_of(root: Path) -> str:
    """What a set of images is called: a folder's name, or where that is a split's, its parent's."""
    root = root.resolve()
    return root.parent.name if root.name.lower() in SPLITS else root.name


def _scaled(history: History) -> str:
    """What was done to the weights after the epoch."""
    if not history.config.temperature_scaling:
        return ""
    return (
        f", before a temperature of {history.temperature:.3f}, fitted on the validation images, "
        f"went into the last layer"
    )


def _text(history: History, model: keras.Model, command: str) -> str:
    config, best = history.config, history.epochs[history.kept_epoch]
    curves = "\n".join(f"| {name} | {value:.4g} |" for name, value in best.items())
    scored = list(evaluations(history))
    head = "".join(f" {len(found.labels)} {split} images |" for split, _, found in scored)
    columns = [found.figures() for _, _, found in scored]
    rows = "\n".join(
        f"| {name} |" + "".join(f" {figure_text(column[name])} |" for column in columns)
        for name in (columns[0] if columns else {})
    )
    results = f"\n| figure |{head}\n|---|{'---|' * len(scored)}\n{rows}\n" if scored else ""
    images = data_config(model)
    size = images.size or (DEFAULT_SIZE, DEFAULT_SIZE)
    answer = 'model.predict(np.stack([prepared("image.jpg")]))'
    value = "probability"
    if ends_in_logits(model):
        answer, value = f"keras.ops.softmax({answer})", "logit"
    steps = "".join(f"    {line}\n" if line else "\n" for line in recipe(images, size).split("\n"))
    return f"""# {in_markdown(history.model.name)}, fine-tuned on {len(history.classes)} classes
{results}
A Keras model. Input: RGB images of 0 to 255 (not of 0 to 1), {tuple(model.inputs[0].shape)}: the
arithmetic of the weight set is inside. Output: one {value} for each name in `classes.json`. Images
were brought to {size[0]}x{size[1]} so, with crop mode {images.crop_mode}, and must be again:

{steps}
{LOADING}    probabilities = {answer}

`vggtorch predict` does the same. `config.json` has all of it by timm's names, and so have the
metadata (`data_config`) of a model that is exported to ONNX.

- Classes: {", ".join(map(in_markdown, history.classes))}
- Pretrained weights: {images.weight_set or "not known"}
- Cut at {in_markdown(config.cut or "the end")}, head {config.head or "its own"},
  {f"frozen up to {in_markdown(config.freeze)}" if config.freeze else "nothing frozen by the run"}
- Training: {len(history.epochs)} {"epoch" if len(history.epochs) == 1 else "epochs"} of batches of
  {config.batch_size},
  {in_markdown(name_of(config.optimizer))}, learning rate {config.learning_rate:g},
  augmentation {config.augment}, seed {config.seed}
- Made by {as_code(command)} with {version_text()}

Epoch {history.kept_epoch + 1}, whose weights these are, as it trained in
{config.precision}{_scaled(history)}:

| figure | value |
|---|---|
{curves}

Measured on images like the training images; on others expect less, and measure.
"""
