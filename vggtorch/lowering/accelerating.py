"""The Keras model itself, run by its lowered module."""

from __future__ import annotations

from typing import Any

import keras
import torch

from vggtorch import keras_graph
from vggtorch.lowering.conventions import lay_out_
from vggtorch.lowering.lowered import Lowered, lower


def accelerate_(model: keras.Model, compile: bool = False, enabled: bool = True) -> keras.Model:
    """Make a Keras model run its lowered module in fit, evaluate, predict and calls, in place.

    Results, callbacks, metrics, saving and surgery stay what they are; neither a saved model nor a
    clone of this one is accelerated. Call it again after layers were changed otherwise than by
    training or by their `trainable` flags. Returns the model.

    Args:
        model: what `lower` takes.
        compile: run the module through torch.compile.
        enabled: False gives the model its own `call` back.

    Raises:
        ValueError: what `lower` raises.

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
    graph = keras_graph.graph_of(model, "accelerate_")
    lowered = lower(model)
    run = torch.compile(lowered) if compile else lowered
    fixes_training = any(
        call.arguments.kwargs.get("training") is not None for call in keras_graph.calls(graph)
    )
    laid_out: Any = None  # the optimizer whose slots have the layout of their kernels

    def call(inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        # Keras's own way where it works out shapes, which it does on tensors that are not real,
        # where masks come in, and where only the calls inside say whether they train.
        undecided = training is None and fixes_training
        if mask is not None or undecided or keras_graph.in_stateless_scope():
            return type(model).call(model, inputs, training=training, mask=mask)
        values = keras_graph.standardize_inputs(graph, inputs)
        if any(x is None or x.is_meta or keras_graph.has_mask(x) for x in values):
            return type(model).call(model, inputs, training=training, mask=mask)
        if lowered.training != bool(training):
            lowered.train(bool(training))
        nonlocal laid_out
        optimizer = getattr(model, "optimizer", None)  # None before compile()
        if training and optimizer is not laid_out and optimizer and optimizer.built:
            _lay_out_slots_(optimizer, lowered)
            laid_out = optimizer
        return run(values)

    keras_graph.override_call_(model, call)
    return model


def _lay_out_slots_(optimizer: keras.Optimizer, lowered: Lowered) -> None:
    """Give momentum and the like the layout of their kernels; mixed layouts make updates slow."""
    shapes = {p.shape for p in lowered.parameters() if not p.is_contiguous()}
    for variable in optimizer.variables:
        if variable.value.shape in shapes:
            lay_out_(variable.value)
