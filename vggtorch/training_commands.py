"""The commands that train: finetune; lr_find and show_batch, which look before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import vggtorch as vt
from vggtorch import files, paths
from vggtorch.options import Architecture, is_given, with_options_of_train_config
from vggtorch.text import terminal_width, visible_lines, wrapped
from vggtorch.training import Interrupted, TrainConfig

if TYPE_CHECKING:
    import keras

SMALLEST = 32  # pixels of an image's side
Advice = Literal["auto", "similar", "different", "none"]
Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="A folder with one folder for each class, or with train, val, test; or a .csv, "
        ".tsv or .jsonl file of paths and labels, and splits perhaps.",
    ),
]
PretrainedWeights = Annotated[
    str | None,
    typer.Option(help="A weight set's name or a path; by default the best that can be had."),
]
Advise = Annotated[
    Advice,
    typer.Option(
        help="Rules of thumb choose what isn't given, before the defaults below: for any images, "
        "for such as are similar to ImageNet's or different, or none."
    ),
]

# What a search for a learning rate doesn't follow, and what changes nothing in what is drawn of a
# batch. They are said and not refused, so that the options of `finetune` may stay.
_UNSEARCHED = (
    "epochs", "learning_rate", "schedule", "warmup", "resume", "patience", "monitor", "metrics",
    "restore_best_weights", "temperature_scaling", "ema_decay", "checkpoint_steps", "log_with",
)  # fmt: skip
_UNDRAWN = (
    *_UNSEARCHED, "gradient_accumulation_steps", "optimizer", "layer_decay", "weight_decay",
    "label_smoothing", "class_weight", "max_grad_norm", "precision", "num_workers", "cache_dtype",
    "cache_dir", "output_dir",
)  # fmt: skip
# Settings of which one may need another that the plan sets.
_TOGETHER = ("cut", "unfreeze", "freeze")


@with_options_of_train_config
def finetune(
    context: typer.Context,
    train: Data,
    validation: Annotated[
        str | None,
        typer.Argument(metavar="VALIDATION", help="The same; by default part of DATA."),
    ] = None,
    architecture: Architecture = "vgg16",
    weights: PretrainedWeights = None,
    advise: Advise = "auto",
    **options: Any,
) -> None:
    """Fine-tune on a folder of images; writes the model, its card and a report."""
    given = [train] if validation is None else [train, validation]
    model, config = _model_and_config(context, given, architecture, weights, advise, options)
    try:
        history = vt.finetune(model, train, validation, config)
    except Interrupted as stop:  # which typer would swallow
        raise typer.Abort from stop
    from accelerate import PartialState

    if PartialState().is_main_process:
        run = Path(config.output_dir)
        vt.save_trained(history, run)
        vt.write_report(history, run / "report.html")
        for name, found in (("validation", history.evaluation), ("test", history.test_evaluation)):
            if found is not None:
                _show(f"Accuracy on {len(found.labels)} {name} images: {found.accuracy:.3f}")
        if config.temperature_scaling:
            _show(f"Temperature {history.temperature:.3f}, in the last layer's weights")
        _show(f"Wrote {run / 'model.keras'}, {run / 'README.md'} and {run / 'report.html'}.")


@with_options_of_train_config
def lr_find(
    context: typer.Context,
    train: Data,
    picture: Annotated[
        str, typer.Option(metavar="FILE", help="Where loss by learning rate is drawn, as SVG.")
    ] = "lr_find.svg",
    lowest: Annotated[float, typer.Option(help="The first learning rate.")] = 1e-6,
    highest: Annotated[
        float, typer.Option(help="The last, unless the loss diverges before.")
    ] = 1.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps from the first to the last.")] = 100,
    architecture: Architecture = "vgg16",
    weights: PretrainedWeights = None,
    advise: Advise = "auto",
    **options: Any,
) -> None:
    """Find a learning rate for finetune, by a short run in which it rises; draws the loss."""
    paths.check_out(picture, (".svg",), "picture")
    model, config = _model_and_config(context, [train], architecture, weights, advise, options)
    _tell_unused(context, _UNSEARCHED, "the search")
    search = vt.find_learning_rate(
        model, train, config, lowest=lowest, highest=highest, steps=steps
    )
    from accelerate import PartialState

    from vggtorch.training import plot_rates

    if PartialState().is_main_process:
        plot_rates(search, picture)
        _show(f"Suggested: --lr {search.suggestion:.2g}\nWrote {picture}.")


@with_options_of_train_config
def show_batch(
    context: typer.Context,
    train: Data,
    picture: Annotated[
        str, typer.Option(metavar="FILE", help="Where the images are drawn, as PNG or JPEG.")
    ] = "batch.png",
    count: Annotated[int, typer.Option(help="How many images, at most those of a batch.")] = 16,
    architecture: Architecture = "vgg16",
    weights: PretrainedWeights = None,
    advise: Advise = "auto",
    **options: Any,
) -> None:
    """Draw what the network would see: the first images, augmented, with their labels."""
    paths.check_out(picture, (".png", ".jpg", ".jpeg"), "picture")
    model, config = _model_and_config(context, [train], architecture, weights, advise, options)
    _tell_unused(context, _UNDRAWN, "the picture")
    drawn = vt.show_batch(model, train, config, count=count)
    with files.atomic(picture, body=(OSError, ValueError)) as temporary:
        drawn.save(temporary)
    _show(f"Wrote {picture}.")


def _model_and_config(
    context: typer.Context,
    given_data: Sequence[str],
    architecture: str,
    weights: str | None,
    advise: Advice,
    options: dict[str, Any],
) -> tuple[keras.Model, TrainConfig]:
    """The pretrained network without its top, and how the options have it train.

    What can't be right is refused before the weights are loaded.
    """
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in options.items()
        if is_given(context, name)
    }
    # Some settings need the plan's.
    TrainConfig(**{k: v for k, v in given.items() if advise == "none" or k not in _TOGETHER})
    train = given_data[0]
    for data in given_data:
        paths.check_data(data)
    if weights is not None:
        paths.check_weights(weights)
    if context.info_name == "finetune":
        paths.check_run(options["output_dir"], options["resume"])
    from vggtorch.models import best_weight_set, constructor
    from vggtorch.training import find_splits, images_by_class, settle_config

    images_by_class(find_splits(paths.as_path(train)).train, given.get("label_pattern"))
    size = given.get("image_size", 224)
    if size < SMALLEST:
        raise ValueError(
            f"Received image_size={size}; expected {SMALLEST} or more, which is one pixel behind "
            f"the pools of {architecture}."
        )
    if weights is None:
        weights, missing = best_weight_set(architecture)
        because = missing.partition("\n")[0].removesuffix(" Tried:")
        _show(f"Weights: {weights}" + (f" (no better ones: {because})" if because else ""))
    model = constructor(architecture)(
        weights=weights, include_top=False, input_shape=(size, size, 3)
    )
    if advise == "none":
        return model, TrainConfig(**given)
    return model, settle_config(model, train, None, given, None if advise == "auto" else advise)


def _tell_unused(context: typer.Context, unused: Sequence[str], on: str) -> None:
    """Say which of the options that the user has given have no effect."""
    if given := [f"--{n.replace('_', '-')}" for n in unused if is_given(context, n)]:
        _show(f"Without effect on {on}: {', '.join(given)}.")


def _show(text: object) -> None:
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first one speaks
        print(wrapped(visible_lines(text), terminal_width()))
