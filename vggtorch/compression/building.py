"""The Keras model with the cheaper layers in place."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain, count
from typing import Any

import keras
from torch import nn

from vggtorch.compression.factors import Factors, geometry
from vggtorch.compression.sites import Site
from vggtorch.surgery import delete_channels, remade, replace_where


def built(
    model: keras.Model,
    sites: Mapping[str, Site],
    chosen: Mapping[str, Factors],
    modules: Mapping[str, nn.Sequential],
) -> keras.Model:
    """A new model in which layers were replaced by those of `chosen`, with the modules' weights.

    The last of the new layers has the old layer's name, activation and settings.
    """
    originals = {name: model.get_layer(name) for name in chosen}
    gone = {
        name: sorted(set(range(sites[name].outputs)) - set(factors.gives.tolist()))
        for name, factors in chosen.items()
        if factors.gives is not None
    }
    if gone:
        model = delete_channels(model, gone)
    made: dict[str, list[keras.Layer]] = {}
    taken = {operation.name for operation in model.operations}

    def make(old: keras.Layer) -> list[keras.Layer]:
        made[old.name] = _layers(old, sites[old.name], chosen[old.name], taken)
        return made[old.name]

    # Sites are layers of the model's own, whatever layers of nested models are called.
    olds = [
        model.get_layer(name)
        for name, factors in chosen.items()
        if factors.method != "channels"
        or (factors.bias is not None and not originals[name].use_bias)
    ]
    if olds:
        model = replace_where(model, lambda layer: any(layer is old for old in olds), make)
    for name in chosen:
        trainable = originals[name].trainable
        for layer, module in zip(
            made.get(name, [model.get_layer(name)]),
            [m for m in modules[name].children() if isinstance(m, nn.Conv2d | nn.Linear)],
            strict=True,
        ):
            values = [parameter.detach().cpu() for parameter in module.parameters()]
            # OIHW -> HWIO; (out, in) -> (in, out)
            kernel = values[0].permute(2, 3, 1, 0) if values[0].ndim == 4 else values[0].T
            layer.set_weights([kernel.numpy(), *(bias.numpy() for bias in values[1:])])
            layer.trainable = trainable
    return model


def _layers(old: keras.Layer, site: Site, factors: Factors, taken: set[str]) -> list[keras.Layer]:
    """New Keras layers, unbuilt, that are what a site's factors are; `taken` gets their names."""
    layers = []
    for part in factors.parts:
        last = part is factors.parts[-1]
        settings: dict[str, Any] = {"use_bias": last and factors.bias is not None}
        if site.is_dense:
            settings["units"] = part.weight.shape[0]
        else:
            settings["filters"] = part.weight.shape[0]
            settings["kernel_size"] = tuple(part.weight.shape[2:])
            settings["strides"] = geometry(site, part.axes)[0]
        if not last:
            settings |= {"activation": "linear", "activity_regularizer": None}
        name = old.name if last else _free(old.name + part.suffix, taken)
        layers.append(remade(old, name, **settings))
    return layers


def _free(name: str, taken: set[str]) -> str:
    """A name, numbered where it is taken, such as in a model that was compressed before."""
    found = next(n for n in chain([name], (f"{name}_{i}" for i in count(2))) if n not in taken)
    taken.add(found)
    return found
