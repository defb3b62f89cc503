"""New layers anywhere in random networks are distilled, and they alone change.

`RANDOM_NETWORKS=1000 pytest tests/surgery/test_random_distillations.py` tries more of them.
"""

from __future__ import annotations

import os

import keras
import pytest
import torch
from contract import run
from drawn import Drawn
from keras import layers as kl

import vggtorch as vt
from vggtorch.keras_graph import raw_value
from vggtorch.surgery import examples
from vggtorch.surgery.wiring import Wiring

NETWORKS = int(os.environ.get("RANDOM_NETWORKS", "14"))
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def new_layers(drawn, old):
    """Layers that put out maps of the shape that a convolution does, mostly."""
    base, width = {"dtype": drawn.policy}, old.filters
    same = {"strides": old.strides, "padding": old.padding, **drawn.layout, **base}
    kinds = [
        lambda: [kl.Conv2D(width, 5, activation="relu", name="new", **same)],
        lambda: [kl.SeparableConv2D(width, 3, name="new", **(same | {"strides": 1}))],
        lambda: [
            kl.Conv2D(width, 3, use_bias=False, name="new", **same),
            kl.BatchNormalization(axis=drawn.axis, name="new_norm", **base),
            kl.ReLU(name="new_relu", **base),
        ],
        lambda: [keras.Sequential([kl.Conv2D(width, 3, name="a", **same)], name="new")],
    ]
    return drawn.choose.choice(kinds)()


def replaced(drawn):
    """The model with new layers in place of some, these, and their names."""
    wiring = Wiring(drawn.model, "a test")
    paths = [p for p, x in wiring.layers_by_path().items() if isinstance(x, kl.Conv2D)]
    for path in drawn.choose.sample(paths, len(paths)):
        place, name = wiring.find(path)
        new = new_layers(drawn, place.operations[name])
        try:
            return vt.replace(drawn.model, path, new), new, [place.prefix + x.name for x in new]
        except ValueError:
            continue  # such as a stride that the new layers don't have
    pytest.skip("no layer that could be replaced")


@pytest.mark.parametrize("seed", range(NETWORKS))
def test_random_layers_are_distilled(seed, monkeypatch):
    drawn = Drawn(seed)
    monkeypatch.setattr(examples, "CROP", drawn.choose.choice([7, 96]))
    result, new, names = replaced(drawn)
    variables = [v for m in (drawn.model, result) for v in m.variables]
    before = [raw_value(v).detach().clone() for v in variables]
    flags = [raw_value(v).requires_grad for v in variables]
    steps = drawn.choose.choice([0, 2])
    try:
        found = vt.distill_(drawn.model, result, names, drawn.images, steps=steps)
    except ValueError as error:
        assert "called 2 times; expected the new layers" in str(error), error
        return
    assert found.steps == steps
    assert flags == [raw_value(v).requires_grad for v in variables]
    trained = {id(v) for layer in new for v in layer.trainable_variables}
    for variable, value in zip(variables, before, strict=True):
        assert raw_value(variable).isfinite().all()
        assert id(variable) in trained or torch.equal(raw_value(variable), value)
    check_cosine(drawn, result, found)


def check_cosine(drawn, result, found):
    """What is said of the last map holds of the images that were held out."""
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    held_out, name = drawn.images[order[:2].numpy()], list(found.after)[-1]
    try:
        ends = [vt.truncate(m, name) for m in (drawn.model, result)]
    except ValueError:
        return  # a new layer that is the last
    a, b = (run(m, held_out).double().flatten(1) for m in ends)
    expected = torch.nn.functional.cosine_similarity(a, b, eps=1e-30).mean()
    assert found.after[name] == pytest.approx(float(expected), abs=2e-2)
