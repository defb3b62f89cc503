"""What a network without some channels must compute, found by running the network itself.

The channels are set to NaN where their layer puts them out. NaN goes wherever they go, through
batch norms, pools, sums and nested models, until a layer with a kernel reads it as zero. So the
reference knows nothing of what `delete_channels` believes about the graph.
"""

from __future__ import annotations

import keras
import torch
from keras import layers as kl

from vggtorch.keras_graph import calls, filled, functional, graph_of, reads_training

READERS = (
    *(kl.Conv1D, kl.Conv2D, kl.Conv3D, kl.Conv1DTranspose, kl.Conv2DTranspose, kl.Conv3DTranspose),
    *(kl.SeparableConv1D, kl.SeparableConv2D, kl.Dense),
)


def poisoned(model, inputs, gone, prefix=""):
    """The outputs of a model of which the channels `gone`, by the names of layers, are zero."""
    graph = graph_of(model, "a test")
    values = {id(t): x for t, x in zip(graph.inputs, inputs, strict=True)}
    for node in calls(graph):
        if node.is_input:
            continue
        layer = node.operation
        args, kwargs = filled(node, values)
        if isinstance(layer, READERS):
            args = keras.tree.map_structure(torch.nan_to_num, args)
        if functional(layer) is not None:
            results = poisoned(layer, keras.tree.flatten(args), gone, f"{prefix}{layer.name}/")
        else:
            kwargs |= {"training": False} if reads_training(layer) else {}
            with torch.no_grad():
                results = keras.tree.flatten(_call(layer, args, kwargs))
        if prefix + layer.name in gone:
            first = getattr(layer, "data_format", None) == "channels_first" and results[0].ndim > 2
            results = [x.clone() for x in results]
            for x in results:
                x.movedim(1 if first else -1, 0)[gone[prefix + layer.name]] = torch.nan
        values.update({id(t): x for t, x in zip(node.outputs, results, strict=True)})
    return [values[id(t)] for t in graph.outputs]


def _call(layer, args, kwargs):
    if isinstance(layer, kl.Dense) and args[0].dtype == torch.float64:
        # Keras multiplies matrices in float32, whatever their dtype.
        return layer.activation(args[0] @ layer.kernel.value + layer.bias.value)
    return layer(*args, **kwargs)


def check_deletion(model, result, gone, *inputs):
    """`result` computes what `model` computes without the channels `gone`."""
    expected = poisoned(model, inputs, gone)
    found = keras.tree.flatten(
        result(list(inputs) if len(inputs) > 1 else inputs[0], training=False)
    )
    compare(found, expected, 2e-5)
    if inputs[0].dtype == torch.float64:
        compare(poisoned(result, inputs, {}), expected, 1e-11)


def compare(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        left = other[~other.isnan()].reshape(one.shape)
        torch.testing.assert_close(one, left, rtol=tolerance, atol=tolerance * left.abs().max())
