"""A run: its data, its device, and all of its state that a checkpoint holds."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import filelock
import keras
import torch
from torch.utils.data import DataLoader, Dataset, Subset

from vggtorch import files
from vggtorch.keras_graph import all_layers
from vggtorch.lowering import has_fused_ops
from vggtorch.models import held_tensors, settle_
from vggtorch.paths import as_path
from vggtorch.telling import tell
from vggtorch.training import checkpoints, data
from vggtorch.training.balance import balanced, labels_of
from vggtorch.training.config import Augment, TrainConfig
from vggtorch.training.data import BatchPlan, DatasetSource, Folder
from vggtorch.training.folders import NAMED, images_by_class
from vggtorch.training.items import is_stream, label_names
from vggtorch.training.loaders import as_source, drawn
from vggtorch.training.optimization import Parameters, make_optimizer, trained_parameters
from vggtorch.training.splits import Splits, are_files, as_part, splits_of, tell_beside
from vggtorch.weight_sets import DataConfig
from vggtorch.weights import shortened

if TYPE_CHECKING:
    from accelerate import Accelerator

LONGER = 8.0  # seconds
# What users pass: a folder, a table, or data as torch has it; or such for each split by its name.
Images = str | Path | Dataset | DataLoader | Mapping[str, Any]


class RunData(NamedTuple):
    """What a run reads: sources, each epoch's batches, the classes' names where it has them.

    What is in `test` is scored once, at the end, and nothing is chosen by it.
    """

    training: Folder | DatasetSource
    validation: Folder | DatasetSource | None
    plan: BatchPlan
    classes: tuple[str, ...]
    test: Folder | DatasetSource | None = None
    held_out: bool = False  # the validation images are a part of the training images
    by_loader: bool = False  # a DataLoader decides on the batches, in each epoch anew

    def steps(self, epochs: int) -> int:
        """How many batches so many epochs have."""
        if self.by_loader:
            return sum(len(self.plan(epoch)) for epoch in range(epochs))
        return epochs * len(self.plan(0))

    @property
    def is_part(self) -> bool:
        """Whether it trains on a part of a Dataset, whose classes it has the names of."""
        return isinstance(getattr(self.training, "dataset", None), Subset)


def read_data(
    train: Images, validation: Images | None, config: TrainConfig, images: DataConfig
) -> RunData:
    """Read what the user passed, and hold out images of a training folder where nothing validates.

    `images` says what images are brought to.

    Raises:
        ValueError: data that can't be right, or that contradicts the configuration.
    """

    def read(given: Any, augment: Augment) -> tuple[Any, BatchPlan]:
        if are_files(given):
            folder = data.read_folder(
                given, images, augment, config.on_unreadable, config.seed, config.label_pattern
            )
            return folder, data.shuffled(len(folder), config.batch_size, config.seed)
        if isinstance(given, Mapping):
            raise ValueError(
                f"Received a dictionary of {', '.join(map(repr, given))} as one part of the data; "
                f"expected a folder, a table, a Dataset or a DataLoader."
            )
        if config.sampling == "balanced" and isinstance(given, DataLoader) and given is train:
            raise ValueError(
                "Received sampling='balanced' with a DataLoader, whose own sampler decides. Pass "
                "its Dataset, or a DataLoader with a WeightedRandomSampler."
            )
        return as_source(given, config.seed, config.batch_size, images)

    def judging(given: Any) -> Any:
        if given is None:
            return None
        source, plan = read(given, "none")
        return drawn(source, plan) if isinstance(given, DataLoader) else source

    for given in (train, validation):
        if isinstance(given, TrainConfig):
            raise ValueError(
                f"Received a {type(given).__name__} as data. Pass it by its name: config=..."
            )
    splits = splits_of(train)
    if isinstance(train, str | Path):
        tell_beside(Path(train))
    beside = splits.validation
    if validation is not None:
        splits = splits._replace(validation=validation)
    if splits.validation is not beside is not None:
        which = f", {beside}" if are_files(beside) else ""
        tell(
            f"The data has images to validate on of its own{which}, which aren't used: those that "
            f"were passed as validation are.",
        )
    _check_names(splits, config)
    _tell_unused(splits, config)
    training, plan = read(splits.train, config.augment)
    if isinstance(training, Folder) and config.augment == "none" and config.cache_copies > 1:
        raise ValueError(
            f"Received cache_copies={config.cache_copies} with augment='none': the copies would be "
            f"equal. Choose an augmentation, or one copy."
        )
    held = judging(splits.validation)
    held_out = held is None and isinstance(training, Folder)
    if held_out:
        training, held = data.hold_out(training, config.validation_split)
        plan = data.shuffled(len(training), config.batch_size, config.seed)
    if config.sampling == "balanced":
        plan = balanced(labels_of(training), config.batch_size, config.seed)
    held = _with_classes_of(training, held, "validation")
    test = _with_classes_of(training, judging(splits.test), "test")
    for part, name in ((held, "validation"), (test, "test")):
        _tell_of_repeats(training, part, name)
    names = [source.classes for source in (training, held) if source is not None and source.classes]
    by_loader = isinstance(splits.train, DataLoader) and not is_stream(splits.train)
    return RunData(training, held, plan, names[0] if names else (), test, held_out, by_loader)


def _check_names(splits: Splits, config: TrainConfig) -> None:
    """Refuse by the names of folders and files, before any image is read, what would be later."""

    def counted(given: Any) -> dict[str, int]:
        if are_files(given):
            return images_by_class(as_part(given), config.label_pattern)
        return dict.fromkeys(label_names(given), 0)

    known = counted(splits.train)
    for part, name in ((splits.validation, "validation"), (splits.test, "test")):
        other = () if part is None else counted(part)
        first, second = set(known), set(other)
        may_lack = are_files(part) and second < first  # as rare classes do
        if first and second and list(known) != list(other) and not may_lack:
            raise ValueError(
                f"The classes differ: only in the training data {sorted(first - second)}, only in "
                f"the {name} data {sorted(second - first)}. Expected the same, in the same order."
            )
    if splits.validation is None and are_files(splits.train):
        data.check_hold_out(known, config.validation_split)


def _tell_unused(splits: Splits, config: TrainConfig) -> None:
    """Warn of settings for images in files, where the images are no files."""
    of_files = are_files(splits.train)
    names = [] if of_files else ["augment"]
    names += [] if any(map(are_files, splits)) else ["label_pattern", "on_unreadable"]
    names += [] if of_files or splits.validation is not None else ["validation_split"]
    _tell_of_loaders(splits, config)
    if splits.validation is not None and config.validation_split != TrainConfig.validation_split:
        tell(
            f"Without effect: validation_split={config.validation_split!r}, as the data has images "
            f"of its own to validate on.",
        )
    pairs = [(name, getattr(config, name)) for name in names]
    if given := [f"{n}={value!r}" for n, value in pairs if value != getattr(TrainConfig, n)]:
        tell(
            f"Without effect on a Dataset: {', '.join(given)}. It augments images itself "
            f"(torchvision.transforms.v2), has labels of its own, and is split by "
            f"torch.utils.data.random_split.",
        )


def _tell_of_loaders(splits: Splits, config: TrainConfig) -> None:
    """Warn of what a DataLoader says and what isn't followed, or what it doesn't let follow."""
    loaders = [part for part in splits if isinstance(part, DataLoader)]
    said = []
    workers = max((loader.num_workers for loader in loaders), default=0)
    if workers and not config.num_workers:
        said.append(f"the DataLoader's num_workers={workers} (pass it beside the data)")
    if any(loader.worker_init_fn is not None for loader in loaders):
        said.append("its worker_init_fn (what a Dataset draws is seeded by image and epoch)")
    is_own = isinstance(splits.train, DataLoader) and not is_stream(splits.train)
    if is_own and config.batch_size not in (TrainConfig.batch_size, splits.train.batch_size):
        said.append(f"batch_size={config.batch_size} (the DataLoader's own batches train)")
    if said:
        tell(f"Not followed: {'; '.join(said)}.")


def _tell_of_repeats(training: Any, other: Any, name: str) -> None:
    """Warn of files that train and are to judge what was learned, too."""
    if not (isinstance(training, Folder) and isinstance(other, Folder)):
        return
    known = {image.digest: image.path for image in training.images}
    repeats = [(image.path, known[image.digest]) for image in other.images if image.digest in known]
    if repeats:
        first, same = repeats[0]
        tell(
            f"{len(repeats)} of {len(other)} {name} images are files of the training data again, "
            f"so that the {name} figures are too good: {first} is {same}, say.",
        )


def _with_classes_of(training: Any, other: Any, name: str) -> Any:
    """Another source with the classes of the training data; says which of them files lack."""
    if other is None or not other.classes or training.classes in ((), other.classes):
        return other
    if absent := sorted(set(training.classes) - set(other.classes)):
        tell(
            f"No images of {shortened(absent, NAMED)} in the {name} data, whose figures say "
            f"nothing of {'it' if len(absent) == 1 else 'them'}.",
        )
    return data.with_classes(other, training.classes)


def make_accelerator(
    precision: str, log_with: Sequence[Any] = (), folder: str | None = None
) -> Accelerator:
    """Hugging Face's Accelerator, which knows the processes, the device and the precision.

    Its trackers `log_with` write into the folder what they write to files.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # by `accelerate launch`
    precision = "bf16" if precision == "bf16" else launched
    kept = getattr(AcceleratorState, "_shared_state", {})
    if kept.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()  # an earlier run in this process had another precision
    # Told that it is on a CPU, Accelerate joins torchrun's processes on a machine without GPUs too.
    return Accelerator(
        mixed_precision=precision,
        cpu=not torch.accelerator.is_available(),
        log_with=list(log_with) or None,
        project_dir=folder,
    )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a run's folder for one run at a time.

    Raises:
        ValueError: another run is at work in it.
        OSError: the folder can't be made or written to.
    """
    another = "Choose another with output_dir='run2', say."
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"The folder {folder} can't be made: {error.strerror}. {another}") from error
    # A killed run's workers, which read images, live for up to 5 s longer, and hold the lock.
    lock = filelock.FileLock(folder / ".lock", timeout=LONGER)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ValueError(
            f"Another run is at work in {folder}. Wait until it has ended. {another}"
        ) from None
    except OSError as error:
        reason = error.strerror or files.first_line(error)
        raise OSError(f"Nothing can be written into {folder}: {reason}. {another}") from error
    try:
        yield
    finally:
        lock.release()


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
    rate: float = 0.0  # the head's learning rate in the last step
    stopped: bool = False  # by a callback
    pieces: int = 1  # that a process runs its part of a batch in
    kept_epoch: int = 0
    epochs: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class RunState:
    """All that changes while a network trains."""

    model: keras.Model
    trained: Parameters
    average: dict[int, torch.Tensor]  # of `trained`, over the steps; empty without ema_decay
    optimizer: torch.optim.Optimizer
    progress: Progress
    class_weight: torch.Tensor | None = None  # (classes,), of each class's loss
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None  # where it is torch's


def first_state(
    model: keras.Model,
    config: TrainConfig,
    accelerator: Accelerator,
    class_weight: torch.Tensor | None = None,
) -> RunState:
    """The state in which a run begins, with the model on the device.

    Warns where the device computes in bfloat16 much slower than in float32.

    Raises:
        ValueError: nothing trains, or the loss would have a part that finetune doesn't compute.
    """
    active = [layer.name for layer in all_layers(model) if layer.activity_regularizer is not None]
    if active:
        raise ValueError(
            f"The layers {', '.join(active)} have an activity_regularizer, which finetune doesn't "
            f"add to the loss. Use Keras's fit, or layers without."
        )
    device, policies = accelerator.device, {layer.compute_dtype for layer in all_layers(model)}
    instead = "dtype='float32' of the model" if "bfloat16" in policies else "precision='fp32'"
    is_bf16 = accelerator.mixed_precision == "bf16" or "bfloat16" in policies
    x = torch.empty(0, device=device)
    if is_bf16 and device.type == "cpu" and not has_fused_ops(x, torch.bfloat16):
        tell(
            f"This CPU has no instructions for bfloat16, so that training in it takes several "
            f"times as long as in float32: {instead} is faster.",
        )
    model.to(device)
    trained = trained_parameters(model, config)
    average = {i: p.detach().clone() for i, p in trained.items()} if config.ema_decay else {}
    optimizer = make_optimizer(model, trained, config, device)
    progress = Progress(pieces=config.gradient_accumulation_steps)
    weight = None if class_weight is None else class_weight.to(device)
    return RunState(model, trained, average, optimizer, progress, weight)


def state_dict(state: RunState) -> dict[str, Any]:
    """What a checkpoint holds of a run, but for its identity."""
    return {
        "variables": [t.detach() for t in held_tensors(state.model)],
        "average": state.average,
        "optimizer": state.optimizer.state_dict(),
        "scheduler": {} if state.scheduler is None else state.scheduler.state_dict(),
        "progress": dataclasses.asdict(state.progress),
    }


def restore_(state: RunState, content: dict[str, Any], path: Path) -> None:
    """Carry on from the content of a checkpoint, in place; ValueError where it doesn't fit."""
    assign_(state.model, content["variables"], path)
    for i, value in content["average"].items():
        state.average[i].copy_(value)
    state.optimizer.load_state_dict(content["optimizer"])
    if state.scheduler is not None:
        state.scheduler.load_state_dict(content["scheduler"])
    for name, value in content["progress"].items():
        setattr(state.progress, name, value)


def load_checkpoint_(model: keras.Model, path: str | Path) -> keras.Model:
    """Give a model the weights of a run's checkpoint, `last.pt` or `best.pt`, in place.

    They are the averaged ones if the run kept such.

    >>> import tempfile, keras, torch, vggtorch as vt
    >>> def model():
    ...     layers = [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3)]
    ...     return keras.Sequential(layers)
    >>> data = torch.utils.data.TensorDataset(torch.rand(3, 8, 8, 3), torch.arange(3))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     history = vt.finetune(model(), data, config=vt.TrainConfig(epochs=1, output_dir=folder))
    ...     again = vt.load_checkpoint_(model(), f"{folder}/best.pt")
    >>> bool((again.layers[-1].kernel == history.model.layers[-1].kernel).all())
    True

    Raises:
        ValueError: no checkpoint, a damaged one, or one of another network.
    """
    load_weights_(model, checkpoints.read(as_path(path)), path)
    return model


def load_weights_(model: keras.Model, content: dict[str, Any], path: str | Path) -> None:
    """What `load_checkpoint_` does, with the content of the checkpoint that was read already."""
    assign_(model, content["variables"], path)
    with torch.no_grad():
        for i, value in content["average"].items():
            model.variables[i].value.copy_(value)


def assign_(model: keras.Model, tensors: list[torch.Tensor], path: str | Path) -> None:
    """Copy tensors into a model's variables, in their order; ValueError where shapes differ."""
    held = held_tensors(model)
    expected = [tuple(t.shape) for t in held]
    received = [tuple(t.shape) for t in tensors]
    if expected != received:
        raise ValueError(
            f"{path} holds {len(received)} tensors, whose shapes aren't those of the "
            f"{len(expected)} of {model.name}. Build the model as it was when the run began."
        )
    with torch.no_grad():
        for target, tensor in zip(held, tensors, strict=True):
            target.copy_(tensor)
    settle_(model)
