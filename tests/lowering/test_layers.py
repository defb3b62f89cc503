"""Single layers in all their settings, those that run as Keras runs them, and any name."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
import torch.multiprocessing
from keras import layers
from small_vgg import assert_close, images, on_keras, randomise
from torch import nn

import vggtorch as vt
from vggtorch.lowering.layer_modules import KerasLayer


@pytest.mark.parametrize("size", [15, 16])
@pytest.mark.parametrize(
    "kernel,stride,dilation", [(3, 1, 1), (2, 1, 1), (5, 2, 1), (4, 3, 1), (3, 1, 2)]
)
@pytest.mark.parametrize("kind", [layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D])
def test_same_padding(kind: type, kernel: int, stride: int, dilation: int, size: int) -> None:
    options = {"strides": stride, "dilation_rate": dilation, "padding": "same"}
    filters = () if kind is layers.DepthwiseConv2D else (6,)
    image = keras.Input((size, size + 1, 4))
    y = kind(*filters, kernel, **options)(image)
    model = randomise(keras.Model(image, y))
    x = images(model)
    expected = model(x).detach()
    assert_close(on_keras(model)(x).detach(), expected)
    with torch.no_grad():
        assert_close(on_keras(model).eval()(x), expected)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("layer", [layers.MaxPooling2D, layers.AveragePooling2D])
def test_pooling(layer: type, padding: str) -> None:
    image = keras.Input((15, 14, 4))
    model = keras.Model(image, [layer(3, 2, padding)(image), layer(2, 2, padding)(image)])
    x = images(model)
    for actual, expected in zip(on_keras(model)(x), model(x), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("size", [2, (3, 1)])
def test_adaptive_pooling_where_the_size_is_no_multiple(size: Any) -> None:
    image = keras.Input((7, 6, 4))
    y = layers.AdaptiveAveragePooling2D(size)(layers.ReLU()(layers.Conv2D(4, 3)(image)))
    model = randomise(keras.Model(image, y))
    x = images(model)
    assert_close(as_torch(model, x), model(x))


def test_a_layer_without_handler_gets_training_and_keeps_its_parameters() -> None:
    image = keras.Input((6, 6, 3))
    noisy = layers.GaussianNoise(1.0)(layers.UnitNormalization()(image))
    model = keras.Model(image, layers.PReLU(name="prelu")(noisy))  # a slope for each pixel
    x = images(model)
    lowered: Any = on_keras(model)
    assert torch.equal(lowered.eval()(x), model(x, training=False))
    assert not torch.allclose(lowered.train()(x), lowered.eval()(x))
    assert lowered.network.prelu.alpha is model.get_layer("prelu").alpha.value


def as_torch(model: keras.Model, x: torch.Tensor) -> torch.Tensor:
    """What the lowered model gives, in which no layer may run as Keras runs it."""
    lowered = on_keras(model).train()
    assert not any(isinstance(m, KerasLayer) for m in lowered.network.modules())
    output = lowered(x).detach()
    with torch.no_grad():
        assert_close(lowered.eval()(x), output)
    return output


@pytest.mark.parametrize(
    "layer",
    [
        layers.Rescaling(2.0, -1.0),
        layers.Rescaling([0.5, 2.0, 1.0], [1.0, 0.0, -1.0]),
        layers.Rescaling(0.5, [1.0, 0.0, -1.0], dtype="mixed_bfloat16"),
        layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[4.0, 1.0, 0.0]),
        layers.Normalization(mean=1.0, variance=4.0, axis=None),
        layers.LayerNormalization(),
        layers.LayerNormalization(center=False, scale=False, epsilon=0.1, dtype="mixed_bfloat16"),
        layers.UpSampling2D((2, 3)),
        layers.Reshape((4, 5, 6)),
        layers.Reshape((-1, 3)),
        layers.Reshape((60, -1)),
    ],
)
def test_layers_of_one_input(layer: keras.Layer) -> None:
    image = keras.Input((8, 5, 3))
    model = randomise(keras.Model(image, layer(image)))
    x = images(model)
    assert_close(as_torch(model, x), model(x).detach())


# By the number of axes that are an image's: a layer's settings, and torch's classes for it.
WITH_COUNTERPARTS: list[tuple[int, str, dict[str, Any], list[type]]] = [
    (2, "UpSampling2D", {"size": (2, 3), "interpolation": "bilinear"}, [nn.Upsample]),
    (2, "UpSampling2D", {"size": 3, "interpolation": "bicubic"}, [nn.Upsample]),
    (1, "UpSampling1D", {"size": 3}, [nn.Upsample]),
    (3, "UpSampling3D", {"size": (1, 2, 3)}, [nn.Upsample]),
    (1, "PReLU", {"shared_axes": [1]}, [nn.PReLU]),
    (2, "PReLU", {"shared_axes": [1, 2]}, [nn.PReLU]),
    (2, "PReLU", {"shared_axes": [1, 2, 3]}, [nn.PReLU]),
    (0, "PReLU", {}, [nn.PReLU]),
    (2, "GroupNormalization", {"groups": 2}, [nn.GroupNorm]),
    (3, "GroupNormalization", {"groups": -1, "center": False}, [nn.GroupNorm]),
    (0, "GroupNormalization", {"groups": 2, "epsilon": 0.1}, [nn.GroupNorm]),
    (2, "GroupNormalization", {"groups": 2, "scale": False, "center": False}, [nn.GroupNorm]),
    (2, "GroupNormalization", {"groups": 2, "scale": False}, [KerasLayer]),
    (1, "ZeroPadding1D", {"padding": (1, 2)}, [nn.ZeroPad1d]),
    (2, "ZeroPadding2D", {"padding": ((1, 2), (0, 3))}, [nn.ZeroPad2d]),
    (3, "ZeroPadding3D", {"padding": ((1, 2), (0, 3), (1, 0))}, [nn.ZeroPad3d]),
    (1, "Cropping1D", {"cropping": (1, 2)}, [nn.ZeroPad1d]),
    (2, "Cropping2D", {"cropping": ((1, 0), (2, 1))}, [nn.ZeroPad2d]),
    (3, "Cropping3D", {"cropping": ((1, 0), (2, 1), (0, 0))}, [nn.ZeroPad3d]),
    (1, "Conv1D", {"padding": "causal", "strides": 2}, [nn.ZeroPad1d, nn.Conv1d]),
    (1, "Conv1D", {"padding": "causal", "dilation_rate": 2}, [nn.ZeroPad1d, nn.Conv1d]),
    (1, "DepthwiseConv1D", {"padding": "same", "depth_multiplier": 2}, [nn.Conv1d]),
    (1, "DepthwiseConv1D", {"padding": "valid", "strides": 2}, [nn.Conv1d]),
    (1, "SeparableConv1D", {"padding": "same", "depth_multiplier": 2}, [nn.Conv1d, nn.Conv1d]),
    (1, "AdaptiveAveragePooling1D", {"output_size": 3}, [nn.AdaptiveAvgPool1d]),
    (3, "AdaptiveAveragePooling3D", {"output_size": (1, 2, 3)}, [nn.AdaptiveAvgPool3d]),
    (1, "AdaptiveMaxPooling1D", {"output_size": 3}, [nn.AdaptiveMaxPool1d]),
    (2, "AdaptiveMaxPooling2D", {"output_size": 3}, [nn.AdaptiveMaxPool2d]),
    (3, "AdaptiveMaxPooling3D", {"output_size": 2}, [nn.AdaptiveMaxPool3d]),
    (0, "RMSNormalization", {"epsilon": 0.1}, [nn.RMSNorm]),
    (2, "RMSNormalization", {}, [nn.RMSNorm]),
    (1, "SpatialDropout1D", {"rate": 0.0}, [nn.Dropout1d]),
    (3, "SpatialDropout3D", {"rate": 0.0}, [nn.Dropout3d]),
    *[
        (n, f"Conv{n}DTranspose", {"padding": padding, "strides": 2} | options, classes[:parts])
        for n, classes in (
            (1, [nn.ConvTranspose1d, nn.ZeroPad1d]),
            (2, [nn.ConvTranspose2d, nn.ZeroPad2d]),
            (3, [nn.ConvTranspose3d, nn.ZeroPad3d]),
        )
        for padding, options, parts in (
            ("same", {}, 2),
            ("valid", {}, 1),
            ("valid", {"kernel_size": 1}, 1),
            ("same", {"kernel_size": 4}, 1),
            ("same", {"output_padding": 1}, 2),
            ("valid", {"output_padding": 1}, 1),
            ("same", {"dilation_rate": 2, "strides": 1}, 1),
        )
    ],
]


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize(("n", "name", "settings", "classes"), WITH_COUNTERPARTS)
def test_layers_of_torch(
    n: int, name: str, settings: dict[str, Any], classes: list[type], data_format: str
) -> None:
    """Torch's classes, equal to Keras in float64: outputs, gradients, one memory.

    Two norms compute in float32 in any case.
    """
    dtype = "float32" if "RMS" in name or "GroupN" in name else "float64"
    limits: Any = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 1e-12, "atol": 1e-12}
    )
    settings = {"dtype": dtype} | settings
    shape: tuple[int, ...] = (*(7, 5, 4)[:n], 4)
    if "Conv" in name:
        filters = {} if "Depthwise" in name else {"filters": 3}
        defaults: dict[str, Any] = {"kernel_size": 3, "activation": "tanh"}
        settings = defaults | filters | settings
        classes = [*classes, nn.Tanh]
    if data_format == "channels_first":
        shape = (4, *(7, 5, 4)[:n])
        if "GroupNorm" in name:
            settings["axis"] = 1
        elif "shared_axes" in settings:
            settings["shared_axes"] = [i + (len(settings["shared_axes"]) == n)
                                       for i in settings["shared_axes"]]  # fmt: skip
        elif name not in ("PReLU", "RMSNormalization", "UpSampling1D", "Cropping1D",
                          "SpatialDropout1D"):  # fmt: skip
            settings["data_format"] = data_format
    image = keras.Input(shape, dtype=dtype)
    model = keras.Model(image, getattr(layers, name)(**settings)(image))
    rng = np.random.default_rng(0)
    for variable in model.variables:
        variable.assign(rng.normal(size=variable.shape))
    network = vt.to_torch(model)
    assert all(map(isinstance, network.children(), classes))
    assert len(list(network.children())) == len(classes)
    x = torch.from_numpy(rng.normal(size=(3, *shape)).round(1).astype(dtype))  # some are 0
    left = []
    for run in (lambda x: model(x, training=True), on_keras(model).train()):
        entering = x.clone().requires_grad_()
        model.zero_grad()
        output = run(entering)
        output.square().sum().backward()
        left.append([output, entering.grad, *(v.value.grad for v in model.trainable_variables)])
    for expected, found in zip(*left, strict=True):
        torch.testing.assert_close(found, expected, **limits)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5).add_(0.1)
        for mode in (False, True):
            expected = model(x, training=mode)
            torch.testing.assert_close(network.train(mode)(x), expected, **limits)


def test_dropout_of_whole_maps() -> None:
    for n, kind in ((1, layers.SpatialDropout1D), (3, layers.SpatialDropout3D)):
        image = keras.Input((*(5,) * n, 40))
        network = vt.to_torch(keras.Model(image, kind(0.5)(image)))
        y = network(torch.ones(2, *(5,) * n, 40)).flatten(1, -2)
        assert (y == y[:, :1]).all() and set(y.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("axis", [-1, (1, 2), None])
def test_adapted_normalization(axis: Any) -> None:
    image = keras.Input((8, 5, 3))
    layer = layers.Normalization(axis=axis)
    model = keras.Model(image, layer(image))
    x = images(model)
    layer.adapt(3 * x.numpy() + 1)
    assert_close(as_torch(model, x), model(x).detach())
    layer.adapt(x.numpy())
    assert_close(as_torch(model, x), model(x).detach())


@pytest.mark.parametrize(
    "merge", [layers.Add, layers.Average, layers.Maximum, layers.Minimum, layers.Multiply]
)
def test_merges(merge: type) -> None:
    image = keras.Input((6, 6, 3))
    several = [image, layers.Rescaling(2.0)(image), layers.Rescaling(-1.0, 0.5)(image)]
    model = keras.Model(image, merge()(several))
    x = images(model)
    assert_close(as_torch(model, x), model(x))


@pytest.mark.filterwarnings("ignore:You passed `rms_scaling=True`")
def test_layers_set_to_what_only_keras_does() -> None:
    image = keras.Input((6, 4, 3))
    outputs = [
        layers.Normalization(mean=1.0, variance=4.0, invert=True)(image),
        layers.LayerNormalization(axis=[2, 3])(image),
        layers.UpSampling2D(41)(image),  # torch's Upsample repeats other pixels then
        layers.GroupNormalization(3, axis=2, epsilon=0.1)(layers.Permute((1, 3, 2))(image)),
        layers.GroupNormalization(3, dtype="float64")(image),  # Keras computes in float32
        layers.GroupNormalization(-1)(layers.Flatten()(image)),  # one number in each group
        layers.GroupNormalization(-1)(layers.GlobalAveragePooling2D(keepdims=True)(image)),
        layers.LayerNormalization(rms_scaling=True)(image),
        layers.Rescaling([1.0, 2.0, 3.0])(layers.GlobalMaxPooling2D()(image)),
        layers.RMSNormalization(axis=[1, 2, 3])(image),
        layers.PReLU("uniform", shared_axes=[1])(image),
        layers.Rescaling(np.ones((4, 3)), 1.0)(image),
    ]
    model = keras.Model(image, outputs)
    x = images(model)
    for actual, expected in zip(on_keras(model)(x), model(x), strict=True):
        assert_close(actual.detach(), expected.detach())


def test_group_norm_of_maps_of_any_size() -> None:
    image = keras.Input((None, None, 3))
    model = keras.Model(image, layers.GroupNormalization(-1)(image))
    for size in (4, 1):
        x = torch.randn(2, size, size, 3)
        assert_close(on_keras(model)(x).detach(), model(x).detach())


@pytest.mark.parametrize("kind", [layers.Dropout, layers.SpatialDropout2D])
def test_dropout_with_a_seed_draws_what_keras_does(kind: type) -> None:
    image, x = keras.Input((4, 4, 8)), torch.ones(2, 4, 4, 8)
    first, second = (keras.Model(image, kind(0.5, seed=7)(image)) for _ in range(2))
    assert torch.equal(vt.to_torch(first).train()(x), second(x, training=True))


def test_dropout_of_a_noise_shape() -> None:
    image = keras.Input((4, 4, 8))
    dropout = layers.Dropout(0.5, noise_shape=(None, 1, 1, None))(image)
    y = vt.to_torch(keras.Model(image, dropout)).train()(torch.ones(16, 4, 4, 8))
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    assert set(y.unique().tolist()) == {0.0, 2.0}


def test_layers_of_any_name() -> None:
    """Also of one that the module itself would use."""
    x = image = keras.Input((4,), name="inputs")
    names = ["steps", "forward", "data_format", "training", "outputs", "self", "meta", "_written"]
    for name in names:
        x = layers.Dense(4, name=name)(x)
    model = keras.Model(image, x)
    lowered = on_keras(model)
    assert_close(lowered(torch.ones(2, 4)).detach(), model(torch.ones(2, 4)).detach())
    network = lowered.network
    assert_close(network.forward(torch.ones(2, 4)).detach(), model(torch.ones(2, 4)).detach())
    assert [name for name, _ in network.named_modules()][1:] == [
        "steps", "forward_", "data_format", "training_", "outputs", "self_", "meta_", "_written_",
    ]  # fmt: skip


def test_masks_are_kept() -> None:
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 4, mask_zero=True)(tokens)
    model = keras.Model(tokens, layers.LSTM(3)(layers.BatchNormalization()(layers.Dense(4)(x))))
    ids = torch.tensor([[1, 2, 0, 0, 0], [3, 4, 5, 0, 0]])
    assert_close(on_keras(model).eval()(ids).detach(), model(ids).detach())


def test_subclasses_and_layers_with_a_call_of_their_own_run_as_they_are() -> None:
    class Halved(layers.Reshape):
        def call(self, x: torch.Tensor) -> torch.Tensor:
            return super().call(x) / 2

    image = keras.Input((6, 4, 3))
    doubled, merged = layers.Permute((2, 1, 3)), layers.Add()
    for layer in (doubled, merged):
        layer.call = lambda x, call=layer.call: call(x) * 2
    model = keras.Model(image, [Halved((24, 3))(image), doubled(image), merged([image, image])])
    x = images(model)
    for actual, expected in zip(on_keras(model)(x), model(x), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(5,), (5, 5), (4, 5), (5, 4, 5)])
def test_products_of_rows_and_of_maps(shape: tuple[int, ...], training: bool) -> None:
    """Also where another axis is as long as the last."""
    keras.utils.set_random_seed(0)
    image = keras.Input(shape)
    hidden = layers.Dense(5, activation="relu6", use_bias=False)(image)
    model = keras.Model(image, layers.Dense(3, activation="relu")(hidden))
    x, found = 20 * torch.randn(2, *shape), []
    for run in (on_keras(model).train(training), lambda x: model(x, training=training)):
        y = run(x)
        kernels = [v.value for v in model.trainable_variables]
        found.append([y, *torch.autograd.grad(y.square().sum(), kernels)])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
    with torch.no_grad():
        for run in (on_keras(model).eval(), vt.optimize_for_inference(model)):
            assert_close(run(x), found[1][0].detach())
