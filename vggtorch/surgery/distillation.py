"""Train the layers that replace others until the network behind them sees what it always saw.

`distill_` starts from the best of three sets of weights (composed, least squares, the layers' own)
and needs images, but no labels. The new layers alone change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import torch
from torch import Tensor, nn

from vggtorch.keras_graph import data_format, functional, graph_of
from vggtorch.surgery.arguments import checked_effort, checked_images
from vggtorch.surgery.composition import compose_
from vggtorch.surgery.coordinates import (
    Coordinates,
    Moments,
    Scaled,
    coordinates_of,
    least_squares_,
    measure_moments,
    part,
)
from vggtorch.surgery.descent import Descent, copies, descend_, write_
from vggtorch.surgery.examples import (
    BATCH,
    Examples,
    check_maps,
    check_targets,
    cosines,
    held_out_of,
    in_batches,
    sized_examples,
    wide,
)
from vggtorch.surgery.nesting import flat_view
from vggtorch.surgery.region import (
    Region,
    before_activation,
    chain,
    find_region,
    last_product,
    next_smaller,
)
from vggtorch.surgery.wiring import Wiring, layer_names, needed

CROPS = 320  # how many crops are drawn, once, if their maps take less than MEMORY
MEMORY = 1 << 30  # bytes
HELD_OUT = 64  # crops of images that the new layers aren't trained on
COMPARED = 16  # of these images, whole, for the cosines that are returned
MOMENTS = 4 * BATCH  # of the crops, for least squares and for the coordinates of the training
CHECK = 25  # steps from one look at the held-out crops to the next
PATIENCE = 10  # looks without a better one before the training stops
LEARNING_RATE = 0.2  # relative to the size of the weights, in coordinates where inputs are white
DEEPER = 3.0  # how many times as much as the map before it each matched map counts

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Distillation:
    """How well new layers stand in for those they replaced, on images they were not trained on.

    Attributes:
        start: where training began: `compose`, `least squares` or `own` (the layers' own weights).
        before: cosine between the original's maps and the result's at the start, by layer name;
            the mean over held-out images.
        after: the same at the end.
        steps: optimizer steps taken.
        seconds: wall-clock time of the whole distillation.
    """

    start: str
    before: dict[str, float]
    after: dict[str, float]
    steps: int
    seconds: float


@dataclass(frozen=True)
class _Task:
    """What is trained, on what, and towards what.

    Attributes:
        tail: the new layers and those behind them, up to the last matched map.
        trained: the new layers' trainable parameters.
        loss: of the tail's outputs and their targets.
        train, check: examples to train on, and held-out ones.
    """

    tail: nn.Module
    trained: list[Tensor]
    loss: Loss
    train: Examples
    check: Examples

    def maps(self, x: Tensor) -> list[Tensor]:
        """What the tail makes of what enters it."""
        return wide(self.tail(x))

    def error(self) -> float:
        """The loss over all held-out examples."""
        return float(self.loss(in_batches(self.tail, self.check.x), self.check.targets))


def relative_error(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Absolute error of each map relative to its size; a mean in which deeper maps count more."""
    errors = torch.stack([_error(y, t) for y, t in zip(outputs, targets, strict=True)])
    weights = DEEPER ** torch.arange(len(errors), device=errors.device, dtype=errors.dtype)
    return errors @ weights / weights.sum()


def _error(y: Tensor, t: Tensor) -> Tensor:
    """Absolute error relative to the target's size; of a target of zeros, 0 if it is finite."""
    size = t.abs().sum()
    return (y - t).abs().sum() / torch.where(size == 0, torch.inf, size)


@contextmanager
def _only_trainable(trained: Sequence[Tensor], *models: keras.Model) -> Iterator[None]:
    """Gradients for these parameters alone, for the time being."""
    parameters = [v.value for model in models for v in model.variables]
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(any(p is t for t in trained))
        yield
    finally:
        for p, flag in zip(parameters, before, strict=True):
            p.requires_grad_(flag)


@torch.inference_mode(False)  # it learns, in whatever mode it is called
def distill_(
    original: keras.Model,
    result: keras.Model,
    new_layers: str | Sequence[str],
    images: Any,
    *,
    match: str | Sequence[str] | None = None,
    loss: Loss = relative_error,
    steps: int = 500,
    seconds: float = 110.0,
    seed: int = 0,
) -> Distillation:
    """Train new layers, in place, until the network behind them sees what it saw before.

    Starts from composed, least-squares or the layers' own weights, whichever are best on held-out
    images (a tenth of all), and minimises the relative absolute error of the next maps on random
    crops with all other layers frozen, by Adam in coordinates where inputs are white. Stops when
    the held-out images get no better and ends on the weights that were best there. One seed gives
    one result on one machine, unless `seconds` run out before `steps`.

    >>> import keras, numpy as np, vggtorch as vt
    >>> vgg = vt.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> vgg = vt.truncate(vgg, "block2_pool")
    >>> new = keras.layers.Conv2D(64, 5, padding="same", activation="relu", name="block1_conv")
    >>> faster = vt.replace(vgg, ["block1_conv1", "block1_conv2"], new)
    >>> photographs = np.random.default_rng(0).uniform(-100, 100, (10, 32, 32, 3))
    >>> found = vt.distill_(vgg, faster, "block1_conv", photographs, steps=1)
    >>> found.steps, list(found.after)
    (1, ['block1_pool', 'block2_pool'])

    Args:
        original: the network before the replacement; unchanged.
        result: the network with the new layers in place, all others named as in `original`.
        new_layers: their names; that of a nested model stands for all of its layers.
        images: (N, H, W, C), preprocessed, without labels; a hundred or more.
        match: layers of both networks whose outputs are to agree; by default the next three that
            make the map smaller (pools, strides).
        loss: of these layers' outputs (N, C, H, W) and the original's, in the order of their
            computation; the default did as well as any that was tried (benchmarks/tried.md).
        steps: optimizer steps at most; by then the learning rate has fallen to nothing.
        seconds: wall-clock time at most; by then the learning rate has fallen to nothing as well.
        seed: decides the held-out images, the crops and their order.

    Raises:
        ValueError: a model isn't a graph of layers; the new layers have more than one way in or
            out, are shared or have nothing to train; a model computes in float16; the images are
            too few or of another shape than the network takes; or numbers of steps, seconds or a
            seed that can't be meant.
    """
    begun = time.monotonic()
    checked_effort(steps, seconds, seed)
    wiring = Wiring(result, "distill_")
    new_layers = _inside(wiring, layer_names(new_layers, "distill_"))
    if match is not None:
        match = [match] if isinstance(match, str) else match
        match = ["/".join(wiring.route(name)) for name in match]
    original, result = flat_view(original, "distill_"), flat_view(result, "distill_")
    array = checked_images(images, original)
    region = find_region(original, result, new_layers)
    names = _matched(region, match)
    layers = [result.get_layer(name) for name in new_layers]
    trained = [v.value for layer in layers for v in layer.trainable_variables]
    if not trained:
        raise ValueError(f"The new layers {new_layers} have no trainable weights to distill into.")
    theirs = {id(v) for v in original.variables}
    if shared := [x.name for x in layers if any(id(v) in theirs for v in x.variables)]:
        raise ValueError(
            f"The original has the new layers {shared} itself, and would change with them: "
            f"expected the network as it was, and what replace or another surgery made of it."
        )
    if any(layer.compute_dtype == "float16" for layer in (*original.layers, *result.layers)):
        raise ValueError(
            "Received a model that computes in float16, in which the gradients of a training are "
            "lost; expected float32 or bfloat16, also mixed: distill in those."
        )
    generator = torch.Generator().manual_seed(seed)
    layout = data_format(graph_of(original, "distill_"))
    held_out, shown = held_out_of(array, layout, trained[0].device, generator)
    compare = _comparison(original, result, region, [*names, list(region.behind)[-1]])
    begin = _beginning(original, result, region, names)
    wanted = [region.behind[name][0] for name in names]
    tail = part(begin[1], [region.behind[name][1] for name in names])
    with _only_trainable(trained, original, result):
        one, examples = sized_examples(original, begin[0], wanted, shown, generator)
        check_maps(names, one.targets, wide(tail(one.x)))
        each = sum(t.nbytes for t in (one.x, *one.targets))
        number = max(MOMENTS, min(CROPS, steps * BATCH))  # no more than the steps will see
        train = examples(shown, max(BATCH, min(number, MEMORY // each)))
        check = examples(held_out, min(HELD_OUT, len(train.x)))
        check_targets(names, train.targets)
        task = _Task(tail, trained, loss, train, check)
        moments = measure_moments(
            tail,
            trained,
            last_product(region),
            part(begin[0], [before_activation(region)]),
            train.x[:MOMENTS].split(BATCH),
            generator,
        )
        start = _start_from_the_best_(task, _starts(region, moments))
        before = compare(held_out[:COMPARED])
        found = coordinates_of(moments, trained)
        taken = _train_(task, found, steps, begun + seconds, generator)
        after = compare(held_out[:COMPARED])
    return Distillation(start, before, after, taken, time.monotonic() - begun)


def _beginning(
    original: keras.Model, result: keras.Model, region: Region, names: Sequence[str]
) -> tuple[keras.KerasTensor, keras.KerasTensor]:
    """Where the trained part of each network begins, at the new layers or else at the images.

    At the images if some of what enters the layers behind goes around the new ones, as a shortcut
    does in a residual network.
    """
    begin, ends = region.new[0], [region.behind[name][1] for name in names]
    inputs = {id(tensor) for tensor in result.inputs}
    if any(id(node.outputs[0]) in inputs for node in needed(ends, cut={id(begin)})):
        return original.inputs[0], result.inputs[0]
    return region.old[0], begin


def _comparison(
    original: keras.Model,
    result: keras.Model,
    region: Region,
    names: Sequence[str],
) -> Callable[[Tensor], dict[str, float]]:
    """A function that gives the cosines of both networks' maps, the mean over images."""
    names = list(dict.fromkeys(names))
    deep = [
        part(model.inputs[0], [region.behind[name][i] for name in names])
        for i, model in enumerate((original, result))
    ]

    def means(images: Tensor) -> dict[str, float]:
        pairs = zip(names, *(in_batches(graph, images) for graph in deep), strict=True)
        return {name: float(cosines(a, b).mean()) for name, a, b in pairs}

    return means


def _inside(wiring: Wiring, names: Sequence[str]) -> list[str]:
    """The full names of layers; in the place of nested models, of all in them."""
    layers = wiring.layers_by_path().items()
    found: list[str] = []
    for name in ("/".join(wiring.route(name)) for name in names):
        inside = [
            path
            for path, layer in layers
            if path.startswith(f"{name}/")
            and functional(layer) is None
            and not isinstance(layer, keras.layers.InputLayer)
        ]
        found += inside or [name]
    return list(dict.fromkeys(found))


def _matched(region: Region, match: Sequence[str] | None) -> list[str]:
    """The layers whose outputs are to agree, in the order of the network."""
    if match is None:
        return next_smaller(region)
    unknown = [name for name in match if name not in region.behind]
    if unknown or not match:
        raise ValueError(
            f"Received match={match}; expected layers behind the new ones: "
            f"{list(region.behind)}. Not among them: {unknown}."
        )
    return [name for name in region.behind if name in match]


def _starts(region: Region, moments: Sequence[Moments]) -> dict[str, Callable[[], object]]:
    """The ways to give the new layers weights to start from, each a function that writes them."""
    starts: dict[str, Callable[[], object]] = {"own": lambda: None}
    for aimed in (m for m in moments if m.targets is not None):
        starts["least squares"] = partial(least_squares_, aimed)
    replaced, new = chain(*region.old), chain(*region.new)
    kernels = [a for a in new or [] if isinstance(a, keras.layers.Conv2D | keras.layers.Dense)]
    if replaced and len(kernels) == 1:
        starts["compose"] = partial(compose_, replaced, kernels[0])
    return starts


@torch.no_grad()
def _start_from_the_best_(task: _Task, starts: dict[str, Callable[[], object]]) -> str:
    """Write the weights whose held-out error is least; returns the name of the way to them."""
    own, found = copies(task.trained), {}
    for name, write_start_ in starts.items():
        write_(task.trained, own)
        try:
            write_start_()
        except ValueError:
            continue  # a chain that can't be composed can still be imitated
        found[name] = task.error(), copies(task.trained)
    best = min(found, key=lambda name: found[name][0])
    write_(task.trained, found[best][1])
    return best


def _train_(
    task: _Task,
    coordinates: Sequence[Coordinates | Scaled],
    steps: int,
    deadline: float,
    generator: torch.Generator,
) -> int:
    """Train until the steps, the time or the patience end; returns the steps."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    optimizer = torch.optim.Adam([c.theta for c in coordinates], LEARNING_RATE, (0.9, 0.99))

    def step_(rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        x, targets = task.train.batch(generator)
        gradients = torch.autograd.grad(task.loss(task.maps(x), targets), task.trained)
        with torch.no_grad():
            by_parameter = {id(p): g for p, g in zip(task.trained, gradients, strict=True)}
            for c in coordinates:
                c.take_([by_parameter[id(p)] for p in c.parameters])
            optimizer.step()
            for c in coordinates:
                c.write_()

    text = TextColumn("distilling, held-out error {task.fields[error]:.4f}")
    bar = Progress(text, BarColumn(), TimeRemainingColumn(), console=Console(stderr=True))
    state = Descent(best=task.error(), kept=copies(task.trained))
    with bar:
        shown = bar.add_task("", total=1.0, error=state.best)

        def looked(done: float) -> None:
            bar.update(shown, completed=done, error=state.best)

        descend_(
            state,
            task.trained,
            step_,
            task.error,
            looked,
            steps=steps,
            seconds=deadline - time.monotonic(),
            every=CHECK,
            patience=PATIENCE,
        )
        looked(1.0)
    return state.step
