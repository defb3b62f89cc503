"""The whole networks at full size against their references, on real photographs."""

import keras
import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_sample_images

import vggtorch as vt
from vggtorch import conversion, models
from vggtorch.architectures import ARCHITECTURES

PHOTOS = np.stack([photo[:, 100:527] for photo in load_sample_images().images])  # 427x427
BLOCKS = [f"block{b}_pool" for b in range(1, 6)]


def build(name, **arguments):
    """One of our networks without values, on the meta device."""
    with keras.device("meta"):
        constructor = getattr(vt, name.removesuffix("_bn").upper())
        return constructor(weights=None, batch_norm=name.endswith("_bn"), **arguments)


def torchvision_network(name):
    """torchvision's network with random weights, and batch norm statistics that matter."""
    torch.manual_seed(0)
    reference = torchvision.models.get_model(name).eval()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return reference


def assert_close(received, expected, name, tolerance=1e-4):
    """Within `tolerance` of the reference's largest magnitude."""
    received, expected = np.asarray(received), np.asarray(expected)
    error = np.abs(received - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_every_blocks_output_equal_torchvisions(name):
    reference = torchvision_network(name)
    images = torch.from_numpy(vt.preprocess(PHOTOS, "imagenet", size=224))
    pools = [m for m in reference.features if isinstance(m, torch.nn.MaxPool2d)]
    outputs: list[torch.Tensor] = []
    for pool in pools:
        pool.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        logits = reference(images.movedim(-1, 1))

    state = reference.state_dict()
    model = build(name, classifier_activation=None)
    tensors = conversion.torchvision_to_keras(state)
    models.fill_(model, tensors)
    inside = keras.Model(model.input, [model.get_layer(b).output for b in BLOCKS] + model.outputs)
    with torch.no_grad():
        *blocks, received = inside(images)

    assert_close(received, logits, "logits")
    for block, ours, theirs in zip(BLOCKS, blocks, outputs, strict=True):
        assert_close(ours, theirs.movedim(1, -1), block)

    back = conversion.keras_to_torchvision(
        {key: variable.value.detach() for key, variable in vt.named_variables(model).items()}
    )
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)
