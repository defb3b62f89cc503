"""Checkpoints from any form into any other."""

from __future__ import annotations

from pathlib import Path

import by_torchvision
import pytest
import torch

import vggtorch as vt
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


@pytest.mark.slow
@pytest.mark.parametrize("form", ["keras", "h5", "weights.h5"])
def test_a_part_that_ends_within_the_classifier_is_converted_whole(
    tmp_path: Path, form: str
) -> None:
    part, other = (
        vt.truncate(vt.VGG11(weights=None, input_shape=(32, 32, 3)), "fc1") for _ in range(2)
    )
    vt.save_weights(part, tmp_path / "a.safetensors")
    target = tmp_path / f"b.{form}"
    rows = models.convert(tmp_path / "a.safetensors", target)
    assert [row[2] for row in rows] == list(vt.named_variables(part))
    again = vt.load_weights(other, target) if form == "weights.h5" else vt.load_model(target)
    assert again.layers[-1].name == "fc1"
    for ours, theirs in zip(again.get_weights(), part.get_weights(), strict=True):
        assert (ours == theirs).all()
