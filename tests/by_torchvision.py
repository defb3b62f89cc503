"""torchvision's VGGs without their classifiers, whose 120 million random numbers take seconds."""

from __future__ import annotations

from torch import nn
from torchvision.models import vgg


def features(name: str, batch_norm: bool = False, narrow: bool = False) -> nn.Sequential:
    """What torchvision's network of this name has as `features`, with random weights and biases.

    `narrow` gives it an eighth of the channels, as the fixture of this name gives ours.
    """
    row = vgg.cfgs[{"vgg11": "A", "vgg16": "D"}[name]]
    if narrow:
        row = [n // 8 if isinstance(n, int) else n for n in row]
    layers = vgg.make_layers(row, batch_norm)
    for module in layers:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.normal_(module.get_parameter("bias"), std=0.01)
    return layers
