"""Surgery on layers of nested models, by full names such as "tower/deep/conv2"."""

from __future__ import annotations

import keras
import pytest
import torch
from contract import (
    calls_of,
    equal,
    identity,
    images,
    run,
    same_layer,
    same_snapshot,
    shake_,
    snapshot,
)
from keras import layers as kl

from vggtorch.keras_graph import functional
from vggtorch.lowering import to_torch
from vggtorch.surgery import freeze_, insert, remove, replace, stack, truncate, unfreeze_
from vggtorch.surgery.wiring import Wiring

pytestmark = pytest.mark.usefixtures("one_thread")


def tower(name="tower", shared=None):
    """A model with a Sequential model inside."""
    inputs = keras.Input((8, 8, 3))
    x = kl.Conv2D(4, 3, padding="same", activation="relu", name="conv1")(inputs)
    norm = kl.BatchNormalization(name="norm")
    deep = [keras.Input((8, 8, 4)), kl.Conv2D(4, 3, padding="same", name="conv2"), norm]
    x = keras.Sequential(deep, name="deep")(x)
    if shared is not None:
        x = shared(x)
    x = kl.MaxPooling2D(name="pool")(x)
    return keras.Model(inputs, kl.Conv2D(5, 3, padding="same", name="conv3")(x), name=name)


def outer():
    inputs = keras.Input((8, 8, 3), name="image")
    x = tower()(kl.Rescaling(0.5, name="rescale")(inputs))
    x = kl.Dense(2, name="head")(kl.GlobalAveragePooling2D(name="mean")(x))
    return keras.Model(inputs, x, name="outer")


def siamese(across=True):
    """One tower on two images, once as in inference, and a layer of it used outside as well."""
    a, b = keras.Input((8, 8, 3), name="a"), keras.Input((8, 8, 3), name="b")
    mix = kl.Conv2D(4, 1, name="mix")
    both = tower(shared=mix if across else None)
    outside = mix(kl.Conv2D(4, 2, strides=2, name="outside")(a))
    x = kl.Concatenate(name="both")([both(a), both(b, training=False), outside])
    x = kl.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model([a, b], kl.Dense(2, name="head")(x), name="siamese")


def sequential():
    top = [keras.Input((8, 8, 3)), tower(), kl.Flatten(name="flat"), kl.Dense(2, name="head")]
    return keras.Sequential(top, name="row")


MODELS = {"outer": outer, "siamese": siamese, "sequential": sequential}


@pytest.fixture(params=MODELS)
def case(request):
    """A model, its input and its output; whatever a test does, the model is as it was."""
    model = shake_(MODELS[request.param]())
    x = images(8) / 255
    x = [x, x.flip(1)] if request.param == "siamese" else x
    before = snapshot(model)
    yield model, x, run(model, x)
    same_snapshot(before, snapshot(model))


def layers(model):
    return Wiring(model, "a test").layers_by_path()


def check_nested(model, result, new=(), gone=()):
    """Kept layers have all that they had, at any depth, and what was one layer is one."""
    old, made = layers(model), layers(result)
    assert not set(gone) & set(made)
    assert set(made) - set(old) <= {
        path for path, x in made.items() if isinstance(x, kl.InputLayer) or path in new
    }
    for path in set(old) & set(made):
        if functional(old[path]) is None and not isinstance(old[path], kl.InputLayer):
            same_layer(old[path], made[path])
        assert made[path].trainable == old[path].trainable
    for one in set(old) & set(made):
        for other in set(old) & set(made):
            assert (old[one] is old[other]) == (made[one] is made[other]), (one, other)
    ids = {id(v) for v in result.variables}
    assert len(result.variables) == len(ids)
    assert {id(p) for p in result.parameters()} == {id(v.value) for v in result.variables}
    assert not result.compiled


def inner(model, path):
    *steps, last = path.split("/")
    for step in steps:
        model = model.get_layer(step)
    return model.get_layer(last)


@pytest.mark.parametrize("name", ["tower/deep/conv2", "conv2", "tower/deep/norm", "tower/conv3"])
def test_insert_follows_every_call_of_the_nested_model(case, name):
    model, x, y = case
    new = identity()
    result = insert(model, name, new)
    path = {"conv2": "tower/deep"}.get(name, name.rpartition("/")[0])
    assert inner(result, f"{path}/identity") is new
    check_nested(model, result, new=[f"{path}/identity"])
    equal(run(result, x), y)
    again = remove(result, f"{path}/identity")
    check_nested(result, again, gone=[f"{path}/identity"])
    equal(run(again, x), y)


def test_replace_and_compose_in_a_nested_model(case):
    model, x, y = case
    names = ["tower/deep/conv2", "tower/deep/norm"]
    new = kl.Conv2D(4, 3, padding="same", name="new")
    result = replace(model, names, new, init="compose")
    check_nested(model, result, new=["tower/deep/new"], gone=names)
    torch.testing.assert_close(run(result, x), y, rtol=1e-4, atol=1e-5)
    network = to_torch(result).eval()
    args = x if isinstance(x, list) else [x]
    torch.testing.assert_close(network(*args), run(result, x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_remove_takes_layers_of_several_models_at_once(case):
    model, x, _ = case
    model = insert(insert(model, "tower/conv1", identity()), "tower/deep/conv2", identity())
    names = ["tower/identity", "tower/deep/norm", "tower/deep/identity"]
    result = remove(model, names)
    check_nested(model, result, gone=names)
    norm = inner(model, "tower/deep/norm")
    norm.call = lambda t, **_: t
    equal(run(result, x), run(model, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["outer", "siamese", "sequential"])
def test_results_are_saved_loaded_and_cloned(name, tmp_path):
    # A layer shared across models is lost by Keras itself, which clones and saves it twice.
    model = shake_(siamese(across=False) if name == "siamese" else MODELS[name]())
    x = images(8) / 255
    x = [x, x.flip(1)] if name == "siamese" else x
    y = run(model, x)
    result = insert(model, "tower/deep/conv2", identity())
    result.save(tmp_path / "m.keras")
    equal(run(keras.saving.load_model(tmp_path / "m.keras"), x), y)
    clone = keras.models.clone_model(result)
    clone.set_weights(result.get_weights())
    equal(run(clone, x), y)
    equal(run(stack(result, identity()), x), y)


@pytest.mark.slow
def test_truncate_ends_inside_and_starts_inside():
    model, x = shake_(outer()), images(8) / 255
    y = run(model, x)
    part = model.get_layer("tower")
    ends = {"tower/conv1": (8, 8, 4), "tower/deep/conv2": (8, 8, 4), "tower/pool": (4, 4, 4)}
    for name, shape in ends.items():
        before = snapshot(model)
        first = truncate(model, name)
        assert first.output_shape == (None, *shape)
        assert "head" not in layers(first)
        assert name in layers(first)
        rest = truncate(model, "head", start=name)
        same_snapshot(before, snapshot(model))
        check_nested(model, first, gone=["head"])
        middle = run(first, x)
        equal(run(rest, middle), y)
        assert set(layers(rest)) & set(layers(first)) <= {"tower", "tower/deep"}
    equal(run(truncate(model, "tower/conv1"), x), run(part.get_layer("conv1"), x * 0.5))
    several = truncate(model, ["tower/pool", "head", "tower/deep/conv2", "tower"])
    check_nested(model, several)
    found = run(several, x)
    equal(found[0], middle)
    equal(found[1], y)
    equal(found[3], run(part, x * 0.5))
    inside = truncate(model, "tower/pool", start="tower/conv1")
    assert "tower/conv3" not in layers(inside)
    equal(run(inside, run(truncate(model, "tower/conv1"), x)), middle)


def test_a_nested_model_stays_as_much_of_its_class_as_it_was():
    result = insert(outer(), "tower/conv1", identity())
    assert type(inner(result, "tower/deep")) is keras.Sequential  # nothing in it has changed
    assert [len(calls_of(x)) for x in result.layers] == [1] * len(result.layers)


def test_freezing_by_full_names():
    model = outer()
    freeze_(model, "tower/deep/conv2")
    flags = {path: x.trainable for path, x in layers(model).items() if x.variables}
    assert flags == {
        "tower": True,
        "tower/conv1": False,
        "tower/deep": True,
        "tower/deep/conv2": False,
        "tower/deep/norm": True,
        "tower/conv3": True,
        "head": True,
    }
    unfreeze_(freeze_(model), "tower/deep/norm")
    frozen = {path for path, x in layers(model).items() if x.variables and not x.trainable}
    assert frozen == {"tower/conv1", "tower/deep/conv2"}


def two():
    inputs = keras.Input((8, 8, 3))
    towers = [tower("left")(inputs), tower("right")(inputs)]
    return keras.Model(inputs, kl.Add(name="sum")(towers), name="two")


def residual():
    inputs = keras.Input((8, 8, 3))
    x = kl.Conv2D(4, 1, name="a")(inputs)
    block = keras.Model(inputs, kl.Add(name="add")([kl.Conv2D(4, 1, name="b")(x), x]), name="block")
    return keras.Model(inputs, kl.Dense(2, name="after")(block(inputs)), name="residual")


REFUSED = {
    "a name in two models": (
        lambda: insert(two(), "conv1", identity()),
        "'conv1', which stands in 2 nested models of 'two'.*'left/conv1' or 'right/conv1'",
    ),
    "an unknown full name": (
        lambda: remove(two(), "left/deep/conv9"),
        "'two' has no layer 'left/deep/conv9'. Did you mean 'left/deep/conv2'",
    ),
    "a shared model has no one output": (
        lambda: truncate(siamese(), "tower/pool"),
        "'tower/pool' is shared, because 'tower' is called 2 times",
    ),
    "a start behind the end": (
        lambda: truncate(outer(), "tower/conv1", start="tower/pool"),
        "can't start at 'pool' and end at 'tower/conv1'",
    ),
    "an end before the nested model": (
        lambda: truncate(outer(), "rescale", start="tower/pool"),
        "can't start at 'pool' and end at 'rescale'",
    ),
    "a way around inside": (
        lambda: truncate(residual(), "after", start="block/b"),
        "starts at 'b' would be open: 'a' -> 'block/add' goes around it",
    ),
    "what follows can't take it": (
        lambda: replace(two(), "left/conv1", kl.Conv2D(7, 1)),
        r"'left/deep/conv2' \(Conv2D\) expects \(None, 8, 8, 4\) .*would now get \(None, 8, 8, 7\)",
    ),
    "nothing left": (
        lambda: remove(two(), ["left/deep/conv2", "left/deep/norm"]),
        "remove would leave no layer of 'deep' but its inputs",
    ),
    "a join inside": (
        lambda: remove(residual(), "block/add"),
        r"can't take out 'block/add': it joins 2 tensors \(from 'b', 'a'\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cant_be_done_inside_is_refused(case):
    operation, text = REFUSED[case]
    with pytest.raises(ValueError, match=text):
        operation()


def test_weights_that_two_layers_hold_in_secret_are_refused():
    dense = kl.Dense(4, name="inside")
    inputs = keras.Input((3, 4))
    x = kl.TimeDistributed(dense, name="steps")(inputs)
    model = keras.Model(inputs, kl.Add(name="sum")([x, dense(inputs)]))
    with pytest.raises(ValueError, match=r"'.*kernel' are held by two layers.*Surgery keeps what"):
        insert(model, "sum", identity())
