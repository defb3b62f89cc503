"""A model's variables by name, the tensors that belong to them, and how they get them.

Both `vgg`, which builds models around a checkpoint, and `loading`, which loads into models that
exist, go this way: `path_of` a weight set or a file, what of it belongs to the model (`matching`),
then values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path

import keras
import torch

from vggtorch import paths, weights
from vggtorch.architectures import ARCHITECTURES, LAYERS, Architecture
from vggtorch.keras_graph import (
    all_layers,
    check_model,
    device,
    own_variables,
    raw_value,
    reset_seed_,
    seed_generators,
    set_value_,
    torch_dtype,
    track_variables_,
)
from vggtorch.weight_sets import WEIGHT_SETS


def named_variables(model: keras.Model) -> dict[str, keras.Variable]:
    """A model's weights by name: `layer/variable`, with the nested model's name before it.

    Trainable weights and state such as moving means; random seeds are not weights. What a
    subclassed model holds itself stands behind the model's name, and what a torch module holds, its
    buffers too, behind the names that it has there. Of several weights with one name, all but the
    first get a number.

    Example:
        >>> import vggtorch as vt
        >>> variables = vt.named_variables(vt.VGG11(weights=None, include_top=False))
        >>> list(variables)[:2], variables["block1_conv1/kernel"].shape
        (['block1_conv1/kernel', 'block1_conv1/bias'], (3, 3, 3, 64))

    Raises:
        ValueError: what is given is no Keras model.
    """
    check_model(model, "named_variables")
    named: dict[str, keras.Variable] = {}
    for key, variable in _named(model, ""):
        numbered = (f"{key}_{n}" for n in range(1, len(named) + 1))
        name = key if key not in named else next(n for n in numbered if n not in named)
        named[name] = variable
    return named


def _named(model: keras.Model, path: str) -> Iterator[tuple[str, keras.Variable]]:
    """The weights of a model by the names that they ask for; `path` leads to a nested one."""
    for layer in model.layers:
        place = f"{path}{layer.name}/"
        if isinstance(layer, keras.Model):
            yield from _named(layer, place)
        else:
            wrapped = dict(_of_torch(layer, place))
            known = {id(variable) for variable in wrapped.values()}
            for variable in layer.weights:
                if id(variable) not in known:
                    yield place + _path_inside(layer, variable), variable
            yield from wrapped.items()
    for variable in own_variables(model):
        yield (path or f"{model.name}/") + variable.path.rpartition("/")[2], variable


def held_tensors(model: keras.Model) -> list[torch.Tensor]:
    """All that a model holds: the values of its variables, then the buffers of torch modules."""
    wrapped = [
        x.module for x in all_layers(model) if isinstance(x, keras.layers.TorchModuleWrapper)
    ]
    return [
        *(raw_value(variable) for variable in model.variables),
        *(buffer for module in wrapped for buffer in module.buffers()),
    ]


def settle_(model: keras.Model) -> None:
    """Let layers compute with the values that their weights have got."""
    for layer in all_layers(model):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # it makes tensors of its weights, and computes with those


def _of_torch(layer: keras.Layer, place: str) -> Iterator[tuple[str, keras.Variable]]:
    """The parameters and buffers of torch modules in a layer: Keras knows of the parameters alone.

    A buffer gets a variable on its own memory here. What a batch norm only counts is left out.
    """
    variables = {id(raw_value(variable)): variable for variable in layer.weights}
    for wrapper in all_layers(layer):
        if not isinstance(wrapper, keras.layers.TorchModuleWrapper):
            continue
        inside = place if wrapper is layer else f"{place}{wrapper.name}/"
        for name, tensor in wrapper.module.state_dict(keep_vars=True).items():
            if name.endswith("num_batches_tracked") or not isinstance(tensor, torch.Tensor):
                continue
            variable = variables.get(id(tensor))
            if variable is None:
                dtype = keras.backend.standardize_dtype(tensor.dtype)
                variable = keras.Variable(tensor, trainable=False, dtype=dtype, name="buffer")
            yield inside + name, variable


def _path_inside(layer: keras.Layer, variable: keras.Variable) -> str:
    """A variable's path from its layer on, which may have got its name after it was built.

    The number is left out that Keras counts through a process for a variable without a name.
    """
    _, found, path = f"/{variable.path}".partition(f"/{layer.name}/")
    if not found:
        own, (first, _, rest) = own_variables(layer), variable.path.partition("/")
        if own:
            path = variable.path.removeprefix(own[0].path.rpartition("/")[0] + "/")
        else:  # in a clone of a wrapper the names of the layers inside may come first
            path = variable.path if first in {part.name for part in all_layers(layer)} else rest
    return re.sub(r"(^|/)variable_\d+$", r"\1variable", path)


def fill_(model: keras.Model, tensors: Mapping[str, torch.Tensor]) -> keras.Model:
    """Give a model that was built on the meta device its values, in place, without copying them.

    Layers that have values, such as those before the user's `input_tensor`, keep them. The others
    share the memory of the tensors that are already on Keras's device and of the variable's dtype.
    """
    for key, variable in named_variables(model).items():
        if raw_value(variable).is_meta:
            value = tensors[key].to(device=device(), dtype=torch_dtype(variable.dtype))
            set_value_(variable, value, requires_grad=variable.trainable)
    layers = all_layers(model)
    for generator in (g for layer in layers for g in seed_generators(layer)):
        if raw_value(generator.state).is_meta:
            reset_seed_(generator)
    for layer in layers:
        track_variables_(layer)
    return model


def best_weight_set(architecture: str) -> tuple[str, str]:
    """The best published weight set of a network that can be had, and why no better one.

    Raises:
        OSError: none can be had; says what each place answered.
    """
    missing = []
    for name in ("imagenet", "oxford"):
        if not weights.publications(name, architecture):
            continue
        try:
            weights.find(name, architecture, include_top=False)
        except OSError as error:
            missing.append(str(error))
        else:
            return name, "\n".join(missing)
    raise OSError("No pretrained weights can be had.\n" + "\n".join(missing))


def checkpoint_of(
    source: str | PathLike, variables: Mapping[str, keras.Variable], name: str = ""
) -> weights.Checkpoint:
    """A file's checkpoint, or what a weight set has for the network with these variables.

    Of several networks that have them, the one of the `name` is meant.
    """
    named = {key: v for key, v in variables.items() if key.partition("/")[0] in LAYERS}
    shapes = {key: tuple(variable.shape) for key, variable in named.items()}
    candidates = weights.identify(shapes) or list(ARCHITECTURES.values())
    candidates = [a for a in candidates if a.name == name] or candidates
    include_top = any(key.startswith(("fc1/", "fc2/", "predictions/")) for key in shapes)
    return weights.converted(path_of(source, candidates, include_top=include_top))


def path_of(
    source: str | PathLike, candidates: list[Architecture], *, include_top: bool = False
) -> Path:
    """The file of a weight set, of a path that exists, or of an address on the hub."""
    if isinstance(source, str) and source in WEIGHT_SETS:
        published = [a for a in candidates if weights.publications(source, a.name)] or candidates
        if len(published) > 1:
            names = ", ".join(a.name for a in published)
            raise ValueError(
                f"This model may be a part of any of {names}, so weights={source!r} could mean "
                f"several files. Give the model the name of its network, or pass a path."
            )
        return weights.find(source, published[0].name, include_top=include_top)
    if isinstance(source, torch.nn.Module):
        raise ValueError(
            f"Received a network, {type(source).__name__}, as weights; expected its state_dict: "
            f"vt.load_weights(model, network.state_dict())."
        )
    if not isinstance(source, str | PathLike):
        raise ValueError(
            f"Received weights of type {type(source).__name__}; expected the name of a weight set, "
            f"a path, or None. A dict of tensors goes into a model that is there "
            f"(vt.load_weights(model, tensors))."
        )
    if paths.is_on_hub(source):
        return weights.file_from_hub(str(source))
    if (Path(source) / "model.keras").is_file():  # the folder of a run that has ended
        return Path(source) / "model.keras"
    paths.check_weights(source)
    return Path(source)
