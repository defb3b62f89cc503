"""What people read of a run: one HTML page, and the drawing of a search for the learning rate.

The page holds its pictures and drawings itself, so that it can be sent and kept as one file.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vggtorch import files
from vggtorch.text import LONGEST_MESSAGE, as_command, in_html, visible, without_folders
from vggtorch.training.checkpoints import version_text
from vggtorch.training.config import TrainConfig
from vggtorch.training.data import Folder
from vggtorch.training.evaluation import Evaluation, activation_map
from vggtorch.training.loop import History
from vggtorch.training.rate_search import RateSearch


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
    _write(path, _plot(lines, title, 640, mark=float(np.log10(search.suggestion))))


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
        f'<text x="{left}" y="16" font-size="13">{in_html(title)}</text>'
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
            f"{in_html(name)}</text>"
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


def write_report(
    history: History,
    path: str | Path,
    command: str | None = None,
    mistakes: int = 12,
) -> None:
    """Write one HTML file: curves, confusion matrix, figures by class, the worst mistakes.

    >>> import tempfile, keras, torch, vggtorch as vt
    >>> model = keras.Sequential(
    ...     [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3)]
    ... )
    >>> data = torch.utils.data.TensorDataset(torch.rand(3, 8, 8, 3), torch.arange(3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     config = vt.TrainConfig(epochs=1, output_dir=folder)
    ...     history = vt.finetune(model, data, data, config)
    ...     vt.write_report(history, f"{folder}/report.html")

    Args:
        history: what `finetune` returned.
        path: the file.
        command: what made it; by default this process's command line.
        mistakes: how many pictures of images that the model got wrong.

    Raises:
        OSError: the file couldn't be written.
    """
    command = command or as_command(sys.argv)
    keys = [("loss", "val_loss"), ("accuracy", "val_accuracy"), ("learning_rate",)]
    drawings = [
        curves_svg(
            {key: [e[key] for e in history.epochs] for key in some if key in history.epochs[0]},
            some[0].replace("_", " ") + " by epoch",
        )
        for some in keys
    ]
    sections = [f"<h2>Curves</h2><p>{''.join(drawings)}</p>"]
    if history.evaluation is not None:
        sections.append(_summary(history, history.evaluation))
        sections.append(_mistakes(history, history.evaluation, mistakes))
    settings = "".join(
        f"<tr><th>{f.name}</th><td>"
        f"{in_html(without_folders(getattr(history.config, f.name)))}</td></tr>"
        for f in dataclasses.fields(TrainConfig)
    )
    made_by = html.escape(visible(command, LONGEST_MESSAGE))
    title = f"{in_html(history.model.name)}, {len(history.epochs)} epochs"
    _write(
        path,
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>{STYLE}"
        f"<h1>{title}</h1><p>Made by <code>{made_by}</code> with "
        f"{version_text()}. Best epoch: {history.best_epoch + 1}.</p>"
        f"{''.join(sections)}<h2>Settings</h2><table>{settings}</table></html>",
    )


def _write(path: str | Path, text: str) -> None:
    with files.atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


STYLE = (
    "<style>body{font:15px sans-serif;max-width:1300px;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .6em;text-align:right;font-weight:normal}"
    "th{color:#555}figure{display:inline-block;margin:.5em}code{background:#eee}</style>"
)


def _summary(history: History, evaluation: Evaluation) -> str:
    rows = "".join(
        f"<tr><th>{in_html(c.name)}</th><td>{c.images}</td><td>{c.precision:.3f}</td>"
        f"<td>{c.recall:.3f}</td><td>{c.f1:.3f}</td></tr>"
        for c in evaluation.per_class(history.classes)
    )
    names = [in_html(name) for name in history.classes]
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
        name = f"image {index}"
        if isinstance(source, Folder):
            name = "/".join(source.paths[index].parts[-2:])
        try:
            mapped = _picture(image, activation_map(history.model, image, predicted))
        except ValueError:  # a network without feature maps
            mapped = ""
        figures.append(
            f"<figure>{_picture(image)} {mapped}<figcaption>{in_html(true)} taken for "
            f"{in_html(history.classes[predicted])} ({certainty:.0%})<br>"
            f"<small>{in_html(name)}</small></figcaption></figure>"
        )
    return (
        "<h2>Worst mistakes, and in red what spoke for them</h2>" + "".join(figures)
        if figures
        else "<h2>No mistakes</h2>"
    )
