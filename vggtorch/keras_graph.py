"""Every use of Keras's private parts, each behind a function of its own.

Keras has no public way to walk the graph of a model, to give a variable another tensor as its
value, or to make a layer again from its config with functions of the user's. What vggtorch needs
of that stands here and nowhere else, so that a Keras release which changes one of these parts
fails in `tests/test_keras_graph.py`, which names them all, and is mended in this file. Every name
without an underscore is for other files, those that are imported here too. Two of Keras's rules
that several rooms compute by stand at the end: padding "same" and batch norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import torch
from keras import KerasTensor
from keras.src.applications.convnext import LayerScale as LayerScale
from keras.src.applications.imagenet_utils import obtain_input_shape as obtain_input_shape
from keras.src.backend.common import global_state
from keras.src.backend.common.masking import get_keras_mask
from keras.src.backend.common.stateless_scope import in_stateless_scope as in_stateless_scope
from keras.src.layers.layer import CallContext
from keras.src.models.functional import Functional, functional_like_constructor
from keras.src.ops.node import Node
from keras.src.saving.serialization_lib import SafeModeScope
from keras.src.utils.naming import to_snake_case as to_snake_case

from vggtorch.telling import tell
from vggtorch.weight_sets import WEIGHT_SETS, DataConfig

# Models that remember what they expect of an image
#
# They stand here, in the one file that knows Functional, because `vggtorch/__init__.py` imports
# this file as soon as Keras has been imported: then keras.saving.load_model knows them.


def mark_(layer: Any, config: DataConfig) -> None:
    """Write on a layer what the weights of its model expect of an image."""
    if config != marked(layer):
        layer.vggtorch_data_config = config


def marked(layer: Any) -> DataConfig:
    """What was written on a layer; the defaults where nothing was."""
    found = getattr(layer, "vggtorch_data_config", None)
    return found if isinstance(found, DataConfig) else DataConfig()


@keras.saving.register_keras_serializable("vggtorch", "PlainModel")  # of no weight set
class _ImageModel(Functional):
    """A Functional model whose class remembers what it expects of an image.

    A model's class is what Keras keeps when it clones a model, and what surgery keeps. In a file
    it has two names: Keras takes the registered one where vggtorch is imported, and else the one
    that it is called by, which is that of its own Functional. So plain Keras loads such files too.
    """

    data_config = DataConfig()

    def build(self, input_shape: Any) -> None:
        """Write it on the layers too, for models that a user makes of them."""
        super().build(input_shape)
        for layer in self.layers:
            mark_(layer, self.data_config)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "data_config": self.data_config.as_dict()}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Functional:
        stored = config.get("data_config")
        made = cls if stored is None else model_class(DataConfig.from_dict(stored))
        plain = {name: value for name, value in config.items() if name != "data_config"}
        return Functional.from_config.__func__(made, plain, custom_objects)  # type: ignore[attr-defined]

    def save(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """As Keras has it; its older form loses what this class remembers, unless we load it."""
        warn_of_older_form(filepath, self.data_config)
        return super().save(filepath, *args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Keras pickles a model as its file, by a method of its class, which has no place here."""
        method, content = super().__reduce__()
        return _unpickled, (method.__name__, content)


def warn_of_older_form(filepath: Any, config: DataConfig) -> None:
    """Say what Keras's own reader of a whole model in HDF5 leaves out, where it is written."""
    if str(filepath).endswith((".h5", ".hdf5")) and config != DataConfig():
        tell(
            f"keras.saving.load_model reads {filepath} without what the model remembers of its "
            f"images ({config.weight_set or 'their size and labels'}); vt.load_model keeps it, and "
            f"so does every reader of a .keras file."
        )


def _unpickled(method: str, content: tuple[Any, ...]) -> keras.Model:
    model: keras.Model = getattr(Functional, method)(*content)
    return model


_CLASSES: dict[DataConfig, type[Functional]] = {DataConfig(): Functional}


def model_class(config: DataConfig) -> type[Functional]:
    """The class of the models that remember `config`; the same class for the same configuration."""
    if config not in _CLASSES:
        name = f"{(config.weight_set or 'plain').capitalize()}Model"
        content = {
            "__module__": Functional.__module__,
            "__qualname__": name,
            "__doc__": _ImageModel.__doc__,
            "data_config": config,
        }
        made = type(Functional.__name__, (_ImageModel,), content)
        _CLASSES[config] = keras.saving.register_keras_serializable("vggtorch", name)(made)
    return _CLASSES[config]


for _weight_set in WEIGHT_SETS:  # Keras knows their names from now on
    model_class(DataConfig(_weight_set))


def remembers(model: Any) -> bool:
    """Whether a model's class is one of those that can be exchanged for another by `remember_`."""
    return type(model) is Functional or isinstance(model, _ImageModel)


# The graph of a model


def check_model(model: object, verb: str) -> None:
    """Raise ValueError unless `model` is a Keras model; `verb` is the function that was called."""
    if not isinstance(model, keras.Model):
        raise ValueError(f"{verb} needs a Keras model, received {type(model).__name__}.")


def functional(model: Any) -> Functional | None:
    """The Functional graph that a model runs; None if it runs code of its own, or isn't a model.

    A Sequential model has its graph inside, once it knows its input's shape.
    """
    if isinstance(model, keras.Sequential) and type(model).call is keras.Sequential.call:
        return model._functional
    if isinstance(model, Functional) and type(model).call is Functional.call:
        return model
    return None


def graph_of(model: Any, verb: str) -> Functional:
    """The Functional graph that a model runs; the one refusal of everything that has none.

    Args:
        model: what the user passed.
        verb: what was to be done, as the user called it: "truncate", "draw", "finetune".

    Raises:
        ValueError: a subclassed model, a Sequential model that isn't built, or no model at all.
    """
    graph = functional(model)
    if graph is not None:
        return graph
    check_model(model, verb)
    if isinstance(model, keras.Sequential) and type(model).call is keras.Sequential.call:
        raise ValueError(
            f"The Sequential model {model.name!r} has no graph yet, which {verb} needs: it doesn't "
            f"know its input shape. Begin it with keras.Input(...) or call "
            f"model.build(input_shape) first."
        )
    raise ValueError(
        f"{model.name!r} is a subclassed model ({type(model).__name__}): how its layers are "
        f"wired is known only to its call(). {verb} needs a Functional or Sequential model; "
        f"build one from keras.Input."
    )


def calls(graph: keras.Function) -> list[Node]:
    """Every call of a layer or operation in a graph, in the order of its layers, inputs first.

    Each call comes after those whose results it takes.
    """
    place = {operation: i for i, operation in enumerate(graph.operations)}
    by_depth = graph._nodes_by_depth
    return [
        node
        for depth in sorted(by_depth, reverse=True)
        for node in sorted(by_depth[depth], key=lambda node: place[node.operation])
    ]


def calls_of(operation: keras.Operation) -> list[Node]:
    """The calls of one layer or operation on symbolic tensors, in any model."""
    return operation._inbound_nodes


def producer(tensor: KerasTensor) -> Any:
    """The layer or operation that made a symbolic tensor."""
    return tensor._keras_history.operation


def producing_call(tensor: KerasTensor) -> Node:
    """The call that made a symbolic tensor."""
    operation, index, _ = tensor._keras_history
    return operation._inbound_nodes[index]


def operation_copy(operation: keras.Operation) -> keras.Operation:
    """A copy of an operation, such as keras.ops.add, that hasn't been called.

    The copy of a layer stands on the layer's own variables.
    """
    new: keras.Operation = object.__new__(type(operation))
    vars(new).update(vars(operation), _inbound_nodes=[], _outbound_nodes=[])
    return new


def without_activation(tensor: KerasTensor) -> KerasTensor:
    """What the layer that makes a symbolic tensor has computed before its activation.

    The new tensor stands in the same graph, made by a copy of that layer on the layer's variables,
    or of a nested model on its layers. The layer, its model and what they know of their calls stay
    as they are.
    """
    call = producing_call(tensor)
    inner = functional(call.operation)
    if inner is None:
        copied = operation_copy(call.operation)
        copied.activation = keras.activations.linear
        copied.name = copied.name.replace("/", "_")  # Keras calls no layer that is named by a path
    else:
        copied = keras.Model(inner._inputs_struct, without_activation(inner.outputs[0]))
    result = copied(*call.arguments.args, **call.arguments.kwargs)
    for parent in {id(t): producer(t) for t in call.input_tensors}.values():
        parent._outbound_nodes.remove(producing_call(result))
    return result


def filled(node: Node, values: dict[int, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with other values in the place of its tensors, by their id."""
    return node.arguments.fill_in(values)


def is_plain_functional(model: Any) -> bool:
    """Whether a model's class is made by Class(inputs, outputs), as keras.Model is."""
    return isinstance(model, Functional) and functional_like_constructor(type(model))


def input_structure(graph: keras.Function) -> Any:
    """A model's inputs in the structure that it is called with: a tensor, a list, a dict."""
    return graph._inputs_struct


def output_structure(graph: keras.Function) -> Any:
    """A model's outputs in the structure that it returns."""
    return graph._outputs_struct


def standardize_inputs(graph: Functional, inputs: Any) -> list[Any]:
    """What a model is called with as a flat list of tensors, of the ranks and dtypes it wants."""
    return graph._standardize_inputs(inputs)


def override_call_(model: keras.Model, call: Callable[..., Any] | None) -> None:
    """Let `model(...)`, fit, evaluate and predict run `call`; None gives the model its own back.

    It stands in the instance's `__dict__`, which neither saving nor cloning looks at.
    """
    model.__dict__.pop("call", None)
    if call is not None:
        model.__dict__["call"] = call


def data_format(graph: keras.Function, otherwise: str | None = None) -> str:
    """The layout of a graph's spatial layers, Flatten aside; without any `otherwise` or Keras's."""
    for operation in graph.operations:
        for layer in all_layers(operation) if isinstance(operation, keras.Layer) else ():
            if hasattr(layer, "data_format") and not isinstance(layer, keras.layers.Flatten):
                return str(layer.data_format)
    return otherwise or str(keras.config.image_data_format())


# Layers


def all_layers(layer: keras.Layer, *, include_self: bool = True) -> list[keras.Layer]:
    """A layer and those inside of it, at any depth, parents first."""
    return list(layer._flatten_layers(include_self=include_self))


def layers_as_given(model: keras.Sequential) -> list[keras.Layer]:
    """The layers of a Sequential model, its InputLayer among them."""
    return list(model._layers)


def reads_training(operation: Any) -> bool:
    """Whether a layer's `call` has an argument `training`."""
    return bool(getattr(operation, "_call_has_training_arg", False))


@contextlib.contextmanager
def training_context(operation: Any, training: bool) -> Iterator[None]:
    """Let layers in a call know whether it trains, as the call of a whole model would.

    A layer whose `call` has no argument `training` hands it on to the layers inside by this
    context alone. Inside of a call that Keras itself began, that call's context stays.
    """
    if global_state.get_global_attribute("current_call_ctx") is not None:
        yield
        return
    context = CallContext(entry_layer=None)
    context.set_value("training", training)
    global_state.set_global_attribute("current_call_ctx", context)
    if isinstance(operation, keras.Layer):
        operation._clear_losses()
    try:
        yield
    finally:
        global_state.set_global_attribute("current_call_ctx", None)


def keras_mask(tensor: KerasTensor) -> KerasTensor | None:
    """The mask that a tensor carries to the layers that read it, as an Embedding's may."""
    return get_keras_mask(tensor)


def state_of(operation: Any) -> list[keras.Variable]:
    """The variables that no optimizer ever changes: moving statistics, the state of seeds."""
    if not isinstance(operation, keras.Layer):
        return []
    own = [layer._trainable_variables for layer in all_layers(operation)]
    weights = {id(variable) for variables in own for variable in variables}
    return [variable for variable in operation.variables if id(variable) not in weights]


def operation_kind(operation: Any) -> str | None:
    """The name of an operation of keras.ops, such as "Add" or "Relu"; None for all else."""
    kind = type(operation)
    known = ("keras.src.ops.numpy", "keras.src.ops.nn")
    return kind.__name__ if kind.__module__ in known else None


def rematerializes(layer: keras.Layer) -> bool:
    """Whether a layer was made in a keras.RematScope: backward computes its values again."""
    return getattr(layer, "_remat_mode", None) is not None


def give_seed_generator_(
    layer: keras.Layer, attribute: str, generator: keras.random.SeedGenerator
) -> None:
    """Let a layer that is built have one more seed generator."""
    layer._tracker.unlock()
    setattr(layer, attribute, generator)
    layer._tracker.lock()


def seed_generators(layer: keras.Layer) -> Iterable[keras.random.SeedGenerator]:
    """The seed generators of one layer, without those of the layers inside."""
    return getattr(layer, "_seed_generators", ())


def own_variables(layer: keras.Layer) -> list[keras.Variable]:
    """The variables of one layer, without those of the layers inside."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def lambda_output_shape(layer: keras.layers.Lambda) -> Any:
    """The output shape that a Lambda layer was given."""
    return layer._output_shape


def safe_mode_off() -> contextlib.AbstractContextManager:
    """Let configs name objects that are the user's own; nothing is unpickled from a file."""
    return SafeModeScope(False)


# Variables


def device() -> str:
    """Where Keras puts new tensors: "cpu", or "cuda:0" where there is a GPU."""
    from keras.src.backend.torch.core import get_device

    return str(get_device())


def torch_dtype(name: str) -> torch.dtype:
    """Torch's dtype of a name such as "float32"."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def set_value_(variable: keras.Variable, value: torch.Tensor, requires_grad: bool) -> None:
    """Make `value` itself, not a copy, what a variable holds; `track_variables_` comes after."""
    variable._value = torch.nn.Parameter(value, requires_grad=requires_grad)


def raw_value(variable: keras.Variable) -> torch.Tensor:
    """The Parameter behind a variable; `.value` casts it inside of Keras's autocast."""
    return variable._value


def track_variables_(layer: keras.Layer) -> None:
    """Let a layer list its variables' values as torch Parameters anew, after one was replaced."""
    if hasattr(layer, "_torch_params"):
        layer._track_variables()


def reset_seed_(generator: keras.random.SeedGenerator) -> None:
    """Give a seed generator whose state was made on the meta device its state again."""
    fresh = keras.random.SeedGenerator(generator._initial_seed)
    generator.state._initialize(fresh.state.value)


# Keras's rules


def same_padding(size: int, window: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """The rows (or columns) that padding="same" adds before and after a map of some size."""
    total = (window - 1) * dilation
    if stride > 1:  # ONNX rounds the quotient of a negative number, as in -(-size // stride), up
        total += ((size + stride - 1) // stride - 1) * stride + 1 - size
    # In an export the size is a symbol, which a comparison would bind to one range of sizes.
    total = torch.sym_max(total, 0) if isinstance(total, torch.SymInt) else max(total, 0)
    return total // 2, total - total // 2


def scale_and_shift(
    mean: Any, variance: Any, epsilon: float, gamma: Any = None, beta: Any = None
) -> tuple[Any, Any]:
    """Batch norm at inference as a factor and a summand for each channel; of arrays or tensors."""
    scale = (variance + epsilon) ** -0.5
    scale = scale if gamma is None else scale * gamma
    shift = -mean * scale
    return scale, shift if beta is None else shift + beta
