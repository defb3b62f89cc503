"""Many images through a model that is there: their classes, and how well it does on labelled ones.

Any number of images goes through in batches; what can't be read is passed over and reported.
"""

from __future__ import annotations

import csv
import dataclasses
import glob
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import keras
import numpy as np
import torch

from vggtorch import files
from vggtorch.checks import whole
from vggtorch.lowering import between
from vggtorch.models import data_config, decode_predictions, preprocess
from vggtorch.paths import PREDICTIONS, SUFFIXES, as_path, check_images, check_out
from vggtorch.training import data
from vggtorch.training.evaluation import Evaluation, evaluate
from vggtorch.training.folders import images_by_class, images_under, tell_left_out
from vggtorch.training.heads import ends_in_logits, logits_network
from vggtorch.training.run import make_accelerator
from vggtorch.training.splits import test_part
from vggtorch.weight_sets import DataConfig


class Batch(NamedTuple):
    """Images that were read, ready for the model, and why others could not be."""

    asked: Sequence[Path]
    paths: list[Path]
    images: np.ndarray
    problems: list[tuple[Path, str]]


class Prediction(NamedTuple):
    """The most probable classes of an image, the best first, or why it could not be read."""

    path: Path
    classes: list[tuple[str, float]]
    problem: str = ""


def image_files(given: str | Path | Iterable[str | Path]) -> list[Path]:
    """The files that are meant: files themselves, all images in folders, and what patterns match.

    One alone needs no list.

    Warns of other files in the folders.

    Raises:
        ValueError: nothing, a folder without images, or a pattern or a name that nothing matches.
        OSError: a folder that can't be looked into.
    """
    found: list[Path] = []
    if isinstance(given, str | os.PathLike) or not isinstance(given, Iterable):
        given = [given]
    given = list(given)
    if not given:
        raise ValueError("Received no images. Expected files, folders or patterns.")
    check_images(given)
    for one in given:
        is_there, before = os.path.exists(one), len(found)
        matching = [one] if is_there else sorted(glob.glob(os.fspath(one), recursive=True))
        # Of `photos/**` the files match by themselves, and of `photos/*` perhaps the folders alone.
        with_files = {p for path in matching if os.path.isfile(path) for p in Path(path).parents}
        for path in map(Path, matching):
            if not path.is_dir():
                found.append(path)
            elif path not in with_files:
                inside, left_out = images_under(path)
                tell_left_out(path, left_out)
                found += inside
        if len(found) == before:
            raise ValueError(f"{one} has no images. Expected {', '.join(sorted(SUFFIXES))} files.")
    return list(dict.fromkeys(found))


def batches(model: keras.Model, paths: Sequence[Path], batch_size: int) -> Iterator[Batch]:
    """The images of files in batches, as the model takes them; the next are read meanwhile."""
    batch_size = whole("batch_size", batch_size)
    read = _reader(model)
    with ThreadPoolExecutor() as pool:
        chunks = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]
        ahead = [pool.submit(read, path) for path in chunks[0]] if chunks else []
        for chunk, following in itertools.zip_longest(chunks, chunks[1:], fillvalue=()):
            now, ahead = ahead, [pool.submit(read, path) for path in following]
            good: list[Path] = []
            arrays: list[np.ndarray] = []
            problems: list[tuple[Path, str]] = []
            for path, future in zip(chunk, now, strict=True):
                try:
                    arrays.append(future.result())
                    good.append(path)
                except (OSError, ValueError) as error:
                    reason = files.first_line(error).removeprefix("Can't read ")
                    problems.append((path, reason))
            yield Batch(chunk, good, np.concatenate(arrays) if arrays else np.zeros(0), problems)


def _check_model(model: Any) -> None:
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"Received a {type(model).__name__} as the model; expected Keras's. (vt.load_model "
            f"reads one.)"
        )


def _reader(model: keras.Model) -> Callable[[Path], np.ndarray]:
    def read(path: Path) -> np.ndarray:
        return np.asarray(preprocess(path, model))

    _check_model(model)
    # What the model doesn't say is refused once, and not as a fault of every file.
    preprocess(np.zeros((32, 32, 3), np.uint8), model)
    return read


def predict_files(
    model: keras.Model,
    images: str | Path | Iterable[str | Path],
    *,
    top: int = 5,
    labels: Sequence[str] | None = None,
    batch_size: int = 32,
) -> Iterator[Prediction]:
    """The classes of image files, in their order; what can't be read is named and passed over.

    Args:
        model: puts out probabilities or logits; it remembers what it expects of an image.
        images: files, folders and patterns such as `photos/**/*.jpg`.
        top: how many classes of each image.
        labels: the names of the classes; by default the model's, or those of ImageNet.
        batch_size: images at a time, which bounds the memory.

    Raises:
        ValueError: nothing to predict, or a model that doesn't say what it expects.

    Example:
        >>> import tempfile, keras, vggtorch as vt
        >>> from PIL import Image
        >>> from vggtorch.models import remember_
        >>> from vggtorch.weight_sets import DataConfig
        >>> image = keras.Input((8, 8, 3))
        >>> x = keras.layers.GlobalAveragePooling2D()(image)
        >>> model = keras.Model(image, keras.layers.Softmax()(x))
        >>> config = DataConfig(preprocessing_inside=True, label_names=("red", "green", "blue"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (9, 9), "green").save(f"{folder}/a.png")
        ...     (found,) = vt.predict_files(remember_(model, config), [folder])
        >>> found.path.name, found.classes[0][0]
        ('a.png', 'green')
    """
    _reader(model)  # refuses a model that doesn't say what it expects, before it looks for files
    labels = data_config(model).label_names or None if labels is None else labels
    shares = keras.ops.softmax if ends_in_logits(model) else keras.ops.convert_to_tensor
    for batch in batches(model, image_files(images), batch_size):
        found = {path: Prediction(path, [], problem) for path, problem in batch.problems}
        if batch.paths:
            outputs = shares(model.predict_on_batch(batch.images))
            best = decode_predictions(keras.ops.convert_to_numpy(outputs), top, labels)
            for path, classes in zip(batch.paths, best, strict=True):
                found[path] = Prediction(path, [(name, share) for _, name, share in classes])
        yield from (found[path] for path in batch.asked)


def write_predictions(found: Iterable[Prediction], path: str | Path) -> list[Prediction]:
    """Write predictions as they come; returns those of images that could not be read.

    >>> import pathlib, tempfile, vggtorch as vt
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     problems = vt.write_predictions([], pathlib.Path(folder) / "none.jsonl")
    >>> problems
    []

    Args:
        found: what `predict_files` gives.
        path: ends in .csv (a row for each image: path, label and probability of each class, and
            what was wrong) or in .jsonl (a line for each image, with a list of its classes).

    Raises:
        ValueError: another ending, or no such folder.
        OSError: the file can't be written; one that stood there before is then still whole.
    """
    check_out(path, PREDICTIONS, "")
    path = Path(path)
    problems: list[Prediction] = []
    is_csv = path.suffix == ".csv"
    # Bytes of a file's name that aren't UTF-8 stand as they are in CSV, and as \udc.. in JSON: who
    # reads either as Python does has the name again.
    errors = "surrogateescape" if is_csv else "backslashreplace"
    with (
        files.atomic(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors=errors) as file,
    ):
        (_csv_rows if is_csv else _json_lines)(file, _watched(found, problems))
    return problems


def _watched(found: Iterable[Prediction], problems: list[Prediction]) -> Iterator[Prediction]:
    for one in found:
        if one.problem:
            problems.append(one)
        yield one


def _json_lines(file: Any, found: Iterable[Prediction]) -> None:
    for one in found:
        line: dict[str, Any] = {"path": str(one.path)}
        if one.problem:
            line["error"] = one.problem
        else:
            line["classes"] = [{"label": name, "probability": p} for name, p in one.classes]
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _csv_rows(file: Any, found: Iterable[Prediction]) -> None:
    rows, found = csv.writer(file), iter(found)
    # The first image that could be read says how many classes a row has.
    before: list[Prediction] = []
    while not (before and before[-1].classes) and (one := next(found, None)):
        before.append(one)
    classes = len(before[-1].classes) if before else 0
    numbers = ["", *(f"_{i}" for i in range(2, classes + 1))][:classes]
    header = [f"{name}{number}" for number in numbers for name in ("label", "probability")]
    rows.writerow(["path", *header, "error"])
    for one in itertools.chain(before, found):
        cells = [cell for name, share in one.classes for cell in (name, f"{share:.6g}")]
        rows.writerow([one.path, *cells, *[""] * (2 * classes - len(cells)), one.problem])


def evaluate_folder(
    model: keras.Model,
    folder: str | Path,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    label_pattern: str | None = None,
    on_unreadable: Literal["skip", "stop"] = "stop",
) -> tuple[Evaluation, data.Folder]:
    """How well a model does on a folder with a subfolder for each class, and the images of it.

    Classes are told by their names. Of a folder with `test` beside `train`, `test` is taken, and of
    a table with a column `split` its rows of the split test.

    Args:
        model: ends in probabilities or logits; it remembers its classes and what it expects.
        folder: of images that nothing was chosen by; or a table of paths and labels.
        batch_size: images at a time.
        num_workers: processes that read images.
        label_pattern: regular expression whose first group, in a file's name, is the label.
        on_unreadable: stop at an image that can't be read, or leave it out with a warning.

    Raises:
        ValueError: classes that the model doesn't know, or what a folder is refused for.

    Example:
        >>> import pathlib, tempfile, keras, vggtorch as vt
        >>> from PIL import Image
        >>> from vggtorch.models import remember_
        >>> from vggtorch.weight_sets import DataConfig
        >>> image = keras.Input((8, 8, 3))
        >>> x = keras.layers.GlobalAveragePooling2D()(image)
        >>> model = keras.Model(image, keras.layers.Softmax()(x))
        >>> config = DataConfig(preprocessing_inside=True, label_names=("red", "green", "blue"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("blue", "red"):
        ...         pathlib.Path(folder, name).mkdir()
        ...         Image.new("RGB", (9, 9), name).save(f"{folder}/{name}/1.png")
        ...     found, images = vt.evaluate_folder(remember_(model, config), folder)
        >>> found.accuracy, found.labels.tolist()
        (1.0, [2, 0])
    """
    batch_size = whole("batch_size", batch_size)
    num_workers = whole("num_workers", num_workers, least=0)
    if on_unreadable not in ("skip", "stop"):
        raise ValueError(f"Received on_unreadable={on_unreadable!r}; expected 'skip' or 'stop'.")
    _check_model(model)
    if not isinstance(folder, str | os.PathLike):
        raise ValueError(
            f"Received a {type(folder).__name__}; expected the path of a folder or a table. (What "
            f"is in memory goes through vt.preprocess into model.evaluate.)"
        )
    part = test_part(as_path(folder))
    config = data_config(model)
    _check_known(model, config, tuple(images_by_class(part, label_pattern)), part)
    size = config.size or (data.DEFAULT_SIZE, data.DEFAULT_SIZE)
    source = data.read_folder(
        part,
        dataclasses.replace(config, input_size=(3, *size)),
        on_unreadable=on_unreadable,
        label_pattern=label_pattern,
    )
    source = data.with_classes(source, tuple(config.label_names or source.classes))
    accelerator = make_accelerator("fp32")
    model.to(accelerator.device)
    found = evaluate(
        _logits(model),
        model,
        source,
        batch_size=batch_size,
        num_workers=num_workers,
        accelerator=accelerator,
    )
    return found, source


def _check_known(
    model: keras.Model, config: DataConfig, classes: tuple[str, ...], part: object
) -> None:
    """See that a model knows the classes of a test set, before an image of it is read."""
    names, outputs = config.label_names or classes, model.output_shape[-1]
    if len(names) != outputs or not set(classes) <= set(names):
        unknown = sorted(set(classes) - set(config.label_names))
        raise ValueError(
            f"{model.name} puts out {outputs} classes"
            + (f" ({', '.join(config.label_names)})" if config.label_names else "")
            + f", and {part} has {len(classes)}, of which it doesn't know "
            f"{', '.join(unknown[:10])}. Name them as the model's classes."
        )


def _logits(model: keras.Model) -> torch.nn.Module:
    """A network that puts out logits; of one that ends in a layer Softmax their logarithms."""
    try:
        return logits_network(model, model.inputs[0])
    except ValueError as error:
        return _Logarithms(model, str(error))


class _Logarithms(torch.nn.Module):
    """The logarithms of probabilities, which are logits of the same."""

    def __init__(self, model: keras.Model, otherwise: str) -> None:
        super().__init__()
        self.network, self.otherwise = between(model.inputs[0], model.outputs[0]), otherwise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probabilities = self.network(x)
        if not bool(((probabilities.sum(1) - 1).abs() < 1e-3).all() and (probabilities >= 0).all()):
            raise ValueError(self.otherwise)
        return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
