"""Temperature scaling: how sure a network may be, fitted on images that it didn't train on."""

from __future__ import annotations

import keras
import torch

from vggtorch.keras_graph import calls, graph_of
from vggtorch.telling import tell
from vggtorch.training.evaluation import Evaluation
from vggtorch.training.heads import last_layer

LIMITS = (1e-2, 1e2)  # of what logits are divided by


def fitted_temperature(evaluation: Evaluation) -> float:
    """What to divide logits by, so that the cross-entropy of these images is least.

    Warns, and says 1, where the images can't tell: where all of them are right, say, any network
    looks too unsure.

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017.
    """
    logits, labels = evaluation.logits.double(), evaluation.labels
    true = logits.gather(1, labels[:, None])[:, 0].mean()

    def slope(inverse: float) -> float:
        """Of the cross-entropy by the inverse of the temperature; it only rises."""
        expected = ((logits * inverse).softmax(1) * logits).sum(1).mean()
        return float(expected - true)

    low, high = 1 / LIMITS[1], 1 / LIMITS[0]
    if not slope(low) < 0 < slope(high):
        tell(
            f"No temperature could be fitted on {len(labels)} validation images, of which "
            f"{evaluation.accuracy:.0%} are right: it stays 1. More images would tell.",
        )
        return 1.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / (low * high) ** 0.5


def check_temperature(model: keras.Model) -> keras.layers.Dense:
    """The layer that a temperature goes into: the Dense that puts out the logits.

    Raises:
        ValueError: another kind of layer, or one that is used elsewhere in the model too.
    """
    layer = last_layer(model)
    used = [call for call in calls(graph_of(model, "finetune")) if call.operation is layer]
    if type(layer) is not keras.layers.Dense or len(used) > 1:
        raise ValueError(
            f"Received temperature_scaling=True; {model.name} ends in {layer.name} "
            f"({type(layer).__name__}{', which it uses twice' if len(used) > 1 else ''}), and a "
            f"temperature goes into the weights of a Dense at the end. Stack one, or leave it out."
        )
    return layer


def divide_logits_(model: keras.Model, temperature: float) -> None:
    """Put a temperature into the last layer's weights, in place.

    So `predict`, `evaluate`, exported files and every copy of the weights have it.
    """
    layer = check_temperature(model)
    with torch.no_grad():
        for variable in layer.weights:
            variable.value.div_(temperature)
