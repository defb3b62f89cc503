"""One optimizer step: the loss that is minimised, its gradient over a batch, and what it does."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import keras
import torch
from torch.nn import functional as F

from vggtorch.telling import tell
from vggtorch.training.config import TrainConfig
from vggtorch.training.data import arithmetic_of, as_input, check_labels, seeded
from vggtorch.training.mixing import mixed
from vggtorch.training.optimization import update_average_
from vggtorch.training.reading import Batch
from vggtorch.training.run import RunState


def train_step_(
    state: RunState, module: torch.nn.Module, batch: Batch, config: TrainConfig, accelerator: Any
) -> tuple[float, int]:
    """One optimizer step on a batch, of which each process runs its part.

    Where a GPU's memory doesn't suffice, the step runs again in twice as many pieces.

    Returns:
        The loss summed over the batch, and how many of its images were right.

    Raises:
        ValueError: labels that the model has no class for, or too little memory for one image.
        FloatingPointError: the loss or its gradient isn't finite; then the step isn't taken.
    """
    progress = state.progress
    for labels in (batch.labels, *([batch.partners[1]] if batch.partners else [])):
        check_labels(labels, state.model)
    while True:
        try:
            total = _gradients_(state, module, batch, config, accelerator)
            break
        except torch.OutOfMemoryError as error:
            if accelerator.num_processes > 1 or progress.pieces >= len(batch.labels):
                raise ValueError(
                    f"The GPU's memory doesn't suffice for batches of {config.batch_size} on "
                    f"{accelerator.num_processes} process(es), each running its part in "
                    f"{progress.pieces} piece(s) ({error}). Set more gradient_accumulation_steps "
                    f"or a smaller batch_size."
                ) from error
        progress.pieces *= 2
        tell(
            f"The GPU's memory doesn't suffice: from step {progress.done + 1} on, each batch of "
            f"{config.batch_size} runs in {progress.pieces} pieces.",
        )
        torch.cuda.empty_cache()
    norm = accelerator.clip_grad_norm_(state.trained.values(), config.max_grad_norm or math.inf)
    loss, correct = accelerator.reduce(total).tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        last = Path(config.output_dir, "last.pt")
        good = f" {last} is good (vt.load_checkpoint_ takes its weights)." if last.exists() else ""
        raise FloatingPointError(
            f"The loss is {loss / batch.size:.4g} and the norm of its gradient {norm:.4g} in step "
            f"{progress.step + 1} of epoch {progress.epoch + 1}. That step was not taken.{good} "
            f"Begin a new run with a lower learning_rate, a max_grad_norm or precision='fp32'."
        )
    state.optimizer.step()
    if config.ema_decay is not None:
        update_average_(state.average, state.trained, config.ema_decay, progress.done)
    return loss, int(correct)


def _gradients_(
    state: RunState, module: torch.nn.Module, batch: Batch, config: TrainConfig, accelerator: Any
) -> torch.Tensor:
    """Leave the gradient of the mean loss; (2,): loss summed and number right in this process."""
    device, progress = accelerator.device, state.progress
    state.optimizer.zero_grad()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    images, targets, labels = batch.images, batch.labels, batch.labels
    if batch.partners is not None:
        partners, partner_labels = batch.partners
        images, targets = mixed(
            network_input(images, state.model, device),
            labels.to(device),
            (network_input(partners, state.model, device), partner_labels.to(device)),
            state.model.output_shape[1],
            config,
            progress.done,
        )
        labels = targets.argmax(1)  # the class of the larger share
    pieces = [tensor.chunk(progress.pieces) for tensor in (images, targets, labels)]
    with seeded(config.seed, progress.done, accelerator.process_index):
        if device.type == "cuda":
            torch.cuda.manual_seed(torch.initial_seed())
        for i, (x, target, y) in enumerate(zip(*pieces, strict=True)):
            x = network_input(x, state.model, device)
            target, y = target.to(device), y.to(device)
            is_last = i == len(pieces[0]) - 1
            penalty = regularization(state.model) if is_last else x.new_zeros(())
            with contextlib.nullcontext() if is_last else accelerator.no_sync(module):
                with accelerator.autocast():
                    outputs = module(x)
                loss = F.cross_entropy(
                    outputs.float(),
                    target,
                    weight=state.class_weight,
                    reduction="sum",
                    label_smoothing=config.label_smoothing,
                )
                # DistributedDataParallel takes the mean over processes; here over the images.
                accelerator.backward(loss * accelerator.num_processes / batch.size + penalty)
            loss = loss.detach() + len(batch.labels) * penalty.detach()
            total += torch.stack([loss, (outputs.argmax(1) == y).sum()])
    return total


def regularization(model: keras.Model) -> torch.Tensor:
    """What the regularisers of all trainable weights add to the loss, as in Keras's fit."""
    kept = [v for v in model.trainable_variables if v.regularizer is not None]
    zero = torch.zeros((), device=model.variables[0].value.device)
    return sum((v.regularizer(v) for v in kept), start=zero)


def network_input(x: torch.Tensor, model: keras.Model, device: torch.device) -> torch.Tensor:
    """Images as the model takes them, or features, on the device."""
    return as_input(x.to(device, non_blocking=True), arithmetic_of(model))
