"""What the documentation holds that is made while it is built: pictures and the commands' help.

MkDocs calls the functions whose names begin with `on_`.
"""

from __future__ import annotations

import dataclasses
import io
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
import torch
from mkdocs.structure.files import File
from PIL import Image

from vggtorch.architectures import ARCHITECTURES
from vggtorch.training.charts import HEIGHT, WIDTH, chart, curves_svg

ROOT = Path(__file__).parent.parent
Line = list[tuple[float, float]]


def on_config(config: Any) -> Any:
    """Leave pages that aren't written yet out of the menu."""
    config.nav = _written(config.nav, Path(config.docs_dir))
    return config


def _written(items: list[Any], folder: Path) -> list[Any]:
    kept: list[Any] = []
    for item in items:
        if isinstance(item, str):
            kept += [item] if (folder / item).exists() else []
            continue
        ((title, inside),) = item.items()
        if isinstance(inside, list):
            kept.append({title: _written(inside, folder)})
        elif (folder / inside).exists():
            kept.append(item)
    return kept


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures to the site."""
    pictures: dict[str, str | bytes] = {
        "surgery.svg": surgery_picture(),
        "report.svg": report_picture(),
        "costs.svg": costs_picture(),
        "compression.svg": compression_picture(),
        "growth.svg": growth_picture(),
        "features.png": features_picture(),
    }
    for name, content in pictures.items():
        files.append(File.generated(config, f"pictures/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in what pages ask for: the help of every command, and links out of docs/."""
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", commands_help())
    if "<!-- settings -->" in markdown:
        markdown = markdown.replace("<!-- settings -->", settings_table())
    for mark, name in (("<!-- benchmarks -->", "README.md"), ("<!-- tried -->", "tried.md")):
        if mark in markdown:
            _, text = (ROOT / "benchmarks" / name).read_text().split("\n", 1)  # less the title
            text = re.sub(r"\[README(\.md)?\]\(README\.md\)", "[Speed](speed.md)", text)
            text = text.replace("](../docs/", "](")
            markdown = markdown.replace(mark, text)
    return markdown


# Pictures


def surgery_picture() -> str:
    """The tutorial's replacement on the bottom of VGG16."""
    vgg = vt.VGG16(weights=None, include_top=False, input_shape=(160, 160, 3))
    bottom = vt.truncate(vgg, "block2_pool")
    conv = keras.layers.Conv2D(64, 5, padding="same", activation="relu", name="block1_conv")
    return vt.draw(vt.replace(bottom, ["block1_conv1", "block1_conv2"], conv), before=bottom)


def report_picture() -> str:
    """The curves that a report draws of ten epochs on handwritten digits, side by side."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(200):
            place = Path(folder, "digits", str(digits.target[i]))
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray((digits.images[i] * 15).astype("uint8")).save(place / f"{i}.png")
        vgg = vt.VGG16(weights="oxford", include_top=False, input_shape=(64, 64, 3))
        epochs = vt.finetune(
            vgg, Path(folder, "digits"), epochs=10, output_dir=f"{folder}/run"
        ).epochs
    return side_by_side(
        curves_svg({said: [e[key] for e in epochs] for key, said in lines.items()}, title)
        for title, lines in (
            ("Loss", {"loss": "training", "val_loss": "validation"}),
            ("Accuracy", {"accuracy": "training", "val_accuracy": "validation"}),
        )
    )


def costs_picture() -> str:
    """Multiply-adds and parameters of VGG16 by block, as bars."""
    network = ARCHITECTURES["vgg16"]
    costs: dict[str, list[float]] = {}
    size = 224
    for layer in network.features():
        block = costs.setdefault(layer.name.split("_")[0], [0.0, 0.0])
        if layer.kind == "conv":
            block[0] += 9 * layer.inputs * layer.outputs * size * size
            block[1] += 9 * layer.inputs * layer.outputs + layer.outputs
        if layer.kind == "pool":
            size //= 2
    for layer in network.classifier():
        costs[layer.name] = [layer.inputs * layer.outputs, (layer.inputs + 1) * layer.outputs]
    totals = [sum(cost[i] for cost in costs.values()) for i in range(2)]
    rows = []
    for place, (name, cost) in enumerate(costs.items()):
        y = 44 + 30 * place
        rows.append(f'<text x="96" y="{y + 12}" text-anchor="end">{name}</text>')
        for i, colour in enumerate(("#00897b", "#f9a825")):
            share = cost[i] / totals[i]
            rows.append(
                f'<rect x="104" y="{y + 11 * i}" width="{1 + 480 * share:.1f}" height="10" '
                f'fill="{colour}"/><text x="{110 + 480 * share:.1f}" y="{y + 9 + 11 * i}" '
                f'font-size="10">{share:.1%}</text>'
            )
    height = 60 + 30 * len(costs)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 660 {height}" '
        f'font-family="sans-serif" font-size="12"><rect width="660" height="{height}" '
        f'fill="white"/><text x="104" y="20" fill="#00695c">multiply-adds, '
        f'{totals[0] / 1e9:.1f} billion for one image</text><text x="380" y="20" fill="#b26a00">'
        f"parameters, {totals[1] / 1e6:.0f} million</text>{''.join(rows)}</svg>"
    )


def compression_picture() -> str:
    """What compressed networks still see, how fast and how accurate, by the benchmarks' table."""
    rows = table_of("What a compressed network sees, and how fast it is")
    times = [1.0, *(float(row["multiply-adds less, times"]) for row in rows)]
    probes = [[float(n) for n in row["probe"].split("+-")] for row in rows]
    curves = {
        "cosine to the original": {
            f"after block {block}": [1.0, *(float(row[str(block)]) for row in rows)]
            for block in (3, 4, 5)
        },
        "times as fast": {
            f"batch {batch}": [1.0, *(float(row[f"batch {batch}"].split()[0]) for row in rows)]
            for batch in (1, 8)
        },
        "accuracy of a linear probe, less the original's": {
            label: [0.0, *(found + sign * error for found, error in probes)]
            for label, sign in (
                ("block 4", 0),
                ("+ standard error", 1),
                ("- standard error", -1),
            )
        },
    }
    return side_by_side(
        chart(
            {name: list(zip(times, values, strict=True)) for name, values in lines.items()},
            title,
            "times less multiply-adds",
        )
        for title, lines in curves.items()
    )


def growth_picture() -> str:
    """How VGG's time grows with images, pixels and layers, by the benchmarks' table."""
    rows = table_of("How the cost grows")
    engines = list(rows[0])[1:]

    def lines(pattern: str, share: Callable[[float], float]) -> dict[str, Line]:
        """By engine, the rows that the pattern finds: a number, and the time over its share."""
        found = [(float(m[1]), row) for row in rows if (m := re.fullmatch(pattern, row["VGG"]))]
        return {name: [(x, float(row[name]) / share(x)) for x, row in found] for name in engines}

    return side_by_side(
        [
            chart(
                lines(r"batch (\d+)", float), "ms for one image", "images at once", logarithmic=True
            ),
            chart(
                lines(r"(\d+) pixels", lambda side: (side / 224) ** 2),
                "ms for as many pixels as 224x224 has",
                "height and width in pixels",
                logarithmic=True,
            ),
            chart(lines(r"VGG(\d+)", lambda _: 1.0), "ms", "layers with weights", whole=True),
        ]
    )


def table_of(title: str) -> list[dict[str, str]]:
    """The first table under a heading of benchmarks/README.md, a dict for each row."""
    _, found, section = (ROOT / "benchmarks" / "README.md").read_text().partition(f"## {title}\n")
    if not found:
        raise ValueError(f"benchmarks/README.md has no heading {title!r}, whose table is drawn.")
    lines = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("|")]
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(head, row, strict=True)) for row in rows if len(row) == len(head)]


def side_by_side(charts: Iterable[str]) -> str:
    """Charts of vggtorch.training.charts in one picture, on white."""
    placed = [
        f'<g transform="translate({i * WIDTH} 0)">{re.sub("^<svg[^>]*>|</svg>$", "", chart)}</g>'
        for i, chart in enumerate(charts)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(placed) * WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(placed)}</svg>"
    )


def features_picture() -> bytes:
    """A photograph, and how strongly each place of it excites three layers of VGG16."""
    from skimage import data

    photo = Image.fromarray(data.astronaut()).resize((224, 224))
    taps = ["relu1_2", "relu3_3", "relu5_3"]
    extractor = vt.FeatureExtractor("oxford", taps, value_range=(0, 255))
    pixels = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8)
    images = pixels.view(1, 224, 224, 3).permute(0, 3, 1, 2)
    strip = Image.new("RGB", (4 * 224 + 3 * 8, 224), "white")
    strip.paste(photo, (0, 0))
    for place, value in enumerate(extractor(images).values(), 1):
        strength = value[0].norm(dim=0)
        grey = (strength / strength.max() * 255).byte().numpy()
        heat = Image.fromarray(grey).resize((224, 224), Image.Resampling.BICUBIC)
        strip.paste(heat.convert("RGB"), (place * (224 + 8), 0))
    buffer = io.BytesIO()
    strip.save(buffer, "PNG")
    return buffer.getvalue()


# The command line


def commands_help() -> str:
    """The help of every command, as Markdown."""
    from typer.testing import CliRunner

    from vggtorch.cli import app

    commands: list[Any] = app.registered_commands
    names = [str(c.name or c.callback.__name__.replace("_", "-")) for c in commands]
    names += [str(group.name) for group in app.registered_groups]
    parts = []
    for name in sorted(names):
        result = CliRunner().invoke(
            app, [name, "--help"], env={"TERM": "dumb"}, prog_name="vggtorch", terminal_width=92
        )
        if result.exit_code:
            raise RuntimeError(f"vggtorch {name} --help: {result.output}")
        text = re.sub(r"\x1b\[[0-9;]*m", "", result.output).strip()
        parts.append(f"## vggtorch {name}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def settings_table() -> str:
    """The fields of TrainConfig, as Markdown."""
    rows = ["| setting | default | what it does |", "|---|---|---|"]
    for field in dataclasses.fields(vt.TrainConfig):
        rows.append(f"| `{field.name}` | `{field.default!r}` | {field.metadata['help']} |")
    return "\n".join(rows)
