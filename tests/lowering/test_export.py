import errno
import os

import pytest

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
import numpy as np
import onnxruntime
import torch
from keras import layers

from vggtorch import files
from vggtorch.models import remember_

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("narrow", "onnx_operators")]


def vgg(**options):
    keras.utils.set_random_seed(0)
    model = vt.VGG11(weights=None, input_shape=(32, 32, 3), classes=7, **options)
    for variable in model.weights:  # biases too, which begin as zeros
        variable.assign(variable + 0.01 * keras.random.normal(variable.shape))
    return model


def branched():
    """Two inputs, two outputs, a batch norm, and layers that lower has no handler for."""
    keras.utils.set_random_seed(0)
    image, number = keras.Input((16, 16, 3), name="image"), keras.Input((4,), name="number")
    x = layers.Conv2D(8, 3, strides=2, padding="same", name="conv")(image)
    x = layers.BatchNormalization(name="norm")(x)
    maps = layers.ReLU(name="relu")(x)
    x = layers.GlobalAveragePooling2D(name="mean")(maps)
    x = layers.Concatenate(name="both")([x, layers.LayerNormalization(name="ln")(number)])
    return keras.Model([image, number], [layers.Dense(3, name="dense")(x), maps])


def images(*shape):
    return np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)


def open_onnx(path):
    """The file as a function of arrays that gives a list of arrays."""
    session = onnxruntime.InferenceSession(path)
    names = [x.name for x in session.get_inputs()]
    return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def open_pt2(path):
    """The same of the other form."""
    program = torch.export.load(path).module()

    def run(*inputs):
        with torch.no_grad():
            found = program(*map(torch.from_numpy, inputs))
        return [y.numpy() for y in (found if isinstance(found, list | tuple) else [found])]

    return run


OPEN = {".onnx": open_onnx, ".pt2": open_pt2}


@pytest.mark.parametrize("ending", OPEN)
def test_the_file_computes_what_keras_does(tmp_path, ending):
    model, path = vgg(), tmp_path / f"model{ending}"
    vt.export(model, path)
    run = OPEN[ending](path)
    for batch in (1, 3):
        x = images(batch, 32, 32, 3)
        (found,) = run(x)
        np.testing.assert_allclose(found, model.predict(x, verbose=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ending", OPEN)
def test_several_inputs_and_outputs(tmp_path, ending):
    model, inputs = branched(), [images(5, 16, 16, 3), images(5, 4)]
    path = tmp_path / f"model{ending}"
    vt.export(model, path)
    found = OPEN[ending](path)(*inputs)
    for one, expected in zip(found, model.predict(inputs, verbose=0), strict=True):
        np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ending", OPEN)
def test_any_image_size_and_the_other_layout(tmp_path, ending):
    keras.utils.set_random_seed(0)
    model = vt.truncate(vt.VGG11(weights=None, include_top=False), "block3_pool")
    path, x = tmp_path / f"model{ending}", images(2, 40, 72, 3)
    vt.export(model, path, data_format="channels_first")
    (found,) = OPEN[ending](path)(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    expected = model.predict(x, verbose=0).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def test_an_accelerated_model_with_preprocessing_inside(tmp_path):
    model = vt.accelerate_(remember_(vgg(include_preprocessing=True), "oxford"))
    x = images(2, 32, 32, 3)
    vt.export(model, tmp_path / "model.onnx")
    (found,) = open_onnx(tmp_path / "model.onnx")(x)
    np.testing.assert_allclose(found, model.predict(x, verbose=0), rtol=1e-4, atol=1e-6)


def test_onnx_names_its_axes_and_its_output(tmp_path):
    """As they are in the Keras model, not numbered by torch."""
    image = keras.Input((None, None, 3), name="image")
    vector = keras.Input((5,), name="vector")
    x = keras.layers.Conv2D(4, 3, strides=2, padding="same")(image)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dense(2, name="both")(keras.layers.Concatenate()([x, vector]))
    vt.export(keras.Model([image, vector], x), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [(i.name, i.shape) for i in session.get_inputs()] == [
        ("image", ["batch", "height", "width", 3]), ("vector", ["batch", 5]),
    ]  # fmt: skip
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("both", ["batch", 2])]


def test_onnx_comes_back_with_its_weight_set(tmp_path):
    model = remember_(vgg(), "oxford")
    vt.export(model, tmp_path / "model.onnx")
    again = vt.VGG11(weights=tmp_path / "model.onnx", input_shape=(32, 32, 3), classes=7)
    assert vt.weight_set(again) == "oxford"
    for one, expected in zip(again.weights, model.weights, strict=True):
        assert torch.equal(one.value, expected.value), expected.path


def test_the_model_stays_as_it_is(tmp_path):
    model, x = vgg(dropout=0.5), images(2, 32, 32, 3)
    before, outputs = model.get_weights(), model.predict(x, verbose=0)
    vt.export(model, tmp_path / "model.pt2")
    assert all(map(np.array_equal, before, model.get_weights()))
    # Other kernels run where the weights have another order in memory.
    np.testing.assert_allclose(outputs, model.predict(x, verbose=0), rtol=1e-4, atol=1e-6)
    assert not np.array_equal(*(model(x, training=True).detach().numpy() for _ in range(2)))


def test_another_ending(tmp_path):
    with pytest.raises(ValueError, match=r"ends in .onnx or .pt2"):
        vt.export(vgg(), tmp_path / "model.tflite")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'vggtorch\[onnx\]'"):
        vt.export(vgg(), tmp_path / "model.onnx")


@pytest.mark.parametrize("ending", OPEN)
def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch, ending):
    path = tmp_path / f"model{ending}"
    path.write_bytes(b"old")

    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.*unchanged"):
        vt.export(vgg(), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def of_images(*added, size=8, **options):
    image = keras.Input((size, size, 3), **options)
    x = layers.Conv2D(3, 3, padding="same")(image)
    for layer in added:
        x = layer(x)
    return keras.Model(image, x)


@pytest.mark.parametrize("ending", OPEN)
def test_reshapes_leave_the_batch_open(tmp_path, ending):
    model = of_images(layers.Reshape((4, 16, 3)), layers.GlobalAveragePooling2D())
    path = tmp_path / f"model{ending}"
    vt.export(model, path)
    run = OPEN[ending](path)
    for batch in (1, 5):
        x = images(batch, 8, 8, 3) / 255
        (found,) = run(x)
        np.testing.assert_allclose(found, model.predict(x, verbose=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ending", OPEN)
def test_images_so_small_that_they_end_as_one_pixel(tmp_path, ending):
    image = keras.Input((None, None, 3))
    x = layers.MaxPooling2D(4)(layers.Conv2D(2, 3, padding="same", activation="relu")(image))
    model = keras.Model(image, layers.MaxPooling2D(8)(x))
    path = tmp_path / f"model{ending}"
    vt.export(model, path)
    run = OPEN[ending](path)
    for size in ((2, 32, 63), (1, 63, 32), (1, 64, 33)):
        x = images(*size, 3) / 255
        (found,) = run(x)
        np.testing.assert_allclose(found, model.predict(x, verbose=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ending", OPEN)
@pytest.mark.parametrize(
    "branches",
    [
        [
            layers.Conv2D(2, 3, strides=2, padding="same"),
            layers.MaxPooling2D(2, padding="same"),
            layers.AveragePooling2D(2, padding="same"),
            layers.AveragePooling2D(3, 2, padding="same"),
        ],
        [
            layers.Conv1D(2, 3, strides=3, padding="same"),
            layers.AveragePooling1D(3, 2, padding="same"),
        ],
    ],
    ids=["2D", "1D"],
)
def test_same_padding_with_strides_at_any_size(tmp_path, ending, branches):
    """How much pads, and on which side, depends on the size."""
    n = 1 if "1D" in type(branches[0]).__name__ else 2
    image = keras.Input((*(None,) * n, 3))
    model = keras.Model(image, [layer(image) for layer in branches])
    path = tmp_path / f"model{ending}"
    vt.export(model, path)
    run = OPEN[ending](path)
    for size in ((2, 31, 32), (1, 32, 33), (3, 35, 37), (2, 36, 34)):
        x = images(*size[: n + 1], 3) / 255
        for found, expected in zip(run(x), model.predict(x, verbose=0), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ending", OPEN)
@pytest.mark.parametrize("batch", [1, 4])
def test_a_fixed_batch_stays_fixed(tmp_path, ending, batch):
    model = of_images(batch_size=batch)
    x = images(batch, 8, 8, 3) / 255
    path = tmp_path / f"model{ending}"
    vt.export(model, path)
    (found,) = OPEN[ending](path)(x)
    np.testing.assert_allclose(found, model(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_file_that_takes_one_size_only_is_refused(tmp_path):
    """torch.onnx writes adaptive pools for the size that it traced them at."""
    pool = layers.AdaptiveAveragePooling2D(7)
    model = of_images(pool, layers.Flatten(), layers.Dense(2), size=None)
    with pytest.raises(ValueError, match=r"fails at inputs of shape .3, 160, 192, 3.*Adaptive"):
        vt.export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_takes_one_batch_only_is_refused(tmp_path):
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(20, 8, mask_zero=True)(tokens)
    model = keras.Model(tokens, layers.LSTM(3, name="memory")(x))
    for ending in OPEN:
        with pytest.raises(ValueError, match=r"shape .3, 5.*'memory' .LSTM.*batch_size=n"):
            vt.export(model, tmp_path / f"model{ending}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", OPEN)
def test_whole_numbers_beside_tensors(tmp_path, ending):
    image = keras.Input((4,))
    model, x = keras.Model(image, 1 - (image * 2.0 - 1)), images(3, 4)
    vt.export(model, tmp_path / f"model{ending}")
    (found,) = OPEN[ending](tmp_path / f"model{ending}")(x)
    torch.testing.assert_close(torch.as_tensor(found), model(x))


def test_what_onnx_runtime_refuses_is_refused(tmp_path):
    image = keras.Input((4,))
    dense = layers.Dense(3, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"ONNX Runtime refuses this model: .*float32.*\.pt2"):
        vt.export(keras.Model(image, dense(image)), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ending", OPEN)
def test_outputs_by_name_in_any_order(tmp_path, ending):
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    outputs = {"sum": layers.Add()([a, b]), "dense": layers.Dense(2)(a)}
    model, path = keras.Model({"b": b, "a": a}, outputs), tmp_path / f"model{ending}"
    vt.export(model, path)
    expected = model({"a": torch.ones(2, 4), "b": torch.ones(2, 4)})
    assert list(expected) == list(vt.to_torch(model)(torch.ones(2, 4), torch.ones(2, 4)))
    if ending == ".onnx":
        found = pytest.importorskip("onnxruntime").InferenceSession(path).get_outputs()
        assert {one.name: one.shape[1] for one in found} == {"dense": 2, "sum": 4}
        assert [one.name for one in found] == list(expected)


@pytest.mark.parametrize("ending", OPEN)
def test_values_twice_and_inputs_among_the_outputs(tmp_path, ending):
    image, other = keras.Input((4,), name="image"), keras.Input((4,), name="other")
    y = layers.Dense(2, name="y")(image)
    model, path = keras.Model([image, other], [y, other, y, image]), tmp_path / f"model{ending}"
    vt.export(model, path)
    inputs = images(3, 4), images(3, 4)[::-1].copy()
    for found, expected in zip(OPEN[ending](path)(*inputs), model.predict(inputs), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    if ending == ".onnx":
        found = onnxruntime.InferenceSession(path).get_outputs()
        assert [one.name for one in found] == ["y", "other_", "y_", "image_"]


def test_a_size_that_the_models_own_code_asks_for_stays_guarded(tmp_path):
    """Which no size that is tried has, so that the file would else give other numbers there."""

    class Doubled(keras.layers.Layer):
        def call(self, x):
            return 2 * x if x.shape[1] is not None and x.shape[1] % 100 == 0 else x

        def compute_output_shape(self, shape):
            return shape

    image = keras.Input((None, 40, 3))
    model = keras.Model(image, layers.MaxPooling2D(2)(Doubled()(image)))
    vt.export(model, tmp_path / "model.pt2")
    run = torch.export.load(tmp_path / "model.pt2").module()
    assert run(torch.ones(2, 202, 40, 3)).max() == model(torch.ones(2, 202, 40, 3)).max() == 1
    with pytest.raises(AssertionError, match="Guard failed"):
        run(torch.ones(2, 200, 40, 3))
