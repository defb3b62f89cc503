"""Fine-tuning: one frozen TrainConfig, one plain torch loop on Hugging Face Accelerate.

Every random number is a function of (seed, epoch, image) or (seed, step), and the learning rate and
what is frozen are functions of step and epoch. So a run that was killed goes on exactly where its
last checkpoint stands, inside an epoch too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from vggtorch import surgery
from vggtorch.lowering.lowered import part
from vggtorch.lowering.modules import BatchNorm
from vggtorch.models.preprocessing import remember_, weight_set
from vggtorch.training import checkpoints, data
from vggtorch.training.config import TrainConfig
from vggtorch.training.data import Augment, Folder, Items, Planner, Source
from vggtorch.training.display import Display, display
from vggtorch.training.features import cached_features, frozen_end

# 1. The network: its head, what trains when, how fast


def with_head(model: keras.Model, config: TrainConfig, classes: int) -> keras.Model:
    """A new model: `model` up to `config.cut` with the head that `config.head` names.

    `tutorial` is the seed's, on normalised maps: on maps as large as pixel values, which `oxford`
    has, it learns nothing. `linear` and `mlp` are fastai's, on the mean and the maximum of each
    feature map, normalised. Source: Howard and Gugger, "fastai: a layered API", 2020.
    """
    layers = keras.layers
    with data.seeded(config.seed):
        base = surgery.truncate(model, config.cut or model.layers[-1].name)
        x = base.output
        if len(x.shape) != 4:
            raise ValueError(
                f"The head {config.head!r} needs feature maps (N, H, W, C) under it; {base.name} "
                f"ends in {tuple(x.shape)}. Name a layer to cut at: cut='block5_pool'."
            )
        if config.head == "tutorial":
            x = layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name="head_norm")(x)
            x = layers.Conv2D(64, 3, activation="relu", name="head_conv")(x)
            x = layers.MaxPooling2D(2, name="head_pool")(x)
            x = layers.Flatten(name="head_flatten")(x)
            x = layers.Dense(256, activation="relu", name="head_hidden")(x)
            x = layers.Dropout(0.5, name="head_dropout")(x)
        else:
            mean = layers.GlobalAveragePooling2D(name="head_mean")(x)
            maximum = layers.GlobalMaxPooling2D(name="head_max")(x)
            x = layers.Concatenate(name="head_pool")([mean, maximum])
            x = layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name="head_norm")(x)
        if config.head == "mlp":
            x = layers.Dropout(0.25, name="head_dropout")(x)
            x = layers.Dense(512, activation="relu", name="head_hidden")(x)
            x = layers.BatchNormalization(epsilon=1e-5, momentum=0.9, name="head_norm2")(x)
            x = layers.Dropout(0.5, name="head_dropout2")(x)
        x = layers.Dense(classes, activation="softmax", name="head_predictions")(x)
        return remember_(keras.Model(base.inputs, x, name=model.name), weight_set(model))


def _freeze_for_(model: keras.Model, config: TrainConfig, epoch: int) -> None:
    """Freeze what this epoch freezes, whatever was frozen before."""
    if config.freeze is None:
        return
    surgery.unfreeze_(model)
    surgery.freeze_(model, until=config.freeze)
    for start, since in config.unfreeze:
        if start <= epoch:
            surgery.unfreeze_(model, since=since)


def _trained(model: keras.Model, config: TrainConfig) -> dict[int, torch.nn.Parameter]:
    """All that trains in some epoch, by index in `model.variables`."""
    chosen = set()
    for epoch in (0, *dict(config.unfreeze)):
        _freeze_for_(model, config, epoch)
        chosen |= {id(v) for v in model.trainable_variables}
    if not chosen:
        raise ValueError(
            f"No layer of {model.name} trains. Unfreeze some (vt.unfreeze_(model, since=name)), or "
            f"freeze fewer."
        )
    return {i: v.value for i, v in enumerate(model.variables) if id(v) in chosen}


def _optimizer(
    model: keras.Model,
    trained: dict[int, torch.nn.Parameter],
    config: TrainConfig,
    device: torch.device,
) -> torch.optim.Optimizer:
    """AdamW or SGD, with a group for each block's kernels and one for its biases and norms.

    A block is the part of a layer's name before the first underscore: block1 ... block5, fc1, head.
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
    return torch.optim.SGD(described, momentum=0.9, fused=on_cuda)  # slower on a CPU


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The head's learning rate in a step (from 0) of `steps`: linear warm-up, cosine to 0."""
    warmup = round(config.warmup * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@contextlib.contextmanager
def logits(model: keras.Model) -> Iterator[None]:
    """Let a model that ends in softmax put out what goes into it; back to softmax afterwards.

    The cross-entropy of logits keeps its gradient where a probability rounds to 0 or 1.
    """
    layer = model.outputs[0]._keras_history.operation
    while isinstance(layer, keras.Model):
        layer = layer.outputs[0]._keras_history.operation
    activation = getattr(layer, "activation", keras.activations.linear)
    allowed = (keras.activations.softmax, keras.activations.linear)
    if isinstance(layer, keras.layers.Softmax) or activation not in allowed:
        raise ValueError(
            f"{model.name} ends in {layer.name} ({type(layer).__name__}, activation "
            f"{getattr(activation, '__name__', activation)}); expected "
            f"Dense(classes, activation='softmax'), or activation=None for logits."
        )
    if activation is keras.activations.linear:
        yield
        return
    layer.activation = keras.activations.linear
    try:
        yield
    finally:
        layer.activation = activation


# 2. Where a run stands


@dataclass
class Progress:
    """Where a run stands; with the weights and the optimizer's state, all that follows from it."""

    epoch: int = 0
    step: int = 0  # in this epoch
    done: int = 0  # steps in all
    loss: float = 0.0  # summed over this epoch's images
    correct: int = 0
    images: int = 0
    seconds: float = 0.0  # in this epoch
    accumulate: int = 1
    best_epoch: int = 0
    epochs: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class _Run:
    """What a run works with."""

    config: TrainConfig
    model: keras.Model
    accelerator: Any
    optimizer: torch.optim.Optimizer
    trained: dict[int, torch.nn.Parameter]  # by index in model.variables
    average: dict[int, torch.Tensor]  # of `trained`, over the steps; empty without config.ema
    progress: Progress
    identity: dict[str, Any]  # what a run that resumes must have in common with this one

    @property
    def last(self) -> Path:
        return Path(self.config.folder) / "last.pt"

    @property
    def best(self) -> Path:
        return Path(self.config.folder) / "best.pt"


@dataclass(frozen=True)
class History:
    """What came out of a run.

    Attributes:
        model: the trained Keras model, with the weights of the best epoch.
        epochs: loss, accuracy, val_loss, val_accuracy, learning_rate and seconds of each.
        best_epoch: the epoch (from 0) with the highest validation accuracy; the last without one.
        classes: their names by index; numbers where the data has no names.
        config: what the run was told to do.
        validation: what it was validated on.
    """

    model: keras.Model
    epochs: list[dict[str, float]]
    best_epoch: int
    classes: tuple[str, ...]
    config: TrainConfig
    validation: Folder | Items | None


def _save(run: _Run, is_best: bool = False) -> None:
    if run.accelerator.is_main_process:
        content = {
            **run.identity,
            "variables": [v.value.detach() for v in run.model.variables],
            "average": run.average,
            "optimizer": run.optimizer.state_dict(),
            "progress": dataclasses.asdict(run.progress),
        }
        checkpoints.write(run.last, content, also=run.best if is_best else None)


def _restore_(run: _Run) -> None:
    """Carry on from the run's last checkpoint."""
    content = checkpoints.read(run.last)
    for name, expected in run.identity.items():
        received = content[name]
        if name == "config" and received != expected:
            differing = [
                f"{field}={expected[field]!r} (was {received.get(field)!r})"
                for field in expected
                if received.get(field) != expected[field]
            ]
            raise ValueError(
                f"{run.last} belongs to another run: {', '.join(differing)}. Resume with the "
                f"options of that run, or begin anew in another folder."
            )
        if received != expected:
            raise ValueError(
                f"{run.last} was written for other images or another split of them. Resume with "
                f"the same data, or begin anew in another folder."
            )
    _assign_(run.model, content["variables"], run.last)
    for i, value in content["average"].items():
        run.average[i].copy_(value)
    run.optimizer.load_state_dict(content["optimizer"])
    for name, value in content["progress"].items():
        setattr(run.progress, name, value)


def load_checkpoint_(model: keras.Model, path: str | Path) -> keras.Model:
    """Give a model the weights of a checkpoint, the averaged ones if the run kept them; in place.

    Raises:
        ValueError: no checkpoint, a damaged one, or one of another network.
    """
    content = checkpoints.read(Path(path))
    _assign_(model, content["variables"], path)
    with torch.no_grad():
        for i, value in content["average"].items():
            model.variables[i].value.copy_(value)
    return model


def _assign_(model: keras.Model, tensors: list[torch.Tensor], path: str | Path) -> None:
    expected = [tuple(v.shape) for v in model.variables]
    received = [tuple(t.shape) for t in tensors]
    if expected != received:
        raise ValueError(
            f"{path} holds {len(received)} tensors, whose shapes aren't those of the "
            f"{len(expected)} of {model.name}. Build the model as it was when the run began."
        )
    with torch.no_grad():
        for variable, tensor in zip(model.variables, tensors, strict=True):
            variable.value.copy_(tensor)


# 3. The loop


def finetune(
    model: keras.Model,
    train: str | Path | Dataset | DataLoader,
    validation: str | Path | Dataset | DataLoader | None = None,
    config: TrainConfig | None = None,
) -> History:
    """Fine-tune a model that ends in class probabilities or logits.

    Args:
        model: a Functional Keras model. With `config.head` a new model is made of it; without, it
            is trained in place.
        train: a folder with a subfolder for each class, or with `train` and `val` that have them;
            or a Dataset or DataLoader of (image, label), for which see `vggtorch.data.Items`.
        validation: the same. Without it, `config.holdout` of a training folder is held out.
        config: a TrainConfig, or a Plan that `advise` made.

    Raises:
        ValueError: data, model and config that don't fit each other, or the folder's checkpoint.
        FloatingPointError: the loss or its gradient isn't finite any more.
        OSError: a checkpoint couldn't be written.
    """
    config = config or TrainConfig()
    training, held, plan, classes = _read_data(train, validation, config)
    if config.head is not None:
        model = with_head(model, config, len(classes))
    classes = _check_classes(model, classes)
    run = _begin(model, training, held, config)
    progress, accelerator = run.progress, run.accelerator
    steps = sum(len(plan(epoch)) for epoch in range(config.epochs))
    curves = Path(config.folder) if config.tensorboard else None
    stage = None
    with logits(model), display(accelerator.is_main_process, curves) as show:
        while progress.epoch < config.epochs and not _is_stale(progress, config):
            epoch = progress.epoch
            if stage is None or epoch in dict(config.unfreeze):
                _freeze_for_(model, config, epoch)
                stage = _prepare(run, training, held, show)
                module = accelerator.prepare_model(stage.module)
            keys = [[stage.key(index, epoch) for index in batch] for batch in plan(epoch)]
            show.begin(f"epoch {epoch + 1}/{config.epochs}", sum(map(len, keys)), progress.images)
            began = time.perf_counter() - progress.seconds
            module.train()
            for images, labels, count in _loaded(run, stage, keys[progress.step :]):
                rate = learning_rate(config, progress.done, steps)
                for group in run.optimizer.param_groups:
                    group["lr"] = rate * group["scale"]
                loss, correct = _step(run, module, images, labels, count)
                progress.step += 1
                progress.done += 1
                progress.loss += loss
                progress.correct += correct
                progress.images += count
                progress.seconds = time.perf_counter() - began
                show.advance(count, progress.loss / progress.images)
                if progress.step % config.checkpoint_steps == 0 and progress.step < len(keys):
                    _save(run)
            result = {
                "loss": progress.loss / progress.images,
                "accuracy": progress.correct / progress.images,
                "learning_rate": rate,
            }
            if stage.validation is not None:
                with _averaged(run):
                    outputs, labels = _predict(run, stage.module, stage.validation)
                    penalty = _penalty(run).item()
                result["val_loss"] = F.cross_entropy(outputs, labels).item() + penalty
                result["val_accuracy"] = (outputs.argmax(1) == labels).double().mean().item()
            result["seconds"] = time.perf_counter() - began
            progress.epochs.append(result)
            is_best = _is_better(result, progress.epochs[progress.best_epoch])
            if is_best:
                progress.best_epoch = epoch
            progress.epoch, progress.step = epoch + 1, 0
            progress.loss, progress.correct, progress.images, progress.seconds = 0.0, 0, 0, 0.0
            _save(run, is_best)
            show.end(epoch, result)
    accelerator.wait_for_everyone()
    load_checkpoint_(model, run.best)
    return History(model, progress.epochs, progress.best_epoch, classes, config, held)


def _begin(
    model: keras.Model, training: Folder | Items, held: Folder | Items | None, config: TrainConfig
) -> _Run:
    """Set up a run, where its last checkpoint stands if it resumes."""
    if config.patience is not None and held is None:
        raise ValueError(
            f"Received patience={config.patience} and no validation data to see improvement on. "
            f"Pass validation, or patience=None."
        )
    active = [x.name for x in model._flatten_layers() if x.activity_regularizer is not None]
    if active:
        raise ValueError(
            f"The layers {', '.join(active)} have an activity_regularizer, which finetune doesn't "
            f"add to the loss. Use Keras's fit, or layers without."
        )
    accelerator = _accelerator(config)
    model.to(accelerator.device)
    trained = _trained(model, config)
    run = _Run(
        config,
        model,
        accelerator,
        _optimizer(model, trained, config, accelerator.device),
        trained,
        {i: p.detach().clone() for i, p in trained.items()} if config.ema else {},
        Progress(accumulate=config.accumulate),
        {"config": _settings(config), "data": [_identity(s) for s in (training, held)]},
    )
    if not run.last.exists():
        return run
    if not config.resume:
        raise ValueError(
            f"{run.last} exists: the folder holds another run. Pass resume=True to carry that on, "
            f"or choose another folder."
        )
    _restore_(run)
    return run


def _accelerator(config: TrainConfig) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # by `accelerate launch`
    precision = "bf16" if config.precision == "bf16" else launched
    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()  # an earlier run in this process had another one
    # Told so, Accelerate joins the processes of torchrun on a machine without GPUs too.
    return Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available())


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What of a configuration decides how a run ends."""
    elsewhere = {"folder", "cache_folder", "resume", "workers", "tensorboard", "checkpoint_steps"}
    return {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(TrainConfig)
        if f.name not in elsewhere
    }


def _identity(source: Folder | Items | None) -> str:
    if isinstance(source, Folder):
        return source.digest
    return "" if source is None else f"{len(source)} items"


def _read_data(
    train: str | Path | Dataset | DataLoader,
    validation: str | Path | Dataset | DataLoader | None,
    config: TrainConfig,
) -> tuple[Folder | Items, Folder | Items | None, Planner, tuple[str, ...]]:
    """Training source, validation source, the batches of each epoch, and the classes' names."""

    def read(given: str | Path | Dataset | DataLoader, augment: Augment) -> tuple[Any, Planner]:
        if isinstance(given, str | Path):
            folder = data.read_folder(given, config.image_size, augment, config.broken, config.seed)
            return folder, data.shuffled(len(folder), config.batch_size, config.seed)
        return data.as_source(given, config.seed, config.batch_size)

    if validation is None and isinstance(train, str | Path):
        train, validation = data.find_splits(Path(train))
    training, plan = read(train, config.augment)
    if isinstance(training, Folder) and config.augment == "none" and config.cache_copies > 1:
        raise ValueError(
            f"Received cache_copies={config.cache_copies} with augment='none': the copies would be "
            f"equal. Choose an augmentation, or one copy."
        )
    held = read(validation, "none")[0] if validation is not None else None
    if held is None and isinstance(training, Folder):
        training, held = data.hold_out(training, config.holdout)
        plan = data.shuffled(len(training), config.batch_size, config.seed)
    names = [source.classes for source in (training, held) if source is not None and source.classes]
    if len(set(names)) > 1:
        only = [sorted(set(a) - set(b)) for a, b in (names, names[::-1])]
        raise ValueError(
            f"The classes differ: only in the training data {only[0]}, only in the validation data "
            f"{only[1]}. Expected the same, in the same order."
        )
    return training, held, plan, names[0] if names else ()


def _check_classes(model: keras.Model, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the model's outputs, numbers where the data has no names."""
    shape = model.output_shape
    if not isinstance(shape, tuple) or len(shape) != 2:
        raise ValueError(
            f"{model.name} puts out {shape}; expected (N, classes). Stack a head on it, or name "
            f"one: TrainConfig(head='linear')."
        )
    if classes and len(classes) != shape[1]:
        raise ValueError(
            f"The data has {len(classes)} classes ({', '.join(classes)}), and {model.name} "
            f"puts out {shape[1]}. Stack a head of {len(classes)} on it, or name one: "
            f"TrainConfig(head='linear')."
        )
    return classes or tuple(map(str, range(shape[1])))


@dataclass(frozen=True)
class _Stage:
    """What runs between two changes of what is frozen."""

    module: torch.nn.Module
    training: Source
    validation: Source | None
    is_cached: bool

    def key(self, index: int, epoch: int) -> data.Key:
        return (index, index + epoch if self.is_cached else data.draw(index, epoch))


def _prepare(
    run: _Run, training: Folder | Items, held: Folder | Items | None, show: Display
) -> _Stage:
    """The part of the model that trains, and what goes into it: images, or cached features."""
    model, config = run.model, run.config
    end = frozen_end(model) if config.cache else model.inputs[0]
    tail = part(end, model.outputs[0])
    for module in tail.modules():
        if isinstance(module, BatchNorm):
            # In pieces, batch norm is of each piece, in one process and in several.
            module.synchronized = run.accelerator.num_processes > 1 and config.accumulate == 1
    if end is model.inputs[0]:
        return _Stage(tail, training, held, is_cached=False)
    folder = Path(config.cache_folder or Path(config.folder) / "features")

    def features(source: Folder | Items, copies: int) -> Source:
        show.begin("frozen layers, once", copies * len(source))
        return cached_features(
            keras.Model(model.inputs, end),
            source,
            folder,
            weights=weight_set(model),
            copies=copies,
            half=config.cache_half,
            workers=config.workers,
            accelerator=run.accelerator,
            advance=show.advance,
        )

    return _Stage(
        tail,
        features(training, config.cache_copies),
        features(held, 1) if held is not None else None,
        is_cached=True,
    )


def _loaded(
    run: _Run, stage: _Stage, keys: list[list[data.Key]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Of each batch the part that this process runs, images and labels, and the batch's size."""
    mine = [batch[run.accelerator.process_index :: run.accelerator.num_processes] for batch in keys]
    # A batch of fewer images than processes leaves some without a part. They take part in the
    # step all the same, as the others wait for them, with an image of which nothing is used.
    listed = [some or batch[:1] for some, batch in zip(mine, keys, strict=True)]
    loaded = data.batches(stage.training, listed, run.config.workers)
    for batch, some, (images, labels) in zip(keys, mine, loaded, strict=True):
        yield (images, labels, len(batch)) if some else (images[:0], labels[:0], len(batch))


def _step(
    run: _Run, module: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, count: int
) -> tuple[float, int]:
    """One optimizer step on a batch of `count`, of which `images` are this process's part.

    Where a GPU's memory doesn't suffice, the step runs again in twice as many pieces.

    Returns:
        The loss summed over the batch, and how many of it were right.
    """
    config, accelerator, progress = run.config, run.accelerator, run.progress
    _check_labels(run.model, labels)
    while True:
        try:
            total = _gradients(run, module, images, labels, count)
            break
        except torch.OutOfMemoryError as error:
            if accelerator.num_processes > 1 or progress.accumulate >= len(labels):
                raise ValueError(
                    f"The GPU's memory doesn't suffice for batches of {config.batch_size} on "
                    f"{accelerator.num_processes} process(es), each running its part in "
                    f"{progress.accumulate} piece(s) ({error}). Set a larger accumulate or a "
                    f"smaller batch_size."
                ) from error
        progress.accumulate *= 2
        warnings.warn(
            f"The GPU's memory doesn't suffice: from step {progress.done} on, each batch of "
            f"{config.batch_size} runs in {progress.accumulate} pieces.",
            stacklevel=3,
        )
        torch.cuda.empty_cache()
    norm = accelerator.clip_grad_norm_(run.trained.values(), config.clip_norm or math.inf)
    loss, correct = accelerator.reduce(total).tolist()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"The loss is {loss / count:.4g} and the norm of its gradient {norm:.4g} in step "
            f"{progress.step} of epoch {progress.epoch}. That step was not taken, and the last "
            f"good checkpoint is in {config.folder}. Begin a new run from its weights "
            f"(load_checkpoint_) with a lower learning_rate, a clip_norm or precision='fp32'."
        )
    run.optimizer.step()
    if config.ema is not None:
        # Early on the average is over few steps, as in Polyak averaging with a warm-up.
        decay = min(config.ema, (1 + progress.done) / (10 + progress.done))
        with torch.no_grad():
            torch._foreach_lerp_(list(run.average.values()), list(run.trained.values()), 1 - decay)
    return loss, int(correct)


def _gradients(
    run: _Run, module: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, count: int
) -> torch.Tensor:
    """Leave the gradient of the mean loss; (2,): loss summed and number right in this process."""
    config, accelerator, progress = run.config, run.accelerator, run.progress
    run.optimizer.zero_grad()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    pieces = list(
        zip(images.chunk(progress.accumulate), labels.chunk(progress.accumulate), strict=True)
    )
    with data.seeded(config.seed, progress.done, accelerator.process_index):
        if accelerator.device.type == "cuda":
            torch.cuda.manual_seed(torch.initial_seed())
        for i, (x, y) in enumerate(pieces):
            x, y = _to_device(run, x), y.to(accelerator.device)
            is_last = i == len(pieces) - 1
            penalty = _penalty(run) if is_last else x.new_zeros(())
            with contextlib.nullcontext() if is_last else accelerator.no_sync(module):
                with accelerator.autocast():
                    outputs = module(x)
                loss = F.cross_entropy(
                    outputs.float(), y, reduction="sum", label_smoothing=config.label_smoothing
                )
                # DistributedDataParallel takes the mean over processes; here over the images.
                accelerator.backward(loss * accelerator.num_processes / count + penalty)
            loss = loss.detach() + len(labels) * penalty.detach()
            total += torch.stack([loss, (outputs.argmax(1) == y).sum()])
    return total


def _penalty(run: _Run) -> torch.Tensor:
    """What the regularisers of all trainable weights add to the loss, as in Keras's fit."""
    kept = [v for v in run.model.trainable_variables if v.regularizer is not None]
    zero = torch.zeros((), device=run.accelerator.device)
    return sum((v.regularizer(v) for v in kept), start=zero)


def _to_device(run: _Run, x: torch.Tensor) -> torch.Tensor:
    """Images or features as the network takes them, on the device."""
    return data.as_input(x.to(run.accelerator.device, non_blocking=True), weight_set(run.model))


def _check_labels(model: keras.Model, labels: torch.Tensor) -> None:
    if not len(labels):
        return
    low, high, classes = int(labels.min()), int(labels.max()), model.output_shape[1]
    if low < 0 or high >= classes:
        raise ValueError(
            f"Received labels from {low} to {high}; expected 0 to {classes - 1}, as "
            f"{model.name} puts out {classes} classes."
        )


def _predict(
    run: _Run, module: torch.nn.Module, source: Source
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, classes) and labels (N,) for every image of a source, in order, on the CPU."""
    from accelerate.utils import gather_object

    keys = data.in_order(len(source), run.config.batch_size)
    mine = keys[run.accelerator.process_index :: run.accelerator.num_processes]
    found = []
    module.eval()
    loaded = data.batches(source, mine, run.config.workers)
    for some, (images, labels) in zip(mine, loaded, strict=True):
        with torch.no_grad(), run.accelerator.autocast():
            outputs = module(_to_device(run, images)).float().cpu()
        found.append((some[0], outputs, labels))
    found = sorted(gather_object(found), key=lambda part: part[0])
    return torch.cat([part[1] for part in found]), torch.cat([part[2] for part in found])


@contextlib.contextmanager
def _averaged(run: _Run) -> Iterator[None]:
    """Run the model on the averaged weights, if there are any."""

    @torch.no_grad()
    def swap() -> None:
        for i, value in run.average.items():
            kept = run.trained[i].clone()
            run.trained[i].copy_(value)
            value.copy_(kept)

    swap()
    try:
        yield
    finally:
        swap()


def _is_better(result: dict[str, float], best: dict[str, float]) -> bool:
    """Whether an epoch beats the best one; without validation the later one does."""
    if "val_loss" not in result or result is best:
        return True
    merits = [(epoch["val_accuracy"], -epoch["val_loss"]) for epoch in (result, best)]
    return merits[0] > merits[1]


def _is_stale(progress: Progress, config: TrainConfig) -> bool:
    """Whether the last `patience` epochs have brought no improvement."""
    if config.patience is None or progress.step:
        return False
    return progress.epoch - 1 - progress.best_epoch >= config.patience


# 4. How fast to learn


@dataclass(frozen=True)
class RateSearch:
    """Smoothed training loss at learning rates that rise until it diverges."""

    rates: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def suggestion(self) -> float:
        """A tenth of the rate with the lowest loss, the first tenth left out: it's noise."""
        lowest = min(range(len(self.losses) // 10, len(self.losses)), key=self.losses.__getitem__)
        return self.rates[lowest] / 10


def find_learning_rate(
    model: keras.Model,
    train: str | Path | Dataset | DataLoader,
    config: TrainConfig | None = None,
    *,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 100,
) -> RateSearch:
    """Train a few steps while the learning rate rises from `lowest` to `highest`; then undo that.

    `vggtorch.report.plot_rates` draws the result.

    Raises:
        ValueError: what `finetune` raises; a loss that isn't finite from the first step on.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", 2017; the smoothing and
    the suggestion are fastai's.
    """
    config = config or TrainConfig()
    features = config.cache_folder or str(Path(config.folder) / "features")
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, folder=folder, cache_folder=features, patience=None)
        training, _, plan, classes = _read_data(train, None, config)
        if config.head is not None:
            model = with_head(model, config, len(classes))
        _check_classes(model, classes)
        before = [v.value.detach().clone() for v in model.variables]
        run = _begin(model, training, None, config)
        _freeze_for_(model, config, 0)
        rates: list[float] = []
        smoothed: list[float] = []
        average = 0.0
        try:
            with logits(model), display(run.accelerator.is_main_process, None) as show:
                stage = _prepare(run, training, None, show)
                module = run.accelerator.prepare_model(stage.module).train()
                show.begin("learning rate", steps * config.batch_size)
                for images, labels, count in _endless(run, stage, plan, steps):
                    rate = lowest * (highest / lowest) ** (run.progress.done / (steps - 1))
                    for group in run.optimizer.param_groups:
                        group["lr"] = rate * group["scale"]
                    loss, _ = _step(run, module, images, labels, count)
                    run.progress.done += 1
                    average = 0.98 * average + 0.02 * loss / count
                    rates.append(rate)
                    smoothed.append(average / (1 - 0.98**run.progress.done))
                    show.advance(count, smoothed[-1])
                    if smoothed[-1] > 4 * min(smoothed):
                        break
        except FloatingPointError as error:
            if not rates:
                raise ValueError(
                    f"The loss isn't finite at the lowest learning rate, {lowest:.3g}: the data or "
                    f"the weights hold values that aren't finite or far too large."
                ) from error
        finally:
            _assign_(model, before, "the search")
    return RateSearch(tuple(rates), tuple(smoothed))


def _endless(
    run: _Run, stage: _Stage, plan: Planner, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Of `steps` batches, over as many epochs as it takes: this process's part, and their size."""
    keys: list[list[data.Key]] = []
    for epoch in itertools.count():
        if len(keys) >= steps:
            break
        keys += [[stage.key(index, epoch) for index in batch] for batch in plan(epoch)]
    yield from _loaded(run, stage, keys[:steps])
