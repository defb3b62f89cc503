"""Figures are those of scikit-learn, and maps those of Grad-CAM's definition."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tiny
import torch
from accelerate import Accelerator
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch.utils.data import TensorDataset

from vggtorch.training.evaluation import Evaluation, activation_maps, evaluate
from vggtorch.training.heads import logits_network
from vggtorch.training.loaders import as_source


def test_figures_are_those_of_scikit_learn(history):
    found = history.evaluation
    images, labels = history.validation[[(i, 0) for i in range(len(history.validation))]]
    inputs = keras.applications.vgg16.preprocess_input(images.numpy().astype(np.float32))
    expected = history.model.predict(inputs, verbose=0)
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-5)
    predicted = expected.argmax(1)
    np.testing.assert_array_equal(
        found.confusion, confusion_matrix(labels, predicted, labels=range(3))
    )
    reference = precision_recall_fscore_support(labels, predicted, labels=range(3), zero_division=0)
    for i, figures in enumerate(found.per_class(history.classes)):
        assert figures.name == history.classes[i]
        ours = (figures.precision, figures.recall, figures.f1, figures.images)
        np.testing.assert_allclose(ours, [values[i] for values in reference])
    assert found.accuracy == pytest.approx((predicted == labels.numpy()).mean())


@pytest.mark.parametrize("activation", ["softmax", "linear"])
def test_what_ends_in_softmax_and_what_ends_in_logits_say_the_same(activation):
    model = tiny.network(dropout=0.0)
    x = torch.randn(5, 16, 16, 3) * 100
    expected = model(x, training=False).detach()
    model.get_layer("predictions").activation = getattr(keras.activations, activation)
    source, _ = as_source(TensorDataset(x, torch.tensor([0, 1, 2, 0, 1])), 0, 2)
    network = logits_network(model, model.inputs[0])
    options = {"batch_size": 2, "num_workers": 0, "accelerator": Accelerator()}
    found = evaluate(network, model, source, **options).probabilities
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_worst_mistakes_come_first():
    probabilities = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.7, 0.3]])
    found = Evaluation(probabilities.log(), torch.tensor([0, 0, 0, 1]))
    np.testing.assert_allclose(found.probabilities, probabilities, rtol=1e-6)
    assert found.worst_mistakes(5) == [1, 3, 2]
    assert found.worst_mistakes(2) == [1, 3]


def test_the_map_is_grad_cam_by_its_definition():
    model = tiny.network(dropout=0.0)
    image = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0)) * 255
    model.get_layer("predictions").activation = keras.activations.linear
    maps = keras.Model(model.inputs, [model.get_layer("block2_pool").output, model.outputs[0]])
    features, scores = maps(image[None], training=False)
    largest = []
    for index in range(3):
        (gradient,) = torch.autograd.grad(scores[0, index], features, retain_graph=True)
        expected = np.zeros((4, 4))
        for channel in range(features.shape[-1]):
            weight = float(gradient[0, :, :, channel].mean())
            expected += weight * features[0, :, :, channel].detach().numpy()
        expected = np.maximum(expected, 0)
        largest.append(expected.max())
        (found,) = activation_maps(model, image[None], [index])
        np.testing.assert_allclose(found, expected / max(expected.max(), 1e-12), atol=1e-4)
    assert max(largest) > 0
    model.get_layer("predictions").activation = keras.activations.softmax
    np.testing.assert_array_equal(activation_maps(model, image[None], [2])[0], found)


def test_maps_of_several_images_are_those_of_each():
    model = tiny.network(dropout=0.0)
    images = torch.rand(3, 16, 16, 3, generator=torch.Generator().manual_seed(1)) * 255
    together = activation_maps(model, images, [2, 0, 1])
    for image, index, found in zip(images, (2, 0, 1), together, strict=True):
        (alone,) = activation_maps(model, image[None], [index])
        np.testing.assert_allclose(found, alone, atol=1e-5)


def test_maps_of_a_network_in_half_the_bits(monkeypatch):
    images = torch.rand(2, 16, 16, 3) * 255
    expected = activation_maps(tiny.network(), images, [2, 0])
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = tiny.network()
    finally:
        keras.config.set_dtype_policy(policy)
    found = activation_maps(model, images, [2, 0])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=0.05)


def test_a_network_without_maps():
    image = keras.Input((4, 4, 3))
    x = keras.layers.Dense(2, activation="softmax")(keras.layers.Flatten()(image))
    with pytest.raises(ValueError, match="no layer with a height and a width"):
        activation_maps(keras.Model(image, x, name="flat"), torch.rand(1, 4, 4, 3), [0])


@pytest.mark.filterwarnings("ignore:'k' .5. greater than or equal to 'n_classes'")
@pytest.mark.parametrize("classes", [3, 8])
def test_figures_are_those_of_scikit_learn_and_torchmetrics(classes):
    from sklearn import metrics
    from torchmetrics.functional import classification

    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(200, classes, generator=generator) * 2
    # Some are equal, but never all: a certainty of one in three ends a bin.
    logits[:40, :2] = logits[:40, :2].round()
    labels = torch.randint(0, classes - 1, (200,), generator=generator)  # the last has no images
    found = Evaluation(logits, labels)
    predicted, probabilities = logits.argmax(1), torch.from_numpy(found.probabilities)
    assert found.macro_f1 == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))
    areas = [metrics.roc_auc_score(labels == i, probabilities[:, i]) for i in range(classes - 1)]
    assert found.auroc == pytest.approx(np.mean(areas))
    calibration = classification.multiclass_calibration_error
    expected = calibration(probabilities, labels, classes, n_bins=15, norm="l1")
    assert found.calibration_error == pytest.approx(float(expected), abs=1e-6)
    logits = torch.randn(200, classes, generator=generator)  # none are equal
    for k in (1, 2, 5):
        top = metrics.top_k_accuracy_score(labels, logits, k=k, labels=range(classes))
        assert Evaluation(logits, labels).top_k_accuracy(k) == pytest.approx(
            top if k < classes else 1
        )
    assert ("top-5 accuracy" in found.figures()) == (classes > 5)


def test_one_class_alone_has_no_auroc_and_that_is_said():
    found = Evaluation(torch.eye(3)[:2] * 3, torch.tensor([1, 1]))
    with pytest.warns(UserWarning, match="of one class alone, for which there is no auroc"):
        assert np.isnan(found.figure("auroc"))
