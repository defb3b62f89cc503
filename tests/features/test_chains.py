"""The kernels of frozen layers give torch's values and gradients, and notice every change."""

from __future__ import annotations

import copy
import pickle

import keras
import pytest
import torch
from kept import kept_for_backward, plain_network
from keras import layers
from precision import BFLOAT16
from torch.utils._python_dispatch import TorchDispatchMode

import vggtorch as vt
from vggtorch.features import chains, frozen
from vggtorch.lowering import has_fused_ops, winograd


@pytest.fixture
def runs(monkeypatch):
    """How many chains have run."""
    counted: list[int] = []
    apply = chains.Chain.apply

    def count(*args):
        counted.append(len(args[1]))
        return apply(*args)

    monkeypatch.setattr(frozen.Chain, "apply", count)
    return counted


def network() -> keras.Model:
    """Strides, dilation, groups, odd padding, no bias, batch norm, and pools in both orders."""
    keras.utils.set_random_seed(0)
    x = image = keras.Input((None, None, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="a")(x)
    x = layers.Conv2D(8, 3, strides=2, padding="valid", activation="relu", name="b")(x)
    x = layers.Conv2D(8, 3, dilation_rate=2, padding="same", use_bias=False, name="c")(x)
    x = layers.BatchNormalization(name="c_norm")(x)
    x = layers.ReLU(name="c_relu")(x)
    x = layers.MaxPooling2D((3, 2), name="c_pool")(x)
    x = layers.ReLU(name="pooled_relu")(x)
    x = layers.Conv2D(8, 3, groups=2, padding="same", activation="relu", name="d")(x)
    x = layers.Conv2D(8, 1, activation="relu", name="e")(x)
    x = layers.BatchNormalization(name="e_norm")(x)
    x = layers.ReLU(name="e_relu")(x)
    x = layers.MaxPooling2D(3, 2, name="overlapping")(x)
    x = layers.Conv2D(8, 5, padding="same", activation="relu", name="f")(x)
    model = keras.Model(image, layers.Conv2D(4, 3, padding="same", name="g")(x))
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.gamma.assign(keras.random.uniform(layer.gamma.shape, 0.5, 2.0))
            layer.beta.assign(keras.random.normal(layer.beta.shape))
            layer.moving_mean.assign(keras.random.normal(layer.beta.shape))
            layer.moving_variance.assign(keras.random.uniform(layer.beta.shape, 0.5, 2.0))
    return model


def off(received, expected):
    """The distance of all numbers together, by the length of what is expected."""
    received, expected = received.detach().double(), expected.detach().double()
    return float((received - expected).norm() / expected.norm())


def values_and_gradient(run, images):
    x = images.clone().requires_grad_()
    values = run(x)
    numbers = torch.Generator().manual_seed(1)
    total = sum(
        (value.float() * torch.randn(value.shape, generator=numbers)).sum()
        for value in values.values()
    )
    (gradient,) = torch.autograd.grad(total, x)
    return [*values.values(), gradient]


TAPS = [
    ["g"], ["a_relu", "c", "g"], ["a", "b_relu", "c_norm", "c_pool", "d_relu", "e_norm", "g"],
    ["c_relu"], ["e_relu", "overlapping", "f_relu"],
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("taps", TAPS)
def test_values_and_gradients_are_torchs(taps, dtype, runs):
    extractor = vt.FeatureExtractor(network(), taps, normalization=None)
    extractor = copy.deepcopy(extractor).to(dtype)
    images = torch.rand(2, 3, 47, 40, generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(extractor).double()
    expected = values_and_gradient(lambda x: plain_network(exact, x), images.to(dtype).double())
    received = values_and_gradient(extractor, images)
    by_torch = values_and_gradient(lambda x: plain_network(extractor, x), images.to(dtype))
    assert bool(runs) == has_fused_ops(images, dtype)
    for mine, theirs, exactly in zip(received, by_torch, expected, strict=True):
        assert off(mine, exactly) < 4 * off(theirs, exactly) + 1e-6


@pytest.mark.slow
def test_pretrained_layers_keep_little_and_give_the_same(runs):
    vgg = vt.VGG16(weights=None, include_top=False)
    extractor = vt.FeatureExtractor(
        vgg, ["relu1_2", "relu2_2", "relu3_3"], normalization="imagenet"
    )
    images = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    weights = {p.data_ptr() for p in extractor.parameters()}
    x = images.clone().requires_grad_()
    _, memory = kept_for_backward(extractor, x)
    _, plain = kept_for_backward(lambda x: plain_network(extractor, x), x, weights)
    assert memory < 0.3 * plain
    assert runs == [2, 3, 4]
    pairs = zip(
        values_and_gradient(extractor, images),
        values_and_gradient(lambda x: plain_network(extractor, x), images),
        strict=True,
    )
    for mine, theirs in pairs:
        assert off(mine, theirs) < 1e-5


@pytest.mark.slow
def test_every_change_of_a_weight_is_noticed(runs):
    extractor = copy.deepcopy(vt.FeatureExtractor(network(), ["g"], normalization=None))
    images = torch.rand(1, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    for name, tensor in extractor.network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data[-1] += 0.5
            expected = values_and_gradient(lambda x: plain_network(extractor, x), images)
            for mine, theirs in zip(values_and_gradient(extractor, images), expected, strict=True):
                assert off(mine, theirs) < 1e-5, name
    assert runs


@pytest.mark.parametrize("by_one", [False, True])
def test_a_convolution_that_is_set_to_something_else(by_one, runs):
    extractor = copy.deepcopy(vt.FeatureExtractor(network(), ["d_relu"], normalization=None))
    conv = extractor.network.a
    if by_one:
        conv.stride, conv.padding, conv.dilation = 1, 2, 2
    else:
        conv.weight = torch.nn.Parameter(torch.rand(8, 3, 5, 5) - 0.5, requires_grad=False)
        conv.padding = (2, 2)
    images = torch.rand(2, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    expected = values_and_gradient(lambda x: plain_network(extractor, x), images)
    for mine, theirs in zip(values_and_gradient(extractor, images), expected, strict=True):
        assert off(mine, theirs) < 1e-5
    assert bool(runs) is not by_one


def test_backward_belongs_to_its_forward(runs):
    """It may come twice, and later than a change of the weights, with the ones that forward had."""
    extractor = copy.deepcopy(vt.FeatureExtractor(network(), ["d_relu"], normalization=None))
    images = torch.rand(1, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    *_, expected = values_and_gradient(lambda x: plain_network(extractor, x), images)
    x = images.clone().requires_grad_()
    value = extractor(x)["d_relu"]
    total = (value * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))).sum()
    with torch.no_grad():
        for parameter in extractor.parameters():
            parameter.add_(1.0)
    extractor(images.clone().requires_grad_())
    for _ in range(2):
        (found,) = torch.autograd.grad(total, x, retain_graph=True)
        assert off(found, expected) < 1e-5
    assert runs


def test_nan_and_infinity_stay_what_they_are(runs):
    extractor = vt.FeatureExtractor(network(), ["c_relu", "g"], normalization=None)
    images = torch.rand(3, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    images[1, 0, 5, 5], images[2, 1, 7, 7] = torch.nan, torch.inf
    expected = values_and_gradient(lambda x: plain_network(extractor, x), images)
    for mine, theirs in zip(values_and_gradient(extractor, images), expected, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert off(mine[:1], theirs[:1]) < 1e-5
    assert runs


class Convolutions(TorchDispatchMode):
    """The operations of torch that convolve."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "conv" in str(func):
            self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


def test_whoever_looks_on_gets_the_modules_one_by_one(runs, monkeypatch):
    extractor = copy.deepcopy(vt.FeatureExtractor(network(), ["d_relu"], normalization=None))
    images = torch.rand(1, 3, 30, 30, generator=torch.Generator().manual_seed(0)).requires_grad_()
    calls: list[str] = []
    for module in (extractor.network, extractor.network.b):
        hook = module.register_forward_hook(lambda *_: calls.append("hook"))
        extractor(images)
        hook.remove()
    assert calls == ["hook", "hook"]
    with Convolutions() as mode:
        extractor(images)
    assert mode.seen == {"aten.convolution.default"}
    extractor.network.d_relu.forward = torch.zeros_like
    assert not extractor(images)["d_relu"].any()
    del extractor.network.d_relu.forward
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.ReLU, "forward", lambda self, x: torch.zeros_like(x))
        assert not extractor(images)["d_relu"].any()
    assert not runs
    assert extractor(images)["d_relu"].any()
    assert runs


def test_a_relu_that_overwrites_does_so(runs):
    extractor = copy.deepcopy(vt.FeatureExtractor(network(), ["a", "b"], normalization=None))
    extractor.network.a_relu = torch.nn.ReLU(inplace=True)
    images = torch.rand(1, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    received, expected = (
        run(images.clone().requires_grad_())
        for run in (extractor, lambda x: plain_network(extractor, x))
    )
    assert float(expected["a"].detach().min()) == 0
    for tap, value in expected.items():
        assert off(received[tap], value) < 1e-5


def test_maps_that_lie_in_memory_channels_first(runs):
    first = {"data_format": "channels_first"}
    image = keras.Input((3, 12, 10))
    x = layers.Conv2D(4, 3, padding="same", **first)(image)
    x = layers.ReLU()(layers.Reshape((4, 12, 10))(x))
    model = keras.Model(image, layers.Conv2D(2, 3, name="last", **first)(x))
    extractor = vt.FeatureExtractor(model, ["last"], normalization=None)
    images = torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    expected = values_and_gradient(lambda x: plain_network(extractor, x), images)
    for mine, theirs in zip(values_and_gradient(extractor, images), expected, strict=True):
        assert off(mine, theirs) < 1e-5
    assert runs == [1, 2]


def test_a_tap_that_is_overwritten_is_refused_as_torch_refuses_it():
    extractor = vt.FeatureExtractor(network(), ["a_relu"], normalization=None)
    value = extractor(torch.rand(1, 3, 30, 30).requires_grad_())["a_relu"]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.mul_(2).sum().backward()


@pytest.fixture
def by_winograd(monkeypatch, winograd_always):
    """The paddings of the convolutions that were computed Winograd's way."""
    seen: list[object] = []
    convolve = winograd.Filtering.convolve

    def count(self, *args):
        seen.append(args[4])
        return convolve(self, *args)

    monkeypatch.setattr(winograd.Filtering, "convolve", count)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("trainable", [False, True])
def test_values_and_gradients_by_winograd(trainable, dtype, runs, by_winograd):
    settings = {"normalization": None, "trainable": trainable}
    extractor = vt.FeatureExtractor(network(), ["a_relu", "c_relu", "g"], winograd=True, **settings)
    extractor = pickle.loads(pickle.dumps(copy.deepcopy(extractor))).eval().to(dtype)
    images = torch.rand(2, 3, 47, 40, generator=torch.Generator().manual_seed(0))
    exact = copy.deepcopy(extractor).double()
    expected = values_and_gradient(lambda x: plain_network(exact, x), images.to(dtype).double())
    assert not by_winograd
    received = values_and_gradient(extractor, images)
    fused = has_fused_ops(images, dtype)
    # The first layer and the last, forward and backward.
    assert len(by_winograd) == (4 if fused else 0)
    assert bool(runs) == (fused and not trainable)
    with torch.no_grad():
        received += extractor(images).values()
    assert len(by_winograd) == (6 if fused else 0)
    by_torch = values_and_gradient(lambda x: plain_network(extractor, x), images.to(dtype))
    pairs = zip(received, by_torch + by_torch[:-1], expected + expected[:-1], strict=True)
    for mine, theirs, exactly in pairs:
        # In bfloat16 rounding turns some ReLUs on or off, and the gradient has that.
        assert off(mine, exactly) < 10 * off(theirs, exactly) + 1e-5


def test_what_is_not_finite_is_torchs_by_winograd_too(runs, by_winograd):
    extractor = vt.FeatureExtractor(network(), ["c_relu"], normalization=None, winograd=True)
    images = torch.rand(2, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    for number in (1.0, torch.nan, torch.inf, 3e38):
        gradients: list[torch.Tensor] = []
        for run in (extractor, lambda x: plain_network(extractor, x)):
            x = images.clone().requires_grad_()
            value = run(x)["c_relu"]
            grad = torch.ones_like(value)
            grad[1, 0, 3, 3] = number
            gradients += torch.autograd.grad(value, x, grad)
        mine, theirs = gradients
        assert torch.equal(mine.isfinite(), theirs.isfinite())
        assert off(mine[:1], theirs[:1]) < 1e-5
        usual = theirs.isfinite()
        assert off(mine[usual], theirs[usual]) < 1e-5
    assert len(by_winograd) == 8


def test_many_gradients_at_once(runs):
    extractor = vt.FeatureExtractor(network(), ["a", "e_relu", "g"], normalization=None)
    images = torch.rand(2, 3, 30, 30, generator=torch.Generator().manual_seed(0))
    found = []
    for run in (extractor, lambda x: plain_network(extractor, x)):
        x = images.clone().requires_grad_()
        for value in run(x).values():
            many = torch.randn(3, *value.shape, generator=torch.Generator().manual_seed(1))
            options = {"is_grads_batched": True, "retain_graph": True}
            found += [torch.autograd.grad(value, x, many, **options)[0]]
            found += [
                torch.vmap(lambda v, y=value, x=x: torch.autograd.grad(y, x, v, True)[0])(many)
            ]
    assert runs
    for mine, theirs in zip(found[:6], found[6:], strict=True):
        assert off(mine, theirs) < 1e-5
