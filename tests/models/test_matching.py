"""Files of any layers, under other names too, go into the weights that Keras loads them into."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
import torch
from keras import layers
from written import write

import vggtorch as vt

FORMS = ["keras", "h5", "weights.h5", "safetensors", "pth", "bin"]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGGTORCH_HOME", str(tmp_path / "home"))


@pytest.fixture(autouse=True)
def _other_names() -> Iterator[None]:
    """Automatic names of a test begin anew, as those of a new process do."""
    keras.utils.clear_session(free_memory=False)
    yield


def filled(model: keras.Model) -> keras.Model:
    generator = np.random.default_rng(0)
    for variable in vt.named_variables(model).values():
        variable.assign(generator.uniform(0.1, 1, size=variable.shape))
    return model


def assert_same(model: keras.Model, expected: keras.Model) -> None:
    ours, theirs = vt.named_variables(model), vt.named_variables(expected)
    assert len(ours) == len(theirs)
    for a, b in zip(ours.values(), theirs.values(), strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b))


def images() -> keras.Model:
    x = image = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv")(x)
    x = layers.BatchNormalization(scale=False, name="unscaled")(x)
    x = layers.SeparableConv2D(6, 3, depth_multiplier=2, name="separable")(x)
    x = layers.BatchNormalization(name="bn")(x)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x)
    x = layers.Conv2DTranspose(5, 2, strides=2, name="transposed")(x)
    x = layers.LayerNormalization(name="ln")(x)
    x = layers.PReLU(name="prelu")(x)
    x = layers.Flatten(name="flatten")(x)
    x = layers.BatchNormalization(name="flat_bn")(x)
    return keras.Model(image, layers.Dense(3, name="out")(layers.Dropout(0.5)(x)))


def sequences() -> keras.Model:
    x = tokens = keras.Input((6,))
    x = layers.Embedding(9, 8, name="words")(x)
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True, name="lstm"), name="both")(x)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.Conv1D(8, 3, name="conv")(x)
    x = layers.GRU(5, name="gru")(x)
    return keras.Model(tokens, layers.Dense(2, name="out")(x))


def nested() -> keras.Model:
    inner = [keras.Input((4,)), layers.Dense(3, name="a"), layers.BatchNormalization(name="n")]
    deeper = keras.Sequential([keras.Input((4,)), keras.Sequential(inner, name="inner")], name="m")
    image = keras.Input((4,))
    return keras.Model(image, layers.Dense(2, name="b")(deeper(image)))


def shared() -> keras.Model:
    """A layer that stands in a nested model and around it."""
    layer, image, inner = layers.Dense(4, name="twice"), keras.Input((4,)), keras.Input((4,))
    return keras.Model(image, layer(keras.Model(inner, layer(inner), name="body")(image)))


def row() -> keras.Model:
    """A Sequential model, whose own name stands before all others in Keras's .h5."""
    cell = layers.Bidirectional(layers.LSTM(2, name="cell"), name="both")
    return keras.Sequential([keras.Input((4, 3)), layers.Dense(3, name="a"), cell], name="row")


def held_twice() -> keras.Model:
    """Layers that hold the kernel of the layer inside of them, which Keras writes for both."""
    inner = [layers.Conv2D(4, 3, name="conv"), layers.Conv2D(5, 1, use_bias=False, name="last")]
    around = [layers.SpectralNormalization(x, name=f"around_{x.name}") for x in inner]
    return keras.Sequential([keras.Input((6, 6, 3)), *around])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "build",
    [
        *(pytest.param(b, marks=pytest.mark.slow) for b in (images, sequences)),
        nested,
        shared,
        row,
        held_twice,
    ],
)
def test_any_layers_survive_in_every_form(
    tmp_path: Path, build: Callable[[], keras.Model], form: str
) -> None:
    model = filled(build())
    path = write(model, tmp_path / f"a.{form}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = vt.load_weights(build(), path)
    assert_same(again, model)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_automatic_names_are_matched_by_their_order_and_that_is_said(
    tmp_path: Path, form: str
) -> None:
    """A notebook's cell that ran twice: dense and dense_1 became dense_2 and dense_3."""

    def build() -> keras.Model:
        inner = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.Dense(4)])
        image = keras.Input((4,))
        x = layers.Dense(4, name="named")(layers.Dense(4)(inner(image)))
        for _ in range(9):  # dense_10 comes after dense_9, not after dense_1
            x = layers.Dense(4)(x)
        return keras.Model(image, x)

    model = filled(build())
    path = write(model, tmp_path / f"a.{form}")
    again = build()
    with pytest.warns(UserWarning, match="matched by their order.*dense_2 is dense_14, dense_3 is"):
        vt.load_weights(again, path)
    assert_same(again, model)
    # One layer more, or another shape, and nothing is guessed.
    image = keras.Input((4,))
    x = layers.Dense(4, name="named")(image)
    other = keras.Model(image, layers.Dense(5)(layers.Dense(4)(x)))
    with pytest.raises(ValueError, match="does not fit the model"):
        vt.load_weights(other, path)


def test_automatic_names_of_layers_that_are_two_modules_in_torch(tmp_path: Path) -> None:
    def build() -> keras.Model:
        body = [layers.SeparableConv2D(3, 1) for _ in range(11)]  # 10 comes after 9
        return keras.Sequential([keras.Input((2, 2, 3)), *body])

    model = filled(build())
    vt.save_weights(model, tmp_path / "a.pth")
    again = build()
    with pytest.warns(UserWarning, match="separable_conv2d_depthwise is separable_conv2d_11_"):
        vt.load_weights(again, tmp_path / "a.pth")
    assert_same(again, model)


def test_of_a_kernel_that_a_file_has_twice_the_inner_layers_is_loaded(tmp_path: Path) -> None:
    """As by Keras, which reads the layer inside last."""
    path = tmp_path / "a.weights.h5"
    filled(held_twice()).save_weights(path)
    with h5py.File(path, "r+") as file:
        file["layers/spectral_normalization/layer/vars/0"][:] = 7
    by_keras, ours = held_twice(), held_twice()
    by_keras.load_weights(path)
    assert_same(vt.load_weights(ours, path), by_keras)
    assert (ours.get_weights()[0] == 7).all()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_layers_inside_of_layers_are_told_apart(tmp_path: Path, form: str) -> None:
    """The two directions have the same shapes, and names that count up."""

    def build() -> keras.Model:
        tokens = keras.Input((6, 3))
        return keras.Model(tokens, layers.Bidirectional(layers.LSTM(4), name="both")(tokens))

    model = filled(build())
    path = write(model, tmp_path / f"a.{form}")
    again = build()
    assert "both/forward_lstm_1/lstm_cell/kernel" in vt.named_variables(again)
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        vt.load_weights(again, path)
    assert_same(again, model)


def test_shapes_decide_whether_names_are_matched(tmp_path: Path) -> None:
    first = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Dense(2)])
    second = keras.Sequential([keras.Input((4,)), layers.Dense(2), layers.Dense(3)])
    vt.save_weights(first, tmp_path / "a.safetensors")
    before = second.get_weights()
    with pytest.raises(ValueError, match="No layer of the model is in|does not fit the model"):
        vt.load_weights(second, tmp_path / "a.safetensors")
    for a, b in zip(before, second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_prefix_is_taken_off(tmp_path: Path) -> None:
    """From a model that stood in another one, and from a wrapper around to_torch's network."""
    model = filled(nested())
    image = keras.Input((4,))
    around = keras.Model(image, layers.Dense(7, name="own")(model(image)))
    vt.save_weights(around, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="Unexpected in the file: own/kernel, own/bias"):
        vt.load_weights(nested(), tmp_path / "a.safetensors")
    report = vt.load_weights(nested(), tmp_path / "a.safetensors", partial=True)
    assert report.left == ("own/kernel", "own/bias") and not report.kept
    assert_same(report.model, model)
    state = {f"net.{key}": tensor for key, tensor in vt.to_torch(model).state_dict().items()}
    assert_same(vt.load_weights(nested(), {"state_dict": state}), model)


def slopes_and_norms() -> keras.Model:
    x = sound = keras.Input((8, 3))
    x = layers.SeparableConv1D(4, 3, name="sep")(x)
    x = layers.PReLU("uniform", shared_axes=[1], name="by_channel")(x)
    x = layers.PReLU("uniform", name="by_place")(layers.GroupNormalization(2, name="gn")(x))
    return keras.Model(sound, layers.RMSNormalization(name="rms")(x))


@pytest.mark.parametrize("build", [images, nested, slopes_and_norms])
def test_torch_files_without_torchvisions_names_are_to_torchs(
    tmp_path: Path, build: Callable[[], keras.Model]
) -> None:
    model = filled(build())
    network = vt.to_torch(model)
    vt.save_weights(model, tmp_path / "a.pth")
    state, expected = torch.load(tmp_path / "a.pth"), network.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key
    other = vt.to_torch(build())
    other.load_state_dict(state)  # strictly
    torch.save(other.state_dict(), tmp_path / "b.pth")
    assert_same(vt.load_weights(build(), tmp_path / "b.pth"), model)


def without_names(path: Path) -> None:
    """Keras 2 wrote its .weights.h5 so: layers have their place, and no names."""
    with h5py.File(path, "r+") as file:
        file.visititems(lambda _, member: member.attrs.pop("name", None) and None)


@pytest.mark.slow
@pytest.mark.parametrize("build", [images, nested])
def test_layers_without_names_have_the_place_that_keras_gives_them(
    tmp_path: Path, build: Callable[[], keras.Model]
) -> None:
    model = filled(build())
    model.save_weights(tmp_path / "a.weights.h5")
    without_names(tmp_path / "a.weights.h5")
    by_keras = build()
    by_keras.load_weights(tmp_path / "a.weights.h5")
    assert_same(by_keras, model)
    assert_same(vt.load_weights(build(), tmp_path / "a.weights.h5"), model)


@pytest.mark.slow
def test_legacy_files_of_keras_2_nested_and_renamed(tmp_path: Path) -> None:
    """Names end in `:0`, trainable weights stand first, and a renamed layer's keep the old name."""

    def build(trainable: bool = True) -> keras.Model:
        x = inner = keras.Input((8, 8, 3))
        for i in (1, 2):
            x = layers.Conv2D(3, 3, padding="same", name=f"conv{i}")(x)
            x = layers.BatchNormalization(name=f"bn{i}")(x)
        body = keras.Model(inner, x, name="body")
        body.trainable = trainable
        image = keras.Input((8, 8, 3))
        return keras.Model(image, layers.Conv2D(2, 1, name="left_head")(body(image)))

    model = filled(build())
    body = model.get_layer("body")
    ours = [*body.trainable_weights, *body.non_trainable_weights]
    groups = {
        "body": {f"{variable.path}:0": variable for variable in ours},
        "left_head": {f"head/{v.name}:0": v for v in model.get_layer("left_head").weights},
    }
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in groups]
        file.attrs["keras_version"] = b"2.11.0"
        for name, weights in groups.items():
            group = file.create_group(name)
            group.attrs["weight_names"] = [key.encode() for key in weights]
            for key, variable in weights.items():
                group[key] = keras.ops.convert_to_numpy(variable)
    by_keras = build()
    by_keras.load_weights(tmp_path / "a.h5")
    assert_same(by_keras, model)
    assert_same(vt.load_weights(build(), tmp_path / "a.h5"), model)
    assert_same(vt.load_weights(build(trainable=False), tmp_path / "a.h5"), model)


def flat_and_nested(inside: str = "vgg") -> tuple[keras.Model, keras.Model]:
    """One network with a head, as one graph and with the network nested in a model."""
    inputs = keras.Input((8, 8, 3), name="image")
    x = keras.layers.Conv2D(4, 3, name="block1_conv1")(inputs)
    x = keras.layers.Conv2D(4, 3, name="block1_conv2")(x)
    network = keras.Model(inputs, x, name=inside)
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(2, name="out")]
    whole = keras.Sequential([keras.Input((8, 8, 3)), network, *head], name="whole")
    return vt.flatten(whole), whole


@pytest.mark.slow
@pytest.mark.parametrize("form", ["keras", "h5", "weights.h5", "safetensors", "pth"])
def test_a_flat_models_file_goes_into_one_with_nested_models_and_back(
    tmp_path: Path, form: str
) -> None:
    for at in (0, 1):
        saved = flat_and_nested()[at]
        path = tmp_path / f"{at}.{form}"
        saved.save(path) if form in ("keras", "h5") else vt.save_weights(saved, path)
        model = flat_and_nested()[1 - at]
        vt.load_weights(model, path)
        for ours, theirs in zip(model.get_weights(), saved.get_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_layer_that_several_nested_models_have_is_not_guessed(tmp_path: Path) -> None:
    flat = flat_and_nested()[0]
    vt.save_weights(flat, tmp_path / "flat.safetensors")
    inputs = keras.Input((8, 8, 3))
    ends = [flat_and_nested(name)[1].layers[0](inputs) for name in ("left", "right")]
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Add()(ends))
    both = keras.Model(inputs, keras.layers.Dense(2, name="out")(x))
    with pytest.raises(ValueError, match="Missing in the file: left/block1_conv1/kernel"):
        vt.load_weights(both, tmp_path / "flat.safetensors")


@pytest.mark.parametrize("name", ["dense/weight", "dense.kernel"])
def test_a_name_of_keras_with_torchs_variable_says_nothing_of_axes(name: str) -> None:
    image = keras.Input((3,))
    dense = keras.Model(image, layers.Dense(3, use_bias=False, name="dense")(image))
    with pytest.raises(ValueError, match=f"Missing in the file: dense/kernel. Unexpected.*{name}"):
        vt.load_weights(dense, {name: torch.arange(9.0).reshape(3, 3)})


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_a_layer_in_a_layer_leaves_automatic_names_their_order(tmp_path: Path, form: str) -> None:
    def made() -> keras.Model:
        image = keras.Input((2, 3))
        x = layers.TimeDistributed(layers.Dense(3))(image)
        return filled(keras.Model(image, layers.Dense(2)(layers.Flatten()(x))))

    path = write(made(), tmp_path / f"w.{form}")
    keras.utils.clear_session(free_memory=False)
    layers.Dense(1)  # has a number of its own
    later = made()
    for variable in later.weights:
        variable.assign(variable * 0)
    with pytest.warns(UserWarning, match="dense_1 is dense_2"):
        vt.load_weights(later, path)
    assert_same(later, made())
