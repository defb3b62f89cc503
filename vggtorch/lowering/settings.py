"""What a network has of Keras layers beside their weights, and whether it still is so."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import keras
import torch

from vggtorch import keras_graph
from vggtorch.lowering.calls import WRITTEN
from vggtorch.telling import tell

# A layer, its attributes, how many these are, those that count as they were, what gets the values
# of these at once, and what it got.
_Taken = tuple[keras.Layer, dict[str, Any], int, dict[str, Any], Callable[[Any], Any], Any]


class Settings:
    """The strides, activations, rates, dtype policies and so on that some layers have now.

    Attributes whose names begin with an underscore are Keras's own; weights and `trainable`, which
    networks follow, are among them. Of models the graph counts, which a Sequential model makes
    anew; of classes, the code that a call runs; of layers that Keras itself runs, which variables
    they have; of torch's modules in a wrapper, also their children and tensors. A copy is empty:
    copies of a network stand alone.
    """

    def __init__(self, layers: Iterable[keras.Layer] = ()) -> None:
        self._layers = layers = list(layers)
        self._models = {
            layer: _of_model(layer) for layer in layers if isinstance(layer, keras.Model)
        }
        self._taken = [_taken(layer) for layer in layers if type(layer) in WRITTEN]
        self._variables = [
            (layer, _variables(layer))
            for layer in layers
            if type(layer) not in WRITTEN and layer not in self._models
        ]
        self._wrapped = [
            (f"{layer.name}.{path}".removesuffix("."), part, _of_module(part))
            for layer, *_ in self._taken
            if isinstance(layer, keras.layers.TorchModuleWrapper)
            for path, part in layer.module.named_modules()
        ]
        kinds = {type(layer) for layer, *_ in self._taken} | {type(model) for model in self._models}
        self._code = [(kind, *part) for kind in kinds for part in _code(kind).items()]

    def are_same(self) -> bool:
        """Whether the layers still have the same attributes, and no new ones."""
        try:
            same = all(
                len(own) == number and values_of(own) == values
                for _, own, number, _, values_of, values in self._taken
            )
        except Exception:  # one is gone, or is an array, which doesn't compare as a whole
            return False
        return (
            same
            and all(getattr(kind, name, None) is part for kind, name, part in self._code)
            and all(_variables(layer) == variables for layer, variables in self._variables)
            and all(_of_model(model) == of_model for model, of_model in self._models.items())
            and not any(_differing(was, _of_module(part)) for _, part, was in self._wrapped)
        )

    def warn_of_changes(self) -> None:
        """Say which of them are no longer what they were, once."""
        if self.are_same():
            return
        changed = [
            f"{layer.path or layer.name}.{name.removeprefix('_')}"
            for layer, own, _, was, *_ in self._taken
            for name, value in was.items()
            if not (_is_equal(own.get(name), value) or _is_of_variables(own.get(name), layer))
        ]
        changed += [
            f"{path}.{name}"
            for path, part, was in self._wrapped
            for name in _differing(was, _of_module(part))
        ]
        changed += [
            f"{kind.__name__}.{name}"
            for kind, name, part in self._code
            if getattr(kind, name, None) is not part
        ]
        for model, (graph, _) in self._models.items():
            if _of_model(model) != self._models[model]:
                same = keras_graph.functional(model) is graph
                changed.append(f"{model.name}.{'call' if same else 'layers'}")
        vars(self).update(vars(Settings(self._layers)))
        if changed:
            tell(
                f"{', '.join(changed)} changed in Keras after to_torch, and the torch network "
                f"keeps what it was written with: call to_torch again to have it, or train the "
                f"Keras model under accelerate_, which follows."
            )

    def __deepcopy__(self, memo: Any) -> Settings:
        return Settings()

    def __reduce__(self) -> tuple[Any, ...]:
        return Settings, ()


def has_other_code(layer: keras.Layer) -> bool:
    """Whether somebody has put something in the place of what Keras runs when it calls a layer.

    In its class or in itself; what `accelerate_` puts there computes the same.
    """
    parts = _code(type(layer))
    own = [vars(layer)[name] for name in parts if name in vars(layer)]
    return any(_package(part) not in ("keras", "torch") for part in parts.values()) or any(
        _package(part) != "vggtorch" for part in own
    )


def graph_to_read(model: Any, verb: str) -> keras.Function:
    """The graph that a model runs, for whoever runs it in another way than by the model's `call`.

    Raises:
        ValueError: what `keras_graph.graph_of` raises, or a model whose `call` was replaced.
    """
    graph = keras_graph.graph_of(model, verb)
    if has_other_code(model):
        raise ValueError(
            f"The `call` of {model.name!r}, or of its class, was replaced by code that isn't "
            f"Keras's, which {verb} would leave out. Take that back first, put it into a layer of "
            f"the model, or hand over the graph alone: keras.Model(model.inputs, model.outputs)."
        )
    return graph


def _code(kind: type) -> dict[str, Any]:
    """The functions of a class that a call of one of its layers runs first, by name."""
    call = kind.call  # type: ignore[attr-defined]
    names = getattr(getattr(call, "__code__", None), "co_names", ())
    parts = {name: getattr(kind, name, None) for name in ("__call__", "call", *names)}
    return {k: part for k, part in parts.items() if callable(part) and not isinstance(part, type)}


def _package(function: Any) -> str:
    """The package whose file has a function; of one that `functools.wraps` made, the wrapper's."""
    name: str = getattr(function, "__globals__", {}).get("__name__", "")
    return name.partition(".")[0]


def _of_model(model: keras.Model) -> tuple[Any, Any]:
    """The graph that a model runs, and what stands in the place of its `call`, unless we put it."""
    call = vars(model).get("call")
    return keras_graph.functional(model), None if _package(call) == "vggtorch" else call


def _variables(layer: keras.Layer) -> list[int]:
    """Which variables a layer has, which LoRA and quantization change."""
    return list(map(id, keras_graph.own_variables(layer)))


def _taken(layer: keras.Layer) -> _Taken:
    own = vars(layer)
    public = (name for name in own if name[0] != "_" and name not in ("call", "training"))
    names = [name for name in ("_dtype_policy", "call", *public) if name in own]
    values_of: Callable[[Any], Any] = operator.itemgetter(*names)
    was = {"call": None} | {name: own[name] for name in names}
    return layer, own, len(own), was, values_of, values_of(own)


def _of_module(module: torch.nn.Module) -> dict[str, Any]:
    """A torch module's settings, children, parameters and buffers."""
    public = {k: v for k, v in vars(module).items() if k[0] != "_" and k != "training"}
    # Tensors among them are made anew in each call, as those of pruning are.
    settings = {k: v for k, v in public.items() if not isinstance(v, torch.Tensor)}
    return {**settings, **module._modules, **module._parameters, **module._buffers}


def _differing(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The names of what isn't the same object in both."""
    return [name for name in {**old, **new} if old.get(name) is not new.get(name)]


def _is_equal(new: Any, old: Any) -> bool:
    """Whether a setting is what it was; of weights and layers only the same object is."""
    plain = (bool, int, float, str, tuple, list, dict, keras.DTypePolicy)
    return new is old or (isinstance(old, plain) and type(new) is type(old) and bool(new == old))


def _is_of_variables(new: Any, layer: keras.Layer) -> bool:
    """Whether a tensor stands on a variable of the layer, as what a Normalization adapts does."""
    values = map(keras_graph.raw_value, layer.variables)
    return isinstance(new, torch.Tensor) and new.data_ptr() in {v.data_ptr() for v in values}
