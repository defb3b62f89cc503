"""Networks as Keras has them, and the same networks written by hand in torch.nn.

The VGG is as narrow as the fixture `narrow_throughout`, which it needs, makes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import by_torchvision
import keras
import torch
from torch import Tensor, nn

from vggtorch.lowering import TorchNetwork, to_torch
from vggtorch.weights import keras_to_torchvision


def shaken(model: keras.Model) -> keras.Model:
    """Let the signal reach the end, and give no norm trivial numbers."""
    for variable in model.variables:
        if variable.name in ("moving_variance", "gamma"):
            variable.assign(torch.rand(variable.shape) + 0.5)
        elif variable.name in ("moving_mean", "beta", "bias"):
            variable.assign(torch.rand(variable.shape) * 0.2)
    return model


def with_head(base: keras.Model) -> keras.Model:
    head = [keras.layers.GlobalAveragePooling2D(name="pool"), keras.layers.Dense(10, name="logits")]
    return shaken(vt.stack(base, head))


def made_once(make: Callable[[], keras.Model]) -> Callable[[], keras.Model]:
    """A function that gives a new copy, each time, of what `make` gave the first time."""
    kept = functools.cache(make)

    def copied() -> keras.Model:
        model = keras.models.clone_model(kept())
        model.set_weights(kept().get_weights())
        return model

    return copied


@made_once
def vgg11_bn() -> keras.Model:
    keras.utils.set_random_seed(0)
    return with_head(
        vt.VGG11(weights=None, include_top=False, batch_norm=True, input_shape=(32, 32, 3))
    )


def vgg11_bn_by_hand(model: keras.Model) -> nn.Module:
    """torchvision's `features`, an average pool and an nn.Linear on the same weights."""
    with torch.device("meta"):
        features = by_torchvision.features("vgg11", batch_norm=True, narrow=True)
    tensors = {
        key: v.value.detach()
        for key, v in vt.named_variables(model).items()
        if not key.startswith("logits")
    }
    state = keras_to_torchvision(tensors)
    values = {k.removeprefix("features."): v.clone() for k, v in state.items()}
    features.load_state_dict(values, assign=True)
    dense = model.get_layer("logits")
    linear = nn.Linear(*dense.kernel.shape)
    with torch.no_grad():
        linear.weight.copy_(dense.kernel.value.T)
        linear.bias.copy_(dense.bias.value)
    for module in features.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # which captum and hooks can't look through
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)


@made_once
def resnet() -> keras.Model:
    keras.utils.set_random_seed(0)
    make = keras.applications.ResNet50
    whole = make(weights=None, include_top=False, input_shape=(64, 64, 3))
    return with_head(keras.Model(whole.input, whole.get_layer("conv3_block2_out").output))


class ResNet(nn.Module):
    """Keras's ResNet50 as far as the second block of its second stage.

    Its convolutions have biases, and a block's stride is in its first one.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2015.
    """

    STAGES = ((64, 3, 1), (128, 2, 2))  # channels, blocks, stride

    def __init__(self, order: list[str]) -> None:
        """`order`: in which the children are registered, so that lists of them can be compared."""
        super().__init__()
        made: dict[str, nn.Module] = {"conv1_pad": nn.ZeroPad2d(3), "pool1_pad": nn.ZeroPad2d(1)}

        def conv(name: str, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
            padding = 1 if kernel == 3 else 0
            made[f"{name}_conv"] = nn.Conv2d(inputs, outputs, kernel, stride, padding)
            made[f"{name}_bn"] = nn.BatchNorm2d(outputs, 1.001e-5, 0.01)
            made[f"{name}_relu"] = nn.ReLU()

        conv("conv1", 3, 64, 7, 2)
        made["pool1_pool"] = nn.MaxPool2d(3, 2)
        self.blocks: list[str] = []
        inputs = 64
        for stage, (channels, blocks, stride) in enumerate(self.STAGES, 2):
            for block in range(1, blocks + 1):
                name, step = f"conv{stage}_block{block}", stride if block == 1 else 1
                if block == 1:
                    conv(f"{name}_0", inputs, 4 * channels, 1, step)
                conv(f"{name}_1", inputs, channels, 1, step)
                conv(f"{name}_2", channels, channels, 3)
                conv(f"{name}_3", channels, 4 * channels)
                made[f"{name}_out"] = nn.ReLU()
                self.blocks.append(name)
                inputs = 4 * channels
        made |= {"pool": nn.AdaptiveAvgPool2d(1), "pool_flatten": nn.Flatten()}
        made["logits"] = nn.Linear(inputs, 10)
        for name in order:
            self.add_module(name, made[name])

    def forward(self, x: Tensor) -> Tensor:
        def run(name: str, x: Tensor, *parts: str) -> Tensor:
            for part in parts:
                x = getattr(self, f"{name}_{part}")(x)
            return x

        x = run("conv1", x, "pad", "conv", "bn", "relu")
        x = run("pool1", x, "pad", "pool")
        for block in self.blocks:
            around = run(f"{block}_0", x, "conv", "bn") if block.endswith("block1") else x
            x = run(f"{block}_1", x, "conv", "bn", "relu")
            x = run(f"{block}_2", x, "conv", "bn", "relu")
            x = run(f"{block}_3", x, "conv", "bn")
            x = run(block, around + x, "out")
        for name in ("pool", "pool_flatten", "logits"):
            x = getattr(self, name)(x)
        return x


def resnet_by_hand(model: keras.Model) -> nn.Module:
    network = to_torch(model)
    hand = ResNet([name for name, _ in network.named_children()])
    hand.load_state_dict(network.state_dict())
    return hand


@dataclass(frozen=True)
class Kind:
    """A network in both forms.

    Attributes:
        size: height and width of its images.
        first_size: those of the maps that its first batch norm sees.
        taps: names of values in ours, and by hand.
    """

    build: Callable[[], keras.Model]
    by_hand: Callable[[keras.Model], nn.Module]
    size: int
    first_size: int
    taps: dict[str, str]

    def ours(self, model: keras.Model) -> TorchNetwork:
        return to_torch(model, data_format="channels_first").eval()


_BLOCK = ("conv2_block1_1_conv", "conv2_block1_1_bn", "conv2_block1_1_relu", "conv3_block2_out")
KINDS = {
    "vgg11_bn": Kind(
        vgg11_bn,
        vgg11_bn_by_hand,
        32,
        32,
        {"block1_conv1": "0", "block1_bn1": "1", "block1_relu1": "2", "block5_pool": "28"},
    ),
    "resnet": Kind(resnet, resnet_by_hand, 64, 32, dict(zip(_BLOCK, _BLOCK, strict=True))),
}
