"""Checkpoints from any form into any other."""

from __future__ import annotations

from pathlib import Path

import by_torchvision
import pytest
import torch

from vggtorch import models
from vggtorch.architectures import ARCHITECTURES
from vggtorch.weights import rules


@pytest.fixture(scope="module")
def vgg11(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG11 without its top, an eighth of its channels, with random values, in torchvision's form.

    Nothing here depends on how many channels there are.
    """
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg11") / "vgg11.pth"
    state = by_torchvision.features("vgg11", narrow=True).state_dict(prefix="features.")
    torch.save(state, path)
    return path


@pytest.mark.slow
def test_any_form_to_any(tmp_path: Path, vgg11: Path, narrow: None) -> None:
    expected = torch.load(vgg11, weights_only=True)
    source = vgg11
    # Names and shapes in network order.
    table = rules(ARCHITECTURES["vgg11"], include_top=False)
    of_torch = before = [(rule.torch_key, rule.torch_shape) for rule in table]
    of_keras = [(rule.keras_key, rule.keras_shape) for rule in table]
    for ending in ("safetensors", "weights.h5", "bin", "keras", "h5", "pth"):
        target = tmp_path / f"a.{ending}"
        after = of_torch if ending in ("bin", "pth") else of_keras
        mapped = [(*old, *new) for old, new in zip(before, after, strict=True)]
        assert models.convert(source, target) == mapped
        source, before = target, after
    back = torch.load(source, weights_only=True)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in expected.items())
