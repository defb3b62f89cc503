import math

import pytest
import torch
import torchvision

from vggtorch.architectures import ARCHITECTURES
from vggtorch.weights import conversion


def reference(name, classes=1000, side=1):
    """torchvision's state_dict, in each tensor every element another bit pattern.

    Its fc1 is that of a last map of `side` x `side`, since one of 7x7 has most of the numbers.
    """
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=classes)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    shapes["classifier.0.weight"] = (4096, 512 * side**2)
    return {
        key: torch.arange(math.prod(shape), dtype=torch.int32).view(torch.float32).reshape(shape)
        if shape
        else torch.zeros((), dtype=torch.long)
        for key, shape in shapes.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side"), [*((name, 2) for name in ARCHITECTURES), ("vgg11", 7), ("vgg16", 1)]
)
def test_round_trip_is_exact_to_the_bit(name, side):
    state = reference(name, side=side)
    back = conversion.keras_to_torchvision(conversion.to_keras(state, "torchvision"))
    assert list(back) == list(state)
    for key in state:
        assert torch.equal(back[key], state[key]) and back[key].shape == state[key].shape


def test_kernels_are_views_not_copies():
    state = reference("vgg11")
    keras_tensors = conversion.to_keras(state, "torchvision")
    kernel = keras_tensors["block1_conv1/kernel"]
    assert kernel.shape == (3, 3, 3, 64)
    assert kernel.data_ptr() == state["features.0.weight"].data_ptr()


def test_fc1_turns_chw_into_hwc(narrow):
    state = {"classifier.0.weight": torch.randn(64, 64 * 7 * 7)}
    features = torch.randn(2, 64, 7, 7)
    expected = features.flatten(1) @ state["classifier.0.weight"].T
    kernel = conversion.to_keras(state, "torchvision")["fc1/kernel"]
    received = features.permute(0, 2, 3, 1).flatten(1) @ kernel
    torch.testing.assert_close(received, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.slow
def test_other_numbers_of_classes_and_image_sizes():
    state = reference("vgg11", classes=10, side=5)
    converted = conversion.to_keras(state, "torchvision")
    assert converted["predictions/kernel"].shape == (4096, 10)
    assert converted["fc1/kernel"].shape == (12800, 4096)
    back = conversion.keras_to_torchvision(converted)
    assert torch.equal(back["classifier.0.weight"], state["classifier.0.weight"])


def test_a_part_of_a_network_is_converted():
    state = {k: v for k, v in reference("vgg16").items() if k.startswith("features.1")}
    converted = conversion.to_keras(state, "torchvision")
    assert next(iter(converted)) == "block3_conv1/kernel"
    assert conversion.keras_to_torchvision(converted).keys() == state.keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_identify_knows_whole_networks_apart(name):
    shapes = {
        key: tuple(value.shape)
        for key, value in conversion.to_keras(reference(name), "torchvision").items()
    }
    assert [a.name for a in conversion.identify(shapes)] == [name]


def test_wrong_architecture_names_both_lists():
    tensors = conversion.to_keras(reference("vgg16"), "torchvision")
    del tensors["block1_conv2/bias"]
    tensors["block1_conv9/bias"] = torch.zeros(64)
    missing = "block1_conv2/bias, block3_conv4/kernel"
    with pytest.raises(
        ValueError, match=f"not those of vgg19.*Unexpected: block1_conv9/bias.*Missing: {missing}"
    ):
        conversion.architecture_of(tensors, "vgg19")


def test_a_gap_in_the_middle_is_missing():
    state = reference("vgg16")
    del state["features.5.bias"]
    tensors = conversion.to_keras(state, "torchvision")
    with pytest.raises(ValueError, match=r"nearest is vgg16.*Missing: block2_conv1/bias\. Shapes"):
        conversion.architecture_of(tensors)
    # The 28th module is the last convolution of VGG16, and the first of VGG19's last block.
    few = {key: state[key] for key in ("features.14.weight", "features.28.weight")}
    with pytest.raises(ValueError, match="These tensors are not those of any VGG network"):
        conversion.to_keras(few, "torchvision")


def test_tensors_of_another_rank_are_named_and_never_left_out():
    state = {k: v for k, v in reference("vgg11").items() if k.startswith("features.")}
    state["features.0.weight"] = state["features.0.weight"].flatten(1)
    with pytest.raises(ValueError, match=r"features.0.weight has \(64, 27\), expected \(64, 3, 3"):
        conversion.to_keras(state, "torchvision")


def test_unexpected_keys_are_named():
    with pytest.raises(ValueError, match=r"nearest is vgg\d+.*Unexpected: layer1_conv1/kernel"):
        conversion.architecture_of({"layer1_conv1/kernel": torch.zeros(3, 3, 64, 64)})


def test_unknown_architecture_and_empty_input():
    with pytest.raises(ValueError, match="Unknown architecture 'vgg17'; expected one of vgg11"):
        conversion.architecture_of({"block1_conv1/bias": torch.zeros(64)}, "vgg17")
    with pytest.raises(ValueError, match="Received no tensors"):
        conversion.architecture_of({})
