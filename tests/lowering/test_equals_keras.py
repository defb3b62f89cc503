"""What lower returns computes what Keras does: outputs, gradients, moving statistics."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch
import torch.multiprocessing
from keras import layers
from small_vgg import assert_close, images, on_keras, randomise, small_vgg, step

from vggtorch.lowering import between, to_torch


@pytest.mark.slow
def test_vgg_without_batch_norm_is_bit_identical() -> None:
    make = keras.applications.VGG16
    model = randomise(make(weights=None, include_top=False, input_shape=(64, 64, 3)))
    x = images(model, 3)
    with torch.no_grad():
        expected = model(x, training=False)
        assert torch.equal(on_keras(model).eval()(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype,tolerance", [("float64", 1e-10), ("float32", 1e-4)])
def test_training_equals_keras(dtype: str, tolerance: float) -> None:
    """Without batch norm in float64, where rounding is far below any mistake; with it in float32.

    Keras computes batch norm in float32 whatever the policy.
    """
    if dtype == "float64":
        keras.config.set_dtype_policy("float64")
        model = keras.applications.VGG16(weights=None, include_top=False, input_shape=(32, 32, 3))
        keras.config.set_dtype_policy("float32")
    else:
        model = small_vgg()
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    output, left = step(model, on_keras(model).train())
    expected, keras_left = step(twin, lambda x: twin(x, training=True))
    assert_close(output, expected, tolerance)
    for actual, value in zip(left, keras_left, strict=True):
        assert_close(actual, value, tolerance)


def test_a_batch_without_images() -> None:
    model = small_vgg()
    lowered = on_keras(model).train()
    model.get_layer("block2_bn1").trainable = False
    lowered(torch.zeros(0, 16, 16, 3)).sum().backward()
    assert not model.get_layer("fc1").kernel.value.grad.any()
    with torch.no_grad():
        assert lowered.eval()(torch.zeros(0, 16, 16, 3)).shape == (0, 10)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("given", ["channels_last", "channels_first"])
def test_layouts(data_format: str, given: str) -> None:
    """A channels_first Keras model is compared with its channels_last twin, which a CPU can run."""
    model, twin = small_vgg(data_format), small_vgg()
    twin.set_weights(model.get_weights())
    nhwc = images(twin)
    # Flatten of a channels_first model puts channels last, so that fc1 is the same.
    expected = twin(nhwc, training=False).detach()
    x = nhwc if given == "channels_last" else nhwc.permute(0, 3, 1, 2)
    lowered = on_keras(model, data_format=given).eval()
    assert_close(lowered(x).detach(), expected)
    with torch.no_grad():
        assert_close(lowered(x), expected)


def test_feature_maps_come_out_in_the_layout_asked_for() -> None:
    vgg = small_vgg()
    model = keras.Model(vgg.input, vgg.get_layer("block1_pool").output)
    x = images(model)
    expected = model(x).detach()
    assert_close(on_keras(model)(x).detach(), expected)
    first = on_keras(model, data_format="channels_first")(x.permute(0, 3, 1, 2)).detach()
    assert_close(first, expected.permute(0, 3, 1, 2))


def test_graphs_of_any_shape() -> None:
    """Branches, a shared layer, a nested model, operations, several inputs and outputs, dicts."""
    keras.utils.set_random_seed(0)
    a, b = keras.Input((8, 8, 3), name="a"), keras.Input((8, 8, 3), name="b")
    shared = layers.Conv2D(4, 3, padding="same")
    nested = keras.Sequential([keras.Input((8, 8, 4)), layers.Conv2D(4, 1), layers.ReLU(6)])
    relu = layers.ReLU()
    left, right = shared(a), shared(b)
    both = layers.Add()([relu(left), relu(right), left])  # `left` is needed after its ReLU
    x = layers.Concatenate()([nested(both), nested(left)]) * 2.0 + keras.ops.mean(right)
    pooled = layers.GlobalAveragePooling2D()(x)
    score = layers.Dense(3, activation="softmax")(layers.LayerNormalization()(pooled))
    model = keras.Model({"a": a, "b": b}, {"score": score, "map": both, "pooled": pooled})
    inputs = {"a": torch.randn(2, 8, 8, 3), "b": torch.randn(2, 8, 8, 3)}
    expected = model(inputs, training=False)
    lowered = on_keras(model)
    for mode in (lowered.train(), lowered.eval()):
        outputs = mode(*inputs.values())
        for key in expected:
            assert_close(outputs[key].detach(), expected[key].detach())
    with torch.no_grad():
        for key, output in lowered(*inputs.values()).items():
            assert_close(output, expected[key].detach())


def test_one_activation_after_several_convolutions() -> None:
    """Each convolution must keep its own weights where it takes the activation over."""
    image = keras.Input((8, 8, 3))
    relu = layers.ReLU()
    x = relu(layers.Conv2D(4, 3)(image))
    model = keras.Model(image, relu(layers.Conv2D(4, 3)(x)))
    x = images(model)
    with torch.no_grad():
        assert_close(on_keras(model).eval()(x), model(x))


def test_dropout_follows_train_and_eval() -> None:
    image = keras.Input((1000,))
    model = keras.Model(image, layers.Dropout(0.25)(image))
    x = torch.ones(20, 1000)
    lowered = on_keras(model)
    assert torch.equal(lowered.eval()(x), x)
    y = lowered.train()(x)
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((y == 0).float().mean() - 0.25) < 0.02
    torch.manual_seed(3)
    expected = model(x, training=True)
    torch.manual_seed(3)
    assert torch.equal(lowered(x), expected)


def test_seeded_dropout_is_kerass_own() -> None:
    image = keras.Input((100,))
    models = [keras.Model(image, layers.Dropout(0.5, seed=7)(image)) for _ in range(2)]
    x = torch.ones(4, 100)
    assert torch.equal(on_keras(models[0]).train()(x), models[1](x, training=True))


def test_batch_norm_that_is_not_trainable_stays_frozen() -> None:
    model = small_vgg()
    norm = model.get_layer("block2_bn1")
    x = images(model)
    lowered = on_keras(model).train()
    norm.trainable = False  # after lowering
    before = [v.numpy().copy() for v in norm.variables]
    assert_close(lowered(x).detach(), model(x, training=True).detach())
    for variable, value in zip(norm.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    norm.trainable = True
    lowered(x)
    assert not np.array_equal(norm.moving_mean.numpy(), before[2])


def test_batch_norm_of_one_value() -> None:
    image = keras.Input((3,))
    model = randomise(keras.Model(image, layers.BatchNormalization()(image)))
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    x = torch.randn(1, 3)
    assert_close(on_keras(model).train()(x).detach(), twin(x, training=True).detach(), 1e-4)
    for mine, theirs in zip(model.variables, twin.variables, strict=True):
        assert_close(mine.value.detach(), theirs.value.detach(), 1e-5)


def test_parts_of_a_model() -> None:
    model = small_vgg()
    calls = [len(layer._inbound_nodes) for layer in model.layers]
    x = images(model)
    middle, end = model.get_layer("block1_pool").output, model.get_layer("block2_relu1").output
    first = between(model.input, middle).eval()
    rest = between(middle, [end, model.output]).eval()
    with torch.no_grad():
        found, probabilities = rest(first(x))
        assert_close(probabilities, model(x, training=False))
        assert_close(found, keras.Model(model.input, end)(x, training=False))
        nchw = between(model.input, middle, data_format="channels_first").eval()
        assert_close(nchw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), first(x))
        assert first(torch.zeros(1, 20, 24, 3)).shape == (1, 10, 12, 8)  # another size
    assert {id(p) for p in rest.parameters()} <= {id(v.value) for v in model.variables}
    assert [len(layer._inbound_nodes) for layer in model.layers][:-2] == calls[:-2]
    with pytest.raises(ValueError, match="data_format='NCHW'"):
        between(model.input, middle, data_format="NCHW")
    image = keras.Input((8, 8, 3))
    branch = layers.Conv2D(3, 1)(image)
    around = keras.Model(image, layers.Add()([branch, image]))
    with pytest.raises(ValueError, match="not connected"):
        between(branch, around.output)


def test_convolution_copies_no_activation() -> None:
    module = on_keras(small_vgg()).train()
    x = torch.randn(2, 16, 16, 3)
    module(x)  # copies one image, to see how many fit in a group
    with torch.profiler.profile(record_shapes=True) as profile:
        module(x)
    copies = {"aten::contiguous", "aten::clone"}
    shapes = [event.input_shapes[0] for event in profile.events() if event.name in copies]
    assert [2, 8, 16, 16] not in shapes and [1, 8, 16, 16] not in shapes


def test_plain_operations_where_onednn_is_off() -> None:
    model = small_vgg()
    x = images(model)
    lowered = on_keras(model).eval()
    with torch.no_grad():
        expected = lowered(x)
        with torch.backends.mkldnn.flags(enabled=False):
            assert_close(lowered(x), expected)
        assert torch.equal(lowered(x), expected)


def test_refusals() -> None:
    class Own(keras.Model):
        def call(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ValueError, match="is a subclassed model .Own.*to_torch needs a Functional"):
        to_torch(Own())
    with pytest.raises(ValueError, match="has no graph yet, which to_torch needs"):
        to_torch(keras.Sequential([layers.Dense(2)]))
    with pytest.raises(ValueError, match="data_format='NCHW'; expected 'channels_last'"):
        to_torch(small_vgg(), data_format="NCHW")


def test_what_goes_into_a_pool_is_not_kept() -> None:
    model = small_vgg()
    lowered = on_keras(model).train()
    shapes: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lowered(images(model))
    assert {(3, 16, 16), (8, 8, 8)} <= {shape[1:] for shape in shapes}
    assert (8, 16, 16) not in {shape[1:] for shape in shapes}
