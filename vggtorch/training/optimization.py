"""What trains in which epoch, how fast, and the moving average of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import keras
import torch

from vggtorch import surgery
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
        ValueError: nothing trains.
    """
    chosen = set()
    for epoch in (0, *dict(config.unfreeze)):
        freeze_for_(model, config, epoch)
        if not model.trainable_variables:
            raise ValueError(
                f"No layer of {model.name} trains in epoch {epoch}. Unfreeze some "
                f"(vt.unfreeze_(model, since=name)), or freeze fewer."
            )
        chosen |= {id(v) for v in model.trainable_variables}
    return {i: v.value for i, v in enumerate(model.variables) if id(v) in chosen}


def make_optimizer(
    model: keras.Model, trained: Parameters, config: TrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW or SGD, with a group for each block's kernels and one for its biases and norms.

    A block is the part of a layer's name before the first underscore: block1 ... block5, fc1, head.
    Each group's `scale` is what the head's learning rate is multiplied by.

    Sources: Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018
    (rates that fall with depth); Loshchilov and Hutter, "Decoupled Weight Decay", 2019.
    """
    owner = {id(v): layer.name.split("_")[0] for layer in model.layers for v in layer.variables}
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for i, parameter in trained.items():
        block = owner[id(model.variables[i])]
        groups.setdefault((block, parameter.ndim > 1), []).append(parameter)
    blocks = list(dict.fromkeys(block for block, _ in groups))
    described = [
        {
            "params": members,
            "scale": config.layer_decay ** (len(blocks) - 1 - blocks.index(block)),
            "weight_decay": config.weight_decay if is_kernel else 0.0,
        }
        for (block, is_kernel), members in groups.items()
    ]
    on_cuda = device.type == "cuda"
    if config.optimizer == "adamw":
        return torch.optim.AdamW(described, fused=on_cuda or device.type == "cpu")
    return torch.optim.SGD(described, momentum=0.9, fused=on_cuda)  # on a CPU, fused is slower


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
