"""How fast to learn: a short run in which the learning rate rises until the loss diverges."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import keras
import torch

from vggtorch.checks import whole
from vggtorch.keras_graph import graph_of
from vggtorch.models import held_tensors
from vggtorch.training.balance import class_weights
from vggtorch.training.config import TrainConfig
from vggtorch.training.display import open_display
from vggtorch.training.heads import class_names
from vggtorch.training.mixing import mixes
from vggtorch.training.opening import read_and_fit, settle_config
from vggtorch.training.optimization import freeze_for_, frozen_layers_kept, set_learning_rate_
from vggtorch.training.reading import shared_batches
from vggtorch.training.run import Images, assign_, first_state, make_accelerator
from vggtorch.training.stages import prepare
from vggtorch.training.step import train_step_


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


@torch.inference_mode(False)  # it learns, in whatever mode it is called
def find_learning_rate(
    model: keras.Model,
    train: Images,
    config: TrainConfig | None = None,
    *,
    lowest: float = 1e-6,
    highest: float = 1.0,
    steps: int = 100,
    **settings: Any,
) -> RateSearch:
    """Train a few steps while the learning rate rises from `lowest` to `highest`; then undo that.

    Afterwards the model has the weights, and the frozen layers, that it had before.
    `vggtorch.training.plot_rates` draws the result.

    >>> import tempfile, keras, torch, vggtorch as vt
    >>> images, labels = torch.rand(6, 8, 8, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> data = torch.utils.data.TensorDataset(images, labels)
    >>> model = keras.Sequential(
    ...     [keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(3)]
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     config = vt.TrainConfig(batch_size=3, output_dir=folder)
    ...     search = vt.find_learning_rate(model, data, config, steps=20)
    >>> 1e-7 <= search.suggestion <= 0.1
    True

    Args:
        model: what `finetune` takes.
        train: the same.
        config: the same; cached features go where that run would put them.
        lowest: the first learning rate.
        highest: the last one, unless the loss diverges before.
        steps: from the first to the last.
        **settings: fields of TrainConfig that go before it.

    Raises:
        ValueError: what `finetune` raises; a loss that isn't finite from the first step on.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", 2017; the smoothing and
    the suggestion are fastai's.
    """
    steps = whole("steps", steps, least=2)
    for name, rate in (("lowest", lowest), ("highest", highest)):
        if not isinstance(rate, Real) or isinstance(rate, bool) or not math.isfinite(rate):
            raise ValueError(f"Received {name}={rate!r}; expected a number above 0.")
    if not 0 < lowest < highest:
        raise ValueError(
            f"Received lowest={lowest}, highest={highest}; expected rates above 0 that rise."
        )
    graph_of(model, "find_learning_rate")
    config = settle_config(model, train, config, settings)
    model, read = read_and_fit(model, train, None, config)
    classes = class_names(model, read.classes, is_part=read.is_part)
    accelerator = make_accelerator(config.precision)
    device = model.variables[0].value.device
    before = [tensor.detach().clone() for tensor in held_tensors(model)]
    rates: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    with frozen_layers_kept(model):
        try:
            weight = class_weights(config, read.training, read.plan, classes)
            state = first_state(model, config, accelerator, weight)
            freeze_for_(model, config, 0)
            with open_display(accelerator.is_main_process) as show:
                stage = prepare(model, read, config, 0, accelerator, show)
                module = accelerator.prepare_model(stage.module).train()
                show.begin("learning rate", steps * config.batch_size)
                epochs = (stage.keys(read.plan, epoch) for epoch in itertools.count())
                keys = list(itertools.islice(itertools.chain.from_iterable(epochs), steps))
                batches = shared_batches(
                    stage.training, keys, config.num_workers, accelerator, in_pairs=mixes(config)
                )
                for done, batch in enumerate(batches):
                    state.progress.done = done
                    rates.append(lowest * (highest / lowest) ** (done / (steps - 1)))
                    set_learning_rate_(state.optimizer, rates[-1])
                    loss, _ = train_step_(state, module, batch, config, accelerator)
                    average = 0.98 * average + 0.02 * loss / batch.size
                    smoothed.append(average / (1 - 0.98 ** (done + 1)))
                    show.advance(batch.size, smoothed[-1])
                    if smoothed[-1] > 4 * min(smoothed):
                        break
        except FloatingPointError as error:
            if not smoothed:
                raise ValueError(
                    f"The loss isn't finite at the lowest learning rate, {lowest:.3g}: the data or "
                    f"the weights hold values that aren't finite or far too large."
                ) from error
        finally:
            assign_(model, before, "the search")
            model.zero_grad()
            model.to(device)
    return RateSearch(tuple(rates[: len(smoothed)]), tuple(smoothed))
