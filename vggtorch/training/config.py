"""How to fine-tune: one frozen configuration, and the command line's options made from it."""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from vggtorch.training.data import Augment


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """How to fine-tune; every field is an option of `vggtorch finetune`.

    Raises:
        ValueError: a value outside its range, or two that contradict each other.
    """

    cut: str | None = _option(None, "last layer kept of the network, under the new head")
    head: Literal["tutorial", "linear", "mlp"] | None = _option(
        None, "new layers on top: the tutorial's, pooled linear, pooled MLP"
    )
    freeze: str | None = _option(None, "this layer and all below it are frozen")
    unfreeze: tuple[tuple[int, str], ...] = _option(
        (), "EPOCH:LAYER: from that epoch (the first is 0) that layer and all above it train"
    )
    epochs: int = _option(10, "passes over the training images")
    batch_size: int = _option(32, "images in one optimizer step, over all processes")
    accumulate: int = _option(1, "pieces that a process runs its part of a batch in")
    optimizer: Literal["adamw", "sgd"] = _option("adamw", "SGD has a momentum of 0.9")
    learning_rate: float = _option(1e-3, "of the head, at the end of the warm-up")
    layer_decay: float = _option(
        1.0, "each block trains with this times the learning rate of the block above"
    )
    warmup: float = _option(0.1, "share of all steps in which the learning rate rises")
    schedule: Literal["cosine", "constant"] = _option("cosine", "what follows the warm-up")
    weight_decay: float = _option(0.01, "for kernels, not for biases and norms")
    label_smoothing: float = _option(0.0, "share of the target spread over all classes")
    clip_norm: float | None = _option(None, "largest norm of the gradient")
    ema: float | None = _option(None, "decay of an average of the weights, kept and used")
    patience: int | None = _option(None, "stop after this many epochs without improvement")
    precision: Literal["fp32", "bf16"] = _option("fp32", "what the layers compute in")
    image_size: int = _option(224, "height and width of the images from a folder")
    augment: Augment = field(
        default="none",
        metadata={"help": "mirrored images; and random crops; and TrivialAugment (folders only)"},
    )
    broken: Literal["skip", "stop"] = _option("stop", "what an unreadable image in a folder does")
    holdout: float = _option(
        0.2, "share of the training folder that validates if nothing else does"
    )
    workers: int = _option(0, "processes that read images")
    cache: bool = _option(True, "run frozen layers once and keep their features on disk")
    cache_copies: int = _option(
        1, "augmented copies of each image in the cache, the plain one first"
    )
    cache_half: bool = _option(False, "keep features in half precision")
    cache_folder: str | None = _option(None, "where features go; by default into `folder`")
    folder: str = _option("run", "checkpoints and everything else that the run writes")
    checkpoint_steps: int = _option(500, "steps between checkpoints inside an epoch")
    resume: bool = _option(False, "carry on from the last checkpoint in `folder`, if there is one")
    tensorboard: bool = _option(False, "write curves for TensorBoard into `folder`")
    seed: int = _option(0, "where all random numbers start")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(TrainConfig)
        for name, hint in hints.items():
            choices = [c for a in (hint, *typing.get_args(hint)) for c in _choices(a)]
            if choices and (value := getattr(self, name)) is not None and value not in choices:
                raise ValueError(
                    f"Received {name}={value!r}; expected one of {', '.join(map(repr, choices))}."
                )
        for names, is_right, expected in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                may_be_none = TrainConfig.__dataclass_fields__[name].default is None
                if not (value is None and may_be_none) and not (
                    isinstance(value, int | float) and math.isfinite(value) and is_right(value)
                ):
                    raise ValueError(f"Received {name}={value!r}; expected {expected}.")
        if self.head is None and self.cut is not None:
            raise ValueError(
                f"Received cut={self.cut!r} without a head. Name one (tutorial, linear, mlp), or "
                f"stack your own first: model = vt.stack(vt.truncate(model, {self.cut!r}), layers)."
            )
        for entry in self.unfreeze:
            if len(entry) != 2 or not isinstance(entry[0], int) or not 0 < entry[0] < self.epochs:
                raise ValueError(
                    f"Received unfreeze={self.unfreeze!r}; expected pairs of an epoch from 1 to "
                    f"{self.epochs - 1} and a layer's name, such as ((2, 'block5_conv1'),)."
                )
        if self.unfreeze and self.freeze is None:
            raise ValueError(
                "Received unfreeze without freeze, so that nothing is frozen. Name the layer that "
                "the run starts frozen up to: freeze='block5_pool'."
            )


def _choices(hint: Any) -> tuple:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _is_whole(value: float) -> bool:
    return value == int(value)


_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "epochs batch_size accumulate image_size cache_copies checkpoint_steps",
        lambda v: _is_whole(v) and v > 0,
        "a whole number from 1",
    ),
    ("patience", lambda v: _is_whole(v) and v > 0, "a whole number from 1, or None"),
    ("workers seed", lambda v: _is_whole(v) and v >= 0, "a whole number from 0"),
    ("learning_rate", lambda v: v > 0, "a number above 0"),
    ("clip_norm", lambda v: v > 0, "a number above 0, or None"),
    ("weight_decay", lambda v: v >= 0, "a number from 0"),
    ("layer_decay", lambda v: 0 < v <= 1, "a number above 0 and at most 1"),
    ("warmup label_smoothing", lambda v: 0 <= v < 1, "a number from 0 and below 1"),
    ("holdout", lambda v: 0 < v < 1, "a number between 0 and 1"),
    ("ema", lambda v: 0 < v < 1, "a number between 0 and 1, or None"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one option for every field of TrainConfig to a parser."""
    hints = typing.get_type_hints(TrainConfig)
    for option in dataclasses.fields(TrainConfig):
        hint = hints[option.name]
        kind = next((a for a in typing.get_args(hint) if a is not types.NoneType), hint)
        flag = "--" + option.name.replace("_", "-")
        default = "" if option.default in (None, ()) else f" (default: {option.default})"
        kwargs: dict[str, Any] = {"help": option.metadata["help"].replace("%", "%%") + default}
        if hint is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        elif option.name == "unfreeze":
            kwargs |= {"type": _stage, "nargs": "+"}
        elif choices := _choices(hint) or _choices(kind):
            kwargs["choices"] = choices
        else:
            kwargs |= {"type": kind, "metavar": kind.__name__.upper()}
        # What was not asked for is left out, so that a plan can decide it.
        parser.add_argument(flag, default=argparse.SUPPRESS, **kwargs)


def _stage(text: str) -> tuple[int, str]:
    epoch, _, layer = text.partition(":")
    if not epoch.isdigit() or not layer:
        raise argparse.ArgumentTypeError(f"{text!r} isn't EPOCH:LAYER, such as 2:block5_conv1")
    return int(epoch), layer


def options_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of the options of `add_arguments` those that were given, as fields of TrainConfig."""
    given = vars(arguments)
    options = {f.name: given[f.name] for f in dataclasses.fields(TrainConfig) if f.name in given}
    if "unfreeze" in options:
        options["unfreeze"] = tuple(options["unfreeze"])
    return options
