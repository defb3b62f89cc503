"""Accelerate's trackers (TensorBoard, W&B, MLflow): what they keep of a run, and how it ended."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vggtorch import files
from vggtorch.telling import tell
from vggtorch.training.config import TrainConfig
from vggtorch.training.history import History
from vggtorch.training.optimization import name_of

if TYPE_CHECKING:
    from accelerate import Accelerator

KEPT = "trackers.json"  # in the run's folder: each tracker's own run, and what it has been told


def check_trackers(given: Sequence[Any]) -> None:
    """See that trackers are Accelerate's, and that their packages are installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

    available = {str(name) for name in get_available_trackers()}
    for one in given:
        if isinstance(one, GeneralTracker):
            continue
        if str(one) not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(
                f"Received log_with={one!r}; expected some of "
                f"{', '.join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))}, or an "
                f"accelerate.tracking.GeneralTracker."
                f"{' Name each by itself.' if ',' in str(one) else ''}"
            )
        if str(one) not in available:
            extra = "'vggtorch[tensorboard]'" if one == "tensorboard" else f"{one}"
            raise ValueError(
                f"Received log_with={one!r}, whose package isn't installed: pip install {extra}."
            )


class Trackers:
    """The trackers of one run; nothing happens where the configuration names none.

    Accelerate begins them in the main process alone; in the others there are none.
    """

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self._config, self._accelerator = config, accelerator
        self._path = Path(config.output_dir, KEPT)
        self._told: list[tuple[Any, _Told]] = []  # each tracker with what it has

    def begin(self, about: Mapping[str, Any], epochs: Sequence[dict[str, float]]) -> None:
        """Begin a run of each tracker with the settings, and what else is known of the run.

        A run that is carried on goes on in the same run of TensorBoard, W&B and MLflow, which get
        those epochs that they lack. Another tracker begins another run, which gets all epochs.
        """
        if not (self._config.log_with and self._accelerator.is_main_process):
            return
        names = (field.name for field in dataclasses.fields(TrainConfig))
        known = {n: getattr(self._config, n) for n in names if n not in ("log_with", "resume")}
        # As all trackers take them: numbers, and all else as text.
        settings = {
            name: value if isinstance(value, bool | int | float) else name_of(value)
            for name, value in {**known, **about}.items()
        }
        before = _read(self._path) if self._config.resume else {}
        options = {}
        for name in before.keys() & set(map(str, self._config.log_with)):
            options[name] = _go_on(name, before[name].run)
        try:
            self._accelerator.init_trackers("vggtorch", init_kwargs=options)
            for tracker in self._accelerator.trackers:
                told = before.get(tracker.name)
                if told is None or told.run != _run_of(tracker):
                    told = _Told(_run_of(tracker))
                    tracker.store_init_configuration(settings)
                self._told.append((tracker, told))
        except Exception as error:  # of any kind: each tracker has its own
            failed = [t.name for t in self._accelerator.trackers if not _has_begun(t)]
            name = failed[0] if failed else ", ".join(map(str, self._config.log_with))
            raise ValueError(
                f"Received log_with={name!r}, which couldn't begin: {files.first_line(error)}"
            ) from error
        for tracker, told in self._told:
            for epoch in range(told.epochs, len(epochs)):
                tracker.log(epochs[epoch], step=epoch)
            told.epochs = len(epochs)
        self._keep()

    def log(self, figures: dict[str, float], epoch: int) -> None:
        """Log an epoch's figures."""
        for tracker, told in self._told:
            tracker.log(figures, step=epoch)
            told.epochs = epoch + 1
        self._keep()

    def log_outcome(self, history: History) -> None:
        """Log what the weights that are kept reach, on validation images and on test images."""
        kept: dict[str, float] = {"kept_epoch": history.kept_epoch}
        found = {"kept_val": history.evaluation, "test": history.test_evaluation}
        for part, evaluation in found.items():
            if evaluation is not None:
                named = {k.lower().replace(" ", "_"): v for k, v in evaluation.figures().items()}
                kept |= {f"{part}_{name}": value for name, value in named.items()}
        for tracker, told in self._told:
            if not told.outcome:  # a run that had ended may be called again
                tracker.log(kept, step=len(history.epochs) - 1)
                told.outcome = True
        self._keep()

    def _keep(self) -> None:
        """Write down what the trackers have been told, for a run that carries this one on."""
        known = {t.name: dataclasses.asdict(k) for t, k in self._told if k.run is not None}
        if known:
            files.write_text(self._path, json.dumps(known, indent=2))

    def end(self, status: str) -> None:
        """End each tracker's run as MLflow calls it: FINISHED, FAILED or KILLED."""
        for tracker in self._accelerator.trackers:  # end_training would end torch's processes too
            is_main = self._accelerator.is_main_process
            if is_main and not _has_begun(tracker):
                continue
            if is_main and status != "FINISHED" and tracker.name == "wandb":
                tracker.tracker.finish(exit_code=1)
            elif is_main and status != "FINISHED" and tracker.name == "mlflow":
                import mlflow  # type: ignore[import-not-found,unused-ignore]

                mlflow.end_run(status=status)
            else:
                tracker.finish()


@contextlib.contextmanager
def tracked(config: TrainConfig, accelerator: Accelerator) -> Iterator[Trackers]:
    """Inside, trackers may begin and log; at the end they learn how the run ended."""
    trackers = Trackers(config, accelerator)
    try:
        yield trackers
    except BaseException as error:
        trackers.end("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    trackers.end("FINISHED")


@dataclasses.dataclass
class _Told:
    """What a tracker has: `run` is the name of its run, None where it can't go on with one."""

    run: str | None
    epochs: int = 0
    outcome: bool = False


def _read(path: Path) -> dict[str, _Told]:
    """What `_keep` wrote; nothing where it didn't, or where that is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: _Told(**told) for name, told in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        tell(
            f"{path} can't be read ({files.first_line(error)}): the trackers begin other runs.",
        )
        return {}


def _go_on(name: str, run: str | None) -> dict[str, Any]:
    """What Accelerate's tracker is given so that it goes on with a run of its own."""
    if name == "wandb" and "WANDB_RUN_ID" not in os.environ:
        return {"id": run, "resume": "allow"}
    if name == "mlflow":
        import mlflow  # type: ignore[import-not-found,unused-ignore]

        try:
            if mlflow.get_run(run).info.lifecycle_stage == "active":
                return {"run_id": run}
            reason = "it was deleted"
        except Exception as error:  # MLflow's own, or that of its store
            reason = files.first_line(error)
        tell(
            f"MLflow's run {run} can't be carried on ({reason}): another one begins, with all "
            f"epochs.",
        )
    return {}


def _run_of(tracker: Any) -> str | None:
    """The name of the run that a tracker has begun, where it can be carried on by it."""
    if tracker.name == "wandb":
        return tracker.tracker.id
    if tracker.name == "mlflow":
        return tracker.tracker.info.run_id
    return "" if tracker.name == "tensorboard" else None  # which writes into the run's own folder


def _has_begun(tracker: Any) -> bool:
    """Whether a tracker of Accelerate's has its writer or run."""
    return hasattr(tracker, "tracker")
