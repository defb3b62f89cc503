"""The Keras model itself, run by its torch network."""

from __future__ import annotations

import inspect
import threading
from typing import Any

import keras
import torch

from vggtorch import keras_graph
from vggtorch.lowering.on_keras import OnKeras
from vggtorch.lowering.plan import has_global_hooks, has_hooks
from vggtorch.lowering.settings import Settings, graph_to_read, has_other_code


def accelerate_(
    model: keras.Model, compile: bool = False, enabled: bool = True, *, winograd: bool = False
) -> keras.Model:
    """Make a Keras model run its torch network in fit, evaluate, predict and calls, in place.

    The network is that of `to_torch`, with its fast plan. Results, callbacks, metrics, saving and
    surgery stay what they are; neither a saved model nor a clone of this one is accelerated. What
    is set on a layer afterwards (an activation, a rate, a dtype policy, LoRA, quantization) the
    next call has. Returns the model.

    Args:
        model: what `to_torch` takes.
        compile: run the network through torch.compile.
        enabled: False gives the model its own `call` back.
        winograd: 3x3 convolutions may be computed sooner and less exactly, as `to_torch` has it.

    Raises:
        ValueError: what `to_torch` raises; `compile` and `winograd` together.

    Example:
        >>> import keras, numpy as np, vggtorch as vt
        >>> image = keras.Input((8, 8, 3))
        >>> x = keras.layers.Conv2D(4, 3, activation="relu")(image)
        >>> model = vt.accelerate_(keras.Model(image, keras.layers.Flatten()(x)))
        >>> model.predict(np.zeros((2, 8, 8, 3)), verbose=0).shape
        (2, 144)
    """
    if not enabled:
        keras_graph.override_call_(model, None)
        return model
    graph_to_read(model, "accelerate_")
    if compile and winograd:
        raise ValueError(
            "Received compile=True and winograd=True. What torch compiles are torch's own "
            "convolutions, so leave one of them out: winograd=True is faster where many 3x3 "
            "convolutions run on a CPU."
        )
    laid_out: Any = None  # the optimizer whose slots have the layout of their kernels
    graph: keras.Function | None = None
    inside: list[keras.Layer] = []
    decides = False  # some layer, where nobody says whether the model trains
    module: Any = None
    run: Any = None
    settings = Settings()
    mode = _Mode()

    def renew() -> None:
        nonlocal graph, inside, decides, module, run, settings
        settings = Settings(keras_graph.all_layers(model))
        # A Sequential model makes another graph when layers are added, and has none without any.
        graph = None if has_other_code(model) else keras_graph.functional(model)
        if graph is None:
            return
        inside = keras_graph.all_layers(model, include_self=False)
        decides = any(map(_decides, inside)) or any(
            call.arguments.kwargs.get("training") for call in keras_graph.calls(graph)
        )
        module = OnKeras(graph, model.name, winograd=winograd)
        run = torch.compile(module) if compile else module

    def call(inputs: Any, training: bool | None = None, mask: Any = None, **others: Any) -> Any:
        # The model's own `call` runs where Keras only works out shapes, with tensors that have no
        # values, where masks or other arguments come in, where `training` is left to what the
        # layers inside were called with, where torch.jit traces the model, which must find the
        # parameters of the layers, and where torch's hooks wait for these, its modules too.
        set_apart = keras_graph.in_stateless_scope() or torch.jit.is_tracing()
        current = module is not None and (torch.compiler.is_compiling() or settings.are_same())
        if not (set_apart or current):
            renew()
        undecided = training is None and decides
        watched = has_global_hooks() or any(map(has_hooks, inside))
        if set_apart or graph is None or mask is not None or others or undecided or watched:
            return type(model).call(model, inputs, training=training, mask=mask, **others)
        values = keras_graph.standardize_inputs(graph, inputs)
        if any(x is None or x.is_meta or keras_graph.keras_mask(x) is not None for x in values):
            return type(model).call(model, inputs, training=training, mask=mask)
        if not mode.begin(module, bool(training)):  # a call in the other mode is under way
            return type(model).call(model, inputs, training=training, mask=mask)
        nonlocal laid_out
        try:
            optimizer = getattr(model, "optimizer", None)  # None before compile()
            if training and optimizer is not laid_out and optimizer and optimizer.built:
                _lay_out_slots_(optimizer, model)
                laid_out = optimizer
            return run(*values)
        finally:
            mode.end()

    if not keras_graph.in_stateless_scope():  # where weights may have no values yet
        renew()
    keras_graph.override_call_(model, call)
    return model


def _decides(layer: keras.Layer) -> bool:
    """Whether a layer may train where nobody says whether the model does.

    Keras's own don't, but for those that augment images; a `TorchModuleWrapper` does, and so may
    the user's layers.
    """
    if not keras_graph.reads_training(layer):
        return False
    argument = inspect.signature(layer.call).parameters.get("training")
    default = None if argument is None else argument.default
    wraps = isinstance(layer, keras.layers.TorchModuleWrapper)
    if type(layer).__module__.startswith("keras.") and not wraps:
        return default is True
    return default is not False


class _Mode:
    """Keeps a network in training or inference while calls of it run, in one thread or several."""

    def __init__(self) -> None:
        self.calls = 0
        self.lock = threading.Lock()

    def begin(self, network: torch.nn.Module, training: bool) -> bool:
        """Whether a call in this mode may run, which `end` ends; not while others run in the other.

        A layer may call the model that it is in, and another thread may ask it while it trains.
        """
        if torch.compiler.is_compiling():
            if network.training != training:
                network.train(training)
            return True
        with self.lock:
            if network.training != training:
                if self.calls:
                    return False
                network.train(training)
            self.calls += 1
        return True

    def end(self) -> None:
        """A call that began has ended."""
        if not torch.compiler.is_compiling():
            with self.lock:
                self.calls -= 1


def _lay_out_slots_(optimizer: keras.Optimizer, model: keras.Model) -> None:
    """Give momentum and the like the layout of their kernels; mixed layouts make updates slow."""
    values = (keras_graph.raw_value(v) for v in model.trainable_variables)
    kernels = {p.shape: p for p in values if not p.is_contiguous()}
    for variable in optimizer.variables:
        value = keras_graph.raw_value(variable)
        if value.shape in kernels:
            value.data = torch.empty_like(kernels[value.shape]).copy_(value)
