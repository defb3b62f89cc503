"""Random networks are compressed to the budget and are of their kind afterwards, or it is refused.

`RANDOM_NETWORKS=1000 pytest tests/compression/test_random_compressions.py` tries more of them.
"""

from __future__ import annotations

import os
import re

import keras
import numpy as np
import pytest
import torch
from contract import run, same_snapshot, snapshot
from drawn import Drawn

import vggtorch as vt
from vggtorch.compression import photographs

NETWORKS = int(os.environ.get("RANDOM_NETWORKS", "14"))
REFUSALS = r"no layer that could be replaced|this network can cost \d+\.\d\d times less at most"
ALL = ("low rank", "separated", "bottleneck", "channels", "composition")
METHODS: list[tuple[str, ...]] = [ALL, ALL, ALL, ALL, *((one,) for one in ALL[1:])]
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def arrays(model, x):
    values = keras.tree.flatten(run(model, x))
    return [y.detach().to(torch.float64).numpy() for y in values]


@pytest.mark.filterwarnings("ignore:.* has regularizers:UserWarning")
@pytest.mark.parametrize("seed", range(NETWORKS))
def test_a_random_network_is_compressed_or_refused(seed, monkeypatch, tmp_path):
    drawn = Drawn(seed)
    model, x, choose = drawn.model, drawn.images, drawn.choose
    monkeypatch.setattr(photographs, "CROP", choose.choice([7, 112]))
    options = {"methods": choose.choice(METHODS), "steps": choose.choice([0, 2])}
    before, times = snapshot(model), choose.choice([1.1, 1.5, 3])
    try:
        result, found = vt.compress(model, times, x, **options)
    except ValueError as error:
        assert re.search(REFUSALS, str(error)), error
        same_snapshot(before, snapshot(model))
        most = re.search(r"can cost (\d+\.\d\d)", str(error))
        if most is None or (times := float(most[1]) - 0.01) < 1.01:
            return
        result, found = vt.compress(model, times, x, **options)
    same_snapshot(before, snapshot(model))
    assert found.times >= times
    counted = [vt.inspect(m, repeats=1).total.multiply_adds for m in (model, result)]
    assert counted == [found.before, found.after]
    check_layers(model, result, found)
    check_values(model, result, x, tmp_path / "small.keras")


def check_layers(model, result, found):
    """Each layer is there with all that was its own, and those before it have that from it."""
    old = {layer.name: layer for layer in vt.flatten(model).layers}
    rows = {row.name: row for row in found.layers}
    now = {layer.name: layer for layer in result.layers}
    assert {name for name in old if name not in now} <= {
        name for name, row in rows.items() if row.method == "composition" and not row.after
    }
    for name, layer in now.items():
        source = old[name if name in old else re.sub(r"_[a-z]+(_\d+)?$", "", name)]
        assert layer.trainable == source.trainable
        assert layer.dtype_policy.name == source.dtype_policy.name
        for own in ("kernel_regularizer", "kernel_constraint"):
            assert type(getattr(layer, own, None)) is type(getattr(source, own, None))
        if name in old:
            assert type(layer) is type(source)
            assert getattr(layer, "activation", None) == getattr(source, "activation", None)
        if name in rows and rows[name].method is None:
            for a, b in zip(source.get_weights(), layer.get_weights(), strict=True):
                np.testing.assert_array_equal(a, b)


def check_values(model, result, x, file):
    """It gives what it did in its form, finite, and so does what is saved, cut and lowered."""
    before, now = arrays(model, x), arrays(result, x)
    assert keras.tree.map_structure(lambda t: t.dtype, model.output) == keras.tree.map_structure(
        lambda t: t.dtype, result.output
    )
    for a, b in zip(before, now, strict=True):
        assert a.shape == b.shape
        assert np.isfinite(b).all()
    result.save(file)
    for a, b in zip(now, arrays(keras.saving.load_model(file), x), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-3 * np.abs(a).max())
    network, half = vt.to_torch(result).eval(), "bfloat16" in result.layers[1].dtype_policy.name
    dtype = getattr(torch, result.inputs[0].dtype)
    with torch.no_grad():
        found = keras.tree.flatten(network(torch.from_numpy(x).to(dtype)))
    for a, b in zip(now, found, strict=True):
        near = (0.1 if half else 1e-4) * np.abs(a).max()
        np.testing.assert_allclose(b.to(torch.float64), a, rtol=0, atol=near)
    vt.truncate(result, result.layers[-1].name)
