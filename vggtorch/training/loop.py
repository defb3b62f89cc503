"""Fine-tuning: one plain torch loop on Hugging Face Accelerate.

Every random number is a function of (seed, epoch, image) or (seed, step), and the learning rate and
what is frozen are functions of step and epoch. So a run that was killed goes on exactly where its
last checkpoint stands, inside an epoch too.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import torch

from vggtorch.keras_graph import graph_of
from vggtorch.models import remember_
from vggtorch.paths import check_run
from vggtorch.training import checkpoints
from vggtorch.training.balance import class_weights
from vggtorch.training.callbacks import call, check_callbacks, check_figures, check_unfrozen
from vggtorch.training.config import TrainConfig
from vggtorch.training.data import DatasetSource, Source, check_labels
from vggtorch.training.display import Display, open_display
from vggtorch.training.evaluation import Evaluation, evaluate
from vggtorch.training.folders import check_apart
from vggtorch.training.heads import class_names, logits_network
from vggtorch.training.history import History
from vggtorch.training.identity import check_identity, identity_of
from vggtorch.training.mixing import mixes
from vggtorch.training.opening import first_lines, read_and_fit, settle_config
from vggtorch.training.optimization import averaged, freeze_for_
from vggtorch.training.reading import clear_errors, shared_batches
from vggtorch.training.run import (
    Images,
    RunData,
    RunState,
    first_state,
    load_weights_,
    locked,
    make_accelerator,
    restore_,
    state_dict,
)
from vggtorch.training.schedules import after_epoch_, after_step_, make_scheduler, set_rate_
from vggtorch.training.stages import Stage, prepare
from vggtorch.training.step import regularization, train_step_
from vggtorch.training.stopping import Interrupted, Stopping, Terminated, stoppable
from vggtorch.training.temperature import check_temperature, divide_logits_, fitted_temperature
from vggtorch.training.trackers import Trackers, check_trackers, tracked
from vggtorch.weight_sets import DataConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.inference_mode(False)  # it learns, in whatever mode it is called
def finetune(
    model: keras.Model,
    train: Images,
    validation: Images | None = None,
    config: TrainConfig | None = None,
    *,
    callbacks: Sequence[Any] = (),
    **settings: Any,
) -> History:
    """Fine-tune a model that ends in class probabilities or logits.

    >>> import tempfile, keras, torch, vggtorch as vt
    >>> images, labels = torch.rand(6, 8, 8, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> data = torch.utils.data.TensorDataset(images, labels)
    >>> model = keras.Sequential(
    ...     [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3)]
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     config = vt.TrainConfig(epochs=2, batch_size=3, output_dir=folder)
    ...     history = vt.finetune(model, data, config=config)
    >>> len(history.epochs), history.model is model
    (2, True)

    Args:
        model: a Functional or Sequential Keras model. With `config.head` a new model is made of it;
            without, it is trained in place.
        train: a folder with a subfolder for each class, or with `train`, `val` and `test` that
            have them; a .csv, .tsv or .jsonl file of paths, labels, perhaps splits; a Dataset or
            DataLoader of (image, label) or of dictionaries with both, such as Hugging Face's; or a
            dictionary of such data with the names train, validation and test. An image of a Dataset
            is a PIL image; or uint8, RGB and of the model's size; or floating point and ready for
            the model. A Dataset is read once at the start, so that a run that resumes is known to
            have the same images; not so if its attribute `content_name`, a text of yours, says what
            stands for them. A stream (IterableDataset) is kept in memory.
        validation: the same; of a DataLoader what its sampler gives first, in an epoch. Without it,
            `config.validation_split` of a training folder is held out.
        config: a TrainConfig, or a Plan that `advise` made. Without it, a model that ends in
            feature maps is trained by advice, with a new head; its first lines say how and why.
        callbacks: what is called in between, objects with methods of `Callback`.
        **settings: fields of TrainConfig that go before it, such as `epochs=5`.

    Raises:
        ValueError: data, model and config that don't fit each other, or the folder's checkpoint.
        FloatingPointError: the loss or its gradient isn't finite any more.
        OSError: a checkpoint couldn't be written.
        KeyboardInterrupt: Ctrl-C. The run leaves a checkpoint, from which it can be carried on, as
            on SIGTERM, which ends the process with status 143. A second one ends the run at once.
    """
    graph_of(model, "finetune")
    config = settle_config(model, train, config, settings)
    check_apart(train, config.output_dir)
    check_callbacks(callbacks)
    check_trackers(config.log_with)
    accelerator = make_accelerator(config.precision, config.log_with, config.output_dir)
    folder = Path(config.output_dir)
    with (
        locked(folder) if accelerator.is_main_process else nullcontext(),
        tracked(config, accelerator) as trackers,
    ):
        check_run(config.output_dir, config.resume)  # once no other run can still write there
        model, read = read_and_fit(model, train, validation, config)
        images = read.training.data_config
        if read.validation is None:
            _check_unvalidated(config)
        if config.temperature_scaling:
            check_temperature(model)
        before = () if config.head else images.label_names
        classes = class_names(model, read.classes, is_part=read.is_part, before=before)
        read = read._replace(classes=classes if read.classes else ())
        images = dataclasses.replace(images, label_names=read.classes)
        remember_(model, images)
        weight = class_weights(config, read.training, read.plan, classes)
        state = first_state(model, config, accelerator, weight)
        identity = identity_of(config, read, model, accelerator.mixed_precision)
        for part in (read.training, read.validation, read.test):
            if isinstance(part, DatasetSource) and part.content_name is None:
                check_labels(torch.tensor(part.plain[1]), model)
        steps = read.steps(config.epochs)
        state = dataclasses.replace(state, scheduler=make_scheduler(config, state.optimizer, steps))
        run = _Run(
            config, read, classes, images, state, identity, steps, accelerator, callbacks, trackers
        )
        run.carry_on()
        run.train()
        return run.outcome()


@dataclass(frozen=True)
class _Run:
    """A run from its first step to what comes out of it."""

    config: TrainConfig
    read: RunData
    classes: tuple[str, ...]  # the names of the model's outputs
    images: DataConfig  # how images become what the model takes
    state: RunState
    identity: dict[str, Any]  # what a checkpoint must say to be this run's
    steps: int  # of all epochs
    accelerator: Accelerator
    callbacks: Sequence[Any]
    trackers: Trackers

    @property
    def model(self) -> keras.Model:
        """What trains, with its head."""
        return self.state.model

    @property
    def last(self) -> Path:
        """The checkpoint from which the run can be carried on."""
        return Path(self.config.output_dir) / "last.pt"

    @property
    def best(self) -> Path:
        """The checkpoint whose weights are kept."""
        return Path(self.config.output_dir) / "best.pt"

    def carry_on(self) -> None:
        """Go back to the last checkpoint, if there is one."""
        if self.last.exists():
            content = checkpoints.read(self.last)
            check_identity(self.last, content, self.identity, self.model)
            restore_(self.state, content, self.last)
            self.identity["weights"] = content["weights"]

    def save(self, is_kept: bool = False, found: Evaluation | None = None) -> None:
        """Write the last checkpoint, and the best one where this is it."""
        if self.accelerator.is_main_process:
            content = {**self.identity, **state_dict(self.state)}
            if is_kept:
                content["evaluation"] = found and (found.logits, found.labels)
            checkpoints.write(self.last, content, also=self.best if is_kept else None)

    def train(self) -> None:
        """Train to the end: of all epochs, of the patience, or by a callback."""
        config, progress = self.config, self.state.progress
        stage = None
        with (
            stoppable(self.accelerator.num_processes) as stop,
            open_display(self.accelerator.is_main_process) as show,
            self._left_behind(show),
            clear_errors(config.num_workers),
        ):
            freeze_for_(self.model, config, progress.epoch)
            device = self.accelerator.device
            show.say(first_lines(self.model, self.read, config, self.images, device))
            if progress.epoch == config.epochs or progress.stopped:
                show.say(f"The run in {config.output_dir} had ended: nothing is trained.")
            self.trackers.begin(self._about(), progress.epochs)
            call(self.callbacks, "on_train_begin", self.model, config)
            while self._goes_on():
                if stage is None or progress.epoch in dict(config.unfreeze):
                    freeze_for_(self.model, config, progress.epoch)
                    stage = prepare(
                        self.model, self.read, config, progress.epoch, self.accelerator, show
                    )
                    module = self.accelerator.prepare_model(stage.module)
                check_unfrozen(self.model, self.state.trained)
                began = time.perf_counter() - progress.seconds
                self._train_epoch(stage, module, began, stop, show)
                self._end_epoch(stage, began, stop, show)
                stop.agree(self.accelerator)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _left_behind(self, show: Display) -> Iterator[None]:
        """Leave a checkpoint where the run is stopped, and say that it can be carried on."""
        try:
            yield
        except (Interrupted, Terminated):
            self.save()
            progress = self.state.progress
            show.say(
                f"Stopped in epoch {progress.epoch + 1} after {progress.step} steps; {self.last} "
                f"holds the run, and the same call with `resume` carries it on."
            )
            self.accelerator.wait_for_everyone()  # the launcher ends all when the first has ended
            raise

    def _goes_on(self) -> bool:
        """Whether there is something left to train."""
        progress = self.state.progress
        if progress.epoch == self.config.epochs or progress.stopped:
            return False
        return progress.step > 0 or not _is_stale(progress.epochs, self.config)

    def _train_epoch(
        self, stage: Stage, module: torch.nn.Module, began: float, stop: Stopping, show: Display
    ) -> None:
        """The steps that are left of an epoch, which began at a second of the clock."""
        config, state, progress = self.config, self.state, self.state.progress
        keys = stage.keys(self.read.plan, progress.epoch)
        title = f"epoch {progress.epoch + 1}/{config.epochs}"
        show.begin(title, sum(map(len, keys)), progress.images)
        module.train()
        left = keys[progress.step :]
        for batch in shared_batches(
            stage.training, left, config.num_workers, self.accelerator, in_pairs=mixes(config)
        ):
            rate = set_rate_(state.scheduler, state.optimizer, config, progress.done, self.steps)
            with stop.held():
                loss, correct = train_step_(state, module, batch, config, self.accelerator)
                after_step_(state.scheduler)
                progress.rate = rate
                progress.step += 1
                progress.done += 1
                progress.loss += loss
                progress.correct += correct
                progress.images += batch.size
                progress.seconds = time.perf_counter() - began
                show.advance(batch.size, progress.loss / progress.images)
                if progress.step % config.checkpoint_steps == 0 and progress.step < len(keys):
                    self.save()
            call(self.callbacks, "on_step_end", progress.done - 1, loss / batch.size)
            stop.agree(self.accelerator)

    def _end_epoch(self, stage: Stage, began: float, stop: Stopping, show: Display) -> None:
        """Judge what an epoch has learned, and keep it."""
        config, progress = self.config, self.state.progress
        epoch = progress.epoch
        result = {
            "loss": progress.loss / progress.images,
            "accuracy": progress.correct / progress.images,
            "learning_rate": progress.rate,
        }
        found = None
        if stage.validation is not None:
            with averaged(self.state.trained, self.state.average, stop.held):
                found = self._judged(stage.module, stage.validation)
                result["val_loss"] = found.loss + regularization(self.model).item()
            result["val_accuracy"] = found.accuracy
            chosen = dict.fromkeys((*config.metrics, config.monitor))
            result |= {f"val_{n}": found.figure(n) for n in chosen if f"val_{n}" not in result}
        result["seconds"] = time.perf_counter() - began
        before = list(result)
        progress.stopped = call(self.callbacks, "on_epoch_end", epoch, result, found)
        check_figures(result, before)
        with stop.held():
            after_epoch_(self.state.scheduler, result.get("val_loss", result["loss"]))
            progress.epochs.append(result)
            is_kept = not config.restore_best_weights or _best(progress.epochs, config) == epoch
            if is_kept:
                progress.kept_epoch = epoch
            progress.epoch, progress.step = epoch + 1, 0
            progress.loss, progress.correct, progress.images, progress.seconds = 0.0, 0, 0, 0.0
            self.save(is_kept, found)
            show.end(epoch, result)
            self.trackers.log(result, epoch)

    def _judged(self, module: torch.nn.Module, source: Source) -> Evaluation:
        """What a part of the model, which puts out logits, says of images or their features."""
        config = self.config
        return evaluate(
            module,
            self.model,
            source,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
            accelerator=self.accelerator,
        )

    def outcome(self) -> History:
        """The model with the weights that are kept, its temperature, and its test, once."""
        model, config, read, progress = self.model, self.config, self.read, self.state.progress
        content = checkpoints.read(self.best)
        load_weights_(model, content, self.best)
        evaluation = content["evaluation"] and Evaluation(*content["evaluation"])
        network = logits_network(model, model.inputs[0])
        # Epochs were judged in the precision of training; the model predicts in its own.
        is_rounded = self.accelerator.mixed_precision != "no" or config.cache_dtype != "float32"
        if read.validation is not None and is_rounded:
            evaluation = self._judged(network, read.validation)
        temperature = 1.0
        if config.temperature_scaling and evaluation is not None:
            temperature = fitted_temperature(evaluation)
            divide_logits_(model, temperature)
            evaluation = Evaluation(evaluation.logits / temperature, evaluation.labels)
        tested = None
        if read.test is not None:
            tested = self._judged(network, read.test)
        history = History(
            model,
            progress.epochs,
            progress.kept_epoch,
            self.classes,
            config,
            self.images,
            read.validation,
            evaluation,
            read.test,
            tested,
            temperature,
        )
        self.trackers.log_outcome(history)
        call(self.callbacks, "on_train_end", history)
        return history

    def _about(self) -> dict[str, Any]:
        """What trackers keep of a run beside its settings."""
        read = self.read
        parts = {"train": read.training, "validation": read.validation, "test": read.test}
        height, width = self.images.size or (0, 0)
        return {
            "model": self.model.name,
            "weight_set": self.images.weight_set,
            "parameters": self.model.count_params(),
            "classes": len(self.classes),
            "input": f"{height}x{width}",
            **{f"{name}_images": len(part) for name, part in parts.items() if part is not None},
        }


def _check_unvalidated(config: TrainConfig) -> None:
    """See that nothing asks for figures of validation images where there are none."""
    for name in ("patience", "monitor", "metrics", "temperature_scaling"):
        value = getattr(config, name)
        if value != getattr(TrainConfig, name):
            shown = value[0] if isinstance(value, tuple) else value
            raise ValueError(
                f"Received {name}={shown!r} and no validation data to see it on. Pass validation, "
                f"or leave {name} out."
            )


def _best(epochs: Sequence[dict[str, float]], config: TrainConfig) -> int:
    """The best of the epochs so far, the first of equal ones; without validation the last one."""
    if not epochs or "val_loss" not in epochs[-1]:
        return len(epochs) - 1
    sign = -1 if config.monitor in ("loss", "calibration_error") else 1

    def merits(epoch: int) -> list[float]:
        figures = epochs[epoch]
        found = (sign * figures[f"val_{config.monitor}"], -figures["val_loss"])
        return [-math.inf if math.isnan(merit) else merit for merit in found]

    return max(range(len(epochs)), key=merits)


def _is_stale(epochs: Sequence[dict[str, float]], config: TrainConfig) -> bool:
    """Whether the last `config.patience` epochs have brought no improvement."""
    patience = config.patience
    return patience is not None and len(epochs) - 1 - _best(epochs, config) >= patience
