"""TrainConfig's fields as options of the command line, and messages in the words of options."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vggtorch.architectures import ARCHITECTURES
from vggtorch.training import ELSEWHERE, NO_SETTINGS, TrainConfig

if TYPE_CHECKING:  # a type checker can't read choices that are made while the program runs
    ArchitectureName = str
else:
    ArchitectureName = Literal[tuple(ARCHITECTURES)]
Architecture = Annotated[ArchitectureName, typer.Option(help="The pretrained network.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A run's folder, a .keras file, hf://owner/name or a network's name."
    ),
]
Weights = Annotated[
    str, typer.Option(help="An architecture's weights: a weight set's name or a path.")
]
ImageSize = Annotated[
    int | None,
    typer.Option(help="Height and width that images are brought to for an architecture; else 224."),
]


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the user has given an option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _stages(values: list[str] | None) -> list[tuple[int, str]]:
    """EPOCH:LAYER as it stands on the command line as pairs of both."""
    stages = []
    for text in values or ():
        epoch, _, layer = text.partition(":")
        if not epoch.isdigit() or not layer:
            raise typer.BadParameter(f"{text!r} isn't EPOCH:LAYER, such as 2:block5_conv1")
        stages.append((int(epoch), layer))
    return stages


def _class_weight(text: str | None) -> str | tuple[float, ...] | None:
    """`balanced`, or numbers separated by commas."""
    if text is None or text == "balanced":
        return text
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        expected = "expected balanced, or numbers such as 1,2.5"
        raise typer.BadParameter(f"{text!r} was received; {expected}") from None


SHORT = {"learning_rate": "--lr", "batch_size": "-b", "output_dir": "-o"}  # beside the long names
# Types of fields on the command line that aren't TrainConfig's own, and what typer is to know.
_OTHER_TYPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "unfreeze": (list[str], {"metavar": "EPOCH:LAYER", "callback": _stages}),
    "class_weight": (str | None, {"metavar": "WEIGHTS", "callback": _class_weight}),
    "optimizer": (str, {}),
    "schedule": (str, {}),
}


def with_options_of_train_config(command: Callable[..., None]) -> Callable[..., None]:
    """Put one option for each field of TrainConfig in the place of a command's `**options`."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [p for p in own if p.kind is not p.VAR_KEYWORD]
    hints = typing.get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        hint, details = _OTHER_TYPES.get(field.name, (hints[field.name], {}))
        default, text = field.default, field.metadata["help"]
        if typing.get_origin(hint) is tuple:
            hint, details = list[str], {"metavar": "NAME"}
        if hint == list[str]:
            default, text = [], f"{text} May be given several times."
        flag = "--" + field.name.replace("_", "-")
        flags = [flag, SHORT[field.name]] if field.name in SHORT else []  # else typer makes it
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[hint, typer.Option(*flags, help=text, **details)],
            )
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


_FIELDS = "|".join(field.name for field in dataclasses.fields(TrainConfig))
_PYTHON_HINT = re.compile(r" \(vt\.(?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
_NO_OPTION = re.compile(  # hints that no option follows
    r"\n[^\n]* and include_top=False[^\n]*|: build the model with include_top=False"
    r"|include_top=False and stack a head of your own, or "
)
_STAGE = r"\((\d+), '([^']*)'\)"
_NAMES = (
    f"{_FIELDS}|weights|architecture|times|by|keep|seconds|size|out|lowest|highest|steps|count|top"
    "|shard_size|picture|draw|page|batch|repeats"
)
_NUMBERS = r"\((?:[\d.e+-]+,? ?)+\)"
_ARGUMENT = re.compile(rf"\b({_NAMES})=('[^']*'|\((?:{_STAGE},? ?)+\)|{_NUMBERS}|[\w.+-]*\w)")
_LONG_NAME = re.compile(rf"(?<![-\w/.])({_FIELDS})(?![-\w/.=])")


# What commands and their options are called elsewhere, beside the fields of TrainConfig.
_COMMANDS_ELSEWHERE = {
    "train": "finetune", "fit": "finetune", "fine_tune": "finetune", "tune": "finetune",
    "eval": "evaluate", "test": "evaluate", "validate": "evaluate", "val": "evaluate",
    "score": "evaluate", "infer": "predict", "inference": "predict", "classify": "predict",
    "embed": "features", "extract": "features", "summary": "inspect", "benchmark": "bench",
    "upload": "push", "help": "--help", "surgery": "inspect",
}  # fmt: skip
_OPTIONS_ELSEWHERE = {
    "model": "architecture", "arch": "architecture", "backbone": "architecture",
    "network": "architecture", "pretrained": "weights", "output": "out", "output_dir": "out",
    "topk": "top", "top_k": "top", "num_steps": "steps", "start_lr": "lowest", "end_lr": "highest",
    "bs": "batch", "batch_size": "batch", "size": "image_size", "img_size": "size",
    "image_size": "size", "val": "validation_split",
}  # fmt: skip


def wrong_usage(reason: str, arguments: Sequence[str], known: Sequence[str]) -> str:
    """What is wrong with a command line, with what was received and what may be meant.

    The command knows certain options.

    >>> wrong_usage("No such option: --bs", ["finetune", "photos", "--bs", "16"], ["--batch-size"])
    'No such option: --bs. Perhaps --batch-size?'
    >>> wrong_usage(
    ...     "Invalid value for '--epochs': Input should be a valid integer, unable to parse string "
    ...     "as an integer", ["finetune", "photos", "--epochs=few"], ["--epochs"],
    ... )
    "Received --epochs 'few'; expected a whole number"
    """
    if found := re.match(r"No such option: --([\w-]+)", reason):
        name = found[1].replace("-", "_")
        if name in NO_SETTINGS and "--epochs" in known:
            return as_options(f"{found[0]}. {NO_SETTINGS[name]}")
        for elsewhere in (ELSEWHERE, _OPTIONS_ELSEWHERE):
            if (option := f"--{elsewhere.get(name, '')}".replace("_", "-")) in known:
                return f"{found[0]}. Perhaps {option}?"
    found = re.match(r"No such command '([\w-]+)'", reason)
    if found and (meant := _COMMANDS_ELSEWHERE.get(found[1].replace("-", "_"))):
        return f"{found[0]}. Perhaps {meant}?"
    if found := re.search(
        r"Invalid value for (.+): Input should be a valid (integer|number)", reason
    ):
        number = "a whole number" if found[2] == "integer" else "a number"
        for flag in re.findall(r"'(-[\w-]+)'", found[1]):
            for place, argument in reversed([*enumerate(arguments)]):  # the last one counts
                value = argument.partition("=")[2]
                if argument == flag:
                    value = "".join(arguments[place + 1 : place + 2])
                if argument.partition("=")[0] == flag:
                    return f"Received {flag} {value!r}; expected {number}"
    return reason


def as_options(message: str) -> str:
    r"""A message that speaks of Python's arguments as one line that speaks of options.

    Hints for Python in parentheses, `(vt.stack(...))`, are left out.

    >>> as_options("Received epochs=0.\nStack a head (vt.stack(model, layers)), or head='linear'.")
    'Received --epochs 0. Stack a head, or --head linear.'
    >>> as_options("Received class_weight=(1.0, 2.5), 2 numbers for 3 classes.")
    'Received --class-weight 1.0,2.5, 2 numbers for 3 classes.'
    """

    def option(match: re.Match[str]) -> str:
        flag, value = "--" + match[1].replace("_", "-"), match[2].strip("'")
        if value in ("True", "None"):
            return flag if value == "True" else f"no {flag}"
        if stages := re.findall(_STAGE, value):
            return " ".join(f"{flag} {epoch}:{layer}" for epoch, layer in stages)
        if re.fullmatch(_NUMBERS, value):
            return f"{flag} {re.sub('[() ]', '', value).rstrip(',')}"
        return f"--no-{flag[2:]}" if value == "False" else f"{flag} {shlex.quote(value)}"

    message = re.sub(r"(?<=[^.:;])\n+", "; ", _NO_OPTION.sub("", message))
    message = _PYTHON_HINT.sub("", " ".join(message.split()))
    message = _ARGUMENT.sub(option, re.sub(r"TrainConfig\(([^()]*)\)", r"\1", message))
    return _LONG_NAME.sub(  # words such as `cut` may be meant as words
        lambda match: "--" + match[1].replace("_", "-") if "_" in match[1] else match[1], message
    )
