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
from vggtorch.training.charts import chart, curves_svg
from vggtorch.training.checkpoints import version_text
from vggtorch.training.config import TrainConfig
from vggtorch.training.data import Folder
from vggtorch.training.evaluation import Evaluation, activation_map
from vggtorch.training.loop import History
from vggtorch.training.rate_search import RateSearch


def plot_rates(search: RateSearch, path: str | Path) -> None:
    """Draw loss against the logarithm of the learning rate, with the suggestion, as an SVG file."""
    exponents = np.log10(search.rates)
    title = f"Loss by learning rate; suggested {search.suggestion:.2g}"
    lines = {"loss": list(zip(exponents.tolist(), search.losses, strict=True))}
    mark = float(np.log10(search.suggestion))
    _write(path, chart(lines, title, "log10(learning rate)", mark))


def _picture(pixels: np.ndarray, text: str, size: int = 160) -> str:
    """Pixels (H, W, 3) as an <img> tag."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((size, size)).save(buffer, "JPEG", quality=85)
    code = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img width="{size}" height="{size}" alt="{in_html(text)}" '
        f'src="data:image/jpeg;base64,{code}">'
    )


def _pixels(image: torch.Tensor) -> np.ndarray:
    """An image as it is seen; one that is ready for the network is stretched to 0 ... 255."""
    if image.dtype == torch.uint8:
        return image.numpy()
    image = image.float()
    span = (image.max() - image.min()).clamp_min(1e-12)
    return ((image - image.min()) / span * 255).byte().numpy()


def _heat(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A map over the grey image, from blue over green to red: seen on images of any colour."""
    height, width = pixels.shape[:2]
    mapped = Image.fromarray((heat * 255).astype(np.uint8))
    share = np.asarray(mapped.resize((width, height), Image.Resampling.BICUBIC)) / 255
    grey = pixels.mean(2, keepdims=True).repeat(3, 2)
    colours = np.array(
        [[40, 60, 160], [30, 160, 160], [120, 200, 60], [250, 200, 40], [220, 40, 30]]
    )
    stops = np.linspace(0, 1, len(colours))
    painted = np.stack([np.interp(share, stops, colours[:, i]) for i in range(3)], -1)
    return (0.45 * grey + 0.55 * painted).clip(0, 255).astype(np.uint8)


def write_report(
    history: History,
    path: str | Path,
    command: str | None = None,
    mistakes: int = 12,
) -> None:
    """Write one HTML file: headline, curves, figures by class, confusion, the worst mistakes.

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
    made_by = html.escape(visible(command, LONGEST_MESSAGE))
    title = f"{in_html(history.model.name)}, {len(history.classes)} classes"
    sections = [_headline(history), _curves(history)]
    if history.evaluation is not None:
        sections.append(_summary(history.classes, history.evaluation, "Validation"))
        sections.append(_mistakes(history, history.evaluation, mistakes))
    if history.test_evaluation is not None:
        sections.append(_summary(history.classes, history.test_evaluation, "Test"))
    _write(
        path,
        f"<!doctype html><html lang=en><meta charset=utf-8>"
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title>{STYLE}<main><h1>{title}</h1>{''.join(sections)}"
        f"{_settings(history)}<footer>Made by <code>{made_by}</code> with {version_text()}."
        f"</footer></main></html>",
    )


def _headline(history: History) -> str:
    """The figures that one looks for first."""
    cards = []
    for name, found in (("test", history.test_evaluation), ("validation", history.evaluation)):
        if found is not None:
            right = round(found.accuracy * len(found.labels))
            cards.append((f"{found.accuracy:.1%}", f"of {len(found.labels)} {name} images right"))
            cards[-1] = (cards[-1][0], f"{cards[-1][1]} ({right})")
    best = history.epochs[history.best_epoch]
    cards.append((f"{history.best_epoch + 1} of {len(history.epochs)}", "best epoch"))
    cards.append((f"{best['loss']:.3g}", "training loss there"))
    cards.append((f"{sum(e['seconds'] for e in history.epochs):.0f} s", "in all epochs"))
    return (
        "<section class=cards>"
        + "".join(f"<div><b>{value}</b>{in_html(name)}</div>" for value, name in cards)
        + "</section>"
    )


def _curves(history: History) -> str:
    """Charts, and the same as a table."""
    groups = [("loss", "val_loss"), ("accuracy", "val_accuracy"), ("learning_rate",)]
    charts = "".join(
        "<div>"
        + curves_svg(
            {_said(k): [e[k] for e in history.epochs] for k in keys if k in history.epochs[0]},
            _said(keys[0]).capitalize(),
        )
        + "</div>"
        for keys in groups
    )
    names = list(history.epochs[0])
    rows = "".join(
        f"<tr{' class=best' if i == history.best_epoch else ''}><th>{i + 1}</th>"
        + "".join(f"<td>{epoch[name]:.4g}</td>" for name in names)
        + "</tr>"
        for i, epoch in enumerate(history.epochs)
    )
    head = "".join(f"<th>{_said(name)}</th>" for name in names)
    return (
        f"<section><h2>Epochs</h2><div class=charts>{charts}</div><details><summary>As a table"
        f"</summary><div class=wide><table><tr><th>epoch</th>{head}</tr>{rows}</table></div>"
        f"</details></section>"
    )


def _said(name: str) -> str:
    return name.replace("val_", "validation ").replace("_", " ")


def _settings(history: History) -> str:
    """The settings that differ from the defaults, then all others."""

    def row(field: dataclasses.Field) -> str:
        value = in_html(without_folders(getattr(history.config, field.name)))
        return f"<tr><th>{field.name}</th><td>{value}</td></tr>"

    fields = dataclasses.fields(TrainConfig)
    own = [f for f in fields if getattr(history.config, f.name) != f.default]
    others = [f for f in fields if f not in own]
    images = history.data_config
    seen = (
        f"Images were brought to {images.size[0]}x{images.size[1]}, crop mode {images.crop_mode}, "
        f"crop share {images.crop_pct:g}, {images.interpolation}; weight set "
        f"{in_html(images.weight_set or 'not known')}."
        if images.size
        else ""
    )
    return (
        f"<section><h2>Settings</h2><p>{seen}</p><table>{''.join(map(row, own))}</table><details>"
        f"<summary>Settings at their defaults</summary><table>{''.join(map(row, others))}</table>"
        f"</details></section>"
    )


def _write(path: str | Path, text: str) -> None:
    with files.atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


STYLE = """<style>
:root{color-scheme:light dark;--ink:#1c2024;--page:#fff;--soft:#f2f4f6;--line:#d8dde2;
--best:#e3f1e8}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ec;--page:#15181b;--soft:#20252a;--line:#363d44;
--best:#1f3a2a}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0}
main{max-width:1100px;margin:auto;padding:1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}
.cards{display:flex;flex-wrap:wrap;gap:.75rem}
.cards div{background:var(--soft);border-radius:.5rem;padding:.75rem 1rem;flex:1 1 9rem}
.cards b{display:block;font-size:1.7rem;line-height:1.2}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:1rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .6rem;text-align:right;font-weight:normal}th{opacity:.75}
tr{border-bottom:1px solid var(--line)}.best{background:var(--best)}
.confusion td{min-width:1.4rem;text-align:center}
.small td,.small th{padding:0;font-size:0;height:7px}
.turned th{writing-mode:vertical-rl;text-align:left;padding:.4rem .2rem}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:1rem}
figure{margin:0}figcaption{overflow-wrap:anywhere}img{max-width:49%;height:auto;border-radius:.25rem}
code{background:var(--soft);overflow-wrap:anywhere}footer{margin-top:2rem;opacity:.75}
summary{cursor:pointer;margin:.5rem 0}
@media print{details>*{display:block}section,figure{break-inside:avoid}}
</style>"""
LARGE = 25  # classes, from which on the confusion is drawn without numbers


def _summary(classes: Sequence[str], evaluation: Evaluation, name: str) -> str:
    rows = "".join(
        f"<tr><th>{in_html(c.name)}</th><td>{c.images}</td><td>{c.precision:.3f}</td>"
        f"<td>{c.recall:.3f}</td><td>{c.f1:.3f}</td></tr>"
        for c in evaluation.per_class(classes)
    )
    figures = "".join(
        f"<tr><th>{figure}</th><td>{value:.4f}</td></tr>"
        for figure, value in evaluation.figures().items()
    )
    return (
        f"<section><h2>{name}: {evaluation.accuracy:.1%} of {len(evaluation.labels)} right</h2>"
        f"<table>{figures}</table><details open><summary>By class</summary><div class=wide><table>"
        f"<tr><th>class</th><th>images</th><th>precision</th><th>recall</th><th>F1</th></tr>{rows}"
        f"</table></div></details>{_confusion(classes, evaluation.confusion)}</section>"
    )


def _confusion(classes: Sequence[str], confusion: np.ndarray) -> str:
    """The confusion as a table, coloured by share of the class; of many classes without numbers."""
    shares = confusion / confusion.sum(1, keepdims=True).clip(1)
    is_large = len(classes) >= LARGE
    names = [in_html(name) for name in classes]
    body = "".join(
        f"<tr><th>{'' if is_large else name}</th>"
        + "".join(
            f'<td style="background:rgba(59,130,196,{share:.2f})" '
            f'title="{name} as {other}: {count}">'
            f"{'' if is_large or not count else count}</td>"
            for other, count, share in zip(names, counts, row, strict=True)
        )
        + "</tr>"
        for name, counts, row in zip(names, confusion, shares, strict=True)
    )
    columns = "" if is_large else "".join(f"<th>{name}</th>" for name in names)
    wrong = confusion * (1 - np.eye(len(classes), dtype=confusion.dtype))
    pairs = [divmod(int(i), len(classes)) for i in np.argsort(-wrong, axis=None, kind="stable")[:8]]
    worst = "".join(
        f"<li>{names[i]} taken for {names[j]}: {wrong[i, j]} of {confusion[i].sum()}</li>"
        for i, j in pairs
        if wrong[i, j]
    )
    return (
        f"<h3>Confusion (rows: true, columns: predicted)</h3><div class=wide><table "
        f'class="confusion{" small" if is_large else ""}"><tr class=turned><th></th>{columns}</tr>'
        f"{body}</table></div>" + (f"<p>Most often confused:</p><ul>{worst}</ul>" if worst else "")
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
        pixels, caption = _pixels(image), f"{true} taken for {history.classes[predicted]}"
        try:
            heat = activation_map(history.model, image, predicted)
            mapped = _picture(_heat(pixels, heat), f"Grad-CAM of {history.classes[predicted]}")
        except ValueError:  # a network without feature maps
            mapped = ""
        figures.append(
            f"<figure>{_picture(pixels, caption)} {mapped}<figcaption>{in_html(caption)} "
            f"({certainty:.0%})<br><small>{in_html(name)}</small></figcaption></figure>"
        )
    return (
        "<section><h2>Worst mistakes</h2><p>Beside each image Grad-CAM: where what spoke for the "
        f"predicted class is, red for most.</p><div class=pictures>{''.join(figures)}</div>"
        "</section>"
        if figures
        else "<section><h2>No mistakes</h2></section>"
    )
