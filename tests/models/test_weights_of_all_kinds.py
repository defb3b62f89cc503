"""What a model holds is in the file and comes back from it, whatever holds it, or is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers

import vggtorch as vt
from vggtorch.models import convert

# What Keras says of a layer that is never called.
pytestmark = pytest.mark.filterwarnings(r"ignore:`build\(\)` was called on layer")
FORMS = (".safetensors", ".pth", ".bin", ".weights.h5")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGGTORCH_HOME", str(tmp_path / "home"))


class Own(keras.Model):
    """Functional inside, with a weight of the model's own."""

    def __init__(self) -> None:
        inputs = keras.Input((3,))
        super().__init__(inputs, layers.Dense(3, name="dense")(inputs), name="own")
        self.extra = self.add_weight(shape=(3,), name="extra")


class Twice(keras.Model):
    """Two layers of one name, which a subclassed model may have, and a weight of its own."""

    def __init__(self) -> None:
        super().__init__(name="twice")
        self.first, self.second = layers.Dense(3, name="dense"), layers.Dense(3, name="dense")
        self.unused = layers.Dense(2, name="unused")
        self.scale = self.add_weight(shape=(3,), name="scale")

    def call(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) * self.scale


class Nameless(layers.Layer):
    """Weights that have no names, and two that have one."""

    def build(self, shape: tuple[int, ...]) -> None:
        self.a, self.b = self.add_weight(shape=(3,)), self.add_weight(shape=(3,))
        self.c = self.add_weight(shape=(3,), name="same")
        self.d = self.add_weight(shape=(3,), name="same")
        self.steps = self.add_weight(shape=(), name="steps", dtype="int32", trainable=False)
        self.mask = self.add_weight(shape=(3,), name="mask", dtype="bool", trainable=False)

    def call(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.a + self.b


class Inside(layers.Layer):
    """A torch module inside of a layer."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm = torch.nn.BatchNorm1d(3)

    def call(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def with_layer(layer: layers.Layer) -> keras.Model:
    inputs = keras.Input((3,))
    return keras.Model(inputs, layer(inputs))


def with_torch() -> keras.Model:
    head = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    return vt.stack(with_layer(layers.Dense(3, name="dense")), head)


def quantized() -> keras.Model:
    model = with_layer(layers.Dense(2, name="dense"))
    model.quantize("int8")
    return model


def adapted(dtype: str = "float32") -> keras.Model:
    normalization = layers.Normalization(name="normalization", dtype=dtype)
    normalization.adapt(np.random.default_rng(0).random((20, 3)))
    return with_layer(normalization)


def nested() -> keras.Model:
    inputs = keras.Input((3,))
    return keras.Model(inputs, layers.Dense(2, name="head")(Own()(inputs)))


MODELS: dict[str, Callable[[], keras.Model]] = {
    "own": Own,
    "nested": nested,
    "twice": Twice,
    "nameless": lambda: with_layer(Nameless(name="nameless")),
    "torch": with_torch,
    "torch inside": lambda: with_layer(Inside(name="inside")),
    "adapted": adapted,
    "quantized": quantized,
    "bfloat16": lambda: with_layer(layers.Dense(2, dtype="bfloat16", name="dense")),
}
# Keras's own form has no names, and an order that is not that of the weights.
ORDERLESS = {("twice", ".weights.h5"), ("quantized", ".weights.h5")}


def built(make: Callable[[], keras.Model]) -> keras.Model:
    model = make()
    model(np.zeros((1, 3), "float32"), training=False)
    return model


def held(model: keras.Model) -> list[torch.Tensor]:
    """All that a model holds, asked of Keras and of torch and not of vggtorch."""
    tensors = [variable.value for variable in model.variables]
    for layer in model._flatten_layers():
        if isinstance(layer, layers.TorchModuleWrapper):
            buffers = layer.module.named_buffers()
            tensors += [t for name, t in buffers if not name.endswith("num_batches_tracked")]
    return tensors


def with_other_values(model: keras.Model) -> keras.Model:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in held(model):
            values = 1 + 50 * torch.rand(tensor.shape, generator=generator)
            tensor.copy_(values > 25 if tensor.dtype == torch.bool else values)
    return model


@pytest.mark.filterwarnings("ignore:Names differ", "ignore:Layer InputLayer does not have")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", MODELS)
def test_all_that_a_model_holds_comes_back(kind: str, form: str, tmp_path: Path) -> None:
    before, after = with_other_values(built(MODELS[kind])), built(MODELS[kind])
    path = tmp_path / f"a{form}"
    vt.save_weights(before, path)
    if (kind, form) in ORDERLESS:
        with pytest.raises(ValueError, match=r"Keras itself loads it \(model\.load_weights\(path"):
            vt.load_weights(after, path)
        return
    vt.load_weights(after, path)
    assert len(held(before)) >= 2
    for a, b in zip(held(before), held(after), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_a_normalization_computes_with_what_was_loaded(dtype: str, tmp_path: Path) -> None:
    before = adapted(dtype)
    after = with_layer(layers.Normalization(name="normalization", dtype=dtype))
    x = np.random.default_rng(1).random((4, 3)).astype("float32")
    vt.save_weights(before, tmp_path / "a.pth")
    vt.load_weights(after, tmp_path / "a.pth")
    assert torch.equal(after(x), before(x))
    assert not torch.allclose(after(x).float(), torch.tensor(x))
    before.save(tmp_path / "a.keras")  # a model that was saved whole, through another form
    convert(tmp_path / "a.keras", tmp_path / "b.safetensors")
    again = with_layer(layers.Normalization(name="normalization", dtype=dtype))
    assert torch.equal(vt.load_weights(again, tmp_path / "b.safetensors")(x), before(x))


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have", "ignore:Names differ")
def test_whole_numbers_are_no_floats(tmp_path: Path) -> None:
    plain = with_layer(layers.Dense(2, name="dense"))
    kept = plain.get_weights()
    for model, other, message in (
        (plain, quantized(), "dense/kernel has dtype int8, expected float32"),
        (quantized(), plain, "dense/kernel has dtype float32, expected int8"),
    ):
        vt.save_weights(other, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=message):
            vt.load_weights(model, tmp_path / "a.safetensors")
    report = vt.load_weights(plain, dict(vt.named_variables(quantized())), partial=True)
    assert report.loaded == ("dense/bias",)
    assert np.array_equal(plain.get_weights()[0], kept[0])


def test_the_state_dict_of_to_torch_has_the_names_of_a_torch_head(tmp_path: Path) -> None:
    before, after = with_other_values(with_torch()), with_torch()
    state = vt.to_torch(before).state_dict()
    with pytest.warns(UserWarning, match="matched by their order"):
        vt.load_weights(after, state)
    assert torch.equal(held(after)[-1], held(before)[-1])
    vt.save_weights(before, tmp_path / "a.pth")
    assert set(torch.load(tmp_path / "a.pth")) == set(state)


def test_variables_are_tensors_for_another_model() -> None:
    before, after = with_layer(layers.Dense(2, name="a")), with_layer(layers.Dense(2, name="a"))
    vt.load_weights(after, vt.named_variables(before))
    assert np.array_equal(after.get_weights()[0], before.get_weights()[0])


class Raw(layers.Layer):
    def __init__(self, persistent: bool) -> None:
        super().__init__(name="raw")
        self.register_buffer("kept", torch.ones(3), persistent=persistent)

    def call(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.kept


@pytest.mark.parametrize("form", FORMS)
def test_what_no_file_would_hold_is_refused(form: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"would be lost: raw\.kept\. Make them weights"):
        vt.save_weights(with_layer(Raw(persistent=True)), tmp_path / f"a{form}")
    vt.save_weights(with_layer(Raw(persistent=False)), tmp_path / f"a{form}")
    unbuilt = keras.Sequential([layers.Dense(2, name="later")])
    with pytest.raises(ValueError, match="which isn't built and has no weights yet. Call"):
        vt.save_weights(unbuilt, tmp_path / f"b{form}")
    with pytest.raises(ValueError, match="load_weights received 'sequential.*isn't built"):
        vt.load_weights(unbuilt, tmp_path / f"a{form}")
    assert not (tmp_path / f"b{form}").exists()


def test_a_layer_that_is_never_called_is_no_hindrance(tmp_path: Path) -> None:
    before, after = built(Twice), built(Twice)
    assert not before.unused.built
    vt.save_weights(before, tmp_path / "a.pth")
    vt.load_weights(after, tmp_path / "a.pth")
    assert torch.equal(held(after)[0], held(before)[0])


@pytest.mark.parametrize("form", FORMS)
def test_a_wrapper_and_its_clone_take_each_other_s_files(form: str, tmp_path: Path) -> None:
    """In a clone, Keras's names of a wrapper's weights begin with the layers inside."""
    inputs = keras.Input((5, 4))
    model = keras.Model(inputs, layers.Bidirectional(layers.LSTM(3), name="both")(inputs))
    clone = keras.models.clone_model(model)
    for given, taking in ((model, clone), (clone, model)):
        vt.save_weights(with_other_values(given), tmp_path / f"a{form}")
        for variable in taking.variables:
            variable.assign(keras.ops.zeros_like(variable))
        vt.load_weights(taking, tmp_path / f"a{form}")
        assert list(vt.named_variables(given)) == list(vt.named_variables(taking))
        for a, b in zip(given.get_weights(), taking.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
