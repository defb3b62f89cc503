"""Images of a report: what the network saw, what it took them for, and what spoke for that."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import keras
import numpy as np
import torch
from PIL import Image

from vggtorch.models import read_image
from vggtorch.text import in_html
from vggtorch.training.data import DatasetSource, Folder
from vggtorch.training.evaluation import Evaluation, activation_maps

EDGE = 192  # pixels of a picture's longer side
BATCH = 16  # images whose maps are taken at a time


def galleries(
    model: keras.Model,
    images: Folder | DatasetSource,
    classes: Sequence[str],
    found: Evaluation,
    count: int,
) -> str:
    """`count` samples that were wrong, half as many unsure and right ones, with Grad-CAM; HTML."""
    parts = []
    for title, note, indices in (
        (
            "Wrong and sure",
            "What the network is surest of, and wrong.",
            found.worst_mistakes(count),
        ),
        ("Unsure", "The two most probable classes are closest here.", unsure(found, count // 2)),
        ("Right and sure", "The surest of each class.", right(found, count // 2)),
    ):
        if indices:
            figures = _figures(model, images, classes, found, indices)
            parts.append(f"<h3>{title}</h3><p>{note}</p><div class=pictures>{figures}</div>")
        elif title.startswith("Wrong"):
            parts.append("<h3>No mistakes</h3>")
    return "".join(parts)


def unsure(found: Evaluation, count: int) -> list[int]:
    """Indices of images whose two most probable classes are closest, right or wrong."""
    best = found.logits.softmax(1).topk(min(2, found.logits.shape[1]), 1).values
    return (best[:, 0] - best[:, -1]).argsort(stable=True)[:count].tolist()


def right(found: Evaluation, count: int) -> list[int]:
    """Indices of right images, of each class the surest one first; then the second ones."""
    certainty, predicted = found.logits.softmax(1).max(1)
    taken: dict[int, int] = {}
    order: list[tuple[int, int, int]] = []
    for index in certainty.argsort(descending=True, stable=True).tolist():
        label = int(predicted[index])
        if label == int(found.labels[index]):
            order.append((taken.get(label, 0), len(order), index))
            taken[label] = taken.get(label, 0) + 1
    return [index for _, _, index in sorted(order)[:count]]


def inputs(images: Folder | DatasetSource, count: int = 6) -> str:
    """Files beside what became of them before the network saw them; HTML, empty without files."""
    if not isinstance(images, Folder):
        return ""
    step = max(1, len(images) // count)
    figures = []
    for index in range(0, len(images), step)[:count]:
        name = "/".join(images.images[index].path.parts[-2:])
        before = np.asarray(read_image(images.images[index].path))
        (after,), _ = images[[(index, 0)]]
        sizes = f"{before.shape[1]}x{before.shape[0]} to {after.shape[1]}x{after.shape[0]}"
        figures.append(
            f"<figure><div class=pair>{img(before, 'the file')}"
            f"{img(pixels(after), 'what the network saw')}</div>"
            f"<figcaption>{sizes}<small>{in_html(name)}</small></figcaption></figure>"
        )
    return f"<div class=pictures>{''.join(figures)}</div>"


def _figures(
    model: keras.Model,
    images: Folder | DatasetSource,
    classes: Sequence[str],
    found: Evaluation,
    indices: Sequence[int],
) -> str:
    parts = []
    for start in range(0, len(indices), BATCH):
        some = indices[start : start + BATCH]
        batch, _ = images[[(index, 0) for index in some]]
        try:
            predicted = found.logits[list(some)].argmax(1).tolist()
            heats = list(activation_maps(model, batch, predicted))
        except ValueError:  # a network without feature maps
            heats = []
        for place, index in enumerate(some):
            seen = pixels(batch[place])
            shown = img(seen, "what the network saw")
            if heats:
                shown += img(heated(seen, heats[place]), "Grad-CAM of the predicted class")
            parts.append(f"<figure><div class=pair>{shown}</div>")
            parts.append(_caption(images, classes, found, index) + "</figure>")
    return "".join(parts)


def _caption(
    images: Folder | DatasetSource, classes: Sequence[str], found: Evaluation, index: int
) -> str:
    """The true class, and bars of the three most probable ones."""
    true = int(found.labels[index])
    shares = found.logits[index].softmax(0)
    rows = []
    for label in shares.topk(min(3, len(shares))).indices.tolist():
        share = f"{float(shares[label]):.0%}"
        kind = " class=true" if label == true else ""
        rows.append(
            f"<li{kind} style='--share:{share}'><bdi>{in_html(classes[label])}</bdi>{share}</li>"
        )
    name = f"image {index}"
    if isinstance(images, Folder):
        name = "/".join(images.images[index].path.parts[-2:])
    predicted = int(found.logits[index].argmax())
    answer = (
        "right"
        if predicted == true
        else f"taken for <b><bdi>{in_html(classes[predicted])}</bdi></b>"
    )
    return (
        f"<figcaption><b><bdi>{in_html(classes[true])}</bdi></b>, {answer}<ol>{''.join(rows)}</ol>"
        f"<small>{in_html(name)}</small></figcaption>"
    )


def img(pixels: np.ndarray, text: str) -> str:
    """Pixels (H, W, 3) as an <img> tag."""
    picture = Image.fromarray(pixels)
    times = EDGE / max(picture.size)
    edges = [max(1, round(edge * times)) for edge in picture.size]  # also of a strip
    picture = picture.resize((edges[0], edges[1]), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    code = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img width="{picture.width}" height="{picture.height}" alt="{in_html(text)}" '
        f'title="{in_html(text)}" src="data:image/jpeg;base64,{code}">'
    )


def pixels(image: torch.Tensor) -> np.ndarray:
    """An image as it is seen; one that is ready for the network is stretched to 0 ... 255."""
    if image.dtype == torch.uint8:
        return image.numpy()
    image = image.float()
    span = (image.max() - image.min()).clamp_min(1e-12)
    return ((image - image.min()) / span * 255).byte().numpy()


def heated(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
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
