"""How to fine-tune: one frozen configuration, from whose fields the command line makes its options.

This file imports nothing heavy, so that `vggtorch finetune --help` needs neither Keras nor torch.
"""

# ruff: noqa: RUF009  (what `_option` returns is a dataclass's field, and no default)

from __future__ import annotations

import math
import os
import re
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from vggtorch.checks import switch

Augment = Literal["none", "flip", "crop", "trivial"]
Metric = Literal["accuracy", "top5_accuracy", "macro_f1", "auroc", "calibration_error", "loss"]
METRICS: tuple[str, ...] = typing.get_args(Metric)
OWN_SCHEDULES = ("cosine", "constant")  # of the learning rate; others are torch's
# What people who know fastai, timm, Keras or the Trainer of transformers type.
ELSEWHERE = {
    "lr": "learning_rate", "bs": "batch_size", "batch": "batch_size", "size": "image_size",
    "img_size": "image_size", "output": "output_dir", "folder": "output_dir", "opt": "optimizer",
    "smoothing": "label_smoothing", "workers": "num_workers", "clip_grad": "max_grad_norm",
    "mixup_alpha": "mixup", "cutmix_alpha": "cutmix", "class_weights": "class_weight",
    "scheduler": "schedule", "lr_scheduler": "schedule", "sched": "schedule",
    "tensorboard": "log_with", "report_to": "log_with", "eval_metric": "monitor",
    "num_train_epochs": "epochs", "validation_data": "validation", "wd": "weight_decay",
    "n_epochs": "epochs", "num_epochs": "epochs", "max_epochs": "epochs", "imgsz": "image_size",
    "input_size": "image_size", "resize": "image_size", "per_device_train_batch_size": "batch_size",
    "val_split": "validation_split", "valid_pct": "validation_split", "test_size":
    "validation_split", "early_stopping": "patience", "early_stop": "patience", "amp": "precision",
    "fp16": "precision", "bf16": "precision", "mixed_precision": "precision", "dtype": "precision",
    "save_dir": "output_dir", "out_dir": "output_dir", "out": "output_dir", "project": "output_dir",
    "augmentation": "augment", "aa": "augment", "data_augmentation": "augment",
    "random_state": "seed", "random_seed": "seed", "clipnorm": "max_grad_norm",
    "clip_norm": "max_grad_norm", "gradient_clip_val": "max_grad_norm",
    "accumulate_grad_batches": "gradient_accumulation_steps", "grad_accum_steps":
    "gradient_accumulation_steps", "ema": "ema_decay", "model_ema": "ema_decay",
    "model_ema_decay": "ema_decay", "warmup_ratio": "warmup", "warmup_epochs": "warmup",
    "warmup_steps": "warmup", "pct_start": "warmup", "wandb": "log_with", "mlflow": "log_with",
    "logger": "log_with", "resume_from_checkpoint": "resume", "layerwise_lr_decay": "layer_decay",
    "freeze_layers": "freeze", "freeze_until": "freeze", "freeze_epochs": "unfreeze",
    "metric": "metrics", "load_best_model_at_end": "restore_best_weights",
    "max_lr": "learning_rate", "lr_max": "learning_rate", "base_lr": "learning_rate",
    "lr0": "learning_rate", "sample_weight": "class_weight",
    "save_best_only": "restore_best_weights", "interp": "interpolation", "balanced": "sampling",
    "weighted_sampler": "sampling", "momentum": "optimizer", "scheduler_type": "schedule",
}  # fmt: skip
# Values that they type, and what these are called here.
_VALUES_ELSEWHERE = {
    "bfloat16": "bf16", "mixed_bfloat16": "bf16", "bf16-mixed": "bf16", "float32": "fp32",
    "32": "fp32", "no": "fp32", "fp16": "bf16", "float16": "bf16", "mixed_float16": "bf16",
    "16": "bf16", "amp": "bf16", "half": "float16", "pad": "border", "squish": "squash",
    "stretch": "squash", "resize": "squash", "centercrop": "center", "cubic": "bicubic",
    "linear": "bilinear", "weighted": "balanced", "random": "shuffled", "ignore": "skip",
    "raise": "stop", "error": "stop", "trivialaugment": "trivial", "randaugment": "trivial",
    "horizontal_flip": "flip", "randomresizedcrop": "crop", "acc": "accuracy", "f1": "macro_f1",
    "f1_score": "macro_f1", "top5": "top5_accuracy", "auc": "auroc", "roc_auc": "auroc",
    "ece": "calibration_error", "dense": "linear", "fc": "linear", "crop": "center",
}  # fmt: skip
# What elsewhere are settings and here are none, and why.
NO_SETTINGS = {
    "loss": "The loss is cross-entropy, which label_smoothing and class_weight change."
    " (vt.to_torch(model) trains with another one in a loop of torch's, and so does Keras's fit.)",
    "criterion": "The loss is cross-entropy, which label_smoothing and class_weight change.",
    "device": "Accelerate chooses it: CUDA_VISIBLE_DEVICES and ACCELERATE_USE_CPU say which.",
    "num_classes": "The data says how many classes there are.",
    "shuffle": "Images are shuffled, or come as a DataLoader's sampler has them.",
    "steps_per_epoch": "An epoch is every image once, or what a DataLoader's sampler gives.",
    "verbose": "What a run prints goes to stderr.",
    "dropout": "A head brings its own.",
}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """How to fine-tune; every field is an option of `vggtorch finetune`.

    The text of each field is in `dataclasses.fields(TrainConfig)`, as `metadata["help"]`.

    >>> import vggtorch as vt
    >>> vt.TrainConfig(head="linear", cut="block5_pool", freeze="block5_pool", epochs=3).epochs
    3
    >>> vt.TrainConfig(epochs=0)
    Traceback (most recent call last):
    ValueError: Received epochs=0; expected a whole number from 1.

    Raises:
        ValueError: a value outside its range, or two that contradict each other.
    """

    cut: str | None = _option(None, "Last layer kept of the network, under the new head.")
    head: Literal["multilevel", "linear", "mlp", "tutorial"] | None = _option(
        None, "New layers: on pooled maps of three blocks, of one (linear, mlp), or the tutorial's."
    )
    freeze: str | None = _option(None, "This layer and all below it are frozen.")
    unfreeze: tuple[tuple[int, str], ...] = _option(
        (), "EPOCH:LAYER: from that epoch (the first is 0) that layer and all above it train."
    )
    epochs: int = _option(10, "Passes over the training images.")
    batch_size: int = _option(32, "Images in one optimizer step, over all processes.")
    gradient_accumulation_steps: int = _option(
        1, "Pieces that a process runs its part of a batch in, to need less memory."
    )
    optimizer: str | Callable[..., Any] = _option(
        "adamw", "Name of one in torch.optim; sgd has a momentum of 0.9."
    )
    learning_rate: float = _option(1e-3, "Learning rate of the head, at the end of the warm-up.")
    layer_decay: float = _option(
        1.0, "Each block trains with this times the learning rate of the block above."
    )
    warmup: float = _option(
        0.1, "Share of all steps in which the learning rate rises, before cosine or constant."
    )
    schedule: str | Callable[..., Any] = _option(
        "cosine", "Of the learning rate: cosine, constant or one of torch's schedulers."
    )
    weight_decay: float = _option(0.01, "Weight decay of kernels; biases and norms have none.")
    label_smoothing: float = _option(0.0, "Share of the target spread over all classes.")
    mixup: float = _option(
        0.0, "Mix each image with another: alpha of mixup's Beta distribution; 0 mixes none."
    )
    cutmix: float = _option(
        0.0, "Paste a part of another image: alpha of cutmix's Beta distribution; 0 pastes none."
    )
    class_weight: str | Sequence[float] | Mapping[str | int, float] | None = _option(
        None, "Of each class's loss: balanced, or a number for each class, separated by commas."
    )
    sampling: Literal["shuffled", "balanced"] = _option(
        "shuffled", "Every image once in an epoch, or draw every class equally often."
    )
    max_grad_norm: float | None = _option(None, "A gradient with a larger norm is scaled to this.")
    ema_decay: float | None = _option(
        None, "Keep a moving average of the weights, with this decay, and use that."
    )
    metrics: tuple[str, ...] = _option(
        (), f"Figures of each epoch's validation: {', '.join(METRICS[1:-1])}."
    )
    monitor: Metric = _option("accuracy", "What the best epoch is best in, on validation images.")
    temperature_scaling: bool = _option(
        False, "Divide logits so that probabilities fit the validation images; kept in the model."
    )
    restore_best_weights: bool = _option(
        True, "Keep the weights of the best epoch, where images validate; else those of the last."
    )
    patience: int | None = _option(None, "Stop after this many epochs without improvement.")
    precision: Literal["fp32", "bf16"] = _option("fp32", "Precision that the layers compute in.")
    image_size: int | None = _option(
        None, "Height and width that images are brought to; by default the model's, or 224."
    )
    crop_mode: Literal["center", "squash", "border"] | None = _option(
        None, "Crop the center, squash to the size, or put a border around; by default the model's."
    )
    crop_pct: float | None = _option(
        None, "Share of the resized image that is kept; by default 0.875 for center, or 1."
    )
    interpolation: Literal["bilinear", "bicubic"] | None = _option(
        None, "Of resizing; by default the model's, which is bilinear where it says none."
    )
    augment: Augment = _option(
        "none",
        "Of images in files: flip mirrors at random, crop crops too, trivial adds TrivialAugment.",
    )
    on_unreadable: Literal["skip", "stop"] = _option(
        "stop", "Stop at an image of a folder that can't be read, or skip it."
    )
    label_pattern: str | None = _option(
        None, "Regular expression; its first group, in a file's name, is the image's label."
    )
    validation_split: float = _option(
        0.2, "Share of the training folder that validates if nothing else does."
    )
    num_workers: int = _option(0, "Processes that read images; 0 reads them in the main process.")
    cache: bool = _option(True, "Run frozen layers once and keep their features on disk.")
    cache_copies: int = _option(
        1, "Augmented copies of each image in the cache, the plain one first."
    )
    cache_dtype: Literal["float32", "float16"] = _option(
        "float32", "Precision of the features on disk."
    )
    cache_dir: str | None = _option(None, "Where features go; by default into the output folder.")
    output_dir: str = _option("run", "Folder of checkpoints and all else that the run writes.")
    checkpoint_steps: int = _option(500, "Steps between checkpoints inside an epoch.")
    resume: bool = _option(
        False, "Carry on from the last checkpoint in the output folder, if there is one."
    )
    log_with: tuple[Any, ...] = _option(
        (), "Accelerate's trackers that get each epoch's figures: tensorboard, wandb, mlflow."
    )
    seed: int = _option(0, "Where all random numbers start.")

    def __post_init__(self) -> None:
        for name in ("metrics", "log_with", "unfreeze"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        for name in TrainConfig.__dataclass_fields__:
            object.__setattr__(self, name, _plain(getattr(self, name)))
        for name, hint in typing.get_type_hints(TrainConfig).items():
            _check_kind(name, getattr(self, name), hint)
        for names, is_right, expected in _RANGES:
            for name in names.split():
                number = _number(name, getattr(self, name), is_right, expected)
                object.__setattr__(self, name, number)
        if self.label_pattern is not None:
            checked_pattern(self.label_pattern)
        for metric in self.metrics:
            if metric not in METRICS:
                raise ValueError(
                    f"Received metrics={metric!r}; expected some of {', '.join(METRICS)}."
                    f"{_meant(metric, METRICS)} (vt.Callback adds figures of your own.)"
                )
        for name in ("optimizer", "schedule"):
            _check_made(name, getattr(self, name))
        _check_class_weight(self.class_weight)
        _check_together(self)
        _check_unfreeze(self)


def _check_kind(name: str, value: Any, hint: Any) -> None:
    """See that a setting is one of its choices, True or False, or text, where it has to be."""
    kinds = (hint, *typing.get_args(hint))
    if value is None and type(None) in kinds:
        return
    literals = [kind for kind in kinds if typing.get_origin(kind) is Literal]
    if choices := [choice for literal in literals for choice in typing.get_args(literal)]:
        if value not in choices:
            meant = _meant(value, choices)
            listed = ", ".join(map(repr, choices))
            raise ValueError(f"Received {name}={value!r}; expected one of {listed}.{meant}")
    elif hint is bool:
        switch(name, value)
    elif hint in (str, str | None) and not (isinstance(value, str | os.PathLike) and str(value)):
        raise ValueError(f"Received {name}={value!r}; expected a name.")


def _meant(value: Any, choices: Collection[str]) -> str:
    """` Perhaps ...?` with the choice that is meant, where it is known elsewhere by that value."""
    plain = str(value).lower().removeprefix("val_")
    if "," in plain and set(map(str.strip, plain.split(","))) <= set(choices):
        return " Name each by itself."
    plain = plain if plain in choices else _VALUES_ELSEWHERE.get(plain, "")
    return f" Perhaps {plain!r}?" if plain in choices else ""


def _plain(given: Any) -> Any:
    """NumPy's and torch's numbers and arrays as Python's own, which are compared and written."""
    if isinstance(given, Mapping):
        return {_plain(name): _plain(value) for name, value in given.items()}
    if isinstance(given, list | tuple):
        return tuple(map(_plain, given))
    if isinstance(given, str) or callable(given) or not hasattr(given, "tolist"):
        return given
    return _plain(given.tolist())


def _as_tuple(given: Any) -> Any:
    """One name, or a dictionary of epochs and layers, as the tuple that it stands for."""
    if isinstance(given, Mapping):
        return tuple(given.items())
    return given if isinstance(given, list | tuple) else (given,)


def _number(name: str, value: Any, is_right: Callable[[float], bool], expected: str) -> Any:
    """A number as it is, or as an int where it has to be whole; or None where that may be."""
    if value is None and TrainConfig.__dataclass_fields__[name].default is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and is_right(value)):
        raise ValueError(f"Received {name}={value!r}; expected {expected}.")
    return int(value) if expected.startswith("a whole number") else value


def _check_made(name: str, given: Any) -> None:
    """See that an optimizer or a schedule is a name, or makes one."""
    if given is None or isinstance(given, int | float):
        raise ValueError(f"Received {name}={given!r}; expected a name, or what makes one.")
    made_by = str(getattr(given, "__module__", "")).partition(".")[0]
    if not isinstance(given, str) and made_by in ("keras", "tf_keras"):
        called = getattr(given, "__name__", type(given).__name__)
        raise ValueError(
            f"Received {name}={called}, which is Keras's; expected one of torch's, by its name or "
            f"its class."
        )
    if not isinstance(given, str) and not callable(given):
        kind = type(given).__name__
        raise ValueError(
            f"Received {name}={kind}(...), which is made already, and what it is for isn't there "
            f"yet. Pass what makes it: functools.partial({kind}, ...)."
        )


def _check_together(config: TrainConfig) -> None:
    """See that no setting takes another's effect."""
    if config.warmup != TrainConfig.warmup and config.schedule not in OWN_SCHEDULES:
        raise ValueError(
            f"Received warmup={config.warmup!r}, which the schedules {', '.join(OWN_SCHEDULES)} "
            f"have, and one of torch's that was chosen has not. Leave one of them out."
        )
    chooses = config.restore_best_weights or config.patience is not None
    if config.monitor != "accuracy" and not chooses:
        raise ValueError(
            f"Received monitor={config.monitor!r} with restore_best_weights=False and no "
            f"patience, so that nothing would be chosen by it. Set restore_best_weights=True, "
            f"or leave monitor out."
        )
    if config.class_weight == "balanced" == config.sampling:
        raise ValueError(
            "Received class_weight='balanced' with sampling='balanced', which would balance the "
            "classes twice, so that the rarest counts most. Leave one of them out."
        )
    if config.head is None and config.cut is not None:
        raise ValueError(
            f"Received cut={config.cut!r} without a head. Name one (head='multilevel', say), or "
            f"stack your own first (vt.stack(vt.truncate(model, {config.cut!r}), layers))."
        )


def _check_unfreeze(config: TrainConfig) -> None:
    """See that layers are unfrozen in epochs that there are, and that some are frozen."""
    unfreeze, epochs = config.unfreeze, config.epochs
    if unfreeze and epochs == 1:
        raise ValueError(
            f"Received unfreeze={unfreeze!r} with epochs=1, after which nothing can be unfrozen. "
            f"Set more epochs, or leave unfreeze out."
        )
    for entry in unfreeze:
        is_pair = isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], str)
        if not (is_pair and isinstance(entry[0], int) and 0 < entry[0] < epochs):
            raise ValueError(
                f"Received unfreeze={unfreeze!r}; expected pairs of an epoch from 1 to "
                f"{epochs - 1} and a layer's name: unfreeze=((2, 'block5_conv1'),), say."
            )
    if unfreeze and config.freeze is None:
        raise ValueError(
            f"Received unfreeze={unfreeze!r}, and nothing is frozen. Name the layer that the run "
            f"starts frozen up to: freeze='block5_pool'."
        )


def _check_class_weight(given: Any) -> None:
    """See that weights of classes are `balanced`, or numbers of which one is above 0.

    Of a dictionary each may be 0, as classes that it doesn't name have a weight of 1.
    """
    if given is None or given == "balanced":
        return
    several = isinstance(given, Mapping | Sequence) and not isinstance(given, str)
    numbers = list(given.values() if isinstance(given, Mapping) else given) if several else []
    is_right = all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers)
    if not (numbers and is_right) or not (isinstance(given, Mapping) or any(numbers)):
        raise ValueError(
            f"Received class_weight={given!r}; expected 'balanced', or a number from 0 for each "
            f"class, and one above 0."
        )


def checked_pattern(pattern: str) -> re.Pattern[str]:
    """A pattern of labels, which is a regular expression with a group."""
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"Received label_pattern={pattern!r}, which isn't a regular expression: {error}."
        ) from error
    if not found.groups:
        raise ValueError(
            f"Received label_pattern={pattern!r}; expected a group around the label, as in "
            f"'^(.+)_[0-9]+' for cat_12.jpg."
        )
    return found


def _is_whole(value: float) -> bool:
    return value == int(value)


_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "epochs batch_size gradient_accumulation_steps cache_copies checkpoint_steps",
        lambda v: _is_whole(v) and v > 0,
        "a whole number from 1",
    ),
    ("patience image_size", lambda v: _is_whole(v) and v > 0, "a whole number from 1, or None"),
    ("crop_pct", lambda v: 0 < v <= 1, "a number above 0 and at most 1, or None"),
    ("num_workers seed", lambda v: _is_whole(v) and v >= 0, "a whole number from 0"),
    ("learning_rate", lambda v: v > 0, "a number above 0"),
    ("max_grad_norm", lambda v: v > 0, "a number above 0, or None"),
    ("weight_decay mixup cutmix", lambda v: v >= 0, "a number from 0"),
    ("layer_decay", lambda v: 0 < v <= 1, "a number above 0 and at most 1"),
    ("warmup label_smoothing", lambda v: 0 <= v < 1, "a number from 0 and below 1"),
    ("validation_split", lambda v: 0 < v < 1, "a number between 0 and 1"),
    ("ema_decay", lambda v: 0 < v < 1, "a number between 0 and 1, or None"),
)
