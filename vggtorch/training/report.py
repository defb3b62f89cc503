"""What people read of a run or a test: one HTML page; and the drawing of a search for the rate.

The page holds its pictures and drawings itself, so that it can be sent and kept as one file.
"""

from __future__ import annotations

import dataclasses
import html
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import keras

from vggtorch import files
from vggtorch.checks import whole
from vggtorch.paths import check_out
from vggtorch.text import (
    LONGEST_MESSAGE,
    as_command,
    figure_text,
    in_html,
    name_in_html,
    visible,
    without_folders,
)
from vggtorch.training.card import check_history, evaluations
from vggtorch.training.charts import chart, curves_svg
from vggtorch.training.checkpoints import version_text
from vggtorch.training.config import TrainConfig
from vggtorch.training.confusion import confusion_html
from vggtorch.training.data import DatasetSource, Folder, geometry_text
from vggtorch.training.evaluation import Evaluation
from vggtorch.training.history import History
from vggtorch.training.optimization import name_of
from vggtorch.training.pictures import galleries, inputs
from vggtorch.training.rate_search import RateSearch


def plot_rates(search: RateSearch, path: str | Path) -> None:
    """Draw the loss against the learning rate, with the suggestion, as an SVG file."""
    title = f"Loss by learning rate; suggested {search.suggestion:.2g}"
    lines = {"loss": list(zip(search.rates, search.losses, strict=True))}
    files.write_text(
        path, chart(lines, title, "learning rate", search.suggestion, logarithmic=True)
    )


def write_report(
    history: History,
    path: str | Path,
    command: str | None = None,
    mistakes: int = 12,
) -> None:
    """Write one HTML file: headline, curves, figures by class, confusion, samples with Grad-CAM.

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
        mistakes: how many pictures of images that the model got wrong; of unsure and right ones
            half as many each.

    Raises:
        ValueError: another kind of history or path, or `mistakes` that isn't a number from 0.
        OSError: the file couldn't be written.
    """
    check_history(history)
    check_out(path, (), "path")
    scored = list(evaluations(history))
    sections = [_headline(history), _curves(history)]
    for place, (name, images, found) in enumerate(scored):
        # Samples are of those images that nothing was chosen by, where there are such.
        count = mistakes if place == 0 else 0
        sections.append(_scored(history.model, name, images, history.classes, found, count))
    if scored and (seen := inputs(scored[0][1])):
        sections.append(
            f"<section><h2>What the network saw</h2><p>{_geometry(history)} On the left the file, "
            f"on the right what became of it.</p>{seen}</section>"
        )
    sections.append(_settings(history))
    title = f"{in_html(history.model.name)}, {len(history.classes)} classes"
    files.write_text(path, _page(title, sections, command))


def write_test_report(
    model: keras.Model,
    images: Folder,
    found: Evaluation,
    path: str | Path,
    command: str | None = None,
    mistakes: int = 12,
) -> None:
    """Write the part of a report that says how a model did on images, as one HTML file.

    >>> import pathlib, tempfile, keras, vggtorch as vt
    >>> from PIL import Image
    >>> model = keras.Sequential(
    ...     [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)]
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("blue", "red"):
    ...         pathlib.Path(folder, name).mkdir()
    ...         Image.new("RGB", (9, 9), name).save(f"{folder}/{name}/1.png")
    ...     found, images = vt.evaluate_folder(model, folder)
    ...     vt.write_test_report(model, images, found, f"{folder}/report.html")

    Args:
        model: which `found` is of.
        images: in the order of `found`; as `evaluate_folder` gives both.
        found: what the model said.
        path: the file.
        command: what made it; by default this process's command line.
        mistakes: as in `write_report`.

    Raises:
        OSError: the file couldn't be written.
    """
    scored = _scored(model, "test", images, images.classes, found, mistakes)
    cards = _cards([_accuracy_card("test", found)])
    title = f"{in_html(model.name)} on {in_html(images.root.resolve().name)}"
    files.write_text(path, _page(title, [cards, scored], command))


def _page(title: str, sections: Iterable[str], command: str | None) -> str:
    made_by = html.escape(visible(command or as_command(sys.argv), LONGEST_MESSAGE))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8>"
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title>{STYLE}<main><h1>{title}</h1>{''.join(sections)}"
        f"<footer>Made by <code>{made_by}</code> with {version_text()}.</footer></main></html>"
    )


def _headline(history: History) -> str:
    """The figures that one looks for first."""
    cards = [_accuracy_card(name, found) for name, _, found in evaluations(history)]
    kept = f"{history.kept_epoch + 1} of {len(history.epochs)}"
    which = "best" if history.config.restore_best_weights and history.validation else "last"
    cards.append((kept, f"is the {which} epoch, whose weights these are"))
    cards.append((_duration(sum(e["seconds"] for e in history.epochs)), "in all epochs"))
    return _cards(cards)


def _accuracy_card(name: str, found: Evaluation) -> tuple[str, str]:
    right, images = round(found.accuracy * len(found.labels)), len(found.labels)
    return f"{found.accuracy:.1%}", f"{name} accuracy, {right} of {images} images right"


def _cards(cards: Sequence[tuple[str, str]]) -> str:
    inside = "".join(f"<div><b>{value}</b>{in_html(text)}</div>" for value, text in cards)
    return f"<section class=cards>{inside}</section>"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.2f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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
        f"<tr{' class=kept' if i == history.kept_epoch else ''}><th>{i + 1}</th>"
        + "".join(f"<td>{epoch[name]:.4g}</td>" for name in names)
        + "</tr>"
        for i, epoch in enumerate(history.epochs)
    )
    head = "".join(f"<th>{_said(name)}</th>" for name in names)
    shown = " open" if len(history.epochs) <= SHORT else ""
    return (
        f"<section><h2>Epochs, as they trained in {history.config.precision}</h2>"
        f"<div class=charts>{charts}</div><details{shown}><summary>As a table</summary>"
        f"<div class=wide><table><tr><th>epoch</th>{head}</tr>{rows}</table></div></details>"
        f"</section>"
    )


def _said(name: str) -> str:
    return name.replace("val_", "validation ").replace("_", " ")


def _scored(
    model: keras.Model,
    name: str,
    images: Folder | DatasetSource,
    classes: Sequence[str],
    found: Evaluation,
    mistakes: int,
) -> str:
    """All that is known of how images were scored."""
    figures = "".join(
        f"<div><dt>{figure}</dt><dd>{figure_text(value)}</dd></div>"
        for figure, value in found.figures().items()
    )
    rows = "".join(
        f"<tr><th>{name_in_html(c.name)}</th><td>{c.images}</td><td>{c.precision:.3f}</td>"
        f"<td>{c.recall:.3f}</td><td class=bar style='--share:{c.f1:.0%}'>{c.f1:.3f}</td></tr>"
        for c in found.per_class(classes)
    )
    shown = " open" if len(classes) <= LARGEST_OPEN else ""
    mistakes = whole("mistakes", mistakes, least=0)
    samples = galleries(model, images, classes, found, mistakes) if mistakes else ""
    if samples:
        samples = (
            f"<h2>{name.capitalize()} images, and what spoke for the answer</h2><p>On the right of "
            f"each, Grad-CAM: where in the image the score of the predicted class comes from, red "
            f"for most. Bars are probabilities; the true class has a green one.</p>{samples}"
        )
    return (
        f"<section><h2>{name.capitalize()}: {found.accuracy:.1%} of {len(found.labels)} right</h2>"
        f"<dl class=figures>{figures}</dl><div class=split><div><h3>By class</h3><details{shown}>"
        f"<summary>{len(classes)} classes</summary><div class=wide><table><tr><th>class</th>"
        f"<th>images</th><th>precision</th><th>recall</th><th>F1</th></tr>{rows}</table></div>"
        f"</details></div><div>{confusion_html(classes, found.confusion)}</div></div></section>"
        + (f"<section>{samples}</section>" if samples else "")
    )


def _geometry(history: History) -> str:
    return f"Images were brought to {in_html(geometry_text(history.data_config))}."


def _settings(history: History) -> str:
    """The settings that differ from the defaults, then all others."""

    def row(field: dataclasses.Field) -> str:
        value = in_html(without_folders(name_of(getattr(history.config, field.name))))
        return f"<tr><th>{field.name}</th><td>{value}</td></tr>"

    fields = dataclasses.fields(TrainConfig)
    own = [f for f in fields if getattr(history.config, f.name) != f.default]
    others = [f for f in fields if f not in own]
    return (
        f"<section><h2>Settings that differ from the defaults</h2><p>{_geometry(history)}</p>"
        f"<div class=wide><table class=settings>{''.join(map(row, own))}</table></div><details>"
        f"<summary>Settings at their defaults</summary><div class=wide><table class=settings>"
        f"{''.join(map(row, others))}</table></div></details></section>"
    )


SHORT = 12  # epochs whose table is open
LARGEST_OPEN = 25  # classes whose table is open
STYLE = """<style>
:root{color-scheme:light dark;--ink:#1c2024;--page:#fff;--soft:#f2f4f6;--line:#d8dde2;
--kept:#e3f1e8;--bar:#cfe2f3;--true:#bfe3cd}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ec;--page:#15181b;--soft:#20252a;--line:#363d44;
--kept:#1f3a2a;--bar:#23435f;--true:#235239}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0}
main{max-width:1200px;margin:auto;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0 1rem}h2{font-size:1.25rem;margin:2.5rem 0 .75rem}
h3{font-size:1rem;margin:1.5rem 0 .25rem}p{margin:.25rem 0 .75rem;max-width:48rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.75rem}
.cards div{background:var(--soft);border-radius:.5rem;padding:.75rem 1rem}
.cards b{display:block;font-size:1.9rem;line-height:1.2}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr));gap:.5rem;margin:0}
h1,li{overflow-wrap:anywhere}
.name{display:inline-block;max-width:min(16rem,40vw);overflow:hidden;text-overflow:ellipsis;
white-space:nowrap;vertical-align:bottom}
.figures div{border-left:3px solid var(--line);padding-left:.6rem}
dt{opacity:.75;font-size:.9rem}dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:1rem}
.split{display:flex;flex-wrap:wrap;column-gap:2.5rem}.split>div{max-width:100%}
.split svg{width:min(46rem,calc(100vw - 2rem))}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .6rem;text-align:right;font-weight:normal}
th:first-child{text-align:left;padding-left:0}th{opacity:.75}
tr{border-bottom:1px solid var(--line)}.kept{background:var(--kept)}
.settings td{text-align:left;overflow-wrap:anywhere}
.bar{background:linear-gradient(90deg,var(--bar) var(--share),transparent var(--share))}
.confusion{font-size:.87rem}.confusion td{min-width:1.6rem;padding:.2rem .3rem;text-align:center}
.confusion th:first-child{position:sticky;left:0;background:var(--page);opacity:1}
.confusion tr{border-color:transparent}.confusion td{border:1px solid var(--line)}
.turned th{vertical-align:bottom;padding:.4rem .2rem}
.turned .name{writing-mode:vertical-rl;transform:rotate(180deg);max-width:none;max-height:9rem}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,250px),1fr));gap:1rem}
figure{margin:0;background:var(--soft);border-radius:.5rem;padding:.6rem}
.pair{display:flex;gap:.4rem;align-items:center}.pair img{flex:1 1 0;min-width:0;height:auto;
border-radius:.25rem}
figcaption{margin-top:.4rem;overflow-wrap:anywhere}small{display:block;opacity:.75}
ol{list-style:none;margin:.25rem 0;padding:0}
li{margin:.1rem 0}ol li{display:flex;justify-content:space-between;gap:.5rem;padding:0 .4rem;
border-radius:.2rem;min-width:0;
background:linear-gradient(90deg,var(--bar) var(--share),transparent var(--share))}
ol .true{--bar:var(--true)}ul{margin:.25rem 0;padding-left:1.2rem}
code{background:var(--soft);overflow-wrap:anywhere}footer{margin-top:2.5rem;opacity:.75}
summary{cursor:pointer;margin:.25rem 0}
@media print{body{font-size:11px}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
:root{--ink:#000;--page:#fff;--soft:#f2f4f6;--line:#d8dde2;--kept:#e3f1e8;--bar:#cfe2f3;
--true:#bfe3cd}
details::details-content{content-visibility:visible;block-size:auto}
figure,tr,svg,.confusion,.cards,.figures{break-inside:avoid}h2,h3{break-after:avoid}
.wide{overflow:visible}.pictures{grid-template-columns:repeat(3,minmax(0,1fr))}}
</style>"""
