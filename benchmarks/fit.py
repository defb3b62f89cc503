"""Keras fit, evaluate and predict with and without accelerate_.

The tutorial's network at 160x160 and VGG16's convolutions at 64x64 with a pooled head, on random
images; both runs start from the same weights and see the same batches, and their losses must agree.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import vggtorch  # noqa: F401  # isort: skip  (first: it selects Keras's torch backend)
import harness
import keras
import numpy as np
import torch
from train_step import tutorial, twin

from vggtorch.lowering import accelerate_

TOLERANCE = 1e-3  # of the loss


def pooled() -> keras.Model:
    """VGG16's convolutions, all trainable, and a linear head on their average."""
    base = keras.applications.VGG16(
        weights=None, include_top=False, input_shape=(64, 64, 3), pooling="avg"
    )
    return keras.Model(base.input, keras.layers.Dense(10, activation="softmax")(base.output))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(harness.header(device))
    rng = np.random.default_rng(0)
    for make in (tutorial, pooled):
        keras.utils.set_random_seed(0)
        model = make()
        models = {"Keras": twin(model), "accelerate_": accelerate_(twin(model))}
        x = rng.normal(size=(args.images, *model.input_shape[1:])).astype("float32")
        y = rng.integers(0, 10, args.images)
        losses = {}
        for name, network in models.items():
            optimizer = keras.optimizers.SGD(1e-3, momentum=0.9)
            network.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
            history = network.fit(x, y, args.batch, verbose=0, shuffle=False).history
            losses[name] = history["loss"][0]
        if not abs(losses["Keras"] - losses["accelerate_"]) <= TOLERANCE * losses["Keras"]:
            raise RuntimeError(f"The losses differ: {losses}")
        for what in ("fit", "evaluate", "predict"):
            calls = {
                name: call(network, what, x, y, args.batch) for name, network in models.items()
            }
            seconds = harness.in_turns(calls, args.repeats, device, warmup=1)
            print(f"\n{make.__name__}, {what}, {args.images} images, batch {args.batch}\n")
            print("| | ms | quartiles | times ours |\n|-|-|-|-|")
            print("\n".join(harness.table(seconds, "accelerate_")), flush=True)


def call(
    model: keras.Model, what: str, x: np.ndarray, y: np.ndarray, batch: int
) -> Callable[[], object]:
    if what == "fit":
        return lambda: model.fit(x, y, batch, verbose=0)
    if what == "evaluate":
        return lambda: model.evaluate(x, y, batch, verbose=0)
    return lambda: model.predict(x, batch, verbose=0)


if __name__ == "__main__":
    main()
