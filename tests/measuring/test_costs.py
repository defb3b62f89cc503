"""Costs are those that one counts by hand, and the model is afterwards as it was."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vggtorch import measuring
from vggtorch.keras_graph import calls_of

L = keras.layers


def branched() -> keras.Model:
    x = inputs = keras.Input((16, 16, 3))
    x = L.Conv2D(8, 3, strides=2, padding="same", name="stem")(x)
    a = L.SeparableConv2D(8, 3, padding="same", name="separable")(x)
    b = L.Conv2D(8, 1, groups=2, name="grouped")(x)
    x = L.Add(name="add")([a, b, x])
    x = L.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, L.Dense(5, name="dense")(x))


def test_costs_are_those_counted_by_hand():
    report = measuring.inspect(branched(), repeats=1)
    positions = 8 * 8
    assert {row.name: row.multiply_adds for row in report.layers} == {
        "stem": positions * 3 * 3 * 3 * 8,
        "separable": positions * (3 * 3 * 8 + 8 * 8),
        "grouped": positions * 4 * 8,
        "add": 0,
        "pool": 0,
        "dense": 8 * 5,
    }
    rows = {row.name: row for row in report.layers}
    assert rows["stem"].shape == (8, 8, 8)
    assert rows["stem"].activation == 8 * 8 * 8 * 4
    assert rows["separable"].kind == "SeparableConv2D"
    assert rows["dense"].shape == (5,)


def test_the_products_of_attention_count_on_every_device():
    tokens = keras.Input((6, 8))
    model = keras.Model(tokens, L.MultiHeadAttention(num_heads=2, key_dim=4)(tokens, tokens))
    projections, products = 4 * 6 * 8 * 8, 2 * 2 * 6 * 6 * 4
    assert measuring.inspect(model, repeats=1).total.multiply_adds == projections + products


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        lambda: keras.applications.VGG16(weights=None, input_shape=(32, 32, 3), include_top=False),
        lambda: keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3)),
        branched,
    ],
)
def test_totals_are_torchs_and_kerass_own(build):
    model = build()
    report = measuring.inspect(model, repeats=1)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(np.zeros((1, *model.input_shape[1:]), "float32"))
    assert report.total.multiply_adds == counter.get_total_flops() // 2
    assert report.total.parameters == model.count_params()
    assert {r.name: r.parameters for r in report.layers} == {
        layer.name: layer.count_params()
        for layer in model.layers
        if not isinstance(layer, L.InputLayer)
    }
    assert all(row.seconds > 0 for row in (*report.layers, report.total))


def test_an_open_size_is_the_one_asked_for():
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, L.Conv2D(4, 3, name="conv")(inputs))
    report = measuring.inspect(model, size=10, repeats=1)
    assert report.layers[0].shape == (8, 8, 4)


def test_a_report_is_a_table_with_a_line_for_each_layer():
    lines = [line.split() for line in str(measuring.inspect(branched(), repeats=1)).splitlines()]
    assert [line[0] for line in lines] == [
        *("layer", "stem", "separable", "grouped", "add", "pool", "dense", "total")
    ]
    assert lines[1][:5] == ["stem", "Conv2D", "8x8x8", "224", "13,824"]
    assert lines[1][5:7] == ["0.00", "MiB"]


@pytest.mark.slow
def test_a_comparison_shows_what_a_replacement_gains(vgg, replaced):
    comparison = measuring.compare(vgg, replaced, repeats=1)
    before, after = (
        {row.name: row for row in report.blocks} for report in (comparison.before, comparison.after)
    )
    pixels = 32 * 32
    assert before["block1"].multiply_adds == pixels * 9 * (3 * 64 + 64 * 64)
    assert after["block1"].multiply_adds == pixels * 25 * 3 * 64
    assert before["block2"].multiply_adds == after["block2"].multiply_adds
    lines = str(comparison).splitlines()
    assert lines[0].split()[:3] == ["block", "parameters", "multiply-adds"]
    assert lines[1].split()[:4] == ["block1", "before", "38,720", "39,518,208"]
    assert lines[2].split()[:3] == ["after", "4,864", "4,915,200"]
    ratio = comparison.after.total.multiply_adds / comparison.before.total.multiply_adds
    assert lines[-1].split()[2] == f"{ratio:.3f}"


@pytest.mark.slow
def test_the_model_is_as_it_was(vgg):
    weights = [v.value.detach().clone() for v in vgg.variables]
    flags = [v.value.requires_grad for v in vgg.variables]
    measuring.inspect(vgg, repeats=1)
    assert all(torch.equal(a, b.value) for a, b in zip(weights, vgg.variables, strict=True))
    assert flags == [v.value.requires_grad for v in vgg.variables]
    assert len(calls_of(vgg.layers[1])) == 1


def sequential() -> keras.Sequential:
    return keras.Sequential(
        [keras.Input((8, 8, 3)), L.Conv2D(4, 3, name="conv"), L.Flatten(name="flat")], name="chain"
    )


def test_a_sequential_model_is_measured_as_any_other():
    report = measuring.inspect(sequential(), repeats=1)
    assert [row.name for row in report.layers] == ["conv", "flat"]
    comparison = measuring.compare(sequential(), branched(), repeats=1)
    assert comparison.before.total.multiply_adds == 6 * 6 * 3 * 3 * 3 * 4
    found = measuring.bench(sequential(), 2, repeats=1)
    assert found.inference[1].difference < 1e-5
    assert "conv" in measuring.draw(sequential())


class Subclassed(keras.Model):
    def call(self, x):
        return x


VERBS: dict[str, Callable[[keras.Model], object]] = {
    "inspect": measuring.inspect,
    "bench": measuring.bench,
    "compare": lambda model: measuring.compare(sequential(), model),
    "draw": measuring.draw,
}


@pytest.mark.parametrize("verb", VERBS)
def test_models_without_a_graph_get_one_answer(verb):
    with pytest.raises(
        ValueError,
        match=rf"'mine' is a subclassed model .*{verb} needs a Functional or Sequential model",
    ):
        VERBS[verb](Subclassed(name="mine"))
    with pytest.raises(
        ValueError, match=rf"'mine' has no graph yet, which {verb} needs: it doesn't know its input"
    ):
        VERBS[verb](keras.Sequential([L.Dense(2)], name="mine"))
