"""The tutorial's three examples on real weights and real images, in a few minutes on a CPU."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import keras
import numpy as np
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import vggtorch as vt
from vggtorch.text import visible_lines
from vggtorch.training import tutorial_head

SIZE = 160  # the tutorial's image size
PER_CLASS = 30  # training images of each digit
TEST_IMAGES = 200
EPOCHS = 4
CUT = "block2_pool"
BEST_FIRST = ("imagenet", "oxford")


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured.

    Attributes:
        weight_set: the pretrained weights that could be had.
        pretrained_accuracy: on test images, the frozen pretrained layers under the new head.
        random_accuracy: the same network with random layers in their place.
        similarity: cosine of block5_pool's features to the original network's after the
            replacement, by the new layer's `init`.
    """

    weight_set: str
    pretrained_accuracy: float
    random_accuracy: float
    similarity: dict[str, float]


def _digits(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Handwritten digits (UCI, 8x8 grey) as RGB of 0 to 255, (N, 160, 160, 3), and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.images))
    train = np.concatenate([order[data.target[order] == digit][:PER_CLASS] for digit in range(10)])
    test = np.setdiff1d(order, train, assume_unique=True)[:TEST_IMAGES]
    split = []
    for indices in (train, test):
        grey = (data.images[indices] * (255 / 16)).astype("uint8")
        images = [Image.fromarray(g).resize((SIZE, SIZE)).convert("RGB") for g in grey]
        split += [np.stack([np.asarray(image) for image in images]), data.target[indices]]
    return split[0], split[1], split[2], split[3]


def _photographs() -> list[Image.Image]:
    """The colour photographs that scikit-image carries."""
    from skimage import data

    return [
        Image.fromarray(photo)
        for photo in (data.astronaut(), data.chelsea(), data.coffee(), data.rocket())
    ]


def _best_weights(console: Console) -> str:
    """The best weight set that can be had here; says which and why."""
    for name in BEST_FIRST:
        try:
            vt.VGG16(weights=name, include_top=False)
        except OSError as error:
            reason = escape(visible_lines(error))
            console.print(f"[yellow]{name} weights can't be had here.[/] {reason}")
        else:
            console.print(f"Using the [bold]{name}[/] weights.")
            return name
    raise OSError("No pretrained weights can be had; the messages above say how to get them.")


def _train(base: keras.Model, weight_set: str, data: tuple[np.ndarray, ...]) -> float:
    """Cut, stack, freeze, compile and fit, as in the tutorial; the accuracy on test images."""
    train_images, train_labels, test_images, test_labels = data
    model = vt.freeze_(vt.stack(vt.truncate(base, CUT), tutorial_head(classes=10)), until=CUT)
    vt.accelerate_(model)  # the same Keras model and the same results, sooner
    # Adam's default of 1e-3 moves a Dense layer with 23,104 inputs too far in one step.
    optimizer = keras.optimizers.Adam(1e-4)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(vt.preprocess(train_images, weight_set), train_labels, batch_size=20, epochs=EPOCHS)
    return model.evaluate(
        vt.preprocess(test_images, weight_set), test_labels, batch_size=20, verbose=0
    )[1]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Mean cosine between the feature maps of the same images, (N, H, W, C)."""
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean((a * b).sum(axis=1) / norms))


def _similarity(original: keras.Model, weight_set: str) -> dict[str, float]:
    """How alike block5_pool is after one 5x5 took the place of block1_conv1 and block1_conv2."""
    photographs = vt.preprocess(_photographs(), weight_set)
    features = keras.ops.convert_to_numpy(original.predict(photographs, verbose=0))
    similarity = {}
    for init in (None, "compose"):
        conv = keras.layers.Conv2D(
            64, (5, 5), padding="same", activation="relu", name="block1_conv"
        )
        replaced = vt.replace(original, ["block1_conv1", "block1_conv2"], conv, init=init)
        received = keras.ops.convert_to_numpy(replaced.predict(photographs, verbose=0))
        similarity[init or "random"] = _cosine(features, received)
    return similarity


def run() -> DemoResult:
    """Run the tutorial: load, cut and stack, train, replace two layers by one; print a table.

    Uses the best pretrained weights that can be had, scikit-learn's handwritten digits enlarged to
    160x160, and scikit-image's photographs. Deterministic for given weights and versions.

    Raises:
        ImportError: scikit-learn or scikit-image, the extra `demo`, is not installed.
        OSError: no pretrained weights can be had.
    """
    missing = [name for name in ("sklearn", "skimage") if not importlib.util.find_spec(name)]
    if missing:
        raise ImportError(
            f"The demo's images come from scikit-learn and scikit-image; not installed: "
            f"{', '.join(missing)}. Run pip install 'vggtorch[demo]'."
        )
    console = Console()
    keras.utils.set_random_seed(0)

    console.rule("1. Load pretrained weights")
    weight_set = _best_weights(console)
    pretrained = vt.VGG16(weights=weight_set, include_top=False, input_shape=(SIZE, SIZE, 3))
    console.print("Layers:", ", ".join(layer.name for layer in pretrained.layers))

    console.rule(f"2. Cut at {CUT}, stack a head, freeze, train on handwritten digits")
    data = _digits()
    console.print(f"{len(data[0])} training and {len(data[2])} test images, {SIZE}x{SIZE}")
    pretrained_accuracy = _train(pretrained, weight_set, data)
    console.print("The same network with random weights in the frozen layers:")
    random = vt.VGG16(weights=None, include_top=False, input_shape=(SIZE, SIZE, 3))
    random_accuracy = _train(random, weight_set, data)
    console.print(
        "Digits are easy: edges at random serve them nearly as well. What pretrained layers bring "
        "to photographs is measured in benchmarks/README.md."
    )

    console.rule("3. Replace block1_conv1 and block1_conv2 by one 5x5 convolution")
    original = vt.VGG16(weights=weight_set, include_top=False, input_shape=(224, 224, 3))
    similarity = _similarity(original, weight_set)

    table = Table("What was done", "Result")
    table.add_row("weights", weight_set)
    table.add_row(f"test accuracy, pretrained up to {CUT}", f"{pretrained_accuracy:.3f}")
    table.add_row("test accuracy, random weights there", f"{random_accuracy:.3f}")
    for init, cosine in similarity.items():
        table.add_row(f"block5_pool against the original's, 5x5 {init} (cosine)", f"{cosine:.2f}")
    console.print(table)
    return DemoResult(weight_set, pretrained_accuracy, random_accuracy, similarity)
