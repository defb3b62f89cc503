"""Each private part of Keras that vggtorch uses is there, and does what vggtorch takes it to do.

A Keras release that changes one of them fails here first, by its name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers as kl

from vggtorch import keras_graph

PACKAGE = Path(keras_graph.__file__).parent
BENCHMARKS = PACKAGE.parent / "benchmarks"


def network() -> keras.Model:
    """A layer called twice, an operation without weights, and two branches that meet."""
    inputs = keras.Input((4,), name="in")
    dense = kl.Dense(4, name="dense")
    x = dense(dense(inputs))
    y = kl.Dropout(0.5, seed=3, name="drop")(x)
    return keras.Model({"in": inputs}, [kl.Add(name="sum")([x, y]), keras.ops.relu(x)])


def chain(built: bool = True) -> keras.Sequential:
    given = [keras.Input((4,)), kl.Dense(2, name="dense")]
    return keras.Sequential(given[not built :], name="chain")


# The parts, each with a check that fails if Keras has changed it


def check_functional_of_a_sequential() -> None:
    assert keras_graph.functional(chain(built=False)) is None
    graph = keras_graph.functional(chain())
    assert isinstance(graph, keras_graph.Functional)
    assert [operation.name for operation in graph.operations][1:] == ["dense"]


def check_nodes_by_depth() -> None:
    model = network()
    calls = keras_graph.calls(model)
    names = [node.operation.name for node in calls]
    assert names[:4] == ["in", "dense", "dense", "drop"]
    assert sorted(names[4:]) == sorted(["sum", keras_graph.producer(model.outputs[1]).name])
    made: set[int] = set()
    for node in calls:
        assert isinstance(node, keras_graph.Node)
        assert node.is_input or {id(t) for t in node.input_tensors} <= made
        made |= {id(t) for t in node.outputs}


def check_inbound_nodes() -> None:
    dense = network().get_layer("dense")
    first, second = keras_graph.calls_of(dense)
    assert keras_graph.producing_call(second.outputs[0]) is second
    assert keras_graph.producing_call(second.input_tensors[0]) is first


def check_history() -> None:
    model = network()
    assert keras_graph.producer(model.outputs[0]) is model.get_layer("sum")


def check_copies_of_operations() -> None:
    relu = keras_graph.producer(network().outputs[1])
    copied = keras_graph.operation_copy(relu)
    assert type(copied) is type(relu) and not keras_graph.calls_of(copied)
    assert len(keras_graph.calls_of(relu)) == 1
    copied(keras.Input((4,)))
    assert len(keras_graph.calls_of(copied)) == 1


def check_fill_in() -> None:
    node = keras_graph.calls_of(network().get_layer("sum"))[0]
    values = dict(zip(map(id, node.input_tensors), "ab", strict=True))
    assert keras_graph.filled(node, values) == ((["a", "b"],), {})


def check_constructor() -> None:
    class Own(keras.Model):
        def __init__(self) -> None:
            inputs = keras.Input((4,))
            super().__init__(inputs, kl.Dense(2)(inputs))

    assert keras_graph.is_plain_functional(network())
    assert not keras_graph.is_plain_functional(Own())
    assert not keras_graph.is_plain_functional(chain())


def check_structures() -> None:
    model = network()
    assert list(keras_graph.input_structure(model)) == ["in"]
    assert keras_graph.output_structure(model) == model.outputs


def check_standardized_inputs() -> None:
    (x,) = keras_graph.standardize_inputs(network(), {"in": np.zeros((2, 4), "float64")})
    assert isinstance(x, torch.Tensor) and x.dtype == torch.float32


def check_call_in_the_instance(tmp_path: Path) -> None:
    model = chain()
    x = np.ones((1, 4), "float32")
    own = model.predict(x, verbose=0)
    keras_graph.override_call_(model, lambda x, training=None, mask=None: x * 2)
    np.testing.assert_array_equal(model.predict(x, verbose=0), 2 * x)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), own)
    keras_graph.override_call_(model, None)
    model.make_predict_function(force=True)
    np.testing.assert_array_equal(model.predict(x, verbose=0), own)


def check_flatten_layers() -> None:
    outer = keras.Sequential([keras.Input((4,)), chain()])
    names = [layer.name for layer in keras_graph.all_layers(outer)]
    assert names[0] == outer.name and names.index("chain") < names.index("dense")
    assert outer.name not in [x.name for x in keras_graph.all_layers(outer, include_self=False)]


def check_layers_as_given() -> None:
    first, second = keras_graph.layers_as_given(chain())
    assert isinstance(first, kl.InputLayer) and second.name == "dense"


def check_training_argument() -> None:
    assert keras_graph.reads_training(kl.Dropout(0.5))
    assert not keras_graph.reads_training(kl.Flatten())
    assert not keras_graph.reads_training(keras_graph.producer(network().outputs[1]))


def check_training_context() -> None:
    class Hands(kl.Layer):
        """Its `call` has no argument `training`; the Dropout inside has."""

        def __init__(self) -> None:
            super().__init__()
            self.drop = kl.Dropout(0.9, seed=1)

        def call(self, x: Any) -> Any:
            return self.drop(x)

    layer, x = Hands(), torch.ones(100)
    for training in (True, False):
        with keras_graph.training_context(layer, training):
            assert bool((layer(x) == 0).any()) == training
    assert not bool((layer(x) == 0).any())


def check_masks() -> None:
    tokens = keras.Input((3,), dtype="int32")
    assert keras_graph.keras_mask(kl.Embedding(5, 2, mask_zero=True)(tokens)) is not None
    assert keras_graph.keras_mask(kl.Embedding(5, 2)(tokens)) is None
    mask = keras_graph.keras_mask(kl.Embedding(5, 2, mask_zero=True)(torch.tensor([[1, 0]])))
    assert mask is not None and mask.tolist() == [[True, False]]


def check_operation_kinds() -> None:
    x = keras.Input((4,))
    assert keras_graph.operation_kind(keras_graph.producer(x + x)) == "Add"
    assert keras_graph.operation_kind(keras_graph.producer(x * 2.0)) == "Multiply"
    assert keras_graph.operation_kind(keras_graph.producer(keras.ops.relu(x))) == "Relu"
    assert keras_graph.operation_kind(kl.Add()) is None


def check_rematerialization() -> None:
    assert not keras_graph.rematerializes(kl.Dense(2))
    with keras.RematScope():
        assert keras_graph.rematerializes(kl.Dense(2))


def check_seed_generators() -> None:
    assert keras_graph.seed_generators(kl.Dropout(0.5))
    assert not keras_graph.seed_generators(kl.Dense(2))
    with keras.device("meta"):
        (generator,) = keras_graph.seed_generators(kl.Dropout(0.5, seed=3))
    assert keras_graph.raw_value(generator.state).is_meta
    keras_graph.reset_seed_(generator)
    (expected,) = keras_graph.seed_generators(kl.Dropout(0.5, seed=3))
    assert torch.equal(generator.state.value, expected.state.value)


def check_given_seed_generators() -> None:
    layer = kl.Dropout(0.0)
    assert not keras_graph.seed_generators(layer)
    generator = keras.random.SeedGenerator(3)
    keras_graph.give_seed_generator_(layer, "seed_generator", generator)
    layer.rate = 0.5
    assert list(keras_graph.seed_generators(layer)) == [generator]
    assert 0 in layer(torch.ones(1, 100), training=True)


def check_own_variables() -> None:
    inputs = keras.Input((4,))
    model = keras.Model(inputs, kl.BatchNormalization(name="norm")(inputs))
    assert len(keras_graph.own_variables(model.get_layer("norm"))) == 4
    assert not keras_graph.own_variables(model)
    norm = model.get_layer("norm")
    norm.trainable = False  # which leaves what it learns and what it counts what they are
    assert keras_graph.state_of(model) == [norm.moving_mean, norm.moving_variance]


def check_lambda() -> None:
    assert keras_graph.lambda_output_shape(kl.Lambda(abs, output_shape=(7,))) == (7,)


def check_safe_mode() -> None:
    config = kl.Lambda(lambda x: x).get_config()
    with pytest.raises(ValueError, match="safe"):
        kl.Lambda.from_config(config)
    with keras_graph.safe_mode_off():
        kl.Lambda.from_config(config)


def check_values_and_parameters() -> None:
    model = chain()
    kernel, value = model.layers[0].kernel, torch.rand(4, 2)
    keras_graph.set_value_(kernel, value, requires_grad=False)
    assert keras_graph.raw_value(kernel).data_ptr() == value.data_ptr()
    assert not any(p is keras_graph.raw_value(kernel) for p in model.parameters())
    for layer in keras_graph.all_layers(model):
        keras_graph.track_variables_(layer)
    assert any(p is keras_graph.raw_value(kernel) for p in model.parameters())
    keras_graph.track_variables_(kl.Dense(2))  # one that isn't built


def check_stateless_scope() -> None:
    assert not keras_graph.in_stateless_scope()
    with keras.StatelessScope():
        assert keras_graph.in_stateless_scope()


def check_device() -> None:
    assert str(keras.ops.convert_to_tensor(0.0).device) == keras_graph.device()


def check_snake_case() -> None:
    assert keras_graph.to_snake_case("Conv2D") + "_" in kl.Conv2D(2, 3).name + "_"


def check_input_shapes() -> None:
    arguments: dict[str, Any] = {
        "default_size": 224,
        "min_size": 32,
        "data_format": "channels_last",
        "require_flatten": False,
    }
    assert keras_graph.obtain_input_shape(None, weights=None, **arguments) == (None, None, 3)
    with pytest.raises(ValueError, match="at least 32x32"):
        keras_graph.obtain_input_shape((8, 8, 3), weights=None, **arguments)


def check_layer_scale() -> None:
    layer = keras_graph.LayerScale(0.5, 3)
    assert torch.allclose(layer(torch.ones(1, 3)), torch.full((1, 3), 0.5))


PARTS: dict[str, Callable[..., None]] = {
    "_functional": check_functional_of_a_sequential,
    "Functional": check_functional_of_a_sequential,
    "_nodes_by_depth": check_nodes_by_depth,
    "Node": check_nodes_by_depth,
    "_inbound_nodes": check_inbound_nodes,
    "_keras_history": check_history,
    "_outbound_nodes": check_copies_of_operations,
    "fill_in": check_fill_in,
    "functional_like_constructor": check_constructor,
    "_inputs_struct": check_structures,
    "_outputs_struct": check_structures,
    "_standardize_inputs": check_standardized_inputs,
    "call in the instance": check_call_in_the_instance,
    "_flatten_layers": check_flatten_layers,
    "_layers": check_layers_as_given,
    "_call_has_training_arg": check_training_argument,
    "CallContext": check_training_context,
    "_clear_losses": check_training_context,
    "current_call_ctx": check_training_context,
    "global_state": check_training_context,
    "get_keras_mask": check_masks,
    "keras.src.ops.numpy": check_operation_kinds,
    "keras.src.ops.nn": check_operation_kinds,
    "_seed_generators": check_seed_generators,
    "_remat_mode": check_rematerialization,
    "_tracker": check_given_seed_generators,
    "_initial_seed": check_seed_generators,
    "_initialize": check_seed_generators,
    "_trainable_variables": check_own_variables,
    "_non_trainable_variables": check_own_variables,
    "_output_shape": check_lambda,
    "SafeModeScope": check_safe_mode,
    "_value": check_values_and_parameters,
    "_torch_params": check_values_and_parameters,
    "_track_variables": check_values_and_parameters,
    "in_stateless_scope": check_stateless_scope,
    "get_device": check_device,
    "to_snake_case": check_snake_case,
    "obtain_input_shape": check_input_shapes,
    "LayerScale": check_layer_scale,
}


@pytest.mark.parametrize("part", PARTS)
def test_keras_still_has_what_vggtorch_uses(part: str, tmp_path: Path) -> None:
    check = PARTS[part]
    check(*[tmp_path] * check.__code__.co_argcount)


# No other file uses them


def private_names(path: Path) -> Iterator[str]:
    """What a file imports from keras.src, and Keras's private attributes that it reads."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras.src"):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("keras.src"))
        elif isinstance(node, ast.Attribute) and node.attr == "fill_in":
            yield node.attr
        elif isinstance(node, ast.keyword) and (node.arg or "").startswith("_"):
            yield str(node.arg)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            of_its_own = isinstance(node.value, ast.Name) and node.value.id == "self"
            if not (node.attr.startswith("__") or of_its_own):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            named = re.fullmatch(r"_[a-z]\w+", text)
            if named or text.startswith("keras.src") or text == "current_call_ctx":
                yield text


def test_every_private_part_is_named_here() -> None:
    used = set(private_names(Path(keras_graph.__file__)))
    assert used == set(PARTS) - {"call in the instance"}


@pytest.mark.parametrize(
    "path",
    sorted({*PACKAGE.rglob("*.py"), *BENCHMARKS.glob("*.py")} - {Path(keras_graph.__file__)}),
    ids=lambda path: str(path.relative_to(PACKAGE.parent)),
)
def test_no_other_file_uses_private_parts_of_keras(path: Path) -> None:
    tree = ast.parse(path.read_text())
    modules = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert not [name for name in modules if name.startswith("keras.src")]
    underscored = {part for part in PARTS if part.startswith("_")}
    assert not underscored & set(private_names(path))


# What keras_graph makes of them


def test_calls_come_in_the_order_of_the_layers() -> None:
    inputs = keras.Input((8, 8, 3))
    branches = [kl.Conv2D(2, 1, name=f"branch{n}")(inputs) for n in range(5)]
    model = keras.Model(inputs, kl.Concatenate(name="join")(branches))
    names = [node.operation.name for node in keras_graph.calls(model)]
    assert names == [layer.name for layer in model.layers]


@pytest.mark.parametrize("size", [1, 5, 8, 9])
@pytest.mark.parametrize(
    ("window", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (2, 3, 1), (3, 1, 2)]
)
def test_padding_same_is_kerass(size: int, window: int, stride: int, dilation: int) -> None:
    x = np.random.default_rng(0).normal(size=(1, size, 1)).astype("float32")
    kernel = np.random.default_rng(1).normal(size=(window, 1, 1)).astype("float32")
    options = {"strides": stride, "dilation_rate": dilation}
    before, after = keras_graph.same_padding(size, window, stride, dilation)
    padded = np.pad(x, ((0, 0), (before, after), (0, 0)))
    found = keras.ops.conv(padded, kernel, padding="valid", **options)
    expected = keras.ops.conv(x, kernel, padding="same", **options)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("own", [True, False])
def test_scale_and_shift_are_batch_norms(own: bool) -> None:
    layer = kl.BatchNormalization(scale=own, center=own)
    layer.build((None, 3))
    for variable in layer.variables:
        variable.assign(np.random.default_rng(0).uniform(0.5, 2, 3))
    gamma, beta = (layer.gamma.value, layer.beta.value) if own else (None, None)
    scale, shift = keras_graph.scale_and_shift(
        layer.moving_mean.value, layer.moving_variance.value, layer.epsilon, gamma, beta
    )
    x = torch.rand(4, 3)
    torch.testing.assert_close(x * scale + shift, layer(x, training=False))
