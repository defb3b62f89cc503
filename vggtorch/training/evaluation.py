"""How well a network does on labelled images, and where in an image its answer comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import torch
from torch.nn import functional as F

from vggtorch import keras_graph
from vggtorch.lowering import between
from vggtorch.telling import tell
from vggtorch.training.data import Source, check_labels, in_order
from vggtorch.training.heads import logits_network
from vggtorch.training.reading import loaded
from vggtorch.training.step import network_input


@dataclass(frozen=True)
class ClassFigures:
    """How a class fared: `recall` of its images found, `precision` of what was called so."""

    name: str
    images: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Evaluation:
    """What a network says of labelled images.

    Attributes:
        logits: (N, classes).
        labels: (N,).
    """

    logits: torch.Tensor
    labels: torch.Tensor

    @property
    def probabilities(self) -> np.ndarray:
        """Of each image and class, (N, classes)."""
        return self.logits.softmax(1).numpy()

    @property
    def loss(self) -> float:
        """Mean cross-entropy."""
        return F.cross_entropy(self.logits, self.labels).item()

    @property
    def accuracy(self) -> float:
        """Share of the images that were right."""
        return (self.logits.argmax(1) == self.labels).double().mean().item()

    @property
    def confusion(self) -> np.ndarray:
        """Numbers of images, (classes, classes): rows true, columns predicted."""
        classes = self.logits.shape[1]
        pairs = torch.bincount(self.labels * classes + self.logits.argmax(1), minlength=classes**2)
        return pairs.reshape(classes, classes).numpy()

    def per_class(self, classes: Sequence[str]) -> list[ClassFigures]:
        """Figures for each class; 0 where a class was never predicted or has no images."""
        confusion = self.confusion
        right, true, called = np.diag(confusion), confusion.sum(1), confusion.sum(0)
        precision = right / np.maximum(called, 1)
        recall = right / np.maximum(true, 1)
        f1 = 2 * right / np.maximum(true + called, 1)
        return [
            ClassFigures(name, int(n), float(p), float(r), float(f))
            for name, n, p, r, f in zip(classes, true, precision, recall, f1, strict=True)
        ]

    def top_k_accuracy(self, k: int = 5) -> float:
        """Share of the images whose class is among the k most probable ones."""
        best = self.logits.topk(min(k, self.logits.shape[1]), 1).indices
        return (best == self.labels[:, None]).any(1).double().mean().item()

    @property
    def macro_f1(self) -> float:
        """Mean of the classes' F1, over those that have images or were predicted."""
        confusion = self.confusion
        right, both = np.diag(confusion), confusion.sum(0) + confusion.sum(1)
        return float(np.mean(2 * right[both > 0] / both[both > 0]))

    @property
    def auroc(self) -> float:
        """Mean area under the ROC curve of each class against all others; NaN for one class alone.

        It is the chance that an image of the class gets a higher probability of it than another.
        """
        areas = []
        for index, scores in enumerate(self.probabilities.T.astype(np.float64)):
            is_class = self.labels.numpy() == index
            positive, negative = int(is_class.sum()), int((~is_class).sum())
            if positive and negative:
                _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
                rank = (np.cumsum(count) - (count - 1) / 2)[place]  # equal scores share a rank
                above = rank[is_class].sum() - positive * (positive + 1) / 2
                areas.append(above / (positive * negative))
        return float(np.mean(areas)) if areas else float("nan")

    @property
    def calibration_error(self) -> float:
        """Mean distance between how sure and how right the network is, in 15 bins of certainty.

        Source: Guo et al., "On Calibration of Modern Neural Networks", 2017.
        """
        certainty, predicted = self.logits.double().softmax(1).max(1)
        right = (predicted == self.labels).double()
        bins = (certainty * 15).ceil().long().clamp(1, 15)
        gaps = torch.zeros(16, dtype=torch.float64).index_add(0, bins, certainty - right)
        return float(gaps.abs().sum() / len(right))

    def figure(self, name: str) -> float:
        """One of the figures by its name among `METRICS`, the settings'."""
        if name == "top5_accuracy":
            return self.top_k_accuracy(5)
        found = getattr(self, name)
        if name == "auroc" and np.isnan(found):
            tell(
                "The images to judge on are of one class alone, for which there is no auroc.",
            )
        return found

    def figures(self) -> dict[str, float]:
        """All figures by name; top-5 accuracy where there are more than five classes."""
        found = {"accuracy": self.accuracy}
        if self.logits.shape[1] > 5:
            found["top-5 accuracy"] = self.top_k_accuracy(5)
        return found | {
            "macro F1": self.macro_f1,
            "AUROC": self.auroc,
            "loss": self.loss,
            "calibration error": self.calibration_error,
        }

    def worst_mistakes(self, count: int) -> list[int]:
        """Indices of wrong images, those first that the model was surest of."""
        certainty, predicted = self.logits.softmax(1).max(1)
        wrong = (predicted != self.labels).nonzero()[:, 0]
        order = certainty[wrong].argsort(descending=True, stable=True)
        return wrong[order][:count].tolist()


def evaluate(
    module: torch.nn.Module,
    model: keras.Model,
    source: Source,
    *,
    batch_size: int,
    num_workers: int,
    accelerator: Any,
) -> Evaluation:
    """What a network says of every image of a source, in their order, by all processes together.

    `module` puts out logits: it is the model, whose preprocessing the images need, or its part that
    follows cached features. Labels that the model has no class for are refused.
    """
    from accelerate.utils import gather_object

    keys = in_order(len(source), batch_size)
    mine = keys[accelerator.process_index :: accelerator.num_processes]
    found = []
    module.eval()
    for some, (images, labels) in zip(mine, loaded(source, mine, num_workers), strict=True):
        check_labels(labels, model)
        with torch.no_grad():
            outputs = module(network_input(images, model, accelerator.device))
        found.append((some[0], outputs.float().cpu(), labels))
    found = sorted(gather_object(found), key=lambda part: part[0])
    return Evaluation(
        torch.cat([part[1] for part in found]), torch.cat([part[2] for part in found])
    )


def activation_maps(model: keras.Model, images: torch.Tensor, classes: Sequence[int]) -> np.ndarray:
    """Where in each image (N, H, W, 3) the score of a class comes from, as (N, h, w) of 0 to 1.

    The maps are of the last layer that has a height and a width. Source: Selvaraju et al.,
    "Grad-CAM: Visual Explanations from Deep Networks", 2017.

    Raises:
        ValueError: the model has no such layer that all of an image passes through.
    """
    maps = _last_maps(model)
    device = model.variables[0].value.device
    with torch.no_grad():
        features = between(model.inputs[0], maps).eval()(network_input(images, model, device))
    features.requires_grad_()
    scores = logits_network(model, maps).eval()(features)
    chosen = scores[torch.arange(len(images)), torch.as_tensor(classes)]
    (gradient,) = torch.autograd.grad(chosen.sum(), features)  # of each image its own
    weights = gradient.mean((1, 2), keepdim=True)
    heat = (weights * features.detach()).sum(-1).clamp_min(0).float()  # NumPy has no bfloat16
    return (heat / heat.amax((1, 2), keepdim=True).clamp_min(1e-12)).cpu().numpy()


def _last_maps(model: keras.Model) -> keras.KerasTensor:
    for call in reversed(keras_graph.calls(keras_graph.graph_of(model, "activation_maps"))):
        tensor = call.output_tensors[0]
        if not call.is_input and len(tensor.shape) == 4:
            try:
                keras.Function(tensor, model.outputs[0])
            except ValueError:  # another path goes around this layer
                continue
            return tensor
    raise ValueError(
        f"{model.name} has no layer with a height and a width that the whole image passes through."
    )
