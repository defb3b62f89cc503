"""VGG's convolutions out of files that others write: other names, other parts beside them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import by_torchvision
import keras
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vggtorch as vt
from vggtorch.models import remember_

State = dict[str, torch.Tensor]
SHAPE = (32, 32, 3)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("narrow_throughout")]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGGTORCH_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "batch_norm"])
def network(request: pytest.FixtureRequest) -> nn.Sequential:
    """torchvision's features of VGG11, with an eighth of the channels."""
    torch.manual_seed(0)
    features = by_torchvision.features("vgg11", request.param, narrow=True)
    for module in features:
        if isinstance(module, nn.BatchNorm2d):
            module.get_buffer("running_mean").uniform_(-1, 1)
            module.get_buffer("running_var").uniform_(0.5, 1)
    return features.eval()


def vgg11(network: nn.Sequential, **arguments: object) -> keras.Model:
    normed = any(isinstance(module, nn.BatchNorm2d) for module in network)
    arguments = {"include_top": False, "input_shape": SHAPE, "weights": None} | arguments
    return vt.VGG11(batch_norm=normed, **arguments)  # type: ignore[arg-type]


def assert_computes(model: keras.Model, network: nn.Sequential) -> None:
    x = torch.rand(1, *SHAPE)
    with torch.no_grad():
        for y in keras.tree.flatten(model(x)):
            expected = network(x.movedim(-1, 1)).movedim(1, -1)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def under(prefix: str, state: State) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def by_layer(network: nn.Sequential, name: Callable[[int, int, str], str]) -> State:
    """The state with other names, made of the number of a convolution and of what belongs to it."""
    state, convolution, pools = {}, 0, 0
    for place, module in enumerate(network):
        convolution += isinstance(module, nn.Conv2d)
        pools += isinstance(module, nn.MaxPool2d)
        kind = "conv" if isinstance(module, nn.Conv2d) else "bn"
        for variable, tensor in module.state_dict().items():
            state[f"{name(convolution + pools - 1, place, kind)}.{variable}"] = tensor
    return state


OTHERS = {
    "mmpretrain": lambda n: {
        "meta": {"epoch": 1},
        "state_dict": by_layer(n, lambda i, _, kind: f"backbone.features.{i}.{kind}")
        | {"head.fc.weight": torch.zeros(3, 4)},
    },
    "Caffe's": lambda n: (
        by_layer(n, lambda i, _, kind: f"{kind}{i}_1")
        | {"fc6.weight": torch.zeros(4, 64), "fc6.bias": torch.zeros(4)}
    ),
    "LPIPS's slices": lambda n: (
        by_layer(n, lambda i, place, _: f"net.slice{1 + i // 3}.{place}")
        | {"lin0.model.1.weight": torch.zeros(1, 8, 1, 1)}
    ),
    "a detector's row goes on": lambda n: (
        under("vgg.", n.state_dict())
        | {f"vgg.{len(n) + 2}.weight": torch.zeros(128, 64, 3, 3), "loc.0.bias": torch.zeros(4)}
    ),
    "segmentation_models_pytorch": lambda n: (
        under("encoder.features.", n.state_dict())
        | {"decoder.blocks.0.conv1.0.weight": torch.zeros(8, 64, 3, 3)}
    ),
    "fastai": lambda n: {
        "model": under("0.0.", n.state_dict()) | {"1.4.weight": torch.zeros(3, 64)}
    },
    "metrics beside it": lambda n: {
        "state_dict": under("model.features.", n.state_dict())
        | {"accuracy.tp": torch.zeros(3, dtype=torch.long), "mean": torch.zeros(1, 3, 1, 1)}
    },
    "an average beside it": lambda n: {
        "state_dict": under("model.features.", n.state_dict())
        | under("ema.module.features.", {k: t * 2 for k, t in n.state_dict().items()})
    },
}
SAID = {
    "mmpretrain": "matched by their order.*backbone/features/0/conv is block1_conv1",
    "Caffe's": "matched by their order.*conv0_1 is block1_conv1",
    "LPIPS's slices": "matched by their order, since all shapes agree",
    "a detector's row goes on": r"were left: .*features/\d+",
    "segmentation_models_pytorch": "were left: decoder/blocks/0/conv1/0",
    "metrics beside it": "numbers that are no weights were left: accuracy.tp.",
    "an average beside it": "'model.' was taken, and not 'ema.'. To take another, load it by its",
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_backbone_of_what_others_write(
    tmp_path: Path, network: nn.Sequential, case: str
) -> None:
    torch.save(OTHERS[case](network), tmp_path / "a.pth")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        model = vgg11(network, weights=tmp_path / "a.pth")
    assert_computes(model, network)
    if case in SAID:
        assert any(re.search(SAID[case], str(w.message)) for w in said), [w.message for w in said]


def test_names_in_alphabetical_order_are_taken_by_their_numbers(
    tmp_path: Path, network: nn.Sequential
) -> None:
    state = by_layer(network, lambda _, place, kind: f"body.{place}.{kind}")
    save_file({k: t.contiguous() for k, t in state.items()}, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="matched by their order"):
        model = vgg11(network, weights=tmp_path / "a.safetensors")
    assert_computes(model, network)
    del state[next(iter(state))]  # nothing is guessed of a row with a gap, or of two rows
    with pytest.raises(ValueError, match="No layer of the model is in|does not fit the model"):
        vt.load_weights(vgg11(network), state)
    twice = by_layer(network, lambda i, _, kind: f"a{kind}{i}")
    twice |= by_layer(network, lambda i, _, kind: f"b{kind}{i}")
    with pytest.raises(ValueError, match="No layer of the model is in The state_dict"):
        vt.load_weights(vgg11(network), twice)


# Two networks in one file or in one model


def test_two_networks_of_torch_go_where_their_names_are(
    tmp_path: Path, network: nn.Sequential
) -> None:
    state = under("left.features.", network.state_dict())
    state |= under("right.features.", {k: t * 1 for k, t in network.state_dict().items()})
    state["left.features.0.bias"] = state["left.features.0.bias"] + 1
    state["head.weight"] = torch.ones(2, 128)
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"several networks.*'left' and 'right'.*efix\('left.'\)"):
        vgg11(network, weights=tmp_path / "a.pth")
    right = {k.removeprefix("right."): t for k, t in state.items() if k.startswith("right.")}
    assert_computes(vt.load_weights(vgg11(network), right), network)
    image = keras.Input(SHAPE)
    towers = [vgg11(network, name=name) for name in ("left", "right")]
    x = keras.layers.Concatenate()([tower(image) for tower in towers])
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, keras.layers.Dense(2, use_bias=False, name="head")(x))
    vt.load_weights(model, tmp_path / "a.pth")
    assert_computes(towers[1], network)
    np.testing.assert_array_equal(
        towers[0].get_layer("block1_conv1").get_weights()[1], state["left.features.0.bias"]
    )
    assert model.get_layer("head").get_weights()[0][0, 0] == 1
    one = vgg11(network, weights=tmp_path / "a.pth", prefix="right_")
    assert_computes(one, network)
    towers = [vgg11(network, prefix=prefix) for prefix in ("left_", "right_")]
    both = keras.Model([t.input for t in towers], [t.output for t in towers])
    del state["head.weight"]
    vt.load_weights(both, state)
    assert_computes(towers[1], network)
    np.testing.assert_array_equal(towers[0].get_weights()[1], state["left.features.0.bias"])
    state["left.head.weight"] = torch.ones(2, 128)
    with pytest.raises(ValueError, match="prefix 'left_': .*Unexpected.*: left.head.weight. Sh"):
        vt.load_weights(both, state)
    with pytest.raises(ValueError, match=r"nested in the model, .*model.get_layer\(name\)"):
        vt.load_weights(model, network.state_dict())


def test_a_plain_file_goes_into_networks_under_prefixes_and_back(
    tmp_path: Path, network: nn.Sequential
) -> None:
    state = network.state_dict(prefix="features.")
    torch.save(state | {"classifier.0.weight": torch.ones(4, 64)}, tmp_path / "plain.pth")
    torch.save(state, tmp_path / "alone.pth")
    left = vgg11(network, prefix="left_")
    both = vgg11(network, prefix="right_", input_tensor=left.input)
    both = keras.Model(left.input, [left.output, both.output], name="both")
    for source in (tmp_path / "alone.pth", state):
        for variable in both.variables:
            variable.assign(variable * 0)
        vt.load_weights(both, source)
        assert_computes(both, network)
    with pytest.raises(ValueError, match="with the prefix 'left_': .*Unexpected.*classifier"):
        vt.load_weights(both, tmp_path / "plain.pth")
    report = vt.load_weights(both, tmp_path / "plain.pth", partial=True)
    assert report.left == ("classifier.0.weight",)
    assert not report.kept and set(report.loaded) == set(vt.named_variables(both))
    # And what a model of prefixes has saved goes into one without.
    remember_(both, "oxford")
    for ending in ("safetensors", "pth", "weights.h5"):
        both.get_layer("left_block1_conv1").bias.assign(np.ones(8, "float32"))
        path = tmp_path / f"both.{ending}"
        vt.save_weights(both, path)
        with pytest.raises(ValueError, match=r"have the prefixes 'left_' and 'right_'. Build"):
            vgg11(network, weights=path)
        one = vgg11(network, weights=path, prefix="right_")
        assert_computes(one, network)
        vt.save_weights(one, path)
        assert_computes(vgg11(network, weights=path), network)
        assert_computes(vgg11(network, weights=path, prefix="other_"), network)
