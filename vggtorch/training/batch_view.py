"""A picture of what the network sees: a batch as it trains on it, with its labels."""

from __future__ import annotations

import contextlib
import math
import unicodedata
from typing import Any, cast

import keras
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vggtorch.checks import whole
from vggtorch.keras_graph import graph_of
from vggtorch.text import visible
from vggtorch.training.config import TrainConfig
from vggtorch.training.data import check_labels
from vggtorch.training.features import frozen_end
from vggtorch.training.mixing import mixed, mixes
from vggtorch.training.opening import read_and_fit, settle_config
from vggtorch.training.optimization import freeze_for_, frozen_layers_kept
from vggtorch.training.pictures import pixels
from vggtorch.training.reading import Batch, shared_batches
from vggtorch.training.run import Images, make_accelerator
from vggtorch.training.stages import Stage

# Where systems have one of them, the first that there is draws the labels.
FONTS = (
    "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "DejaVuSans.ttf",
    "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "arial.ttf", "Arial.ttf",
)  # fmt: skip
EDGE, TEXT, GAP = 160, 18, 8  # pixels: of an image's longer side, of a line, between images


def show_batch(
    model: keras.Model,
    train: Images,
    config: TrainConfig | None = None,
    *,
    count: int = 16,
    epoch: int = 0,
    **settings: Any,
) -> Image.Image:
    """The first images that a run would train on: cropped, augmented and mixed, with their labels.

    What images are brought to and how they are drawn at random is as `finetune` does it. Colours
    are those before the arithmetic of the weight set; images that come ready for the network are
    stretched to 0 ... 255.

    >>> import keras, torch, vggtorch as vt
    >>> images = torch.randint(256, (6, 8, 8, 3), dtype=torch.uint8)
    >>> data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 2, 0, 1, 2]))
    >>> model = keras.Sequential(
    ...     [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3)]
    ... )
    >>> picture = vt.show_batch(model, data, count=4, mixup=0.4)
    >>> picture.size  # two by two
    (344, 380)

    Args:
        model: what `finetune` takes.
        train: the same.
        config: the same.
        count: how many images, at most those of a batch.
        epoch: of which epoch (from 0).
        **settings: fields of TrainConfig that go before it.

    Raises:
        ValueError: what `finetune` raises of its data and settings.
    """
    count, epoch = whole("count", count), whole("epoch", epoch, least=0)
    graph_of(model, "show_batch")
    config = settle_config(model, train, config, settings)
    model, read = read_and_fit(model, train, None, config)
    with frozen_layers_kept(model):
        freeze_for_(model, config, epoch)
        kept = config.cache and not mixes(config) and frozen_end(model) is not model.inputs[0]
    keys = Stage(torch.nn.Identity(), read.training, None, kept).keys(read.plan, epoch)[0]
    if kept:  # the features of so many copies take turns
        keys = [(index, copy % config.cache_copies) for index, copy in keys]
    accelerator = make_accelerator(config.precision)
    (batch,) = shared_batches(read.training, [keys], 0, accelerator, in_pairs=mixes(config))
    step = read.steps(epoch)
    check_labels(batch.labels, model)
    classes = read.classes or tuple(map(str, range(model.output_shape[1])))
    images, texts = _seen(batch, classes, config, step)
    return _sheet([pixels(image) for image in images[:count]], texts[:count])


def _seen(
    batch: Batch, classes: tuple[str, ...], config: TrainConfig, step: int
) -> tuple[torch.Tensor, list[str]]:
    """The images as they go in, and what their labels are."""
    if batch.partners is None:
        return batch.images, [classes[label] for label in batch.labels.tolist()]
    others, other_labels = batch.partners
    images, shares = mixed(
        batch.images.float(), batch.labels, (others.float(), other_labels), len(classes), config,
        step,
    )  # fmt: skip
    if batch.images.dtype == torch.uint8:
        images = images.round().byte()
    texts = [
        ", ".join(f"{classes[i]} {row[i]:.0%}" for i in row.argsort(descending=True) if row[i] > 0)
        for row in shares
    ]
    return images, texts


def _font(size: int) -> ImageFont.FreeTypeFont:
    """A font of this machine that has letters of many languages; else PIL's own."""
    for name in FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return _own_font(size)


def _own_font(size: int) -> ImageFont.FreeTypeFont:
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))


def _sheet(images: list[Any], texts: list[str]) -> Image.Image:
    """Images in rows, each with a line of text under it."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = EDGE + GAP, EDGE + TEXT + GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), _font(13)
    for place, (image, text) in enumerate(zip(images, texts, strict=True)):
        left, top = GAP + place % columns * width, GAP + place // columns * height
        small = ImageOps.contain(Image.fromarray(image), (EDGE, EDGE))
        sheet.paste(small, (left + (EDGE - small.width) // 2, top + (EDGE - small.height) // 2))
        line = visible(text)
        if font.getname() == _own_font(13).getname():  # which has plain letters alone
            apart = unicodedata.normalize("NFKD", line)
            line = "".join(c for c in apart if not unicodedata.combining(c))
        while draw.textlength(line, font) > EDGE:
            line = f"{line.rstrip('…')[:-1]}…"
        draw.text((left + EDGE // 2, top + EDGE + 2), line, "black", font, anchor="ma")
    return sheet
