"""Train the layers that replace others until the network behind them sees what it always saw.

`fit_` starts from the best of three sets of weights (composed, least squares, the layers' own) and
needs images, but no labels. The new layers alone change.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import keras
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vggtorch.lowering import graphs, modules
from vggtorch.lowering import lowered as lowering
from vggtorch.surgery.composition import POINTWISE, SKIPPED, compose_

CROP = 96  # height and width of the crops that a fit trains on
CROPS = 320  # how many of them, drawn once, if their maps take less than MEMORY
MEMORY = 1 << 30  # bytes
HELD_OUT = 64  # crops of images that it does not train on
COMPARED = 16  # of these images, whole, for the cosines that it returns
BATCH = 16
CHECK = 25  # steps from one look at the held-out images to the next
PATIENCE = 10  # looks without a better one before it stops
WARM_UP = 10  # steps
LEARNING_RATE = 0.2  # relative to the size of the weights, in coordinates where inputs are white
DAMPING = 1e-3  # of the mean variance of the inputs
DEEPER = 3.0  # how many times as much as the map before it each matched map counts

Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Fit:
    """How well a replacement stands in for what it replaced, on images that it was not fitted to.

    Attributes:
        start: where the fit began: `compose`, `least squares` or `own` (the layers' own weights).
        before: cosine between the original's maps and the result's at the start, by layer name;
            the mean over held-out images.
        after: the same at the end.
        steps: optimizer steps taken.
        seconds: wall-clock time of the whole fit.
    """

    start: str
    before: dict[str, float]
    after: dict[str, float]
    steps: int
    seconds: float


# Where the new layers sit


@dataclass(frozen=True)
class _Region:
    """Tensors around the replaced layers in one graph and around the new ones in the other."""

    old: tuple[keras.KerasTensor, keras.KerasTensor]  # what enters, what leaves
    new: tuple[keras.KerasTensor, keras.KerasTensor]
    behind: dict[str, tuple[keras.KerasTensor, keras.KerasTensor]]  # what later layers give


def _producer(tensor: keras.KerasTensor) -> keras.Layer:
    return tensor._keras_history.operation


def _inputs(tensor: keras.KerasTensor) -> list[keras.KerasTensor]:
    """What the layer that made a tensor made it from."""
    history = tensor._keras_history
    return history.operation._inbound_nodes[history.node_index].input_tensors


def _calls(model: keras.Model) -> list[Any]:
    """The nodes of a model's own graph, in the order of their computation."""
    graph = model._functional if isinstance(model, keras.Sequential) else model
    depths = sorted(graph._nodes_by_depth, reverse=True)
    return [node for depth in depths for node in graph._nodes_by_depth[depth]]


def _nodes(model: keras.Model) -> dict[str, Any]:
    """The node of each layer, in the order of their computation; of a shared one, the last."""
    return {node.operation.name: node for node in _calls(model)}


def _region(original: keras.Model, result: keras.Model, new_layers: Sequence[str]) -> _Region:
    """Find the one way into the new layers and the one way out, in both graphs."""
    old, now, new = _nodes(original), _nodes(result), set(new_layers)
    if missing := sorted(new - set(now)):
        raise ValueError(f"Received new_layers {missing}; the result has the layers {list(now)}.")
    entries = {_producer(t).name for name in new for t in now[name].input_tensors} - new
    if len(entries) != 1 or not entries <= set(old):
        raise ValueError(
            f"The new layers {sorted(new)} take their input from {sorted(entries)}; expected one "
            f"layer, which the original has too."
        )
    (entry,) = entries

    calls = Counter(node.operation.name for node in _calls(result))
    behind: dict[str, tuple[keras.KerasTensor, keras.KerasTensor]] = {}
    exits = [
        (a, b)
        for a, b in zip(original.outputs, result.outputs, strict=True)
        if _producer(b).name in new
    ]
    for node in _calls(result):
        name, producers = node.operation.name, {_producer(t).name for t in node.input_tensors}
        later = not producers.isdisjoint({*new, *behind})
        if calls[name] > 1 and (name in {*new, entry} or later):
            raise ValueError(
                f"Layer {name!r} is called {calls[name]} times; expected the new layers, the one "
                f"before them and those behind them to be called once."
            )
        if name in new or not later:
            continue
        if name not in old:
            raise ValueError(
                f"Layer {name!r} comes after the new layers and is not in the original: "
                f"name it in new_layers too."
            )
        behind[name] = old[name].outputs[0], node.outputs[0]
        pairs = zip(old[name].input_tensors, node.input_tensors, strict=True)
        exits += [(a, b) for a, b in pairs if _producer(b).name in new]
    if len({id(b) for _, b in exits}) != 1:
        leaving = sorted({_producer(b).name for _, b in exits})
        raise ValueError(f"The new layers are left from {leaving}; expected one way out.")
    leaves, leaves_now = exits[0]
    if not behind:  # they are the network's last
        behind = {_producer(leaves_now).name: exits[0]}
    return _Region((old[entry].outputs[0], leaves), (now[entry].outputs[0], leaves_now), behind)


def _chain(start: keras.KerasTensor, end: keras.KerasTensor) -> list[keras.Layer] | None:
    """The layers from one tensor to another, in order; None where they branch."""
    layers: list[keras.Layer] = []
    while end is not start:
        if len(_inputs(end)) != 1:
            return None
        layers.insert(0, _producer(end))
        (end,) = _inputs(end)
    return layers


def _matched(region: _Region) -> list[str]:
    """The layers whose outputs are to agree: the next three that make the map smaller.

    Each further block costs as much time as those before it. Where the network has no such layer
    behind the cut, its last layer counts.
    """
    shrinking = [
        name
        for name, (tensor, _) in region.behind.items()
        if np.max(getattr(_producer(tensor), "strides", None) or 1) > 1
    ]
    return shrinking[:3] or list(region.behind)[-1:]


# Parts of the graphs as torch modules

Linear = modules.Conv2D | modules.Dense


def _part(start: keras.KerasTensor, ends: Sequence[keras.KerasTensor]) -> lowering.Lowered:
    """The layers between tensors of a model as a torch module; takes and returns NCHW."""
    return lowering.part(start, list(ends), data_format="channels_first").eval()


def _linears(graph: nn.Module, parameters: Sequence[Tensor]) -> list[Linear]:
    """The modules of a graph that multiply with one of these parameters, ungrouped."""
    return [
        module
        for module in graph.modules()
        if isinstance(module, Linear) and any(module.kernel is p for p in parameters)
    ]


def _linear_target(model: keras.Model, region: _Region) -> graphs.Graph:
    """What the replaced layers give before their last activation, as a function of their input."""
    tensor = region.old[1]
    while isinstance(_producer(tensor), POINTWISE):
        (tensor,) = _inputs(tensor)
    graph = _part(region.old[0], [tensor])
    variables = getattr(_producer(tensor), "variables", [])  # keras.ops.add, say, has none
    for module in _linears(graph, [v.value for v in variables]):
        module.activation = None
    return graph


def _last_linear(region: _Region, tail: nn.Module) -> Linear | None:
    """The new layer that gives the exit its values, if it is an ungrouped product."""
    start, tensor = region.new
    while isinstance(_producer(tensor), (*POINTWISE, *SKIPPED, keras.layers.BatchNormalization)):
        if tensor is start:
            return None
        (tensor,) = _inputs(tensor)
    layer = _producer(tensor)
    if isinstance(layer, keras.layers.DepthwiseConv2D) or getattr(layer, "groups", 1) != 1:
        return None
    return next(reversed(_linears(tail, [v.value for v in layer.variables])), None)


def _in_batches(graph: nn.Module, x: Tensor) -> list[Tensor]:
    """Run a graph without gradients, a batch at a time; one tensor for each of its outputs."""
    with torch.no_grad():
        return [torch.cat(parts) for parts in zip(*map(graph, x.split(BATCH)), strict=True)]


# The new layers in good coordinates


def _matrix(module: Linear, kernel: Tensor) -> Tensor:
    """A kernel, or its gradient, as (inputs of one output, outputs); rows as in `_patches`."""
    if isinstance(module, modules.Dense):
        return kernel
    if module.depthwise:
        return kernel.flatten(2).flatten(0, 1)  # HWCM -> (HW, CM)
    return kernel.permute(2, 0, 1, 3).flatten(0, 2)  # HWIO -> (IHW, O)


def _kernel(module: Linear, matrix: Tensor) -> Tensor:
    """The inverse of `_matrix`."""
    if isinstance(module, modules.Dense) or module.depthwise:
        return matrix.reshape(module.kernel.shape)
    height, width, inputs, outputs = module.kernel.shape
    return matrix.reshape(inputs, height, width, outputs).permute(1, 2, 0, 3)


def _patches(module: Linear, x: Tensor) -> Tensor:
    """What meets the kernel at each position, and a one for the bias: (positions, inputs + 1)."""
    if isinstance(module, modules.Dense):
        rows = x.flatten(0, -2)
    else:
        x, padding = module.pad(x)
        size = module.kernel.shape[:2]
        columns = F.unfold(x, size, module.dilation, padding, module.stride)  # (N, IHW, positions)
        if module.depthwise:
            columns = columns.unflatten(1, (x.shape[1], -1)).flatten(0, 1)  # (NC, HW, positions)
        elif module.kernel.shape[2] != x.shape[1]:  # groups share what they meet on average
            columns = columns.unflatten(1, (x.shape[1] // module.kernel.shape[2], -1)).flatten(0, 1)
        rows = columns.transpose(1, 2).flatten(0, 1)
    return torch.cat([rows, torch.ones_like(rows[:, :1])], 1)


@dataclass
class _Moments:
    """Sums over a sample of the positions at one layer, in float64.

    Attributes:
        module: the layer.
        patches: patch by patch, (D + 1, D + 1); the last row and column are the one's.
        targets: patch by wanted output, (D + 1, O); None where nothing is wanted.
        count: positions counted in.
    """

    module: Linear
    patches: Any = 0.0
    targets: Any = None
    count: int = 0

    def add(self, x: Tensor, target: Tensor | None, generator: torch.Generator) -> None:
        """Count in the maps (N, C, H, W) that enter the layer, and those that it should give."""
        wanted = len(_matrix(self.module, self.module.kernel)) // 4 + 512
        for i in range(len(x)):  # one by one, since patches overlap and so take much memory
            rows = _patches(self.module, x[i : i + 1])
            kept = torch.randperm(len(rows), generator=generator)[:wanted].to(rows.device)
            rows = rows[kept].double()
            self.count += len(rows)
            self.patches = self.patches + rows.T @ rows
            if target is not None:
                y = target[i : i + 1].movedim(1, -1).flatten(0, -2)[kept].double()
                self.targets = (0.0 if self.targets is None else self.targets) + rows.T @ y

    @property
    def second(self) -> Tensor:
        """E[patch patch^T], without the one's row and column if the layer has no bias."""
        size = len(self.patches) - (self.module.bias is None)
        return self.patches[:size, :size] / self.count


def _put_(module: Linear, stacked: Tensor) -> None:
    """Write [kernel matrix; bias] into a layer."""
    size = len(stacked) - (module.bias is not None)
    module.kernel.copy_(_kernel(module, stacked[:size]))
    if module.bias is not None:
        module.bias.copy_(stacked[size])


def _least_squares_(moments: _Moments) -> None:
    """Give a layer the weights whose outputs come nearest to the wanted ones."""
    second = moments.second
    ridge = 1e-9 * second.diagonal().mean() * torch.eye(len(second), device=second.device)
    targets = moments.targets[: len(second)] / moments.count
    _put_(moments.module, torch.linalg.solve(second + ridge.double(), targets).float())


class _Coordinates:
    """The weights of a layer in coordinates in which one size of step suits them all.

    Neighbouring pixels are nearly equal, which gives the kernel of a layer that looks at
    photographs a problem of condition 1e5 and more, and makes Adam slow. With S the second moment
    of a patch and a one (for the bias), [kernel; bias] = S^-1/2 theta makes it round. Each column
    of theta, which is one output channel, is then measured by its own size.
    """

    def __init__(self, moments: _Moments) -> None:
        self.module, second = moments.module, moments.second
        self.parameters = [p for p in (self.module.kernel, self.module.bias) if p is not None]
        # In units of the patch's own size, beside which the one is neither large nor small.
        size = len(moments.patches) - 1
        units = torch.ones_like(second[0])
        units[:size] = second.diagonal()[:size].mean().sqrt()
        values, vectors = torch.linalg.eigh(second / units / units[:, None])
        values = values.clamp_min(0) + DAMPING * values.mean()
        self.inverse = ((vectors * values.rsqrt()) @ vectors.T / units[:, None]).float()
        theta = ((vectors * values.sqrt()) @ vectors.T * units).float()
        theta = theta @ self._stack([p.detach() for p in self.parameters])
        scale = theta.square().mean(0).sqrt()
        self.scale = scale.clamp_min(0.1 * float(scale.mean()) + 1e-12)
        self.theta = theta / self.scale

    def _stack(self, values: Sequence[Tensor]) -> Tensor:
        return torch.cat([_matrix(self.module, values[0]), *(bias[None] for bias in values[1:])])

    def take_(self, gradients: Sequence[Tensor]) -> None:
        """Turn the parameters' gradients into theta's."""
        self.theta.grad = self.inverse.T @ self._stack(gradients) * self.scale

    def write_(self) -> None:
        """Give the layer the weights that theta stands for."""
        _put_(self.module, self.inverse @ (self.theta * self.scale))


class _Plain:
    """A parameter of another kind, such as a batch norm's scale, measured by its own size."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameters = [parameter]
        self.scale = 0.1 * parameter.detach().square().mean().sqrt().clamp_min(0.1)
        self.theta = parameter.detach() / self.scale

    def take_(self, gradients: Sequence[Tensor]) -> None:
        """Turn the parameter's gradient into theta's."""
        self.theta.grad = gradients[0] * self.scale

    def write_(self) -> None:
        """Give the parameter the value that theta stands for."""
        self.parameters[0].copy_(self.theta * self.scale)


# The fit


@dataclass(frozen=True)
class _Examples:
    """Maps that enter the new layers, and the original's maps that should come of them."""

    x: Tensor
    targets: list[Tensor]

    def error(self, tail: nn.Module, loss: Loss) -> float:
        """Of the new layers and what follows them, over all examples."""
        return float(loss(_in_batches(tail, self.x), self.targets))

    def batch(self, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """A batch drawn at random."""
        which = torch.randint(len(self.x), (BATCH,), generator=generator).to(self.x.device)
        return self.x[which], [t[which] for t in self.targets]


def relative_error(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Absolute error of each map relative to its size; a mean in which deeper maps count more."""
    pairs = zip(outputs, targets, strict=True)
    errors = torch.stack([(y - t).abs().sum() / t.abs().sum() for y, t in pairs])
    weights = DEEPER ** torch.arange(len(errors), device=errors.device)
    return errors @ weights / weights.sum()


def _crops(images: Tensor, number: int, size: int, generator: torch.Generator) -> Tensor:
    """Squares at random places of random images, (number, C, size, size), channels-last."""
    high, wide = (min(size, n) for n in images.shape[2:])

    def draw(below: int) -> list[int]:
        return torch.randint(below, (number,), generator=generator).tolist()

    places = zip(
        draw(len(images)),
        draw(images.shape[2] - high + 1),
        draw(images.shape[3] - wide + 1),
        strict=True,
    )
    crops = [images[i, :, top : top + high, left : left + wide] for i, top, left in places]
    return torch.stack(crops).contiguous(memory_format=torch.channels_last)


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


def _moments(
    tail: nn.Module,
    linears: Sequence[Linear],
    last: Linear | None,
    target: nn.Module,
    x: Tensor,
    generator: torch.Generator,
) -> list[_Moments]:
    """Moments at each of the new layers; at the last one also with what it should give."""
    moments = [_Moments(module) for module in linears]
    entered: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        entered[module] = args[0].detach()

    hooks = [module.register_forward_pre_hook(keep) for module in linears]
    for part in x.split(BATCH):
        tail(part)
        (y,) = target(part)
        for moment in moments:
            wanted = y if moment.module is last else None
            moment.add(entered[moment.module], wanted, generator)
    for hook in hooks:
        hook.remove()
    return moments


def _starts_(region: _Region, last: _Moments | None, trained: Sequence[Tensor]) -> Iterator[str]:
    """Give the new layers one set of weights to start from after the other; yields its name."""
    own = [p.detach().clone() for p in trained]
    yield "own"
    if last is not None:
        _least_squares_(last)
        yield "least squares"
        _restore_(trained, own)
    chain, new = _chain(*region.old), _chain(*region.new)
    kernels = [a for a in new or [] if isinstance(a, keras.layers.Conv2D | keras.layers.Dense)]
    if chain and len(kernels) == 1:
        try:
            compose_(chain, kernels[0])
        except ValueError:
            return  # what can't be composed can still be fitted
        yield "compose"


def _restore_(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


def _checked(images: Any, original: keras.Model) -> np.ndarray:
    if len(original.inputs) != 1:
        raise ValueError(f"Received a model with {len(original.inputs)} inputs; expected one.")
    arrays = [np.asarray(keras.ops.convert_to_numpy(image), np.float32) for image in images]
    if len(arrays) < 10:
        raise ValueError(f"Received {len(arrays)} images; expected 10 at least, better 100.")
    if len(shapes := sorted({array.shape for array in arrays})) > 1:
        raise ValueError(
            f"Received images of {len(shapes)} shapes, such as {shapes[0]} and {shapes[1]}; "
            f"expected one: preprocess them to one size."
        )
    stacked = np.stack(arrays)
    shape = tuple(original.inputs[0].shape)
    if stacked.ndim != len(shape) or any(
        a not in (None, b) for a, b in zip(shape, stacked.shape, strict=True)
    ):
        raise ValueError(
            f"Received images of shape {stacked.shape}; expected {shape}, preprocessed as the "
            f"model expects."
        )
    if not np.isfinite(stacked).all():
        raise ValueError("Received images with NaN or infinite values; leave those out.")
    return stacked


def fit_(
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
) -> Fit:
    """Train a replacement, in place, until the network behind it sees what it saw before.

    Starts from composed, least-squares or the layers' own weights, whichever are best on held-out
    images (a tenth of all), and minimises the relative absolute error of the next maps on random
    crops with all other layers frozen, by Adam in coordinates where inputs are white. Stops when
    the held-out images get no better and ends on the weights that were best there. One seed gives
    one result on one machine, unless `seconds` run out before `steps`.

    Args:
        original: the network before the replacement; unchanged.
        result: the network with the new layers in place, all others named as in `original`.
        new_layers: their names.
        images: (N, H, W, C), preprocessed, without labels; a hundred or more.
        match: layers of both networks whose outputs are to agree; by default the next three that
            make the map smaller (pools, strides).
        loss: of these layers' outputs (N, C, H, W) and the original's, in the order of their
            computation; the default did as well as any that was tried (benchmarks/README.md).
        steps: optimizer steps at most; by then the learning rate has fallen to nothing.
        seconds: wall-clock time at most; by then the learning rate has fallen to nothing as well.
        seed: decides the held-out images, the crops and their order.

    Raises:
        ValueError: the new layers have more than one way in or out, are shared or have nothing to
            train, or the images are too few or of another shape than the network takes.
    """
    begun = time.monotonic()
    pixels = torch.from_numpy(_checked(images, original))
    new_layers = [new_layers] if isinstance(new_layers, str) else list(new_layers)
    region = _region(original, result, new_layers)
    match = [match] if isinstance(match, str) else match
    wanted = set(_matched(region) if match is None else match)
    names = [name for name in region.behind if name in wanted]
    unknown = sorted(wanted - set(names))
    if unknown or not names:
        raise ValueError(
            f"Received match={match}; expected layers behind the new ones: {list(region.behind)}. "
            f"Not among them: {unknown}."
        )
    layers = [result.get_layer(name) for name in new_layers]
    trained = [v.value for layer in layers for v in layer.trainable_variables]
    if not trained:
        raise ValueError(f"The new layers {new_layers} have no trainable weights to fit.")

    old, new = zip(*(region.behind[name] for name in names), strict=True)
    prefix = keras.Function(original.inputs, list(old))
    pixels = pixels.to(trained[0].device)
    if lowering.layout(prefix) == "channels_last":
        pixels = pixels.permute(0, 3, 1, 2)  # NHWC -> NCHW view
    generator = torch.Generator().manual_seed(seed)
    pixels = pixels[torch.randperm(len(pixels), generator=generator).to(pixels.device)]
    held_out, shown = pixels[: len(pixels) // 10], pixels[len(pixels) // 10 :]

    reference, tail = _part(region.old[0], old), _part(region.new[0], new)
    # Layers that know the size of the map they get leave no choice but whole images.
    sized = keras.layers.Flatten | keras.layers.Reshape
    whole = any(isinstance(operation, sized) for operation in prefix.operations)
    size = max(pixels.shape[2:]) if whole else CROP

    enter: nn.Module | None = None
    if region.old[0] is not original.inputs[0]:
        enter = _part(original.inputs[0], [region.old[0]])

    def examples(source: Tensor, number: int) -> _Examples:
        x = _crops(source, number, size, generator)
        x = x if enter is None else _in_batches(enter, x)[0]
        return _Examples(x, _in_batches(reference, x))

    compared = list(dict.fromkeys([*names, list(region.behind)[-1]]))
    deep = [
        _part(model.inputs[0], [region.behind[name][i] for name in compared])
        for i, model in enumerate((original, result))
    ]

    def cosines() -> dict[str, float]:
        maps = (_in_batches(graph, held_out[:COMPARED]) for graph in deep)
        pairs = zip(compared, *maps, strict=True)
        return {
            name: float(F.cosine_similarity(a.flatten(1), b.flatten(1)).mean())
            for name, a, b in pairs
        }

    with _only_trainable(trained, original, result):
        one = examples(shown, 1)
        each = sum(t.nbytes for t in (one.x, *one.targets))
        train = examples(shown, max(BATCH, min(CROPS, MEMORY // each)))
        check = examples(held_out, min(HELD_OUT, len(train.x)))

        linears = _linears(tail, trained)
        last = _last_linear(region, tail)
        target = _linear_target(original, region)
        moments = _moments(tail, linears, last, target, train.x[: 4 * BATCH], generator)
        with torch.no_grad():
            aimed = next((m for m in moments if m.targets is not None), None)
            starts = {
                name: (check.error(tail, loss), [p.clone() for p in trained])
                for name in _starts_(region, aimed, trained)
            }
            start = min(starts, key=lambda name: starts[name][0])
            _restore_(trained, starts[start][1])
        before = cosines()
        taken = _descend_(
            tail, trained, moments, train, check, loss, steps, begun + seconds, generator
        )
        after = cosines()
    return Fit(start, before, after, taken, time.monotonic() - begun)


def _descend_(
    tail: nn.Module,
    trained: Sequence[Tensor],
    moments: Sequence[_Moments],
    train: _Examples,
    check: _Examples,
    loss: Loss,
    steps: int,
    deadline: float,
    generator: torch.Generator,
) -> int:
    """Train until the steps, the time or the patience end, keep the best; returns the steps."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    linear = [_Coordinates(m) for m in moments]
    done = {id(p) for c in linear for p in c.parameters}
    others = [_Plain(p) for p in trained if id(p) not in done]
    coordinates: list[_Coordinates | _Plain] = [*linear, *others]
    optimizer = torch.optim.Adam([c.theta for c in coordinates], LEARNING_RATE, (0.9, 0.99))
    best, kept, waited = check.error(tail, loss), [p.detach().clone() for p in trained], 0
    begun, step = time.monotonic(), 0
    text, left = (
        TextColumn("fitting, held-out error {task.fields[error]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(text, BarColumn(), left) as bar:
        task = bar.add_task("", total=1.0, error=best)
        while step < steps and waited < PATIENCE:
            spent = (time.monotonic() - begun) / max(deadline - begun, 1e-9)
            # The clock has a say only where it is clear that the steps won't fit: what depends on
            # it is another result each time.
            progress = step / steps if spent < 0.2 else max(step / steps, spent)
            if spent >= 1:
                break
            for group in optimizer.param_groups:  # warm up, then down a cosine to nothing
                warm = min(1.0, (step + 1) / WARM_UP)
                group["lr"] = LEARNING_RATE * warm * (1 + cos(pi * progress)) / 2
            x, targets = train.batch(generator)
            gradients = torch.autograd.grad(loss(tail(x), targets), trained)
            with torch.no_grad():
                by_parameter = {id(p): g for p, g in zip(trained, gradients, strict=True)}
                for c in coordinates:
                    c.take_([by_parameter[id(p)] for p in c.parameters])
                optimizer.step()
                for c in coordinates:
                    c.write_()
            step += 1
            if step % CHECK == 0:
                error, waited = check.error(tail, loss), waited + 1
                if error < best:
                    best, kept, waited = error, [p.detach().clone() for p in trained], 0
                bar.update(task, completed=progress, error=best)
        if step % CHECK and (error := check.error(tail, loss)) < best:
            best, kept = error, [p.detach().clone() for p in trained]
        bar.update(task, completed=1.0, error=best)
    with torch.no_grad():
        _restore_(trained, kept)
    return step
