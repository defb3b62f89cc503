from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch

from vggtorch import surgery
from vggtorch.keras_graph import calls_of, producer
from vggtorch.surgery import distillation, examples

L = keras.layers
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def vgg(block: str = "relu") -> keras.Model:
    """The first blocks of a VGG, small, with random weights."""
    x = inputs = keras.Input((16, 16, 3))
    for name, width, depth in (("block1", 8, 2), ("block2", 12, 2), ("block3", 16, 1)):
        for n in range(1, depth + 1):
            x = L.Conv2D(width, 3, padding="same", activation=block, name=f"{name}_conv{n}")(x)
        x = L.MaxPooling2D(name=f"{name}_pool")(x)
    return keras.Model(inputs, x)


def images(number: int = 30, size: int = 16) -> np.ndarray:
    """Images that are smooth, as photographs are, which makes the problem ill-conditioned."""
    rng = np.random.default_rng(2)
    noise = rng.normal(size=(number, size, size, 3)).astype("float32")
    return 100 * (noise.cumsum(1).cumsum(2) / size + 0.05 * noise)


@pytest.fixture(scope="module")
def original() -> keras.Model:
    keras.utils.set_random_seed(0)
    return vgg()


def replaced(original: keras.Model, *new: keras.Layer) -> tuple[keras.Model, list[str]]:
    result = surgery.replace(original, ["block1_conv1", "block1_conv2"], list(new))
    return result, [layer.name for layer in new]


def states(model: keras.Model) -> dict[str, np.ndarray]:
    return {v.path: keras.ops.convert_to_numpy(v) for v in model.variables}


def conv(size: int = 5, **options: Any) -> keras.Layer:
    options = {"padding": "same", "activation": "relu", "name": "block1_conv"} | options
    return L.Conv2D(8, size, **options)


def cosine(original: keras.Model, result: keras.Model, pixels: np.ndarray) -> float:
    a = original.predict(pixels, verbose=0).reshape(len(pixels), -1)
    b = result.predict(pixels, verbose=0).reshape(len(pixels), -1)
    return float(np.mean((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)))


def test_distillation_recovers_a_layer_that_can_be_matched_exactly(original):
    keras.utils.set_random_seed(1)
    result = surgery.replace(
        original,
        "block2_conv1",
        new := L.Conv2D(12, 3, padding="same", activation="relu", name="new"),
    )
    found = surgery.distill_(original, result, ["new"], images(), steps=0)
    assert found.start in ("least squares", "compose")
    assert found.steps == 0
    expected = original.get_layer("block2_conv1").get_weights()
    for a, b in zip(expected, new.get_weights(), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-3)
    assert found.after["block3_pool"] > 0.9999


NEW = {
    "5x5": lambda: [conv()],
    "7x7": lambda: [conv(7)],
    "no bias": lambda: [conv(use_bias=False)],
    "separable": lambda: [
        L.SeparableConv2D(8, 5, padding="same", activation="relu", depth_multiplier=4, name="new")
    ],
    "bottleneck": lambda: [
        L.Conv2D(6, 5, padding="same", use_bias=False, name="narrow"),
        L.BatchNormalization(name="norm"),
        L.Activation("relu", name="relu"),
        L.Conv2D(8, 1, activation="relu", name="wide"),
    ],
    "grouped": lambda: [
        L.Conv2D(9, 5, padding="same", groups=3, name="groups"),
        L.Conv2D(8, 1, activation="relu", name="mix"),
    ],
}


@pytest.mark.parametrize("new", NEW.values(), ids=NEW)
def test_any_replacement_gets_better_and_alone_changes(original, new):
    keras.utils.set_random_seed(1)
    result, names = replaced(original, *new())
    before, untouched = states(result), states(original)
    found = surgery.distill_(original, result, names, images(), steps=100)

    assert found.after["block3_pool"] > max(0.9, found.before["block3_pool"])
    assert found.steps == 100
    for path, value in states(original).items():
        np.testing.assert_array_equal(value, untouched[path])
    changed = {
        path.split("/")[0] for path, v in states(result).items() if (v != before[path]).any()
    }
    assert changed == {layer for layer in names if result.get_layer(layer).trainable_variables}
    variables = [*original.variables, *result.variables]
    assert all(v.value.requires_grad == v.trainable for v in variables)
    # What it says of images it has not seen holds of others that it has not seen.
    unseen = images(50)[30:]
    assert abs(cosine(original, result, unseen) - found.after["block3_pool"]) < 0.03


def test_a_seed_decides_the_result(original):
    weights = []
    for seed in (3, 3, 4):
        keras.utils.set_random_seed(1)
        result, names = replaced(original, conv())
        surgery.distill_(original, result, names, images(), steps=30, seconds=1e6, seed=seed)
        weights.append(result.get_layer("block1_conv").get_weights()[0])
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).any()


@pytest.mark.parametrize("add", [lambda *x: L.Add()(x), keras.ops.add])
def test_a_region_with_branches_inside_can_be_distilled(add):
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((16, 16, 3))
    x = L.Conv2D(8, 3, padding="same", activation="relu", name="stem")(x)
    a = L.Conv2D(8, 3, padding="same", name="left")(x)
    x = add(a, x)
    joined = producer(x).name
    x = L.Conv2D(8, 3, strides=2, padding="same", activation="relu", name="after")(x)
    model = keras.Model(inputs, L.Dense(4, name="head")(L.Flatten(name="flat")(x)))
    new = L.Conv2D(8, 3, padding="same", name="new")
    result = surgery.replace(model, ["left", joined], new)
    found = surgery.distill_(model, result, ["new"], images(), steps=0)
    assert found.start == "least squares"  # a branch can't be composed
    assert found.after["after"] > 0.9999  # the way around is a 1x1 identity, so one layer can do it
    assert list(found.after) == ["after", "head"]


def test_channels_first_gives_the_same(original):
    keras.config.set_image_data_format("channels_first")
    try:
        x = inputs = keras.Input((3, 16, 16))
        for layer in original.layers[1:]:
            x = type(layer).from_config(layer.get_config() | {"data_format": "channels_first"})(x)
        first = keras.Model(inputs, x)
        first.set_weights(original.get_weights())
        new = conv(data_format="channels_first")
        result = surgery.replace(first, ["block1_conv1", "block1_conv2"], new)
        found = surgery.distill_(
            first, result, ["block1_conv"], images().transpose(0, 3, 1, 2), steps=5
        )
    finally:
        keras.config.set_image_data_format("channels_last")
    last, names = replaced(original, other := conv())
    expected = surgery.distill_(original, last, names, images(), steps=5)
    assert found.after == pytest.approx(expected.after, abs=1e-3)
    for a, b in zip(new.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.05, atol=0.01)


def test_distillation_ends_on_its_best_weights(original, monkeypatch):
    """A learning rate that ruins everything leaves the start, and stops early."""
    keras.utils.set_random_seed(1)
    result, names = replaced(original, conv())
    monkeypatch.setattr(distillation, "LEARNING_RATE", 1e6)
    found = surgery.distill_(original, result, names, images(), steps=10_000)
    assert found.steps == distillation.CHECK * distillation.PATIENCE
    assert found.after == pytest.approx(found.before, abs=1e-5)


@pytest.mark.parametrize(("steps", "expected"), [(0, 64), (5, 80), (10_000, 320)])
def test_no_more_crops_are_drawn_than_the_steps_will_see(original, monkeypatch, steps, expected):
    result, names = replaced(original, conv())
    drawn: list[int] = []
    crops = examples.crops

    def count(source, which, *args):
        drawn.append(len(which))
        return crops(source, which, *args)

    monkeypatch.setattr(examples, "crops", count)
    surgery.distill_(original, result, names, images(), steps=steps, seconds=0.0)
    one, trained_on, held_out = drawn
    assert (one, trained_on, held_out) == (1, expected, 64)


def test_time_that_has_run_out_ends_a_distillation(original):
    result, names = replaced(original, conv())
    assert surgery.distill_(original, result, names, images(), seconds=0.0).steps == 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"new_layers": ["nope"]}, "has no layer 'nope'. Its layers: input"),
        ({"new_layers": ["block1_pool"]}, "expected one layer, which the original has too"),
        ({"match": ["block1_conv"]}, r"Not among them: \['block1_conv'\]"),
        ({"match": ["nope"]}, "has no layer 'nope'. Its layers: input"),
        ({"match": []}, r"Received match=\[\]; expected layers behind the new ones"),
        ({"images": images(9)}, "Received 9 images; expected 10 at least"),
        (
            {"images": images()[..., :2]},
            r"of shape \(30, 16, 16, 2\); expected \(None, 16, 16, 3\)",
        ),
        (
            {"images": [*images(9), *images(1, size=8)]},
            r"images of 2 shapes, such as \(8, 8, 3\) and \(16, 16, 3\); expected one",
        ),
        ({"images": np.full((10, 16, 16, 3), np.nan)}, "Received images with NaN or infinite"),
        ({"images": "photos"}, "Received the path 'photos' for images"),
        ({"steps": -1}, "Received steps=-1; expected a whole number from 0"),
        ({"steps": 0.5}, "Received steps=0.5; expected a whole number from 0"),
        ({"seconds": float("nan")}, "Received seconds=nan; expected a number from 0"),
        ({"seed": -1}, "Received seed=-1; expected a whole number from 0"),
    ],
)
def test_what_cannot_be_distilled_says_why(original, changed, message):
    result, names = replaced(original, conv())
    arguments = {"new_layers": names, "images": images()} | changed
    with pytest.raises(ValueError, match=message):
        surgery.distill_(original, result, **arguments)


def test_layers_without_weights_cannot_be_distilled(original):
    result = surgery.insert(original, "block1_conv1", L.Activation("relu", name="again"))
    with pytest.raises(ValueError, match=r"\['again'\] have no trainable weights to distill into"):
        surgery.distill_(original, result, ["again"], images())


@pytest.mark.parametrize(
    "new",
    [
        lambda: L.PReLU("ones", shared_axes=(1, 2), name="new"),
        lambda: L.BatchNormalization(name="new"),
        lambda: L.Conv2DTranspose(3, 3, padding="same", name="new"),
        lambda: L.DepthwiseConv2D(3, padding="same", activation="relu", name="new"),
    ],
)
def test_other_layers_than_products_can_be_distilled_even_first_of_all(new):
    """Here in place of an activation, which leaves least squares nothing to aim at."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((16, 16, 3))
    x = L.ReLU(name="first")(x)
    model = keras.Model(inputs, L.Conv2D(4, 3, strides=2, name="last")(x))
    result = surgery.replace(model, "first", new())
    found = surgery.distill_(model, result, "new", images(), steps=50)
    assert found.start == "own"
    assert found.after["last"] > found.before["last"]


def test_an_activation_behind_another_can_be_replaced_alone():
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((16, 16, 3))
    x = L.Activation("tanh", name="second")(L.ReLU(name="first")(x))
    model = keras.Model(inputs, L.Conv2D(4, 3, strides=2, name="last")(x))
    new = L.Conv2D(3, 1, name="new")
    result = surgery.replace(model, "second", new)
    before = [(len(calls_of(op)), len(op._outbound_nodes)) for op in model.operations]
    found = surgery.distill_(model, result, "new", images() / 100, steps=0)
    assert found.start == "least squares"
    assert found.after["last"] > 0.8
    assert before == [(len(calls_of(op)), len(op._outbound_nodes)) for op in model.operations]


def test_what_cannot_be_composed_can_be_distilled(original):
    keras.utils.set_random_seed(1)
    new = L.Conv2D(8, 4, strides=2, padding="same", activation="relu", name="new")
    result = surgery.replace(original, ["block1_conv2", "block1_pool"], new)
    found = surgery.distill_(original, result, "new", images(), steps=50)
    assert found.start == "least squares"
    assert found.after["block3_pool"] > 0.95


def test_a_sequential_model_can_be_distilled():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            L.Conv2D(4, 3, name="one"),
            L.Conv2D(4, 3, name="two"),
            L.GlobalAveragePooling2D(name="mean"),
        ]
    )
    new = L.Conv2D(4, 5, name="new")
    result = surgery.replace(model, ["one", "two"], new)
    found = surgery.distill_(model, result, "new", images(), steps=0)
    assert found.start in ("least squares", "compose")  # both are exact
    assert found.after["mean"] > 0.99999


def test_names_may_come_alone_and_in_any_order(original):
    found = []
    for names, match in (
        (["block1_conv"], ["block1_pool", "block2_pool"]),
        ("block1_conv", ("block2_pool", "block1_pool")),
        ("block1_conv", "block2_pool"),
    ):
        keras.utils.set_random_seed(1)
        result, _ = replaced(original, conv())
        found.append(surgery.distill_(original, result, names, images(), match=match, steps=3))
    assert found[0].after == found[1].after
    assert list(found[2].after) == ["block2_pool", "block3_pool"]


def test_the_loss_sees_the_maps_in_order_and_decides(original):
    shapes = set()

    def first_alone(outputs, targets):
        shapes.add(tuple(y.shape[1:] for y in outputs))
        return (outputs[0] - targets[0]).square().mean()

    found = {}
    for loss in (surgery.relative_error, first_alone):
        keras.utils.set_random_seed(1)
        result, names = replaced(original, conv())
        found[loss] = surgery.distill_(original, result, names, images(), loss=loss, steps=100)
    assert shapes == {((8, 8, 8), (12, 4, 4), (16, 2, 2))}
    default, other = found.values()
    assert other.after["block1_pool"] > default.after["block1_pool"]


def test_the_relative_error_is_of_each_map_and_grows_with_depth():
    target = [torch.full((1, 2, 3, 3), 10.0), torch.full((1, 4, 2, 2), 0.1)]
    one = surgery.relative_error([target[0] * 1.1, target[1]], target)
    other = surgery.relative_error([target[0], target[1] * 1.1], target)
    assert float(one) == pytest.approx(0.1 / 4, rel=1e-4)
    assert float(other) == pytest.approx(0.1 * 3 / 4, rel=1e-4)


def join(x: Any, side: Any) -> Any:
    return L.Add(name="join")([x, L.Conv2D(4, 1, name="side")(side)])


def test_new_layers_with_two_ways_out_cannot_be_distilled():
    inputs = keras.Input((16, 16, 3))
    one = L.Conv2D(4, 3, padding="same", name="one")(inputs)
    two = L.Conv2D(4, 3, padding="same", name="two")(one)
    model = keras.Model(inputs, join(two, one))
    with pytest.raises(ValueError, match=r"are left from \['one', 'two'\]; expected one way out"):
        surgery.distill_(model, model, ["one", "two"], images())


def test_new_layers_with_two_ways_in_cannot_be_distilled():
    inputs = keras.Input((16, 16, 3))
    one = L.Conv2D(4, 3, padding="same", name="one")(inputs)
    model = keras.Model(inputs, join(one, inputs))
    with pytest.raises(
        ValueError, match=r"take their input from \['input.*', 'one'\]; expected one"
    ):
        surgery.distill_(model, model, ["join", "side"], images())


def of_policy(policy: str) -> tuple[keras.Model, keras.Model]:
    """A network, and the same with a batch norm and a convolution in place of two layers."""
    dtype: Any = {"dtype": policy}
    x = inputs = keras.Input((16, 16, 3))
    for name in ("one", "two"):
        x = L.Conv2D(8, 3, padding="same", activation="relu", name=name, **dtype)(x)
    model = keras.Model(inputs, L.MaxPooling2D(name="pool", **dtype)(x))
    new = [L.BatchNormalization(name="norm", **dtype)]
    new.append(L.Conv2D(8, 5, padding="same", activation="relu", name="new", **dtype))
    result = surgery.replace(model, ["one", "two"], new)
    rng = np.random.default_rng(0)
    for layer in (*model.layers, new[1]):
        if isinstance(layer, L.Conv2D):  # the same in every dtype
            layer.kernel.assign(rng.normal(0, 0.2, layer.kernel.shape))
    return model, result


@pytest.mark.parametrize("policy", ["float64", "bfloat16", "mixed_bfloat16"])
def test_other_dtypes_are_distilled_as_float32_is(policy):
    after = [
        surgery.distill_(*of_policy(p), ["norm", "new"], images(), steps=75).after["pool"]
        for p in ("float32", policy)
    ]
    assert after[1] == pytest.approx(after[0], abs=0.01)


def test_float16_is_refused():
    with pytest.raises(ValueError, match="computes in float16, in which the gradients"):
        surgery.distill_(*of_policy("mixed_float16"), ["norm", "new"], images())


def test_networks_of_other_numbers_of_outputs_cannot_be_distilled(original):
    result, names = replaced(original, conv())
    both = keras.Model(original.inputs, [original.get_layer("block1_pool").output, original.output])
    with pytest.raises(ValueError, match="original has 2 outputs, the result 1; expected the same"):
        surgery.distill_(both, result, names, images())


def test_messages_list_layers_in_the_order_of_the_network() -> None:
    inputs = keras.Input((16, 16, 3))
    b = L.Conv2D(4, 3, name="b")(inputs)
    c = L.Conv2D(4, 3, name="c")(inputs)
    model = keras.Model(inputs, L.Add(name="a")([b, c]))
    with pytest.raises(ValueError, match=r"b, c, a\."):
        surgery.distill_(model, model, ["nope"], images())
    with pytest.raises(ValueError, match=r"are left from \['b', 'c'\]"):
        surgery.distill_(model, model, ["c", "b"], images())
    with pytest.raises(ValueError, match=r"layers \['a'\] take their input from \['b', 'c'\]"):
        surgery.distill_(model, model, ["a"], images())


def test_a_new_layer_that_was_not_named_is(original):
    result, _ = replaced(original, conv(name="first"), conv(3, name="second"))
    with pytest.raises(
        ValueError, match="'second' comes after the new layers and is not in the or"
    ):
        surgery.distill_(original, result, ["first"], images())


@pytest.mark.parametrize("new", ["shared", "before", "behind"])
def test_layers_that_are_called_twice_cannot_be_distilled(new):
    shared = L.Conv2D(4, 3, padding="same", name="shared")
    x = inputs = keras.Input((16, 16, 3))
    x = L.Conv2D(4, 3, padding="same", name="before")(x)
    x = shared(L.ReLU(name="between")(shared(x)))
    model = keras.Model(inputs, L.Conv2D(4, 3, name="behind")(x))
    message = "'shared' is called 2 times; expected the new layers, the one before them and those"
    with pytest.raises(ValueError, match=message):
        surgery.distill_(model, model, [new], images())


def test_a_network_with_two_inputs_cannot_be_distilled():
    a, b = keras.Input((16, 16, 3)), keras.Input((16, 16, 3))
    model = keras.Model([a, b], join(L.Conv2D(4, 3, padding="same", name="new")(a), b))
    with pytest.raises(ValueError, match="Received a model with 2 inputs; expected one"):
        surgery.distill_(model, model, ["new"], images())


def test_the_last_layers_of_a_network_can_be_distilled(original):
    cut = surgery.truncate(original, "block1_conv2")
    keras.utils.set_random_seed(1)
    result, names = replaced(cut, conv())
    found = surgery.distill_(cut, result, names, images(), steps=30)
    assert list(found.after) == ["block1_conv"]
    assert found.after["block1_conv"] > max(0.9, found.before["block1_conv"])


def test_dense_layers_can_be_distilled():
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((6, 6, 3))
    x = L.GlobalAveragePooling2D(name="pool")(x)
    x = L.Dense(8, name="one")(x)
    x = L.Activation("tanh", name="tanh")(L.Dense(5, name="two")(x))
    model = keras.Model(inputs, L.Dense(4, name="head")(x))
    new = [L.Dense(5, name="new"), L.Activation("tanh", name="new_tanh")]
    result = surgery.replace(model, ["one", "two", "tanh"], new)
    found = surgery.distill_(model, result, ["new", "new_tanh"], images(30, size=6), steps=0)
    assert found.start in ("least squares", "compose")
    assert found.after["head"] > 0.9999
