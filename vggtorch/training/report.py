"""What people keep of a run: one HTML page, the trained model that takes raw images, a model card.

The page holds its pictures and drawings itself, so that it can be sent and kept as one file.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import torch
from PIL import Image

from vggtorch import surgery
from vggtorch.models import preprocessing
from vggtorch.models.preprocessing import as_layers, remember_, weight_set
from vggtorch.training.checkpoints import versions
from vggtorch.training.config import TrainConfig
from vggtorch.training.data import Folder, Items, as_input, batches, in_order
from vggtorch.training.features import part
from vggtorch.training.loop import History, RateSearch, logits

# 1. Figures


@dataclass(frozen=True)
class ClassFigures:
    """How a class fared: `recall` of its images found, `precision` of what was called so."""

    name: str
    images: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Evaluation:
    """A model on labelled images.

    Attributes:
        probabilities: (N, classes).
        labels: (N,).
        confusion: (classes, classes), rows true, columns predicted.
    """

    probabilities: np.ndarray
    labels: np.ndarray
    confusion: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of the images that were right."""
        return float(np.trace(self.confusion) / self.confusion.sum())

    def per_class(self, classes: Sequence[str]) -> list[ClassFigures]:
        """Figures for each class; 0 where a class was never predicted or has no images."""
        right = np.diag(self.confusion)
        true, called = self.confusion.sum(1), self.confusion.sum(0)
        precision = right / np.maximum(called, 1)
        recall = right / np.maximum(true, 1)
        f1 = 2 * right / np.maximum(true + called, 1)
        return [
            ClassFigures(name, int(n), float(p), float(r), float(f))
            for name, n, p, r, f in zip(classes, true, precision, recall, f1, strict=True)
        ]

    def worst_mistakes(self, count: int) -> list[int]:
        """Indices of wrong images, those first that the model was surest of."""
        predicted = self.probabilities.argmax(1)
        wrong = np.flatnonzero(predicted != self.labels)
        certainty = self.probabilities[wrong, predicted[wrong]]
        return wrong[np.argsort(-certainty, kind="stable")][:count].tolist()


def evaluate(
    model: keras.Model, source: Folder | Items, batch_size: int = 32, workers: int = 0
) -> Evaluation:
    """Run a model that ends in softmax or logits on every image of a source."""
    module = part(model.inputs[0], model.outputs[0]).eval()
    device = model.variables[0].value.device
    outputs, labels = [], []
    with torch.no_grad():
        for x, y in batches(source, in_order(len(source), batch_size), workers):
            outputs.append(module(as_input(x.to(device), weight_set(model))).float().cpu())
            labels.append(y)
    scores, truth = torch.cat(outputs), torch.cat(labels)
    if bool((scores < 0).any()) or not torch.allclose(
        scores.sum(1), torch.ones(len(scores)), atol=1e-3
    ):
        scores = scores.softmax(1)  # logits
    classes = scores.shape[1]
    pairs = torch.bincount(truth * classes + scores.argmax(1), minlength=classes**2)
    return Evaluation(scores.numpy(), truth.numpy(), pairs.reshape(classes, classes).numpy())


def activation_map(model: keras.Model, image: torch.Tensor, index: int) -> np.ndarray:
    """Where in an image (H, W, 3) a class's score comes from, as (h, w) of 0 to 1.

    The map is of the last layer that has a height and a width. Source: Selvaraju et al.,
    "Grad-CAM: Visual Explanations from Deep Networks", 2017.

    Raises:
        ValueError: the model has no such layer that all the image passes through.
    """
    maps = _last_maps(model)
    device = model.variables[0].value.device
    x = as_input(image[None].to(device), weight_set(model))
    with torch.no_grad():
        features = part(model.inputs[0], maps).eval()(x)
    features.requires_grad_()
    with logits(model):
        score = part(maps, model.outputs[0]).eval()(features)[0, index]
    (gradient,) = torch.autograd.grad(score, features)
    weights = gradient.mean((1, 2), keepdim=True)
    heat = (weights * features.detach()).sum(-1)[0].clamp_min(0)
    return (heat / heat.max().clamp_min(1e-12)).cpu().numpy()


def _last_maps(model: keras.Model) -> keras.KerasTensor:
    for layer in reversed(model.layers[1:]):
        tensor = layer.output
        if isinstance(tensor, keras.KerasTensor) and len(tensor.shape) == 4:
            try:
                keras.Function(tensor, model.outputs[0])
            except ValueError:  # another path goes around this layer
                continue
            return tensor
    raise ValueError(
        f"{model.name} has no layer with a height and a width that the whole image passes through."
    )


# 2. Drawings


def curves_svg(curves: dict[str, Sequence[float]], title: str, width: int = 420) -> str:
    """A line for each named curve over 1, 2, ...; SVG text."""
    points = {
        name: [(float(i), value) for i, value in enumerate(values, 1)]
        for name, values in curves.items()
    }
    return _plot(points, title, width)


def plot_rates(search: RateSearch, path: str | Path) -> None:
    """Draw loss against the logarithm of the learning rate, with the suggestion, as an SVG file."""
    exponents = np.log10(search.rates)
    title = f"loss by log10(learning rate); suggested {search.suggestion:.2g}"
    lines = {"loss": list(zip(exponents.tolist(), search.losses, strict=True))}
    Path(path).write_text(_plot(lines, title, 640, mark=float(np.log10(search.suggestion))))


COLOURS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3")


def _plot(
    lines: dict[str, list[tuple[float, float]]],
    title: str,
    width: int,
    mark: float | None = None,
) -> str:
    height, left, right, top, bottom = 240, 50, 12, 30, 34
    xs = [x for line in lines.values() for x, _ in line] + ([] if mark is None else [mark])
    ys = [y for line in lines.values() for _, y in line if np.isfinite(y)]
    (x0, x1), (y0, y1) = (min(xs), max(xs)), (min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x0) / ((x1 - x0) or 1) * (width - left - right),
            height - bottom - (y - y0) / ((y1 - y0) or 1) * (height - top - bottom),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{left}" y="16" font-size="13">{html.escape(title)}</text>'
    ]
    for x, anchor in ((x0, "start"), (x1, "end")):
        px, py = place(x, y0)
        parts.append(f'<text x="{px:.1f}" y="{py + 16:.1f}" text-anchor="{anchor}">{x:.3g}</text>')
    for y in np.linspace(y0, y1, 4):
        px, py = place(x0, y)
        parts.append(
            f'<path d="M{px:.1f} {py:.1f}H{width - right}" stroke="#ddd"/>'
            f'<text x="{px - 5:.1f}" y="{py + 4:.1f}" text-anchor="end">{y:.3g}</text>'
        )
    if mark is not None:
        px, _ = place(mark, y0)
        parts.append(
            f'<path d="M{px:.1f} {top}V{height - bottom}" stroke="#888" stroke-dasharray="4"/>'
        )
    for i, (name, line) in enumerate(lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        drawn = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in line if np.isfinite(y))
        parts.append(
            f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<text x="{left + 110 * i}" y="{height - 4}" fill="{colour}">'
            f"{html.escape(name)}</text>"
        )
    return "".join(parts) + "</svg>"


def _picture(image: torch.Tensor, heat: np.ndarray | None = None, size: int = 160) -> str:
    """An image (H, W, 3) as an <img> tag, a map over it in red."""
    pixels = image.float()
    if image.dtype != torch.uint8:  # as the network takes it: stretch to 0 ... 255
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min()).clamp_min(1e-12) * 255
    picture = Image.fromarray(pixels.byte().numpy()).resize((size, size))
    if heat is not None:
        mask = Image.fromarray((heat * 160).astype(np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        picture.paste(Image.new("RGB", (size, size), (255, 0, 0)), mask=mask)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    code = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="{size}" height="{size}" alt="" src="data:image/jpeg;base64,{code}">'


def _versions() -> str:
    return ", ".join(f"{name} {version}" for name, version in versions().items())


# 3. The page


def write_report(
    history: History,
    path: str | Path,
    command: str | None = None,
    mistakes: int = 12,
) -> Evaluation | None:
    """Write one HTML file: curves, confusion matrix, figures by class, the worst mistakes.

    Args:
        history: what `finetune` returned.
        path: the file.
        command: what made it; by default this process's command line.
        mistakes: how many pictures of images that the model got wrong.

    Returns:
        The evaluation on the validation images; None without any.
    """
    command = command or shlex.join(sys.argv)
    keys = [("loss", "val_loss"), ("accuracy", "val_accuracy"), ("learning_rate",)]
    drawings = [
        curves_svg(
            {key: [e[key] for e in history.epochs] for key in some if key in history.epochs[0]},
            some[0].replace("_", " ") + " by epoch",
        )
        for some in keys
    ]
    sections = [f"<h2>Curves</h2><p>{''.join(drawings)}</p>"]
    evaluation = None
    if history.validation is not None:
        evaluation = evaluate(history.model, history.validation, history.config.batch_size)
        sections.append(_summary(history, evaluation))
        sections.append(_mistakes(history, evaluation, mistakes))
    settings = "".join(
        f"<tr><th>{f.name}</th><td>{html.escape(str(getattr(history.config, f.name)))}</td></tr>"
        for f in dataclasses.fields(TrainConfig)
    )
    title = f"{html.escape(history.model.name)}, {len(history.epochs)} epochs"
    Path(path).write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>{STYLE}"
        f"<h1>{title}</h1><p>Made by <code>{html.escape(command)}</code> with "
        f"{_versions()}. Best epoch: {history.best_epoch + 1}.</p>"
        f"{''.join(sections)}<h2>Settings</h2><table>{settings}</table></html>",
        encoding="utf-8",
    )
    return evaluation


STYLE = (
    "<style>body{font:15px sans-serif;max-width:1300px;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .6em;text-align:right;font-weight:normal}"
    "th{color:#555}figure{display:inline-block;margin:.5em}code{background:#eee}</style>"
)


def _summary(history: History, evaluation: Evaluation) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(c.name)}</th><td>{c.images}</td><td>{c.precision:.3f}</td>"
        f"<td>{c.recall:.3f}</td><td>{c.f1:.3f}</td></tr>"
        for c in evaluation.per_class(history.classes)
    )
    names = [html.escape(name) for name in history.classes]
    most = evaluation.confusion.sum(1, keepdims=True).clip(1)
    matrix = "".join(
        f"<tr><th>{name}</th>"
        + "".join(
            f'<td style="background:rgba(31,119,180,{share:.2f})">{count}</td>'
            for count, share in zip(counts, shares, strict=True)
        )
        + "</tr>"
        for name, counts, shares in zip(
            names, evaluation.confusion, evaluation.confusion / most, strict=True
        )
    )
    columns = "".join(f"<th>{name}</th>" for name in names)
    return (
        f"<h2>Validation: {evaluation.accuracy:.1%} of {len(evaluation.labels)} right</h2>"
        f"<table><tr><th>class</th><th>images</th><th>precision</th><th>recall</th><th>F1</th></tr>"
        f"{rows}</table><h2>Confusion (rows: true, columns: predicted)</h2>"
        f"<table><tr><th></th>{columns}</tr>{matrix}</table>"
    )


def _mistakes(history: History, evaluation: Evaluation, count: int) -> str:
    figures = []
    source = history.validation
    assert source is not None
    for index in evaluation.worst_mistakes(count):
        (image,), _ = source[[(index, 0)]]
        predicted = int(evaluation.probabilities[index].argmax())
        true = history.classes[int(evaluation.labels[index])]
        certainty = evaluation.probabilities[index, predicted]
        name = str(source.paths[index]) if isinstance(source, Folder) else f"image {index}"
        try:
            mapped = _picture(image, activation_map(history.model, image, predicted))
        except ValueError:  # a network without feature maps
            mapped = ""
        figures.append(
            f"<figure>{_picture(image)} {mapped}<figcaption>{html.escape(true)} taken for "
            f"{html.escape(history.classes[predicted])} ({certainty:.0%})<br>"
            f"<small>{html.escape(name)}</small></figcaption></figure>"
        )
    return (
        "<h2>Worst mistakes, and in red what spoke for them</h2>" + "".join(figures)
        if figures
        else "<h2>No mistakes</h2>"
    )


# 4. The model to keep


def save_trained(history: History, folder: str | Path, command: str | None = None) -> keras.Model:
    """Write `model.keras`, `classes.txt` and `README.md`, the model card, into a folder.

    The model takes RGB images of 0 to 255, (N, H, W, 3); plain Keras loads it without vggtorch.

    Returns:
        That model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = with_preprocessing(history.model)
    model.save(folder / "model.keras")
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in history.classes))
    (folder / "README.md").write_text(_card(history, command or shlex.join(sys.argv)))
    return model


def with_preprocessing(model: keras.Model) -> keras.Model:
    """A new plain Keras model that takes RGB of 0 to 255 and preprocesses it itself."""
    name = weight_set(model)
    if name is None:
        return surgery.truncate(model, model.layers[-1].name)
    image = keras.Input(model.inputs[0].shape[1:], name="image")
    # One layer whose name tells vggtorch.preprocess that only the geometry is left to do.
    inside = keras.Model(image, as_layers(image, name), name=f"{name}{preprocessing._SUFFIX}")
    return remember_(surgery.insert(model, model.layers[0].name, [inside]), None)


def _card(history: History, command: str) -> str:
    config, best = history.config, history.epochs[history.best_epoch]
    figures = "\n".join(f"| {name} | {value:.4g} |" for name, value in best.items())
    base = weight_set(history.model)
    return f"""# {history.model.name}, fine-tuned on {len(history.classes)} classes

A Keras model. Input: RGB images, 0 to 255, {tuple(history.model.inputs[0].shape)}; preprocessing is
inside. Output: one value for each line of `classes.txt`.

    import keras

    model = keras.saving.load_model("model.keras")
    probabilities = model.predict(images)

- Classes: {", ".join(history.classes)}
- Pretrained weights: {base or "not known"}
- Cut at {config.cut or "the end"}, head {config.head or "its own"}, frozen up to {config.freeze}
- Training: {len(history.epochs)} epochs of batches of {config.batch_size}, {config.optimizer},
  learning rate {config.learning_rate:g}, augmentation {config.augment}, seed {config.seed}
- Made by `{command}` with {_versions()}

Epoch {history.best_epoch + 1}, whose weights these are:

| figure | value |
|---|---|
{figures}

Measured on images like the training images; on others expect less, and measure.
"""
