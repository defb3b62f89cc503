"""A new model from an old one: the one walk that every surgery ends in.

A surgery that changes a graph is a splice: whoever read tensor A now reads tensor B, after some new
layers. One that cuts it names the tensors where the new model begins and ends. Both come down to
`rebuilt`, which walks the old graph once, copies each layer with its weights at its first call, and
calls the copies as the old layers were called.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import keras
import torch
from keras import KerasTensor as Tensor
from keras.layers import Layer, TorchModuleWrapper

from vggtorch.keras_graph import (
    Functional,
    Node,
    all_layers,
    filled,
    functional,
    is_plain_functional,
    lambda_output_shape,
    layers_as_given,
    operation_copy,
    producer,
    raw_value,
    safe_mode_off,
    set_value_,
    to_snake_case,
    torch_dtype,
    track_variables_,
)
from vggtorch.models import remember_, remembered
from vggtorch.surgery.wiring import Wiring, needed, owner


def splice(
    wiring: Wiring, pairs: Sequence[tuple[Tensor, Tensor]], new: Sequence[Layer]
) -> Functional:
    """A new model in which whoever read one tensor of a pair reads `new` applied to the other.

    The new layers are built only once the whole graph has been seen to fit, with copies of them
    in their place.
    """
    instead = {id(before): now for before, now in pairs}
    inputs, outputs = wiring.functional.input, wiring.functional.output
    kept = needed([*wiring.outputs, *wiring.functional.inputs], instead)
    _settle_names_(new, {node.operation.name for node in kept})
    if new:
        copies = {id(layer): _copy(layer, weights=False) for layer in new}
        trial = [copies[id(layer)] for layer in new]
        rebuilt(wiring, inputs, outputs, instead, trial, weights=False)
    return rebuilt(wiring, inputs, outputs, instead, new)


def rebuilt(
    wiring: Wiring,
    inputs: Any,
    outputs: Any,
    instead: Mapping[int, Tensor] | None = None,
    new_layers: Sequence[Layer] = (),
    *,
    weights: bool = True,
    changed: Mapping[int, Layer] | None = None,
) -> Functional:
    """A new model from `inputs` to `outputs`, both structures of the old graph's tensors.

    `instead` maps the id of an old tensor to the one that is read in its place, through the new
    layers. Without `weights` the result has no values: it only shows that everything fits.
    `changed` maps the id of an old layer, in nested models too, to the `changed_copy` that is
    called in its place.
    """
    instead, changed = instead or {}, changed or {}
    device = next((raw_value(v).device for v in wiring.model.variables), None)
    made = {id(t): _copy_input(t, changed) for t in keras.tree.flatten(inputs)}  # old -> new
    read: dict[int, Tensor] = {}  # old tensor -> what is read in its place, where `instead` says so
    copies: dict[int, Any] = {}  # old operation -> new one

    def reading(tensor: Tensor) -> Tensor:
        if id(tensor) not in instead:
            return made[id(tensor)]
        if id(tensor) not in read:
            source = instead[id(tensor)]
            x = made[id(tensor)] if source is tensor else reading(source)
            for layer in new_layers:
                with _on(device if weights else "meta"):
                    x = _call_new(layer, x)
            read[id(tensor)] = x
        return read[id(tensor)]

    for node in needed(keras.tree.flatten(outputs), instead, set(made)):
        old = node.operation
        first_call = id(old) not in copies
        if first_call:
            copies[id(old)] = changed.get(id(old)) or _copy(old, weights, changed)
        new = copies[id(old)]
        args, kwargs = filled(node, {id(t): reading(t) for t in node.input_tensors})
        with _on(_where(old)):
            results = _call_kept(new, args, kwargs, node)
        if first_call and isinstance(old, Layer) and not _has_graph(old) and id(old) not in changed:
            _check_state(old, new, node, args, kwargs)
            if weights:
                _carry_(old, new)
        made.update({id(t): result for t, result in zip(node.outputs, results, strict=True)})

    model = wiring.model
    result = (type(model) if is_plain_functional(model) else Functional)(
        inputs=keras.tree.map_structure(lambda t: made[id(t)], inputs),
        outputs=keras.tree.map_structure(reading, outputs),
        name=model.name,
        trainable=model.trainable,
    )
    result.dtype_policy = model.dtype_policy
    kept = [id(t) for t in keras.tree.flatten(outputs) if id(t) not in instead]
    if kept != [id(t) for t in wiring.functional.outputs]:
        # Other outputs than those that the labels are the names of.
        remember_(result, dataclasses.replace(remembered(result), label_names=()))
    return result


def _call_new(layer: Layer, x: Tensor) -> Tensor:
    try:
        if isinstance(layer, TorchModuleWrapper) and layer.output_shape is None:
            layer.output_shape = _torch_output_shape(layer.module, x)
        y = layer(x)
    except Exception as error:
        raise ValueError(
            f"The new layer {layer.name!r} ({type(layer).__name__}) can't take its input of shape "
            f"{x.shape}: {error}"
        ) from error
    if not isinstance(y, Tensor):
        raise ValueError(
            f"The new layer {layer.name!r} ({type(layer).__name__}) must put out one tensor; it "
            f"puts out {len(keras.tree.flatten(y))}."
        )
    return y


def _call_kept(new: Any, args: Any, kwargs: Any, node: Node) -> list[Tensor]:
    try:
        if isinstance(new, TorchModuleWrapper) and args[0].shape != node.input_tensors[0].shape:
            new.output_shape = _torch_output_shape(new.module, *args)
        return keras.tree.flatten(new(*args, **kwargs))
    except Exception as error:
        raise _misfit(node, args, kwargs, str(error)) from error


def _torch_output_shape(module: torch.nn.Module, x: Tensor) -> tuple[int | None, ...]:
    """The shape that a torch module puts out for `x`, which Keras doesn't find out."""
    state = [*module.named_parameters(), *module.named_buffers()]
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in state}

    def run(size: int) -> torch.Size:
        shape = [size if n is None else n for n in x.shape]
        argument = torch.empty(shape, dtype=torch_dtype(x.dtype), device="meta")
        return torch.func.functional_call(module, meta, argument).shape

    # An axis of the result is unknown if its size depends on that of an unknown axis of the input.
    return tuple(a if a == b else None for a, b in zip(run(83), run(89), strict=True))


def _misfit(node: Node, args: Any, kwargs: Any, reason: str) -> ValueError:
    """The error for a kept layer that can't take what it would now get."""
    before = [t.shape for t in node.input_tensors]
    now = [t.shape for t in keras.tree.flatten((args, kwargs)) if isinstance(t, Tensor)]
    what = f"{node.operation.name!r} ({type(node.operation).__name__})"
    if now == before:
        return ValueError(f"The layer {what} can't be called again as it was: {reason}")
    sources = ", ".join(repr(owner(t)) for t in node.input_tensors)
    return ValueError(
        f"The layer {what} expects {_shapes(before)} (from {sources}) and would now get "
        f"{_shapes(now)}. Surgery keeps the layers that follow as they are: put something in "
        f"place that gives {_shapes(before)}."
    )


def _shapes(shapes: Sequence[tuple[int | None, ...]]) -> str:
    return str(shapes[0]) if len(shapes) == 1 else f"[{', '.join(map(str, shapes))}]"


# New layers


def _settle_names_(layers: Sequence[Layer], taken: set[str]) -> None:
    """Rename new layers whose automatic name is taken; refuse a chosen one that is."""
    taken = set(taken)
    for layer in {id(layer): layer for layer in layers}.values():
        if layer.name in taken:
            base = to_snake_case(type(layer).__name__)
            if not re.fullmatch(rf"{re.escape(base)}(_\d+)?", layer.name):
                raise ValueError(
                    f"The name {layer.name!r} of a new layer is taken. Give it another name."
                )
            layer.name = next(
                name for n in range(1, len(taken) + 2) if (name := f"{base}_{n}") not in taken
            )
        taken.add(layer.name)


# Copies of layers


def changed_copy(
    old: Layer,
    settings: Mapping[str, Any],
    input_shape: tuple[int | None, ...],
    values: Sequence[torch.Tensor],
) -> Layer:
    """A built copy of a layer with other settings, and with `values` for its variables."""
    new = _from_config(old, settings)
    if values:
        with _on(_where(old)):
            new.build(input_shape)
    _carry_(old, new, values)
    return new


def _copy_input(tensor: Tensor, changed: Mapping[int, Layer]) -> Tensor:
    """A new input that stands for `tensor`, which may come from the middle of the graph."""
    old = changed.get(id(producer(tensor)), producer(tensor))
    if not isinstance(old, keras.layers.InputLayer):
        return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=f"{old.name}_output")
    new = type(old).from_config(old.get_config())
    new.trainable, new.dtype_policy = old.trainable, old.dtype_policy
    return new.output


def _copy(old: Any, weights: bool, changed: Mapping[int, Layer] | None = None) -> Any:
    """A layer like `old` that hasn't been called; models come with their weights, if wanted."""
    if not isinstance(old, Layer):  # a stateless operation, such as keras.ops.add
        return operation_copy(old)
    if isinstance(old, Functional) and _has_graph(old):
        wiring = Wiring(old, "surgery")
        return rebuilt(wiring, old.input, old.output, weights=weights, changed=changed)
    if _has_graph(old):
        return _copy_sequential(old, weights, changed or {})
    try:
        with safe_mode_off():
            return _from_config(old)
    except Exception as error:
        raise ValueError(
            f"The layer {old.name!r} ({type(old).__name__}) can't be made again from its config, "
            f"which saving needs too: {error}"
        ) from error


def _from_config(old: Layer, settings: Mapping[str, Any] | None = None) -> Layer:
    base = {"name": old.name, "trainable": old.trainable, "dtype": old.dtype_policy}
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
    config = {**old.get_config(), **(settings or {})}
    for key, value in config.items():  # a config can't name a function that Keras doesn't know
        live = getattr(old, key, None)
        if isinstance(live, FunctionType | BuiltinFunctionType) and not isinstance(value, str):
            config[key] = live
    # A regulariser's factor may be a tensor. Made on the meta device it would have no value.
    device = _where(old)
    with _on(None if device == "meta" else device):
        new = type(old).from_config(config)
    if old.built and type(old).build_from_config is not Layer.build_from_config:
        with _on(device):
            new.build_from_config(old.get_build_config())  # which makes a state of another kind
    return new


def _copy_sequential(
    old: keras.Sequential, weights: bool, changed: Mapping[int, Layer]
) -> keras.Sequential:
    copies = {
        id(layer): changed.get(id(layer)) or _copy(layer, weights, changed)
        for layer in layers_as_given(old)
    }
    with _on(_where(old)):
        new = type(old)(
            [copies[id(layer)] for layer in layers_as_given(old)],
            name=old.name,
            trainable=old.trainable,
        )
    for layer in old.layers:
        if weights and not _has_graph(layer) and id(layer) not in changed:
            _carry_(layer, copies[id(layer)])
    if weights:
        track_variables_(new)
        track_variables_(functional(new))
    return new


def _has_graph(layer: Layer) -> bool:
    """Whether a layer is a model that is copied by walking its graph, not by its config."""
    made_from_its_graph = is_plain_functional(layer) or type(layer) is keras.Sequential
    return made_from_its_graph and functional(layer) is not None


def _where(layer: Any) -> str | None:
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


def _on(device: torch.device | str | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if device is None else keras.device(str(device))


def _check_state(old: Layer, new: Layer, node: Node, args: Any, kwargs: Any) -> None:
    """Raise unless `new`, just built, has the variables that `old` has."""
    before = [tuple(v.shape) for v in old.variables]
    now = [tuple(v.shape) for v in new.variables]
    if len(before) != len(now) or len(all_layers(old)) != len(all_layers(new)):
        raise ValueError(
            f"The layer {old.name!r} ({type(old).__name__}) has {len(before)} variables, but made "
            f"again from its config it has {len(now)}: its get_config() doesn't say all."
        )
    if before != now:
        raise _misfit(node, args, kwargs, f"its weights have shapes {before}, now {now}")


def _carry_(old: Layer, new: Layer, values: Sequence[torch.Tensor] | None = None) -> None:
    """Give `new` the values, trainable flags and other tensors of `old`, each copied once.

    With `values`, its variables get these instead.
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
    buffers = dict(new.named_buffers())
    for name, buffer in old.named_buffers():
        buffers[name].data = buffer.detach().clone()
    if values is None:  # clone() keeps the memory format
        values = [raw_value(variable).detach().clone() for variable in old.variables]
    for source, target, value in zip(old.variables, new.variables, values, strict=True):
        target.trainable = source.trainable
        old_value, new_value = raw_value(source), raw_value(target)
        if new_value.is_meta and not value.is_meta:
            set_value_(target, value, old_value.requires_grad)
        else:  # keep the Parameter itself, which a torch module may hold too
            new_value.data = value
            new_value.requires_grad = old_value.requires_grad
    for _, target in layers:
        track_variables_(target)
