"""What pretrained layers bring, in a few minutes on a CPU: real weights, real photographs, a page.

The tutorial's three examples (load, cut and stack, replace) with a measure for each, the network
compressed, and its speed on this machine. Everything that is drawn from is in packages: the
photographs of scikit-image and scikit-learn, and the weights of a package index.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import keras
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

import vggtorch as vt
from vggtorch import files
from vggtorch.measuring import in_turns

SIZE = 64  # of a crop, in pixels
SHORT_SIDE = 256  # of a photograph before it is cropped
PER_PICTURE = 20  # crops of each half
DEPTHS = ("block2_pool", "block3_pool", "block4_pool")
CUT = "block3_pool"
EPOCHS = 8
REPLACED_SIZE = 64  # of the colour crops on which the replacement is measured
UNLABELLED = 10  # crops of each photograph to distil on
DISTILL_STEPS, DISTILL_SECONDS = 150, 80.0  # whichever ends first
BENCH_SIZE = 224
EASIEST_FIRST = ("oxford", "imagenet")  # weight sets; a package index carries the first
COMPRESS_TIMES, COMPRESS_STEPS, COMPRESS_SECONDS = 2, 60, 70.0
STEPS = 6


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        weight_set: the pretrained weights.
        pretrained, random: accuracy of a linear classifier on test crops, by the pool whose
            features it has: those of the pretrained layers, and of the same layers with random
            weights.
        fitted: accuracy of the tutorial's network, which was cut, stacked, frozen and fitted.
        similarity: cosine of block5_pool's features to the original network's after the
            replacement, by how the new layer got its weights.
        compressed: cosine of block5_pool's features after compressing, and how many times as fast
            the smaller network runs here.
        milliseconds: of one prediction on this machine, by who runs it.
        page: the HTML file that shows it all.
    """

    weight_set: str
    pretrained: dict[str, float]
    random: dict[str, float]
    fitted: float
    similarity: dict[str, float]
    compressed: tuple[float, float]
    milliseconds: dict[str, float]
    page: Path


# Photographs


def photographs() -> dict[str, Image.Image]:
    """The sixteen photographs: scikit-image's own, and scikit-learn's two."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    names = (
        "astronaut brick camera chelsea clock coffee coins grass gravel hubble_deep_field "
        "immunohistochemistry moon rocket"
    )
    arrays = {name: getattr(data, name)() for name in names.split()}
    arrays["motorcycle"] = data.stereo_motorcycle()[0]
    arrays["china"], arrays["flower"] = load_sample_images().images
    return {name: Image.fromarray(array) for name, array in arrays.items()}


def _crops(photo: Image.Image, half: int, size: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """Squares of one half of a photograph: 0 is the left one, 1 the right one."""
    scale = SHORT_SIDE / min(photo.size)
    pixels = np.asarray(photo.resize((round(photo.width * scale), round(photo.height * scale))))
    middle = pixels.shape[1] // 2
    pixels = pixels[:, middle:] if half else pixels[:, :middle]
    rng = np.random.default_rng([seed, half])
    for _ in range(count):
        top = rng.integers(pixels.shape[0] - size + 1)
        left = rng.integers(pixels.shape[1] - size + 1)
        yield pixels[top : top + size, left : left + size]


def _task(photos: Mapping[str, Image.Image], half: int) -> tuple[np.ndarray, np.ndarray]:
    """Grey crops (N, SIZE, SIZE, 3) of 0 to 255, and which photograph each is from.

    Each crop has the same mean and deviation, so that brightness and contrast give nothing away.
    """
    images, labels = [], []
    for label, photo in enumerate(photos.values()):
        for crop in _crops(photo.convert("L"), half, SIZE, PER_PICTURE, seed=label):
            grey = (crop - crop.mean()) / (crop.std() + 1e-6)
            images.append(np.repeat(np.clip(128 + 48 * grey, 0, 255)[..., None], 3, axis=-1))
            labels.append(label)
    return np.stack(images).astype("float32"), np.array(labels)


def _coloured(photos: Mapping[str, Image.Image], half: int, count: int) -> np.ndarray:
    """Colour crops without labels, (N, REPLACED_SIZE, REPLACED_SIZE, 3) of 0 to 255."""
    crops = [
        crop
        for label, photo in enumerate(photos.values())
        for crop in _crops(photo.convert("RGB"), half, REPLACED_SIZE, count, seed=label)
    ]
    return np.stack(crops)


# What is measured


def _by_depth(
    model: keras.Model, weight_set: str, data: tuple[np.ndarray, ...], what: str
) -> dict[str, float]:
    """Accuracy of a logistic regression on the means of each pool's maps."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train_images, train_labels, test_images, test_labels = data
    extractor = vt.FeatureExtractor(
        model, DEPTHS, normalization=weight_set, value_range=(0, 255), data_format="channels_last"
    )
    images = torch.from_numpy(np.concatenate([train_images, test_images]))
    found: dict[str, list[torch.Tensor]] = {tap: [] for tap in DEPTHS}
    with torch.inference_mode():
        for batch in track(images.split(32), f"{what:19}", transient=False):
            for tap, maps in extractor(batch).items():
                found[tap].append(maps.mean((1, 2)))
    accuracy = {}
    for tap, parts in found.items():
        values = torch.cat(parts).numpy()
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        classifier.fit(values[: len(train_labels)], train_labels)
        accuracy[tap] = float(classifier.score(values[len(train_labels) :], test_labels))
    return accuracy


def _fit(base: keras.Model, weight_set: str, data: tuple[np.ndarray, ...]) -> float:
    """Cut, stack, freeze, compile and fit, as in the tutorial; the accuracy on test crops."""
    train_images, train_labels, test_images, test_labels = data
    head = [
        keras.layers.GlobalAveragePooling2D(),
        # Pretrained features have very different scales; so few steps need a short memory of them.
        keras.layers.BatchNormalization(momentum=0.8),
        keras.layers.Dense(int(train_labels.max()) + 1, activation="softmax"),
    ]
    model = vt.freeze_(vt.stack(vt.truncate(base, CUT), head), until=CUT)
    vt.accelerate_(model)  # the same Keras model and the same results, sooner
    model.compile(
        keras.optimizers.Adam(1e-2), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    model.fit(vt.preprocess(train_images, weight_set), train_labels, batch_size=32, epochs=EPOCHS)
    test = vt.preprocess(test_images, weight_set)
    return float(model.evaluate(test, test_labels, batch_size=32, verbose=0)[1])


def _likeness(original: keras.Model, other: keras.Model, images: np.ndarray) -> float:
    """Mean cosine between the last maps that two networks have of the same images."""
    maps = (model.predict(images, verbose=0) for model in (original, other))
    a, b = (torch.from_numpy(values).flatten(1) for values in maps)
    return float(torch.cosine_similarity(a, b).mean())


def _replace(
    original: keras.Model, unlabelled: np.ndarray, held_out: np.ndarray, console: Console
) -> tuple[dict[str, float], str]:
    """How alike block5_pool is after one 5x5 took the place of two convolutions; a drawing."""
    names = ["block1_conv1", "block1_conv2"]
    similarity = {}
    for how in ("random", "composed", "distilled"):
        with console.status(f"one 5x5 for two 3x3, {how}"):
            conv = keras.layers.Conv2D(64, 5, padding="same", activation="relu", name="block1_conv")
            replaced = vt.replace(
                original, names, conv, init=None if how == "random" else "compose"
            )
            if how == "distilled":
                vt.distill_(
                    original, replaced, "block1_conv", unlabelled,
                    steps=DISTILL_STEPS, seconds=DISTILL_SECONDS,
                )  # fmt: skip
            similarity[how] = _likeness(original, replaced, held_out)
        console.print(f"{how:10} cosine {similarity[how]:.3f}")
    bottom = vt.truncate(original, "block2_pool")
    return similarity, vt.draw(vt.truncate(replaced, "block2_pool"), before=bottom)


def _compress(
    original: keras.Model, unlabelled: np.ndarray, held_out: np.ndarray
) -> tuple[float, float]:
    """How alike block5_pool is with half the multiply-adds, and how many times as fast it runs."""
    small, _ = vt.compress(
        original, COMPRESS_TIMES, unlabelled, steps=COMPRESS_STEPS, seconds=COMPRESS_SECONDS
    )
    images = torch.from_numpy(held_out[:8])
    networks = {name: vt.to_torch(m).eval() for name, m in (("a", original), ("b", small))}
    with torch.inference_mode():
        before, after = in_turns(
            {name: partial(network, images) for name, network in networks.items()},
            repeats=9,
            device=images.device,
        ).values()
    ratios = [a / b for a, b in zip(before, after, strict=True)]
    return _likeness(original, small, held_out), statistics.median(ratios)


def _speed(model: keras.Model) -> dict[str, float]:
    """Milliseconds of a prediction for one image: stock Keras, and the network that we run."""
    frozen = vt.truncate(model, "block5_pool")
    frozen.trainable = False  # then inference alone is timed
    return {
        way.name: 1000 * statistics.median(way.seconds)
        for way in vt.bench(frozen, batch=1, size=BENCH_SIZE, repeats=5).inference
    }


# The page


def _picture(image: np.ndarray | Image.Image, size: int) -> str:
    """An image as a tag that holds it."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image.astype("uint8"))
    buffer = io.BytesIO()
    picture.convert("RGB").resize((size, size)).save(buffer, "JPEG", quality=85)
    code = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="{size}" height="{size}" alt="" src="data:image/jpeg;base64,{code}">'


def _bars(values: Mapping[str, float], form: str, largest: float | None = None) -> str:
    """Horizontal bars with their figures, SVG."""
    largest = largest or max(values.values())
    parts = []
    for place, (name, value) in enumerate(values.items()):
        y, colour = 26 * place, "#9aa5a3" if "random" in name or name == "Keras" else "#00897b"
        parts.append(
            f'<text x="150" y="{y + 15}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect x="158" y="{y}" width="{max(1, 250 * value / largest):.0f}" height="20" '
            f'fill="{colour}"/><text x="{164 + max(1, 250 * value / largest):.0f}" y="{y + 15}">'
            f"{form.format(value)}</text>"
        )
    return (
        f'<svg viewBox="0 0 470 {26 * len(values)}" width="700" font-family="sans-serif" '
        f'font-size="13" fill="currentColor">{"".join(parts)}</svg>'
    )


STYLE = (
    ":root{color-scheme:light dark;--ink:#222;--page:#fff}"
    "@media(prefers-color-scheme:dark){:root{--ink:#e6e9ec;--page:#15181b}}"
    "body{font:16px/1.5 system-ui,sans-serif;max-width:900px;margin:2em auto;padding:0 1em;"
    "color:var(--ink);background:var(--page)}"
    "svg{max-width:100%;height:auto}img{border-radius:3px;margin:1px}.big{font-size:1.3em}"
    ".drawing{background:#fff;border-radius:4px}"
    "figure{display:inline-block;margin:.3em;text-align:center;font-size:.75em}"
)


def _page(
    result: DemoResult, photos: Mapping[str, Image.Image], crops: np.ndarray, drawing: str
) -> str:
    """All of it as one HTML page that holds its pictures itself."""
    gain = 100 * (result.pretrained[CUT] - result.random[CUT])
    shown = "".join(
        f"<figure>{_picture(photo, 88)}{_picture(crops[i * PER_PICTURE], 44)}<br>"
        f"{html.escape(name.replace('_', ' '))}</figure>"
        for i, (name, photo) in enumerate(photos.items())
    )
    depths = {
        f"{tap}, {kind}": values[tap]
        for tap in DEPTHS
        for kind, values in (("pretrained", result.pretrained), ("random", result.random))
    }
    times = result.milliseconds
    alike, as_fast = result.compressed
    faster = times["Keras"] / times["vggtorch"]
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>vggtorch</title><style>{STYLE}</style>
<h1>What pretrained layers bring</h1>
<p class="big">{len(photos)} photographs, {PER_PICTURE} small grey crops of the left half of each to
learn from. Which photograph is a crop of the right half from? Layers pretrained on ImageNet
(<code>{result.weight_set}</code>) say so in {result.pretrained[CUT]:.0%} of cases, the same layers
with random weights in {result.random[CUT]:.0%}: {gain:+.0f} points.</p>
<div>{shown}</div>
<h2>How deep to cut</h2>
<p>A linear classifier on the means of each pool's maps; accuracy on {len(crops)} crops that it has
not seen. Guessing gives {1 / len(photos):.0%}.</p>
{_bars(depths, "{:.2f}", 1)}
<p>The tutorial's way, in Keras: cut at <code>{CUT}</code>, stack a head, freeze, compile,
<code>fit</code> for {EPOCHS} epochs: {result.fitted:.2f}.</p>
<h2>Two layers replaced by one</h2>
<p>One 5x5 convolution takes the place of two of 3x3, and all other layers keep their weights. How
alike what the last pool sees is to what it saw before (cosine, held-out crops):</p>
{_bars(result.similarity, "{:.3f}", 1)}
<p>Composed: the product of the two kernels. Distilled: then trained alone, on crops without
labels.</p>
<div class="drawing">{drawing}</div>
<h2>Compressed</h2>
<p><code>vt.compress(model, {COMPRESS_TIMES}, images)</code> on the same crops, without labels: the
network with 1/{COMPRESS_TIMES} of the multiply-adds has a cosine of {alike:.3f} to the original at
the last pool, on crops that it has not seen, and runs {as_fast:.2f} times as fast here.</p>
<h2>Speed</h2>
<p>One image of {BENCH_SIZE}x{BENCH_SIZE} through VGG16's convolutions on this machine, in
milliseconds (shorter is better): {faster:.1f} times as fast as stock Keras on torch.</p>
{_bars(times, "{:.0f} ms")}
<h2>Next</h2>
<p>The README has your own photographs in four commands, and <code>make docs</code> builds the
pages on surgery, compression, features and torch's tools.</p>
</html>
"""


# All of it


def _best_weights(console: Console) -> str:
    """The first weight set that can be had here."""
    reasons = []
    for name in EASIEST_FIRST:
        try:
            with console.status(f"Getting the {name} weights"):
                vt.VGG16(weights=name, include_top=False)
        except OSError as error:
            reasons.append(f"{name}: {error}")
        else:
            console.print(f"Pretrained weights: [bold]{name}[/]")
            return name
    raise OSError("No pretrained weights can be had. " + " ".join(reasons))


@contextmanager
def _step(console: Console, number: int, title: str) -> Iterator[None]:
    """A headline with how far the demo is, and at the end how long the step took."""
    console.rule(f"{number} of {STEPS}  {title}")
    start = time.monotonic()
    yield
    console.print(f"[dim]{time.monotonic() - start:.0f} s[/]")


def run(page: str | Path = "vggtorch-demo.html") -> DemoResult:
    """Show what pretrained layers bring: prints as it goes, and writes an HTML page at the end.

    Deterministic for given weights and versions, but for the times.

    Args:
        page: where the page is written.

    Raises:
        ImportError: scikit-learn or scikit-image, the extra `demo`, is not installed.
        OSError: no pretrained weights can be had, or the page can't be written.
    """
    missing = [name for name in ("sklearn", "skimage") if not importlib.util.find_spec(name)]
    if missing:
        raise ImportError(
            f"The demo's images come from scikit-learn and scikit-image; not installed: "
            f"{', '.join(missing)}. Run pip install 'vggtorch[demo]'."
        )
    console = Console()
    keras.utils.set_random_seed(0)
    start = time.monotonic()
    console.print(f"{STEPS} steps, about five minutes on two cores")

    with _step(console, 1, "Load pretrained weights"):
        weight_set = _best_weights(console)
        pretrained = vt.VGG16(weights=weight_set, include_top=False)
        random = vt.VGG16(weights=None, include_top=False)
        console.print("Layers:", ", ".join(layer.name for layer in pretrained.layers))
        photos = photographs()
        train, test = _task(photos, 0), _task(photos, 1)

    with _step(console, 2, "Which photograph is a crop from? A linear classifier at three depths"):
        console.print(
            f"{len(photos)} photographs; {len(train[1])} grey crops of their left halves to learn "
            f"from, {len(test[1])} of their right halves to test"
        )
        by_pretrained = _by_depth(pretrained, weight_set, (*train, *test), "pretrained layers")
        by_random = _by_depth(random, weight_set, (*train, *test), "random layers")
        for tap in DEPTHS:
            console.print(
                f"{tap}: accuracy {by_pretrained[tap]:.2f}, random layers {by_random[tap]:.2f}"
            )

    with _step(console, 3, f"Cut at {CUT}, stack a head, freeze, compile, fit"):
        fitted = _fit(pretrained, weight_set, (*train, *test))
        console.print(f"accuracy on the right halves: {fitted:.2f}")

    with _step(console, 4, "Replace block1_conv1 and block1_conv2 by one 5x5 convolution"):
        shape = (REPLACED_SIZE, REPLACED_SIZE, 3)
        original = vt.VGG16(weights=weight_set, include_top=False, input_shape=shape)
        unlabelled = np.asarray(vt.preprocess(_coloured(photos, 0, UNLABELLED), weight_set))
        held_out = np.asarray(vt.preprocess(_coloured(photos, 1, 2), weight_set))
        similarity, drawing = _replace(original, unlabelled, held_out, console)

    with _step(console, 5, f"Compress: 1/{COMPRESS_TIMES} of the multiply-adds, seeing the same"):
        compressed = _compress(original, unlabelled, held_out)
        console.print(f"cosine {compressed[0]:.3f}, {compressed[1]:.2f} times as fast")

    with _step(console, 6, "Speed on this machine"), console.status("timing in turns"):
        milliseconds = _speed(pretrained)

    page = Path(page).resolve()
    result = DemoResult(
        weight_set, by_pretrained, by_random, fitted, similarity, compressed, milliseconds, page
    )
    files.write_text(page, _page(result, photos, test[0], drawing))
    console.print(_table(result))
    console.print(f"All of it with pictures: [bold]{page}[/] ({time.monotonic() - start:.0f} s)")
    return result


def _table(result: DemoResult) -> Table:
    table = Table("What was done", "Result")
    for tap in DEPTHS:
        table.add_row(
            f"accuracy on {tap}: pretrained, random layers",
            f"{result.pretrained[tap]:.2f}, {result.random[tap]:.2f}",
        )
    table.add_row(f"accuracy of the network cut at {CUT} and fitted", f"{result.fitted:.2f}")
    for how, cosine in result.similarity.items():
        table.add_row(f"likeness after a 5x5 for two 3x3, {how} (cosine)", f"{cosine:.3f}")
    table.add_row(
        f"likeness after compressing {COMPRESS_TIMES} times", f"{result.compressed[0]:.3f}"
    )
    table.add_row("speed-up measured", f"{result.compressed[1]:.2f}")
    for who, milliseconds in result.milliseconds.items():
        table.add_row(f"one image of {BENCH_SIZE}x{BENCH_SIZE}, {who}", f"{milliseconds:.0f} ms")
    return table
