"""Accelerate's trackers (TensorBoard, W&B, MLflow): what they keep of a run, and how it ended."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vggtorch import files
from vggtorch.training.config import TrainConfig
from vggtorch.training.optimization import name_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from vggtorch.training.loop import History


def check_trackers(given: Sequence[Any]) -> None:
    """See that trackers are Accelerate's, and that their packages are installed.

    Raises:
        ValueError: another name, or a package that isn't installed.
    """
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
            )
        if str(one) not in available:
            extra = "'vggtorch[tensorboard]'" if one == "tensorboard" else f"{one}"
            raise ValueError(
                f"Received log_with={one!r}, whose package isn't installed: pip install {extra}."
            )


class Trackers:
    """The trackers of one run; nothing happens where the configuration names none."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self._config, self._accelerator = config, accelerator

    def begin(self, about: Mapping[str, Any], epochs: Sequence[dict[str, float]]) -> None:
        """Begin a run of each tracker with the settings, and what else is known of the run.

        A run that is carried on begins another one there, which gets the earlier epochs again, so
        that it is whole. TensorBoard has them already, in the run's folder.

        Raises:
            ValueError: a tracker couldn't begin.
        """
        if not self._config.log_with:
            return
        settings = {name: _plain(v) for name, v in {**_settings(self._config), **about}.items()}
        try:
            self._accelerator.init_trackers("vggtorch", config=settings)
        except Exception as error:  # of any kind: each tracker has its own
            failed = [t.name for t in self._accelerator.trackers if not _has_begun(t)]
            name = failed[0] if failed else ", ".join(map(str, self._config.log_with))
            raise ValueError(
                f"Received log_with={name!r}, which couldn't begin: {files.first_line(error)}"
            ) from error
        for tracker in self._accelerator.trackers:
            for epoch, figures in enumerate(epochs):
                if tracker.name != "tensorboard":
                    tracker.log(figures, step=epoch)

    def log(self, figures: dict[str, float], epoch: int) -> None:
        """Log an epoch's figures."""
        if self._config.log_with:
            self._accelerator.log(figures, step=epoch)

    def log_outcome(self, history: History) -> None:
        """Log what the weights that are kept reach, on validation images and on test images."""
        best: dict[str, float] = {"best_epoch": history.best_epoch}
        found = {"best_val": history.evaluation, "test": history.test_evaluation}
        for part, evaluation in found.items():
            if evaluation is not None:
                named = {k.lower().replace(" ", "_"): v for k, v in evaluation.figures().items()}
                best |= {f"{part}_{name}": value for name, value in named.items()}
        self.log(best, len(history.epochs) - 1)

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


def _has_begun(tracker: Any) -> bool:
    """Whether a tracker of Accelerate's has its writer or run."""
    return hasattr(tracker, "tracker")


def _settings(config: TrainConfig) -> dict[str, Any]:
    found = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}
    return {name: value for name, value in found.items() if name != "log_with"}


def _plain(value: Any) -> Any:
    """A setting as all trackers take it: numbers, and all else as text."""
    return value if isinstance(value, bool | int | float) else name_of(value)
