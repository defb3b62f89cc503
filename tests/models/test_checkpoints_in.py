"""The backbone out of any fine-tuned file, and whole models back from every form, bit for bit."""

from __future__ import annotations

from pathlib import Path

import by_torchvision
import keras
import numpy as np
import pytest
import torch
from torch import nn
from written import write

import vggtorch as vt
from vggtorch import architectures
from vggtorch.models import remember_
from vggtorch.models.torch_form import in_torch_form
from vggtorch.weights import conversion

pytestmark = pytest.mark.usefixtures("narrow_throughout")
SHAPE = (32, 32, 3)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGGTORCH_HOME", str(tmp_path_factory.mktemp("home")))


def vgg11(**arguments: object) -> keras.Model:
    arguments = {"weights": None, "include_top": False, "input_shape": SHAPE} | arguments
    return vt.VGG11(**arguments)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def backbone(narrow_throughout: None) -> keras.Model:
    """VGG11's convolutions, narrow, which remember that they expect `oxford` images."""
    keras.utils.set_random_seed(0)
    return remember_(vgg11(), "oxford")


def head(*units: int) -> list[keras.layers.Layer]:
    layers = keras.layers
    return [layers.GlobalAveragePooling2D(), *(layers.Dense(n, name=f"out{n}") for n in units)]


def nested(backbone: keras.Model) -> keras.Model:
    image = keras.Input(SHAPE)
    x = backbone(image)
    for layer in head(4, 3):
        x = layer(x)
    return keras.Model(image, x, name="fine_tuned")


def assert_same(model: keras.Model, expected: keras.Model) -> None:
    ours, theirs = model.get_weights(), expected.get_weights()
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore:keras.saving.load_model reads")
@pytest.mark.slow
@pytest.mark.parametrize("form", ["keras", "h5", "weights.h5", "safetensors", "pth", "bin"])
@pytest.mark.parametrize("shape", ["flat", "nested"])
def test_the_backbone_of_any_fine_tuned_file(
    tmp_path: Path, backbone: keras.Model, form: str, shape: str
) -> None:
    model = nested(backbone) if shape == "nested" else vt.stack(backbone, head(4, 3))
    path = write(model, tmp_path / f"ft.{form}")
    again = vt.VGG11(weights=path, include_top=False, input_shape=SHAPE)
    assert_same(again, backbone)
    if form != "weights.h5":  # which Keras alone has written
        assert vt.weight_set(again) == "oxford"
    # And the whole model into another that is built alike, as Keras's own load_weights would.
    other = vgg11()
    whole = nested(other) if shape == "nested" else vt.stack(other, head(4, 3))
    vt.load_weights(whole, path)
    assert_same(whole, model)


class Torch(nn.Module):
    """Torch's own VGG11 with another head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.features = by_torchvision.features("vgg11", narrow=True)
        self.classifier = head


@pytest.mark.slow
@pytest.mark.parametrize(
    "head",
    [nn.Linear(64, 3), nn.Sequential(nn.Dropout(), nn.Linear(64, 4), nn.ReLU(), nn.Linear(4, 3))],
)
def test_torchs_networks_of_any_head(tmp_path: Path, head: nn.Module) -> None:
    network = Torch(head)
    torch.save({"net": nn.DataParallel(network).state_dict(), "acc": 0.9}, tmp_path / "a.pth")
    model = vt.VGG11(weights=tmp_path / "a.pth", include_top=False, input_shape=SHAPE)
    images = torch.rand(2, *SHAPE)
    with torch.no_grad():
        expected = network.features(images.movedim(-1, 1)).movedim(1, -1)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"Unexpected in the file: classifier.*partial=True"):
        vt.load_weights(model, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"fc1/kernel.*Built with include_top=False, a model tak"):
        vt.VGG11(weights=tmp_path / "a.pth", classes=3, input_shape=SHAPE)


@pytest.mark.slow
def test_what_was_left_is_said_where_it_is_not_plain(tmp_path: Path, backbone: keras.Model) -> None:
    inserted = vt.insert(backbone, "block4_pool", keras.layers.Conv2D(64, 1, name="attention"))
    vt.save_weights(vt.stack(inserted, head(3)), tmp_path / "a.safetensors")
    with pytest.warns(
        UserWarning, match="not Dense layers of a head, and were left: attention. If"
    ):
        vt.VGG11(weights=tmp_path / "a.safetensors", include_top=False)
    other = vt.VGG13(weights=None, include_top=False, input_shape=SHAPE)
    for network in (other, nested(other)):
        vt.save_weights(network, tmp_path / "13.safetensors")
        with pytest.raises(ValueError, match="Unexpected in the file: .*block1_conv2/kernel"):
            vt.VGG11(weights=tmp_path / "13.safetensors", include_top=False)


@pytest.mark.slow
def test_two_networks_in_one_file_are_refused(tmp_path: Path, backbone: keras.Model) -> None:
    image = keras.Input(SHAPE)
    twins = [
        keras.Model(model.inputs, model.outputs, name=name)
        for name, model in (("left", backbone), ("right", vgg11()))
    ]
    both = keras.Model(image, [twin(image) for twin in twins])
    vt.save_weights(both, tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match="holds several networks that fit the model: 'left' and 'r"
    ):
        vt.VGG11(weights=tmp_path / "a.safetensors", include_top=False)
    one = {
        key.removeprefix("right/"): variable.value
        for key, variable in vt.named_variables(both).items()
        if key.startswith("right/")
    }
    model = vt.load_weights(vgg11(), one)
    assert_same(model, twins[1])


@pytest.mark.slow
def test_the_state_of_to_torch_and_dicts_in_memory(tmp_path: Path, backbone: keras.Model) -> None:
    """OIHW weights under Keras's names, which to_torch's network gives; bare and wrapped."""
    model = vt.stack(backbone, [keras.layers.Flatten(), keras.layers.Dense(3, name="out")])
    state = vt.to_torch(model).state_dict()
    assert "block1_conv1.weight" in state
    for saved in (state, {"model_state": {f"_orig_mod.{k}": t for k, t in state.items()}}):
        torch.save(saved, tmp_path / "a.pth")
        whole = vt.stack(vgg11(), [keras.layers.Flatten(), keras.layers.Dense(3, name="out")])
        assert_same(vt.load_weights(whole, tmp_path / "a.pth"), model)
        assert_same(vt.VGG11(weights=tmp_path / "a.pth", include_top=False), backbone)
    convolutions = {key: tensor for key, tensor in state.items() if not key.startswith("out.")}
    assert_same(vt.load_weights(vgg11(), convolutions), backbone)
    deeper = nested(backbone)
    assert_same(vt.load_weights(nested(vgg11()), vt.to_torch(deeper).state_dict()), deeper)
    by_keras = {key: variable.value for key, variable in vt.named_variables(model).items()}
    assert_same(vt.load_weights(whole, by_keras), model)
    with pytest.raises(
        ValueError, match=r"type dict; expected .*\(vt.load_weights\(model, tensors"
    ):
        vt.VGG11(weights=by_keras, include_top=False)
    with pytest.raises(ValueError, match="a network, Linear, as weights; expected its state_dict"):
        vt.load_weights(whole, nn.Linear(2, 2))  # type: ignore[call-overload]


@pytest.mark.slow
def test_a_partial_load_says_what_it_did(tmp_path: Path, backbone: keras.Model) -> None:
    vt.save_weights(vt.stack(backbone, head(4, 3)), tmp_path / "a.safetensors")
    model = vt.stack(vgg11(), head(4, 5))
    kept = model.get_layer("out5").get_weights()
    with pytest.raises(ValueError, match=r"Missing in the file: out5/kernel.*partial=True\) takes"):
        vt.load_weights(model, tmp_path / "a.safetensors")
    report = vt.load_weights(model, tmp_path / "a.safetensors", partial=True)
    assert report.model is model
    assert report.left == ("out3/kernel", "out3/bias")
    assert report.kept == ("out5/kernel", "out5/bias")
    assert set(report.loaded) == set(vt.named_variables(model)) - set(report.kept)
    assert str(report).startswith("18 of 20 weights loaded; left in the file: out3/kernel, out3/b")
    assert_same(vt.truncate(model, "block5_pool"), backbone)
    np.testing.assert_array_equal(model.get_layer("out5").get_weights()[0], kept[0])
    assert vt.weight_set(model) == "oxford"
    # The head alone leaves what the model expects of an image as it is.
    bias = {"out5.bias": torch.ones(5), "out4.weight": torch.ones(7, 64)}
    report = vt.load_weights(model, bias, partial=True)
    assert report.loaded == ("out5/bias",)
    assert report.differing == ("out4/kernel has (7, 64), expected (4, 64)",)
    assert report.left == ("out4.weight",)
    assert vt.weight_set(model) == "oxford"
    with pytest.raises(ValueError, match="No layer of the model is in The state_dict"):
        vt.load_weights(model, {"else.weight": torch.ones(2, 2)}, partial=True)


def torch_state(model: keras.Model) -> dict[str, torch.Tensor]:
    return in_torch_form(model, {k: v.value for k, v in vt.named_variables(model).items()})


def test_a_tensor_of_torchvisions_that_is_missing_is_named_and_others_are_loaded(
    backbone: keras.Model,
) -> None:
    state = torch_state(backbone)
    del state["features.3.bias"]
    model = vgg11()
    with pytest.raises(
        ValueError, match=r"Missing in the file: block2_conv1/bias\. .*partial=True"
    ):
        vt.load_weights(model, state)
    report = vt.load_weights(model, state, partial=True)
    assert (report.kept, report.left) == (("block2_conv1/bias",), ())
    assert len(report.loaded) == 15
    whole = vgg11(include_top=True, classes=5)
    state = torch_state(whole)
    del state["classifier.6.bias"]
    with pytest.raises(
        ValueError, match=r"file: predictions/bias\. .*differ: none\. Built with inc"
    ):
        vt.load_weights(whole, state)
    assert vt.load_weights(whole, state, partial=True).kept == ("predictions/bias",)


@pytest.mark.slow
def test_timms_networks_with_and_without_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many hidden units there are timm doesn't let one say."""
    vgg = pytest.importorskip("timm.models.vgg")
    for module in (architectures, conversion):
        monkeypatch.setattr(module, "HIDDEN", 4096)
    widths = {64: 8, 128: 16, 256: 32, 512: 64}
    network = vgg.VGG([widths.get(n, n) for n in vgg.cfgs["vgg11"]], num_classes=0).eval()
    torch.save(network.state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"ends at fc2: .*vt.truncate\(model, 'fc2'\)"):
        vt.VGG11(weights=tmp_path / "a.pth")
    model = vt.truncate(vt.VGG11(weights=None), "fc2")
    vt.load_weights(model, tmp_path / "a.pth")
    images = torch.rand(1, 224, 224, 3)
    with torch.no_grad():
        expected = network(images.movedim(-1, 1))
        torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)
    vt.save_weights(model, tmp_path / "b.bin")
    back = torch.load(tmp_path / "b.bin")
    assert all(torch.equal(back[key], t) for key, t in network.state_dict().items())
    network.reset_classifier(5)
    torch.save({"state_dict_ema": network.state_dict()}, tmp_path / "c.pth")
    model = vt.VGG11(weights=tmp_path / "c.pth", include_top=False, input_shape=SHAPE)
    kernel = network.features[0].weight.detach().permute(2, 3, 1, 0)
    np.testing.assert_array_equal(model.get_weights()[0], kernel)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["weights.h5", "keras"])
def test_a_cut_model_takes_its_part_of_keras_own_files(tmp_path: Path, form: str) -> None:
    """Whose layers stand in the order of the alphabet: conv2d, conv2d_1, ..., conv2d_10."""
    whole = vt.VGG16(weights=None, include_top=False, input_shape=SHAPE)
    path = write(whole, tmp_path / f"a.{form}")
    other = vt.VGG16(weights=None, include_top=False, input_shape=SHAPE)
    part = vt.load_weights(vt.truncate(other, "block2_pool"), path)
    assert_same(part, vt.truncate(whole, "block2_pool"))
