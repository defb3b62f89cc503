"""The commands that take many images through a model: predict, evaluate, features."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import vggtorch as vt
from vggtorch import files, paths
from vggtorch.architectures import ARCHITECTURES
from vggtorch.options import Architecture, ImageSize, Model, Weights, is_given
from vggtorch.text import figure_text, table, terminal_width, visible, visible_lines

if TYPE_CHECKING:
    import keras

Images = Annotated[
    list[str], typer.Argument(metavar="IMAGES...", help="Files, folders and patterns ('*.jpg').")
]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", help="Images at a time.")]
UNREADABLE = 10  # that a message names
# Files of models and runs that users may take for the model.
OF_MODELS = {".pt", ".pth", ".pt2", ".onnx", ".safetensors", ".h5", ".bin", ".json", ".ckpt"}


def predict(
    context: typer.Context,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] IMAGES...",
            help="A run's folder, a .keras file, hf://owner/name or a network's name; files, "
            "folders and patterns.",
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="The model, where it doesn't stand before the images.")
    ] = None,
    architecture: Architecture = "vgg16",
    weights: Weights = "imagenet",
    top: Annotated[int, typer.Option(help="How many classes of each image.")] = 5,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="FILE", help="Ends in .csv or .jsonl.")
    ] = None,
    batch_size: BatchSize = 32,
) -> None:
    """The most probable classes of images; status 1 if some can't be read."""
    if model is None and _is_model(images[0]):
        model, *images = images
        if not images:
            raise ValueError(
                f"Received the model {model} and no images. Expected files, folders or patterns "
                f"behind it."
            )
    elif model is None and Path(images[0]).suffix in OF_MODELS and Path(images[0]).is_file():
        raise ValueError(
            f"Received {images[0]}, which is neither a model nor an image. Expected the folder of "
            f"a run, or its model.keras."
        )
    elif model is None and len(images) > 1 and not _is_there(images[0]):
        raise ValueError(f"{paths.missing_network(images[0])} Or an image.")
    refuse_for_models(context, model, ("architecture", "weights"))
    model = architecture if model is None else model
    paths.check_model(model)
    paths.check_weights(weights)
    _check_order(images)
    paths.check_images(images)
    if out is not None:
        paths.check_out(out, paths.PREDICTIONS)
    found = vt.predict_files(network(model, weights), images, top=top, batch_size=batch_size)
    if out is not None:
        problems = vt.write_predictions(found, out)
        print(f"Wrote {visible(out)}.")
    else:
        problems = []
        for one in found:
            if one.problem:
                problems.append(one)
                continue
            print(visible(str(one.path)))
            for category, probability in one.classes:
                print(f"  {probability:6.1%}  {visible(category)}")
    _report([(one.path, one.problem) for one in problems])


def evaluate(
    model: Model,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A folder with one folder for each class, or with test; or a table of labels.",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", metavar="FILE", help="Figures as .json, or a report as .html."),
    ] = None,
    batch_size: BatchSize = 32,
    num_workers: Annotated[int, typer.Option(help="Processes that read images.")] = 0,
    label_pattern: Annotated[
        str | None,
        typer.Option(help="Regular expression; its first group, in a file's name, is the label."),
    ] = None,
    on_unreadable: Annotated[
        Literal["skip", "stop"],
        typer.Option(help="Stop at an image that can't be read, or skip it."),
    ] = "stop",
) -> None:
    """How well a trained model does on labelled images that nothing was chosen by."""
    paths.check_model(model)
    paths.check_data(data)
    if out is not None:
        paths.check_out(out, (".json", ".html"))
    trained = network(model, "imagenet")
    found, source = vt.evaluate_folder(
        trained,
        data,
        batch_size=batch_size,
        num_workers=num_workers,
        label_pattern=label_pattern,
        on_unreadable=on_unreadable,
    )
    figures = found.figures()
    print(f"{len(found.labels)} images of {len(source.classes)} classes in {visible(source.root)}")
    for name, value in figures.items():
        print(f"  {name:24} {figure_text(value)}")
    rows = found.per_class(source.classes)
    cells = [["  class", "images", "precision", "recall", "F1"]]
    for row in rows:
        figures_of = (f"{share:.3f}" for share in (row.precision, row.recall, row.f1))
        cells.append([f"  {visible(row.name)}", str(row.images), *figures_of])
    print(table(cells, 1, terminal_width()))
    if out is not None and out.endswith(".html"):
        vt.write_test_report(trained, source, found, out)
        print(f"Wrote {visible(out)}.")
    elif out is not None:
        # JSON has no NaN, which the AUROC of one class alone is.
        numbers = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        content: dict[str, Any] = {"images": len(found.labels), **numbers}
        content["classes"] = {row.name: row.__dict__ for row in rows}
        content["confusion"] = found.confusion.tolist()
        files.write_text(out, json.dumps(content, indent=2))
        print(f"Wrote {visible(out)}.")


def extract_features(
    context: typer.Context,
    model: Model,
    images: Images,
    layer: Annotated[str, typer.Option(help="Whose output is taken.")] = "block5_pool",
    out: Annotated[
        str, typer.Option("--out", "-o", metavar="FOLDER", help="A Parquet data set.")
    ] = "features.parquet",
    pooling: Annotated[
        Literal["avg", "max", "none"], typer.Option(help="Of feature maps, to one value a channel.")
    ] = "avg",
    weights: Weights = "imagenet",
    image_size: ImageSize = None,
    batch_size: BatchSize = 32,
    shard_size: Annotated[int, typer.Option(help="Images in one file of the data set.")] = 1024,
) -> None:
    """A layer's output for any number of images; goes on where it was, also under torchrun."""
    refuse_for_models(context, model, ("weights", "image_size"))
    paths.check_model(model)
    paths.check_weights(weights)
    _check_order(images)
    paths.check_images(images)
    from vggtorch.training import geometry_text

    trunk = network(model, weights, include_top=False, size=image_size)
    process, processes = (int(os.environ.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    if process == 0:
        print(f"Input: {geometry_text(vt.data_config(trunk))}")
    problems = vt.write_features(
        trunk,
        images,
        out,
        layer=layer,
        pooling=pooling,
        batch_size=batch_size,
        shard_size=shard_size,
        process=process,
        processes=processes,
    )
    print(f"Wrote {visible(out)}.")
    _report(problems)


def push(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run that has ended.")],
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Of the repository; made if there is none.")
    ],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="By default as it is.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="For the card: mit, cc-by-4.0, ...; else as it stands there.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="A branch.")] = None,
) -> None:
    """Push a trained model to the Hugging Face hub, with its card."""
    if not Path(run).is_dir():
        raise ValueError(
            f"There is no folder {run}.{paths.near(run)} Expected that of a run that has ended."
        )
    address = vt.push_to_hub(run, repository, private=private, license=license, revision=revision)
    print(f"Pushed to {visible(address)}. Load it as {visible(_on_hub(repository, revision))}.")


def _on_hub(repository: str, revision: str | None) -> str:
    return f"hf://{repository.removeprefix('hf://')}" + (f"@{revision}" if revision else "")


def refuse_for_models(context: typer.Context, model: str | None, names: Sequence[str]) -> None:
    """Refuse options that say which network to build, where a model is there or its name says it.

    Args:
        context: of the command.
        model: what the user gives as the model; None where the options alone say it.
        names: of the options. With a network's name its weights are still to be chosen.

    Raises:
        ValueError: one of them is given.
    """
    if model is None:
        return
    for name in ("architecture",) if model in ARCHITECTURES else names:
        if name in names and is_given(context, name):
            raise ValueError(
                f"Received {name}={context.params[name]!r} with the model {model}, which says that "
                f"itself. Leave one of them out."
            )


def _check_order(images: Sequence[str]) -> None:
    """See that no model stands among the images."""
    for place, name in enumerate(images):
        if name not in ARCHITECTURES and _is_model(name) and not _has_images(name):
            raise ValueError(
                f"Received the model {name} among the images, in place {place + 1}. Expected one "
                f"model, before all images."
            )


def _has_images(folder: str) -> bool:
    """Whether images stand beside a model in its folder."""
    path = Path(folder)
    return path.is_dir() and any(p.suffix.lower() in paths.SUFFIXES for p in path.iterdir())


def _is_there(name: str) -> bool:
    """Whether a name is that of a file or a folder, or can stand for many or for an address."""
    return Path(name).exists() or any(character in name for character in "*?[") or "://" in name


def _is_model(name: str) -> bool:
    if not name:  # which would be the folder that one is in
        return False
    known = name in ARCHITECTURES or name.endswith(".keras") or paths.is_on_hub(name)
    return known or any(Path(name, kept).is_file() for kept in ("model.keras", "last.pt"))


def network(
    name: str, weights: str, *, include_top: bool = True, size: int | None = None
) -> keras.Model:
    """A pretrained network by its name, for images of a size if given, or what else is a model."""
    from vggtorch.models import constructor, model_from_name

    if name in ARCHITECTURES:
        shape = None if size is None else (size, size, 3)
        return constructor(name)(weights=weights, include_top=include_top, input_shape=shape)
    return model_from_name(name)


def _report(problems: list[tuple[Path, str]]) -> None:
    """Name the images that could not be read, and end with status 1 if there are any."""
    if not problems:
        return
    lines = [reason for _, reason in problems[:UNREADABLE]]
    more = f"\nAnd {len(problems) - UNREADABLE} more." if len(problems) > UNREADABLE else ""
    text = f"{len(problems)} images can't be read:\n" + "\n".join(lines) + more
    if len(problems) == 1:
        text = f"an image can't be read: {lines[0]}"
    print(f"vggtorch: {visible_lines(text)}", file=sys.stderr)
    raise typer.Exit(1)
