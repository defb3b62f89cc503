"""FeatureExtractor gives what torchvision's create_feature_extractor gives, and Keras's layers."""

import copy
import pickle

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import keras
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kept import kept_for_backward, plain_network
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import functional as transforms

from vggtorch.features.frozen import _MaxPool as MaxPool

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TAPS = {  # ours -> torchvision's; both sides of a ReLU
    "block1_conv2": "features.2",
    "relu1_2": "features.3",
    "block3_conv3_relu": "features.15",
    "pool4": "features.23",
    "conv5_2": "features.26",
}
pytestmark = pytest.mark.usefixtures("one_thread")


def close(received, expected, tolerance=2e-5):
    scale = expected.abs().max().item()
    torch.testing.assert_close(received, expected, rtol=0, atol=tolerance * scale)


@pytest.fixture(scope="module")
def peer(torchvision_vgg):
    network = copy.deepcopy(torchvision_vgg)
    for module in network.modules():  # in place, a ReLU would overwrite what is tapped before it
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False
    return create_feature_extractor(network, {name: tap for tap, name in TAPS.items()})


@pytest.mark.slow
def test_values_and_gradients_are_those_of_create_feature_extractor(vgg, peer, images):
    extractor = vt.FeatureExtractor(vgg, [*TAPS], normalization="imagenet")
    # In float64, where no value is so near 0 that the two see it on different sides of a ReLU.
    ours, theirs = copy.deepcopy(extractor).double(), copy.deepcopy(peer).double()
    gradients = []
    for features in (ours, lambda x: theirs(transforms.normalize(x, MEAN, STD))):
        x = images.double().requires_grad_()
        values = features(x)
        assert list(values) == [*TAPS]
        sum(value.square().mean() for value in values.values()).backward()
        gradients.append((values, x.grad))
    (received, gradient), (expected, wanted) = gradients
    for tap in TAPS:
        close(received[tap], expected[tap], 1e-12)
        close(extractor(images)[tap], expected[tap].float())
    close(gradient, wanted, 1e-10)
    assert not any(p.requires_grad or p.grad is not None for p in extractor.parameters())


def test_nothing_behind_the_last_tap_is_there(vgg):
    extractor = vt.FeatureExtractor(vgg, ["block2_conv1"], normalization="imagenet")
    names = [name for name, _ in extractor.network.named_children()]
    assert names == ["block1_conv1", "block1_conv1_relu", "block1_conv2", "block1_conv2_relu",
                     "block1_pool", "block2_conv1"]  # fmt: skip
    assert len(list(extractor.parameters())) == 6
    assert extractor(torch.rand(1, 3, 32, 32))["block2_conv1"].min() < 0  # before the ReLU


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet", "features", "oxford"])
def test_each_normalisation_is_that_of_preprocess_in_every_range_and_layout(vgg, images, name):
    pixels = (images * 255).round()
    ready = torch.as_tensor(vt.preprocess(pixels.permute(0, 2, 3, 1), name)).permute(0, 3, 1, 2)
    expected = vt.FeatureExtractor(vgg, ["relu1_1"], normalization=None)(ready)["relu1_1"]
    for value_range, given in {
        (0, 255): pixels,
        (0, 1): pixels / 255,
        (-1, 1): pixels / 127.5 - 1,
    }.items():
        first = vt.FeatureExtractor(vgg, ["relu1_1"], normalization=name, value_range=value_range)
        close(first(given)["relu1_1"], expected)
        last = vt.FeatureExtractor(
            vgg, ["relu1_1"], normalization=name, value_range=value_range,
            data_format="channels_last",
        )  # fmt: skip
        close(last(given.permute(0, 2, 3, 1))["relu1_1"].permute(0, 3, 1, 2), expected)
    byte = vt.FeatureExtractor(vgg, ["relu1_1"], normalization=name, value_range=(0, 255))
    torch.testing.assert_close(byte(pixels.byte())["relu1_1"], byte(pixels)["relu1_1"])
    torch.testing.assert_close(byte.pixels.normalise(pixels), ready, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.network
def test_a_weight_set_is_loaded_with_its_own_normalisation(images):
    extractor = vt.FeatureExtractor("oxford", ["relu1_2"])
    vgg = vt.VGG16(weights="oxford", include_top=False)
    cut = keras.Model(vgg.input, vgg.get_layer("block1_conv2").output)
    pixels = (images * 255).permute(0, 2, 3, 1)
    expected = cut(vt.preprocess(pixels, "oxford")).permute(0, 3, 1, 2)
    close(extractor(images)["relu1_2"], expected.detach())
    # Neither the Keras model's memory nor that of the layers behind the tap is held.
    assert sum(p.numel() for p in extractor.parameters()) == 38_720


@pytest.mark.slow
@pytest.mark.network
def test_a_model_remembers_its_weight_set_or_has_its_preprocessing_inside(images):
    inside = vt.VGG16(weights="oxford", include_top=False, include_preprocessing=True)
    received = vt.FeatureExtractor(inside, ["relu2_2"])(images)["relu2_2"]
    close(received, vt.FeatureExtractor("oxford", ["relu2_2"])(images)["relu2_2"])


def test_weights_are_shared_with_the_model_and_stay_frozen_here(small, images):
    extractor = vt.FeatureExtractor(small, ["relu2_1"], normalization=None)
    before = extractor(images)["relu2_1"]
    small.trainable = False
    small.trainable = True
    small.get_layer("block1_conv1").kernel.assign(small.get_layer("block1_conv1").kernel * 2)
    after = extractor(images)["relu2_1"]
    assert not torch.equal(before, after)
    assert not after.requires_grad
    assert all(v.value.requires_grad for v in small.trainable_variables)


def test_frozen_layers_run_as_in_inference_whatever_train_says(small, images):
    extractor = vt.FeatureExtractor(small, ["dropout", "block2_bn1"], normalization=None)
    expected = extractor(images)
    extractor.train()
    for tap, value in extractor(images).items():
        assert torch.equal(value, expected[tap])
    learning = vt.FeatureExtractor(small, ["dropout"], normalization=None, trainable=True).train()
    learning(images)["dropout"].sum().backward()
    assert learning.network.block1_conv1.weight.grad is not None
    assert (learning(images)["dropout"] == 0).float().mean() > 0.4


def test_the_values_are_keras_layers_own_also_where_keras_runs_a_layer(images):
    class Shift(keras.layers.Layer):
        def call(self, x):
            return x + keras.ops.arange(x.shape[-1], dtype="float32")

    image = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(4, 3, activation="relu", name="conv")(image)
    x = Shift(name="shift")(x)
    x = keras.layers.LayerNormalization(name="norm")(x)
    x = keras.layers.Dense(5, activation="relu", name="dense")(x)
    model = keras.Model(image, keras.layers.Conv2D(2, 3, name="last")(x))
    taps = ["conv_relu", "shift", "norm", "dense_relu", "last"]
    received = vt.FeatureExtractor(model, taps, normalization=None)(images)
    layers = [model.get_layer(tap.removesuffix("_relu")).output for tap in taps]
    expected = keras.Model(image, layers)(images.permute(0, 2, 3, 1))
    for tap, value in zip(taps, expected, strict=True):
        close(received[tap], value.permute(0, 3, 1, 2).detach())


@pytest.mark.slow
@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
@pytest.mark.parametrize("size", [(48, 64), (45, 51)])
def test_a_frozen_network_keeps_a_quarter_and_gives_the_same_gradients(vgg, data_format, size):
    extractor = vt.FeatureExtractor(
        vgg, ["conv1_2", "relu2_2", "pool4"], normalization="imagenet", data_format=data_format
    )
    shape = (2, 3, *size) if data_format == "channels_first" else (2, *size, 3)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    weights = {p.data_ptr() for p in extractor.parameters()}
    x = images.clone().requires_grad_()
    _, memory = kept_for_backward(extractor, x)
    _, plain = kept_for_backward(lambda x: plain_network(extractor, x), x, weights)
    assert memory < 0.26 * plain

    exact = copy.deepcopy(extractor).double()
    x, y = images.double().requires_grad_(), images.double().requires_grad_()
    received, expected = exact(x), plain_network(exact, y)
    for tap, value in received.items():
        wanted = expected[tap]
        if data_format == "channels_last":
            wanted = wanted.permute(0, 2, 3, 1)
        close(value, wanted, 1e-12)
        value.square().mean().backward(retain_graph=True)
        wanted.square().mean().backward(retain_graph=True)
        close(x.grad, y.grad, 1e-10)


@pytest.mark.parametrize(
    ("window", "size"),
    [((2, 2), (5, 7)), ((3, 2), (9, 8)), ((2, 2), (4, 40_000)), ((300, 3), (600, 120))],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_of_a_frozen_pool_is_torchs(window, size, layout):
    """Also where the places in a window are too far apart for two bytes."""
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = []
    for pool in (lambda x: MaxPool.apply(x, window), lambda x: F.max_pool2d(x, window)):
        given = x.contiguous(memory_format=layout).requires_grad_()
        y = pool(given)
        (gradient,) = torch.autograd.grad((y * torch.arange(y.numel()).view(y.shape)).sum(), given)
        gradients.append(gradient)
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.slow
def test_gradients_of_gradients_and_of_nan_are_torchs(vgg, images):
    extractor = vt.FeatureExtractor(vgg, ["relu3_1"], normalization="imagenet")
    found = []
    for run in (extractor, lambda x: plain_network(extractor, x)):
        x = images.clone().requires_grad_()
        (first,) = torch.autograd.grad(run(x)["relu3_1"].square().mean(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        bad = images.clone()
        bad[0, 0, 0, 0] = torch.nan
        bad.requires_grad_()
        value = run(bad)["relu3_1"]
        (of_bad,) = torch.autograd.grad(value.sum(), bad)
        found.append((first, second, value.isnan(), of_bad.isnan()))
    for received, expected in zip(*found, strict=True):
        if received.dtype == torch.bool:
            assert torch.equal(received, expected)
        else:
            close(received, expected)


@pytest.mark.slow
def test_hooks_adapters_and_replaced_layers_are_seen_in_backward_too(vgg, images):
    extractor = copy.deepcopy(vt.FeatureExtractor(vgg, ["pool2"], normalization="imagenet"))
    x = images.clone().requires_grad_()
    extractor(x)
    seen: list[torch.Size] = []
    hook = extractor.network.block1_conv2.register_full_backward_hook(
        lambda module, of_input, of_output: seen.append(of_input[0].shape)
    )
    extractor(x)["pool2"].sum().backward()
    hook.remove()
    assert seen == [torch.Size([2, 64, 48, 64])]

    class Half(torch.nn.Module):
        def forward(self, weight):
            return weight / 2

    torch.nn.utils.parametrize.register_parametrization(
        extractor.network.block1_conv1, "weight", Half()
    )
    extractor.network.block1_pool = torch.nn.AvgPool2d(2)
    y = images.clone().requires_grad_()
    received, expected = extractor(x)["pool2"], plain_network(extractor, y)["pool2"]
    close(received, expected)
    x.grad = None
    received.sum().backward()
    expected.sum().backward()
    close(x.grad, y.grad)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [False, True])
def test_checkpointing_gives_the_same_from_less_that_is_kept(vgg, images, trainable):
    saved, found = [], []
    for checkpoint in (False, True):
        extractor = vt.FeatureExtractor(
            vgg, ["relu1_2", "relu4_1"], normalization="imagenet", checkpoint=checkpoint,
            trainable=trainable,
        )  # fmt: skip
        x = images.clone().requires_grad_()
        values, memory = kept_for_backward(extractor, x)
        values["relu4_1"].square().mean().backward()
        saved.append(memory)
        found.append((*values.values(), x.grad))
    for received, expected in zip(found[1], found[0], strict=True):
        close(received, expected)
    assert saved[1] < saved[0] / (4 if trainable else 2)


@pytest.mark.slow
def test_bfloat16_autocast_copies_and_pickles(vgg, images):
    extractor = vt.FeatureExtractor(vgg, ["relu3_3"], normalization="imagenet", checkpoint=True)
    expected = extractor(images)["relu3_3"]
    x = images.clone().requires_grad_()
    extractor(x)["relu3_3"].sum().backward()  # the parts are there before it is copied
    twin = copy.deepcopy(extractor)
    again = pickle.loads(pickle.dumps(extractor))
    for other in (twin, again):
        torch.testing.assert_close(other(images)["relu3_3"], expected)
    half = twin.to(torch.bfloat16)(images)["relu3_3"]
    assert half.dtype == torch.bfloat16
    close(half.float(), expected, 0.03)
    with torch.autocast("cpu", torch.bfloat16):
        close(extractor(images)["relu3_3"].float(), expected, 0.03)
    x = images.double().requires_grad_()
    (gradient,) = torch.autograd.grad(again.double()(x)["relu3_3"].square().mean(), x)
    assert gradient.dtype == torch.float64


@pytest.mark.slow
def test_torch_compile_takes_it_whole(small, images):
    extractor = vt.FeatureExtractor(small, ["block1_conv1", "relu2_1"], normalization="oxford")
    x, y = images.clone().requires_grad_(), images.clone().requires_grad_()
    received = torch.compile(extractor, fullgraph=True, backend="aot_eager")(x)
    expected = extractor(y)
    for tap in expected:
        close(received[tap], expected[tap])
    received["relu2_1"].sum().backward()
    expected["relu2_1"].sum().backward()
    close(x.grad, y.grad)


def test_torch_func_takes_it(small, images):
    extractor = vt.FeatureExtractor(small, ["relu2_1"], normalization="imagenet")
    each = torch.func.vmap(torch.func.grad(lambda x: extractor(x[None])["relu2_1"].sum()))(images)
    x = images.clone().requires_grad_()
    extractor(x)["relu2_1"].sum().backward()
    close(each, x.grad)


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        (["relu1_9"], "No layer 'relu1_9' can be tapped"),
        (["block2_pol"], "Did you mean 'block2_pool'"),
        ("relu1_2", "expected a list of layers' names"),
        ([], "expected a list of layers' names"),
        (["pool1", "pool1"], "a name stands twice"),
    ],
)
def test_taps_that_are_not_there_are_refused(vgg, taps, message):
    with pytest.raises(ValueError, match=message):
        vt.FeatureExtractor(vgg, taps, normalization="imagenet")


@pytest.mark.slow
def test_models_that_have_no_features_of_one_image_are_refused(vgg):
    layers = keras.layers
    with pytest.raises(ValueError, match="does not say which weight set.*normalization="):
        vt.FeatureExtractor(vt.VGG11(weights=None, include_top=False), ["pool1"])
    with pytest.raises(ValueError, match="Unknown weight set 'caffe'"):
        vt.FeatureExtractor(vgg, ["pool1"], normalization="caffe")
    inside = vt.VGG11(weights=None, include_top=False, include_preprocessing=True)
    with pytest.raises(ValueError, match="preprocessing inside. Leave normalization out"):
        vt.FeatureExtractor(inside, ["pool1"], normalization="oxford")
    with pytest.raises(ValueError, match="expected a Keras model, a weight set"):
        vt.FeatureExtractor(torch.nn.Conv2d(3, 3, 3), ["pool1"])
    row = keras.Input((4,))
    with pytest.raises(ValueError, match="expected one batch of images"):
        vt.FeatureExtractor(keras.Model(row, layers.Dense(2)(row)), ["dense"], normalization=None)
    image = keras.Input((8, 8, 3))
    shared = layers.Conv2D(3, 3, padding="same", name="shared")
    twice = keras.Model(image, shared(shared(image)))
    with pytest.raises(ValueError, match="'shared' is called 2 times"):
        vt.FeatureExtractor(twice, ["shared"], normalization=None)


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({}, torch.rand(3, 32, 32), r"One image is a batch of one: images\[None\]"),
        ({}, torch.rand(1, 32, 32, 3), "pass data_format='channels_last'"),
        ({}, torch.rand(1, 1, 32, 32), r"\(N, 3, H, W\). They look grey: .*\(1, 3, 1, 1\)"),
        ({}, np.zeros((1, 3, 32, 32), "float32"), "expected a tensor of images"),
        ({}, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"expected value_range=\(0, 255\)"),
        ({}, torch.zeros(1, 3, 32, 32, dtype=torch.int64), "expected uint8 or float"),
        ({}, torch.rand(1, 3, 32, 32) * 255, r"such as value_range=\(0, 255\)"),
        ({"value_range": (0, 255)}, torch.rand(1, 3, 32, 32), r"pass value_range=\(0, 1\)"),
        ({}, torch.rand(1, 3, 4, 4), "4x4, which are too small"),
    ],
)
def test_images_that_cannot_be_right_are_refused(vgg, options, given, message):
    extractor = vt.FeatureExtractor(vgg, ["pool4"], normalization="imagenet", **options)
    with pytest.raises(ValueError, match=message):
        extractor(given)


def test_options_that_cannot_be_are_refused(vgg):
    with pytest.raises(ValueError, match="expected 'channels_last' or"):
        vt.FeatureExtractor(vgg, ["pool1"], normalization=None, data_format="NCHW")
    with pytest.raises(ValueError, match="expected the values of black and of white"):
        vt.FeatureExtractor(vgg, ["pool1"], normalization=None, value_range=(1, 0))
    for switch in ("trainable", "checkpoint", "winograd"):
        with pytest.raises(ValueError, match=f"Received {switch}='no'; expected True or False"):
            vt.FeatureExtractor(vgg, ["pool1"], normalization=None, **{switch: "no"})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="architecture='vgg19' with a model, which is a network"):
        vt.FeatureExtractor(vgg, ["pool1"], normalization=None, architecture="vgg19")


def test_unfreezing_the_module_around_a_frozen_extractor_is_said_to_have_no_effect(small, images):
    extractor = vt.FeatureExtractor(small, ["block1_conv1"], normalization=None)
    extractor(images)
    torch.nn.Sequential(extractor).requires_grad_(True)
    with pytest.warns(UserWarning, match="stay frozen here: make it with trainable=True"):
        value = extractor(images)["block1_conv1"]
    assert not value.requires_grad


def test_a_frozen_extractor_says_that_it_stays_frozen(vgg):
    extractor = vt.FeatureExtractor(vgg, ["pool1"], normalization=None)
    with pytest.raises(ValueError, match="frozen. Make it with trainable=True"):
        extractor.requires_grad_(True)
    assert extractor.requires_grad_(False) is extractor
    open_ = vt.FeatureExtractor(vgg, ["pool1"], normalization=None, trainable=True)
    assert all(p.requires_grad for p in open_.requires_grad_(True).parameters())


def test_it_says_what_it_adds_to_its_network(vgg):
    extractor = vt.FeatureExtractor(vgg, ["pool1"], normalization=None, value_range=(0, 255))
    expected = "taps=['pool1'], normalization=None, value_range=(0, 255), data_format='channels_f"
    assert expected in repr(extractor)


def test_arithmetic_of_rgb_is_refused_for_other_channels():
    grey = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3, name="a")])
    with pytest.raises(ValueError, match="'oxford' for images of 1 channels; it is for RGB"):
        vt.FeatureExtractor(grey, ["a"], normalization="oxford")
    maps = vt.FeatureExtractor(grey, ["a"], normalization=None)(torch.rand(1, 1, 8, 8))
    assert maps["a"].shape == (1, 4, 6, 6)
