"""What comes out of a run: its model, its figures, and the images that they were measured on."""

from __future__ import annotations

from dataclasses import dataclass

import keras

from vggtorch.training.config import TrainConfig
from vggtorch.training.data import DatasetSource, Folder
from vggtorch.training.evaluation import Evaluation
from vggtorch.weight_sets import DataConfig


@dataclass(frozen=True)
class History:
    """What came out of a run.

    Attributes:
        model: the trained Keras model, with the weights of `kept_epoch`.
        epochs: loss, accuracy, val_loss, val_accuracy, learning_rate and seconds of each, in the
            precision of training.
        kept_epoch: the epoch (from 0) that is best on the validation images, in accuracy if
            `config.monitor` says nothing else; the last one without validation, and where
            `config.restore_best_weights` is False.
        classes: their names by index; numbers where the data has no names.
        config: what the run was told to do.
        data_config: how its images became what the model takes; the model remembers it.
        validation: the images that it was validated on.
        evaluation: what that network said of them, in the precision in which it predicts.
        test: the images that nothing was chosen by: those of a folder `test` beside `train`.
        test_evaluation: what that network said of these, once, at the end.
        temperature: what the last layer's weights were divided by at the end, after `epochs`; the
            run's checkpoints have them as they were.
    """

    model: keras.Model
    epochs: list[dict[str, float]]
    kept_epoch: int
    classes: tuple[str, ...]
    config: TrainConfig
    data_config: DataConfig
    validation: Folder | DatasetSource | None
    evaluation: Evaluation | None
    test: Folder | DatasetSource | None = None
    test_evaluation: Evaluation | None = None
    temperature: float = 1.0
