"""What users have called in between."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import keras

from vggtorch.training.config import TrainConfig
from vggtorch.training.evaluation import Evaluation
from vggtorch.training.history import History
from vggtorch.weights import shortened


class Callback:
    """What `finetune` calls while it trains; a class of your own overrides what it needs.

    All of it is called in every process (`accelerate.PartialState().is_main_process` tells them
    apart). A run that was killed inside an epoch and resumed repeats the steps since its last
    checkpoint, and calls for them again.

    >>> import tempfile, keras, torch, vggtorch as vt
    >>> class UntilGood(vt.Callback):
    ...     def on_epoch_end(self, epoch, figures, evaluation):
    ...         figures["val_errors"] = (1 - figures["val_accuracy"]) * len(evaluation.labels)
    ...         return figures["val_errors"] <= 3
    >>> images, labels = torch.rand(3, 8, 8, 3), torch.arange(3)
    >>> data = torch.utils.data.TensorDataset(images, labels)
    >>> model = keras.Sequential(
    ...     [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3)]
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     history = vt.finetune(
    ...         model, data, data, callbacks=[UntilGood()], epochs=9, output_dir=folder
    ...     )
    >>> len(history.epochs), "val_errors" in history.epochs[0]
    (1, True)
    """

    def on_train_begin(self, model: keras.Model, config: TrainConfig) -> None:
        """The model is as it will train, with its new head, or as a checkpoint has it."""

    def on_step_end(self, step: int, loss: float) -> None:
        """After an optimizer step (from 0, over all epochs), with the mean loss of its batch."""

    def on_epoch_end(
        self, epoch: int, figures: dict[str, float], evaluation: Evaluation | None
    ) -> bool | None:
        """After an epoch (from 0); True ends the run after it.

        Args:
            epoch: which one.
            figures: its row of `history.epochs`. What is put in stands there too, and in trackers.
            evaluation: logits and labels of all validation images, which torchmetrics takes:
                `torchmetrics.functional.auroc(evaluation.probabilities, ...)`.
        """

    def on_train_end(self, history: History) -> None:
        """At the end, with what `finetune` returns."""


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """See that each has some of Callback's methods, and no others that would never be called."""
    known = [name for name in vars(Callback) if name.startswith("on_")]
    if not isinstance(callbacks, Sequence):
        raise ValueError(
            f"Received callbacks={type(callbacks).__name__}; expected a list of such objects."
        )
    for callback in callbacks:
        if inspect.isclass(callback):
            raise ValueError(
                f"Received the class {callback.__name__} as a callback; expected an object of it, "
                f"{callback.__name__}()."
            )
        own = [n for n in dir(callback) if n.startswith("on_") and callable(getattr(callback, n))]
        if not own or set(own) - set(known):
            other = ", ".join(sorted(set(own) - set(known))[:3])
            raise ValueError(
                f"Received a callback of {type(callback).__module__}.{type(callback).__name__}"
                + (f" with {other}" if other else "")
                + f"; expected an object with some of {', '.join(known)} (see vt.Callback)."
            )


def check_unfrozen(model: keras.Model, trained: Collection[int]) -> None:
    """See that no callback has unfrozen a weight that the optimizer doesn't have.

    It has those with the indices `trained` in the model's `variables`.
    """
    known = {id(model.variables[i]) for i in trained}
    if others := [v.path for v in model.trainable_variables if id(v) not in known]:
        raise ValueError(
            f"{shortened(others, 4)} was unfrozen while the run trained, and its optimizer doesn't "
            f"have it. Say it beforehand, by freeze='block5_pool', unfreeze=((2, 'block5_conv1'),)."
        )


def call(callbacks: Sequence[Any], name: str, *arguments: Any) -> bool:
    """Call a method of all callbacks that have it; whether one of them said yes."""
    answers = [getattr(c, name)(*arguments) for c in callbacks if hasattr(c, name)]
    return any(bool(answer) for answer in answers)  # NumPy's and torch's True too


def check_figures(figures: dict[str, Any], before: Collection[str]) -> None:
    """Make plain numbers of an epoch's figures, in place; those of `before` must be there."""
    if gone := [name for name in before if name not in figures]:
        raise ValueError(
            f"A callback has removed {', '.join(gone)} from an epoch's figures; expected that it "
            f"adds to them."
        )
    for name, value in figures.items():
        try:
            figures[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"A callback has put {name}={value!r} among the figures; expected a number."
            ) from error
