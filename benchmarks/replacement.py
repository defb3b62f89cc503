"""One 5x5 for block1_conv1 and block1_conv2: how well the network still works, and what is gained.

    python benchmarks/replacement.py match        cosine to the original's maps, by layer
    python benchmarks/replacement.py curve        the same for other budgets, losses and layers
    python benchmarks/replacement.py probe DATA   accuracy of a linear probe on CIFAR-10
    python benchmarks/replacement.py speed        images each second at 224x224

Distillation sees crops of `--photographs` (a folder, searched through); cosines are those of the
photographs in `--test`. By default both come out of the packages scikit-image and scikit-learn.
DATA holds `train/<class>/*.jpg` and `test/<class>/*.jpg`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
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

from vggtorch import surgery

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
    part = keras.Model(model.inputs, [model.get_layer(n).output for n in names])
    module = vt.to_torch(part).eval()
    device = next(module.parameters()).device
    with torch.no_grad():
        parts = [
            keras.tree.flatten(module(x.to(device))) for x in torch.from_numpy(images).split(16)
        ]
    return [torch.cat(part) for part in zip(*parts, strict=True)]


def cosines(original: keras.Model, result: keras.Model, images: np.ndarray) -> list[float]:
    pairs = zip(maps(original, images, POOLS), maps(result, images, POOLS), strict=True)
    return [float(F.cosine_similarity(a.flatten(1), b.flatten(1)).mean()) for a, b in pairs]


def replaced(
    original: keras.Model, shape: str, init: Literal["compose"] | None, seed: int = 0
) -> keras.Model:
    keras.utils.set_random_seed(seed)  # a layer's initializer draws its seed when it is made
    return vt.replace(original, REPLACED, SHAPES[shape](), init=init)


def distilled(
    original: keras.Model, shape: str, images: np.ndarray, **options: Any
) -> tuple[keras.Model, surgery.Distillation]:
    result = replaced(original, shape, None)
    known = {layer.name for layer in original.layers}
    new = [layer.name for layer in result.layers if layer.name not in known]
    return result, vt.distill_(original, result, new, images, **options)


def row(name: str, values: list[float], note: str = "") -> None:
    print(f"{name:<34}" + "".join(f"{value:>8.4f}" for value in values) + f"  {note}", flush=True)


def compare(
    original: keras.Model, shown: np.ndarray, unseen: np.ndarray, seconds: float, seeds: int
) -> None:
    """The two convolutions replaced by one 5x5 in four ways."""
    print(f"{'cosine after block':<34}" + "".join(f"{b:>8}" for b in range(1, 6)))
    row("composed", cosines(original, replaced(original, "5x5", "compose"), unseen))
    random, ours = [], []
    for seed in range(seeds):
        random.append(cosines(original, replaced(original, "5x5", None, seed), unseen))
        row(f"random, seed {seed}", random[-1])
        result, found = distilled(original, "5x5", shown, steps=10**6, seconds=seconds, seed=seed)
        note = f"{found.seconds:.0f} s, {found.steps} steps, from {found.start}"
        ours.append(cosines(original, result, unseen))
        row(f"distilled, seed {seed}", ours[-1], note)
    for name, values in (("random", random), ("distilled", ours)) if seeds > 1 else ():
        row(f"{name}, mean of {seeds}", np.mean(values, 0).tolist())
        row(f"{name}, largest less smallest", np.ptp(values, 0).tolist())


Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def weighted(distance: Distance, weights: tuple[int, ...] = (1, 3, 9)) -> surgery.Loss:
    """The distances of the maps, summed; by default with the weights that distillation has."""

    def loss(outputs: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
        pairs = zip(outputs, targets, strict=True)
        distances = torch.stack([distance(y, t) for y, t in pairs])
        return distances @ distances.new_tensor(weights)

    return loss


def absolute(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (y - target).abs().sum() / target.abs().sum()


def squared(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (y - target).square().sum() / target.square().sum()


def huber(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    size = target.square().mean().sqrt()
    return F.huber_loss(y / size, target / size)


def by_channel(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Each channel in units of its own size, those that are nearly silent aside."""
    size = target.square().mean((0, 2, 3))
    errors = (y - target).square().mean((0, 2, 3))
    return (errors / size.clamp_min(1e-3 * float(size.mean()))).mean()


def angle(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 1 - F.cosine_similarity(y.flatten(1), target.flatten(1)).mean()


def angle_by_position(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return 1 - F.cosine_similarity(y, target, dim=1).mean()


LOSSES = {
    "absolute error, maps alike": weighted(absolute, (1, 1, 1)),
    "squared error": weighted(squared),
    "squared error, maps alike": weighted(squared, (1, 1, 1)),
    "squared error, not relative": weighted(F.mse_loss, (1, 1, 1)),
    "Huber": weighted(huber),
    "squared error by channel": weighted(by_channel),
    "1 - cosine of maps": weighted(angle),
    "1 - cosine of positions": weighted(angle_by_position),
}


def curve(original: keras.Model, shown: np.ndarray, unseen: np.ndarray, seconds: float) -> None:
    """What more time, other maps to match, other losses and other layers bring.

    Each run takes 100 steps where nothing else is said.
    """
    print(f"{'cosine after block':<34}" + "".join(f"{b:>8}" for b in range(1, 6)))
    runs: list[tuple[str, str, dict[str, Any]]] = [
        *((f"5x5, {n} steps", "5x5", {"steps": n}) for n in (25, 100, 250, 1000)),
        *((f"match {POOLS[n - 1]} and before", "5x5", {"match": POOLS[:n]}) for n in (1, 2, 4, 5)),
        *((f"match {POOLS[n - 1]} alone", "5x5", {"match": POOLS[n - 1]}) for n in (3, 4)),
        *((name, "5x5", {"loss": loss}) for name, loss in LOSSES.items()),
        *((name, name, {}) for name in SHAPES if name != "5x5"),
    ]  # fmt: skip
    for name, shape, options in runs:
        options = {"steps": 100, "seconds": seconds} | options
        result, found = distilled(original, shape, shown, **options)
        note = f"{found.seconds:.0f} s, {found.steps} steps, from {found.start}"
        row(name, cosines(original, result, unseen), note)


Labelled = tuple[np.ndarray, np.ndarray]


def cifar10(folder: Path, each: Sequence[int]) -> tuple[Labelled, Labelled]:
    """The first images of each class, enlarged to 96x96 and preprocessed, and their labels.

    `each` says how many to train on, and how many to test on.
    """
    train, test = (
        _labelled(folder / part, n) for part, n in zip(("train", "test"), each, strict=True)
    )
    print(f"{len(train[1])} images to train on, {len(test[1])} to test on; +- standard error")
    return train, test


def _labelled(folder: Path, each: int) -> Labelled:
    images, labels = [], []
    classes = sorted(path for path in folder.glob("*") if path.is_dir())
    if not classes:
        raise SystemExit(f"{folder} holds no folders of classes: see --help for DATA.")
    for label, path in enumerate(classes):
        for file in sorted(path.glob("*.jpg"))[:each]:
            images.append(np.asarray(Image.open(file).resize((96, 96), Image.Resampling.BILINEAR)))
            labels.append(label)
    return preprocessed(np.stack(images)), np.array(labels)


def pooled(y: torch.Tensor) -> np.ndarray:
    """Mean and maximum of each channel of maps (N, H, W, C)."""
    return torch.cat([y.mean((1, 2)), y.amax((1, 2))], 1).cpu().numpy()


def probed(train: Labelled, test: Labelled) -> tuple[np.ndarray, float]:
    """On which test vectors a logistic regression is right, and its regularisation C.

    Five folds of the training vectors choose that.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        {"logisticregression__C": [1e-4, 1e-3, 1e-2, 1e-1]},
        cv=5,
    ).fit(*train)
    return search.predict(test[0]) == test[1], search.best_params_["logisticregression__C"]


ACCURACY = f"{'accuracy':>17}{'less original':>19}"


def accuracy(right: np.ndarray, original: np.ndarray) -> str:
    """The columns of ACCURACY, of who is right on which images."""
    less, error = right.astype(float) - original, len(right) ** -0.5
    return (
        f"{right.mean():>9.3f} +-{error * right.std():.3f}"
        f"{less.mean():>+11.3f} +-{error * less.std():.3f}"
    )


def probe(
    original: keras.Model, shown: np.ndarray, folder: Path, each: Sequence[int], seconds: float
) -> None:
    """Logistic regression on the mean and maximum of block4_pool's channels, by network."""
    (x, labels), (x_test, labels_test) = cifar10(folder, each)
    own = x[np.random.default_rng(0).permutation(len(x))[: len(shown)]]
    options = {"steps": 100, "seconds": seconds}
    networks: dict[str, keras.Model] = {
        "original": original,
        "random": replaced(original, "5x5", None),
        "composed": replaced(original, "5x5", "compose"),
        "distilled on photographs": distilled(original, "5x5", shown, **options)[0],
        "distilled on CIFAR-10": distilled(original, "5x5", own, **options)[0],
    }
    print(f"{'':<24}{ACCURACY}   C")
    right = {}
    for name, network in networks.items():
        vectors, others = (pooled(*maps(network, y, ["block4_pool"])) for y in (x, x_test))
        right[name], c = probed((vectors, labels), (others, labels_test))
        print(f"{name:<24}{accuracy(right[name], right['original'])}   {c:g}", flush=True)


def speed(
    networks: dict[str, keras.Model], images: np.ndarray, repeats: int, reference: str
) -> None:
    """All in turn, each first checked against Keras; by the time of the `reference`."""
    modules = {name: vt.to_torch(network).eval() for name, network in networks.items()}
    x = torch.from_numpy(images).to(next(modules[reference].parameters()).device)

    def run(module: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return module(x)

    for name, module in modules.items():
        expected = torch.as_tensor(networks[name].predict(images, verbose=0))
        torch.testing.assert_close(run(module).cpu(), expected, rtol=1e-3, atol=1e-2)
    calls = {name: partial(run, module) for name, module in modules.items()}
    times = harness.in_turns(calls, repeats, x.device)
    print(f"batch {len(x)} | median ms | quartiles | times {reference}")
    print("\n".join(harness.table(times, reference)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("question", choices=["match", "curve", "probe", "speed"])
    parser.add_argument("data", type=Path, nargs="?", help="CIFAR-10 as folders, for probe")
    parser.add_argument("--weights", default="oxford", help="weight set or file of VGG16")
    parser.add_argument("--photographs", type=Path, help="folder of photographs to distill on")
    parser.add_argument("--test", type=Path, help="folder of photographs that it doesn't see")
    parser.add_argument("--images", type=int, default=300, help="crops of 224x224 to distill on")
    parser.add_argument("--seeds", type=int, default=1, help="for match: how many runs")
    parser.add_argument("--seconds", type=float, default=110.0, help="time for each distillation")
    parser.add_argument(
        "--each",
        type=int,
        nargs=2,
        default=(300, 100),
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
            compare(original, shown, unseen, args.seconds, args.seeds)
        case "curve":
            curve(original, shown, unseen, args.seconds)
        case "probe":
            probe(original, shown, args.data, args.each, args.seconds)
        case "speed":
            both = {"original": original, "one 5x5": replaced(original, "5x5", "compose")}
            images = np.resize(unseen, (args.batch, *unseen.shape[1:]))
            speed(both, images, args.repeats, "one 5x5")


if __name__ == "__main__":
    main()
