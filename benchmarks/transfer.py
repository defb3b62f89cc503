"""How well and how fast does a cut VGG16 learn CIFAR-10: our loop and Keras fit, one row each.

    python benchmarks/transfer.py DATA WEIGHTS                          # every row
    python benchmarks/transfer.py DATA WEIGHTS --only "oxford block4_pool ours"
    python benchmarks/transfer.py DATA WEIGHTS --cache                  # an epoch with it, without

DATA has train/ and test/ with a folder for each class; images are enlarged to 96x96. Each row runs
in a process of its own, whose peak memory is reported. The accuracy is that after the last epoch,
so that nothing was chosen by looking at the test images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
import numpy as np
import torch
from PIL import Image

from vggtorch.config import TrainConfig
from vggtorch.data import read_folder, shuffled
from vggtorch.preprocessing import preprocess, remember_
from vggtorch.training import finetune, learning_rate, with_head

SIZE = 96
HEADS: dict[str, Literal["tutorial", "mlp"]] = {"block2_pool": "tutorial", "block4_pool": "mlp"}


class Enlarged(torch.utils.data.Dataset):
    """All images of a split in memory, (96, 96, 3) uint8; draws mirror half of them."""

    def __init__(self, folder: Path, mirror: bool) -> None:
        source = read_folder(folder, SIZE)
        self.classes, self.labels, self.mirror = source.classes, source.labels, mirror
        self.images = torch.stack([self._read(path) for path in source.paths])

    @staticmethod
    def _read(path: Path) -> torch.Tensor:
        image = Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index]
        if self.mirror and torch.rand(()) < 0.5:
            image = image.flip(1)
        return image, self.labels[index]


def configuration(cut: str, epochs: int, folder: str) -> TrainConfig:
    return TrainConfig(
        cut=cut, head=HEADS[cut], freeze=cut, epochs=epochs, batch_size=64, label_smoothing=0.1,
        cache_copies=2 if cut == "block4_pool" else 1, cache_half=cut == "block2_pool",
        folder=folder,
    )  # fmt: skip


def network(weights: str) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = vt.VGG16(
        include_top=False, weights=None if weights == "random" else weights,
        input_shape=(SIZE, SIZE, 3),
    )  # fmt: skip
    return remember_(model, "oxford")


def ours(base: keras.Model, train: Enlarged, test: Enlarged, config: TrainConfig) -> float:
    return finetune(base, train, test, config).epochs[-1]["val_accuracy"]


def keras_fit(base: keras.Model, train: Enlarged, test: Enlarged, config: TrainConfig) -> float:
    """The same head, schedule, optimizer and loss; Keras runs the frozen layers in every epoch."""
    model = with_head(base, config, len(train.classes))
    vt.freeze_(model, until=config.freeze)
    plan = shuffled(len(train), config.batch_size, config.seed)
    steps = config.epochs * len(plan(0))

    class Schedule(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step: torch.Tensor) -> float:
            return learning_rate(config, int(step), steps)

        def get_config(self) -> dict:
            return {}

    model.compile(
        keras.optimizers.AdamW(Schedule(), weight_decay=config.weight_decay, epsilon=1e-8),
        keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing),
    )

    class Batches(keras.utils.PyDataset):
        def __init__(self, epoch: int) -> None:
            super().__init__()
            self.batches = plan(epoch)

        def __len__(self) -> int:
            return len(self.batches)

        def __getitem__(self, i: int) -> tuple[Any, np.ndarray]:
            images, labels = zip(*(train[index] for index in self.batches[i]), strict=True)
            return (
                preprocess(torch.stack(images), base),
                keras.utils.to_categorical(labels, len(train.classes)),
            )

    for epoch in range(config.epochs):
        model.fit(Batches(epoch), verbose=0)
    found = [
        model.predict_on_batch(preprocess(test.images[i : i + 64], base)).argmax(1)
        for i in range(0, len(test), 64)
    ]
    return float((np.concatenate(found) == np.array(test.labels)).mean())


def measure(data: Path, weights: str, cut: str, by: str, epochs: int) -> dict[str, float]:
    """One row, in this process."""
    train, test = Enlarged(data / "train", mirror=True), Enlarged(data / "test", mirror=False)
    base = network(weights)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        run = ours if by == "ours" else keras_fit
        accuracy = run(base, train, test, configuration(cut, epochs, folder))
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"accuracy": accuracy, "seconds": seconds, "peak_mib": peak}


def cache(data: Path, weights: str, epochs: int) -> None:
    """Seconds of an epoch at block4_pool with the feature cache and without."""
    train = Enlarged(data / "train", mirror=False)  # so that both see the same images
    train.images, train.labels = train.images[::10], train.labels[::10]  # 300 images suffice
    losses: list[list[float]] = []
    seconds: list[list[float]] = []
    for use in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                cut="block4_pool", head="linear", freeze="block4_pool", epochs=epochs,
                batch_size=60, cache=use, folder=folder,
            )  # fmt: skip
            history = finetune(network(weights), train, None, config)
        losses.append([epoch["loss"] for epoch in history.epochs])
        seconds.append([epoch["seconds"] for epoch in history.epochs[1:]])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    with_cache, without = map(np.median, seconds)
    print(
        f"{len(train)} images, epochs 2 to {epochs}, medians: cached {with_cache:.4f} s "
        f"({min(seconds[0]):.4f} to {max(seconds[0]):.4f}), not cached {without:.2f} s "
        f"({min(seconds[1]):.2f} to {max(seconds[1]):.2f}): {without / with_cache:.0f} times"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("weights", help="`oxford`, or a file that holds it")
    parser.add_argument("--epochs", type=int, default=30, help="(default: 30)")
    parser.add_argument("--keras-epochs", type=int, default=3, help="(default: 3)")
    parser.add_argument("--only", metavar="ROW", help="one row: 'oxford block4_pool ours'")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cache", action="store_true", help="time an epoch with and without cache")
    arguments = parser.parse_args()
    if arguments.cache:
        cache(arguments.data, arguments.weights, epochs=4)
        return
    names = [
        " ".join(row) for row in itertools.product(("oxford", "random"), HEADS, ("ours", "fit"))
    ]
    if arguments.only is not None and arguments.only not in names:
        parser.error(f"no row {arguments.only!r}; expected one of: {'; '.join(names)}")
    if arguments.row:
        which, cut, by = arguments.only.split()
        weights = arguments.weights if which == "oxford" else "random"
        print(json.dumps(measure(arguments.data, weights, cut, by, arguments.epochs)))
        return
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"Keras {keras.__version__}, {torch.get_num_threads()} threads, "
        f"{time.strftime('%Y-%m-%d')}: {' '.join(sys.argv)}"
    )
    for name in [arguments.only] if arguments.only else names:
        epochs = arguments.keras_epochs if name.endswith("fit") else arguments.epochs
        row = subprocess.run(
            [sys.executable, __file__, arguments.data, arguments.weights, "--row", "--only", name,
             "--epochs", str(epochs)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
        )  # fmt: skip
        found = json.loads(row.stdout.splitlines()[-1])
        print(
            f"{name:28} {epochs:3} epochs  accuracy {found['accuracy']:.3f}  "
            f"{found['seconds']:6.0f} s  peak {found['peak_mib']:5.0f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
