"""One 5x5 for block1_conv1 and block1_conv2: how well the network still works, and what is gained.

    python benchmarks/replacement.py match        cosine to the original's maps, by layer
    python benchmarks/replacement.py curve        the same for other budgets, targets and layers
    python benchmarks/replacement.py probe DATA   accuracy of a linear probe on CIFAR-10
    python benchmarks/replacement.py speed        images each second at 224x224

The fit sees crops of `--photographs` (a folder, searched through); cosines are those of the
photographs in `--test`. By default both come out of the packages scikit-image and scikit-learn.
DATA holds `train/<class>/*.jpg` and `test/<class>/*.jpg`.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any, Literal

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import harness
import keras
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vggtorch import fitting, lowering

REPLACED = ["block1_conv1", "block1_conv2"]
POOLS = [f"block{b}_pool" for b in range(1, 6)]
SIZE = 224


def conv(outputs: int, size: int | tuple[int, int], name: str, **options: Any) -> keras.Layer:
    options = {"padding": "same", "activation": "relu"} | options
    return keras.layers.Conv2D(outputs, size, name=name, **options)


SHAPES = {
    "5x5": lambda: [conv(64, 5, "new")],
    "3x3": lambda: [conv(64, 3, "new")],
    "7x7": lambda: [conv(64, 7, "new")],
    "3x3 of 16, 3x3": lambda: [conv(16, 3, "new1"), conv(64, 3, "new2")],
    "5x5 of 32, 1x1": lambda: [conv(32, 5, "new1"), conv(64, 1, "new2")],
    "separable 5x5": lambda: [
        keras.layers.SeparableConv2D(
            64, 5, depth_multiplier=16, padding="same", activation="relu", name="new"
        )
    ],
}


def packaged() -> list[Image.Image]:
    """The colour photographs inside scikit-image and scikit-learn."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    names = ["astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"]
    folder = Path(skimage.data.__file__).parent
    photographs = [Image.open(folder / name) for name in names]
    return photographs + [Image.fromarray(image) for image in load_sample_images().images]


def photographs(folder: Path | None, *, test: bool) -> list[Image.Image]:
    """All of a folder; without one, every third of those in the packages is for testing."""
    if folder is None:
        return [image for i, image in enumerate(packaged()) if (i % 3 == 2) == test]
    suffixes = {".jpg", ".jpeg", ".png"}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    if not paths:
        raise SystemExit(f"{folder} holds no .jpg or .png: name a folder with photographs.")
    return [Image.open(path) for path in paths]


def resized(image: Image.Image, short: int) -> Image.Image:
    scale = short / min(image.size)
    width, height = (max(short, round(n * scale)) for n in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def random_crops(images: list[Image.Image], number: int, seed: int = 0) -> np.ndarray:
    """Squares of SIZE at random places and scales (short side 1 to 3 times SIZE), some mirrored."""
    rng, crops = np.random.default_rng(seed), []
    for i in range(number):
        image = images[i % len(images)]
        image = resized(image, round(rng.uniform(SIZE, max(SIZE, min(*image.size, 3 * SIZE)))))
        left, top = (int(rng.integers(n - SIZE + 1)) for n in image.size)
        crop = np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))
        crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return np.stack(crops)


def centres(images: list[Image.Image]) -> np.ndarray:
    """Short side 256, the middle SIZE: what the network is tested on."""
    crops = []
    for image in images:
        image = resized(image, 256)
        left, top = ((n - SIZE) // 2 for n in image.size)
        crops.append(np.asarray(image.crop((left, top, left + SIZE, top + SIZE))))
    return np.stack(crops)


def preprocessed(images: np.ndarray) -> np.ndarray:
    return np.asarray(vt.preprocess(images, "oxford"))


def maps(model: keras.Model, images: np.ndarray, names: list[str]) -> list[torch.Tensor]:
    module = lowering.lower(
        keras.Model(model.inputs, [model.get_layer(n).output for n in names])
    ).eval()
    device = next(module.parameters()).device
    with torch.no_grad():
        parts = [module(x.to(device)) for x in torch.from_numpy(images).split(16)]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def cosines(original: keras.Model, result: keras.Model, images: np.ndarray) -> list[float]:
    pairs = zip(maps(original, images, POOLS), maps(result, images, POOLS), strict=True)
    return [float(F.cosine_similarity(a.flatten(1), b.flatten(1)).mean()) for a, b in pairs]


def replaced(
    original: keras.Model, new: list[keras.Layer], init: Literal["compose"] | None
) -> keras.Model:
    keras.utils.set_random_seed(0)
    return vt.replace(original, REPLACED, new, init=init)


def fitted(
    original: keras.Model, new: list[keras.Layer], images: np.ndarray, **options: Any
) -> tuple[keras.Model, fitting.Fit]:
    result = replaced(original, new, None)
    return result, fitting.fit_(original, result, [a.name for a in new], images, **options)


def row(name: str, values: list[float], note: str = "") -> None:
    print(f"{name:<34}" + "".join(f"{value:>8.4f}" for value in values) + f"  {note}", flush=True)


def compare(original: keras.Model, shown: np.ndarray, unseen: np.ndarray, seconds: float) -> None:
    """The two convolutions replaced by one 5x5 in four ways."""
    print(f"{'cosine after block':<34}" + "".join(f"{b:>8}" for b in range(1, 6)))
    row("random", cosines(original, replaced(original, SHAPES["5x5"](), None), unseen))
    row("composed", cosines(original, replaced(original, SHAPES["5x5"](), "compose"), unseen))
    result, fit = fitted(original, SHAPES["5x5"](), shown, steps=10**6, seconds=seconds)
    note = f"{fit.seconds:.0f} s, {fit.steps} steps, from {fit.start}"
    row("fitted", cosines(original, result, unseen), note)


def curve(original: keras.Model, shown: np.ndarray, unseen: np.ndarray, seconds: float) -> None:
    """What more time, other maps to match and other layers bring; equal steps where not said."""
    print(f"{'cosine after block':<34}" + "".join(f"{b:>8}" for b in range(1, 6)))
    runs: list[tuple[str, str, dict[str, Any]]] = [
        *((f"5x5, {n} steps", "5x5", {"steps": n}) for n in (25, 100, 250, 1000)),
        *((f"5x5, match {POOLS[n - 1]} and before", "5x5", {"match": POOLS[:n], "steps": 100})
          for n in (1, 2, 4, 5)),
        *((f"{name}, 100 steps", name, {"steps": 100}) for name in SHAPES if name != "5x5"),
    ]  # fmt: skip
    for name, shape, options in runs:
        result, fit = fitted(original, SHAPES[shape](), shown, seconds=seconds, **options)
        note = f"{fit.seconds:.0f} s, {fit.steps} steps, from {fit.start}"
        row(name, cosines(original, result, unseen), note)


def cifar10(folder: Path, part: str, each: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of each class, enlarged to 96x96."""
    images, labels = [], []
    classes = sorted(path for path in (folder / part).glob("*") if path.is_dir())
    if not classes:
        raise SystemExit(f"{folder / part} holds no folders of classes: see --help for DATA.")
    for label, path in enumerate(classes):
        for file in sorted(path.glob("*.jpg"))[:each]:
            images.append(np.asarray(Image.open(file).resize((96, 96), Image.Resampling.BILINEAR)))
            labels.append(label)
    return np.stack(images), np.array(labels)


def probe(
    original: keras.Model, shown: np.ndarray, folder: Path, each: tuple[int, int], seconds: float
) -> None:
    """Logistic regression on the mean and maximum of block4_pool's channels."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sets = [cifar10(folder, "train", each[0]), cifar10(folder, "test", each[1])]
    networks = {
        "original": original,
        "random": replaced(original, SHAPES["5x5"](), None),
        "composed": replaced(original, SHAPES["5x5"](), "compose"),
        "fitted": fitted(original, SHAPES["5x5"](), shown, steps=10**6, seconds=seconds)[0],
    }
    print(f"{len(sets[0][1])} images to train on, {len(sets[1][1])} to test on")
    for name, network in networks.items():
        cut = vt.truncate(network, "block4_pool")
        features = []
        for images, _ in sets:
            (x,) = maps(cut, preprocessed(images), ["block4_pool"])
            features.append(torch.cat([x.mean((1, 2)), x.amax((1, 2))], 1).cpu().numpy())
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        classifier.fit(features[0], sets[0][1])
        print(f"{name:<12} accuracy {classifier.score(features[1], sets[1][1]):.3f}", flush=True)


def speed(original: keras.Model, images: np.ndarray, repeats: int) -> None:
    """Original and replaced in turn, each first checked against Keras."""
    networks = {
        "original": original,
        "one 5x5": replaced(original, SHAPES["5x5"](), "compose"),
    }
    modules = {name: lowering.lower(network).eval() for name, network in networks.items()}
    x = torch.from_numpy(images).to(next(modules["original"].parameters()).device)

    def run(module: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return module(x)

    for name, module in modules.items():
        expected = torch.as_tensor(networks[name].predict(images, verbose=0))
        torch.testing.assert_close(run(module).cpu(), expected.cpu(), rtol=1e-3, atol=1e-3)
    calls = {name: partial(run, module) for name, module in modules.items()}
    times = harness.in_turns(calls, repeats, x.device)
    print(f"batch {len(x)} | median ms | quartiles | times one 5x5")
    print("\n".join(harness.table(times, "one 5x5")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("question", choices=["match", "curve", "probe", "speed"])
    parser.add_argument("data", type=Path, nargs="?", help="CIFAR-10 as folders, for probe")
    parser.add_argument("--weights", default="oxford", help="weight set or file of VGG16")
    parser.add_argument("--photographs", type=Path, help="folder of photographs for the fit")
    parser.add_argument("--test", type=Path, help="folder of photographs that it doesn't see")
    parser.add_argument("--images", type=int, default=300, help="crops of 224x224 for the fit")
    parser.add_argument("--seconds", type=float, default=110.0, help="time for each fit")
    parser.add_argument(
        "--each",
        type=int,
        nargs=2,
        default=(200, 100),
        help="for probe: images of each class to train and to test on",
    )
    parser.add_argument("--batch", type=int, default=8, help="for speed")
    parser.add_argument("--repeats", type=int, default=10, help="for speed")
    args = parser.parse_args()
    if args.question == "probe" and args.data is None:
        parser.error("probe needs DATA, a folder with train/<class>/*.jpg and test/<class>/*.jpg")
    if (args.photographs is None) != (args.test is None):
        parser.error("--photographs and --test go together, so that no photograph is in both")

    original = vt.VGG16(weights=args.weights, include_top=False)
    print(harness.header(original.get_layer("block1_conv1").kernel.value.device))
    seen = photographs(args.photographs, test=False)
    unseen = preprocessed(centres(photographs(args.test, test=True)))
    shown = preprocessed(random_crops(seen, args.images))
    print(f"{args.images} crops of {len(seen)} photographs; tested on {len(unseen)} others")
    match args.question:
        case "match":
            compare(original, shown, unseen, args.seconds)
        case "curve":
            curve(original, shown, unseen, args.seconds)
        case "probe":
            probe(original, shown, args.data, tuple(args.each), args.seconds)
        case "speed":
            speed(original, np.resize(unseen, (args.batch, *unseen.shape[1:])), args.repeats)


if __name__ == "__main__":
    main()
