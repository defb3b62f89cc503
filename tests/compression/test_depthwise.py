"""Networks of depthwise convolutions, batch norms and adds, such as MobileNetV2."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from small import L, images

import vggtorch as vt
from vggtorch.compression.deletion import pairs_of
from vggtorch.compression.networks import networks_of
from vggtorch.compression.photographs import split

pytestmark = pytest.mark.usefixtures("one_thread")


def normed(x, name, activation=True):
    x = L.BatchNormalization(name=f"{name}_bn")(x)
    return L.ReLU(6.0, name=f"{name}_relu")(x) if activation else x


def block(x, name, outputs, strides=1):
    """An inverted residual block of MobileNetV2."""
    before, inputs = x, x.shape[-1]
    conv = {"use_bias": False, "padding": "same"}
    x = normed(L.Conv2D(4 * inputs, 1, name=f"{name}_expand", **conv)(x), f"{name}_expand")
    if strides == 2:
        x, conv["padding"] = L.ZeroPadding2D(((0, 1), (0, 1)), name=f"{name}_pad")(x), "valid"
    x = L.DepthwiseConv2D(3, strides=strides, name=f"{name}_depthwise", **conv)(x)
    x = normed(x, f"{name}_depthwise")
    x = L.Conv2D(outputs, 1, use_bias=False, name=f"{name}_project")(x)
    x = normed(x, f"{name}_project", activation=False)
    return L.Add(name=f"{name}_add")([before, x]) if strides == 1 and inputs == outputs else x


def mobile(size: int | None = 32) -> keras.Model:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((size, size, 3))
    x = L.Conv2D(16, 3, strides=2, padding="same", use_bias=False, name="stem")(inputs)
    x = normed(x, "stem")
    for n, (outputs, strides) in enumerate(((24, 1), (24, 1), (32, 2), (32, 1))):
        x = block(x, f"b{n}", outputs, strides)
    model = keras.Model(inputs, L.GlobalAveragePooling2D(name="pool")(x), name="mobile")
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, L.BatchNormalization):
            scale, _, mean, variance = layer.get_weights()
            some = [rng.normal(size=scale.shape).astype("float32") for _ in range(2)]
            layer.set_weights([scale + 0.1 * some[0], 0.1 * some[1] + 0.3, mean, 2 + variance])
    return model


@pytest.mark.slow
def test_channels_are_deleted_through_depthwise_layers_but_not_through_what_is_kept():
    model = mobile()
    shown = split(model, images(20, 32), 0)
    networks = networks_of(model, shown, ())
    assert networks.taps == ("b1_add", "pool")
    arguments = model, networks.sites, networks.depthwise, networks.taps
    pairs = {pair.name: [site.name for site in pair.between] for pair in pairs_of(*arguments)}
    through = {f"b{n}_expand+b{n}_project": [f"b{n}_depthwise"] for n in (1, 2, 3)}
    assert pairs == {"stem+b0_expand": []} | through
    kept = pairs_of(*arguments, keep=["b1_depthwise_bn", "b2_expand_relu"])
    assert [pair.first.name for pair in kept] == ["stem", "b2_expand", "b3_expand"]
    networks = networks_of(model, shown, ["b2_depthwise", "b3_project"])
    found = pairs_of(model, networks.sites, networks.depthwise, networks.taps)
    assert [pair.first.name for pair in found] == ["stem", "b1_expand"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "methods", [["channels"], ["low rank", "separated", "bottleneck", "channels"]], ids=len
)
def test_it_costs_what_was_asked_for_and_sees_the_same(methods, tmp_path):
    model, x = mobile(), images(60, 32)
    result, found = vt.compress(model, 1.6, x[:40], methods=methods, steps=20)
    costs = [vt.inspect(m, repeats=1) for m in (model, result)]
    assert [cost.total.multiply_adds for cost in costs] == [found.before, found.after]
    assert 1.6 <= found.times < 1.75
    assert min(found.likeness.values()) > 0.95
    rows = {row.name: row for row in found.layers}
    assert {row.method for row in rows.values()} <= {None, *methods}
    narrow = [name for name in rows if name.endswith("depthwise") and rows[name].method]
    assert narrow
    counted = {row.name: row.multiply_adds for row in costs[1].layers}
    for name in narrow:
        channels = result.get_layer(name).kernel.shape[2]
        assert (channels,) == rows[name].ranks
        assert counted[name] == rows[name].after < rows[name].before
        project = result.get_layer(name.replace("depthwise", "project"))
        assert project.use_bias and project.kernel.shape[2] == channels
    result.save(tmp_path / "small.keras")
    again = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(again.predict(x[40:]), result.predict(x[40:]))


@pytest.mark.slow
def test_channels_of_layers_without_a_bias_are_deleted():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((32, 32, 3))
    x = L.Conv2D(32, 3, padding="same", use_bias=False, name="a")(inputs)
    x = L.ReLU()(L.BatchNormalization(name="bn")(x))
    outputs = L.Conv2D(32, 3, padding="same", name="b")(x)
    model = keras.Model(inputs, outputs)
    result, found = vt.compress(model, 1.5, images(40, 32), methods=["channels"], steps=3)
    assert [row.method for row in found.layers] == ["channels", "channels"]
    assert not result.get_layer("a").use_bias and result.get_layer("b").use_bias
    assert found.likeness["b"] > 0.95
