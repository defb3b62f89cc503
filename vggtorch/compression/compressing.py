"""`compress`: the whole way from a budget and images to a network that costs so much."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import inf
from numbers import Real
from typing import Any, Literal, get_args

import keras
import torch

from vggtorch.compression.building import built
from vggtorch.compression.choice import Option, choice_of, left
from vggtorch.compression.composing import composed
from vggtorch.compression.deletion import pairs_of
from vggtorch.compression.factors import METHODS
from vggtorch.compression.fitting import closed_forms_, options_of
from vggtorch.compression.joint import train_
from vggtorch.compression.networks import likeness, networks_of, tapped_result
from vggtorch.compression.photographs import split
from vggtorch.compression.progress import open_progress
from vggtorch.compression.report import Compression, LayerChange
from vggtorch.compression.resuming import Notebook
from vggtorch.compression.sites import Site
from vggtorch.compression.work import Work
from vggtorch.keras_graph import functional, graph_of
from vggtorch.surgery import checked_effort, flatten, names_when_flat

By = Literal["multiply-adds", "seconds"]


@torch.inference_mode(False)  # it learns, in whatever mode it is called
def compress(
    model: keras.Model,
    times: float,
    images: Any,
    *,
    by: By = "multiply-adds",
    methods: str | Sequence[str] = (*METHODS, "channels", "composition"),
    keep: str | Sequence[str] = (),
    seconds: float = 600.0,
    steps: int = 300,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
) -> tuple[keras.Model, Compression]:
    """A network that costs 1/times as much and sees the same; and what was done to have it.

    Layers are replaced by cheaper ones, chosen by what each of them costs and how much it changes
    the last map of the network, and fitted to images without labels: in closed form, each on what
    the layers already replaced give it, then all at once, until the maps agree with the original's.

    >>> import numpy as np, vggtorch as vt
    >>> vgg = vt.VGG11(weights=None, include_top=False, input_shape=(32, 32, 3))
    >>> vgg = vt.truncate(vgg, "block2_pool")
    >>> photographs = np.random.default_rng(0).uniform(-100, 100, (20, 32, 32, 3))
    >>> smaller, found = vt.compress(vgg, 2, photographs, steps=1)
    >>> found.times >= 2, list(found.likeness)
    (True, ['block1_pool', 'block2_pool'])

    The last of the layers in the place of `block2_conv1` has its name, its activation and its
    settings; those before it are called `block2_conv1_rank` (low rank), `block2_conv1_vertical` and
    `_horizontal` (separated), `block3_conv2_narrow` and `_core` (bottleneck), with a number behind
    where that is taken. All other layers, the weight set and the input stay. Convolutions with
    groups or dilation and layers that are called more than once stay as they are; depthwise ones
    and batch norms only become narrower with the layers around them. Nested models are dissolved
    first, as `flatten` does it. All is computed in float32, and the result has the model's dtype
    policies.

    The methods:

    - "low rank": the kernel to fewer channels, then 1 x 1 (Zhang et al. 2016, their asymmetric
      reconstruction); of a Dense layer, the truncated singular value decomposition in the metric of
      what enters it.
    - "separated": a column of the kernel, then a row (Jaderberg et al. 2014), and 1 x 1 behind them
      where that is better (Zhang et al. 2016).
    - "channels": channels between two convolutions are deleted, in the depthwise layers between
      them too, and the second is fitted anew to those that are left (He et al. 2017).
    - "bottleneck": 1 x 1 to fewer channels, the kernel between few channels, 1 x 1 (Tucker-2, Kim
      et al. 2016).

    - "composition": two layers without an activation between them become one, where that is exact
      and cheaper; before all else.

    An error of a layer is measured by what it does to the network's outputs: to first order by the
    gradients there, which also know which channels a ReLU cuts off, and by a run of the network
    with the layer replaced, once for each layer and method. What is kept of the images in the
    meantime is a sample of positions of each layer, a quarter of a gigabyte at most.

    One seed gives one result on one kind of machine, unless `seconds` run out before `steps`.

    Args:
        model: Functional or Sequential, with one input and any layers; unchanged.
        times: how many times less the result is to cost, more than 1.
        images: (N, H, W, C), preprocessed, without labels; 20 at least, better a few hundred. A
            tenth of them is held out. Costs are counted at their size.
        by: what is to be less: "multiply-adds", or "seconds", measured on this machine, for one
            image, on the device of the weights.
        methods: those to choose from.
        keep: names of layers that stay as they are, "vgg16/block1_conv1" inside of nested models;
            that of a nested model stands for all of its layers.
        seconds: wall-clock time; what the closed forms leave of it is for the training. They are
            done in any case, and take two to four minutes for VGG16 on 2 cores.
        steps: optimizer steps at most, each on eight crops; 0 leaves the closed forms.
        seed: decides the held-out images, the positions and the crops.
        folder: where to write down how far it is, every twenty steps; a run that was interrupted
            and is called again with the same arguments goes on there.

    Returns:
        The new model, and a `Compression`: what became of each layer, costs before and after, the
        likeness of the maps on held-out images. `print` shows it as a table.

    Raises:
        ValueError: a model that isn't a graph of layers, a layer in `keep` that doesn't exist,
            too few images or such as its preprocessing can't give, a budget that can't be reached
            (it says which one can), or a folder that holds another run.
    """
    graph_of(model, "compress")
    methods = [methods] if isinstance(methods, str) else list(methods or ())
    _check(times, by, methods)
    checked_effort(steps, seconds, seed)
    times, seconds, steps, seed = float(times), float(seconds), int(steps), int(seed)
    keep = _when_flat([keep] if isinstance(keep, str) else list(keep or ()), model)
    graphs = [functional(layer) for layer in model.layers]
    if functional(model) is not model or any(graph is not None for graph in graphs):
        model = flatten(model)  # a Sequential model too
    photographs = split(model, images, seed)
    settings = {
        "what": [times, by, methods, keep],
        "how": [seconds, steps, seed],
    }
    notes = Notebook(folder, model, photographs.shown, settings)
    whole = networks_of(model, photographs, keep)
    photographs = photographs.cropped(whole.original)
    start, merged = composed(model, whole.sites) if "composition" in methods else (model, {})
    networks = networks_of(start, photographs, keep) if merged else whole
    sites = {site.name: site for site in networks.sites}
    if not sites:
        raise ValueError(
            f"{model.name!r} has no layer that could be replaced: these are Conv2D and Dense "
            f"layers of its own, called once, without groups or dilation, that aren't in keep."
        )
    with open_progress() as progress:
        read = (networks.sites, networks.depthwise, networks.taps)
        pairs = pairs_of(start, *read, keep) if "channels" in methods else []
        work = Work(networks, whole, photographs, seed, notes, progress, by, pairs)
        options = options_of(work, [method for method in methods if method in METHODS])
        chosen, total = choice_of(work, options, times)
        factors = closed_forms_(work, chosen)
        replaced = [sites[name] for name in factors]
        before = likeness(networks, networks.work, photographs.held_out)
        modules = {site.name: getattr(networks.work, site.child) for site in replaced}
        trained = [p for module in modules.values() for p in module.parameters()]
        state = train_(work, networks.work, networks.maps, trained, steps, seconds)
    result = built(start, sites, factors, modules)
    tapped = tapped_result(result, networks)
    after = likeness(networks, tapped, photographs.held_out)
    cost = total / work.speed(tapped) if by == "seconds" else left(work, chosen)
    first = {site.name: work.cost(site, whole) for site in whole.sites if site.name in merged}
    first = {name: option[0].cost for name, option in options.items()} | first
    between = {pair.first.name: pair.between for pair in pairs}
    rows = tuple(
        _change(site, chosen.get(site.name), merged.get(site.name), first[site.name])
        for own in whole.sites
        for site in (own, *between.get(own.name, ()))
    )
    return result, Compression(by, total, cost, rows, before, after, state.step, notes.seconds)


def _change(
    site: Site, option: Option | None, merged: tuple[str, int] | None, before: float
) -> LayerChange:
    """What became of a layer that may have been composed with another and then replaced."""
    if merged is not None and merged[0] != site.name:
        return LayerChange(site.name, "composition", (), before, 0.0)
    if option is None:  # composed to one that isn't worth a replacement
        assert merged is not None
        return LayerChange(site.name, "composition", (), before, float(merged[1]))
    method = option.method or ("composition" if merged else None)
    return LayerChange(site.name, method, option.ranks, before, option.cost)


def _when_flat(keep: list[str], model: keras.Model) -> list[str]:
    found = []
    for name in keep:
        try:
            found += names_when_flat(model, [name], "compress")
        except ValueError as error:
            raise ValueError(f"Received keep={name!r}; {error}") from error
    return found


def _check(times: Any, by: str, methods: Sequence[str]) -> None:
    if isinstance(times, bool) or not isinstance(times, Real) or not 1 < float(times) < inf:
        raise ValueError(f"Received times={times!r}; expected a number above 1: 2 halves the cost.")
    if by not in get_args(By):
        raise ValueError(f"Received by={by!r}; expected one of {get_args(By)}.")
    known = [*METHODS, "channels", "composition"]
    if not methods or any(method not in known for method in methods):
        raise ValueError(f"Received methods={methods}; expected some of {known}.")
