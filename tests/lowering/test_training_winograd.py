"""`winograd=True`: networks that learn, and follow their weights, by Winograd's convolutions."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from precision import needs_bfloat16
from small_vgg import assert_close, dropout_vgg, images, small_vgg

import vggtorch as vt
from vggtorch.lowering import winograd

pytestmark = pytest.mark.usefixtures("winograd_always")


class Counts:
    """How often each of Winograd's functions has run to its end."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.convolve = self.weight_gradient = 0
        for name in ("convolve", "weight_gradient"):
            patch.setattr(winograd.Filtering, name, self.counted(name))

    def counted(self, name: str) -> Any:
        original = getattr(winograd.Filtering, name)

        def run(*args: Any) -> Any:
            result = original(*args)
            setattr(self, name, getattr(self, name) + 1)
            return result

        return run


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


def gradients(network: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    network.zero_grad()
    network(x).square().sum().backward()
    return {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_outputs_and_gradients_are_those_without(
    train: bool, checkpoint: bool, counts: Counts
) -> None:
    model = small_vgg()
    plain = vt.to_torch(model, share=False, checkpoint=checkpoint).train(train)
    network = vt.to_torch(model, share=False, checkpoint=checkpoint, winograd=True).train(train)
    x = images(model)
    expected = gradients(plain, x)
    assert counts.convolve == counts.weight_gradient == 0
    found = gradients(network, x)
    assert (
        counts.convolve >= 3 and counts.weight_gradient >= 2
    )  # the first takes no images' gradient
    for name, value in expected.items():
        assert_close(found[name], value, 1e-4)
    assert_close(network(x), plain(x))
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(dict(network.named_buffers())[name], buffer)


def test_a_network_follows_its_weights(counts: Counts) -> None:
    model = small_vgg()
    network = vt.to_torch(model, winograd=True).eval()
    x = images(model)
    with torch.no_grad():
        assert_close(network(x), model(x, training=False))
        kernel = model.get_layer("block2_conv1").kernel
        kernel.assign(kernel * 1.5)
        assert_close(network(x), model(x, training=False))
        network.block1_conv1.weight.data *= -1
        assert_close(network(x), model(x, training=False))
    assert counts.convolve >= 6


def test_in_any_mode_and_back(counts: Counts) -> None:
    """Memory that was taken in inference mode serves training afterwards."""
    model = small_vgg()
    x = images(model)
    network = vt.to_torch(model, winograd=True)
    with torch.inference_mode():
        assert_close(network.eval()(x), model(x, training=False))
    found = gradients(network.train(), x)
    with torch.inference_mode():
        assert_close(network.eval()(x), model(x, training=False))
    for name, value in gradients(vt.to_torch(model, share=False), x).items():
        assert_close(found[name], value, 1e-4)


@pytest.mark.parametrize("frozen", ["block1_conv1", "block2_conv1"])
def test_frozen_layers_stay_and_the_rest_learns(frozen: str) -> None:
    model = small_vgg()
    model.get_layer(frozen).trainable = False
    x = images(model)
    found = gradients(vt.to_torch(model, share=False, winograd=True), x)
    for name, value in gradients(vt.to_torch(model, share=False), x).items():
        if value is None:
            assert found[name] is None
        else:
            assert_close(found[name], value, 1e-4)


@needs_bfloat16
def test_under_autocast_it_learns_in_bfloat16(counts: Counts) -> None:
    model = small_vgg()
    x = images(model)

    def run(**options: Any) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return gradients(vt.to_torch(model, share=False, **options), x)

    found, expected = run(winograd=True), run()
    assert counts.convolve and counts.weight_gradient
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        noise = 5e-3  # that of a bias before a batch norm has nothing else
        assert (found[name] - value).norm() <= 0.1 * value.norm() + noise


def test_backward_under_autocast_goes_the_same_way(counts: Counts) -> None:
    model = small_vgg()
    x = images(model)
    network = vt.to_torch(model, share=False, winograd=True)
    loss = network(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert counts.weight_gradient >= 2
    for name, value in gradients(vt.to_torch(model, share=False), x).items():
        assert_close(network.get_parameter(name).grad, value, 1e-4)


def test_copies_and_pickles_go_the_same_way(counts: Counts) -> None:
    model = small_vgg()
    network = vt.to_torch(model, winograd=True)
    x = images(model)
    gradients(network, x)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        before = counts.weight_gradient
        gradients(other, x)
        assert counts.weight_gradient > before


def test_looked_into_it_runs_its_modules(counts: Counts) -> None:
    model = small_vgg()
    network = vt.to_torch(model, winograd=True).eval()
    x = images(model)
    parameters = dict(network.named_parameters())
    network.block1_conv1.register_forward_hook(lambda *_: None)
    network(x).sum().backward()

    def loss(weights: Any, image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(network, weights, (image[None],)).sum()

    each: Any = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    assert each["block1_conv1.weight"].shape == (4, 8, 3, 3, 3)
    assert counts.convolve == counts.weight_gradient == 0


@pytest.mark.slow
def test_kerass_own_fit_learns_the_same(counts: Counts) -> None:
    x = np.random.default_rng(0).normal(size=(16, 16, 16, 3)).astype("float32")
    y = np.arange(16) % 10

    def losses(**options: Any) -> list[float]:
        model = dropout_vgg()
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        keras.utils.set_random_seed(0)
        vt.accelerate_(model, **options)
        return model.fit(x, y, 8, epochs=2, shuffle=False, verbose=0).history["loss"]

    assert losses(winograd=True) == pytest.approx(losses(), rel=1e-4)
    assert counts.convolve and counts.weight_gradient


def test_compiled_convolutions_are_torchs() -> None:
    with pytest.raises(ValueError, match="compile=True and winograd=True.*leave one of them out"):
        vt.accelerate_(small_vgg(), compile=True, winograd=True)


def test_other_convolutions_and_dtypes_are_computed_as_ever(counts: Counts) -> None:
    keras.utils.set_random_seed(0)
    image = keras.Input((12, 12, 4))
    x = layers.Conv2D(8, 3, strides=2, padding="same")(image)
    x = layers.Conv2D(8, 3, dilation_rate=2, padding="same")(x)
    x = layers.Conv2D(8, 3, groups=2)(layers.Conv2D(8, (3, 1))(x))
    model = keras.Model(image, layers.DepthwiseConv2D(3, padding="same")(x))
    gradients(vt.to_torch(model, winograd=True), images(model))
    gradients(vt.to_torch(model, winograd=True, share=False).double(), images(model).double())
    assert counts.convolve == counts.weight_gradient == 0


@pytest.mark.once
@pytest.mark.slow
def test_at_real_size_a_step_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block but the first, of a batch of 8, goes Winograd's way by its own limits."""
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        counts = Counts(patch)
        model = vt.VGG13(weights=None, include_top=False, input_shape=(112, 112, 3))
        x = torch.randn(8, 112, 112, 3)
        found = gradients(vt.to_torch(model, share=False, winograd=True), x)
        assert counts.weight_gradient >= 7 and counts.convolve >= 8
    for name, value in gradients(vt.to_torch(model, share=False), x).items():
        assert (found[name] - value).norm() <= 2e-3 * value.norm()


def test_a_kernel_of_another_size_is_no_longer_winograds(counts: Counts) -> None:
    network: Any = vt.to_torch(small_vgg(), share=False, winograd=True)
    for conv in (network.block1_conv1, network.block2_conv1):
        conv.weight = torch.nn.Parameter(torch.nn.functional.pad(conv.weight, (1, 1, 1, 1)))
        conv.padding = (2, 2)
    found = gradients(network, images(small_vgg()))
    assert counts.convolve == counts.weight_gradient == 0
    assert found["block2_conv1.weight"].shape[2:] == (5, 5)
