"""Every operation on networks of keras.applications, branched ones among them."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from applications import beginning, waists
from contract import (
    check,
    equal,
    identity,
    images,
    nodes,
    output_of,
    run,
    same_snapshot,
    shake_,
    snapshot,
)
from keras import layers as kl

from vggtorch.models import remember_, weight_set
from vggtorch.surgery import freeze_, insert, remove, replace, stack, truncate, unfreeze_

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

NETWORKS = (
    *("VGG16", "ResNet50", "InceptionV3", "DenseNet121", "MobileNetV3Small", "EfficientNetB0"),
    *("Xception", "ConvNeXtTiny"),
)


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    model = shake_(remember_(beginning(request.param), "oxford"))
    first = next(layer for layer in model.layers if isinstance(layer, kl.Conv2D))
    first.kernel_regularizer = first.kernel.regularizer = keras.regularizers.L2(0.1)
    last = next(layer for layer in reversed(model.layers) if layer.trainable_weights)
    last.trainable_weights[0].trainable = False
    model.layers[len(model.layers) // 2].dtype_policy = keras.DTypePolicy("mixed_bfloat16")
    x = images(model.input_shape[1], count=1)
    return model, x, run(model, x)


@pytest.fixture(autouse=True)
def input_untouched(request):
    """Whatever a test does, the network it was lent is as it was."""
    if "network" not in request.fixturenames:
        yield
        return
    model, _, _ = request.getfixturevalue("network")
    before = snapshot(model)
    yield
    same_snapshot(before, snapshot(model))


def between(model, first, last):
    """Names of the layers after `first` up to `last`, both waists."""
    names = [node.operation.name for node in nodes(model)]
    return names[names.index(first) + 1 : names.index(last) + 1]


def test_truncate_gives_the_intermediate_output_and_the_rest_the_rest(network):
    model, x, y = network
    points = waists(model)
    name, last = points[len(points) // 2], model.layers[-1].name
    first = truncate(model, name)
    check(model, first, gone=[last])
    with pytest.warns(UserWarning, match="no longer remembers its weight set 'oxford'"):
        rest = truncate(model, last, start=name)
    check(model, rest, gone=[name], sees_images=False)
    features = run(first, x)
    equal(run(rest, features), y)
    equal(features, run(keras.Model(model.input, output_of(model, name)), x))


def test_insert_and_remove_of_an_identity(network):
    model, x, y = network
    points = waists(model)
    new = identity()
    inserted = insert(model, points[len(points) // 2], new)
    check(model, inserted, new=[new])
    equal(run(inserted, x), y)
    removed = remove(inserted, "identity")
    check(model, removed, gone=["identity"])
    assert [layer.name for layer in removed.layers] == [layer.name for layer in model.layers]


def test_replace_of_a_block_with_branches_inside(network):
    model, x, y = network
    points = waists(model)
    first, last = points[len(points) // 2 - 1], points[len(points) // 2]
    block = between(model, first, last)
    with pytest.warns(UserWarning, match="no longer remembers its weight set 'oxford'"):
        new = truncate(model, last, start=first)
    new.name = "block"
    result = replace(model, block, new)
    assert result.get_layer("block") is new
    check(model, result, new=[new], gone=block)
    equal(run(result, x), y)


def test_several_cuts_and_a_head(network):
    model, x, y = network
    points = waists(model)
    early, late = points[len(points) // 3], points[2 * len(points) // 3]
    result = truncate(model, [late, early])
    check(model, result, gone=[model.layers[-1].name])
    assert len(result.losses) == 1
    equal(result.losses[0], model.losses[0])
    expected = keras.Model(model.input, [output_of(model, late), output_of(model, early)])
    for a, b in zip(run(result, x), run(expected, x), strict=True):
        equal(a, b)

    head = [kl.GlobalAveragePooling2D(name="mean"), kl.Dense(3, name="top")]
    result = stack(model, head)
    check(model, result, new=head)
    equal(run(result, x), head[1](head[0](y)))


def test_freezing_follows_every_graph(network):
    model, _, _ = network
    points = waists(model)
    name = points[len(points) // 2]
    before = {layer.name for layer in truncate(model, name).layers}
    behind = {layer.name for layer in model.layers} - before

    result = truncate(model, model.layers[-1].name)  # freezing works in place
    flags = {layer.name: layer.trainable for layer in result.layers}
    assert freeze_(result, until=name) is result
    assert {layer.name: layer.trainable for layer in result.layers} == {
        layer: layer in behind and flag for layer, flag in flags.items()
    }
    freeze_(result)
    assert not result.trainable_variables
    unfreeze_(result, since=name)
    assert {layer.name for layer in result.layers if layer.trainable} == (
        (behind | {name}) & set(flags)  # an operation, such as keras.ops.add, is no layer
    )


def test_results_are_saved_loaded_cloned_and_trained(network, tmp_path):
    model, x, _ = network
    points = waists(model)
    short = truncate(model, points[len(points) // 2])
    top = kl.Dense(3, activation="softmax", name="top")
    result = stack(short, [kl.GlobalAveragePooling2D(name="mean"), top])
    y = run(result, x)

    result.save(tmp_path / "result.keras")
    loaded = keras.saving.load_model(tmp_path / "result.keras")
    assert weight_set(loaded) == "oxford"
    equal(run(loaded, x), y)
    equal(run(truncate(loaded, "mean"), x), run(truncate(result, "mean"), x))

    clone = keras.models.clone_model(result)
    clone.set_weights(result.get_weights())
    equal(run(clone, x), y)

    weights = [w.copy() for w in result.get_weights()]
    result.compile("sgd", "sparse_categorical_crossentropy")
    result.fit(x, np.array([0]), verbose=0)
    assert any((a != b).any() for a, b in zip(weights, result.get_weights(), strict=True))
