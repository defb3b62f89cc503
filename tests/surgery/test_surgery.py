"""Surgery gives what it says, leaves its input as it was, and its result stands alone."""

from __future__ import annotations

import re

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import vggtorch  # noqa: F401  selects the torch backend
from vggtorch.models.preprocessing import remember_, weight_set
from vggtorch.surgery.operations import freeze_, insert, remove, replace, stack, truncate, unfreeze_

import keras  # isort: skip
from keras import layers as kl  # isort: skip

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORKS = {  # of keras.applications: the smallest input each takes
    "VGG16": 32,
    "ResNet50": 32,
    "InceptionV3": 75,
    "DenseNet121": 32,
    "MobileNetV3Small": 32,
    "EfficientNetB0": 32,
    "Xception": 71,
    "ConvNeXtTiny": 32,
}


# What is checked after every operation -----------------------------------------------------------


def operations(model):
    """Operations of the graph by name."""
    graph = model._functional if isinstance(model, keras.Sequential) else model
    return {op.name: op for op in graph.operations}


def every_layer(model):
    return model._flatten_layers()


def snapshot(model):
    """All of a model that surgery must leave as it is."""
    return {
        "class": type(model),
        "values": [(v, v._value, v._value.detach().clone()) for v in model.variables],
        "trainable": [(layer, layer.trainable) for layer in every_layer(model)],
        "variables": [v.trainable for v in model.variables],
        "requires_grad": [v._value.requires_grad for v in model.variables],
        "parameters": [id(p) for p in model.parameters()],
        "nodes": [
            (op, [id(n) for n in op._inbound_nodes], [id(n) for n in op._outbound_nodes])
            for layer in every_layer(model)
            if isinstance(layer, keras.Model)
            for op in operations(layer).values()
        ],
        "outputs": [
            [id(t) for n in op._inbound_nodes for t in n.outputs]
            for op in operations(model).values()
        ],
    }


def same_snapshot(before, after):
    assert before.keys() == after.keys()
    for key in before:
        if key == "values":
            for (v1, p1, x1), (v2, p2, x2) in zip(before[key], after[key], strict=True):
                assert v1 is v2
                assert p1 is p2
                assert x1.stride() == x2.stride()
                assert x1.is_meta or torch.equal(x1, x2)
        else:
            assert before[key] == after[key], key


def unnumbered(path):
    """A variable's path less the numbers that Keras gives as variables are made."""
    return re.sub(r"_\d+(?=/|$)", "", path)


def same_layer(old, new):
    """A kept layer has everything that the old one had, and shares nothing with it."""
    assert type(old) is type(new)
    assert old is not new
    assert old.get_config() == new.get_config()
    if not isinstance(old, kl.Layer):
        return
    assert old.dtype_policy.name == new.dtype_policy.name
    assert [x.trainable for x in every_layer(old)] == [x.trainable for x in every_layer(new)]
    for a, b in zip(old.variables, new.variables, strict=True):
        assert a is not b
        assert unnumbered(a.path) == unnumbered(b.path)
        assert (a.trainable, a.dtype) == (b.trainable, b.dtype)
        assert a._value.requires_grad == b._value.requires_grad
        assert a._value.stride() == b._value.stride()
        assert a._value.device == b._value.device
        assert a._value.is_meta or a._value.data_ptr() != b._value.data_ptr()
        assert a._value.is_meta or torch.equal(a._value, b._value), a.path
        assert b._value.untyped_storage().nbytes() == b._value.numel() * b._value.itemsize
    ours = {id(v._value) for v in new.variables}
    assert {id(p) for p in new.parameters()} == ours


def check(model, result, new=(), gone=()):
    """The contract between a model and what surgery made of it."""
    old, made = operations(model), operations(result)
    new = {layer.name: layer for layer in new}
    for name, op in made.items():
        if name in new:
            assert op is new[name]
        elif name in old:
            same_layer(old[name], op)
        else:
            assert isinstance(op, kl.InputLayer)
        assert len(op._inbound_nodes) == sum(node.operation is op for node in nodes(result)), name
    assert not set(gone) & set(made)
    assert set(new) <= set(made)
    assert not result.compiled
    assert (result.name, result.trainable) == (model.name, model.trainable)
    if not isinstance(model, keras.Sequential):
        assert type(result) is type(model)
    assert {id(p) for p in result.parameters()} == {id(v._value) for v in result.variables}


def nodes(model):
    return [node for level in model._nodes_by_depth.values() for node in level]


def waists(model):
    """Layers that every path goes through, in order."""
    order = sorted(nodes(model), key=lambda n: -depth(model, n))
    left = {id(n): len(n.outputs[0]._keras_history.operation._outbound_nodes) for n in order}
    found: list[str] = []
    waiting: dict[int, int] = {}
    for node in order:
        for parent in node.parent_nodes:
            waiting[id(parent)] -= 1
            if not waiting[id(parent)]:
                del waiting[id(parent)]
        if not waiting:
            found.append(node.operation.name)
        waiting[id(node)] = left[id(node)]
    return found


def output_of(model, name):
    """What a layer puts out in this graph; a nested model's own `.output` is inside it."""
    return operations(model)[name]._inbound_nodes[0].outputs[0]


def depth(model, node):
    return next(d for d, level in model._nodes_by_depth.items() if node in level)


def between(model, first, last):
    """Names of the layers after `first` up to `last`, both waists."""
    names = [n.operation.name for n in sorted(nodes(model), key=lambda n: -depth(model, n))]
    return names[names.index(first) + 1 : names.index(last) + 1]


def identity():
    return kl.Activation("linear", name="identity")


def run(model, x):
    with torch.no_grad():
        return model(x, training=False)


def equal(a, b):
    assert torch.equal(a, b), f"{a.shape} {b.shape} {float((a - b).abs().max())}"


def shake_(model, seed=0):
    """Values that no initialiser gives, so that a lost one shows; some layers frozen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for v in model.variables:
            if v._value.is_floating_point():
                v._value += 0.01 * torch.rand(v._value.shape, generator=generator)
    layers = model.layers
    layers[len(layers) // 3].trainable = False
    return model


def images(size, count=2):
    return torch.from_numpy(
        np.random.default_rng(0).uniform(0, 255, (count, size, size, 3)).astype("float32")
    )


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    size = NETWORKS[request.param]
    build = getattr(keras.applications, request.param)
    model = build(weights=None, include_top=False, input_shape=(size, size, 3))
    shake_(remember_(model, "oxford"))
    first = next(layer for layer in model.layers if isinstance(layer, kl.Conv2D))
    first.kernel_regularizer = first.kernel.regularizer = keras.regularizers.L2(0.1)
    last = next(layer for layer in reversed(model.layers) if layer.trainable_weights)
    last.trainable_weights[0].trainable = False
    model.layers[len(model.layers) // 2].dtype_policy = keras.DTypePolicy("mixed_bfloat16")
    return model, images(size, count=1), run(model, images(size, count=1))


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


# Every network -----------------------------------------------------------------------------------


def test_truncate_gives_the_intermediate_output_and_the_rest_the_rest(network):
    model, x, y = network
    points = waists(model)
    name, last = points[len(points) // 2], model.layers[-1].name
    first = truncate(model, name)
    check(model, first, gone=[last])
    rest = truncate(model, last, start=name)
    check(model, rest, gone=[name])
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


# What results are good for -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def vgg():
    model = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    return shake_(model), images(32)


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


def test_the_tutorial_runs_on_results(vgg):
    model, x = vgg
    custom = truncate(model, "block2_pool")
    layer_dict = {layer.name: layer for layer in custom.layers}
    y = layer_dict["block2_pool"].output
    y = kl.Conv2D(64, 3, activation="relu")(y)
    y = kl.Dense(10, activation="softmax")(kl.Flatten()(y))
    custom_model = keras.Model(inputs=custom.input, outputs=y)
    for layer in custom_model.layers[:7]:
        layer.trainable = False
    assert [layer.name for layer in custom_model.layers[:7]] == [
        *("input_layer", "block1_conv1", "block1_conv2", "block1_pool"),
        *("block2_conv1", "block2_conv2", "block2_pool"),
    ] or custom_model.layers[0].name.startswith("input_layer")
    assert run(custom_model, x).shape == (2, 10)
    assert all(model.get_layer(f"block2_conv{n}").trainable for n in (1, 2))

    new_conv = kl.Conv2D(64, 5, padding="same", activation="relu", name="block1_conv")
    replaced = replace(model, ["block1_conv1", "block1_conv2"], new_conv)
    check(model, replaced, new=[new_conv], gone=["block1_conv1", "block1_conv2"])
    inner = keras.Model(replaced.input, replaced.get_layer("block3_pool").output)
    tail = truncate(model, "block3_pool", start="block1_pool")
    equal(run(inner, x), run(tail, run(truncate(replaced, "block1_pool"), x)))


def test_truncate_with_several_names_gives_several_outputs_in_that_order(vgg):
    model, x = vgg
    result = truncate(model, ["block3_conv3", "block1_conv2"])
    check(model, result, gone=["block3_pool"])
    late, early = run(result, x)
    equal(late, run(truncate(model, "block3_conv3"), x))
    equal(early, run(truncate(model, "block1_conv2"), x))


def test_replace_by_a_copy_gives_the_same(vgg):
    model, x = vgg
    old = model.get_layer("block2_conv1")
    new = type(old).from_config({**old.get_config(), "name": "copy"})
    result = replace(model, "block2_conv1", new)
    new.set_weights(old.get_weights())
    equal(run(result, x), run(model, x))


def test_new_layers_keep_the_weights_they_come_with(vgg):
    model, _ = vgg
    new = kl.Conv2D(64, 5, padding="same", name="new")
    new.build((None, 32, 32, 3))
    kernel = new.kernel.numpy()
    result = replace(model, ["block1_conv1", "block1_conv2"], new)
    assert np.array_equal(result.get_layer("new").kernel.numpy(), kernel)


def test_remove_of_several_layers(vgg):
    model, x = vgg
    result = remove(model, ["block4_conv2", "block4_conv3", "block5_conv1"])
    check(model, result, gone=["block4_conv2", "block4_conv3", "block5_conv1"])
    y = run(truncate(model, "block4_conv1"), x)
    for name in ("block4_pool", "block5_conv2", "block5_conv3", "block5_pool"):
        y = model.get_layer(name)(y)
    equal(run(result, x), y)


def test_weight_set_and_class_are_carried_on(vgg):
    model, _ = vgg
    model = remember_(truncate(model, "block2_pool"), "oxford")
    result = stack(model, kl.Flatten())
    assert weight_set(result) == "oxford"
    assert weight_set(keras.models.clone_model(result)) == "oxford"


def test_nothing_is_initialised_that_is_about_to_be_replaced():
    class Watched(keras.initializers.Initializer):
        real = 0

        def __call__(self, shape, dtype=None):
            value = keras.ops.zeros(shape, dtype)
            Watched.real += not value.is_meta
            return value

        def get_config(self):
            return {}

    with keras.saving.custom_object_scope({"Watched": Watched}):
        inputs = keras.Input((4,))
        model = keras.Model(inputs, kl.Dense(3, kernel_initializer=Watched(), name="d")(inputs))
        assert Watched.real == 1
        insert(model, "d", kl.Activation("linear"))
        assert Watched.real == 1
        stack(model, kl.Dense(2, kernel_initializer=Watched()))
        assert Watched.real == 2  # the new layer, once


def test_memory_format_of_kernels_is_kept(vgg):
    model, _ = vgg
    model = truncate(model, "block1_pool")
    kernel = model.get_layer("block1_conv2").kernel._value  # HWIO
    kernel.data = kernel.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)  # stored OHWI
    result = stack(model, kl.Flatten())
    check(model, result, new=[result.layers[-1]])
    assert result.get_layer("block1_conv2").kernel._value.stride() == kernel.stride()


def test_a_model_without_values_stays_without():
    with keras.device("meta"):
        model = keras.applications.VGG16(weights=None)
    result = replace(model, "block1_conv1", kl.Conv2D(64, 5, padding="same", name="new"))
    assert all(v._value.is_meta for v in result.variables)
    check(model, result, new=[result.get_layer("new")], gone=["block1_conv1"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_results_stay_on_the_device_of_their_input():
    for device in ("cpu", "cuda:0"):
        with keras.device(device):
            model = keras.applications.VGG16(
                weights=None, include_top=False, input_shape=(32, 32, 3)
            )
        result = stack(model, [kl.Flatten(), kl.Dense(2), torch.nn.Linear(2, 2)])
        check(model, result, new=result.layers[-3:])
        assert {str(v._value.device) for v in result.variables} == {device}


# Other graphs ------------------------------------------------------------------------------------


def shared():
    """One layer called twice, on two inputs, and a branch."""
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    dense = kl.Dense(6, activation="relu", name="shared")
    x, y = dense(a), dense(b)
    x = kl.Dense(6, name="only_a")(x)
    return keras.Model({"a": a, "b": b}, [kl.Add(name="sum")([x, y]), kl.Dense(2, name="side")(y)])


def test_shared_layers_stay_shared():
    model = shake_(shared())
    x = {"a": torch.rand(3, 6), "b": torch.rand(3, 6)}
    before = snapshot(model)
    result = insert(model, "only_a", identity())
    check(model, result, new=[result.get_layer("identity")])
    for a, b in zip(run(result, x), run(model, x), strict=True):
        equal(a, b)

    new = kl.Dense(6, activation="relu", name="new")
    result = replace(model, "shared", new)
    assert len(new._inbound_nodes) == 2
    new.set_weights(model.get_layer("shared").get_weights())
    for a, b in zip(run(result, x), run(model, x), strict=True):
        equal(a, b)

    new = identity()
    result = insert(model, "shared", new)
    assert len(new._inbound_nodes) == 2
    check(model, result, new=[new])

    removed = remove(model, "shared")
    equal(run(removed, x)[1], model.get_layer("side")(x["b"]))
    same_snapshot(before, snapshot(model))


def test_inputs_that_are_no_longer_needed_go():
    model = shared()
    result = truncate(model, "side")
    assert list(result.input) == ["b"]
    x = torch.rand(3, 6)
    equal(run(result, {"b": x}), run(model, {"a": x, "b": x})[1])
    assert [t.name for t in truncate(model, ["sum", "side"]).inputs] == ["a", "b"]


def test_one_input_that_is_left_stands_alone():
    a, b, c = (keras.Input((6,), name=name) for name in "abc")
    x = kl.Add(name="sum")([a, b])
    model = keras.Model([a, b, c], kl.Concatenate(name="all")([x, kl.Dense(2, name="side")(c)]))
    assert [t.name for t in truncate(model, "sum").input] == ["a", "b"]
    assert truncate(model, "side").input.name == "c"
    x = torch.rand(3, 6)
    equal(run(truncate(model, "side"), x), model.get_layer("side")(x))


def nested():
    """Models inside a model, one of them frozen, one called with training=False."""
    inner = keras.Sequential(
        [keras.Input((4, 4, 6)), kl.Conv2D(6, 1, name="conv"), kl.BatchNormalization(name="bn")],
        name="inner",
    )
    deep = keras.Input((4, 4, 3))
    y = inner(kl.Conv2D(6, 3, padding="same", name="before")(deep), training=False)
    middle = keras.Model(deep, kl.ReLU(name="after")(y), name="middle")
    inner.layers[0].trainable = False
    inputs = keras.Input((4, 4, 3), name="image")
    x = kl.Rescaling(1 / 255, name="rescale")(inputs)
    x = middle(x)
    return keras.Model(inputs, kl.Dense(2, name="head")(kl.Flatten(name="flat")(x)), name="outer")


def test_nested_models_are_copied_with_all_that_is_in_them():
    model = shake_(nested())
    model.get_layer("middle").get_layer("inner").layers[0].trainable = False
    before = snapshot(model)
    x = images(4)
    result = insert(model, "middle", identity())
    check(model, result, new=[result.get_layer("identity")])
    equal(run(result, x), run(model, x))
    middle = result.get_layer("middle")
    assert isinstance(middle.get_layer("inner"), keras.Sequential)
    assert not middle.get_layer("inner").layers[0].trainable
    same_layer(model.get_layer("middle").get_layer("inner"), middle.get_layer("inner"))
    for op in operations(middle).values():
        assert len(op._inbound_nodes) == 1
    (node,) = middle.get_layer("inner")._inbound_nodes
    assert node.arguments.kwargs == {"training": False}
    same_snapshot(before, snapshot(model))


def test_operations_masks_and_layers_of_many_kinds():
    class Custom(kl.Layer):
        """Keeps tensors wherever torch and Keras let a layer keep them."""

        def __init__(self, units, **kwargs):
            super().__init__(**kwargs)
            self.units = units
            self.dense = kl.Dense(units, activation=lambda x: scale * x, name="inside")
            self.register_buffer("steps", torch.zeros(1))
            self.shift = torch.nn.Parameter(torch.zeros(1))
            self.norm = torch.nn.BatchNorm1d(units)
            self.constant = torch.ones(1)

        def call(self, x):
            return self.norm(self.dense(x)) + self.steps + self.shift + self.constant

        def compute_output_shape(self, input_shape):
            return (*input_shape[:-1], self.units)

        def get_config(self):
            return {**super().get_config(), "units": self.units}

    scale = 3.0
    tokens = keras.Input((5,), dtype="int32", name="tokens")
    x = kl.Embedding(10, 6, mask_zero=True, name="embed")(tokens)
    x = kl.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = kl.Bidirectional(kl.GRU(4), name="gru")(x)
    x = keras.ops.concatenate([x, keras.ops.mean(x, axis=-1, keepdims=True) * 2.0], axis=-1)
    normalise = kl.Normalization(name="normalise")
    normalise.adapt(np.random.default_rng(0).normal(1, 2, (20, 9)).astype("float32"))
    x = normalise(x)
    x = kl.Lambda(lambda t: t * scale, name="lambda", dtype="float64")(x)
    x = kl.Dense(4, activation=torch.nn.functional.gelu, name="gelu")(x)
    x = Custom(4, name="custom")(x)
    x = kl.TorchModuleWrapper(
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)),
        output_shape=(None, 4),
        name="torch",
    )(x)
    model = shake_(keras.Model(tokens, kl.Dropout(0.5, seed=1, name="drop")(x)))
    custom, torch_layer = model.get_layer("custom"), model.get_layer("torch")
    custom.dense.trainable = False
    with torch.no_grad():
        for tensor in (custom.steps, custom.shift, custom.constant):
            tensor += 0.5
        for norm in (custom.norm.module, torch_layer.module[1]):
            norm.running_mean += 0.3
    numbers = torch.tensor([[1, 2, 3, 0, 0], [4, 5, 6, 7, 8]])
    y = run(model, numbers)
    before = snapshot(model)
    result = insert(model, "lambda", identity())
    same_snapshot(before, snapshot(model))
    equal(run(result, numbers), y)
    for name in operations(model):
        old, new = operations(model)[name], operations(result)[name]
        if isinstance(old, kl.Layer):
            flags = [layer.trainable for layer in every_layer(old)]
            assert [layer.trainable for layer in every_layer(new)] == flags, name
            assert new.dtype_policy.name == old.dtype_policy.name, name
    again = remove(truncate(result, "drop", start="gru"), "identity")
    equal(run(again, run(truncate(model, "gru"), numbers)), y)
    equal(result(numbers, training=True), model(numbers, training=True))  # one seed, one mask
    for layer in every_layer(result):
        assert not any(isinstance(t, torch.Tensor) and t.is_meta for t in vars(layer).values())
        for parameter in layer.named_parameters():
            assert not parameter[1].is_meta


@pytest.mark.parametrize("regularizer", ["L1", "L2", "L1L2", "OrthogonalRegularizer"])
def test_policies_regularisers_constraints_and_flags_are_kept(regularizer):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        inputs = keras.Input((8,))
        x = kl.Dense(
            8,
            kernel_regularizer=getattr(keras.regularizers, regularizer)(),
            kernel_constraint=keras.constraints.MaxNorm(1.0),
            name="a",
        )(inputs)
        x = kl.BatchNormalization(name="norm", dtype="float32")(x)
        model = keras.Model(inputs, kl.Dense(2, name="b", dtype="float64")(x))
    finally:
        keras.config.set_dtype_policy("float32")
    shake_(model)
    model.get_layer("a").trainable = True
    model.get_layer("b").trainable = False
    model.get_layer("norm").gamma.trainable = False
    result = insert(model, "norm", identity())
    check(model, result, new=[result.get_layer("identity")])
    policies = [layer.dtype_policy.name for layer in model.layers]
    assert policies[1:] == ["mixed_bfloat16", "float32", "float64"]
    assert result.dtype_policy == model.dtype_policy
    assert len(result.losses) == len(model.losses) == 1
    equal(result.losses[0], model.losses[0])
    x = torch.rand(3, 8)
    equal(run(remove(result, "identity"), x), run(model, x))


def test_layers_that_were_changed_after_they_were_made():
    """LoRA, int8 and layers unfrozen in a frozen model are part of what is kept."""
    inputs = keras.Input((6,))
    x = kl.Dense(4, name="lora")(inputs)
    model = keras.Model(inputs, kl.Dense(4, name="int8")(kl.Dense(4, name="plain")(x)))
    model.get_layer("lora").enable_lora(2)
    model.get_layer("int8").quantize("int8")
    model.trainable = False
    model.get_layer("plain").trainable = True
    shake_(model)
    result = insert(model, "plain", identity())
    check(model, result, new=[result.get_layer("identity")])
    x = torch.rand(3, 6)
    equal(run(result, x), run(model, x))


def test_models_whose_class_has_a_constructor_of_its_own():
    class Backbone(keras.Model):
        def __init__(self, units, **kwargs):
            inputs = keras.Input((6,))
            super().__init__(inputs, kl.Dense(units, name="dense")(inputs), **kwargs)
            self.units = units

        def get_config(self):
            return {"units": self.units, "name": self.name, "trainable": self.trainable}

        @classmethod
        def from_config(cls, config):
            return cls(**config)

    backbone = Backbone(4, name="backbone")
    inputs, x = keras.Input((6,)), torch.rand(3, 6)
    model = keras.Model(inputs, kl.Dense(2, name="top")(backbone(inputs)))
    result = insert(model, "backbone", identity())
    check(model, result, new=[result.get_layer("identity")])
    equal(run(result, x), run(model, x))
    alone = insert(backbone, "dense", identity())  # it can't be made from inputs and outputs
    assert type(alone) is type(keras.Model(inputs, model.output))
    equal(run(alone, x), run(backbone, x))


def test_sequential_models_become_functional_ones():
    model = keras.Sequential([keras.Input((6,)), kl.Dense(5, name="a"), kl.Dense(4, name="b")])
    shake_(model)
    before = snapshot(model)
    result = truncate(model, "a")
    equal(run(result, torch.ones(2, 6)), model.layers[0](torch.ones(2, 6)))
    assert result.name == model.name
    result = insert(model, "a", identity())
    equal(run(result, torch.ones(2, 6)), run(model, torch.ones(2, 6)))
    same_snapshot(before, snapshot(model))


def test_graphs_deeper_than_the_stack_of_python():
    inputs = x = keras.Input((2,))
    for n in range(300):
        x = kl.Activation("linear", name=f"layer{n}")(x)
    model = keras.Model(inputs, x)
    result = remove(model, [f"layer{n}" for n in range(100, 200)])
    assert len(result.layers) == 201


def test_a_head_of_every_kind(vgg, tmp_path):
    model, x = vgg
    model = stack(truncate(model, "block1_pool"), kl.GlobalAveragePooling2D(name="mean"))
    y = run(model, x)

    head = keras.Sequential([kl.Dense(5), kl.Dense(2)], name="head")
    result = stack(model, head)
    assert result.get_layer("head") is head
    equal(run(result, x), head(y))

    inputs = keras.Input((64,))
    head = keras.Model(inputs, kl.Dense(3)(inputs), name="functional")
    result = stack(model, head)
    check(model, result, new=[head])
    equal(run(result, x), head(y))

    module = torch.nn.Sequential(torch.nn.Linear(64, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    result = stack(model, module)
    assert result.output_shape == (None, 4)
    assert result.layers[-1].module is module
    equal(run(result, x), module.eval()(y))
    result.compile("sgd", "mse")
    result.fit(x, np.ones((2, 4)), verbose=0)
    again = insert(result, "mean", identity())
    assert again.layers[-1].module is not module
    equal(run(again, x), run(result, x))
    larger = insert(stack(vgg[0], torch.nn.ReLU()), "block4_pool", kl.UpSampling2D())
    assert larger.output_shape == (None, 2, 2, 512)
    assert run(larger, x).shape == (2, 2, 2, 512)
    result.save(tmp_path / "torch.keras")
    loaded = keras.saving.load_model(tmp_path / "torch.keras", safe_mode=False)
    equal(run(loaded, x), run(result, x))


# Freezing ----------------------------------------------------------------------------------------


def trainable(model):
    return {layer.name for layer in every_layer(model) if layer.weights and layer.trainable}


def test_freeze_and_unfreeze_by_position():
    model = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
    assert freeze_(model, until="block4_pool") is model
    late = {f"block5_conv{n}" for n in (1, 2, 3)}
    assert trainable(model) == {model.name, *late}
    assert {v.path.split("/")[0] for v in model.trainable_variables} == late
    assert unfreeze_(model, since="block4_conv3") is model
    assert trainable(model) == {model.name, "block4_conv3", *late}
    freeze_(model)
    assert not model.trainable_variables
    unfreeze_(model)
    assert len(model.trainable_variables) == len(model.weights)
    model.trainable = False
    unfreeze_(model, since="block5_conv2")
    assert trainable(model) == {model.name, "block5_conv2", "block5_conv3"}
    assert len(model.trainable_variables) == 4


def test_freezing_follows_the_graph():
    model = shared()
    freeze_(model, until="only_a")
    assert trainable(model) == {model.name, "side"}
    unfreeze_(model, since="only_a")
    assert trainable(model) == {model.name, "only_a", "side"}


def test_freezing_reaches_into_nested_models():
    model = nested()
    unfreeze_(model)
    freeze_(model, until="conv")
    assert trainable(model) == {"outer", "middle", "inner", "bn", "head"}
    freeze_(model)
    unfreeze_(model, since="bn")
    assert trainable(model) == {"outer", "middle", "inner", "bn", "head"}
    assert {v.path.split("/")[-2] for v in model.trainable_variables} == {"bn", "head"}


# Errors ------------------------------------------------------------------------------------------


def two_outputs():
    inputs = keras.Input((4,), name="in")
    a = kl.Dense(4, name="a")(inputs)
    return keras.Model(inputs, [a, kl.Dense(3, name="b")(a)], name="two")


class Subclassed(keras.Model):
    def call(self, x):
        return x


def used(name="used"):
    layer = kl.Dense(3, name=name)
    layer(keras.Input((4,)))
    return layer


class Forgetful(kl.Layer):
    """Its config leaves out how many weights it has."""

    def __init__(self, weights=0, **kwargs):
        super().__init__(**kwargs)
        self.count = weights

    def build(self, input_shape):
        for n in range(self.count):
            self.add_weight(name=f"weight{n}")

    def call(self, x):
        return x

    def get_config(self):
        return {"name": self.name}


class Unwritten(kl.Layer):
    """It has no config."""

    def get_config(self):
        raise NotImplementedError("no config")

    def call(self, x):
        return x


class Moody(kl.Layer):
    """Its config leaves out what its call needs."""

    def __init__(self, mood="bad", **kwargs):
        super().__init__(**kwargs)
        self.mood = mood

    def call(self, x):
        if self.mood == "bad":
            raise RuntimeError("not today")
        return x

    def get_config(self):
        return {"name": self.name}


def with_layer(layer):
    inputs = keras.Input((4, 3), name="in")
    return keras.Model(inputs, kl.Dense(2, name="after")(layer(inputs)))


def recurrent():
    inputs = keras.Input((4, 3), name="in")
    states = kl.LSTM(5, return_state=True, name="lstm")(inputs)
    return keras.Model(inputs, kl.Dense(2, name="after")(states[0]), name="recurrent")


def residual():
    inputs = keras.Input((8, 8, 3))
    x = kl.Conv2D(4, 3, padding="same", name="stem")(inputs)
    return keras.Model(inputs, kl.Add(name="add")([kl.ReLU(name="relu")(x), x]))


ERRORS = {
    "unknown name": (
        lambda m: truncate(m, "block1_pol"),
        r"'vgg16' has no layer 'block1_pol'\. Did you mean 'block1_pool'.*Its layers: .*block2_p",
    ),
    "unknown start": (lambda m: truncate(m, "block2_pool", start="blck"), "no layer 'blck'"),
    "unknown in remove": (lambda m: remove(m, ["block1_conv1", "x"]), "no layer 'x'"),
    "unknown in freeze": (lambda m: freeze_(m, "block9"), "has no layer 'block9'"),
    "name inside a nested model": (
        lambda m: truncate(nested(), "bn"),
        "'outer' has no layer 'bn'.*It is a layer of 'middle', which is nested in it",
    ),
    "a model on itself": (lambda m: stack(m, m), "'vgg16' has been called before and belongs to"),
    "no names": (lambda m: truncate(m, []), "truncate received no layer names"),
    "no names to remove": (lambda m: remove(m, []), "remove received no layer names"),
    "no names to replace": (
        lambda m: replace(m, [], identity()),
        "replace received no layer names",
    ),
    "name twice": (lambda m: remove(m, ["fc", "fc"]), "a layer name twice: 'fc'"),
    "not a name": (lambda m: remove(m, [m]), "expects layer names, received <Functional"),
    "no layers": (lambda m: stack(m, []), "stack received no layers"),
    "no layers to insert": (lambda m: insert(m, "block1_pool", []), "insert received no layers"),
    "not a layer": (lambda m: stack(m, ["Dense"]), "stack expects Keras layers.*received 'Dense'"),
    "an input as a layer": (
        lambda m: stack(m, kl.InputLayer(shape=(3,))),
        "stack expects Keras layers.*received <InputLayer",
    ),
    "truncate at the input": (
        lambda m: truncate(m, m.layers[0].name),
        "truncate at 'input.*' leaves no layer: 'input.*' is an input",
    ),
    "end before start": (
        lambda m: truncate(m, "block1_pool", start="block2_pool"),
        "can't start at 'block2_pool' and end at 'block1_pool': 'block1_pool' doesn't come after",
    ),
    "end is start": (
        lambda m: truncate(m, "block2_pool", start="block2_pool"),
        "can't start at 'block2_pool' and end at 'block2_pool'",
    ),
    "remove the input": (
        lambda m: remove(m, m.layers[0].name),
        "remove can't take 'input.*': it is an input of 'vgg16'",
    ),
    "replace the input": (
        lambda m: replace(m, m.layers[0].name, identity()),
        "replace can't take 'input.*': it is an input of 'vgg16'",
    ),
    "removal breaks shapes": (
        lambda m: remove(m, "block1_conv1"),
        r"'block1_conv2' \(Conv2D\) expects \(None, 32, 32, 64\) \(from 'block1_conv1'\) and would "
        r"now get \(None, 32, 32, 3\)\. .*put something in place that gives \(None, 32, 32, 64\)",
    ),
    "replacement with other channels": (
        lambda m: replace(m, "block2_conv2", kl.Conv2D(96, 3, padding="same")),
        r"'block3_conv1' \(Conv2D\) expects \(None, 8, 8, 128\) \(from 'block2_pool'\) and would "
        r"now get \(None, 8, 8, 96\)",
    ),
    "new layer can't take its input": (
        lambda m: stack(m, [kl.Flatten(), kl.Conv2D(3, 3, name="conv")]),
        r"new layer 'conv' \(Conv2D\) can't take its input of shape \(None, 512\)",
    ),
    "two ways in": (
        lambda m: replace(m, ["block1_conv2", "block2_conv1"], identity()),
        "one way in; 'block1_conv2', 'block2_conv1' have 2: 'block1_conv1' -> 'block1_conv2', "
        "'block1_pool' -> 'block2_conv1'",
    ),
    "name taken": (
        lambda m: stack(m, kl.Flatten(name="block1_conv1")),
        "The name 'block1_conv1' of a new layer is taken",
    ),
    "layer of another model": (
        lambda m: stack(m, used()),
        "'used' has been called before and belongs to another model",
    ),
    "subclassed model": (
        lambda m: truncate(Subclassed(name="mine"), "x"),
        r"'mine' is a subclassed model \(Subclassed\).*Functional and Sequential",
    ),
    "subclassed model to freeze": (lambda m: freeze_(Subclassed()), "is a subclassed model"),
    "not a model": (lambda m: truncate(3, "x"), "Expected a Keras model, received int"),
    "unbuilt Sequential": (
        lambda m: truncate(keras.Sequential([kl.Dense(3)], name="seq"), "dense"),
        "'seq' has no graph yet: it doesn't know its input shape",
    ),
    "stack on two outputs": (
        lambda m: stack(two_outputs(), kl.Dense(3)),
        r"stack needs a model with one output; 'two' has 2 \('a', 'b'\)",
    ),
    "two ways out": (
        lambda m: replace(two_outputs(), ["a", "b"], kl.Dense(3)),
        "one way out; 'a', 'b' have 2: 'a' -> the model's output, 'b' -> the model's output",
    ),
    "truncate at a shared layer": (
        lambda m: truncate(shared(), "shared"),
        "'shared' is shared, called 2 times, and so has 2",
    ),
    "remove a join": (
        lambda m: remove(shared(), "sum"),
        "can't take out 'sum': it joins 2 tensors \\(from 'only_a', 'shared'\\)",
    ),
    "remove everything": (
        lambda m: remove(two_outputs(), ["a", "b"]),
        "remove would leave no layer of 'two' but its inputs",
    ),
    "start that is gone around": (
        lambda m: truncate(shared(), "sum", start="only_a"),
        "starts at 'only_a' would be open: 'shared' -> 'sum' goes around it",
    ),
    "cut at a layer with several outputs": (
        lambda m: truncate(recurrent(), "lstm"),
        "truncate needs a layer with one output; 'lstm' has 3",
    ),
    "insert after a layer with several outputs": (
        lambda m: insert(recurrent(), "lstm", identity()),
        "insert needs a layer with one output; 'lstm' has 3",
    ),
    "new layer with several outputs": (
        lambda m: stack(residual(), [kl.Reshape((64, 4)), kl.GRU(2, return_state=True, name="g")]),
        r"new layer 'g' \(GRU\) must put out one tensor; it puts out 2",
    ),
    "branches that no longer fit together": (
        lambda m: replace(residual(), "relu", kl.Conv2D(5, 1)),
        r"'add' \(Add\) expects \[\(None, 8, 8, 4\), \(None, 8, 8, 4\)\] \(from 'relu', 'stem'\) "
        r"and would now get \[\(None, 8, 8, 5\), \(None, 8, 8, 4\)\]",
    ),
    "layer that can't be called again": (
        lambda m: insert(with_layer(Moody("good", name="mine")), "after", identity()),
        r"'mine' \(Moody\) can't be called again as it was: [\s\S]*not today",
    ),
    "layer without a config": (
        lambda m: insert(with_layer(Unwritten(name="mine")), "after", identity()),
        r"'mine' \(Unwritten\) can't be made again from its config, which saving needs too: no con",
    ),
    "layer with half a config": (
        lambda m: insert(with_layer(Forgetful(2, name="mine")), "after", identity()),
        r"'mine' \(Forgetful\) has 2 variables, but made again from its config it has 0",
    ),
    "unknown in unfreeze": (lambda m: unfreeze_(m, "block9"), "has no layer 'block9'"),
    "unknown in insert": (lambda m: insert(m, "block9", identity()), "has no layer 'block9'"),
    "unknown in replace": (lambda m: replace(m, "block9", identity()), "has no layer 'block9'"),
    "inputs of a replaced set": (
        lambda m: replace(shared(), ["shared", "sum"], identity()),
        "one way in; 'shared', 'sum' have 3: 'a' -> 'shared', .*'only_a' -> 'sum'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, vgg):
    model, _ = vgg
    operation, text = ERRORS[case]
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        operation(model)
    same_snapshot(before, snapshot(model))


def test_errors_leave_new_layers_unbuilt(vgg):
    model, _ = vgg
    new = kl.Conv2D(7, 3)
    with pytest.raises(ValueError, match="would now get"):
        replace(model, "block1_conv1", new)
    assert not new.built
    assert not new._inbound_nodes


def test_automatic_names_give_way(vgg):
    model, x = vgg
    first = stack(model, [kl.Flatten(), kl.Dense(4)])
    dense = kl.Dense(4)
    dense.name = first.layers[-1].name  # as if made in another session
    result = stack(first, dense)
    assert result.layers[-1] is dense
    assert len({layer.name for layer in result.layers}) == len(result.layers)
    equal(run(result, x), dense(run(first, x)))


# Many operations, one after another --------------------------------------------------------------


def small():
    """Branches, a shared layer, operations and a nested model on 8x8 images."""
    inputs = keras.Input((8, 8, 3), name="image")
    x = kl.Conv2D(6, 3, padding="same", name="stem")(inputs)
    left = kl.Conv2D(6, 3, padding="same", name="left")(x)
    right = kl.BatchNormalization(name="norm")(kl.Conv2D(6, 1, name="right")(x))
    x = kl.Add(name="join")([x, left, right])
    again = kl.DepthwiseConv2D(3, padding="same", name="again")
    x = keras.ops.relu(again(keras.ops.relu(again(x))))
    inside = keras.Input((8, 8, 6))
    x = keras.Model(inside, kl.Conv2D(6, 1, name="inner")(inside), name="nested")(x)
    x = kl.Concatenate(name="both")([x, kl.Dropout(0.5, name="drop")(x)])
    return keras.Model(inputs, kl.MaxPooling2D(name="pool")(x), name="small")


def spliced(model, x, changed):
    """Run `model` on `x` with the operations named in `changed` replaced by functions."""

    def operation_fn(op):
        def call(*args, **kwargs):
            if "training" in getattr(op, "_call_context_args", ()):
                kwargs["training"] = False
            return changed.get(op.name, lambda op, *args: op(*args, **kwargs))(op, *args)

        return call

    with torch.no_grad():
        return model._run_through_graph([x], operation_fn=operation_fn)


def step(model, x, data, count):
    """One random operation: (result, what it must compute for x) or a refusal."""
    names = [n for n, op in operations(model).items() if not isinstance(op, kl.InputLayer)]
    name = data.draw(st.sampled_from(names))
    verb = data.draw(
        st.sampled_from(["truncate", "insert", "remove", "replace", "stack", "freeze"])
    )
    new = data.draw(
        st.sampled_from(
            [
                lambda: kl.Activation("relu", name=f"new{count}"),
                lambda: kl.BatchNormalization(name=f"new{count}"),
                lambda: kl.Conv2D(6, 3, padding="same", name=f"new{count}"),
                lambda: kl.MaxPooling2D(2, padding="same", name=f"new{count}"),
            ]
        )
    )()
    first = lambda t: t[0] if isinstance(t, list) else t  # noqa: E731

    def apply(t):
        with torch.no_grad():
            return new(t, training=False)

    if verb == "truncate":
        return (
            truncate(model, name),
            (),
            lambda: run(keras.Model(model.input, output_of(model, name)), x),
        )
    if verb == "insert":
        result = insert(model, name, new)
        return result, [new], lambda: spliced(model, x, {name: lambda op, *args: apply(op(*args))})
    if verb == "remove":
        return (
            remove(model, name),
            (),
            lambda: spliced(model, x, {name: lambda op, *args: first(args[0])}),
        )
    if verb == "replace":
        result = replace(model, name, new)
        return (
            result,
            [new],
            lambda: spliced(model, x, {name: lambda op, *args: apply(first(args[0]))}),
        )
    if verb == "stack":
        return stack(model, new), [new], lambda: apply(run(model, x))
    freeze_(model, until=name)
    return truncate(model, model.output_names[0]), (), lambda: run(model, x)


@pytest.fixture(scope="module", params=["small", "vgg"])
def seed_model(request):
    if request.param == "small":
        return shake_(small()), images(8) / 255
    model, x = request.getfixturevalue("vgg")
    return truncate(model, "block2_pool"), x / 255


@hypothesis.settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
@hypothesis.given(data=st.data())
def test_any_sequence_of_operations_keeps_the_contract(seed_model, data):
    model, x = seed_model
    model = truncate(model, model.output_names[0])  # freeze_ works in place
    for count in range(6):
        before = snapshot(model)
        try:
            result, new, expected = step(model, x, data, count)
        except ValueError:
            same_snapshot(before, snapshot(model))
            continue
        check(model, result, new=new)
        equal(run(result, x), expected())
        model = result
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    equal(run(clone, x), run(model, x))


# Replacements that keep the network working -------------------------------------------------------


def linear_chain():
    """Two convolutions without an activation between them, and something that follows."""
    x = inputs = keras.Input((16, 16, 3))
    x = kl.Conv2D(4, 3, name="one")(x)
    x = kl.Conv2D(5, 3, activation="relu", name="two")(x)
    return keras.Model(inputs, kl.MaxPooling2D(name="pool")(x))


def test_replace_by_the_composition_of_a_linear_chain_changes_nothing():
    model = linear_chain()
    new = kl.Conv2D(5, 5, activation="relu", name="both")
    result = replace(model, ["one", "two"], new, init="compose")
    x = images(16)
    torch.testing.assert_close(run(result, x), run(model, x), rtol=1e-4, atol=1e-4)


def test_replace_with_a_fit_comes_closer_than_without():
    model, x = linear_chain(), images(16, 40)
    names, shown = ["one", "two"], np.asarray(x)
    layers = [kl.Conv2D(5, 5, activation="relu", name="both") for _ in range(2)]
    results = [
        replace(model, names, layers[0]),
        replace(model, names, layers[1], init="fit", images=shown),
    ]
    errors = [float((run(result, x) - run(model, x)).square().mean()) for result in results]
    assert errors[1] < 1e-3 * errors[0]


@pytest.mark.parametrize(
    ("new", "options", "message"),
    [
        (1, {"init": "copy"}, "expects init=None, 'compose' or 'fit', received 'copy'"),
        (1, {"init": "fit"}, "images with init='fit' and only there; received init='fit' without"),
        (1, {"images": np.zeros(3)}, "received init=None with images"),
        (2, {"init": "compose"}, "needs one new layer, received 2"),
    ],
)
def test_replace_refuses_what_its_init_cannot_do(new, options, message):
    layers = [kl.Conv2D(5, 5, padding="valid"), kl.Activation("relu")][:new]
    with pytest.raises(ValueError, match=message):
        replace(linear_chain(), ["one", "two"], layers, **options)
