import pytest
import torch
import torchvision

from vggtorch.architectures import ARCHITECTURES

# conversion-rules: the index of each convolution in torchvision's `features`, block by block.
CONV_INDICES = {
    "vgg11": "0|3|6,8|11,13|16,18",
    "vgg13": "0,2|5,7|10,12|15,17|20,22",
    "vgg16": "0,2|5,7|10,12,14|17,19,21|24,26,28",
    "vgg19": "0,2|5,7|10,12,14,16|19,21,23,25|28,30,32,34",
    "vgg11_bn": "0|4|8,11|15,18|22,25",
    "vgg13_bn": "0,3|7,10|14,17|21,24|28,31",
    "vgg16_bn": "0,3|7,10|14,17,20|24,27,30|34,37,40",
    "vgg19_bn": "0,3|7,10|14,17,20,23|27,30,33,36|40,43,46,49",
}


def test_the_table_has_torchvisions_eight_networks():
    assert set(ARCHITECTURES) == {
        name for name in torchvision.models.list_models() if name.startswith("vgg")
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_convolutions_stand_at_torchvisions_indices(name):
    blocks: dict[str, list[str]] = {}
    for layer in ARCHITECTURES[name].features():
        if layer.kind == "conv":
            block, n = layer.name.split("_conv")
            blocks.setdefault(block, []).append(layer.torch_path.removeprefix("features."))
            assert n == str(len(blocks[block]))
    assert list(blocks) == [f"block{b}" for b in range(1, 6)]
    assert "|".join(",".join(indices) for indices in blocks.values()) == CONV_INDICES[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_is_a_torchvision_module_of_the_same_kind_and_size(name):
    with torch.device("meta"):
        reference = torchvision.models.get_model(name)
    modules = dict(reference.named_modules())
    kinds = {
        "conv": torch.nn.Conv2d,
        "batch_norm": torch.nn.BatchNorm2d,
        "pool": torch.nn.MaxPool2d,
        "dense": torch.nn.Linear,
    }
    layers = [*ARCHITECTURES[name].features(), *ARCHITECTURES[name].classifier()]
    for layer in layers:
        module = modules.pop(layer.torch_path)
        assert isinstance(module, kinds[layer.kind])
        if isinstance(module, torch.nn.Conv2d):
            assert (module.in_channels, module.out_channels) == (layer.inputs, layer.outputs)
        elif isinstance(module, torch.nn.Linear):
            assert (module.in_features, module.out_features) == (layer.inputs, layer.outputs)
    assert not any(isinstance(m, tuple(kinds.values())) for m in modules.values())
