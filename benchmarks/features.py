"""Features, LPIPS and their gradients: ours, torchvision's create_feature_extractor, lpips.

VGG16's five taps of LPIPS on two images of 256x256 and one of 1024x1024, with random weights that
all share, frozen. Each must give the same values and the same gradient before it is timed; the
memory is what a call holds at its worst moment.
"""

from __future__ import annotations

import argparse
import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import vggtorch as vt  # isort: skip  (first: it selects Keras's torch backend)
import harness
import lpips
import torch
from torch import Tensor, nn
from torchvision.models import vgg
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import functional as transforms

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TAPS = {"relu1_2": 3, "relu2_2": 8, "relu3_3": 15, "relu4_3": 22, "relu5_3": 29}
# A value near 0 may be on either side of a ReLU, which changes the gradient of a whole region.
TOLERANCE = {torch.float32: (1e-4, 2e-2), torch.bfloat16: (5e-2, 0.5)}  # of values and gradients
Run = Callable[[Tensor], dict[str, Tensor]]


def torchvision_vgg() -> nn.Module:
    """torchvision's convolutions under their names, with its way to draw random weights."""
    torch.manual_seed(0)
    layers = vgg.make_layers(vgg.cfgs["D"])
    for module in layers:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.normal_(module.get_parameter("bias"), std=0.01)
    return nn.Sequential(OrderedDict(features=layers)).eval().requires_grad_(False)


def keras_vgg(network: nn.Module) -> Any:
    """The same weights as a Keras model."""
    model = vt.VGG16(weights=None, include_top=False)
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    layers = [layer for layer in model.layers if layer.weights]
    for layer, module in zip(layers, convs, strict=True):
        kernel, bias = module.weight.permute(2, 3, 1, 0), module.get_parameter("bias")  # -> HWIO
        layer.set_weights([kernel.numpy(), bias.numpy()])
    return model


def extractors(dtype: torch.dtype, device: torch.device) -> dict[str, Run]:
    """Who gives the five taps of images of 0 to 1."""
    network = torchvision_vgg()
    ours = vt.FeatureExtractor(keras_vgg(network), [*TAPS], normalization="imagenet")
    peers = {
        "torchvision": network,
        "torchvision, channels-last": copy.deepcopy(network).to(memory_format=torch.channels_last),
    }
    names = {f"features.{index}": tap for tap, index in TAPS.items()}

    def features(peer: nn.Module, channels_last: bool) -> Run:
        extractor = create_feature_extractor(peer, names).to(device, dtype)
        memory = torch.channels_last if channels_last else torch.contiguous_format

        def run(images: Tensor) -> dict[str, Tensor]:
            x = transforms.normalize(images, MEAN, STD).to(dtype)
            return extractor(x.contiguous(memory_format=memory))

        return run

    # A copy stands alone, so that it can change its dtype.
    runs: dict[str, Run] = {"vggtorch": copy.deepcopy(ours).to(device, dtype)}
    return runs | {name: features(peer, "last" in name) for name, peer in peers.items()}


def distances(dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[Tensor], Any]]:
    """Who gives LPIPS between images of 0 to 1 and the same images turned upside down."""
    network = torchvision_vgg()
    ours = copy.deepcopy(vt.LPIPS(keras_vgg(network), normalization="imagenet")).to(device, dtype)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    convs = [module for module in theirs.net.modules() if isinstance(module, nn.Conv2d)]
    given = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    for module, source in zip(convs, given, strict=True):
        module.load_state_dict(source.state_dict())
    theirs = theirs.requires_grad_(False).to(device, dtype)

    def package(images: Tensor) -> Tensor:
        x = images.to(dtype)
        return theirs(x, x.detach().flip(2), normalize=True)

    return {"vggtorch": lambda x: ours(x, x.detach().flip(2)), "lpips": package}


def total(values: Any) -> Tensor:
    """One number of what a candidate returns, in which each tap weighs about the same."""
    taps = values.values() if isinstance(values, dict) else [values]
    return torch.stack([value.float().square().mean() for value in taps]).sum()


def gradient(run: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """The gradient of `total` to the images."""
    x = images.detach().requires_grad_()
    (found,) = torch.autograd.grad(total(run(x)), x)
    return found


def check(
    runs: dict[str, Callable[[Tensor], Any]], images: Tensor, tolerances: tuple[float, float]
) -> None:
    """Raise where a candidate's values or gradient are not those of the first."""
    found = {}
    for name, run in runs.items():
        with torch.no_grad():
            values = run(images)
        taps = [*values.values()] if isinstance(values, dict) else [values]
        found[name] = [value.float() for value in (*taps, gradient(run, images))]
    expected = next(iter(found.values()))
    for name, tensors in found.items():
        limits = [tolerances[0]] * (len(tensors) - 1) + [tolerances[1]]
        for received, wanted, limit in zip(tensors, expected, limits, strict=True):
            error = ((received - wanted).norm() / wanted.norm()).item()
            if not error <= limit:
                raise RuntimeError(f"{name} differs by {error:.1e}")


def measure(
    title: str, runs: dict[str, Callable[[Tensor], Any]], images: Tensor, repeats: int
) -> None:
    """Time the candidates in turn, with and without the gradient, and print both tables."""

    @torch.no_grad()
    def forward(run: Callable[[Tensor], Any]) -> None:
        run(images)

    for what in ("forward", "forward and gradient"):
        calls: dict[str, Callable[[], Any]] = {
            name: partial(forward, run) if what == "forward" else partial(gradient, run, images)
            for name, run in runs.items()
        }
        seconds = harness.in_turns(calls, repeats, images.device)
        rows = harness.table(seconds, "vggtorch")
        print(f"\n{title}, {what}\n\n| | ms | quartiles | times ours | peak MB |\n|-|-|-|-|-|")
        for row, run in zip(rows, calls.values(), strict=True):
            print(f"{row} {harness.peak_memory(run, images.device) / 1e6:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(harness.header(device))
    for name in args.dtypes:
        dtype = getattr(torch, name)
        for title, runs in {
            "features": extractors(dtype, device),
            "LPIPS": distances(dtype, device),
        }.items():
            for size in args.sizes:
                images = torch.rand(2 if size < 512 else 1, 3, size, size, device=device)
                check(runs, images, TOLERANCE[dtype])
                measure(
                    f"{title}, {len(images)} of {size}x{size}, {name}", runs, images, args.repeats
                )


if __name__ == "__main__":
    main()
