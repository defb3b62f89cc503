"""Time and memory of a training step: ours, stock Keras on torch, a plain torchvision loop.

Full fine-tuning of VGG16 at 224x224, and the tutorial's transfer learning at 160x160: frozen up to
block2_pool, a small head on top. SGD with momentum on the same weights and images, in float32 and
in bfloat16 (autocast, and Keras's mixed policy). Before anything is timed all must agree on the
first step: its loss, and how far it moves each parameter. The peak is of tensors, gradients among
them, above what is there before the step; there is then no gradient, and an inference has let go of
whatever a network keeps from one step to the next.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import vggtorch  # noqa: F401  # isort: skip  (first: it selects Keras's torch backend)
import harness
import keras
import torch
import torch.nn.functional as F
from forward import torch_vgg16
from keras import layers
from torch import Tensor, nn

from vggtorch.lowering import accelerate_, to_torch

LR, MOMENTUM = 1e-3, 0.9
# Of the loss and of what a step changes. Rounded to bfloat16 many maxima of a pool are equal, and
# each layout picks its own for the gradient.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}


def full() -> keras.Model:
    """VGG16 with probabilities, everything trainable."""
    return keras.applications.VGG16(weights=None)


def tutorial() -> keras.Model:
    """VGG16 up to block2_pool, frozen, and the tutorial's head (no dropout, to be comparable)."""
    base = keras.applications.VGG16(weights=None, include_top=False, input_shape=(160, 160, 3))
    x = base.get_layer("block2_pool").output
    x = layers.Conv2D(64, 3, activation="relu")(x)
    x = layers.MaxPooling2D()(x)
    x = layers.Flatten()(x)
    x = layers.Dense(256, activation="relu")(x)
    model = keras.Model(base.input, layers.Dense(10, activation="softmax")(x))
    for layer in model.layers[:7]:
        layer.trainable = False
    return model


def torch_tutorial(model: keras.Model) -> nn.Module:
    """The same network, hand-written; the flattened map in HWC order, as Keras has it."""

    class HwcFlatten(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.permute(0, 2, 3, 1).flatten(1)

    modules: list[nn.Module] = []
    for layer in model.layers:
        if isinstance(layer, layers.Conv2D):
            channels, filters = layer.kernel.shape[2:]
            conv = nn.Conv2d(channels, filters, 3, padding=int(layer.padding == "same"))
            conv.weight.data.copy_(layer.kernel.value.permute(3, 2, 0, 1))
            conv.bias.data.copy_(layer.bias.value)  # type: ignore[union-attr]
            modules += [conv.requires_grad_(layer.trainable), nn.ReLU(inplace=True)]
        elif isinstance(layer, layers.MaxPooling2D):
            modules.append(nn.MaxPool2d(2))
        elif isinstance(layer, layers.Flatten):
            modules.append(HwcFlatten())
        elif isinstance(layer, layers.Dense):
            dense = nn.Linear(*layer.kernel.shape)
            dense.weight.data.copy_(layer.kernel.value.t())
            dense.bias.data.copy_(layer.bias.value)
            modules.append(dense)
            if layer is not model.layers[-1]:
                modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)


class Candidate(NamedTuple):
    """A step of training, which returns the loss, an inference between two, and what is trained."""

    step: Callable[[], float]
    infer: Callable[[], object]
    parameters: Sequence[Tensor]


def torch_step(
    module: nn.Module,
    x: Tensor,
    y: Tensor,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    dtype: torch.dtype,
) -> Candidate:
    """A plain torch loop, under autocast where that is not float32."""
    autocast = partial(torch.autocast, x.device.type, dtype, enabled=dtype != torch.float32)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, LR, MOMENTUM, fused=x.is_cuda)  # slower on a CPU
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0

    def step() -> float:
        module.train()
        with autocast():
            loss = loss_of(module(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return Candidate(step, lambda: module.eval()(x[:1]), parameters)


def keras_step(model: keras.Model, x: Tensor, y: Tensor) -> Candidate:
    optimizer = keras.optimizers.SGD(LR, MOMENTUM)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    return Candidate(
        lambda: float(model.train_on_batch(x, y)),
        lambda: model.predict_on_batch(x[:1]),
        [variable.value for variable in model.trainable_variables],
    )


def twin(model: keras.Model) -> keras.Model:
    """A copy with Parameters of its own."""
    copied = keras.models.clone_model(model)
    copied.set_weights(model.get_weights())
    return copied


def nll(probabilities: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(probabilities.clamp(1e-7, 1 - 1e-7).log(), y)


def task(job: str, batch: int, device: torch.device) -> tuple[keras.Model, Tensor, Tensor]:
    """The network, images (N, H, W, 3) and classes; the same at every call."""
    keras.utils.set_random_seed(0)
    model = full() if job == "full" else tutorial()
    size, classes = (224, 1000) if job == "full" else (160, 10)
    x = torch.randn(batch, size, size, 3, device=device)
    return model, x, torch.randint(0, classes, (batch,), device=device)


def hand_written(job: str, model: keras.Model) -> nn.Module:
    return torch_vgg16(model, five=False) if job == "full" else torch_tutorial(model)


def candidates(
    job: str, batch: int, dtype: torch.dtype, device: torch.device, names: Sequence[str] | None
) -> dict[str, Candidate]:
    """Those of these names, or all."""
    model, x, y = task(job, batch, device)
    mixed = model
    if dtype != torch.float32:
        keras.config.set_dtype_policy("mixed_bfloat16")
        mixed = full() if job == "full" else tutorial()
        keras.config.set_dtype_policy("float32")
        mixed.set_weights(model.get_weights())
    plain = hand_written(job, model).to(device)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    nchw = x.permute(0, 3, 1, 2)

    def ours(checkpoint: bool = False, winograd: bool = False) -> Candidate:
        network = to_torch(twin(model), checkpoint=checkpoint, winograd=winograd)
        return torch_step(network, x, y, nll, dtype)

    def theirs(module: nn.Module, images: Tensor) -> Candidate:
        return torch_step(module, images, y, F.cross_entropy, dtype)

    made: dict[str, Callable[[], Candidate]] = {
        "vggtorch": ours,
        "vggtorch, Winograd": lambda: ours(winograd=True),
        "vggtorch, checkpointed": lambda: ours(checkpoint=True),
        "vggtorch, train_on_batch": lambda: keras_step(accelerate_(twin(mixed)), x, y),
        "Keras, train_on_batch": lambda: keras_step(twin(mixed), x, y),
        "torchvision": lambda: theirs(plain, nchw.contiguous()),
        "torchvision, channels-last": lambda: theirs(last, nchw),
    }
    return {name: make() for name, make in made.items() if names is None or name in names}


def compiled(
    job: str, batch: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Candidate]:
    """Ours and torchvision's through torch.compile, where that can be done here."""
    model, x, y = task(job, batch, device)
    last = hand_written(job, model).to(device).to(memory_format=torch.channels_last)
    ours: Any = torch.compile(to_torch(twin(model)))
    theirs: Any = torch.compile(last)
    nchw = x.permute(0, 3, 1, 2)
    torch.compiler.reset()
    found = {
        "vggtorch, compiled": torch_step(ours, x, y, nll, dtype),
        "torchvision, channels-last, compiled": torch_step(theirs, nchw, y, F.cross_entropy, dtype),
    }
    return {
        name: candidate
        for name, candidate in found.items()
        if harness.compiles(name, candidate.infer)
    }


def first_step(candidate: Candidate) -> Tensor:
    """The loss of the first step, and the length of each parameter's change in it."""
    before = [p.detach().clone() for p in candidate.parameters]
    loss = candidate.step()
    changes = [
        (p.detach() - old).norm() for p, old in zip(candidate.parameters, before, strict=True)
    ]
    return torch.stack([changes[0].new_tensor(loss), *changes])


def check(found: dict[str, Candidate], tolerance: float) -> None:
    """Raise where the first step is not that of the first candidate."""
    expected = first_step(found["vggtorch"])
    for name, candidate in found.items():
        if name == "vggtorch":
            continue
        error = ((first_step(candidate) - expected).abs() / expected.abs()).max().item()
        if not error <= tolerance:
            raise RuntimeError(f"{name}: loss or gradients differ by {error:.1e}")


def measure(found: dict[str, Candidate], repeats: int, device: torch.device) -> list[str]:
    """Rows of Markdown: times, ratios and the peak of memory."""
    steps = {name: candidate.step for name, candidate in found.items()}
    rows = harness.table(harness.in_turns(steps, repeats, device, warmup=1), "vggtorch")
    for i, (name, candidate) in enumerate(found.items()):
        if device.type == "cpu" and name.endswith("compiled"):
            rows[i] += " |"  # torch's profiler doesn't see all that compiled code allocates
            continue
        candidate.infer()
        for p in candidate.parameters:
            p.grad = None  # some are let go of at the end of a step, some at the start of the next
        rows[i] += f" {harness.peak_memory(candidate.step, device) / 1e6:.0f} |"
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, help="8 on a CPU, 64 on a GPU by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--jobs", nargs="+", default=["full", "tutorial"])
    parser.add_argument("--candidates", nargs="+", help="names as in the table; all by default")
    args = parser.parse_args()
    if args.candidates and "vggtorch" not in args.candidates:
        parser.error("--candidates needs vggtorch, which the others are compared with")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = args.batch or (64 if device.type == "cuda" else 8)
    print(harness.header(device))
    for job, name in itertools.product(args.jobs, args.dtypes):
        dtype = getattr(torch, name)
        found = candidates(job, batch, dtype, device, args.candidates)
        if args.compile:
            found |= compiled(job, batch, dtype, device)
        check(found, TOLERANCE[dtype])
        rows = measure(found, args.repeats, device)
        print(f"\n{job}, batch {batch}, {name}\n")
        print("| | ms | quartiles | times ours | peak MB |\n|-|-|-|-|-|")
        print("\n".join(rows), flush=True)
        found.clear()  # before the next networks take as much memory


if __name__ == "__main__":
    main()
