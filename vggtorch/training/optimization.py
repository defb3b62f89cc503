"""What trains in which epoch, how fast, and the moving average of it."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import torch

from vggtorch import files, surgery
from vggtorch.keras_graph import all_layers
from vggtorch.training.config import TrainConfig

Parameters = dict[int, torch.nn.Parameter]  # by index in the model's `variables`


def freeze_for_(model: keras.Model, config: TrainConfig, epoch: int) -> None:
    """Freeze what this epoch freezes, whatever was frozen before."""
    if config.freeze is None:
        return
    surgery.unfreeze_(model)
    surgery.freeze_(model, until=config.freeze)
    for start, since in config.unfreeze:
        if start <= epoch:
            surgery.unfreeze_(model, since=since)


@contextlib.contextmanager
def frozen_layers_kept(model: keras.Model) -> Iterator[None]:
    """Put every layer's and every variable's `trainable` flag back at the end."""
    owners = [*all_layers(model), *model.variables]  # a layer's flag sets those inside of it first
    flags = [owner.trainable for owner in owners]
    try:
        yield
    finally:
        for owner, flag in zip(owners, flags, strict=True):
            owner.trainable = flag


def trained_parameters(model: keras.Model, config: TrainConfig) -> Parameters:
    """All that trains in some epoch; the model is left as the last of them has it.

    Raises:
        ValueError: nothing trains, or nothing more where something is unfrozen.
    """
    chosen: set[int] = set()
    for epoch in sorted({0, *dict(config.unfreeze)}):
        freeze_for_(model, config, epoch)
        if not model.trainable_variables:
            raise ValueError(
                f"No layer of {model.name} trains in epoch {epoch + 1}. Unfreeze some "
                f"(vt.unfreeze_(model, since=name)), or freeze fewer."
            )
        before, chosen = chosen, chosen | {id(v) for v in model.trainable_variables}
        if before == chosen:
            raise ValueError(
                f"Received unfreeze={config.unfreeze!r}, and in epoch {epoch} nothing trains that "
                f"didn't before. Name a lower layer: that and all above it train."
            )
    return {i: v.value for i, v in enumerate(model.variables) if id(v) in chosen}


def _layers(model: keras.Model) -> Iterator[keras.Layer]:
    """A model's layers, and in the place of a nested model those inside of it."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield layer  # which may have weights of its own
            yield from _layers(layer)
        else:
            yield layer


def make_optimizer(
    model: keras.Model, trained: Parameters, config: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """An optimizer of torch's: a group for each block's kernels, one for its biases and norms.

    A block is the part of a layer's name before the first underscore: block1 ... block5, fc1, head.
    Each group's `scale` is what the head's learning rate is multiplied by.

    Raises:
        ValueError: no such optimizer, or one that can't train this.

    Sources: Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018
    (rates that fall with depth); Loshchilov and Hutter, "Decoupled Weight Decay", 2019.
    """
    owner = {id(v): layer.name.split("_")[0] for layer in _layers(model) for v in layer.variables}
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for i, parameter in trained.items():
        block = owner[id(model.variables[i])]
        groups.setdefault((block, parameter.ndim > 1), []).append(parameter)
    blocks = list(dict.fromkeys(block for block, _ in groups))
    described: list[dict[str, Any]] = [
        {
            "params": members,
            "scale": config.layer_decay ** (len(blocks) - 1 - blocks.index(block)),
            "weight_decay": config.weight_decay if is_kernel else 0.0,
        }
        for (block, is_kernel), members in groups.items()
    ]
    given = config.optimizer
    kind: Callable[..., Any] = given  # type: ignore[assignment]
    if isinstance(given, str):
        kind = torch_class("optimizer", given, torch.optim, torch.optim.Optimizer)
    options: dict[str, Any] = {"lr": config.learning_rate}
    accepted = set(inspect.signature(kind).parameters)
    if kind is torch.optim.SGD:
        options |= {"momentum": 0.9, "fused": device.type == "cuda"}  # on a CPU, fused is slower
    elif "fused" in accepted and kind in (torch.optim.AdamW, torch.optim.Adam):
        options["fused"] = device.type in ("cuda", "cpu")
    if inspect.isclass(kind) and "weight_decay" not in accepted:
        if config.weight_decay not in (0, TrainConfig.weight_decay):
            raise ValueError(
                f"Received weight_decay={config.weight_decay!r} with optimizer={name_of(given)!r}, "
                f"which has none. Leave one of them out."
            )
        described = [{k: v for k, v in g.items() if k != "weight_decay"} for g in described]
    try:
        made = kind(described) if _takes_no_rate(kind) else kind(described, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Received optimizer={name_of(given)!r}, which can't train this network: "
            f"{files.first_line(error)}"
        ) from error
    if not isinstance(made, torch.optim.Optimizer) or len(made.param_groups) != len(described):
        raise ValueError(
            f"Received optimizer={name_of(given)!r}, which makes a {type(made).__name__}; expected "
            f"a torch.optim.Optimizer of the groups that it is called with."
        )
    _check_counts(made, config)
    return made


def _check_counts(made: torch.optim.Optimizer, config: TrainConfig) -> None:
    """See that what made an optimizer hasn't set what every group and step sets again."""
    given, parameters = config.optimizer, inspect.signature(type(made)).parameters
    bound = given.keywords if isinstance(given, functools.partial) else {}
    for name, setting in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        value = bound.get(name, made.defaults.get(name))
        usual = parameters[name].default if name in parameters else value
        is_usual = name not in bound and (value == usual or not isinstance(value, int | float))
        if not is_usual and value != getattr(config, setting):
            raise ValueError(
                f"Received optimizer={name_of(given)!r}, which sets {name}={value!r}, and that "
                f"would not count: it changes by group and step. Pass {setting}={value!r} instead."
            )


def _takes_no_rate(kind: Callable[..., Any]) -> bool:
    """Whether a callable takes no learning rate, which each step sets anyway."""
    if inspect.isclass(kind) or isinstance(kind, functools.partial):
        return False
    parameters = inspect.signature(kind).parameters.values()
    return not any(p.name == "lr" or p.kind is p.VAR_KEYWORD for p in parameters)


def name_of(given: Any) -> str:
    """How a setting reads: the name of a class or a function, with its bound arguments.

    >>> import functools, torch
    >>> name_of(functools.partial(torch.optim.SGD, momentum=0.95))
    'SGD(momentum=0.95)'
    """
    if isinstance(given, functools.partial):
        bound = [*map(repr, given.args), *(f"{k}={v!r}" for k, v in given.keywords.items())]
        return f"{name_of(given.func)}({', '.join(bound)})"
    return getattr(given, "__qualname__", type(given).__name__) if callable(given) else str(given)


def torch_class(
    setting: str, name: str, module: Any, base: type, others: Sequence[str] = ()
) -> Any:
    """The class of this name, however it is capitalised, of those of a kind in a module of torch.

    The message names the setting, and `others` that it may be. It refuses what needs more than a
    gradient.
    """
    kinds = {
        key.lower(): value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, base) and not key.startswith("_")
        and value not in (base, torch.optim.LBFGS, torch.optim.SparseAdam)
    }  # fmt: skip
    known, last = [*others, *sorted(kinds)], name.lower().rpartition(".")[2]
    if name.lower() in kinds:
        return kinds[name.lower()]
    near = [last] if last in known else difflib.get_close_matches(last, known, 1)
    near = near or [k for k in known if last and (last in k or k in last)][:1]
    raise ValueError(
        f"Received {setting}={name!r}; expected one of {', '.join(known)}."
        + (f" Perhaps {near[0]}?" if near else "")
    )


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The head's learning rate in a step (from 0) of `steps`: linear warm-up, cosine to 0."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def set_learning_rate_(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group its share of the head's learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


@torch.no_grad()
def update_average_(
    average: dict[int, torch.Tensor], trained: Parameters, decay: float, step: int
) -> None:
    """Move the average of the weights towards the weights after a step (from 0).

    Early on the average is over few steps, as in Polyak averaging with a warm-up.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.values()), list(trained.values()), 1 - decay)


@contextlib.contextmanager
def averaged(
    trained: Parameters,
    average: dict[int, torch.Tensor],
    held: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Iterator[None]:
    """Run the model on the averaged weights, if there are any; on its own again afterwards.

    Nothing stops the run while `held`, in which the two change places.
    """

    @torch.no_grad()
    def swap() -> None:
        for i, value in average.items():
            kept = trained[i].clone()
            trained[i].copy_(value)
            value.copy_(kept)

    try:
        with held():
            swap()
        yield
    finally:
        with held():
            swap()
