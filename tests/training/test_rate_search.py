"""The search for a learning rate, and that it leaves no trace."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import tiny

import vggtorch as vt
from vggtorch.cli import main
from vggtorch.training.rate_search import find_learning_rate


@pytest.mark.slow
def test_the_search_finds_a_rate_and_leaves_no_trace(config, images):
    model = tiny.network()
    before = tiny.weights(model)
    config = dataclasses.replace(config, batch_size=18)
    search = find_learning_rate(model, images, config, lowest=1e-6, highest=1e4, steps=60)
    assert all(map(np.array_equal, tiny.weights(model), before))
    assert len(search.rates) == len(search.losses) <= 60
    assert search.rates[0] == pytest.approx(1e-6)
    assert search.rates[1] / search.rates[0] == pytest.approx(1e10 ** (1 / 59))
    first = len(search.losses) // 10
    assert 10 * search.suggestion == search.rates[int(np.argmin(search.losses[first:])) + first]
    assert 1e-6 < search.suggestion < 10
    assert 20 < len(search.rates) < 60  # it stopped where the loss rose
    assert not (Path(config.output_dir) / "last.pt").exists()


@pytest.mark.parametrize("freeze", ["block1_pool", "no such layer"])
def test_the_search_leaves_what_was_frozen_and_no_gradients(config, images, freeze):
    model = tiny.network(batch_norm=True)
    model.get_layer("block2_conv1").trainable = False
    model.get_layer("block1_conv1").bias.trainable = False
    before = tiny.weights(model)
    flags = [x.trainable for x in (*model.layers, *model.variables)]
    config = dataclasses.replace(config, freeze=freeze)
    with contextlib.nullcontext() if freeze == "block1_pool" else pytest.raises(ValueError):
        find_learning_rate(model, images, config, steps=3)
    assert [x.trainable for x in (*model.layers, *model.variables)] == flags
    assert all(v.value.requires_grad == v.trainable for v in model.variables)
    assert all(v.value.grad is None for v in model.variables)
    assert all(map(np.array_equal, tiny.weights(model), before))


def test_a_search_over_no_range_is_refused(config, images):
    with pytest.raises(ValueError, match="lowest=1.0, highest=0.1; expected rates"):
        find_learning_rate(tiny.network(), images, config, lowest=1.0, highest=0.1)
    with pytest.raises(ValueError, match="steps=1; expected a whole number from 2"):
        find_learning_rate(tiny.network(), images, config, steps=1)


def test_a_loss_that_is_never_finite_is_an_error(config):
    train = tiny.dataset()
    train.tensors[0][:] = math.nan
    with pytest.raises(ValueError, match="isn't finite at the lowest learning rate, 1e-06"):
        find_learning_rate(tiny.network(), train, config)


@pytest.mark.slow
@pytest.mark.usefixtures("narrow")
def test_the_command_draws_its_suggestion(tmp_path, capsys, images, monkeypatch):
    """It is that of the function, on the same network and plan."""
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "random.safetensors"
    vt.save_weights(vt.VGG11(weights=None, include_top=False, input_shape=(32, 32, 3)), weights)
    options = ["--architecture", "vgg11", "--weights", str(weights), "--image-size", "32"]
    few = ["--steps", "6", "--lowest", "1e-5", "-b", "8"]
    assert main(["lr_find", str(images), *options, *few]) == 0
    model = vt.VGG11(weights=weights, include_top=False, input_shape=(32, 32, 3))
    expected = find_learning_rate(model, images, batch_size=8, steps=6, lowest=1e-5)
    assert (
        f"Suggested: --lr {expected.suggestion:.2g}\nWrote lr_find.svg." in capsys.readouterr().out
    )
    drawing = xml.etree.ElementTree.parse(tmp_path / "lr_find.svg").getroot()
    assert f"suggested {expected.suggestion:.2g}" in "".join(drawing.itertext())
    unused = ["--lr", "0.1", "--restore-best-weights", "--epochs", "2"]
    assert main(["lr_find", str(images), *options, *few, *unused]) == 0
    said = "Without effect on the search: --epochs, --learning-rate, --restore-best-weights."
    assert said in capsys.readouterr().out
    assert main(["lr_find", str(images), *options, "--steps", "1"]) == 1
    assert "--steps 1; expected a whole number from 2" in capsys.readouterr().err
