from __future__ import annotations

import copy
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vggtorch  # isort: skip  (first: it selects Keras's torch backend)
import keras
from keras import layers

from vggtorch.lowering import graphs, kernels, modules
from vggtorch.lowering.lowered import Lowered, accelerate_, lower, part
from vggtorch.lowering.modules import KerasLayer

APPLICATIONS = {  # name: image size, operations of it that run as Keras runs them
    "VGG16": (32, set()),
    "ResNet50": (32, set()),
    "ResNet50V2": (32, set()),
    "MobileNet": (32, set()),
    "MobileNetV2": (32, set()),
    "MobileNetV3Small": (32, {"Add", "Multiply"}),  # of keras.ops
    "DenseNet121": (32, set()),
    "EfficientNetB0": (32, {"Dropout"}),  # of whole images
    "InceptionV3": (75, set()),
    "Xception": (71, set()),
    "ConvNeXtTiny": (32, {"Add", "Dense", "LayerScale"}),  # Dense at each position
}


def randomise(model: keras.Model) -> keras.Model:
    """Give batch norms and biases values that a mistake would show in."""
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if variable.name in ("gamma", "moving_variance"):
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        elif variable.name in ("beta", "moving_mean", "bias"):
            variable.assign(rng.normal(0, 0.1, variable.shape))
    return model


def application(name: str, size: int) -> keras.Model:
    keras.utils.set_random_seed(0)
    make = getattr(keras.applications, name)
    return randomise(
        make(weights=None, include_top=False, input_shape=(size, size, 3), pooling="avg")
    )


def small_vgg(data_format: str = "channels_last", dtype: str = "float32") -> keras.Model:
    """Two blocks of a VGG, one with batch norm, and its classifier."""
    keras.utils.set_random_seed(0)
    options = {"data_format": data_format}
    shape = (16, 16, 3) if data_format == "channels_last" else (3, 16, 16)
    axis = -1 if data_format == "channels_last" else 1
    with_dtype = {"dtype": dtype}
    x = image = keras.Input(shape)
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="block1_conv1",
                      **options, **with_dtype)(x)  # fmt: skip
    x = layers.MaxPooling2D(2, name="block1_pool", **options, **with_dtype)(x)
    x = layers.Conv2D(16, 3, padding="same", name="block2_conv1", **options, **with_dtype)(x)
    x = layers.BatchNormalization(axis, 0.5, name="block2_bn1", **with_dtype)(x)
    x = layers.Activation("relu", name="block2_relu1", **with_dtype)(x)
    x = layers.MaxPooling2D(2, name="block2_pool", **options, **with_dtype)(x)
    x = layers.Flatten(name="flatten", **options)(x)
    x = layers.Dense(32, activation="relu", name="fc1", **with_dtype)(x)
    x = layers.Dense(10, activation="softmax", name="predictions", **with_dtype)(x)
    return randomise(keras.Model(image, x))


def images(model: keras.Model, n: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, *model.input_shape[1:], generator=generator)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of the largest magnitude (or of 0.01, below which it is noise)."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * max(expected.abs().max().item(), 0.01)


@pytest.mark.parametrize("name", APPLICATIONS)
def test_outputs_and_gradients_equal_keras(name: str) -> None:
    """Batch norm as in inference: that of deep maps of one pixel would let rounding grow."""
    size, as_keras = APPLICATIONS[name]
    model = application(name, size)
    x = images(model)
    lowered = lower(model).eval()
    found = []
    for run in (lowered, lambda x: model(x, training=False)):
        output = run(x)
        grads = torch.autograd.grad(
            output.square().sum(), [v.value for v in model.trainable_variables]
        )
        found.append([output.detach(), *grads])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)
    with torch.no_grad():  # in which all is fused
        assert_close(lowered(x), output.detach())
    kept = {type(m.operation[0]).__name__ for m in lowered.modules() if isinstance(m, KerasLayer)}
    assert kept == as_keras


def test_vgg_without_batch_norm_is_bit_identical() -> None:
    model = application("VGG16", 64)
    x = images(model, 3)
    with torch.no_grad():
        expected = model(x, training=False)
        assert torch.equal(lower(model).eval()(x), expected)


def step(model: keras.Model, run: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What a step of training leaves: outputs, and gradients or moving statistics."""
    output = run(images(model))
    output.square().sum().backward()
    left = [v.value.grad if v.trainable else v.value.detach() for v in model.variables]
    return output.detach(), left


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
    output, left = step(model, lower(model).train())
    expected, keras_left = step(twin, lambda x: twin(x, training=True))
    assert_close(output, expected, tolerance)
    for actual, value in zip(left, keras_left, strict=True):
        assert_close(actual, value, tolerance)


def test_images_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """One image after the other gives what all at once give, in inference and in training."""
    model, twin = small_vgg(), small_vgg()
    x = images(model)
    expected, expected_left = step(twin, lambda x: twin(x, training=True))
    monkeypatch.setattr(graphs, "GROUP_BYTES", 1)
    lowered: Any = lower(model).train()
    entered: list[int] = []
    convolve = lowered.block1_conv1.convolve

    def spy(x: torch.Tensor) -> torch.Tensor:
        entered.append(len(x))
        return convolve(x)

    monkeypatch.setattr(lowered.block1_conv1, "convolve", spy)
    with torch.profiler.profile() as profile:
        output, left = step(model, lowered)
    assert entered == [1] * 5  # the first to see how many fit
    # Each would fill and add up a tensor as large as the batch's.
    assert "aten::slice_backward" not in {event.key for event in profile.key_averages()}
    assert_close(output, expected, 1e-4)
    for actual, value in zip(left, expected_left, strict=True):
        assert_close(actual, value, 1e-4)
    with torch.no_grad():
        assert_close(lowered.eval()(x), model(x, training=False))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_hooks_see_what_each_layer_gives(
    training: bool, checkpoint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole batch, although otherwise layers are fused and images run in groups."""
    monkeypatch.setattr(graphs, "GROUP_BYTES", 1)
    model = small_vgg()
    x = images(model)
    names = ["block1_conv1", "block2_relu1", "block2_pool", "fc1"]
    parts = keras.Model(model.input, [model.get_layer(name).output for name in names])
    lowered: Any = lower(model, checkpoint=checkpoint).train(training)
    expected = parts(x, training=training)
    seen: dict[str, torch.Tensor] = {}

    def see(name: str, y: torch.Tensor) -> None:
        seen[name] = y.detach().permute(0, 2, 3, 1) if y.ndim == 4 else y.detach()

    hooks = [
        getattr(lowered, name).register_forward_hook(lambda _, __, y, name=name: see(name, y))
        for name in names
    ]
    with torch.set_grad_enabled(training):
        lowered(x)
        for name, value in zip(names, expected, strict=True):
            assert_close(seen[name], value.detach(), 1e-4)
        for hook in hooks:
            hook.remove()
        seen.clear()
        lowered(x)
    assert not seen


def test_gradients_of_a_hooked_map() -> None:
    """As Grad-CAM takes them."""
    model = small_vgg()
    lowered: Any = lower(model).eval()
    found: list[torch.Tensor] = []
    lowered.block1_conv1.register_full_backward_hook(lambda _, __, of_y: found.append(of_y[0]))
    lowered(images(model))[:, 0].sum().backward()
    assert found[0].shape == (4, 8, 16, 16) and found[0].any()


def test_what_goes_into_a_pool_is_not_kept() -> None:
    model = small_vgg()
    lowered = lower(model).train()
    shapes: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lowered(images(model))
    assert {(3, 16, 16), (8, 8, 8)} <= {shape[1:] for shape in shapes}
    assert (8, 16, 16) not in {shape[1:] for shape in shapes}


@pytest.mark.parametrize("training", [False, True])
def test_operations_are_counted(training: bool) -> None:
    """A count of floating-point operations must not miss fused ones."""
    model = small_vgg()
    lowered = lower(model).train(training)
    with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
        lowered(images(model))
    convolutions = 16 * 16 * 9 * 3 * 8 + 8 * 8 * 9 * 8 * 16
    assert counter.get_total_flops() == 2 * 4 * (convolutions + 4 * 4 * 16 * 32 + 32 * 10)


def exchanged(model: keras.Model, lowered: torch.nn.Module, factor: float) -> tuple[Any, Any]:
    """Other parameters, by name, and what Keras gives with them."""
    names = [name for name, _ in lowered.named_parameters()]
    twin = small_vgg()
    for kernel in twin.trainable_variables:
        kernel.assign(kernel * factor)
    parameters = dict(zip(names, (p.detach() for p in lower(twin).parameters()), strict=True))
    return parameters, twin


@pytest.mark.parametrize("training", [False, True])
def test_parameters_of_one_call(training: bool) -> None:
    """functional_call, as averaged weights or ensembles are evaluated."""
    model = small_vgg()
    lowered = lower(model).train(training)
    x = images(model)
    with torch.set_grad_enabled(training):
        expected = [model(x, training=training)]
        found = [lowered(x)]
        for factor in (1.5, 0.5):
            parameters, twin = exchanged(model, lowered, factor)
            found.append(torch.func.functional_call(lowered, parameters, (x,)))
            expected.append(twin(x, training=training))
            del parameters  # so that the next may stand where these stood
        found.append(lowered(x))
    for actual, value in zip(found, [*expected, expected[0]], strict=True):
        assert_close(actual.detach(), value.detach(), 1e-4)


def test_transforms() -> None:
    """Derivatives in forward mode, and one gradient for each image."""
    model = small_vgg()
    model.get_layer("block2_bn1").trainable = False  # or images would depend on each other
    lowered = lower(model).train()
    x, of_x = images(model), images(model).flip(0)
    of_y = torch.func.jvp(lowered, (x,), (of_x,))[1].detach()
    weights = torch.randn(of_y.shape)
    (gradient,) = torch.autograd.grad(lowered(x.requires_grad_()), x, weights)
    assert_close((of_y * weights).sum(), (gradient * of_x).sum(), 1e-3)
    x = x.detach()

    parameters = dict(lowered.named_parameters())
    trained = {name: p.detach() for name, p in parameters.items() if p.requires_grad}

    def loss(trained: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        output = torch.func.functional_call(lowered, trained, (image.unsqueeze(0),))
        return output.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(trained, x)
    lowered(x).square().sum().backward()
    for name, gradients in each.items():
        expected = parameters[name].grad
        assert expected is not None
        assert_close(gradients.sum(0), expected, 1e-4)


def test_a_batch_without_images() -> None:
    model = small_vgg()
    lowered = lower(model).train()
    model.get_layer("block2_bn1").trainable = False
    lowered(torch.zeros(0, 16, 16, 3)).sum().backward()
    assert not model.get_layer("fc1").kernel.value.grad.any()
    with torch.no_grad():
        assert lowered.eval()(torch.zeros(0, 16, 16, 3)).shape == (0, 10)


def dropout_vgg() -> keras.Model:
    """small_vgg with a second convolution in its first block and dropout in its second."""
    keras.utils.set_random_seed(0)
    x = image = keras.Input((16, 16, 3))
    for _ in range(2):
        x = layers.Conv2D(8, 3, padding="same", activation="relu")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Dropout(0.5)(layers.Conv2D(8, 3, padding="same")(x))
    x = layers.Flatten()(layers.MaxPooling2D()(x))
    return randomise(keras.Model(image, layers.Dense(10)(x)))


def kept(run: Any, x: torch.Tensor) -> int:
    """Bytes that a call keeps for backward."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor._base, nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(x)
    return sum(storages.values())


def test_checkpointing_keeps_less_and_changes_nothing() -> None:
    """Dropout must drop the same, and batch norm must count a batch once."""
    found, memory = [], []
    for checkpoint in (False, True):
        model = dropout_vgg()
        lowered = lower(model, checkpoint=checkpoint).train()
        torch.manual_seed(5)
        output, left = step(model, lowered)
        found.append([output, *left])
        memory.append(kept(lowered, images(model)))
        with torch.no_grad():
            assert_close(lowered.eval()(images(model)), model(images(model), training=False))
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)
    assert memory[1] < memory[0] / 4


def test_checkpointing_leaves_keras_layers_alone() -> None:
    """A seeded layer counts its calls, so that a second one would not repeat the first."""
    found = []
    for checkpoint in (False, True):
        keras.utils.set_random_seed(0)
        image = keras.Input((8, 8, 3))
        x = layers.SpatialDropout2D(0.5, seed=3)(layers.Conv2D(8, 3)(image))
        x = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3)(x))
        model = keras.Model(image, x)
        output, _ = step(model, lower(model, checkpoint=checkpoint).train())
        grads = [v.value.grad for v in model.trainable_variables]
        found.append([output, *grads])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)


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
    lowered = lower(model, data_format=given).eval()
    assert_close(lowered(x).detach(), expected)
    with torch.no_grad():
        assert_close(lowered(x), expected)


def test_feature_maps_come_out_in_the_layout_asked_for() -> None:
    vgg = small_vgg()
    model = keras.Model(vgg.input, vgg.get_layer("block1_pool").output)
    x = images(model)
    expected = model(x).detach()
    assert_close(lower(model)(x).detach(), expected)
    first = lower(model, data_format="channels_first")(x.permute(0, 3, 1, 2)).detach()
    assert_close(first, expected.permute(0, 3, 1, 2))


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
    assert_close(lower(model)(x).detach(), expected)
    with torch.no_grad():
        assert_close(lower(model).eval()(x), expected)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("layer", [layers.MaxPooling2D, layers.AveragePooling2D])
def test_pooling(layer: type, padding: str) -> None:
    image = keras.Input((15, 14, 4))
    model = keras.Model(image, [layer(3, 2, padding)(image), layer(2, 2, padding)(image)])
    x = images(model)
    for actual, expected in zip(lower(model)(x), model(x), strict=True):
        assert torch.equal(actual, expected)


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
    lowered = lower(model)
    for mode in (lowered.train(), lowered.eval()):
        outputs = mode(inputs)
        for key in expected:
            assert_close(outputs[key].detach(), expected[key].detach())
    with torch.no_grad():
        for key, output in lowered(inputs).items():
            assert_close(output, expected[key].detach())


def test_a_layer_without_handler_gets_training_and_keeps_its_parameters() -> None:
    image = keras.Input((6, 6, 3))
    noisy = layers.GaussianNoise(1.0)(layers.UnitNormalization()(image))
    model = keras.Model(image, layers.PReLU(name="prelu")(noisy))
    x = images(model)
    lowered: Any = lower(model)
    assert torch.equal(lowered.eval()(x), model(x, training=False))
    assert not torch.allclose(lowered.train()(x), lowered.eval()(x))
    assert lowered.prelu.alpha is model.get_layer("prelu").alpha.value


def as_torch(model: keras.Model, x: torch.Tensor) -> torch.Tensor:
    """What the lowered model gives, in which no layer may run as Keras runs it."""
    lowered = lower(model).train()
    assert not any(isinstance(m, KerasLayer) for m in lowered.modules())
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


def test_layers_set_to_what_only_keras_does() -> None:
    image = keras.Input((6, 4, 3))
    outputs = [
        layers.Normalization(mean=1.0, variance=4.0, invert=True)(image),
        layers.LayerNormalization(axis=[2, 3])(image),
        layers.UpSampling2D(2, interpolation="bilinear")(image),
        layers.Rescaling(np.ones((4, 3)), 1.0)(image),
    ]
    model = keras.Model(image, outputs)
    x = images(model)
    for actual, expected in zip(lower(model)(x), model(x), strict=True):
        assert_close(actual.detach(), expected.detach())


def test_layers_of_any_name() -> None:
    """Also of one that the module itself would use."""
    x = image = keras.Input((4,), name="inputs")
    names = ["steps", "forward", "data_format", "training", "outputs"]
    for name in names:
        x = layers.Dense(4, name=name)(x)
    model = keras.Model(image, x)
    lowered = lower(model)
    assert_close(lowered(torch.ones(2, 4)).detach(), model(torch.ones(2, 4)).detach())
    found = [name for name, _ in lowered.named_modules()][1:]
    assert found == ["steps", "forward_", "data_format_", "training_", "outputs"]


def test_one_activation_after_several_convolutions() -> None:
    """Each convolution must keep its own weights where it takes the activation over."""
    image = keras.Input((8, 8, 3))
    relu = layers.ReLU()
    x = relu(layers.Conv2D(4, 3)(image))
    model = keras.Model(image, relu(layers.Conv2D(4, 3)(x)))
    x = images(model)
    with torch.no_grad():
        assert_close(lower(model).eval()(x), model(x))


def test_masks_are_kept() -> None:
    tokens = keras.Input((5,), dtype="int32")
    x = layers.Embedding(7, 4, mask_zero=True)(tokens)
    model = keras.Model(tokens, layers.LSTM(3)(layers.BatchNormalization()(layers.Dense(4)(x))))
    ids = torch.tensor([[1, 2, 0, 0, 0], [3, 4, 5, 0, 0]])
    assert_close(lower(model).eval()(ids).detach(), model(ids).detach())


def test_dropout_follows_train_and_eval() -> None:
    image = keras.Input((1000,))
    model = keras.Model(image, layers.Dropout(0.25)(image))
    x = torch.ones(20, 1000)
    lowered = lower(model)
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
    assert torch.equal(lower(models[0]).train()(x), models[1](x, training=True))


def test_batch_norm_that_is_not_trainable_stays_frozen() -> None:
    model = small_vgg()
    norm = model.get_layer("block2_bn1")
    x = images(model)
    lowered = lower(model).train()
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
    assert_close(lower(model).train()(x).detach(), twin(x, training=True).detach(), 1e-4)
    for mine, theirs in zip(model.variables, twin.variables, strict=True):
        assert_close(mine.value.detach(), theirs.value.detach(), 1e-5)


# Parameters


def test_the_parameters_are_the_keras_models_own() -> None:
    model = small_vgg()
    values = model.get_weights()
    lowered: Any = lower(model)
    ours = {id(p) for p in lowered.parameters()}
    assert ours == {id(v.value) for v in model.variables}
    assert lowered.block1_conv1.kernel is model.get_layer("block1_conv1").kernel.value
    assert {"block1_conv1", "block2_bn1", "fc1"} <= {name for name, _ in lowered.named_modules()}
    assert "block1_conv1.kernel" in lowered.state_dict()
    for value, expected in zip(model.get_weights(), values, strict=True):
        np.testing.assert_array_equal(value, expected)
    for name in ("block1_conv1", "block2_conv1"):
        kernel = model.get_layer(name).kernel.value
        assert kernel.permute(3, 2, 0, 1).is_contiguous(memory_format=torch.channels_last)
    assert model.get_layer("fc1").kernel.value.t().is_contiguous()


@pytest.mark.parametrize("batch_norm", [False, True])
def test_torchvision_takes_our_state_dict(batch_norm: bool) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = randomise(vggtorch.VGG11(weights=None, classes=10, batch_norm=batch_norm,
                                     classifier_activation=None))  # fmt: skip
    lowered = lower(model, data_format="channels_first").eval()
    name = "vgg11_bn" if batch_norm else "vgg11"
    theirs = getattr(torchvision.models, name)(num_classes=10).eval()
    state = lowered.torchvision_state_dict()
    assert list(state) == list(theirs.state_dict())
    theirs.load_state_dict(state, strict=True)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert_close(lowered(x), theirs(x))
    kernel = model.get_layer("block1_conv1").kernel.value
    assert state["features.0.weight"].data_ptr() == kernel.data_ptr()


def test_torchvision_has_no_keys_for_other_layers() -> None:
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(64, 3, padding="same", name="block1_conv1")(image)
    lowered = lower(keras.Model(image, layers.Conv2D(5, 1, name="head")(x)))
    with pytest.raises(ValueError, match="Unexpected: head/bias, head/kernel"):
        lowered.torchvision_state_dict()


def test_parts_of_a_model() -> None:
    model = small_vgg()
    calls = [len(layer._inbound_nodes) for layer in model.layers]
    x = images(model)
    middle, end = model.get_layer("block1_pool").output, model.get_layer("block2_relu1").output
    first = part(model.input, middle).eval()
    rest = part(middle, [end, model.output]).eval()
    with torch.no_grad():
        found, probabilities = rest(first(x))
        assert_close(probabilities, model(x, training=False))
        assert_close(found, keras.Model(model.input, end)(x, training=False))
        nchw = part(model.input, middle, data_format="channels_first").eval()
        assert_close(nchw(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), first(x))
        assert first(torch.zeros(1, 20, 24, 3)).shape == (1, 10, 12, 8)  # another size
    assert {id(p) for p in rest.parameters()} <= {id(v.value) for v in model.variables}
    assert [len(layer._inbound_nodes) for layer in model.layers][:-2] == calls[:-2]
    with pytest.raises(ValueError, match="shape .4, 16, 16, 3.; expected .None, None, None, 8."):
        rest(x)
    with pytest.raises(ValueError, match="data_format='NCHW'"):
        part(model.input, middle, data_format="NCHW")
    image = keras.Input((8, 8, 3))
    branch = layers.Conv2D(3, 1)(image)
    around = keras.Model(image, layers.Add()([branch, image]))
    with pytest.raises(ValueError, match="not connected"):
        part(branch, around.output)


def test_convolution_copies_no_activation() -> None:
    lowered = lower(small_vgg()).train()
    x = torch.randn(2, 16, 16, 3)
    assert not operations(lowered, x) & {"aten::contiguous", "aten::clone"}


def test_trained_from_either_side() -> None:
    model = small_vgg()
    x, y = images(model), torch.tensor([0, 1, 2, 3])
    lowered = lower(model).train()
    optimizer = torch.optim.SGD([p for p in lowered.parameters() if p.requires_grad], lr=0.01)
    F.nll_loss(lowered(x).log(), y).backward()
    optimizer.step()
    with torch.no_grad():
        assert_close(lowered.eval()(x), model(x, training=False))
    before = model.get_weights()
    model.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy")
    model.fit(x, y, verbose=0)
    assert not np.array_equal(model.get_weights()[0], before[0])
    with torch.no_grad():
        assert_close(lowered.eval()(x), model(x, training=False))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.mul_(1.5),
        lambda p: p.data.mul_(1.5),
        lambda p: setattr(p, "data", p.data * 1.5),
        lambda p: p.copy_(torch.zeros_like(p)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_prepared_follows_the_parameters(change: Any, dtype: torch.dtype) -> None:
    model = small_vgg()
    lowered = lower(model, dtype=dtype).eval()
    x = images(model)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    with torch.no_grad():
        before = lowered(x)
        for name in ("block1_conv1", "block2_conv1", "fc1"):
            change(model.get_layer(name).kernel.value)
            after = lowered(x)
            assert not torch.allclose(after, before)
            assert_close(after.float(), model(x, training=False), tolerance)
            before = after
        model.get_layer("block2_bn1").moving_mean.assign(np.ones(16))
        assert_close(lowered(x).float(), model(x, training=False), tolerance)


def test_saved_loaded_moved_and_copied(tmp_path: Path) -> None:
    model = small_vgg()
    x = images(model)
    lowered = lower(model).eval()
    expected = lowered(x).detach()
    path = f"{tmp_path}/weights.weights.h5"
    model.save_weights(path)
    state = copy.deepcopy(lowered.state_dict())
    with torch.no_grad():
        lowered(x)  # leaves prepared weights, which copies must do without
    twin = copy.deepcopy(lowered)

    def zero() -> None:
        for p in lowered.parameters():
            p.data.zero_()

    zero()
    model.load_weights(path)
    assert_close(lowered(x).detach(), expected)
    zero()
    lowered.load_state_dict(state)
    assert_close(model(x, training=False).detach(), expected)
    zero()
    assert_close(twin(x).detach(), expected)  # a copy has parameters of its own
    lowered.load_state_dict(state)
    lowered.to("cpu").to(memory_format=torch.contiguous_format)
    assert {id(p) for p in lowered.parameters()} == {id(v.value) for v in model.variables}
    assert_close(lowered(x).detach(), expected)


def test_a_frozen_prefix_keeps_nothing_for_backward() -> None:
    model = small_vgg()
    for layer in model.layers[:-2]:
        layer.trainable = False
    x = images(model)
    saved: list[torch.Size] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        lower(model).train()(x).sum().backward()
    assert not [shape for shape in saved if len(shape) == 4]
    assert model.get_layer("fc1").kernel.value.grad is not None


def operations(run: Any, x: torch.Tensor) -> set[str]:
    """The operations of torch that a call runs."""
    with torch.profiler.profile() as profile:
        run(x)
    return {event.key for event in profile.key_averages()}


FUSED = "mkldnn::_convolution_pointwise"


@pytest.mark.parametrize("until", ["block1_conv1", "block1_pool", "block2_conv1", "fc1"])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("group_bytes", [1, 1 << 20])
def test_frozen_layers_train_as_keras(
    until: str, checkpoint: bool, group_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the boundary is between those that run as in inference and those that learn."""
    monkeypatch.setattr(graphs, "GROUP_BYTES", group_bytes)
    model, twin = small_vgg(), small_vgg()
    for network in (model, twin):
        for layer in network.layers:
            layer.trainable = False
            if layer.name == until:
                break
    lowered = lower(model, checkpoint=checkpoint).train()
    x = images(model)
    assert (FUSED in operations(lowered, x)) == kernels.fuses(x, x.dtype)
    output, left = step(model, lowered)
    twin(x, training=True)  # counted by batch norm
    expected, expected_left = step(twin, lambda x: twin(x, training=True))
    assert_close(output, expected, 1e-4)
    for actual, value in zip(left, expected_left, strict=True):
        assert_close(actual, value, 1e-4)


def test_layers_that_thaw_or_freeze_are_noticed() -> None:
    model = small_vgg()
    x, kernel = images(model), model.get_layer("block1_conv1").kernel.value
    lowered = lower(model).train()
    for trainable in (False, True, False):
        model.trainable = trainable
        kernel.grad = None
        output = lowered(x)
        assert output.requires_grad == trainable
        if trainable:
            output.sum().backward()
            assert kernel.grad is not None and kernel.grad.any()
        else:
            assert_close(output, model(x, training=True).detach())


def test_gradients_of_the_input_go_through_frozen_layers() -> None:
    """As adversarial examples and style transfer take them."""
    model = small_vgg()
    model.trainable = False
    found = []
    for run in (lower(model).train(), lower(model).eval(), lambda x: model(x, training=True)):
        x = images(model).requires_grad_()
        run(x).square().sum().backward()
        assert x.grad is not None
        found.append(x.grad)
    assert_close(found[0], found[2], 1e-4)
    assert_close(found[1], found[2], 1e-4)


def test_frozen_dropout_still_drops() -> None:
    model = dropout_vgg()
    model.trainable = False
    lowered = lower(model).train()
    x = images(model)
    assert not torch.equal(lowered(x), lowered(x))
    with torch.no_grad():
        assert not torch.equal(lowered(x), lowered(x))


def test_evaluation_sees_weights_that_were_written_through_data() -> None:
    """As averages of weights are often put in place; here where no sample of them is taken."""
    model = small_vgg()
    kernel = model.get_layer("block2_conv1").kernel.value
    lowered = lower(model).eval()
    x = images(model)
    with torch.no_grad():
        before = lowered(x)
        lowered.train()
        kernel.data[1, 1, 1, 1] += 1
        after = lowered.eval()(x)
    assert not torch.equal(before, after)
    assert_close(after, model(x, training=False).detach())


# Precision


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_dtype_policies(policy: str) -> None:
    model = small_vgg(dtype=policy)
    x = images(model)
    lowered = lower(model)
    expected = model(x, training=False).detach()
    assert_close(lowered.eval()(x).detach(), expected, 3e-2)
    with torch.no_grad():
        assert_close(lowered(x), expected, 3e-2)
    output = lowered.train()(x)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    for variable in model.trainable_variables:
        assert variable.value.grad.dtype == variable.value.dtype


def test_dtype_computes_as_the_mixed_policy_does() -> None:
    model, mixed = small_vgg(), small_vgg(dtype="mixed_bfloat16")
    mixed.set_weights(model.get_weights())
    x = images(model)
    lowered = lower(model, dtype=torch.bfloat16).eval()
    expected = mixed(x, training=False).detach()
    assert_close(lowered(x).detach(), expected, 3e-2)
    with torch.no_grad():
        assert_close(lowered(x), expected, 3e-2)
    assert {p.dtype for p in lowered.parameters()} == {torch.float32}


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_computes_in_bfloat16(frozen: bool) -> None:
    """Convolutions and products; from them on, everything that autocast leaves in bfloat16."""
    model = small_vgg()
    if frozen:
        model.get_layer("block1_conv1").trainable = False
    x = images(model)
    lowered: Any = lower(model).train()
    seen: list[torch.dtype] = []
    hook = lowered.block2_bn1.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        lowered(x)
        hook.remove()
        output = lowered(x)
        with torch.no_grad():
            fused = lowered.eval()(x)
    assert seen == [torch.bfloat16]
    output.float().square().sum().backward()
    twin = small_vgg()
    for _ in range(2):  # counted by batch norm
        expected = twin(x, training=True)
    expected.square().sum().backward()
    assert_close(output.detach().float(), expected.detach(), 5e-2)
    for name in ("block2_conv1", "fc1", "predictions"):
        grad = model.get_layer(name).kernel.value.grad
        assert grad.dtype == torch.float32
        exact = twin.get_layer(name).kernel.value.grad
        assert (grad - exact).norm() < 0.1 * exact.norm()
    assert_close(fused.float(), twin(x, training=False).detach(), 5e-2)
    assert lowered(x).dtype == torch.float32  # the next call is nobody's autocast
    with torch.no_grad():
        assert_close(lowered(x), model(x, training=False))


def test_a_large_batch_of_mixed_precision_is_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense computes small batches in its kernel's own dtype, which is exact, and large in bf16."""
    for many_rows in (1, 100):
        monkeypatch.setattr(modules, "MANY_ROWS", many_rows)
        model = small_vgg()
        lowered: Any = lower(model, dtype=torch.bfloat16).train()
        fc1 = model.get_layer("fc1")
        x = torch.randn(4, 4 * 4 * 16).bfloat16()
        y = lowered.fc1(x)
        assert y.dtype == torch.bfloat16
        exact = F.linear(x.float(), fc1.kernel.value.t(), fc1.bias.value).relu().bfloat16()
        assert torch.equal(y, exact) == (many_rows == 100 and kernels.fuses(x, torch.float32))
        assert_close(y.detach(), exact.detach(), 2e-2)
        y.float().sum().backward()
        assert fc1.kernel.value.grad.dtype == torch.float32


# torch.compile, several processes


@pytest.mark.parametrize("training", [True, False])
def test_no_graph_breaks(training: bool) -> None:
    model = small_vgg()
    x = images(model)
    lowered = lower(model).train(training)
    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        assert torch._dynamo.explain(lowered)(x).graph_break_count == 0
        compiled = torch.compile(
            lower(small_vgg()).train(training), backend="aot_eager", fullgraph=True
        )
        assert_close(compiled(x).detach(), lower(small_vgg()).train(training)(x).detach())


def _gradients(rank: int, port: int, out: object) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    grads: list[np.ndarray] = []
    for checkpoint in (False, True):
        model = small_vgg()
        model.get_layer("block2_bn1").trainable = False
        module = lower(model, checkpoint=checkpoint).train()
        parallel = nn.parallel.DistributedDataParallel(module)
        half = images(model)[rank * 2 : rank * 2 + 2]
        parallel(half).square().sum(1).mean().backward()
        grads += [v.value.grad.numpy() for v in model.trainable_variables]
    if rank == 0:
        np.savez(out, *grads)  # type: ignore[arg-type]
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = f"{tmp_path}/gradients.npz"
    torch.multiprocessing.spawn(_gradients, (port, out), nprocs=2)
    model = small_vgg()
    model.get_layer("block2_bn1").trainable = False
    lower(model).train()(images(model)).square().sum(1).mean().backward()
    variables = model.trainable_variables * 2  # without checkpointing, and with it
    for variable, grad in zip(variables, np.load(out).values(), strict=True):
        np.testing.assert_allclose(variable.value.grad.numpy(), grad, rtol=1e-4, atol=1e-6)


# The Keras model itself


def trained(accelerated: bool, dropout: float = 0.5, **options: bool) -> tuple[keras.Model, dict]:
    keras.utils.set_random_seed(1)
    vgg = small_vgg()
    x = layers.Dropout(dropout)(vgg.get_layer("fc1").output)
    model = keras.Model(vgg.input, layers.Dense(4, activation="softmax")(x))
    model.compile(
        # Adam would make full steps of the noise that is a bias's gradient before batch norm.
        keras.optimizers.SGD(0.01, momentum=0.9),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    if accelerated:
        assert accelerate_(model, **options) is model
    rng = np.random.default_rng(0)
    images, classes = rng.normal(size=(24, 16, 16, 3)), rng.integers(0, 4, 24)
    keras.utils.set_random_seed(2)
    history = model.fit(images, classes, 8, 2, verbose=0, validation_data=(images, classes)).history
    return model, history | {
        "evaluate": model.evaluate(images, classes, verbose=0),
        "predict": model.predict(images, verbose=0),
        "call": model(images).detach().numpy(),
        "training": model(images, training=True).shape,
        "moving_mean": model.get_layer("block2_bn1").moving_mean.numpy(),
    }


def test_accelerated_fit_evaluate_predict_and_call() -> None:
    _, expected = trained(accelerated=False)
    model, actual = trained(accelerated=True)
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=1e-3, atol=1e-5, err_msg=key)
    accelerate_(model, enabled=False)
    assert "call" not in vars(model)


def test_accelerated_runs_the_lowered_module() -> None:
    model = accelerate_(accelerate_(small_vgg()))
    x = images(model)
    ran = operations(lambda x: model.predict(x, verbose=0), x)
    assert (FUSED in ran) == kernels.fuses(x, x.dtype)


def test_accelerated_compiled() -> None:
    _, expected = trained(accelerated=False, dropout=0.0)
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:  # a compiler is not everywhere; the graph is
        real = torch.compile
        patch.setattr(torch, "compile", lambda module: real(module, backend="aot_eager"))
        _, actual = trained(accelerated=True, dropout=0.0, compile=True)
    np.testing.assert_allclose(actual["loss"], expected["loss"], rtol=1e-3)


def test_accelerated_models_save_clone_and_can_be_cut(tmp_path: Path) -> None:
    model = accelerate_(small_vgg())
    x = images(model)
    expected = model.predict(x, verbose=0)
    path = f"{tmp_path}/model.keras"
    model.save(path)
    loaded = keras.saving.load_model(path)
    assert "call" not in vars(loaded) | vars(keras.models.clone_model(model))
    np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-6)
    head = layers.Dense(2)(model(keras.Input((16, 16, 3))))  # symbolic: as a layer of another
    assert head.shape == (None, 2)
    cut = keras.Model(model.input, model.get_layer("block1_pool").output)
    assert cut.predict(x, verbose=0).shape == (4, 8, 8, 8)


def test_accelerated_optimizer_slots_have_the_layout_of_their_kernels() -> None:
    model, _ = trained(accelerated=True)
    kernel = model.get_layer("block1_conv1").kernel.value
    slots = [v.value for v in model.optimizer.variables if v.value.shape == kernel.shape]
    assert len(slots) == 1
    assert all(slot.stride() == kernel.stride() for slot in slots)


def test_accelerated_without_compile() -> None:
    model, twin = accelerate_(small_vgg()), small_vgg()
    x = images(model)
    assert_close(model(x, training=True).detach(), twin(x, training=True).detach(), 1e-4)


def test_plain_operations_where_onednn_is_off() -> None:
    model = small_vgg()
    x = images(model)
    lowered = lower(model).eval()
    with torch.no_grad():
        expected = lowered(x)
        with torch.backends.mkldnn.flags(enabled=False):
            assert_close(lowered(x), expected)
        assert torch.equal(lowered(x), expected)


def test_accelerated_sequential() -> None:
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(2, 3), layers.Flatten()])
    x = np.random.default_rng(0).normal(size=(3, 8, 8, 3))
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(accelerate_(model).predict(x, verbose=0), expected, rtol=1e-5)


# What is refused


def test_refusals() -> None:
    class Own(keras.Model):
        def call(self, x: torch.Tensor) -> torch.Tensor:
            return x

    with pytest.raises(ValueError, match="not a Functional model or a built Sequential one"):
        lower(Own())
    with pytest.raises(ValueError, match="not a Functional model or a built Sequential one"):
        lower(keras.Sequential([layers.Dense(2)]))
    with pytest.raises(ValueError, match="data_format='NCHW'; expected 'channels_last'"):
        lower(small_vgg(), data_format="NCHW")
    with pytest.raises(ValueError, match=r"dtype=torch.int8; expected torch.float32"):
        lower(small_vgg(), dtype=torch.int8)
    lowered = lower(small_vgg())
    with pytest.raises(ValueError, match=r"shape \(2, 3, 16, 16\); expected \(None, 16, 16, 3\)"):
        lowered(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"from torch\.float32 to torch\.bfloat16"):
        lowered.to(torch.bfloat16)
    with pytest.raises(ValueError, match="Received 2 inputs; this model takes 1"):
        lowered([torch.zeros(2, 16, 16, 3)] * 2)


# A GPU, where there is one


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("training", [True, False])
def test_cuda_equals_keras(training: bool) -> None:
    model = small_vgg()
    twin = small_vgg()
    x = images(model).to(DEVICE)
    with torch.set_grad_enabled(training):
        lowered = lower(model).train(training)
        assert_close(lowered(x), twin(x, training=training), 1e-3)
    assert {p.device.type for p in lowered.parameters()} == {DEVICE}


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_cuda_trains_as_keras(frozen: bool, dtype: torch.dtype) -> None:
    """Also after the parameters were elsewhere, and after an inference."""
    model, twin = small_vgg(), small_vgg()
    for network in (model, twin):
        network.get_layer("block1_conv1").trainable = not frozen
    x = images(model).to(DEVICE)
    lowered = lower(model).to("cpu").to(DEVICE)
    assert {id(p) for p in lowered.parameters()} == {id(v.value) for v in model.variables}
    with torch.inference_mode():
        lowered.eval()(x)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        output = lowered.train()(x)
    expected = twin(x, training=True)
    for y in (output, expected):
        y.float().square().sum().backward()
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    for variable, theirs in zip(model.trainable_variables, twin.trainable_variables, strict=True):
        if variable.path != "block2_conv1/bias":  # before batch norm, so its gradient is noise
            exact = theirs.value.grad
            assert (variable.value.grad - exact).norm() < tolerance * exact.norm()


def follows_inputs_and_parameters(model: keras.Model, lowered: Lowered, run: Any) -> None:
    """Whether replays give what Keras gives: other images, other shapes, other weights."""
    kernel = model.get_layer("block1_conv1").kernel.value
    x, few = images(model).to(kernel.device), images(model, 2).to(kernel.device)
    with torch.inference_mode():
        run(x)
    with torch.no_grad():
        first = run(x)
        expected = model(x, training=False)
        for given in (x, few, x * 2):
            assert_close(run(given), model(given, training=False), 1e-3)
        assert_close(first, expected, 1e-3)  # no replay has written over it
        for change in (lambda: kernel.mul_(1.5), lambda: setattr(kernel, "data", kernel * 0.5)):
            change()
            assert not torch.allclose(run(x), expected)
            assert_close(run(x), model(x, training=False), 1e-3)
    assert len(lowered._captured) == 1  # what was captured of other weights is gone
    assert not copy.deepcopy(lowered)._captured


def test_replays_follow_inputs_and_parameters() -> None:
    """Where there is no GPU, with a function that stands for the graph."""
    model = small_vgg()
    lowered: Any = lower(model, cuda_graphs=True).eval()

    def capture(inputs: list[torch.Tensor]) -> Any:
        static = [x.clone() for x in inputs]
        outputs = graphs.Graph.forward(lowered, *static)

        def replay() -> None:
            for mine, new in zip(outputs, graphs.Graph.forward(lowered, *static), strict=True):
                mine.copy_(new)

        return SimpleNamespace(replay=replay), static, outputs

    lowered._capture = capture
    follows_inputs_and_parameters(
        model, lowered, lambda x: lowered._replay([x.permute(0, 3, 1, 2)])[0]
    )
    lowered._captured.clear()
    with torch.no_grad():  # as it is, it doesn't try on a CPU
        assert_close(lowered(images(model)), model(images(model), training=False))
    assert not lowered._captured


def test_what_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    lowered = lower(small_vgg(), cuda_graphs=True).eval()
    on_gpu: list[Any] = [SimpleNamespace(is_cuda=True)]
    assert not lowered._replays(on_gpu)  # there may be gradients to come
    with torch.no_grad():
        assert lowered._replays(on_gpu)
        assert not lowered._replays([torch.ones(1)])
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert not lowered._replays(on_gpu)


@needs_gpu
def test_cuda_graphs() -> None:
    model = small_vgg()
    lowered = lower(model, cuda_graphs=True).eval()
    follows_inputs_and_parameters(model, lowered, lowered)
    lowered.train()(images(model).cuda()).sum().backward()  # as without graphs
