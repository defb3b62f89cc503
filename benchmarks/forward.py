"""Speed of inference: ours, torchvision's eager and compiled, stock Keras on torch.

VGG16 and VGG16 with one 5x5 in place of its first two convolutions, 224x224, random weights that
all share. Each must give the same logits before it is timed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import vggtorch  # noqa: F401  # isort: skip  (first: it selects Keras's torch backend)
import harness
import keras
import torch
import torchvision
from torch import Tensor, nn

from vggtorch.lowering import to_torch

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def vgg16(five: bool, policy: str) -> keras.Model:
    """VGG16 with logits; `five` puts a 5x5 in place of the first two convolutions."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    model = keras.applications.VGG16(weights=None, classifier_activation=None)
    if five:
        x = keras.layers.Conv2D(64, 5, padding="same", activation="relu", name="block1_conv")(
            model.input
        )
        for layer in model.layers[3:]:
            x = layer(x)
        model = keras.Model(model.input, x)
    keras.config.set_dtype_policy("float32")
    return model


def torch_vgg16(model: keras.Model, five: bool) -> nn.Module:
    """VGG16 of torchvision with the weights of the Keras model."""
    twin = torchvision.models.vgg16()
    if five:
        twin.features[0] = nn.Conv2d(3, 64, 5, padding=2)
        del twin.features[2:4]
    convs: list[Any] = [m for m in twin.features if isinstance(m, nn.Conv2d)]
    denses: list[Any] = [m for m in twin.classifier if isinstance(m, nn.Linear)]
    layers = [layer for layer in model.layers if layer.weights]
    with torch.no_grad():
        for module, layer in zip(convs + denses, layers, strict=True):
            kernel = layer.kernel.value
            if isinstance(module, nn.Conv2d):
                kernel = kernel.permute(3, 2, 0, 1)  # HWIO -> OIHW
            elif layer.name == "fc1":  # rows in HWC order -> CHW
                kernel = kernel.reshape(7, 7, 512, -1).permute(3, 2, 0, 1).flatten(1)
            else:
                kernel = kernel.t()
            module.weight.copy_(kernel)
            module.bias.copy_(layer.bias.value)
    return twin.eval()


def multiply_adds(module: nn.Module, x: Tensor) -> int:
    """Of all convolutions and linear layers, for one image."""
    total = 0

    def count(layer: Any, _: object, y: Tensor) -> None:
        nonlocal total
        total += layer.weight[0].numel() * y[0].numel()

    kinds = (nn.Conv2d, nn.Linear)
    hooks = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, kinds)]
    module(x[:1].to(next(module.parameters()).dtype))
    for hook in hooks:
        hook.remove()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--networks", nargs="+", default=["vgg16", "vgg16 5x5"])
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = args.batches or [1, 8, 256 if device.type == "cuda" else 64]
    print(harness.header(device))
    torch.set_grad_enabled(False)
    for name in args.dtypes:
        dtype = getattr(torch, name)
        peak = harness.matmul_rate(dtype, device)
        print(f"\nMatrix product, {name}: {peak / 1e9:.0f} GFLOP/s")
        for network in args.networks:
            models = build(network == "vgg16 5x5", dtype, device)
            for batch in batches:
                x = torch.randn(batch, 224, 224, 3, device=device)
                flops = 2 * batch * multiply_adds(models["torchvision"], x.permute(0, 3, 1, 2))
                candidates = calls(models, x, dtype)
                if args.compile:
                    candidates |= compiled(models, x, dtype)
                check(candidates, TOLERANCE[dtype])
                seconds = harness.in_turns(candidates, args.repeats, device)
                print(f"\n{network}, batch {batch}, {name}\n")
                print("| | ms | quartiles | times ours | share of product |\n|-|-|-|-|-|")
                print("\n".join(harness.table(seconds, "vggtorch", flops, peak)), flush=True)


def build(five: bool, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The networks, all with the same weights; ours has Parameters of its own."""
    keras_vgg = vgg16(five, "mixed_bfloat16" if dtype == torch.bfloat16 else "float32")
    twin = keras.models.clone_model(keras_vgg)
    twin.set_weights(keras_vgg.get_weights())
    eager = torch_vgg16(keras_vgg, five).to(device, dtype)
    return {
        "vggtorch": to_torch(twin).eval(),
        "torchvision": eager,
        "torchvision, channels-last": copy.deepcopy(eager).to(memory_format=torch.channels_last),
        "Keras on torch": keras_vgg,
    }


def calls(models: dict[str, Any], x: Tensor, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """What is timed. Each network gets the images in the layout and dtype it is best at."""
    nchw = x.permute(0, 3, 1, 2).to(dtype)
    contiguous = nchw.contiguous()
    given = dict.fromkeys(models, x) | {
        "torchvision": contiguous,
        "torchvision, channels-last": nchw,
    }
    options = {"Keras on torch": {"training": False}}
    return {
        name: partial(model, given[name], **options.get(name, {})) for name, model in models.items()
    }


def compiled(
    models: dict[str, Any], x: Tensor, dtype: torch.dtype
) -> dict[str, Callable[[], Tensor]]:
    """Ours and torchvision's through torch.compile, where that can be done here."""
    found: dict[str, Callable[[], Tensor]] = {}
    torch.compiler.reset()  # or it would give up after eight networks and shapes
    # CUDA graphs, for small batches; on a CPU weights that were prepared once.
    options: dict[str, Any] = {"triton.cudagraphs": True} if x.is_cuda else {"freezing": True}
    for name in ("vggtorch", "torchvision, channels-last"):
        model = torch.compile(models[name], options=options, dynamic=False)
        run = calls({name: model}, x, dtype)[name]
        if harness.compiles(name, run):
            found[f"{name}, compiled"] = run
    return found


def check(candidates: dict[str, Callable[[], Tensor]], tolerance: float) -> None:
    """Raise where a candidate's logits are not those of the first."""
    # A copy, because a compiled network may write its next output over the last.
    outputs = {name: run().float().clone() for name, run in candidates.items()}
    expected = next(iter(outputs.values()))
    for name, output in outputs.items():
        error = ((output - expected).abs().max() / expected.abs().max()).item()
        if not error <= tolerance:
            raise RuntimeError(f"{name} differs by {error:.1e} of the largest logit")


if __name__ == "__main__":
    main()
