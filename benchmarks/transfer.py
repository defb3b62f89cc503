"""How well and how fast does a cut VGG16 learn CIFAR-10: our loop and Keras fit, one row each.

    python benchmarks/transfer.py DATA WEIGHTS                          # every row
    python benchmarks/transfer.py DATA WEIGHTS --only "oxford, block5_pool multilevel, ours"
    python benchmarks/transfer.py DATA WEIGHTS --peers                  # beside fastai and timm
    python benchmarks/transfer.py DATA WEIGHTS --fold 1                 # other images to test on
    python benchmarks/transfer.py DATA WEIGHTS --heads                  # which head, by folds alone
    python benchmarks/transfer.py DATA WEIGHTS --cache                  # an epoch with it, without

DATA has train/ and test/ with a folder for each class; images are enlarged to 96x96. A fifth of
train/ is held out and chooses the best epoch; test/ is scored once, at the end, by those weights.
Each row runs in a process of its own, whose peak memory is reported. `--fold` 1, 2 and 3 test on a
third of the images in train/ each, and train on all others: a check of settings that were chosen
while looking at test/. `--heads` compares heads by those thirds without ever opening test/: pooled
features of the frozen network are computed once, and each head is trained on two thirds of them.

`--peers` has three rows, each as its documentation has it, on the same images, size and weights:
`vt.finetune(model, DATA)`; fastai's `vision_learner(...).fine_tune(epochs)`; and, with timm, a
linear probe: a logistic regression (scikit-learn) on the standardised pooled features of the frozen
network, whose strength of regularization the held-out images choose. The latter two hold out a
fifth of train/, `vt.finetune` a tenth where a class has 200 to 499 images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import harness
import keras
import numpy as np
import torch
import torchvision
from torch.utils.data import TensorDataset

from vggtorch.models import remember_
from vggtorch.training.config import TrainConfig
from vggtorch.training.data import (
    Folder,
    as_input,
    hold_out,
    in_order,
    read_folder,
    shuffled,
)
from vggtorch.training.heads import with_head
from vggtorch.training.loop import finetune
from vggtorch.training.optimization import learning_rate
from vggtorch.weight_sets import WEIGHT_SETS

SIZE = 96
ROWS = ("block2_pool tutorial", "block4_pool mlp", "block5_pool multilevel")
PEERS = ("oxford, defaults, ours", "oxford, fine_tune, fastai", "oxford, linear probe, timm")
FOLDS = 3


def refold(data: Path, fold: int, target: Path) -> Path:
    """A folder of links to the images of `data`, with every third one of train/ in test/ instead.

    `fold`, from 1 to FOLDS, says which; the images of test/ go to train/.
    """
    for part in ("train", "test"):
        for folder in sorted(path for path in (data / part).iterdir() if path.is_dir()):
            for i, image in enumerate(sorted(folder.iterdir())):
                tested = part == "train" and i % FOLDS == fold - 1
                link = target / ("test" if tested else "train") / folder.name / image.name
                link.parent.mkdir(parents=True, exist_ok=True)
                link = link.with_stem(f"{part}-{image.stem}")
                link.symlink_to(image.resolve())
    return target


def configuration(epochs: int, folder: str) -> TrainConfig:
    return TrainConfig(
        epochs=epochs, batch_size=64, label_smoothing=0.1, image_size=SIZE, augment="flip",
        cache_copies=2, cache_dtype="float16", output_dir=folder,
    )  # fmt: skip


def network(weights: str, row: str, classes: int) -> keras.Model:
    """A frozen VGG16, `random` or with `oxford` weights from a file, under a new head."""
    keras.utils.set_random_seed(0)
    base = vt.VGG16(
        include_top=False, weights=None if weights == "random" else weights,
        input_shape=(SIZE, SIZE, 3),
    )  # fmt: skip
    remember_(base, "oxford")
    for layer in base.layers:
        layer.trainable = False
    cut, head = row.split()
    return with_head(base, TrainConfig(cut=cut, head=head), classes)  # type: ignore[arg-type]


def keras_fit(model: keras.Model, train: Folder, test: Folder, config: TrainConfig) -> float:
    """The same images, optimizer, schedule and loss; Keras runs the frozen layers every time."""
    plan = shuffled(len(train), config.batch_size, config.seed)
    steps, classes = config.epochs * len(plan(0)), len(train.classes)

    class Schedule(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step: torch.Tensor) -> float:
            return learning_rate(config, int(step), steps)

        def get_config(self) -> dict:
            return {}

    class Batches(keras.utils.PyDataset):
        def __init__(self, epoch: int) -> None:
            super().__init__()
            self.keys = [[(i, (i + epoch) % 2) for i in batch] for batch in plan(epoch)]

        def __len__(self) -> int:
            return len(self.keys)

        def __getitem__(self, i: int) -> tuple[torch.Tensor, np.ndarray]:
            images, labels = train[self.keys[i]]
            return as_input(images, "oxford"), keras.utils.to_categorical(labels, classes)

    model.compile(
        keras.optimizers.AdamW(Schedule(), weight_decay=config.weight_decay, epsilon=1e-8),
        keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing),
    )
    for epoch in range(config.epochs):
        model.fit(Batches(epoch), verbose=0)
    right = 0
    for keys in in_order(len(test), config.batch_size):
        images, labels = test[keys]
        found = model.predict_on_batch(as_input(images, "oxford")).argmax(1)
        right += int((found == labels.numpy()).sum())
    return right / len(test)


def measure(
    data: Path, weights: str, row: str, by: str, epochs: int, fold: int
) -> dict[str, float]:
    """One row, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        data = refold(data, fold, Path(folder, "fold")) if fold else data
        began = time.perf_counter()
        if row == "defaults":
            accuracy = by_defaults(data, weights, folder)
        elif row == "fine_tune":
            accuracy = by_fastai(data, weights, epochs)
        elif row == "linear probe":
            accuracy = by_timm(data, weights)
        else:
            config = configuration(epochs, folder)
            train = read_folder(data / "train", SIZE, config.augment)
            model = network(weights, row, len(train.classes))
            if by == "ours":
                tested = finetune(model, data, config=config).test_evaluation
                assert tested is not None
                accuracy = tested.accuracy
            else:
                train, _ = hold_out(train, config.validation_split)  # what ours trains on
                accuracy = keras_fit(model, train, read_folder(data / "test", SIZE), config)
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"accuracy": accuracy, "seconds": seconds, "peak_mib": peak}


def torchvision_vgg16(weights: str) -> torchvision.models.VGG:
    """VGG16 as torchvision has it, with `oxford` convolutions for RGB from 0 to 255 less a mean."""
    network = torchvision.models.vgg16(weights=None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "vgg16.pth")
        base = vt.VGG16(include_top=False, weights=weights, input_shape=(SIZE, SIZE, 3))
        vt.save_weights(base, path)
        network.features.load_state_dict(
            {k.removeprefix("features."): v for k, v in torch.load(path).items()}
        )
    first = network.features[0].weight
    first.data = first.data.flip(1)  # the file's own order is BGR
    return network


def _statistics() -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of RGB from 0 to 1 that give what those convolutions expect."""
    blue, green, red = WEIGHT_SETS["oxford"].mean
    return (red / 255, green / 255, blue / 255), (1 / 255,) * 3


def by_defaults(data: Path, weights: str, folder: str) -> float:
    """One call that sets nothing but where the run goes."""
    model = vt.VGG16(include_top=False, weights=weights, input_shape=(SIZE, SIZE, 3))
    tested = vt.finetune(model, data, output_dir=folder).test_evaluation
    assert tested is not None
    return tested.accuracy


def by_fastai(data: Path, weights: str, epochs: int) -> float:
    """As fastai's course and documentation train on a folder of photographs."""
    from fastai.vision import all as fastai

    fastai.set_seed(0)
    images = fastai.ImageDataLoaders.from_folder(
        data / "train", valid_pct=0.2, seed=0, bs=64, num_workers=0,
        item_tfms=fastai.Resize(SIZE),
        batch_tfms=[*fastai.aug_transforms(), fastai.Normalize.from_stats(*_statistics())],
    )  # fmt: skip

    def vgg16(pretrained: bool = True) -> torch.nn.Module:
        return torchvision_vgg16(weights)

    learner = fastai.vision_learner(images, vgg16, metrics=fastai.accuracy)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(epochs)
        files = fastai.get_image_files(data / "test")
        found = learner.get_preds(dl=images.test_dl(files, num_workers=0))[0].argmax(1)
    names = [images.vocab[int(i)] for i in found]
    return float(np.mean([n == f.parent.name for n, f in zip(names, files, strict=True)]))


def by_timm(data: Path, weights: str) -> float:
    """A linear probe on the features that timm's `forward_features` gives, pooled."""
    import timm
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    network: Any = timm.create_model("vgg16", pretrained=False).eval()
    network.features.load_state_dict(torchvision_vgg16(weights).features.state_dict())
    mean, std = _statistics()
    transform = timm.data.create_transform(
        input_size=(3, SIZE, SIZE), mean=mean, std=std, interpolation="bilinear", crop_pct=0.875
    )
    features, labels = {}, {}
    for part in ("train", "test"):
        images = torchvision.datasets.ImageFolder(data / part, transform)
        pooled = []
        with torch.no_grad():
            for batch, _ in torch.utils.data.DataLoader(images, batch_size=64):
                pooled.append(network.forward_features(batch).mean((2, 3)))
        features[part], labels[part] = torch.cat(pooled).numpy(), np.array(images.targets)
    held = np.zeros(len(labels["train"]), bool)
    held[np.random.default_rng(0).permutation(len(held))[: len(held) // 5]] = True
    x, y = features["train"], labels["train"]
    probes = [
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(
            x[~held], y[~held]
        )
        for c in (1e-4, 1e-3, 1e-2, 1e-1, 1)
    ]
    best = max(probes, key=lambda probe: probe.score(x[held], y[held]))
    return float(best.score(features["test"], labels["test"]))


HEADS = (  # the pools whose maps a head stands on, and its kind
    ("linear", (5,)), ("linear", (4,)), ("mlp", (5,)), ("mlp", (4,)), ("mlp", (4, 5)),
    ("linear", (3, 4, 5)), ("mlp", (3, 4, 5)), ("mlp", (2, 3, 4, 5)),
)  # fmt: skip


def heads(data: Path, weights: str, epochs: int) -> None:
    """Accuracy of each head on thirds of train/, trained on the other two; test/ isn't opened."""
    source = read_folder(data / "train", SIZE, "flip")
    base = vt.VGG16(include_top=False, weights=weights, input_shape=(SIZE, SIZE, 3))
    names = [f"block{block}_pool" for block in (2, 3, 4, 5)]
    network = vt.to_torch(vt.truncate(base, names)).eval()
    pooled: dict[int, list[torch.Tensor]] = {block: [] for block in (2, 3, 4, 5)}
    for copy in (0, 1):
        parts: dict[int, list[torch.Tensor]] = {block: [] for block in pooled}
        for keys in in_order(len(source), 50, copy):
            with torch.no_grad():
                maps = network(as_input(source[keys][0], "oxford"))
            for block, x in zip(pooled, maps, strict=True):
                parts[block].append(torch.cat([x.mean((1, 2)), x.amax((1, 2))], 1))
        for block, found in parts.items():
            pooled[block].append(torch.cat(found))
    labels = torch.tensor(source.labels)
    place = torch.zeros_like(labels)
    for label in range(len(source.classes)):
        members = (labels == label).nonzero()[:, 0]
        place[members] = torch.arange(len(members)) % FOLDS
    for kind, blocks in HEADS:
        x = [torch.cat([pooled[block][copy] for block in blocks], 1) for copy in (0, 1)]
        accuracies = [
            _head_accuracy(kind, x, labels, place == fold, epochs) for fold in range(FOLDS)
        ]
        print(
            f"{kind:6} on the pools of blocks {', '.join(map(str, blocks)):10}  "
            f"{np.mean(accuracies):.3f} ({', '.join(f'{value:.3f}' for value in accuracies)})",
            flush=True,
        )


def _head_accuracy(
    kind: str, x: list[torch.Tensor], labels: torch.Tensor, held: torch.Tensor, epochs: int
) -> float:
    """Train a head as `finetune` does on all but the held images; its accuracy on those."""
    torch.manual_seed(0)
    nn, inputs, classes = torch.nn, x[0].shape[1], int(labels.max()) + 1

    def norm(width: int) -> torch.nn.Module:
        return nn.BatchNorm1d(width, eps=1e-5, momentum=0.1)

    deep = [nn.Dropout(0.25), nn.Linear(inputs, 512), nn.ReLU(), norm(512), nn.Dropout(0.5)]
    hidden = deep if kind == "mlp" else []
    head = nn.Sequential(norm(inputs), *hidden, nn.Linear(512 if hidden else inputs, classes))
    config = configuration(epochs, "")
    groups = [
        {"params": [p for p in head.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in head.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    members = (~held).nonzero()[:, 0]
    plan = shuffled(len(members), config.batch_size, 0)
    steps = itertools.count()
    for epoch in range(epochs):
        head.train()
        for some in plan(epoch):
            batch = members[some]
            copies = torch.stack([x[0][batch], x[1][batch]])
            features = copies[(batch + epoch) % 2, torch.arange(len(batch))]
            rate = learning_rate(config, next(steps), epochs * len(plan(0)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = nn.functional.cross_entropy(head(features), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        right = head.eval()(x[0][held]).argmax(1) == labels[held]
    return float(right.double().mean())


def cache(data: Path, weights: str, epochs: int) -> None:
    """Seconds of an epoch at block4_pool with the feature cache and without, on 300 images."""
    source = read_folder(data / "test", SIZE)
    chosen = [(index, 0) for index in range(0, len(source), len(source) // 300)]
    train = TensorDataset(*source[chosen])
    losses: list[list[float]] = []
    seconds: list[list[float]] = []
    for use in (True, False, True, False):
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(epochs=epochs, batch_size=60, cache=use, output_dir=folder)
            model = network(weights, "block4_pool linear", len(source.classes))
            history = finetune(model, train, None, config)
        losses.append([epoch["loss"] for epoch in history.epochs])
        seconds.append([epoch["seconds"] for epoch in history.epochs[1:]])
        np.testing.assert_allclose(losses[0], losses[-1], rtol=1e-3)
    with_cache, without = seconds[0] + seconds[2], seconds[1] + seconds[3]
    print(
        f"{len(train)} images, an epoch after the first, median of {len(with_cache)}: "
        f"cached {np.median(with_cache):.4f} s ({min(with_cache):.4f} to {max(with_cache):.4f}), "
        f"not cached {np.median(without):.2f} s ({min(without):.2f} to {max(without):.2f}), "
        f"{np.median(without) / np.median(with_cache):.0f} times"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", help="`oxford`, or a file that holds it")
    parser.add_argument("--epochs", type=int, default=30, help="(default: 30)")
    parser.add_argument("--keras-epochs", type=int, default=3, help="(default: 3)")
    parser.add_argument(
        "--peer-epochs",
        type=int,
        default=5,
        help="of fine_tune, after one of the head (default: 5)",
    )
    parser.add_argument("--only", metavar="ROW", help="one row, by its name")
    parser.add_argument("--peers", action="store_true", help="our defaults, fastai's and timm's")
    parser.add_argument(
        "--fold", type=int, default=0, choices=range(FOLDS + 1),
        help="which third of train/ to test on, 1 to 3 (default: 0, test/)",
    )  # fmt: skip
    parser.add_argument("--heads", action="store_true", help="compare heads on thirds of train/")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cache", action="store_true", help="time an epoch with and without cache")
    arguments = parser.parse_args()
    if arguments.heads:
        heads(arguments.data, arguments.weights, arguments.epochs)
        return
    if arguments.cache:
        cache(arguments.data, arguments.weights, epochs=4)
        return
    rows = itertools.product(("oxford", "random"), ROWS, ("ours", "fit"))
    names = list(PEERS) if arguments.peers else [", ".join(row) for row in rows]
    if arguments.only is not None and arguments.only not in (*PEERS, *names):
        parser.error(f"no row {arguments.only!r}; expected one of: {'; '.join((*PEERS, *names))}")
    if arguments.row:
        which, row, by = arguments.only.split(", ")
        weights = arguments.weights if which == "oxford" else "random"
        print(
            json.dumps(measure(arguments.data, weights, row, by, arguments.epochs, arguments.fold))
        )
        return
    print(harness.header(torch.device("cpu")))
    for name in [arguments.only] if arguments.only else names:
        by = name.split(", ")[-1]
        epochs = {"fit": arguments.keras_epochs, "fastai": arguments.peer_epochs}.get(
            by, arguments.epochs
        )
        process = subprocess.run(
            [sys.executable, __file__, arguments.data, arguments.weights, "--row", "--only", name,
             "--epochs", str(epochs), "--fold", str(arguments.fold)],
            stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        found = json.loads(process.stdout.splitlines()[-1])
        often = f"{epochs:3} epochs" if name not in PEERS or by == "fastai" else " " * 10
        print(
            f"{name:36} {often}  accuracy {found['accuracy']:.3f}  "
            f"{found['seconds']:6.0f} s  peak {found['peak_mib']:5.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
