"""One layer made again: from its config, on the right device, with all that the old one holds.

A copy is made in two steps, because most layers have weights only once they have been called: first
`remade` from the config, then, after the copy's first call, `check_state` and `carry_`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import keras
import torch
from keras.layers import Layer, TorchModuleWrapper

from vggtorch.keras_graph import (
    all_layers,
    give_seed_generator_,
    lambda_output_shape,
    mark_,
    marked,
    raw_value,
    reset_seed_,
    safe_mode_off,
    seed_generators,
    set_value_,
    torch_dtype,
    track_variables_,
)


def remade(old: Layer, name: str | None = None, **settings: Any) -> Layer:
    """A layer like `old`, under another name and with other settings if wanted, not called yet."""
    try:
        with safe_mode_off():
            return _from_config(old, {**settings, "name": name or old.name})
    except Exception as error:
        raise ValueError(
            f"The layer {old.name!r} ({type(old).__name__}) can't be made again from its config, "
            f"which saving needs too: {error}"
        ) from error


def changed_copy(
    old: Layer,
    settings: Mapping[str, Any],
    input_shape: tuple[int | None, ...],
    values: Sequence[torch.Tensor],
) -> Layer:
    """A built copy of a layer with other settings, and with `values` for its variables."""
    new = remade(old, **settings)
    if values:
        with on(where(old)):
            new.build(input_shape)
    given = {id(v): value for v, value in zip(old.variables, values, strict=True)}
    carry_(old, new, given)
    return new


def _from_config(old: Layer, settings: Mapping[str, Any]) -> Layer:
    base = {"trainable": old.trainable, "dtype": old.dtype_policy, **settings}
    # Two kinds of layers hold what a config can't carry: torch modules and code.
    if isinstance(old, TorchModuleWrapper):
        return type(old)(copy.deepcopy(old.module), output_shape=old.output_shape, **base)
    if isinstance(old, keras.layers.Lambda):
        return type(old)(
            old.function,
            output_shape=lambda_output_shape(old),
            mask=old.mask,
            arguments=old.arguments,
            **base,
        )
    config = {**old.get_config(), **settings}
    for key, value in config.items():  # a config can't name a function that Keras doesn't know
        live = getattr(old, key, None)
        if isinstance(live, FunctionType | BuiltinFunctionType) and not isinstance(value, str):
            config[key] = live
    # A regulariser's factor may be a tensor. Made on the meta device it would have no value.
    device = where(old)
    with on(None if device == "meta" else device):
        new = type(old).from_config(config)
        if "dtype" not in settings and new.dtype_policy.name != old.dtype_policy.name:
            new.dtype_policy = old.dtype_policy  # which the config of SpatialDropout2D leaves out
        _give_seeds_(old, new)
    if old.built and type(old).build_from_config is not Layer.build_from_config:
        with on(device):
            new.build_from_config(old.get_build_config())  # which makes a state of another kind
    return new


def _give_seeds_(old: Layer, new: Layer) -> None:
    """Let `new` draw at random where `old` does.

    A Dropout has a seed generator only if its rate was above 0 when it was made, so that one whose
    rate was changed to 0 later has one that its config knows nothing of. A Sequential model inside
    has an InputLayer only once it is built.
    """
    found = (
        [x for x in all_layers(y) if type(x) is not keras.layers.InputLayer] for y in (old, new)
    )
    for source, target in zip(*found, strict=False):
        if seed_generators(source) and not seed_generators(target):
            for key, value in vars(source).items():
                if isinstance(value, keras.random.SeedGenerator):
                    seed = value.get_config()["seed"]
                    give_seed_generator_(target, key, keras.random.SeedGenerator(seed))


def where(layer: object) -> str | None:
    """The device to build a copy of a layer on; None where Keras's default will do.

    Keras's own layers are built on the meta device, without values: all that they hold is replaced
    by the old layer's. Others may keep tensors anywhere, and are built for real.
    """
    if not isinstance(layer, Layer):
        return None
    if all(
        type(sub).__module__.startswith("keras.") and not isinstance(sub, TorchModuleWrapper)
        for sub in all_layers(layer)
    ):
        return "meta"
    return next((str(raw_value(v).device) for v in layer.variables), None)


def on(device: torch.device | str | None) -> contextlib.AbstractContextManager:
    """What is made inside stands on this device; None leaves the choice to Keras."""
    return contextlib.nullcontext() if device is None else keras.device(str(device))


def state(layer: Layer) -> list[keras.Variable]:
    """A layer's variables without the states of its seed generators."""
    seeds = {id(g.state) for sub in all_layers(layer) for g in seed_generators(sub)}
    return [v for v in layer.variables if id(v) not in seeds]


def check_state(old: Layer, new: Layer) -> str | None:
    """Raise unless `new`, just built, has the variables of `old`; says which shapes differ."""
    before = [tuple(v.shape) for v in state(old)]
    now = [tuple(v.shape) for v in state(new)]
    if len(before) != len(now) or len(all_layers(old)) != len(all_layers(new)):
        raise ValueError(
            f"The layer {old.name!r} ({type(old).__name__}) has {len(before)} variables, but made "
            f"again from its config it has {len(now)}: its get_config() doesn't say all."
        )
    return None if before == now else f"its weights have shapes {before}, now {now}"


def carry_(old: Layer, new: Layer, values: dict[int, torch.Tensor] | None = None) -> None:
    """Give `new` the values, trainable flags and other tensors of `old`, each copied once.

    `values` has, by the ids of old variables, those that are to have other values.
    """
    layers = list(zip(all_layers(old), all_layers(new), strict=True))
    for source, target in layers:
        # Parents come first, because setting the flag of one sets those of its children.
        target.trainable = source.trainable
        for name, tensor in vars(source).items():
            if isinstance(tensor, torch.Tensor):  # such as Normalization's mean
                setattr(target, name, tensor.detach().clone())
        for name, parameter in source.named_parameters(recurse=False):
            target.get_parameter(name).data = parameter.detach().clone()
        pairs = list(zip(seed_generators(source), seed_generators(target), strict=False))
        for seed, now in pairs:
            _give_value_(seed.state, now.state, raw_value(seed.state).detach().clone())
        for generator in list(seed_generators(target))[len(pairs) :]:
            if raw_value(generator.state).is_meta:  # a Dropout whose rate was 0 when it was made
                reset_seed_(generator)
    mark_(new, marked(old))
    buffers = dict(new.named_buffers())
    for name, buffer in old.named_buffers():
        buffers[name].data = buffer.detach().clone()
    for before, after in zip(state(old), state(new), strict=True):
        after.trainable = before.trainable
        value = (values or {}).get(id(before))
        # A clone keeps the memory format.
        _give_value_(before, after, raw_value(before).detach().clone() if value is None else value)
    for _, target in layers:
        track_variables_(target)


def _give_value_(old: keras.Variable, new: keras.Variable, value: torch.Tensor) -> None:
    old_value, new_value = raw_value(old), raw_value(new)
    if new_value.is_meta and not value.is_meta:
        set_value_(new, value, old_value.requires_grad)
    else:  # keep the Parameter itself, which a torch module may hold too
        new_value.data = value
        new_value.requires_grad = old_value.requires_grad


def torch_output_shape(module: torch.nn.Module, x: keras.KerasTensor) -> tuple[int | None, ...]:
    """The shape that a torch module puts out for `x`, which Keras doesn't find out."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}

    def run(size: int) -> torch.Size:
        shape = [size if n is None else n for n in x.shape]
        argument = torch.empty(shape, dtype=torch_dtype(x.dtype), device="meta")
        return torch.func.functional_call(module, meta, argument).shape

    # An axis of the result is unknown if its size depends on that of an unknown axis of the input.
    return tuple(a if a == b else None for a, b in zip(run(83), run(89), strict=True))
